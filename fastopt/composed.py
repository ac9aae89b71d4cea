"""Composes the passes of a rule (:meth:`Rule.in_passes`) into its ``update`` and
``measure``. ``csrc/render.py`` runs this file during the build, so it must not import
NumPy.
"""

from __future__ import annotations

import linecache
import types
from collections.abc import Sequence
from typing import Any


def text(direction: Sequence[str], apply: Sequence[str], states: int) -> str:
    """Return the source of ``update`` and ``measure``, which call ``direction``,
    ``terms`` and ``apply``. The arguments are the parameter names of ``direction`` and
    ``apply``, and the number of state buffers."""
    names, (p, *state) = ", ".join(direction), (direction[0], *direction[2:][:states])
    both, (_, u, *scalars) = ", ".join([*direction, *apply[2:]]), apply
    new = "".join(f" {name}," for name in state)
    return f"""\
def update({both}):
    {u},{new} = direction({names})
    ({p},) = apply({", ".join([p, u, *scalars])})
    return {p},{new}

def measure({names}):
    {u},{new} = direction({names})
    return terms({p}, {u})
"""


# What the passes must take.
TAKEN = {
    "direction": "(p, g, *state, *scalars)",
    "terms": "(p, u) and nothing else",
    "apply": "(p, u, *what settle returns)",
}


def functions(direction: Any, measure: Any, apply: Any, states: int) -> tuple[Any, Any]:
    """Return ``update`` and ``measure``. Raise TypeError if a pass takes the wrong
    arguments."""
    parts = {"direction": direction, "terms": measure, "apply": apply}
    taken: list[tuple[str, ...]] = []
    for what, function in parts.items():
        if not isinstance(function, types.FunctionType):
            raise TypeError(f"{what} must be a plain Python function, got {function!r}")
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        least = 2 + states if what == "direction" else 2
        if len(names) < least or (what == "terms" and len(names) > least):
            raise TypeError(
                f"{function.__name__} of a rule in passes must take {TAKEN[what]}, "
                f"with {states} state buffers here; it takes ({', '.join(names)})"
            )
        taken.append(names)
    for name in taken[2][1:]:
        if name in taken[0]:
            raise TypeError(
                f"{apply.__name__} takes {name}, and so does {direction.__name__}; "
                f"give it another name in one of them, for it is another number"
            )
    code = text(taken[0], taken[2], states)
    # Tracebacks and inspect find the source under this name.
    file = f"<{direction.__module__}.{direction.__name__} in passes>"
    linecache.cache[file] = len(code), None, code.splitlines(True), file
    made: dict[str, Any] = {"__name__": direction.__module__, **parts}
    exec(compile(code, file, "exec"), made)
    return made["update"], made["measure"]
