"""What the text of CUDA kernels calls: loads, stores and primitives, for numba-cuda's
compiler and for its simulator."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from fastopt.backends import llvm_ir
from fastopt.backends.cuda_device import SIMULATED as SIMULATED
from fastopt.backends.cuda_table import VECTOR_BYTES
from fastopt.language import NUMPY, Word
from fastopt.memory.formats import COMPUTED, DTYPES
from fastopt.memory.order import GROUP, LANES

if SIMULATED:
    from fastopt.backends import cuda_simulated

try:
    import numba_cuda  # noqa: F401  (without it, numba.cuda is an older thing)
    from numba import cuda as cuda
    from numba.cuda import cgutils, extending
    from numba.cuda import types as types
    from numba.cuda.cudadrv import nvvm as nvvm
    from numba.cuda.extending import intrinsic
except ImportError as error:
    not_installed = str(error)
    cuda = nvvm = types = None
else:
    not_installed = ""

# Where a group shares a scale, each of SHARERS threads has QUAD of its elements. They
# are of one warp.
QUAD = VECTOR_BYTES // COMPUTED.itemsize
SHARERS = GROUP // QUAD
WARP = 2**32 - 1  # all threads of a warp, as bits
BUTTERFLY = 3  # the mode of a shuffle between numbers that differ in a bit
TOPS: dict[int, Any] = {}  # by the threads of a block, in the simulator
SUMS: dict[tuple[int, ...], float] = {}  # by warps, lanes and terms, likewise


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
    on. In a kernel they are intrinsics, because only LLVM's vectors become loads and
    stores of vectors. The elements of a buffer of integers are words."""

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

    if not SIMULATED:
        return {"load": intrinsic(load), "store": intrinsic(store)}
    return {"load": functools.partial(simulated_load, width), "store": simulated_store}


def pointer_to(dtype: np.dtype[Any]) -> Any:
    """Return a function for kernels that makes a pointer of an address."""
    if SIMULATED:
        return lambda place: cuda_simulated.numbers_at(int(place), dtype)

    def pointer(context: Any, place: Any) -> Any:
        kind = types.CPointer(getattr(types, dtype.name))

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return intrinsic(pointer)


