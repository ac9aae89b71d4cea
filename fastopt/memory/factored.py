"""Factored averages of squares: for a matrix, only one value per row and per column is
stored. Shazeer & Stern 2018, arXiv:1804.04235.

``v[i, j] = rows[i] * columns[j] / mean(rows)`` stands for the average of the squares of
the gradients, where ``rows`` and ``columns`` are the averages of their means. These
means are computed from float64 sums, in one order. The matrix is cut into tiles. In a
tile, a row is summed by lanes and the lanes by halves, and a column from above. Then
the tiles are added up, one after the other.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np

from fastopt.memory.arena import zeros
from fastopt.memory.order import LANES, TILE_COLUMNS, TILE_ROWS
from fastopt.memory.segments import Array, Product
from fastopt.rule import Rule


def is_factored(rule: Rule, array: Array) -> bool:
    """Whether an array's state is stored as one value per row and per column."""
    return rule.factored and array.ndim > 1


def kept_shape(rule: Rule, array: Array) -> tuple[int, ...]:
    """Return the shape of its state: that of the array, or rows and then columns."""
    if not is_factored(rule, array):
        return tuple(array.shape)
    *matrices, rows, columns = array.shape
    return (*matrices, rows + columns)


class Factors:
    """The averages of one array, on the host, and what kernels see of them.

    There are two sets, which are used in turn: one is valid at even counts of steps. So
    they change at the instant when a step is counted.
    """

    def __init__(
        self, module: ModuleType, array: Array, kept: Array | None, near: Any = None
    ):
        *matrices, self.height, self.width = array.shape
        self.count = math.prod(matrices)
        self.sets = np.zeros((2, *matrices, self.height + self.width), array.dtype)
        if kept is not None:
            self.sets[:] = kept
        sizes = self.height, self.width
        seen = [np.empty((self.count, size), array.dtype) for size in sizes]
        arena = functools.partial(module.state_arena, near=near)
        self.product = Product(*zeros(arena, seen, 1)[0])

    def keep(self, t: int) -> None:
        """Make the next set, that of step ``t``, as it was."""
        self.sets[t % 2] = self.sets[(t + 1) % 2]

    def advance(
        self, t: int, sums: tuple[Array, Array], weight: float, least: float
    ) -> None:
        """Make the next set from the sums of the squares by row and by column."""
        old = self.sets[(t + 1) % 2].reshape(self.count, -1)
        new = self.sets[t % 2].reshape(self.count, -1)
        sizes = self.width, self.height
        means = [total / n for total, n in zip(sums, sizes, strict=True)]
        with np.errstate(all="ignore"):
            both = np.concatenate(means, axis=1)
            new[:] = old + weight * (both - old.astype(np.float64))
            rows, columns = np.split(new, [self.height], axis=1)
            mean = in_tiles(rows) / self.height
            rows = rows / np.where(mean < least, least, mean)[:, None]
            for seen, value in zip(self.product, (rows, columns), strict=True):
                seen.reshape(-1)[:] = value.astype(seen.dtype).reshape(-1)


def in_lanes(numbers: Array) -> Array:
    """Sum over the last axis in float64: first by lanes, then the lanes by halves."""
    size = numbers.shape[-1]
    count = min(LANES, 1 << max(size - 1, 0).bit_length())  # more would be zeros
    lanes = np.zeros((*numbers.shape[:-1], count))
    for first in range(0, size, count):
        some = numbers[..., first : first + count]
        lanes[..., : some.shape[-1]] += some
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def in_tiles(numbers: Array) -> Array:
    """Sum over the last axis: each tile by lanes, then the tiles' sums the same way."""
    while (size := numbers.shape[-1]) > TILE_COLUMNS:
        tiles = -(-size // TILE_COLUMNS)
        padded = np.zeros((*numbers.shape[:-1], tiles * TILE_COLUMNS))
        padded[..., :size] = numbers
        numbers = in_lanes(padded.reshape(*numbers.shape[:-1], tiles, TILE_COLUMNS))
    return in_lanes(numbers)


def in_order(parts: Iterable[Array]) -> Array:
    """Add up arrays in their order."""
    return functools.reduce(operator.add, parts)


def square_sums(grad: Array) -> tuple[Array, Array]:
    """Return the sums of squares of matrices by row and by column, as every backend
    must compute them."""
    _, height, width = grad.shape
    by_row, by_column = [], []
    for j in range(0, width, TILE_COLUMNS):
        squares = np.square(grad[:, :, j : j + TILE_COLUMNS].astype(np.float64))
        by_row.append(in_lanes(squares))
        tiles = [squares[:, i : i + TILE_ROWS] for i in range(0, height, TILE_ROWS)]
        down = [in_order(np.moveaxis(tile, 1, 0)) for tile in tiles]
        by_column.append(in_order(down))
    return in_order(by_row), np.concatenate(by_column, axis=1)
