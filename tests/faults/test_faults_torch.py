"""Interrupts of what ``fastopt.torch`` does, at every line of it and by signals: each
leaves the optimizer as before or after, and one that goes on as if there had been none.
"""

import copy
import random
import signal
import sys
from functools import partial

import pytest
from interrupts import PACKAGE, alarm, at_line, at_place, interrupted

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_tensors import Parameter, draw, params_of  # noqa: E402

import fastopt.torch as ft  # noqa: E402

MATRICES = (3, 5), (4, 2)


class Trained:
    """Parameters and their optimizer, after some steps; ``settings`` of its last ones
    are arguments of step."""

    def __init__(
        self,
        kind,
        steps=0,
        dtypes=(torch.float32,),
        groups=False,
        channels_last=False,
        **options,
    ):
        drawn = [tensor for dtype in dtypes for tensor in draw(dtype=dtype)]
        if channels_last:  # of a convolution, whose gradients lie so, too
            drawn[0] = draw([(4, 3, 2, 2)])[0].to(memory_format=torch.channels_last)
        self.params = params_of(drawn)
        given = self.params
        if groups:
            given = [{"params": given[:2], "lr": 0.03}, {"params": given[2:]}]
        self.optimizer = getattr(ft, kind)(given, lr=0.05, **options)
        for seed in range(steps):
            self.step(seed)

    def give(self, seed):
        for i, param in enumerate(self.params):
            (grad,) = draw((param.shape,), torch.float64, 100 * seed + i + 1)
            memory = torch.preserve_format
            if not param.is_contiguous():
                memory = torch.channels_last
            param.grad = grad.to(param.dtype).contiguous(memory_format=memory)

    def step(self, seed, **settings):
        self.give(seed)
        self.optimizer.step(**settings)

    def all(self):
        """All that a step changes, as it is now."""
        kept = self.optimizer.state_dict()
        kept["attributes"] = self.optimizer.skipped, self.optimizer.grad_norm
        kept["mode"] = getattr(self.optimizer, "_evaluating", None)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept["parameters"] = [(p.detach(), p.grad) for p in params]
        # Whether they share a buffer.
        kept["places"] = [p.untyped_storage().nbytes() for p in params]
        return copy.deepcopy(kept)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def at_lines(campaign, what, make, action, go_on, stride=1):
    """Interrupt ``action`` at its lines, or every ``stride``-th: what was changed is
    all or nothing, and ``go_on`` then does what it would have."""
    made, came = make(), [True]
    before = made.all()
    action(made)
    after = made.all()
    go_on(made)
    ends = {False: made.all()}
    made = make()
    go_on(made)
    ends[True] = made.all()
    assert not equal(before, after)

    def check(line):
        made = make()
        came[0] = interrupted(lambda: action(made), line)
        now = made.all()
        undone = equal(now, before)
        assert undone or equal(now, after), "torn"
        assert came[0] or not undone, "not done"
        go_on(made)
        assert equal(made.all(), ends[undone]), "another way on"

    line = 0
    while came[0]:
        campaign.attempt(f"{what}, line {line}", check, line)
        line += stride


CASES = {
    "AdamW": {},
    "Adam, amsgrad": {"kind": "Adam", "amsgrad": True},
    "SGD": {},
    "SGD, momentum": {"kind": "SGD", "momentum": 0.9},
    "NAdam": {},
    "ASGD": {},
    "RMSprop, centered": {"kind": "RMSprop", "centered": True, "momentum": 0.5},
    "LAMB": {},
    "Prodigy": {},
    "ScheduleFreeAdamW": {},
    "Adafactor": {},
    "SophiaG": {},
    "Lion": {},
    "AdamW, groups": {"kind": "AdamW", "groups": True},
    "NAdam, groups": {"kind": "NAdam", "groups": True},
    "AdamW, maximize": {"kind": "AdamW", "maximize": True},
    "AdamW, ema": {"kind": "AdamW", "ema": 0.9},
    "AdamW, clip_norm": {"kind": "AdamW", "clip_norm": 0.5},
    "NAdam, all": {
        "kind": "NAdam", "ema": 0.9, "clip_norm": 0.5, "clip_value": 1.0,
        "nonfinite": "skip",
    },
    "AdamW, dtypes": {
        "kind": "AdamW", "dtypes": (torch.float32, torch.float64, torch.bfloat16),
    },
    "LAMB, dtypes": {"kind": "LAMB", "dtypes": (torch.float32, torch.float64)},
    "Prodigy, dtypes": {"kind": "Prodigy", "dtypes": (torch.float32, torch.float16)},
    "Adafactor, bfloat16": {"kind": "Adafactor", "dtypes": (torch.bfloat16,)},
    "AdamW, complex": {"kind": "AdamW", "dtypes": (torch.complex64,)},
    "AdamW, channels_last": {"kind": "AdamW", "channels_last": True},
    "LAMB, channels_last": {
        "kind": "LAMB", "channels_last": True, "clip_norm": 0.5, "ema": 0.9,
    },
    "AdamW, numpy": {"kind": "AdamW", "backend": "numpy", "ema": 0.9},
    "Prodigy, numpy": {"kind": "Prodigy", "backend": "numpy", "clip_norm": 0.5},
    "NAdam, numba": {"kind": "NAdam", "backend": "numba", "ema": 0.9},
    "LAMB, numba": {"kind": "LAMB", "backend": "numba", "clip_norm": 0.5},
}  # fmt: skip


