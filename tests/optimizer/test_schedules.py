"""Schedules are the formulas of torch, optax and transformers, at every step, but where
their docstrings say otherwise; and a run resumed at any step is the same run."""

import copy
import inspect
import math
import pickle
import warnings

import numpy as np
import pytest

import fastopt
from fastopt import schedules
from fastopt.schedules import Schedule

LR, N = 0.3, 12
STEPS = range(-1, N + 3)

ALL = {
    "constant": schedules.constant(LR),
    "step": schedules.step(LR, 4, gamma=0.5),
    "multistep": schedules.multistep(LR, (3, 7), gamma=0.3),
    "exponential": schedules.exponential(LR, 0.9, steps=3, begin=2, end=0.2),
    "inverse_power": schedules.inverse_power(LR, c=0.5, p=0.7),
    "inverse_sqrt": schedules.inverse_sqrt(LR, warmup=4, timescale=6),
    "polynomial": schedules.polynomial(LR, N, power=1.7, end=0.02, begin=2),
    "linear": schedules.linear(LR, N, end=0.02, begin=2),
    "cosine": schedules.cosine(LR, N, end=0.02, power=1.3),
    "warmup_cosine": schedules.warmup_cosine(LR, N, 4, start=0.01, end=0.02, power=1.3),
    "cosine_restarts": schedules.cosine_restarts(LR, 2, mult=3, end=0.02),
    "onecycle": schedules.onecycle(LR, N, pct_start=0.4, div_factor=9.0),
    "cyclic": schedules.cyclic(0.01, LR, 3, 4, mode="exp_range", gamma=0.9),
    "wsd": schedules.wsd(LR, N, 5, warmup=3, start=0.01, end=0.02, shape="1-sqrt"),
    "join": schedules.join(
        [schedules.linear(0.1, 3, end=LR), schedules.cosine(LR, N - 3)], [3]
    ),
    "product": schedules.product(
        [schedules.linear(0.1, 3, end=1.0), schedules.inverse_power(LR)]
    ),
}
ENDLESS = {
    "step",
    "inverse_power",
    "inverse_sqrt",
    "cosine_restarts",
    "cyclic",
    "product",
}

every = pytest.mark.parametrize("name", ALL)


def test_all_are_here():
    there = {
        name
        for name, value in vars(schedules).items()
        if inspect.isclass(value)
        and issubclass(value, Schedule)
        and value is not Schedule
    }
    assert there == set(ALL)


# What all of them are --------------------------------------------------------------


@every
def test_an_array_is_its_elements(name):
    """Bit for bit, in its shape; a number gives a float."""
    schedule = ALL[name]
    one_by_one = [schedule(t) for t in STEPS]
    assert all(type(value) is float for value in one_by_one)
    assert schedule(np.arange(-1, N + 3)).tolist() == one_by_one
    assert schedule(np.arange(-1.0, N + 3)).tolist() == one_by_one
    assert schedule(np.int32(3)) == schedule(3.0) == schedule(3)
    assert schedule(np.arange(6).reshape(2, 3)).tolist() == [
        one_by_one[1:4],
        one_by_one[4:7],
    ]
    empty = schedule(np.arange(0))
    assert empty.shape == (0,) and empty.dtype == np.float64


@every
def test_it_is_fixed_and_can_be_copied(name):
    schedule = ALL[name]
    for other in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert other == schedule and hash(other) == hash(schedule)
        assert [other(t) for t in STEPS] == [schedule(t) for t in STEPS]
    with pytest.raises(AttributeError):
        schedule.lr = 1.0
    assert eval(repr(schedule), vars(schedules)) == schedule


@every
def test_before_and_after(name):
    schedule = ALL[name]
    assert schedule(-1) == schedule(-100) == schedule(0)
    if name not in ENDLESS:
        end = schedule(N + 2)
        assert schedule(N + 3) == end == schedule(10**12)
    assert math.isfinite(schedule(2**62))


