"""The state of parameters: torch's tensors under torch's keys, in memory that kernels
work in. Made when a parameter has its first gradient, and made anew where what was
loaded lies elsewhere or is of another dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastopt.backends.numpy_ref import evaluate
from fastopt.memory.factored import Factors
from fastopt.memory.segments import Array
from fastopt.rule import Rule
from fastopt.torch.memory import (
    C_TYPES,
    COMPUTED,
    NUMPY,
    array,
    computed,
    is_plain,
    like,
    numbers,
    room,
    same_layout,
)

Values = Sequence[Any]  # of the hyperparameters of a group, as scalars takes them
EMA = "ema"  # the key of the moving average of a parameter
TRAINED = "trained"  # the key of what a parameter is in training, in eval mode
FACTORS = "row_var", "col_var"  # those of a matrix's averages, where it is factored


class Names(NamedTuple):
    """What torch calls things in an optimizer's state, and does otherwise."""

    keys: Mapping[str, str] = {}  # of the rule's buffers; its own names if not here
    steps: str | None = "step"  # the key of the parameter's steps; None: not counted
    carry: Mapping[str, str | float] | None = None  # in place of the rule's
    scalars: Callable[..., tuple[float, ...]] | None = None  # likewise
    torchs: bool = False  # whether the carry is of the dtype of torch's counts
    real: bool = False  # whether complex parameters are refused

    def key(self, name: str) -> str:
        return self.keys.get(name, name)


class Member:
    """A parameter that is updated, and its place among all parameters."""

    def __init__(
        self,
        param: Tensor,
        place: int,
        group: int,
        state: dict[str, Any],
        plain: bool,
        alone: bool,
    ):
        self.param, self.place, self.group, self.state = param, place, group, state
        self.alone = alone  # whether it is always a segment by itself
        self.plain = plain  # whether steps work in its own memory
        self.dtype = computed(param)  # of its state
        self.factors: Factors | None = None

    def has(self, tensor: Any) -> bool:
        """Whether a tensor of the state can be worked in as it is."""
        if not isinstance(tensor, Tensor):
            return False
        if self.plain:
            return same_layout(tensor, self.param, self.dtype)
        alike = (tensor.dtype, tensor.device, tensor.shape) == (
            self.dtype,
            self.param.device,
            self.param.shape,
        )
        return alike and is_plain(tensor, shaped=True)


def make(
    rule: Rule,
    names: Names,
    members: Sequence[Member],
    values: Sequence[Values],
    averaged: bool,
    module: Any,
    neighbours: Sequence[Sequence[int]],
) -> list[str]:
    """See that all members have their buffers; the keys of these. ``neighbours``: runs
    of members that follow one another in memory, as their state is to do, too."""
    keys = {name: names.key(name) for name in rule.state}
    if averaged:
        keys[EMA] = EMA
    apart = {
        (i, name)
        for run in neighbours
        for name, key in keys.items()
        if not in_one_piece([members[i].state.get(key) for i in run])
        for i in run
    }
    batches: dict[tuple[str, ...], list[Member]] = {}
    for i, member in enumerate(members):
        of_matrix = rule.factored and member.param.dim() > 1
        if of_matrix:
            factor(member, module)
        lacking = tuple(
            name
            for name, key in keys.items()
            if not (of_matrix and name != EMA)
            and ((i, name) in apart or not member.has(member.state.get(key)))
        )
        if lacking:
            batches.setdefault(lacking, []).append(member)
    for lacking, batch in batches.items():
        for member, streams in zip(batch, zeros(batch, len(lacking)), strict=True):
            named = dict(zip(rule.hyperparameters, values[member.group], strict=True))
            for name, flat in zip(lacking, streams, strict=True):
                tensor = like(member.param, flat, member.plain)
                before, of = member.state.get(keys[name]), rule.starts.get(name)
                if isinstance(before, Tensor):
                    tensor.copy_(before.detach())
                elif of == "p" or name == EMA:
                    tensor.copy_(member.param.detach())
                elif of is not None:
                    flat.fill_(rule.start(of, named))
                member.state[keys[name]] = tensor
    return list(keys.values())


def in_one_piece(tensors: Sequence[Any]) -> bool:
    """Whether each begins in memory where the one before it ends."""
    return all(isinstance(tensor, Tensor) for tensor in tensors) and all(
        a.data_ptr() + a.numel() * a.element_size() == b.data_ptr()
        for a, b in zip(tensors, tensors[1:], strict=False)
    )


def zeros(members: Sequence[Member], streams: int) -> list[tuple[Tensor, ...]]:
    """For each, so many zeroed buffers, of numbers in a row."""
    first = members[0].param
    dtype, on_cpu = COMPUTED[first.dtype], first.is_cpu
    arrays = [
        np.empty(numbers(member.param), NUMPY[dtype])  # never touched
        if on_cpu and not member.plain
        else array(member.param)
        for member in members
    ]
    return room(arrays, streams, first.device, dtype)


def shapes_of(rule: Rule, names: Names, param: Tensor) -> dict[str, tuple[int, ...]]:
    """What the tensors in a parameter's state must be like."""
    counts = rule.carry if names.carry is None else names.carry
    found = {names.key(name): () for name in counts}
    if names.steps is not None:
        found[names.steps] = ()
    if rule.factored and param.dim() > 1:
        return {**found, EMA: tuple(param.shape), **factored_shapes(param)}
    keys = EMA, *map(names.key, rule.state)
    return {**found, **dict.fromkeys(keys, tuple(param.shape))}


