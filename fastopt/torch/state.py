"""The state of parameters: torch's tensors under torch's keys, in memory that kernels
work in. It is made when a parameter has its first gradient, and made anew where what
was loaded lies elsewhere or is of another dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastopt.backends.numpy_ref import evaluate
from fastopt.memory import arena
from fastopt.memory.factored import Factors
from fastopt.memory.segments import Array
from fastopt.optimizer.formats import PARAM, Chosen
from fastopt.portable import portable
from fastopt.rule import Rule
from fastopt.torch import formats, masters, memory
from fastopt.torch.memory import (
    COMPUTED,
    NUMPY,
    array,
    at_address,
    computed,
    is_plain,
    like,
    numbers,
    same_layout,
)

Values = Sequence[Any]  # of the hyperparameters of a group, as scalars takes them
EMA = "ema"  # the key of the moving average of a parameter
TRAINED = "trained"  # the key of what a parameter is in training, in eval mode
# The key of the number of steps, 0 or 1, that a GPU keeps for classes that count none,
# such as SGD: it may have skipped the first step, although there is a buffer.
BEGUN = "begun"
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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of torch's counts."""
        wide = torch.get_default_dtype() == torch.float64
        return torch.float64 if wide else torch.float32

    @property
    def carry_dtype(self) -> torch.dtype:
        """The dtype of the numbers that are carried."""
        return self.dtype if self.torchs else torch.float64

    def carried(self, rule: Rule) -> dict[str, str | float]:
        """Return the key and the first value of each number that is carried."""
        carry = rule.carry if self.carry is None else self.carry
        return {self.key(name): first for name, first in carry.items()}


@dataclass(eq=False)
class Member:
    """A parameter that is updated, and its place among all parameters. Of a DTensor,
    the parameter here and its state are this process's shards."""

    param: Tensor
    chosen: Chosen  # the formats of the rule's buffers, and of itself
    place: int
    group: int
    values: Mapping[str, Any]  # the group's hyperparameters
    state: dict[str, Any]
    plain: bool  # whether steps work in its own memory
    alone: bool  # whether it is always a segment by itself
    first: int  # the number of its first element among all parameters'
    owner: Tensor  # the parameter as the optimizer has it
    factors: Factors | None = None
    copy: Tensor | None = None  # where steps copy the parameter to
    # The state before this plan, to which plans add what is missing.
    before: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that is computed in, and that of plain state."""
        return computed(self.param)

    @property
    def keeps_remainder(self) -> bool:
        """Whether the state has the rest of a parameter that is stored in two parts."""
        format = self.chosen.get(PARAM)
        return format is not None and format.second is not None

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a buffer of the rule; of a parameter, its remainder's."""
        format = self.chosen.get(name)
        return formats.tensor_dtype(format, name == PARAM) if format else self.dtype

    def has(self, name: str, key: str) -> bool:
        """Whether a buffer of the state can be worked in as it is."""
        tensor = self.state.get(key)
        if not isinstance(tensor, Tensor):
            return False
        dtype = self.dtype_of(name)
        format = self.chosen.get(name)
        if format is not None and format.scale is not None:
            scales = self.state.get(f"{key}_{formats.SCALE}")
            shape = formats.second_shape(self.param, format)
            if not isinstance(scales, Tensor) or scales.shape != shape:
                return False
            if scales.dtype is not torch.float32 or not scales.is_contiguous():
                return False
        if self.plain:
            return same_layout(tensor, self.param, dtype)
        alike = (tensor.dtype, tensor.device, tensor.shape) == (
            dtype,
            self.param.device,
            self.param.shape,
        )
        return alike and is_plain(tensor, shaped=True)


class Kind(NamedTuple):
    """Members that are stepped together, and what they have in common."""

    rule: Rule
    names: Names
    module: ModuleType
    averaged: bool  # whether moving averages of the parameters are kept
    members: list[Member]
    all_members: list[Member]  # of the rule, also those that are stepped apart
    not_stored: Any  # counts groups of 8-bit state that were not finite

    @property
    def is_over_all(self) -> bool:
        """Whether the rule measures all parameters together."""
        return self.rule.measure is not None and self.rule.over == "all"

    @property
    def keys(self) -> dict[str, str]:
        """The keys of the buffers of each member, by the rule's names for them."""
        keys = {name: self.names.key(name) for name in self.rule.state}
        if self.averaged:
            keys[EMA] = EMA
        if any(member.keeps_remainder for member in self.members):
            keys[PARAM] = formats.REMAINDER
        return keys


