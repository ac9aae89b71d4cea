"""Parameters and gradients side by side in memory, for the fastest steps there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt.memory.arena import STAGGER, zeroed
from fastopt.optimizer.refusals import named
from fastopt.runtime.atomic import Call, uninterrupted
from fastopt.torch.memory import is_hollow

FLAT = "flattened_by_fastopt"  # an attribute of the buffers of gradients
flattened_any = [False]  # whether this process has flattened parameters


class Flat(NamedTuple):
    """All parameters of one dtype and device as one tensor, and all their gradients.

    Attributes
    ----------
    data, grad
        Tensors of one dimension, which the parameters and gradients are views of.

    Examples
    --------
    >>> import torch, fastopt.torch
    >>> (flat,) = fastopt.torch.flatten_(torch.nn.Linear(3, 2))
    >>> flat.data.numel(), flat.grad.numel()
    (8, 8)
    """

    data: Tensor
    grad: Tensor


def flatten_(model: torch.nn.Module | Iterable[Tensor]) -> list[Flat]:
    """Move the parameters of a model into one buffer, and their gradients into another.

    An optimizer made afterwards updates each buffer as if it was one parameter; its
    state and its groups stay those of the parameters. Groups should have parameters
    that follow one another, or there are as many stretches as there are changes.

    Parameters
    ----------
    model
        A module, or parameters. Those that require no gradient are left alone. They
        stay the same objects, whose ``data`` and ``grad`` are views from now on.

    Returns
    -------
    The buffers, for each dtype and device; reducing their ``grad``, say, is one call.

    Raises
    ------
    ValueError
        For a sparse gradient, or a tensor without memory of its own, as a DTensor,
        before anything is moved.

    Notes
    -----
    Gradients stay in the buffer as long as they are set to zero and not to None: by the
    ``zero_grad()`` of an optimizer of ``fastopt.torch``, not by that of the model. If
    they leave it, steps are right, but as fast as without. A parameter that had no part
    in a loss has a gradient of zeros, where it had None before, so that weight decay
    and momentum go on. Parameters that share memory without being one object no longer
    do; and their elements lie row by row, not as ``channels_last``.

    ``safetensors.torch.save_model`` refuses parameters that share a buffer, and
    ``torch.save`` of one layer writes all of it: call :func:`unflatten_` before. A
    ``torch.save`` of the whole ``state_dict()`` writes the buffer once.

    Examples
    --------
    >>> import torch, fastopt.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    >>> (flat,) = fastopt.torch.flatten_(model)
    >>> flat.data.shape
    torch.Size([11])
    >>> opt = fastopt.torch.AdamW(model.parameters(), lr=0.1)
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in parameters(model):
        if param.requires_grad:
            kinds.setdefault((param.dtype, param.device), []).append(param)
    for param in itertools.chain.from_iterable(kinds.values()):
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise ValueError(
                f"a gradient of shape {tuple(param.shape)} is sparse and cannot lie in "
                f"a buffer; nothing was moved"
            )
        for tensor in (param, param.grad):
            if tensor is not None and is_hollow(tensor):
                raise ValueError(
                    f"a {type(tensor).__name__} of shape {tuple(param.shape)} has no "
                    f"memory of its own and cannot lie in a buffer; nothing was moved"
                )
    with torch.no_grad():
        buffers = [flattened(alike) for alike in kinds.values()]
        uninterrupted(*[move for _, moves in buffers for move in moves])
    return [flat for flat, _ in buffers]


def unflatten_(model: torch.nn.Module | Iterable[Tensor]) -> None:
    """Undo :func:`flatten_`: give each parameter memory of its own, and its gradient.

    Optimizers go on with the same bits, and as fast as before ``flatten_``.

    Parameters
    ----------
    model
        A module, or parameters. They stay the same objects. Those that lie in a larger
        buffer, and gradients in one of ``flatten_``, are copied out of it; all others
        are left alone.

    Examples
    --------
    >>> import torch, fastopt.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> _ = fastopt.torch.flatten_(model)
    >>> model.bias.untyped_storage().nbytes()
    32
    >>> fastopt.torch.unflatten_(model)
    >>> model.bias.untyped_storage().nbytes()
    8
    """
    moves: list[Call] = []
    for param in parameters(model):
        if param.grad is not None and in_flat_buffer(param.grad):
            moves.append(partial(setattr, param, "grad", param.grad.clone()))
        if param.layout is torch.strided:
            own = param.numel() * param.element_size()
            if param.untyped_storage().nbytes() > own:
                moves.append(partial(setattr, param, "data", param.data.clone()))
    uninterrupted(*moves)


def parameters(model: torch.nn.Module | Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters of a module, or of a list, without duplicates."""
    if isinstance(model, torch.nn.Module):
        return list(dict.fromkeys(model.parameters()))
    wanted = "model must be a torch.nn.Module, or a list of parameters"
    if isinstance(model, Tensor) or not isinstance(model, Iterable):
        advice = "pass [param]" if isinstance(model, Tensor) else "pass the model"
        raise TypeError(f"{wanted}, got {named(model)}; {advice}")
    params = list(model)
    for param in params:
        if not isinstance(param, Tensor):
            raise TypeError(f"{wanted}, got one with {named(param)} in it")
    return list(dict.fromkeys(params))


def flattened(params: list[Tensor]) -> tuple[Flat, list[Call]]:
    """One dtype and device: the buffers, filled, and what moves parameters there."""
    sizes = [param.numel() for param in params]
    # Buffers that are equal modulo 4096 make a load wait for an unrelated store.
    flat = Flat(*(zeros(sum(sizes), params[0], at) for at in (0, STAGGER // 2)))
    setattr(flat.grad, FLAT, True)
    flattened_any[0] = True
    datas, grads, moves = flat.data.split(sizes), flat.grad.split(sizes), list[Call]()
    for param, data, grad in zip(params, datas, grads, strict=True):
        data, grad = data.view(param.shape), grad.view(param.shape)
        data.copy_(param)
        if param.grad is not None:
            grad.copy_(param.grad)
        moves += [
            partial(setattr, param, "data", data),
            partial(setattr, param, "grad", grad),
        ]
    return flat, moves


def in_flat_buffer(grad: Tensor) -> bool:
    """Whether a gradient lies where ``flatten_`` has put it. It may have gone with its
    parameter, as by ``model.double()``, and be the same object."""
    base = grad._base
    if base is None or not hasattr(base, FLAT):
        return False
    offset = grad.data_ptr() - base.data_ptr()
    return bool(0 <= offset < base.numel() * base.element_size() or not grad.numel())


def zeros(count: int, like: Tensor, offset: int) -> Tensor:
    """Zeros of a parameter's dtype and device, some bytes into huge pages."""
    if not like.is_cpu:
        return torch.zeros(count, dtype=like.dtype, device=like.device)
    memory = zeroed(offset + count * like.element_size())[offset:]
    return torch.from_numpy(memory).view(like.dtype)
