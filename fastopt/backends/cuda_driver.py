"""The CUDA backend: memory on a GPU, and a kernel launch for each segment.

The kernels are those of ``cuda_kernels``. Sums of chunks are added up on the host.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.backends import BY_NUMBA
from fastopt.backends.cuda_accesses import (
    SIMULATED,
    VECTOR_BYTES,
    NumbaPerformanceWarning,
    cuda,
    is_cuda_ndarray,
    not_installed,
    nvvm,
)
from fastopt.backends.cuda_kernels import (
    NOTHING,
    Beside,
    check,
    kernel,
    lanes_kernel,
    product_kernel,
    sums_kernel,
    threads_for,
    tiles_kernel,
)
from fastopt.backends.cuda_streams import Formats, draws
from fastopt.backends.numpy_ref import Step, pairs_of, parts_of, scalars
from fastopt.memory.arrays import on_device
from fastopt.memory.factored import in_order
from fastopt.memory.formats import FORMATS
from fastopt.memory.order import CHUNK, LANES, TILE_COLUMNS, TILE_ROWS
from fastopt.memory.segments import Array, Encoded, Product, Segment, encoded
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.runtime.atomic import Call
from fastopt.step import PLAIN, Request, Row

__all__ = [
    "as_array",
    "bind",
    "formats",
    "gram",
    "missing",
    "scalars",
    "state_arena",
]

formats = frozenset(FORMATS)

BLOCK = 256
ROOM = 1 << 22  # elements, of what is factored, that are there at a time
ALIGNMENT = 256  # of each segment's state, as of what cudaMalloc returns


def replace(p: Any, g: Any) -> tuple[Any]:
    return (g,)


COPY = Rule(replace, passes.none)

HOW_TO_GET = BY_NUMBA["cuda"]


def missing() -> str | None:
    """Why this backend cannot be used and how to get it, or None."""
    if not_installed:
        return f"numba-cuda cannot be imported ({not_installed}); {HOW_TO_GET}"
    if cuda.is_available():
        return None
    if not nvvm.is_available():
        return f"CUDA's compiler library libNVVM was not found; {HOW_TO_GET}"
    return "no NVIDIA GPU with a working driver was found; nvidia-smi should list one"


def as_array(name: str, value: Any) -> Any:
    """``value`` itself or a view of its memory, as a device array."""
    if not on_device(value):
        raise TypeError(
            f"{name} is a {type(value).__name__} in host memory, but backend 'cuda' "
            f"needs device arrays; copy it with numba.cuda.to_device"
        )
    if is_cuda_ndarray(value):
        return value
    array, dtype = cuda.as_cuda_array(value), getattr(value, "dtype", None)
    # The interface has no name for bfloat16.
    renamed = isinstance(dtype, np.dtype) and dtype != array.dtype
    return array.view(dtype) if renamed else array


def state_arena(params: Sequence[Any], streams: int) -> list[tuple[Any, ...]]:
    """Zeroed state for these parameters: for each, ``streams`` flat arrays.

    Each stream is one allocation for all parameters, in which all of them are aligned.
    """
    word = np.dtype(np.float64)
    unit = ALIGNMENT // word.itemsize
    counts = [-(-param.size * param.dtype.itemsize // ALIGNMENT) for param in params]
    ends = np.cumsum([unit * max(count, 1) for count in counts]).tolist()
    arenas = [cuda.device_array(ends[-1], word) for _ in range(streams)]
    for arena in arenas:
        arena[:] = 0
    return [
        tuple(arena[start:end].view(param.dtype)[: param.size] for arena in arenas)
        for start, end, param in zip([0, *ends], ends, params, strict=False)
    ]


def gram(tasks: Sequence[Sequence[Any]], threads: int) -> Array:
    """Do what :func:`numpy_ref.gram` does, pair by pair."""
    products = np.zeros((len(tasks), len(tasks)))
    for i, j in pairs_of(len(tasks)):
        pairs = [
            (a, b)
            for a, b in zip(tasks[i], tasks[j], strict=True)
            if a is not None and b is not None
        ]
        if pairs:
            segments = [Segment(a, (), 0) for a, _ in pairs]
            step = OnDevice(passes.inner, segments, np.zeros(1, np.int64))
            step.take([b for _, b in pairs])
            for found in step.sums("rule", [(1.0,)], PLAIN):
                products[i, j] += found[0] if found else 0.0
        products[j, i] = products[i, j]
    return products


@functools.cache
def compiled(make: Callable[..., Any], *of: Any) -> Any:
    """Compile what ``make``, such as ``kernel``, returns, for this GPU."""
    function, signature = make(*of)
    dispatcher = cuda.jit(signature, lto=False)(function)  # a late link would fuse
    if make not in (lanes_kernel, product_kernel):  # those only add, or multiply
        single = make is kernel and of[2] == np.float32
        check(dispatcher.inspect_asm(signature.args), single)
    return dispatcher


@functools.cache
def launcher(blocks: int, make: Callable[..., Any], *of: Any) -> Any:
    """Return a kernel with its grid. Call it with the kernel's arguments."""
    if SIMULATED:  # where one kernel has only one grid at a time
        return cuda.jit(make(*of)[0])[blocks, BLOCK]
    with warnings.catch_warnings():  # numba says that a small grid leaves the GPU idle
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        return compiled(make, *of)[blocks, BLOCK]


