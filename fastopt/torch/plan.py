"""What a step does, worked out once, and kept for as long as all is where it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastopt import backends
from fastopt.bound import shrinking
from fastopt.numpy_ref import Extras
from fastopt.rule import Rule
from fastopt.torch.memory import COMPUTED, is_plain, watched
from fastopt.torch.part import Part, Sums
from fastopt.torch.state import Member, Names, Values


class Unsupported(Exception):
    """What fastopt has no kernels for."""


class Asked(NamedTuple):
    """What a step is to do beside the update."""

    clip_norm: float = math.inf
    clip_value: float = math.inf
    nonfinite: str = "propagate"
    zero_grads: bool = False
    weight: float = 0.0  # of new parameters in their average


class Plan:
    """How to update the parameters of some groups, all of an optimizer's or only one.

    Parameters
    ----------
    lists, rules, values
        Of each group the parameters, the rule and the values of its hyperparameters.
    state
        The optimizer's, in which the plan makes what is missing.
    """

    def __init__(
        self,
        lists: list[list[Tensor]],
        rules: list[Rule],
        values: Sequence[Values],
        names: Names,
        state: dict[Any, Any],
        averaged: bool,
        backend: str | None,
    ):
        self.rules, self.averaged = rules, averaged
        self.sizes = list(map(len, lists))
        params = [param for of_group in lists for param in of_group]
        groups = [i for i, size in enumerate(self.sizes) for _ in range(size)]
        together: dict[Any, list[Member]] = {}
        planned = []
        for place, (param, group) in enumerate(zip(params, groups, strict=True)):
            rule = rules[group]
            keeps = bool(rule.state or rule.carry or names.steps or averaged)
            there = param.grad is not None or bool(state.get(param))
            planned.append(there or not keeps)
            if not planned[-1]:
                continue
            check(param, rule)
            plain = is_plain(param, rule.factored)
            entry = state[param] if keeps else {}
            member = Member(param, place, group, entry, plain)
            key = id(rule), param.dtype, param.device, plain
            together.setdefault(key, []).append(member)
        with torch.no_grad():
            self.parts = [
                Part(
                    rules[apart[0].group],
                    module_for(rules[apart[0].group], backend, apart[0].param),
                    names,
                    apart,
                    values,
                    averaged,
                )
                for members in together.values()
                for apart in in_turn(members)
            ]
        self._params: list[Tensor] = params
        self._odd: list[Tensor] = []  # gradients that are not in memory as they should
        self._plain = {
            member.place
            for part in self.parts
            for member in part.members
            if member.plain
        }
        merged = any(part.merged for part in self.parts)
        buffers = [tensor for part in self.parts for tensor in part.buffers]
        self.tensors = watched(params, planned, state, buffers, merged)
        self.merged, self._expected = merged, None
        # Plain tensors, with the parameters' counts of versions.
        self._aliases = {
            member.place: member.param.detach()
            for part in self.parts
            for member in part.members
        }
        self._all_aliases = list(self._aliases.values())

    def look(
        self, lists: list[list[Tensor]], rules: list[Rule], state: Any, averaged: bool
    ) -> list[Any] | None:
        """The gradients, if the plan still holds, else None."""
        if rules != self.rules or averaged != self.averaged:
            return None
        if list(map(len, lists)) != self.sizes:
            return None
        grads: list[Any] | None = self.tensors.look(lists, state)
        if grads is None or not self.merged:
            return grads
        if self._expected is None:
            self._expected = self.tensors.found.copy()
        elif self.tensors.moved and (self.tensors.found != self._expected).any():
            return None
        return grads

    def take(self, grads: list[Any]) -> list[Part]:
        """Give gradients to the parts; those that have some."""
        tensors = self.tensors
        self._odd = []
        for place in tensors.odd or ():
            grad, param = grads[place], self._params[place]
            if grad.layout is not torch.strided:
                raise Unsupported("sparse gradients")
            self._odd.append(grad)
            if place in self._plain:
                fitted = torch.empty_like(param, requires_grad=False)
                grads[place] = fitted.copy_(grad.detach())
                tensors.found[place] = fitted.data_ptr()
        found, moved = tensors.found, tensors.moved
        return [part for part in self.parts if part.take(grads, found, moved)]

    def do(
        self,
        parts: list[Part],
        values: Sequence[Values],
        factors: list[float],
        threads: int,
        asked: Asked | None,
    ) -> tuple[float, bool]:
        """The step, with what was taken: the norm of the gradients, if it was asked
        for, and whether anything was updated."""
        norm, extras, limit = math.nan, None, math.inf
        if asked is not None:
            limit = asked.clip_value
            extras = Extras(limit, asked.weight, asked.zero_grads)
            if asked.clip_norm < math.inf or asked.nonfinite != "propagate":
                found = [part.norm(abs(factors[0]), threads) for part in parts]
                norm = math.sqrt(sum(squares for squares, _ in found))
                if asked.nonfinite != "propagate" and not all(ok for _, ok in found):
                    if asked.nonfinite == "raise":
                        raise FloatingPointError(
                            "not all is finite in the gradients; nothing was updated"
                        )
                    return norm, False
                shrink = shrinking(norm, asked.clip_norm)
                factors = [factor * shrink for factor in factors]
        for part in parts:
            part.prepare(values, factors)
        totals: dict[int, Sums] = {}
        for part in parts:
            for more in part.sums(threads, limit) if part.over_all else ():
                before = totals.get(id(part.rule), (0, None))
                totals[id(part.rule)] = together(before, more)
        for part in parts:
            part.update(threads, extras, totals.get(id(part.rule)))
        if asked is not None and asked.zero_grads:
            self._zero_what_was_copied(parts)
        return norm, True

    def _zero_what_was_copied(self, parts: list[Part]) -> None:
        grads = list(self._odd)
        for part in parts:
            if not part.plain:
                grads += [member.param.grad for member in part.members]
        for grad in grads:
            if grad is not None:
                grad.zero_()

    def end(self, parts: list[Part]) -> None:
        """After a step: put back copies, and tell autograd what has changed."""
        if len(parts) == len(self.parts) and all([part.all for part in parts]):
            increment_version(self._all_aliases)
        else:
            changed = [
                self._aliases[part.members[i].place]
                for part in parts
                for run, active in zip(part.runs, part.active, strict=True)
                if active
                for i in run
            ]
            increment_version(changed)
        for part in parts:
            part.end()


def check(param: Tensor, rule: Rule) -> None:
    """That fastopt has kernels for a parameter."""
    if rule.factored and param.is_complex():
        raise Unsupported("complex parameters")
    if param.layout is not torch.strided:
        raise Unsupported("sparse parameters")
    if param.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"parameters on {param.device}")
    if param.dtype not in COMPUTED:
        raise Unsupported(f"parameters of {param.dtype}")


def module_for(rule: Rule, backend: str | None, param: Tensor) -> ModuleType:
    """The backend that updates a parameter."""
    on_device = param.device.type != "cpu"
    if on_device != (backend == "cuda"):
        backend = None
    return backends.load(backend or backends.choose(rule, on_device))


def in_turn(members: list[Member]) -> list[list[Member]]:
    """Members that do not share memory, and then those that do, one after another."""

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


def together(first: Sums, second: Sums) -> Sums:
    """The sums over both."""
    if first[1] is None or second[1] is None:
        return first if second[1] is None else second
    added = tuple(a + b for a, b in zip(first[1], second[1], strict=True))
    return first[0] + second[0], added
