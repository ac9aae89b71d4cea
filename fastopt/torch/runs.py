"""Runs: parameters that follow one another in memory, stepped as one segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastopt.memory.segments import Array
from fastopt.rule import Rule
from fastopt.torch.memory import same_layout
from fastopt.torch.state import Member, in_one_piece


def neighbours(
    rule: Rule, members: Sequence[Member], vectors: Sequence[Array]
) -> list[list[int]]:
    """Find runs of members whose parameters follow one another in memory, and whose
    gradients do, as ``flatten_`` puts them. ``vectors`` hold their steps and carry."""
    return joined([placement(rule, m, i, vectors) for i, m in enumerate(members)])


def merged(
    rule: Rule, members: Sequence[Member], vectors: Sequence[Array], keys: Sequence[str]
) -> list[list[int]]:
    """Find those whose state, under these keys, follows on as well."""
    placements = []
    for i, member in enumerate(members):
        place = placement(rule, member, i, vectors)
        if place is not None:
            common, tensors = place
            place = common, [*tensors, *(member.state[key] for key in keys)]
        placements.append(place)
    return joined(placements)


def placement(
    rule: Rule, member: Member, i: int, vectors: Sequence[Array]
) -> tuple[Any, list[Tensor]] | None:
    """What a member must have in common with its neighbours, and which tensors must
    follow theirs; None if the member is a segment by itself."""
    param, grad = member.param, member.param.grad
    by_itself = member.alone or (rule.measure is not None and rule.by_segment)
    if by_itself or grad is None or not (member.plain and param.is_cpu):
        return None
    if not same_layout(grad, param):
        return None
    common = (
        member.group,
        *(vector[i] for vector in vectors),
        # Tensors may follow one another by chance, but not for long.
        param.untyped_storage().data_ptr(),
        grad.untyped_storage().data_ptr(),
    )
    return common, [param, grad]


def joined(placements: Sequence[Any]) -> list[list[int]]:
    """Join neighbours into runs."""
    runs: list[list[int]] = []
    before: Any = None
    for i, after in enumerate(placements):
        joins = before and after and before[0] == after[0]
        if joins and all(map(in_one_piece, zip(before[1], after[1], strict=True))):
            runs[-1].append(i)
        else:
            runs.append([i])
        before = after
    return runs
