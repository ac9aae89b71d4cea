"""What kernels work on: segments, which consist of streams."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


class Product(NamedTuple):
    """Factored state: a factor for every row and every column of each of several
    matrices. An element of the state is the product of its row's and its column's."""

    rows: Array  # matrices x rows
    columns: Array  # matrices x columns


# An operand of a kernel: an array, which the kernel reads in place, or a Product, of
# which blocks are computed for the kernel.
Stream: TypeAlias = Array | Product


class Segment(NamedTuple):
    """Streams of one length that kernels walk side by side. The arrays are C-contiguous
    and of one dtype; kernels see them as flat. On a GPU they are device arrays."""

    param: Array
    state: tuple[Stream, ...]
    row: int  # the row of scalars that applies
    average: Array | None = None  # the moving average of param, if one is kept

    @property
    def is_factored(self) -> bool:
        return any(isinstance(stream, Product) for stream in self.state)
