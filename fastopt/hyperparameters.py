"""The hyperparameters of one group of parameters, checked at every assignment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from fastopt.rule import Hyperparameter, Rule, check_hyperparameter


class Group(MutableMapping[str, Any]):
    """Like a dict with the rule's hyperparameters as its fixed keys.

    A value may be a schedule: a callable of the number of completed steps.
    """

    def __init__(
        self, rule: Rule, prefix: str, assign: Callable[[Group, str, Any], None]
    ):
        self._rule = rule
        self._prefix = prefix  # how messages name this group: 'groups[1]' or ''
        self._assign = assign  # the optimizer's: an assignment may need new state
        self._values: dict[str, Any] = dict(rule.hyperparameters)
        self._scheduled: tuple[str, ...] = ()

    def at(self, steps: int) -> dict[str, Hyperparameter]:
        """The values that hold when ``steps`` steps are completed."""
        if not self._scheduled:
            return self._values
        return self._checked(self._values, steps, self._scheduled)

    def change(self, changes: Mapping[str, Any], steps: int) -> None:
        """Make all of the changes or, with an error, none."""
        for key in changes:
            if key not in self._values:
                raise TypeError(
                    f"{self._rule.name} has no hyperparameter {self._name(key)!r}; "
                    f"it has {', '.join(self._values)}"
                )
        values = {**self._values, **changes}
        now = self._checked(values, steps, values)
        # A rule's own conditions, such as nesterov's, stand in its scalars.
        self._rule.scalars(steps + 1, **now)
        self._values = {k: v if callable(v) else now[k] for k, v in values.items()}
        self._scheduled = tuple(k for k, v in values.items() if callable(v))

    def _checked(
        self, values: Mapping[str, Any], steps: int, keys: Iterable[str]
    ) -> dict[str, Hyperparameter]:
        """The values, of which those under ``keys`` are checked and schedules asked."""
        checked = dict(values)
        for key in keys:
            value, name = values[key], self._name(key)
            if callable(value):
                value, name = value(steps), f"{name}({steps})"
            default = self._rule.hyperparameters[key]
            checked[key] = check_hyperparameter(key, name, value, default)
        return checked

    def _name(self, key: str) -> str:
        return f'{self._prefix}["{key}"]' if self._prefix else key

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._assign(self, key, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{self._name(key)} can be changed but not removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)
