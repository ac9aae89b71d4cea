"""Formats: how numbers are stored in fewer bits than kernels compute in.

Kernels compute in float32. A format encodes a float32 number as a word, which is
stored, and decodes it again. Both functions are written in the language of rules, so
every backend compiles them and computes the same bits. Rules do not know about formats.

There are three kinds:

- A word is stored as it is: bfloat16, float16.
- A word is split: its upper half is a bfloat16 number, the rest is stored elsewhere. So
  parameters of bfloat16 have the precision of float32 between steps.
- Groups of 64 numbers share a scale, and each has a code of 8 bits.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastopt.language import NUMPY, Function, Word, concrete
from fastopt.memory.order import GROUP
from fastopt.rule import bits, copysign, real, sqrt, where, word

Parts: TypeAlias = tuple[npt.NDArray[Any], ...]

# The dtypes that kernels compute in. Decoded numbers have the first.
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
COMPUTED = DTYPES[0]
# Arrays of fewer elements keep float32 state, which takes little memory there.
SMALLEST = 4096
INFINITY = 0x7F800000  # the bits of infinity: a NaN has more
# For messages.
WANTED_DTYPES = "float32, float64, float16 or ml_dtypes' bfloat16"


@dataclass(frozen=True)
class Format:
    """A format in which numbers are stored.

    Parameters
    ----------
    name
        The name in saved state and in the names of kernels. Users write the names of
        ``fastopt.optimizer.formats``.
    decode
        Takes a stored word, and the scale if there is one. Returns the number.
    encode
        Takes a number, and the scale if there is one. Returns the word to store, in the
        lowest bits. A ``stochastic`` format takes a random word as well.
    public
        The name of the dtype that users see for such arrays: NumPy's or ml_dtypes'.
    remainder
        The dtype in which the bits below those of ``public`` are stored, if a word is
        split.
    scale
        Takes the bits of the greatest magnitude of a group. Returns the group's scale.
    curve
        Takes a number that is not negative. Returns the number that is encoded in its
        place, such as its root. Groups with a negative number are not stored.
    """

    name: str
    decode: Function
    encode: Function
    public: str
    remainder: str = ""
    scale: Function | None = None
    curve: Function | None = None

    def function(self, function: Function | None) -> Any:
        """Return a function that works on arrays."""
        return function and concrete(function, COMPUTED, NUMPY, lambda helper: helper)

    def read(self, parts: Parts) -> npt.NDArray[Any]:
        """Decode an array, which is stored in several ``parts``."""
        words = parts[0].astype(np.uint32)
        scales: Parts = ()
        if self.remainder:
            words = words << self.shift | parts[1]
        elif self.scale:
            scales = (spread(parts[1], words),)
        with np.errstate(all="ignore"):
            numbers: npt.NDArray[Any] = self.function(self.decode)(Word(words), *scales)
        return numbers

    @property
    def dtype(self) -> np.dtype[Any]:
        """The ``public`` dtype. Raise ImportError if it needs ml_dtypes, which is not
        installed."""
        module: Any = np
        if not hasattr(np, self.public):
            try:
                module = importlib.import_module("ml_dtypes")
            except ImportError as error:
                raise ImportError(
                    f"arrays of {self.public} need ml_dtypes; pip install ml_dtypes"
                ) from error
        dtype: np.dtype[Any] = np.dtype(getattr(module, self.public))
        return dtype

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of the stored words, an unsigned integer."""
        return np.dtype(STORED[self.public])

    @property
    def shift(self) -> np.uint32:
        """The number of bits below those of ``public``."""
        return np.uint32(8 * np.dtype(self.remainder or np.void).itemsize)

    @property
    def second(self) -> tuple[str, np.dtype[Any], int] | None:
        """The name of the second part, its dtype, and the number of elements for each
        element of it."""
        if self.remainder:
            return "remainder", np.dtype(self.remainder), 1
        return ("scale", COMPUTED, GROUP) if self.scale else None

    @property
    def strides(self) -> tuple[int, ...]:
        """The bytes of each part for a group of elements."""
        first = (GROUP * self.stored.itemsize,)
        if self.second is None:
            return first
        _, dtype, elements = self.second
        return *first, GROUP // elements * dtype.itemsize

    @property
    def stochastic(self) -> bool:
        """Whether numbers are rounded up or down at random."""
        arguments = 2 if self.scale is None else 3
        return self.encode.__code__.co_argcount == arguments

    def place(self, stream: int) -> tuple[int, int]:
        """Return which random word a stream rounds by, and how far to shift it to the
        left. Streams 2 k and 2 k + 1 use the upper and the lower half of word k. A
        parameter with a remainder of 8 bits uses the lowest byte of word 1, because
        buffers 2 and 3 are rounded by the upper bits of its halves."""
        return (1, 0) if self.remainder else (stream // 2, stream % 2 * 16)

    @property
    def nearest(self) -> Format:
        """The format with the same words that rounds to nearest, if there is one."""
        return FORMATS.get(NEAREST.get(self.name, self.name), self)

    def curved(self, numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return what is encoded in place of numbers."""
        if self.curve is None:
            return numbers
        with np.errstate(all="ignore"):
            curved: npt.NDArray[Any] = self.function(self.curve)(numbers)
        return curved

    def tops(self, numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the bits of the greatest magnitude of each group. Those of a group
        that cannot be stored are at least INFINITY."""
        padded = np.zeros(-(-numbers.size // GROUP) * GROUP, COMPUTED)
        padded[: numbers.size] = self.curved(numbers).reshape(-1)
        padded = padded if self.curve else abs(padded)
        words = padded.view(np.uint32).reshape(-1, GROUP)
        tops: npt.NDArray[Any] = words.max(axis=1, initial=0)
        return tops

    def written(
        self,
        numbers: npt.NDArray[Any],
        draw: tuple[int, int, int] = (0, 0, 0),
        parts: Parts = (),
    ) -> Parts:
        """Encode an array of numbers, and return its parts.

        A stochastic format draws random words. They depend on ``draw`` only: the index
        of the first element among all elements of an optimizer, the number of the step,
        and the index of the stream: 0 for the parameter, from 2 on for the state.

        The groups of a format with scales need finite numbers. Other groups are taken
        from ``parts``, if these are given, and the last array returned is their count.
        """
        numbers = np.asarray(numbers, COMPUTED)
        random: tuple[Word, ...] = ()
        if self.stochastic:
            first, step, stream = draw
            pair, shift = self.place(stream)
            random = (drawn(numbers.shape, first, step, pair) << shift,)
        encode = self.function(self.encode)
        scales: Parts = ()
        with np.errstate(all="ignore"):
            if self.scale:
                numbers, tops = self.curved(numbers), self.tops(numbers)
                scale = np.asarray(self.function(self.scale)(Word(tops)), COMPUTED)
                scales = (spread(scale, numbers),)
            words: npt.NDArray[Any] = encode(numbers, *scales, *random).array
        if self.remainder:
            return (words >> self.shift).astype(self.stored), words.astype(
                self.remainder
            )
        words = words.astype(self.stored)
        if not self.scale:
            return (words,)
        finite = tops < INFINITY
        if parts:
            words = np.where(spread(finite, words), words, parts[0])
            scale = np.where(finite, scale, parts[1])
            return words, scale, np.array([np.count_nonzero(~finite)])
        return words, scale


def spread(groups: npt.NDArray[Any], like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Repeat the value of each group for each of its elements."""
    return np.repeat(groups, GROUP)[: like.size].reshape(like.shape)


def drawn(shape: tuple[int, ...], first: int, step: int, pair: int) -> Word:
    """Return a random word for each element, from the index of the first one on."""
    begin, *given = (np.asarray(k % 2**32, np.uint32) for k in (first, step, pair))
    count = np.arange(math.prod(shape), dtype=np.uint64).astype(np.uint32)
    random = concrete(random_word, COMPUTED, NUMPY, lambda helper: helper)
    words: Word = random(Word(count.reshape(shape) + begin), *map(Word, given))
    return words


# bfloat16: the upper half of a float32.

ONE = word(1)
BELOW_HALF = word(0x7FFF)  # rounds to the nearest, together with the lowest bit kept
QUIET = word(0x00400000)  # a bit that every NaN may have


def decode_bf16(w: Word) -> Any:
    return real(w << 16)


def encode_bf16(x: Any) -> Any:
    """Round to the nearest, ties to even. A NaN keeps its upper bits."""
    w = bits(x)
    nearest = w + BELOW_HALF + ((w >> 16) & ONE)
    return bits(where(x == x, real(nearest), real(w | QUIET))) >> 16


# Stochastic rounding rounds up with the probability that makes the mean exact. So even
# changes that are too small for rounding to nearest are not lost on average.

FIRST_FACTOR = word(0x7FEB352D)
SECOND_FACTOR = word(0x846CA68B)
STEP_FACTOR = word(0x9E3779B9)


def mixed(w: Word) -> Any:
    """Hash a word, by C. Wellons' lowbias32, which takes two multiplications."""
    w = (w ^ (w >> 16)) * FIRST_FACTOR
    w = (w ^ (w >> 15)) * SECOND_FACTOR
    return w ^ (w >> 16)


def random_start(step: Word, pair: Word) -> Any:
    return mixed(step * STEP_FACTOR + pair + ONE)


def random_slope(start: Word) -> Any:
    return mixed(start) | ONE


def scrambled(w: Word) -> Any:
    return (w ^ (w >> 16)) * FIRST_FACTOR


def random_word(element: Word, step: Word, pair: Word) -> Any:
    """Return a pseudorandom word. It depends on the arguments only, so it is the same
    on every backend, for any number of threads, and in a resumed run. Two streams share
    it: the first uses the upper half of its bits, the second the lower half.

    In each step, the word is a linear function of the element's index, whose slope and
    start are hashes of the step. So the words of two elements are independent over the
    steps, which the mean and the variance of rounding need (J. Carter and M. Wegman,
    Universal classes of hash functions, 1979). The last multiplication mixes the words
    of one step.
    """
    start = random_start(step, pair)
    return scrambled(element * random_slope(start) + start)


def encode_bf16_sr(x: Any, random: Word) -> Any:
    """Round up or down at random, by the upper half of a random word."""
    w = bits(x)
    return bits(where(x == x, real(w + (random >> 16)), real(w | QUIET))) >> 16


# float16: 5 bits of exponent, 10 of mantissa.

SIGN16 = word(0x8000)
REST16 = word(0x7FFF)
EXPONENT = word(0x7F800000)
BELOW_HALF16 = word(0x0FFF)
REBIAS = word(112 << 23)  # the difference of the biases, 127 - 15
HALF_BITS = word(0x3F000000)
SCALE = 2.0**112  # undoes this difference
HALF = 0.5
LEAST_NORMAL = 2.0**-14
OVERFLOW = 65520.0  # from here on, infinity is the nearest
# With one exponent more than float16 has, these have the words of infinity and of NaN.
INFINITE = 65536.0
NOT_A_NUMBER = 98304.0


def decode_fp16(w: Word) -> Any:
    shifted = (w & REST16) << 13
    size = real(shifted) * SCALE  # exact, for subnormals too
    size = where(size >= INFINITE, real(shifted | EXPONENT), size)
    return real(bits(size) | ((w & SIGN16) << 16))


def encode_fp16(x: Any) -> Any:
    """Round to the nearest, ties to even."""
    size = abs(x)
    size = where(size < OVERFLOW, size, INFINITE)
    size = where(x == x, size, NOT_A_NUMBER)
    w = bits(size)
    normal = (w + BELOW_HALF16 + ((w >> 13) & ONE) - REBIAS) >> 13
    # The sum is rounded to a multiple of 2**-24, the smallest number of float16.
    small = bits(size + HALF) - HALF_BITS
    y = where(size < LEAST_NORMAL, real(small), real(normal))
    return bits(y) | ((bits(x) >> 16) & SIGN16)


# bfloat16 with a remainder, a signed integer of 8 or 16 bits that is added below. So
# the bfloat16 number alone is the nearest. With 16 bits, all finite numbers and
# infinities are exact; with 8, the last 8 bits are rounded.

UPPER16 = word(0xFFFF0000)
HALF8 = word(0x80)
BYTE = word(0xFF)


def decode_r16(w: Word) -> Any:
    """Subtract 1 from the upper half if the remainder is negative, unless the bfloat16
    number is zero: then a user has set it, and to subtract would make a NaN."""
    borrowed = (((w >> 16) & REST16) + REST16) & (w & SIGN16)
    return real(w - (borrowed << 1))


def encode_r16(x: Any) -> Any:
    """A NaN has no remainder, because it could become zero."""
    w = bits(where(x == x, x, real((bits(x) & UPPER16) | QUIET)))
    return w + ((w & SIGN16) << 1)


def decode_r8(w: Word) -> Any:
    return decode_r16(w << 8)


def split_r8(w: Word) -> Any:
    """Return the upper 24 bits of a float32 as bfloat16 and remainder."""
    return (w + ((w & SIGN16) << 1)) >> 8


def encode_r8(x: Any, random: Word) -> Any:
    """Round up or down at random, by the lowest byte of a random word. Otherwise a
    decay of 1e-6 of a number would be lost here, too."""
    w = bits(x)
    added = real(w + (random & BYTE))
    return split_r8(bits(where(x == x, added, real((w & UPPER16) | QUIET))))


def encode_r8_nearest(x: Any) -> Any:
    """Round to the nearest, ties away from zero."""
    w = bits(x)
    return split_r8(bits(where(x == x, real(w + HALF8), real((w & UPPER16) | QUIET))))


# Codes of 8 bits, rounded stochastically. The bits of 2**23 with a word below it set
# are those of their sum. Numbers from 256 to 512 have 15 bits for what is below 1.

INTEGER = word(0x4B000000)  # the bits of 2**23
INTEGERS = 2.0**23
SIGN8 = word(0x80)
OFFSET_INTEGERS = 2.0**23 + 128
OFFSET = 256.0
MIDDLE = 768.0  # 512, for the exponent, and 256, for codes below 0
UNSIGNED = 255.0
TWICE_SIGNED = 254.0
ZERO = 0.0
UNIT = 1.0
QUARTER = 0.25


def scale_m8(top: Word) -> Any:
    return real(top)


def decode_m8(w: Word, scale: Any) -> Any:
    code = real((w ^ SIGN8) | INTEGER) - OFFSET_INTEGERS
    return scale * (code / (TWICE_SIGNED - abs(code)))


def encode_m8(x: Any, scale: Any, random: Word) -> Any:
    """Encode softsign, 2 y / (1 + abs(y)) of y = x / scale. It has more codes for small
    numbers. The code is signed."""
    # A quarter of each, so that the sum is finite.
    unit = scale * QUARTER
    unit = where(unit > ZERO, unit, UNIT)
    size = abs(x) * QUARTER
    y = copysign(TWICE_SIGNED * (size / (unit + size)), x)
    return (bits(y + MIDDLE) + (random >> 18)) >> 14


def curve_v8(x: Any) -> Any:
    return sqrt(x)


def scale_v8(top: Word) -> Any:
    return real(top) / UNSIGNED


def decode_v8(w: Word, scale: Any) -> Any:
    y = (real(w | INTEGER) - INTEGERS) * scale
    return y * y


def encode_v8(x: Any, scale: Any, random: Word) -> Any:
    """Encode a root. The code of a number above 0 is at least 1, because rules divide
    by the root."""
    least = where(x > ZERO, UNIT, ZERO)
    y = x * (UNIT / scale)
    y = where(y > least, y, least)
    y = where(y < UNSIGNED, y, UNSIGNED)
    return (bits(y + OFFSET) + (random >> 17)) >> 15


# The dtypes of stored words, by the dtypes that users see.
STORED = {
    "bfloat16": "uint16",
    "float16": "uint16",
    "int8": "uint8",
    "uint8": "uint8",
}

NEAREST = {"bf16_sr": "bf16", "r8": "r8_nearest"}

FORMATS = {
    format.name: format
    for format in (
        Format("bf16", decode_bf16, encode_bf16, "bfloat16"),
        Format("bf16_sr", decode_bf16, encode_bf16_sr, "bfloat16"),
        Format("fp16", decode_fp16, encode_fp16, "float16"),
        Format("r8", decode_r8, encode_r8, "bfloat16", remainder="uint8"),
        Format(
            "r8_nearest", decode_r8, encode_r8_nearest, "bfloat16", remainder="uint8"
        ),
        Format("r16", decode_r16, encode_r16, "bfloat16", remainder="uint16"),
        Format("m8", decode_m8, encode_m8, "int8", scale=scale_m8),
        Format("v8", decode_v8, encode_v8, "uint8", scale=scale_v8, curve=curve_v8),
    )
}


@functools.cache
def format_of(dtype: np.dtype[Any]) -> Format | None:
    """Return the format of arrays of a dtype, or None if kernels do not decode it. The
    first of the formats with that dtype rounds to nearest."""
    if dtype.itemsize != 2 or not dtype.isnative:  # codes need scales
        return None
    return next((f for f in FORMATS.values() if f.public == dtype.name), None)


def computed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that kernels compute in for arrays of a dtype."""
    return dtype if format_of(dtype) is None else COMPUTED
