"""Formats of stored numbers: their codecs against oracles, and what steps make of them.

That every rule has the same bits on every backend for them is in test_bits.py.
"""

import itertools
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, IDS, bfloat16, nonzero, same_bits
from installed import BACKENDS, NUMBA, needs_numba, numba_cpu

import fastopt
from fastopt import backends
from fastopt.backends import cython_cpu
from fastopt.memory import formats
from fastopt.memory.formats import FORMATS, format_of
from fastopt.memory.segments import Encoded, Segment
from fastopt.optimizer.formats import EIGHT_BITS
from fastopt.rule import word
from fastopt.rules import passes
from fastopt.runtime.atomic import uninterrupted
from fastopt.step import Key, Program, Request, execute

# An independent implementation of each format: NumPy's own, and ml_dtypes'.
ORACLES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
NEAREST = [k for k, of in FORMATS.items() if not (of.stochastic or of.second)]
WORDS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def equal(words, expected, oracle):
    """Whether words are those expected, or both those of a NaN."""
    nan = np.isnan(expected.astype(np.float32))
    return ((words == expected.view(words.dtype)) & ~nan) | (
        np.isnan(words.view(oracle).astype(np.float32)) & nan
    )


def patterns(low):
    """Float32 numbers with these lower halves and every sign, exponent and upper half
    of the mantissa, one after the other."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    for lower in low:
        yield (upper | np.uint32(lower)).view(np.float32)


def test_every_format_has_an_oracle():
    assert [*ORACLES] == NEAREST
    for name, oracle in ORACLES.items():
        assert format_of(oracle) is FORMATS[name] and FORMATS[name].dtype == oracle
    assert FORMATS["bf16_sr"].dtype == bfloat16
    assert format_of(np.dtype(np.float32)) is None
    assert format_of(np.dtype(np.uint16)) is None


@pytest.mark.parametrize("name", NEAREST)
def test_every_word_is_decoded_exactly(name):
    got = FORMATS[name].read((WORDS,))
    expected = WORDS.view(ORACLES[name]).astype(np.float32)
    assert got.dtype == np.float32 and same_bits(got, expected)


@pytest.mark.parametrize("name", NEAREST)
def test_every_word_is_encoded_as_itself(name):
    format, oracle = FORMATS[name], ORACLES[name]
    assert equal(
        format.written(format.read((WORDS,)))[0], WORDS.view(oracle), oracle
    ).all()


@pytest.mark.parametrize("name", NEAREST)
def test_numbers_are_rounded_to_the_nearest(name):
    """The bits that decide are around the middle between two numbers: for float16 they
    are in every place of the mantissa, as its subnormals have fewer bits."""
    low = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2FFF}
    low |= {0x3000, 0x3001, *np.random.default_rng(0).integers(0, 1 << 16, 30).tolist()}
    format, oracle = FORMATS[name], ORACLES[name]
    for numbers in patterns(sorted(low)):
        with np.errstate(all="ignore"):
            expected = numbers.astype(oracle)
        assert equal(format.written(numbers)[0], expected, oracle).all()


def copied(numbers, format, backend, threads=2):
    """Numbers that a backend's kernels have encoded, and decoded again: 0 + g."""
    zeros = np.zeros(numbers.size, format.stored)
    segment = Segment(Encoded(format, (zeros,)), (), 0)
    program = Program(backends.load(backend), passes.accumulate, [segment])
    assert program.runner.take([numbers])
    request = Request(threads=threads)
    uninterrupted(*execute(program, [Key(1, (), ())], request))
    total = np.zeros(numbers.size, np.float32)
    program = Program(
        backends.load(backend), passes.accumulate, [Segment(total, (), 0)]
    )
    assert program.runner.take([Encoded(format, (zeros,))])
    uninterrupted(*execute(program, [Key(1, (), ())], request))
    return zeros, total


