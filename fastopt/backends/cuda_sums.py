"""Sums that the host needs: norms of gradients, what rules measure, and the squares of
factored state. Their steps wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.backends import cuda_device as device
from fastopt.backends import cuda_jobs, cuda_table
from fastopt.backends.cuda_arrays import DeviceArray, empty
from fastopt.backends.cuda_jobs import Sums, Tiles
from fastopt.backends.cuda_table import address, ceiling
from fastopt.backends.numpy_ref import parts_of
from fastopt.memory.factored import in_order
from fastopt.memory.order import CHUNK, LANES, SPAN, TILE_COLUMNS, TILE_ROWS
from fastopt.memory.segments import Array, Encoded
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.step import Request, Row

if TYPE_CHECKING:
    from fastopt.backends.cuda_runner import OnDevice


class Measuring:
    """The sums of a runner's segments."""

    def __init__(self, runner: OnDevice):
        self.runner = runner
        self._boards: dict[str, Any] = {}  # by what is on them
        self._sums: dict[int, DeviceArray] = {}  # by terms
        self._squares: dict[int, DeviceArray] = {}  # by segments

    def _board(self, what: str, data: Array) -> Any:
        """Return where data of this size is on the device."""
        board = self._boards.get(what)
        if board is None or board.size != data.nbytes:
            board = device.Board(self.runner.context, data.nbytes)
            self._boards[what] = board
        return board

    def sums(
        self, what: str, rows: Sequence[Row], request: Request
    ) -> list[tuple[float, ...] | None]:
        rule = self.runner.rule if what == "rule" else passes.norm
        limits = limits_of(request)
        totals = self._chunks(what, rule, rows, limits)
        results: list[tuple[float, ...] | None] = []
        begin = 0
        for size, grad in zip(
            self.runner.sizes, self.runner.grads_now.tolist(), strict=True
        ):
            count = ceiling(size, CHUNK)
            some = totals[begin : begin + count]
            begin += count
            given = bool(grad) or (not size and self._is_given(len(results)))
            results.append(tuple(map(in_spans, some.T)) if given else None)
        return results

    def _is_given(self, i: int) -> bool:
        """Whether there is a gradient without elements."""
        return bool(self.runner.grads) and self.runner.grads[i] is not None

    def _chunks(
        self, what: str, rule: Rule, rows: Sequence[Row], limits: tuple[float, ...]
    ) -> Array:
        """Return the sums over all chunks, by chunks and terms."""
        states = len(rule.state) if what == "rule" else 0
        table = self.runner.table(what)
        measured = rule.measure, states, self.runner.dtype, table.kinds, table.stride
        job = Sums(*measured, rule.terms, bool(limits))
        total = table.chunk_count
        if not total:
            return np.zeros((0, rule.terms))
        if job.terms not in self._sums:
            shape = total, job.terms
            self._sums[job.terms] = empty(
                shape, np.float64, self.runner.near, self.runner.stream
            )
        sums = self._sums[job.terms]
        count = row_count(rows)
        used = [(*row[: job.row - len(limits)], *limits) for row in rows[:count]]
        data = np.array(used, self.runner.dtype)
        board = self._board(f"rows of {what}", data)
        kernel = cuda_jobs.loaded(job, self.runner.number)
        numbers = (
            *(table.chunks.address, total, table.numbers.address),
            *(
                self.runner.gradients.address,
                board.address,
                sums.address,
                int(count > 1),
            ),
        )
        blocks = ceiling(total * LANES, cuda_table.BLOCK)
        launch = device.Launch(kernel, blocks, cuda_table.BLOCK, numbers)
        stream = self.runner.stream()
        with self.runner.context:
            self.runner.gradients.write_noted(stream)
            board.write(data, stream)
            launch(stream)
        return sums.copy_to_host()

    def squares(
        self, rows: Sequence[Row], request: Request
    ) -> list[tuple[Array, Array] | None]:
        limits = limits_of(request)
        return [
            None
            if not segment.is_factored or grad is None or not grad.size
            else self._square_sums(i, grad, (rows[segment.row][0], *limits))
            for i, (segment, grad) in enumerate(
                zip(self.runner.segments, self.runner.grads, strict=True)
            )
        ]

    def _square_sums(
        self, i: int, grad: Any, scalars: tuple[float, ...]
    ) -> tuple[Array, Array]:
        """Do what :func:`fastopt.memory.factored.square_sums` does, with the gradient
        of a segment."""
        *_, height, width = grad.shape
        matrices = grad.size // (height * width)
        across, down = ceiling(width, TILE_COLUMNS), ceiling(height, TILE_ROWS)
        of_rows = matrices * height * across
        of_columns = down * matrices * width
        if i not in self._squares:
            shape = (of_rows + of_columns,)
            self._squares[i] = empty(
                shape, np.float64, self.runner.near, self.runner.stream
            )
        sums, data = self._squares[i], np.array(scalars, self.runner.dtype)
        rows = self._board(f"rows of squares {i}", data)
        format = grad.format if isinstance(grad, Encoded) else None
        place, stream = address(parts_of(grad)[0]), self.runner.stream()
        with self.runner.context:
            rows.write(data, stream)
        for by_column, count, to in (
            (False, of_rows * LANES, sums[:of_rows]),
            (True, of_columns, sums[of_rows:]),
        ):
            job = Tiles(by_column, len(scalars) > 1, self.runner.dtype, format)
            numbers = matrices, height, width, place, rows.address, to.address
            kernel = cuda_jobs.loaded(job, self.runner.number)
            blocks = ceiling(count, cuda_table.BLOCK)
            launch = device.Launch(kernel, blocks, cuda_table.BLOCK, numbers)
            with self.runner.context:
                launch(stream)
        found = sums.copy_to_host()
        by_row = found[:of_rows].reshape(matrices, height, across)
        by_column_sums = found[of_rows:].reshape(down, matrices, width)
        return in_order(np.moveaxis(by_row, 2, 0)), in_order(by_column_sums)


def row_count(rows: Sequence[Row]) -> int:
    """Return 1 if all rows are one object, or else their number."""
    first = rows[0]
    return 1 if all([row is first for row in rows]) else len(rows)


def in_spans(chunks: Array) -> float:
    """Add up the sums of chunks in order, as the reference does."""
    total = 0.0
    for first in range(0, len(chunks), SPAN):
        span = np.concatenate([[0.0], chunks[first : first + SPAN]])
        total += float(np.add.accumulate(span)[-1])  # one after the other
    return total


def limits_of(request: Request) -> tuple[float, ...]:
    """Return what kernels take to clip each element; nothing if they are not to."""
    return request.limits if request.limits_gradients else ()
