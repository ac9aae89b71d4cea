"""Schedules: a hyperparameter as a function of the number of completed steps.

>>> import numpy as np, fastopt
>>> lr = fastopt.schedules.warmup_cosine(0.1, steps=100, warmup=10)
>>> lr(5), lr(10), lr(100)
(0.05, 0.1, 0.0)
>>> lr(np.arange(3)).round(3)
array([0.  , 0.01, 0.02])
>>> opt = fastopt.sgd(np.ones(3), lr=lr, momentum=0.9)    # or any hyperparameter

Each is a closed form of the step and remembers nothing, so a run that resumes at any
step goes on with the same bits. Before the first step they are as at the first, since
no step is made there, and after their end they stay as at the end. Where a docstring
names schedules of others, they compute the same at every step from 0 on, but for what
it says; at -1 optax' formulas of a cosine and of milestones at 0 give another number,
and transformers' warm-ups one below zero.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np

from fastopt.memory.segments import Array
from fastopt.optimizer.checks import check_choice, check_count, check_positive
from fastopt.optimizer.refusals import is_function, items, named
from fastopt.rule import check_hyperparameter

# Types of fields, which say what is allowed.
Function = Callable[[Any], Any]
Positive = float
NonNegative = float  # at least 0
Count = int  # at least 0; an int is at least 1
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "float": lambda name, value: check_hyperparameter("", name, value, 1.0),
    "Positive": check_positive,
    "NonNegative": lambda name, value: check_hyperparameter("lr", name, value, 1.0),
    "int": lambda name, value: check_count(name, value, 1),
    "Count": lambda name, value: check_count(name, value, 0),
    "bool": lambda name, value: check_hyperparameter("", name, value, False),
    "Sequence[int]": lambda name, value: _ascending(name, value),
    "Sequence[Function]": lambda name, value: _callables(name, value),
}


@dataclass(frozen=True)
class Schedule:
    """What all schedules are: immutable, picklable, equal if their arguments are.

    A subclass has its arguments as fields and its formula in ``at``. Numbers must be
    finite; what counts steps must be an integer.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, _, optional = str(field.type).partition(" | ")
            value = getattr(self, field.name)
            if kind in _CHECKS and not (optional and value is None):
                value = _CHECKS[kind](field.name, value)
                object.__setattr__(self, field.name, value)

    @overload
    def __call__(self, t: float) -> float: ...
    @overload
    def __call__(self, t: Array) -> Array: ...
    def __call__(self, t: float | Array) -> Any:
        """The value when ``t`` steps are completed, so 0 for the first step.

        ``t`` may be a number, whole or not, or an array of them, which gives a float64
        array of the same shape, element by element the same bits (it takes as long as a
        loop over them). Inside ``jax.jit`` it may be traced: the value is the same,
        rounded to float32 unless x64 is on, and computed by a callback to Python.
        """
        if type(t) is int:  # as an optimizer asks, once in a step
            return self.at(t if t > 0 else 0)
        if "jax" in sys.modules:
            from fastopt.jax import schedules as jax_schedules

            if jax_schedules.is_traced(t):
                return jax_schedules.value(self, t)
        steps = np.asarray(t)
        if steps.dtype.kind not in "iuf":
            raise TypeError(f"steps must be numbers, got {t!r}")
        if steps.dtype.kind == "f" and not np.isfinite(steps).all():
            raise ValueError(f"steps must be finite, got {t!r}")
        values = map(self.at, np.maximum(steps, 0).ravel().tolist())
        array = np.fromiter(values, np.float64, steps.size).reshape(steps.shape)
        return array if array.ndim else float(array)

    def at(self, t: float) -> float:
        """The formula, for ``t`` of at least 0."""
        raise NotImplementedError


def _mix(start: float, end: float, x: float) -> float:
    """From start, exactly, at 0 to end, exactly, at 1."""
    return start * (1 - x) + end * x


