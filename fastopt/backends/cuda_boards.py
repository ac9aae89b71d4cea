"""What a runner keeps on the device: tables of segments, and boards, which the host
writes anew when their numbers change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.backends import cuda_device as device
from fastopt.backends import cuda_table
from fastopt.backends.cuda_arrays import DeviceArray, empty
from fastopt.backends.cuda_table import table_of
from fastopt.memory.segments import Array

if TYPE_CHECKING:
    from fastopt.backends.cuda_runner import OnDevice


class DeviceTable(NamedTuple):
    """A table of segments in device memory."""

    kinds: tuple[cuda_table.Formats, ...]
    stride: int
    block_count: int
    chunk_count: int
    span_count: int
    numbers: DeviceArray
    blocks: DeviceArray
    chunks: DeviceArray
    spans: DeviceArray


def device_table(runner: OnDevice, what: str) -> DeviceTable:
    """Return a runner's table, on the device. See :meth:`OnDevice.table`."""
    segments = runner.segments
    if what != "update":
        segments = [segment._replace(average=None) for segment in segments]
    if what == "gradients":
        segments = [segment._replace(state=()) for segment in segments]
    block = cuda_table.BLOCK * cuda_table.width_of(runner.dtype)
    table = table_of(segments, runner.grad_formats, runner.dtype, block)
    arrays = []
    for numbers in (table.numbers, table.blocks, table.chunks, table.spans):
        array = empty(numbers.shape, np.int64, runner.near, runner.stream)
        device.set_aside(runner.context, array.address, numbers)
        arrays.append(array)
    counts = len(table.blocks), len(table.chunks), len(table.spans)
    return DeviceTable(table.kinds, table.stride, *counts, *arrays)


class NumberBoard:
    """A board that is written if its numbers change."""

    def __init__(self, runner: OnDevice, shape: tuple[int, ...], dtype: Any):
        self.numbers: Array = np.zeros(shape, dtype)
        self._context = runner.context
        self.board = device.Board(runner.context, self.numbers.nbytes)
        self.address, self._is_new = self.board.address, True

    def note(self, numbers: Any) -> None:
        """Note what is to be written."""
        new = np.empty_like(self.numbers)
        new[...] = numbers
        if new.tobytes() != self.numbers.tobytes():  # -0.0 is not 0.0
            self._is_new = True  # first, because an interrupt may come
            self.numbers[...] = new

    def write_noted(self, stream: int) -> None:
        """Write what was noted, if it is new, while the context is current."""
        if self._is_new:
            self.board.write(self.numbers, stream)
            self._is_new = False

    def write(self, numbers: Any, stream: int) -> None:
        self.note(numbers)
        self.write_noted(stream)

    def forget(self) -> None:
        """Let the next write take place even if the numbers are the same."""
        self._is_new = True

    def read(self, stream: int) -> Array:
        """Wait for the stream, and return what is on the device."""
        numbers = np.empty_like(self.numbers)
        with self._context:
            device.download(numbers, self.address, stream)
        return numbers

    def set_aside(self, numbers: Any) -> None:
        """Write the numbers at once. Nothing on the device may use the board yet."""
        self.numbers[...] = numbers
        device.set_aside(self._context, self.address, self.numbers)