def maker(name, **more):
    return partial(Trained, **{"kind": name, **CASES[name], **more})


def settings_of(name):
    return {"zero_grads": True} if "dtypes" in CASES[name] else {}


@pytest.mark.parametrize("name", CASES)
def test_steps_of_torch_interrupted_at_lines(campaign, name):
    """The first step, which makes the state, the second, and one like the last."""
    for steps in (0, 1, 3):

        def make(steps=steps):
            made = maker(name, steps=steps)()
            made.give(50)
            return made

        def step(made):
            made.optimizer.step(**settings_of(name))

        stride = 1 if campaign.long else 101 if steps == 3 else 401
        at_lines(
            campaign, f"{name} after {steps}", make, step, lambda m: m.step(7), stride
        )


def other_makers():
    """What else changes an optimizer: how it is made, the action, and how it goes on.
    Each of these functions is given what was made."""

    def flattened(made, steps):
        model = torch.nn.ParameterList(made.params)
        made.give(0)
        ft.flatten_(model)
        return with_grads(made) if not steps else flat_step(made)

    def with_grads(made, seed=50):
        for param, other in zip(made.params, draw(seed=seed), strict=True):
            param.grad.copy_(other) if param.grad is not None else None
        return made

    def flat_step(made, seed=50):
        with_grads(made, seed)
        made.optimizer.step()
        return made

    def given(name, steps=2, **more):
        made = maker(name, steps=steps, **more)()
        made.give(50)
        return made

    def not_finite():
        made = given("NAdam, all", dtypes=(torch.float32, torch.bfloat16))
        with torch.no_grad():
            made.params[1].grad[0] = float("inf")
        return made

    def scaled():
        made = given("AdamW, dtypes")
        made.optimizer.grad_scale, made.optimizer.found_inf = map(
            torch.tensor, (8.0, 0.0)
        )
        return made

    def unscaled_step(made):
        for name in ("grad_scale", "found_inf"):
            vars(made.optimizer).pop(name, None)
        made.step(7)

    def alone(made):
        made.optimizer.step_param(made.params[0])

    def alone_again(made):
        made.give(7)
        alone(made)

    def after_one_alone(**more):
        made = given("AdamW", **more)
        alone(made)
        return made

    def with_gradients(made):
        made.give(50)
        return made

    def estimate(made):
        made.optimizer.estimate()

    def fresh_state(made):
        saved = Trained("AdamW", 3, dtypes=(torch.float32, torch.bfloat16))
        return saved.optimizer.state_dict()

    def load(made):
        made.optimizer.load_state_dict(fresh_state(made))

    def load_centered(made):
        options = CASES["RMSprop, centered"]
        made.optimizer.load_state_dict(
            Trained(steps=5, **options).optimizer.state_dict()
        )

    def add(made):
        extra = Parameter(torch.ones(3))
        made.optimizer.add_param_group({"params": [extra], "lr": 0.3})

    def step(made):
        made.optimizer.step()

    def go_on(made):
        made.params = [p for g in made.optimizer.param_groups for p in g["params"]]
        made.step(7)

    def averaged():
        made = given("ScheduleFreeAdamW", **halves)
        made.optimizer.eval()
        return made

    def as_trained(made):
        """Steps are refused in eval mode, and right after it."""
        if made.optimizer._evaluating:
            with pytest.raises(RuntimeError, match="in eval mode"):
                made.optimizer.step()
            made.optimizer.train()
        go_on(made)

    def flatten(made):
        ft.flatten_(made.params)

    def unflatten(made):
        ft.unflatten_(made.params)

    halves = {"dtypes": (torch.float32, torch.bfloat16)}
    return {
        "eval": (
            lambda: given("ScheduleFreeAdamW", **halves),
            lambda made: made.optimizer.eval(),
            as_trained,
        ),
        "train": (averaged, lambda made: made.optimizer.train(), as_trained),
        "flatten_": (lambda: given("NAdam", **halves), flatten, go_on),
        "unflatten_": (
            lambda: flattened(Trained("AdamW"), 1), unflatten,
            lambda made: flat_step(made, 7),
        ),
        "flattened, first": (lambda: flattened(Trained("AdamW"), 0), step, flat_step),
        "flattened": (lambda: flattened(Trained("AdamW"), 1), step, flat_step),
        "skipped": (not_finite, step, go_on),
        "scaled": (scaled, step, unscaled_step),
        "step_param, first": (
            lambda: with_gradients(Trained("NAdam")), alone, alone_again,
        ),
        "step_param": (lambda: after_one_alone(**halves), alone, alone_again),
        "estimate, first": (lambda: given("SophiaG", 0), estimate, go_on),
        "estimate": (lambda: given("SophiaG"), estimate, go_on),
        "load_state_dict": (lambda: given("AdamW", **halves), load, go_on),
        "load_state_dict, first": (lambda: given("AdamW", 0, **halves), load, go_on),
        "load_state_dict, centered": (
            lambda: given("RMSprop, centered"), load_centered, go_on,
        ),
        "add_param_group": (lambda: given("AdamW"), add, go_on),
    }  # fmt: skip


