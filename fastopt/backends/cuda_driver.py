"""The CUDA backend: memory on a GPU, and one kernel launch for a step.

Its steps are in ``cuda_runner``, its kernels in ``cuda_kernels``.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt.backends import BY_NUMBA
from fastopt.backends import cuda_device as device
from fastopt.backends.cuda_arrays import as_device_array as as_array
from fastopt.backends.cuda_arrays import setting, state_arena
from fastopt.backends.cuda_runner import OnDevice
from fastopt.backends.numpy_ref import Step, pairs_of, parts_of, scalars
from fastopt.memory.arrays import on_device
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Array, Segment, encoded
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.runtime.atomic import Call
from fastopt.step import PLAIN

__all__ = [
    "as_array",
    "bind",
    "formats",
    "gram",
    "missing",
    "scalars",
    "state_arena",
]

formats = frozenset(FORMATS)

HOW_TO_GET = BY_NUMBA["cuda"]


def replace(p: Any, g: Any) -> tuple[Any]:
    return (g,)


COPY = Rule(replace, passes.none)


def missing() -> str | None:
    """Return why this backend cannot be used and how to get it, or None."""
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed; {HOW_TO_GET}"
    reason = device.missing()
    if reason is None:
        return None
    return (
        f"no NVIDIA GPU with a working driver was found ({reason}); nvidia-smi should "
        f"list one"
    )


def gram(tasks: Sequence[Sequence[Any]], threads: int) -> Array:
    """Do what :func:`numpy_ref.gram` does, pair by pair."""
    products = np.zeros((len(tasks), len(tasks)))
    for i, j in pairs_of(len(tasks)):
        pairs = [
            (a, b)
            for a, b in zip(tasks[i], tasks[j], strict=True)
            if a is not None and b is not None
        ]
        if pairs:
            segments = [Segment(a, (), 0) for a, _ in pairs]
            step = OnDevice(passes.inner, segments, np.zeros(1, np.int64))
            step.take([b for _, b in pairs])
            for found in step.sums("rule", [(1.0,)], PLAIN):
                products[i, j] += found[0] if found else 0.0
        products[j, i] = products[i, j]
    return products


def bind(rule: Rule, segments: Sequence[Segment], count: Array, carry: Array) -> Step:
    """Do what :func:`numpy_ref.bind` does, with device arrays. Kernels are enqueued on
    the current stream of the library that the parameters belong to, and on the default
    stream if it has none; ``threads`` has no effect."""
    if any(segment.copy is not None for segment in segments):
        raise ValueError("backend 'cuda' does not support copy_to; leave it out")
    return OnDevice(rule, segments, count, carry)


def filling(array: Any, value: Any) -> Call:
    """Return a call that writes a number, or as many numbers as there are, into a
    device array, whatever their dtypes."""
    array = as_array("an array", array)
    if isinstance(value, float):
        value = np.full(1, value, array.dtype)
    words = parts_of(encoded(array))[0]
    if not on_device(value):
        new = parts_of(encoded(np.asarray(value).astype(array.dtype)))[0]
        return setting(words, new.reshape(-1))
    value = as_array("values", value)
    if value.dtype == array.dtype:
        return setting(words, parts_of(encoded(value))[0].reshape(-1))
    segment = Segment(encoded(array), (), 0)
    step = OnDevice(COPY, [segment], np.zeros(1, np.int64))
    step.take([value])
    return functools.partial(step, [(1.0,)])
