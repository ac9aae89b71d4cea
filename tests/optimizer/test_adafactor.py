"""Adafactor against its definition in float64, torch's, and its other backends."""

import math
import tracemalloc

import numpy as np
import pytest
from cases import DTYPES, nonzero, odd_view, same_bits
from installed import BACKENDS, needs_numba, numba_cpu

import fastopt
from fastopt import step
from fastopt.memory import factored
from fastopt.rules.adafactor import adafactor, scalars, settle

SHAPES = [(5,), (), (7, 3), (3, 7), (1, 9), (9, 1), (2, 4, 5)]
# More than one tile down, across and both; many small matrices; long and narrow.
LARGE = [(520, 70), (5, 4100), (2, 515, 2050), (700, 3, 3), (40000, 2), (2, 40000)]
VALUES = {
    "lr": 0.03,
    "beta2_decay": -0.7,
    "eps1": 1e-3,
    "eps2": 2e-2,
    "d": 0.8,
    "weight_decay": 0.2,
}


def draw(seed, shape, dtype=np.float64):
    size = math.prod(shape)
    return nonzero(np.random.default_rng(seed), size, dtype).reshape(shape)


def mean_square(x, axis=None):
    return np.mean(x**2, axis=axis, keepdims=axis is not None)


def oracle(t, p, g, v, *, lr, beta2_decay, eps1, eps2, d, weight_decay):
    """Shazeer & Stern 2018, algorithms 4 and 5 with section 7's decay and 8's steps;
    the epsilons, lr and weight decay where torch has them."""
    beta2 = 1 - t**beta2_decay
    if p.ndim > 1:
        seen = mean_square(g, -1), mean_square(g, -2)
        v = [beta2 * old + (1 - beta2) * new for old, new in zip(v, seen, strict=True)]
        rows, columns = v
        guess = rows * columns / np.maximum(rows.mean(-2, keepdims=True), eps1)
    else:
        v = guess = beta2 * v[0] + (1 - beta2) * g**2
        v = [v, 0]
    u = g / np.sqrt(np.maximum(guess, eps1**2))
    u = u / max(1, np.sqrt(mean_square(u)) / d)
    step = min(lr, 1 / np.sqrt(t)) * max(eps2, np.sqrt(mean_square(p)))
    return p - lr * weight_decay * p - step * u, v


def follow(p, grads, start=1, v=(0, 0), **values):
    for t, grad in enumerate(grads, start):
        p, v = oracle(t, p, grad, v, **values)
    return p, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE[0], LARGE[2]])
