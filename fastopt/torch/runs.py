"""Parameters that are stepped together: those that follow one another in memory as one
segment, and those that share memory one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

from torch import Tensor

from fastopt.memory.segments import Array
from fastopt.optimizer.formats import PARAM
from fastopt.rule import Rule
from fastopt.torch import memory
from fastopt.torch.memory import same_layout
from fastopt.torch.state import Kind, Member, in_one_piece


def find_runs(
    kind: Kind, vectors: Sequence[Array], keys: Sequence[str] = ()
) -> list[list[int]]:
    """Find runs of members whose parameters follow one another in memory, as
    ``flatten_`` puts them, and whose gradients do, and their state under these keys.
    ``vectors`` hold their steps and carry."""
    joined: list[list[int]] = []
    placed = cache(lambda i: placement(kind, i, vectors))
    end = None  # of the parameter before
    for i, member in enumerate(kind.members):
        begin, size = member.param.data_ptr(), member.param.nbytes
        if begin == end and follows(kind, i, placed, keys):
            joined[-1].append(i)
        else:
            joined.append([i])
        end = begin + size
    return joined


def follows(
    kind: Kind, i: int, placed: Callable[[int], Any], keys: Sequence[str]
) -> bool:
    """Whether a member whose parameter follows the one before it in memory can be
    stepped with it as one segment. ``placed`` returns the placement of a member."""
    before, after = placed(i - 1), placed(i)
    if before is None or after is None or before[0] != after[0]:
        return False
    pairs = list(zip(before[1], after[1], strict=True))
    states = [kind.members[k].state for k in (i - 1, i)]
    pairs += [(states[0][key], states[1][key]) for key in keys]
    return all(map(in_one_piece, pairs))


def placement(
    kind: Kind, i: int, vectors: Sequence[Array]
) -> tuple[Any, list[Tensor]] | None:
    """Return what a member must have in common with its neighbours, and which tensors
    must follow theirs; None if the member is a segment by itself."""
    member = kind.members[i]
    param, grad = member.param, member.param.grad
    if member.alone or kind.rule.by_segment or grad is None:
        return None
    if any(format.scale is not None for format in member.chosen.values()):
        return None  # groups begin with its first element
    if memory.on_gpu(param) or not (member.plain and same_layout(grad, param)):
        return None
    first = 0
    if any(format.stochastic for format in member.chosen.values()):
        # Its elements must follow one another in the optimizer as well, because their
        # numbers there choose the random words.
        first = member.first - param.data_ptr() // param.element_size()
    common = (
        member.group,
        tuple(member.chosen.items()),
        first,
        *(vector[i] for vector in vectors),
        # Tensors may follow one another by chance, but not for long.
        param.untyped_storage().data_ptr(),
        grad.untyped_storage().data_ptr(),
    )
    if member.copy is None:
        return common, [param, grad]
    return (*common, member.copy.untyped_storage().data_ptr()), [
        *(param, grad, member.copy)
    ]


def stepped_together(
    members: list[Member], rule: Rule
) -> Iterator[tuple[int, list[Member]]]:
    """Yield the number of a wave, and the members that one native step updates.

    ``members`` are on one device, and have one rule and one dtype to compute in. If
    some share memory, they are in different waves, which are done one after another. A
    GPU updates a wave in one launch; the CPU's kernels are each for one way to store
    parameters. The order is the same on both, so that norms have the same bits.
    """
    first = members[0]
    at_once = memory.on_gpu(first.param) and first.plain and not rule.factored
    ordered = list(chain.from_iterable(by_storage(members)))
    for wave, apart in enumerate(in_turn(ordered)):
        for together in [apart] if at_once else by_storage(apart):
            yield wave, together


def by_storage(members: list[Member]) -> list[list[Member]]:
    """Return lists of members that are stored alike."""
    alike: dict[Any, list[Member]] = {}
    for member in members:
        storage = member.param.dtype, member.chosen.get(PARAM)
        alike.setdefault(storage, []).append(member)
    return list(alike.values())


def in_turn(members: list[Member]) -> list[list[Member]]:
    """Return lists of members that do not share memory within a list. Members that
    share memory are in lists that follow one another."""

    def span(member: Member) -> tuple[int, int]:
        param = member.param
        size = 1 + sum(
            (n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True)
        )
        begin = param.data_ptr()
        return begin, begin + (size * param.element_size() if param.numel() else 0)

    spans = list(map(span, members))
    placed = sorted((begin, end) for begin, end in spans if begin < end)
    if all(a[1] <= b[0] for a, b in zip(placed, placed[1:], strict=False)):
        return [members]
    waves: list[tuple[list[Member], list[tuple[int, int]]]] = []
    for member, (begin, end) in zip(members, spans, strict=True):
        for wave, taken in waves:  # noqa: B007
            if all(end <= first or last <= begin for first, last in taken):
                break
        else:
            wave, taken = [], []
            waves.append((wave, taken))
        wave.append(member)
        taken.append((begin, end))
    return [wave for wave, _ in waves]