@pytest.mark.slow
@pytest.mark.parametrize("name", NEAREST)
def test_kernels_round_to_the_nearest(name):
    """Every lower half of a float32, each with a 61st of the upper halves."""
    format, oracle = FORMATS[name], ORACLES[name]
    for first in range(0, 1 << 16, 512):
        lower = np.arange(first, first + 512, dtype=np.uint32)[:, None]
        upper = np.arange(0, (1 << 16) - 60, 61, dtype=np.uint32) + lower % 61
        numbers = (upper << np.uint32(16) | lower).ravel().view(np.float32)
        with np.errstate(all="ignore"):
            numbers = numbers + np.float32(0)  # as the kernel does, which adds
            expected = numbers.astype(oracle)
        words, _ = copied(numbers, format, BACKENDS[-1])
        assert equal(words, expected, oracle).all()


@needs_numba
@pytest.mark.parametrize("name", NEAREST)
def test_numbas_own_driver_has_the_bits_of_the_reference(name, monkeypatch):
    monkeypatch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
    format = FORMATS[name]
    (numbers,) = patterns([0x8001])
    expected = copied(numbers, format, "numpy")
    for got, of_numpy in zip(copied(numbers, format, "numba"), expected, strict=True):
        assert got.tobytes() == of_numpy.tobytes()
    param = np.ones(5, bfloat16)
    opt = fastopt.adamw(param, lr=0.1, backend="numba")
    grad = np.full(5, 2, np.float16)
    opt.step(grad, zero_grads=True)
    assert param.tolist() == [0.8984375] * 5 and not grad.any()