def stretch(stream: Any, start: int = 0, end: int | None = None) -> Any:
    """Return a part of a stream as one without dimensions. It has no scales, because
    neither gradients have nor what is kept beside factored state."""
    if isinstance(stream, Encoded):
        parts = (stretch(part, start, end) for part in stream.parts)
        return Encoded(stream.format, tuple(parts))
    flat = stream.reshape(-1)
    return flat if start == 0 and end is None else flat[start:end]


def address(array: Any) -> int:
    """Return the address at which a device array begins."""
    if SIMULATED:
        return int(array.ctypes.data)
    return int(array.__cuda_array_interface__["data"][0])


def operand(array: Any) -> Any:
    """Return what a kernel takes for a device array: its address, which numba passes on
    fastest."""
    return array.reshape(-1) if SIMULATED else address(array)


def vectors_of(stream: Any) -> tuple[Any, ...]:
    """Return the parts of a stream that have an element for each of its own."""
    parts = parts_of(stream)
    scaled = isinstance(stream, Encoded) and stream.format.scale is not None
    return parts[:1] if scaled else parts


def operands(*streams: Any) -> tuple[Any, ...]:
    """Return what a kernel takes for streams: all of their parts."""
    return tuple(operand(part) for stream in streams for part in parts_of(stream))


def formats_of(streams: Sequence[Any]) -> Formats:
    return tuple(s.format if isinstance(s, Encoded) else None for s in streams)


def offset(*streams: Any) -> int:
    """Return a multiple of VECTOR_BYTES if all streams begin with a whole vector. The
    vector of a part with fewer bits has fewer bytes."""
    found = 0
    for stream in streams:
        for part in vectors_of(stream):
            shrunk: int = stream.dtype.itemsize // part.dtype.itemsize
            found |= shrunk * address(part)
    return found


class Buffers(NamedTuple):
    """What a kernel takes besides the gradient."""

    operands: tuple[Any, ...]
    offset: int
    formats: Formats


def buffers_of(streams: Sequence[Any]) -> Buffers:
    return Buffers(operands(*streams), offset(*streams), formats_of(streams))


def bind(rule: Rule, segments: Sequence[Segment], count: Array, carry: Array) -> Step:
    """Do what :func:`numpy_ref.bind` does, with device arrays. The kernels are enqueued
    on numba's default stream; ``threads`` has no effect."""
    if any(segment.copy is not None for segment in segments):
        raise ValueError("backend 'cuda' writes no copies: leave copy_to out")
    return OnDevice(rule, segments, count)


