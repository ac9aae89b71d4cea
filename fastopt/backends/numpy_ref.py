"""The reference backend: a rule applied to whole NumPy arrays. Slow and readable.

Every backend is a module with the same functions: ``bind`` takes segments and returns
the runner that does steps over them (see :class:`fastopt.step.Runner`); ``as_array``
and ``state_arena`` provide arrays and memory for state where it works; ``formats`` are
the names of those formats of :mod:`fastopt.memory.formats` that it has; ``scalars``
returns a rule's scalars, compiled if possible; ``gram`` multiplies the gradients of
several tasks; ``missing`` says why the backend cannot be used, if so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import setitem
from typing import Any

import numpy as np

from fastopt.language import NUMPY, Function, concrete
from fastopt.memory.arena import state_arena
from fastopt.memory.arrays import as_array
from fastopt.memory.factored import square_sums
from fastopt.memory.formats import FORMATS, INFINITY
from fastopt.memory.order import CHUNK, GROUP, LANES, SPAN
from fastopt.memory.segments import (
    Array,
    Encoded,
    Product,
    Segment,
    Stream,
    decoded,
    encoded,
)
from fastopt.portable import portable
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call, uninterrupted
from fastopt.step import PLAIN, Request, Row

__all__ = ["as_array", "bind", "formats", "gram", "missing", "scalars", "state_arena"]

formats = frozenset(FORMATS)


def missing() -> str | None:
    """Why this backend cannot be used, or None; this one always can."""
    return None


def scalars(rule: Rule) -> Any:
    """Return a rule's ``scalars``, compiled where the backend can compile them."""
    return portable(rule.scalars)


def rounded(numbers: Sequence[float], kind: Any) -> list[Any]:
    """Round numbers to a dtype, once. The product refuses what is no number, such as
    None, of which NumPy would make NaN."""
    return [kind(1.0 * number) for number in numbers]