@pytest.mark.parametrize(
    "change", [{}, {"d": 3.0}, {"eps1": 1.0}, {"lr": 0.8}], ids=str
)
def test_agrees_with_its_definition(backend, shape, change):
    p, values = draw(0, shape), VALUES | change
    grads = [draw(t, shape) for t in range(1, 31 if math.prod(shape) < 100 else 4)]
    expected, v = follow(p, grads, **values)
    opt = fastopt.Adafactor([p], backend=backend, **values)
    for grad in grads:
        opt.step([grad])
    np.testing.assert_allclose(p, expected, rtol=1e-10, atol=1e-13)
    if len(shape) > 1:
        v = np.concatenate([v[0][..., 0], v[1][..., 0, :]], axis=-1)
    else:
        v = v[0]
    np.testing.assert_allclose(opt.state["v"][0], v, rtol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_torch(shape, dtype):
    """In float32, torch rounds every sum on its way: 200 steps apart by some 6e-6."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    p = draw(0, shape, dtype)
    values = dict(VALUES)
    eps = values["eps1"], values["eps2"]
    theirs = {k: v for k, v in values.items() if k not in ("eps1", "eps2", "d")}
    tensor = torch.nn.Parameter(torch.from_numpy(p.copy()))
    other = torch.optim.Adafactor([tensor], eps=eps, d=1.5, foreach=False, **theirs)
    opt = fastopt.Adafactor([p], **values | {"d": 1.5})
    for t in range(1, 201):
        grad = draw(t, shape, dtype)
        tensor.grad = torch.from_numpy(grad.copy())
        other.step()
        opt.step([grad])
    rtol, atol = (1e-10, 0) if dtype == np.float64 else (5e-5, 1e-7)
    np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_least_mean_of_rows(backend):
    """Below eps1, but so that the estimate is above its square."""
    p, grad = draw(0, (3, 7)), np.random.default_rng(1).uniform(0.05, 0.08, (3, 7))
    values = VALUES | {"eps1": 0.01, "d": 100.0}  # or clipping would hide it
    expected, (rows, columns) = follow(p, [grad], **values)
    assert rows.mean() < 0.01 and (rows * columns / 0.01).min() > 0.01**2
    fastopt.Adafactor(p, backend=backend, **values).step(grad)
    np.testing.assert_allclose(p, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_defaults_are_torchs(dtype):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    p, b = draw(0, (4, 6), dtype), draw(1, (3,), dtype) * 1e-4
    tensors = [torch.nn.Parameter(torch.from_numpy(a.copy())) for a in (p, b)]
    other, opt = torch.optim.Adafactor(tensors), fastopt.Adafactor([p, b])
    for t in range(1, 21):
        grads = [draw(t, (4, 6), dtype) * 1e-5, draw(-t % 99, (3,), dtype) * 1e-6]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.from_numpy(grad.copy())
        other.step()
        opt.step(grads)
    rtol = 1e-10 if dtype == np.float64 else 1e-5
    for ours, theirs in zip((p, b), tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=rtol)


# The same bits


def run(backend, shape, dtype, *, offset=0, steps=3, threads=None, **asked):
    p = odd_view(draw(0, shape, dtype), offset)
    opt = fastopt.Adafactor([p], backend=backend, threads=threads, **VALUES)
    for t in range(1, steps + 1):
        grad = odd_view(draw(t, shape, dtype), offset)
        before = grad.copy()
        opt.step([grad], grad_scale=0.7, **asked)
        assert same_bits(grad, before)
    return p, opt.state["v"][0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_same_bits(shape, dtype):
    for asked in ({}, {"clip_value": 0.3}):
        p, v = run("numpy", shape, dtype, **asked)
        for backend in BACKENDS[1:]:
            for threads, offset in ((1, 0), (1, 3), (2, 1), (3, 0), (7, 3)):
                found = run(
                    backend, shape, dtype, offset=offset, threads=threads, **asked
                )
                assert same_bits(p, found[0]) and same_bits(v, found[1])


@needs_numba
def test_same_bits_of_numba_alone(monkeypatch):
    expected = [run("numpy", shape, np.float32) for shape in (*SHAPES, LARGE[0])]
    monkeypatch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
    found = [run("numba", shape, np.float32) for shape in (*SHAPES, LARGE[0])]
    for ours, theirs in zip(found, expected, strict=True):
        assert same_bits(ours[0], theirs[0]) and same_bits(ours[1], theirs[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_what_is_not_finite_spreads_alike(backend, bad):
    found = []
    for name in ("numpy", backend):
        p, grad = draw(0, (6, 70), np.float32), draw(1, (6, 70), np.float32)
        grad[-1, -1] = bad
        opt = fastopt.Adafactor(p, backend=name)
        for g in (grad, draw(2, (6, 70), np.float32)):
            opt.step(g)
        found.append((p, opt.state["v"][0]))
    assert same_bits(found[0][0], found[1][0]) and same_bits(found[0][1], found[1][1])


def test_the_order_of_sums():
    """Rows by lanes and halves, columns from above, tile after tile: in plain loops."""
    rows, columns = factored.TILE_ROWS, factored.TILE_COLUMNS
    height, width = rows + 6, columns + 70
    squares = draw(0, (1, height, width), np.float32).astype(np.float64) ** 2
    by_row, by_column = factored.square_sums(draw(0, (1, height, width), np.float32))
    for i in (*range(0, rows, 9), *range(rows, height)):
        total = 0.0
        for left in range(0, width, columns):
            lanes = [0.0] * 32
            for k, x in enumerate(squares[0, i, left : left + columns].tolist()):
                lanes[k % 32] += x
            for half in (16, 8, 4, 2, 1):
                lanes = [lanes[k] + lanes[k + half] for k in range(half)]
            total += lanes[0]
        assert by_row[0, i] == total
    for j in (*range(0, columns, 99), *range(columns, width)):
        total = 0.0
        for top in range(0, height, rows):
            tile = 0.0
            for x in squares[0, top : top + rows, j].tolist():
                tile += x
            total += tile
        assert by_column[0, j] == total


# A run that goes on


@pytest.mark.parametrize("stop", [0, 1, 2, 5])
def test_a_run_goes_on_exactly(stop):
    shapes = [(5,), (), (7, 3), (2, 4, 5), (0, 3)]
    params = [draw(k, shape) for k, shape in enumerate(shapes)]
    opt = fastopt.Adafactor(params, **VALUES, ema=0.9)

    def grads(t):
        return [draw(t + k, shape) for k, shape in enumerate(shapes)]

    for t in range(stop):
        opt.step(grads(t))
    again = [p.copy() for p in params]
    saved = opt.state_dict()
    other = fastopt.Adafactor(again, backend="numpy", ema=0.5)
    other.step(grads(99))  # what was there before is gone
    for value, p in zip(again, params, strict=True):
        value[...] = p
    other.load_state_dict(saved)
    other.ema = 0.9
    for t in range(stop, 7):
        opt.step(grads(t))
        other.step(grads(t))
    for a, b in zip(params, again, strict=True):
        assert same_bits(a, b)
    for a, b in zip(opt.ema_params, other.ema_params, strict=True):
        assert same_bits(a, b)
    assert opt.steps == other.steps == 7


def test_a_saved_state_is_a_copy_and_is_checked():
    p = draw(0, (4, 3))
    opt = fastopt.Adafactor([p])
    opt.step([draw(1, (4, 3))])
    saved = opt.state_dict()
    kept = saved["state"]["v"][0].copy()
    opt.step([draw(2, (4, 3))])
    opt.step([draw(3, (4, 3))])
    assert same_bits(saved["state"]["v"][0], kept)
    before = opt.state_dict()
    for bad in (np.zeros((4, 3)), np.zeros(6), np.zeros(7, np.float32)):
        with pytest.raises((TypeError, ValueError), match=r"state\[\"v\"\]\[0\]"):
            opt.load_state_dict({**saved, "state": {"v": [bad]}, "steps": 9})
        assert opt.steps == 3
        assert same_bits(opt.state["v"][0], before["state"]["v"][0])


def test_an_interrupted_step_is_none(monkeypatch):
    p, q = draw(0, (4, 3)), draw(0, (4, 3))
    opt, other = fastopt.Adafactor(p), fastopt.Adafactor(q)
    for o in (opt, other):
        o.step(draw(1, (4, 3)))
    before = opt.state["v"][0].copy()

    advance = step.advance_factors

    def interrupt(*args):
        advance(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "advance_factors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opt.step(draw(9, (4, 3)))
    assert same_bits(opt.state["v"][0], before)
    for o in (opt, other):
        o.step(draw(2, (4, 3)))
    assert same_bits(p, q) and same_bits(opt.state["v"][0], other.state["v"][0])


# Edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_zeros_and_the_first_step(backend, shape):
    p, zero = draw(0, shape, np.float32), np.zeros(shape, np.float32)
    for eps1 in (None, 1e-30):
        before = p.copy()
        opt = fastopt.Adafactor(p, backend=backend, eps1=eps1)
        opt.step(zero)
        assert same_bits(p, before) and not opt.state["v"][0].any()
    # The gradient's size drops out of the first step, which is lr of the parameters'.
    p = np.full(shape, 2.0)
    fastopt.Adafactor(p, backend=backend, lr=0.25).step(np.full(shape, 7.0))
    np.testing.assert_allclose(p, 1.5, rtol=1e-14)
    before = p.copy()
    opt = fastopt.Adafactor(p, backend=backend, lr=0, weight_decay=0.3)
    opt.step(draw(1, shape))
    assert same_bits(p, before) and opt.state["v"][0].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_arrays(backend):
    shapes = [(0,), (0, 3), (3, 0), (0, 2, 2), (2, 2, 0), (2, 2)]
    params = [draw(0, shape) for shape in shapes]
    alone = params[-1].copy()
    opt = fastopt.Adafactor(params, backend=backend, weight_decay=0.1)
    other = fastopt.Adafactor(alone, backend=backend, weight_decay=0.1)
    for t in range(3):
        opt.step([draw(t, shape) for shape in shapes], clip_norm=1.0)
        other.step(draw(t, (2, 2)), clip_norm=1.0)
    assert same_bits(params[-1], alone)
    assert not any(state.any() for state in opt.state["v"][:-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pause", [1, 2])
def test_none_leaves_an_array_and_its_state_alone(backend, pause):
    a, b = draw(0, (4, 3)), draw(0, (5,))
    opt = fastopt.Adafactor([a, b], backend=backend, **VALUES)
    opt.step([draw(1, (4, 3)), draw(1, (5,))])
    before, v = a.copy(), opt.state["v"][0].copy()
    for _ in range(pause):
        opt.step([None, draw(2, (5,))])
        assert same_bits(a, before) and same_bits(opt.state["v"][0], v)
    opt.step([draw(3, (4, 3)), None])
    first, state = follow(draw(0, (4, 3)), [draw(1, (4, 3))], **VALUES)
    then, _ = follow(first, [draw(3, (4, 3))], 2 + pause, state, **VALUES)
    np.testing.assert_allclose(a, then, rtol=1e-12)


def test_it_keeps_rows_and_columns_alone():
    """And makes room for little else: a large matrix's step needs next to nothing."""
    w, grad = draw(0, (1000, 800), np.float32), draw(1, (1000, 800), np.float32)
    opt = fastopt.Adafactor(w)
    opt.step(grad)  # what is imported and compiled by now does not count
    tracemalloc.start()
    try:
        opt = fastopt.Adafactor(w)
        kept = tracemalloc.get_traced_memory()[0]
        opt.step(grad)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opt.state["v"][0].shape == (1800,)
    assert kept < 6 * 1800 * 4 + 20_000
    assert peak < w.nbytes / 10 or opt.backend == "numpy"


# What Optimizer.step does for every rule


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping(backend):
    shapes = [(4, 3), (5,)]
    grads = [draw(t, shape) for t, shape in enumerate(shapes, 1)]
    norm = math.sqrt(sum(np.sum(g**2) for g in grads))

    def after(grads, **asked):
        params = [draw(0, shape) for shape in shapes]
        opt = fastopt.Adafactor(params, backend=backend, **VALUES)
        opt.step([draw(9, shape) for shape in shapes])
        opt.step(grads, **asked)
        return params, opt

    clipped, opt = after(grads, clip_norm=0.5)
    assert opt.grad_norm == pytest.approx(norm, rel=1e-12)
    scaled, _ = after(grads, grad_scale=0.5 / (opt.grad_norm + 1e-6))
    limited, _ = after(grads, clip_value=0.01)
    given, _ = after([np.clip(g, -0.01, 0.01) for g in grads])
    zeroed, _ = after(copies := [g.copy() for g in grads], zero_grads=True)
    plain, _ = after(grads)
    for k in range(2):
        assert same_bits(clipped[k], scaled[k]) and same_bits(limited[k], given[k])
        assert same_bits(zeroed[k], plain[k]) and not copies[k].any()
        assert not same_bits(clipped[k], plain[k])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite(backend):
    p, grad = draw(0, (4, 3)), draw(1, (4, 3))
    opt = fastopt.Adafactor(p, backend=backend)
    opt.step(grad)
    before, v = p.copy(), opt.state["v"][0].copy()
    grad[-1, -1] = math.inf
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        opt.step(grad, nonfinite="raise")
    opt.step(grad, nonfinite="skip", zero_grads=True)
    assert opt.skipped == 1 and opt.steps == 1 and not grad.any()
    assert same_bits(p, before) and same_bits(opt.state["v"][0], v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_averages_schedules_and_lookahead(backend):
    p, q = draw(0, (4, 3)), draw(0, (4, 3))
    opt = fastopt.Adafactor(p, backend=backend, lr=lambda done: 0.1 / (1 + done))
    other = fastopt.Adafactor(q, backend=backend, ema=0.9)
    average = p.copy()
    for t in range(3):
        opt.step(2 * draw(t, (4, 3)))
        other.lr = 0.1 / (1 + t)
        other.accumulate(draw(t, (4, 3)))
        other.accumulate(draw(t, (4, 3)))
        other.step()
        average = 0.9 * average + 0.1 * q
    assert same_bits(p, q)
    np.testing.assert_allclose(other.ema_params, average, rtol=1e-12)
    ahead = fastopt.Lookahead(fastopt.Adafactor(q, backend=backend), k=2)
    for t in range(4):
        ahead.step(draw(t, (4, 3)))
    assert ahead.steps == 4


def test_groups_and_the_epsilon_of_the_dtype():
    for dtype in DTYPES:
        eps = float(np.finfo(dtype).eps)
        a, b, c = (draw(k, (3, 2), dtype) for k in range(3))
        alone = [x.copy() for x in (a, b, c)]
        opt = fastopt.Adafactor([{"params": [a]}, {"params": [b], "eps1": 0.5}], d=2.0)
        assert opt.groups[0]["eps1"] == eps and opt.groups[1]["eps1"] == 0.5
        grad = draw(9, (3, 2), dtype)
        opt.step([[grad], [grad]])
        opt.add_group({"params": [c], "frozen": True})
        assert opt.groups[2]["eps1"] == eps and opt.groups[2]["d"] == 1.0
        opt.step([[grad], [grad], [grad]])
        others = [
            fastopt.Adafactor(alone[0], d=2.0),
            fastopt.Adafactor(alone[1], d=2.0, eps1=0.5),
        ]
        for other in others:
            other.step(grad)
            other.step(grad)
        for ours, theirs in zip((a, b, c), alone, strict=True):
            assert same_bits(ours, theirs)
    with pytest.raises(TypeError, match="a group is a dict"):
        opt.add_group([c])


def test_an_eps1_of_none_in_a_group():
    """None is the machine epsilon, whatever the others have."""
    for dtype in DTYPES:
        a, b, c = (draw(k, (3, 2), dtype) for k in range(3))
        alone = [x.copy() for x in (a, b)]
        groups = [{"params": a, "eps1": None}, {"params": b, "lr": 0.1}]
        opt = fastopt.Adafactor(groups, eps1=0.5)
        opt.step([draw(9, (3, 2), dtype)] * 2)
        for x, given in zip(alone, ({}, {"lr": 0.1, "eps1": 0.5}), strict=True):
            fastopt.Adafactor(x, **given).step(draw(9, (3, 2), dtype))
        assert same_bits(a, alone[0]) and same_bits(b, alone[1])
        opt.add_group({"params": c, "eps1": None})
        eps = float(np.finfo(dtype).eps)
        assert [group["eps1"] for group in opt.groups] == [eps, 0.5, eps]
        assert groups[0]["eps1"] is None  # the caller's own


def test_arrays_of_a_flat_buffer_are_factored_one_by_one():
    flat = fastopt.flatten({"w": draw(0, (4, 3)), "b": draw(1, (5,))})
    tree = {"w": draw(0, (4, 3)), "b": draw(1, (5,))}
    grads = {"w": draw(2, (4, 3)), "b": draw(3, (5,))}
    fastopt.Adafactor(flat).step(fastopt.flatten(grads))
    fastopt.Adafactor(tree).step(grads)
    assert all(same_bits(flat[n], tree[n]) for n in tree)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refusal_writes_nothing(backend):
    p = [draw(0, (4, 3)), draw(0, (5,))]
    before = [a.copy() for a in p]
    opt = fastopt.Adafactor(p, backend=backend)
    fit = [draw(1, (4, 3)), draw(1, (5,))]
    bad = [np.ones((3, 4)), np.ones((4, 3), np.float32), np.ones((3, 4)).T, p[0]]
    for grad in bad:
        with pytest.raises((TypeError, ValueError), match=r"grads\[0\]"):
            opt.step([grad, fit[1]])
    with pytest.raises(ValueError, match="entries"):
        opt.step(fit[:1])
    assert opt.steps == 0 and not opt.state["v"][0].any()
    for a, b in zip(p, before, strict=True):
        assert same_bits(a, b)


def test_hyperparameters_out_of_range():
    w = np.ones((2, 2))
    for bad in (
        {"lr": -1},
        {"beta2_decay": 0.1},
        {"eps1": 0},
        {"eps1": -1.0},
        {"eps2": -1.0},
        {"d": 0},
        {"weight_decay": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fastopt.Adafactor(w, **bad)
    opt = fastopt.Adafactor(w)
    with pytest.raises(ValueError, match="d must be above 0"):
        opt.d = -1
    assert opt.d == 1.0
    with pytest.raises(TypeError, match="eps1 must be a number"):
        opt.eps1 = None


def test_a_factored_rule_measures_segments_and_has_one_state():
    assert adafactor.factored
    for given in (
        {"state": ("v",)},
        {
            "state": ("v",),
            "measure": adafactor.measure,
            "settle": settle,
            "over": "all",
        },
    ):
        with pytest.raises(TypeError, match="a factored rule needs"):
            fastopt.Rule(adafactor.update, scalars, factored=True, **given)