@pytest.mark.parametrize("name", NEAREST)
def test_kernels_have_the_bits_of_the_reference(name, monkeypatch):
    format, oracle = FORMATS[name], ORACLES[name]
    numbers = np.concatenate([*patterns([0, 0x1000, 0x7FFF, 0x8000, 0x9001])])
    with np.errstate(all="ignore"):
        numbers = numbers + np.float32(0)  # as the kernel does, which adds
        expected = numbers.astype(oracle)
    isas = [] if cython_cpu.missing() else cython_cpu.driver().cpu_supports()
    cases = [("numpy", None), *(("cython", isa) for isa in isas)]
    cases += [("numba", None)] if NUMBA else []
    for backend, isa in cases:
        if isa:
            extension = cython_cpu.extension(isa)
            monkeypatch.setattr(cython_cpu, "kernels", lambda of=extension: of)
        words, total = copied(numbers, format, backend)
        assert equal(words, expected, oracle).all(), (backend, isa)
        assert same_bits(total, format.read((words,)) + np.float32(0)), (backend, isa)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_parameters_are_what_float32_makes_of_them_rounded(dtype, backend):
    """State is float32, and nothing but the parameters is rounded, once a step."""
    rng = np.random.default_rng(0)
    shapes = {"w": (30, 7), "b": (3,), "none": (0,)}
    params = {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}
    exact = {k: p.astype(np.float32) for k, p in params.items()}
    opt = fastopt.adamw(params, lr=0.1, backend=backend, ema=0.9)
    reference = fastopt.adamw(exact, lr=0.1, backend=backend, ema=0.9)
    for kind in (dtype, np.float32, np.float16, bfloat16):
        grads = {k: rng.normal(size=s).astype(kind) for k, s in shapes.items()}
        full = {k: g.astype(np.float32) for k, g in grads.items()}
        opt.step(grads, clip_norm=1.0, clip_value=0.1, zero_grads=True)
        reference.step(full, clip_norm=1.0, clip_value=0.1)
        assert not any(grad.any() for grad in grads.values())
        for key, param in exact.items():
            assert same_bits(params[key], param.astype(dtype))
            param[...] = param.astype(dtype)
    for name, arrays in opt.state.items():
        for array, other in zip(arrays, reference.state[name], strict=True):
            assert array.dtype == np.float32 and same_bits(array, other)
    for key, average in opt.ema_params.items():
        assert average.dtype == np.float32
        assert same_bits(average, reference.ema_params[key])


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_a_saved_state_goes_on_with_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    start = rng.normal(size=100).astype(dtype)
    grads = [rng.normal(size=100).astype(dtype) for _ in range(6)]
    one, two = start.copy(), start.copy()
    opt = fastopt.adamw(one, lr=0.1)
    for grad in grads:
        opt.step(grad)
    other = fastopt.adamw(two, lr=0.1)
    for grad in grads[:3]:
        other.step(grad)
    resumed = fastopt.adamw(two, lr=0.5)
    resumed.load_state_dict(other.state_dict())
    for grad in grads[3:]:
        resumed.step(grad)
    assert same_bits(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_one_optimizer_may_differ(backend):
    rng = np.random.default_rng(0)
    params = [rng.normal(size=50).astype(t) for t in (np.float32, np.float16, bfloat16)]
    alone = [p.copy() for p in params]
    grads = [rng.normal(size=50).astype(bfloat16) for _ in params]
    fastopt.lamb(params, lr=0.1, backend=backend).step(grads)
    for one, grad, param in zip(alone, grads, params, strict=True):
        fastopt.lamb(one, lr=0.1, backend=backend).step(grad)
        assert same_bits(one, param)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_optimizers_take_them(backend):
    rng = np.random.default_rng(0)
    start, grad = (rng.normal(size=(6, 4)).astype(bfloat16) for _ in range(2))
    for make in (
        fastopt.Adafactor,
        lambda p, **o: fastopt.schedule_free_adamw(p, lr=0.1, **o),
        lambda p, **o: fastopt.Muon(p, lr=0.1, **o),
    ):
        param, exact = start.copy(), start.astype(np.float32)
        make(param, backend=backend).step(grad.copy())
        make(exact, backend=backend).step(grad.astype(np.float32))
        assert same_bits(param, exact.astype(bfloat16))
        assert not same_bits(param, start)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slow_weights_are_of_float32(backend):
    rng = np.random.default_rng(0)
    start, grad = (rng.normal(size=50).astype(bfloat16) for _ in range(2))
    param = start.copy()
    opt = fastopt.Lookahead(fastopt.gd(param, lr=0.1, backend=backend), k=1, alpha=0.25)
    opt.step(grad)
    slow = start.astype(np.float32)
    step = slow - np.float32(0.1) * grad.astype(np.float32)
    slow = slow + np.float32(0.25) * (step.astype(bfloat16).astype(np.float32) - slow)
    assert same_bits(opt.state_dict()["slow"][0], slow)
    assert same_bits(param, slow.astype(bfloat16))


def test_gradients_are_summed_in_float32():
    """256 times 1/256 of a gradient come to it, where bfloat16 would stop at a part."""
    param = np.zeros(3, bfloat16)
    opt = fastopt.gd(param, lr=1.0)
    for _ in range(256):
        opt.accumulate(np.full(3, 1 / 256, bfloat16))
    opt.step()
    assert param.tolist() == [-1.0] * 3


@pytest.mark.parametrize("make", [fastopt.adamw, fastopt.lamb, fastopt.Adafactor])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_several_tasks_may_differ(backend, make):
    """Seven tasks, of which four at a time are decoded."""
    rng = np.random.default_rng(0)
    kinds = [
        bfloat16,
        np.float32,
        np.float16,
        bfloat16,
        np.float32,
        bfloat16,
        np.float16,
    ]
    shapes = (70, 90), (5,), (3000,)
    tasks = [[rng.normal(size=s).astype(kind) for s in shapes] for kind in kinds]
    tasks[1][1] = tasks[6][2] = None
    full = [[g if g is None else g.astype(np.float32) for g in t] for t in tasks]
    start = [rng.normal(size=shape).astype(bfloat16) for shape in shapes]
    weights = [0.5, 0.25, -1.0, 0.0, 0.125, 2.0, 1.5]
    of_float32 = [p.copy() for p in start]
    params = [p.copy() for p in start]
    options = {"weights": weights, "clip_value": 0.5, "clip_norm": 10.0}
    make(of_float32, lr=0.1, backend="numpy").step(full, **options)
    make(params, lr=0.1, backend=backend).step(tasks, zero_grads=True, **options)
    for param, expected, before in zip(params, of_float32, start, strict=True):
        assert same_bits(param, expected) and not same_bits(param, before)
    assert not any(g.any() for task in tasks for g in task if g is not None)


def test_what_overlaps_is_refused():
    memory = np.zeros(10, np.float16)
    opt = fastopt.gd(memory[:6])
    for grad in (memory[4:], memory[:6]):
        with pytest.raises(ValueError, match="overlaps" if grad.size == 6 else "shape"):
            opt.step(grad)
    with pytest.raises(ValueError, match="overlap in memory"):
        fastopt.gd([memory[:6], memory[5:]])


def test_sixteen_bits_are_not_taken_for_what_they_are_not():
    opt = fastopt.gd(np.ones(3, np.float32))
    swapped = np.dtype(bfloat16).newbyteorder(">")
    for dtype in (np.uint16, np.int16, ">f2", swapped, np.float64):
        with pytest.raises(TypeError, match="has dtype"):
            opt.step(np.ones(3, dtype))
    double = fastopt.gd(np.ones(3))
    for dtype in (np.float16, bfloat16):
        with pytest.raises(TypeError, match="has dtype"):
            double.step(np.ones(3, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_misaligned_gradients_are_refused(dtype, backend):
    param = np.ones(3, np.float32)
    opt = fastopt.gd(param, backend=backend)
    grad = np.zeros(7, np.uint8)[1:].view(dtype)
    with pytest.raises(ValueError, match="not aligned to its 2-byte elements"):
        opt.step(grad)
    assert param.tolist() == [1, 1, 1]


def test_a_step_makes_no_copies():
    """Gradients are decoded in the cache, block by block."""
    import tracemalloc

    param, grad = (nonzero(np.random.default_rng(k), 1 << 20, bfloat16) for k in (0, 1))
    opt = fastopt.adamw(param, backend="cython" if "cython" in BACKENDS else "numpy")
    opt.step(grad)
    if opt.backend == "numpy":
        pytest.skip("the reference computes in whole arrays")
    tracemalloc.start()
    opt.step(grad)
    opt.step(grad, clip_norm=1.0, clip_value=0.1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < param.nbytes / 4


# Formats of state -------------------------------------------------------------------


def with_formats(rule, backend, threads, formats, steps=3, **values):
    rng = np.random.default_rng(0)
    sizes = 5000, 3, 40_001, 4096, 4095
    kinds = bfloat16, np.float32, np.float32, np.float16, bfloat16
    params = [
        rng.normal(size=n).astype(kind) for n, kind in zip(sizes, kinds, strict=True)
    ]
    opt = rule(params, backend=backend, threads=threads, formats=formats, **values)
    for step in range(steps):
        grads = [rng.normal(size=n).astype(bfloat16) for n in sizes]
        grads[step % 2] = None
        opt.step(grads, clip_value=2.0 if step == 1 else None)
    return opt, params + [array for arrays in opt.state.values() for array in arrays]


def several(rule, param, *kinds):
    """These formats in turn for the buffers of a rule, whatever they are averages of:
    here it is about bits."""
    names = dict.fromkeys(name for variant in rule.all for name in variant.state)
    chosen = dict(zip(names, itertools.cycle(kinds), strict=False))
    for name, kind in chosen.items():
        if kind == "v8" and EIGHT_BITS.get(name) == "m8":
            chosen[name] = "m8"  # which v8 is refused for
    return {"param": param, **chosen}


KINDS = {
    "bf16": lambda rule: "bf16",
    "r8": lambda rule: several(rule, "bf16+r8", "m8", "v8"),
    "r16": lambda rule: several(rule, "bf16+r16", "v8", "m8"),
    "stochastic": lambda rule: several(rule, "bf16", "fp32", "m8", "bf16"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_formats_have_the_same_bits(rule, values, kind, monkeypatch):
    if rule.factored:
        pytest.skip("its state has no formats")
    formats = KINDS[kind](rule)
    opt, expected = with_formats(rule, "numpy", 1, formats, **values)
    isas = [] if cython_cpu.missing() else cython_cpu.driver().cpu_supports()
    cases = [("cython", isa, 3) for isa in isas]
    cases += [("numba", None, 2)] if NUMBA else []
    for backend, isa, threads in cases:
        if isa:
            extension = cython_cpu.extension(isa)
            monkeypatch.setattr(cython_cpu, "kernels", lambda of=extension: of)
        other, got = with_formats(rule, backend, threads, formats, **values)
        assert other.nonfinite_groups == opt.nonfinite_groups
        for a, b in zip(expected, got, strict=True):
            assert same_bits(a, b), (backend, isa)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("formats", ["bf16", {"m": "fp16", "v": "bf16"}])
def test_a_format_holds_from_4096_elements_on(backend, formats):
    opt, _ = with_formats(fastopt.adamw, backend, 2, formats)
    m = np.float16 if isinstance(formats, dict) else bfloat16
    wanted = [[m, np.float32, m, m, np.float32], [bfloat16, np.float32] * 2]
    wanted[1].insert(2, bfloat16)
    wanted[1][3:] = [bfloat16, np.float32]
    for arrays, kinds in zip(opt.state.values(), wanted, strict=True):
        assert [array.dtype for array in arrays] == kinds
        assert all(array.any() for array in arrays)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.lamb, fastopt.nadam])
def test_a_saved_state_of_a_format_goes_on_with_the_same_bits(rule, backend):
    opt, arrays = with_formats(rule, backend, 2, "bf16")
    _, same = with_formats(rule, backend, 2, "bf16")
    params = same[:5]
    other = rule(params, backend=backend, formats="bf16")
    other.load_state_dict(opt.state_dict())
    grads = [p.astype(bfloat16) for p in params]
    opt.step(grads)
    other.step(grads)
    for a, b in zip(arrays[:5], params, strict=True):
        assert same_bits(a, b)
    for name, kept in opt.state.items():
        for a, b in zip(kept, other.state[name], strict=True):
            assert same_bits(a, b)
    plain = rule([p.copy() for p in params], backend=backend)
    with pytest.raises(
        ValueError, match="has the formats .* but this optimizer has pl"
    ):
        plain.load_state_dict(opt.state_dict())


def test_what_follows_does_not_depend_on_how_arrays_are_put_together():
    """The number of an element is that in all parameters, so a flat buffer has the bits
    of its arrays."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=n).astype(np.float32) for n in (5000, 7000, 4096)]
    flat = fastopt.flatten([a.copy() for a in arrays])
    grads = flat.zeros_like()
    grads.data[:] = rng.normal(size=grads.data.size)
    for opt, given in (
        (fastopt.adamw(arrays, lr=0.1, formats="bf16"), list(grads.views)),
        (fastopt.adamw(flat, lr=0.1, formats="bf16"), grads),
    ):
        for _ in range(3):
            opt.step(given)
    for array, view in zip(arrays, flat.views, strict=True):
        assert same_bits(array, view)


def test_averages_are_biased_by_rounding_to_the_nearest_only():
    """The average of squares, of gradients that were 1 and are 0 for 1,000 steps: to
    the nearest it stays at 1, because 0.1% is less than half of the last place."""
    left = {}
    for kind in ("fp32", "bf16_nearest", "bf16"):
        param = np.zeros(4096, np.float32)
        opt = fastopt.adamw(param, beta2=0.999, formats={"v": kind})
        opt.state["v"][0][:] = 1
        for _ in range(1000):
            opt.step(np.zeros_like(param))
        left[kind] = opt.state["v"][0].astype(np.float64).mean()
    assert left["fp32"] == pytest.approx(0.999**1000, rel=1e-4)
    assert left["bf16"] == pytest.approx(left["fp32"], rel=0.01)
    assert left["bf16_nearest"] == 1.0


@pytest.mark.parametrize(
    ("formats", "error", "message"),
    [
        ("4bit", ValueError, "must be one of 'fp32', 'bf16', .*, '8bit', or a dict"),
        ({"q": "bf16"}, ValueError, "formats has 'q', but adamw keeps m, v"),
        ({"m": "e4m3"}, ValueError, r"formats\['m'\] must be one of 'fp32', 'bf16'"),
        ({"m": ["bf16"]}, ValueError, r"formats\['m'\] must be one of 'fp32', 'bf16'"),
        (3, TypeError, "must be a name such as 'bf16' or '8bit', a dict"),
        (np.float16, TypeError, "must be a name such as 'bf16' or '8bit', a dict"),
        ({"m": "v8"}, ValueError, "for numbers that are never negative"),
    ],
)
def test_refused_formats(formats, error, message):
    with pytest.raises(error, match=message):
        fastopt.adamw(np.ones(3, np.float32), formats=formats)


def test_formats_are_refused_where_there_are_none():
    with pytest.raises(TypeError, match="need state of float64"):
        fastopt.adamw(np.ones(3), formats="bf16")
    for make in (fastopt.Muon, fastopt.Adafactor):
        with pytest.raises(
            TypeError, match="keeps its state in float32, without formats"
        ):
            make(np.ones((3, 3), np.float32), formats="bf16")


def test_estimates_go_into_state_of_a_format():
    params = [np.ones(5000, np.float32), np.ones(5000, np.float32)]
    grads = [np.full(5000, 0.3, np.float32)] * 2
    found = []
    for backend in BACKENDS:
        opt = fastopt.sophia_g(
            [p.copy() for p in params], backend=backend, formats="bf16"
        )
        for _ in range(3):
            opt.estimate(grads)
            opt.step(grads)
        found.append(opt.state["h"])
    for state in found:
        assert all(map(same_bits, state, found[0])) and state[0].any()
        assert not same_bits(state[0], state[1])  # which drew other numbers


def test_arrays_of_16_bits_are_not_taken_for_float32():
    """Kernels would write beyond their ends."""
    array = np.ones(8, np.float16)
    with pytest.raises(TypeError, match="kernels compute in float32 or float64"):
        Program(backends.load("numpy"), passes.accumulate, [Segment(array, (), 0)])
    mixed = Segment(np.ones(8, np.float32), (array,), 0)
    with pytest.raises(TypeError, match="segments of float16, float32"):
        Program(backends.load("numpy"), passes.accumulate, [mixed])


# Mutants ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constant", "value", "check"),
    [
        (
            "BELOW_HALF",
            0x8000,
            partial(test_numbers_are_rounded_to_the_nearest, "bf16"),
        ),
        (
            "BELOW_HALF16",
            0x1000,
            partial(test_numbers_are_rounded_to_the_nearest, "fp16"),
        ),
        ("QUIET", 0, partial(test_numbers_are_rounded_to_the_nearest, "bf16")),
        ("EXPONENT", 0, partial(test_every_word_is_decoded_exactly, "fp16")),
    ],
    ids=["tie bf16", "tie fp16", "NaN bf16", "infinity"],
)
def test_a_mutant_of_a_codec_is_caught(constant, value, check, monkeypatch):
    monkeypatch.setattr(formats, constant, word(value))
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("step", [0, 1])
def test_a_reference_that_draws_for_another_step_is_caught(step, monkeypatch):
    """Kernels are compared with the reference, for the first and later steps."""
    drawn, calls = formats.drawn, []

    def off_by_one(shape, first, t, pair):
        calls.append(t)
        return drawn(shape, first, t + (t > step), pair)

    monkeypatch.setattr(formats, "drawn", off_by_one)
    _, expected = with_formats(fastopt.adamw, "numpy", 1, "bf16")
    _, got = with_formats(fastopt.adamw, BACKENDS[-1], 2, "bf16")
    assert calls
    assert not all(map(same_bits, expected, got))
