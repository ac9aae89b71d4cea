"""Steps with limits in one compiled call: the same as in Python, and refused alike."""

import math

import numpy as np
import pytest
from cases import bfloat16, same_bits

import fastopt
from fastopt.backends import cython_cpu
from fastopt.optimizer.optimizer import Optimizer

BACKENDS = ("numba", *(() if cython_cpu.missing() else ("cython",)))
OPTIONS = [
    {"clip_norm": 2.0},
    {"clip_norm": 1e9},
    {"clip_value": 0.3},
    {"clip_norm": 3.0, "clip_value": 0.1},
    {"nonfinite": "skip"},
    {"nonfinite": "raise", "clip_norm": 0.5},
    {"zero_grads": True},
    {"zero_grads": True, "clip_norm": 2.0, "nonfinite": "skip"},
]


def run(rule, backend, dtype, options, bad=False, **more):
    """Return an optimizer and its parameters after three steps, some without a gradient
    or with one of 16 bits."""
    rng = np.random.default_rng(0)
    sizes = 1000, 0, 7, 40_000
    params = [rng.normal(size=n).astype(dtype) for n in sizes]
    opt = rule(params, lr=0.1, backend=backend, threads=2, **more)
    norms = []
    for step in range(3):
        grads = [rng.normal(size=n).astype(dtype) for n in sizes]
        if dtype is np.float32 and step == 1:
            grads = [g.astype(bfloat16) for g in grads]
        if step == 2:
            grads[2] = None
            grads[0][5] = np.inf if bad else 1e3
        try:
            opt.step(grads, grad_scale=0.5, **options)
        except FloatingPointError:
            norms.append("raised")
        norms.append(opt.grad_norm)
        norms += [bool(g.any()) for g in grads if g is not None]
    return opt, params, norms


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.nadam, fastopt.gd])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_does_what_python_does(
    backend, rule, dtype, options, bad, monkeypatch
):
    opt, params, norms = run(rule, backend, dtype, options, bad)
    assert opt._plan[3] is not None
    monkeypatch.setattr(Optimizer, "_in_one_call", False)
    other, expected, same_norms = run(rule, backend, dtype, options, bad)
    assert other._plan[3] is None
    assert all(map(same_bits, params, expected))
    np.testing.assert_array_equal(norms, same_norms)
    assert (opt.steps, opt.skipped) == (other.steps, other.skipped)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 2.0}], ids=str)
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.nadam, fastopt.gd])
@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_and_groups(backend, rule, options, monkeypatch):
    """From the second step on, because averages begin as the parameters then are."""
    more = {"ema": 0.7}
    opt, params, norms = run(rule, backend, np.float32, options, **more)
    assert opt._plan[3] is not None
    monkeypatch.setattr(Optimizer, "_in_one_call", False)
    other, expected, same_norms = run(rule, backend, np.float32, options, **more)
    assert all(map(same_bits, params, expected))
    assert all(map(same_bits, opt.ema_params, other.ema_params))
    np.testing.assert_array_equal(norms, same_norms)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_set_to_zero(backend, dtype):
    """One in the call, those that are read-only or overlap not at all."""
    rng = np.random.default_rng(0)
    start, numbers = rng.normal(size=(2, 5000)).astype(np.float32)
    params = [start.copy() for _ in range(2)]
    grads = [numbers.astype(dtype) for _ in range(2)]
    for param, grad, zero in zip(params, grads, (True, False), strict=True):
        opt = fastopt.adamw(param, lr=0.1, backend=backend)
        opt.step(grad, zero_grads=zero, clip_norm=0.5)
    assert same_bits(*params) and not grads[0].any() and grads[1].any()
    grads[1].setflags(write=False)
    before = params[1].copy()
    with pytest.raises(ValueError, match="read-only"):
        opt.step(grads[1], zero_grads=True)
    assert same_bits(params[1], before) and opt.steps == 1
    views = [np.ones(10, np.float32)] * 2
    both = fastopt.gd([np.ones(10, np.float32) for _ in range(2)], backend=backend)
    with pytest.raises(ValueError, match="overlap in memory"):
        both.step(views, zero_grads=True)
    assert views[0].all()


@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_gradients_are_set_to_zero(backend, dtype):
    """Those that lie in one array, in any order, but do not overlap."""
    shared = np.ones(30, dtype)
    cuts = slice(20, 30), slice(0, 0), slice(0, 10), slice(10, 20)
    params = [np.ones(10, np.float32) for _ in cuts]
    params[1] = np.ones(0, np.float32)
    opt = fastopt.gd([*params, np.ones(7, np.float32)], lr=0.5, backend=backend)
    opt.step([*(shared[cut] for cut in cuts), None], zero_grads=True)
    assert not shared.any()
    assert all((param == 0.5).all() for param in params)
    shared[:] = 1
    cuts = slice(20, 30), slice(0, 0), slice(0, 10), slice(9, 19)
    with pytest.raises(ValueError, match="overlap in memory"):
        opt.step([*(shared[cut] for cut in cuts), None], zero_grads=True)
    assert shared.all() and opt.steps == 1
    assert all((param == 0.5).all() for param in params)


def test_a_norm_overflows_in_float64_only_if_numbers_do():
    """The squares of 1e200 do, so the call leaves these gradients to Python."""
    param, grad = np.ones(100), np.full(100, 1e200)
    opt = fastopt.gd(param, lr=1.0)
    opt.step(grad, nonfinite="raise")
    assert (param == 1 - 1e200).all() and opt.grad_norm == math.inf


def test_options_are_checked_whenever_they_change():
    """Those that are the same objects as before are not checked again."""
    param, grad = np.ones(10, np.float32), np.full(10, 3.0, np.float32)
    opt = fastopt.gd(param, lr=1.0)
    opt.step(grad, clip_norm=1.0)
    for bad in (True, -1.0, "1", math.nan):
        with pytest.raises((TypeError, ValueError), match="clip_norm"):
            opt.step(grad, clip_norm=bad)
    with pytest.raises(ValueError, match="nonfinite"):
        opt.step(grad, nonfinite="ignore")
    before = param.copy()
    limit = np.array(1.0)
    for value in (1.0, 2.0):
        limit[...] = value
        opt.step(grad, clip_norm=limit)
        moved = np.linalg.norm(param - before)
        np.testing.assert_allclose(moved, value, rtol=1e-4)
        before = param.copy()
    opt.step(grad, clip_value=0.5)
    np.testing.assert_allclose(before - param, 0.5, rtol=1e-6)
