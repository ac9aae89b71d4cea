"""How streams are stored in fewer bits than kernels compute in.

Kernels compute in float32. A format says how a number of float32 becomes a stored word,
and how a word becomes a number again. Its two functions are written in the language of
rules, so every backend compiles them, and the bits are the same on each. A rule says
nothing about formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastopt.language import NUMPY, Function, Word, concrete
from fastopt.rule import bits, real, where, word

# What kernels compute in, and that for numbers that are stored in fewer bits.
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
COMPUTED = DTYPES[0]
# For messages.
WANTED_DTYPES = "float32, float64, float16 or ml_dtypes' bfloat16"


@dataclass(frozen=True)
class Format:
    """A format of stored numbers.

    Parameters
    ----------
    name
        What users and kernels call it.
    decode
        Takes the stored word, and returns the number.
    encode
        Takes a number, and returns the word to store, in its lowest bits.
    stored
        The dtype of what is stored: an unsigned integer.
    """

    name: str
    decode: Function
    encode: Function
    stored: np.dtype[Any]

    def read(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the numbers of an array of stored words."""
        decode = concrete(self.decode, COMPUTED, NUMPY, lambda helper: helper)
        with np.errstate(all="ignore"):
            numbers: npt.NDArray[Any] = decode(Word(stored.astype(np.uint32)))
        return numbers

    def written(self, numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the words to store for these numbers."""
        encode = concrete(self.encode, COMPUTED, NUMPY, lambda helper: helper)
        with np.errstate(all="ignore"):
            words: npt.NDArray[Any] = encode(numbers).array
        return words.astype(self.stored)


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
        Format("bf16", decode_bf16, encode_bf16, np.dtype(np.uint16)),
        Format("fp16", decode_fp16, encode_fp16, np.dtype(np.uint16)),
    )
}


def format_of(dtype: np.dtype[Any]) -> Format | None:
    """Return the format of a dtype's elements, or None if kernels do not decode it.
    ``bfloat16`` is not NumPy's own: ml_dtypes provides it."""
    if dtype == np.float16:
        return FORMATS["fp16"]
    if dtype.itemsize == 2 and dtype.name == "bfloat16":
        return FORMATS["bf16"]
    return None


def computed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that kernels compute in for elements of a dtype."""
    return dtype if format_of(dtype) is None else COMPUTED
