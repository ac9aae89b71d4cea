"""What the text of CUDA kernels calls: loads, stores and primitives, for numba-cuda's
compiler and for its simulator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config

from fastopt.backends import llvm_ir
from fastopt.language import NUMPY, Word
from fastopt.memory.formats import COMPUTED, DTYPES

try:
    import numba_cuda  # noqa: F401  (without it, numba.cuda is an older thing)
    from numba import cuda as cuda
    from numba.cuda import cgutils, extending
    from numba.cuda import types as types
    from numba.cuda.core.errors import (
        NumbaPerformanceWarning as NumbaPerformanceWarning,
    )
    from numba.cuda.cudadrv import nvvm as nvvm
    from numba.cuda.cudadrv.devicearray import is_cuda_ndarray as is_cuda_ndarray
    from numba.cuda.extending import intrinsic
except ImportError as error:
    not_installed = str(error)
    cuda = nvvm = is_cuda_ndarray = NumbaPerformanceWarning = types = None
else:
    not_installed = ""

SIMULATED = bool(config.ENABLE_CUDASIM)


def inlined(function: Any) -> Any:
    """Return a function that kernels may call. It is inlined, because numba-cuda cannot
    compile a call on its own without a GPU."""
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


def primitives(dtype: type[np.floating[Any]]) -> dict[str, Callable[..., Any]]:
    """Return the primitives of `fastopt.rule` for one element of this dtype."""
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
    return NUMPY | ours if SIMULATED else ours | conversions()


@functools.cache
def conversions() -> dict[str, Any]:
    return llvm_ir.primitives(extending)


def unfused(context: Any) -> None:
    """Products and sums are not to be fused in the kernel that is being generated. No
    public switch says so; `check` sees to it that this one works."""
    library = context.active_code_library
    getattr(library, "_nvvm_options", {})["fma"] = False


def accesses(width: int) -> dict[str, Any]:
    """Return functions that load and store ``width`` elements of a buffer from the i-th
    on, and one that makes a word of an integer, without what does not fit. In a kernel
    they are intrinsics, because only LLVM's vectors become loads and stores of vectors.
    The elements of a buffer of integers are words."""

    def place(context: Any, builder: Any, kind: Any, pointer: Any, i: Any) -> Any:
        unfused(context)
        vector = ir.VectorType(context.get_value_type(kind.dtype), width)
        first = builder.bitcast(builder.gep(pointer, [i]), vector.as_pointer())
        return builder.addrspacecast(first, vector.as_pointer(1))  # global

    def load(context: Any, pointer: Any, i: Any) -> Any:
        words = isinstance(pointer.dtype, types.Integer)
        word = llvm_ir.Word(8 * COMPUTED.itemsize)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            at = place(context, builder, pointer, *given)
            loaded = builder.load(at, align=width * pointer.dtype.bitwidth // 8)
            lanes = map(ir.IntType(32), range(width))
            values = [builder.extract_element(loaded, lane) for lane in lanes]
            if words:
                values = [llvm_ir.resized(builder, x, word.width) for x in values]
            return context.make_tuple(builder, signature.return_type, values)

        kind = word if words else pointer.dtype
        return types.UniTuple(kind, width)(pointer, i), generate

    def store(context: Any, pointer: Any, i: Any, values: Any) -> Any:
        kind = pointer.dtype

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            at = place(context, builder, pointer, *given[:2])
            stored = ir.Constant(at.type.pointee, ir.Undefined)
            for lane, value in enumerate(cgutils.unpack_tuple(builder, given[2])):
                if isinstance(kind, types.Integer):
                    value = llvm_ir.resized(builder, value, kind.bitwidth)
                else:
                    value = context.cast(builder, value, values[lane], kind)
                stored = builder.insert_element(stored, value, ir.IntType(32)(lane))
            builder.store(stored, at, align=width * kind.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(pointer, i, values), generate

    def word_of(context: Any, i: Any) -> Any:
        word = llvm_ir.Word(8 * COMPUTED.itemsize)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return llvm_ir.resized(builder, given[0], word.width)

        return word(i), generate

    if not SIMULATED:
        return {f.__name__: intrinsic(f) for f in (load, store, word_of)}
    return {
        "load": functools.partial(simulated_load, width),
        "store": simulated_store,
        "word_of": simulated_word,
    }


def simulated_load(width: int, buffer: Any, i: int) -> tuple[Any, ...]:
    elements = [buffer[j] for j in range(i, i + width)]
    if buffer.dtype.kind == "u":
        return tuple(Word(np.uint32(x)) for x in elements)
    if buffer.dtype not in DTYPES:  # NumPy would compute with what a kernel would not
        raise TypeError(f"a kernel reads no {buffer.dtype}")
    return tuple(elements)


def simulated_store(buffer: Any, i: int, values: tuple[Any, ...]) -> None:
    stored = [x.array if isinstance(x, Word) else x for x in values]
    buffer[i : i + len(values)] = np.array(stored).astype(buffer.dtype)


def simulated_word(i: int) -> Word:
    return Word(np.uint32(i % 2**32))
