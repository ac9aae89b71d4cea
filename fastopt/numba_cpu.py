"""The JIT backend: a rule compiled by Numba, for all CPU cores.

``bind`` has the shape of the reference's. A step is one native call over a table of
addresses, by the compiled backend's driver or, where that is missing, by our own. A
kernel does one part of the step and is compiled once for a rule and dtype; our parallel
region around it takes the kernel's address, so it is compiled once for all rules. Both
stay on disk as plain object code (see ``kernel_cache``).
"""

# JIT functions take what Numba infers; its stubs know neither intrinsics nor config.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,untyped-decorator,var-annotated"

from __future__ import annotations

import ctypes
import functools
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import config, njit, prange
from numba.core import cgutils
from numba.core import types as nt
from numba.core.errors import NumbaError, TypingError
from numba.extending import intrinsic

from fastopt import cython_cpu, kernel_cache
from fastopt.checks import as_array
from fastopt.flat import CACHE_LINE, Array, Segment, state_arena
from fastopt.kernel_cache import Kernel
from fastopt.numpy_ref import Step
from fastopt.rule import Function, Rule, concrete

__all__ = ["as_array", "bind", "missing", "state_arena"]

SERIAL_BELOW = 32768  # elements; a parallel region would cost more than it saves
ALIGN_FROM = 4096  # elements; for fewer, it would
# Columns of the table, as in the compiled backend: p, g, state..., length, group.
PARAM, GRAD, LENGTH, GROUP = 0, 1, -2, -1
WORD = ir.IntType(64)
REAL = {4: ctypes.c_float, 8: ctypes.c_double}
FLOAT = {4: ir.FloatType(), 8: ir.DoubleType()}

# Neither fastmath nor contraction: the bits are those of every other backend.
FLAGS: Any = {"error_model": "numpy"}
compiled = njit(**FLAGS)


def missing() -> str | None:
    """Why this backend cannot be used, or None."""
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set; unset it or pass backend='numpy'"
    return None


# The primitives of `fastopt.rule`, in scalars and without a literal's float64.


@intrinsic
def sqrt(typingctx, x):
    # Numba's own calls libm's, which sets errno and so is not inlined for a scalar.
    def codegen(context, builder, signature, args):
        root = builder.module.declare_intrinsic("llvm.sqrt", [args[0].type])
        return builder.call(root, args)

    return (x(x), codegen) if isinstance(x, nt.Float) else None


@compiled
def where(condition, a, b):
    return a if condition else b


@compiled
def maximum(a, b):
    return a if (a > b) | (a != a) else b


@compiled
def minimum(a, b):
    return a if (a < b) | (a != a) else b


@compiled
def copysign(a, b):
    return math.copysign(a, b)


@compiled
def sign(x):
    zero, one = type(x)(0), type(x)(1)
    return math.copysign(one, x) if (x > zero) | (x < zero) else x


PRIMITIVES: dict[str, Any] = {
    "sqrt": sqrt,
    "where": where,
    "maximum": maximum,
    "minimum": minimum,
    "copysign": copysign,
    "sign": sign,
}

# The kernel


@intrinsic
def word(typingctx, pointer, index):
    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(args[0], [args[1]]))

    return nt.int64(pointer, index), codegen


@intrinsic
def add_one(typingctx, pointer):
    # In native code, so that no interrupt comes between a step and its count.
    def codegen(context, builder, signature, args):
        builder.store(builder.add(builder.load(args[0]), WORD(1)), args[0])
        return context.get_dummy_value()

    return nt.void(pointer), codegen


@compiled
def length_of(table, row, width):
    length = word(table, (row + 1) * width + LENGTH)
    return length if word(table, row * width + GRAD) else 0


