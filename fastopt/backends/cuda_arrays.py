"""Arrays in device memory, without Numba."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastopt.backends import cuda_device as device
from fastopt.memory.arrays import on_device
from fastopt.memory.segments import Array

TYPESTRS = {"bfloat16": "<V2"}  # for dtypes that the interface has no name for


def default_stream() -> int:
    """Return the default stream, for arrays of libraries that name no other."""
    return 0


class DeviceArray:
    """An array in device memory.

    Parameters
    ----------
    address, shape, dtype
        Where the array is, and what it has. It is C-contiguous, unless there are
        ``strides``.
    owner
        The object that keeps the memory alive.
    number
        The number of the device.
    stream
        A function that returns the stream on which the owner works at the moment.
    writeable
        Whether steps may write to it.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        owner: Any,
        number: int,
        stream: Callable[[], int] = default_stream,
        *,
        strides: tuple[int, ...] | None = None,
        writeable: bool = True,
    ):
        self.address, self.shape, self.dtype = address, tuple(shape), np.dtype(dtype)
        self.owner, self.stream, self._writeable = owner, stream, writeable
        self.number = number
        self.size, self.ndim = math.prod(self.shape), len(self.shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.strides = strides or steps_of(self.shape, self.dtype.itemsize)

    __cuda_ndarray__ = True

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if device.SIMULATED:  # other libraries must not take host memory for a GPU's
            raise AttributeError("the simulator's arrays are in host memory")
        return {
            "shape": self.shape,
            "typestr": TYPESTRS.get(self.dtype.name, self.dtype.str),
            "data": (self.address, not self._writeable),
            "strides": None if self._is_ordered else self.strides,
            "version": 3,
        }

    @property
    def ctypes(self) -> SimpleNamespace:
        """``ctypes.data`` is the address, as that of a NumPy array."""
        return SimpleNamespace(data=self.address)

    @property
    def _is_ordered(self) -> bool:
        steps = steps_of(self.shape, self.dtype.itemsize)
        return not self.size or all(
            size == 1 or ours == dense
            for size, ours, dense in zip(self.shape, self.strides, steps, strict=True)
        )

    @property
    def flags(self) -> dict[str, bool]:
        steps = steps_of(self.shape[::-1], self.dtype.itemsize)[::-1]
        return {
            "C_CONTIGUOUS": self._is_ordered,
            "F_CONTIGUOUS": self.strides == steps,
            "WRITEABLE": self._writeable,
        }

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    def _like(
        self, address: int, shape: tuple[int, ...], dtype: Any = None
    ) -> DeviceArray:
        of = self.owner, self.number, self.stream
        dtype = dtype or self.dtype
        return DeviceArray(address, shape, dtype, *of, writeable=self._writeable)

    def _check_ordered(self) -> None:
        if not self._is_ordered:
            raise ValueError("an array on a GPU must be C-contiguous for this")

    def reshape(self, *shape: Any) -> DeviceArray:
        """Return a view in another shape; -1 stands for what is left."""
        self._check_ordered()
        sizes = shape[0] if len(shape) == 1 and type(shape[0]) is tuple else shape
        known = math.prod(size for size in sizes if size != -1)
        whole = tuple(self.size // max(known, 1) if n == -1 else n for n in sizes)
        if math.prod(whole) != self.size:
            raise ValueError(f"{self.size} elements have no shape {sizes}")
        return self._like(self.address, whole)

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        """Return the same memory as numbers of another dtype."""
        new = np.dtype(dtype)
        if new.itemsize == self.dtype.itemsize:
            shape = self.shape
        else:
            *outer, last = self.shape
            shape = *outer, last * self.dtype.itemsize // new.itemsize
        self._check_ordered()
        return self._like(self.address, shape, new)

    def __getitem__(self, key: slice) -> DeviceArray:
        """Return a part along the first dimension."""
        self._check_ordered()
        start, stop, _ = key.indices(self.shape[0])
        step = self.strides[0] if self.size else 0
        shape = (max(stop - start, 0), *self.shape[1:])
        return self._like(self.address + start * step, shape)

    def __setitem__(self, key: slice, value: Any) -> None:
        """Write numbers of this dtype, or zeros. Those in device memory are copied on
        this array's stream; others are there when this returns."""
        to, stream = self[key], self.stream()
        with device.context(self.number):
            if isinstance(value, DeviceArray):
                if (value.dtype, value.size) != (to.dtype, to.size):
                    raise ValueError(f"{value} does not fit into {to}")
                device.copy(to.address, value.address, to.nbytes, stream)
            elif np.isscalar(value) and value == 0:
                device.clear(to.address, to.nbytes, stream)
            else:
                whole = np.empty(to.shape, self.dtype)
                whole[...] = value
                device.upload(to.address, whole, stream)

    def copy(self) -> DeviceArray:
        """Return a copy in device memory."""
        new = empty(self.shape, self.dtype, self.address, self.stream)
        if self.size:
            new[:] = self.reshape(new.shape)
        return new

    def copy_to_host(self) -> Array:
        """Return a NumPy array with the numbers, as they are when the stream has done
        what is enqueued by now."""
        self._check_ordered()
        array = np.empty(self.shape, self.dtype)
        if self.size:
            with device.context(self.number):
                device.download(array, self.address, self.stream())
        return array


def steps_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of a C-contiguous array."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def empty(
    shape: tuple[int, ...],
    dtype: npt.DTypeLike,
    near: int,
    stream: Callable[[], int] = default_stream,
) -> DeviceArray:
    """Return an array of zeros on the device that another address belongs to."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    number = device.device_of(near)
    memory = device.Memory(device.context(number), nbytes)
    return DeviceArray(memory.address, shape, dtype, memory, number, stream)


def stream_of(value: Any, number: int) -> Callable[[], int]:
    """Return a function that returns the current stream of the library to which an
    array belongs, on the device of this number. A library's function is asked in every
    step, because its current stream changes."""
    library = type(value).__module__.partition(".")[0]
    for parent in type(value).__mro__:  # such as a Parameter of torch
        if parent.__module__.partition(".")[0] in ("torch", "cupy"):
            library = parent.__module__.partition(".")[0]
    if library == "torch":
        current: Any = sys.modules["torch"]._C._cuda_getCurrentRawStream
        return lambda: int(current(number))
    if library == "cupy":
        cupy = sys.modules["cupy"]
        return lambda: int(cupy.cuda.get_current_stream().ptr)
    return default_stream


def as_device_array(name: str, value: Any) -> DeviceArray:
    """Return ``value`` itself, or an array that shares its memory."""
    if isinstance(value, DeviceArray):
        return value
    if not on_device(value):
        raise TypeError(
            f"{name} is a {type(value).__name__} in host memory, but backend 'cuda' "
            f"needs arrays on a GPU; copy it there, such as with torch's .cuda(), "
            f"cupy.asarray or numba.cuda.to_device"
        )
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:  # of Numba's simulator
        of = value.ctypes.data, value.shape, value.dtype, value, 0
        return DeviceArray(*of, strides=tuple(value.strides))
    address, fixed = interface["data"]
    if interface.get("mask") is not None:
        raise TypeError(f"{name} is a masked array; pass its data, or fill the masked")
    dtype = np.dtype(interface["typestr"])
    named = getattr(value, "dtype", None)
    if isinstance(named, np.dtype) and named.itemsize == dtype.itemsize:
        dtype = named  # the interface has no name for bfloat16
    number = device.device_of(address) if address else 0
    return DeviceArray(
        address or 0,
        interface["shape"],
        dtype,
        value,
        number,
        stream_of(value, number),
        strides=interface.get("strides"),
        writeable=not fixed,
    )


def setting(to: Any, value: Any) -> Callable[[], None]:
    """Return a call that writes numbers into a whole array."""
    return partial(to.reshape(-1).__setitem__, slice(None), value)


ALIGNMENT = 256  # bytes: of each segment's state, as of what the driver allocates


def state_arena(
    params: Sequence[Any], streams: int, near: Any = None
) -> list[tuple[Any, ...]]:
    """Return zeroed state for these parameters: for each, ``streams`` flat arrays, on
    the device of the array ``near`` or, by default, of the first parameter.

    Each stream is one allocation for all parameters, in which all of them are aligned.
    """
    sizes = [param.size * param.dtype.itemsize for param in params]
    ends = np.cumsum([-(-max(n, 1) // ALIGNMENT) * ALIGNMENT for n in sizes]).tolist()
    models = [*params, *([] if near is None else [near])]
    place = next((address_of(p) for p in models if p.size and address_of(p)), 0)
    stream = next(filter(None, map(stream_near, models)), default_stream)
    arenas = [empty((ends[-1],), np.uint8, place, stream) for _ in range(streams)]
    return [
        tuple(
            DeviceArray(
                arena.address + start,
                (param.size,),
                param.dtype,
                arena.owner,
                arena.number,
                stream,
            )
            for arena in arenas
        )
        for start, param in zip([0, *ends], params, strict=False)
    ]


def address_of(param: Any) -> int:
    """Return the address of an array, or of the first part of an encoded stream; of a
    model in host memory 0."""
    first = getattr(param, "parts", (param,))[0]
    return first.address if isinstance(first, DeviceArray) else 0


def stream_near(param: Any) -> Callable[[], int] | None:
    first = getattr(param, "parts", (param,))[0]
    return first.stream if isinstance(first, DeviceArray) else None
