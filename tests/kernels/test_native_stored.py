"""The step that csrc/xla.pyx calls, of parameters and gradients that are stored in
fewer bits: its bits, and what it refuses. test_jax_formats.py has those of JAX."""

import ctypes

import numpy as np
import pytest
from cases import STORED, bfloat16, nonzero, same_bits
from native_code import (
    BAD_ARGUMENT,
    F64,
    I64,
    INT,
    OK,
    OVERLAP,
    RULE,
    Optimizer,
    P,
    address,
)

import fastopt
from fastopt import native
from fastopt.backends import cython_cpu

if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

CODES = {np.float32: 0, bfloat16: 1, np.float16: 2}


def load():
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = P, [ctypes.py_object, ctypes.c_char_p]
    kind = ctypes.CFUNCTYPE(INT, RULE, INT, I64, P, P, P, P, I64, F64, INT, P, P)
    return kind(pointer(native._step_stored, b"fastopt.native._step_stored"))


STEP = load()


class Stored(Optimizer):
    """An optimizer whose parameters and gradients may be of 16 bits."""

    def __init__(self, name, params, codes):
        super().__init__(
            name,
            [p.astype(np.float32) for p in params],
            getattr(fastopt, name).hyperparameters,
        )
        self.params, self.codes = params, np.array(codes, np.int8)

    def call(self, rule, dtype, t, values, carry, segments, count, scale, threads):
        codes = address(self.codes)
        return STEP(
            *(rule, dtype, t, values, carry, segments, codes, count, scale, threads),
            *(None, None),
        )


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "lamb", "prodigy"])
def test_same_bits(name):
    """Plain segments beside others, with a gradient missing."""
    pairs = [*STORED.values(), (np.float32, np.float32), (bfloat16, np.float32)]
    sizes = 40_003, 0, 4097, 300, 33, 301
    codes = [CODES[dtype] for pair in pairs for dtype in pair]

    def drawn(seed, which):
        rng = np.random.default_rng(seed)
        return [nonzero(rng, n, p[which]) for n, p in zip(sizes, pairs, strict=True)]

    start = drawn(0, 0)
    ours = Stored(name, drawn(0, 0), codes)
    python = getattr(fastopt, name)(start, backend="numpy")
    for step in range(3):
        grads = drawn(1 + step, 1)
        if step == 1:
            grads[0] = None
        assert ours.step(grads, 0.5, 2) == OK
        python.step(grads, grad_scale=0.5)
    expected = [*start, *(a for key in python.state for a in python.state[key])]
    assert all(map(same_bits, ours.everything(), expected))


def one(param, grad, codes=(1, 1)):
    """The outcome of a step; one that is refused has written nothing."""
    opt, before = Stored("sgd", [param], codes), param.copy()
    outcome = opt.step([grad])
    assert outcome == OK or same_bits(param, before)
    return outcome


@pytest.mark.parametrize("pair", STORED.values(), ids=STORED)
def test_overlaps_of_elements_of_different_widths(pair):
    """They may touch, and no more."""
    n, (p, g) = 5, pair
    codes = CODES[p], CODES[g]
    widths = np.dtype(p).itemsize, np.dtype(g).itemsize
    for first, second in ((0, 1), (1, 0)):
        memory = np.ones(100, np.uint8)
        memory = memory[-memory.ctypes.data % 8 :]
        between = -(-n * widths[first] // 4) * 4
        for overlap in (0, 1):
            at = [0, 0]
            at[second] = between - 4 * overlap
            param, grad = (
                memory[k : k + n * width].view(dtype)
                for k, width, dtype in zip(at, widths, pair, strict=True)
            )
            assert one(param, grad, codes) == (OVERLAP if overlap else OK)


def test_refusals():
    x, g = np.ones(8, bfloat16), np.ones(8, bfloat16)
    assert one(x, g) == OK
    odd = np.zeros(17, np.uint8)[1:].view(bfloat16)
    assert one(x, odd) == one(odd, g) == BAD_ARGUMENT
    for codes in ((3, 1), (1, 3), (-1, 1), (1, -1)):
        assert one(x, g, codes) == BAD_ARGUMENT
    wide = Stored("sgd", [np.ones(8)], (0, 0))
    assert wide.dtype == 0  # as the base class was made of float32
    wide.dtype = 1
    assert wide.step([np.ones(8)]) == OK
    wide.codes[1] = 1
    assert wide.step([np.ones(8)]) == BAD_ARGUMENT
