"""The arrays that an optimizer works on, and the structure that they were given in."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from fastopt.memory.arena import like, zeros
from fastopt.memory.flat import FlatBuffer, expanded
from fastopt.memory.segments import Array, Encoded, encoded
from fastopt.memory.trees import leaves, rebuild
from fastopt.optimizer import checks
from fastopt.optimizer.formats import Chosen, Formats
from fastopt.optimizer.watching import Watch
from fastopt.rule import shown

# What saved state is matched by: an array's path, after its group's number, and shape.
Part: TypeAlias = tuple[str, tuple[int, ...]]


class Parameters:
    """Some trees of arrays, one for each group, as a list of segments to be.

    Attributes
    ----------
    module
        The backend's.
    names, arrays, group_of
        Of each segment: what messages call it, its memory, its group's number.
    streams, likes
        Of each segment: its memory as kernels take it, and something of its shape in
        the dtype that they compute in, which is that of its state.
    sets, set_of
        What needs hyperparameters of its own: a group, and which of them are 0, such as
        its weight decay, where that does not apply. And for each segment its place in
        this list.
    first
        The index from which stochastic rounding counts the elements.
    copies
        For each segment, the copy in fewer bits that steps write, or None.
    chosen
        Of each segment the formats of its state and of itself.
    layout
        For :func:`checks.collect`.
    watch
        Whether the arrays are still what they were.
    """

    def __init__(
        self,
        module: ModuleType,
        trees: Sequence[Any],
        grouped: bool,
        separate: bool,
        off: Callable[[Array, bool], tuple[str, ...]],
        weight_decay_mask: Any,
        formats: Formats,
        before: Parameters | None = None,  # the first of these, already known
        copy_to: Any = None,
        first: int = 0,
    ):
        self.module, self.grouped = module, grouped
        self._separate, self._off, self._mask = separate, off, weight_decay_mask
        self.first = first
        self.trees: list[Any] = []
        self.names: list[str] = []
        self.arrays: list[Array] = []
        self.streams: list[Array | Encoded] = []
        self.likes: list[Array] = []
        self.group_of: list[int] = []
        self.sets: list[tuple[int, tuple[str, ...]]] = []
        self.set_of: list[int] = []
        self._decays: list[bool] = list(before._decays) if before else []
        self.chosen: list[Chosen] = list(before.chosen) if before else []
        self._formats = formats
        self._held: list[weakref.ref[Array]] = []
        self._placed: list[checks.Placed] = []
        self.copies: list[Encoded | None] = []
        self.watch = Watch()
        layouts = self._extend(trees)
        if not self.arrays:
            raise ValueError("params is empty; pass at least one array")
        self.layout: Any = layouts if grouped else layouts[0]
        self.copied = copy_to is not None
        if copy_to is not None:
            self.copies = self._copies(copy_to)

    def _copies(self, copy_to: Any) -> list[Encoded | None]:
        """Check the copies of the parameters, and return them as kernels take them."""
        given: list[Any] = []
        checks.collect(self.layout, copy_to, "", given, "copy_to")
        copies = [
            None if array is None else self.module.as_array("copy_to", array)
            for array in given
        ]
        checks.check_copies(self.names, self.arrays, copies, given, self._placed)
        self._held += map(weakref.ref, owners(*[c for c in copies if c is not None]))
        streams: list[Any] = [
            copy if copy is None else encoded(copy) for copy in copies
        ]
        return streams

    def _extend(self, trees: Sequence[Any]) -> list[Any]:
        """Append groups, at the cost of what is in them, and return their layouts."""
        first, start = len(self.trees), len(self.arrays)
        plain = list(map(expanded, trees)) if self._separate else list(trees)
        entries = [
            (path, leaf, number)
            for number, tree in enumerate(plain, first)
            for path, leaf in leaves(tree, f"[{number}]" if self.grouped else "")
        ]
        paths = [path for path, _, _ in entries]
        originals = [leaf for _, leaf, _ in entries]
        group_of = [number for _, _, number in entries]
        names = [f"params{path}" for path in paths]
        arrays = list(map(self.module.as_array, names, originals))
        first_kind = (self.names[0], self.dtype) if start else None
        formats_of, known_formats = self._formats.of, self.module.formats
        checks.check_params(
            names, arrays, originals, known_formats, first_kind, self._placed
        )
        streams = list(map(encoded, arrays))
        self.trees += trees
        self.names += names
        self.arrays += arrays
        self.streams += streams
        self.likes += map(like, streams)
        self.copies += [None] * len(arrays)
        known = len(self.chosen)
        self.chosen += [
            formats_of(path, array, array.dtype.name, like, known_formats)
            for path, array, like in zip(
                paths[known - start :],
                self.arrays[known:],
                self.likes[known:],
                strict=True,
            )
        ]
        self.group_of += group_of
        self._held += map(weakref.ref, owners(*originals, *arrays))
        for segment, name in enumerate(names, start):
            i = segment - start
            self.watch.add(segment, name, originals[i], arrays[i])
        for _, leaf in leaves(trees):
            if isinstance(leaf, FlatBuffer):
                leaf.trained = True
        decided = len(self._decays) - start  # of these
        self._decays += self._decaying(paths[decided:], start + decided)
        decays = self._decays[start:]
        rows = list(zip(group_of, map(self._off, arrays, decays), strict=True))
        groups: list[tuple[int, tuple[str, ...]]] = [
            (number, ()) for number in range(first, len(self.trees))
        ]
        sets = sorted(dict.fromkeys([*groups, *rows]), key=lambda of: of[0])
        places = {of: place for place, of in enumerate(sets, len(self.sets))}
        self.sets += sets
        self.set_of += [places[row] for row in rows]
        return list(map(checks.layout, plain))

    @property
    def dtype(self) -> np.dtype[Any]:
        """What kernels compute in."""
        return self.likes[0].dtype

    @property
    def masked(self) -> bool:
        return not all(self._decays)

    @property
    def differ(self) -> bool:
        """Whether there are other sets than the groups."""
        return any(off for _, off in self.sets)

    @property
    def parts(self) -> list[list[Part]]:
        """Return each segment's arrays: one, or those of a FlatBuffer."""
        trees = list(map(expanded, self.trees)) if self._separate else self.trees
        entries = [
            (f"[{number}]{path}", leaf)
            for number, tree in enumerate(trees)
            for path, leaf in leaves(tree)
        ]
        return [
            [(path + within, shape) for within, shape in leaf.shapes]
            if isinstance(leaf, FlatBuffer)
            else [(path, tuple(array.shape))]
            for (path, leaf), array in zip(entries, self.arrays, strict=True)
        ]

    def with_group(self, tree: Any) -> Parameters:
        """Return these, with one more group at the end. What is known of these is
        copied, not worked out again, so that many groups may be added one by one."""
        if self.copied:
            raise RuntimeError("an optimizer with copy_to takes no more groups")
        if not self.grouped:  # names and layout are other ones with groups
            self.watch.check()
            return Parameters(
                self.module,
                [*self.trees, tree],
                True,
                self._separate,
                self._off,
                self._mask,
                self._formats,
                self,
                first=self.first,
            )
        more = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(more, name, list(value))
        more.watch = self.watch.copy()
        more.layout += more._extend([tree])
        return more

    def check_unchanged(self, runner: Any, tasks: Sequence[Sequence[Any]]) -> None:
        """Check that a step may write to each parameter that has a gradient. The
        compiled runner checks most arrays itself."""
        watch = self.watch
        if "scalars" in runner.fuses and runner.unchanged():
            if not watch.foreign or watch.unchanged():
                return
        watch.check(
            [any(grad is not None for grad in of) for of in zip(*tasks, strict=False)]
        )

    def watching(self, runner: Any) -> Callable[..., bool] | None:
        """Return what does a plain step in one call, if the runner can, after a check
        of the arrays that it cannot check itself."""
        if "again" in runner.fuses and self.watch.is_fixed(runner):
            again: Callable[..., bool] = runner.again
            return again
        if "scalars" not in runner.fuses:
            return None
        at: Callable[..., bool] = runner.at
        watch = self.watch
        if not watch.foreign:
            return at
        return lambda *arguments: watch.unchanged() and at(*arguments)

    def _decaying(self, paths: Sequence[str], first: int) -> list[bool]:
        """Return whether weight decay applies to each of the arrays from the ``first``
        on, which have these paths."""
        mask, names = self._mask, self.names[first:]
        if mask is None:
            return [True] * len(names)
        if callable(mask):
            check_mask(mask)
            told = list(map(mask, paths, self.arrays[first:]))
        elif first:
            raise ValueError(
                "weight_decay_mask was a tree, which says nothing of a group that is "
                "added; make the optimizer with a callable"
            )
        else:
            flags = dict(leaves(mask))
            if flags.keys() != set(paths):
                wanted = f"with the leaves {', '.join(paths)}"
                if list(paths) == [""]:
                    wanted = "a single True or False"
                raise ValueError(
                    f"weight_decay_mask must have the structure of params, {wanted}; "
                    f"it has {', '.join(flags) or 'none'}"
                )
            told = [flags[path] for path in paths]
        for name, flag in zip(names, told, strict=True):
            if not isinstance(flag, (bool, np.bool_)):
                raise TypeError(
                    f"weight_decay_mask must say True or False for {name}, got "
                    f"{shown(flag)}"
                )
        return list(map(bool, told))

    def like(self, computed: bool = False) -> tuple[Any, list[Array]]:
        """Return new arrays like these: in the structure of the parameters, in which a
        FlatBuffer stands for one; and one for each segment. They have the dtypes of
        the parameters or, if ``computed``, the one that kernels compute in."""
        of = self.likes if computed else self.arrays
        segments: list[Array | None] = []  # None: not in a FlatBuffer
        originals = [leaf for _, leaf in leaves(self.trees)]
        trees: list[FlatBuffer | None] = []
        for leaf in originals:
            if isinstance(leaf, FlatBuffer):
                flat = leaf.zeros_like(self.dtype if computed else None)
                trees.append(flat)
                views = [view for _, view in leaves(flat.views)]
                segments += views if self._separate else [flat.data]
            else:
                trees.append(None)
                segments.append(None)
        alone = [a for a, s in zip(of, segments, strict=True) if s is None]
        fresh = zeros(self.module.state_arena, alone, 1)[0] if alone else []
        of_segments, of_leaves = iter(fresh), iter(fresh)
        arrays = [next(of_segments) if s is None else s for s in segments]
        values = (next(of_leaves) if tree is None else tree for tree in trees)
        whole = rebuild(self.trees, values)
        return whole if self.grouped else whole[0], arrays


def check_mask(mask: Callable[..., Any]) -> None:
    """Check that a mask can be called with a path and an array. The check reads its
    signature only, so that errors inside the mask are raised unchanged."""
    try:
        signature = inspect.signature(mask)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        signature.bind("", None)
    except TypeError as error:
        raise TypeError(
            f"weight_decay_mask must be a tree of bools, or a function of two "
            f"arguments, as lambda path, array: array.ndim > 1, but {mask!r} cannot be "
            f"called with a path and an array"
        ) from error


def owners(*leaves: Any) -> list[Array]:
    """Return the NumPy arrays among these, and those that own their memory. NumPy does
    not resize an array that has a weak reference, not even with ``refcheck=False``."""
    arrays: dict[int, Array] = {}
    for leaf in leaves:
        array = leaf.data if isinstance(leaf, FlatBuffer) else leaf
        while isinstance(array, np.ndarray) and id(array) not in arrays:
            arrays[id(array)] = array
            array = array.base
    return list(arrays.values())
