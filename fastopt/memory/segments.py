"""What kernels walk: arrays of one shape and dtype, side by side."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


class Product(NamedTuple):
    """A factor for every row and every column of each of several matrices."""

    rows: Array  # matrices x rows
    columns: Array  # matrices x columns


class Segment(NamedTuple):
    """One stretch of memory that a kernel walks: C-contiguous arrays of one shape and
    dtype, which kernels see as flat. On a GPU they are device arrays."""

    param: Array
    state: tuple[Array, ...]
    row: int  # the row of scalars that applies
    average: Array | None = None  # the moving average of param, if one is kept
    product: Product | None = None  # what kernels take for the last of the state
