"""What a step changes besides parameters and their state: the calls that do it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor

from fastopt.step import Request
from fastopt.torch import dtensors
from fastopt.torch.state import Member
from fastopt.torch.turns import Call


def noting(
    optimizer: dict[str, Any], norm: float, finite: bool, request: Request
) -> list[Call]:
    """Return the calls that note in an optimizer what a look at its gradients has
    shown. Raises FloatingPointError if that is asked for."""
    calls: list[Call] = [partial(optimizer.update, grad_norm=norm)]
    if not finite and request.nonfinite == "raise":
        raise FloatingPointError(
            "infinity or NaN in the gradients; nothing was updated"
        )
    if not finite and request.nonfinite == "skip":
        calls.append(partial(optimizer.update, skipped=optimizer["skipped"] + 1))
    return calls


def zeroing(grads: Iterable[Tensor | None]) -> list[Call]:
    """Return the calls that set gradients to zero."""
    there = [grad for grad in grads if grad is not None]
    return [(g.detach() if g.requires_grad else g).zero_ for g in there]


def aliases_of(member: Member) -> list[Tensor]:
    """Return plain tensors that share a parameter's count of versions: that of a shard,
    and that of the DTensor that it belongs to."""
    if member.owner is member.param:
        return [member.param.detach()]
    return [member.param.detach(), dtensors.alias(member.owner)]
