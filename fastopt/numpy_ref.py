"""The reference backend: a rule applied to whole NumPy arrays. Slow and readable.

Every backend is a module with the same names: ``bind`` is given the segments once and
returns the function that does a step over them; ``as_array`` and ``state_arena`` give
it arrays and room for state where it works; ``missing`` says why the backend cannot be
used here, if it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastopt.checks import as_array
from fastopt.flat import Array, Segment, state_arena
from fastopt.rule import PRIMITIVES, Rule, concrete

__all__ = ["as_array", "bind", "missing", "state_arena"]

Step = Callable[[list[Array | None], list[tuple[float, ...]], int], bool]


NUMPY = {primitive.__name__: primitive for primitive in PRIMITIVES}


def missing() -> str | None:
    """Why this backend cannot be used, or None; this one always can."""
    return None


def bind(rule: Rule, segments: Sequence[Segment], count: Array) -> Step:
    """The function ``step(grads, scalars, threads)`` over these segments.

    ``grads`` holds one array a segment (None: leave it alone), ``scalars`` one tuple a
    group, which starts with the factor for the gradients. ``count``, an int64 array of
    one element, is raised by one at the end. True says that the step was done.
    """

    dtype = segments[0].param.dtype
    # Numbers that the rule reaches by name take the dtype here as on other backends.
    update = concrete(rule.update, dtype, NUMPY, lambda function: function)

    def step(
        grads: list[Array | None],
        scalars: list[tuple[float, ...]],
        threads: int,
    ) -> bool:
        results: list[tuple[Array, Array]] = []
        with np.errstate(all="ignore"):
            for segment, grad in zip(segments, grads, strict=True):
                if grad is None:
                    continue
                grad_scale, *constants = map(dtype.type, scalars[segment.group])
                buffers = (segment.param, *segment.state)
                new = update(buffers[0], grad * grad_scale, *buffers[1:], *constants)
                results += zip(buffers, new, strict=True)
        # Only now, so that an error in a rule leaves all as it was. (An interrupt in
        # between does not; the compiled backends do a step in one call.)
        values = [value.copy() for _, value in results]
        for (buffer, _), value in zip(results, values, strict=True):
            buffer[...] = value
        count[0] += 1
        return True

    return step
