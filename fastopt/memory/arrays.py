"""Arrays of NumPy and of other libraries, as NumPy arrays that share their memory."""

from __future__ import annotations

from collections.abc import Iterator, MappingView, Set
from typing import Any

import numpy as np

from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array

OF_TORCH = "fastopt.torch.AdamW(model.parameters())"


def of_jax(leaf: Any) -> bool:
    """Return whether this is a JAX array. These are read-only."""
    return type(leaf).__module__.partition(".")[0] in ("jax", "jaxlib")


def on_device(leaf: Any) -> bool:
    """Whether an array lives on a GPU (or is numba's simulation of one)."""
    return hasattr(leaf, "__cuda_array_interface__") or getattr(
        leaf, "__cuda_ndarray__", False
    )


def as_array(name: str, value: Any) -> Array:
    """Return ``value`` itself, or a NumPy array that shares its memory."""
    if type(value) is np.ndarray:
        return value
    if on_device(value):
        raise TypeError(
            f"{name} is on a GPU, where this backend cannot reach it; use "
            f"backend='cuda' or copy it to the host"
        )
    if isinstance(value, FlatBuffer):
        return value.data
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass its .data, or fill the masked")
    if isinstance(value, np.ndarray):
        return value.view(np.ndarray)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
        if getattr(value, "is_neg", bool)():
            # torch negates such a view when it is read; its memory has the other sign.
            raise TypeError(f"{name} is a lazily negated view; pass its resolve_neg()")
        try:
            array = np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError) as error:
            advice = (
                ""
                if "bfloat16" not in str(value.dtype)
                else ("; use fastopt.torch, or pass an array of ml_dtypes' bfloat16")
            )
            if of_jax(value):  # such as a tracer, inside jax.jit
                advice = "; use fastopt.jax, whose steps are functions for jax.jit"
            if getattr(value, "requires_grad", False):
                advice = f"; pass {name}.detach()"
                if name.startswith("params"):
                    advice += f", or {OF_TORCH}, which takes such tensors"
            raise TypeError(
                f"{name} does not share its memory: {error}{advice}"
            ) from error
        if array.flags.owndata and array.size:
            # NumPy allocates an array where it is given a null address.
            raise TypeError(
                f"{name} is a {type(value).__name__} without memory of its own (a "
                f"wrapper of tensors, a fake one, or one whose storage was freed); "
                f"pass the tensors that it is made of"
            )
        return array
    if hasattr(value, "__array_interface__") and not isinstance(value, np.generic):
        return np.asarray(value)
    advice = ""
    if isinstance(value, (Iterator, MappingView, Set)):
        advice = "; pass a list of arrays"
    elif isinstance(value, (list, tuple, int, float, complex, np.generic)):
        advice = f"; pass np.asarray({name}), of the dtype of the parameter"
        if name.startswith("params"):
            advice = "; make an array of numbers first, which is updated in place"
    of_module = getattr(value, "__qualname__", "").startswith("Module.")
    bases = [base.__module__ for base in type(value).__mro__]
    if of_module or any(base.startswith("torch.nn") for base in bases):
        advice = f"; for a model of torch, use {OF_TORCH}"
    raise TypeError(
        f"{name} must be an array (NumPy's, or one that speaks DLPack, "
        f"__array_interface__ or __cuda_array_interface__), "
        f"got {type(value).__name__}{advice}"
    )


def read_only(leaf: Any) -> bool:
    if on_device(leaf):
        interface = getattr(leaf, "__cuda_array_interface__", {"data": (0, False)})
        return bool(interface["data"][1])
    return isinstance(leaf, np.ndarray) and not leaf.flags.writeable


def span(array: Array) -> tuple[int, int]:
    """Return the addresses at which a dense array begins and ends."""
    interface = getattr(array, "__cuda_array_interface__", None)
    begin = interface["data"][0] if interface else array.ctypes.data
    return begin, begin + array.size * array.dtype.itemsize


def to_host(array: Any, name: str = "an array") -> Array:
    """Copy an array into a C-contiguous NumPy array. ``name`` is for the error."""
    if hasattr(array, "copy_to_host"):
        array = array.copy_to_host()
    elif hasattr(array, "detach"):  # torch's, which may have a history to leave behind
        try:
            array = array.detach().cpu().numpy()
        except (RuntimeError, TypeError) as error:  # of bfloat16, fake ones, wrappers
            raise TypeError(
                f"{name} cannot be copied into a NumPy array: {error}"
            ) from error
    return np.array(array, order="C")
