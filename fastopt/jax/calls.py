"""A step as custom calls of XLA's (csrc/xla.pyx)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastopt import native
from fastopt.backends.cython_cpu import HOW_TO_GET
from fastopt.jax import shards
from fastopt.jax.arrays import words
from fastopt.memory.formats import DTYPES as STATE_DTYPES
from fastopt.memory.formats import computed
from fastopt.rule import Rule

STEP, SUMS, STEP_WITH_SUMS = "fastopt_step", "fastopt_sums", "fastopt_step_with_sums"


def register() -> None:
    """Tell XLA of the calls."""
    native.table()  # or the error that says how to get it
    try:
        xla = importlib.import_module("fastopt._xla")
    except ImportError as error:
        raise RuntimeError(
            f"fastopt was built without its call for XLA ({error}); {HOW_TO_GET}"
        ) from error
    for name, target in xla.targets().items():
        jax.ffi.register_ffi_target(name, target, platform="cpu")


@dataclass(frozen=True)
class Step:
    """A step of a rule.

    Parameters
    ----------
    name
        What the rule is called among the native rules.
    axes
        The axes of a mesh over which its sums are added up, and their sizes.
    """

    rule: Rule
    name: str
    threads: int
    axes: Mapping[Any, int] = field(default_factory=dict)

    def __call__(
        self,
        t: Any,
        static: Mapping[str, float],
        traced: Mapping[str, Any],
        carry: Any,
        params: Sequence[Any],
        grads: Sequence[Any],
        buffers: Sequence[Sequence[Any]],
    ) -> tuple[list[list[Any]], Any]:
        """Parameters and state, each as a list of arrays, after the step; and the
        carry. One call, or two, for the arrays that are computed in each dtype."""
        order = [*self.rule.hyperparameters, "grad_scale"]
        attributes = {
            "rule": self.name,
            "traced": np.array([order.index(key) for key in traced], np.int64),
            "threads": np.int32(self.threads),
        }
        numbers = words([static.get(key, 0.0) for key in order])
        streams, old = [list(params), *map(list, buffers)], carry
        for dtype in STATE_DTYPES:
            which = [k for k, p in enumerate(params) if computed(p.dtype) == dtype]
            if not which:
                continue
            # Of a rule over segments, each array has its own row.
            rows = np.array(which) if self.rule.by_segment else np.arange(len(old))
            new, part = self._part(
                [
                    *(t, numbers, old[rows] if len(rows) < len(old) else old),
                    *traced.values(),
                ],
                [[stream[k] for k in which] for stream in (params, grads, *buffers)],
                attributes,
            )
            if len(rows) < len(old):
                part = jnp.asarray(carry).at[rows].set(part)
            carry = part
            for k, array in enumerate(new):
                streams[k // len(which)][which[k % len(which)]] = array
        return streams, carry

    def _part(
        self,
        leading: list[Any],
        streams: list[list[Any]],
        attributes: Mapping[str, Any],
    ) -> tuple[Sequence[Any], Any]:
        """The arrays and the carry after the step. ``leading`` are the number of the
        step, the hyperparameters, the carry, and traced numbers; ``streams`` are
        parameters, gradients and state."""
        common = shards.axes_of(*leading)
        varies = [shards.axes_of(*arrays) for arrays in zip(*streams, strict=True)]
        together = shards.NONE.union(*varies)
        if self.rule.settle is not None and not self.axes:
            common |= together if self.rule.over == "all" else shards.NONE
            leading[2] = shards.varying(leading[2], together)
        leading[2] = shards.varying(leading[2], common)
        streams = [
            [
                array if k == 1 else shards.varying(array, axes | common)
                for array, axes in zip(arrays, varies, strict=True)
            ]
            for k, arrays in enumerate(streams)
        ]
        operands = [*leading, *(array for arrays in streams for array in arrays)]
        first, count = len(leading), len(varies)
        # For each result, the operand in whose memory it is. Gradients have no result.
        kept = [2, *range(first, first + count)]
        kept += range(first + 2 * count, len(operands))

        def call(*operands: Any, sharded: shards.Sharded | None = None) -> Any:
            """The step of these arrays, or of shards of arrays."""
            given, name, places = [*operands], STEP, kept
            if sharded is not None and self.rule.settle is not None:
                sums = shards.from_all(self._sums(operands, count, attributes), sharded)
                given.insert(3, sums)
                name, places = STEP_WITH_SUMS, [k + (k >= 3) for k in kept]
            return jax.ffi.ffi_call(
                name,
                tuple(shards.like(given[k]) for k in places),
                input_output_aliases={k: i for i, k in enumerate(places)},
                vmap_method="sequential",
            )(*given, **attributes)

        if self.axes:
            part, *new = call(*operands, sharded=shards.Sharded(self.axes, varies))
        else:
            about = repr(attributes)
            part, *new = shards.in_shards(call, about, operands, first, count, kept)
        return new, part

    def _sums(
        self, operands: Sequence[Any], count: int, attributes: Mapping[str, Any]
    ) -> Any:
        """The sums over each array that is here."""
        like = jnp.zeros((count, 1 + self.rule.terms, 2), jnp.uint32)
        like = shards.like(shards.varying(like, shards.axes_of(*operands)))
        call = jax.ffi.ffi_call(SUMS, like, vmap_method="sequential")
        return call(*operands, **attributes)
