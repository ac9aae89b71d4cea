"""Schedules inside ``jax.jit``, where the step is traced.

Python computes them as it does elsewhere, by a callback, so their numbers are the same:
the cosine and the power of XLA differ in the last place.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastopt.schedules import Schedule, join, product


def is_traced(t: Any) -> bool:
    return isinstance(t, jax.core.Tracer)


def value(schedule: Any, t: Any) -> Any:
    """``schedule(t)`` for a traced ``t``, in JAX's widest float. What is composed of
    others' schedules is composed in JAX, where those belong."""
    steps = _numbers(t)
    widest = jnp.result_type(float)
    if _is_ours(schedule):
        return _computed(schedule, steps, widest, ())
    steps = jnp.maximum(steps, 0)
    if isinstance(schedule, product):
        return math.prod(value(part, steps) for part in schedule.schedules)
    if isinstance(schedule, join):
        first, *others = schedule.schedules
        now = value(first, steps)
        for part, begin in zip(others, schedule.boundaries, strict=True):
            later = value(part, jnp.maximum(steps - begin, 0))
            now = jnp.where(steps >= begin, later, now)
        return now
    return jnp.asarray(schedule(steps), widest)


def words(schedule: Schedule, t: Any) -> Any:
    """All bits of a float64, as fastopt.jax.exact has them, where the schedule has so
    many; else its value."""
    if not _is_ours(schedule):
        return value(schedule, t)
    return _computed(schedule, _numbers(t), np.uint32, (2,))


def _computed(schedule: Schedule, t: Any, dtype: Any, last: tuple[int, ...]) -> Any:
    def compute(t: Any) -> Any:
        values = np.asarray(schedule(np.asarray(t)), np.float64)
        if not last:
            return values.astype(dtype)
        return values.reshape(*values.shape, 1).view(dtype)

    like = jax.ShapeDtypeStruct((*t.shape, *last), dtype)
    return jax.pure_callback(compute, like, t, vmap_method="broadcast_all")


def _numbers(t: Any) -> Any:
    if jnp.issubdtype(t.dtype, np.integer):
        return t
    if not jnp.issubdtype(t.dtype, np.floating):
        raise TypeError(f"steps must be numbers, got {t.dtype}{list(t.shape)}")
    return t.astype(jnp.promote_types(t.dtype, np.float32))


def _is_ours(schedule: Any) -> bool:
    if isinstance(schedule, (join, product)):
        return all(map(_is_ours, schedule.schedules))
    return isinstance(schedule, Schedule)