def kernel_of(update: Any, dtype: np.dtype[Any], streams: int, constants: int) -> Any:
    """The function that does one part of a step over all segments."""
    real = numba.from_dtype(dtype)
    width = streams + 2
    itemsize = dtype.itemsize
    line = CACHE_LINE // itemsize

    def pointer(builder: Any, table: Any, row: Any, stream: int, index: Any) -> Any:
        column = builder.mul(row, WORD(width))
        column = builder.add(column, WORD(PARAM + stream))
        address = builder.load(builder.gep(table, [column]))
        # The table stays as it is, so this load can leave the loop.
        address.set_metadata("invariant.load", builder.module.add_metadata([]))
        pointer = builder.inttoptr(address, FLOAT[dtype.itemsize].as_pointer())
        return builder.gep(pointer, [index])

    def apart(builder: Any, access: Any, stream: int) -> Any:
        """Say that streams do not overlap. LLVM would check it at run time, but gives
        up at five streams (amsgrad) and leaves the loop scalar."""
        note = builder.module.add_metadata
        scopes = [note([f"stream {i}", note(["fastopt"])]) for i in range(streams)]
        access.set_metadata("alias.scope", note([scopes.pop(stream)]))
        access.set_metadata("noalias", note(scopes))
        return access

    @intrinsic
    def load(typingctx, table, row, index):
        def codegen(context, builder, signature, args):
            table, row, index = args
            values = [
                apart(builder, builder.load(pointer(builder, table, row, i, index)), i)
                for i in range(streams)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return nt.UniTuple(real, streams)(table, row, index), codegen

    @intrinsic
    def load_scalars(typingctx, scalars, group):
        def codegen(context, builder, signature, args):
            first = builder.mul(args[1], WORD(constants))
            places = [builder.add(first, WORD(i)) for i in range(constants)]
            values = [builder.load(builder.gep(args[0], [i])) for i in places]
            return context.make_tuple(builder, signature.return_type, values)

        return nt.UniTuple(real, constants)(scalars, group), codegen

    @intrinsic
    def store(typingctx, table, row, index, values):
        if values != nt.UniTuple(real, streams - 1):
            raise TypingError(
                f"it must return (p, *state), here {streams - 1} values of type "
                f"{real}; it returns {values}"
            )

        def codegen(context, builder, signature, args):
            table, row, index, values = args
            written = [i for i in range(streams) if PARAM + i != GRAD]
            values = cgutils.unpack_tuple(builder, values)
            for i, value in zip(written, values, strict=True):
                place = pointer(builder, table, row, i, index)
                apart(builder, builder.store(value, place), i)
            return context.get_dummy_value()

        return nt.void(table, row, index, values), codegen

    def kernel(table, rows, scalars, part, parts, count):
        total = 0
        for row in range(rows):
            total += length_of(table, row, width)
        share = (total + parts * line - 1) // (parts * line) * line
        first, last = part * share, (part + 1) * share
        for row in range(rows):
            length = length_of(table, row, width)
            constants = load_scalars(scalars, word(table, (row + 1) * width + GROUP))
            begin, end = max(first, 0), min(last, length)
            # On their own the few up to a cache line's end, so that no store of the
            # rest crosses a line; as a loop, for a second copy would be compiled too.
            cut = begin
            if end - begin >= ALIGN_FROM:
                cut += -(word(table, row * width + PARAM) // itemsize + begin) % line
            for i_from, i_to in ((begin, cut), (cut, end)):
                for i in range(i_from, i_to):
                    old = load(table, row, i)
                    g = old[1] * constants[0]
                    store(table, row, i, update(old[0], g, *old[2:], *constants[1:]))
            first -= length
            last -= length
        if parts == 1:
            add_one(count)

    return kernel


@intrinsic
def call_kernel(typingctx, kernel, table, rows, scalars, part, parts, count):
    """Call the kernel at this address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in args[1:]])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    given = (kernel, table, rows, scalars, part, parts, count)
    return nt.void(*given), codegen


def region(kernel, table, rows, scalars, parts, count):
    for part in prange(parts):
        call_kernel(kernel, table, rows, scalars, part, parts, count)
    add_one(count)


def compile_kernel(function: Callable[..., None], *taken: Any, **flags: Any) -> Kernel:
    """Compile a function that takes these types and returns nothing."""
    native = numba.cfunc(nt.void(*taken), **FLAGS, **flags)(function)
    text = native.inspect_llvm()
    imports = re.findall(r'^declare .*@"?([^\s"(]+)"?\(', text, re.M)
    imports += re.findall(r'^@"?([^\s"]+)"? = external ', text, re.M)
    return Kernel(
        native.native_name,
        tuple(name for name in imports if not name.startswith("llvm.")),
        kernel_cache.target_machine().emit_object(llvm.parse_assembly(text)),
    )


def source() -> str:
    return Path(__file__).read_text(encoding="utf-8")


@functools.cache
def kernel_for(
    update: Function, dtype: np.dtype[Any], streams: int, reached: str
) -> Any:
    """A rule's kernel, as a C function. ``reached``: a text that differs when something
    differs that the rule reaches by name."""

    def identity() -> tuple[Any, ...]:
        return source(), kernel_cache.fingerprint(update), str(dtype), streams

    def make() -> Kernel:
        constants = 1 + update.__code__.co_argcount - streams
        words, scalars = nt.CPointer(nt.int64), nt.CPointer(numba.from_dtype(dtype))
        element = compiled(concrete(update, dtype, PRIMITIVES, compiled))
        kernel = kernel_of(element, dtype, streams, constants)
        taken = words, nt.int64, scalars, nt.int64, nt.int64, words
        return compile_kernel(kernel, *taken)

    at, number = ctypes.c_void_p, ctypes.c_int64
    native = ctypes.CFUNCTYPE(None, at, number, at, number, number, at)
    return native(kernel_cache.obtain(identity, make))


@functools.cache
def parallel_region() -> Any:
    """The parallel region, as a C function that takes a kernel's address first."""
    numba.get_num_threads()  # starts the threads, which the code is linked to

    def make() -> Kernel:
        words = nt.CPointer(nt.int64)
        taken = nt.int64, words, nt.int64, words, nt.int64, words
        return compile_kernel(region, *taken, parallel=True)

    at, number = ctypes.c_void_p, ctypes.c_int64
    native = ctypes.CFUNCTYPE(None, at, at, number, at, number, at)
    return native(kernel_cache.obtain(source, make))


def reached(update: Function) -> str:
    try:
        return kernel_cache.fingerprint(update)
    except kernel_cache.Unhashable:  # then only the function itself tells
        return ""


# Numba's threading layer "workqueue" ends the process when two threads enter it.
one_region = threading.Lock()


def bind(rule: Rule, segments: Sequence[Segment], count: Array) -> Step:
    """As :func:`fastopt.numpy_ref.bind`; the first for a rule and dtype compiles.

    Where the compiled backend is here, its driver calls our kernel: a step of 1,000
    elements then takes a sixth of the time, and no thread of Numba's is started.
    """
    if cython_cpu.missing() is None and cython_cpu.kernels().OPENMP:
        address = ctypes.cast(kernel(rule, segments), ctypes.c_void_p).value
        return cython_cpu.driver(cast(int, address), rule, segments, count)
    return bind_alone(rule, segments, count)


def kernel(rule: Rule, segments: Sequence[Segment]) -> Any:
    dtype, streams = segments[0].param.dtype, 2 + len(rule.state)
    try:
        return kernel_for(rule.update, dtype, streams, reached(rule.update))
    except NumbaError as error:
        raise TypeError(
            f"Numba cannot compile update of {rule.name!r} for {dtype}: {error}"
        ) from error


def bind_alone(rule: Rule, segments: Sequence[Segment], count: Array) -> Step:
    """The same without the compiled backend: a parallel region of Numba's own."""
    native = kernel(rule, segments)
    dtype = segments[0].param.dtype
    width = 1 + rule.scalar_count
    table = np.array(
        [
            (s.param.ctypes.data, 0)
            + tuple(buffer.ctypes.data for buffer in s.state)
            + (s.param.size, s.group)
            for s in segments
        ],
        np.int64,
    )
    sizes = [segment.param.size for segment in segments]
    groups = 1 + max(segment.group for segment in segments)
    # A cast to float rounds once; NumPy would do it at ten times the cost of a call.
    constants = (REAL[dtype.itemsize] * (groups * width))()
    # Pointers that keep their arrays alive.
    table_at = table.ctypes.data_as(ctypes.c_void_p)
    count_at = count.ctypes.data_as(ctypes.c_void_p)
    kernel_at = ctypes.cast(native, ctypes.c_void_p)

    def step(
        grads: list[Array | None],
        scalars: list[tuple[float, ...]],
        threads: int,
    ) -> bool:
        used = scalars[:groups]  # the last groups may be without parameters
        for row in used:
            if len(row) != width:
                raise TypeError(
                    f"update of {rule.name!r} takes {width - 1} scalars, but scalars "
                    f"returned {len(row) - 1}"
                )
        constants[:] = [value for row in used for value in row]
        given = 0
        for i, (grad, size) in enumerate(zip(grads, sizes, strict=True)):
            address = 0
            if grad is not None:
                address = grad.__array_interface__["data"][0]
                given += size
            table[i, GRAD] = address
        if threads == 1 or given < SERIAL_BELOW:
            native(table_at, len(sizes), constants, 0, 1, count_at)
            return True
        region = parallel_region()
        with one_region:
            before = numba.get_num_threads()  # of this Python thread
            wanted = min(threads, config.NUMBA_NUM_THREADS)
            try:
                if wanted != before:
                    numba.set_num_threads(wanted)
                region(kernel_at, table_at, len(sizes), constants, threads, count_at)
            finally:
                if wanted != before:
                    numba.set_num_threads(before)
        return True

    return step