def test_ends_are_exact():
    """0.1 is none of the numbers that survive any detour."""
    for make in (
        schedules.polynomial,
        schedules.linear,
        schedules.cosine,
        schedules.cosine_restarts,
    ):
        schedule = make(0.1, 7, end=1e-3)
        assert schedule(0) == 0.1
        assert schedule(7) == (0.1 if make is schedules.cosine_restarts else 1e-3)
    for schedule in (
        schedules.warmup_cosine(0.1, 9, 3, start=0.03, end=1e-3),
        schedules.wsd(0.1, 9, 4, warmup=3, start=0.03, end=1e-3),
    ):
        assert [schedule(t) for t in (0, 3, 9)] == [0.03, 0.1, 1e-3]


@every
@pytest.mark.parametrize("steps", ["3", None, True, [None], np.array([True])])
def test_steps_are_numbers(name, steps):
    with pytest.raises(TypeError, match="steps must be numbers"):
        ALL[name](steps)


@every
def test_steps_are_finite(name):
    for steps in (math.nan, math.inf, np.array([1, -math.inf])):
        with pytest.raises(ValueError, match="steps must be finite"):
            ALL[name](steps)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: schedules.constant(math.nan), "lr must be finite"),
        (lambda: schedules.constant("1"), "lr must be a number"),
        (lambda: schedules.cosine(1, 0), "steps must be at least 1"),
        (lambda: schedules.cosine(1, 2.0), "steps must be an integer"),
        (lambda: schedules.cosine(1, True), "steps must be an integer"),
        (lambda: schedules.cosine(1, 5, power=0), "power must be above 0"),
        (lambda: schedules.step(1, 0), "step_size must be at least 1"),
        (lambda: schedules.multistep(1, (3, 3)), "milestones must ascend"),
        (lambda: schedules.multistep(1, (-1,)), r"milestones\[0\] must be at least 0"),
        (lambda: schedules.exponential(1, 0.0), "gamma must be above 0"),
        (lambda: schedules.exponential(1, 0.5, end=math.inf), "end must be finite"),
        (lambda: schedules.exponential(1, 0.5, staircase=1), "staircase must be True"),
        (lambda: schedules.inverse_power(1, c=-1), "c must be at least 0"),
        (lambda: schedules.inverse_power(1, p=0), "p must be above 0"),
        (lambda: schedules.inverse_sqrt(1, 2, 0), "timescale must be at least 1"),
        (lambda: schedules.linear(1, 5, begin=-1), "begin must be at least 0"),
        (lambda: schedules.warmup_cosine(1, 5, 5), r"at least warmup \+ 1 = 6, got 5"),
        (lambda: schedules.cosine_restarts(1, 5, mult=0), "mult must be at least 1"),
        (lambda: schedules.onecycle(1, 5, pct_start=1.1), "pct_start must be in"),
        (lambda: schedules.onecycle(1, 5, div_factor=0), "div_factor must be above 0"),
        (lambda: schedules.cyclic(0, 1, mode="up"), 'mode must be "triangular"'),
        (lambda: schedules.cyclic(0, 1, steps_down=0), "steps_down must be at least 1"),
        (lambda: schedules.wsd(1, 5, 4, 2), r"at least warmup \+ decay = 6, got 5"),
        (lambda: schedules.wsd(1, 5, 2, shape="sqrt"), 'shape must be "cosine"'),
        (lambda: schedules.join([abs], [1]), "1 schedules need 0 boundaries"),
        (lambda: schedules.join([], []), "schedules is empty"),
        (lambda: schedules.join([abs, 0.1], [1]), r"constant\(0.1\)"),
        (lambda: schedules.join([abs] * 3, [2, 1]), "boundaries must ascend"),
        (lambda: schedules.product([0.1]), r"schedules\[0\] must be a callable"),
    ],
)
def test_refusals(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


# The formulas of others ------------------------------------------------------------


def agree(schedule, peer, first=-1, last=N + 2, rtol=1e-12):
    """At each of these steps, with what a peer has there."""
    steps = np.arange(first, last + 1)
    theirs = np.array([float(peer(int(t))) for t in steps])
    # What is left of a cosine near its end has the rounding of its beginning.
    np.testing.assert_allclose(schedule(steps), theirs, rtol=rtol, atol=1e-16)


@pytest.fixture
def of_torch():
    """``of_torch(lr, class, *arguments)``: the rates as it is stepped, by step."""
    torch = pytest.importorskip("torch")
    from torch.optim import lr_scheduler

    def of_torch(lr, name, *arguments, key="lr", steps=N + 3, **more):
        opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr, momentum=0.9)
        made = getattr(lr_scheduler, name)(opt, *arguments, **more)
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it wants optimizer steps in between
            for _ in range(steps):
                found.append(opt.param_groups[0][key])
                made.step()
        return found.__getitem__

    return of_torch


