"""The table of segments that a kernel walks over, and what maps blocks to segments.

One launch serves all segments of a program, so a kernel finds out where it works: a
block looks up its segment, and in the table the addresses of the segment's streams.
What changes from step to step is not in the table: the addresses of gradients and the
rows of scalars are in arrays of their own, which are copied to the device when they
change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastopt.backends.numpy_ref import parts_of
from fastopt.memory.formats import Format
from fastopt.memory.order import CHUNK, SPAN
from fastopt.memory.segments import Array, Encoded, Product, Segment

BLOCK = 256  # threads
VECTOR_BYTES = 16

# What the table has for each segment, in numbers of 64 bits: its size, its first block,
# chunk and span of chunks among those of all segments, the index of its first element
# among all of the optimizer, its row of scalars, its kind, whether its buffers begin
# with whole vectors, and the shape of a matrix. Then follow its buffers'
# addresses.
SIZE, FIRST_BLOCK, FIRST_CHUNK, FIRST_SPAN, FIRST_ELEMENT, ROW = range(6)
KIND, ALIGNED, HEIGHT, WIDTH, BUFFERS = range(6, 11)


class Factored(NamedTuple):
    """Stands for the format of factored state: two parts, rows and columns, are
    multiplied. Kernels do not write it."""

    name: str = "factored"


FACTORED = Factored()

# The formats of a segment's streams: of the gradient, of the parameter, of each state
# buffer and of the average, if there is one. None is of those that are not encoded.
Formats: TypeAlias = tuple[Format | Factored | None, ...]

COUNT = np.dtype(np.uint64)  # of the groups that were not finite


def dtypes_of(format: Format | Factored | None, dtype: np.dtype[Any]) -> list[Any]:
    """Return the dtypes of a stream's parts. ``dtype`` is that of streams that are not
    encoded."""
    if format is None:
        return [dtype]
    if isinstance(format, Factored):
        return [dtype, dtype]
    second = [format.second[1]] if format.second else []
    return [format.stored, *second, *([COUNT] if format.scale else [])]


def is_grouped(formats: Formats) -> bool:
    """Whether groups share scales, so that their threads must wait for each other."""
    return any(isinstance(format, Format) and bool(format.scale) for format in formats)


def draws(formats: Formats) -> bool:
    """Whether a stream that a kernel writes is rounded stochastically."""
    return any(
        isinstance(format, Format) and format.stochastic for format in formats[1:]
    )


def format_of(stream: Any) -> Format | Factored | None:
    if isinstance(stream, Product):
        return FACTORED
    return stream.format if isinstance(stream, Encoded) else None


def buffers_of(segment: Segment) -> list[Any]:
    """Return the streams of a segment besides the gradient."""
    average = [] if segment.average is None else [segment.average]
    return [segment.param, *segment.state, *average]


def address(array: Any) -> int:
    return int(array.ctypes.data)


def parts(stream: Any) -> tuple[Any, ...]:
    if isinstance(stream, Product):
        return stream.rows, stream.columns
    return parts_of(stream)


def is_aligned(streams: Sequence[Any]) -> bool:
    """Whether all streams begin with a whole vector. The vector of a part with fewer
    bits has fewer bytes."""
    offset = 0
    for stream in streams:
        if isinstance(stream, Product):
            continue
        vectors = parts_of(stream)
        if isinstance(stream, Encoded) and stream.format.scale is not None:
            vectors = vectors[:1]
        for part in vectors:
            offset |= address(part) * stream.dtype.itemsize // part.dtype.itemsize
    return offset % VECTOR_BYTES == 0


def ceiling(size: int, piece: int) -> int:
    """Return how many pieces cover so many elements."""
    return -(-size // piece)


class Table(NamedTuple):
    """The table of some segments."""

    kinds: tuple[Formats, ...]  # which formats occur
    stride: int  # the numbers for each segment
    numbers: Array
    blocks: Array  # the segment of each block of an update
    chunks: Array  # the segment of each chunk of a sum
    spans: Array  # the segment of each span of chunks


def table_of(
    segments: Sequence[Segment],
    grads: Sequence[Format | None],
    dtype: np.dtype[Any],
    block: int,
) -> Table:
    """Return the table of segments. ``grads`` are the formats of their gradients, and
    ``block`` is the number of elements that a block of threads updates."""
    kinds: dict[Formats, int] = {}
    rows: list[list[int]] = []
    block_counts: list[int] = []
    chunk_counts: list[int] = []
    span_counts: list[int] = []
    first_block = first_chunk = first_span = 0
    for segment, grad in zip(segments, grads, strict=True):
        streams = buffers_of(segment)
        formats = grad, *map(format_of, streams)
        kind = kinds.setdefault(formats, len(kinds))
        shape: tuple[int, ...] = (1, 1, *segment.param.shape)
        height, width = shape[-2:]
        row = [0] * BUFFERS
        row[SIZE], row[ROW], row[KIND] = segment.param.size, segment.row, kind
        row[FIRST_BLOCK], row[FIRST_CHUNK] = first_block, first_chunk
        row[FIRST_SPAN] = first_span
        row[FIRST_ELEMENT], row[ALIGNED] = segment.first, is_aligned(streams)
        row[HEIGHT], row[WIDTH] = height, width
        row += [address(part) for stream in streams for part in parts(stream)]
        rows.append(row)
        block_counts.append(ceiling(segment.param.size, block))
        chunk_counts.append(ceiling(segment.param.size, CHUNK))
        span_counts.append(ceiling(chunk_counts[-1], SPAN))
        first_span += span_counts[-1]
        first_block += block_counts[-1]
        first_chunk += chunk_counts[-1]
    stride = max(map(len, rows))
    numbers = np.zeros((len(rows), stride), np.int64)
    for i, row in enumerate(rows):
        numbers[i, : len(row)] = row
    index = np.arange(len(rows), dtype=np.int64)
    return Table(
        tuple(kinds),
        stride,
        numbers,
        np.repeat(index, block_counts),
        np.repeat(index, chunk_counts),
        np.repeat(index, span_counts),
    )


def width_of(dtype: np.dtype[Any]) -> int:
    """Return the number of elements that a thread updates."""
    return VECTOR_BYTES // dtype.itemsize
