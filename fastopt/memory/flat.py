"""Where parameters and state live: segments, the state's arena, flat buffers, trees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MappingView, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from fastopt.memory.arena import STAGGER, zeroed
from fastopt.memory.formats import DTYPES, WANTED_DTYPES, format_of
from fastopt.memory.trees import branches, leaves, rebuild


class FlatBuffer:
    """Many named arrays in one aligned allocation; made by :func:`flatten`.

    ``flat["w"]`` is a view into it, as is everything in ``flat.views``, which has the
    structure of what was flattened. ``flat.data`` is the whole as one 1-D array.

    Attributes
    ----------
    data
        All elements, one array after the other, in the order of ``views``.
    views
        The arrays, which share the memory of ``data``.
    shapes
        For each array its path, such as ``"['w']"``, and its shape.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> flat = fastopt.flatten({"w": np.ones(2), "b": np.zeros(1)})
    >>> grads = flat.zeros_like()
    >>> grads["w"][:] = 1.0
    >>> fastopt.gd(flat, lr=0.5).step(grads)
    >>> flat.data
    array([0.5, 0.5, 0. ])
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
        # The items of nested dicts and lists. These cannot refuse an assignment, as a
        # FlatBuffer does, so a step checks whether the items are still the same.
        self.nested = tuple(nested(self.views))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data" and self.trained and value is not self.data:
            raise AttributeError(
                "an optimizer updates the array of this FlatBuffer, so it cannot be "
                "replaced; write into it: flat.data[:] = values"
            )
        # Reading vars(self) would make each attribute slower to read.
        if name == "views" and hasattr(self, "views"):
            raise AttributeError(
                "the arrays of a FlatBuffer cannot be replaced; write into them"
            )
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.views[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(self.views, np.ndarray):  # a single array was flattened
            self.views[key] = value
            return
        now = self.views[key]
        if value is not now:  # which it is after flat[key] += 1
            into = "[:]" if getattr(now, "ndim", 0) else "[...]"
            raise TypeError(
                f"the arrays of a FlatBuffer cannot be replaced; write into them: "
                f"flat[{key!r}]{into} = values"
            )

    def __contains__(self, key: Any) -> bool:
        return key in self.views

    def __iter__(self) -> Iterator[Any]:
        return iter(self.views)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy's views must lie in the copy's own data.
        return flatten, (self.views,)

    def zeros_like(self, dtype: npt.DTypeLike | None = None) -> FlatBuffer:
        """Return a zeroed buffer of the same layout, such as for the gradients, and of
        the same dtype, if no other is given."""
        kind = self.data.dtype if dtype is None else dtype
        same = FlatBuffer(self.views, kind, offset=STAGGER // 2)
        same.shapes = self.shapes  # one object, so that comparing them takes no time
        return same

    def __repr__(self) -> str:
        return (
            f"<FlatBuffer of {len(self.shapes)} arrays, "
            f"{self.data.size} elements, {self.data.dtype}>"
        )


def nested(tree: Any, top: bool = True) -> Iterator[tuple[Any, Any, Any]]:
    """Yield what the dicts and lists below the top hold: the dict or list, and the key
    and the value of each item."""
    for key, child in branches(tree, 0) or ():
        if not top and not isinstance(tree, tuple):
            yield tree, key, child
        yield from nested(child, False)


def check_nested(flat: FlatBuffer, name: str) -> None:
    """Check that no array in a nested dict or list was replaced by another one, which
    a step would ignore."""
    for tree, key, child in flat.nested:
        if isinstance(tree, Mapping):
            now = tree.get(key)
        else:
            now = tree[key] if key < len(tree) else None
        if now is not child:
            raise TypeError(
                f"{name} is a FlatBuffer, but its array [{key!r}] was replaced or "
                f"removed; put the old one back, and write into it: [...] = values"
            )


def flatten(tree: Any) -> FlatBuffer:
    """Copy the arrays of a dict or list, nested too, into one :class:`FlatBuffer`.

    A step over one buffer is the fastest there is.

    Parameters
    ----------
    tree
        NumPy arrays of one dtype: float32, float64, float16 or the bfloat16 of
        ml_dtypes. They are copied.

    Returns
    -------
    FlatBuffer

    Raises
    ------
    TypeError, ValueError
        For anything but arrays of one such dtype, and if there is no array.

    Examples
    --------
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
            walked = isinstance(leaf, (Iterator, MappingView, Set))
            advice = "pass a list of arrays" if walked else "convert it with np.asarray"
            raise TypeError(
                f"arrays{path} must be a NumPy array, got {type(leaf).__name__}; "
                f"{advice}"
            )
        if leaf.dtype not in DTYPES and format_of(leaf.dtype) is None:
            raise TypeError(
                f"arrays{path} has dtype {leaf.dtype}; {WANTED_DTYPES} is needed"
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


def expanded(tree: Any) -> Any:
    """Replace each FlatBuffer of a tree by its views, so that each array is a leaf."""
    flats = (
        leaf.views if isinstance(leaf, FlatBuffer) else leaf for _, leaf in leaves(tree)
    )
    return rebuild(tree, flats)
