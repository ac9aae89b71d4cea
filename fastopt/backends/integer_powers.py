"""Powers and logarithms that are correctly rounded, as functions that Numba compiles.

They are the functions of ``csrc/elementary.h.in``: a fast way with tables, and a slow
way with limbs of 32 bits for what the fast way does not decide. They compute with whole
numbers alone, of 64 bits. A number of 128 bits is a pair of them, its upper half first.
Numba makes float64 of a signed and an unsigned integer, so an expression has integers
of one kind only. :func:`build` compiles the functions for a target.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fastopt import elementary
from fastopt.language import Function

SIGN = np.uint64(2**63)
UNIT = np.uint64(2**52)  # the lowest exponent, or a mantissa of 1
INFINITY = np.uint64(0x7FF << 52)
NAN = np.uint64(0xFFF << 51)
FLOAT_ONE = np.uint64(1023 << 52)  # the bits of 1.0
ZERO, ONE, TWO = np.uint64(0), np.uint64(1), np.uint64(2)
HALF_WORD = np.uint64(2**32 - 1)


def halves(value: int) -> tuple[Any, Any]:
    """Return a number of 128 bits as a pair."""
    return np.uint64(value >> 64 & 2**64 - 1), np.uint64(value & 2**64 - 1)


CONSTANTS, MIDDLE = elementary.tables(), elementary.MIDDLE
# Three words for each logarithm, then two for each power.
LOGARITHMS = [(np.uint64(c), *halves(log)) for c, log in CONSTANTS.logarithms]
POWERS, POWERS_FROM = map(halves, CONSTANTS.powers), 3 * len(LOGARITHMS)
TABLE = np.array([*chain(*LOGARITHMS, *POWERS)])
# Times 2**64. Of two constants, more digits are needed.
C, D = (
    tuple(halves(of >> elementary.TABLE_DIGITS - 64)[1] for of in series)
    for series in (CONSTANTS.c, CONSTANTS.d)
)
C0_HIGH, C0_LOW = halves(CONSTANTS.c[0] >> elementary.TABLE_DIGITS - 127)
D1_HIGH, D1_LOW = halves(CONSTANTS.d[1] >> elementary.TABLE_DIGITS - 128)


class Typed(NamedTuple):
    """A function for kernels."""

    function: Function
    signature: str  # in words that a target gives types to
    apart: bool  # compiled once, even if it is called from several places


FUNCTIONS: list[Typed] = []  # each calls only those before it


def of_type(signature: str, apart: bool = False) -> Callable[[Any], Any]:
    """Say of which type a function is."""

    def noted(function: Any) -> Any:
        FUNCTIONS.append(Typed(function, signature, apart))
        return function

    return noted


# What a target has of its own. These serve NumPy, and Numba on a CPU.


def bits(x: Any) -> Any:
    """Return the bits of a number."""
    return np.float64(x).view(np.uint64)


def real(word: Any) -> Any:
    """Return the number that has these bits."""
    return np.uint64(word).view(np.float64)


def high(a: Any, b: Any) -> Any:
    """Return the upper half of a product."""
    a1, a0, b1, b0 = a >> 32, a & HALF_WORD, b >> 32, b & HALF_WORD
    cross = a1 * b0 + (a0 * b0 >> 32)
    other = a0 * b1 + (cross & HALF_WORD)
    return a1 * b1 + (cross >> 32) + (other >> 32)


def entry(i: Any) -> Any:
    """Return a word of the table."""
    return TABLE[i]


def workspace() -> Any:
    """Return memory for the slow way."""
    return np.zeros(WORKSPACE, np.uint64)


# Numbers of 128 bits


@of_type("pair(word, word, word, word)")
def plus(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return a sum of two pairs."""
    low = b + d
    return a + c + (ONE if low < b else ZERO), low


