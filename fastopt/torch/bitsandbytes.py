"""State that bitsandbytes' 8-bit optimizers have saved, for ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastopt.torch.step import Stepping

NESTED = "__bnb_optimizer_quant_state__"  # where its later versions put tensors
BLOCKS = 256, 2048  # elements that share a scale; 2048 before its version 0.44
SHARED = "lr", "betas", "eps", "weight_decay"


def from_bitsandbytes(
    state_dict: Mapping[str, Any], optimizer: Stepping
) -> dict[str, Any]:
    """Return a ``state_dict`` for an optimizer of ours, made of what one of
    bitsandbytes has saved.

    Parameters
    ----------
    state_dict
        What ``Adam8bit``, ``AdamW8bit``, ``LAMB8bit``, ``Lion8bit``, ``RMSprop8bit``
        or their 32-bit counterparts returned from ``state_dict()``.
    optimizer
        Ours of the same kind, over as many parameters in the same order. Its
        ``load_state_dict`` takes the result, and converts it to its own formats.

    Returns
    -------
    dict
        State of float32. lr, betas, eps and weight decay are those that were saved.

    Raises
    ------
    ValueError
        If the state has another number of parameters or buffers.

    Examples
    --------
    >>> import torch, fastopt.torch
    >>> w = torch.nn.Parameter(torch.ones(4))
    >>> opt = fastopt.torch.AdamW([w])
    >>> entry = {"step": 3, "state1": torch.ones(4), "state2": torch.ones(4)}
    >>> saved = {"state": {0: entry}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    >>> opt.load_state_dict(fastopt.torch.from_bitsandbytes(saved, opt))
    >>> opt.state[w]["exp_avg"]
    tensor([1., 1., 1., 1.])
    """
    if not isinstance(optimizer, Stepping) or not isinstance(state_dict, Mapping):
        raise TypeError(
            f"from_bitsandbytes takes a state_dict and an optimizer of fastopt.torch, "
            f"got {type(state_dict).__name__} and {type(optimizer).__name__}"
        )
    ours = optimizer.state_dict()
    theirs, own = state_dict["param_groups"], ours["param_groups"]
    counts = [[len(group["params"]) for group in of] for of in (theirs, own)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the state has groups of {counts[0]} parameters, but this optimizer of "
            f"{counts[1]}"
        )
    groups = [
        {
            **mine,
            **{name: group[name] for name in SHARED if name in group and name in mine},
        }
        for mine, group in zip(own, theirs, strict=True)
    ]
    keys: dict[Any, list[str]] = {}
    indices: dict[Any, Any] = {}
    for group, mine, live in zip(theirs, own, optimizer.param_groups, strict=True):
        names = list(map(optimizer._names.key, optimizer._rule(live).state))
        keys |= dict.fromkeys(group["params"], names)
        indices |= dict(zip(group["params"], mine["params"], strict=True))
    state = {}
    for index, entry in state_dict["state"].items():
        flat = {**entry, **entry.get(NESTED, {})}
        if index not in keys:
            raise ValueError(f"the state is of parameter {index}, which no group has")
        there = [name for name in ("state1", "state2") if name in flat]
        if len(there) != len(keys[index]):
            raise ValueError(
                f"the state of parameter {index} has {len(there)} buffers, but "
                f"{type(optimizer).__name__} keeps {', '.join(keys[index]) or 'none'}"
            )
        converted: dict[str, Any] = {
            key: numbers(flat, name)
            for key, name in zip(keys[index], there, strict=True)
        }
        if optimizer._names.steps is not None:
            converted[optimizer._names.steps] = torch.tensor(float(flat["step"]))
        state[indices[index]] = converted
    return {**ours, "state": state, "param_groups": groups}


def numbers(state: Mapping[str, Any], name: str) -> Tensor:
    """Return a buffer as float32: each code stands for a number of a map, which is
    multiplied by the greatest magnitude of its block."""
    stored: Tensor = state[name]
    if stored.dtype is not torch.uint8:
        return stored.float()
    number = name[-1]
    lacking = [k for k in (f"absmax{number}", f"qmap{number}") if k not in state]
    if lacking:
        raise ValueError(f"{name} has codes, but the state has no {lacking[0]}")
    scales, values = state[f"absmax{number}"].float(), state[f"qmap{number}"].float()
    count = stored.numel()
    block = next((b for b in BLOCKS if -(-count // b) == scales.numel()), None)
    if block is None:
        raise ValueError(
            f"{name} has {count} codes and {scales.numel()} scales, which are not "
            f"blocks of {' or '.join(map(str, BLOCKS))}"
        )
    flat = values[stored.reshape(-1).long()]
    return (flat * scales.repeat_interleave(block)[:count]).view(stored.shape)
