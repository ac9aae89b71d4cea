"""The CUDA backend against the reference where state and parameters have formats: run
by test_cuda.py, as cuda_simulator.py is."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from cases import bfloat16, nonzero, same_bits
from cuda_simulator import (  # noqa: F401
    BESIDE,
    BY_ID,
    cases,
    drawn,
    in_simulator,
    on_device,
    quick_simulator,
    rewritten,
    unlike,
)
from numba import cuda

import fastopt
from fastopt.backends import cuda_driver, cuda_jobs, cuda_kernels, numpy_ref
from fastopt.memory.arrays import to_host
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Encoded, Segment
from fastopt.optimizer import formats, state

SR, R8, R16 = FORMATS["bf16_sr"], FORMATS["r8"], FORMATS["r16"]
M8, V8 = FORMATS["m8"], FORMATS["v8"]
LARGE = 4096 + 63


@pytest.fixture(autouse=True)
def any_buffer_may_have_any_format(monkeypatch):
    """Users may not have v8 for averages of gradients. Here it is about bits."""
    monkeypatch.setattr(formats, "EIGHT_BITS", {})


@pytest.fixture
def small_arrays(monkeypatch):
    """State of a few elements has a format, too."""
    monkeypatch.setattr(formats, "SMALLEST", 1)


def several(rule, param, *kinds):
    """These formats in turn for the buffers of a rule."""
    names = dict.fromkeys(name for variant in rule.all for name in variant.state)
    return {"param": param, **dict(zip(names, itertools.cycle(kinds), strict=False))}


KINDS = {
    "stochastic": ("bf16", "bf16"),
    "r8": ("bf16+r8", "bf16", "fp32"),
    "r16": ("bf16+r16", "fp16", "bf16"),
    "m8": ("bf16", "m8", "v8"),
    "v8": ("bf16+r8", "bf16", "v8", "m8"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def run_formats(rule, values, kind, sizes=(7, 0, 65, 33), steps=3, **asked):
    """Steps of parameters and gradients of two dtypes, some of them misaligned, every
    gradient once None and once 0."""

    def run(backend, put):
        made = enumerate(drawn(0, sizes))
        params = [put(a.astype((bfloat16, "f4")[i == 3]), i // 2) for i, a in made]
        of = several(rule, *KINDS[kind])
        opt = rule(params, backend=backend, ema=0.75, formats=of, **values)
        for k in range(steps):
            grads = drawn(1 + k, sizes)
            grads[k][:] = 0
            grads = [
                put(g.astype((np.float32, bfloat16)[i % 2]), (i + k) // 2 % 2)
                for i, g in enumerate(grads)
            ]
            grads[-1 - k % len(grads)] = None
            opt.step(grads, grad_scale=0.7, **asked)
        return opt, {"params": params, "left": np.array(opt.nonfinite_groups)}

    return run


@every_kind
@cases("adamw", "sgd-momentum-nesterov", "amsgradw", "lamb")
def test_same_bits(rule, values, kind, small_arrays):
    assert not unlike(run_formats(rule, values, kind))


@every_kind
@cases("adamw", "prodigy")
def test_beside_the_rule(rule, values, kind, small_arrays):
    assert not unlike(run_formats(rule, values, kind, **BESIDE))


@every_kind
def test_same_bits_of_large_arrays(kind):
    """Those that have state of a format without a test's doing."""
    run = run_formats(*BY_ID["adamw"], kind, (LARGE, 5, 0, 9), 2)
    assert not unlike(run)


@every_kind
@cases("schedule_free_adamw", "sophia_g")
def test_state_that_begins_with_parameters_and_is_saved(
    rule, values, kind, small_arrays, monkeypatch
):
    """And parameters to evaluate, which are computed from numbers in host memory."""

    def evaluate(rule, buffers, *of):
        assert all(type(buffer) is np.ndarray for buffer in buffers)
        return numpy_ref.evaluate(rule, buffers, *of)

    monkeypatch.setattr(state, "evaluate", evaluate)

    def run(backend, put):
        params = [put(p, i) for i, p in enumerate(drawn(0, (65, 7), bfloat16))]
        of = several(rule, *KINDS[kind])
        opt = rule(params, backend=backend, formats=of, **values)
        for k in range(3):
            opt.step(list(map(put, drawn(1 + k, (65, 7)))))
            if rule.estimate:
                opt.estimate(list(map(put, drawn(10 + k, (65, 7)))), grad_scale=0.3)
        copies = [put(to_host(p)) for p in params]
        again = rule(copies, backend=backend, formats=of, **values)
        again.load_state_dict(opt.state_dict())
        if kind != "stochastic":
            again.load_master_params(opt.master_params())
        again.step(list(map(put, drawn(9, (65, 7)))))
        used = again.eval_params() if rule.evaluate else []
        return again, {"params": copies, "masters": again.master_params(), "used": used}

    assert not unlike(run)


