"""Stopping and plateaus with the conventions that they state, and the loop that uses
them; and what becomes of NaN, of metrics below zero and of nothing to learn."""

import copy
import itertools
import json
import math
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import fastopt
from fastopt import EarlyStopping, ReduceLROnPlateau, minimize, schedules

NAN, INF = math.nan, math.inf
ALL_SCHEDULES = [
    name
    for name, value in vars(schedules).items()
    if isinstance(value, type) and issubclass(value, schedules.Schedule)
][1:]


def looks(watch, metrics, *more):
    return [watch.step(metric, *more) for metric in metrics]


# Plateaus --------------------------------------------------------------------------


def rates(plateau, metrics, lr=1.0):
    """The learning rate after each look."""
    opt = fastopt.sgd(np.ones(2), lr=lr)
    found = []
    for metric in metrics:
        before, said = opt.lr, plateau.step(metric, opt)
        assert said == (opt.lr < before)
        found.append(opt.lr)
    return found


@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience, cooldown", [(0, 0), (1, 0), (2, 3), (3, 1)])
def test_plateau_is_torch(mode, threshold_mode, patience, cooldown):
    """Where torch is right: with metrics above 0, and without its eps."""
    torch = pytest.importorskip("torch")
    given = dict(
        mode=mode,
        factor=0.5,
        patience=patience,
        threshold=0.03,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        min_lr=0.01,
    )
    rng = np.random.default_rng(patience)
    steps = np.cumsum(rng.normal(scale=0.1, size=60))
    metrics = [*(3 + abs(steps)), NAN, 3.0, INF, 3.0]
    if mode == "max":
        metrics = [-m if m == INF else m for m in metrics]
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    peer = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, eps=0, **given)
    expected = []
    for metric in metrics:
        peer.step(metric)
        expected.append(theirs.param_groups[0]["lr"])
    assert rates(ReduceLROnPlateau(**given), metrics) == expected
    assert len(set(expected)) > 2


def test_patience_of_a_plateau():
    """More than so many looks without an improvement."""
    assert rates(ReduceLROnPlateau(patience=2), [1.0] * 8) == (
        [1, 1, 1, 0.1, 0.1, 0.1, pytest.approx(0.01), pytest.approx(0.01)]
    )


@pytest.mark.parametrize("mode, worse", [("min", 1), ("max", -1)])
@pytest.mark.parametrize("best", [-2.0, 0.0, 2.0])
def test_a_plateau_of_any_sign(mode, worse, best):
    """One that stands still, or gets worse, is one; pytorch#47513."""
    for drift in (0, 1e-5, 0.1):
        plateau = ReduceLROnPlateau(mode=mode, patience=2)
        metrics = [best + worse * drift * i for i in range(4)]
        assert rates(plateau, metrics)[-1] == 0.1
    plateau = ReduceLROnPlateau(mode=mode, patience=2)
    better = [best - worse * 0.1 * i for i in range(9)]
    assert rates(plateau, better)[-1] == 1.0 and plateau.best == better[-1]


def test_threshold_is_a_share_of_the_magnitude():
    plateau = ReduceLROnPlateau(threshold=0.1)
    looks(plateau, [-10.0, -10.9], fastopt.sgd(np.ones(1)))
    assert plateau.best == -10.0 and plateau.bad == 1
    looks(plateau, [-11.1], fastopt.sgd(np.ones(1)))
    assert plateau.best == -11.1 and plateau.bad == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_never_improves(mode, bad):
    """Neither as the first metric, after which all would be worse, nor later."""
    plateau = ReduceLROnPlateau(mode=mode, patience=1)
    opt = fastopt.sgd(np.ones(2), lr=1.0)
    assert looks(plateau, [bad, 3.0, bad, bad], opt) == [False, False, False, True]
    assert plateau.best == 3.0
    stop = EarlyStopping(3, mode=mode)
    assert looks(stop, [bad, bad, 3.0, bad, bad, bad]) == [False] * 5 + [True]
    assert (stop.best, stop.best_look) == (3.0, 2)


def test_small_rates_are_reduced_too():
    """torch's eps of 1e-8 would leave this one."""
    assert rates(ReduceLROnPlateau(patience=0), [1.0] * 2, lr=1e-9)[-1] == (
        pytest.approx(1e-10)
    )


def test_no_rate_is_raised():
    """Not to the least either, and each group has its own."""
    params = [{"params": np.ones(1), "lr": lr} for lr in (1.0, 0.2, 0.1, 0.01)]
    opt = fastopt.sgd(params)
    plateau = ReduceLROnPlateau(patience=0, min_lr=0.1)
    assert looks(plateau, [1.0, 1.0, 1.0], opt) == [False, True, False]
    assert [group["lr"] for group in opt.groups] == [0.1, 0.1, 0.1, 0.01]


