"""What a step inside ``jax.jit`` takes: its arrays and numbers, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastopt.memory.formats import DTYPES as STATE_DTYPES
from fastopt.memory.formats import computed
from fastopt.rule import check_hyperparameter

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64

# The dtypes of parameters and gradients. State has those that kernels compute in.
DTYPES = (*STATE_DTYPES, np.dtype(jnp.bfloat16), np.dtype(np.float16))
ARRAYS = (jax.Array, np.ndarray, np.generic)
MOST_STEPS = 2**31 - 2  # so that one more fits int32


def paths(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(p), x) for p, x in jax.tree.leaves_with_path(tree)]


def shown(leaf: Any) -> str:
    if isinstance(leaf, ARRAYS):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__


# Parameters and what is like them -----------------------------------------------------


def taken(
    name: str, tree: Any, dtypes: Sequence[Any] = DTYPES
) -> tuple[list[Any], Any]:
    """The leaves, if they are arrays that a step can take, and the structure."""
    leaves, structure = jax.tree.flatten(tree)
    for path, leaf in paths(tree):
        if not isinstance(leaf, ARRAYS) or leaf.dtype not in dtypes:
            *others, last = map(str, dtypes)
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{name}{path} must be an array of {', '.join(others)} or {last}, got "
                f"{dtype}"
            )
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise TypeError(
                f"{name}{path} is float64, which JAX rounds to float32 as long as "
                f"jax_enable_x64 is off; turn that on, or pass float32"
            )
        check_platform(f"{name}{path}", leaf)
    return leaves, structure


def fitting(
    name: str,
    tree: Any,
    params: Any,
    theirs: str = "params",
    dtypes: Sequence[Any] = DTYPES,
) -> list[Any]:
    """The leaves, if they have the structure and shapes of the parameters, or of what
    goes by the name of ``theirs``, and dtypes that are computed in the same one."""
    leaves, structure = taken(name, tree, dtypes)
    wanted = jax.tree.structure(params)
    if structure != wanted:
        raise ValueError(f"{name} has the structure {structure}, {theirs} {wanted}")
    for leaf, (path, param) in zip(leaves, paths(params), strict=True):
        kind = computed(param.dtype)
        if leaf.shape != param.shape or computed(leaf.dtype) != kind:
            fit = [str(dtype) for dtype in dtypes if computed(dtype) == kind]
            raise ValueError(
                f"{name}{path} is {shown(leaf)} but {theirs}{path} is {shown(param)}; "
                f"it must be {' or '.join(fit)}, of shape {list(param.shape)}"
            )
    return leaves


def check_platform(name: str, leaf: Any) -> None:
    """The kernels work in host memory. Where a traced array will be, only JAX's
    default tells."""
    if isinstance(leaf, jax.core.Tracer):
        device = jax.config.jax_default_device
        platforms = {getattr(device, "platform", device) or jax.default_backend()}
    elif isinstance(leaf, jax.Array):
        platforms = {device.platform for device in leaf.devices()}
    else:
        platforms = {"cpu"}
    if platforms != {"cpu"}:
        raise ValueError(
            f"{name} is on {' and '.join(sorted(platforms))}, but fastopt.jax works on "
            f"the CPU; set JAX_PLATFORMS=cpu, or work within "
            f"jax.default_device(jax.devices('cpu')[0])"
        )


def widened(leaf: Any) -> Any:
    """An array of the dtype that kernels compute in."""
    dtype = computed(leaf.dtype)
    return leaf if leaf.dtype == dtype else jnp.asarray(leaf, dtype)


# The rest of a state ------------------------------------------------------------------


def completed(count: Any) -> Any:
    """``state.count``: as int32, or as int64 where it is one of JAX's. A checkpoint may
    bring any integer."""
    name = "state.count"
    if isinstance(count, int) and not isinstance(count, bool):
        count = np.array(count)
    integer = isinstance(count, ARRAYS) and jnp.issubdtype(count.dtype, np.integer)
    wanted = f"{name} must be one integer, as int32[], got {shown(count)}"
    if not integer:
        raise TypeError(wanted)
    if count.shape:
        raise ValueError(f"{wanted}{BATCHED}")
    check_platform(name, count)
    if isinstance(count, jax.Array):
        wide = count.dtype.itemsize == 8
        return jax.lax.convert_element_type(count, jnp.int64 if wide else jnp.int32)
    if not 0 <= int(count) <= MOST_STEPS:
        raise ValueError(f"{name} must be from 0 to {MOST_STEPS}, got {count}")
    return jnp.asarray(int(count), jnp.int32)


def carried(carry: Any, shape: tuple[int, ...]) -> Any:
    """``state.carry``; None is that of a rule which carries no numbers."""
    if carry is None and shape[1] == 0:
        return np.zeros(shape, np.uint32)
    wanted = f"state.carry must be uint32{list(shape)}, got {shown(carry)}"
    if not isinstance(carry, ARRAYS) or carry.dtype != np.uint32:
        raise TypeError(
            f"{wanted}; it holds the halves of float64, so restore it as it was saved"
        )
    if carry.shape != shape:
        raise ValueError(f"{wanted}{BATCHED}")
    check_platform("state.carry", carry)
    return carry


def named(buffers: Any, rule: str, names: Sequence[str]) -> dict[str, Any]:
    """``state.buffers``, which has these names and no others."""
    if not isinstance(buffers, Mapping):
        raise TypeError(
            f"state.buffers must be a dict of the buffers' names, got {shown(buffers)}"
        )
    if {*buffers} != {*names}:
        theirs, ours = (", ".join(map(str, n)) or "nothing" for n in (buffers, names))
        raise ValueError(
            f"state.buffers has {theirs}, but {rule} with these options keeps {ours}; "
            f"take the state from this optimizer's init or step"
        )
    return dict(buffers)


BATCHED = "; a batch of states is for jax.vmap of the step"

# Numbers ------------------------------------------------------------------------------


def words(values: Sequence[float]) -> Any:
    """float64 as pairs of uint32, which JAX has in any case."""
    return np.array(values, np.float64).view(np.uint32).reshape(len(values), 2)


def is_words(value: Any) -> bool:
    pair = isinstance(value, ARRAYS) and value.shape == (2,)
    return pair and value.dtype == np.uint32


def number(key: str, name: str, value: Any, default: Any) -> Any:
    """A hyperparameter: a plain number, checked, or a traced scalar, which the step
    checks when it runs."""
    if isinstance(value, jax.core.Tracer):
        if is_words(value):
            return value
        real = [np.integer, np.floating]
        if value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in real):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        wide = value.dtype == jnp.float64
        return value if wide else value.astype(jnp.float32)
    if is_words(value):
        value = as_float(value)
    return check_hyperparameter(key, name, value, default)


def as_float(value: Any) -> float:
    """A number of any kind that is known by now."""
    return float(np.asarray(value).view(np.float64)[0] if is_words(value) else value)


def as_words(value: Any) -> Any:
    """A number as the halves of a float64, inside ``jit``, too."""
    if is_words(value):
        return value
    if not isinstance(value, jax.core.Tracer):
        return words([value])[0]
    with enable_x64(True):
        return jax.lax.bitcast_convert_type(value.astype(np.float64), np.uint32)


def as_dtype(value: Any, dtype: Any) -> Any:
    """A number, rounded to a dtype."""
    if not is_words(value):
        return jnp.asarray(value, dtype)
    with enable_x64(True):
        wide = jax.lax.bitcast_convert_type(jnp.asarray(value), np.float64)
        return wide.astype(dtype)
