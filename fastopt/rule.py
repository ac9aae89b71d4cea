"""The contract of an optimizer: what happens to one element, and what happens once.

An optimizer here is a pair of pure functions. ``update`` says what a step does to one
parameter, in scalar arithmetic; ``scalars`` turns the hyperparameters into the few
constants that ``update`` needs, once per step, on the host, in float64. Every backend
compiles the same ``update``; nothing else in the package knows a formula.

>>> import numpy as np
>>> from fastopt.rule import Rule, sign
>>> def scalars(t, lr=1e-3):
...     return (lr,)
>>> def update(p, g, lr):
...     return (p - lr * sign(g),)
>>> sign_sgd = Rule(update, scalars, name="sign_sgd")
>>> w = np.zeros(2)
>>> sign_sgd(w, lr=0.5, backend="numpy").step(np.array([3.0, -2.0]))
>>> w
array([-0.5,  0.5])
"""

from __future__ import annotations

import inspect
import math
import reprlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeAlias

import numpy as np

from fastopt import advice, composed, docstrings
from fastopt.language import Function, constants, reached
from fastopt.language import Word as Word
from fastopt.language import bits as bits
from fastopt.language import cbrt as cbrt
from fastopt.language import copysign as copysign
from fastopt.language import is_double as is_double
from fastopt.language import maximum as maximum
from fastopt.language import minimum as minimum
from fastopt.language import real as real
from fastopt.language import sign as sign
from fastopt.language import sqrt as sqrt
from fastopt.language import where as where
from fastopt.language import wide as wide
from fastopt.language import word as word
from fastopt.portable import log as log
from fastopt.portable import power as power
from fastopt.runtime.exclusive import computed_once
from fastopt.signatures import (
    check_named,
    check_scalars,
    check_settle,
    state_names,
)
from fastopt.signatures import limits as limits
from fastopt.statements import (
    body_of,
    check_calls,
    check_no_loop,
    check_no_statement,
    uses_words,
)
from fastopt.trial import tried

if TYPE_CHECKING:
    from fastopt.optimizer.optimizer import Optimizer

__all__ = [
    "Rule",
    "Word",
    "bits",
    "cbrt",
    "copysign",
    "is_double",
    "log",
    "maximum",
    "minimum",
    "power",
    "real",
    "sign",
    "sqrt",
    "where",
    "wide",
    "word",
]

Hyperparameter: TypeAlias = float | int | bool


class Shown(reprlib.Repr):
    """Shortens values for messages. A value may be large, deep or refer to itself."""

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of more than 4300 digits.
        if abs(x) < 10**100:
            return super().repr_int(x, level)
        return f"an integer of {x.bit_length()} bits"


_shown = Shown()
_shown.maxstring = _shown.maxother = 200
shown = _shown.repr


def check_hyperparameter(
    key: str, name: str, value: Any, default: Any
) -> Hyperparameter:
    """Return ``value`` as a plain Python number, or raise an error that says why not.
    ``name`` is what the message calls ``key``. ``default`` is the rule's own and tells
    whether a flag or a number is wanted. Rules check what is special to them (nesterov
    needs momentum) in ``scalars``."""
    given = value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a number of NumPy's, JAX's or torch's
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {shown(given)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(given)}")
    number = float(value) if abs(value) <= sys.float_info.max else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    least, below = limits(key)
    if not least <= number < below:
        wanted = "at least 0" if below == math.inf else "in [0, 1)"
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    return number


@dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer: ``update`` for one element, ``scalars`` for one step.

    Parameters
    ----------
    update
        ``update(p, g, *state, *scalars) -> (p, *state)``: the new value of one element.
        Only + - * /, comparisons, ``abs`` and the primitives of this module; no number,
        not even 1: these come from ``scalars``. ``bits(x)`` is a :class:`Word`.
    scalars
        ``scalars(t, *hyperparameters) -> tuple of floats``, where ``t`` is 1 at the
        first step. Its signature is the list of hyperparameters and their defaults; it
        is called with all of them, by position. By name, ``lr``, ``eps``,
        ``weight_decay`` and ``momentum`` must be at least 0 and ``beta``, ``beta1`` ...
        in [0, 1), and so must what ends in such a name, as ``adamw_lr`` does. The
        results are rounded once to the parameters' dtype.
    state
        The names of the state buffers, in the order ``update`` takes them. They start
        at zero.
    starts
        Where they do not: name -> ``"p"`` (a copy of the parameter), the name of a
        hyperparameter, or a number. Read when the optimizer is made, and at its first
        step again, because parameters may have got their values in between.
    carry
        Numbers that a rule remembers from step to step on the host, in float64: name ->
        its first value, a number or the name of a hyperparameter. ``scalars`` takes
        them after ``t``, without defaults, and returns the new ones at the end.
    measure, settle, over
        For a rule with norms. ``measure(p, g, *state, *scalars) -> terms``, written
        like ``update``, is summed in float64 over each array (``over="segment"``) or
        over all (``"all"``), in an order that does not depend on backend or threads,
        before a parameter moves. Then ``settle(t, n, *sums, *last results of
        scalars)``, with ``n`` elements, returns what ``update`` takes after the other
        results, and the new carry. A rule over segments has a carry for each array, any
        other one for each group. See also :meth:`in_passes`.
    factored
        Arrays of two and more dimensions keep of the one state buffer, an average of
        the squares of the gradients, only the means over its rows and its columns (the
        last two dimensions). In place of the buffer, ``update`` and ``measure`` get
        what these make, up to date. ``scalars`` must begin with the weight of the new
        square, which is then 0, the least that may be made, and the least mean of the
        rows to divide by. For rules that measure segments.
    evaluate
        ``evaluate(p, *state, *scalars) -> p``: the parameters that are to be used,
        where these are not those that the gradients are taken at.
    estimate
        ``(name, rule)``: what ``Optimizer.estimate`` does to that state buffer, for
        which the rule's ``p`` stands, with a gradient of another kind. It has the same
        hyperparameters.
    variants
        For options that change the state: hyperparameters that are on (not zero) -> the
        Rule that then applies, with as many of the leading scalars as it needs. With
        the option off it must do what this rule does: groups may share one kernel.
    follows
        Hyperparameters that are, if not given, what another one is at first, and never
        less than what is assigned to that one later: name -> the other's.
    name
        For messages and saved states; by default that of ``update`` or its module.

    Raises
    ------
    TypeError, ValueError
        For functions that do not fit this contract.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> def scalars(t, lr=0.1, momentum=0.9):
    ...     return lr, momentum
    >>> def update(p, g, m, lr, mu):
    ...     m = mu * m + g
    ...     return p - lr * m, m
    >>> heavy_ball = fastopt.Rule(update, scalars, state=("m",), name="heavy_ball")
    >>> w = np.ones(3)
    >>> heavy_ball(w, lr=0.5, backend="numpy").step(np.ones(3))
    >>> w
    array([0.5, 0.5, 0.5])
    """

    # What a call makes. The module of optimizers sets it, so this one needs no import.
    optimizer: ClassVar[type[Optimizer]]

    update: Function
    scalars: Function
    _: KW_ONLY  # setup.py reads the rules as text, and looks for state=
    state: tuple[str, ...] = ()
    starts: Mapping[str, str | float] = field(default_factory=dict)
    carry: Mapping[str, str | float] = field(default_factory=dict)
    measure: Function | None = None
    settle: Function | None = None
    apply: Function | None = None  # the last pass, of a rule in passes
    over: str = "segment"
    factored: bool = False
    evaluate: Function | None = None
    estimate: tuple[str, Rule] | None = None
    variants: Mapping[tuple[str, ...], Rule] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if (self.measure is None) != (self.settle is None):
            raise TypeError("measure and settle belong together: give both or neither")
        if self.over not in ("segment", "all"):
            raise ValueError(f"over must be 'segment' or 'all', got {self.over!r}")
        if self.factored and not (self.by_segment and len(self.state) == 1):
            raise TypeError("a factored rule needs measure over segments and one state")
        optional = ("measure", "settle", "evaluate")
        given = [what for what in optional if getattr(self, what) is not None]
        for what in ("update", "scalars", *given):
            if not isinstance(getattr(self, what), types.FunctionType):
                raise TypeError(
                    f"{what} must be a plain Python function, "
                    f"got {getattr(self, what)!r}"
                )
        object.__setattr__(self, "state", state_names(self.state))
        if not self.name:
            name = self.update.__name__
            module = (self.update.__module__ or "__main__").rpartition(".")[2]
            if name == "update" and module != "__main__":
                name = module
            object.__setattr__(self, "name", name)
        check_scalars(self.name, self.scalars, self.carry)
        self._check_starts()
        for element in (self.update, self.measure, self.evaluate):
            if element is not None:
                self._check_element(element)
        if self.settle is not None:
            check_settle(self.name, self.settle)
        if self.estimate is not None:
            self._check_estimate(*self.estimate)

    @classmethod
    def in_passes(
        cls,
        direction: Function,
        measure: Function,
        apply: Function,
        scalars: Function,
        settle: Function,
        **more: Any,
    ) -> Rule:
        """A rule that moves each parameter along a direction, by as much as norms say.

        Backends may compute the direction once for both the norms and the step, and
        write the state meanwhile.

        Parameters
        ----------
        direction
            ``direction(p, g, *state, *scalars) -> (u, *state)``. It takes the results
            of ``scalars`` that ``settle`` does not take.
        measure
            ``measure(p, u) -> terms``, of which ``settle`` gets the sums.
        apply
            ``apply(p, u, *what settle returns) -> (p,)``.
        scalars, settle, more
            As for :class:`Rule`. Its ``update`` and ``measure`` are made of the others.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> def scalars(t, lr=0.5, momentum=0.9):
        ...     return momentum, lr
        >>> def direction(p, g, m, mu):
        ...     m = mu * m + g
        ...     return m, m
        >>> def measure(p, u):
        ...     return (u * u,)
        >>> def settle(t, n, uu, lr):
        ...     return (lr / uu**0.5 if uu > 0 else 0.0,)
        >>> def apply(p, u, lr):
        ...     return (p - lr * u,)
        >>> normalised = fastopt.Rule.in_passes(
        ...     direction, measure, apply, scalars, settle, state=("m",), name="sgdn"
        ... )
        >>> w = np.zeros(4)
        >>> normalised(w, backend="numpy").step(np.ones(4))
        >>> w
        array([-0.25, -0.25, -0.25, -0.25])
        """
        states = len(state_names(more.get("state", ())))
        update, whole = composed.functions(direction, measure, apply, states)
        more = {"measure": whole, "settle": settle, "apply": apply, **more}
        return cls(update, scalars, **more)

    def _check_estimate(self, buffer: str, rule: Rule) -> None:
        if buffer not in self.state:
            raise ValueError(f"estimate of {self.name!r}: {buffer!r} is not in state")
        if list(rule.hyperparameters) != list(self.hyperparameters):
            raise TypeError(
                f"estimate of {self.name!r} must take the same hyperparameters, "
                f"{', '.join(self.hyperparameters)}, in the same order, but takes "
                f"{', '.join(rule.hyperparameters)}"
            )

    def _check_starts(self) -> None:
        for name in self.starts:
            if name not in self.state:
                raise ValueError(f"starts of {self.name!r}: {name!r} is not in state")
        for start in (*self.starts.values(), *self.carry.values()):
            if isinstance(start, str) and start not in ("p", *self.hyperparameters):
                raise ValueError(
                    f"{self.name!r} starts at {start!r}, which is not a hyperparameter"
                )

    def _check_element(self, element: Function) -> None:
        """Check an element function's signature and literals."""
        check_named(self.name, element)
        code = element.__code__
        taken = (1 if element is self.evaluate else 2) + len(self.state)
        if code.co_argcount < taken:
            raise TypeError(
                f"{element.__name__} of {self.name!r} must take (p, "
                f"{'' if element is self.evaluate else 'g, '}*state, *scalars), which "
                f"is at least {taken} arguments here; it takes {code.co_argcount}"
            )
        for function in reached(element, []):
            body = body_of(function)
            check_no_loop(self.name, function, body)
            check_no_statement(self.name, function, body)
            for constant in constants(function):
                if isinstance(constant, types.CodeType):
                    raise ValueError(
                        f"{function.__name__} of {self.name!r} defines a function "
                        f"inside; define it outside"
                    )
                if isinstance(constant, (int, float, complex)):
                    named = f", or name it outside: NAME = word({constant!r}) is a word"
                    words = isinstance(constant, int) and uses_words(function)
                    raise ValueError(
                        f"{function.__name__} of {self.name!r} contains the number "
                        f"{constant!r}, which some backends would compute in float64; "
                        f"return it from scalars, and take it as an argument of "
                        f"{element.__name__}{named if words else ''}"
                    )
            check_calls(self.name, function, body)

    @property
    def by_segment(self) -> bool:
        """Whether sums, and so scalars, are taken for each array by itself."""
        return self.measure is not None and self.over == "segment"

    @computed_once
    def hyperparameters(self) -> dict[str, Any]:
        """Names and defaults, from the signature of ``scalars``."""
        parameters = list(inspect.signature(self.scalars).parameters.items())
        return {name: p.default for name, p in parameters[1 + len(self.carry) :]}

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values, and those that follow from them."""
        values = dict(given)
        for name, other in self.follows.items():
            if values.get(name) is None and values.get(other) is not None:
                first = values[other]
                if callable(first) and not isinstance(first, (type, Rule)):
                    schedule, first = first, first(0)
                    if not 0 < first >= schedule(1):
                        raise ValueError(
                            f"{name} must be the largest {other}, but {schedule!r} "
                            f"does not begin with its largest value; give {name}, too"
                        )
                elif first == 0:
                    raise ValueError(f"{other} is 0 at first; give {name}, too")
                values[name] = first
        return values

    def check_names(self, names: Iterable[str], where: str = "") -> None:
        """Check that the rule has hyperparameters of these names."""
        for name in names:
            if name not in self.hyperparameters:
                raise TypeError(
                    f"{where}{self.name} has no hyperparameter {name!r}; it has "
                    f"{', '.join(self.hyperparameters) or 'none'}"
                    f"{advice.hint(name, self.hyperparameters)}"
                )

    def checked(
        self, values: Mapping[str, Any], called: Callable[[str], str] = str
    ) -> dict[str, Hyperparameter]:
        """Check hyperparameters, each one and all of them together in a first step.
        Return numbers, the defaults among them, in the order of ``scalars``."""
        numbers = {
            key: check_hyperparameter(
                key, called(key), values.get(key, default), default
            )
            for key, default in self.hyperparameters.items()
        }
        self.scalars(1, *self.first_carry(numbers), *numbers.values())
        return numbers

    @computed_once
    def switches(self) -> frozenset[str]:
        """The hyperparameters that select a variant."""
        return frozenset(name for names in self.variants for name in names)

    @property
    def all(self) -> tuple[Rule, ...]:
        """Return this rule and those that come with it: all that need a kernel."""
        estimate = (self.estimate[1],) if self.estimate else ()
        return (self, *self.variants.values(), *estimate)

    @property
    def scalar_count(self) -> int:
        """How many scalars ``update`` takes."""
        return self.update.__code__.co_argcount - 2 - len(self.state)

    @property
    def measure_count(self) -> int:
        """How many scalars ``measure`` takes."""
        if self.measure is None:
            return 0
        return self.measure.__code__.co_argcount - 2 - len(self.state)

    @computed_once
    def settle_count(self) -> int:
        """How many results of ``scalars`` ``settle`` takes."""
        if self.settle is None:
            return 0
        return self.settle.__code__.co_argcount - 2 - self.terms

    @computed_once
    def terms(self) -> int:
        """How many values ``measure`` returns."""
        if self.measure is None:
            return 0
        buffers = [np.ones(1, np.float32) for _ in range(2 + len(self.state))]
        ones = [np.float32(1)] * self.measure_count
        return len(tried(self, self.measure, *buffers, *ones))

    def start(self, of: str | float, values: Mapping[str, Any]) -> float:
        """A number that something starts at, under these hyperparameters."""
        return float(values[of] if isinstance(of, str) else of)

    def first_carry(self, values: Mapping[str, Any]) -> tuple[float, ...]:
        """Return what ``scalars`` takes at the first step, after ``t``."""
        return tuple(self.start(of, values) for of in self.carry.values())

    def variant(self, on: Set[str]) -> Rule:
        """The rule that applies with these switches on: this or one of its variants."""
        if not on:
            return self
        for names, rule in self.variants.items():
            if set(names) == on:
                ours = rule.scalars is self.scalars
                if ours:
                    return rule
                return replace(rule, scalars=self.scalars, carry=self.carry)
        raise ValueError(
            f"{self.name} has no variant for {' with '.join(sorted(on))}; its variants "
            f"are for {', '.join(' with '.join(names) for names in self.variants)}"
        )

    def __call__(
        self,
        params: Any,
        *unnamed: NoReturn,
        **options: Any,
    ) -> Optimizer:
        """Return an :class:`~fastopt.Optimizer` that applies this rule to ``params``.

        The options are those of :class:`~fastopt.Optimizer`.
        """
        if unnamed:
            key = next(iter(self.hyperparameters), "backend")
            raise TypeError(
                f"{self.name} takes hyperparameters and options by name, as in "
                f"{self.name}(params, {key}=...), but got {shown(unnamed[0])} after "
                f"params"
            )
        return self.optimizer(self, params, **options)

    def __repr__(self) -> str:
        given = ", ".join(f"{k}={v!r}" for k, v in self.hyperparameters.items())
        return f"<rule {self.name}({given})>"


advice.suggest_arguments(Rule)
# What help(fastopt.adamw) shows is about that rule.
Rule.__doc__ = docstrings.Described(Rule.__doc__, docstrings.of_rule)  # type: ignore[assignment]