def run_segments(rule, stored, draws, size=37, first=5, offset=0):
    """What differs after steps over a segment of any formats, with any numbers in what
    is drawn, and what is written outside of it."""
    scalars = [0.7, *[0.3 + 0.1 * k for k in range(rule.scalar_count)]]
    # Two objects, because of one there would be the steps of one, too.
    rows = [tuple(scalars), tuple(scalars)]
    whole = []

    def put(array):
        view, room = on_device(array, offset)
        whole.append((room, array.size))
        return cuda_driver.as_array("an array", view)

    def run(module, put):
        rng = np.random.default_rng(0)
        parts = []
        for format in stored:
            numbers = abs(nonzero(rng, size, np.float32))
            written = (numbers,) if format is None else format.written(numbers)
            counts = [np.zeros(1, np.int64)] if format and format.scale else []
            parts.append([put(part) for part in (*written, *counts)])
        streams = [
            of[0] if format is None else Encoded(format, tuple(of))
            for format, of in zip(stored, parts, strict=True)
        ]
        grad, param, *others = streams
        runner = module.OnDevice if module is cuda_driver else module.Step
        segment = Segment(param, tuple(others), 1, first=first)
        step = runner(rule, [segment], np.zeros(1, np.int64))
        found = []
        for number in draws:
            step.take([grad])
            found += step.sums("rule", rows, numpy_ref.PLAIN) if rule.measure else []
            step(rows, steps=[7, number])
        host = [to_host(part) for of in parts for part in of]
        return [*host, np.array(found)]

    pairs = zip(run(cuda_driver, put), run(numpy_ref, np.copy), strict=True)
    wrong = [k for k, pair in enumerate(pairs) if not same_bits(*pair)]
    for room, count in whole:
        outside = np.delete(to_host(room), range(offset, offset + count))
        wrong += ["outside"] * (not np.all(outside == 7))
    return wrong


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**32 + 1, 3 * 2**40])
def test_numbers_of_elements_and_steps_wrap_around(first):
    draws = 1, 2**32 + 1, 2**33 - 1
    for of in ((SR, R8, SR, SR), (SR, SR, V8, M8)):
        assert not run_segments(fastopt.adamw, (None, *of[1:]), draws, first=first)
    assert not run_segments(fastopt.lamb, (None, SR, SR, R16), draws, first=first)


@pytest.mark.parametrize("offset", [0, 1])
def test_groups_of_every_size(offset):
    """Every number of elements in the last group that a thread can have, and none."""
    for size in (1, 2, 3, 4, 5, 61, 63, 64, 65, 127, 128, 130, 191):
        of = [(None, None, M8, V8), (FORMATS["bf16"], SR, V8, M8)][size % 2]
        found = run_segments(fastopt.adamw, of, (1, 2), size, offset=offset)
        assert not found, (size, of)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_groups_that_are_not_finite_stay_and_are_counted(bad, small_arrays):
    def run(backend, put):
        (start, grad), (other,) = drawn(0, (192 + 5, 192 + 5)), drawn(1, (64,))
        params = [put(start), put(other)]
        kinds = {"m": "m8", "v": "v8"}
        opt = fastopt.adamw(params, lr=0.1, backend=backend, formats=kinds)
        opt.step([put(grad), put(other)])
        before = [to_host(a) for name in opt.state for a in opt.state[name][:1]]
        wrong = grad.copy()
        wrong[[64 + 3, 130, -1]] = bad
        opt.step([put(wrong), put(other)])
        assert opt.nonfinite_groups == 6  # three groups of m and of v
        after = [to_host(a) for name in opt.state for a in opt.state[name][:1]]
        for a, b in zip(before, after, strict=True):
            group = 64 if a.size > 4 else 1
            assert same_bits(a[group:], b[group:])
            assert not same_bits(a[:group], b[:group])
        return opt, params

    assert not unlike(run)


def on_device_whole(array):
    """A copy, as an array of the backend's."""
    return cuda_driver.as_array("an array", cuda.to_device(array))


def encoded_on_device(format, numbers, first=0, step=1):
    """The words that a kernel makes of numbers, as parameters: 0 + g."""
    parts = [np.zeros(numbers.size, format.stored)]
    if format.second:
        parts.append(np.zeros(numbers.size, format.second[1]))
    parts = tuple(map(on_device_whole, parts))
    segment = Segment(Encoded(format, parts), (), 0, first=first)
    rule = fastopt.rules.passes.accumulate
    step_ = cuda_driver.OnDevice(rule, [segment], np.zeros(1, np.int64))
    step_.take([on_device_whole(numbers)])
    step_([(1.0,)], steps=[step])
    return [part.copy_to_host() for part in parts]


