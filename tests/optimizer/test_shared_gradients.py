"""Two parameters whose gradients are one array: as with two copies of it, by each door;
what sets gradients to zero refuses (test_watching.py, test_torch_memory.py)."""

import os
from typing import Any

import numpy as np
import pytest

import fastopt

BACKENDS = ["numpy", "cython", "numba"]
RNG = np.random.default_rng(5)
START, GRADS = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(3, 3, 4))
OPTIMIZERS = {
    "adamw": lambda params, **given: fastopt.adamw(params, lr=0.1, **given),
    "lamb": lambda params, **given: fastopt.lamb(params, lr=0.1, **given),
    "prodigy": fastopt.prodigy,
    "sophia_g": lambda params, **given: fastopt.sophia_g(params, lr=0.1, **given),
    "muon": lambda params, **given: fastopt.Muon(params, lr=0.1, **given),
    "adafactor": fastopt.Adafactor,
    "lookahead": lambda params, **given: fastopt.Lookahead(
        fastopt.adamw(params, lr=0.1, **given), k=2
    ),
}
PLACES = {  # where the array stands twice
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
    "groups": lambda a, b: [{"params": [a]}, {"params": {"b": b}}],
}


def grads_at(place, a, b):
    return [[a], {"b": b}] if place == "groups" else PLACES[place](a, b)


def views(grad, kind):
    """Two gradients in one memory."""
    if kind == "overlapping":
        whole = np.concatenate([grad.ravel(), grad.ravel()[:4]])
        return whole[:12].reshape(3, 4), whole[4:].reshape(3, 4)
    return grad, grad if kind == "the same" else grad[:]


def run(name, place, shared, backend, door):
    first, second = (start.copy() for start in START)
    opt = OPTIMIZERS[name](PLACES[place](first, second), backend=backend)
    for values in GRADS:
        a, b = views(values.copy(), shared or "the same")
        before = a.copy(), b.copy()
        given = (a, b) if shared else before
        for extra in range(2):
            if door == "estimate":
                opt.estimate(grads_at(place, *given), grad_scale=0.5 + extra)
            elif door == "accumulate":
                opt.accumulate(grads_at(place, *given), grad_scale=0.5 + extra)
        if door == "accumulate":
            opt.step(zero_grads=True, clip_norm=2.0)
        else:
            opt.step(grads_at(place, *given), clip_norm=2.0)
        assert np.array_equal(a, before[0]) and np.array_equal(b, before[1])
    return first, second


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_read_twice(name, place, backend):
    doors = ["step", "accumulate", *(["estimate"] if name == "sophia_g" else [])]
    for door in doors:
        wanted = run(name, place, None, backend, door)
        for kind in ("the same", "a view"):
            got = run(name, place, kind, backend, door)
            assert all(map(np.array_equal, got, wanted)), (door, kind)
        for now, then in zip(wanted, START, strict=True):
            assert not np.array_equal(now, then)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_never_set_to_zero(name, backend):
    for place in PLACES:
        for kind in ("the same", "a view", "overlapping"):
            first, second = (start.copy() for start in START)
            opt = OPTIMIZERS[name](PLACES[place](first, second), backend=backend)
            a, b = views(GRADS[0].copy(), kind)
            saved = a.copy()
            more: dict[str, Any]
            for more in ({}, {"clip_norm": 1.0}, {"nonfinite": "skip"}):
                with pytest.raises(ValueError, match="overlap in memory.*zero_grads"):
                    opt.step(grads_at(place, a, b), zero_grads=True, **more)
            assert np.array_equal(a, saved) and np.array_equal(first, START[0])
            assert np.array_equal(second, START[1]) and opt.steps == 0


def test_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    import fastopt.jax as fj

    opt = fj.adamw(lr=0.1)
    a, b = (start.astype(np.float32) for start in START)
    grad = jax.numpy.asarray(GRADS[0], np.float32)
    step = jax.jit(opt.step, donate_argnums=(0, 2))
    results = []
    for grads in ({"a": grad, "b": grad}, {"a": grad, "b": grad + 0}):
        params = {"a": jax.numpy.array(a), "b": jax.numpy.array(b)}
        state = opt.init(params)
        for _ in range(3):
            params, state = step(params, grads, state)
        results.append(jax.tree.leaves(params))
    for ours, wanted in zip(*results, strict=True):
        assert np.array_equal(ours, wanted)
    assert not np.array_equal(results[0][1], b)


def test_keras():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip("keras has another backend here")
    import fastopt.keras

    results = []
    for share in (True, False):
        variables = [keras.Variable(start, dtype="float32") for start in START]
        opt = fastopt.keras.adamw(0.1, global_clipnorm=2.0)
        for values in GRADS:
            grad = torch.tensor(values, dtype=torch.float32)
            opt.apply([grad, grad if share else grad.clone()], variables)
            assert torch.equal(grad, torch.tensor(values, dtype=torch.float32))
        results.append([np.array(v) for v in variables])
    assert all(map(np.array_equal, *results))
    assert not np.array_equal(results[0][1], START[1].astype(np.float32))


def test_thinc():
    """thinc takes one array at a time, and sets its gradient to zero: what is shared is
    consumed by the first, as with thinc's own."""
    pytest.importorskip("thinc", reason="thinc is not installed")
    from thinc.api import Adam

    import fastopt.thinc

    results = []
    for make in (fastopt.thinc.Adam, Adam):
        opt = make(0.1, L2=0.0)
        params = [start.astype(np.float32) for start in START]
        for values in GRADS:
            grad = values.astype(np.float32)
            for i, param in enumerate(params):
                params[i], left = opt((i, "w"), param, grad)
                assert not np.any(left) and not np.any(grad)
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
