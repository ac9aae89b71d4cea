"""The edges, for every rule and backend: a gradient of zeros, a learning rate of zero,
a first step, arrays without elements or dimensions. (An infinity: test_step.py.)"""

import numpy as np
import pytest
from cases import CASES, IDS, nonzero, same_bits
from installed import BACKENDS

from fastopt import RULES

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def decay_off(rule):
    """Without what moves parameters even when the gradient is zero."""
    return {
        name: 0.0
        for name in ("weight_decay", "lambd", "l2", "l2_shrinkage")
        if name in rule.hyperparameters
    }


@every_backend
@every_rule
def test_zero_gradients_move_nothing(rule, backend):
    """From the first step on, and nothing becomes NaN."""
    p = nonzero(np.random.default_rng(0), 50, np.float32)
    before = p.copy()
    opt = rule(p, backend=backend, **decay_off(rule))
    for _ in range(3):
        opt.step(np.zeros(50, np.float32))
        assert all(np.isfinite(a[0]).all() for a in opt.state.values())
        assert np.isfinite(p).all()
    # Yogi's m starts at 1e-6, and so it moves; FTRL's parameters are a function of its
    # sums alone, which are zero.
    assert rule.name in ("yogi", "ftrl") or np.array_equal(p, before)


@every_backend
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_a_learning_rate_of_zero(rule, values, backend):
    p = nonzero(np.random.default_rng(0), 50, np.float32)
    before = p.copy()
    opt = rule(p, backend=backend, **{**values, "lr": 0})
    for k in range(3):
        opt.step(nonzero(np.random.default_rng(k), 50, np.float32))
        assert all(np.isfinite(a[0]).all() for a in opt.state.values())
    if rule.name == "rprop":  # lr is only where its steps begin
        assert np.isfinite(p).all()
    else:
        np.testing.assert_allclose(p, before, rtol=1e-6)


@every_backend
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_arrays_without_elements_or_dimensions(rule, values, backend):
    """They do as their neighbours do, alone and beside them."""
    scalar, row = np.array(1.5, np.float32), np.array([1.5], np.float32)
    empty = np.zeros((3, 0, 2), np.float32)
    opt = rule([empty, scalar], backend=backend, **values)
    other = rule([row], backend=backend, **values)
    for g in (0.7, -0.2, 0.4):
        opt.step([empty.copy(), np.array(g, np.float32)])
        other.step([np.array([g], np.float32)])
    assert same_bits(scalar, row[0:1].reshape(()))
    for mine, theirs in zip(opt.state.values(), other.state.values(), strict=True):
        assert mine[0].shape == empty.shape and mine[1].shape == ()
        assert same_bits(mine[1].reshape(1), theirs[0])
    nothing = rule(empty, backend=backend, **values)
    nothing.step(empty.copy(), clip_norm=1.0, nonfinite="raise")
    assert nothing.steps == 1 and nothing.grad_norm == 0


@every_backend
@every_rule
def test_a_gradient_that_is_none_leaves_all_alone(rule, backend):
    params = [np.ones(3, np.float32), np.ones(3, np.float32)]
    opt = rule(params, backend=backend)
    opt.step([np.ones(3, np.float32), np.ones(3, np.float32)])
    before = [params[1].copy(), *(a[1].copy() for a in opt.state.values())]
    opt.step([np.ones(3, np.float32), None])
    after = [params[1], *(a[1] for a in opt.state.values())]
    assert all(map(same_bits, before, after))
    opt.step([None, None])
    assert opt.steps == 3 and np.isfinite(params[0]).all()


@every_backend
@every_rule
def test_state_starts_where_the_first_step_finds_the_parameters(rule, backend):
    """A model may be loaded after its optimizer was made."""
    loaded = nonzero(np.random.default_rng(1), 20, np.float32)
    p, q = np.zeros(20, np.float32), loaded.copy()
    opt = rule(p, backend=backend)
    p[:] = loaded
    other = rule(q, backend=backend)
    for k in range(3):
        grad = nonzero(np.random.default_rng(k), 20, np.float32)
        opt.step(grad)
        other.step(grad)
    assert same_bits(p, q)