def test_step_is_torch(of_torch):
    peer = of_torch(LR, "StepLR", 4, gamma=0.5)
    agree(ALL["step"], peer, 0)


def test_multistep_is_torch(of_torch):
    peer = of_torch(LR, "MultiStepLR", [3, 7], gamma=0.3)
    agree(ALL["multistep"], peer, 0)


def test_a_milestone_0_counts():
    assert schedules.multistep(1.0, (0, 2))(np.arange(3)).tolist() == [0.1, 0.1, 0.1**2]


def test_exponential_is_torch(of_torch):
    peer = of_torch(LR, "ExponentialLR", 0.9)
    agree(schedules.exponential(LR, 0.9), peer, 0)


def test_polynomial_is_torch(of_torch):
    peer = of_torch(LR, "PolynomialLR", N, power=1.7)
    agree(schedules.polynomial(LR, N, power=1.7), peer, 0, rtol=1e-11)


def test_linear_is_torch(of_torch):
    peer = of_torch(LR, "LinearLR", 0.2, 0.7, total_iters=N)
    agree(schedules.linear(LR * 0.2, N, end=LR * 0.7), peer, 0)


def test_cosine_is_torch_until_its_end(of_torch):
    peer = of_torch(LR, "CosineAnnealingLR", N, eta_min=0.02)
    ours = schedules.cosine(LR, N, end=0.02)
    agree(ours, peer, 0, N, rtol=1e-11)
    assert peer(N + 2) > 0.03 and ours(N + 2) == 0.02


@pytest.mark.parametrize("mult", [1, 2, 3])
def test_cosine_restarts_are_torch(of_torch, mult):
    peer = of_torch(LR, "CosineAnnealingWarmRestarts", 2, mult, 0.02, steps=90)
    agree(schedules.cosine_restarts(LR, 2, mult=mult, end=0.02), peer, 0, 89)


def test_a_restart_where_the_logarithm_rounds_down():
    """121 = 1 + 3 + 9 + 27 + 81 cycles have passed, and the next begins."""
    t, mult = 121, 3
    assert int(math.log(t * (mult - 1) + 1, mult)) == 4  # of 5
    schedule = schedules.cosine_restarts(0.1, 7, mult=mult)
    assert schedule(7 * t) == 0.1 > schedule(7 * t + 1) > 0.0999
    assert schedule(7 * t - 1) < 1e-6


@pytest.mark.parametrize("pct", [0.0, 0.05, 0.25, 0.3, 0.9])
def test_onecycle_is_torch(of_torch, pct):
    peer = of_torch(
        LR,
        "OneCycleLR",
        LR,
        N,
        pct_start=pct,
        div_factor=9,
        final_div_factor=7,
        steps=N,
    )
    ours = schedules.onecycle(
        LR, N, pct_start=pct, div_factor=9.0, final_div_factor=7.0
    )
    agree(ours, peer, 0, N - 1)
    assert ours(N - 1) == ours(N) == LR / 9 / 7  # which torch leaves upwards