def sum_in_order(terms: Array) -> float:
    """Sum up an array in the order that is promised."""
    flat = terms.astype(np.float64).reshape(-1)
    padded = np.zeros(-(-flat.size // CHUNK) * CHUNK)
    padded[: flat.size] = flat
    chunks = padded.reshape(-1, CHUNK // LANES, LANES)
    lanes = np.zeros((len(chunks), LANES))
    for k in range(CHUNK // LANES):
        lanes += chunks[:, k]
    return add_up(lanes)


def add_up(lanes: Array) -> float:
    """Add up the lanes of a segment's chunks."""
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return in_spans(lanes[:, 0].tolist())


def in_spans(chunks: Sequence[float]) -> float:
    """Add up the sums of a segment's chunks, first within spans of them."""
    total = 0.0
    for first in range(0, len(chunks), SPAN):
        span = 0.0
        for chunk in chunks[first : first + SPAN]:
            span += chunk
        total += span
    return total


def combined(grads: Sequence[Array | None], weights: Sequence[float]) -> Array | None:
    """Add up several tasks' gradients, times their weights, from zero on, in their
    order. Return None if no task has one. Tasks with weight 0 are left out."""
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
    """Return all pairs (i, j) of so many indices with j <= i."""
    return [(i, j) for i in range(count) for j in range(i + 1)]


def gram(tasks: Sequence[Sequence[Array | None]], threads: int) -> Array:
    """Sum up the products of every two tasks' gradients, over all segments."""
    products = np.zeros((len(tasks), len(tasks)))
    with np.errstate(all="ignore"):
        for i, j in pairs_of(len(tasks)):
            for a, b in zip(tasks[i], tasks[j], strict=True):
                if a is not None and b is not None:
                    products[i, j] += sum_in_order(a.astype(np.float64) * b)
            products[j, i] = products[i, j]
    return products


class Step:
    """The reference runner (see :class:`fastopt.step.Runner`)."""

    fuses: frozenset[str] = frozenset()

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
            "gradients": (element(passes.norm.measure), 0),
        }
        self.average = element(passes.average.update)
        self.clip = element(passes.clip.update)

    @standard
    def take(self, grads: list[Any], weights: Sequence[float] | None = None) -> bool:
        """Take the gradients for what follows: an array for each segment, or None to
        leave it alone. With weights, there is such a list for each task, and their
        weighted sum is taken. Return False if one needs a closer look; other backends
        may."""
        self.tasks: list[list[Any]] = [grads] if weights is None else grads
        tasks = [[numbers(grad) for grad in task] for task in self.tasks]
        self.grads: list[Any] = tasks[0]
        if weights is not None:
            self.grads = [combined(of, weights) for of in zip(*tasks, strict=True)]
        return True

    def grad(self, i: int, factor: float, request: Request) -> Array:
        """Return a segment's gradient as rules see it, scaled and clipped."""
        grad: Any = self.grads[i]
        grad = grad * self.type(factor)
        if request.limits_gradients:
            (grad,) = self.clip(grad, grad, *map(self.type, request.limits))
        return np.asarray(grad)

    def state_of(self, segment: Segment) -> list[Array]:
        """Return the state as rules see it."""
        state = []
        for stream in segment.state:
            if isinstance(stream, Product):
                product = stream.rows[:, :, None] * stream.columns[:, None, :]
                state.append(product.reshape(segment.param.shape))
            elif isinstance(stream, Encoded):
                state.append(stream.numbers())
            else:
                state.append(self.instead.get(id(stream), stream))
        return state

    @standard
    def squares(
        self, rows: Sequence[Row], request: Request
    ) -> list[tuple[Array, Array] | None]:
        found: list[tuple[Array, Array] | None] = []
        with np.errstate(all="ignore"):
            for i, segment in enumerate(self.segments):
                if not segment.is_factored or self.grads[i] is None:
                    found.append(None)
                    continue
                grad = self.grad(i, rows[segment.row][0], request)
                *_, height, width = grad.shape
                found.append(
                    square_sums(grad.reshape(-1, height, width)) if grad.size else None
                )
        return found

    @standard
    def sums(
        self, what: str, rows: Sequence[Row], request: Request
    ) -> list[tuple[float, ...] | None]:
        measure, taken = self.measures[what]
        sums: list[tuple[float, ...] | None] = []
        with np.errstate(all="ignore"):
            for i, segment in enumerate(self.segments):
                if self.grads[i] is None:
                    sums.append(None)
                    continue
                factor, *constants = rows[segment.row]
                grad = self.grad(i, factor, request)
                state = self.state_of(segment) if what == "rule" else ()
                used = rounded(constants[:taken], self.type)
                terms = measure(decoded(segment.param), grad, *state, *used)
                sums.append(tuple(map(sum_in_order, terms)))
        return sums

    @standard
    def calls(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> list[Call]:
        # An error in a rule is raised here, before anything is written.
        calls: list[Call] = []
        with np.errstate(all="ignore"):
            for i, segment in enumerate(self.segments):
                p = decoded(segment.param)
                if self.grads[i] is not None:
                    factor, *constants = rows[segment.row]
                    grad = self.grad(i, factor, request)
                    used = rounded(constants, self.type)
                    new = self.update(p, grad, *self.state_of(segment), *used)
                    streams = segment.param, *segment.state
                    step = steps[segment.row] if steps else 0
                    columns = 0, *range(2, 1 + len(new))
                    new = new[0], *held_together(segment.state, new[1:])
                    for c, stream, value in zip(columns, streams, new, strict=True):
                        calls += stored(stream, value, (segment.first, step, c))
                    p = new[0]
                    if segment.copy is not None:
                        calls += stored(segment.copy, p, (segment.first, 0, 0))
                if segment.average is not None:
                    weight = self.type(request.ema_weight)
                    (new,) = self.average(segment.average, p, weight)
                    calls.append(setting(segment.average, new))
                for task in self.tasks if request.zero_grads else ():
                    if task[i] is not None:
                        parts = parts_of(task[i])
                        calls += [setting(p, np.zeros_like(p)) for p in parts]
        return [*calls, partial(setitem, self.count, 0, self.count[0] + 1)]

    def __call__(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> bool:
        """Do the step. Return True, as a compiled step does."""
        uninterrupted(*self.calls(rows, request, steps))
        return True


def parts_of(stream: Array | Encoded) -> tuple[Array, ...]:
    """Return the arrays in memory that a stream consists of."""
    return stream.parts if isinstance(stream, Encoded) else (stream,)


def numbers(grad: Array | Encoded | None) -> Array | None:
    """Return a gradient in the dtype that kernels compute in."""
    return grad if grad is None else decoded(encoded(grad))


def setting(to: Array, value: Array) -> Call:
    """Return a call that sets an array to a copy of a value. A rule may return an array
    that another call writes to."""
    return partial(setitem, to, ..., np.array(value))


def stored(stream: Stream, value: Array, draw: tuple[int, int, int]) -> list[Call]:
    """Return the calls that give a stream a new value."""
    if isinstance(stream, Product):
        return []
    if not isinstance(stream, Encoded):
        return [setting(stream, value)]
    words = stream.format.written(value, draw, stream.parts)
    if stream.format.scale is None:
        return list(map(setting, stream.parts, words))
    # Several streams may have the same counter, so it is added to.
    *parts, counter = stream.parts
    adding = partial(np.add, counter, words[-1], counter)
    return [*map(setting, parts, words[:-1]), adding]


def held_together(state: Sequence[Stream], new: Sequence[Array]) -> Sequence[Array]:
    """If a group of one stream with scales is not finite, and so will not be stored,
    let those of the others be neither: a new average without the other would make a
    step of any length."""
    formats = [s.format if isinstance(s, Encoded) else None for s in state]
    scaled = [format is not None and format.scale is not None for format in formats]
    if sum(scaled) < 2:
        return new
    bad: Any = False
    for value, format in zip(new, formats, strict=True):
        if format is not None and format.scale is not None:
            bad = bad | (format.tops(np.asarray(value)) >= INFINITY)
    if not np.any(bad):
        return new
    held = []
    for value, is_scaled in zip(new, scaled, strict=True):
        value = np.array(value)
        if is_scaled:
            value.reshape(-1)[np.flatnonzero(bad) * GROUP] = np.inf
        held.append(value)
    return held


def evaluate(
    rule: Rule, buffers: Sequence[Array], scalars: Sequence[float], dtype: np.dtype[Any]
) -> Array:
    """Compute what a rule uses in place of its parameters for an evaluation, from the
    parameters and the state."""
    function: Any = rule.evaluate
    element = concrete(function, dtype, NUMPY, lambda helper: helper)
    count = element.__code__.co_argcount - len(buffers)
    numbers = rounded(scalars[:count], dtype.type)
    with np.errstate(all="ignore"):
        return np.array(element(*buffers, *numbers))


def written(calls: Sequence[Call]) -> dict[int, Any]:
    """Return what such calls are known to write into arrays, by the arrays' ids."""
    return {
        id(call.args[0]): call.args[2]
        for call in calls
        if isinstance(call, partial) and call.func is setitem
    }


def bind(rule: Rule, segments: Sequence[Segment], count: Array, carry: Array) -> Step:
    """Return the runner of steps over these segments. It counts completed steps in
    ``count``. ``carry`` has two sets of a rule's numbers, used in turn; the first is
    valid at even counts."""
    return Step(rule, segments, count)
