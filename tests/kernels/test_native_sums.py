"""A step in two calls of native code: sums, and a step with those of all processes."""

import numpy as np
import pytest
from cases import CASES, IDS, bfloat16, nonzero, same_bits
from native_code import BAD_ARGUMENT, OK, StreamOptimizer, variant_name

import fastopt
from fastopt.backends import cython_cpu

if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

SUMMED = [(r, v) for r, v in CASES if r.settle is not None and not r.factored]
SIZES = [9001, 1, 0, 307]
of_summed = pytest.mark.parametrize(
    "rule, values",
    SUMMED,
    ids=[IDS[k] for k, case in enumerate(CASES) if case in SUMMED],
)


def arrays(seed, dtype, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return [nonzero(rng, size, np.float64).astype(dtype) for size in sizes]


def made(rule, values, params):
    opt = StreamOptimizer(variant_name(rule, values), params, values)
    assert opt.start() == OK
    return opt


@pytest.mark.parametrize("dtype", [np.float32, np.float64, bfloat16])
@of_summed
def test_one_process_has_the_bits_of_a_step(rule, values, dtype):
    """Also where a segment has no gradient, and with threads."""
    ours, whole = (made(rule, values, arrays(0, dtype)) for _ in range(2))
    for k in range(3):
        grads = [*arrays(1 + k, dtype)[:3], None]
        before = [a.copy() for a in (*ours.everything(), ours.carry)]
        code, sums = ours.sums(grads, 0.5, threads=2)
        assert code == OK and sums[:, 0].tolist() == [9001, 1, 0, 0]
        assert all(map(same_bits, before, (*ours.everything(), ours.carry)))
        assert ours.step_with_sums(grads, sums[None], 0.5, threads=2) == OK
        assert whole.step(grads, 0.5, threads=1) == OK
        assert all(map(same_bits, ours.everything(), whole.everything()))
        assert same_bits(ours.carry, whole.carry)


@of_summed
def test_three_processes_have_parts_of_each_array(rule, values):
    """One part is empty. The last array is whole in all, and counted once."""
    cuts = [(0, 4000), (4000, 4000), (4000, 9001)]

    def part(of, k):
        return [of[0][slice(*cuts[k])].copy(), of[3].copy()]

    start = arrays(0, np.float64)
    parts = [made(rule, values, part(start, k)) for k in range(3)]
    whole = made(rule, values, [start[0].copy(), start[3].copy()])
    for k in range(3):
        grads = arrays(1 + k, np.float64)
        sums = np.array([p.sums(part(grads, i))[1] for i, p in enumerate(parts)])
        sums[1:, 1] = 0
        for i, p in enumerate(parts):
            assert p.step_with_sums(part(grads, i), sums) == OK
        assert whole.step([grads[0], grads[3]], threads=1) == OK
    for p in parts[1:]:
        assert same_bits(p.carry, parts[0].carry)
        assert same_bits(p.params[1], parts[0].params[1])
    joined = np.concatenate([p.params[0] for p in parts])
    np.testing.assert_allclose(joined, whole.params[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(parts[0].carry, whole.carry, rtol=1e-12)


def test_sums_may_be_of_arrays_that_share_memory():
    """As XLA gives them, where it knows two to be equal: nothing is written."""
    opt = made(fastopt.lamb, fastopt.lamb.hyperparameters, arrays(0, np.float32, [9]))
    (p,) = opt.params
    opt.state = [[p, p]]
    code, sums = opt.sums([p])
    assert code == OK
    np.testing.assert_allclose(sums[0, 1], np.sum(p.astype(float) ** 2), rtol=1e-14)


def test_what_is_refused():
    values = fastopt.dog.hyperparameters
    opt = made(fastopt.dog, values, arrays(0, np.float32))
    grads = arrays(1, np.float32)
    _, sums = opt.sums(grads)
    given = sums[None]
    before = [a.copy() for a in (*opt.everything(), opt.carry)]
    for number in (np.nan, np.inf, -1.0, 9000.0, 2.0**54):
        bad = given.copy()
        bad[0, 0, 0] = number
        assert opt.step_with_sums(grads, bad) == BAD_ARGUMENT
    assert opt.step_with_sums(grads, given[:0]) == BAD_ARGUMENT  # of no process
    for code in (
        opt.step_with_sums(grads, given, clip_norm=1.0),
        opt.step_with_sums(grads, given, np.inf),
        opt.sums(grads, clip_norm=1.0)[0],
        opt.sums(grads, np.nan)[0],
    ):
        assert code == BAD_ARGUMENT
    assert all(map(same_bits, before, (*opt.everything(), opt.carry)))
    assert opt.step_with_sums(grads, given) == OK
    plain = made(fastopt.adamw, fastopt.adamw.hyperparameters, arrays(0, np.float32))
    assert plain.rule.contents.sum_count == 0
    code, found = plain.sums(grads)
    assert code == BAD_ARGUMENT
    assert plain.step_with_sums(grads, np.ones((1, 4, 1))) == BAD_ARGUMENT


def test_the_table_says_how_many_sums():
    for name in ("lamb", "dog", "prodigy", "novograd", "adamw"):
        opt = made(r := getattr(fastopt, name), r.hyperparameters, [np.ones(1, "f")])
        assert opt.rule.contents.sum_count == r.terms
