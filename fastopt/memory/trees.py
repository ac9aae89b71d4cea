"""Nested dicts, lists and tuples of arrays."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

DEEPEST = 200  # levels of a tree


def branches(tree: Any, level: int) -> Iterable[tuple[Any, Any]] | None:
    """Return the keys and children of a dict, list or tuple, or None for a leaf. The
    keys of a namedtuple are its fields."""
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
    """Yield the leaves of nested dicts, lists and tuples, with paths like
    ``['w'][0]``."""
    children = branches(tree, level)
    if children is None:
        yield path, tree
    else:
        for key, child in children:
            yield from leaves(child, f"{path}[{key!r}]", level + 1)


def rebuild(tree: Any, values: Iterator[Any], level: int = 0) -> Any:
    """Return a tree of the same structure with other leaves, taken in order. Subclasses
    of dict and namedtuples keep their type."""
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
