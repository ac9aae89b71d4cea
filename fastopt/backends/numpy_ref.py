"""The reference backend: a rule applied to whole NumPy arrays. Slow and readable.

Every backend is a module with the same names: ``bind`` is given the segments once and
returns what does steps over them, with the methods of ``Step`` here; ``as_array`` and
``state_arena`` give it arrays and room for state where it works; ``gram`` multiplies
the gradients of several tasks; ``missing`` says why the backend cannot be used here, if
it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import setitem
from typing import Any, NamedTuple

import numpy as np

from fastopt.language import PRIMITIVES, Function, concrete
from fastopt.memory.arena import state_arena
from fastopt.memory.arrays import as_array
from fastopt.memory.factored import square_sums
from fastopt.memory.order import CHUNK, LANES
from fastopt.memory.segments import Array, Segment
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call, uninterrupted

__all__ = ["as_array", "bind", "gram", "missing", "state_arena"]

NUMPY = {primitive.__name__: primitive for primitive in PRIMITIVES}


class Extras(NamedTuple):
    """What a step does beside the update."""

    clip_value: float = math.inf  # for the scaled gradients
    ema_weight: float = 0.0  # of the new parameters in their average; 0: none is kept
    zero_grads: bool = False


PLAIN = Extras()


def missing() -> str | None:
    """Why this backend cannot be used, or None; this one always can."""
    return None


def sum_in_order(terms: Array) -> float:
    """The sum of an array in the order that is promised."""
    flat = terms.astype(np.float64).reshape(-1)
    padded = np.zeros(-(-flat.size // CHUNK) * CHUNK)
    padded[: flat.size] = flat
    chunks = padded.reshape(-1, CHUNK // LANES, LANES)
    lanes = np.zeros((len(chunks), LANES))
    for k in range(CHUNK // LANES):
        lanes += chunks[:, k]
    return add_up(lanes)


def add_up(lanes: Array) -> float:
    """The sum of the lanes of a segment's chunks."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    total = 0.0
    for chunk in lanes[:, 0].tolist():
        total += chunk
    return total


def combined(grads: Sequence[Array | None], weights: Sequence[float]) -> Array | None:
    """The sum of several tasks' gradients, times their weights, from zero on, in their
    order; None if no task has one. What has no weight is left out."""
    given = [
        (grad, grad.dtype.type(weight))
        for grad, weight in zip(grads, weights, strict=True)
        if grad is not None
    ]
    if not given:
        return None
    total: Any = np.zeros_like(given[0][0])
    with np.errstate(all="ignore"):
        for grad, weight in given:
            if weight != 0:
                total = total + grad * weight
    return np.asarray(total)


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Every two of so many, each with itself too."""
    return [(i, j) for i in range(count) for j in range(i + 1)]


def gram(tasks: Sequence[Sequence[Array | None]], threads: int) -> Array:
    """The sums of the products of every two tasks' gradients, over all segments."""
    products = np.zeros((len(tasks), len(tasks)))
    with np.errstate(all="ignore"):
        for i, j in pairs_of(len(tasks)):
            for a, b in zip(tasks[i], tasks[j], strict=True):
                if a is not None and b is not None:
                    products[i, j] += sum_in_order(a.astype(np.float64) * b)
            products[j, i] = products[i, j]
    return products


