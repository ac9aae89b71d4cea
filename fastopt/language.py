"""The language of rules: arithmetic that has the same bits on every backend.

A rule may use + - * /, comparisons, & | on comparisons, ``abs()``, and the primitives
of this module, because each of them is correctly rounded, or exact, on every backend.
The bodies here serve NumPy and the host; the other backends replace them with their own
(:func:`concrete`).
"""

from __future__ import annotations

import dis
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np


class Function(Protocol):
    """A plain Python function: backends compile its code."""

    __name__: str
    __module__: str
    __code__: types.CodeType

    __defaults__: tuple[Any, ...] | None

    @property
    def __globals__(self) -> dict[str, Any]: ...
    @property
    def __closure__(self) -> tuple[types.CellType, ...] | None: ...

    def __hash__(self) -> int: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def sqrt(x: Any) -> Any:
    """The square root, correctly rounded."""
    return math.sqrt(x) if type(x) is float else np.sqrt(x)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``."""
    return np.where(condition, a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two; NaN if either is NaN."""
    return np.where((a > b) | (a != a), a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two; NaN if either is NaN."""
    return np.where((a < b) | (a != a), a, b)


def copysign(a: Any, b: Any) -> Any:
    """The magnitude of ``a`` with the sign of ``b``."""
    return np.copysign(a, b)


def sign(x: Any) -> Any:
    """-1, 0 or 1 with the sign of ``x``; zeros and NaN are returned as they came."""
    return np.where((x > 0) | (x < 0), np.copysign(np.ones_like(x), x), x)


def wide(x: Any) -> Any:
    """``x`` in float64, for sums whose terms would overflow; in ``measure`` only."""
    return np.asarray(x, np.float64)


# The bits of x**(-1/3) are about these less a third of the bits of x, within 3.5%. Each
# round of Newton's method doubles the digits: measured 3.6 and 4.0 units of eps.
CBRT = {
    np.dtype(np.float32): (0x54A21D2A, 3),
    np.dtype(np.float64): (0x553EF0FF289DD796, 4),
}


def cbrt(x: Any) -> Any:
    """Return the cube root of a number that is not negative. It is off by a few units
    in the last place, but all its operations are correctly rounded, so that its bits
    are the same everywhere."""
    x = np.asarray(x)
    magic, rounds = CBRT[x.dtype]
    third, four_thirds = x.dtype.type(1 / 3), x.dtype.type(4 / 3)
    bits = np.atleast_1d(x).view(x.dtype.str.replace("f", "i"))
    bits = (bits >> 2) + (bits >> 4)  # no processor divides vectors of integers
    bits = bits + (bits >> 4)
    bits = bits + (bits >> 8)
    bits = bits + (bits >> 16)
    y = (bits.dtype.type(magic) - bits).view(x.dtype).reshape(x.shape)
    for _ in range(rounds):
        y = y * (four_thirds - third * (x * y * y * y))
    return x * y * y


PRIMITIVES = (sqrt, where, maximum, minimum, copysign, sign, wide, cbrt)


def concrete(
    function: Function,
    dtype: np.dtype[Any],
    primitives: Mapping[str, Callable[..., Any]],
    compiled: Callable[[Function], Any],
) -> Function:
    """Return a copy of an update for one backend and dtype.

    The primitives that it uses become the backend's own (by identity, so a rule may
    import them under any name), its helper functions are made concrete likewise and
    ``compiled``, and plain numbers take the dtype, as they do in NumPy when they meet
    an array.
    """

    def fit(value: Any) -> Any:
        if any(value is primitive for primitive in PRIMITIVES):
            return primitives[value.__name__]
        if isinstance(value, types.FunctionType):
            return compiled(concrete(value, dtype, primitives, compiled))
        return dtype.type(value) if type(value) in (int, float) else value

    reached = function.__globals__
    used = [name for name in function.__code__.co_names if name in reached]
    copy = types.FunctionType(
        function.__code__,
        reached | {name: fit(reached[name]) for name in used},
        function.__name__,
        function.__defaults__,
        closure=tuple(
            types.CellType(fit(cell.cell_contents))
            for cell in function.__closure__ or ()
        ),
    )
    copy.__module__ = function.__module__
    return copy


def reached(function: Function, found: list[Function]) -> list[Function]:
    """A function and the helper functions that it calls, directly or not."""
    if function not in found:
        found.append(function)
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        names = function.__code__.co_names
        for value in (*map(function.__globals__.get, names), *cells):
            ours = any(value is primitive for primitive in PRIMITIVES)
            if isinstance(value, types.FunctionType) and not ours:
                reached(value, found)
    return found


def constants(code: types.CodeType) -> list[Any]:
    """The numbers, and functions, written in a function's code."""
    found: list[Any] = []
    for folded in code.co_consts:
        found += folded if isinstance(folded, tuple) else [folded]
    # From Python 3.14 on, small integers stand in the instruction.
    found += [
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname == "LOAD_SMALL_INT"
    ]
    return found
