"""Whether parameters are still what they were when an optimizer was made for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array
from fastopt.memory.trees import leaves

UNDO = "change it back, or make a new optimizer; nothing was written"


class Look(NamedTuple):
    """What kernels rely on."""

    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    writeable: bool
    negative: bool = False  # torch's negative bit: reads return the negated memory


def look_at(leaf: Any) -> Look:
    """Describe an array as it is now, without strides and address if it has none."""
    if isinstance(leaf, np.ndarray):
        address, _ = leaf.__array_interface__["data"]
        strides = leaf.strides if leaf.size and not leaf.flags.c_contiguous else ()
        return Look(leaf.dtype, leaf.shape, strides, address, leaf.flags.writeable)
    for name in ("__cuda_array_interface__", "__array_interface__"):
        facts = getattr(leaf, name, None)
        if facts is not None:
            data: Any = facts.get("data")
            address, fixed = data if isinstance(data, tuple) else (0, False)
            strides, shape = tuple(facts.get("strides") or ()), tuple(facts["shape"])
            return Look(facts["typestr"], shape, strides, address, not fixed)
    stride: Any = getattr(leaf, "stride", None)  # of a tensor
    pointer: Any = getattr(leaf, "data_ptr", None)
    negative: Any = getattr(leaf, "is_neg", None)
    return Look(
        getattr(leaf, "dtype", None),
        tuple(leaf.shape),
        tuple(stride()) if callable(stride) else (),
        pointer() if callable(pointer) else 0,
        True,
        bool(negative()) if callable(negative) else False,
    )


class Watch:
    """Arrays that steps write to, or that show the same memory, by name."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._segments: list[int] = []  # the number of each one's
        self._leaves: list[Any] = []
        self._looks: list[Look] = []
        self.foreign = False  # whether some are not NumPy's

    def add(self, segment: int, name: str, original: Any, array: Array) -> None:
        """Watch a parameter as it was given, and as kernels take it."""
        for path, leaf in parts(original, array):
            self._segments.append(segment)
            self._names.append(name + path)
            self._leaves.append(leaf)
            self._looks.append(look_at(leaf))
            self.foreign |= not isinstance(leaf, np.ndarray)

    def copy(self) -> Watch:
        more = Watch()
        for name, value in vars(self).items():
            setattr(more, name, list(value) if isinstance(value, list) else value)
        return more

    @property
    def ndarrays(self) -> list[tuple[Array, bool]]:
        """The arrays that the compiled step can check itself, and whether they were
        writeable."""
        return [
            (leaf, look.writeable)
            for leaf, look in zip(self._leaves, self._looks, strict=True)
            if isinstance(leaf, np.ndarray)
        ]

    def is_fixed(self, runner: Any) -> bool:
        """Whether no array can change, as far as a runner knows their libraries."""
        return all(map(runner.is_fixed, self._leaves))

    def unchanged(self) -> bool:
        """Whether the arrays that are not NumPy's are as they were."""
        return all(
            look_at(leaf) == look
            for leaf, look in zip(self._leaves, self._looks, strict=True)
            if not isinstance(leaf, np.ndarray)
        )

    def check(self, written: Sequence[bool] | None = None) -> None:
        """Check that no array has changed, and that those of segments that are
        ``written`` are still writeable."""
        for segment, name, leaf, then in zip(
            self._segments, self._names, self._leaves, self._looks, strict=True
        ):
            now = look_at(leaf)
            if now != then:
                refuse(name, then, now, written is not None and written[segment])


def parts(original: Any, array: Array) -> Iterator[tuple[str, Any]]:
    """The arrays that share a segment's memory, with their paths within it."""
    yield "", original.data if isinstance(original, FlatBuffer) else original
    if isinstance(original, FlatBuffer):
        yield from leaves(original.views)
    elif isinstance(original, np.ndarray) and original is not array:
        yield "", array


def refuse(name: str, then: Look, now: Look, writing: bool) -> None:
    """Raise the error that says what was changed."""
    made, strides = "when the optimizer was made", now.strides or "those of C order"
    changes: dict[str, str] = {
        "dtype": f"had dtype {then.dtype} {made}, and has {now.dtype} now",
        "shape": f"had shape {then.shape} {made}, and has {now.shape} now",
        "strides": f"had other strides {made} than now, {strides}",
        "address": "has been moved to other memory since the optimizer was made",
        "negative": f"has another sign than its memory had {made} (torch's negative "
        f"bit has changed)",
    }
    for what, change in changes.items():
        if getattr(now, what) != getattr(then, what):
            error = TypeError if what == "dtype" else ValueError
            raise error(f"{name} {change}; {UNDO}")
    if writing and not now.writeable:
        raise ValueError(
            f"{name} was writeable {made}, and is read-only now, but parameters are "
            f"updated in place; {UNDO}"
        )
