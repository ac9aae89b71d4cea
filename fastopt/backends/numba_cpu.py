"""The JIT backend: a rule compiled by Numba, for all CPU cores.

A kernel does a stretch of one segment, as those of the compiled backend do, and is
compiled once for a rule and dtype; so is one for what a rule measures. The compiled
backend's driver calls them by address, or, where that is missing, our own: a walk over
the segments in a parallel region, which is compiled once for all rules. Everything
stays on disk as plain object code (see ``kernel_cache``).
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
from functools import partial
from operator import setitem
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import config, extending, njit, prange
from numba.core import cgutils
from numba.core import types as nt
from numba.core.errors import NumbaError, TypingError
from numba.extending import intrinsic
from numba.np.ufunc import parallel

from fastopt import language
from fastopt.backends import cython_cpu, kernel_cache, kernel_link, llvm_ir, numpy_ref
from fastopt.backends.kernel_cache import Kernel
from fastopt.backends.numpy_ref import Step
from fastopt.language import Function, concrete
from fastopt.memory import order
from fastopt.memory.arena import state_arena
from fastopt.memory.arrays import as_array
from fastopt.memory.formats import FORMATS
from fastopt.memory.order import ALIGN_FROM, CACHE_LINE, LANES, SERIAL_BELOW
from fastopt.memory.segments import Array, Segment
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call
from fastopt.step import PLAIN, Request, Row

__all__ = ["as_array", "bind", "formats", "gram", "missing", "scalars", "state_arena"]

formats = frozenset(FORMATS)

# Columns of the table, as in the compiled backend: p, g, state..., length, row.
PARAM, GRAD, LENGTH, ROW = 0, 1, -2, -1
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
    **llvm_ir.primitives(extending),
}

# The kernels


def accesses(dtype: np.dtype[Any], streams: int, constants: int) -> tuple[Any, ...]:
    """Return functions that load and store element ``index`` of a row's streams, and
    one that loads the scalars. All of them take addresses."""
    real = numba.from_dtype(dtype)

    def pointer(builder: Any, row: Any, stream: int, index: Any) -> Any:
        words = builder.inttoptr(row, WORD.as_pointer())
        address = builder.load(builder.gep(words, [WORD(stream)]))
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
    def load(typingctx, row, index):
        def codegen(context, builder, signature, args):
            row, index = args
            values = [
                apart(builder, builder.load(pointer(builder, row, i, index)), i)
                for i in range(streams)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return nt.UniTuple(real, streams)(row, index), codegen

    @intrinsic
    def load_scalars(typingctx, scalars):
        def codegen(context, builder, signature, args):
            first = builder.inttoptr(args[0], FLOAT[dtype.itemsize].as_pointer())
            values = [
                builder.load(builder.gep(first, [WORD(i)])) for i in range(constants)
            ]
            return context.make_tuple(builder, signature.return_type, values)

        return nt.UniTuple(real, constants)(scalars), codegen

    @intrinsic
    def store(typingctx, row, index, values):
        if values != nt.UniTuple(real, streams - 1):
            raise TypingError(
                f"it must return (p, *state), here {streams - 1} values of type "
                f"{real}; it returns {values}"
            )

        def codegen(context, builder, signature, args):
            row, index, values = args
            written = [i for i in range(streams) if i != GRAD]
            values = cgutils.unpack_tuple(builder, values)
            for i, value in zip(written, values, strict=True):
                apart(builder, builder.store(value, pointer(builder, row, i, index)), i)
            return context.get_dummy_value()

        return nt.void(row, index, values), codegen

    return load, load_scalars, store


def update_kernel(
    update: Any, dtype: np.dtype[Any], streams: int, constants: int, terms: int
) -> Any:
    """Return the function that updates elements [start, start + n) of a segment."""
    load, load_scalars, store = accesses(dtype, streams, constants)

    def kernel(row, start, n, scalars):
        constants = load_scalars(scalars)
        for i in range(start, start + n):
            old = load(row, i)
            g = old[1] * constants[0]
            store(row, i, update(old[0], g, *old[2:], *constants[1:]))

    return kernel


def measure_kernel(
    measure: Any, dtype: np.dtype[Any], streams: int, constants: int, terms: int
) -> Any:
    """Return the function that sums up what is measured, over at most a chunk."""
    load, load_scalars, _ = accesses(dtype, streams, constants)
    double = FLOAT[8]

    @intrinsic
    def make_lanes(typingctx):
        def codegen(context, builder, signature, args):
            room = cgutils.alloca_once(builder, ir.ArrayType(double, terms * LANES))
            return builder.bitcast(room, double.as_pointer())

        return nt.CPointer(nt.float64)(), codegen

    @intrinsic
    def add(typingctx, lanes, lane, values):
        kinds = list(values) if isinstance(values, nt.BaseTuple) else []
        if len(kinds) != terms or not all(isinstance(k, nt.Float) for k in kinds):
            raise TypingError(f"it must return a tuple of {terms} numbers")

        def codegen(context, builder, signature, args):
            lanes, lane, values = args
            values = cgutils.unpack_tuple(builder, values)
            for k, value in enumerate(values):
                value = context.cast(builder, value, kinds[k], nt.float64)
                place = builder.gep(lanes, [builder.add(lane, WORD(k * LANES))])
                builder.store(builder.fadd(builder.load(place), value), place)
            return context.get_dummy_value()

        return nt.void(lanes, lane, values), codegen

    @intrinsic
    def put(typingctx, place, index, value):
        def codegen(context, builder, signature, args):
            first = builder.inttoptr(args[0], double.as_pointer())
            builder.store(args[2], builder.gep(first, [args[1]]))
            return context.get_dummy_value()

        return nt.void(place, index, value), codegen

    def kernel(row, start, n, scalars, sums):
        constants = load_scalars(scalars)
        lanes = make_lanes()
        sum_of = numba.carray(lanes, terms * LANES)
        for k in range(terms * LANES):
            sum_of[k] = 0.0
        end = start + n
        whole = start + n // LANES * LANES
        for first in range(start, whole, LANES):
            for lane in range(LANES):
                old = load(row, first + lane)
                g = old[1] * constants[0]
                add(lanes, lane, measure(old[0], g, *old[2:], *constants[1:]))
        for i in range(whole, end):
            old = load(row, i)
            g = old[1] * constants[0]
            add(lanes, i - whole, measure(old[0], g, *old[2:], *constants[1:]))
        for k in range(terms):
            half = LANES // 2
            while half:
                for lane in range(k * LANES, k * LANES + half):
                    sum_of[lane] += sum_of[lane + half]
                half //= 2
            put(sums, k, sum_of[k * LANES])

    return kernel


# The driver, for where the compiled backend's is missing


@intrinsic
def word(typingctx, address, index):
    def codegen(context, builder, signature, args):
        words = builder.inttoptr(args[0], WORD.as_pointer())
        return builder.load(builder.gep(words, [args[1]]))

    return nt.int64(address, index), codegen


@intrinsic
def add_one(typingctx, address):
    # In native code, so that no interrupt comes between a step and its count.
    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], WORD.as_pointer())
        builder.store(builder.add(builder.load(place), WORD(1)), place)
        return context.get_dummy_value()

    return nt.void(address), codegen


@intrinsic
def call_kernel(typingctx, kernel, row, start, n, scalars):
    """Call the kernel at this address."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [WORD] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return nt.void(kernel, row, start, n, scalars), codegen