def make(kind: Kind, runs: Sequence[Sequence[int]]) -> list[str]:
    """Make the buffers that members lack, and return the keys of all. The buffers of a
    run lie one after the other in memory, as its members do."""
    rule, members, keys = kind.rule, kind.members, kind.keys
    for member in members:  # they may be of an optimizer with another master
        if not member.keeps_remainder:
            member.state.pop(formats.REMAINDER, None)
    apart = {
        (i, name)
        for run in runs
        if len(run) > 1
        for name, key in keys.items()
        if not in_one_piece([members[i].state.get(key) for i in run])
        for i in run
    }
    batches: dict[tuple[Any, ...], list[Member]] = {}
    for i, member in enumerate(members):
        of_matrix = rule.factored and member.param.dim() > 1
        if of_matrix:
            factor(member, kind.module)
        lacking = tuple(
            name
            for name, key in keys.items()
            if not (of_matrix and name != EMA)
            and (name != PARAM or member.keeps_remainder)
            and ((i, name) in apart or not member.has(name, key))
        )
        if lacking and not member.chosen:
            batches.setdefault((member.dtype, *lacking), []).append(member)
            continue
        for dtype in dict.fromkeys(map(member.dtype_of, lacking)):
            alike = [name for name in lacking if member.dtype_of(name) == dtype]
            batches.setdefault((dtype, *alike), []).append(member)
    for (dtype, *names), batch in batches.items():
        made = zeros(batch, len(names), dtype)
        for member, streams in zip(batch, made, strict=True):
            for name, flat in zip(names, streams, strict=True):
                tensor = like(member.param, flat, member.plain)
                begin(kind, member, name, keys[name], tensor)
                member.state[keys[name]] = tensor
    return list(keys.values())


def begin(kind: Kind, member: Member, name: str, key: str, tensor: Tensor) -> None:
    """Give a new buffer its numbers: those of the state, or what the rule begins
    with."""
    of, format, values = kind.rule.starts.get(name), member.chosen.get(name), None
    before = member.state.get(key)
    if format is None and before is None and of is None and name != EMA:
        return  # zeros
    if name == PARAM and format is not None and before is not None:
        formats.check_remainder(before, member.param, format)
    if isinstance(before, Tensor):
        # A remainder is no number by itself.
        values = before if name == PARAM else formats.decoded(member.state, key)
    elif of == "p" or name == EMA:
        values = masters.master(member.param, member.state)
    elif of is not None:
        start: float = kind.rule.start(of, member.values)
        values = torch.empty_like(tensor, dtype=member.dtype)
        (torch.view_as_real(values) if values.is_complex() else values).fill_(start)
    member.state.pop(f"{key}_{formats.SCALE}", None)
    if format is None or format.scale is None:
        if values is not None:
            tensor.copy_(values.detach().resolve_neg())
        return
    shape = formats.second_shape(member.param, format)
    scales = torch.zeros(shape, device=tensor.device)
    if values is not None:
        formats.encode(tensor, scales, format, values)
    member.state[f"{key}_{formats.SCALE}"] = scales


def in_one_piece(tensors: Sequence[Any]) -> bool:
    """Whether each begins in memory where the one before it ends."""
    return all(isinstance(tensor, Tensor) for tensor in tensors) and all(
        a.data_ptr() + a.numel() * a.element_size() == b.data_ptr()
        for a, b in zip(tensors, tensors[1:], strict=False)
    )


