"""Checkpoints: an optimizer's state in a file, or in a file for each process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.memory.segments import Array
from fastopt.optimizer import safetensors, saving
from fastopt.optimizer.safetensors import Content
from fastopt.optimizer.shards import Shards, extents_of, names_of
from fastopt.optimizer.state import filling, filling_stream
from fastopt.rule import shown
from fastopt.runtime.atomic import Call

if TYPE_CHECKING:
    from fastopt.optimizer.bindings import Bindings


def save(
    opt: Bindings, state: Mapping[str, Any], path: Any, params: Any, shard: Any
) -> None:
    """Write an optimizer's state, which may be its memory itself, to a file. ``params``
    and ``shard`` are as for :meth:`Optimizer.save`."""
    check_flag("params", params)
    bound = opt._bound.params
    extents = extents_of(bound, shard)
    arrays = bound.arrays if params else None
    safetensors.write(path, Content(state, arrays, names_of(bound), extents))


def load(
    opt: Bindings,
    loading: Callable[[Mapping[str, Any]], Callable[..., None]],
    path: Any,
    params: Any,
    shard: Any,
) -> None:
    """Read a state and commit it, by what ``loading`` returns for it. The rest is as
    for :meth:`Optimizer.load`."""
    if params is not None:
        check_flag("params", params)
    paths = list(path) if isinstance(path, (list, tuple)) else [path]
    if not paths:
        raise ValueError("path is an empty list; pass the files to load")
    bound = opt._bound.params
    extents = extents_of(bound, shard)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safetensors.opened(path)) for path in paths]
        contents = list(map(safetensors.contents, files))
        if params is False:
            contents = [content._replace(params=None) for content in contents]
        elif params and any(content.params is None for content in contents):
            raise ValueError(
                f"{listed(paths)} has no parameters, because it was saved without "
                f"params=True; leave params out to load the state alone"
            )
        if len(paths) == 1 and shard is None and not contents[0].sharded:
            state = safetensors.read_all(contents[0].state)
            values = safetensors.read_all(contents[0].params)
        else:
            shards = Shards(contents, list(map(os.fsdecode, paths)), bound, extents)
            state, values = shards.state(), shards.params()
    try:
        commit = loading(state)
        calls = [] if values is None else filling_params(opt, state, values)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"cannot load {listed(paths)}: {error}") from error
    commit(*calls)


def filling_params(
    opt: Bindings, state: Mapping[str, Any], values: Sequence[Array]
) -> list[Call]:
    """Return the calls that write saved parameters, and copies of them."""
    bound = opt._bound.params
    bound.watch.check([True] * len(bound.arrays))
    values = saving.by_name(saving.of_core(state), opt)("params", values)
    kinds = [array.dtype for array in bound.arrays]
    saving.check_arrays("params", values, opt, kinds=kinds)
    calls = [filling(*pair) for pair in zip(bound.arrays, values, strict=True)]
    for value, copy in zip(values, bound.copies, strict=True):
        if copy is not None:
            calls += filling_stream(copy, value)
    return calls


def listed(paths: Sequence[Any]) -> str:
    return ", ".join(map(os.fsdecode, paths))


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
