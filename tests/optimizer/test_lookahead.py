"""Lookahead against its definition, with any rule and backend, and resumed anywhere."""

import copy

import ml_dtypes
import numpy as np
import pytest
from cases import nonzero, same_bits
from installed import BACKENDS

import fastopt
from fastopt.runtime.atomic import uninterrupted


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
    assert all(map(same_bits, slow, opt.state_dict()["slow"]))
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
    params = start()
    opt = fastopt.Lookahead(fastopt.adam(params), k=3, alpha=0.3)
    for grads in gradients(7)[:stop]:
        opt.step(grads)
    saved, again = opt.state_dict(), [p.copy() for p in params]
    other = fastopt.Lookahead(fastopt.adam(again))
    other.load_state_dict(saved)
    assert (other.k, other.alpha) == (3, 0.3)
    for grads in gradients(7)[stop:]:
        opt.step(grads)
        other.step(grads)
    assert all(map(same_bits, params, again))


def test_parameters_added_later():
    p, q = np.ones(2), np.ones(3)
    opt = fastopt.Lookahead(fastopt.gd(p, lr=1.0), k=2, alpha=0.5)
    opt.step(np.ones(2))
    opt.add_group({"params": q, "lr": 1.0})
    q += 1
    opt.step([np.ones(2), np.full(3, 4.0)])
    assert np.all(p == 0) and np.all(q == 0)
    other = fastopt.gd([{"params": p.copy()}, {"params": q.copy()}])
    saved = opt.state_dict()
    assert len(saved["slow"]) == 2
    fastopt.Lookahead(other).load_state_dict(saved)


@pytest.mark.parametrize("make", [fastopt.Muon, fastopt.Adafactor])
def test_around_optimizers_of_their_own_class(make):
    fast, params = np.eye(3), np.eye(3)
    inner, opt = make(fast, lr=0.1), fastopt.Lookahead(make(params, lr=0.1), k=2)
    for seed in range(2):
        grads = np.random.default_rng(seed).standard_normal((3, 3))
        inner.step(grads)
        opt.step(grads)
    np.testing.assert_allclose(params, (np.eye(3) + fast) / 2, rtol=1e-15)


def test_what_does_not_fit():
    opt = fastopt.gd(np.ones(3))
    for bad in ({"k": 0}, {"k": 1.5}, {"alpha": 0}, {"alpha": 1.5}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"^{name} must be"):
            fastopt.Lookahead(opt, **bad)
        good = fastopt.Lookahead(opt)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            setattr(good, name, value)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            good.load_state_dict(good.state_dict() | bad)
        assert (good.k, good.alpha) == (5, 0.5)
    with pytest.raises(TypeError, match="k must be a number"):
        fastopt.Lookahead(opt, k=True)
    with pytest.raises(TypeError, match="must be an optimizer"):
        fastopt.Lookahead(np.ones(3))
    with pytest.raises(TypeError, match="expected the keys"):
        fastopt.Lookahead(opt).load_state_dict({})


def test_a_load_is_done_or_not():
    p = np.ones(3)
    opt = fastopt.Lookahead(fastopt.gd(p, lr=0.5), k=2)
    opt.step(np.ones(3))
    good, before = opt.state_dict(), opt.state_dict()
    for wrong in ("slow", "opt", "alpha"):
        saved = copy.deepcopy(good)
        saved["slow"][0] += 1
        saved["opt"]["groups"][0]["lr"] = 0.25
        if wrong == "slow":
            saved["slow"][0] = np.ones(2)
        elif wrong == "opt":
            saved["opt"]["groups"][0]["lr"] = -1.0
        else:
            saved["alpha"] = 0.0
        with pytest.raises(ValueError):
            opt.load_state_dict(saved)
        assert opt.lr == 0.5 and same_bits(opt.state_dict()["slow"][0], np.ones(3))
    assert opt.state_dict()["opt"] == before["opt"]


def test_what_is_set_is_the_inner_optimizers():
    w = np.zeros(1)
    opt = fastopt.Lookahead(fastopt.gd(w, lr=0.5))
    opt.lr = 0.1
    assert opt.opt.lr == 0.1
    with pytest.raises(AttributeError, match="opt is fixed"):
        opt.opt = fastopt.gd(w)
    with pytest.raises(AttributeError, match="no hyperparameter 'beta'"):
        opt.beta = 3


def test_k_and_alpha_may_change():
    p = np.zeros(1)
    opt = fastopt.Lookahead(fastopt.gd(p, lr=1.0), k=2, alpha=0.5)
    for _ in range(2):
        opt.step(-np.ones(1))
    assert p == 1
    opt.k, opt.alpha = 3, 1.0
    opt.step(-np.ones(1))
    assert p == 2
    for _ in range(2):
        opt.step(-np.ones(1))
    opt.alpha = 0.25
    opt.step(-np.ones(1))
    assert p == 2.75 and opt.k == 3


