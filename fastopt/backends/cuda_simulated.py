"""What ``cuda_calls`` has, in Numba's simulator, where device memory is the host's.

Launches are done at once, so streams and events have no meaning here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numba import cuda

from fastopt.memory.segments import Array

FURTHEST = 1 << 40  # bytes from an address on that may be looked at


class Context(nullcontext[None]):
    capability = 9, 0
    number = 0


def context(number: int) -> Context:
    return Context()


def device_of(address: int) -> int:
    return 0


def missing() -> str | None:
    return None


def is_capturing(stream: int) -> bool:
    return False


@functools.lru_cache(maxsize=4096)
def numbers_at(address: int, dtype: np.dtype[Any]) -> Array:
    """Return what is in memory from an address on. The array keeps no memory alive."""
    memory: Any = (ctypes.c_char * FURTHEST).from_address(address)
    numbers: Array = np.frombuffer(memory, dtype)
    return numbers


class Memory:
    def __init__(self, of: Context, size: int):
        self.context, self.size = of, size
        room = np.zeros(size + 256, np.uint8)
        skip = -room.ctypes.data % 256
        self.bytes: Array = room[skip : skip + size]
        self.address: int = room.ctypes.data + skip
        self._room = room


Pinned = Memory


class Event:
    def __init__(self, of: Context):
        pass

    def record(self, stream: int) -> None:
        pass

    def wait(self) -> None:
        pass


class Board(Memory):
    def write(self, data: Array, stream: int) -> None:
        self.bytes[:] = data.reshape(-1).view(np.uint8)


def upload(address: int, source: Array, stream: int) -> None:
    ctypes.memmove(address, source.ctypes.data, source.nbytes)


def download(to: Array, address: int, stream: int) -> None:
    ctypes.memmove(to.ctypes.data, address, to.nbytes)


def set_aside(of: Context, address: int, source: Array) -> None:
    upload(address, source, 0)


def copy(to: int, address: int, size: int, stream: int) -> None:
    ctypes.memmove(to, address, size)


def clear(address: int, size: int, stream: int) -> None:
    ctypes.memset(address, 0, size)


class Launch:
    """A kernel, which is a function here, with its arguments."""

    def __init__(
        self,
        kernel: Callable[..., None],
        blocks: int,
        threads: int,
        numbers: Sequence[int],
    ):
        self.numbers = list(numbers)
        self.waits: bool = getattr(kernel, "waits", False)  # for other threads
        self._launch = cuda.jit(kernel)[blocks, threads]

    def __call__(self, stream: int) -> None:
        self._launch(*self.numbers)
