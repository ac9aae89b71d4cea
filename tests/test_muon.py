"""Muon against its definition in float64, and torch's, whose products are bfloat16."""

import math

import numpy as np
import pytest
from cases import same_bits

import fastopt
from fastopt import cython_cpu
from fastopt.muon import orthogonal

BACKENDS = ["numpy", "numba", *([] if cython_cpu.missing() else ["cython"])]
SHAPES = {"wide": (5, 9), "tall": (9, 4), "row": (1, 6), "b": (7,), "k": (2, 3, 2)}


def draw(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in SHAPES.items()}


def oracle(t, p, g, b, lr, weight_decay, momentum, nesterov, adjust_lr):
    """Jordan et al. 2024: the quintic acts on the singular values alone."""
    b = momentum * b + (1 - momentum) * g
    u = momentum * b + (1 - momentum) * g if nesterov else b
    left, s, right = np.linalg.svd(u, full_matrices=False)
    s = s / np.sqrt(np.sum(s**2))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = p.shape
    factor = math.sqrt(max(1, rows / columns))
    if adjust_lr == "match_rms_adamw":
        factor = 0.2 * math.sqrt(max(rows, columns))
    return (1 - lr * weight_decay) * p - lr * factor * (left * s) @ right, b


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_agrees_with_its_definition(backend, nesterov, adjust_lr):
    params, expected = draw(0), draw(0)
    values = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.8}
    values |= {"nesterov": nesterov, "adjust_lr": adjust_lr}
    opt = fastopt.Muon(params, backend=backend, adamw={"lr": 0.02}, **values)
    rest = {n: expected[n] for n in ("b", "k")}
    adamw = fastopt.adamw(rest, lr=0.02, backend="numpy")
    momenta = dict.fromkeys(("wide", "tall", "row"), 0.0)
    for t in range(1, 31):
        grads = draw(t)
        opt.step(grads)
        adamw.step({n: grads[n] for n in rest})
        for n in momenta:
            expected[n], momenta[n] = oracle(
                t, expected[n], grads[n], momenta[n], **values
            )
    for n in SHAPES:
        np.testing.assert_allclose(params[n], expected[n], rtol=1e-9, atol=1e-11)
    assert opt.steps == 30