class Step:
    """Steps over fixed segments."""

    def __init__(self, rule: Rule, segments: Sequence[Segment], count: Array):
        dtype = segments[0].param.dtype

        def element(function: Function | None) -> Any:
            # Numbers that a rule reaches by name take the dtype, as on other backends.
            return function and concrete(function, dtype, NUMPY, lambda helper: helper)

        self.segments, self.count, self.type = segments, count, dtype.type
        # Arrays to read in place of buffers, by these buffers' identities.
        self.instead: dict[int, Array] = {}
        self.update = element(rule.update)
        self.measures = {
            "rule": (element(rule.measure), rule.measure_count),
            "gradients": (element(passes.accumulate.measure), 0),
        }
        self.average = element(passes.average.update)
        self.clip = element(passes.clip.update)

    @standard
    def take(self, grads: list[Any], weights: Sequence[float] | None = None) -> bool:
        """The gradients for what follows, one array a segment; None: leave it alone.
        With weights such a list for each task, whose weighted sum is what follows sees.
        False if one needs a closer look: a backend may make its own checks."""
        self.tasks: list[list[Any]] = [grads] if weights is None else grads
        self.grads: list[Any] = grads
        if weights is not None:
            self.grads = [combined(of, weights) for of in zip(*grads, strict=True)]
        return True

    def grad(self, i: int, factor: float, limit: float) -> Array:
        """A segment's gradient as rules see it: scaled and clipped."""
        grad: Any = self.grads[i]
        grad = grad * self.type(factor)
        if limit < math.inf:
            grad = self.clip(grad, grad, self.type(-limit), self.type(limit))
        return np.asarray(grad)

    def state_of(self, segment: Segment) -> tuple[Array, ...]:
        """The state buffers, or what stands for them."""
        if segment.product is None:
            return tuple(self.instead.get(id(a), a) for a in segment.state)
        rows, columns = segment.product
        product = rows[:, :, None] * columns[:, None, :]
        return (product.reshape(segment.param.shape),)

    @standard
    def squares(
        self,
        rows: list[tuple[float, ...]],
        threads: int,
        clip_value: float = math.inf,
    ) -> list[tuple[Array, Array] | None]:
        """For each segment whose state is factored, the sums of the squares of its
        gradient by row and by column, matrix by matrix; None where there are none."""
        found: list[tuple[Array, Array] | None] = []
        with np.errstate(all="ignore"):
            for i, segment in enumerate(self.segments):
                if segment.product is None or self.grads[i] is None:
                    found.append(None)
                    continue
                grad = self.grad(i, rows[segment.row][0], clip_value)
                *_, height, width = grad.shape
                found.append(
                    square_sums(grad.reshape(-1, height, width)) if grad.size else None
                )
        return found

    @standard
    def sums(
        self,
        what: str,
        rows: list[tuple[float, ...]],
        threads: int,
        clip_value: float = math.inf,
    ) -> list[tuple[float, ...] | None]:
        """For each segment, the sums of what the rule measures, or, of the
        "gradients", what their norm is made of. None where there is no gradient."""
        measure, taken = self.measures[what]
        sums: list[tuple[float, ...] | None] = []
        with np.errstate(all="ignore"):
            for i, segment in enumerate(self.segments):
                if self.grads[i] is None:
                    sums.append(None)
                    continue
                factor, *constants = rows[segment.row]
                grad = self.grad(i, factor, clip_value)
                state = self.state_of(segment) if what == "rule" else ()
                used = map(self.type, constants[:taken])
                terms = measure(segment.param, grad, *state, *used)
                sums.append(tuple(map(sum_in_order, terms)))
        return sums

    @standard
    def calls(
        self, rows: list[tuple[float, ...]], threads: int, extras: Extras = PLAIN
    ) -> list[Call]:
        """What is left of a step once all its results are known: calls that write them.
        An error in a rule comes before, and an interrupt before or after them all."""
        results: list[tuple[Array, Array]] = []
        with np.errstate(all="ignore"):
            for i, segment in enumerate(self.segments):
                p = segment.param
                if self.grads[i] is not None:
                    factor, *constants = rows[segment.row]
                    grad = self.grad(i, factor, extras.clip_value)
                    used = map(self.type, constants)
                    new = self.update(p, grad, *self.state_of(segment), *used)
                    written = (p, *segment.state) if segment.product is None else (p,)
                    results += zip(written, new, strict=False)
                    p = new[0]
                if segment.average is not None:
                    weight = self.type(extras.ema_weight)
                    (new,) = self.average(segment.average, p, weight)
                    results.append((segment.average, new))
                for task in self.tasks if extras.zero_grads else ():
                    if task[i] is not None:
                        results.append((task[i], np.zeros_like(task[i])))
        # Copies, as a rule may return an array that another of these calls writes to.
        return [
            *(partial(setitem, to, ..., np.array(value)) for to, value in results),
            partial(setitem, self.count, 0, self.count[0] + 1),
        ]

    def __call__(
        self, rows: list[tuple[float, ...]], threads: int, extras: Extras = PLAIN
    ) -> bool:
        """Do the step: the update with a row of scalars, of which the first is the
        factor for the gradients; ``count``, an int64 array of one element, is raised.
        True."""
        uninterrupted(*self.calls(rows, threads, extras))
        return True


def calls_of(
    step: Step, rows: list[tuple[float, ...]], threads: int, extras: Extras = PLAIN
) -> list[Call]:
    """A step as calls for :func:`uninterrupted`. A compiled step is one
    such call."""
    if isinstance(step, Step):
        return step.calls(rows, threads, extras)
    return [partial(step, rows, threads, extras)]


def written(calls: Sequence[Call]) -> dict[int, Any]:
    """What such calls are known to write into arrays, by the arrays' identities."""
    return {
        id(call.args[0]): call.args[2]
        for call in calls
        if isinstance(call, partial) and call.func is setitem
    }


def bind(rule: Rule, segments: Sequence[Segment], count: Array, carry: Array) -> Step:
    """What does steps over these segments. ``count`` is where the completed steps are
    counted; of ``carry``, a rule's two sets in turn, one holds at even counts."""
    return Step(rule, segments, count)
