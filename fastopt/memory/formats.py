"""How streams are stored in fewer bits than kernels compute in.

Kernels compute in float32. A format says how a number of float32 becomes a stored word,
and how a word becomes a number again. Its two functions are written in the language of
rules, so every backend compiles them, and the bits are the same on each. A rule says
nothing about formats.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastopt.language import NUMPY, Function, Word, concrete
from fastopt.rule import bits, real, where, word

# What kernels compute in, and that for numbers that are stored in fewer bits.
DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
COMPUTED = DTYPES[0]
# The state of fewer elements stays plain: it takes little memory, and needs more care.
SMALLEST = 4096
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
        Takes a number, and returns the word to store, in its lowest bits. If it is
        ``stochastic``, it takes a random word, too.
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

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of arrays of it, for users. That of bfloat16 is ml_dtypes'."""
        if self.decode is decode_fp16:
            return np.dtype(np.float16)
        try:
            module = importlib.import_module("ml_dtypes")
        except ImportError as error:
            raise ImportError(
                "arrays of bfloat16 need ml_dtypes; pip install ml_dtypes"
            ) from error
        dtype: np.dtype[Any] = np.dtype(module.bfloat16)
        return dtype

    @property
    def stochastic(self) -> bool:
        """Whether it rounds up or down at random."""
        return self.encode.__code__.co_argcount == 2

    def written(
        self, numbers: npt.NDArray[Any], draw: tuple[int, int, int] = (0, 0, 0)
    ) -> npt.NDArray[Any]:
        """Return the words to store for these numbers. ``draw`` decides what a
        stochastic format draws: the number of the first element among all that an
        optimizer updates, that of the step, and the stream's."""
        encode = concrete(self.encode, COMPUTED, NUMPY, lambda helper: helper)
        with np.errstate(all="ignore"):
            random = (drawn(numbers.shape, draw),) if self.stochastic else ()
            words: npt.NDArray[Any] = encode(numbers, *random).array
        return words.astype(self.stored)


def drawn(shape: tuple[int, ...], draw: tuple[int, int, int]) -> Word:
    """Return a random word for each element of an array."""
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


# Stochastic rounding: up with the probability that makes the expected result exact, so
# that what is too small to move a number does move it now and then.

FIRST_FACTOR = word(0x7FEB352D)
SECOND_FACTOR = word(0x846CA68B)
STEP_FACTOR = word(0x9E3779B9)


def mixed(w: Word) -> Any:
    """Return a hash of a word: C. Wellons' lowbias32, which has two multiplications."""
    w = (w ^ (w >> 16)) * FIRST_FACTOR
    w = (w ^ (w >> 15)) * SECOND_FACTOR
    return w ^ (w >> 16)


def random_word(element: Word, step: Word, pair: Word) -> Any:
    """Return a word that depends on nothing but these, so that it is the same on every
    backend, for any number of threads, and when a run is resumed. It serves a pair of
    streams: the upper half is the first one's, the lower half the other's."""
    return mixed(element ^ mixed(step * STEP_FACTOR + pair))


def encode_bf16_sr(x: Any, random: Word) -> Any:
    """Round up or down, by the upper half of a random word."""
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
        Format("bf16", decode_bf16, encode_bf16, np.dtype(np.uint16)),
        Format("bf16_sr", decode_bf16, encode_bf16_sr, np.dtype(np.uint16)),
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
