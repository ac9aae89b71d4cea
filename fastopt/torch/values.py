"""Reads hyperparameters from an optimizer's groups, and refuses invalid ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastopt.rule import Rule, check_hyperparameter, shown
from fastopt.signatures import limits
from fastopt.torch import memory
from fastopt.torch.arguments import PAIRS, called, number, refuse_schedules

BIG = 2**53  # integers below it are floats, too
UNREAD = 1.0  # stands for a learning rate on a GPU, which the host does not read

# A function that returns the name of a hyperparameter, or of a tuple, in messages.
Called = Callable[[str], str]


class Reader(NamedTuple):
    """How to read a hyperparameter from a group, and what its usual values are."""

    name: str
    read: Callable[[Mapping[str, Any]], Any]
    least: float
    below: float
    flag: bool  # torch takes anything for True or False
    optional: bool  # whether it may be None


@functools.cache
def readers(rule: Rule) -> list[Reader]:
    """Return how to read each hyperparameter of a rule."""

    def reader(name: str, default: Any) -> Reader:
        pair, i = PAIRS.get(name, (None, 0))
        read = (lambda g: g[name]) if pair is None else (lambda g: g[pair][i])
        of_dtype = rule.factored and name == "eps1"  # None: the parameter's eps
        return Reader(name, read, *limits(name), isinstance(default, bool), of_dtype)

    return [reader(*item) for item in rule.hyperparameters.items()]


@functools.cache
def sizes(rule: Rule) -> list[tuple[str, int]]:
    """Return how many numbers each tuple of hyperparameters has."""
    found: dict[str, int] = {}
    for name in rule.hyperparameters:
        if name in PAIRS:
            pair, i = PAIRS[name]
            found[pair] = max(found.get(pair, 0), i + 1)
    return list(found.items())


def values_of(
    group: Mapping[str, Any], rule: Rule, groups: Sequence[Any], own: bool
) -> list[Any]:
    """Return a group's hyperparameters in the order of the rule's.

    What torch steps with is taken, such as a negative ``lr``: schedules round, and
    some end a little below 0.

    Parameters
    ----------
    group
        One of the ``groups`` of an optimizer, or a group that is to become one.
    rule
        That of the group.
    own
        Whether torch has no class of this rule. Then decay rates must be in [0, 1).

    Raises
    ------
    TypeError
        If one is not a number, or a tuple of numbers.
    ValueError
        If a tuple has another length, or if a step cannot be computed.
    """
    for pair, size in sizes(rule):
        value = group[pair]
        if type(value) is not tuple or len(value) != size:
            check_tuple(in_group(group, groups)(pair), value, size)
    values, unusual = [], False
    for name, read, least, below, flag, optional in readers(rule):
        value = read(group)
        if name == "lr" and device_lr(group) is not None:
            value = UNREAD
        kind = type(value)
        if kind is not float and not (kind is int and -BIG < value < BIG):
            if not flag and not (optional and value is None):
                check_number(in_group(group, groups)(name), value)
            value = number(value)
        if not flag and value is not None:
            unusual |= not least <= value < below
        values.append(value)
    if unusual:
        check_decays(rule, values, in_group(group, groups), own)
    return values


def device_lr(group: Mapping[str, Any]) -> Tensor | None:
    """Return a group's learning rate if it is to stay on a GPU."""
    lr = group.get("lr")
    if not isinstance(lr, Tensor) or not group.get("capturable"):
        return None
    return lr if memory.on_gpu(lr) else None


def in_group(group: Mapping[str, Any], groups: Sequence[Any]) -> Called:
    """Return what messages call the values of a group."""
    places = [i for i, there in enumerate(groups) if there is group]

    def name_of(name: str) -> str:
        if not places:
            return called(name)
        pair, i = PAIRS.get(name, (None, 0))
        where = f'param_groups[{places[0]}]["{pair or name}"]'
        return where if pair is None else f"{where}[{i}]"

    return name_of


def check_tuple(where: str, value: Any, size: int) -> None:
    """Check that there are so many values."""
    is_sequence = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    if isinstance(value, Tensor):
        is_sequence = value.dim() == 1
    if not is_sequence or isinstance(value, (str, bytes, Mapping)):
        raise TypeError(
            f"{where} must be a tuple of {size} numbers, got {shown(value)}"
        )
    if len(value) != size:
        raise ValueError(
            f"{where} must have {size} numbers, got {len(value)}: {shown(value)}"
        )


def check_number(where: str, value: Any) -> None:
    """Check that this is a number, or a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(
                f"{where} must be a number or a tensor of one, got a tensor of "
                f"{value.dtype} of shape {tuple(value.shape)}"
            )
        return
    refuse_schedules({where: value})
    wrong = isinstance(value, (str, bytes))
    try:
        if not wrong:
            float(value)
    except OverflowError:
        raise ValueError(f"{where} must be finite, got {shown(value)}") from None
    except (TypeError, ValueError):
        wrong = True
    if wrong:
        raise TypeError(f"{where} must be a number, got {shown(value)}")


def check_decays(rule: Rule, values: Sequence[Any], name_of: Called, own: bool) -> None:
    """Check decay rates that are outside [0, 1). torch computes with some of them, so
    for a rule of torch's they are refused only if a step cannot be computed."""
    outside = [
        (reader.name, value)
        for reader, value in zip(readers(rule), values, strict=True)
        if reader.below == 1 and not 0 <= value < 1
    ]
    if outside and (own or not can_step(rule, values)):
        for name, value in outside:
            check_hyperparameter(name, name_of(name), value, 0.5)


def can_step(rule: Rule, values: Sequence[Any]) -> bool:
    """Whether the first two steps have real scalars."""
    values = [x if isinstance(x, bool) else float(x) for x in values]
    carry = rule.first_carry(dict(zip(rule.hyperparameters, values, strict=True)))
    try:
        scalars = [x for t in (1, 2) for x in rule.scalars(t, *carry, *values)]
    except (ArithmeticError, ValueError):
        return False
    return not any(isinstance(x, complex) or math.isnan(x) for x in scalars)


def options_of(groups: list[dict[str, Any]]) -> list[Any]:
    lists = "params", "param_names"
    return [v for group in groups for k, v in list(group.items()) if k not in lists]


def is_fixed(value: Any) -> bool:
    """Whether an option can change only if another object takes its place."""
    if type(value) is tuple:
        return all(map(is_fixed, value))
    return value is None or type(value) in (float, int, bool, str)


def check_arguments(defaults: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Check the kinds of a constructor's arguments, of which torch compares values
    before it has looked at their kinds."""
    for name, value in named.items():
        default = defaults.get(name)
        if isinstance(default, tuple):
            check_tuple(name, value, len(default))
            pairs = zip(default, value, strict=True)
            parts = [(f"{name}[{i}]", *pair) for i, pair in enumerate(pairs)]
        else:
            parts = [(name, default, value)]
        for where, usual, part in parts:
            if isinstance(usual, (int, float)) and not isinstance(usual, bool):
                check_number(where, part)
