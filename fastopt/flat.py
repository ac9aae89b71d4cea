"""Where parameters and state live: segments, the state's arena, flat buffers, trees."""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

CACHE_LINE = 64
PAGE = 4096
HUGE_PAGE = 2 << 20
STAGGER = 1024
DEEPEST = 200  # levels of a tree


class Product(NamedTuple):
    """For each of several matrices a factor for every row and every column."""

    rows: Array  # matrices x rows
    columns: Array  # matrices x columns


class Segment(NamedTuple):
    """One stretch of memory that a kernel walks: C-contiguous arrays of one shape and
    dtype, which kernels see as flat. On a GPU they are device arrays."""

    param: Array
    state: tuple[Array, ...]
    row: int  # the row of scalars that applies
    average: Array | None = None  # the moving average of param, if one is kept
    product: Product | None = None  # what kernels take for the last of the state


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


def state_arena(params: Sequence[Array], streams: int) -> list[tuple[Array, ...]]:
    """Zeroed state for these parameters: for each, ``streams`` flat arrays.

    All in one allocation, a stream after the other. Each array begins as many bytes
    after a cache line's begin as its parameter, so that where one of a step's stores
    keeps within lines, all do. Streams begin at different places within a page: buffers
    that are equal modulo 4096 make a load wait for an unrelated store.
    """
    starts, end = [], 0
    for param in params:
        end += (param.ctypes.data - end) % CACHE_LINE
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


def branches(tree: Any, level: int) -> Iterable[tuple[Any, Any]] | None:
    """The keys and children of a dict, list or tuple, those of a namedtuple its fields;
    None of what is a leaf."""
    mapping = isinstance(tree, Mapping)
    if not mapping and not isinstance(tree, (list, tuple)):
        return None
    if level > DEEPEST:
        raise ValueError(
            f"a {type(tree).__name__} is nested more than {DEEPEST} levels deep; "
            f"does it contain itself? Pass a flatter one"
        )
    keys = getattr(tree, "_fields", range(len(tree)))
    return tree.items() if mapping else zip(keys, tree, strict=True)


def leaves(tree: Any, path: str = "", level: int = 0) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, lists and tuples, with paths like ``['w'][0]``."""
    children = branches(tree, level)
    if children is None:
        yield path, tree
    else:
        for key, child in children:
            yield from leaves(child, f"{path}[{key!r}]", level + 1)


def rebuild(tree: Any, values: Iterator[Any], level: int = 0) -> Any:
    """A tree of the same structure with other leaves, taken in order. Subclasses of
    dict and namedtuples keep their type."""
    children = branches(tree, level)
    if children is None:
        return next(values)
    rebuilt = {key: rebuild(child, values, level + 1) for key, child in children}
    if isinstance(tree, tuple):
        make = getattr(type(tree), "_make", tuple)  # of a namedtuple
        return make(rebuilt.values())
    if isinstance(tree, list):
        return list(rebuilt.values())
    if type(tree) is dict or not isinstance(tree, dict):
        return rebuilt
    same = copy.copy(tree)  # which keeps the default of a defaultdict, for example
    for key, child in rebuilt.items():
        same[key] = child
    return same


class FlatBuffer:
    """Many named arrays in one aligned allocation; made by :func:`flatten`.

    ``flat["w"]`` is a view into it, as is everything in ``flat.views``, which has the
    structure of what was flattened. ``flat.data`` is the whole as one 1-D array.
    """

    trained = False  # whether it was given to an optimizer as parameters

    def __init__(self, tree: Any, dtype: npt.DTypeLike, offset: int = 0) -> None:
        self.shapes = tuple((path, np.shape(leaf)) for path, leaf in leaves(tree))
        sizes = [math.prod(shape) for _, shape in self.shapes]
        nbytes = sum(sizes) * np.dtype(dtype).itemsize
        self.data = zeroed(offset + nbytes)[offset:].view(dtype)
        parts = np.split(self.data, np.cumsum(sizes, dtype=np.int64)[:-1])
        shaped = [
            part.reshape(shape)
            for part, (_, shape) in zip(parts, self.shapes, strict=True)
        ]
        self.views = rebuild(tree, iter(shaped))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data" and self.trained and value is not self.data:
            raise AttributeError(
                "an optimizer updates the array of this FlatBuffer, so it cannot be "
                "replaced; write into it: flat.data[:] = values"
            )
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.views[key]

    def __contains__(self, key: Any) -> bool:
        return key in self.views

    def __iter__(self) -> Iterator[Any]:
        return iter(self.views)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy's views must lie in the copy's own data.
        return flatten, (self.views,)

    def zeros_like(self) -> FlatBuffer:
        """A zeroed buffer of the same layout and dtype, such as for the gradients."""
        same = FlatBuffer(self.views, self.data.dtype, offset=STAGGER // 2)
        same.shapes = self.shapes  # one object, so that comparing them takes no time
        return same

    def __repr__(self) -> str:
        return (
            f"<FlatBuffer of {len(self.shapes)} arrays, "
            f"{self.data.size} elements, {self.data.dtype}>"
        )


def flatten(tree: Any) -> FlatBuffer:
    """Copy the arrays of a dict or list, nested too, into one :class:`FlatBuffer`.

    A step over one buffer is the fastest there is. All arrays must have one dtype,
    float32 or float64.

    Example
    -------
    >>> import numpy as np, fastopt
    >>> flat = fastopt.flatten({"w": np.ones((2, 3)), "b": np.zeros(3)})
    >>> flat["w"].shape, flat.data.shape
    ((2, 3), (9,))
    """
    arrays = [(path, leaf) for path, leaf in leaves(tree)]
    if not arrays:
        raise ValueError("nothing to flatten: pass at least one array")
    for path, leaf in arrays:
        if not isinstance(leaf, np.ndarray):
            walked = isinstance(leaf, Iterator)
            advice = "pass a list of arrays" if walked else "convert it with np.asarray"
            raise TypeError(
                f"arrays{path} must be a NumPy array, got {type(leaf).__name__}; "
                f"{advice}"
            )
        if leaf.dtype not in (np.float32, np.float64):
            raise TypeError(
                f"arrays{path} has dtype {leaf.dtype}; float32 or float64 is needed"
            )
        if leaf.dtype != arrays[0][1].dtype:
            raise TypeError(
                f"arrays{path} has dtype {leaf.dtype} but arrays{arrays[0][0]} has "
                f"{arrays[0][1].dtype}; flatten them in two buffers"
            )
    flat = FlatBuffer(tree, arrays[0][1].dtype)
    for (_, view), (_, leaf) in zip(leaves(flat.views), arrays, strict=True):
        view[...] = leaf
    return flat