def test_both_rates_of_muon():
    opt = fastopt.Muon([np.ones((2, 2)), np.ones(2)], lr=1.0, adamw_lr=0.5)
    assert looks(ReduceLROnPlateau(patience=0), [1.0, 1.0], opt) == [False, True]
    assert (opt.lr, opt.adamw_lr) == (0.1, 0.05)
    opt.adamw_lr = schedules.constant(0.1)
    with pytest.raises(TypeError, match=r"adamw_lr of groups\[0\] is a schedule"):
        ReduceLROnPlateau().step(1.0, opt)


def test_a_schedule_is_not_reduced():
    params = [{"params": np.ones(1)}, {"params": np.ones(1)}]
    opt = fastopt.sgd(params)
    opt.groups[1]["lr"] = schedules.constant(0.1)
    plateau = ReduceLROnPlateau()
    with pytest.raises(TypeError, match=r"lr of groups\[1\] is a schedule, constant"):
        plateau.step(1.0, opt)
    assert plateau.best is None


# Stopping --------------------------------------------------------------------------


def test_patience_of_stopping():
    """At so many looks without an improvement, in a row."""
    for patience in (1, 2, 5):
        assert looks(EarlyStopping(patience), [1.0] * 6) == (
            [False] * patience + [True] * (6 - patience)
        )
    metrics = [3, 4, 2, 5, 5, 1, 5, 5, 5]
    assert looks(EarlyStopping(3), metrics) == [False] * 8 + [True]


@pytest.mark.parametrize("sign", [1, -1])
def test_min_delta_is_absolute(sign):
    stop = EarlyStopping(9, min_delta=0.5, mode="min" if sign == 1 else "max")
    for metric, best in [(0.2, 0.2), (-0.3, 0.2), (-0.4, -0.4), (-0.85, -0.4)]:
        assert not stop.step(sign * metric)
        assert stop.best == sign * best


def test_best_params_are_kept_and_restored():
    """Whether it stopped or not, and in whatever structure."""
    params = {"w": np.arange(3.0), "b": [np.zeros((2, 1))]}
    flat = fastopt.flatten(params)
    for tree, arrays in (
        (params, [params["w"], params["b"][0]]),
        (flat, [flat.data]),
        ([flat, params["w"]], [flat.data, params["w"]]),
    ):
        stop, best = EarlyStopping(9), None
        for metric, value in [(3.0, 1.0), (1.0, 2.0), (2.0, 3.0), (NAN, NAN)]:
            for array in arrays:
                array[...] = value
            stop.step(metric, tree)
            best = copy.deepcopy(arrays) if metric == 1.0 else best
        stop.restore(tree)
        for array, expected in zip(arrays, best, strict=True):
            assert array.tobytes() == expected.tobytes()
            array[...] = 7.0
        stop.restore(tree)  # once more: the copy is the stop's own
        assert all((array == 2.0).all() for array in arrays)


def test_nothing_to_restore():
    for stop in (EarlyStopping(1), EarlyStopping(1)):
        stop.step(NAN, np.ones(1))
        with pytest.raises(ValueError, match="there are no best parameters"):
            stop.restore(np.ones(1))
    stop.step(1.0, np.ones(2))
    with pytest.raises(ValueError, match="shapes"):
        stop.restore(np.ones(1))


