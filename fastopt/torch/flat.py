"""Parameters and gradients side by side in memory, for the fastest steps there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt.flat import zeroed


class Flat(NamedTuple):
    """All parameters of one dtype and device, as one tensor, and their gradients."""

    data: Tensor
    grad: Tensor


def flatten_(model: torch.nn.Module | Iterable[Tensor]) -> list[Flat]:
    """Move the parameters of a model, or these, and their gradients, into one buffer
    each for every dtype and device. The optimizer's ``zero_grad`` keeps them there.

    Example
    -------
    >>> import torch, fastopt.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> (flat,) = fastopt.torch.flatten_(model)
    >>> flat.data.shape, model.weight.grad.shape
    (torch.Size([8]), torch.Size([2, 3]))
    """
    params = model.parameters() if isinstance(model, torch.nn.Module) else model
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in dict.fromkeys(params):
        kinds.setdefault((param.dtype, param.device), []).append(param)
    with torch.no_grad():
        return [flattened(alike) for alike in kinds.values()]


def flattened(params: list[Tensor]) -> Flat:
    sizes = [param.numel() for param in params]
    flat = Flat(*(room(sum(sizes), params[0], offset) for offset in (0, 512)))
    flat.grad.flattened_by_fastopt = True
    for param, data, grad in zip(
        params, flat.data.split(sizes), flat.grad.split(sizes), strict=True
    ):
        data, grad = data.view(param.shape), grad.view(param.shape)
        data.copy_(param)
        if param.grad is not None:
            grad.copy_(param.grad)
        param.data, param.grad = data, grad
    return flat


def room(count: int, like: Tensor, offset: int) -> Tensor:
    if not like.is_cpu:
        return torch.zeros(count, dtype=like.dtype, device=like.device)
    memory = zeroed(offset + count * like.element_size())[offset:]
    return torch.from_numpy(memory).view(like.dtype)
