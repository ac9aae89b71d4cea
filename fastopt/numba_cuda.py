"""The CUDA backend: a rule compiled by numba-cuda, one kernel launch per segment.

A thread moves 16 bytes of every stream: it loads a vector of the gradient, of the
parameter and of each state buffer, runs ``update`` on the lanes and stores the vectors.
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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import config

from fastopt.checks import on_device
from fastopt.flat import Array, Segment
from fastopt.numpy_ref import Step
from fastopt.rule import Rule, concrete

try:
    import numba_cuda  # noqa: F401  (without it, numba.cuda is an older thing)
    from numba import cuda
    from numba.cuda import types
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
    return {"sqrt": sqrt, "copysign": copysign, **ours}


def vector_update(update: Callable[..., Any], dtype: np.dtype[Any], width: int) -> Any:
    """A function (i, grad, buffers, scalars) that updates ``width`` elements from i on.

    In a kernel it is an intrinsic, because only LLVM's vectors become 16-byte loads and
    stores, and because it can be written once for any number of buffers.
    """

    def simulated(i: int, grad: Any, buffers: Any, scalars: Any) -> None:
        with np.errstate(all="ignore"):
            grad_scale, *constants = map(dtype.type, scalars)
            for j in range(i, i + width):
                p, *state = (buffer[j] for buffer in buffers)
                new = update(p, grad[j] * grad_scale, *state, *constants)
                for buffer, value in zip(buffers, new, strict=True):
                    buffer[j] = value

    def typed(context: Any, i: Any, grad: Any, buffers: Any, scalars: Any) -> Any:
        real, streams = scalars.dtype, len(buffers)
        takes = [real] * (streams + len(scalars))  # p, g, *state, *constants
        signature = types.UniTuple(real, streams)(*takes)

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            # Products and sums are not to be fused in the kernel that this goes into.
            # No public switch says so; `check` sees to it that this one works.
            library = context.active_code_library
            getattr(library, "_nvvm_options", {})["fma"] = False
            element = context.compile_subroutine(
                builder, update, signature, caching=False
            )
            vector = ir.VectorType(context.get_value_type(real), width)

            def parts(array: Any) -> list[Any]:
                return [builder.extract_value(array, k) for k in range(len(array.type))]

            def place(pointer: Any) -> Any:
                first = builder.gep(pointer, [i])
                pointer = builder.bitcast(first, vector.as_pointer())
                return builder.addrspacecast(pointer, vector.as_pointer(1))  # global

            i, grad, buffers, scalars = arguments
            places = [place(pointer) for pointer in (grad, *parts(buffers))]
            align = width * dtype.itemsize
            old = [builder.load(pointer, align=align) for pointer in places]
            new = [ir.Constant(vector, ir.Undefined)] * streams
            grad_scale, *constants = parts(scalars)
            for k in range(width):
                lane = ir.Constant(ir.IntType(32), k)
                g, p, *state = (builder.extract_element(v, lane) for v in old)
                values = [p, builder.fmul(g, grad_scale), *state, *constants]
                values = parts(
                    context.call_internal(builder, element.fndesc, signature, values)
                )
                new = list(map(builder.insert_element, new, values, [lane] * streams))
            for v, pointer in zip(new, places[1:], strict=True):
                builder.store(v, pointer, align=align)
            return context.get_dummy_value()

        return types.void(i, grad, buffers, scalars), generate

    return simulated if SIMULATED else intrinsic(typed)


def kernel(
    update: Any, states: int, dtype: np.dtype[Any], width: int
) -> tuple[Callable[..., None], Any]:
    """The kernel, not yet compiled, and its signature."""
    element = concrete(update, dtype, primitives(dtype.type), inlined)
    several, single = (vector_update(element, dtype, w) for w in (width, 1))

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
    buffers = types.UniTuple(pointer, 1 + states)
    scalars = types.UniTuple(real, update.__code__.co_argcount - 1 - states)
    return kernel, types.void(types.int64, pointer, buffers, scalars)


def check(ptx: str, dtype: np.dtype[Any]) -> str:
    """The kernel's PTX, unless its bits would differ from those of other backends."""
    # An addition that does not say how to round may be fused by the assembler later.
    if re.search(r"\b(fma\.|(add|sub|mul)\.f)", ptx):
        raise RuntimeError(
            "this version of numba-cuda fuses multiplications with additions, which "
            "changes results, and fastopt cannot prevent it; 0.30.4 is known to work"
        )
    if dtype == np.float32 and re.search(r"\.f64", ptx):
        raise TypeError(
            "update computes in float64, though everything it is given is float32; "
            "return its constants from scalars instead"
        )
    return ptx


def compile_ptx(
    rule: Rule, dtype: npt.DTypeLike, cc: tuple[int, int] = (9, 0), aligned: bool = True
) -> str:
    """The PTX for a compute capability of the kernel that a step launches. No GPU."""
    dtype = np.dtype(dtype)
    width = VECTOR_BYTES // dtype.itemsize if aligned else 1
    function, signature = kernel(rule.update, len(rule.state), dtype, width)
    return check(cuda.compile_ptx(function, signature, cc=cc)[0], dtype)


@functools.cache
def compiled(update: Any, states: int, dtype: np.dtype[Any], width: int) -> Any:
    """The kernel for this GPU."""
    function, signature = kernel(update, states, dtype, width)
    dispatcher = cuda.jit(signature, lto=False)(function)  # a late link would fuse
    check(dispatcher.inspect_asm(signature.args), dtype)
    return dispatcher


@functools.cache
def launcher(
    update: Any, states: int, dtype: np.dtype[Any], width: int, blocks: int
) -> Any:
    """The kernel with its grid, to be called with its arguments."""
    if SIMULATED:  # where one kernel has only one grid at a time
        return cuda.jit(kernel(update, states, dtype, width)[0])[blocks, BLOCK]
    with warnings.catch_warnings():  # numba says that a small grid leaves the GPU idle
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        return compiled(update, states, dtype, width)[blocks, BLOCK]


def address(array: Any) -> int:
    """Where a device array begins."""
    if SIMULATED:
        return int(array.ctypes.data)
    return int(array.__cuda_array_interface__["data"][0])


def operand(array: Any) -> Any:
    """What a kernel takes for an array: its address, which numba passes on fastest."""
    return array.reshape(-1) if SIMULATED else address(array)


def bind(rule: Rule, segments: Sequence[Segment], count: Array) -> Step:
    """As :func:`fastopt.numpy_ref.bind`, with device arrays. The kernels are enqueued
    on numba's default stream, and ``threads`` means nothing here."""
    bound = []
    for segment in segments:
        buffers = (segment.param, *segment.state)
        address_bits = functools.reduce(operator.or_, map(address, buffers))
        bound.append((segment, tuple(map(operand, buffers)), address_bits))

    def step(
        grads: list[Array | None], scalars: list[tuple[float, ...]], threads: int
    ) -> bool:
        launches = []  # complete before the first, so that no error leaves half a step
        for (segment, buffers, bits), grad in zip(bound, grads, strict=True):
            size, dtype = segment.param.size, segment.param.dtype
            if grad is None or size == 0:
                continue
            aligned = (bits | address(grad)) % VECTOR_BYTES == 0
            width = VECTOR_BYTES // dtype.itemsize if aligned else 1
            blocks = -(-(size // width + size % width) // BLOCK)
            launch = launcher(rule.update, len(rule.state), dtype, width, blocks)
            launches.append((launch, operand(grad), buffers, segment))
        for launch, grad, buffers, segment in launches:
            launch(segment.param.size, grad, buffers, scalars[segment.group])
        count[0] += 1
        return True

    return step
