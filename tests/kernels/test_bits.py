"""The promise: every backend, instruction set, thread count and layout, the same bits.

The reference is the NumPy backend; the CUDA kernels are held to it in test_cuda.py.
"""

import functools

import numpy as np
import pytest
from cases import (
    CASES,
    DTYPES,
    IDS,
    STORED,
    nonzero,
    odd_view,
    same_bits,
    special_values,
)
from installed import BACKENDS, NUMBA

import fastopt
from fastopt import backends
from fastopt.backends import cython_cpu, numpy_ref
from fastopt.memory.order import CHUNK, SPAN
from fastopt.portable import portable

SIZES = (0, 1, 7, 63, 64, 65, 4097, 40_003)  # from 32 Ki elements on, threads share
LARGE = 1_000_003
THREADS = (1, 2, 3, 8)
STEPS = 10


@functools.lru_cache(maxsize=4)
def gradients(size, dtype):
    rng = np.random.default_rng(size)
    return [nonzero(rng, size, dtype) for _ in range(STEPS)]


def run(rule, values, size, dtype, layout, backend, threads=1, of_grads=None):
    """Ten steps; the parameters and the state, in one list of arrays."""
    start = nonzero(np.random.default_rng(1 + size), size, dtype)
    if layout == "aligned":
        params, places = [start.copy()], [0]
    else:  # three segments; the state of the later ones starts misaligned too
        params = [odd_view(start, 1), odd_view(start[:3], 0), odd_view(start, 3)]
        places = [3, 1, 1]
    opt = rule(params, backend=backend, threads=threads, **values)
    for grad in gradients(size, of_grads or dtype):
        grads = [
            odd_view(grad[: param.size], offset)
            for param, offset in zip(params, places, strict=True)
        ]
        opt.step(grads, grad_scale=0.7)
    return params + [array for arrays in opt.state.values() for array in arrays]


def differing(expected, got):
    return [
        i
        for i, (a, b) in enumerate(zip(expected, got, strict=True))
        if not same_bits(a, b)
    ]


def compiled_isas():
    if cython_cpu.missing():
        return []
    return cython_cpu.driver().cpu_supports()


def summed(backend, size):
    """The norm of gradients of which the first array has several spans of chunks."""
    rng = np.random.default_rng(5)
    grads = [nonzero(rng, n, np.float32) for n in (size, 9)]
    opt = fastopt.gd([np.zeros_like(g) for g in grads], lr=0.1, backend=backend)
    opt.step(grads, clip_norm=1.0)
    return opt.grad_norm


@pytest.mark.parametrize("many", [1, 2.5])
def test_sums_over_spans_of_chunks(many, monkeypatch):
    """An order of its own, but only where there are more chunks than fit a span."""
    size = int(many * SPAN * CHUNK)
    expected = summed("numpy", size)
    for backend in BACKENDS:
        assert summed(backend, size) == expected
    monkeypatch.setattr(numpy_ref, "SPAN", 10 * SPAN)
    assert (summed("numpy", size) == expected) == (many == 1)


@pytest.fixture
def on_isa(monkeypatch):
    def use(isa):
        monkeypatch.setattr(cython_cpu, "kernels", lambda: cython_cpu.extension(isa))

    return use


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_same_bits(rule, values, dtype, size, on_isa):
    compare(rule, values, dtype, size, on_isa)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_same_bits_of_stored(rule, values, stored, on_isa):
    """Parameters and gradients that are decoded and encoded block by block."""
    dtype, of_grads = STORED[stored]
    for size, threads in ((65, 1), (4097, 2), (40_003, 3)):
        case = (rule, values, size, dtype, "odd")
        expected = run(*case, "numpy", 1, of_grads)
        for isa in compiled_isas():
            on_isa(isa)
            got = run(*case, "cython", threads, of_grads)
            assert not differing(expected, got), (size, isa)
        if NUMBA:
            got = run(*case, "numba", threads, of_grads)
            assert not differing(expected, got), (size, "numba")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "prodigy"])
def test_same_bits_of_many(name, dtype, on_isa):
    rule, values = next(case for case in CASES if case[0].name == name)
    compare(rule, values, dtype, LARGE, on_isa)


