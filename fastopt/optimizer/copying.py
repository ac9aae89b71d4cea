"""Copies of parameters in their structure, and what writes them back."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt import backends
from fastopt.memory.arrays import as_array, on_device, read_only, to_host
from fastopt.memory.flat import FlatBuffer, expanded, flatten
from fastopt.memory.trees import leaves, rebuild
from fastopt.optimizer.checks import check_layout
from fastopt.optimizer.refusals import check_arrays
from fastopt.optimizer.state import filling
from fastopt.runtime.atomic import uninterrupted


def copied(tree: Any, name: str = "params") -> Any:
    """Return a copy of a tree of arrays in host memory. Flat buffers stay flat."""
    copies = (
        flatten(x.views) if isinstance(x, FlatBuffer) else to_host(x, name + path)
        for path, x in leaves(tree)
    )
    return rebuild(tree, copies)


def write(tree: Any, values: Any) -> None:
    """Write :func:`copied` values into arrays of the same names."""
    check_arrays("params", tree)
    arrays, values = arrays_of(tree), arrays_of(values)
    shapes = [{k: np.shape(a) for k, a in each.items()} for each in (arrays, values)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"params have the shapes {shapes[0]}, the best {shapes[1]}")
    places = {k: writeable(f"params{k}", array) for k, array in arrays.items()}
    for name, place in places.items():
        if not np.can_cast(values[name].dtype, place.dtype, "same_kind"):
            raise TypeError(
                f"params{name} has dtype {place.dtype}, the best {values[name].dtype}"
            )
    uninterrupted(*[filling(place, values[name]) for name, place in places.items()])


def writeable(name: str, leaf: Any) -> Any:
    """Return a writeable array that shares the memory of ``leaf``."""
    tensor = leaf.detach() if hasattr(leaf, "detach") else leaf  # torch's parameters
    if on_device(tensor):
        array = backends.load("cuda").as_array(name, tensor)
        check_layout(name, array)
    else:
        # NumPy may treat a tensor that it gets by DLPack as read-only.
        array = as_array(name, tensor if tensor is leaf else tensor.numpy())
    if read_only(tensor) or read_only(array):
        raise ValueError(f"{name} is read-only; pass an array that can be written to")
    return array


def arrays_of(tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree, or of a flat buffer, by their paths."""
    return dict(leaves(expanded(tree)))
