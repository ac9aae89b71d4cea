"""Steps on several devices. Inside ``jax.shard_map``, types tell which arrays differ
between devices; under ``jax.jit``, XLA's partitioner asks how to step shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fastopt.rule import Rule

Axes: TypeAlias = frozenset[Any]  # names of a mesh's axes
NONE: Axes = frozenset()


# Inside shard_map ---------------------------------------------------------------------


def axes_of(*arrays: Any) -> Axes:
    """The axes of a mesh over which arrays vary, as far as their types tell."""
    return NONE.union(*map(_axes_of, arrays))


def _axes_of(array: Any) -> Axes:
    if not isinstance(array, jax.core.Tracer):
        return NONE
    kind = jax.typeof(array)
    kind = getattr(kind, "manual_axis_type", kind)  # JAX 0.10
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", NONE)))


def varying(array: Any, axes: Axes) -> Any:
    """The array, with a type that varies over these axes, too."""
    missing = tuple(sorted(axes - axes_of(array), key=str))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    return jax.lax.pvary(array, missing)  # before JAX 0.8


def like(array: Any) -> Any:
    """The type of a result: shape and dtype, and how it is sharded or varies."""
    if not hasattr(jax, "typeof"):  # before JAX 0.6
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.typeof(array).update(weak_type=False)


def manual_axes() -> dict[Any, int]:
    """The axes that a shard_map around us splits arrays over, and their sizes."""
    if not hasattr(jax.sharding, "get_abstract_mesh"):
        return {}
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in getattr(mesh, "manual_axes", ())}


def checked_names(axis_name: Any) -> tuple[Any, ...] | None:
    """``axis_name=`` as a tuple of names."""
    if axis_name is None:
        return None
    names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"axis_name must be the name of a mesh's axis or a tuple of names, got "
            f"{axis_name!r}"
        )
    if len({*names}) < len(names):
        raise ValueError(f"axis_name has a name twice: {names!r}")
    return names


def summed_over(
    rule: Rule,
    names: tuple[Any, ...] | None,
    params: Sequence[tuple[str, Any]],
    others: Sequence[Sequence[tuple[str, Any]]],
) -> dict[Any, int]:
    """The axes over which a step of this rule must add up its sums, and their sizes.

    Parameters
    ----------
    names
        What the user gave.
    params, others
        The parameters; the gradients and each state buffer: arrays with their names.

    Raises
    ------
    ValueError
        Where arrays may be shards whose sums would not be those of whole arrays.
    """
    if rule.settle is None or names == ():
        return {}
    manual = manual_axes()
    single = {name for name, size in manual.items() if size == 1}
    known = all(axes_of(jax.lax.axis_index(name)) for name in {*manual} - single)
    takes = f"{rule.name} takes sums over whole arrays"
    if names is None:
        names = ()
        if not known:
            raise ValueError(
                f"{takes}, and inside shard_map with check_vma=False, or pmap, nothing "
                f"tells whether arrays are shards; leave check_vma on, or give the "
                f"optimizer axis_name=() if each device has whole arrays"
            )
    elif missing := [name for name in names if name not in manual]:
        raise ValueError(
            f"axis_name={names!r} is for a step inside jax.shard_map over these axes, "
            f"but there is no axis {missing[0]!r} around this one"
        )
    elif not known:
        raise ValueError(
            f"{takes}, and with check_vma=False nothing tells which arrays are shards "
            f"and which are whole on each device; leave check_vma of shard_map on"
        )
    together = axes_of(*(leaf for _, leaf in params))
    names += tuple(name for name in manual if name in single & together - {*names})
    for path, leaf in params:
        if left := axes_of(leaf) - {*names}:
            axes = _listed(left)
            raise ValueError(
                f"{takes}, but {path} varies over {axes}: give the optimizer "
                f"axis_name=, with {axes} in it, to add up the sums of its shards, or "
                f"axis_name=() if each device has whole arrays"
            )
    for several in others:
        for (path, leaf), (param, whole) in zip(several, params, strict=True):
            if left := axes_of(leaf) - axes_of(whole):
                raise ValueError(
                    f"{takes}, and {path} varies over {_listed(left)} but {param} does "
                    f"not: a gradient and state must be sharded as their parameter is, "
                    f"so sum up the gradients over that axis first, as by jax.lax.psum"
                )
    return {name: manual[name] for name in names}


def _listed(axes: Axes) -> str:
    return " and ".join(sorted(map(repr, axes)))


class Sharded(NamedTuple):
    """How arrays are sharded."""

    axes: Mapping[Any, int]  # axes of a mesh, and their sizes
    over: Sequence[Axes]  # for each array those that it is sharded over


def from_all(numbers: Any, sharded: Sharded) -> Any:
    """What all devices have of these numbers, uint32 with a row for each array: in the
    order of the devices along the axes, and the same on each device. Of an array that
    is whole on several devices, only the first has numbers; the others' are 0."""
    names, sizes = tuple(sharded.axes), tuple(sharded.axes.values())
    places = dict(zip(names, np.indices(sizes).reshape(len(sizes), -1), strict=True))
    counted = np.ones((math.prod(sizes), len(sharded.over)), bool)
    for row, over in enumerate(sharded.over):
        for name in {*names} - over:
            counted[:, row] &= places[name] == 0
    # Each device adds zeros to the others' words, so nothing is rounded. The type of a
    # sum, unlike that of all_gather, says that it is the same everywhere.
    mine = jnp.arange(len(counted)) == jax.lax.axis_index(names)
    words = jnp.where(counted & mine[:, None], 1, 0).astype(jnp.uint32)
    return jax.lax.psum(words[:, :, None, None] * numbers, names)


