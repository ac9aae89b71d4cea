"""What a step does, worked out once, and kept for as long as all is where it was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
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

USUAL, ALL = attrgetter("usual"), attrgetter("all")


class Unsupported(Exception):
    """What fastopt has no kernels for."""


# Of each group the rule, its hyperparameters, and the sign of its gradients.
Read = tuple[list[Rule], Sequence[Values], list[float]]


class Asked(NamedTuple):
    """What a step is to do beside the update."""

    clip_norm: float = math.inf
    clip_value: float = math.inf
    nonfinite: str = "propagate"
    zero_grads: bool = False
    weight: float = 0.0  # of new parameters in their average


class Plan:
    """How to update the parameters of some groups: all of them, or a ``single`` one.

    Parameters
    ----------
    names
        What the state calls things.
    groups, state
        The optimizer's; in the state, what is missing is made.
    read
        Of each group the rule, its hyperparameters, and the sign of its gradients.
    averaged
        Whether a moving average of the parameters is kept.
    """

    def __init__(
        self,
        names: Names,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        read: Read,
        averaged: bool,
        backend: str | None,
        single: Tensor | None = None,
    ):
        self.rules, self.values, self.signs = read
        self.averaged = averaged
        pairs = [(p, i) for i, group in enumerate(groups) for p in group["params"]]
        if single is not None:
            pairs = [(single, 0)]
        self._params = [param for param, _ in pairs]
        keeps = [
            bool(rule.state or rule.carry or names.steps or averaged)
            for rule in self.rules
        ]
        planned = [
            param.grad is not None or bool(state.get(param)) or not keeps[group]
            for param, group in pairs
        ]
        for param, there in zip(self._params, planned, strict=True):
            if there:  # all of them, before anything is put into the state
                check(param, names)
        alike: dict[Any, list[Member]] = {}
        for place, (param, group) in enumerate(pairs):
            if not planned[place]:
                continue
            rule = self.rules[group]
            plain = is_plain(param, rule.factored)
            entry = state[param] if keeps[group] else {}
            member = Member(param, place, group, entry, plain)
            key = id(rule), param.dtype, param.device, plain
            alike.setdefault(key, []).append(member)
        with torch.no_grad():
            self.parts = []
            for members in alike.values():
                for apart in in_turn(members):
                    rule = self.rules[apart[0].group]
                    module = module_for(rule, backend, apart[0].param)
                    part = Part(rule, module, names, apart, self.values, averaged)
                    self.parts.append(part)
        members = [member for part in self.parts for member in part.members]
        self._plain = {member.place for member in members if member.plain}
        self._merged = any(part.merged for part in self.parts)
        buffers = [tensor for part in self.parts for tensor in part.buffers]
        self.tensors = watched(
            self._params,
            planned,
            groups,
            state,
            buffers,
            single is not None,
            self._merged,
        )
        self._fixed = all(map(is_fixed, options_of(groups)))
        self._usual = False  # whether the last step was as most are
        self._expected: Any = None
        self._odd: list[Tensor] = []  # gradients that are not where they should be
        # Plain tensors, with the parameters' counts of versions.
        self._aliases = {member.place: member.param.detach() for member in members}
        self._all_aliases = list(self._aliases.values())

    def look(
        self, groups: list[dict[str, Any]], state: Any, averaged: bool
    ) -> list[Any] | None:
        """The gradients, if all else is as it was planned, or None."""
        tensors = self.tensors
        if averaged != self.averaged:
            return None
        grads: list[Any] | None = tensors.look(groups, state)
        if self._merged and grads is not None and tensors.moved:
            if self._expected is None:
                self._expected = tensors.found.copy()
            elif (tensors.found != self._expected).any():
                return None
        return grads

    def again(self, groups: list[dict[str, Any]], state: Any, threads: int) -> bool:
        """Do the same step as the last, if all is as it was then: much the quickest."""
        tensors = self.tensors
        grads = tensors.look(groups, state) if self._usual else None
        if grads is None or tensors.odd or not self.options_hold:
            return False
        if tensors.moved and self._merged:
            return False
        if tensors.moved:
            for part in self.parts:
                part.take(grads, tensors.found, True)
            tensors.moved = False
        for part in self.parts:
            if not part.usual:
                return False
        for part in self.parts:
            part.do_as_usual(self.values, self.signs, threads)
        increment_version(self._all_aliases)
        return True

    @property
    def options_hold(self) -> bool:
        """Whether the options of the groups are still what was read of them."""
        return self._fixed and bool(self.tensors.same_options)

    def reread(self, groups: list[dict[str, Any]], read: Read) -> bool:
        """Take other options over; False if they are for another plan."""
        rules, self.values, self.signs = read
        self.tensors.note(groups)
        self._fixed = all(map(is_fixed, options_of(groups)))
        return rules == self.rules

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
        where = tensors.found, tensors.moved
        found = [part for part in self.parts if part.take(grads, *where)]
        tensors.moved = False
        return found

    def do(
        self,
        parts: list[Part],
        scale: float,
        threads: int,
        asked: Asked | None,
    ) -> tuple[float, bool]:
        """The step, with what was taken, times a factor: the norm of the gradients, if
        it was asked for, and whether anything was updated."""
        with in_order({part.device for part in parts}):
            return self._do(parts, scale, threads, asked)

    def _do(
        self, parts: list[Part], scale: float, threads: int, asked: Asked | None
    ) -> tuple[float, bool]:
        norm, extras, limit = math.nan, None, math.inf
        values, factors = self.values, self.signs
        if scale != 1:
            factors = [factor * scale for factor in factors]
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
        totals: dict[int, Sums] = {}
        over_all = [part for part in parts if part.over_all]
        for part in over_all:
            part.prepare(values, factors)
            for more in part.sums(threads, limit):
                before = totals.get(id(part.rule), (0, None))
                totals[id(part.rule)] = together(before, more)
        for part in parts:
            if not part.over_all:  # after those before it: they may be the same
                part.prepare(values, factors)
            part.update(threads, extras, totals.get(id(part.rule)))
        if asked is not None and asked.zero_grads:
            # Kernels have set to zero what they read, which was copies of these.
            copied = [m.param for p in parts if not p.plain for m in p.members]
            set_to_zero([p.grad for p in copied] + self._odd)
        return norm, True

    def end(self, parts: list[Part]) -> None:
        """After a step: put back copies, and tell autograd what has changed."""
        if len(parts) == len(self.parts) and all(map(ALL, parts)):
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
        self._usual = len(parts) == len(self.parts) and all(map(USUAL, parts))


def set_to_zero(grads: Iterable[Tensor | None]) -> None:
    for grad in grads:
        if grad is not None:
            grad.zero_()


@contextmanager
def in_order(devices: set[torch.device]) -> Iterator[None]:
    """Numba's kernels are on the default stream of a GPU: let them come after what has
    been enqueued on torch's current one, and what will be, after them."""
    streams = [
        (torch.cuda.default_stream(device), torch.cuda.current_stream(device))
        for device in devices
        if device.type == "cuda"
    ]
    streams = [pair for pair in streams if pair[0] != pair[1]]
    for default, current in streams:
        default.wait_stream(current)
    yield
    for default, current in streams:
        current.wait_stream(default)


def options_of(groups: list[dict[str, Any]]) -> list[Any]:
    lists = "params", "param_names"
    return [v for group in groups for k, v in group.items() if k not in lists]


def is_fixed(value: Any) -> bool:
    """Whether an option cannot change but by another taking its place."""
    if type(value) is tuple:
        return all(map(is_fixed, value))
    return value is None or type(value) in (float, int, bool, str)


def check(param: Tensor, names: Names) -> None:
    """That fastopt has kernels for a parameter and its gradient."""
    if names.real and param.is_complex():
        raise Unsupported("complex parameters")
    if param.layout is not torch.strided:
        raise Unsupported("sparse parameters")
    if param.grad is not None and param.grad.layout is not torch.strided:
        raise Unsupported("sparse gradients")
    if param.device.type not in ("cpu", "cuda"):
        raise Unsupported(f"parameters on {param.device}")
    if param.dtype not in COMPUTED:
        raise Unsupported(f"parameters of {param.dtype}")


def module_for(rule: Rule, backend: str | None, param: Tensor) -> ModuleType:
    """The backend that updates a parameter: the one asked for is of CPU tensors."""
    on_device = param.device.type != "cpu"
    asked = None if on_device else backend
    return backends.load(asked or backends.choose(rule, on_device))


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
