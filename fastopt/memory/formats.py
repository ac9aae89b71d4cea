"""Formats: how numbers are stored in fewer bits than kernels compute in.

Kernels compute in float32. A format encodes a float32 number as a word, which is
stored, and decodes it again. Both functions are written in the language of rules, so
every backend compiles them and computes the same bits. Rules do not know about formats.
"""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastopt.language import NUMPY, Function, Word, concrete
from fastopt.rule import bits, real, where, word

# The dtypes that kernels compute in. Decoded numbers have the first.
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
COMPUTED = DTYPES[0]
# Arrays of fewer elements keep float32 state, which takes little memory there.
SMALLEST = 4096
# For messages.
WANTED_DTYPES = "float32, float64, float16 or ml_dtypes' bfloat16"


@dataclass(frozen=True)
class Format:
    """A format in which numbers are stored.

    Parameters
    ----------
    name
        The name in ``formats=`` and in the names of kernels.
    decode
        Takes a stored word and returns its number.
    encode
        Takes a number and returns the word to store, in the lowest bits. A
        ``stochastic`` format takes a random word as well.
    stored
        The dtype of the stored words, an unsigned integer.
    public
        The name of the dtype of such arrays, which users see: NumPy's or ml_dtypes'.
    """

    name: str
    decode: Function
    encode: Function
    stored: np.dtype[Any]
    public: str

    def read(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Decode an array of stored words."""
        decode = concrete(self.decode, COMPUTED, NUMPY, lambda helper: helper)
        with np.errstate(all="ignore"):
            numbers: npt.NDArray[Any] = decode(Word(stored.astype(np.uint32)))
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
    def stochastic(self) -> bool:
        """Whether numbers are rounded up or down at random."""
        return self.encode.__code__.co_argcount == 2

    def written(
        self, numbers: npt.NDArray[Any], draw: tuple[int, int, int] = (0, 0, 0)
    ) -> npt.NDArray[Any]:
        """Encode an array of numbers.

        A stochastic format draws random words. They depend on ``draw`` only: the index
        of the first element among all elements of an optimizer, the number of the step,
        and the index of the stream.
        """
        encode = concrete(self.encode, COMPUTED, NUMPY, lambda helper: helper)
        with np.errstate(all="ignore"):
            random = (drawn(numbers.shape, draw),) if self.stochastic else ()
            words: npt.NDArray[Any] = encode(numbers, *random).array
        return words.astype(self.stored)


def drawn(shape: tuple[int, ...], draw: tuple[int, int, int]) -> Word:
    """Return a random word for each element, as :meth:`Format.written` says."""
    first, step, pair = (
        np.asarray(k % 2**32, np.uint32) for k in (*draw[:2], draw[2] // 2)
    )
    count = np.arange(math.prod(shape), dtype=np.uint64).astype(np.uint32)
    random = concrete(random_word, COMPUTED, NUMPY, lambda helper: helper)
    word: Word = random(Word(count.reshape(shape) + first), Word(step), Word(pair))
    return word << 16 if draw[2] % 2 else word


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


def random_word(element: Word, step: Word, pair: Word) -> Any:
    """Return a pseudorandom word. It depends on the arguments only, so it is the same
    on every backend, for any number of threads, and in a resumed run. Two streams share
    it: the first uses the upper half of its bits, the second the lower half."""
    return mixed(element ^ mixed(step * STEP_FACTOR + pair))


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


FORMATS = {
    format.name: format
    for format in (
        Format("bf16", decode_bf16, encode_bf16, np.dtype(np.uint16), "bfloat16"),
        Format("bf16_sr", decode_bf16, encode_bf16_sr, np.dtype(np.uint16), "bfloat16"),
        Format("fp16", decode_fp16, encode_fp16, np.dtype(np.uint16), "float16"),
    )
}


@functools.cache
def format_of(dtype: np.dtype[Any]) -> Format | None:
    """Return the format of arrays of a dtype, or None if kernels do not decode it. The
    first of the formats with that dtype rounds to nearest."""
    alike = (format for format in FORMATS.values() if format.public == dtype.name)
    return next(alike, None) if dtype.isnative else None


def computed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that kernels compute in for arrays of a dtype."""
    return dtype if format_of(dtype) is None else COMPUTED
