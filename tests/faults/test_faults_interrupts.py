"""Interrupts at every line of what changes an optimizer: afterwards it is as before or
as after, to the last bit; it can be used; and it goes on as if nothing had happened."""

import signal
import threading

import numpy as np
import pytest
from installed import BACKENDS, numba_cpu
from interrupts import at_every_line, interrupted

import fastopt

SHAPES = {"w": (3, 4), "b": (5,), "none": (0,), "k": (2, 2)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def plain(value):
    """Anything as something that compares by its bits."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return repr(value)


class Case:
    """An optimizer after some steps, and all that it writes."""

    def __init__(self, name, backend, patch, **given):
        patch.undo()
        if backend == "alone":
            patch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
            backend = "numba"
        self.params, self.grads = draw(0), draw(1)
        self.lr_of_vectors = "adamw_lr" if name == "Muon" else "lr"
        w, *others = self.params.values()
        groups = [{"params": {"w": w}}, {"params": others}]
        if name == "lookahead":
            inner = fastopt.adamw(groups, lr=0.1, backend=backend, **given)
            self.opt = fastopt.Lookahead(inner, k=2, alpha=0.3)
        else:
            make = getattr(fastopt, name)
            self.opt = make(groups, lr=0.1, backend=backend, **given)
        self.opt.step(self.tree(draw(2)))

    def tree(self, grads=None):
        w, *others = (grads or self.grads).values()
        return [{"w": w}, others]

    def state(self):
        lrs = [float(g["lr"]) for g in self.opt.groups]
        rest = self.params, self.grads, lrs, repr(self.opt.grad_norm)
        return plain([self.opt.state_dict(), *rest])

    def go_on(self):
        """A step more, of whatever there is by now."""
        if self.opt._pending is None:
            self.opt.step(self.tree(draw(3))[: len(self.opt.groups)] + self.more())
        else:
            self.opt.step()
        return self.state()

    def more(self):
        return [np.ones(3)] * (len(self.opt.groups) - 2)


def accumulate(case):
    case.opt.accumulate(case.tree(), grad_scale=0.5)


def step_accumulated(case):
    case.opt.step(nonfinite="skip")


def drop(case):
    case.opt.drop_accumulated()


def load(case):
    case.opt.load_state_dict(case.saved)


DOORS = {
    "step": lambda c: c.opt.step(c.tree()),
    "clip": lambda c: c.opt.step(c.tree(), clip_norm=0.5, clip_value=0.2),
    "skip": lambda c: c.opt.step(c.tree(), nonfinite="skip", zero_grads=True),
    "zero": lambda c: c.opt.step(c.tree(), zero_grads=True),
    "weights": lambda c: c.opt.step([c.tree(), c.tree(draw(4))], weights=[0.3, 2.0]),
    "lr": lambda c: setattr(c.opt, "lr", 0.03),
    "update": lambda c: c.opt.groups[1].update(lr=0.2),
    "frozen": lambda c: setattr(c.opt.groups[0], "frozen", True),
    "add": lambda c: c.opt.add_group({"params": np.ones(3), c.lr_of_vectors: 0.5}),
    "accumulate": accumulate,
    "accumulated": step_accumulated,
    "drop": drop,
    "load": load,
}
ACCUMULATING = ("accumulated", "drop")
RULES = (
    ["adamw", "lamb", "prodigy", "schedule_free_adamw", "nadam", "lion"]
    + ["Muon", "Adafactor", "lookahead"]
)  # fmt: skip


def cases(long):
    for backend in BACKENDS:
        for rule in RULES if long else ("adamw", "lamb", "Muon", "lookahead"):
            for door in DOORS:
                for given in ({}, {"ema": 0.9}) if long else ({"ema": 0.9},):
                    yield rule, backend, door, given


def try_one(rule, backend, door, given, stride, offset, patch):
    def make():
        case = Case(rule, backend, patch, **given)
        if door in ACCUMULATING:
            case.opt.accumulate(case.tree())
        if door == "skip":
            case.grads["b"][1] = np.nan
        if door == "load":
            case.saved = case.opt.state_dict()
            case.opt.step(case.tree(draw(5)))
            case.opt.lr = 0.7
        return case

    action = DOORS[door]
    before, after = make(), make()
    action(after)
    states = [before.state(), after.state()]
    following = [before.go_on(), after.go_on()]

    def check(case):
        state = case.state()
        assert state in states, f"{door} was torn"
        assert case.go_on() == following[states.index(state)], f"{door} went on wrong"

    assert states[0] != states[1]
    for line in range(offset, 10**6, stride):
        case = make()
        if not interrupted(lambda case=case: action(case), line):
            check(case)
            return
        check(case)


def test_interrupts_at_the_lines_of_the_core(campaign, monkeypatch):
    for number, case in enumerate(cases(campaign.long)):
        if not campaign.long and number % 11:
            continue
        rule, backend, door, given = case
        stride = 29 if campaign.long else 23  # all lines of all cases take hours
        offset = number % stride
        arguments = *case, stride, offset, monkeypatch
        campaign.attempt(f"{rule} {backend} {door} {given}", try_one, *arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_of_muon_are_made_orthogonal_after_an_interrupt(backend, monkeypatch):
    """While steps are planned anew, there is never a plan without the products."""

    def check(case):
        assert case.go_on() == following

    following = Case("Muon", backend, monkeypatch).go_on()
    at_every_line(
        lambda: Case("Muon", backend, monkeypatch),
        lambda case: setattr(case.opt, "threads", 3),
        check,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_handler_that_steps_is_refused_and_never_waits(backend, monkeypatch):
    """The interrupted step is not made; the optimizer can be used."""
    case = Case("adamw", backend, monkeypatch)
    errors = []

    def handler(*given):
        try:
            case.opt.step(case.tree())
        except RuntimeError as error:
            errors.append(str(error))

    class Signals(dict):
        def items(self):
            signal.raise_signal(signal.SIGUSR1)
            return super().items()

        def __getitem__(self, key):
            signal.raise_signal(signal.SIGUSR1)
            return super().__getitem__(key)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        grads = case.tree()
        case.opt.step([Signals(grads[0]), grads[1]])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert errors and "in a step" in errors[0]
    assert case.opt.steps == 2


@pytest.mark.parametrize("which", ["early", "plateau"])
def test_what_watches_a_metric_is_not_half_done(which):
    class Watch:
        def __init__(self):
            self.w = np.ones(3)
            self.opt = fastopt.sgd([{"params": self.w}, {"params": np.ones(2)}], lr=1.0)
            early = fastopt.EarlyStopping(patience=3)
            plateau = fastopt.ReduceLROnPlateau(patience=0)
            self.one = early if which == "early" else plateau
            self.look(1.0)

        def look(self, metric):
            self.one.step(metric, self.w if which == "early" else self.opt)

        def state(self):
            lrs = [group["lr"] for group in self.opt.groups]
            return plain([self.one.state_dict(), lrs])

    metric = 0.5 if which == "early" else 2.0
    before, after = Watch(), Watch()
    after.look(metric)
    states = [before.state(), after.state()]
    assert states[0] != states[1]

    def check(watch):
        assert watch.state() in states

    assert at_every_line(Watch, lambda watch: watch.look(metric), check) > 5


def test_the_flag_of_one_thread_refuses_another():
    inside, go = threading.Event(), threading.Event()

    def wait(steps):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(10)
        return 0.1

    opt = fastopt.sgd(np.ones(3), lr=wait)
    thread = threading.Thread(target=opt.step, args=(np.ones(3),))
    thread.start()
    inside.wait(10)
    with pytest.raises(RuntimeError, match="in a step"):
        opt.state_dict()
    go.set()
    thread.join()
    assert opt.steps == 1
