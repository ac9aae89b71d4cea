"""Checks the arguments that a rule's functions take."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from fastopt.language import Function

# These match a name, or its end, as in adamw_lr.
_AT_LEAST_ZERO = re.compile(r"(.*_)?(lr|eps|weight_decay|momentum)")
_BELOW_ONE = re.compile(r"(.*_)?beta\d*")
# What an optimizer's own attributes and arguments are called.
_RESERVED = {"params", "backend", "threads", "rule", "groups", "state", "steps", "step"}
_RESERVED |= {"state_dict", "load_state_dict", "add_group", "accumulate", "estimate"}
_RESERVED |= {"accumulated", "ema", "ema_params", "eval_params", "frozen", "grad_norm"}
_RESERVED |= {"skipped", "weight_decay_mask", "formats", "copy_to", "seed", "memory"}
_RESERVED |= {"save", "load"}


@cache
def limits(key: str) -> tuple[float, float]:
    """Return the least value of a hyperparameter of this name, and its upper bound,
    which is not allowed itself."""
    if _BELOW_ONE.fullmatch(key):
        return 0.0, 1.0
    return (0.0 if _AT_LEAST_ZERO.fullmatch(key) else -math.inf), math.inf


def state_names(state: Any) -> tuple[str, ...]:
    """Return the names of a rule's state buffers, which are given as a tuple."""
    if isinstance(state, str):
        raise TypeError(
            f"state must be a tuple with the name of each buffer, got the string "
            f"{state!r}; write state=({state!r},)"
        )
    if not isinstance(state, Sequence) or not all(isinstance(n, str) for n in state):
        raise TypeError(
            f"state must be a tuple with the name of each buffer, such as "
            f"('m', 'v'), got {state!r}"
        )
    if len(set(state)) < len(state):
        raise ValueError(f"state must name each buffer once, got {tuple(state)!r}")
    return tuple(state)


def check_scalars(name: str, scalars: Function, carry: Mapping[str, Any]) -> None:
    """Check the arguments of a rule's ``scalars``: t, what is carried, and
    hyperparameters."""
    of, parameters = f"scalars of {name!r}", list(_parameters(scalars))
    _check_first(of, parameters, "scalars(t, lr=0.1)")
    if limits(parameters[0].name) != (-math.inf, math.inf):
        first = parameters[0].name
        raise TypeError(
            f"{of} must take t, the number of the step, before the hyperparameters, "
            f"but takes {first} first, which would get this number; write "
            f"scalars(t, {first}=...)"
        )
    parameters = parameters[1:]
    carried = [parameter.name for parameter in parameters[: len(carry)]]
    if carried != list(carry):
        raise TypeError(
            f"{of} must take the carry after t, {', '.join(carry)}, but takes "
            f"{', '.join(carried)}"
        )
    for parameter in parameters[: len(carry)]:
        _check_kind(of, "the carry", parameter)
        if parameter.default is not parameter.empty:
            raise TypeError(
                f"{of} must take the carry without defaults, but {parameter.name} has "
                f"the default {parameter.default!r}; give the first value in carry="
            )
    for parameter in parameters[len(carry) :]:
        key = parameter.name
        _check_kind(of, "its hyperparameters", parameter)
        if parameter.default is parameter.empty:
            raise TypeError(
                f"{of} must give every hyperparameter a default; {key} has none"
            )
        if key in _RESERVED or key.startswith("_"):
            raise TypeError(
                f"a hyperparameter of {name!r} may not be named {key!r}, "
                f"which means something else to an optimizer"
            )


def check_settle(name: str, settle: Function) -> None:
    """Check the arguments of a rule's ``settle``: t, n, sums, and results of
    ``scalars``."""
    of, parameters = f"settle of {name!r}", list(_parameters(settle))
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{of} must name its arguments one by one: those results of scalars "
                f"that it does not name go on to update"
            )
    _check_first(of, parameters, "settle(t, n, total, lr)")
    for parameter in parameters[1:]:
        _check_kind(of, "its arguments", parameter)
        if parameter.default is not parameter.empty:
            raise TypeError(
                f"{of} must take its arguments without defaults, because it always "
                f"gets them all; {parameter.name} has the default "
                f"{parameter.default!r}"
            )


def _check_first(
    of: str, parameters: Sequence[inspect.Parameter], example: str
) -> None:
    """Check that the first argument is one for ``t``."""
    wanted = "t, the number of the step, "
    if not parameters:
        raise TypeError(
            f"{of} must take {wanted}first, but takes no argument; write {example}"
        )
    first = parameters[0]
    if first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD):
        raise TypeError(
            f"{of} must name its arguments one by one, {wanted}first, but takes "
            f"*{first.name}; write {example}"
        )
    if first.kind is first.KEYWORD_ONLY:
        raise TypeError(
            f"{of} must take {wanted}first and by position, but takes {first.name} by "
            f"name only; remove the *, and write {example}"
        )
    if first.default is not first.empty:
        raise TypeError(
            f"{of} must take {wanted}first and without a default, but takes "
            f"{first.name}={first.default!r} first, which would get this number; "
            f"write {example}"
        )


def _check_kind(of: str, what: str, parameter: inspect.Parameter) -> None:
    """Check that an argument is one alone, and given by position."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise TypeError(
            f"{of} must name {what} one by one, but takes *{parameter.name}"
        )
    if parameter.kind is parameter.KEYWORD_ONLY:
        raise TypeError(
            f"{of} must take {what} by position, but takes {parameter.name} by name "
            f"only; remove the *"
        )


def _parameters(function: Function) -> Sequence[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def check_named(name: str, element: Function) -> None:
    """Check that a function of elements takes arguments by position, one by one."""
    for parameter in _parameters(element):
        _check_kind(f"{element.__name__} of {name!r}", "its arguments", parameter)
