"""Range tests find the rate that a grid finds, and leave no trace; noise scales are
those of gradients with a known covariance, or unresolved; hyperparameters follow a
batch."""

import math
import random
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from threadpoolctl import threadpool_limits

import fastopt
from fastopt import GradientNoiseScale, lr_range_test, scale_hyperparameters
from fastopt.cli import demo
from fastopt.schedules import constant, cosine, linear
from fastopt.tune import LRRangeTest, both_ways

NAN, INF = math.nan, math.inf


# The learning rate -----------------------------------------------------------------


def batches(count, size, rng):
    while True:
        yield from np.split(
            rng.permutation(count)[: count // size * size], count // size
        )


class Digits:
    """A network on handwritten digits."""

    data = demo.digits().train

    def start(self, seed):
        return demo.mlp(seed)

    def loss(self, params):
        return demo.evaluate(params, *self.data)[0]

    def batch(self, params, rows):
        x, y = (part[rows] for part in self.data)
        grads = params.zeros_like()
        demo.backward(params, grads, x, y)
        return demo.evaluate(params, x, y)[0], grads

    def function(self, seed):
        order = batches(len(self.data[0]), 64, np.random.default_rng(seed))
        return lambda params: self.batch(params, next(order))


class Regression(Digits):
    """A linear model of how diabetes progressed."""

    data = x, y = load_diabetes(return_X_y=True)
    data = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()

    def start(self, seed):
        return np.random.default_rng(seed).normal(size=self.data[0].shape[1])

    def loss(self, params):
        return self.batch(params, slice(None))[0]

    def batch(self, params, rows):
        x, y = (part[rows] for part in self.data)
        error = x @ params - y
        return 0.5 * np.mean(error * error), x.T @ error / len(y)


TASKS = {
    "digits, momentum": (Digits(), fastopt.sgd, {"momentum": 0.9}),
    "digits, Adam": (Digits(), fastopt.adam, {}),
    "regression, SGD": (Regression(), fastopt.sgd, {}),
}


@pytest.mark.parametrize("name", TASKS)
def test_it_finds_what_a_grid_finds(name):
    """Within a factor of 3 of the rate with the least loss after 100 steps, of a grid
    whose rates double; for each of 3 seeds, by their median loss."""
    task, rule, more = TASKS[name]
    grid = 10 ** np.arange(-3, 0.61, 0.3)

    def trained(lr, seed):
        params, function = task.start(seed), task.function(seed + 10)
        opt = rule(params, lr=float(lr), **more)
        for _ in range(100):
            opt.step(function(params)[1])
        return np.nan_to_num(task.loss(params), nan=INF)

    with threadpool_limits(1, "blas"), np.errstate(all="ignore"):
        losses = [np.median([trained(lr, seed) for seed in range(3)]) for lr in grid]
        best = grid[int(np.argmin(losses))]
        for seed in range(3):
            opt = rule(task.start(seed), lr=0.1, **more)
            found = lr_range_test(task.function(seed + 20), opt).suggestion()
            assert best / 3 <= found <= best * 3


def test_it_knows_the_edge_of_a_quadratic():
    """Gradient descent diverges from 2 over the largest curvature on."""
    for curvature in (1e-3, 1.0, 1e3):
        h = curvature * np.geomspace(0.01, 1, 20)
        found = {
            how: lr_range_test(
                lambda x, h=h: (0.5 * h @ x**2, h * x),
                fastopt.gd(np.ones(20)),
                lo=1e-5 / curvature,
                hi=1e2 / curvature,
            ).suggestion(how)
            * curvature
            for how in ("valley", "steepest", "minimum")
        }
        assert 0.4 < found["valley"] < 2
        assert found["steepest"] < found["valley"]
        assert found["minimum"] < 0.4


def test_where_it_begins_does_not_matter():
    """Of a longest fall, the middle would move by the square root of this."""
    h, found = np.geomspace(0.01, 1, 20), []
    for lo, num in ((1e-8, 200), (1e-4, 120)):  # 20 rates a decade
        result = lr_range_test(
            lambda x: (0.5 * h @ x**2, h * x),
            fastopt.gd(np.ones(20)),
            lo=lo,
            hi=100,
            num=num,
        )
        found.append(result.suggestion())
    assert found[0] == pytest.approx(found[1], rel=0.15)


def test_shift_and_scale_do_not_matter():
    """A negative loss is one as any other."""
    h = np.geomspace(0.01, 1, 20)

    def result(shift, scale):
        return lr_range_test(
            lambda x: (scale * 0.5 * h @ x**2 + shift, h * x),
            fastopt.gd(np.ones(20)),
            lo=1e-4,
            hi=100,
        )

    plain = result(0, 1)
    for shift, scale in ((-100, 1), (-0.1, 1), (0, 1e-6), (3, 1e6)):
        other = result(shift, scale)
        assert other.diverged
        assert other.suggestion() == pytest.approx(plain.suggestion(), rel=0.01)


def test_it_is_these_steps():
    """The loss at a rate is that after the step with it."""
    h = np.array([1.0, 3.0])

    def function(x):
        return 0.5 * h @ x**2, h * x

    result = lr_range_test(function, fastopt.adam(np.ones(2)), lo=0.01, hi=1, num=7)
    x = np.ones(2)
    opt = fastopt.adam(x)
    for lr, loss in zip(result.lrs, result.losses, strict=True):
        opt.lr = float(lr)
        opt.step(h * x)
        assert function(x)[0] == loss
    assert result.lrs == pytest.approx(np.geomspace(0.01, 1, 7))
    assert (result.start, result.diverged) == (2.0, False)


def test_smoothing_looks_both_ways():
    values = np.random.default_rng(0).normal(size=9)
    i = np.arange(9)
    weights = 0.7 ** abs(i[:, None] - i)
    expected = weights @ values / weights.sum(1)
    np.testing.assert_allclose(both_ways(values, 0.7), expected, rtol=1e-13)
    assert (both_ways(values, 0.0) == values).all()
    np.testing.assert_allclose(both_ways(np.ones(9), 0.9), 1, rtol=1e-14)


# That it leaves no trace -----------------------------------------------------------


def everything(opt, arrays, lr="lr"):
    """As bytes and plain values."""
    state = opt.state_dict()
    inner = state.get("opt", state)
    buffers = [[a.tobytes() for a in kept] for kept in inner["state"].values()]
    averages = [a.tobytes() for a in inner["ema"] or ()]
    slow = [a.tobytes() for a in state.get("slow", ())]
    groups = [dict(group) for group in opt.groups]
    rest = {k: v for k, v in inner.items() if k not in ("state", "ema", "accumulated")}
    params = [a.tobytes() for a in arrays]
    return params, buffers, averages, slow, groups, str(rest)


MAKERS = {
    "prodigy": lambda w, v: fastopt.prodigy([w, v]),
    "schedule": lambda w, v: fastopt.adam([w, v], lr=linear(0.8, 10, end=-0.3)),
    "groups": lambda w, v: fastopt.adamw(
        [{"params": w, "lr": 0.3}, {"params": v, "lr": constant(0.1)}], ema=0.9
    ),
    "lookahead": lambda w, v: fastopt.Lookahead(fastopt.sgd([w, v], momentum=0.9), k=3),
    "schedule_free": lambda w, v: fastopt.schedule_free_adamw([w, v]),
    "lamb": lambda w, v: fastopt.lamb([w, v], weight_decay=cosine(0.1, 20)),
    "Adafactor": lambda w, v: fastopt.Adafactor([w, v]),
    "Muon": lambda w, v: fastopt.Muon([w, v], lr=linear(0.8, 10, end=-0.3)),
}


class Broken(Exception):
    pass


@pytest.mark.parametrize("end", ["good", "diverges", "raises", "raises at once"])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_all_is_as_before(name, before, end):
    """However it ends, and at whatever step; and a run after it is as without it."""
    rng = np.random.default_rng(1)

    def noisy(params):
        x = [a for part in params for a in (part if isinstance(part, list) else [part])]
        calls.append(1)
        if end == "raises at once" or (end == "raises" and len(calls) > 4):
            raise Broken
        grads = [a + rng.normal(size=a.shape) for a in x]
        loss = (
            NAN
            if end == "diverges" and len(calls) > 5
            else sum((a**2).sum() for a in x)
        )
        return loss, grads

    runs = []
    for test in (True, False):
        rng = np.random.default_rng(1)
        w, v = np.ones((3, 4)), np.ones(5)
        opt, calls = MAKERS[name](w, v), []
        for step in range(before):
            opt.step([np.full_like(w, step + 1.0), np.full_like(v, -2.0)])
        was, where = everything(opt, [w, v]), rng.bit_generator.state
        if test:
            try:
                lr_range_test(noisy, opt, num=8, diverge=1e9, rng=rng)
            except Broken:
                assert "raises" in end
            assert len(calls) == {"good": 9, "diverges": 6, "raises": 5}.get(end, 1)
        assert everything(opt, [w, v]) == was
        assert rng.bit_generator.state == where
        for step in range(3):
            opt.step([np.full_like(w, 1.0 + step), np.full_like(v, 3.0)])
        runs.append(everything(opt, [w, v]))
    assert runs[0] == runs[1]


def test_all_generators_are_put_back():
    generators = [random.Random(3), np.random.RandomState(3), np.random.default_rng(3)]
    draws = [lambda g=g: g.random() for g in generators[:1]]
    draws += [lambda g=g: g.normal() for g in generators[1:]]
    try:
        import torch
    except ImportError:
        pass
    else:
        generators.append(torch.Generator().manual_seed(3))
        draws.append(lambda: torch.rand(1, generator=generators[3]).item())
    expected = [draw() for draw in draws]
    generators[0].seed(3)
    generators[1].seed(3)
    generators[2] = np.random.default_rng(3)
    if len(generators) == 4:
        generators[3].manual_seed(3)
    draws[2] = generators[2].normal

    def function(x):
        return float(x @ x) + sum(draw() for draw in draws), 2 * x

    lr_range_test(function, fastopt.gd(np.ones(2)), num=5, rng=generators)
    assert [draw() for draw in draws] == expected
    lr_range_test(function, fastopt.gd(np.ones(2)), num=5, rng=generators[2])
    with pytest.raises(TypeError, match="rng must be a generator"):
        lr_range_test(function, fastopt.gd(np.ones(2)), rng=3)


def test_accumulated_gradients_stay():
    w = np.ones(2)
    opt = fastopt.sgd(w, lr=0.5)
    opt.accumulate(np.ones(2))
    with pytest.raises(RuntimeError, match="there are accumulated gradients"):
        lr_range_test(lambda x: (1.0, 1 * x), opt)
    opt.step()
    assert w.tolist() == [0.5, 0.5]


# Clear words where there is no answer ----------------------------------------------


def test_a_loss_that_is_not_finite():
    opt = fastopt.gd(np.ones(2))
    for bad in (NAN, INF, -INF):
        with pytest.raises(FloatingPointError, match="before the first step"):
            lr_range_test(lambda x, bad=bad: (bad, x), opt)
    result = lr_range_test(lambda x: (1.0 if x[0] == 1 else NAN, 2 * x), opt)
    assert result.diverged and not len(result.lrs)
    for how in ("valley", "steepest", "minimum"):
        with pytest.raises(ValueError, match="diverged at the learning rate number 1"):
            result.suggestion(how)
    assert result.plot() is not None


def test_nan_never_wins():
    """The loss is NaN where it would be least."""
    h = np.geomspace(0.01, 1, 20)

    def function(x):
        loss = 0.5 * h @ x**2
        return loss if loss > 1.0 else NAN, h * x

    result = lr_range_test(function, fastopt.gd(np.ones(20)), lo=1e-3, hi=10)
    assert result.diverged and np.isfinite(result.losses).all()
    for how in ("valley", "steepest", "minimum"):
        assert 0 < result.suggestion(how) <= result.lrs[-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", ["valley", "steepest", "minimum"])
def test_gradients_of_zero_and_noise(how, seed):
    """Batches alone make the loss go up and down: nothing is suggested by that."""
    rng = np.random.default_rng(seed)
    for noise in (0.0, 1.0):
        result = lr_range_test(
            lambda x, noise=noise: (3 + noise * rng.normal(), np.zeros(2)),
            fastopt.adam(np.ones(2)),
        )
        with pytest.raises(ValueError, match="does not stand out of its noise"):
            result.suggestion(how)
        result.plot()


def test_no_end_of_the_fall():
    result = lr_range_test(
        lambda x: (float(x @ x), 2 * x), fastopt.gd(np.ones(2)), lo=1e-4, hi=0.1
    )
    for how in ("valley", "minimum"):
        with pytest.raises(ValueError, match=r"still falls at the largest rate.*0.1;"):
            result.suggestion(how)
    with pytest.raises(ValueError, match="how must be"):
        result.suggestion("best")


def test_no_warnings_when_it_overflows():
    h = np.array([1.0, 2.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = lr_range_test(
            lambda x: (0.5 * h @ x**2, h * x),
            fastopt.gd(np.ones(2, np.float32)),
            hi=1e9,
            diverge=1e30,
        )
    assert result.diverged and 0.01 < result.suggestion() < 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lo": 0.0}, "lo must be above 0 and below hi"),
        ({"lo": 2.0, "hi": 1.0}, "lo must be above 0 and below hi"),
        ({"hi": INF}, "hi must be finite"),
        ({"num": 2}, "num must be at least 3"),
        ({"num": 9.0}, "num must be an integer"),
        ({"smooth": 1.0}, r"smooth must be in \[0, 1\)"),
        ({"diverge": 1.0}, "diverge must be above 1"),
        ({"opt": fastopt.gd}, "opt must be an Optimizer"),
        ({"value_and_grad": lambda x: x}, "value_and_grad must return the loss"),
        ({"value_and_grad": lambda x: (1.0, x[:1])}, "grads has shape"),
    ],
)
def test_refusals(given, message):
    given = {
        "value_and_grad": lambda x: (float(x @ x), 2 * x),
        "opt": fastopt.gd(np.ones(2)),
    } | given
    with pytest.raises((TypeError, ValueError), match=message):
        lr_range_test(**given)


def test_it_plots_itself(tmp_path):
    result = LRRangeTest(
        lrs := np.geomspace(1e-4, 1, 9),
        losses := np.array([9.0, 9, 8, 7, 5, 2, 1, 3, 9]),
        both_ways(losses, 0.3),
        9.0,
        True,
    )
    axes = result.plot()
    axes.figure.savefig(tmp_path / "range.png")
    assert (tmp_path / "range.png").stat().st_size > 5000
    assert axes.get_xscale() == "log"
    dots = axes.get_lines()[0].get_xydata()
    assert dots.tolist() == np.column_stack([lrs, losses]).tolist()
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named[2:] == [
        f"{how}: {result.suggestion(how):.2g}"
        for how in ("valley", "steepest", "minimum")
    ]
    assert result.plot(axes) is axes


# The batch size --------------------------------------------------------------------


def gaussian(rng, mean, deviations, batch, count):
    """Gradients of batches: means of so many examples, drawn at once."""
    size = (count, len(mean))
    return mean + deviations / math.sqrt(batch) * rng.normal(size=size)


@pytest.mark.parametrize("batch, count", [(1, 2), (4, 4), (32, 8)])
def test_noise_scale_of_a_known_covariance(batch, count):
    """Within 5%, whatever batches it is seen through; nothing of it is isotropic."""
    rng = np.random.default_rng(batch)
    deviations = np.geomspace(0.1, 3, 150)
    mean = rng.normal(size=150) * 0.5
    expected = (deviations**2).sum() / (mean @ mean)
    scale = GradientNoiseScale(batch, beta=1)
    for _ in range(2000 // count):
        scale.update(list(gaussian(rng, mean, deviations, batch, count)))
    assert scale.resolved
    assert scale.value == pytest.approx(expected, rel=0.05)
    assert scale.noise == pytest.approx((deviations**2).sum(), rel=0.05)
    assert scale.signal == pytest.approx(mean @ mean, rel=0.05)
    assert abs(scale.value - expected) < 4 * scale.error < 0.4 * expected


def test_its_parts_have_no_bias():
    """As expected values of the formulas, over many draws of two batches: neither has
    what a plain mean of the squared norms would add."""
    rng, trace, signal, batch = np.random.default_rng(0), 8.0, 2.0, 5
    mean, deviations = np.full(8, 0.5), np.ones(8)
    scale = GradientNoiseScale(batch, beta=1)
    for _ in range(10_000):
        pair = gaussian(rng, mean, deviations, batch, 2)
        scale.update_norms((pair**2).sum(1), float((pair.mean(0) ** 2).sum()))
    assert scale.noise == pytest.approx(trace, rel=0.03)
    assert scale.signal == pytest.approx(signal, rel=0.03)
    # The signal is the product of both, whose variance is, element by element:
    variance = 8 * ((0.5**2 + 1 / batch) ** 2 - 0.5**4)
    assert scale._covariance()[1, 1] ** 0.5 == pytest.approx(
        math.sqrt(variance / 1e4), rel=0.1
    )


def test_the_error_is_how_far_it_is_off():
    """In standard errors, over many measurements: about 1."""
    rng, off = np.random.default_rng(0), []
    for _ in range(100):
        scale = GradientNoiseScale(2, beta=0.98)
        for _ in range(60):
            pair = gaussian(rng, np.full(9, 0.8), np.ones(9), 2, 4)
            scale.update_norms((pair**2).sum(1), float((pair.mean(0) ** 2).sum()))
        if scale.resolved:
            off.append((scale.value - 1 / 0.64) / scale.error)
    assert len(off) > 90 and 0.7 < np.sqrt(np.mean(np.square(off))) < 1.4


@pytest.mark.parametrize("size", [5, 200])
def test_no_signal_is_unresolved(size):
    """At no update of any of these runs is there a number."""
    rng = np.random.default_rng(size)
    for beta in (0.95, 1):
        for _ in range(40):
            scale = GradientNoiseScale(3, beta=beta)
            for _ in range(40):
                g = rng.normal(size=(4, size))
                scale.update_norms((g * g).sum(1), float((g.mean(0) ** 2).sum()))
                assert math.isnan(scale.value) and math.isnan(scale.error)
    assert not scale.resolved and "unresolved after 40 updates" in repr(scale)
    assert scale.noise == pytest.approx(
        3 * size, rel=0.2
    )  # which is known all the same


def test_too_few_updates_are_unresolved():
    scale = GradientNoiseScale(1)
    assert math.isnan(scale.value) and math.isnan(scale.noise)
    assert repr(scale) == "<gradient noise scale: unresolved after 0 updates>"
    rng = np.random.default_rng(0)
    for n in range(1, 13):
        scale.update(list(gaussian(rng, np.ones(50), np.full(50, 0.1), 1, 2)))
        assert scale.resolved == (n >= 10)
    assert scale.value == pytest.approx(0.01, rel=0.2)
    assert repr(scale) == "<gradient noise scale: 0.00965 ± 0.00075 examples>"


def test_gradients_without_noise_and_of_zero():
    """None of the one is a batch size of 0; of both, unresolved."""
    scale, nothing = GradientNoiseScale(8), GradientNoiseScale(8)
    for _ in range(20):
        scale.update([np.full(7, 0.1, np.float32)] * 3)
        nothing.update([np.zeros(7)] * 3)
    assert scale.value == pytest.approx(0, abs=1e-6)
    assert math.isnan(nothing.value) and nothing.noise == nothing.signal == 0


def test_old_measurements_fade():
    scale = GradientNoiseScale(1, beta=0.8)
    rng = np.random.default_rng(0)
    for deviation in (3.0, 0.5):
        for _ in range(60):
            scale.update(list(gaussian(rng, np.ones(50), np.full(50, deviation), 1, 4)))
    assert scale.value == pytest.approx(0.25, rel=0.2)


def test_structures_of_gradients():
    rng = np.random.default_rng(0)
    flat = fastopt.flatten({"w": np.zeros((3, 4), np.float32), "b": np.zeros(5, "f4")})
    kinds = [GradientNoiseScale(2) for _ in range(3)]
    for _ in range(12):
        buffers = [flat.zeros_like() for _ in range(3)]
        for buffer in buffers:
            buffer.data[:] = rng.normal(size=17) + 1
        kinds[0].update(buffers)
        kinds[1].update([buffer.views for buffer in buffers])
        kinds[2].update([buffer.data.astype(float) for buffer in buffers])
    assert kinds[0].value == pytest.approx(kinds[1].value, rel=1e-12)
    assert kinds[0].value == pytest.approx(kinds[2].value, rel=1e-12)


def test_norms_of_a_step_are_enough():
    """The recipe of the documentation: nothing is kept and no pass is added."""
    rng = np.random.default_rng(0)
    w = np.zeros(30)
    opt = fastopt.sgd(w, lr=1e-9)
    by_norms, by_gradients = GradientNoiseScale(2), GradientNoiseScale(2)
    for _ in range(12):
        grads = gaussian(rng, np.ones(30), np.ones(30), 2, 4)
        for grad in grads:
            opt.accumulate(grad, grad_scale=1 / 4)
        opt.step(nonfinite="skip")
        by_norms.update_norms((grads**2).sum(1), opt.grad_norm**2)
        by_gradients.update(list(grads))
    assert by_norms.value == pytest.approx(by_gradients.value, rel=1e-9)


@pytest.mark.parametrize(
    "update, message",
    [
        (lambda s: s.update_norms([1.0], 1.0), "at least two batches"),
        (lambda s: s.update([np.ones(2)]), "at least two batches"),
        (lambda s: s.update_norms([1.0, NAN], 1.0), "must be finite numbers, got nan"),
        (lambda s: s.update_norms([1.0, 1.0], INF), "must be finite numbers, got inf"),
        (lambda s: s.update_norms([1.0, -1.0], 0.1), "must be finite numbers, got -1"),
        (lambda s: s.update_norms([1.0, "2"], 0.1), "must be finite numbers, got '2'"),
        (lambda s: s.update_norms([1.0, 1.0], 4.0), "norm of the sum of the gradients"),
        (lambda s: s.update([np.full(2, 1e200)] * 2), "must be finite numbers"),
        (lambda s: s.update([np.ones(2), np.ones(3)]), "differ in their structure"),
        (lambda s: GradientNoiseScale(0), "batch_size must be at least 1"),
        (lambda s: GradientNoiseScale(1, beta=0), r"beta must be in \(0, 1\]"),
        (lambda s: GradientNoiseScale(1, beta=1.1), r"beta must be in \(0, 1\]"),
    ],
)
def test_refusals_of_the_noise_scale(update, message):
    """And nothing is counted."""
    scale = GradientNoiseScale(1)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
        update(scale)
    assert "after 0 updates" in repr(scale)


# Hyperparameters of another batch size ---------------------------------------------


def test_the_linear_rule():
    given = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "ema": 0.99}
    for ratio in (4, 0.25):
        scaled = scale_hyperparameters(given, ratio, "linear")
        assert scaled == given | {"lr": 0.1 * ratio, "ema": 0.99**ratio}
    assert scale_hyperparameters(given, 1, "linear") == given


def test_the_sqrt_rule():
    given = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    scaled = scale_hyperparameters(given, 4, "sqrt")
    assert scaled == pytest.approx(
        {"lr": 2e-3, "beta1": 0.6, "beta2": 0.96, "eps": 5e-9, "weight_decay": 0.1}
    )
    back = scale_hyperparameters(scaled, 0.25, "sqrt")
    assert back == pytest.approx(given)
    assert scale_hyperparameters({"lr": 1, "alpha": 0.99}, 2, "sqrt")["alpha"] == (
        pytest.approx(0.98)
    )
    unchanged = {"lr": 1.0, "beta1": 0.0, "alpha": 5.0, "ema": None}  # ademamix' alpha
    assert scale_hyperparameters(unchanged, 4, "sqrt") == unchanged | {"lr": 2.0}


def test_noise_of_a_scaled_run_is_the_same():
    """What the linear rule promises: SGD on a quadratic, whose spread in the end is lr
    times the variance of the gradients over 2, but for a larger lr."""
    spreads = []
    for ratio in (1, 8):
        scaled = scale_hyperparameters({"lr": 0.01}, ratio, "linear")
        x, rng = np.zeros(4000), np.random.default_rng(ratio)
        opt = fastopt.sgd(x, **scaled)
        for _ in range(900 // ratio):
            opt.step(x + rng.normal(size=4000) / math.sqrt(ratio))
        spreads.append(x.var())
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)


def test_groups_of_an_optimizer():
    opt = fastopt.adam(np.ones(2), lr=0.01)
    opt.groups[0].update(scale_hyperparameters(opt.groups[0], 4, "sqrt"))
    assert opt.lr == 0.02 and opt.beta2 == pytest.approx(0.996)


@pytest.mark.parametrize(
    "given, ratio, rule, message",
    [
        ({"lr": 1}, 0, "sqrt", "batch_ratio must be above 0"),
        ({"lr": 1}, NAN, "sqrt", "batch_ratio must be finite"),
        ({"lr": 1}, 2, "square root", 'rule must be "linear" or "sqrt"'),
        ({"beta1": 0.9}, 2, "sqrt", "there is no lr"),
        ({"lr": 1, "beta1": 0.9}, 10, "sqrt", "beta1=0.9 averages over 10 steps, of"),
        ({"lr": cosine(1, 9)}, 2, "linear", "lr is a schedule, cosine"),
        ({"lr": 1, "beta1": cosine(1, 9)}, 2, "sqrt", "beta1 is a schedule, cosine"),
    ],
)
def test_refusals_of_scaling(given, ratio, rule, message):
    with pytest.raises((TypeError, ValueError), match=message):
        scale_hyperparameters(given, ratio, rule)


def test_what_is_hard_to_see_is_not_told_wrong():
    """Who looks after every update is not told of less than half the noise scale, nor
    of more than twice. With a margin of 4 errors this fails."""
    rng = np.random.default_rng(0)
    told = []
    for true in (4, 16, 32, 64) * 8:
        scale, mean = GradientNoiseScale(1), np.full(50, true**-0.5)
        for _ in range(200):
            scale.update(list(mean + rng.normal(size=(4, 50))))
            if scale.resolved:
                told.append(scale.value / true)
                break
    assert len(told) >= 8
    assert 0.5 < min(told) and max(told) < 2


def test_gradients_of_batches_go_by_name():
    rng, one, other = np.random.default_rng(0), *(GradientNoiseScale(1) for _ in "ab")
    for _ in range(12):
        a, b = rng.normal(size=(2, 3)), 30 + rng.normal(size=(2, 4))
        one.update([{"a": a[0], "b": b[0]}, {"a": a[1], "b": b[1]}])
        other.update([{"a": a[0], "b": b[0]}, {"b": b[1], "a": a[1]}])
    assert one.noise == pytest.approx(other.noise)
    assert one.signal == pytest.approx(other.signal)
    with pytest.raises(ValueError, match="no gradient at"):
        one.update([{"a": a[0], "b": None}, {"a": a[1], "b": b[1]}])


def test_the_error_knows_that_noise_and_signal_hang_together():
    """The spread of many measurements, of few elements in two batches."""
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(200):
        scale = GradientNoiseScale(1, beta=1)
        for _ in range(200):
            scale.update(list(1 + rng.normal(size=(2, 3))))
        values.append(scale.value)
        errors.append(scale.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.1, "adamw_lr": 0.01}, "no rule for Muon's lr"),
        ({"lr": 0.1, "betas": (0.9, 0.999)}, "pass beta1 and beta2"),
        ({"lr": 0.1, "beta1": 1.5}, r"beta1 must be in \[0, 1\)"),
    ],
)
def test_what_would_be_scaled_in_part_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        fastopt.scale_hyperparameters(given, 4, "sqrt")


def test_numpys_global_generator_goes_back():
    np.random.seed(0)
    x = np.ones(3)
    fastopt.lr_range_test(
        lambda x: (float(x @ x) + 0 * np.random.rand(), 2 * x),
        fastopt.sgd(x),
        rng=np.random,
    )
    drawn = np.random.rand()
    np.random.seed(0)
    assert drawn == np.random.rand()
