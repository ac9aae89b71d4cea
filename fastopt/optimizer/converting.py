"""Saved state in other formats."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastopt.memory.arena import aligned
from fastopt.memory.formats import COMPUTED, FORMATS, format_of
from fastopt.memory.segments import Array
from fastopt.optimizer.formats import PARAM, Chosen, Formats, buffers_of, part_name
from fastopt.optimizer.saving import KEYS
from fastopt.rule import shown
from fastopt.rules import CLASS_RULES, RULES

EMPTY = np.empty(0, COMPUTED)
ALL = frozenset(FORMATS)


def convert_state(state_dict: Mapping[str, Any], formats: Any) -> dict[str, Any]:
    """Return a copy of an optimizer's ``state_dict()`` with its state in other formats.

    Parameters
    ----------
    state_dict
        What ``opt.state_dict()`` returned.
    formats
        As for an optimizer: a name, a dict, or a callable of an array's name, as in
        ``state_dict["params"]``, and its first buffer. "fp32" decodes all state, and
        leaves out the remainders of parameters: the result is for float32 parameters,
        those of ``opt.master_params()``. Other formats leave remainders as they are.

    Returns
    -------
    dict
        An optimizer with these formats can load it. A number that a format rounds
        stochastically is rounded by the number of the step, so the result is the same
        each time.

    Raises
    ------
    TypeError, ValueError
        If ``state_dict`` is not an optimizer's, or if a format does not exist.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.ones(8192, np.float32)
    >>> opt = fastopt.adamw(w, formats="8bit")
    >>> opt.step(np.ones_like(w))
    >>> plain = fastopt.adamw(w)
    >>> plain.load_state_dict(fastopt.convert_state(opt.state_dict(), "fp32"))
    >>> plain.state["m"][0][:2]
    array([0.1, 0.1], dtype=float32)
    """
    if not isinstance(state_dict, Mapping) or any(k not in state_dict for k in KEYS):
        raise TypeError(
            f"convert_state takes what an optimizer's state_dict() returned, got "
            f"{shown(state_dict)}"
        )
    if state_dict["params"] is None:
        raise ValueError(
            'state["params"] is None, but the names say which formats arrays have'
        )
    state, params = state_dict["state"], state_dict["params"]
    known = state_dict.get("formats") or {}
    before = [
        {stream: FORMATS[kind] for stream, kind in known.get(part[0][0], {}).items()}
        for part in params
    ]
    parts = {part_name(s, format) for of in before for s, format in of.items()}
    streams = [name for name in state if name not in parts]
    rules = {rule.name: rule for rule in (*RULES, *CLASS_RULES)}
    rule = rules.get(state_dict["rule"])  # None: a user's own
    if rule is None:
        wanted = Formats(formats, state_dict["rule"], streams)
    else:
        wanted = Formats.of_rule(formats, rule, True)
    if PARAM in wanted.common:
        raise ValueError(
            f"convert_state converts the state, not the parameters: leave {PARAM!r} out"
        )
    after: list[Chosen] = []
    numbers: list[list[Array]] = []  # for each array, those of each stream
    for i, (part, old) in enumerate(zip(params, before, strict=True)):
        numbers.append([decoded(state, stream, i, old) for stream in streams])
        kept = {PARAM: old[PARAM]} if PARAM in old and formats != "fp32" else {}
        size = sum(math.prod(shape) for _, shape in part)
        like = numbers[i][0] if streams else aligned(COMPUTED, (size,))
        after.append(kept | dict(wanted.of(part[0][0], like, "float32", like, ALL)))
    converted: dict[str, list[Array]] = {
        name: list(state[name]) if buffer.stream == PARAM else []
        for name, buffer in buffers_of(streams, after).items()
    }
    first = 0  # the index of the array's first element
    for part, chosen, of in zip(params, after, numbers, strict=True):
        for column, (stream, array) in enumerate(zip(streams, of, strict=True), 2):
            draw = first, state_dict["steps"], column
            for name, written in encoded(stream, array, chosen, draw, converted):
                converted[name].append(written)
        first += sum(math.prod(shape) for _, shape in part)
    named = {
        name: {stream: format.name for stream, format in chosen.items()}
        for part, chosen in zip(params, after, strict=True)
        for name, _ in part
        if chosen
    }
    return {**copy.deepcopy(dict(state_dict)), "state": converted, "formats": named}


def decoded(state: Mapping[str, Any], stream: str, i: int, chosen: Chosen) -> Array:
    """Return the numbers of a saved buffer of the i-th array, as a new array."""
    array: Array = state[stream][i]
    format = chosen.get(stream) or format_of(array.dtype)
    if format is None:
        return np.array(array)
    second = part_name(stream, format)
    parts = [array.view(format.stored), *([state[second][i]] if second else [])]
    return format.read(tuple(parts))


def encoded(
    stream: str,
    numbers: Array,
    chosen: Chosen,
    draw: tuple[int, int, int],
    names: Iterable[str],
) -> list[tuple[str, Array]]:
    """Return the buffers of a stream by name, for an array with these formats.
    ``names`` are those of all buffers."""
    format = chosen.get(stream)
    seconds = [
        name
        for name in names
        if name in {part_name(stream, each) for each in FORMATS.values()} - {None}
    ]
    if format is None:
        return [(stream, numbers), *((name, EMPTY) for name in seconds)]
    words, *rest = format.written(numbers, draw)
    own = part_name(stream, format)
    return [
        (stream, words.view(format.dtype)),
        *((name, rest[0] if name == own else EMPTY) for name in seconds),
    ]
