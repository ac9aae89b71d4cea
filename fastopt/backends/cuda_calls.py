"""NVIDIA's driver, called by ctypes: memory, copies, streams and launches.

A launch through Numba takes 18 us of Python, and a call of the driver with a prepared
block of parameters takes less than one (docs/performance.md). The calls need no other
library, so kernels from the cache run without Numba.

All errors are :class:`DriverError`. fastopt makes a context current only during a call,
so torch, CuPy and Numba find their own as before. All of them use the device's primary
context, and so does fastopt.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastopt.memory.segments import Array

INVALID_CONTEXT = 201
CAPTURING = 1
DEVICE_OF_POINTER = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
WITHOUT_TIMING = 2  # CU_EVENT_DISABLE_TIMING
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

Address = ctypes.c_uint64
Handle = ctypes.c_void_p


class DriverError(RuntimeError):
    """A call of the driver has failed."""

    def __init__(self, function: str, code: int, name: str, text: str):
        super().__init__(f"the CUDA driver's {function} failed with {name}: {text}")
        self.code = code


@functools.cache
def library() -> Any:
    """Load the driver. Raises OSError if there is none."""
    names = ["nvcuda.dll"] if sys.platform == "win32" else ["libcuda.so.1"]
    chosen = os.environ.get("FASTOPT_LIBCUDA")
    driver = ctypes.CDLL(chosen or names[0])
    driver.cuLaunchKernel.argtypes = [
        Handle,
        *[ctypes.c_uint] * 7,
        Handle,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return driver


@functools.cache
def prepared(name: str) -> Callable[..., None]:
    """Return a function of the driver that raises DriverError."""
    function: Any = getattr(library(), name)

    def call(*arguments: Any) -> None:
        code = function(*arguments)
        if code:
            raise failure(name, code)

    return call


def failure(function: str, code: int) -> DriverError:
    """Return the error for a code that a function of the driver has returned."""
    texts = []
    for ask in (library().cuGetErrorName, library().cuGetErrorString):
        text = ctypes.c_char_p()
        ask(code, ctypes.byref(text))
        texts.append((text.value or b"an unknown error").decode())
    return DriverError(function, code, f"{texts[0]} ({code})", texts[1])


def missing() -> str | None:
    """Why the driver cannot be used, or None."""
    try:
        library()
        prepared("cuInit")(0)
        count = ctypes.c_int()
        prepared("cuDeviceGetCount")(ctypes.byref(count))
    except (OSError, DriverError) as error:
        return str(error)
    return None if count.value else "the driver lists no device"


class Context:
    """The primary context of a device. As a context manager, it is current for the
    calling thread until it is left."""

    def __init__(self, number: int):
        prepared("cuInit")(0)
        self.number, device = number, ctypes.c_int()
        prepared("cuDeviceGet")(ctypes.byref(device), number)
        self.handle = Handle()
        prepared("cuDevicePrimaryCtxRetain")(ctypes.byref(self.handle), device)
        values = []
        for attribute in CAPABILITY:
            value = ctypes.c_int()
            of = ctypes.byref(value), attribute, device
            prepared("cuDeviceGetAttribute")(*of)
            values.append(value.value)
        self.capability: tuple[int, ...] = tuple(values)
        self._push, self._pop = library().cuCtxPushCurrent_v2, prepared_pop()

    @functools.cached_property
    def aside(self) -> Any:
        """A stream for preparations, while other streams are at work or captured."""
        stream = Handle()
        with self:
            prepared("cuStreamCreate")(ctypes.byref(stream), NON_BLOCKING)
        return stream

    def __enter__(self) -> None:
        code = self._push(self.handle)
        if code:
            raise failure("cuCtxPushCurrent_v2", code)

    def __exit__(self, *_: Any) -> None:
        self._pop()


def prepared_pop() -> Callable[[], None]:
    """Return a function that makes the previous context current again."""
    function, place = library().cuCtxPopCurrent_v2, ctypes.byref(Handle())

    def pop() -> None:
        function(place)  # an error would hide the one that is being raised

    return pop


@functools.cache
def context(number: int) -> Context:
    return Context(number)


def device_of(address: int) -> int:
    """Return the number of the device that an address belongs to; for the address 0
    that of the calling thread's current context, or the first."""
    prepared("cuInit")(0)
    number = ctypes.c_int()
    if not address:
        code = library().cuCtxGetDevice(ctypes.byref(number))
        return 0 if code else number.value
    asked = ctypes.byref(number), DEVICE_OF_POINTER, Address(address)
    code = library().cuPointerGetAttribute(*asked)
    if code == INVALID_CONTEXT:
        # Another thread's libraries have made the array. To make a context where there
        # is none would take hundreds of megabytes of that device.
        for active in active_devices():
            with context(active):
                code = library().cuPointerGetAttribute(*asked)
            if not code:
                break
    if code:
        raise failure("cuPointerGetAttribute", code)
    return number.value


