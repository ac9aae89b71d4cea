"""What a step does, worked out once, and kept for as long as all is where it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from fastopt.optimizer.formats import first_element
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import uninterrupted
from fastopt.step import Examination, HalfDone, Request, Sums, examine, together
from fastopt.torch import counts, dtensors, memory
from fastopt.torch.arguments import spared
from fastopt.torch.changes import aliases_of, noting, zeroing
from fastopt.torch.counts import CountedPart, Scaler, is_countable
from fastopt.torch.dtensors import local
from fastopt.torch.formats import names_of
from fastopt.torch.gradients import Gradients, fitted
from fastopt.torch.memory import Unsupported, check_gradient
from fastopt.torch.orders import Order, Read
from fastopt.torch.part import Part
from fastopt.torch.ranks import Ranks, ranks_of
from fastopt.torch.runs import stepped_together
from fastopt.torch.state import Kind, Member, holds
from fastopt.torch.supported import check_shards, in_fake_mode, is_planned, module_for
from fastopt.torch.turns import Call
from fastopt.torch.values import device_lr, is_fixed, options_of

if TYPE_CHECKING:
    from fastopt.torch.step import Stepping

USUAL, ALL = attrgetter("usual"), attrgetter("all")
TORN = (
    "a step failed after it had updated the first of several parameters that share "
    "memory ({error}); load a checkpoint"
)


class Plan:
    """How to update the parameters of some groups: all of them, or a ``single`` one.

    Parameters
    ----------
    optimizer
        Whose parameters these are.
    groups, state
        The optimizer's. What is missing in the state is made, and put into it by the
        first step.
    read
        Of each group the rule, its hyperparameters, and the sign of its gradients. If
        there is a mask for weight decay, the same again without weight decay.
    gradients
        Gradients in place of those in ``.grad``.
    counting
        The request of a step that a GPU is to count, if it can.
    """

    def __init__(
        self,
        optimizer: Stepping,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        read: Read,
        single: Tensor | None = None,
        gradients: Gradients | None = None,
        counting: Request | None = None,
    ):
        self.rules, self.values, self.signs = read
        self.averaged, names = optimizer.ema is not None, optimizer._names
        without = spared(optimizer.weight_decay_mask, groups, optimizer._rules)
        pairs = [(p, i) for i, group in enumerate(groups) for p in group["params"]]
        if single is not None:
            pairs = [(single, 0)]
        # A spared parameter takes its group's second values, which have no decay.
        pairs = [(p, i + (len(groups) if p in without else 0)) for p, i in pairs]
        owners = [owner for owner, _ in pairs]
        grads = [p.grad for p in owners] if gradients is None else gradients.first
        # What kernels work on: this process's shards of DTensors.
        params, self._owners, here = owners, owners, state
        sharded = dtensors.are_there(owners)
        if sharded:
            params, grads = list(map(local, owners)), dtensors.shards(grads, owners)
            here = {p: dtensors.locals_of(state.get(p) or {}, p) for p in owners}
        self._params = params
        wanted, named_params = optimizer._wanted, names_of(groups)
        formats = [wanted.of_rule(rule) for rule in self.rules]
        keeps = [
            bool(rule.state or rule.carry or names.steps or self.averaged or wanted.any)
            for rule in self.rules
        ]
        if in_fake_mode():
            raise Unsupported("steps under a FakeTensorMode")
        # All of them, before anything is put into the state.
        self._ranks: Ranks | None = None
        if sharded or optimizer.shard_group is not None:
            of_each = [self.rules[group] for _, group in pairs]
            self._ranks = ranks_of(optimizer.shard_group, owners, of_each, self.rules)
        # A rule over everything goes on where another process has a gradient.
        waits = [
            keep and not (self._ranks and id(rule) in self._ranks.together)
            for keep, rule in zip(keeps, self.rules, strict=True)
        ]
        are_simple = memory.simple(params, grads)
        planned = [
            is_planned(
                *(param, grad, names, self.rules[group], here.get(owner)),
                *(waits[group], are_simple[place]),
            )
            for place, ((owner, group), param, grad) in enumerate(
                zip(pairs, params, grads, strict=True)
            )
        ]
        named = [
            dict(zip(rule.hyperparameters, values, strict=True))
            for rule, values in zip(self.rules, self.values, strict=True)
        ]
        # Of the elements of all parameters.
        count, firsts = first_element(optimizer.seed), {}
        for owner, _ in optimizer._all():
            firsts[owner] = count + (sharded and dtensors.first_number(owner))
            count += 0 if is_lazy(owner) else memory.numbers(owner)
        backend_of = cache(partial(module_for, optimizer.backend))
        alike, of_rule = dict[Any, list[Member]](), dict[int, list[Member]]()
        entries: dict[Tensor, dict[str, Any]] = {}  # copies of the state's
        for place, (owner, group) in enumerate(pairs):
            if not planned[place]:
                continue
            rule, param = self.rules[group], params[place]
            module = backend_of(rule, memory.on_gpu(param))
            plain = bool(are_simple[place]) or memory.is_plain(
                param, rule.factored, module.formats
            )
            entry: dict[str, Any] = {}
            if keeps[group]:
                entry = entries.setdefault(owner, dict(here.get(owner, entry)))
            # Gradients that are not in `.grad` lie anywhere, and form no runs.
            alone = gradients is not None or owner is not param
            name = named_params[owner]
            chosen = wanted.of(formats[group], name, owner, module.formats)
            if owner is not param:
                check_shards(owner, rule, chosen)
            if chosen and not plain:
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} has gaps in memory, so "
                    f"it has no formats; make it contiguous, or leave formats and "
                    f"master out"
                )
            of = param, chosen, place, group, named[group], entry, plain
            member = Member(*of, alone, firsts[owner], owner)
            member.copy = local((optimizer.copy_to or {}).get(owner))
            member.before = here.get(owner) or {}
            key = id(rule), param.device, plain, memory.COMPUTED[param.dtype]
            alike.setdefault(key, []).append(member)
            of_rule.setdefault(id(rule), []).append(member)
        kinds = []
        for computed_alike in alike.values():
            first = computed_alike[0].param
            rule = self.rules[computed_alike[0].group]
            common = rule, names, backend_of(rule, memory.on_gpu(first)), self.averaged
            more = of_rule[id(rule)], optimizer._counter(first)
            for wave, members in stepped_together(computed_alike, rule):
                kinds.append((Kind(*common, members, *more), wave))
        self._countable = all(is_countable(kind) for kind, _ in kinds)
        self._countable &= self._ranks is None or not self._ranks.rows
        self._apart = self._ranks is not None or len(kinds) > 1
        self._wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        self.counted = counting is not None and self.can_count(counting)
        part = CountedPart if self.counted else Part
        self.parts: list[Any] = [part(*of) for of in kinds]
        members = [member for part in self.parts for member in part.members]
        self._plain = {member.place for member in members if member.plain}
        self._merged = any(part.merged for part in self.parts)
        buffers = [tensor for part in self.parts for tensor in part.buffers]
        if sharded:
            keys = {key for part in self.parts for key in part.buffer_keys}
            entries = {
                owner: dtensors.wrapped_entry(entry, owner, state.get(owner), keys)
                for owner, entry in entries.items()
            }
        self._new = {
            owner: entry
            for owner, entry in entries.items()
            if not holds(state.get(owner), entry)
        }
        alone = single is not None
        self._watched = buffers, alone, owners, planned, groups
        self._planned = planned
        # Whether all waves can be prepared before the first one is done. They cannot if
        # a rule measures parameters, or if one parameter is in several waves.
        self._at_once = len({*map(id, owners)}) == len(owners)
        self._at_once &= not any(rule.measure for rule in self.rules)
        self.tensors = self._watch({**state, **self._new})
        self._note_options(groups, len(self.values))
        self._usual = False  # whether the last step was as most are
        self._expected: Any = None
        self._odd: list[Tensor] = []  # gradients that are not where they should be
        self._grads_taken: list[Any] = []  # during a step
        # The buffers of flatten_ that gradients at these addresses fill, if they do.
        self._flat: tuple[list[Tensor], bytes] | None = None
        ours = [member for member in members if member.plain]
        self._at = [member.place for member in ours]
        self._begins = np.array([m.param.data_ptr() for m in ours], np.int64)
        lengths = [m.param.numel() * m.param.element_size() for m in ours]
        self._lengths = np.array(lengths, np.int64)
        self._looked_at, self._overlaps = b"", False
        # Plain tensors, with the parameters' counts of versions.
        self._aliases = {member.place: aliases_of(member) for member in members}
        self._all_aliases = list(chain.from_iterable(self._aliases.values()))

    def _watch(self, state: dict[Any, Any]) -> Any:
        *last, params, planned, groups = self._watched
        return memory.watched(params, planned, groups, state, *last)

    @property
    def unused(self) -> bool:
        """Whether what was made for the state is not in it yet."""
        return bool(self._new)

    def look(
        self, groups: list[dict[str, Any]], state: Any, averaged: bool
    ) -> list[Any] | None:
        """Return the gradients if all else is as it was planned, or else None."""
        tensors = self.tensors
        if averaged != self.averaged or in_fake_mode():
            return None
        if not all(part.uniform() for part in self.parts):
            return None
        if self._new:
            state = {**state, **self._new}
        grads: list[Any] | None = tensors.look(groups, state)
        if self._merged and grads is not None and tensors.moved:
            if self._expected is None:
                self._expected = tensors.addresses.copy()
            elif (tensors.addresses != self._expected).any():
                return None
        return grads

    def note_flat(
        self, groups: list[dict[str, Any]], state: Any, bases: list[Tensor]
    ) -> None:
        """Note that the gradients are all of these buffers of ``flatten_``."""
        if self.tensors.look(groups, state) is not None and not self.tensors.odd:
            self._flat = bases, self.tensors.addresses.tobytes()

    def zero_flat(self, groups: list[dict[str, Any]], state: Any) -> bool:
        """Set the gradients to zero if they still are what was noted. Return whether
        they are."""
        if self._flat is None or self.tensors.look(groups, state) is None:
            return False
        bases, addresses = self._flat
        if self.tensors.odd or self.tensors.addresses.tobytes() != addresses:
            return False
        for base in bases:
            base.zero_()
        return True

    @standard
    def again(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        request: Request,
        attributes: dict[str, Any],
        scaler: Scaler | None = None,
    ) -> bool:
        """Do the last step again, if all is as it was then: the fastest path.
        ``attributes`` are the optimizer's. A ``scaler`` is of steps that a GPU
        counts."""
        tensors, turns = self.tensors, attributes["_turns"]
        if not self._usual or in_fake_mode():
            return False
        if self.counted and not self.can_count(request):
            return False
        if self.averaged != (request.ema_weight > 0):
            return False
        grads = tensors.look(groups, state)
        if grads is None or tensors.odd or not self.options_hold:
            return False
        if tensors.moved and self._merged:
            return False
        if tensors.moved:
            addresses = tensors.addresses
            if not all([part.follow(addresses) for part in self.parts]):
                return False
        if not all([part.goes_on for part in self.parts]):
            return False
        calls, signs = [turns.claim], self.signs
        if self.counted:
            calls += self._heed(self.parts, request, attributes, scaler)
        elif request.clip_norm < math.inf and self._apart:
            norm, finite, _, shrink = self._examine(self.parts, 1.0, request, grads)
            calls += noting(attributes, norm, finite, request)
            signs = [sign * shrink for sign in signs]
            request = request._replace(clip_norm=math.inf)
        for part in self.parts:
            calls += part.go_on(self.values, signs, request, attributes)
        increment_version(self._all_aliases)
        try:
            uninterrupted(*calls)
        except KeyError as error:
            if turns.overtaken(error):
                return False
            raise
        # Only now: otherwise, the parts are to take the gradients once more.
        tensors.moved = False
        return True

    def _note_options(self, groups: list[dict[str, Any]], count: int) -> None:
        """Note which learning rates are on a GPU, for each of so many groups, and
        whether the options can change only if other objects take their place."""
        lrs = list(map(device_lr, groups))
        self.lrs = lrs * (count // len(groups))
        unread = {id(lr) for lr in lrs if lr is not None}
        options = options_of(groups)
        self._fixed = all(is_fixed(of) or id(of) in unread for of in options)

    def can_count(self, request: Request) -> bool:
        """Whether a GPU can count a step: there are kernels for all that it decides."""
        if not self._countable or request.nonfinite == "raise":
            return False
        if not request.needs_norm:
            return True
        # The squares of float64 may overflow although all gradients are finite.
        return not self._apart and not (self._wide and request.nonfinite == "skip")

    @property
    def options_hold(self) -> bool:
        """Whether the options of the groups are still what was read of them."""
        return self._fixed and bool(self.tensors.same_options)

    def reread(self, groups: list[dict[str, Any]], read: Read) -> bool:
        """Take over changed options. Return False if they need another plan."""
        rules, self.values, self.signs = read
        self.tensors.note(groups)
        self._note_options(groups, len(self.values))
        return rules == self.rules

    @standard
    def take(self, grads: list[Any]) -> list[Part]:
        """Give gradients to the parts, and return the parts that the step changes."""
        tensors = self.tensors
        self._odd, self._grads_taken = [], grads
        for place in tensors.odd or ():
            param, owner = self._params[place], self._owners[place]
            self._odd.append(grads[place])
            grad = grads[place] = dtensors.local_gradient(grads[place], owner)
            check_gradient(param, grad)
            if place in self._plain:
                grads[place] = fitted(grad, param)
                tensors.addresses[place] = grads[place].data_ptr() or -2  # as look does
        # Kernels know one format for all gradients that they find by their addresses.
        mixed = any(
            grads[place].dtype != self._params[place].dtype
            for place in tensors.odd or ()
        )
        where = tensors.addresses, tensors.moved, mixed
        taken = [part.take(grads, *where) for part in self.parts]
        tensors.moved = False
        return self._stepping(taken)

    def _stepping(self, taken: list[bool]) -> list[Part]:
        """Return the parts that a step changes: those with a gradient or, if averages
        are kept, all parts, because averages follow parameters without gradients. Those
        of a rule over everything step if another one, or another process, has one."""
        averaged = self.averaged and any(taken)
        pairs = list(zip(self.parts, taken, strict=True))
        stepping = {id(part.rule) for part, there in pairs if there or self._ranks}
        return [
            part
            for part, there in pairs
            if there or averaged or (part.over_all and id(part.rule) in stepping)
        ]

    @standard
    def take_gradients(self, gradients: Gradients) -> list[Part] | None:
        """Give the parts gradients that are not in ``.grad``. Return the parts that the
        step changes, or None if a parameter with a gradient is not planned."""
        for task in gradients.tasks:
            for grad, param, planned in zip(
                task, self._params, self._planned, strict=True
            ):
                if grad is not None and not planned:
                    return None
                if grad is not None:
                    check_gradient(param, grad)
        return self._stepping([part.take_gradients(gradients) for part in self.parts])

    @standard
    def do(
        self,
        parts: list[Part],
        order: Order,
        optimizer: dict[str, Any],
        last: list[Call],
    ) -> bool:
        """Do the step with the gradients that were taken, times a factor, and return
        whether anything was updated. All changes happen at the same instant: those of
        parameters and state, of gradients that are set to zero, and of the attributes
        of the ``optimizer``. The calls ``last`` belong to the step, whether it is
        skipped or not."""
        turns, request, gradients = optimizer["_turns"], order.request, order.gradients
        factors = [sign * order.scale for sign in self.signs]
        waits = not self._decides(parts, request)  # for what the device measures
        if self.counted:
            last += self._heed(parts, request, optimizer, order.scaler)
        elif request.needs_norm and not waits:
            runner = parts[0].program.runner
            last.append(partial(optimizer.update, grad_norm=runner.norm))
        elif request.needs_norm:
            of = parts, abs(factors[0]), request, self._grads_taken
            norm, finite, _, shrink = self._examine(*of)
            last += noting(optimizer, norm, finite, request)
            if not finite and request.nonfinite == "skip":
                if request.zero_grads:
                    last += zeroing(self._grads(gradients))
                turns.commit(last)
                return False
            factors = [factor * shrink for factor in factors]
            request = request._replace(clip_norm=math.inf, nonfinite="propagate")
        if request.zero_grads:
            # If the GPU skips the step, they are to be zero all the same.
            apart = self.counted or gradients is not None or self._overlap()
            # Kernels set to zero what they read, which may be copies of these.
            members = [m for p in parts if apart or not p.plain for m in p.members]
            copied = [member.owner.grad for member in members]
            last += zeroing(copied if gradients is None else self._grads(gradients))
            last += zeroing(self._odd)
            request = request._replace(zero_grads=not apart)
        totals = self._measure(parts, factors, request) if waits else {}
        if not any(part.any or is_there(totals.get(part, ())) for part in parts):
            turns.commit(last)  # there is no gradient in any process
            return False
        calls = self.entries(optimizer["state"])
        waves = sorted({part.wave for part in parts})
        torn: list[int] = []  # the waves that are done, if others are not
        try:
            for wave in waves:  # of parameters that share memory, one after another
                for part in parts:
                    if part.wave == wave:
                        sums = totals.get(part)
                        calls += part.update(self.values, factors, request, sums)
                if wave == waves[-1]:
                    calls += [*last, torn.clear]
                elif self._at_once:
                    continue
                else:
                    calls.append(partial(torn.append, wave))
                if torn:
                    uninterrupted(*calls)
                else:
                    self._tell(parts)
                    turns.commit(calls)
                calls = []
        except BaseException as error:
            if torn and not isinstance(error, HalfDone):
                half = HalfDone(TORN.format(error=repr(error)))
                optimizer["_half_done"] = half
                if isinstance(error, Exception):
                    raise half from error
            raise
        return True

    def _heed(
        self,
        parts: list[Any],
        request: Request,
        own: dict[str, Any],
        scaler: Scaler | None,
    ) -> list[Call]:
        """Let counted parts know what a step depends on. Return the calls that note in
        an optimizer's attributes who knows what comes of it."""
        for part in parts:
            part.heed(scaler, self.lrs)
        return counts.noting(parts, request, own)

    def _decides(self, parts: list[Part], request: Request) -> bool:
        """Whether the device decides what norms mean: those of all gradients are in one
        part then, and its own."""
        if self.counted:
            return True
        if self._ranks is not None or len(parts) > 1:
            return False
        return parts[0].plain and parts[0].decides(request)

    def _examine(
        self, parts: list[Part], factor: float, request: Request, grads: list[Any]
    ) -> Examination:
        """Look at the gradients that the parts have taken, times a factor, and at those
        of other processes. ``grads`` are those in ``.grad``."""
        ranks = self._ranks
        return examine(
            [part.program for part in parts],
            factor,
            request,
            lambda p, i: parts[p].is_finite(i, factor, grads),
            None if ranks is None else partial(ranks.norm_of, parts),
        )

    def _measure(
        self, parts: list[Part], factors: list[float], request: Request
    ) -> dict[Part, list[Sums]]:
        """Return, for parts whose sums are not theirs alone, those of each run: sums of
        all parts together, and of all processes."""
        own = {
            part: part.sums(self.values, factors, request)
            for part in parts
            if part.over_all or (self._ranks and self._ranks.divide(part))
        }
        if self._ranks is not None:
            return self._ranks.measure(own)
        totals: dict[int, list[Sums]] = {}
        for part, sums in own.items():
            totals.setdefault(id(part.rule), []).extend(sums)
        joint = {rule: together(sums) for rule, sums in totals.items()}
        return {part: [joint[id(part.rule)]] * len(part.runs) for part in own}

    def _grads(self, gradients: Gradients | None) -> list[Tensor | None]:
        """Return the gradients that the step takes."""
        if gradients is None:
            return [owner.grad for owner in self._owners]
        return [grad for task in gradients.tasks for grad in task]

    def _overlap(self) -> bool:
        """Whether gradients share memory with each other or with parameters, so that
        none may be set to zero before all have been read."""
        addresses = self.tensors.addresses
        if addresses.tobytes() != self._looked_at:
            begins = np.concatenate([addresses[self._at], self._begins])
            ends = begins + np.tile(self._lengths, 2)
            there = (begins > 0) & (begins < ends)
            begins, ends = begins[there], ends[there]
            order = begins.argsort()
            self._overlaps = bool((begins[order][1:] < ends[order][:-1]).any())
            self._looked_at = addresses.tobytes()
        return self._overlaps

    def _tell(self, parts: list[Part]) -> None:
        """Tell autograd what is going to change, before it does, because an interrupt
        may come after."""
        if len(parts) == len(self.parts) and all(map(ALL, parts)):
            increment_version(self._all_aliases)
        else:
            changed = [
                alias
                for part in parts
                for run, active in zip(part.runs, part.active, strict=True)
                if active
                for i in run
                for alias in self._aliases[part.members[i].place]
            ]
            increment_version(changed)

    def entries(self, state: dict[Any, Any]) -> list[Call]:
        """The calls that put what was made into the optimizer's state. They compute no
        hash of a parameter, which would be done in Python."""
        fresh, calls = {}, list[Call]()
        for param, entry in self._new.items():
            there = state.get(param)
            if there is None:
                fresh[param] = entry
            else:
                calls.append(partial(there.update, entry))
                gone = there.keys() - entry.keys()  # scales of what has none here
                calls += [partial(there.pop, key, None) for key in gone]
        return [partial(state.update, fresh), *calls] if self._new else []

    def forget(self) -> None:
        """Release the gradients."""
        self._grads_taken = []
        for part in self.parts:
            part.forget()

    def end(self, parts: list[Part], state: dict[Any, Any]) -> None:
        """Note what the next step needs to know. ``state`` is what ``look`` will be
        told."""
        for part in parts:
            part.end()
        self.forget()
        self._usual = len(parts) == len(self.parts) and all(map(USUAL, parts))
        # What is measured of shards is added up by the host.
        self._usual &= not (self._ranks and any(map(self._ranks.divide, parts)))
        if self._new:
            self._new = {}
            self.tensors = self._watch(state)
            self.tensors.moved = True  # for all that it knows


def is_there(sums: Sequence[Sums]) -> bool:
    """Whether anything was measured."""
    return any(terms is not None for _, terms in sums)