def test_onecycle_where_torch_divides_by_zero(of_torch):
    with pytest.raises(ZeroDivisionError):
        of_torch(LR, "OneCycleLR", LR, 10, pct_start=0.1)
    assert schedules.onecycle(LR, 10, pct_start=0.1)(0) == LR
    assert schedules.onecycle(LR, 10, pct_start=1.0)(np.arange(9, 12)).tolist() == (
        [LR] * 3
    )


def test_onecycle_of_momentum_is_torch(of_torch):
    peer = of_torch(LR, "OneCycleLR", LR, N, key="momentum", steps=N)
    ours = schedules.onecycle(0.85, N, div_factor=0.85 / 0.95, final_div_factor=1)
    agree(ours, peer, 0, N - 1)


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cyclic_is_torch(of_torch, mode):
    given = dict(step_size_up=3, step_size_down=4, mode=mode, gamma=0.9)
    peer = of_torch(LR, "CyclicLR", 0.01, LR, **given, steps=40)
    ours = schedules.cyclic(0.01, LR, 3, 4, mode=mode, gamma=0.9)
    agree(ours, peer, 0, 39)
    peer = of_torch(LR, "CyclicLR", 0.01, LR, **given, key="momentum", steps=40)
    agree(schedules.cyclic(0.9, 0.8, 3, 4, mode=mode, gamma=0.9), peer, 0, 39)