def active_devices() -> list[int]:
    """Return the numbers of the devices whose primary contexts are in use."""
    count, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    prepared("cuDeviceGetCount")(ctypes.byref(count))
    numbers = []
    for number in range(count.value):
        device, state = ctypes.c_int(), (ctypes.byref(flags), ctypes.byref(active))
        prepared("cuDeviceGet")(ctypes.byref(device), number)
        prepared("cuDevicePrimaryCtxGetState")(device, *state)
        numbers += [number] if active.value else []
    return numbers


@contextmanager
def preparing(of: Context) -> Iterator[Any]:
    """Make a context current, in which memory may be allocated even while a stream is
    captured into a graph. The allocation does not become a part of the graph. Yield a
    stream for such work, and wait for that stream at the end."""
    mode = ctypes.c_int(RELAXED)
    exchange = prepared("cuThreadExchangeStreamCaptureMode")
    with of:
        exchange(ctypes.byref(mode))
        try:
            stream = of.aside
            yield stream
            prepared("cuStreamSynchronize")(stream)
        finally:
            exchange(ctypes.byref(mode))


class Memory:
    """Device memory, which is freed with this object. Its bytes are 0 at first."""

    def __init__(self, of: Context, size: int):
        self.context, self.size = of, size
        address = Address()
        with preparing(of) as stream:
            prepared("cuMemAlloc_v2")(ctypes.byref(address), ctypes.c_size_t(size or 1))
            self.address: int = address.value
            weakref.finalize(self, free, of, "cuMemFree_v2", address).atexit = False
            clear(self.address, size, stream)


class Pinned:
    """Pinned host memory, as an array of bytes. The device copies from and to it while
    the host goes on."""

    def __init__(self, of: Context, size: int):
        self.context, place = of, ctypes.c_void_p()
        with preparing(of):
            prepared("cuMemHostAlloc")(
                ctypes.byref(place), ctypes.c_size_t(size or 1), 0
            )
            weakref.finalize(self, free, of, "cuMemFreeHost", place).atexit = False
        self.address: int = place.value or 0
        memory: Any = (ctypes.c_char * size).from_address(self.address)
        self.bytes: Array = np.frombuffer(memory, np.uint8)


def free(of: Context, function: str, place: Any) -> None:
    """Free memory or an event, also while a stream is captured. Errors are ignored,
    because the call that broke the context has raised its own already."""
    if not of._push(of.handle):
        mode, exchange = (
            ctypes.c_int(RELAXED),
            library().cuThreadExchangeStreamCaptureMode,
        )
        exchange(ctypes.byref(mode))
        getattr(library(), function)(place)
        exchange(ctypes.byref(mode))
        of._pop()


class Event:
    """A place in a stream. Before it is first recorded, it counts as reached."""

    def __init__(self, of: Context):
        self.handle = Handle()
        with preparing(of):
            prepared("cuEventCreate")(ctypes.byref(self.handle), WITHOUT_TIMING)
            free_it = weakref.finalize(self, free, of, "cuEventDestroy_v2", self.handle)
            free_it.atexit = False

    def record(self, stream: int) -> None:
        prepared("cuEventRecord")(self.handle, Handle(stream))

    def wait(self) -> None:
        """Let the host wait until the stream has reached this place."""
        prepared("cuEventSynchronize")(self.handle)


def upload(address: int, source: Array, stream: int) -> None:
    """Copy a host array to the device, and wait until that is done."""
    if source.nbytes:
        copy_up(address, source, Handle(stream))
        prepared("cuStreamSynchronize")(Handle(stream))


def copy_up(address: int, source: Array, stream: Any) -> None:
    """Enqueue a copy of a host array to the device."""
    place = ctypes.c_void_p(source.ctypes.data)
    of = Address(address), place, ctypes.c_size_t(source.nbytes), stream
    prepared("cuMemcpyHtoDAsync_v2")(*of)


