"""A rule bound to parameters: their state, and what a step of it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from fastopt.backends.numpy_ref import NUMPY, Extras, Step, calls_of, combined
from fastopt.language import concrete
from fastopt.memory.arena import zeros
from fastopt.memory.arrays import to_host
from fastopt.memory.factored import Factors, is_factored
from fastopt.memory.segments import Array, Segment
from fastopt.optimizer import checks
from fastopt.optimizer.groups import Values
from fastopt.optimizer.parameters import Parameters
from fastopt.rule import Rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call, filling


@dataclass(frozen=True)
class Bound:
    """What applies at present: the rule, or one of its variants, and its buffers."""

    on: frozenset[str]  # the switches that selected it
    rule: Rule
    params: Parameters
    buffers: dict[str, list[Array]]  # the state, as far as it is not factored
    factors: list[Factors | None]  # and the rest of it
    averages: list[Array] | None
    carry: Array  # two sets in turn; in each a row for every row of scalars
    completed: Array  # steps: one int64, raised by the kernel
    step: Step
    spans: list[tuple[int, int]]  # of all that a step writes, by address

    @property
    def steps(self) -> int:
        return int(self.completed[0])

    @property
    def state(self) -> dict[str, list[Array]]:
        """The state buffers, of those that are factored the set that holds now."""
        state = {name: list(arrays) for name, arrays in self.buffers.items()}
        for i, factors in enumerate(self.factors):
            if factors is not None:
                state[self.rule.state[0]][i] = factors.sets[self.steps % 2]
        return state

    @property
    def carried(self) -> Array:
        """The carry that the completed steps left; the other set is the next step's."""
        carried: Array = self.carry[self.steps % 2]
        return carried

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
        for name, first in since.items():
            if name not in self.rule.starts:
                continue
            for i in range(first, len(params.arrays)):
                of, given = self.rule.starts[name], values[params.set_of[i]]
                fill(
                    self.buffers[name][i],
                    params.arrays[i] if of == "p" else self.rule.start(of, given),
                )
        if not self.steps:
            for row, of_set in enumerate(self.sets):
                self.carry[:, row] = self.rule.first_carry(values[of_set])
            for average, param in zip(self.averages or (), params.arrays, strict=False):
                fill(average, param)

    @standard
    def norm(
        self,
        grads: Sequence[Any],
        grad_scale: float,
        threads: int,
        weights: Sequence[float] | None = None,
    ) -> tuple[float, list[int]]:
        """The norm of all gradients, which the step has taken, scaled; and the segments
        where one of them is not finite. With weights, of the tasks' together."""
        tasks = [grads] if weights is None else grads
        rows: list[Values] = [(grad_scale,)] * len(self.sets)
        squares, bad = 0.0, []
        for i, sums in enumerate(self.step.sums("gradients", rows, threads)):
            if sums is not None:
                squares += sums[0]
                dtype = self.params.arrays[i].dtype
                here = [task[i] for task in tasks]
                unfit = not_finite(dtype, sums[0], here, weights or [1.0], grad_scale)
                bad += [i] if unfit else []
        return math.sqrt(squares), bad

    @standard
    def calls(
        self, values: Sequence[Values], factor: float, threads: int, extras: Extras
    ) -> list[Call]:
        """A step with the gradients that were taken, times a factor: calls that do it.
        The new carry is put in its place, where it counts when they are done."""
        rule, t = self.rule, self.steps + 1
        carried, kept = self.carried.tolist(), len(rule.carry)
        rows = [
            rule.scalars(t, *old, *values[of_set])
            for of_set, old in zip(self.sets, carried, strict=True)
        ]
        if rule.factored:
            self._factor(rows, factor, threads, extras.clip_value)
        if rule.settle is not None:
            given = [(factor, *row) for row in rows]
            compiled: Any = self.step  # if there are batches
            if getattr(compiled, "batches", False):
                return [partial(compiled.settled, given, threads, extras)]
            sums = self.step.sums("rule", given, threads, extras.clip_value)
            nothing = (0.0,) * rule.scalar_count
            for r, (n, total) in enumerate(self._totals(sums)):
                if total is None:  # a row without elements: no update, and no change
                    rows[r] = (*nothing, *carried[r])
                else:
                    rows[r] = rule.settle(t, float(n), *total, *rows[r])
        if kept:
            self.carry[t % 2] = [row[-kept:] for row in rows]
        rows = [(factor, *row[: rule.scalar_count]) for row in rows]
        return calls_of(self.step, rows, threads, extras)

    @standard
    def evaluated(self, values: Sequence[Values]) -> Any:
        """New arrays with the parameters to use, in the structure of the parameters."""
        rule, params, dtype = self.rule, self.params, self.params.arrays[0].dtype
        if rule.evaluate is None:
            raise TypeError(
                f"{rule.name} has no other parameters for evaluation; use those that "
                f"it updates"
            )
        evaluate = concrete(rule.evaluate, dtype, NUMPY, lambda helper: helper)
        count = evaluate.__code__.co_argcount - len(rule.state) - 1
        rows = [
            rule.scalars(max(self.steps, 1), *carried, *values[of_set])
            for of_set, carried in zip(self.sets, self.carried.tolist(), strict=True)
        ]
        row_of = range(len(params.arrays)) if rule.by_segment else params.set_of
        tree, arrays = params.like()
        for array, param, row, *state in zip(
            arrays, params.arrays, row_of, *self.state.values(), strict=True
        ):
            buffers = map(to_host, (param, *state))
            used = map(dtype.type, rows[row][:count])
            with np.errstate(all="ignore"):
                fill(array, np.asarray(evaluate(*buffers, *used)))
        return tree

    def _factor(
        self, rows: list[Values], factor: float, threads: int, clip_value: float
    ) -> None:
        """Bring what is factored up to the next step, and tell the kernels so."""
        t, given = self.steps + 1, [(factor, *row) for row in rows]
        sums = self.step.squares(given, threads, clip_value)
        for i, factors in enumerate(self.factors):
            if factors is None:
                continue
            found, (weight, floor, least, *others) = sums[i], rows[i]
            if found is None:
                factors.keep(t)
            else:
                factors.advance(t, found, weight, least)
                rows[i] = (0.0, floor, least, *others)

    def _totals(
        self, sums: list[tuple[float, ...] | None]
    ) -> list[tuple[int, tuple[float, ...] | None]]:
        """For each row of scalars, the elements that are updated and their sums."""
        sizes = [array.size for array in self.params.arrays]
        there: list[tuple[int, tuple[float, ...] | None]] = [
            (size, terms) if terms is not None and size else (0, None)
            for size, terms in zip(sizes, sums, strict=True)
        ]
        if self.rule.by_segment:
            return there
        n, total = 0, None
        for size, terms in there:
            if terms is not None:
                n += size
                old = total or (0.0,) * len(terms)
                total = tuple([a + b for a, b in zip(old, terms, strict=True)])
        return [(n, total)] * len(self.sets)