BATCHES = {
    "lamb": fastopt.lamb,
    "adafactor": fastopt.Adafactor,
    "novograd": fastopt.novograd,
    # LAMB's sums, and another update, whose first pass is not LAMB's.
    "mixed": fastopt.Rule(
        fastopt.cautious_adamw.update,
        fastopt.lamb.scalars,
        state=("m", "v"),
        measure=fastopt.lamb.measure,
        settle=fastopt.lamb.settle,
        name="mixed",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "beside",
    [{}, {"clip_norm": 30.0, "clip_value": 0.05}, {"zero_grads": True}],
    ids=["plain", "clipped", "zeroed"],
)
@pytest.mark.parametrize("name", BATCHES)
def test_same_bits_of_batches(name, beside, dtype, monkeypatch):
    """Segments whose sums are taken together, in their cases: several in a batch, one
    that is more than a batch, what is just kept from sums to update and what is too
    much, none with a gradient, an empty one."""
    rng = np.random.default_rng(0)
    shapes = [333_333, 0, 5, 2_097_152 if dtype == np.float32 else 1_048_576]
    shapes += [70_001, 1, (9, 100, 1000), (77, 33), 2_500_000]
    start = [nonzero(rng, int(np.prod(n)), dtype).reshape(n) for n in shapes]

    def run(backend, threads):
        params = [p.copy() for p in start]
        opt = BATCHES[name](params, backend=backend, threads=threads, ema=0.9)
        for step in range(2):
            grads = [p * dtype(0.5 + step) for p in start]
            if step:
                grads[4] = None
            opt.step(grads, **beside)
        given = [grad for grad in grads if grad is not None]
        averages, carried = opt.ema_params, opt._bound.program.carried
        return [*params, *given, *averages, *state_of(opt), carried]

    expected = run("numpy", 1)
    if NUMBA:
        assert not differing(expected, run("numba", 2))
    for last_cache in (0, 8 << 20) if compiled_isas() else ():
        monkeypatch.setattr(cython_cpu, "last_cache", lambda size=last_cache: size)
        for threads in (1, 2, 3):
            got = run("cython", threads)
            assert not differing(expected, got), (last_cache, threads)


def state_of(opt):
    """All arrays of a state, those of rows and columns, too."""
    entries = [entry for entries in opt.state.values() for entry in entries]
    return [a for e in entries for a in (e if isinstance(e, tuple) else (e,))]


def test_same_bits_of_batches_of_tasks(monkeypatch):
    """The gradients of several tasks, combined in the pass of the sums."""
    monkeypatch.setattr(cython_cpu, "last_cache", lambda: 0)
    rng, found = np.random.default_rng(0), []
    start = [nonzero(rng, n, np.float32) for n in (900_000, 333, 1_100_000, 70_001)]
    for backend in BACKENDS:
        params = [p.copy() for p in start]
        opt = fastopt.lamb(params, backend=backend, threads=2)
        for step in range(2):
            tasks = [[p * np.float32(k + step) for p in start] for k in (0.5, -0.2)]
            tasks[0][1] = None
            opt.step(tasks, weights=[0.3, 0.8])
        found.append([*params, *state_of(opt)])
    for got in found[1:]:
        assert not differing(found[0], got)


def compare(rule, values, dtype, size, on_isa):
    layouts = ("aligned", "odd") if size <= 4097 else ("odd",)
    for layout in layouts:
        case = (rule, values, size, dtype, layout)
        expected = run(*case, "numpy")
        assert size == 0 or np.all(np.isfinite(expected[0]))
        for isa in compiled_isas():
            on_isa(isa)
            for threads in THREADS:
                got = run(*case, "cython", threads)
                assert not differing(expected, got), (layout, isa, threads)
        for threads in THREADS if NUMBA else ():
            got = run(*case, "numba", threads)
            assert not differing(expected, got), (layout, "numba", threads)


def test_a_mutant_is_caught(monkeypatch):
    """Swapped betas, and a kernel that forgets its last element."""
    rule, values = next(case for case in CASES if case[0].name == "adamw")
    expected = run(rule, values, 65, np.float32, "aligned", "cython")

    @functools.wraps(rule.scalars)
    def swapped(t, lr, beta1, beta2, eps, weight_decay):
        return rule.scalars(t, lr, beta2, beta1, eps, weight_decay)

    mutant = fastopt.Rule(rule.update, swapped, state=rule.state)
    assert differing(expected, run(mutant, values, 65, np.float32, "aligned", "numpy"))

    bind = numpy_ref.bind

    def without_tail(rule, segments, *rest):
        shorter = [
            segment._replace(
                param=segment.param[:-1], state=tuple(s[:-1] for s in segment.state)
            )
            for segment in segments
        ]
        step = bind(rule, shorter, *rest)
        take = step.take
        step.take = lambda grads, *more: take([g[:-1] for g in grads], *more)
        return step

    monkeypatch.setattr(numpy_ref, "bind", without_tail)
    assert differing(expected, run(rule, values, 65, np.float32, "aligned", "numpy"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_special_values_give_the_same_bits(rule, values, dtype, on_isa):
    p, g = special_values(dtype)

    def after(backend):
        param = p.copy()
        opt = rule(param, backend=backend, **values)
        for scale in (1, -0.5, 1):
            opt.step(g * dtype(scale))
        return [param, *(arrays[0] for arrays in opt.state.values())]

    with np.errstate(all="ignore"):
        expected = after("numpy")
        for isa in compiled_isas():
            on_isa(isa)
            assert not differing(expected, after("cython")), isa
        if NUMBA:
            assert not differing(expected, after("numba"))


@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_a_variant_with_more_state_gives_the_same_bits(rule, values):
    """What lets a switch be flipped during a run: with it off, more state changes
    nothing. (Groups that differ in a switch share one kernel.)"""
    if not rule.variants:
        pytest.skip("the rule has no variants")
    size, dtype = 65, np.float32
    off = {name: values[name] for name in values}
    everything = max(rule.variants, key=len)
    on = {
        name: True if isinstance(rule.hyperparameters[name], bool) else 0.5
        for name in everything
    }
    start = nonzero(np.random.default_rng(0), size, dtype)
    alone, first, second = start.copy(), start.copy(), start.copy()
    opt = rule(alone, **off)
    both = rule([{"params": first}, {"params": second, **on}], **off)
    for grad in gradients(size, dtype):
        opt.step(grad)
        both.step([grad, grad])
    assert same_bits(alone, first)
    assert off == {**off, **on} or not same_bits(first, second)


def refuse(*given):
    raise AssertionError(f"left to Python: {given}")


@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_compiled_scalars_are_the_rules_own(rule, values):
    """Their bits, for ordinary and extreme numbers, and their errors."""
    if cython_cpu.missing():
        pytest.skip(f"cython backend: {cython_cpu.missing()}")
    rng = np.random.default_rng(0)
    name = cython_cpu.SCALARS[rule.scalars]
    # Only errors may come from the rule's own function.
    alone = cython_cpu.driver().Scalars(refuse, name)
    for t in [1, 2, 3, 1000, 10**6, 10**9, *rng.integers(1, 5000, 200).tolist()]:
        given = [
            value if isinstance(value, bool) else value * rng.uniform(0.5, 1)
            for value in (rule.hyperparameters | values).values()
        ]
        given = [*rng.uniform(0.5, 1, len(rule.carry)).tolist(), *given]
        try:
            expected = portable(rule.scalars)(t, *given)
        except ValueError as error:  # what is drawn is not always legal
            with pytest.raises(ValueError) as raised:
                cython_cpu.compiled(rule.scalars)(t, *given)
            assert str(raised.value) == str(error)
            with pytest.raises(AssertionError, match="left to Python"):
                alone(t, *given)
            continue
        found = alone(t, *given)
        assert found == expected, (t, given)
        assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    "rule", [r for r in fastopt.RULES if r.settle], ids=lambda rule: rule.name
)
def test_compiled_settles_are_the_rules_own(rule):
    """Their bits, and no error, whatever the sums: some arrays are updated by then."""
    if cython_cpu.missing():
        pytest.skip(f"cython backend: {cython_cpu.missing()}")
    compiled = cython_cpu.driver().Scalars(refuse, cython_cpu.SCALARS[rule.settle])
    rng = np.random.default_rng(0)
    sums = [0.0, 1e-320, 1e-30, 1.0, 1e300, np.inf, np.nan]
    for draw in range(500):
        carry = rule.first_carry(rule.hyperparameters)
        if draw % 2:
            carry = rng.uniform(0, 1, len(carry)).tolist()
        given = rule.scalars(1 + draw % 7, *carry, *rule.hyperparameters.values())
        given = given[len(given) - rule.settle_count :]
        given = [draw % 7 + 1, 3.0, *rng.choice(sums, rule.terms).tolist(), *given]
        expected, found = portable(rule.settle)(*given), compiled(*given)
        np.testing.assert_array_equal(np.array(found), np.array(expected), str(given))


def test_compiled_scalars_refuse_what_the_rules_do():
    if cython_cpu.missing():
        pytest.skip(f"cython backend: {cython_cpu.missing()}")
    sgd, adam = map(cython_cpu.compiled, (fastopt.sgd.scalars, fastopt.adam.scalars))
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        sgd(1, 0.1, 0.0, 0.0, 0.0, True)
    for scalars in (adam, fastopt.adam.scalars):
        with pytest.raises(ZeroDivisionError):
            scalars(1, 0.1, 1.0, 0.9, 1e-8, 0.0)


def test_every_instruction_set_of_this_cpu_is_built():
    """Otherwise the matrix above would say less than it seems to."""
    if cython_cpu.missing():
        pytest.skip(f"cython backend: {cython_cpu.missing()}")
    for isa in compiled_isas():
        assert cython_cpu.extension(isa).ISA == isa


def test_backends_are_all_here():
    for name in ("numpy", "cython", *(["numba"] if NUMBA else [])):
        assert backends.load(name)