@of_type("pair(word, word, word, word)")
def minus(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return a difference of two pairs."""
    return a - c - (ONE if b < d else ZERO), b - d


@of_type("pair(word, word, number)")
def left_by(a: Any, b: Any, places: Any) -> Any:
    """Return a pair times ``2**places``, for places from 0 to 127."""
    if places == 0:
        return a, b
    if places >= 64:
        return b << np.uint64(places - 64), ZERO
    by = np.uint64(places)
    return a << by | b >> np.uint64(64 - places), b << by


@of_type("pair(word, word, number)")
def right_by(a: Any, b: Any, places: Any) -> Any:
    """Return a pair over ``2**places``, for places from 0 to 127."""
    if places == 0:
        return a, b
    if places >= 64:
        return ZERO, a >> np.uint64(places - 64)
    by = np.uint64(places)
    return a >> by, b >> by | a << np.uint64(64 - places)


@of_type("pair(word, word, word)")
def scaled(a: Any, b: Any, c: Any) -> Any:
    """Return ``a`` times a pair, over ``2**64``."""
    return plus(high(a, b), a * b, ZERO, high(a, c))


@of_type("pair(word, word, word, word)")
def upper(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return a product of two pairs, over ``2**128``."""
    e, f = scaled(a, c, d)
    return plus(e, f, ZERO, high(b, c))


# The fast way


@of_type("parts(word)")
def parts(word: Any) -> Any:
    """Return m, with 53 binary digits, and e of a finite number that is not 0. It is
    ``m * 2**(e - 52)``, but for its sign."""
    mantissa, exponent = word & (UNIT - ONE), np.int64(word >> 52 & 2047) - 1023
    if exponent == -1023:
        exponent = exponent + 1
        while mantissa < UNIT:
            mantissa = mantissa << 1
            exponent = exponent - 1
    else:
        mantissa = mantissa | UNIT
    return mantissa, exponent


@of_type("logarithm(word)")
def fast_log2(x: Any) -> Any:
    """Return the logarithm to base 2 of a finite number above 0: whether it is below 0,
    a unit, and its size times ``2**unit``, with a relative error below ``2**-73``."""
    mantissa, exponent = parts(x)
    place = np.int64(mantissa >> 42) & 1023
    factor = entry(3 * place)
    # x = 2**exponent / c * (1 + r), with r times 2**64 exact: it is below 2**-10.
    r = mantissa * factor
    less = r >= SIGN
    s = (ZERO - r if less else r) << 10
    square = high(s, s)
    if place >= MIDDLE:
        exponent = exponent + 1
    # log2(1 + r) = r * (c0 - r * (c1 - r * (c2 - ...))). Only c0 needs more digits.
    odd = C[5] + (high(square, C[7]) >> 20)
    odd = C[3] + (high(square, odd) >> 20)
    odd = C[1] + (high(square, odd) >> 20)
    even = C[4] + (high(square, C[6]) >> 20)
    even = C[2] + (high(square, even) >> 20)
    even = high(s, even) >> 10
    odd = odd + even if less else odd - even
    a, b = right_by(high(s, odd), s * odd, 11)
    a, b = plus(C0_HIGH, C0_LOW, a, b) if less else minus(C0_HIGH, C0_LOW, a, b)
    a, b = scaled(s, a, b)
    if exponent == 0 and (factor == 4096 or factor == 2048):
        return less, 137, a, b
    a, b = right_by(a, b, 21)
    if less:
        a, b = minus(ZERO, ZERO, a, b)
    a, b = plus(a, b, entry(3 * place + 1), entry(3 * place + 2))
    a = a + (np.uint64(exponent) << 52)
    negative = a >= SIGN
    if negative:
        a, b = minus(ZERO, ZERO, a, b)
    return negative, 116, a, b


@of_type("decided(word, word, number, word, word)")
def fast_rounded(a: Any, b: Any, k: Any, c: Any, d: Any) -> Any:
    """Return whether a pair from ``2**127`` on, which may be wrong by the pair of c and
    d, decides how it is rounded; and the bits of the pair times ``2**(k - 127)``."""
    rest, half = a & np.uint64(2047), np.uint64(1024)
    word = (np.uint64(k + 1022) << 52) + (a >> 11) + (a >> 10 & ONE)
    e, f = plus(rest - half, b, c, d)
    c, d = left_by(c, d, 1)
    return k >= -1022 and (e > c or (e == c and f > d)), word


@of_type("decided(word, word)")
def fast_power(x: Any, y: Any) -> Any:
    """Return whether the fast way decides ``x**y``, and its bits. ``x`` and ``y`` are
    the bits of finite numbers that are not 0; the sign of ``x`` does not matter."""
    down, unit, a, b = fast_log2(x)
    mantissa, scale = parts(y)
    a, b = scaled(mantissa << 11, a, b)
    down = down != (y >= SIGN)
    extreme = ZERO if down else INFINITY
    left = scale + 117 - unit
    if left <= -128:
        a, b = ZERO, ZERO
    elif left < 0:
        a, b = right_by(a, b, -left)
    elif left > 127:
        return True, FLOAT_ONE if a == 0 and b == 0 else extreme
    else:
        over, under = right_by(a, b, 127 - left)
        if over != 0 or under != 0:
            return True, extreme
        a, b = left_by(a, b, left)
    if down:
        a, b = minus(ZERO, ZERO, a, b)
    k = np.int64(a) >> 52
    if k > 1023:
        return True, INFINITY
    if k < -1076:
        return True, ZERO
    # 2**(i / 512) * 2**r, with r times 2**137 in the pair.
    i = POWERS_FROM + 2 * (np.int64(a >> 43) & 511)
    a, b = left_by(a, b, 21)
    # 2**r - 1 = r * (d1 + r * (d2 + r * (d3 + ...))). Only d1 needs more digits.
    square = high(a, a)
    even = D[4] + (high(square, D[6]) >> 18)
    even = D[2] + (high(square, even) >> 18)
    odd = D[3] + (high(square, D[5]) >> 18)
    q = even + (high(a, odd) >> 9)
    c, d = right_by(high(a, q), a * q, 9)
    c, d = plus(D1_HIGH, D1_LOW, c, d)
    c, d = upper(a, b, c, d)
    a, b = entry(i), entry(i + 1)
    c, d = upper(a, b, c, d)
    c, d = right_by(c, d, 9)
    a, b = plus(a, b, c, d)
    size = np.uint64((-k if k < 0 else k) + 2)
    return fast_rounded(a, b, k, size >> 9, size << 55)


@of_type("decided(word)")
def fast_log(x: Any) -> Any:
    """Return whether the fast way decides the natural logarithm, and its bits."""
    negative, unit, a, b = fast_log2(x)
    a, b = upper(a, b, D1_HIGH, D1_LOW)
    if a == 0 and b == 0:
        return False, ZERO
    k = 127 - unit
    while a < SIGN:
        a, b = left_by(a, b, 1)
        k = k - 1
    decided, word = fast_rounded(a, b, k, ZERO, ONE << 56)
    return decided, word | SIGN if negative else word


# The slow way: numbers from 0 to 2**32, in ten limbs of 32 bits, the lowest first, the
# last before the point. They lie in the workspace at these places. A function writes to
# the place that is its last argument.

LIMBS = 10
DIGITS = 32 * (LIMBS - 1)
LN2, TERM, SQUARE, TOTAL, WHOLE, EXPONENT, REST, VALUE, OTHER = (
    LIMBS * k for k in range(9)
)
PRODUCT = 9 * LIMBS  # of twice as many limbs
WORKSPACE = 11 * LIMBS
LN2_LIMBS = tuple(
    np.uint64(elementary.ln2(DIGITS + 32) >> 32 >> 32 * k & 2**32 - 1)
    for k in range(LIMBS)
)


@of_type("void(space, number)", apart=True)
def cleared(space: Any, to: Any) -> None:
    for i in range(LIMBS):
        space[to + i] = ZERO


@of_type("void(space, number, number, number)", apart=True)
def product(space: Any, a: Any, b: Any, to: Any) -> None:
    for i in range(2 * LIMBS):
        space[PRODUCT + i] = ZERO
    for i in range(LIMBS):
        carry = ZERO
        for j in range(LIMBS):
            carry = carry + space[a + i] * space[b + j] + space[PRODUCT + i + j]
            space[PRODUCT + i + j] = carry & HALF_WORD
            carry = carry >> 32
        space[PRODUCT + i + LIMBS] = carry
    for i in range(LIMBS):
        space[to + i] = space[PRODUCT + LIMBS - 1 + i]


@of_type("void(space, number, word, number)", apart=True)
def times(space: Any, a: Any, b: Any, to: Any) -> None:
    carry = ZERO
    for i in range(LIMBS):
        carry = carry + space[a + i] * b
        space[to + i] = carry & HALF_WORD
        carry = carry >> 32


@of_type("void(space, number, word, number)", apart=True)
def quotient(space: Any, a: Any, b: Any, to: Any) -> None:
    rest = ZERO
    for i in range(LIMBS):
        j = LIMBS - 1 - i
        rest = rest << 32 | space[a + j]
        digit = rest // b
        space[to + j] = digit
        rest = rest - digit * b


@of_type("void(space, number, number, number)", apart=True)
def total(space: Any, a: Any, b: Any, to: Any) -> None:
    carry = ZERO
    for i in range(LIMBS):
        carry = carry + space[a + i] + space[b + i]
        space[to + i] = carry & HALF_WORD
        carry = carry >> 32


@of_type("void(space, number, number, number)", apart=True)
def difference(space: Any, a: Any, b: Any, to: Any) -> None:
    """Write a - b, for b up to a."""
    borrow = ZERO
    for i in range(LIMBS):
        digit = space[a + i] - space[b + i] - borrow
        space[to + i] = digit & HALF_WORD
        borrow = digit >> 63


@of_type("flag(space, number, number)", apart=True)
def below(space: Any, a: Any, b: Any) -> Any:
    i = LIMBS - 1
    while i > 0 and space[a + i] == space[b + i]:
        i = i - 1
    return space[a + i] < space[b + i]


@of_type("flag(space, number)", apart=True)
def is_zero(space: Any, a: Any) -> Any:
    for i in range(LIMBS):
        if space[a + i] != 0:
            return False
    return True


@of_type("word(space, number, number)")
def limb(space: Any, a: Any, i: Any) -> Any:
    return space[a + i] if i >= 0 and i < LIMBS else ZERO


@of_type("word(space, number, number)", apart=True)
def field(space: Any, a: Any, place: Any) -> Any:
    """Return the 64 bits from a place on."""
    i, shift = (place >> 5), np.uint64(place & 31)
    low = limb(space, a, i) | limb(space, a, i + 1) << 32
    if shift == 0:
        return low
    return low >> shift | limb(space, a, i + 2) << (np.uint64(64) - shift)


@of_type("void(space, number, number, number)", apart=True)
def shifted(space: Any, a: Any, places: Any, to: Any) -> None:
    """Write ``a * 2**places`` to another place. What does not fit is cut off."""
    for i in range(LIMBS):
        space[to + i] = field(space, a, 32 * i - places) & HALF_WORD


@of_type("flag(space, word)", apart=True)
def slow_ln(space: Any, x: Any) -> Any:
    """Write the logarithm of a finite number above 0, without its sign, to ``WHOLE``.
    Return whether it is below 0."""
    for i in range(LIMBS):
        space[LN2 + i] = LN2_LIMBS[i]
    cleared(space, TERM)
    cleared(space, TOTAL)
    mantissa, exponent = parts(x)
    one = UNIT
    if mantissa >> 45 >= 181:  # as a number from 0.7 to 1.4
        exponent = exponent + 1
        one = UNIT << 1
    # ln(m) is twice artanh((m - 1) / (m + 1)): a long division, and a series.
    down, less = exponent < 0, mantissa < one
    divisor = mantissa + one
    rest = one - mantissa if less else mantissa - one
    for i in range(DIGITS):
        rest = rest << 1
        if rest >= divisor:
            rest = rest - divisor
            place = DIGITS - 1 - i
            at = TERM + (place >> 5)
            space[at] = space[at] | ONE << np.uint64(place & 31)
    product(space, TERM, TERM, SQUARE)
    k = ONE
    while not is_zero(space, TERM):
        quotient(space, TERM, k, OTHER)
        total(space, TOTAL, OTHER, TOTAL)
        product(space, TERM, SQUARE, TERM)
        k = k + TWO
    times(space, TOTAL, TWO, TOTAL)
    times(space, LN2, np.uint64(-exponent if down else exponent), WHOLE)
    if down == less:
        total(space, WHOLE, TOTAL, WHOLE)
        return down
    if not below(space, WHOLE, TOTAL):
        difference(space, WHOLE, TOTAL, WHOLE)
        return down
    difference(space, TOTAL, WHOLE, WHOLE)
    return less


@of_type("word(space, number, number)", apart=True)
def slow_rounded(space: Any, a: Any, k: Any) -> Any:
    """Return the bits of a number from 1 to 2 times ``2**k``, rounded once."""
    drop = DIGITS - 52 + (-1022 - k if k < -1022 else 0)
    whole, next_bits = field(space, a, drop), field(space, a, drop - 64)
    more = field(space, a, drop - 128)
    # What is so close to the middle lies there, and goes to the even number.
    above = next_bits == SIGN and more <= 1
    middle = above or (next_bits == SIGN - ONE and more >= ~ONE)
    up = whole & ONE if middle else next_bits >> 63
    return (np.uint64(k + 1022 if k > -1022 else 0) << 52) + whole + up


@of_type("number(space, number)", apart=True)
def first_place(space: Any, a: Any) -> Any:
    """Return the exponent of the first binary digit that is not 0."""
    k = 31
    while k > -DIGITS and field(space, a, DIGITS + k) & ONE == 0:
        k = k - 1
    return k


@of_type("word(word)", apart=True)
def slow_log(x: Any) -> Any:
    """Return the bits of the natural logarithm of a finite number above 0."""
    space = workspace()
    negative = slow_ln(space, x)
    if is_zero(space, WHOLE):
        return ZERO
    k = first_place(space, WHOLE)
    shifted(space, WHOLE, -k, VALUE)
    word = slow_rounded(space, VALUE, k)
    return word | SIGN if negative else word


@of_type("word(word, word)", apart=True)
def slow_power(x: Any, y: Any) -> Any:
    """Return the bits of ``x**y`` from those of a finite x above 0, but 1, and of a
    finite y, but 0."""
    space = workspace()
    down = slow_ln(space, x)
    mantissa, scale = parts(y)
    down = down != (y >= SIGN)
    # ln(x) may be tiny and y huge: y * ln(x) is up to 2**12, or else too large.
    if first_place(space, WHOLE) + scale > 11:
        return ZERO if down else INFINITY
    cleared(space, OTHER)
    space[OTHER + LIMBS - 1] = ONE
    space[OTHER + LIMBS - 2] = mantissa >> 20 & HALF_WORD
    space[OTHER + LIMBS - 3] = mantissa << 12 & HALF_WORD
    shifted(space, WHOLE, scale, EXPONENT)
    product(space, EXPONENT, OTHER, EXPONENT)
    # As a multiple k of ln(2), and a rest.
    size = field(space, EXPONENT, DIGITS - 32) // space[LN2 + LIMBS - 2]
    times(space, LN2, size, OTHER)
    while below(space, EXPONENT, OTHER):
        size = size - ONE
        times(space, LN2, size, OTHER)
    difference(space, EXPONENT, OTHER, REST)
    k = np.int64(size)
    if down:
        k = -k
        if not is_zero(space, REST):
            k = k - 1
            difference(space, LN2, REST, REST)
    if k > 1023:
        return INFINITY
    if k < -1076:
        return ZERO
    # exp(rest) is the 256th power of exp(rest / 256), a series.
    quotient(space, REST, np.uint64(256), REST)
    cleared(space, VALUE)
    last = VALUE + LIMBS - 1  # to add 1
    for n in range(24):
        space[last] = space[last] + ONE
        product(space, VALUE, REST, VALUE)
        quotient(space, VALUE, np.uint64(24 - n), VALUE)
    space[last] = space[last] + ONE
    for _ in range(8):
        product(space, VALUE, VALUE, VALUE)
    return slow_rounded(space, VALUE, k)


# For callers


@of_type("real(real, real)", apart=True)
def power(x: Any, y: Any) -> Any:
    """Return ``x**y``, correctly rounded, with the special cases of IEEE 754."""
    a, b = bits(x), bits(y)
    size, exponent = a & ~SIGN, b & ~SIGN
    if exponent == 0 or a == FLOAT_ONE:
        return real(FLOAT_ONE)
    if size > INFINITY or exponent > INFINITY:
        return real(NAN)
    whole, odd = True, False
    if exponent != INFINITY:
        mantissa, scale = parts(b)
        if scale < 52:
            last = np.uint64(52 - scale if scale >= 0 else 53)  # of the whole digits
            whole = mantissa & ((ONE << last) - ONE) == 0
            odd = whole and mantissa >> last & ONE != 0
        elif scale == 52:
            odd = mantissa & ONE != 0
    sign = a & SIGN if odd else ZERO
    extreme = INFINITY if (size > FLOAT_ONE) == (b < SIGN) else ZERO
    if exponent == INFINITY:
        return real(FLOAT_ONE if size == FLOAT_ONE else extreme)
    if size == 0 or size == INFINITY:
        return real(extreme | sign)
    if a >= SIGN and not whole:
        return real(NAN)
    if size == FLOAT_ONE:
        return real(FLOAT_ONE | sign)
    decided, word = fast_power(size, b)
    if not decided:
        word = slow_power(size, b)
    return real(word | sign)


@of_type("real(real)", apart=True)
def log(x: Any) -> Any:
    """Return the natural logarithm, correctly rounded: minus infinity for 0, and NaN
    below."""
    a = bits(x)
    if a & ~SIGN == 0:
        return real(INFINITY | SIGN)
    if a >= INFINITY:
        return real(INFINITY if a == INFINITY else NAN)
    decided, word = fast_log(a)
    if not decided:
        word = slow_log(a)
    return real(word)


def build(
    compiled: Callable[[Function, str, bool], Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the functions by name, compiled for a target that has functions of its
    own. ``compiled`` takes a function, its type and whether it stays apart."""
    made: dict[str, Any] = {**globals(), **own}
    for function, signature, apart in FUNCTIONS:
        name = function.__name__
        copy = types.FunctionType(function.__code__, made, name)
        made[name] = compiled(copy, signature, apart)
    return {of.function.__name__: made[of.function.__name__] for of in FUNCTIONS}