def test_join_and_product_are_torch():
    torch = pytest.importorskip("torch")
    from torch.optim.lr_scheduler import (
        ChainedScheduler,
        CosineAnnealingLR,
        ExponentialLR,
        LinearLR,
        SequentialLR,
    )

    def rates(make):
        opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)
        made, found = make(opt), []
        for _ in range(N + 1):
            found.append(opt.param_groups[0]["lr"])
            opt.step()
            made.step()
        return found.__getitem__

    def joined(opt):
        parts = LinearLR(opt, 0.25, 1.0, 3), CosineAnnealingLR(opt, N - 3)
        return SequentialLR(opt, list(parts), [3])

    def multiplied(opt):
        return ChainedScheduler([LinearLR(opt, 0.25, 1.0, 3), ExponentialLR(opt, 0.9)])

    warmup = schedules.linear(0.25, 3, end=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls what it deprecates
        ours = schedules.join(
            [schedules.linear(LR / 4, 3, end=LR), schedules.cosine(LR, N - 3)], [3]
        )
        agree(ours, rates(joined), 0, N, rtol=1e-11)
        ours = schedules.product([warmup, schedules.exponential(LR, 0.9)])
        agree(ours, rates(multiplied), 0, N)


def test_in_a_loop_of_torch(of_torch):
    """As a factor of a rate of 1."""
    peer = of_torch(1.0, "LambdaLR", ALL["wsd"])
    assert [peer(t) for t in range(N + 3)] == ALL["wsd"](np.arange(N + 3)).tolist()


@pytest.fixture
def optax():
    """In float64, and so not by the default of JAX."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    with jax.enable_x64(True):
        yield optax


def test_optax(optax):
    agree(ALL["constant"], optax.constant_schedule(LR))
    peer = optax.piecewise_constant_schedule(LR, {3: 0.3, 7: 0.3})
    agree(ALL["multistep"], peer)
    peer = optax.exponential_decay(LR, 3, 0.9, 2, end_value=0.2)
    agree(ALL["exponential"], peer)
    peer = optax.exponential_decay(LR, 3, 1.1, 2, staircase=True, end_value=0.4)
    agree(schedules.exponential(LR, 1.1, 3, 2, staircase=True, end=0.4), peer)
    agree(ALL["polynomial"], optax.polynomial_schedule(LR, 0.02, 1.7, N, 2))
    agree(ALL["linear"], optax.linear_schedule(LR, 0.02, N, 2))


def test_optax_cosines(optax):
    """Before the first step they go on as they do after it, the other way round."""
    peer = optax.cosine_decay_schedule(LR, N, alpha=0.02 / LR, exponent=1.3)
    agree(ALL["cosine"], peer, 0)
    peer = optax.warmup_cosine_decay_schedule(0.01, LR, 4, N, 0.02, 1.3)
    agree(ALL["warmup_cosine"], peer)
    peer = optax.join_schedules(
        [optax.linear_schedule(0.1, LR, 3), optax.cosine_decay_schedule(LR, N - 3)], [3]
    )
    agree(ALL["join"], peer)
    given = {"init_value": LR, "peak_value": LR, "warmup_steps": 0}
    peer = optax.sgdr_schedule([{**given, "decay_steps": n} for n in (2, 4, 8)])
    agree(schedules.cosine_restarts(LR, 2, mult=2), peer, 0, 13)


def test_optax_onecycle_ends_a_step_later(optax):
    peer = optax.cosine_onecycle_schedule(N, LR)
    ours = schedules.onecycle(LR, N)
    assert float(peer(N)) == pytest.approx(ours(N - 1), rel=1e-6)
    assert float(peer(N - 1)) > 100 * ours(N - 1)


@pytest.fixture
def of_transformers():
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")

    def of_transformers(name, *arguments, **more):
        opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], LR)
        made = getattr(optimization, name)(opt, *arguments, **more)
        return lambda t: LR * made.lr_lambdas[0](t)

    return of_transformers


def test_transformers(of_transformers):
    """From 0 on: at -1 their warmups are below 0."""
    peer = of_transformers("get_inverse_sqrt_schedule", 4, 6)
    agree(ALL["inverse_sqrt"], peer, 0)
    peer = of_transformers("get_inverse_sqrt_schedule", 4)
    agree(schedules.inverse_sqrt(LR, 4), peer, 0)
    peer = of_transformers("get_inverse_sqrt_schedule", 0)
    agree(schedules.inverse_sqrt(LR), peer, 0)
    peer = of_transformers("get_constant_schedule_with_warmup", 4)
    agree(schedules.linear(0.0, 4, end=LR), peer, 0)
    peer = of_transformers("get_linear_schedule_with_warmup", 4, N)
    warmup = schedules.linear(0.0, 4, end=LR)
    agree(schedules.join([warmup, schedules.linear(LR, N - 4)], [4]), peer, 0)
    peer = of_transformers("get_polynomial_decay_schedule_with_warmup", 4, N, 1e-7, 1.7)
    falling = schedules.polynomial(LR, N - 4, 1.7, 1e-7)
    agree(schedules.join([warmup, falling], [4]), peer, 0)


def test_transformers_cosines_until_their_end(of_transformers):
    peer = of_transformers("get_cosine_schedule_with_warmup", 4, N)
    ours = schedules.warmup_cosine(LR, N, 4)
    agree(ours, peer, 0, N)
    assert ours(N + 2) == 0 < peer(N + 2)
    peer = of_transformers(
        "get_cosine_with_min_lr_schedule_with_warmup", 4, N, min_lr=0.02
    )
    agree(schedules.warmup_cosine(LR, N, 4, end=0.02), peer, 0, N)
    peer = of_transformers(
        "get_cosine_with_hard_restarts_schedule_with_warmup", 0, N, 3
    )
    agree(schedules.cosine_restarts(LR, N // 3), peer, 0, N - 1)


@pytest.mark.parametrize("shape", ["cosine", "linear", "1-sqrt"])
def test_wsd_is_transformers(of_transformers, shape):
    peer = of_transformers(
        "get_wsd_schedule", 3, 5, N, decay_type=shape, min_lr_ratio=0.2
    )
    low = 0.2 * LR
    agree(schedules.wsd(LR, N, 5, 3, start=low, end=low, shape=shape), peer, 0)


# In an optimizer -------------------------------------------------------------------


def gradient(t, size=5):
    return np.random.default_rng(t).normal(size=size) + 0.1


@every
def test_a_run_resumed_at_any_step_is_the_same(name):
    schedule = ALL[name]

    def made(given=schedule):
        w = np.linspace(-1, 1, 5)
        return w, fastopt.adam(w, lr=given, eps=1e-6)

    w, opt = made()
    saved = []
    for t in range(N + 3):
        saved.append((w.copy(), opt.state_dict()))
        opt.step(gradient(t))
    for start, (params, state) in enumerate(saved):
        again, opt = made(pickle.loads(pickle.dumps(schedule)))
        again[:] = params
        opt.load_state_dict(state)
        for t in range(start, N + 3):
            opt.step(gradient(t))
        assert again.tobytes() == w.tobytes()


@every
def test_it_is_the_rate_set_by_hand(name):
    w, v = np.ones(5), np.ones(5)
    scheduled, by_hand = fastopt.sgd(w, lr=ALL[name]), fastopt.sgd(v)
    for t in range(N + 3):
        by_hand.lr = ALL[name](t)
        scheduled.step(gradient(t))
        by_hand.step(gradient(t))
    assert w.tobytes() == v.tobytes() != np.ones(5).tobytes()


def test_wherever_there_is_a_rate():
    """And for any hyperparameter."""
    warmup = schedules.linear(0.0, 4, end=0.1)
    w, v = np.ones((3, 4)), np.ones(3)
    grads = [np.ones_like(w), np.ones_like(v)]
    for opt in (
        fastopt.Lookahead(fastopt.adam([w, v], lr=warmup)),
        fastopt.Adafactor([w, v], lr=warmup, weight_decay=warmup),
        fastopt.Muon([w, v], lr=warmup, adamw_lr=warmup),
        fastopt.adamw([{"params": w, "lr": warmup}, {"params": v, "beta1": warmup}]),
        fastopt.sgd([w, v], lr=0.1, momentum=warmup),
    ):
        for _ in range(3):
            opt.step(grads)
        assert opt.steps == 3


def test_inverse_power_is_dynamic_gd():
    x, y = np.array([10.0]), np.array([10.0])
    scheduled = fastopt.gd(x, lr=schedules.inverse_power(0.1))
    rule = fastopt.dynamic_gd(y, lr=0.1)
    for _ in range(100):
        scheduled.step(2 * x)
        rule.step(2 * y)
    assert x[0] == y[0] == 0.3914723667473291


def test_a_bad_value_is_refused_before_the_step():
    """A rate below 0 at some step, and one that is no longer finite."""
    w = np.ones(3)
    opt = fastopt.sgd(w, lr=schedules.linear(1.0, 2, end=-1.0))
    opt.step(np.ones(3))
    opt.step(np.ones(3))
    assert w.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"lr\(2\) must be at least 0, got -1.0"):
        opt.step(np.ones(3))
    assert w.tolist() == [0, 0, 0] and opt.steps == 2
    opt = fastopt.sgd(np.zeros(3), lr=schedules.exponential(1e-3, 1e200))
    opt.step(np.ones(3))
    opt.step(np.zeros(3))
    with pytest.raises(ValueError, match=r"lr\(2\) must be finite, got inf"):
        opt.step(np.ones(3))
    assert opt.steps == 2


def test_growth_beyond_what_a_float_holds():
    bounded = schedules.exponential(1e-3, gamma=2.0, end=1.0)
    assert bounded(1100) == bounded(10**6) == 1.0
    assert schedules.exponential(0.0, gamma=2.0)(10**6) == 0.0
    assert schedules.exponential(1.0, gamma=2.0)(10**6) == np.inf
    assert schedules.step(1.0, 1, gamma=2.0)(10**6) == np.inf