@pytest.mark.parametrize("format", [SR, R8, R16], ids=lambda format: format.name)
def test_every_kind_of_number_is_encoded(format):
    """NaN and infinities, subnormals, and what is rounded to infinity."""
    every = 29 if cuda_kernels.SIMULATED else 1
    rng = np.random.default_rng(0)
    upper = np.arange(0, 1 << 16, every, dtype=np.uint32)
    lower = rng.integers(0, 1 << 16, upper.size, np.uint32)
    lower[::3] = rng.choice(np.array([0, 0x80, 0x8000, 0xFFFF], "u4"), lower[::3].size)
    numbers = (upper << np.uint32(16) | lower).view(np.float32)
    with np.errstate(all="ignore"):
        expected = format.written(numbers + np.float32(0), (11, 3, 0))
    got = encoded_on_device(format, numbers, 11, 3)
    nan = np.isnan(numbers)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(format.read(tuple(got))[nan]).all()
    assert np.isnan(got[0].view(bfloat16).astype(np.float32)[nan]).all()


# That these tests can fail


MUTANTS = {
    "stochastic": {
        "the number of the next step": (r"draw\[1\]", "draw[1] + 1"),
        "no first element": (r"draw\[0\] \+ i", "i"),
        "the element of the neighbour": (r"i \+ (\d)\)", r"i + \1 + 1)"),
        "the words of another pair": (r"word_of\(1\)", "word_of(2)"),
        "the other half of a word": (r" << 16\)", ")"),
        "to the nearest": (r"encode_bf16_sr\((\w+), .*\)", r"encode_bf16(\1)"),
    },
    "r8": {
        "the remainder of the neighbour": (r"(rest, = load\(.*), i\)", r"\1, i ^ 1)"),
        "no remainder": (r" << 8 \| \w+_rest", " << 8"),
        "an old remainder": (r"store\(buffers\[1\].*", "pass"),
        "an upper half of the wrong bits": (r" >> 8", " >> 7"),
    },
    "r16": {
        "the remainder of the neighbour": (r"(rest, = load\(.*), i\)", r"\1, i ^ 1)"),
        "the other order": (r"(b0_\d)_word << 16 \| \w+", r"\1_rest << 16 | \1_word"),
        "another format": (r"decode_r16\((.*)\)", r"decode_r8(\1 >> 8)"),
    },
}
EIGHT = {
    "the scale of the neighbour": (r"load_one\((\S+), .* // 64\)", r"load_one(\1, 0)"),
    "the number of the next step": (r"draw\[1\]", "draw[1] + 1"),
    "a scale of a thread's own": (r"= greatest\((\w+)\)", r"= \1"),
    "the old scale": (r"(\w+_scale) = scale_.*", r"\1 = \1"),
    "no scale": (r"store_one\(.*_scale,\)\)", "pass"),
    "another format": (r"decode_\w8\((\w+), \w+\)", r"decode_bf16(\1 << 8)"),
}
MUTANTS |= {"m8": EIGHT, "v8": EIGHT}
MUTATED = 102, 0, 34, 34  # the sizes
EACH = [(kind, mutant) for kind, mutants in MUTANTS.items() for mutant in mutants]


def mutated(monkeypatch, pattern, new):
    """Rewrite the kernels that are generated from here on."""
    names_of = cuda_kernels.names_of

    def with_all(element, dtype, formats, width):
        return names_of(element, dtype, (*formats, FORMATS["bf16"], R8), width)

    monkeypatch.setattr(cuda_kernels, "names_of", with_all)
    monkeypatch.setattr(cuda_kernels, "compiled", rewritten(pattern, new))
    cuda_jobs.loaded.cache_clear()


@functools.cache
def is_right(kind):
    return not unlike(run_formats(*BY_ID["adamw"], kind, MUTATED))


@in_simulator
@pytest.mark.parametrize(("kind", "mutant"), EACH)
def test_what_is_wrong_is_noticed(monkeypatch, kind, mutant, small_arrays):
    assert is_right(kind)
    run = run_formats(*BY_ID["adamw"], kind, MUTATED)
    mutated(monkeypatch, *MUTANTS[kind][mutant])
    with np.errstate(all="ignore"):
        assert unlike(run)


@in_simulator
def test_steps_of_another_row_are_noticed(monkeypatch):
    """The parameters' are those of the second row."""
    call = cuda_driver.OnDevice.__call__

    def first_row(self, rows, request=numpy_ref.PLAIN, steps=None):
        return call(self, rows, request, steps[:1] * 2)

    of = None, SR, SR, SR
    assert not run_segments(fastopt.adamw, of, (1, 2))
    monkeypatch.setattr(cuda_driver.OnDevice, "__call__", first_row)
    assert run_segments(fastopt.adamw, of, (1, 2))


@in_simulator
@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"is_finite\(\w+\)", "True"),
        (r"where\(\w+_finite, (.*), \w+\)", r"\1"),
        (r"if \w+_finite:", "if True:"),
        (r"    count\(.*", "    pass"),
    ],
    ids=["stored", "words stored", "scale stored", "not counted"],
)
def test_groups_that_are_not_finite_are_noticed(
    monkeypatch, pattern, new, small_arrays
):
    mutated(monkeypatch, pattern, new)
    with pytest.raises(AssertionError):
        test_groups_that_are_not_finite_stay_and_are_counted(np.inf, None)
