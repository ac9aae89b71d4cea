"""The CUDA backend against the reference where streams are stored in fewer bits: run by
test_cuda.py, as cuda_simulator.py is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from cases import STORED, bfloat16, nonzero, same_bits, special_values
from cuda_simulator import (  # noqa: F401
    BESIDE,
    BY_ID,
    FEW,
    MEASURED,
    Foreign,
    cases,
    chunks,
    differing,
    drawn,
    in_simulator,
    on_device,
    quick_simulator,
    rewritten,
    run_beside,
    run_sums,
    small_chunks,
    taken,
    unlike,
)
from numba import cuda

import fastopt
from fastopt.backends import (
    cuda_boards,
    cuda_driver,
    cuda_jobs,
    cuda_kernels,
    cuda_runner,
    cuda_sums,
    cuda_table,
    numpy_ref,
)
from fastopt.memory import factored
from fastopt.memory.arrays import to_host
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Encoded, Segment, encoded
from fastopt.optimizer.state import fill
from fastopt.rules import passes
from fastopt.step import Request, limits

DTYPES = {"bf16": bfloat16, "fp16": np.float16}

every_pair = pytest.mark.parametrize("stored", STORED)
each_format = pytest.mark.parametrize("name", sorted(DTYPES))
# Every rule, and every pair of dtypes with every fourth of them.
ROTATED = [
    pytest.param(*case, *pair, id=f"{name}-{stored}")
    for (name, case), (stored, pair) in zip(
        BY_ID.items(), itertools.cycle(STORED.items()), strict=False
    )
]


@pytest.mark.parametrize(("rule", "values", "dtype", "of_grads"), ROTATED)
def test_same_bits(rule, values, dtype, of_grads):
    for size, offset in ((7, 1), (65, 0)):
        case = rule, values, size, dtype, offset, 5
        assert not differing(*case, of_grads=of_grads), (size, offset)


@cases("adamw", "users")
@every_pair
def test_same_bits_for_every_size(rule, values, stored):
    """From every place between two boundaries of 16 bytes."""
    dtype, of_grads = STORED[stored]
    for size, offset in itertools.product((0, 1, 3, 4, 5, 8), range(9)):
        case = rule, values, size, dtype, offset, 2
        assert not differing(*case, of_grads=of_grads), (size, offset)


@pytest.mark.parametrize(("rule", "values", "dtype", "of_grads"), ROTATED)
def test_beside_the_rule(rule, values, dtype, of_grads):
    assert not unlike(run_beside(rule, values, dtype, of_grads=of_grads))


@cases(*MEASURED)
def test_sums(rule, values, small_chunks):  # noqa: F811
    sizes = chunks((2, 33), (0, 0), (0, 5), (1, 1), (0, 9))
    kinds = STORED["bf16"] if rule.over == "all" else STORED["fp16, float32 gradients"]
    assert not unlike(run_sums(rule, values, kinds[0], sizes, kinds[1]))
    assert not unlike(run_beside(rule, values, kinds[0], sizes[:2], 2, kinds[1]))


@cases("adamw", "sgd-momentum-nesterov", "lamb")
@each_format
def test_special_values(rule, values, name):
    """Of float32 in the gradients, too: of those that the format rounds to zero or to
    infinity."""
    pairs = [special_values(DTYPES[name]), special_values(np.float32)]
    kinds = DTYPES[name], np.float32

    def run(backend, put):
        params = [put(p.astype(kinds[0])) for p, _ in pairs]
        opt = rule(params, backend=backend, **values)
        for scale in (1, -0.5, 1):
            opt.step([put(g) for _, g in pairs], grad_scale=scale)
        return opt, params

    assert not unlike(run)


def ours(array):
    """The backend's array, which shares a device array's memory or has a host array's
    numbers."""
    there = cuda.to_device(array) if isinstance(array, np.ndarray) else array
    return cuda_driver.as_array("an array", there)


def copied(grad, param):
    """Write what a kernel makes of 0 + g."""
    step = cuda_driver.OnDevice(passes.accumulate, [Segment(param, (), 0)], [0])
    step.take([grad])
    step([(1.0,)])


def miscoded(name, every=1):
    """Which of decoding and encoding is wrong: of words, and of numbers with all these
    upper halves and some lower half."""
    format, oracle, rng = FORMATS[name], DTYPES[name], np.random.default_rng(0)
    upper = np.arange(0, 1 << 16, every, dtype=np.uint32)
    words = upper.astype(format.stored)
    low = rng.integers(0, 1 << 16, words.size, np.uint32)
    low[::3] = 0x1000 << rng.integers(0, 4, low[::3].size, np.uint32)  # ties
    numbers = (upper << np.uint32(16) | low).view(np.float32)
    sums = ours(np.zeros(words.size, np.float32))
    rounded = ours(np.zeros(words.size, format.stored))
    with np.errstate(all="ignore"):
        copied(Encoded(format, (ours(words),)), sums)
        copied(ours(numbers), Encoded(format, (rounded,)))
        exact = words.view(oracle).astype(np.float32) + np.float32(0)
        nearest = (numbers + np.float32(0)).astype(oracle)
    wrong = [] if same_bits(sums.copy_to_host(), exact) else ["decoded"]
    same = same_bits(rounded.copy_to_host().view(oracle), nearest)
    return wrong if same else [*wrong, "encoded"]


@each_format
def test_words_and_numbers_of_every_size(name):
    """All words on a GPU; in the simulator every fifth, which takes two seconds."""
    assert not miscoded(name, every=5 if cuda_kernels.SIMULATED else 1)


@cases("adamw", "lamb", "amsgradw")
def test_state_that_is_encoded(rule, values):
    """In formats that nothing is drawn for, of all kinds."""
    kinds = [np.float16, bfloat16, np.float32, bfloat16, np.float16]
    rows = [(0.7, *[0.3 + 0.1 * k for k in range(rule.scalar_count)])]
    request = Request(limits=limits(0.5), zero_grads=True, ema_weight=0.25)

    def run(module, put):
        streams = [
            abs(nonzero(np.random.default_rng(k), 37, np.float32)).astype(kind)
            for k, kind in enumerate(kinds[: 2 + len(rule.state)])
        ]
        grad, param, *state = (put(s) for s in streams)
        average = put(np.ones(37, np.float32))
        given = encoded(param), tuple(map(encoded, state)), 0, average
        runner = module.OnDevice if module is cuda_driver else module.Step
        step = runner(rule, [Segment(*given)], np.zeros(1, np.int64))
        step.take([grad])
        sums = np.array(step.sums("rule", rows, request)) if rule.measure else average
        step(rows, request)
        return [to_host(a) for a in (grad, param, *state, average, sums)]

    found = run(cuda_driver, lambda a: ours(on_device(a, 0)[0]))
    assert all(map(same_bits, found, run(numpy_ref, np.copy)))
    assert not found[0].any()


@pytest.mark.parametrize("clip_value", [None, 0.3])
def test_state_that_is_factored(monkeypatch, clip_value):
    if cuda_kernels.SIMULATED:
        for module in (factored, cuda_kernels, cuda_sums):
            monkeypatch.setattr(module, "TILE_ROWS", 16)
            monkeypatch.setattr(module, "TILE_COLUMNS", 64)
    shapes = [(7,), (3, 5), (2, 3, 4), (70, 80), (0, 3)]
    kinds = bfloat16, np.float16, np.float32, bfloat16, bfloat16

    def made(seed, put, kinds):
        arrays = zip(drawn(seed, map(math.prod, shapes)), shapes, kinds, strict=True)
        return [put(a.astype(t).reshape(s), 1) for a, s, t in arrays]

    def run(backend, put):
        params = made(0, put, kinds)
        opt = fastopt.Adafactor(params, backend=backend, lr=0.1, eps1=1e-3, ema=0.9)
        for k in range(3):
            grads = made(1 + k, put, kinds[-k:] + kinds[:-k])
            opt.step(grads, clip_value=clip_value, clip_norm=2.0, zero_grads=True)
            assert not any(to_host(g).any() for g in grads)
        tasks = [made(9, put, kinds), made(10, put, kinds[::-1])]
        opt.step(tasks, weights=[1.5, -0.5], clip_value=clip_value)
        return opt, params

    assert not unlike(run)


KINDS = (bfloat16, np.float32, np.float16, bfloat16)


def mixed(seed, put, turn=0):
    """Arrays of all dtypes."""
    arrays = enumerate(drawn(seed, (65, 7, 0, 33)))
    return [put(a.astype(KINDS[(i + turn) % 4]), i % 2) for i, a in arrays]


@cases(*FEW, "lamb", "prodigy")
def test_several_tasks_and_parts(rule, values):
    """Whose gradients have other dtypes than the parameters."""

    def run(backend, put):
        params = mixed(0, put)
        opt = rule(params, backend=backend, ema=0.5, **values)
        given = []
        for k in range(2):
            tasks = [mixed(3 * k + t, put, k + t) for t in range(3)]
            tasks[k][0] = tasks[2][2] = None
            opt.step(tasks, weights=[0.7, 0.0, -1.9], grad_scale=0.7, **BESIDE)
            opt.accumulate(mixed(20 + k, put, k), grad_scale=0.5)
            opt.accumulate(mixed(30 + k, put, k + 1))
            opt.step(clip_norm=1.0)
            given += tasks
        return opt, {"params": params, "given": given}

    assert not unlike(run)


@cases("schedule_free_adamw", "sophia_g", "prodigy")
def test_what_begins_with_parameters_or_replaces_them(rule, values):
    """State, estimates, and parameters to evaluate, in and out of a saved state."""

    def run(backend, put):
        params = mixed(0, put)
        opt = rule(params, backend=backend, **values)
        for k in range(3):
            opt.step(mixed(1 + k, put, k))
            if rule.estimate:
                opt.estimate(mixed(10 + k, put, k + 1), grad_scale=0.3)
        again = rule(params, backend=backend, **values)
        again.load_state_dict(opt.state_dict())
        again.step(mixed(9, put))
        used = again.eval_params() if rule.evaluate else []
        assert all(a.dtype == b.dtype for a, b in zip(used, params, strict=False))
        return again, {"params": params, "used": used}

    assert not unlike(run)


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_lookahead(name):
    def run(backend, put):
        params = mixed(0, put)
        inner = getattr(fastopt, name)(params, lr=0.1, backend=backend, ema=0.5)
        opt = fastopt.Lookahead(inner, k=2, alpha=0.3)
        for k in range(5):
            opt.step(mixed(1 + k, put, k), clip_norm=2.0)
        return opt, params

    assert not unlike(run)


def test_muon():
    def run(backend, put):
        shapes = {"wide": (5, 9), "tall": (9, 4), "b": (7,), "none": (0,)}

        def made(seed):
            flat = drawn(seed, map(math.prod, shapes.values()), bfloat16)
            pairs = zip(shapes.items(), flat, strict=True)
            return {name: put(a.reshape(shape)) for (name, shape), a in pairs}

        params = made(0)
        opt = fastopt.Muon(params, backend=backend, lr=0.1, adamw_lr=0.05)
        given = [made(1), {**made(2), "tall": None}]
        for grads in given:
            opt.step(grads, grad_scale=0.7, **BESIDE)
        return opt, {"params": params, "grads": given}

    assert not unlike(run)


def test_gradients_that_are_not_finite_are_zeroed():
    def run(backend, put):
        params = mixed(0, put)
        opt = fastopt.adamw(params, lr=0.1, backend=backend)
        grads = [np.full(g.size, np.inf, g.dtype) for g in map(to_host, params)]
        grads = list(map(put, grads))
        opt.step(grads, nonfinite="skip", zero_grads=True)
        assert opt.skipped == 1 and not any(to_host(g).any() for g in grads)
        return opt, {"params": params, "grads": grads}

    assert not unlike(run)


def test_device_arrays_of_different_dtypes_are_filled():
    """Between each two dtypes, from the device and from host memory."""
    for of, to in itertools.product((bfloat16, np.float16, np.float32), repeat=2):
        (values,) = drawn(0, (37,), of)
        values[:3] = -0.0, np.inf, np.nan
        expected = values.astype(np.float32).astype(to)
        for source in (values, cuda.to_device(values)):
            target, whole = on_device(np.zeros(37, to), 1)
            fill(target, source)
            assert same_bits(target.copy_to_host(), expected)
            assert whole.copy_to_host()[[0, -1]].tolist() == [7, 7]
        fill(target, 0.0)
        assert not target.copy_to_host().any()


@in_simulator
def test_arrays_of_other_libraries(monkeypatch):
    """The interface does not name bfloat16."""
    monkeypatch.setattr(cuda, "as_cuda_array", taken, raising=False)
    rng = np.random.default_rng(0)
    cpu, gpu = (nonzero(np.random.default_rng(0), 33, bfloat16) for _ in range(2))
    opt = fastopt.adamw(Foreign(gpu))
    reference = fastopt.adamw(cpu, backend="numpy")
    assert opt.backend == "cuda"
    for kind in (bfloat16, np.float32, np.float16):
        grad = nonzero(rng, 33, kind)
        reference.step(grad)
        opt.step(Foreign(grad))
    assert same_bits(gpu, cpu)


def widths(monkeypatch, dtype, of_grads, of_param, of_grad=None):
    """How many elements at a time a step moves, for arrays that begin at these
    elements. The gradient's place is the parameter's, if it is not given."""
    found = set()
    update_of = cuda_kernels.update_of

    def noted(*of):
        update = update_of(*of)

        def function(*given):
            found.add(of[-1])
            return update(*given)

        return function

    with monkeypatch.context() as patch:
        patch.setattr(cuda_kernels, "update_of", noted)
        cuda_jobs.loaded.cache_clear()
        size = 4 * cuda_table.BLOCK  # a whole block, whose end is no other's
        param = on_device(np.ones(size, dtype), of_param)[0]
        place = of_param if of_grad is None else of_grad
        grad = on_device(np.ones(size, of_grads), place)[0]
        fastopt.adamw(param).step(grad)
    cuda_jobs.loaded.cache_clear()
    (width,) = found
    return width


@in_simulator
def test_vectors_are_as_wide_as_each_stream_is_aligned(monkeypatch):
    """A vector of 16 bits begins at 8 bytes."""
    assert widths(monkeypatch, bfloat16, bfloat16, 0) == 4
    assert widths(monkeypatch, bfloat16, bfloat16, 4) == 4
    assert widths(monkeypatch, np.float16, np.float16, 12) == 4
    assert widths(monkeypatch, bfloat16, np.float32, 4) == 4
    for offset in (1, 2, 3, 5, 6):
        assert widths(monkeypatch, bfloat16, bfloat16, offset) == 1
        assert widths(monkeypatch, np.float32, bfloat16, offset) == 1
        # Either alone, which the table says of one and the kernel finds of the other.
        assert widths(monkeypatch, bfloat16, bfloat16, offset, 0) == 1
        assert widths(monkeypatch, bfloat16, bfloat16, 0, offset) == 1
    assert widths(monkeypatch, np.float32, np.float32, 4, 8) == 4
    assert widths(monkeypatch, np.float32, np.float32, 4, 2) == 1


@in_simulator
def test_a_step_makes_no_copies(monkeypatch):
    """Nothing is allocated on the device."""
    param, grad = (on_device(a, 0)[0] for a in drawn(0, (4097, 4097), bfloat16))
    opt = fastopt.adamw(param)
    asked = [{"clip_value": 0.1, "zero_grads": True}, {"clip_norm": 1.0}]
    opt.step(grad)
    for one in asked:
        opt.step(grad, **one)
    monkeypatch.setattr(cuda_runner.device, "Memory", None)
    monkeypatch.setattr(cuda_runner.device, "Board", None)
    for one in ({}, *asked):
        opt.step(grad, **one)
    with pytest.raises(TypeError, match="not callable"):  # so it would be noticed
        opt.step(grad, clip_value=0.2, zero_grads=False)


# That these tests can fail


MUTANTS = {
    "rounding towards zero": (r"encode_bf16\((\w+)\)", r"bits(\1) >> 16"),
    "parameters decoded as float16": (r"decode_bf16", "decode_fp16"),
    "words taken for numbers": (r"decode_\w+\((\w+)\)", r"type(zero)(\1.array)"),
    "an average of what was rounded": (
        r"average\((\w+), (\w+)",
        r"average(\1, decode_bf16(encode_bf16(\2))",
    ),
    "no zeros": (r"store\(grad.*", "pass"),
}


def mutated(monkeypatch, pattern, new):
    """Rewrite the kernels that are generated from here on."""
    names_of, compiled = cuda_kernels.names_of, rewritten(pattern, new)

    def with_all(element, dtype, formats, width):  # so that there is what mutants call
        more = *formats, *(FORMATS[k] for k in sorted(DTYPES))
        return names_of(element, dtype, more, width)

    def with_words(lines, names):
        head, *body = lines
        more = (
            "    from fastopt.rule import bits, real, word",
            "    HALF = word(0x8000)",
        )
        return compiled([head, *more, *body], names)

    monkeypatch.setattr(cuda_kernels, "names_of", with_all)
    monkeypatch.setattr(cuda_kernels, "compiled", with_words)
    cuda_jobs.loaded.cache_clear()


@in_simulator
@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_wrong_is_noticed(monkeypatch, mutant):
    run = run_beside(*BY_ID["adamw"], bfloat16)
    assert not unlike(run)
    mutated(monkeypatch, *MUTANTS[mutant])
    assert unlike(run)


@in_simulator
def test_ties_that_are_rounded_away_from_zero_are_noticed(monkeypatch):
    assert not miscoded("bf16", every=64)
    new = r"bits(real(bits(\1) + HALF)) >> 16"
    mutated(monkeypatch, r"encode_bf16\((\w+)\)", new)
    assert miscoded("bf16", every=64) == ["encoded"]


@in_simulator
def test_the_formats_of_other_streams_are_noticed(monkeypatch):
    """As if words of bfloat16 were of float16."""
    swapped = {FORMATS["bf16"]: FORMATS["fp16"]}
    prepared = cuda_boards.table_of

    def turned(segments, grads, *of):
        return prepared(segments, [swapped.get(f, f) for f in grads], *of)

    run = run_beside(*BY_ID["lamb"], np.float32, of_grads=bfloat16)
    assert not unlike(run)
    monkeypatch.setattr(cuda_boards, "table_of", turned)
    assert unlike(run)