@pytest.mark.parametrize("loaded", [False, True])
def test_what_is_written_between_two_steps_stays(loaded):
    p = np.zeros(1)
    opt = fastopt.Lookahead(fastopt.gd(p, lr=1.0), k=2, alpha=0.5)
    for _ in range(2):
        opt.step(-np.ones(1))
    if loaded:
        saved, p = opt.state_dict(), p.copy()
        opt = fastopt.Lookahead(fastopt.gd(p))
        opt.load_state_dict(saved)
    p += 10
    opt.state_dict()
    opt.step(-np.ones(1))
    assert p == 12
    opt.step(-np.ones(1))
    assert p == 7  # half of the way from 1 to 13


class Interrupting:
    """A runner whose pass comes before an interrupt, or after one."""

    fuses = frozenset()

    def __init__(self, runner, after):
        self.runner, self.after, self.take = runner, after, runner.take

    def calls(self, rows, request, steps):
        def interrupted():
            if self.after:
                uninterrupted(*self.runner.calls(rows, request, steps))
            raise KeyboardInterrupt

        return [interrupted]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", ["step", "pass", "passed"])
@pytest.mark.parametrize("then", ["step", "save", "add"])
def test_an_interrupt_does_not_split_a_synchronization(backend, at, then, monkeypatch):
    def made(params):
        inner = fastopt.adam(params, lr=0.1, backend=backend)
        return fastopt.Lookahead(inner, k=2, alpha=0.3)

    params, expected = start(), start()
    opt, other = made(params), made(expected)
    first, second, third, fourth = gradients(4)
    for one in (opt, other):
        one.step(first)
    if at == "step":  # between it and what is due

        def interrupted(*given):
            fastopt.Optimizer.step(*given)
            raise KeyboardInterrupt

        monkeypatch.setitem(vars(opt.opt), "step", interrupted.__get__(opt.opt))
    else:
        runner = opt._pull.runner
        opt._pull.runner = Interrupting(runner, after=at == "passed")
    with pytest.raises(KeyboardInterrupt):
        opt.step(second)
    monkeypatch.undo()
    opt._pull.runner = getattr(opt._pull.runner, "runner", opt._pull.runner)
    other.step(second)
    assert opt.steps == 2
    if then == "save":
        saved = [one.state_dict() for one in (opt, other)]
        assert all(map(same_bits, *(one["slow"] for one in saved)))
        assert all(map(same_bits, params, expected))
    if then == "add":
        more = [np.ones(3), np.ones(3)]
        for one, array in zip((opt, other), more, strict=True):
            one.add_group({"params": array})
        third, fourth = [third, np.ones(3)], [fourth, np.ones(3)]
        params, expected = [*params, more[0]], [*expected, more[1]]
    for one in (opt, other):
        one.step(third)
        one.step(fourth)
    assert all(map(same_bits, params, expected))
    assert all(map(same_bits, opt._slow, other._slow))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_groups_stay_where_they_are(backend):
    a, b = np.zeros(5), np.full(3, 0.5)
    params = [{"params": a}, {"params": b}]
    opt = fastopt.Lookahead(fastopt.sgd(params, lr=1.0, backend=backend), k=3)
    grads = [np.ones(5), np.full(3, 0.25)]
    opt.step(grads)
    opt.groups[1].frozen = True
    for _ in range(5):  # two synchronizations
        opt.step(grads)
    # 0, -1, -2, -3: half of the way; and once more.
    assert (a == -3.0).all() and (b == 0.25).all()
    opt.groups[1].frozen = False
    for _ in range(3):
        opt.step(grads)
    assert (a == -4.5).all() and (b == (0.5 - 0.5) / 2).all()


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
@pytest.mark.parametrize("kind", ["bf16+r8", "bf16+r16", "bf16"])
def test_parameters_with_remainders(kind, backend):
    """With 16 bits, all is as in float32. All backends have the same bits."""

    def run(param, backend, **options):
        rng = np.random.default_rng(1)
        opt = fastopt.Lookahead(
            fastopt.adamw(param, lr=0.01, backend=backend, **options), k=2
        )
        for _ in range(5):
            opt.step(rng.normal(size=param.size).astype(np.float32))
        return opt

    start = np.random.default_rng(0).normal(size=5003).astype(ml_dtypes.bfloat16)
    formats = {"param": kind, "m": "m8", "v": "v8"}
    expected = run(start.copy(), "numpy", formats=formats)
    got = run(start.copy(), backend, formats=formats)
    assert got.master_params().tobytes() == expected.master_params().tobytes()
    for name, (array,) in expected.state.items():
        assert got.state[name][0].tobytes() == array.tobytes()
    if kind == "bf16+r16":
        exact = start.astype(np.float32)
        run(exact, backend, formats={"m": "m8", "v": "v8"})
        assert got.master_params().tobytes() == exact.tobytes()


def test_memory_includes_the_slow_weights():
    opt = fastopt.Lookahead(fastopt.adamw(np.ones(5000, np.float32), formats="8bit"))
    opt.step(np.ones(5000, np.float32))
    usage = opt.memory()
    assert usage.elements == 5000
    assert usage.buffers == (*opt.opt.memory().buffers, ("slow", "float32", 20_000))
