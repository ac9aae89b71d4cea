"""The reference backend: a rule applied to whole NumPy arrays. Slow and readable.

Every backend is a module with the same names: ``bind`` is given the segments once and
returns the function that does a step over them; ``as_array`` and ``state_arena`` give
it arrays and room for state where it works; ``missing`` says why the backend cannot be
used here, if it cannot; ``CHECKS_GRADS`` whether a step checks its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastopt.checks import as_array
from fastopt.flat import Array, Segment, state_arena
from fastopt.rule import Rule

__all__ = ["as_array", "bind", "missing", "state_arena"]

Step = Callable[[list[Array | None], list[tuple[float, ...]], int], bool]


# Whether a step itself checks its gradients; if not, the optimizer does so before.
CHECKS_GRADS = False


def missing() -> str | None:
    """Why this backend cannot be used, or None; this one always can."""
    return None


def bind(rule: Rule, segments: Sequence[Segment], count: Array) -> Step:
    """The function ``step(grads, scalars, threads)`` over these segments.

    ``grads`` holds one array a segment (None: leave it alone), ``scalars`` one tuple a
    group, which starts with the factor for the gradients. ``count``, an int64 array of
    one element, is raised by one at the end. True says that the step was done.
    """

    def step(
        grads: list[Array | None],
        scalars: list[tuple[float, ...]],
        threads: int,
    ) -> bool:
        with np.errstate(all="ignore"):
            for segment, grad in zip(segments, grads, strict=True):
                if grad is None:
                    continue
                dtype = segment.param.dtype.type
                grad_scale, *constants = map(dtype, scalars[segment.group])
                buffers = (segment.param, *segment.state)
                # Copies, since a rule may return one buffer as another.
                values = (b.copy() for b in segment.state)
                p = segment.param.copy()
                g = grad * grad_scale
                new = rule.update(p, g, *values, *constants)
                for buffer, value in zip(buffers, new, strict=True):
                    buffer[...] = value
        count[0] += 1
        return True

    return step
