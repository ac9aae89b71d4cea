"""What kernels walk: arrays of one shape and dtype, side by side."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


class Product(NamedTuple):
    """Factored state: a factor for every row and every column of each of several
    matrices. Kernels take blocks of the products, which are made just before."""

    rows: Array  # matrices x rows
    columns: Array  # matrices x columns


# An operand of kernels, as it is stored: an array as kernels take it, or something from
# which the blocks that they take are made.
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
