"""The language of rules: arithmetic that has the same bits on every backend.

A rule may use + - * /, comparisons, & | on comparisons, ``abs()``, and the primitives
of this module, because each of them is correctly rounded, or exact, on every backend.
It may also look at the bits of a number as a :class:`Word`. The bodies here serve NumPy
and the host; the other backends replace them with their own (:func:`concrete`).
"""

from __future__ import annotations

import dis
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
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
    """The square root, correctly rounded.

    Examples
    --------
    >>> from fastopt.rule import sqrt
    >>> sqrt(2.25)
    1.5
    """
    return math.sqrt(x) if type(x) is float else np.sqrt(x)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, else ``b``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import where
    >>> x = np.array([-1.0, 2.0])
    >>> where(x > 0, x, -x)
    array([1., 2.])
    """
    return np.where(condition, a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two; NaN if either is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import maximum
    >>> maximum(np.array([1.0, 5.0]), 3.0)
    array([3., 5.])
    """
    return np.where((a > b) | (a != a), a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two; NaN if either is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import minimum
    >>> minimum(np.array([1.0, 5.0]), 3.0)
    array([1., 3.])
    """
    return np.where((a < b) | (a != a), a, b)


def copysign(a: Any, b: Any) -> Any:
    """The magnitude of ``a`` with the sign of ``b``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import copysign
    >>> copysign(2.0, np.array([-3.0, 0.0]))
    array([-2.,  2.])
    """
    return np.copysign(a, b)


def sign(x: Any) -> Any:
    """-1, 0 or 1 with the sign of ``x``; zeros and NaN are returned as they came.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import sign
    >>> sign(np.array([-3.0, 0.0, 2.0]))
    array([-1.,  0.,  1.])
    """
    return np.where((x > 0) | (x < 0), np.copysign(np.ones_like(x), x), x)


def wide(x: Any) -> Any:
    """``x`` in float64, for sums whose terms would overflow; in ``measure`` only.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import wide
    >>> g = np.float32(1e30)
    >>> bool(wide(g) * wide(g) < np.inf)
    True
    """
    return np.asarray(x, np.float64)


def is_double(x: Any) -> Any:
    """Whether ``x`` is of float64, which is known before anything is computed.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import is_double
    >>> is_double(np.float32(1))
    False
    """
    return np.asarray(x).dtype == np.float64


@dataclass(frozen=True)
class Constant:
    """A constant for words: its value for float32, and its value for float64."""

    float32: int
    float64: int

    def __post_init__(self) -> None:
        for width, value in ((32, self.float32), (64, self.float64)):
            if type(value) is not int or not 0 <= value < 2**width:
                raise ValueError(
                    f"a word of {width} bits must be an integer from 0 to "
                    f"2**{width} - 1, got {value!r}"
                )

    def at(self, dtype: np.dtype[Any]) -> Any:
        """The word that is as wide as this dtype."""
        single = dtype.itemsize == 4
        return np.uint32(self.float32) if single else np.uint64(self.float64)


def word(float32: int, float64: int | None = None) -> Constant:
    """A word that does not depend on an element, to be named outside of functions. One
    number serves both dtypes, or each has its own.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import bits, real, word
    >>> LAST = word(1)
    >>> bool(real(bits(np.float32(1)) + LAST) == np.nextafter(np.float32(1), 2))
    True
    """
    return Constant(float32, float32 if float64 is None else float64)


def _operator(compute: Callable[[Any, Any], Any]) -> Any:
    def operator(self: Word, other: Any) -> Any:
        result = compute(self.array, self.same(other))
        return result if result.dtype == bool else Word(result)

    return operator


class Word:
    """The bits of a number: an unsigned integer, as wide as the number.

    Words have + - * (what does not fit is cut off), & | ^, comparisons with words, and
    << and >> by a number that is written there, as in ``w >> 16``, or by a constant. A
    constant is named outside of functions, ``NAME = word(...)``.

    They are unsigned because C lets only unsigned integers wrap around, and because
    every instruction set can shift vectors of them: AVX2 has no >> for signed integers
    of 64 bits.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import bits, real
    >>> w = bits(np.float32(6.0))
    >>> float(real((w >> 16) << 16))  # the number as bfloat16 has it
    6.0
    """

    __array_ufunc__ = None  # then arrays leave operators to this class

    def __init__(self, array: Any) -> None:
        self.array = array

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a word is not a number: real(w) makes a number of it")

    def __bool__(self) -> bool:
        raise TypeError("a word is neither true nor false: compare it with another")

    def same(self, other: Any) -> Any:
        """The other operand, which must be a word of this width."""
        dtype, given = self.array.dtype, other
        if isinstance(other, (Word, Constant)):
            other = other.array if isinstance(other, Word) else other.at(dtype)
        if getattr(other, "dtype", None) != dtype:
            raise TypeError(
                f"a word meets {given!r}, which is not a word of its width: bits(x) "
                f"makes a word of a number, real(w) a number of a word, and a "
                f"constant is named outside of the function: NAME = word(...)"
            )
        return other

    def distance(self, by: Any) -> Any:
        """By how many bits to shift."""
        kind = self.array.dtype.type
        by = by.at(self.array.dtype) if isinstance(by, Constant) else by
        if type(by) not in (int, kind):
            raise TypeError(
                f"a word is shifted by a number that is written there, or by a "
                f"constant NAME = word(...), not by {by!r}"
            )
        if not 0 <= by < 8 * self.array.itemsize:
            raise ValueError(
                f"a word of {8 * self.array.itemsize} bits cannot be shifted by {by}"
            )
        return kind(by)

    def __lshift__(self, by: Any) -> Word:
        return Word(np.left_shift(self.array, self.distance(by)))

    def __rshift__(self, by: Any) -> Word:
        return Word(np.right_shift(self.array, self.distance(by)))

    # NumPy's functions, for its operators warn where scalars wrap around.
    __add__ = __radd__ = _operator(np.add)
    __mul__ = __rmul__ = _operator(np.multiply)
    __sub__ = _operator(np.subtract)
    __rsub__ = _operator(lambda a, b: np.subtract(b, a))
    __and__ = __rand__ = _operator(np.bitwise_and)
    __or__ = __ror__ = _operator(np.bitwise_or)
    __xor__ = __rxor__ = _operator(np.bitwise_xor)
    __lt__, __le__ = _operator(np.less), _operator(np.less_equal)
    __gt__, __ge__ = _operator(np.greater), _operator(np.greater_equal)
    __eq__, __ne__ = _operator(np.equal), _operator(np.not_equal)


WORDS = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}


def bits(x: Any) -> Any:
    """The bits of a number, as a word. Those of a NaN differ between machines.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import bits, real
    >>> float(real(bits(np.float64(0.5))))
    0.5
    """
    x = np.asarray(x)
    if x.dtype not in WORDS:
        raise TypeError(f"bits takes numbers of float32 or float64, got {x!r}")
    return Word(x.view(WORDS[x.dtype]))


def real(w: Any) -> Any:
    """The number that has these bits.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import bits, real
    >>> real(bits(np.float32([1.0, -2.0])))
    array([ 1., -2.], dtype=float32)
    """
    if not isinstance(w, Word):
        raise TypeError(f"real takes a word that was computed from bits, got {w!r}")
    return w.array.view(f"f{w.array.itemsize}")


PRIMITIVES = (
    *(sqrt, where, maximum, minimum, copysign, sign, wide),
    *(is_double, bits, real),
)
NUMPY = {primitive.__name__: primitive for primitive in PRIMITIVES}


# What follows is written in the language itself, as the helper functions of rules are.

# The bits of x**(-1/3) are about a constant less a third of the bits of x, within 3.5%.
# Each round of Newton's method doubles the digits: measured 3.6 and 4.0 units of eps.
MAGIC = word(0x54A21D2A, 0x553EF0FF289DD796)
THIRD = 1 / 3
FOUR_THIRDS = 4 / 3


def newton(y: Any, x: Any) -> Any:
    """One round of Newton's method, from ``y`` towards ``x**(-1/3)``."""
    return y * (FOUR_THIRDS - THIRD * (x * y * y * y))


def cbrt(x: Any) -> Any:
    """Return the cube root. It is off by a few units in the last place, but all its
    operations are correctly rounded, so that its bits are the same everywhere.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt.rule import cbrt
    >>> cbrt(np.array([8.0, 27.0])).round(6)
    array([2., 3.])
    """
    size = abs(x)
    w = bits(size)
    w = (w >> 2) + (w >> 4)  # no processor divides vectors of integers
    w = w + (w >> 4)
    w = w + (w >> 8)
    w = w + (w >> 16)
    y = newton(newton(newton(real(MAGIC - w), size), size), size)
    y = where(is_double(x), newton(y, size), y)
    return x * y * y


def concrete(
    function: Function,
    dtype: np.dtype[Any],
    primitives: Mapping[str, Callable[..., Any]],
    compiled: Callable[[Function], Any],
) -> Function:
    """Return a copy of an update for one backend and dtype.

    The primitives that it uses become the backend's own (by identity, so a rule may
    import them under any name), its helper functions are made concrete likewise and
    ``compiled``, plain numbers take the dtype, as they do in NumPy when they meet an
    array, and constants among words its width. This holds for all that a function
    reaches by name: globals, closures, defaults of arguments, and tuples of them.
    """

    def fit(value: Any) -> Any:
        if any(value is primitive for primitive in PRIMITIVES):
            return primitives[value.__name__]
        if isinstance(value, types.FunctionType):
            return compiled(concrete(value, dtype, primitives, compiled))
        if isinstance(value, Constant):
            return value.at(dtype)
        if type(value) is tuple:
            return tuple(map(fit, value))
        return dtype.type(value) if type(value) in (int, float) else value

    reached = function.__globals__
    used = [name for name in function.__code__.co_names if name in reached]
    copy = types.FunctionType(
        function.__code__,
        reached | {name: fit(reached[name]) for name in used},
        function.__name__,
        fit(function.__defaults__),
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


def constants(function: Function) -> list[Any]:
    """Return the numbers and functions that are written in a function, but for those
    that say how far to shift, and the numbers that it reads as attributes, such as
    ``math.pi``, because :func:`concrete` does not reach these."""
    code = function.__code__
    distances: list[Any] = []
    others: list[Any] = []
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    names = function.__globals__ | dict(zip(code.co_freevars, cells, strict=True))
    owner: Any = None
    for instruction, after in pairwise(dis.get_instructions(code)):
        attribute = instruction.opname == "LOAD_ATTR"
        value = getattr(owner, str(instruction.argval), None) if attribute else None
        if type(value) in (int, float, tuple):
            others.append(value)
        owner = value if attribute else names.get(instruction.argval)
        # From Python 3.14 on, small integers stand in the instruction.
        if instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            shifts = "SHIFT" in after.opname or after.argrepr[:2] in ("<<", ">>")
            (distances if shifts else others).append(instruction.argval)
    numbers: list[Any] = []
    for folded in (*code.co_consts, *others):
        if type(folded) is not int or folded in others or folded not in distances:
            numbers += folded if isinstance(folded, tuple) else [folded]
    return numbers