@intrinsic
def enter(typingctx):
    def codegen(context, builder, signature, args):
        return llvm_ir.enter_arithmetic(builder)

    return nt.int64(), codegen


@intrinsic
def leave(typingctx, modes):
    def codegen(context, builder, signature, args):
        llvm_ir.leave_arithmetic(builder, args[0])
        return context.get_dummy_value()

    return nt.void(modes), codegen


@compiled
def length_of(table, row, columns):
    length = word(table, (row + 1) * columns + LENGTH)
    return length if word(table, row * columns + GRAD) else 0


@compiled
def walk(kernel, table, rows, columns, scalars, stride, itemsize, part, parts):
    """One part of several of a step over all segments."""
    modes = enter()
    line = CACHE_LINE // itemsize
    total = 0
    for row in range(rows):
        total += length_of(table, row, columns)
    share = (total + parts * line - 1) // (parts * line) * line
    first, last = part * share, (part + 1) * share
    for row in range(rows):
        length = length_of(table, row, columns)
        begin, end = max(first, 0), min(last, length)
        if begin < end:
            at = table + row * columns * 8
            constants = scalars + word(at, columns + ROW) * stride
            # On their own the few up to a cache line's end, so that no store of the
            # rest crosses a line.
            cut = begin
            if end - begin >= ALIGN_FROM:
                cut += -(word(at, PARAM) // itemsize + begin) % line
                call_kernel(kernel, at, begin, cut - begin, constants)
            call_kernel(kernel, at, cut, end - cut, constants)
        first -= length
        last -= length
    leave(modes)


def serial(kernel, table, rows, columns, scalars, stride, itemsize, parts, count):
    walk(kernel, table, rows, columns, scalars, stride, itemsize, 0, 1)
    add_one(count)


def region(kernel, table, rows, columns, scalars, stride, itemsize, parts, count):
    for part in prange(parts):
        walk(kernel, table, rows, columns, scalars, stride, itemsize, part, parts)
    add_one(count)


def compile_kernel(function: Callable[..., None], *taken: Any, **flags: Any) -> Kernel:
    """Compile a function that takes these types and returns nothing."""
    native = numba.cfunc(nt.void(*taken), **FLAGS, **flags)(function)
    text = native.inspect_llvm()
    if not flags:  # our parallel region calls Numba's threads
        llvm_ir.check_native(text)
    imports = re.findall(r'^declare .*@"?([^\s"(]+)"?\(', text, re.M)
    imports += re.findall(r'^@"?([^\s"]+)"? = external ', text, re.M)
    return Kernel(
        native.native_name,
        tuple(name for name in imports if not name.startswith("llvm.")),
        kernel_link.target_machine().emit_object(llvm.parse_assembly(text)),
    )


def source() -> str:
    """Return the text of all files that decide what a kernel is compiled to."""
    files = map(Path, (__file__, llvm_ir.__file__, language.__file__, order.__file__))
    return "".join(file.read_text(encoding="utf-8") for file in files)


@functools.cache
def kernel_for(
    build: Callable[..., Any],
    element: Function,
    dtype: np.dtype[Any],
    streams: int,
    terms: int,
    reached: str,
) -> int:
    """Return the address of a kernel for a function of a rule. The text ``reached``
    differs when something differs that the rule reaches by name."""
    kind = build.__name__

    def identity() -> tuple[Any, ...]:
        return source(), kernel_cache.fingerprint(element), str(dtype), streams, kind

    def make() -> Kernel:
        constants = 1 + element.__code__.co_argcount - streams
        function = compiled(concrete(element, dtype, PRIMITIVES, compiled))
        kernel = build(function, dtype, streams, constants, terms)
        return compile_kernel(kernel, *[nt.int64] * kernel.__code__.co_argcount)

    return kernel_link.obtain(identity, make)


@functools.cache
def own_driver(function: Callable[..., None], **flags: Any) -> Any:
    """Return the walk or the region as a C function."""
    if flags:
        numba.get_num_threads()  # starts the threads, which the code is linked to

    def identity() -> tuple[Any, ...]:
        return source(), function.__name__

    def make() -> Kernel:
        return compile_kernel(function, *[nt.int64] * 9, **flags)

    native = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)
    return native(kernel_link.obtain(identity, make))