def shrinking(norm: float, limit: float) -> float:
    """The factor that brings gradients of this norm under a limit, as torch has it; a
    NaN goes on into the parameters, as it does there."""
    if limit == math.inf:
        return 1.0
    shrink = limit / (norm + 1e-6)
    return 1.0 if shrink >= 1 else shrink


def not_finite(
    dtype: np.dtype[Any],
    squares: float,
    grads: Sequence[Any],
    weights: Sequence[float],
    grad_scale: float,
) -> bool:
    """Whether a gradient with this sum of squares is infinite or NaN somewhere. The
    squares of finite ones may overflow, in float64 alone."""
    if squares == math.inf and dtype == np.float64:
        there = [None if grad is None else to_host(grad) for grad in grads]
        with np.errstate(all="ignore"):
            grad = np.asarray(combined(there, weights))
            return not np.isfinite(grad * grad_scale).all()
    return not math.isfinite(squares)


def fill(array: Array, value: Any) -> None:
    """Write into an array, in host memory or on a device."""
    filling(array, value)()


def bind(
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
) -> Bound:
    """Bind a rule to parameters, with what there is of its state, for the first of
    them; the rest is new. ``values``: now, for each set of the hyperparameters."""
    arrays = params.arrays
    since = {name: len(state.get(name, ())) for name in rule.state}
    buffers = {name: list(state.get(name, ())) for name in rule.state}
    # Of what is factored, buffers are empty.
    likes = [np.empty(0, a.dtype) if is_factored(rule, a) else a for a in arrays]
    factors: list[Factors | None] = [None] * len(arrays)
    for i, array in enumerate(arrays):
        if is_factored(rule, array):
            (kept,) = buffers.values()
            factors[i] = Factors(module, array, kept[i] if i < len(kept) else None)
            kept[i : i + 1] = [likes[i]] if i < len(kept) else []
    for first in set(since.values()) - {len(arrays)}:
        names = [name for name in rule.state if since[name] == first]
        made = zeros(module.state_arena, likes[first:], len(names))
        for name, fresh in zip(names, made, strict=True):
            buffers[name] += fresh
    row_of = range(len(arrays)) if rule.by_segment else params.set_of
    segments = [
        Segment(
            array,
            tuple(streams) if of is None else (),
            row,
            averages[i] if averages else None,
            of and of.product,
        )
        for i, (array, row, of, *streams) in enumerate(
            zip(arrays, row_of, factors, *buffers.values(), strict=True)
        )
    ]
    completed = np.array([steps], np.int64)
    sets = params.set_of if rule.by_segment else range(len(params.sets))
    carry = np.zeros((2, len(sets), len(rule.carry)))
    for row, of_set in enumerate(sets):
        carry[:, row] = rule.first_carry(values[of_set])
    if carried is not None:
        carry[:, : len(carried)] = carried
        if rule.measure is not None and not rule.by_segment:  # it is of all arrays
            carry[:, len(carried) :] = carried[0]
    written = [*arrays, *(a for made in buffers.values() for a in made)]
    step = module.bind(rule, segments, completed, carry)
    if hasattr(step, "watch"):
        step.watch(params.watch.ndarrays)
    bound = Bound(
        on=on,
        rule=rule,
        params=params,
        buffers=buffers,
        factors=factors,
        averages=averages,
        carry=carry,
        completed=completed,
        step=step,
        spans=checks.spans_of([*written, *(averages or ())]),
    )
    bound.start(values, since)
    return bound


def bind_alone(
    module: ModuleType,
    rule: Rule,
    arrays: Sequence[Array],
    row_of: Any = None,
    state: Sequence[Sequence[Array]] = (),
    completed: Array | None = None,
) -> Step:
    """The step of a rule over arrays of ours, with a row of scalars for all, or each
    with its own; its state buffers, for each an array for each of these; and where it
    is counted."""
    rows = [0] * len(arrays) if row_of is None else list(row_of)
    segments = [
        Segment(array, tuple(streams), row)
        for array, row, *streams in zip(arrays, rows, *state, strict=True)
    ]
    carry = np.zeros((2, max(rows, default=0) + 1, 0))
    count = np.zeros(1, np.int64) if completed is None else completed
    step: Step = module.bind(rule, segments, count, carry)
    return step
