"""The cases to measure: every rule of ``RULES`` with its variants, by size. New rules
are included."""

from __future__ import annotations

from collections.abc import Iterable

import fastopt
from fastopt.bench.contender import Case, state_count

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
QUICK_SIZES = (1_000, 100_000, 1_000_000)
TENSORS = ((100, 1_000), (150, 333_333))  # how many, of how many elements

# What measured steps do besides their rule. Users of LAMB clip; timm's and apex's LAMB
# do so by default.
ASKED: dict[str, tuple[dict[str, float], ...]] = {
    "adamw": ({"clip_norm": 1.0}, {"clip_norm": 1.0, "ema": 0.999}),
    "lamb": ({"clip_norm": 1.0},),
}

# The values that switch variants on; flags become True.
ON = {"momentum": 0.9}


def switched(rule: fastopt.Rule) -> list[dict[str, float | bool]]:
    """Return the rule's defaults, and what switches each of its variants on."""
    return [{}] + [{n: ON.get(n, True) for n in names} for names in rule.variants]


def title(case: Case) -> str:
    """Return a title such as ``sgd (momentum)``."""
    on = ", ".join(case.hyperparameters)
    beside = "".join(f" + {name}" for name in case.asked)
    beside += "" if case.dtype == "float32" else f", {case.dtype}"
    return (f"{case.rule} ({on})" if on else case.rule) + beside


def shape(case: Case) -> str:
    """Return a size such as ``1,000``, or ``100 x 1,000`` for many tensors."""
    many = f"{case.tensors:,} x " if case.tensors > 1 else ""
    return f"{many}{case.elements:,}"


def all_elements(case: Case) -> int:
    return case.tensors * case.elements


def bytes_moved(case: Case) -> int:
    """Return the least bytes that a step moves: it reads all streams and writes all but
    the gradients; for norms it reads the streams once more. State and averages have 4
    bytes an element."""
    width = 4 if case.dtype == "float32" else 2
    states = state_count(case)
    moved = (3 + ("clip_norm" in case.asked)) * width + 8 * states
    moved += 8 * ("ema" in case.asked)
    if getattr(fastopt, case.rule).measure is not None:
        moved += 2 * width + 4 * states
    return moved * all_elements(case)


def cases(
    rules: Iterable[str],
    sizes: Iterable[int],
    tensors: Iterable[tuple[int, int]],
    dtypes: Iterable[str] = ("float32",),
) -> list[Case]:
    shapes = [(1, size) for size in sizes] + list(tensors)
    return [
        Case(name, hyperparameters, count, elements, asked, dtype)
        for name in rules
        for hyperparameters in switched(getattr(fastopt, name))
        for asked in ({}, *ASKED.get(name, ()))
        for dtype in dtypes
        for count, elements in shapes
    ]