def reached(update: Function) -> str:
    try:
        return kernel_cache.fingerprint(update)
    except kernel_cache.Unhashable:  # then only the function itself tells
        return ""


# Numba's threading layer "workqueue" ends the process when two threads enter it.
one_region = threading.Lock()


def bind(rule: Rule, segments: Sequence[Segment], count: Array, carry: Array) -> Step:
    """Do what :func:`numpy_ref.bind` does. The first call for a rule and dtype
    compiles.

    Where the compiled backend is here, its driver calls our kernels: a step of 1,000
    elements then takes a sixth of the time, and no thread of Numba's is started.
    """
    if cython_cpu.missing() is None and cython_cpu.driver().OPENMP:
        kernels = kernel(rule, "update", segments), kernel(rule, "measure", segments)
        return cython_cpu.step((*kernels, None, None), rule, segments, count, carry)
    return bind_alone(rule, segments, count, carry)


def kernel(rule: Rule, what: str, segments: Sequence[Segment]) -> Any:
    """Return the address of the kernel for a rule's update or measure, or None."""
    element = getattr(rule, what)
    if element is None:
        return None
    dtype, streams = segments[0].param.dtype, 2 + len(rule.state)
    build = update_kernel if what == "update" else measure_kernel
    try:
        return kernel_for(build, element, dtype, streams, rule.terms, reached(element))
    except NumbaError as error:
        words = re.sub(r"\x1b\[\d*m", "", str(error))  # coloured, with colorama
        raise TypeError(
            f"Numba cannot compile {what} of {rule.name!r} for {dtype}: {words}"
        ) from error


