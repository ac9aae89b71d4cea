"""Memory for state: aligned, in huge pages, and with its streams staggered."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastopt.memory.order import CACHE_LINE
from fastopt.memory.segments import Array, Encoded

PAGE = 4096
HUGE_PAGE = 2 << 20


STAGGER = 1024


def zeroed(nbytes: int) -> Array:
    """Zero bytes that begin with a huge page, if they are enough for one; if not, with
    a page; with a cache line, if they do not fill a page.

    Nothing is touched yet, so the pages will belong to the threads of the first step.
    NumPy asks for huge pages from 4 MiB on and begins 16 bytes into a page, where
    half of a kernel's stores would cross cache lines (docs/performance.md).
    """
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        boundary = PAGE if nbytes >= PAGE else CACHE_LINE
        raw = np.zeros(nbytes + boundary, np.uint8)
    else:
        boundary = HUGE_PAGE
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        region = mmap.mmap(-1, nbytes + boundary, flags=private)
        with contextlib.suppress(OSError):  # advice, which a system may not take
            region.madvise(mmap.MADV_HUGEPAGE)
        raw = np.frombuffer(region, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + nbytes]


ALIGNED = zeroed(CACHE_LINE)


def like(stream: Array | Encoded) -> Array:
    """Return an array that :func:`state_arena` makes state for: the stream itself if
    it is an array. For an encoded one, state has the dtype that kernels compute in."""
    if not isinstance(stream, Encoded):
        return stream
    return aligned(stream.dtype, stream.shape)


def aligned(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return an array of a dtype and shape that takes no memory. State that is made for
    it begins at a cache line, as blocks of encoded streams do."""
    return np.broadcast_to(ALIGNED[: dtype.itemsize].view(dtype).reshape(()), shape)


def state_arena(
    params: Sequence[Array], streams: int, near: Any = None
) -> list[tuple[Array, ...]]:
    """Zeroed state for these parameters: for each, ``streams`` flat arrays. ``near`` is
    an array on the device that a backend for GPUs is to use.

    All in one allocation, a stream after the other. Each array begins as many bytes
    after a cache line's begin as its parameter, so that where one of a step's stores
    keeps within lines, all do. Streams begin at different places within a page: buffers
    that are equal modulo 4096 make a load wait for an unrelated store.
    """
    starts, end = [], 0
    for param in params:
        end += (param.__array_interface__["data"][0] - end) % CACHE_LINE
        starts.append(end)
        end += param.nbytes
    stride = -(-end // PAGE) * PAGE + STAGGER if end >= PAGE else end
    stride = -(-stride // CACHE_LINE) * CACHE_LINE
    raw = zeroed(STAGGER + stride * streams)[STAGGER:]

    def at(begin: int, param: Array) -> Array:
        return raw[begin : begin + param.nbytes].view(param.dtype)

    return [
        tuple(at(start + k * stride, param) for k in range(streams))
        for start, param in zip(starts, params, strict=True)
    ]


def zeros(
    arena: Callable[..., list[tuple[Array, ...]]], arrays: Sequence[Array], count: int
) -> list[list[Array]]:
    """``count`` zeroed arrays for each of these, in its shape: as many lists."""
    made = arena(arrays, count)
    return [
        [
            streams[k].reshape(array.shape)
            for streams, array in zip(made, arrays, strict=True)
        ]
        for k in range(count)
    ]
