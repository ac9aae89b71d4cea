"""Whether a plan covers a parameter: whether there are kernels for it, for its gradient
and for its state."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastopt import backends
from fastopt.memory.order import GROUP
from fastopt.optimizer.formats import Chosen
from fastopt.rule import Rule
from fastopt.torch.memory import COMPUTED, Unsupported, check_gradient, check_memory
from fastopt.torch.state import Names, has_begun, shapes_of


def is_planned(
    param: Tensor,
    grad: Tensor | None,
    names: Names,
    rule: Rule,
    entry: Any,
    keeps: bool,
    simple: int,
) -> bool:
    """Whether a plan covers a parameter's gradient. A parameter without one may have a
    kind or a state that no step could be done with."""
    if grad is None and keeps and not has_begun(entry, rule, names):
        return False
    if simple and not entry:
        return True
    try:
        check(param, grad, names, rule, entry or {})
    except (Unsupported, ValueError):
        if grad is not None:
            raise
        return False
    return True


def check(
    param: Tensor,
    grad: Tensor | None,
    names: Names,
    rule: Rule,
    entry: dict[str, Any],
) -> None:
    """Check that fastopt has kernels for a parameter, its gradient and its state."""
    if is_lazy(param):
        raise Unsupported("uninitialized parameters")
    if names.real and param.is_complex():
        raise Unsupported("complex parameters")
    if param.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"parameters on {param.device}")
    check_memory("parameters", param)
    if param.dtype not in COMPUTED:
        raise Unsupported(f"parameters of {param.dtype}")
    sizes = zip(param.shape, param.stride(), strict=True)
    if param.numel() and any(step == 0 < size - 1 for size, step in sizes):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is expanded: several of its "
            f"elements are one number in memory; give it a clone() as its data"
        )
    if grad is not None:
        check_gradient(param, grad)
    shapes = shapes_of(rule, names, param)
    for key, tensor in entry.items():
        if not isinstance(tensor, Tensor):
            continue
        check_memory("tensors of the state", tensor)
        shape = shapes.get(key, tensor.shape)
        if tensor.shape != shape and (shape or tensor.numel() != 1):
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} needs {key!r} of shape "
                f"{tuple(shape)} in its state, where it has {tuple(tensor.shape)}; cut "
                f"or pad the state as the parameter, or delete it"
            )


def check_shards(param: Tensor, rule: Rule, chosen: Chosen) -> None:
    """Check that steps can work on the shards of a DTensor."""
    if any(placement.is_partial() for placement in param.placements):
        raise Unsupported("DTensors that are partial sums, which are not reduced yet")
    if rule.factored:
        raise ValueError(
            f"{rule.name} averages rows and columns of whole matrices, of which a "
            f"DTensor has a shard here; use a rule such as AdamW, or formats='bf16' to "
            f"save memory"
        )
    for name, format in chosen.items():
        if format.scale is not None:
            raise ValueError(
                f"{name!r} of a DTensor cannot have 8 bits, because shards would cut "
                f"its groups of {GROUP} numbers; use 'bf16'"
            )


modes: Any = torch._C
count_modes = modes._len_torch_dispatch_stack


def in_fake_mode() -> bool:
    """Whether torch is to make FakeTensors now."""
    if not count_modes():
        return False
    mode = modes._get_dispatch_mode(modes._TorchDispatchModeKey.FAKE)
    return bool(mode is not None)


def module_for(backend: str | None, rule: Rule, on_gpu: bool) -> ModuleType:
    """Return the backend that updates parameters. The one asked for applies to CPU
    tensors."""
    asked = None if on_gpu else backend
    return backends.load(asked or backends.choose(rule, on_gpu))
