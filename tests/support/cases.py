"""What the tests run over: every rule, from RULES, under hyperparameters off their
defaults, and the memory layouts that kernels meet. A new rule needs nothing here."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np

from fastopt import RULES, Rule
from fastopt.rule import sign

DTYPES = (np.float32, np.float64)
bfloat16 = ml_dtypes.bfloat16
# Dtypes of parameters and of their gradients that are stored in fewer bits.
STORED = {
    "bf16": (bfloat16, bfloat16),
    "fp16": (np.float16, np.float16),
    "bf16 gradients": (np.float32, bfloat16),
    "fp16, float32 gradients": (np.float16, np.float32),
}


def off_default(name: str, default: float) -> float:
    """A value of a hyperparameter that is legal and not its default."""
    if name == "lr":
        return 0.03125 * 1.1
    if name == "eps":
        return 1e-3
    if default == 0:
        return 0.3
    return default * 0.93


def settings(rule: Rule) -> list[dict]:
    """Hyperparameters off their defaults, under every choice of the rule's switches."""
    defaults = rule.hyperparameters
    flags = [n for n, default in defaults.items() if isinstance(default, bool)]
    switches = rule.switches - set(flags)
    found = []
    for choice in itertools.product((False, True), repeat=len(flags) + len(switches)):
        on = dict(zip([*flags, *sorted(switches)], choice, strict=True))
        values = {
            n: on[n] if n in flags else off_default(n, default) * on.get(n, True)
            for n, default in defaults.items()
        }
        # Some options exclude others (nesterov dampening): leave out one or none.
        optional = [n for n, d in defaults.items() if d == 0 and n not in on]
        for without in (None, *optional):
            candidate = {**values, **({without: 0.0} if without else {})}
            try:
                rule.scalars(1, *rule.first_carry(candidate), **candidate)
            except ValueError:
                continue
            found.append(candidate)
            break
    return found


def label(rule: Rule, values: dict) -> str:
    """Such as ``sgd-momentum-nesterov``."""
    flags = {n for n, v in values.items() if v is True}
    on = sorted(n for n in values if n in rule.switches | flags and values[n])
    return "-".join([rule.name, *on])


def closure_rule() -> Rule:
    """A user's rule made inside a function: helper and constant are in its closure."""
    third = 1 / 3

    def signed(x):
        return third * sign(x)

    def update(p, g, lr):
        return (p - lr * (signed(g) + third),)

    return Rule(update, lambda t, lr=0.1: (lr,), name="closure")


CASES = [(rule, values) for rule in RULES for values in settings(rule)]
IDS = [label(rule, values) for rule, values in CASES]


def odd_view(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy that starts ``offset`` elements into its allocation: misaligned."""
    room = np.empty(values.size + offset, values.dtype)
    view = room[offset:].reshape(values.shape)
    view[...] = values
    return view


def nonzero(rng: np.random.Generator, size: int, dtype: type) -> np.ndarray:
    """Random values of both signs and several magnitudes, none of them zero."""
    values = rng.standard_normal(size) * 10.0 ** rng.integers(-3, 2, size)
    return np.where(values == 0, 1.0, values).astype(dtype)


def special_values(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Every pair, as parameters and gradients, of infinities, NaN, zeros of both signs,
    subnormals and extremes."""
    limits = ml_dtypes.finfo(dtype)
    tiny, large = limits.smallest_subnormal, limits.max
    values = [np.inf, -np.inf, np.nan, 0.0, -0.0, tiny, -tiny, 1.0, large]
    p, g = np.meshgrid(values, values)
    return p.ravel().astype(dtype), g.ravel().astype(dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit; any NaN equals any other, since IEEE leaves its payload
    and sign to the machine."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = f"u{a.dtype.itemsize}"
    equal = np.atleast_1d(a).view(whole) == np.atleast_1d(b).view(whole)
    return bool(np.all(equal | (np.isnan(a) & np.isnan(b))))


def alike(a: Any, b: Any) -> bool:
    """Whether two states hold the same, to the last bit; arrays may stand for lists,
    and sets."""
    a, b = (sorted(v) if isinstance(v, set) else v for v in (a, b))
    if isinstance(a, list) and isinstance(b, np.ndarray):
        b = b.tolist()
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and same_bits(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and isinstance(b, float) and a != a:
        return b != b
    return bool(a == b)
