"""Schedules: a hyperparameter as a function of the number of completed steps.

>>> import numpy as np, fastopt
>>> lr = fastopt.schedules.warmup_cosine(0.1, steps=100, warmup=10)
>>> lr(5), lr(10), lr(100)
(0.05, 0.1, 0.0)
>>> lr(np.arange(3)).round(3)
array([0.  , 0.01, 0.02])
>>> opt = fastopt.sgd(np.ones(3), lr=lr, momentum=0.9)    # or any hyperparameter

Each schedule is a closed form of the step and remembers nothing, so a run that resumes
at any step continues with the same bits. Before step 0 a schedule has its value at step
0, and after its end it keeps its last value. Where a docstring names the schedule of
another package, both compute the same at every step from 0 on, except for what the
docstring says. At step -1 optax' cosine and its milestones at 0 give another number,
and transformers' warm-ups a negative one.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from fastopt import advice
from fastopt.memory.segments import Array
from fastopt.optimizer.checks import check_choice, check_count, check_positive
from fastopt.optimizer.refusals import is_function, items, named
from fastopt.portable import cospi, power
from fastopt.rule import check_hyperparameter

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "exponential",
    "inverse_power",
    "inverse_sqrt",
    "join",
    "linear",
    "multistep",
    "onecycle",
    "polynomial",
    "product",
    "step",
    "warmup_cosine",
    "wsd",
]

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
    """The base of all schedules, which are immutable, picklable, and equal if their
    arguments are.

    A subclass has its arguments as fields and its formula in ``at``. Numbers must be
    finite; counts of steps must be integers.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from fastopt.schedules import Schedule
    >>> @dataclass(frozen=True)
    ... class halving(Schedule):
    ...     lr: float
    ...     def at(self, t):
    ...         return self.lr / 2**t
    >>> halving(1.0)(3)
    0.125
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
        """Return the value after ``t`` completed steps; ``t`` is 0 for the first step.

        ``t`` may be a number, whole or not, or an array. An array gives a float64 array
        of the same shape, whose elements have the same bits as single calls (it takes
        as long as a loop). Inside ``jax.jit``, ``t`` may be traced: a callback to
        Python computes the same value, rounded to float32 unless x64 is on.
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
    """Return how much half a cosine has left: from 1 at 0 to 0 at 1."""
    return 0.5 * (1 + cospi(x))


# Falling by powers ------------------------------------------------------------------


@dataclass(frozen=True)
class constant(Schedule):
    """Always ``lr``, for instance as a part of :class:`join` or :class:`product`.

    >>> constant(0.5)(np.arange(3))
    array([0.5, 0.5, 0.5])
    """

    lr: float

    def at(self, t: float) -> float:
        return self.lr


@dataclass(frozen=True)
class step(Schedule):
    """``lr * gamma**(t // step_size)``, which jumps every ``step_size`` steps, as
    torch's StepLR does.

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
    """``lr`` times ``gamma`` for each of the ``milestones`` that ``t`` has reached. It
    is the same as torch's MultiStepLR and optax' piecewise_constant_schedule, but a
    milestone at 0 applies from the first step on; torch ignores it.

    >>> multistep(1.0, milestones=(10, 15))(np.array([9, 10, 15]))
    array([1.  , 0.1 , 0.01])
    """

    lr: float
    milestones: Sequence[int]
    gamma: float = 0.1

    def at(self, t: float) -> float:
        return self.lr * power(self.gamma, bisect_right(self.milestones, t))


def _grown(value: float, gamma: float, times: float) -> float:
    """``value * gamma**times``, infinite where that is too large for a float."""
    return value * power(gamma, times) if value else 0.0


@dataclass(frozen=True)
class exponential(Schedule):
    """``lr * gamma**((t - begin) / steps)``; ``staircase`` rounds the exponent down.
    It is ``lr`` until ``begin``, and never goes beyond ``end``. It is the same as
    torch's ExponentialLR, and optax' exponential_decay, which calls gamma decay_rate.

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
    """``lr / (1 + c * t**p)``. The defaults give ``lr / (1 + sqrt(t))``, the rate of
    the rule ``dynamic_gd`` (Zinkevich 2003); ``p=1`` gives Keras' InverseTimeDecay.

    >>> inverse_power(1.0)(np.array([0, 1, 4]))
    array([1.        , 0.5       , 0.33333333])
    """

    lr: float
    c: NonNegative = 1.0
    p: Positive = 0.5

    def at(self, t: float) -> float:
        return self.lr / (1 + self.c * power(t, self.p))


@dataclass(frozen=True)
class inverse_sqrt(Schedule):
    """Linear warmup to ``lr``, then ``lr * sqrt(timescale / (t - warmup +
    timescale))``. It is the same as transformers' get_inverse_sqrt_schedule, with the
    same default for ``timescale``: ``warmup``, or 10000 if there is no warmup.

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


# With an end ------------------------------------------------------------------------


@dataclass(frozen=True)
class polynomial(Schedule):
    """From ``lr`` to ``end`` in ``steps`` steps, as ``(1 - x)**power`` falls from 1 to
    0; it starts after ``begin``. It is the same as optax' polynomial_schedule, torch's
    PolynomialLR, and transformers' schedule, whose default for ``end`` is 1e-7.

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
        return _mix(self.end, self.lr, power(1 - x, self.power))


@dataclass(frozen=True)
class linear(Schedule):
    """From ``lr`` to ``end`` in ``steps`` equal steps, after ``begin``. It is the same
    as optax' linear_schedule; torch's LinearLR is ``linear(lr * start_factor,
    total_iters, lr * end_factor)``.

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
    """From ``lr`` to ``end`` in ``steps`` steps, along half a cosine to a ``power``.
    Loshchilov & Hutter 2017, arXiv:1608.03983. It is the same as optax'
    cosine_decay_schedule, where ``end`` is alpha times ``lr``. After the last step it
    stays at ``end``, as optax' does, because nobody wants a rate that rises after the
    end of a run; torch's CosineAnnealingLR and transformers' schedule rise again.

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
        return _mix(self.end, self.lr, power(_left(t / self.steps), self.power))


@dataclass(frozen=True)
class warmup_cosine(Schedule):
    """Linear from ``start`` to ``lr`` in ``warmup`` steps, then as :class:`cosine` in
    the rest of ``steps``, which counts both. It is the same as optax'
    warmup_cosine_decay_schedule, and up to its end as transformers'
    get_cosine_schedule_with_warmup, which then rises again.

    With ``start=0``, their default, the first step changes nothing; ``start=lr /
    warmup`` wastes no step.

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
        return _mix(self.end, self.lr, power(_left(x), self.power))


@dataclass(frozen=True)
class cosine_restarts(Schedule):
    """A repeated cosine from ``lr`` to ``end``: the first cycle takes ``steps`` steps,
    each later one ``mult`` times as many as the one before. Loshchilov & Hutter 2017,
    arXiv:1608.03983. It is the same as torch's CosineAnnealingWarmRestarts when that is
    stepped. If torch is given a step, it finds the cycle by a logarithm, and finds the
    wrong one where that rounds down (``mult=3`` at step 121 times the first cycle).
    transformers' hard restarts end at 0.

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

    torch's OneCycleLR is the same, but it fails if the way up has no step, and rises
    after the end; this schedule then starts at the top, and stays at the end. optax'
    cosine_onecycle_schedule reaches its end one step later, when no step can use it.

    For a momentum that goes from 0.95 to 0.85 and back in the same steps:
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
    ``steps_down`` (by default as many), repeatedly. Smith 2017, arXiv:1506.01186. It is
    the same as torch's CyclicLR with its modes: the height above ``lr`` stays the same
    in "triangular", halves with each cycle in "triangular2", and is multiplied by
    ``gamma**t`` in "exp_range".

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
            height *= power(0.5, cycle)
        elif self.mode == "exp_range":
            height = _grown(height, self.gamma, t)
        return _mix(self.lr, self.max_lr, height)


@dataclass(frozen=True)
class wsd(Schedule):
    """Warmup, stable, decay: linear from ``start`` to ``lr`` in ``warmup`` steps, then
    ``lr``, and in the last ``decay`` of ``steps`` steps down to ``end``, by the
    ``shape`` "cosine", "linear" or "1-sqrt". Hu et al. 2024, arXiv:2404.06395; a fifth
    to a tenth of the run is a usual decay (Hägele et al. 2024, arXiv:2405.18392).

    It is the same as transformers' get_wsd_schedule with its linear warmup, where
    ``start`` and ``end`` are both min_lr_ratio times ``lr``.

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


# Of other schedules -----------------------------------------------------------------


@dataclass(frozen=True)
class join(Schedule):
    """One schedule after another; each starts at its step 0 at its boundary. It is the
    same as optax' join_schedules and torch's SequentialLR. The schedules may be any
    callables of the step.

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
    """The product of schedules, for instance of a warmup from 0 to 1 and another one.
    It is the same as torch's ChainedScheduler of factors. The schedules may be any
    callables of the step.

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
            more = f"; for a number there is constant({part!r})" if number else ""
            raise TypeError(
                f"{name}[{i}] must be a callable of the step, got {named(part)}{more}"
            )
    return parts


advice.suggest_arguments(*Schedule.__subclasses__())

if not TYPE_CHECKING:  # a type checker would believe that there is every name
    __getattr__ = advice.missing(__name__, __all__)
