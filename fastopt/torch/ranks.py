"""Sums over all processes that have shards of the parameters: those of norms, and those
that rules measure. All processes get the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastopt.memory.segments import Array
from fastopt.rule import Rule, shown
from fastopt.step import Sums, added, together
from fastopt.torch.dtensors import Axes, axes_of, is_dtensor

if TYPE_CHECKING:
    from fastopt.torch.part import Part

# What is added up: for a rule that measures each parameter, the parameter's place; for
# one that measures all together, its id and the axes of some of the parameters.
Place = int | tuple[int, Axes]


class Ranks:
    """The processes that parameters are divided among.

    A step exchanges numbers at most twice over each axis: for ``clip_norm`` or
    ``nonfinite``, and for rules with norms. Every process takes part, whether it has
    gradients or not.

    Parameters
    ----------
    own
        The axes of tensors that are not DTensors. A process may have none of them.
    params, rules
        All parameters, and the rule of each.
    all_rules
        The rules of all groups, which every process has in the same order.
    """

    def __init__(
        self,
        own: Axes,
        params: Sequence[Tensor],
        rules: Sequence[Rule],
        all_rules: Sequence[Rule],
    ):
        self.axes = [axes_of(p) if is_dtensor(p) else own for p in params]
        # A process may have no tensors of its own, but it knows of those of the others.
        self.kinds = list(dict.fromkeys([*([own] if own else []), *self.axes]))
        self.rows: dict[Place, tuple[Axes, int]] = {}  # with the number of terms
        self.together: dict[int, list[Place]] = {}  # the keys of rules over everything
        for rule in all_rules:
            if rule.measure is not None and not rule.by_segment:
                self.together[id(rule)] = [(id(rule), kind) for kind in self.kinds]
                for kind in self.kinds:
                    self.rows[id(rule), kind] = kind, rule.terms
        # A process has pieces of DTensors, and whole ones of other tensors.
        for place, (param, rule) in enumerate(zip(params, rules, strict=True)):
            if rule.by_segment and is_dtensor(param) and self.axes[place]:
                self.rows[place] = self.axes[place], rule.terms

    def norm_of(
        self, parts: Sequence[Part], squares: Sequence[Sequence[float]], nonfinite: int
    ) -> tuple[float, float]:
        """Return the sum of all squares, which are given for each run of each part, and
        how many are not finite: 0 only if it is 0 everywhere."""
        totals = dict.fromkeys(self.kinds, 0.0)
        for part, of_part in zip(parts, squares, strict=True):
            for place, square in zip(part.places.tolist(), of_part, strict=True):
                totals[self.axes[place]] += square
        rows = [(kind, (square, nonfinite)) for kind, square in totals.items()]
        sums = self._added(rows)
        return added(square for square, _ in sums), added(count for _, count in sums)

    def divide(self, part: Part) -> bool:
        """Whether a part measures parameters of which each process has a piece."""
        return any(place in self.rows for place in part.places.tolist())

    def measure(self, own: Mapping[Part, Sequence[Sums]]) -> dict[Part, list[Sums]]:
        """Return the sums over all processes, for each run of each part. ``own`` has
        the sums of this process."""
        sums: dict[Place, Sums] = {}
        for part, of_part in own.items():
            for place, one in zip(part.places.tolist(), of_part, strict=True):
                key = self._key(part.rule, place)
                sums[key] = together([sums[key], one]) if key in sums else one
        rows = []
        for key, (axes, terms) in self.rows.items():
            n, of = sums.get(key, (0, None))
            rows.append((axes, (n, *(of or (0.0,) * terms))))
        of_all = self._added(rows) if rows else []
        for key, (count, *numbers) in zip(self.rows, of_all, strict=True):
            sums[key] = (int(count), tuple(numbers)) if count else (0, None)
        joint = {
            rule: together([sums[key] for key in keys])
            for rule, keys in self.together.items()
        }
        return {
            part: [
                sums[place] if part.rule.by_segment else joint[id(part.rule)]
                for place in part.places.tolist()
            ]
            for part in own
        }

    def _key(self, rule: Rule, place: int) -> Place:
        return place if rule.by_segment else (id(rule), self.axes[place])

    def _added(self, rows: Sequence[tuple[Axes, Sequence[float]]]) -> list[list[float]]:
        """Add rows of numbers up over their axes, in the order of the processes."""
        lengths = [len(numbers) for _, numbers in rows]
        vector = np.array([*chain.from_iterable(row for _, row in rows)], np.float64)
        for group in dict.fromkeys(chain.from_iterable(axes for axes, _ in rows)):
            here = np.repeat([group in axes for axes, _ in rows], lengths)
            vector = np.where(here, total(vector, group), vector)
        ends = np.cumsum(lengths)[:-1]
        return [numbers.tolist() for numbers in np.split(vector, ends)]


def total(vector: Array, group: Any) -> Array:
    """Return the sum of a vector over a group of processes, added in rank order."""
    distributed = torch.distributed
    # NCCL alone has no memory of the CPU.
    device = "cuda" if distributed.get_backend(group) == "nccl" else "cpu"
    own = torch.from_numpy(vector.copy()).to(device)
    rows = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(rows, own, group=group)
    sums: Array = np.zeros_like(vector)
    for row in rows:
        sums += row.cpu().numpy()
    return sums


def check_group(group: Any) -> Any:
    """Check the argument ``shard_group``, and return it."""
    distributed = torch.distributed
    if group is None or group is True:
        return group
    if not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise TypeError(
            f"shard_group must be True, which means all processes, or a group of "
            f"torch.distributed that this process belongs to, got {shown(group)}"
        )
    return group


def refuse_group_in(param_group: Mapping[str, Any]) -> None:
    """Refuse a group of processes in the options of parameters, which are saved with
    the state: ZeroRedundancyOptimizer puts all arguments of the class there."""
    if "shard_group" in param_group and param_group["shard_group"] not in (None, True):
        raise TypeError(
            "shard_group would be saved with the options of the parameters, and a "
            "group of torch.distributed cannot be; pass shard_group=True, which means "
            "all processes, or functools.partial(fastopt.torch.AdamW, "
            "shard_group=group) as the class"
        )


def ranks_of(
    group: Any,
    params: Sequence[Tensor],
    rules: Sequence[Rule],
    all_rules: Sequence[Rule],
) -> Ranks | None:
    """Return the processes that parameters are divided among: those of their meshes,
    and a group for tensors that are not DTensors. None if there is one process."""
    if group is not None and params and all(map(is_dtensor, params)):
        raise ValueError(
            "shard_group is for plain tensors, but all parameters are DTensors, which "
            "know their processes; leave shard_group out"
        )
    if group is True:
        group = torch.distributed.group.WORLD
    alone = group is None or torch.distributed.get_world_size(group) == 1
    ranks = Ranks(() if alone else (group,), params, rules, all_rules)
    return ranks if any(ranks.kinds) else None
