"""What kernels work on: segments, which consist of streams."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastopt.memory.formats import COMPUTED, Format, format_of

Array: TypeAlias = npt.NDArray[Any]


class Product(NamedTuple):
    """Factored state: a factor for every row and every column of each of several
    matrices. An element of the state is the product of its row's and its column's."""

    rows: Array  # matrices x rows
    columns: Array  # matrices x columns


class Encoded(NamedTuple):
    """Numbers that are stored in fewer bits than kernels compute in. To kernels, it is
    an array of float32."""

    format: Format
    # The stored words; their remainders or scales, if there are any; and behind scales
    # an int64 that counts the groups that were not finite, and not stored.
    parts: tuple[Array, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return COMPUTED

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def size(self) -> int:
        return self.parts[0].size

    def numbers(self) -> Array:
        """Decode the numbers."""
        return self.format.read(self.parts)


def encoded(array: Array | Encoded) -> Array | Encoded:
    """Return an array as kernels take it: ``Encoded`` if its dtype has a format."""
    if isinstance(array, Encoded):
        return array
    format = format_of(array.dtype)
    return array if format is None else Encoded(format, (array.view(format.stored),))


def decoded(array: Array | Encoded) -> Array:
    """Return the numbers of a stream as an array."""
    return array.numbers() if isinstance(array, Encoded) else array


# An operand of a kernel. The kernel reads an array in place. Blocks of the others are
# made for it in the cache, unless it decodes the stored words itself.
Stream: TypeAlias = Array | Product | Encoded


class Segment(NamedTuple):
    """Streams of one length that kernels walk side by side. The arrays are C-contiguous
    and of one dtype; kernels see them as flat. On a GPU they are device arrays."""

    param: Array | Encoded
    state: tuple[Stream, ...]
    row: int  # the row of scalars that applies
    average: Array | None = None  # the moving average of param, if one is kept
    first: int = 0  # the index of its first element among all elements of the optimizer
    copy: Encoded | None = None  # a copy of param in fewer bits, if one is kept

    @property
    def is_factored(self) -> bool:
        return any(isinstance(stream, Product) for stream in self.state)

    @property
    def draws(self) -> bool:
        """Whether a stream is rounded stochastically."""
        streams = self.param, *self.state
        return any(isinstance(s, Encoded) and s.format.stochastic for s in streams)

    @property
    def is_made(self) -> bool:
        """Whether blocks must be made of a stream before a kernel can take it."""
        streams = self.param, *self.state, self.copy
        return any(isinstance(stream, (Product, Encoded)) for stream in streams)