class OnDevice(Step):
    def __init__(self, rule: Rule, segments: Sequence[Segment], count: Array):
        self.rule, self.segments, self.count = rule, segments, count
        self.dtype = segments[0].param.dtype
        self.buffers: list[Buffers] = []
        for segment in segments:
            average = () if segment.average is None else (segment.average,)
            streams = (segment.param, *segment.state, *average)
            arrays = [s for s in streams if not isinstance(s, Product)]
            self.buffers.append(buffers_of(arrays))
        most = max((s.param.size for s in segments if s.is_factored), default=0)
        self.room: Any = cuda.device_array(min(most, ROOM), self.dtype) if most else ()
        self.made: list[Any] = []  # where the gradients of several tasks are combined

    def take(self, grads: list[Any], weights: Sequence[float] | None = None) -> bool:
        self.tasks = [
            [None if grad is None else encoded(grad) for grad in task]
            for task in ([grads] if weights is None else grads)
        ]
        self.grads = self.tasks[0]
        if weights is not None:
            self.grads = self.combined(self.tasks, weights)
        return True

    def combined(self, tasks: list[list[Any]], weights: Sequence[float]) -> list[Any]:
        """Combine the tasks' gradients of every segment, as the reference does."""
        params = [segment.param for segment in self.segments]
        if not self.made:
            self.made = [made for (made,) in state_arena(params, 1)]
        for made in self.made:
            made[:] = 0
        segments = [Segment(made, (), 0) for made in self.made]
        step = OnDevice(passes.accumulate, segments, np.zeros(1, np.int64))
        for task, weight in zip(tasks, weights, strict=True):
            if self.dtype.type(weight) != 0:
                step.take([None if g is None else stretch(g) for g in task])
                step([(weight,)])
        given = [any(g is not None for g in of) for of in zip(*tasks, strict=True)]
        return [
            made.reshape(param.shape) if there else None
            for made, param, there in zip(self.made, params, given, strict=True)
        ]

    def blocks(
        self, segment: Segment, *others: Any
    ) -> Iterator[tuple[list[tuple[Any, ...]], list[Any]]]:
        """Cut a segment, and other arrays of its size, into parts for whose factored
        state there is room. Yield the launches that make it, and the parts."""
        for start in range(0, segment.param.size, ROOM):
            size = min(ROOM, segment.param.size - start)
            launches: list[tuple[Any, ...]] = []
            parts = []
            for stream in (segment.param, *segment.state, *others):
                if isinstance(stream, Product):
                    launch = launcher(-(-size // BLOCK), product_kernel, self.dtype)
                    shape = [part.shape[1] for part in stream]
                    factors = operands(*stream, self.room)
                    launches.append((launch, size, start, *shape, *factors))
                    parts.append(self.room[:size])
                else:
                    parts.append(stretch(stream, start, start + size))
            yield launches, parts

    def squares(
        self, rows: Sequence[Row], request: Request
    ) -> list[tuple[Array, Array] | None]:
        limits = limits_of(request)
        return [
            None
            if not segment.is_factored or grad is None or not grad.size
            else square_sums(grad, (rows[segment.row][0], *limits), self.dtype)
            for segment, grad in zip(self.segments, self.grads, strict=True)
        ]

    def sums(
        self, what: str, rows: Sequence[Row], request: Request
    ) -> list[tuple[float, ...] | None]:
        rule = self.rule if what == "rule" else passes.norm
        sizes = [
            0 if grad is None else segment.param.size
            for segment, grad in zip(self.segments, self.grads, strict=True)
        ]
        chunks = [-(-size // CHUNK) for size in sizes]
        terms, total = rule.terms, sum(chunks)
        limits = limits_of(request)
        if not total:
            found: Array = np.zeros(0)
        else:
            lanes = cuda.device_array(total * terms * LANES, np.float64)
            begin = 0

            def launch(segment: Segment, arrays: Sequence[Any], grad: Any) -> None:
                nonlocal begin
                here = -(-grad.size // CHUNK) * LANES
                scalars = (*rows[segment.row][: 1 + rule.measure_count], *limits)
                of = rule.measure, len(arrays) - 1, self.dtype, terms, bool(limits)
                stored = formats_of([grad, *arrays])
                launcher(-(-here // BLOCK), sums_kernel, *of, stored)(
                    grad.size,
                    operands(grad),
                    operands(*arrays),
                    scalars,
                    operand(lanes[begin:]),
                )
                begin += here * terms

            for segment, grad, size in zip(
                self.segments, self.grads, sizes, strict=True
            ):
                if size and what == "rule" and segment.is_factored:
                    for before, (*arrays, g) in self.blocks(segment, grad):
                        for make, *arguments in before:
                            make(*arguments)
                        launch(segment, arrays, g)
                elif size:
                    state = segment.state if what == "rule" else ()
                    launch(segment, (segment.param, *state), grad)
            sums = cuda.device_array(total * terms, np.float64)
            launch_lanes(lanes, sums)
            found = sums.copy_to_host()
        by_chunk = iter(found.reshape(-1, terms).tolist())
        results: list[tuple[float, ...] | None] = []
        for grad, here in zip(self.grads, chunks, strict=True):
            totals = [0.0] * terms
            for _ in range(here):
                totals = [a + b for a, b in zip(totals, next(by_chunk), strict=True)]
            results.append(None if grad is None else tuple(totals))
        return results

    def calls(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> list[Call]:
        # Launches are Python code of Numba's, so an interrupt may come between them.
        return [functools.partial(self, rows, request, steps)]

    def __call__(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> bool:
        limits = limits_of(request)
        clip = bool(limits)
        launches: list[tuple[Any, ...]] = []
        # Complete before the first, so that no error leaves half a step.

        def add(
            rule: Rule,
            beside: Beside,
            grad: Any,
            buffers: Buffers,
            scalars: Any,
            draw: tuple[int, ...] = (),
        ) -> None:
            size = grad.size
            aligned = (buffers.offset | offset(grad)) % VECTOR_BYTES == 0
            width = VECTOR_BYTES // self.dtype.itemsize if aligned else 1
            formats = *formats_of([grad]), *buffers.formats
            blocks = -(-threads_for(size, width, formats) // BLOCK)
            of = rule.update, len(rule.state), self.dtype, width, beside, formats
            launch = launcher(blocks, kernel, *of)
            if not draws(formats):
                draw = ()
            start = operands(grad), buffers.operands
            launches.append((launch, size, *start, scalars, draw))

        for segment, grad, buffers in zip(
            self.segments, self.grads, self.buffers, strict=True
        ):
            averaged = segment.average is not None
            weight = (request.ema_weight,) if averaged else ()
            beside = Beside(clip, averaged, request.zero_grads)
            scalars = (*rows[segment.row], *limits, *weight)
            draw = segment.first, steps[segment.row] if steps else 0
            if not segment.param.size:
                continue
            if grad is None:
                if averaged:  # then only the average moves
                    last = buffers_of([segment.average])
                    add(passes.average, NOTHING, segment.param, last, (1.0, *weight))
            elif not segment.is_factored:
                add(self.rule, beside, grad, buffers, scalars, draw)
            else:
                average = (segment.average,) if averaged else ()
                for before, (*arrays, g) in self.blocks(segment, *average, grad):
                    launches += before
                    add(self.rule, beside, g, buffers_of(arrays), scalars, draw)
                    draw = draw[0] + g.size, draw[1]
        for launch, *arguments in launches:
            launch(*arguments)
        if request.zero_grads and self.tasks[0] is not self.grads:
            for task in self.tasks:
                for grad in task:
                    if grad is not None:
                        for part in parts_of(grad):
                            part.reshape(-1)[:] = 0
        self.count[0] += 1
        return True


def filling(array: Any, value: Any) -> Call:
    """Return a call that writes a number, or as many numbers as there are, into a
    device array, where one of the two has a dtype of 16 bits. Numba's own assignment
    would compile C++ for bfloat16."""
    array = as_array("an array", array)
    if isinstance(value, float):
        value = np.full(1, value, array.dtype)
    if value.dtype == array.dtype:  # the words are copied
        words, new = (parts_of(encoded(each))[0].reshape(-1) for each in (array, value))
        return functools.partial(operator.setitem, words, slice(None), new)
    value = value if on_device(value) else cuda.to_device(value)
    segment = Segment(encoded(array), (), 0)
    step = OnDevice(COPY, [segment], np.zeros(1, np.int64))
    step.take([as_array("values", value)])
    return functools.partial(step, [(1.0,)])


def limits_of(request: Request) -> tuple[float, ...]:
    """Return what kernels take to clip each element; nothing if they are not to."""
    return request.limits if request.limits_gradients else ()


def launch_lanes(lanes: Any, sums: Any) -> None:
    """Add up the lanes of each sum."""
    launch = launcher(-(-sums.size // BLOCK), lanes_kernel)
    launch(sums.size, operand(lanes), operand(sums))


def square_sums(
    grad: Any, scalars: tuple[float, ...], dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """Do what :func:`fastopt.memory.factored.square_sums` does, with a device array."""
    *_, height, width = grad.shape
    flat, (format,) = stretch(grad), formats_of([grad])
    matrices, clip = flat.size // (height * width), len(scalars) > 1
    across, down = -(-width // TILE_COLUMNS), -(-height // TILE_ROWS)

    def launch(
        by_column: bool, matrices: int, height: int, given: Any, to: Any
    ) -> None:
        of = by_column, clip, dtype, format
        call = launcher(-(-to.size // BLOCK), tiles_kernel, *of)
        start = operands(given)
        call(matrices, height, width, start, start, scalars, operand(to))

    columns = cuda.device_array(down * matrices * width, np.float64)
    launch(True, matrices, height, flat, columns)
    count = matrices * height
    rows = cuda.device_array(count * across, np.float64)
    most = max(1, ROOM // (across * LANES))  # rows at a time
    for row in range(0, count, most):
        sums = rows[row * across : (row + most) * across]
        lanes = cuda.device_array(sums.size * LANES, np.float64)
        launch(False, 1, sums.size // across, stretch(flat, row * width), lanes)
        launch_lanes(lanes, sums)
    by_row = rows.copy_to_host().reshape(matrices, height, across)
    by_column = columns.copy_to_host().reshape(down, matrices, width)
    return in_order(np.moveaxis(by_row, 2, 0)), in_order(by_column)