# Under jit ----------------------------------------------------------------------------


def by_partitioner(*arrays: Any) -> bool:
    """Whether these are in a program for several devices whose arrays XLA shards."""
    return (
        jax.__version_info__ >= (0, 9)  # before that, nothing here is tested
        and len(jax.devices("cpu")) > 1
        and any(isinstance(array, jax.core.Tracer) for array in arrays)
        and not manual_axes()
    )


def alike(array: Any, new: Any) -> Any:
    """A new array, sharded as another one of its shape is. Where types tell how that
    is, the new one has its type already."""
    if not by_partitioner(array) or jax.typeof(array).sharding.mesh.explicit_axes:
        return new
    from jax.experimental.shard_alike import shard_alike

    return shard_alike(array, new)[1]


def in_shards(
    call: Callable[..., Any],
    about: str,
    operands: Sequence[Any],
    leading: int,
    arrays: int,
    results: Sequence[int],
) -> Any:
    """Call a function of arrays, each element of which depends on the same elements of
    others and on sums: where arrays are sharded, shard by shard.

    Parameters
    ----------
    call
        ``call(*operands, sharded=None)``.
    about
        What the function depends on. XLA sees that as one more operand: then JAX, whose
        stored programs do not tell such functions apart, never takes one for another.
    leading
        How many of the operands come before the arrays. Each device has them in whole.
    arrays
        How many arrays there are. The other operands are so many parameters, so many
        gradients, and so on; what belongs to one array has its shape.
    results
        For each result the operand that it is like.
    """
    if not by_partitioner(*operands):
        return call(*operands)
    from jax.experimental.custom_partitioning import (
        SdyShardingRule,
        custom_partitioning,
    )

    def body(about: Any, *operands: Any, sharded: Sharded | None = None) -> Any:
        return call(*operands, sharded=sharded)

    def array_of(operand: int) -> int:
        """An array, or before these the operand itself."""
        return operand if operand < leading else leading + (operand - leading) % arrays

    operands, leading = (
        [np.frombuffer(about.encode(), np.uint8), *operands],
        leading + 1,
    )
    of_operands = [*map(array_of, range(len(operands)))]
    of_results = [array_of(1 + k) for k in results]
    one = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    whole = jax.ShapeDtypeStruct((), np.float32, sharding=one)  # on each device

    def chosen(kinds: Iterable[tuple[int, Any]]) -> dict[int, Any]:
        """For each array in shards, the sharding in most parts of all that belongs to
        it: then state in shards is not gathered for a parameter that is whole."""
        found: dict[int, Any] = {}
        most: dict[int, int] = {}
        for array, kind in kinds:
            axes = split_over(kind.sharding, kind.shape) if array >= leading else NONE
            parts = math.prod(kind.sharding.mesh.shape[name] for name in axes)
            if parts > most.get(array, 1):
                found[array], most[array] = kind, parts
        return found

    def partition(mesh: Any, given: Any, made: Any) -> Any:
        found = chosen(
            [*zip([*of_operands, *of_results], [*given, *made], strict=True)]
        )
        over = [
            split_over(found[array].sharding, found[array].shape)
            if array in found
            else NONE
            for array in range(leading, leading + arrays)
        ]
        axes = {
            name: size for name, size in mesh.shape.items() if name in NONE.union(*over)
        }
        return (
            mesh,
            partial(body, sharded=Sharded(axes, over) if axes else None),
            tuple(found.get(array, whole).sharding for array in of_results),
            tuple(found.get(array, whole).sharding for array in of_operands),
        )

    def infer(mesh: Any, given: Any, made: Any) -> Any:
        found = chosen(zip(of_operands, given, strict=True))
        return tuple(found.get(array, whole).sharding for array in of_results)

    def factors(operand: int) -> tuple[str, ...]:
        array = array_of(operand)
        return tuple(f"d{array}_{k}" for k in range(np.ndim(operands[operand])))

    partitioned = custom_partitioning(lambda *operands: body(*operands))
    partitioned.def_partition(
        partition,
        infer_sharding_from_operands=infer,  # for GSPMD, which JAX had before Shardy
        propagate_user_sharding=lambda mesh, made: tuple(k.sharding for k in made),
        sharding_rule=SdyShardingRule(
            tuple(map(factors, range(len(operands)))),
            tuple(factors(1 + k) for k in results),
            need_replication_factors=tuple(
                name for k in range(leading) for name in factors(k)
            ),
        ),
    )
    step = jax.custom_jvp(jax.custom_batching.sequential_vmap(partitioned))
    step.defjvp(_refused)
    # To XLA, what a callback returns is on one device, which JAX cannot put into words
    # for ``partition``. A barrier keeps that from our operands.
    return step(*jax.lax.optimization_barrier(tuple(operands)))


def _refused(primals: Any, tangents: Any) -> Any:
    raise ValueError("`fastopt_step` cannot be differentiated")


def split_over(sharding: Any, shape: Sequence[int]) -> Axes:
    """The axes of a mesh over which an array is split in equal parts; none if it is
    whole on each device, or is to be."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return NONE
    names: list[Any] = []
    for size, entry in zip(shape, sharding.spec, strict=False):
        here = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        if size % math.prod(sharding.mesh.shape[name] for name in here):
            return NONE
        names += here
    return frozenset(names)
