"""What both of Numba's targets, CPU and CUDA, build from LLVM's instructions."""

# mypy: disable-error-code="no-untyped-call, import-untyped"

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from fastopt.language import CBRT

MACHINE = platform.machine().lower()
WORD, HALF, BYTES = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
NOTHING = ir.VoidType()


def cbrt(builder: Any, x: Any, dtype: np.dtype[Any]) -> Any:
    """The cube root of a number of this dtype, as in :func:`fastopt.language.cbrt`."""
    magic, rounds = CBRT[dtype]
    third, four_thirds = (ir.Constant(x.type, float(dtype.type(n / 3))) for n in (1, 4))
    integer = ir.IntType(8 * dtype.itemsize)

    def shifted(bits: Any, by: int) -> Any:
        return builder.ashr(bits, ir.Constant(integer, by))

    bits = builder.bitcast(x, integer)
    bits = builder.add(shifted(bits, 2), shifted(bits, 4))
    for by in (4, 8, 16):
        bits = builder.add(bits, shifted(bits, by))
    y = builder.bitcast(builder.sub(ir.Constant(integer, magic), bits), x.type)
    for _ in range(rounds):
        cube = builder.fmul(builder.fmul(builder.fmul(x, y), y), y)
        y = builder.fmul(y, builder.fsub(four_thirds, builder.fmul(third, cube)))
    return builder.fmul(builder.fmul(x, y), y)


def enter_arithmetic(builder: Any, machine: str = MACHINE) -> Any:
    """Set this thread's modes as csrc/arithmetic.h does; the word to leave with."""
    if machine in ("x86_64", "amd64"):
        place = cgutils.alloca_once(builder, HALF)
        _call(builder, "llvm.x86.sse.stmxcsr", builder.bitcast(place, BYTES))
        before = builder.load(place)
        others = builder.and_(before, ir.Constant(HALF, 0xFFFF003F))
        builder.store(builder.or_(others, ir.Constant(HALF, 0x1F80)), place)
        _call(builder, "llvm.x86.sse.ldmxcsr", builder.bitcast(place, BYTES))
        return builder.zext(before, WORD)
    if machine in ("aarch64", "arm64"):
        before = _call(builder, "llvm.aarch64.get.fpcr", result=WORD)
        _call(builder, "llvm.aarch64.set.fpcr", ir.Constant(WORD, 0))
        return before
    return ir.Constant(WORD, 0)


def leave_arithmetic(builder: Any, word: Any, machine: str = MACHINE) -> None:
    """Set the modes to what they were before."""
    if machine in ("x86_64", "amd64"):
        place = cgutils.alloca_once(builder, HALF)
        builder.store(builder.trunc(word, HALF), place)
        _call(builder, "llvm.x86.sse.ldmxcsr", builder.bitcast(place, BYTES))
    elif machine in ("aarch64", "arm64"):
        _call(builder, "llvm.aarch64.set.fpcr", word)


def _call(builder: Any, name: str, *arguments: Any, result: Any = NOTHING) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)