@pytest.mark.parametrize("cut", range(8))
def test_watches_go_on_from_their_state(cut):
    metrics = [3.0, 2.0, 2.0, NAN, 2.5, 1.0, 1.0, 1.0]

    def run(watch, *more, state=None):
        if state:
            watch.load_state_dict(json.loads(json.dumps(state)))
        return lambda part: looks(watch, part, *more)

    for make, more in (
        (lambda: EarlyStopping(3), ()),
        (
            lambda: ReduceLROnPlateau(patience=1, cooldown=1),
            (fastopt.sgd(np.ones(1), lr=1.0),),
        ),
    ):
        whole = run(make(), *more)(metrics)
        watch = make()
        first = run(watch, *more)(metrics[:cut])
        second = run(make(), *more, state=watch.state_dict())(metrics[cut:])
        assert first + second == whole and True in whole
        assert pickle.loads(pickle.dumps(watch)).state_dict() == watch.state_dict()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EarlyStopping(0), "patience must be at least 1"),
        (lambda: EarlyStopping(1.5), "patience must be an integer"),
        (lambda: EarlyStopping(1, min_delta=-1), "min_delta must be at least 0"),
        (lambda: EarlyStopping(1, mode="auto"), 'mode must be "min" or "max"'),
        (lambda: EarlyStopping(1).step("1"), "metric must be a number"),
        (lambda: EarlyStopping(1).step(None), "metric must be a number"),
        (lambda: EarlyStopping(1).step(np.ones(1)), "metric must be a number"),
        (lambda: EarlyStopping(1).load_state_dict({}), "expected the keys best"),
        (lambda: ReduceLROnPlateau(factor=1.0), "factor must be between 0 and 1"),
        (lambda: ReduceLROnPlateau(factor=0), "factor must be between 0 and 1"),
        (lambda: ReduceLROnPlateau(patience=-1), "patience must be at least 0"),
        (lambda: ReduceLROnPlateau(threshold=NAN), "threshold must be finite"),
        (lambda: ReduceLROnPlateau(threshold_mode="x"), 'threshold_mode must be "rel"'),
        (lambda: ReduceLROnPlateau(cooldown=True), "cooldown must be an integer"),
        (lambda: ReduceLROnPlateau(min_lr=-1), "min_lr must be at least 0"),
        (lambda: ReduceLROnPlateau().load_state_dict([]), "expected the keys best"),
    ],
)
def test_refusals(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# Minimizing ------------------------------------------------------------------------

H = np.array([1.0, 10.0])


def quadratic(x):
    return float(0.5 * (H * x) @ x), H * x


def test_it_is_the_loop_by_hand():
    start, x = np.array([3.0, -1.0]), np.array([3.0, -1.0])
    lr = schedules.cosine(0.15, 30)
    result = minimize(quadratic, start, fastopt.adam, 30, lr=lr, beta1=0.8)
    opt, losses = fastopt.adam(x, lr=lr, beta1=0.8), []
    for _ in range(30):
        loss, grads = quadratic(x)
        losses.append(loss)
        opt.step(grads)
    losses.append(quadratic(x)[0])
    assert result.losses.tolist() == losses
    assert result.lrs.tolist() == [lr(t) for t in range(31)]
    assert result.steps == result.opt.steps == 30
    assert start.tolist() == [3.0, -1.0]  # it is not changed
    at = int(np.argmin(losses))
    assert (result.step, result.loss) == (at, losses[at])
    assert quadratic(result.params)[0] == losses[at]
    assert result.reason == "all 30 steps are done"


def test_structures():
    """As what comes in, so what comes out."""

    def loss_of(tree):
        return float(tree["w"] @ tree["w"] + (tree["b"][0] ** 2).sum())

    def tree_and_grad(tree):
        return loss_of(tree), {"w": 2 * tree["w"], "b": [2 * tree["b"][0]]}

    start = {"w": np.ones(3), "b": [np.ones((2, 2))]}
    result = minimize(tree_and_grad, start, fastopt.gd, 50, lr=0.1)
    assert result.loss < 1e-8 and result.params["b"][0].shape == (2, 2)

    def flat_and_grad(flat):
        grads = flat.zeros_like()
        grads.data[:] = 2 * flat.data
        return loss_of(flat), grads

    flat = minimize(flat_and_grad, fastopt.flatten(start), fastopt.gd, 50, lr=0.1)
    assert isinstance(flat.params, fastopt.FlatBuffer)
    assert flat.params["w"].tobytes() == result.params["w"].tobytes()


def test_the_best_parameters_are_returned():
    """Of a run that leaves the minimum again: the rate is too large from step 5 on."""
    lr = schedules.multistep(0.09, (5,), gamma=3.0)
    result = minimize(quadratic, np.ones(2), fastopt.gd, 60, lr=lr)
    assert result.losses[-1] > result.losses[0] > result.loss == result.losses.min()
    assert 5 < result.step == int(result.losses.argmin()) < 60
    assert quadratic(result.params)[0] == result.loss
    last = minimize(quadratic, np.ones(2), fastopt.gd, 60, lr=lr, best=False)
    assert (last.step, last.loss) == (60, result.losses[-1])
    assert quadratic(last.params)[0] == last.loss


def test_nan_ends_a_run_and_the_best_is_returned():
    with pytest.warns(RuntimeWarning, match="the loss is (inf|nan) after"):
        with np.errstate(all="ignore"):
            result = minimize(quadratic, np.ones(2), fastopt.gd, 9999, lr=1.0)
    assert result.steps < 9999 and not math.isfinite(result.losses[-1])
    assert "the loss is" in result.reason
    assert result.step == 0 and result.params.tolist() == [1, 1]


def test_gradients_of_nan_end_it_too():
    """Though the loss is still finite when they come."""

    def broken(x):
        loss, grads = quadratic(x)
        return loss, grads * NAN if loss < 0.1 else grads

    with pytest.warns(RuntimeWarning, match="the loss is nan"):
        result = minimize(broken, np.ones(2), fastopt.adam, 500, lr=0.1)
    assert result.loss < 0.1 and np.isfinite(result.params).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_start_that_is_not_finite(bad):
    with pytest.raises(FloatingPointError, match="at x0"):
        minimize(lambda x: (bad, x), np.ones(2), fastopt.gd, 5)


def test_gradients_of_zero():
    """Nothing to learn: nothing happens, for every rule, and that is said."""
    for rule in fastopt.RULES:
        if rule.name == "sophia_g":  # it needs estimates
            continue
        decays = {"weight_decay", "lambd"} & set(rule.hyperparameters)
        given = dict.fromkeys(decays, 0.0)
        start = np.linspace(1, 2, 3)
        stop = EarlyStopping(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = minimize(
                lambda x: (1.0, np.zeros(3)), start, rule, 9, callbacks=[stop], **given
            )
        assert result.steps == 3 and "EarlyStopping" in result.reason, rule.name
        if rule.name != "ftrl":  # its parameters are those that its state says
            assert result.params.tolist() == start.tolist(), rule.name


def test_early_stopping_as_a_callback():
    """It begins anew with each run."""
    stop = EarlyStopping(4, min_delta=1e-3)
    first, second = (
        minimize(quadratic, np.ones(2), fastopt.gd, 500, lr=0.15, callbacks=[stop])
        for _ in range(2)
    )
    assert first.losses.tobytes() == second.losses.tobytes()
    assert 10 < first.steps < 100 and first.reason == "EarlyStopping said so"
    assert len(first.losses) == first.steps + 1


def test_a_plateau_as_a_callback():
    """A rate with which gd goes back and forth, until it is smaller."""
    plateau = ReduceLROnPlateau(factor=0.5, patience=2)
    given = dict(lr=0.2, callbacks=[plateau])
    steps = minimize(quadratic, np.array([0.0, 1.0]), fastopt.gd, 40, **given)
    assert (steps.losses[:4] == 5.0).all() and steps.lrs[:4].tolist() == [0.2] * 4
    assert steps.lrs[4] == 0.1 and steps.loss < 1e-9
    again = minimize(quadratic, np.array([0.0, 1.0]), fastopt.gd, 40, **given)
    assert again.lrs.tolist() == steps.lrs.tolist()


def test_callbacks_see_the_run():
    seen = []

    def watch(run):
        seen.append((run.steps, run.opt.steps, run.loss, run.grads.tolist()))
        assert run.total == 7 and run.losses[-1] == run.loss
        assert quadratic(run.params)[0] == run.loss
        return run.steps == 3

    never = EarlyStopping(100)
    callbacks = iter([watch, never])
    result = minimize(quadratic, np.ones(2), fastopt.gd, 7, callbacks=callbacks)
    assert [step for step, *_ in seen] == [step for _, step, *_ in seen] == [0, 1, 2, 3]
    assert result.steps == 3 and result.reason == "watch said so"
    assert never.looks == 4  # all of them are called, whoever asks


def test_validation_in_a_callback():
    """The recipe of the documentation: noise in training, the best by other data."""
    rng, stop = np.random.default_rng(0), EarlyStopping(3)

    def noisy(x):
        loss, grads = quadratic(x)
        return loss + rng.normal(), grads + rng.normal(size=2)

    def validate(run):
        if run.steps % 10 == 0:
            return stop.step(quadratic(run.params)[0], run.params)

    result = minimize(
        noisy, np.full(2, 5.0), fastopt.adam, 5000, lr=0.1, callbacks=[validate]
    )
    assert result.steps < 5000 and result.reason == "validate said so"
    stop.restore(result.params)
    assert quadratic(result.params)[0] == stop.best


@pytest.mark.parametrize("rule", ["schedule_free_sgd", "schedule_free_adamw"])
def test_what_is_to_be_used_is_returned(rule):
    """Not what is trained; and its loss is that of itself."""
    result = minimize(quadratic, np.ones(2), getattr(fastopt, rule), 60, lr=0.02)
    assert result.params.tobytes() == result.opt.eval_params().tobytes()
    assert quadratic(result.params)[0] == result.loss != result.losses[-1]
    assert result.step == 60 and len(result.losses) == 61


def test_whatever_makes_an_optimizer():
    for make in (
        lambda x: fastopt.Lookahead(fastopt.adam(x, lr=0.3)),
        lambda x: fastopt.Muon(x, lr=0.1, adamw_lr=0.3),
        lambda x: fastopt.Adafactor(x, lr=0.3),
    ):
        result = minimize(quadratic, np.ones(2), make, 60)
        assert result.loss < 0.1 * result.losses[0]
        assert len(result.lrs) == 61


def test_no_steps():
    result = minimize(quadratic, np.ones(2), fastopt.gd, 0)
    assert result.loss == 5.5 and result.steps == 0
    assert result.params.tolist() == [1, 1]


def test_progress(capsys):
    minimize(quadratic, np.ones(2), fastopt.gd, 20, lr=0.1, progress=True)
    out, err = capsys.readouterr()
    assert not out and err.startswith("\rstep 0/20  loss 5.5 ")
    assert "step 20/20" in err and err.endswith("\n")
    minimize(quadratic, np.ones(2), fastopt.gd, 20, lr=0.1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "function, opt, steps, message",
    [
        (quadratic, fastopt.gd, -1, "steps must be at least 0"),
        (quadratic, fastopt.gd, 2.0, "steps must be an integer"),
        (quadratic, fastopt.gd(np.ones(2)), 1, "opt must be a rule, or make"),
        (quadratic, "adam", 1, "opt must be a rule, or make"),
        (lambda x: 1.0, fastopt.gd, 1, "must return the loss, a number, and"),
        (lambda x: (x, x), fastopt.gd, 1, "must return the loss, a number, and"),
        (lambda x: (None, x), fastopt.gd, 1, "must return the loss, a number, and"),
        (lambda x: (1.0, x, x), fastopt.gd, 1, "must return the loss, a number, and"),
        (lambda x: (1.0, x[:1]), fastopt.gd, 1, r"grads has shape \(1,\)"),
    ],
)
def test_refusals_of_minimize(function, opt, steps, message):
    with pytest.raises((TypeError, ValueError), match=message):
        minimize(function, np.ones(2), opt, steps)


def test_the_page_runs():
    """Its code, from the first line to the last."""
    page = Path(__file__).resolve().parents[2] / "docs" / "strategy.md"
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert len(blocks) >= 6
    assert names["scale"].resolved and 0.5 < names["test"].suggestion() < 2
    assert names["opt"].steps == 1  # of several tasks
    assert names["value_and_grad"](names["result"].params)[0] == names["stop"].best
    assert names["stop"].best < 1e-3
    for name in ALL_SCHEDULES:
        assert f"| `{name}(" in page.read_text("utf-8")


def test_losses_may_be_arrays_of_no_dimension():
    result = minimize(
        lambda x: (np.float32(x @ x), 2 * x), np.ones(2), fastopt.gd, 3, lr=0.1
    )
    assert [*itertools.pairwise(result.losses)] and result.loss < 2


def test_best_parameters_go_where_their_names_are():
    stop = EarlyStopping(patience=1)
    stop.step(1.0, {"a": np.ones(2), "b": np.full(2, 2.0)})
    params = {"b": np.zeros(2), "a": np.zeros(2)}
    stop.restore(params)
    assert params["a"].tolist() == [1, 1] and params["b"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="have the shapes"):
        stop.restore({"a": np.zeros(2), "c": np.zeros(2)})


def test_rates_of_an_optimizer_that_goes_on():
    lr = fastopt.schedules.linear(0.1, steps=20)

    def function(x):
        return float(x @ x), 2 * x

    def going_on(params):
        opt = fastopt.sgd(params, lr=lr)
        for _ in range(10):
            opt.step(np.zeros(2))
        return opt

    result = minimize(function, np.ones(2), going_on, 3)
    np.testing.assert_allclose(result.lrs, [lr(10 + i) for i in range(4)])


def test_a_complex_number_is_no_loss():
    with pytest.raises(TypeError, match="must return the loss"):
        minimize(lambda x: (np.complex128(1), x), np.ones(2), fastopt.gd, 1)


@pytest.mark.parametrize("best", [math.nan, math.inf, "x"])
def test_a_saved_best_that_nothing_could_improve_is_refused(best):
    for watch in (EarlyStopping(patience=1), fastopt.ReduceLROnPlateau()):
        with pytest.raises(ValueError, match="best must be a finite number"):
            watch.load_state_dict({**watch.state_dict(), "best": best})
        assert watch.best is None
