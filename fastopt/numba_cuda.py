"""The CUDA backend: a rule compiled by numba-cuda, one kernel launch per segment.

A thread moves 16 bytes of every stream: it loads a vector of the gradient, of the
parameter and of each state buffer, runs ``update`` on the lanes and stores the vectors.
What a step does beside the rule is in the same kernel. Sums take a thread for each lane
of each chunk, one more to add the lanes up, and the host for the chunks.
Buffers that do not start on 16 bytes go through the same kernel one element at a time.
Nothing is contracted or approximated, so the bits are the reference's. Under
NUMBA_ENABLE_CUDASIM=1 all but the vector instructions runs in numba's simulator.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import config

from fastopt import llvm_ir, passes
from fastopt import rule as rules
from fastopt.atomic import Call
from fastopt.checks import on_device
from fastopt.factored import TILE_COLUMNS, TILE_ROWS, in_order
from fastopt.flat import Array, Product, Segment
from fastopt.numpy_ref import CHUNK, LANES, PLAIN, Extras, Step, pairs_of
from fastopt.rule import Rule, concrete

try:
    import numba_cuda  # noqa: F401  (without it, numba.cuda is an older thing)
    from numba import cuda
    from numba.cuda import cgutils, types
    from numba.cuda.core.errors import NumbaPerformanceWarning
    from numba.cuda.cudadrv import nvvm
    from numba.cuda.cudadrv.devicearray import is_cuda_ndarray
    from numba.cuda.extending import intrinsic
except ImportError as error:
    not_installed = str(error)
else:
    not_installed = ""

SIMULATED = bool(config.ENABLE_CUDASIM)
VECTOR_BYTES = 16
BLOCK = 256
ROOM = 1 << 22  # elements, of what is factored, that are there at a time
ALIGNMENT = 256  # of each segment's state, as of what cudaMalloc returns

HOW_TO_GET = (
    "pip install '.[cuda13]' in fastopt's folder (or '.[cuda12]' for an older driver)"
)


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
    return value if is_cuda_ndarray(value) else cuda.as_cuda_array(value)


def state_arena(params: Sequence[Any], streams: int) -> list[tuple[Any, ...]]:
    """Zeroed state for these parameters: for each, ``streams`` flat arrays.

    Each stream is one allocation for all parameters, in which all of them are aligned.
    """
    dtype, sizes = params[0].dtype, [param.size for param in params]
    unit = ALIGNMENT // dtype.itemsize
    ends = np.cumsum([-(-size // unit) * unit for size in sizes]).tolist()
    starts = [0, *ends]
    arenas = [cuda.device_array(max(starts[-1], unit), dtype) for _ in range(streams)]
    for arena in arenas:
        arena[:] = 0
    return [
        tuple(arena[start : start + size] for arena in arenas)
        for start, size in zip(starts, sizes, strict=False)
    ]


def gram(tasks: Sequence[Sequence[Any]], threads: int) -> Array:
    """As :func:`fastopt.numpy_ref.gram`, pair by pair."""
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
            for found in step.sums("rule", [(1.0,)], threads):
                products[i, j] += found[0] if found else 0.0
        products[j, i] = products[i, j]
    return products


def inlined(function: Any) -> Any:
    """A function that kernels may call: inlined, for a call would be compiled on its
    own, which numba-cuda does not do without a GPU."""
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


def primitives(dtype: type[np.floating[Any]]) -> dict[str, Callable[..., Any]]:
    """The primitives of `fastopt.rule` for one element, with constants of its dtype."""
    zero, one = dtype(0), dtype(1)
    library: Any = np if SIMULATED else math  # math's are float64 outside of kernels
    sqrt, copysign = library.sqrt, library.copysign

    def where(condition: Any, a: Any, b: Any) -> Any:
        return a if condition else b

    def maximum(a: Any, b: Any) -> Any:
        return a if a > b or a != a else b

    def minimum(a: Any, b: Any) -> Any:
        return a if a < b or a != a else b

    def sign(x: Any) -> Any:
        return copysign(one, x) if x > zero or x < zero else x

    ours = {f.__name__: inlined(f) for f in (where, maximum, minimum, sign)}
    ours |= {"sqrt": sqrt, "copysign": copysign}
    if SIMULATED:
        return {**ours, "wide": np.float64, "cbrt": rules.cbrt}
    return {**ours, "wide": intrinsic(widened), "cbrt": intrinsic(cube_root)}


def widened(context: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], signature.args[0], types.float64)

    return types.float64(x), generate


def cube_root(context: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        dtype = np.dtype(str(signature.args[0]))
        return llvm_ir.cbrt(builder, arguments[0], dtype)

    return x(x), generate


class Beside(NamedTuple):
    """What a kernel does beside the update."""

    clip: bool = False  # with two scalars more: low and high
    average: bool = False  # with a buffer more, and its weight
    zero: bool = False


NOTHING = Beside()


class Elements(NamedTuple):
    """The functions of one element that kernels are made of."""

    update: Any  # or a measure
    clip: Any
    average: Any


def elements(function: Any, dtype: np.dtype[Any]) -> Elements:
    of = function, passes.clip.update, passes.average.update
    return Elements(*(concrete(f, dtype, primitives(dtype.type), inlined) for f in of))


def unfused(context: Any) -> None:
    """Products and sums are not to be fused in the kernel that is being generated. No
    public switch says so; `check` sees to it that this one works."""
    library = context.active_code_library
    getattr(library, "_nvvm_options", {})["fma"] = False


def parts(builder: Any, array: Any) -> list[Any]:
    return [builder.extract_value(array, k) for k in range(len(array.type))]


def caller(context: Any, builder: Any, real: Any) -> Callable[..., list[Any]]:
    """What generates a call of an element's function with arguments of type ``real``,
    which returns so many results."""

    def call(
        function: Any, arguments: list[Any], results: int, kind: Any = real
    ) -> list[Any]:
        signature = types.UniTuple(kind, results)(*[real] * len(arguments))
        element = context.compile_subroutine(
            builder, function, signature, caching=False
        )
        result = context.call_internal(builder, element.fndesc, signature, arguments)
        return parts(builder, result)

    return call


def vector_update(
    of: Elements, beside: Beside, dtype: np.dtype[Any], width: int
) -> Any:
    """A function (i, grad, buffers, scalars) that updates ``width`` elements from i on.

    In a kernel it is an intrinsic, because only LLVM's vectors become 16-byte loads and
    stores, and because it can be written once for any number of buffers.
    """

    def split(scalars: list[Any]) -> tuple[Any, list[Any], list[Any], list[Any]]:
        """The factor, the constants, those of clipping and those of the average."""
        factor, *rest = scalars
        weight = [rest.pop()] if beside.average else []
        limits = rest[-2:] if beside.clip else []
        return factor, rest[: len(rest) - len(limits)], limits, weight

    def simulated(i: int, grad: Any, buffers: Any, scalars: Any) -> None:
        with np.errstate(all="ignore"):
            factor, constants, limits, weight = split(list(map(dtype.type, scalars)))
            for j in range(i, i + width):
                p, *state = (buffer[j] for buffer in buffers)
                average = [state.pop()] if beside.average else []
                g = grad[j] * factor
                if beside.clip:
                    (g,) = of.clip(g, g, *limits)
                new = list(of.update(p, g, *state, *constants))
                if beside.average:
                    new += of.average(*average, new[0], *weight)
                for buffer, value in zip(buffers, new, strict=True):
                    buffer[j] = value
                if beside.zero:
                    grad[j] = 0

    def typed(context: Any, i: Any, grad: Any, buffers: Any, scalars: Any) -> Any:
        real, streams = scalars.dtype, len(buffers)

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            unfused(context)
            call = caller(context, builder, real)
            vector = ir.VectorType(context.get_value_type(real), width)

            def place(pointer: Any) -> Any:
                first = builder.gep(pointer, [i])
                pointer = builder.bitcast(first, vector.as_pointer())
                return builder.addrspacecast(pointer, vector.as_pointer(1))  # global

            i, grad, buffers, scalars = arguments
            places = [place(p) for p in (grad, *parts(builder, buffers))]
            align = width * dtype.itemsize
            old = [builder.load(pointer, align=align) for pointer in places]
            new = [ir.Constant(vector, ir.Undefined)] * streams
            factor, constants, limits, weight = split(parts(builder, scalars))
            for k in range(width):
                lane = ir.Constant(ir.IntType(32), k)
                g, p, *state = (builder.extract_element(v, lane) for v in old)
                average = [state.pop()] if beside.average else []
                g = builder.fmul(g, factor)
                if beside.clip:
                    (g,) = call(of.clip, [g, g, *limits], 1)
                count = streams - beside.average
                values = call(of.update, [p, g, *state, *constants], count)
                if beside.average:
                    values += call(of.average, [*average, values[0], *weight], 1)
                new = list(map(builder.insert_element, new, values, [lane] * streams))
            for v, pointer in zip(new, places[1:], strict=True):
                builder.store(v, pointer, align=align)
            if beside.zero:
                zeros = ir.Constant(vector, None)
                builder.store(zeros, places[0], align=align)
            return context.get_dummy_value()

        return types.void(i, grad, buffers, scalars), generate

    return simulated if SIMULATED else intrinsic(typed)


def lane_sum(of: Elements, clip: bool, terms: int, dtype: np.dtype[Any]) -> Any:
    """A function (first, count, stride, grad, buffers, scalars, sums, place) that puts,
    for every term, the sum over each stride-th element from ``first`` on into the
    sums."""

    def simulated(
        first: int,
        count: int,
        stride: int,
        grad: Any,
        buffers: Any,
        scalars: Any,
        sums: Any,
        to: int,
    ) -> None:
        with np.errstate(all="ignore"):
            factor, *constants = map(dtype.type, scalars)
            limits = [constants.pop(), constants.pop()][::-1] if clip else []
            totals = [0.0] * terms
            for i in range(first, first + count * stride, stride):
                p, *state = (buffer[i] for buffer in buffers)
                g = grad[i] * factor
                if clip:
                    (g,) = of.clip(g, g, *limits)
                found = of.update(p, g, *state, *constants)
                totals = [t + float(x) for t, x in zip(totals, found, strict=True)]
            for k, total in enumerate(totals):
                sums[to + k * LANES] = total

    def typed(
        context: Any,
        first: Any,
        count: Any,
        stride: Any,
        grad: Any,
        buffers: Any,
        scalars: Any,
        sums: Any,
        to: Any,
    ) -> Any:
        real = scalars.dtype

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            unfused(context)
            first, count, stride, grad, buffers, scalars, sums, to = arguments
            call = caller(context, builder, real)
            zero = ir.Constant(ir.DoubleType(), 0.0)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(terms)]
            factor, *constants = parts(builder, scalars)
            limits = [constants.pop(), constants.pop()][::-1] if clip else []
            pointers = [grad, *parts(builder, buffers)]
            with cgutils.for_range(builder, count) as loop:
                i = builder.add(first, builder.mul(loop.index, stride))
                g, p, *state = (builder.load(builder.gep(q, [i])) for q in pointers)
                g = builder.fmul(g, factor)
                if clip:
                    (g,) = call(of.clip, [g, g, *limits], 1)
                given = [p, g, *state, *constants]
                found = call(of.update, given, terms, types.float64)
                for total, value in zip(totals, found, strict=True):
                    builder.store(builder.fadd(builder.load(total), value), total)
            for k, total in enumerate(totals):
                place = builder.add(to, ir.Constant(to.type, k * LANES))
                builder.store(builder.load(total), builder.gep(sums, [place]))
            return context.get_dummy_value()

        taken = first, count, stride, grad, buffers, scalars, sums, to
        return types.void(*taken), generate

    return simulated if SIMULATED else intrinsic(typed)


def kernel(
    update: Any,
    states: int,
    dtype: np.dtype[Any],
    width: int,
    beside: Beside = NOTHING,
) -> tuple[Callable[..., None], Any]:
    """The kernel, not yet compiled, and its signature."""
    of = elements(update, dtype)
    several, single = (vector_update(of, beside, dtype, w) for w in (width, 1))

    def kernel(size: int, grad: Any, buffers: Any, scalars: Any) -> None:
        thread = cuda.grid(1)
        beyond = thread - size // width  # the whole vectors
        if beyond < 0:
            several(thread * width, grad, buffers, scalars)
        elif beyond < size % width:
            single(size - size % width + beyond, grad, buffers, scalars)

    kernel.__qualname__ = f"{update.__module__}.{update.__name__}"  # for profilers
    if SIMULATED:
        return kernel, None
    real = types.float32 if dtype == np.float32 else types.float64
    pointer = types.CPointer(real)
    buffers = types.UniTuple(pointer, 1 + states + beside.average)
    constants = update.__code__.co_argcount - 1 - states
    constants += 2 * beside.clip + beside.average
    scalars = types.UniTuple(real, constants)
    return kernel, types.void(types.int64, pointer, buffers, scalars)


def sums_kernel(
    measure: Any, states: int, dtype: np.dtype[Any], terms: int, clip: bool = False
) -> tuple[Callable[..., None], Any]:
    """The kernel that sums up each lane of each chunk, likewise."""
    lane_of = lane_sum(elements(measure, dtype), clip, terms, dtype)

    def kernel(size: int, grad: Any, buffers: Any, scalars: Any, sums: Any) -> None:
        thread = cuda.grid(1)
        chunk, lane = thread // LANES, thread % LANES
        first = chunk * CHUNK + lane
        if chunk * CHUNK < size:
            beyond = min(size, (chunk + 1) * CHUNK)
            count = (beyond - first + LANES - 1) // LANES if first < beyond else 0
            to = chunk * terms * LANES + lane
            lane_of(first, count, LANES, grad, buffers, scalars, sums, to)

    kernel.__qualname__ = f"{measure.__module__}.{measure.__name__}"
    if SIMULATED:
        return kernel, None
    real = types.float32 if dtype == np.float32 else types.float64
    pointer = types.CPointer(real)
    taken = measure.__code__.co_argcount - 1 - states + 2 * clip
    return kernel, types.void(
        types.int64,
        pointer,
        types.UniTuple(pointer, 1 + states),
        types.UniTuple(real, taken),
        types.CPointer(types.float64),
    )


def tiles_kernel(
    by_column: bool, clip: bool, dtype: np.dtype[Any]
) -> tuple[Callable[..., None], Any]:
    """The kernel that sums up squares in each tile of matrices: each lane of a row, or
    each column."""
    sum_of = lane_sum(elements(passes.square, dtype), clip, 1, dtype)

    def rows(
        matrices: int,
        height: int,
        width: int,
        grad: Any,
        buffers: Any,
        scalars: Any,
        sums: Any,
    ) -> None:
        thread = cuda.grid(1)
        across = (width + TILE_COLUMNS - 1) // TILE_COLUMNS
        row, tile = thread // LANES // across, thread // LANES % across
        if row < matrices * height:
            first = tile * TILE_COLUMNS + thread % LANES
            beyond = min(width, (tile + 1) * TILE_COLUMNS)
            count = (beyond - first + LANES - 1) // LANES if first < beyond else 0
            first += row * width
            sum_of(first, count, LANES, grad, buffers, scalars, sums, thread)

    def columns(
        matrices: int,
        height: int,
        width: int,
        grad: Any,
        buffers: Any,
        scalars: Any,
        sums: Any,
    ) -> None:
        thread = cuda.grid(1)
        down = (height + TILE_ROWS - 1) // TILE_ROWS
        column, tile, matrix = (
            thread % width,
            thread // width // matrices,
            thread // width % matrices,
        )
        if tile < down:
            first = (matrix * height + tile * TILE_ROWS) * width + column
            count = min(height - tile * TILE_ROWS, TILE_ROWS)
            sum_of(first, count, width, grad, buffers, scalars, sums, thread)

    kernel = columns if by_column else rows
    if SIMULATED:
        return kernel, None
    real = types.float32 if dtype == np.float32 else types.float64
    pointer = types.CPointer(real)
    return kernel, types.void(
        *[types.int64] * 3,
        pointer,
        types.UniTuple(pointer, 1),
        types.UniTuple(real, 1 + 2 * clip),
        types.CPointer(types.float64),
    )


def multiply(
    size: int, start: int, height: int, width: int, rows: Any, columns: Any, to: Any
) -> None:
    """The kernel that makes elements from ``start`` on of what is factored."""
    thread = cuda.grid(1)
    if thread < size:
        row, column = (start + thread) // width, (start + thread) % width
        to[thread] = rows[row] * columns[row // height * width + column]


def product_kernel(dtype: np.dtype[Any]) -> tuple[Callable[..., None], Any]:
    """That kernel and its signature."""
    if SIMULATED:
        return multiply, None
    pointer = types.CPointer(types.float32 if dtype == np.float32 else types.float64)
    return multiply, types.void(*[types.int64] * 4, *[pointer] * 3)


def add_lanes(count: int, lanes: Any, sums: Any) -> None:
    """The kernel that adds up the lanes of each chunk and term, by halves."""
    thread = cuda.grid(1)
    if thread < count:
        begin, half = thread * LANES, LANES // 2
        while half > 0:
            for lane in range(begin, begin + half):
                lanes[lane] += lanes[lane + half]
            half //= 2
        sums[thread] = lanes[begin]


def lanes_kernel() -> tuple[Callable[..., None], Any]:
    """That kernel and its signature."""
    if SIMULATED:
        return add_lanes, None
    pointer = types.CPointer(types.float64)
    return add_lanes, types.void(types.int64, pointer, pointer)


def check(ptx: str, single: bool) -> str:
    """The kernel's PTX, unless its bits would differ from those of other backends.
    ``single``: it is to compute in float32 alone."""
    # An addition that does not say how to round may be fused by the assembler later.
    if re.search(r"\b(fma\.|(add|sub|mul)\.f)", ptx):
        raise RuntimeError(
            "this version of numba-cuda fuses multiplications with additions, which "
            "changes results, and fastopt cannot prevent it; 0.30.4 is known to work"
        )
    if single and re.search(r"\.f64", ptx):
        raise TypeError(
            "update computes in float64, though everything it is given is float32; "
            "return its constants from scalars instead"
        )
    return ptx


def compile_ptx(
    rule: Rule,
    dtype: npt.DTypeLike,
    cc: tuple[int, int] = (9, 0),
    aligned: bool = True,
    beside: Beside = NOTHING,
) -> str:
    """The PTX for a compute capability of the kernel that a step launches. No GPU."""
    dtype = np.dtype(dtype)
    width = VECTOR_BYTES // dtype.itemsize if aligned else 1
    of = rule.update, len(rule.state), dtype, width, beside
    function, signature = kernel(*of)
    ptx = cuda.compile_ptx(function, signature, cc=cc)[0]
    return check(ptx, single=dtype == np.float32)


def compile_sums_ptx(
    rule: Rule, dtype: npt.DTypeLike, cc: tuple[int, int] = (9, 0), clip: bool = False
) -> str:
    """The same, of the kernel for what a rule measures."""
    of = rule.measure, len(rule.state), np.dtype(dtype), rule.terms, clip
    function, signature = sums_kernel(*of)
    return check(cuda.compile_ptx(function, signature, cc=cc)[0], single=False)


def compile_tiles_ptx(
    by_column: bool, dtype: npt.DTypeLike, clip: bool, cc: tuple[int, int] = (9, 0)
) -> str:
    """The same, of the kernel for the squares in tiles."""
    function, signature = tiles_kernel(by_column, clip, np.dtype(dtype))
    ptx = cuda.compile_ptx(function, signature, cc=cc)[0]
    return check(ptx, single=False)


@functools.cache
def compiled(make: Callable[..., Any], *of: Any) -> Any:
    """The kernel that ``kernel``, or one like it, makes, for this GPU."""
    function, signature = make(*of)
    dispatcher = cuda.jit(signature, lto=False)(function)  # a late link would fuse
    if make not in (lanes_kernel, product_kernel):  # those only add, or multiply
        single = make is kernel and of[2] == np.float32
        check(dispatcher.inspect_asm(signature.args), single)
    return dispatcher


@functools.cache
def launcher(blocks: int, make: Callable[..., Any], *of: Any) -> Any:
    """A kernel with its grid, to be called with its arguments."""
    if SIMULATED:  # where one kernel has only one grid at a time
        return cuda.jit(make(*of)[0])[blocks, BLOCK]
    with warnings.catch_warnings():  # numba says that a small grid leaves the GPU idle
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        return compiled(make, *of)[blocks, BLOCK]


def address(array: Any) -> int:
    """Where a device array begins."""
    if SIMULATED:
        return int(array.ctypes.data)
    return int(array.__cuda_array_interface__["data"][0])


def operand(array: Any) -> Any:
    """What a kernel takes for an array: its address, which numba passes on fastest."""
    return array.reshape(-1) if SIMULATED else address(array)


def bind(rule: Rule, segments: Sequence[Segment], count: Array, carry: Array) -> Step:
    """As :func:`fastopt.numpy_ref.bind`, with device arrays. The kernels are enqueued
    on numba's default stream, and ``threads`` means nothing here."""
    return OnDevice(rule, segments, count)


