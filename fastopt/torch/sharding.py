"""A warning where each process steps a share of the parameters, and sums are of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt.rule import Rule

# Modules of optimizers that give one share to the optimizer inside: what they are
# called, and whether a share has pieces of parameters.
WRAPPERS = {
    "torch.distributed.optim.zero_redundancy_optimizer": (
        "ZeroRedundancyOptimizer",
        False,
    ),
    "fairscale.optim.oss": ("fairscale's OSS", False),
    "deepspeed.runtime.zero.stage_1_and_2": ("DeepSpeed's ZeRO", True),
    "deepspeed.runtime.zero.stage3": ("DeepSpeed's ZeRO", True),
    "deepspeed.runtime.bf16_optimizer": ("DeepSpeed's BF16_Optimizer", True),
}


def wrapper(params: Iterable[Tensor]) -> tuple[str, bool] | None:
    """Return what has given these parameters to the caller, if it is one of these."""
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        return "FullyShardedDataParallel", True
    frame = sys._getframe(1)
    while frame is not None:
        there = WRAPPERS.get(frame.f_globals.get("__name__", ""))
        if there is not None:
            return there
        frame = frame.f_back  # type: ignore[assignment]
    return None


def warn(
    name: str,
    params: Iterable[Tensor],
    rules: Sequence[Rule],
    clip_norm: bool,
    nonfinite: str,
    group: Any = None,
) -> bool:
    """Warn if a step needs all parameters, which a ``group`` of processes may add up.
    Return whether a warning was given."""
    distributed = torch.distributed.is_available() and (
        torch.distributed.is_initialized()
    )
    measures = [rule.over for rule in rules if rule.measure is not None]
    asked = clip_norm or nonfinite != "propagate" or measures
    if not asked or not distributed or torch.distributed.get_world_size() == 1:
        return False
    by = wrapper(params)
    if by is None:
        return False
    called, pieces = by
    wrong = ["clip_norm"] if clip_norm and group is None else []
    if nonfinite != "propagate" and group is None:
        wrong.append(f"nonfinite={nonfinite!r}")
    if "all" in measures and group is None:
        wrong.append("the rule's sums over all parameters")
    if pieces and "segment" in measures:
        wrong.append("the rule's norm of each parameter")
    if not wrong:
        return False
    warnings.warn(
        f"{name} is given a share of the parameters by {called}: "
        f"{' and '.join(wrong)} would be of each process's share alone, and differ "
        f"between processes. Pass shard_group=True if the shares are of whole "
        f"parameters; or clip and check all gradients before the "
        f"step (such as with clip_grad_norm_), and use rules without such sums",
        stacklevel=4,
    )
    return True
