"""A rule bound to parameters: their state, and what a step of it needs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np

from fastopt.backends.numpy_ref import evaluate
from fastopt.memory.arena import aligned, zeros
from fastopt.memory.arrays import on_device, to_host
from fastopt.memory.factored import Factors, is_factored
from fastopt.memory.formats import format_of
from fastopt.memory.segments import Array, Encoded, Segment, encoded
from fastopt.optimizer import checks
from fastopt.optimizer.formats import PARAM, Buffer, buffers_of, part_name
from fastopt.optimizer.groups import Values
from fastopt.optimizer.parameters import Parameters
from fastopt.portable import portable
from fastopt.rule import Rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call
from fastopt.step import Key, Program


class Bound:
    """What applies at present: the rule, or one of its variants, and its buffers.

    It begins with what there is of the state and of the carried numbers, for the first
    of the parameters; the rest is new. ``values`` are the hyperparameters of each set.
    """

    def __init__(
        self,
        module: ModuleType,
        rule: Rule,
        on: frozenset[str],
        params: Parameters,
        values: Sequence[Mapping[str, Any]],
        *,
        state: Mapping[str, list[Array]],
        averages: list[Array] | None,
        carried: Array | None,
        steps: int,
        nonfinite_before: int = 0,
    ):
        self.rule, self.params, self.averages = rule, params, averages
        self.on = on  # the switches that selected the rule
        self._nonfinite_before = nonfinite_before
        arrays, likes = params.arrays, params.likes
        self.of: dict[str, Buffer] = buffers_of(rule.state, params.chosen)
        since = {name: len(state.get(name, ())) for name in self.of}
        self.buffers = {name: list(state.get(name, ())) for name in self.of}
        # Of what is factored, buffers are empty, and the state is in ``factors``.
        empty = np.empty(0, params.dtype)
        full = [empty if is_factored(rule, like) else like for like in likes]
        self.factors: list[Factors | None] = [None] * len(arrays)
        for i, like in enumerate(likes):
            if is_factored(rule, like):
                (kept,) = self.buffers.values()
                there = kept[i] if i < len(kept) else None
                self.factors[i] = Factors(module, like, there, params.arrays[i])
                kept[i : i + 1] = [] if there is None else [empty]
        for first in set(since.values()) - {len(arrays)}:
            alike: dict[Any, tuple[list[str], list[Array]]] = {}  # by dtypes
            for name in self.of:
                if since[name] == first:
                    models = list(map(self.of[name].model, params.chosen, full))[first:]
                    key = tuple((model.dtype, model.shape) for model in models)
                    alike.setdefault(key, ([], models))[0].append(name)
            for names, models in alike.values():
                fresh = zeros(module.state_arena, models, len(names))
                for name, streams in zip(names, fresh, strict=True):
                    self.buffers[name] += streams
        row_of = range(len(arrays)) if rule.by_segment else params.set_of
        # For each stream and array, the groups that could not be stored.
        counts = aligned(np.dtype(np.int64), (1 + len(rule.state), len(arrays)))
        arena = partial(module.state_arena, near=arrays[0] if arrays else None)
        ((self.not_stored,),) = zeros(arena, [counts], 1)
        # Parameters and the buffers of the state, as kernels take them.
        self.streams = {
            name: [self._stream(name, i, k) for i in range(len(arrays))]
            for k, name in enumerate((PARAM, *rule.state))
        }
        sizes = params.first, *(like.size for like in likes)
        firsts = np.cumsum(sizes, dtype=np.int64).tolist()
        param_streams, *states = self.streams.values()
        each = zip(param_streams, row_of, self.factors, *states, strict=True)
        segments = [
            Segment(
                param,
                tuple(streams) if of is None else (of.product,),
                row,
                averages[i] if averages else None,
                firsts[i],
                params.copies[i],
            )
            for i, (param, row, of, *streams) in enumerate(each)
        ]
        carry = np.zeros((2, len(self.sets), len(rule.carry)))
        for row, of_set in enumerate(self.sets):
            carry[:, row] = rule.first_carry(values[of_set])
        if carried is not None:
            carry[:, : len(carried)] = carried
            if rule.measure is not None and not rule.by_segment:  # it is of all arrays
                carry[:, len(carried) :] = carried[0]
        self.program = Program(
            module,
            rule,
            segments,
            factors=self.factors,
            count=np.array([steps], np.int64),
            carry=carry,
        )
        if "scalars" in self.program.runner.fuses:
            self.program.runner.watch(params.watch.ndarrays)
        copies = [copy.parts[0] for copy in params.copies if copy is not None]
        written = [*arrays, *chain(*self.buffers.values()), *(averages or ()), *copies]
        self.spans = checks.spans_of(written)  # by address
        self.start(values, since)

    def _stream(self, name: str, i: int, k: int) -> Array | Encoded:
        """Return what kernels take for a parameter or a buffer, the k-th of them."""
        first = (self.params.arrays if name == PARAM else self.buffers[name])[i]
        format = self.params.chosen[i].get(name)
        if format is None:
            return self.params.streams[i] if name == PARAM else first
        parts = [first.view(format.stored)]
        if second := part_name(name, format):
            parts.append(self.buffers[second][i])
        if format.scale is not None:
            place = k * len(self.params.arrays) + i
            parts.append(self.not_stored.reshape(-1)[place : place + 1])
        return Encoded(format, tuple(parts))

    @property
    def steps(self) -> int:
        program = self.program
        if program.decides:
            program.runner.refresh()
        return int(program.known_count[0])

    @property
    def known_steps(self) -> int:
        """The number of completed steps, without waiting for those that a GPU has not
        decided yet: for checks, to which another number means as much."""
        return int(self.program.known_count[0])

    @property
    def is_first(self) -> bool:
        """Whether the next step is the first one. One that a GPU may have skipped
        counts as done here, so that nobody has to wait for it."""
        program = self.program
        if program.decides and program.runner.is_ahead:
            return False
        return not program.known_count[0]

    @property
    def kept(self) -> dict[str, Any]:
        """What another of these goes on with."""
        self.program.check_working()
        if self.program.decides:
            self.program.runner.check_filling()
        return {
            "state": self.state,
            "carried": self.program.carried,
            "nonfinite_before": self.nonfinite_groups,
        }

    @property
    def nonfinite_groups(self) -> int:
        """How often a group was not finite, and not stored."""
        return self._nonfinite_before + int(to_host(self.not_stored).sum())

    @property
    def state(self) -> dict[str, list[Array]]:
        """The state buffers, of those that are factored the set that holds now."""
        state = {name: list(arrays) for name, arrays in self.buffers.items()}
        for i, factors in enumerate(self.factors):
            if factors is not None:
                state[self.rule.state[0]][i] = factors.sets[self.steps % 2]
        return state

    @property
    def sets(self) -> Sequence[int]:
        """For each row of scalars, the set of hyperparameters that it is made from."""
        params = self.params
        return params.set_of if self.rule.by_segment else range(len(params.sets))

    @standard
    def start(
        self, values: Sequence[Mapping[str, Any]], since: Mapping[str, int]
    ) -> None:
        """Give what does not start at zero its value, under the hyperparameters of each
        set; of state buffers, from the segment on that ``since`` says."""
        params = self.params
        filled = self.averages or self.rule.starts.keys() & since.keys()
        if filled and self.program.decides:
            self.program.runner.check_filling()
        for name, first in since.items():
            if name not in self.rule.starts:
                continue
            for i in range(first, len(params.arrays)):
                start, named = self.rule.starts[name], values[params.set_of[i]]
                value: Any = numbers(self.streams[PARAM][i])
                if start != "p":  # rounded as other numbers are, before it is encoded
                    value = float(params.dtype.type(self.rule.start(start, named)))
                for call in filling_stream(self.streams[name][i], value):
                    call()
        if not self.steps:
            for row, of_set in enumerate(self.sets):
                self.program.carry[:, row] = self.rule.first_carry(values[of_set])
            pairs = zip(self.averages or (), self.streams[PARAM], strict=False)
            for average, param in pairs:
                fill(average, numbers(param))

    def keys(self, values: Sequence[Values], factor: float = 1.0) -> list[Key]:
        """Return what the next step computes each row of scalars from: with the
        hyperparameters of each set, and a factor for the gradients."""
        t = self.steps + 1
        if self.rule.carry:
            pairs = zip(self.sets, self.program.carried.tolist(), strict=True)
            return [Key(t, old, values[number], factor) for number, old in pairs]
        keys = [Key(t, (), of_set, factor) for of_set in values]
        return [keys[number] for number in self.sets]

    def hyperparameters(self, values: Sequence[Values]) -> list[Values]:
        """Return the hyperparameters of each row of scalars."""
        return [values[number] for number in self.sets]

    @standard
    def evaluated(self, values: Sequence[Values]) -> Any:
        """New arrays with the parameters to use, in the structure of the parameters."""
        self.program.check_working()
        rule, params, dtype = self.rule, self.params, self.params.dtype
        if rule.evaluate is None:
            raise TypeError(
                f"{rule.name} has no other parameters for evaluation; use those that "
                f"it updates"
            )
        t = max(self.steps, 1)
        scalars, keys = portable(rule.scalars), self.keys(values)
        rows = [scalars(t, *key.carry, *key.values) for key in keys]
        row_of = range(len(params.arrays)) if rule.by_segment else params.set_of
        tree, arrays = params.like()
        for array, row, *streams in zip(
            arrays, row_of, *self.streams.values(), strict=True
        ):
            buffers = list(map(numbers, streams))
            fill(array, evaluate(rule, buffers, rows[row], dtype))
        return tree


def numbers(stream: Array | Encoded) -> Array:
    """Return the numbers of a stream in host memory."""
    if isinstance(stream, Encoded):
        return Encoded(stream.format, tuple(map(to_host, stream.parts))).numbers()
    return to_host(stream) if on_device(stream) else stream


def filling_stream(stream: Array | Encoded, value: Any) -> list[Call]:
    """Return calls that write a number, or an array of as many elements, into a
    stream."""
    if not isinstance(stream, Encoded):
        return [filling(stream, value)]
    if not isinstance(value, float):
        value = numbers(encoded(value)).reshape(stream.shape)
    whole = np.broadcast_to(np.asarray(value, stream.dtype), stream.shape)
    words = stream.format.nearest.written(whole)
    return [filling(*pair) for pair in zip(stream.parts, words, strict=False)]


def fill(array: Array, value: Any) -> None:
    """Write into an array, in host memory or on a device."""
    filling(array, value)()


def filling(array: Any, value: Any) -> Call:
    """Return a call that writes a number, or an array of as many elements, into an
    array. For a NumPy array the call is compiled, as ``uninterrupted`` needs; for a
    device array it runs Python code.

    >>> import numpy as np
    >>> from fastopt.runtime.atomic import uninterrupted
    >>> array = np.zeros(2)
    >>> uninterrupted(filling(array, np.ones(2)))
    >>> array
    array([1., 1.])
    """
    if not array.size:
        return bool  # nothing to write
    number = isinstance(value, float)
    if type(array) is np.ndarray and (number or isinstance(value, np.ndarray)):
        # Not into array.reshape(-1), which is a copy if the array is not C-contiguous.
        whole = value if number else value.reshape(array.shape)
        return partial(operator.setitem, array, Ellipsis, whole)
    dtypes = [array.dtype] if number else [array.dtype, value.dtype]
    if on_device(array) and any(map(format_of, dtypes)):
        from fastopt.backends import cuda_driver

        return cuda_driver.filling(array, value)
    flat = value if number else value.reshape(-1)  # on a device
    return partial(operator.setitem, array.reshape(-1), slice(None), flat)


def bind_alone(
    module: ModuleType,
    rule: Rule,
    arrays: Sequence[Array | Encoded],
    row_of: Sequence[int] | None = None,
    state: Sequence[Sequence[Array]] = (),
    count: Array | None = None,
    copies: Sequence[Encoded | None] = (),
) -> Program:
    """Bind a rule to arrays that are no optimizer's parameters, with a row of scalars
    for all of them, or ``row_of`` each; ``state`` has for each buffer its arrays, and
    ``copies`` are where arrays are copied to."""
    firsts = np.cumsum([0, *(array.size for array in arrays)]).tolist()
    rows = [0] * len(arrays) if row_of is None else row_of
    segments = [
        Segment(array, tuple(streams), row, first=first, copy=copy)
        for array, row, first, copy, *streams in zip(
            arrays,
            rows,
            firsts[:-1],
            copies or [None] * len(arrays),
            *state,
            strict=True,
        )
    ]
    return Program(module, rule, segments, count=count)
