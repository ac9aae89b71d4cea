"""DTensors, which ``fully_shard`` makes of a model's parameters. Steps work on the
local tensors, which are this process's shards. The state is wrapped as the parameters
are, so torch's distributed checkpoints can save it, and divide it anew."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# For each dimension of a mesh along which a tensor is divided, the group of processes.
Axes = tuple[Any, ...]


def is_dtensor(tensor: Any) -> TypeIs[DTensor]:
    # As long as nobody has imported it, which takes half a second, there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def are_there(tensors: Iterable[Any]) -> bool:
    """Whether any of these is a DTensor."""
    return "torch.distributed.tensor" in sys.modules and any(map(is_dtensor, tensors))


def local(tensor: Any) -> Any:
    """Return this process's shard of a DTensor, and anything else as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def locals_of(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """Return a parameter's entry of the state with this process's shards."""
    entry = dict(entry)  # a signal handler may add to the state's
    for key, value in entry.items():
        if is_dtensor(value) and value.dim() and not fits(value, param):
            raise ValueError(
                f"{key!r} in the state of a DTensor has placements {value.placements}, "
                f"where the parameter has {getattr(param, 'placements', None)}; load "
                f"the state with torch.distributed.checkpoint, or redistribute() it"
            )
    return {key: local(value) for key, value in entry.items()}


def wrapped(tensor: Tensor, like: DTensor) -> DTensor:
    """Wrap a shard in a DTensor with the mesh, placements and shape of another one."""
    return type(like).from_local(
        tensor,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def on_shard(
    function: Callable[..., Tensor], param: Tensor, state: Mapping[str, Any], *more: Any
) -> Tensor:
    """Call a function with a parameter and its state, and return its result. For a
    DTensor, call it with this process's shards, and wrap the result."""
    if not is_dtensor(param):
        return function(param, state, *more)
    return wrapped(function(local(param), locals_of(state, param), *more), param)


def wrapped_entry(
    entry: Mapping[str, Any], like: Tensor, before: Any, buffers: Set[str]
) -> dict[str, Any]:
    """Return a parameter's entry of the state. If the parameter is a DTensor, wrap the
    buffers; those that ``before`` has wrapped already stay the same objects."""
    if not is_dtensor(like):
        return dict(entry)
    result = {}
    for key, value in entry.items():
        there = before.get(key) if before else None
        if there is not None and local(there) is value:
            result[key] = there
        else:
            result[key] = wrapped(value, like) if key in buffers else value
    return result


def alias(tensor: Tensor) -> Tensor:
    """Return a plain tensor without memory that shares a DTensor's version counter.
    Raising the counter through it takes half as long as through another DTensor."""
    from torch.utils._mode_utils import no_dispatch

    with no_dispatch():
        return tensor.detach()


def axes_of(param: Tensor) -> Axes:
    """Return the groups of processes that a DTensor is divided among. Groups of one
    process are left out. There are none if this process is not part of the mesh."""
    if not is_dtensor(param) or param.device_mesh.get_coordinate() is None:
        return ()
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(i)
        for i, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(i) > 1
    )


def fits(grad: Any, param: Tensor) -> bool:
    """Whether a gradient or a buffer has the mesh and placements of its parameter. It
    does unless both are DTensors."""
    if not is_dtensor(param) or not is_dtensor(grad) or grad._spec is param._spec:
        return True
    same = grad.placements == param.placements
    return bool(same and grad.device_mesh == param.device_mesh)


def local_gradient(grad: Any, param: Tensor) -> Any:
    """Return this process's shard of a gradient. A gradient with other placements than
    its parameter, such as partial sums, is redistributed first, by all processes."""
    if not is_dtensor(param):
        return grad
    if is_dtensor(grad):
        if grad.shape != param.shape:
            raise ValueError(
                f"a parameter has shape {tuple(param.shape)}, but its gradient has "
                f"{tuple(grad.shape)}, both over all processes"
            )
        if not fits(grad, param):
            grad = grad.redistribute(param.device_mesh, param.placements)
        grad = grad._local_tensor
    return waited(grad)


def waited(tensor: Any) -> Any:
    """Wait for an asynchronous collective, and return its result. Other tensors are
    returned as they are."""
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    if collectives and isinstance(tensor, collectives.AsyncCollectiveTensor):
        return tensor.wait()
    return tensor


def shards(grads: Sequence[Any], params: Sequence[Tensor]) -> list[Any]:
    """Return this process's shards of gradients, for planning. A gradient with other
    placements is redistributed only in the step; its parameter stands in for it."""
    return [
        waited(local(grad if fits(grad, param) else param))
        for grad, param in zip(grads, params, strict=True)
    ]


def first_number(param: Tensor) -> int:
    """Return the index of the first element of a shard in the whole parameter, if the
    elements of the shard follow one another there; otherwise 0."""
    if not is_dtensor(param) or param.device_mesh.get_coordinate() is None:
        return 0
    for placement in param.placements:
        if not (placement.is_replicate() or placement.is_shard(0)):
            return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return int(offsets[0]) * math.prod(param.shape[1:]) if offsets else 0