OTHERS = other_makers()


@pytest.mark.parametrize("name", OTHERS)
def test_other_changes_of_torch_interrupted_at_lines(campaign, name):
    make, action, go_on = OTHERS[name]
    at_lines(campaign, name, make, action, go_on, 1 if campaign.long else 31)


# Signals ------------------------------------------------------------------------------


def lines_of(action):
    """How many lines of fastopt's an action comes to."""
    count = 0
    before = sys.gettrace()

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


NESTED = [
    *("AdamW", "SGD, momentum", "NAdam, all", "LAMB", "Prodigy, dtypes"),
    *("Adafactor", "ScheduleFreeAdamW", "AdamW, dtypes", "Adafactor, bfloat16"),
]


@pytest.mark.parametrize("name", NESTED)
def test_steps_of_torch_within_a_step(campaign, name):
    """As torch's: a step that a signal handler does in the midst of another is done,
    and so is the other one, on what it finds then."""
    for steps in (0, 3):
        make = maker(name, steps=steps)
        made = make()
        made.step(7)
        made.optimizer.step()
        expected = [made.all()]
        made.optimizer.step()
        expected.append(made.all())

        def check(line, make=make, expected=expected):
            made = make()
            made.give(7)
            if not at_line(made.optimizer.step, made.optimizer.step, line):
                made.optimizer.step()
            assert equal(made.all(), expected[0])
            made.optimizer.step()  # by what has been noted of those before
            assert equal(made.all(), expected[1])

        made = make()
        made.give(7)
        lines = lines_of(made.optimizer.step)
        stride = 1 if campaign.long else 301 if not steps else 71
        last = 0 if campaign.long or not steps else 12  # where steps are noted
        for line in {*range(0, lines, stride), *range(lines - last, lines)}:
            campaign.attempt(f"{name} after {steps}, line {line}", check, line)


def test_loads_of_torch_within_a_step(campaign):
    """What a handler loads is there afterwards, and is stepped once, or not at all if
    the step was over."""
    saved = Trained("NAdam", 3).optimizer.state_dict()
    ends = []
    for stepped_first in (False, True):
        made = Trained("NAdam", 1)
        made.give(7)
        if stepped_first:
            made.optimizer.step()
        made.optimizer.load_state_dict(copy.deepcopy(saved))
        if not stepped_first:
            made.optimizer.step()
        ends.append(made.all())

    def check(line):
        made = Trained("NAdam", 1)
        made.give(7)
        load = partial(made.optimizer.load_state_dict, copy.deepcopy(saved))
        came[0] = at_line(made.optimizer.step, load, line)
        assert not came[0] or any(equal(made.all(), end) for end in ends)

    line, came = 0, [True]
    while came[0]:
        campaign.attempt(f"line {line}", check, line)
        line += 1 if campaign.long else 13


