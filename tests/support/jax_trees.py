"""Trees of arrays for the tests of fastopt.jax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import bfloat16, nonzero, same_bits

SHAPES = {"w": (131, 7), "layers": [(5,), (2, 1, 3)], "empty": (0, 2), "scalar": ()}


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def arrays(seed: int, dtype: Any = np.float32, shapes: Any = SHAPES) -> Any:
    """NumPy arrays in the structure of ``shapes``."""
    rng = np.random.default_rng(seed)

    def one(shape):
        return nonzero(rng, int(np.prod(shape)), dtype).reshape(shape)

    return jax.tree.map(one, shapes, is_leaf=is_shape)


def to_jax(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.array(a, copy=True), tree)


def same(a: Any, b: Any) -> bool:
    pairs = [
        (np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return all(
        same_bits(x, y)
        if x.dtype.kind == "f" or x.dtype == bfloat16
        else np.array_equal(x, y)
        for x, y in pairs
    )