def set_aside(of: Context, address: int, source: Array) -> None:
    """Copy a host array to device memory that nothing uses yet, and wait until that is
    done. It does not become part of a graph that is captured."""
    if source.nbytes:
        with preparing(of) as stream:
            copy_up(address, source, stream)


def download(to: Array, address: int, stream: int) -> None:
    """Copy from the device into a host array, and wait until that is done."""
    size = to.nbytes
    if size:
        place, stream_handle = ctypes.c_void_p(to.ctypes.data), Handle(stream)
        of = place, Address(address), ctypes.c_size_t(size), stream_handle
        prepared("cuMemcpyDtoHAsync_v2")(*of)
        prepared("cuStreamSynchronize")(stream_handle)


def copy(to: int, address: int, size: int, stream: int) -> None:
    """Enqueue a copy within the device."""
    if size:
        of = Address(to), Address(address), ctypes.c_size_t(size), Handle(stream)
        prepared("cuMemcpyDtoDAsync_v2")(*of)


def clear(address: int, size: int, stream: Any) -> None:
    """Enqueue a call that sets ``size`` bytes to zero."""
    if size:
        handle = stream if isinstance(stream, Handle) else Handle(stream)
        of = Address(address), 0, ctypes.c_size_t(size), handle
        prepared("cuMemsetD8Async")(*of)


def is_capturing(stream: int) -> bool:
    """Whether what is enqueued becomes part of a graph. The default stream is never
    captured."""
    if not stream:
        return False
    status = ctypes.c_int()
    prepared("cuStreamIsCapturing")(Handle(stream), ctypes.byref(status))
    return status.value == CAPTURING


class Kernel:
    """A compiled kernel, loaded into a context. It takes whole numbers of 64 bits,
    addresses among them."""

    def __init__(self, of: Context, cubin: bytes, name: str):
        self.context, module, self.handle = of, Handle(), Handle()
        with preparing(of):
            prepared("cuModuleLoadData")(ctypes.byref(module), cubin)
            found = ctypes.byref(self.handle), module, name.encode()
            prepared("cuModuleGetFunction")(*found)


class Launch:
    """A kernel with a prepared block of parameters. It is called for each launch, with
    a stream, while the context is current."""

    def __init__(
        self, kernel: Kernel, blocks: int, threads: int, numbers: Sequence[int]
    ):
        self.numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        begin = ctypes.addressof(self.numbers)
        places = [begin + 8 * k for k in range(len(numbers))]
        self._places = (ctypes.c_void_p * len(places))(*places)
        self._launch = library().cuLaunchKernel
        self._before = (kernel.handle, blocks, 1, 1, threads, 1, 1, 0)
        self._after = (ctypes.addressof(self._places), None)

    def __call__(self, stream: int) -> None:
        code = self._launch(*self._before, stream, *self._after)
        if code:
            raise failure("cuLaunchKernel", code)


class Board:
    """A few bytes on the device that the host writes anew in most steps.

    They are copied from one of several places in pinned memory, while the host writes
    the next one. A place is used again after a whole turn. By then the device has
    usually read it long ago; two events make sure of that.
    """

    TURNS = 16

    def __init__(self, of: Context, size: int):
        self.context, self.size, self.turn = of, size, 0
        self.memory = Memory(of, size)
        self.address = self.memory.address
        self._room = -(-max(size, 1) // 256) * 256
        self._pinned = Pinned(of, self._room * self.TURNS)
        self._half = [Event(of), Event(of)]
        self._copy = library().cuMemcpyHtoDAsync_v2
        self._to, self._bytes = Address(self.address), ctypes.c_size_t(size)

    def write(self, data: Array, stream: int) -> None:
        """Enqueue a copy of an array's bytes. The context must be current."""
        turn, half = self.turn, self.TURNS // 2
        if turn % half == 0:
            self._half[turn // half].wait()
        start = turn * self._room
        place = self._pinned.address + start
        ctypes.memmove(place, data.ctypes.data, self.size)
        code = self._copy(self._to, Handle(place), self._bytes, Handle(stream))
        if code:
            raise failure("cuMemcpyHtoDAsync_v2", code)
        if turn % half == half - 1:
            self._half[turn // half].record(stream)
        self.turn = (turn + 1) % self.TURNS