class OnDevice(Step):
    def __init__(self, rule: Rule, segments: Sequence[Segment], count: Array):
        self.rule, self.segments, self.count = rule, segments, count
        self.dtype = segments[0].param.dtype
        self.buffers = []  # what the kernels take, and all the addresses' bits
        for segment in segments:
            average = () if segment.average is None else (segment.average,)
            arrays = (segment.param, *segment.state, *average)
            bits = functools.reduce(operator.or_, map(address, arrays))
            self.buffers.append((tuple(map(operand, arrays)), bits))
        most = max((s.param.size for s in segments if s.product), default=0)
        self.room: Any = cuda.device_array(min(most, ROOM), self.dtype) if most else ()
        self.made: list[Any] = []  # where the gradients of several tasks are combined

    def take(self, grads: list[Any], weights: Sequence[float] | None = None) -> bool:
        self.tasks = [grads] if weights is None else grads
        self.grads = grads if weights is None else self.combined(grads, weights)
        return True

    def combined(self, tasks: list[list[Any]], weights: Sequence[float]) -> list[Any]:
        """As of :mod:`fastopt.numpy_ref`, for every segment, in memory of our own."""
        params = [segment.param for segment in self.segments]
        if not self.made:
            self.made = [made for (made,) in state_arena(params, 1)]
        for made in self.made:
            made[:] = 0
        segments = [Segment(made, (), 0) for made in self.made]
        step = OnDevice(passes.accumulate, segments, np.zeros(1, np.int64))
        for task, weight in zip(tasks, weights, strict=True):
            if self.dtype.type(weight) != 0:
                step.take([None if g is None else g.reshape(-1) for g in task])
                step([(weight,)], 1)
        given = [any(g is not None for g in of) for of in zip(*tasks, strict=True)]
        return [
            made.reshape(param.shape) if there else None
            for made, param, there in zip(self.made, params, given, strict=True)
        ]

    def stretches(
        self, product: Product, *arrays: Any
    ) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
        """Of a segment whose state is factored: parts of its arrays, the second of them
        the state, with the launch that has to come before."""
        shape = [factor.shape[1] for factor in product]
        factors = [operand(factor) for factor in product]
        first, *rest = (array.reshape(-1) for array in arrays)
        for start in range(0, first.size, ROOM):
            size = min(ROOM, first.size - start)
            launch = launcher(-(-size // BLOCK), product_kernel, self.dtype)
            part, *parts = (array[start : start + size] for array in (first, *rest))
            made = (launch, size, start, *shape, *factors, operand(self.room))
            yield made, [part, self.room[:size], *parts]

    def squares(
        self,
        rows: list[tuple[float, ...]],
        threads: int,
        clip_value: float = math.inf,
    ) -> list[tuple[Array, Array] | None]:
        limits = (-clip_value, clip_value) if clip_value < math.inf else ()
        return [
            None
            if segment.product is None or grad is None or not grad.size
            else square_sums(grad, (rows[segment.row][0], *limits), self.dtype)
            for segment, grad in zip(self.segments, self.grads, strict=True)
        ]

    def sums(
        self,
        what: str,
        rows: list[tuple[float, ...]],
        threads: int,
        clip_value: float = math.inf,
    ) -> list[tuple[float, ...] | None]:
        rule = self.rule if what == "rule" else passes.accumulate
        sizes = [
            0 if grad is None else segment.param.size
            for segment, grad in zip(self.segments, self.grads, strict=True)
        ]
        chunks = [-(-size // CHUNK) for size in sizes]
        terms, total = rule.terms, sum(chunks)
        limits = (-clip_value, clip_value) if clip_value < math.inf else ()
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
                launcher(-(-here // BLOCK), sums_kernel, *of)(
                    grad.size,
                    operand(grad),
                    tuple(map(operand, arrays)),
                    scalars,
                    operand(lanes[begin:]),
                )
                begin += here * terms

            for segment, grad, size in zip(
                self.segments, self.grads, sizes, strict=True
            ):
                if size and what == "rule" and segment.product is not None:
                    for before, (p, v, g) in self.stretches(
                        segment.product, segment.param, grad
                    ):
                        before[0](*before[1:])
                        launch(segment, (p, v), g)
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
        self, rows: list[tuple[float, ...]], threads: int, extras: Extras = PLAIN
    ) -> list[Call]:
        # Launches are Python code of Numba's, so an interrupt may come between them.
        return [functools.partial(self, rows, threads, extras)]

    def __call__(
        self, rows: list[tuple[float, ...]], threads: int, extras: Extras = PLAIN
    ) -> bool:
        clip = extras.clip_value < math.inf
        limits = (-extras.clip_value, extras.clip_value) if clip else ()
        launches: list[tuple[Any, ...]] = []
        # Complete before the first, so that no error leaves half a step.

        def add(
            rule: Rule, beside: Beside, grad: Any, buffers: Any, bits: int, scalars: Any
        ) -> None:
            size = grad.size
            aligned = (bits | address(grad)) % VECTOR_BYTES == 0
            width = VECTOR_BYTES // self.dtype.itemsize if aligned else 1
            blocks = -(-(size // width + size % width) // BLOCK)
            of = rule.update, len(rule.state), self.dtype, width, beside
            launch = launcher(blocks, kernel, *of)
            launches.append((launch, size, operand(grad), buffers, scalars))

        for segment, grad, (buffers, bits) in zip(
            self.segments, self.grads, self.buffers, strict=True
        ):
            averaged = segment.average is not None
            weight = (extras.ema_weight,) if averaged else ()
            beside = Beside(clip, averaged, extras.zero_grads)
            scalars = (*rows[segment.row], *limits, *weight)
            if not segment.param.size:
                continue
            if grad is None:
                if averaged:  # then only the average moves
                    of = passes.average, NOTHING, segment.param, buffers[-1:], bits
                    add(*of, (1.0, *weight))
            elif segment.product is None:
                add(self.rule, beside, grad, buffers, bits, scalars)
            else:
                average = (segment.average,) if averaged else ()
                for before, (p, v, g, *rest) in self.stretches(
                    segment.product, segment.param, grad, *average
                ):
                    launches.append(before)
                    arrays = (p, v, *rest)
                    bits = functools.reduce(operator.or_, map(address, arrays))
                    given = tuple(map(operand, arrays))
                    add(self.rule, beside, g, given, bits, scalars)
        for launch, *arguments in launches:
            launch(*arguments)
        if extras.zero_grads and self.tasks[0] is not self.grads:
            for task in self.tasks:
                for grad in task:
                    if grad is not None:
                        grad.reshape(-1)[:] = 0
        self.count[0] += 1
        return True


def launch_lanes(lanes: Any, sums: Any) -> None:
    """Add up the lanes of each sum."""
    launch = launcher(-(-sums.size // BLOCK), lanes_kernel)
    launch(sums.size, operand(lanes), operand(sums))


def square_sums(
    grad: Any, scalars: tuple[float, ...], dtype: np.dtype[Any]
) -> tuple[Array, Array]:
    """As of :mod:`fastopt.factored`, of a device array."""
    *_, height, width = grad.shape
    flat = grad.reshape(-1)
    matrices, clip = flat.size // (height * width), len(scalars) > 1
    across, down = -(-width // TILE_COLUMNS), -(-height // TILE_ROWS)

    def launch(
        by_column: bool, matrices: int, height: int, given: Any, to: Any
    ) -> None:
        call = launcher(-(-to.size // BLOCK), tiles_kernel, by_column, clip, dtype)
        start = operand(given)
        call(matrices, height, width, start, (start,), scalars, operand(to))

    columns = cuda.device_array(down * matrices * width, np.float64)
    launch(True, matrices, height, flat, columns)
    count = matrices * height
    rows = cuda.device_array(count * across, np.float64)
    most = max(1, ROOM // (across * LANES))  # rows at a time
    for row in range(0, count, most):
        sums = rows[row * across : (row + most) * across]
        lanes = cuda.device_array(sums.size * LANES, np.float64)
        launch(False, 1, sums.size // across, flat[row * width :], lanes)
        launch_lanes(lanes, sums)
    by_row = rows.copy_to_host().reshape(matrices, height, across)
    by_column = columns.copy_to_host().reshape(down, matrices, width)
    return in_order(np.moveaxis(by_row, 2, 0)), in_order(by_column)
