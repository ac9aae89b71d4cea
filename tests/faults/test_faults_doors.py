"""Interrupts of other doors than the plain step, and of what is built on steps: at each
line, and by real signals. What belongs together has changed as a whole or not at all,
and goes on as if there had been no interrupt."""

import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from installed import numba_cpu
from interrupts import alarm, at_lines
from test_faults_interrupts import BACKENDS, plain

import fastopt

SHAPES = {"w": (3, 4), "b": (5,), "none": (0,), "k": (2, 2)}
SCHEDULE = fastopt.schedules.cosine(0.3, steps=20)


def draw(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=shape).astype(dtype) for n, shape in SHAPES.items()}


class Trained:
    """An optimizer of the core after some steps, and all that it writes."""

    def __init__(self, make, steps=2, flat=False, bad=False):
        self.flat = flat
        self.params = fastopt.flatten(draw(0)) if flat else draw(0)
        self.opt = make(self.params)
        for seed in range(steps):
            self.step(seed, clip_norm=1.0)
        self.grads = self.drawn(50)
        if bad:
            self.grads["k"][1, 0] = np.nan

    def drawn(self, seed):
        return fastopt.flatten(draw(seed)) if self.flat else draw(seed)

    def step(self, seed, **settings):
        grads, added = self.drawn(seed), self.opt.groups[1:]
        given = [grads, *(np.full(3, 0.5) for _ in added)] if added else grads
        self.opt.step(given, **settings)

    def state(self):
        kept = self.opt.state_dict(), repr(self.opt.grad_norm)
        trees = [t.data if self.flat else t for t in (self.params, self.grads)]
        return plain([*kept, *trees])


def lookahead(params):
    inner = fastopt.adamw(params, lr=SCHEDULE, weight_decay=0.1, ema=0.9)
    return fastopt.Lookahead(inner, k=3, alpha=0.3)


def raising(made):
    with pytest.raises(FloatingPointError):
        made.opt.step(made.grads, nonfinite="raise", zero_grads=True)


def add_and_look(made):
    made.opt.add_group({"params": np.ones(3), "lr": 0.5})
    assert made.opt.ema_params is not None


def plain_step(made):
    made.opt.step(made.grads)


def full_step(made):
    made.opt.step(made.grads, nonfinite="raise", clip_norm=0.7, zero_grads=True)


def skipped_step(made):
    made.opt.step(made.grads, nonfinite="skip", zero_grads=True)


def of(rule, **given):
    return lambda params, backend: rule(params, backend=backend, **given)