def test_torch_agrees_to_its_precision():
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    w, grad = (np.random.default_rng(k).standard_normal((20, 12)) for k in (0, 1))
    w, grad = w.astype(np.float32), grad.astype(np.float32)
    tensor = torch.nn.Parameter(torch.from_numpy(w.copy()))
    theirs = torch.optim.Muon([tensor], lr=0.1, weight_decay=0.1)
    opt = fastopt.Muon([w], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        tensor.grad = torch.from_numpy(grad.copy())
        theirs.step()
        opt.step([grad])
    np.testing.assert_allclose(w, tensor.detach().numpy(), atol=0.02)


def test_the_products_are_the_array_librarys():
    """A tensor goes through the same lines: on a GPU, torch or CuPy own the memory."""
    torch = pytest.importorskip("torch")
    u = np.random.default_rng(0).standard_normal((6, 4))
    ours, theirs = orthogonal(u, 5, 1e-7), orthogonal(torch.from_numpy(u), 5, 1e-7)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_is_by_the_norm_of_all(backend):
    params, grads = draw(0), draw(1)
    norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
    opt = fastopt.Muon(params, backend=backend)
    opt.step(grads, clip_norm=0.5)
    assert opt.grad_norm == pytest.approx(norm, rel=1e-12)
    expected = draw(0)
    other = fastopt.Muon(expected, backend=backend)
    other.step(grads, grad_scale=0.5 / (opt.grad_norm + 1e-6))
    for n in SHAPES:
        assert same_bits(params[n], expected[n])


def test_what_is_not_finite():
    params, grads = draw(0), draw(1)
    before = {n: p.copy() for n, p in params.items()}
    opt = fastopt.Muon(params)
    grads["b"][-1] = math.inf
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        opt.step(grads, nonfinite="raise")
    opt.step(grads, nonfinite="skip", zero_grads=True)
    assert opt.skipped == 1 and opt.steps == 0 and not grads["tall"].any()
    assert all(same_bits(params[n], before[n]) for n in SHAPES)


def test_a_refusal_writes_nothing():
    params = draw(0)
    before = {n: p.copy() for n, p in params.items()}
    opt = fastopt.Muon(params)
    with pytest.raises(ValueError, match="shape"):
        opt.step({**draw(1), "b": np.ones(6)})
    assert all(same_bits(params[n], before[n]) for n in SHAPES)


def test_none_leaves_alone_and_zeros_stay_finite():
    params = draw(0)
    before = {n: p.copy() for n, p in params.items()}
    opt = fastopt.Muon(params, weight_decay=0)
    opt.step({**draw(1), "wide": None, "b": None, "tall": np.zeros((9, 4))})
    for n in ("wide", "b", "tall"):
        assert same_bits(params[n], before[n])
    assert not same_bits(params["row"], before["row"])


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_run_goes_on_exactly(stop):
    params = draw(0)
    opt = fastopt.Muon(params)
    for k in range(stop):
        opt.step(draw(k + 1))
    again = {n: p.copy() for n, p in params.items()}
    other = fastopt.Muon(again)
    other.load_state_dict(opt.state_dict())
    for k in range(stop, 6):
        opt.step(draw(k + 1))
        other.step(draw(k + 1))
    assert all(same_bits(params[n], again[n]) for n in SHAPES)


def test_only_matrices_or_none():
    w = np.eye(3)
    fastopt.Muon(w).step(np.ones((3, 3)))
    b = np.ones(3)
    opt = fastopt.Muon([b])
    opt.step([np.ones(3)])
    assert opt.matrices is None and opt.steps == 1
    for bad in ({"adjust_lr": "none"}, {"ns_steps": 0}, {"lr": -1}, {"eps": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fastopt.Muon(w, **bad)
    with pytest.raises(ValueError, match="empty"):
        fastopt.Muon([])


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_and_parts(backend):
    """The average is of all parameters; parts of gradients are their sum."""
    params, whole = draw(0), draw(0)
    how = {"lr": 0.03, "ema": 0.9, "backend": backend}
    opt, other = fastopt.Muon(params, **how), fastopt.Muon(whole, **how)
    expected = draw(0)
    for t in range(1, 4):
        first, second = draw(2 * t), draw(2 * t + 1)
        opt.accumulate(first)
        opt.accumulate(second, grad_scale=0.5)
        opt.step(clip_norm=1.0)
        other.step({n: first[n] + 0.5 * second[n] for n in SHAPES}, clip_norm=1.0)
        for n in SHAPES:
            expected[n] = 0.9 * expected[n] + 0.1 * params[n]
    assert all(same_bits(params[n], whole[n]) for n in SHAPES)
    assert opt.ema_params.keys() == SHAPES.keys()
    for n in SHAPES:
        np.testing.assert_allclose(opt.ema_params[n], expected[n], rtol=1e-12)
    with pytest.raises(TypeError, match="none have been accumulated"):
        opt.step()
    opt.accumulate(first)
    opt.drop_accumulated()
    with pytest.raises(TypeError, match="none have been accumulated"):
        opt.step()


def test_a_flat_buffers_matrices_are_matrices():
    params, grads = draw(0), draw(1)
    flat = fastopt.flatten(params)
    given = flat.zeros_like()
    for n in SHAPES:
        given[n][...] = grads[n]
    fastopt.Muon(params, lr=0.03).step(grads)
    fastopt.Muon(flat, lr=0.03).step(given)
    assert all(same_bits(params[n], flat[n]) for n in SHAPES)


def broken(n):
    if n == 1:
        raise ArithmeticError
    return 0.01


@pytest.mark.parametrize("case", ["read-only", "schedule", "parameter", "shared"])
def test_a_step_is_done_or_not(case):
    params = {"w": np.eye(3), "b": np.ones(3), "v": np.ones(3)}
    opt = fastopt.Muon(params, lr=broken, adamw={"lr": 0.1})
    opt.step({n: np.ones_like(p) for n, p in params.items()})
    if case != "schedule":
        opt.matrices.lr = 0.01
    grads = {n: np.ones_like(p) for n, p in params.items()}
    wanted = {"read-only": "read-only", "parameter": "overlaps", "shared": "overlap"}
    if case == "read-only":
        grads["b"].flags.writeable = False
    elif case == "parameter":
        grads["w"] = params["w"]
    elif case == "shared":
        grads["b"] = grads["w"][0]
    before = opt.state_dict(), {n: p.copy() for n, p in params.items()}
    error = ArithmeticError if case == "schedule" else ValueError
    with pytest.raises(error, match=wanted.get(case)):
        opt.step(grads, zero_grads=True)
    for part in ("momentum", "matrices", "others"):
        assert opt.state_dict()[part]["steps"] == before[0][part]["steps"] == 1
    assert all(same_bits(params[n], before[1][n]) for n in params)
    assert case == "parameter" or all(g.all() for g in grads.values())


def test_a_load_is_done_or_not():
    def made():
        return fastopt.Muon({"w": np.eye(3), "b": np.ones(3)})

    opt, other = made(), made()
    opt.step({"w": np.full((3, 3), np.nan), "b": np.ones(3)}, nonfinite="skip")
    opt.step({"w": np.ones((3, 3)), "b": np.ones(3)})
    saved = opt.state_dict()
    saved["others"]["groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be at least 0"):
        other.load_state_dict(saved)
    assert other.steps == 0
    saved["others"]["groups"][0]["lr"] = 0.1
    other.load_state_dict(saved)
    assert other.steps == 1 and other.skipped == 1