def bind_alone(
    rule: Rule, segments: Sequence[Segment], count: Array, carry: Array
) -> Step:
    return Alone(rule, segments, count, carry)  # without the compiled backend


def scalars(rule: Rule) -> Any:
    return (numpy_ref if cython_cpu.missing() else cython_cpu).scalars(rule)


def gram(tasks: Sequence[Sequence[Array | None]], threads: int) -> Array:
    gram = numpy_ref.gram if cython_cpu.missing() else cython_cpu.gram
    return gram(tasks, threads)


class Alone(Step):
    """Steps by our own driver; sums, what a step does besides its rule, and all of it
    where streams must be decoded or multiplied, are left to NumPy."""

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], count: Array, carry: Array
    ):
        super().__init__(rule, segments, count)
        dtype = segments[0].param.dtype
        self.rule, self.kernel = rule, kernel(rule, "update", segments)
        self.table = np.array(
            [
                (cython_cpu.address(s.param), 0)
                + tuple(map(cython_cpu.address, s.state))
                + (s.param.size, s.row)
                for s in segments
            ],
            np.int64,
        )
        self.sets, self.width = carry.shape[1], 1 + rule.scalar_count
        self.averages = [s.average for s in segments if s.average is not None]
        self.averaging: Alone | None = None
        # A cast to float rounds once; NumPy would do it at ten times a call's cost.
        self.constants = (REAL[dtype.itemsize] * (self.sets * self.width))()

    @standard
    def calls(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> list[Call]:
        if any(segment.is_made for segment in self.segments):
            return super().calls(rows, request, steps)
        for row in rows:
            if len(row) != self.width:
                raise TypeError(
                    f"update of {self.rule.name!r} takes {self.width - 1} scalars, but "
                    f"scalars returned {len(row) - 1}"
                )
        given = 0
        read = list(self.grads)  # or what was clipped of them
        for i, (grad, segment) in enumerate(
            zip(self.grads, self.segments, strict=True)
        ):
            if grad is not None and request.limits_gradients:
                read[i] = self.grad(i, rows[segment.row][0], request)
            address = 0
            if grad is not None:
                address = read[i].__array_interface__["data"][0]
                given += grad.size
            self.table[i, GRAD] = address
        if request.limits_gradients:
            rows = [(1.0, *row[1:]) for row in rows]
        rows = rows[: self.sets]  # those that these segments are of
        self.constants[:] = [value for row in rows for value in row]
        return [
            *self._native(1 if given < SERIAL_BELOW else request.threads),
            partial(len, read),  # which live until the call before this one
            *(self._average(request) if self.averages else ()),
            *[
                partial(setitem, part, ..., 0)
                for task in self.tasks
                for grad in task
                if request.zero_grads and grad is not None
                for part in numpy_ref.parts_of(grad)
            ],
        ]

    def _average(self, request: Request) -> list[Call]:
        """Return the calls that move the averages. The new parameters take the place of
        gradients."""
        if self.averaging is None:
            segments = [Segment(average, (), 0) for average in self.averages]
            count, carry = np.zeros(1, np.int64), np.zeros((2, 1, 0))
            self.averaging = Alone(passes.average, segments, count, carry)
        self.averaging.take([segment.param for segment in self.segments])
        rows: list[Row] = [(1.0, request.ema_weight)]
        return self.averaging.calls(rows, Request(threads=request.threads))

    def _native(self, threads: int) -> list[Call]:
        """Return the calls of native code, with no Python code between them."""
        arguments = (
            self.kernel,
            self.table.ctypes.data,
            *self.table.shape,
            ctypes.addressof(self.constants),
            ctypes.sizeof(self.constants) // self.sets,
            self.type().itemsize,
            threads,
            self.count.ctypes.data,
        )
        if threads == 1:
            return [partial(own_driver(serial), *arguments)]
        native = partial(own_driver(region, parallel=True), *arguments)
        before = numba.get_num_threads()  # of this Python thread
        wanted = min(threads, config.NUMBA_NUM_THREADS)
        # A handler of signals that came while we held the lock would wait for it.
        return [
            one_region.acquire,
            partial(parallel._set_num_threads, wanted),
            native,
            partial(parallel._set_num_threads, before),
            one_region.release,
        ]
