"""What both of Numba's targets, CPU and CUDA, build from LLVM's instructions."""

# mypy: disable-error-code="no-untyped-call, import-untyped"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from fastopt.rule import CBRT


def cbrt(builder: Any, x: Any, dtype: np.dtype[Any]) -> Any:
    """The cube root of a number of this dtype, as in :func:`fastopt.rule.cbrt`."""
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