def factored_shapes(param: Tensor) -> dict[str, tuple[int, ...]]:
    """Of the averages for the rows of a matrix, and for its columns."""
    *matrices, rows, columns = param.shape
    shapes = (*matrices, rows, 1), (*matrices, 1, columns)
    return dict(zip(FACTORS, shapes, strict=True))


def factor(member: Member, module: Any) -> None:
    """The state of a matrix: averages for its rows and its columns."""
    param = member.param
    for key, shape in factored_shapes(param).items():
        before: Any = member.state.get(key)
        kept = isinstance(before, Tensor) and before.dtype == member.dtype
        if not kept or before.is_neg():
            made = torch.zeros(shape, dtype=member.dtype, device=param.device)
            member.state[key] = made if before is None else made.copy_(before.detach())
    shaped = np.empty(param.shape, NUMPY[COMPUTED[param.dtype]])
    member.factors = Factors(module, shaped, None)


def vectors(
    rule: Rule,
    names: Names,
    members: Sequence[Member],
    values: Sequence[Values],
    fresh: Sequence[bool],
) -> list[Array]:
    """Of each member the steps that it has done, and each number that the rule carries:
    vectors, of which the 0-d tensors in the state are views."""
    torchs = torch.get_default_dtype() == torch.float64
    own = torch.float64 if torchs else torch.float32  # of torch's own counts
    if names.steps is None:  # the first step is that without a buffer
        found = [np.array([float(not new) for new in fresh])]
    else:
        key = names.steps
        found = [vector(rule, key, members, [0.0] * len(members), own, key)]
    for name, of in (rule.carry if names.carry is None else names.carry).items():
        named = [
            dict(zip(rule.hyperparameters, values[member.group], strict=True))
            for member in members
        ]
        first = [rule.start(of, given) for given in named]
        dtype = own if names.torchs else torch.float64
        found.append(vector(rule, names.key(name), members, first, dtype))
    return found


def vector(
    rule: Rule,
    key: str,
    members: Sequence[Member],
    first: list[float],
    dtype: torch.dtype,
    steps: str | None = None,
) -> Array:
    """One of these, from what there is in the state; ``steps``: the key of the steps,
    if it is these."""
    entries = [member.state.get(key) for member in members]
    if key == steps:
        for member, entry in zip(members, entries, strict=True):
            if entry is not None:
                check_steps(f"state[...][{key!r}] of parameter {member.place}", entry)
    there = [entry for entry in entries if entry is not None]
    if len(there) == len(entries) and in_a_row(there):
        return array_of(there)
    if rule.measure is not None and rule.over == "all" and there:
        first = [max(map(float, there))] * len(first)  # one number for all of them
    found_in = {entry.dtype for entry in there if isinstance(entry, Tensor)}
    if len(found_in) == 1 and found_in <= set(NUMPY):  # as torch loads it
        (dtype,) = found_in
    made = [
        new if entry is None else float(entry)
        for entry, new in zip(entries, first, strict=True)
    ]
    found: Array = np.array(made, NUMPY[dtype])
    for i, member in enumerate(members):
        member.state[key] = torch.from_numpy(found[i : i + 1]).reshape(())
    return found


def check_steps(where: str, value: Any) -> None:
    """That a parameter's steps are a number of them."""
    if isinstance(value, Tensor) and (type(value) is not Tensor or value.is_meta):
        return  # which cannot be read
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if number < 0 or not number.is_integer():
        raise ValueError(
            f"{where} is {value!r}; it must be the number of completed steps, a whole "
            f"one from 0 on. Nothing was changed"
        )


def in_a_row(entries: Sequence[Any]) -> bool:
    """Whether numbers are tensors that follow one another in memory."""
    first = entries[0]
    return (
        all(isinstance(e, Tensor) and e.dim() == 0 and e.is_cpu for e in entries)
        and first.dtype in NUMPY
        and all(
            e.dtype == first.dtype
            and not e.is_neg()
            and e.data_ptr() == first.data_ptr() + i * first.element_size()
            for i, e in enumerate(entries)
        )
    )


def array_of(entries: Sequence[Tensor]) -> Array:
    """These as one array, which keeps their memory."""
    count, first = len(entries), entries[0]
    memory: Any = (C_TYPES[first.dtype] * count).from_address(first.data_ptr())
    memory.kept = [entry.untyped_storage() for entry in entries]
    found: Array = np.frombuffer(memory, NUMPY[first.dtype])
    return found


def evaluated(
    param: Tensor, state: Mapping[str, Any], rule: Rule, names: Names, values: Values
) -> Tensor:
    """What a rule evaluates in place of a parameter: a new tensor."""
    dtype = COMPUTED[param.dtype]
    if rule.evaluate is None:
        return param.detach().clone()
    carried = [float(state[names.key(name)]) for name in rule.carry]
    steps = max(int(state[names.steps]), 1) if names.steps else 1
    scalars = rule.scalars(steps, *carried, *values)
    buffers = (state[names.key(name)] for name in rule.state)
    tensors = [t.detach().cpu().resolve_conj() for t in (param, *buffers)]
    if param.is_complex():
        tensors = list(map(torch.view_as_real, tensors))
    arrays = [tensor.to(dtype).numpy() for tensor in tensors]
    made = torch.from_numpy(evaluate(rule, arrays, scalars, NUMPY[dtype]))
    made = torch.view_as_complex(made) if param.is_complex() else made
    found: Tensor = made.to(param.device, param.dtype)
    return found