def _left(x: float) -> float:
    """What half a cosine has still before it: from 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * x))


# Falling by powers ------------------------------------------------------------------


@dataclass(frozen=True)
class constant(Schedule):
    """``lr``, always; such as a part of :class:`join` or :class:`product`."""

    lr: float

    def at(self, t: float) -> float:
        return self.lr


@dataclass(frozen=True)
class step(Schedule):
    """``lr * gamma**(t // step_size)``: a jump every ``step_size`` steps. As torch's
    StepLR.

    >>> step(1.0, step_size=10)(np.array([0, 9, 10, 20]))
    array([1.  , 1.  , 0.1 , 0.01])
    """

    lr: float
    step_size: int
    gamma: float = 0.1

    def at(self, t: float) -> float:
        return _grown(self.lr, self.gamma, t // self.step_size)


@dataclass(frozen=True)
class multistep(Schedule):
    """``lr`` times ``gamma`` for each of the ``milestones`` that is reached (``t`` is
    at least as large). As torch's MultiStepLR and optax' piecewise_constant_schedule,
    but that a milestone 0 counts from the first step on, which torch forgets.

    >>> multistep(1.0, milestones=(10, 15))(np.array([9, 10, 15]))
    array([1.  , 0.1 , 0.01])
    """

    lr: float
    milestones: Sequence[int]
    gamma: float = 0.1

    def at(self, t: float) -> float:
        return self.lr * self.gamma ** bisect_right(self.milestones, t)


def _grown(value: float, gamma: float, times: float) -> float:
    """``value * gamma**times``, infinite where that is too large for a float."""
    try:
        return value * float(gamma**times)
    except OverflowError:
        return math.copysign(math.inf, value) if value else 0.0


@dataclass(frozen=True)
class exponential(Schedule):
    """``lr * gamma**((t - begin) / steps)``, or with ``staircase`` its exponent rounded
    down; ``lr`` until ``begin``, and never beyond ``end``. As torch's ExponentialLR,
    and as optax' exponential_decay, of which ``gamma`` is the decay_rate.

    >>> exponential(1.0, gamma=0.5, steps=10)(np.array([0, 10, 20]))
    array([1.  , 0.5 , 0.25])
    """

    lr: float
    gamma: Positive
    steps: int = 1
    begin: Count = 0
    staircase: bool = False
    end: float | None = None

    def at(self, t: float) -> float:
        since = max(t - self.begin, 0)
        x = since // self.steps if self.staircase else since / self.steps
        value = _grown(self.lr, self.gamma, x)
        if self.end is None:
            return value
        return max(value, self.end) if self.gamma < 1 else min(value, self.end)


@dataclass(frozen=True)
class inverse_power(Schedule):
    """``lr / (1 + c * t**p)``. The defaults give ``lr / (1 + sqrt(t))``, that of the
    rule ``dynamic_gd`` (Zinkevich 2003); with ``p=1`` it is Keras' InverseTimeDecay.

    >>> inverse_power(1.0)(np.array([0, 1, 4]))
    array([1.        , 0.5       , 0.33333333])
    """

    lr: float
    c: NonNegative = 1.0
    p: Positive = 0.5

    def at(self, t: float) -> float:
        # sqrt is rounded correctly, a power need not be.
        power = math.sqrt(t) if self.p == 0.5 else float(t) ** self.p
        return self.lr / (1 + self.c * power)


@dataclass(frozen=True)
class inverse_sqrt(Schedule):
    """Linear warmup to ``lr``, then ``lr * sqrt(timescale / (t - warmup +
    timescale))``. As transformers' get_inverse_sqrt_schedule, with its default for the
    time scale: ``warmup``, or 10000 without.

    >>> inverse_sqrt(1.0, warmup=4)(np.array([0, 2, 4, 16]))
    array([0. , 0.5, 1. , 0.5])
    """

    lr: float
    warmup: Count = 0
    timescale: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.timescale or self.warmup or 10_000
        object.__setattr__(self, "timescale", scale)

    def at(self, t: float) -> float:
        if t < self.warmup:
            return self.lr * t / self.warmup
        scale = self.timescale or 0
        return self.lr * math.sqrt(scale / (t - self.warmup + scale))


# To an end --------------------------------------------------------------------------


@dataclass(frozen=True)
class polynomial(Schedule):
    """From ``lr`` to ``end`` in ``steps`` steps, as ``(1 - x)**power`` falls from 1 to
    0; it starts after ``begin``. As optax' polynomial_schedule, and as torch's
    PolynomialLR and transformers', of which the default for ``end`` is 1e-7.

    >>> polynomial(1.0, steps=4, power=2)(np.arange(6))
    array([1.    , 0.5625, 0.25  , 0.0625, 0.    , 0.    ])
    """

    lr: float
    steps: int
    power: Positive = 1.0
    end: float = 0.0
    begin: Count = 0

    def at(self, t: float) -> float:
        x = min(max(t - self.begin, 0) / self.steps, 1.0)
        return _mix(self.end, self.lr, (1 - x) ** self.power)


@dataclass(frozen=True)
class linear(Schedule):
    """From ``lr`` to ``end`` in ``steps`` equal steps, after ``begin``. As optax'
    linear_schedule; torch's LinearLR is ``linear(lr * start_factor, total_iters,
    lr * end_factor)``.

    >>> linear(0.0, steps=4, end=1.0)(np.arange(6))      # a warmup
    array([0.  , 0.25, 0.5 , 0.75, 1.  , 1.  ])
    """

    lr: float
    steps: int
    end: float = 0.0
    begin: Count = 0

    def at(self, t: float) -> float:
        x = min(max(t - self.begin, 0) / self.steps, 1.0)
        return _mix(self.lr, self.end, x)


@dataclass(frozen=True)
class cosine(Schedule):
    """From ``lr`` to ``end`` in ``steps`` steps, along half a cosine, to a ``power``.
    Loshchilov & Hutter 2017, arXiv:1608.03983. As optax' cosine_decay_schedule, of
    which ``end`` is alpha times ``lr``. After the last step torch's CosineAnnealingLR
    and transformers' go up again; this stays, as optax' does, for a rate that rises
    after the end of a run is nobody's wish.

    >>> cosine(1.0, steps=4)(np.arange(6)).round(3)
    array([1.   , 0.854, 0.5  , 0.146, 0.   , 0.   ])
    """

    lr: float
    steps: int
    end: float = 0.0
    power: Positive = 1.0

    def at(self, t: float) -> float:
        if t >= self.steps:
            return self.end
        return _mix(self.end, self.lr, _left(t / self.steps) ** self.power)


@dataclass(frozen=True)
class warmup_cosine(Schedule):
    """Linear from ``start`` to ``lr`` in ``warmup`` steps, then as :class:`cosine` in
    the rest of ``steps``, which counts both. As optax' warmup_cosine_decay_schedule; as
    transformers' get_cosine_schedule_with_warmup up to its end, after which that goes
    up again.

    With ``start=0``, as they have it, the first step moves nothing; ``lr / warmup``
    wastes none.

    >>> warmup_cosine(1.0, steps=6, warmup=2)(np.arange(8)).round(3)
    array([0.   , 0.5  , 1.   , 0.854, 0.5  , 0.146, 0.   , 0.   ])
    """

    lr: float
    steps: int
    warmup: Count
    start: float = 0.0
    end: float = 0.0
    power: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _room(self.steps, self.warmup + 1, "at least warmup + 1 =")

    def at(self, t: float) -> float:
        if t < self.warmup:
            return _mix(self.start, self.lr, t / self.warmup)
        if t >= self.steps:
            return self.end
        x = (t - self.warmup) / (self.steps - self.warmup)
        return _mix(self.end, self.lr, _left(x) ** self.power)


@dataclass(frozen=True)
class cosine_restarts(Schedule):
    """A cosine from ``lr`` to ``end`` again and again: the first takes ``steps`` steps,
    each next one ``mult`` times as many. Loshchilov & Hutter 2017, arXiv:1608.03983. As
    torch's CosineAnnealingWarmRestarts when it is stepped; asked for a step directly,
    torch finds the cycle by a logarithm, and the wrong one where that rounds down
    (``mult=3`` at step 121 times the first cycle). transformers' hard restarts end at
    0.

    >>> cosine_restarts(1.0, steps=2, mult=2)(np.arange(7)).round(3)
    array([1.   , 0.5  , 1.   , 0.854, 0.5  , 0.146, 1.   ])
    """

    lr: float
    steps: int
    mult: int = 1
    end: float = 0.0

    def at(self, t: float) -> float:
        length = self.steps
        if self.mult == 1:
            t = t % length
        while t >= length:  # as often as there were restarts: few, as cycles grow
            t -= length
            length *= self.mult
        return _mix(self.end, self.lr, _left(t / length))


@dataclass(frozen=True)
class onecycle(Schedule):
    """Along cosines from ``lr / div_factor`` up to ``lr``, reached before the step
    ``pct_start * steps``, and down to ``lr / div_factor / final_div_factor`` at the
    last of ``steps`` steps. Smith & Topin 2018, arXiv:1708.07120.

    As torch's OneCycleLR, which fails where the way up has no step and rises after the
    end; this starts at the top, and stays. optax' cosine_onecycle_schedule reaches its
    end one step later, when no step is left that would use it.

    For a momentum that goes from 0.95 to 0.85 and back meanwhile:
    ``onecycle(0.85, steps, div_factor=0.85 / 0.95, final_div_factor=1)``.

    >>> onecycle(1.0, steps=10)(np.array([0, 2, 5, 9])).round(3)
    array([0.04 , 1.   , 0.611, 0.   ])
    """

    lr: float
    steps: int
    pct_start: float = 0.3
    div_factor: Positive = 25.0
    final_div_factor: Positive = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pct_start <= 1:
            raise ValueError(f"pct_start must be in [0, 1], got {self.pct_start!r}")

    def at(self, t: float) -> float:
        start = self.lr / self.div_factor
        end = start / self.final_div_factor
        top, last = self.pct_start * self.steps - 1, self.steps - 1
        if t < top:
            return _mix(self.lr, start, _left(t / top))
        if t >= last:
            return end if last > top else self.lr
        return _mix(end, self.lr, _left((t - top) / (last - top)))


@dataclass(frozen=True)
class cyclic(Schedule):
    """Linear from ``lr`` up to ``max_lr`` in ``steps_up`` steps and down in
    ``steps_down`` (by default as many), again and again. Smith 2017, arXiv:1506.01186.
    As torch's CyclicLR with its modes: the way above ``lr`` is "triangular", halves
    with each cycle in "triangular2", or is times ``gamma**t`` in "exp_range".

    For a momentum that goes the other way: ``cyclic(0.9, max_lr=0.8)``.

    >>> cyclic(0.0, max_lr=1.0, steps_up=2, mode="triangular2")(np.arange(7))
    array([0.  , 0.5 , 1.  , 0.5 , 0.  , 0.25, 0.5 ])
    """

    lr: float
    max_lr: float
    steps_up: int = 2000
    steps_down: int | None = None
    mode: str = "triangular"
    gamma: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, "triangular", "triangular2", "exp_range")
        object.__setattr__(self, "steps_down", self.steps_down or self.steps_up)

    def at(self, t: float) -> float:
        up, down = self.steps_up, self.steps_down or 0
        cycle, at = divmod(t, up + down)
        height = at / up if at <= up else (up + down - at) / down
        if self.mode == "triangular2":
            height *= 0.5**cycle
        elif self.mode == "exp_range":
            height = _grown(height, self.gamma, t)
        return _mix(self.lr, self.max_lr, height)


@dataclass(frozen=True)
class wsd(Schedule):
    """Warmup, stable, decay: linear from ``start`` to ``lr`` in ``warmup`` steps, then
    ``lr``, and in the last ``decay`` of ``steps`` steps down to ``end``, by the
    ``shape`` "cosine", "linear" or "1-sqrt". Hu et al. 2024, arXiv:2404.06395; a fifth
    to a tenth of the run is a usual decay (Hägele et al. 2024, arXiv:2405.18392).

    As transformers' get_wsd_schedule with its linear warmup, of which min_lr_ratio
    times ``lr`` is both ``start`` and ``end``.

    >>> wsd(1.0, steps=8, decay=4, warmup=2, shape="linear")(np.arange(9))
    array([0.  , 0.5 , 1.  , 1.  , 1.  , 0.75, 0.5 , 0.25, 0.  ])
    """

    lr: float
    steps: int
    decay: int
    warmup: Count = 0
    start: float = 0.0
    end: float = 0.0
    shape: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("shape", self.shape, "cosine", "linear", "1-sqrt")
        _room(self.steps, self.warmup + self.decay, "at least warmup + decay =")

    def at(self, t: float) -> float:
        if t < self.warmup:
            return _mix(self.start, self.lr, t / self.warmup)
        if t >= self.steps:
            return self.end
        x = (t - self.steps + self.decay) / self.decay
        if x <= 0:
            return self.lr
        if self.shape == "cosine":
            left = _left(x)
        else:
            left = 1 - (x if self.shape == "linear" else math.sqrt(x))
        return _mix(self.end, self.lr, left)


# Of others --------------------------------------------------------------------------


@dataclass(frozen=True)
class join(Schedule):
    """One schedule after the other: each begins anew, at its 0, at its boundary. As
    optax' join_schedules and torch's SequentialLR. They may be any callables of the
    step.

    >>> join([linear(0.0, 2, end=1.0), cosine(1.0, 2)], [2])(np.arange(6))
    array([0. , 0.5, 1. , 0.5, 0. , 0. ])
    """

    schedules: Sequence[Function]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        count, needed = len(self.boundaries), len(self.schedules) - 1
        if count != needed:
            raise ValueError(
                f"{needed + 1} schedules need {needed} boundaries between them, got "
                f"{count}"
            )

    def at(self, t: float) -> float:
        part = bisect_right(self.boundaries, t)
        since = self.boundaries[part - 1] if part else 0
        return float(self.schedules[part](t - since))


@dataclass(frozen=True)
class product(Schedule):
    """The product of schedules, such as a warmup from 0 to 1 of any other. As torch's
    ChainedScheduler, of factors. They may be any callables of the step.

    >>> product([linear(0.0, 2, end=1.0), constant(0.5)])(np.arange(4))
    array([0.  , 0.25, 0.5 , 0.5 ])
    """

    schedules: Sequence[Function]

    def at(self, t: float) -> float:
        return math.prod(float(schedule(t)) for schedule in self.schedules)


# Checks -----------------------------------------------------------------------------


def _room(steps: int, needed: int, what: str) -> None:
    if steps < needed:
        raise ValueError(f"steps must be {what} {needed}, got {steps}")


def _ascending(name: str, values: Any) -> tuple[int, ...]:
    steps = items(name, values, "steps")
    marks = tuple(check_count(f"{name}[{i}]", mark, 0) for i, mark in enumerate(steps))
    if any(a >= b for a, b in zip(marks, marks[1:], strict=False)):
        raise ValueError(f"{name} must ascend, got {marks}")
    return marks


def _callables(name: str, values: Any) -> tuple[Function, ...]:
    parts = tuple(items(name, values, "callables of the step"))
    if not parts:
        raise ValueError(f"{name} is empty; give at least one")
    for i, part in enumerate(parts):
        if not is_function(part):
            number = isinstance(part, (int, float))
            advice = f"; for a number there is constant({part!r})" if number else ""
            raise TypeError(
                f"{name}[{i}] must be a callable of the step, got {named(part)}{advice}"
            )
    return parts
