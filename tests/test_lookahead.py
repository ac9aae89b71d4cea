"""Lookahead against its definition, with any rule and backend, and resumed anywhere."""

import numpy as np
import pytest
from cases import nonzero, same_bits

import fastopt
from fastopt import cython_cpu

BACKENDS = ["numpy", "numba", *([] if cython_cpu.missing() else ["cython"])]


def gradients(count):
    rng = np.random.default_rng(1)
    return [
        [nonzero(rng, size, np.float64) for size in (40_003, 5)] for _ in range(count)
    ]


def start():
    rng = np.random.default_rng(0)
    return [nonzero(rng, size, np.float64) for size in (40_003, 5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adamw", "lamb"])
def test_lookahead(rule, backend):
    """Zhang et al. 2019, algorithm 1, around steps of the same optimizer."""
    params = [np.zeros_like(p) for p in start()]
    opt = fastopt.Lookahead(
        getattr(fastopt, rule)(params, lr=0.1, backend=backend), k=3, alpha=0.3
    )
    for p, loaded in zip(params, start(), strict=True):
        p[:] = loaded
    fast, slow = start(), start()
    inner = getattr(fastopt, rule)(fast, lr=0.1, backend="numpy")
    for t, grads in enumerate(gradients(7), 1):
        opt.step(grads)
        inner.step(grads)
        if t % 3 == 0:
            for phi, theta in zip(slow, fast, strict=True):
                phi += 0.3 * (theta - phi)
                theta[:] = phi
    assert all(map(same_bits, params, fast))
    assert opt.steps == 7 and opt.lr == 0.1


def test_a_skipped_step_does_not_count():
    p = np.ones(3)
    opt = fastopt.Lookahead(fastopt.gd(p, lr=1.0), k=2, alpha=0.5)
    opt.step(np.ones(3))
    for _ in range(3):
        opt.step(np.full(3, np.nan), nonfinite="skip")
    assert np.all(p == 0) and opt.skipped == 3
    opt.step(np.ones(3))
    assert np.all(p == 0)  # half of the way from 1 to -1


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_a_run_goes_on_exactly(stop):
    def made(params):
        return fastopt.Lookahead(fastopt.adam(params), k=3)

    params = start()
    opt = made(params)
    for grads in gradients(7)[:stop]:
        opt.step(grads)
    saved, again = opt.state_dict(), [p.copy() for p in params]
    other = made(again)
    other.load_state_dict(saved)
    for grads in gradients(7)[stop:]:
        opt.step(grads)
        other.step(grads)
    assert all(map(same_bits, params, again))


def test_parameters_added_later():
    p, q = np.ones(2), np.ones(3)
    opt = fastopt.Lookahead(fastopt.gd(p, lr=1.0), k=2, alpha=0.5)
    opt.step(np.ones(2))
    opt.add_group({"params": q, "lr": 1.0})
    opt.step([np.ones(2), np.full(3, 2.0)])
    assert np.all(p == 0) and np.all(q == 0)


def test_what_does_not_fit():
    opt = fastopt.gd(np.ones(3))
    for bad in ({"k": 0}, {"k": 1.5}, {"alpha": 0}, {"alpha": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fastopt.Lookahead(opt, **bad)
    with pytest.raises(TypeError, match="must be an optimizer"):
        fastopt.Lookahead(np.ones(3))
    with pytest.raises(TypeError, match="expected the keys"):
        fastopt.Lookahead(opt).load_state_dict({})


def test_what_is_set_is_the_inner_optimizers():
    w = np.zeros(1)
    opt = fastopt.Lookahead(fastopt.gd(w, lr=0.5))
    opt.lr = 0.1
    assert opt.opt.lr == 0.1
    with pytest.raises(AttributeError, match="k is fixed"):
        opt.k = 3