MUON = of(fastopt.Muon, lr=SCHEDULE, adamw_lr=SCHEDULE)
SOPHIA = of(fastopt.sophia_g, lr=SCHEDULE, weight_decay=0.1)
FREE = of(fastopt.schedule_free_adamw, lr=0.1, ema=0.9)
ADAMW = of(fastopt.adamw, lr=SCHEDULE, beta1=0.8, ema=0.9)
DOORS = {
    "estimate, first": (SOPHIA, {"steps": 0}, lambda m: m.opt.estimate(m.grads)),
    "estimate": (SOPHIA, {}, lambda m: m.opt.estimate(m.grads, grad_scale=0.5)),
    "schedule": (ADAMW, {}, plain_step),
    "schedule, nadam": (of(fastopt.nadam, lr=SCHEDULE), {}, plain_step),
    "schedule, prodigy": (of(fastopt.prodigy, lr=SCHEDULE), {"steps": 0}, plain_step),
    "schedule, Muon": (MUON, {}, plain_step),
    "schedule, Adafactor": (of(fastopt.Adafactor, lr=SCHEDULE), {}, plain_step),
    "schedule, Lookahead": (lambda p, backend: lookahead(p), {}, plain_step),
    "finite": (ADAMW, {}, full_step),
    "finite, lamb": (of(fastopt.lamb, lr=0.1, ema=0.5), {"steps": 0}, full_step),
    "raise": (ADAMW, {"bad": True}, raising),
    "skip": (ADAMW, {"bad": True}, skipped_step),
    "eval_params, first": (FREE, {"steps": 0}, lambda m: m.opt.eval_params()),
    "eval_params": (FREE, {}, lambda m: m.opt.eval_params()),
    "ema_params": (ADAMW, {}, add_and_look),
    "flat": (of(fastopt.adamw, lr=0.1), {"flat": True}, plain_step),
    "flat, full": (ADAMW, {"flat": True}, full_step),
    "flat, lamb": (of(fastopt.lamb, lr=0.1), {"flat": True}, full_step),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_doors_of_the_core_interrupted_at_lines(campaign, door, monkeypatch):
    make, how, action = DOORS[door]
    backends = BACKENDS if campaign.long else [BACKENDS[len(door) % len(BACKENDS)]]
    for backend in backends:
        monkeypatch.undo()
        if backend == "alone":
            monkeypatch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
        name = "numba" if backend == "alone" else backend

        def trained(name=name):
            return Trained(lambda params: make(params, name), **how)

        at_lines(
            campaign,
            f"{door} {backend}",
            trained,
            action,
            Trained.state,
            lambda made: made.step(7),
            stride=1 if campaign.long else 17,
            changes=not door.startswith("eval_params"),
        )


# What watches a run -------------------------------------------------------------------


class Watched:
    """Parameters, an optimizer, and what looks at their metric."""

    def __init__(self, watch, make=None, metrics=(2.0, 1.0)):
        self.params = {"w": np.ones((3, 2), order="F"), "b": np.full(2, 0.5)}
        trained = {name: value.copy() for name, value in self.params.items()}
        self.opt = (make or fastopt.sgd)(
            [{"params": trained, "lr": 1.0}, {"params": np.ones((2, 3)), "lr": 0.5}]
        )
        self.watch, self.answers = watch(), []
        for metric in metrics:
            self.look(metric)
        for value in self.params.values():
            value += 1.0

    def look(self, metric):
        is_early = isinstance(self.watch, fastopt.EarlyStopping)
        self.watch.step(metric, self.params if is_early else self.opt)

    def state(self):
        rates = [float(group["lr"]) for group in self.opt.groups]
        return plain([self.watch.state_dict(), rates, self.params])


def early():
    return fastopt.EarlyStopping(patience=3, min_delta=0.01)


def plateau():
    return fastopt.ReduceLROnPlateau(patience=0, cooldown=2)


def muon(groups):
    return fastopt.Muon(groups, adamw_lr=0.3)


def looking(groups):
    return fastopt.Lookahead(fastopt.adamw(groups), k=2)


SAVED = {
    early: {"best": 0.5, "best_look": 7, "best_params": None, "looks": 9, "wait": 1},
    plateau: {"best": 0.5, "bad": 1, "cooling": 1},
}
WATCHES = {
    "early, better": (early, None, lambda m: m.look(0.5)),
    "early, worse": (early, None, lambda m: m.look(1.5)),
    "restore": (early, None, lambda m: m.watch.restore(m.params)),
    "reset, early": (early, None, lambda m: m.watch.reset()),
    "load, early": (early, None, lambda m: m.watch.load_state_dict(SAVED[early])),
    "plateau": (plateau, None, lambda m: m.look(1.5)),
    "plateau, Muon": (plateau, muon, lambda m: m.look(1.5)),
    "plateau, Lookahead": (plateau, looking, lambda m: m.look(1.5)),
    "plateau, better": (plateau, None, lambda m: m.look(0.5)),
    "reset, plateau": (plateau, None, lambda m: m.watch.reset()),
    "load, plateau": (plateau, None, lambda m: m.watch.load_state_dict(SAVED[plateau])),
}  # fmt: skip


@pytest.mark.parametrize("name", WATCHES)
def test_what_watches_a_metric_interrupted_at_lines(campaign, name):
    watch, optimizer, action = WATCHES[name]
    at_lines(
        campaign,
        name,
        lambda: Watched(watch, optimizer),
        action,
        Watched.state,
        lambda made: made.look(0.7),
        stride=7 if "plateau" in name and not campaign.long else 1,
    )


def test_a_noise_scale_interrupted_at_lines(campaign):
    def make():
        scale = fastopt.GradientNoiseScale(8, beta=0.9)
        for seed in range(3):
            scale.update_norms([2.0 + seed, 3.0], 1.5)
        return scale

    def state(scale):
        return plain(vars(scale))

    def update(scale):
        scale.update_norms([4.0, 3.0, 5.0], 1.25)

    at_lines(campaign, "noise", make, update, state, update)


def squares(params):
    """A loss whose gradient is not that of another element, and never zero."""
    loss = sum(float((1 + value @ value) / 2) for value in params.values())
    return loss, {name: value + 0.1 for name, value in params.items()}


def test_minimize_interrupted_at_lines(campaign):
    """What its callbacks hold: a whole number of steps; and they can be used again."""

    class Minimized:
        def __init__(self):
            rng = np.random.default_rng(3)
            self.start = {"w": rng.normal(size=4), "b": rng.normal(size=3)}
            self.x0 = {name: value.copy() for name, value in self.start.items()}
            self.run, self.early = None, fastopt.EarlyStopping(patience=3)

        def look(self, run):
            self.run = run

        def minimize(self):
            watch = fastopt.ReduceLROnPlateau(patience=0)
            callbacks = self.look, self.early, watch
            return fastopt.minimize(
                squares, self.x0, fastopt.nadam, 3, callbacks=callbacks, lr=0.1
            )

        def seen(self):
            if self.run is None:
                return None
            kept = self.run.opt.state_dict()
            for name in ("lr",):
                kept["groups"][0].pop(name)
            return plain([kept, self.run.params])

    whole = [Minimized().seen()]
    for steps in range(4):
        one = Minimized()
        one.run = SimpleNamespace(
            params={name: value.copy() for name, value in one.start.items()}
        )
        one.run.opt = fastopt.nadam(one.run.params, lr=0.1)
        for _ in range(steps):
            one.run.opt.step(squares(one.run.params)[1])
        whole.append(one.seen())
    expected = Minimized().minimize()

    def go_on(one):
        again = one.minimize()
        assert again.losses.tolist() == expected.losses.tolist()
        assert plain(again.params) == plain(expected.params)

    def state(one):
        assert plain(one.x0) == plain(one.start)
        assert one.seen() in whole, "torn"

    at_lines(
        campaign,
        "minimize",
        Minimized,
        Minimized.minimize,
        state,
        go_on,
        stride=1 if campaign.long else 61,
        changes=False,
    )


# Adapters -----------------------------------------------------------------------------


def test_scipys_door_interrupted_at_lines(campaign):
    scipy = pytest.importorskip("fastopt.scipy", reason="scipy is not installed")

    class Recorded(fastopt.Rule):
        """A rule that remembers the optimizer that it has made, and its parameters."""

        def __call__(self, x, **given):
            opt = super().__call__(x, **given)
            object.__setattr__(self, "made", (opt, x))
            return opt

    class Minimized:
        def __init__(self):
            adam = fastopt.adam
            self.rule = Recorded(
                adam.update, adam.scalars, state=adam.state, name="adam"
            )
            self.x0 = np.array([1.0, -2.0, 0.5])

        def minimize(self):
            method = scipy.Method(self.rule)
            gradient = SimpleNamespace(fun=lambda x: x @ x, jac=lambda x: 2 * x + 0.1)
            return method(
                gradient.fun, self.x0, jac=gradient.jac, maxiter=3, lr=0.1, gtol=0.0
            )

    x = np.array([1.0, -2.0, 0.5])
    opt, whole = fastopt.adam(x, lr=0.1), []
    for _ in range(4):
        whole.append(plain([opt.state_dict(), x]))
        opt.step(2 * x + 0.1)
    expected = Minimized().minimize().x

    def state(one):
        assert one.x0.tolist() == [1.0, -2.0, 0.5]
        opt, x = vars(one.rule).get("made", (None, None))
        assert opt is None or plain([opt.state_dict(), x]) in whole, "torn"

    def go_on(one):
        assert plain(one.minimize().x) == plain(expected)

    at_lines(
        campaign,
        "scipy",
        Minimized,
        Minimized.minimize,
        state,
        go_on,
        stride=1 if campaign.long else 31,
        changes=False,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_thincs_adam_interrupted_at_lines(campaign, backend, monkeypatch):
    thinc = pytest.importorskip("fastopt.thinc", reason="thinc is not installed")
    monkeypatch.setattr(
        thinc.backends, "choose", lambda *_, **__: backend.replace("alone", "numba")
    )
    if backend == "alone":
        monkeypatch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
    given = {"beta1": 0.85, "beta2": 0.997, "eps": 0.05, "learn_rate": 0.02}
    ops = thinc.FastoptOps()

    class Step:
        def __init__(self):
            rng = np.random.default_rng(4)
            self.arrays = [*np.abs(rng.normal(size=(4, 7))).astype(np.float32)]

        def step(self):
            ops.adam(*self.arrays, **given)

        def state(self):
            return plain(self.arrays)

        def go_on(self):
            self.arrays[1][...] = 0.5
            self.step()

    stride = 1 if campaign.long else 11
    at_lines(campaign, backend, Step, Step.step, Step.state, Step.go_on, stride=stride)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_kerass_steps_and_loads_interrupted_at_lines(campaign):
    """The variables and fastopt's state; what Keras counts itself is Keras's."""
    pytest.importorskip("torch", reason="torch is not installed")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip("keras has another backend here")
    import torch

    import fastopt.keras as optimizers

    def grads(seed):
        return [torch.from_numpy(g) for g in draw(seed, np.float32).values() if g.size]

    class Model:
        def __init__(self, steps=1):
            drawn = draw(0, np.float32)
            self.variables = [keras.Variable(v) for v in drawn.values() if v.size]
            self.optimizer = optimizers.nadam(learning_rate=0.1)
            self.optimizer.exclude_from_weight_decay(var_list=self.variables[:1])
            self.optimizer.build(self.variables)
            for seed in range(steps):
                self.step(seed)

        def step(self, seed=50):
            self.optimizer.apply(grads(seed), self.variables)

        def state(self):
            inner = self.optimizer._optimizer.state_dict()
            values = [v.value.detach().numpy().copy() for v in self.variables]
            return plain([inner, [*self.optimizer._decays], values])

    def load(model):
        model.optimizer.load_own_variables(saved)

    saved = {}
    Model(steps=3).optimizer.save_own_variables(saved)
    for what, action, stride in (("step", Model.step, 41), ("load", load, 17)):
        at_lines(
            campaign,
            what,
            Model,
            action,
            Model.state,
            lambda model: model.step(7),
            stride=1 if campaign.long else stride,
        )


# Signals ------------------------------------------------------------------------------


class Stop(Exception):
    """What a handler raises."""


def stop(*_):
    raise Stop


SIGNALLED = {
    "adamw": lambda p, backend: fastopt.adamw(p, lr=0.1, backend=backend),
    "nadam": lambda p, backend: fastopt.nadam(p, lr=SCHEDULE, ema=0.9, backend=backend),
    "lamb": lambda p, backend: fastopt.lamb(p, lr=0.1, backend=backend),
    "prodigy": lambda p, backend: fastopt.prodigy(p, backend=backend),
    "Muon": lambda p, backend: fastopt.Muon(p, lr=0.1, backend=backend),
    "lookahead": lambda p, backend: fastopt.Lookahead(
        fastopt.adam(p, lr=0.1, backend=backend), k=2
    ),
}


# In a weak reference's callback, Python drops an exception, and the step is done.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("backend", BACKENDS)
def test_signals_that_raise_in_a_step_of_the_core(campaign, backend, monkeypatch):
    """Of which none comes into a kernel, whose arrays are large enough for some to
    come while it runs."""
    if backend == "alone":
        monkeypatch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
    name = "numba" if backend == "alone" else backend
    chance = random.Random(backend)

    class Large:
        def __init__(self, make):
            rng = np.random.default_rng(0)
            shapes = (40, 50), (301,), (1,)
            self.params, self.grads = (
                [rng.normal(size=shape) for shape in shapes] for _ in range(2)
            )
            self.opt = make(self.params, name)

        def step(self):
            self.opt.step(self.grads, clip_norm=5.0)

        def state(self):
            return plain([self.opt.state_dict(), self.params])

    def check(made, expected):
        expected.step()
        before, done = made.state(), False
        try:
            with alarm(stop, chance.uniform(1e-6, 4e-4)):
                made.step()
                done = True
        except Stop:
            pass
        if made.state() == before:
            assert not done, "not done"
            made.step()
        assert made.state() == expected.state(), "torn"

    for rule, make in SIGNALLED.items():
        made, expected = Large(make), Large(make)
        for step in range(500 if campaign.long else 25):
            campaign.attempt(f"{rule} {backend}, step {step}", check, made, expected)