def lookups() -> dict[str, Any]:
    """Return functions for kernels that find their way. ``entry`` loads a whole number
    from an array of them, whose address is given. ``product`` multiplies the factors of
    an element of factored state. ``halved`` takes a number of each lane of a warp, and
    returns their sum, which is added up by halves; in the simulator only to the last
    lane. ``term`` says which of several sums it is."""

    def entry(context: Any, place: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            unfused(context)
            kind = ir.IntType(64)
            pointer = builder.inttoptr(given[0], kind.as_pointer())
            pointer = builder.gep(pointer, [given[1]])
            pointer = builder.addrspacecast(pointer, kind.as_pointer(1))  # global
            return builder.load(pointer, align=8)

        return types.int64(types.int64, types.int64), generate

    def halved(context: Any, x: Any, term: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            find = functools.partial(cgutils.get_or_insert_function, builder.module)
            half, whole = ir.IntType(32), ir.IntType(64)
            result = ir.LiteralStructType([half, ir.IntType(1)])
            shuffle = find(
                ir.FunctionType(result, [half] * 5), "llvm.nvvm.shfl.sync.i32"
            )
            total, distance = given[0], LANES // 2
            while distance:
                word = builder.bitcast(total, whole)
                both = []
                for shift in (0, 32):
                    part = builder.trunc(builder.lshr(word, whole(shift)), half)
                    asked = [half(WARP), half(BUTTERFLY), part, half(distance)]
                    found = builder.call(shuffle, [*asked, half(LANES - 1)])
                    part = builder.zext(builder.extract_value(found, 0), whole)
                    both.append(builder.shl(part, whole(shift)))
                other = builder.bitcast(builder.or_(*both), total.type)
                total = builder.fadd(total, other)
                distance //= 2
            return total

        return types.float64(types.float64, term), generate

    def product(rows: Any, columns: Any, i: Any, shape: Any) -> Any:
        height, width = shape
        row, column = i // width, i % width
        (a,) = load_one(rows, row)
        (b,) = load_one(columns, row // height * width + column)
        return a * b

    load_one = accesses(1)["load"]
    if SIMULATED:
        return {
            "entry": lambda place, i: int(
                cuda_simulated.numbers_at(int(place), np.dtype(np.int64))[i]
            ),
            "halved": cuda.jit(device=True)(simulated_halves),
            "product": product,
        }
    return {
        "entry": intrinsic(entry),
        "halved": intrinsic(halved),
        "product": inlined(product),
    }


def storing_entries() -> Any:
    """Return a function for kernels that stores a whole number in an array of them,
    whose address is given."""

    def store_entry(context: Any, place: Any, i: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = ir.IntType(64)
            pointer = builder.inttoptr(given[0], kind.as_pointer())
            pointer = builder.gep(pointer, [given[1]])
            pointer = builder.addrspacecast(pointer, kind.as_pointer(1))  # global
            builder.store(given[2], pointer, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    if not SIMULATED:
        return intrinsic(store_entry)

    def simulated_entry(place: int, i: int, value: int) -> None:
        cuda_simulated.numbers_at(int(place), np.dtype(np.int64))[i] = value

    return simulated_entry


def words() -> dict[str, Any]:
    """Return more functions for kernels. ``word_of`` makes a word of an integer, of
    which it drops what does not fit. ``greatest`` takes a word of each thread of a
    group, and returns the greatest. ``count`` adds 1 to a number in memory."""
    word = llvm_ir.Word(8 * COMPUTED.itemsize)
    bits = ir.IntType(word.width)

    def word_of(context: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return llvm_ir.resized(builder, given[0], word.width)

        return word(i), generate

    def greatest(context: Any, top: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            find = functools.partial(cgutils.get_or_insert_function, builder.module)
            result = ir.LiteralStructType([bits, ir.IntType(1)])
            kind = ir.FunctionType(result, [bits] * 5)
            shuffle, (top,) = find(kind, "llvm.nvvm.shfl.sync.i32"), given
            distance = 1
            while distance < SHARERS:  # to the thread whose number differs in this bit
                asked = [bits(WARP), bits(BUTTERFLY), top, bits(distance), bits(31)]
                other = builder.extract_value(builder.call(shuffle, asked), 0)
                top = builder.select(builder.icmp_unsigned(">", other, top), other, top)
                distance *= 2
            # All of them have loaded the old scale when one stores another.
            kind = ir.FunctionType(ir.VoidType(), [bits])
            builder.call(find(kind, "llvm.nvvm.bar.warp.sync"), [bits(WARP)])
            return top

        return word(top), generate

    def count(context: Any, pointer: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = context.get_value_type(pointer.dtype)
            at = builder.addrspacecast(given[0], kind.as_pointer(1))  # global
            builder.atomic_rmw("add", at, kind(1), "monotonic")
            return context.get_dummy_value()

        return types.void(pointer), generate

    if not SIMULATED:
        return {f.__name__: intrinsic(f) for f in (word_of, greatest, count)}
    return {
        "word_of": simulated_word,
        "greatest": cuda.jit(device=True)(simulated_greatest),
        "count": cuda.jit(device=True)(simulated_count),
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


def simulated_greatest(top: Word) -> Word:
    here = cuda.threadIdx.x
    TOPS[here] = top.array
    cuda.syncthreads()
    first = here // SHARERS * SHARERS
    found = max(TOPS[thread] for thread in range(first, first + SHARERS))
    cuda.syncthreads()
    return Word(found)


def simulated_count(buffer: Any) -> None:
    cuda.atomic.add(buffer, 0, 1)


def simulated_halves(x: float, term: int) -> float:
    """Return the sum of all lanes to the last one. It waits for the others, because the
    simulator's threads run in any order."""
    warp, lane = divmod(int(cuda.threadIdx.x), LANES)
    SUMS[warp, lane, term] = x
    if lane < LANES - 1:
        return 0.0
    while any((warp, k, term) not in SUMS for k in range(LANES)):
        time.sleep(0)
    lanes = [SUMS.pop((warp, k, term)) for k in range(LANES)]
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [a + b for a, b in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]
