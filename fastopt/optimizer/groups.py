"""The hyperparameters of one group of parameters, checked at every assignment."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from fastopt.advice import hint
from fastopt.optimizer.refusals import check_names, where_option
from fastopt.rule import Hyperparameter, Rule, check_hyperparameter, limits, shown
from fastopt.runtime.atomic import Call
from fastopt.trial import check_numbers, note_scalars

Values: TypeAlias = tuple[Any, ...]  # of hyperparameters, as scalars takes them


def check_schedule(name: str, value: Any) -> None:
    """Check that a schedule can be called with one argument. The check reads its
    signature only, so that errors inside the schedule are raised unchanged."""
    if not callable(value) or isinstance(value, (type, Rule)):
        return
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind(0)
    except TypeError as error:
        raise TypeError(
            f"{name} must be a number, or a schedule: a function of the number of "
            f"completed steps, but {value!r} cannot be called with one argument"
        ) from error


class Group(MutableMapping[str, Any]):
    """Like a dict with the rule's hyperparameters as its fixed keys.

    A value may be a schedule: a callable of the number of completed steps.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> groups = [{"params": np.ones(3)}, {"params": np.ones(2), "lr": 0.5}]
    >>> opt = fastopt.sgd(groups, lr=0.1)
    >>> opt.groups[1]["lr"], opt.groups[1]["momentum"]
    (0.5, 0.0)
    >>> opt.groups[0]["lr"] = 0.2
    >>> opt.groups[1].frozen = True
    """

    def __init__(
        self,
        rule: Rule,
        prefix: str,
        number: int,
        assign: Callable[..., None],
        dtype: np.dtype[Any],
        frozen: Any = False,
    ):
        self.number = number
        self._dtype, self._most = dtype, float(np.finfo(dtype).max)
        self._rule = rule
        self._prefix = prefix  # how messages name this group: 'groups[1]' or ''
        # This is a method of the optimizer, because an assignment may need new state. A
        # strong reference would form a cycle, and keep the arrays in memory until the
        # garbage collector runs.
        self._assigning = weakref.WeakMethod(assign)
        self._frozen = self._flag(frozen)
        self._scheduled: tuple[str, ...] = ()
        self._values: Mapping[str, Any] = dict(rule.hyperparameters)
        self._following: list[str] = []  # hyperparameters, what others are

    if not TYPE_CHECKING:  # a type checker would believe that there is every name

        def __setattr__(self, name, value):
            new = name == "number" and name not in vars(self)
            if name.startswith("_") or new or name in ("frozen", "schedules"):
                super().__setattr__(name, value)
                return
            raise self._no_attribute(name, f" = {shown(value)}")

        def __getattr__(self, name):
            if name.startswith("_"):  # programs look for such names
                raise AttributeError(f"'Group' object has no attribute {name!r}")
            raise self._no_attribute(name)

    def _no_attribute(self, name: str, assigned: str = "") -> AttributeError:
        rule, here = self._rule, f"opt.groups[{vars(self).get('number', '...')}]"
        more = where_option(rule, name) or hint(name, rule.hyperparameters)
        if name in rule.hyperparameters:
            more = f', but an item; write {here}["{name}"]{assigned}'
        return AttributeError(f"{here} has no attribute {name!r}{more}")

    def _assign(self, changes: Mapping[str, Any], frozen: bool | None = None) -> None:
        if (assign := self._assigning()) is None:
            raise ReferenceError(
                "the optimizer of this group no longer exists; keep a reference to the "
                "optimizer as long as its groups are changed"
            )
        assign(self.number, changes, frozen)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a group belongs to its optimizer, and cannot be copied or pickled; "
            "dict(group) has its hyperparameters"
        )

    @property
    def frozen(self) -> bool:
        """Whether steps leave this group alone, as if its gradients were None."""
        return self._frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self._assign({}, self._flag(value))

    def _flag(self, value: Any) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            name = self._name("frozen")
            raise TypeError(f"{name} must be True or False, got {value!r}")
        return bool(value)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The names of those that are schedules."""
        return self._scheduled

    def at(self, steps: int, values: Mapping[str, Any] | None = None) -> Values:
        """Return what holds when ``steps`` steps are completed, of our values or of
        these, in the order in which ``scalars`` takes them."""
        if values is None:
            values, scheduled = self._values, self._scheduled
        else:
            scheduled = tuple(key for key in values if callable(values[key]))
        return tuple(self._checked(values, steps, scheduled).values())

    def begin(self, given: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Return the first values: those given, and the defaults that follow them."""
        self._following = [n for n in self._rule.follows if given.get(n) is None]
        self._check_names(given, making=True)
        for key, value in given.items():  # complete may call it
            check_schedule(self._name(key), value)
        return self.checked(self._rule.complete(given), steps)

    def checked(self, changes: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """Return our values with these changes, if valid after ``steps`` steps."""
        self._check_names(changes)
        for key, value in changes.items():
            check_schedule(self._name(key), value)
        values = {**self._values, **changes}
        now = self._checked(values, steps, values)
        for key in self._following:
            if key not in changes:
                values[key] = now[key] = max(now[key], now[self._rule.follows[key]])
        # A rule's own conditions, such as nesterov's, stand in its scalars.
        carry = self._rule.first_carry(now)
        try:
            results = self._rule.scalars(steps + 1, *carry, *now.values())
        except ArithmeticError as error:
            note_scalars(self._rule, error)
            raise
        check_numbers(self._rule, "scalars", results, self._dtype)
        return {k: v if callable(v) else now[k] for k, v in values.items()}

    def _check_names(self, names: Iterable[str], making: bool = False) -> None:
        if "frozen" in names:
            raise TypeError(
                "frozen is no hyperparameter but an attribute of a group; set "
                f"opt.groups[{self.number}].frozen"
            )
        prefix = f"{self._prefix}: " if self._prefix else ""
        check_names(self._rule, names, prefix, making)

    def committing(
        self,
        values: Mapping[str, Any],
        frozen: bool | None = None,
        prefix: str | None = None,
    ) -> Call:
        """Return the call that takes over what :meth:`checked` returned, whether steps
        leave this group alone, and what messages call it from now on."""
        return partial(
            vars(self).update,
            _values=values,
            _scheduled=tuple(key for key in values if callable(values[key])),
            _frozen=self._frozen if frozen is None else self._flag(frozen),
            _prefix=self._prefix if prefix is None else prefix,
        )

    def update(self, *args: Any, **changes: Any) -> None:
        """Change several at once: all or, with an error, none."""
        self._assign(dict(*args, **changes))

    def _checked(
        self, values: Mapping[str, Any], steps: int, keys: Iterable[str]
    ) -> dict[str, Hyperparameter]:
        """Return the values. Those under ``keys`` are checked, and schedules asked."""
        checked, most = dict(values), self._most
        for key in keys:
            value = values[key]
            if isinstance(value, (type, Rule)):  # which can be called, for objects
                raise TypeError(
                    f"{self._name(key)} must be a number, or a schedule: a function of "
                    f"the number of completed steps, got {value!r}"
                )
            if is_schedule := callable(value):
                value = value(steps)
            default, (least, below) = self._rule.hyperparameters[key], limits(key)
            usual = type(value) is float is type(default)
            if usual and least <= value < below and -most <= value <= most:
                checked[key] = value  # as in each step with a schedule
                continue
            name = self._name(key) + (f"({steps})" if is_schedule else "")
            checked[key] = number = check_hyperparameter(key, name, value, default)
            if abs(number) > most:
                raise ValueError(f"{name} is {number!r}, too large for {self._dtype}")
        return checked

    def _name(self, key: str) -> str:
        return f'{self._prefix}["{key}"]' if self._prefix else key

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._assign({key: value})

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{self._name(key)} can be changed but not removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)