def zeros(
    members: Sequence[Member], streams: int, dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """Return, for each member, ``streams`` flat buffers of zeros."""
    first, sizes = members[0].param, [numbers(member.param) for member in members]
    dtype = COMPUTED[dtype] if dtype.is_complex else dtype
    if not memory.on_gpu(first) and dtype not in NUMPY:  # NumPy may have no such dtype
        stored = np.dtype(f"i{dtype.itemsize}")
        kinds = [arena.aligned(stored, (size,)) for size in sizes]
        return [
            tuple(torch.from_numpy(flat).view(dtype) for flat in of)
            for of in arena.state_arena(kinds, streams)
        ]
    if not memory.on_gpu(first):
        arrays = [
            arena.like(array(member.param))
            if member.plain
            else np.empty(size, NUMPY[dtype])
            for member, size in zip(members, sizes, strict=True)
        ]
        return [
            tuple(map(torch.from_numpy, of))
            for of in arena.state_arena(arrays, streams)
        ]
    unit = 256 // dtype.itemsize
    padded = [-(-size // unit) * unit for size in sizes]
    rows = [
        torch.zeros(sum(padded), dtype=dtype, device=first.device).split(padded)
        for _ in range(streams)
    ]
    return [tuple(row[i][:size] for row in rows) for i, size in enumerate(sizes)]


def shapes_of(rule: Rule, names: Names, param: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors in a parameter's state must have."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names.carried(rule), ())
    if names.steps is not None:
        shapes[names.steps] = ()
    if rule.factored and param.dim() > 1:
        return {**shapes, EMA: tuple(param.shape), **factored_shapes(param)}
    keys = EMA, *map(names.key, rule.state)
    return {**shapes, **dict.fromkeys(keys, tuple(param.shape))}


def factored_shapes(param: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the averages for a matrix's rows and for its columns."""
    *matrices, rows, columns = param.shape
    shapes = (*matrices, rows, 1), (*matrices, 1, columns)
    return dict(zip(FACTORS, shapes, strict=True))


def factor(member: Member, module: Any) -> None:
    """Make the state of a matrix: averages for its rows and for its columns."""
    param = member.param
    for key, shape in factored_shapes(param).items():
        before: Any = member.state.get(key)
        kept = isinstance(before, Tensor) and before.dtype == member.dtype
        if not kept or before.is_neg():
            new = torch.zeros(shape, dtype=member.dtype, device=param.device)
            member.state[key] = (
                new if before is None else new.copy_(before.detach().resolve_neg())
            )
    shaped = np.empty(param.shape, NUMPY[COMPUTED[param.dtype]])
    near = None if param.is_cpu else array(member.state[key])
    member.factors = Factors(module, shaped, None, near)


def has_begun(state: Mapping[str, Any] | None, rule: Rule, names: Names) -> bool:
    """Whether a parameter has more state than ``load_master_params`` makes before the
    first step: a remainder, and counts."""
    if not state or formats.REMAINDER not in state:
        return bool(state)
    return not {formats.REMAINDER, names.steps, *names.carried(rule)} >= state.keys()


def first_counts(rule: Rule, names: Names, values: Values) -> dict[str, Any]:
    """Return the steps of a parameter, and the numbers that the rule carries, before
    the first step. ``values`` are its hyperparameters."""
    named = dict(zip(rule.hyperparameters, values, strict=True))
    steps = {} if names.steps is None else {names.steps: 0.0}
    carried = {key: rule.start(of, named) for key, of in names.carried(rule).items()}
    return {
        **{key: torch.tensor(n, dtype=names.dtype) for key, n in steps.items()},
        **{key: torch.tensor(n, dtype=names.carry_dtype) for key, n in carried.items()},
    }


def vectors(kind: Kind) -> list[Array]:
    """Return, as vectors, the steps that each member has done, and each number that the
    rule carries. The 0-d tensors in the state are views of them."""
    rule, names, members = kind.rule, kind.names, kind.members
    for counted in (names.steps, *names.carried(rule)):
        if counted is not None:
            fetch(members, counted)
    if names.steps is None:
        begun = [True] * len(members)
        if rule.state:
            fetch(members, BEGUN)
            begun = [bool(member.state.pop(BEGUN, True)) for member in members]
        vectors = [np.array(has_buffer(kind), float) * begun]
    else:
        for member in kind.all_members if kind.is_over_all else members:
            if (steps := member.state.get(names.steps)) is not None:
                where = f"state[...][{names.steps!r}] of parameter {member.place}"
                check_steps(where, steps)
        vectors = [vector(kind, names.steps, [0.0] * len(members), names.dtype)]
    for key, of in names.carried(rule).items():
        first = [rule.start(of, member.values) for member in members]
        vectors.append(vector(kind, key, first, names.carry_dtype))
    return vectors


def has_buffer(kind: Kind) -> list[bool]:
    """Return for each member whether it has a buffer. If torch counts no steps, a
    parameter with a buffer has done one, unless a GPU has skipped it."""
    keys = [kind.names.key(name) for name in kind.rule.state]
    return [any(m.state.get(key) is not None for key in keys) for m in kind.members]


def fetch(members: Sequence[Member], key: str) -> None:
    """Let the members' entries of a key be in host memory. To read those that a GPU has
    counted is to wait for it, once."""
    entries: list[Any] = [member.state.get(key) for member in members]
    there = [
        i
        for i, entry in enumerate(entries)
        if isinstance(entry, Tensor) and entry.numel() == 1 and memory.on_gpu(entry)
    ]
    if there:
        numbers = torch.stack([entries[i].detach().reshape(()) for i in there]).cpu()
        for i, number in zip(there, numbers.unbind(), strict=True):
            members[i].state[key] = number


def vector(kind: Kind, key: str, first: list[float], dtype: torch.dtype) -> Array:
    """Return the vector of one key's entries in the state, ``first`` where there are
    none. The entries become views of it."""
    entries = [member.state.get(key) for member in kind.members]
    there = [entry for entry in entries if entry is not None]
    if len(there) == len(entries) and in_a_row(there):
        kept = [entry.untyped_storage() for entry in there]
        return at_address(there[0].data_ptr(), len(there), NUMPY[there[0].dtype], kept)
    if kind.is_over_all:  # one number for all, if steps have left one
        left = [member.before.get(key) for member in kind.all_members]
        if known := [float(number) for number in left if number is not None]:
            first = [max(known)] * len(first)
    dtypes = {entry.dtype for entry in there if isinstance(entry, Tensor)}
    if len(dtypes) == 1 and dtypes <= set(NUMPY):  # as torch loads it
        (dtype,) = dtypes
    numbers = [
        new if entry is None else float(entry)
        for entry, new in zip(entries, first, strict=True)
    ]
    array: Array = np.array(numbers, NUMPY[dtype])
    for i, member in enumerate(kind.members):
        member.state[key] = torch.from_numpy(array[i : i + 1].reshape(()))
    return array


def check_steps(where: str, value: Any) -> None:
    """Check that a parameter's count of steps is a whole number."""
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


def evaluated(
    param: Tensor, state: Mapping[str, Any], rule: Rule, names: Names, values: Values
) -> Tensor:
    """Return a new tensor with what a rule evaluates in place of a parameter."""
    dtype = COMPUTED[param.dtype]
    if rule.evaluate is None:
        return param.detach().clone()
    carried = [float(state[names.key(name)]) for name in rule.carry]
    steps = max(int(state[names.steps]), 1) if names.steps else 1
    scalars = portable(rule.scalars)(steps, *carried, *values)
    buffers = (formats.decoded(state, names.key(name)) for name in rule.state)
    tensors = [masters.master(param, state), *buffers]
    tensors = [tensor.detach().cpu().resolve_conj() for tensor in tensors]
    if param.is_complex():
        tensors = list(map(torch.view_as_real, tensors))
    arrays = [tensor.to(dtype).numpy() for tensor in tensors]
    tensor = torch.from_numpy(evaluate(rule, arrays, scalars, NUMPY[dtype]))
    tensor = torch.view_as_complex(tensor) if param.is_complex() else tensor
    result: Tensor = tensor.to(param.device, param.dtype)
    return result


def holds(there: dict[str, Any] | None, entry: dict[str, Any]) -> bool:
    """Whether an entry of the state has the same objects as another."""
    return (
        there is not None
        and there.keys() == entry.keys()
        and all(there[key] is value for key, value in entry.items())
    )
