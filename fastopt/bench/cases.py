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
    return (f"{case.rule} ({on})" if on else case.rule) + beside


def shape(case: Case) -> str:
    """Return a size such as ``1,000``, or ``100 x 1,000`` for many tensors."""
    many = f"{case.tensors:,} x " if case.tensors > 1 else ""
    return f"{many}{case.elements:,}"


def all_elements(case: Case) -> int:
    return case.tensors * case.elements


def bytes_moved(case: Case) -> int:
    """Return the least bytes that a step moves: it reads all streams and writes all but
    the gradients, 4 bytes an element; for norms it reads the streams once more."""
    streams = 2 + state_count(case)
    moved = 2 * streams - 1 + 2 * ("ema" in case.asked) + ("clip_norm" in case.asked)
    if getattr(fastopt, case.rule).measure is not None:
        moved += streams
    return 4 * moved * all_elements(case)


def cases(
    rules: Iterable[str], sizes: Iterable[int], tensors: Iterable[tuple[int, int]]
) -> list[Case]:
    shapes = [(1, size) for size in sizes] + list(tensors)
    return [
        Case(name, hyperparameters, count, elements, asked)
        for name in rules
        for hyperparameters in switched(getattr(fastopt, name))
        for asked in ({}, *ASKED.get(name, ()))
        for count, elements in shapes
    ]
