"""Where PyTorch keeps, in C++, what a tensor is. ``csrc/tensors.pyx`` reads it there,
because to ask torch takes several times as long, and lets other threads run in the
middle of a step. PyTorch does not promise the layout, so the first plan learns it from
samples. If it is not found, tensors are asked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# How many words of 64 bits are looked through in a TensorImpl and in a StorageImpl.
IMPL, STORAGE = 22, 8
# A view whose sizes, strides and offset are distinct numbers.
SIZES, STRIDES, OFFSET = (3, 5, 7, 2, 4), (1009, 211, 53, 29, 13), 17
DTYPES = torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.complex64


class Layout(NamedTuple):
    """Where words lie, counted in words from the beginning of an object."""

    inner: int  # in a tensor's Python object: the address of its TensorImpl
    # In the TensorImpl:
    keys: int  # the dispatch keys
    storage: int  # the address of the StorageImpl
    ndim: int
    sizes: int  # of up to five dimensions
    strides: int
    offset: int
    dtype: int
    dtype_bits: int  # which bits of that word are the dtype's
    # In the StorageImpl:
    data: int  # the address of the first element
    nbytes: int
    deleter: int  # of the data
    of_copies: int  # that of data which is copied on write


def words(address: int, count: int) -> list[int]:
    """Return so many words of 64 bits from memory."""
    return list((ctypes.c_uint64 * count).from_address(address))


def of_object(tensor: Tensor) -> list[int]:
    return words(id(tensor), type(tensor).__basicsize__ // 8)


def of_impl(tensor: Tensor) -> list[int]:
    return words(tensor._cdata, IMPL)


def of_storage(tensor: Tensor) -> list[int]:
    return words(tensor.untyped_storage()._cdata, STORAGE)


def samples() -> list[Tensor]:
    """Return tensors with different keys, dimensions, sizes, strides and offsets."""
    # In NumPy's memory: a storage in torch's own has its address twice.
    one, many = (torch.from_numpy(np.ones(n, np.float32)) for n in (1, 4096))
    conjugated = torch.from_numpy(np.ones(1, np.complex64)).conj()
    views = [
        many.as_strided(SIZES[:d], STRIDES[:d], OFFSET + d)
        for d in range(1, len(SIZES) + 1)
    ]
    return [
        *(one, torch._neg_view(one), conjugated, torch.nn.Parameter(one, False)),
        *views,
    ]


def place(
    tensors: Sequence[Tensor],
    words_of: Callable[[Tensor], list[int]],
    *what: Callable[[Tensor], int],
) -> int:
    """Return where these words lie, one after the other, in what belongs to each of the
    tensors. Raises ValueError if this is not exactly one place."""
    candidates = []
    for tensor in tensors:
        where, wanted = words_of(tensor), [word(tensor) for word in what]
        starts = range(len(where) - len(wanted) + 1)
        candidates.append({i for i in starts if where[i : i + len(wanted)] == wanted})
    (place,) = set.intersection(*candidates)
    return place


def ones(dtype: torch.dtype) -> Tensor:
    return torch.ones(4, dtype=dtype, device="cpu")


def place_of_dtype() -> tuple[int, int]:
    """Return where the dtype is, a small number: the word, and which 16 bits of it."""
    # In turn with float32, because tensors that are made one after the other may share
    # other words, such as the upper half of an address.
    pairs = [[ones(torch.float32), ones(dtype)] for dtype in DTYPES]
    alike, others = (
        [
            [word >> shift & 0xFFFF for word in of_impl(t) for shift in (0, 16, 32, 48)]
            for t in tensors
        ]
        for tensors in zip(*pairs, strict=True)
    )
    (place,) = (
        i
        for i in range(4 * IMPL)
        if len({half[i] for half in alike}) == 1
        and len({half[i] for half in (alike[0], *others)}) == 1 + len(others)
        and all(half[i] < 256 for half in (alike[0], *others))
    )
    return place // 4, 0xFFFF << place % 4 * 16


def deleter_of_copies(data: int) -> tuple[int, int]:
    """Return where a storage has its deleter, and which one it has if its data is
    copied on write: tensors share it until one of them is written to."""
    tensors = [ones(torch.float32) for _ in range(2)]
    plain = list(map(of_storage, tensors))
    clones = list(map(torch._lazy_clone, tensors))
    lazy = list(map(of_storage, clones))
    (place,) = (
        i
        for i in (data + 1, data + 2)  # next to the data, with what it is called with
        if plain[0][i] == plain[1][i] != lazy[0][i] == lazy[1][i]
    )
    return place, lazy[0][place]


def find() -> Layout:
    """Find the layout. Raises ValueError or AttributeError if it is another one."""
    tensors = samples()
    last = tensors[-1:]
    sizes = [lambda t, d=d: t.size(d) for d in range(len(SIZES))]
    strides = [lambda t, d=d: t.stride(d) for d in range(len(SIZES))]
    data = place(tensors, of_storage, lambda t: t.untyped_storage().data_ptr())
    return Layout(
        place(tensors, of_object, lambda t: t._cdata),
        place(tensors, of_impl, lambda t: torch._C._dispatch_keys(t).raw_repr()),
        place(tensors, of_impl, lambda t: t.untyped_storage()._cdata),
        place(tensors, of_impl, Tensor.dim),
        place(last, of_impl, *sizes),
        place(last, of_impl, *strides),
        place(tensors, of_impl, Tensor.storage_offset),
        *place_of_dtype(),
        data,
        place(tensors, of_storage, lambda t: t.untyped_storage().nbytes()),
        *deleter_of_copies(data),
    )