needs_timers = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="needs POSIX timers"
)


class Stop(Exception):
    """What a handler raises."""


@needs_timers
@pytest.mark.parametrize("name", ["AdamW", "NAdam, all", "LAMB", "AdamW, dtypes"])
def test_signals_that_raise_in_a_step_of_torch(campaign, name):
    """Between the bytecodes, and in torch's own Python code, too."""
    chance = random.Random(name)
    made = maker(name)()
    expected = maker(name)()

    def stop(*_):
        raise Stop

    def check(seed):
        # An interrupt in the end of torch.no_grad() itself, in an earlier test, may
        # have left this off.
        torch.set_grad_enabled(True)
        made.give(seed)
        expected.step(seed)
        before = made.all()
        done = False
        try:
            with alarm(stop, chance.uniform(1e-6, 3e-4)):
                made.optimizer.step()
                done = True
        except Stop:
            pass
        after = made.all()
        assert torch.is_grad_enabled()
        if equal(after, before):
            assert not done
            made.optimizer.step()
        assert equal(made.all(), expected.all()), "torn"

    for seed in range(1000 if campaign.long else 60):
        campaign.attempt(f"{name}, step {seed}", check, seed)


@needs_timers
def test_signals_that_step_in_a_step_of_torch(campaign):
    """Each step of a handler is done in full, and so is the one that it comes into."""
    chance = random.Random(3)
    for name in ("AdamW", "SGD, momentum", "NAdam, groups", "AdamW, dtypes"):

        def check(seed, name=name):
            made, expected = maker(name)(), maker(name)()
            made.give(seed)
            expected.give(seed)
            nested = []

            def step(*_):
                made.optimizer.step()
                nested.append(1)

            for _ in range(5):
                with alarm(step, chance.uniform(1e-6, 3e-4)):
                    made.optimizer.step()
            for _ in range(5 + len(nested)):
                expected.optimizer.step()
            assert equal(made.all(), expected.all())

        for seed in range(200 if campaign.long else 10):
            campaign.attempt(f"{name}, {seed}", check, seed)


@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_interrupts_where_parameters_share_memory(name):
    """A rule that measures steps them one after another, so an interrupt may come in
    between. The optimizer then refuses to go on, as if a GPU had failed."""

    def trained():
        made = Trained(name, steps=1)
        first = made.params[0].detach()
        made.optimizer.add_param_group({"params": [Parameter(first[1:])]})
        made.params.append(made.optimizer.param_groups[1]["params"][0])
        made.give(1)
        return made

    made = trained()
    before = made.all()
    made.optimizer.step()
    after, line, refused = made.all(), 0, 0
    while True:
        made = trained()
        came = interrupted(made.optimizer.step, line)
        try:
            now = made.all()
        except RuntimeError as error:
            assert "load a checkpoint" in str(error)
            refused += 1
        else:
            assert equal(now, before) or equal(now, after)
        if not came:
            break
        line += 3
    assert bool(refused) == (name == "LAMB")


@pytest.mark.parametrize("native", [True, False])
def test_handlers_that_step_everywhere_in_a_first_step(campaign, native, monkeypatch):
    """A first step adds to the state, which the step that it comes into reads."""
    if not native:
        monkeypatch.setattr("fastopt.torch.memory.native", None)
    names = CASES if campaign.long else ("SGD, momentum",)
    for name in names:
        expected, reached = maker(name)(), [True]
        expected.give(0)
        for _ in range(3):
            expected.optimizer.step()
        after = expected.all()

        def check(place, name=name, after=after, reached=reached):
            made = maker(name)()
            made.give(0)
            step = made.optimizer.step
            reached[0] = at_place(step, step, place)
            for _ in range(1 if reached[0] else 2):
                step()
            assert equal(made.all(), after)

        place = 0
        while reached[0]:
            campaign.attempt(f"{name}, place {place}", check, place)
            place += 1
