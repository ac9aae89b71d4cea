"""The CUDA backend against the reference where state and parameters have formats: run
by test_cuda.py, as cuda_simulator.py is."""

from __future__ import annotations

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
from fastopt.backends import cuda_driver, cuda_kernels, numpy_ref
from fastopt.memory.arrays import to_host
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Encoded, Segment
from fastopt.optimizer import formats, state

SR, R8, R16 = FORMATS["bf16_sr"], FORMATS["r8"], FORMATS["r16"]
LARGE = 4096 + 63


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
        return opt, params

    return run


@every_kind
@cases("adamw", "sgd-momentum-nesterov", "amsgradw", "lamb", "prodigy", "nadam")
def test_same_bits(rule, values, kind, small_arrays):
    assert not unlike(run_formats(rule, values, kind))
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


def run_segments(rule, stored, draws, size=37, first=5):
    """Steps over segments of any formats, with any numbers in what is drawn."""
    rows = [(0.7, *[0.3 + 0.1 * k for k in range(rule.scalar_count)])] * 2

    def run(module, put):
        rng = np.random.default_rng(0)
        parts = []
        for format in stored:
            numbers = abs(nonzero(rng, size, np.float32))
            written = (numbers,) if format is None else format.written(numbers)
            parts.append([put(part) for part in written])
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

    ours = run(cuda_driver, lambda array: on_device(array, 0)[0])
    expected = run(numpy_ref, np.copy)
    pairs = zip(ours, expected, strict=True)
    return [k for k, pair in enumerate(pairs) if not same_bits(*pair)]


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**32 + 1, 3 * 2**40])
def test_numbers_of_elements_and_steps_wrap_around(first):
    draws = 1, 2**32 + 1, 2**33 - 1
    of = SR, R8, SR, SR
    assert not run_segments(fastopt.adamw, (None, *of[1:]), draws, first=first)
    assert not run_segments(fastopt.lamb, (None, SR, SR, R16), draws, first=first)


def encoded_on_device(format, numbers, first=0, step=1):
    """The words that a kernel makes of numbers, as parameters: 0 + g."""
    parts = [np.zeros(numbers.size, format.stored)]
    if format.second:
        parts.append(np.zeros(numbers.size, format.second[1]))
    parts = tuple(map(cuda.to_device, parts))
    segment = Segment(Encoded(format, parts), (), 0, first=first)
    rule = fastopt.rules.passes.accumulate
    step_ = cuda_driver.OnDevice(rule, [segment], np.zeros(1, np.int64))
    step_.take([cuda.to_device(numbers)])
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
EACH = [(kind, mutant) for kind, mutants in MUTANTS.items() for mutant in mutants]


def mutated(monkeypatch, pattern, new):
    """Rewrite the kernels that are generated from here on."""
    generated = rewritten(pattern, new)

    def with_all(lines, element, dtype, formats, width):
        more = *formats, FORMATS["bf16"], R8
        return generated(lines, element, dtype, more, width)

    monkeypatch.setattr(cuda_kernels, "generated", with_all)
    cuda_driver.launcher.cache_clear()


@in_simulator
@pytest.mark.parametrize(("kind", "mutant"), EACH)
def test_what_is_wrong_is_noticed(monkeypatch, kind, mutant, small_arrays):
    run = run_formats(*BY_ID["adamw"], kind, (34, 0, 34, 34))
    assert not unlike(run)
    mutated(monkeypatch, *MUTANTS[kind][mutant])
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
