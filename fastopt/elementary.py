"""Powers, logarithms and cosines that are correctly rounded, so that their bits are the
same on every machine. Those of C's mathematics library differ between libraries.

The functions here compute with whole numbers alone, first with 180 binary digits. If
these do not decide how a result is rounded, 320 do. ``csrc/elementary.h.in`` has the
same functions in C, which take less time and serve wherever they were compiled, and
``backends/integer_powers.py`` has them for CUDA kernels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# With how many binary digits after the point to compute, and how many may be wrong.
DIGITS, WRONG = (180, 320), 80
LEAST, MOST = -1022, 1023  # exponents of normal numbers


@functools.cache
def ln2(digits: int) -> int:
    """Return the natural logarithm of 2, times ``2**digits``."""
    return 2 * artanh(1, 3, digits + 16) >> 16


def artanh(n: int, d: int, digits: int) -> int:
    """Return the inverse hyperbolic tangent of ``n / d``, times ``2**digits``."""
    term = (abs(n) << digits) // d
    square, total, k = term * term >> digits, 0, 1
    while term:
        total += term // k
        term, k = term * square >> digits, k + 2
    return total if n > 0 else -total


@functools.lru_cache(maxsize=64)  # of a beta, it is asked for in every step
def ln(x: float, digits: int) -> int:
    """Return the natural logarithm of ``x``, times ``2**digits``."""
    m, e = math.frexp(x)
    if m < 0.7:
        m, e = 2 * m, e - 1
    one = 1 << 53
    whole = int(m * one)
    return e * ln2(digits) + 2 * artanh(whole - one, whole + one, digits)


def exp(x: int, digits: int) -> int:
    """Return e to the power of ``x / 2**digits``, times ``2**digits``. ``x`` is at
    least 0. The result is the 256th power of one whose series is short."""
    digits += 16
    x, term, total, k = x << 8, 1 << digits, 0, 0
    while term:
        total, k = total + term, k + 1
        term = (term * x >> digits) // k
    for _ in range(8):
        total = total * total >> digits
    return total >> 16


@functools.cache
def pi(digits: int) -> int:
    """Return pi, times ``2**digits``: Machin's 16 arctan(1/5) - 4 arctan(1/239)."""
    total = 0
    for factor, n in ((16, 5), (-4, 239)):
        term, k = (factor << digits + 16) // n, 1
        while abs(term) > 1:
            total += term // k
            term, k = -(term // (n * n)), k + 2
    return total >> 16


def sine(x: int, digits: int, first: int) -> int:
    """Return the sine or, if ``first`` is 0, the cosine of ``x / 2**digits``, which is
    in [0, 1], times ``2**digits``."""
    square, total, k = x * x >> digits, 0, first
    term = x if first else 1 << digits
    while term:
        total, k = total + term, k + 2
        term = -(term * square >> digits) // (k * (k - 1))
        term += term == -1  # it was rounded down
    return total


def rounded(value: int, k: int, digits: int) -> float | None:
    """Return ``value / 2**digits``, which is in [1, 2], times ``2**k``, rounded to the
    nearest float. Return None if more digits are needed to do so."""
    drop = digits - 52 + max(0, LEAST - k)
    whole, rest = value >> drop, value & ((1 << drop) - 1)
    beyond = rest - (1 << drop - 1)
    if abs(beyond) >> WRONG == 0:
        if digits < DIGITS[-1]:
            return None
        beyond = whole & 1 or -1  # it lies half-way: to the even one
    whole += beyond > 0
    try:
        return math.ldexp(whole, k - digits + drop)
    except OverflowError:
        return math.inf


def nearest(value: int, digits: int) -> float | None:
    """Return ``value / 2**digits``, above 0 and perhaps small, rounded likewise."""
    k = value.bit_length() - 1 - digits
    return rounded(value << max(-k, 0) >> max(k, 0), k, digits)


def special_power(x: float, y: float) -> float | None:
    """Return the power of zeros, infinities and NaN, as IEEE 754's ``pow``; None for
    what must be computed."""
    if y == 0 or x == 1:
        return 1.0
    if x != x or y != y:
        return x + y
    size = abs(x)
    if math.isinf(y):
        grows = (size > 1) == (y > 0)
        return 1.0 if size == 1 else math.inf if grows else 0.0
    odd = abs(math.fmod(y, 2)) == 1  # y % 2 is rounded where y is below 0
    if size == 0 or math.isinf(size):
        result = math.inf if (size > 1) == (y > 0) else 0.0
        return math.copysign(result, x) if odd else result
    if x < 0 and y % 1:
        return math.nan
    return None


def power(x: float, y: float) -> float:
    """Return ``x**y``, correctly rounded, with the special cases of IEEE 754's ``pow``:
    infinite if it is too large, NaN for a negative ``x`` unless ``y`` is whole.

    >>> power(0.5, 3)
    0.125
    """
    x, y = float(x), float(y)
    special = special_power(x, y)
    if special is not None:
        return special
    sign = -1.0 if x < 0 and y % 2 == 1 else 1.0
    m, e = math.frexp(y)
    whole, e = int(math.ldexp(m, 53)), e - 53
    for digits in DIGITS:
        exponent = ln(abs(x), digits) * whole
        exponent = exponent << e if e > 0 else exponent >> -e
        k, rest = divmod(exponent, ln2(digits))
        if k > MOST:
            return sign * math.inf
        if k < LEAST - 54:
            return sign * 0.0
        result = rounded(exp(rest, digits), k, digits)
        if result is not None:
            return sign * result
    raise AssertionError("the last digits decide")


def log(x: float) -> float:
    """Return the natural logarithm of ``x``, correctly rounded: minus infinity for 0,
    and NaN below.

    >>> log(2.0)
    0.6931471805599453
    """
    x = float(x)
    if not 0 < x < math.inf:
        return x if x > 0 else -math.inf if x == 0 else math.nan
    if x == 1:
        return 0.0
    for digits in DIGITS:
        exact = ln(x, digits)
        result = nearest(abs(exact), digits)
        if result is not None:
            return math.copysign(result, exact)
    raise AssertionError("the last digits decide")


def cospi(x: float) -> float:
    """Return the cosine of pi times ``x``, correctly rounded: 0 half-way between whole
    numbers, and NaN of what is not finite.

    >>> cospi(0.5), cospi(1.0)
    (0.0, -1.0)
    """
    x = abs(float(x))
    if not x < math.inf:
        return math.nan
    x = math.fmod(x, 2.0)
    x = 2 - x if x > 1 else x  # these differences are exact
    sign = 1.0
    if x > 0.5:
        x, sign = 1 - x, -1.0
    if x == 0.5:
        return 0.0
    first = int(x > 0.25)  # then its cosine is the sine of what is left
    n, d = (0.5 - x if first else x).as_integer_ratio()
    for digits in DIGITS:
        result = nearest(sine(pi(digits) * n // d, digits, first), digits)
        if result is not None:
            return sign * result
    raise AssertionError("the last digits decide")


# The fast way of csrc/elementary.h.in and of backends/integer_powers.py needs these.
TABLE_DIGITS = 400  # with which they are computed
LOGARITHMS, POWERS = 1024, 512  # the sizes of the tables
MIDDLE = 424  # the first place of mantissas from the root of 2 on


class Tables(NamedTuple):
    """The constants of the fast way. All of them are whole numbers."""

    # For each 1024th of the mantissas, a factor c that brings a number near to 1, times
    # 2**12, and the logarithm to base 2 of 1 / c, times 2**116.
    logarithms: list[tuple[int, int]]
    powers: list[int]  # 2**(i / 512), times 2**127
    # Of log2(1 + r) = c[0] * r - c[1] * r**2 + ..., and of 2**r - 1 = d[1] * r + ...,
    # times 2**400.
    c: list[int]
    d: list[int]


@functools.cache
def tables() -> Tables:
    """Compute the constants of the fast way."""
    digits, ln_of_2 = TABLE_DIGITS, ln2(TABLE_DIGITS)
    logarithms = []
    for k in range(LOGARITHMS):
        # 2**23 / (2 * (1024 + k) + 1), rounded. It is never half-way.
        divisor = 2 * (LOGARITHMS + k) + 1
        factor = (2**14 * LOGARITHMS + divisor) // (2 * divisor)
        if k in (0, LOGARITHMS - 1):  # next to 1, logarithms are exact
            factor = 2**12 if k == 0 else 2**11
        c = factor / (2**12 if k < MIDDLE else 2**11)
        logarithms.append((factor, -(ln(c, digits) << 116) // ln_of_2))
    powers = [exp(k * ln_of_2 // POWERS, digits) >> digits - 127 for k in range(POWERS)]
    d = [1 << digits]
    for k in range(1, 7):
        d.append((d[-1] * ln_of_2 >> digits) // k)
    c_of_log2 = [(1 << 2 * digits) // (ln_of_2 * k) for k in range(1, 9)]
    return Tables(logarithms, powers, c_of_log2, d)
