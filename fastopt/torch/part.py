"""Parameters of one rule, dtype and device, which one native step updates together."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt.backends import cython_cpu
from fastopt.backends.numpy_ref import PLAIN, Extras, Step, calls_of
from fastopt.memory.segments import Array, Segment
from fastopt.optimizer.state import bind_alone
from fastopt.rule import Rule
from fastopt.torch import state
from fastopt.torch.memory import array, numbers, same_layout
from fastopt.torch.state import EMA, FACTORS, Member, Names, Values, in_one_piece
from fastopt.torch.turns import Call

Sums = tuple[int, tuple[float, ...] | None]  # elements, and what was summed over them


def compiled(rule: Rule) -> Callable[..., tuple[float, ...]]:
    """The rule's scalars, as native code if there is any."""
    name = cython_cpu.SCALARS.get(rule.scalars)
    if name is None or cython_cpu.missing() is not None:
        return rule.scalars
    native: Callable[..., tuple[float, ...]] = getattr(cython_cpu.kernels(), name)
    return native


class Part:
    """Steps over some members.

    ``take`` the gradients, ``prepare`` the scalars, then make the calls of ``update``;
    in between there is time for ``norm`` and ``sums``. Only these calls write what a
    user sees. Where kernels cannot work in a parameter's memory (bfloat16, memory with
    gaps), the native step is made anew each time, over copies.
    """

    def __init__(
        self,
        rule: Rule,
        module: ModuleType,
        names: Names,
        members: list[Member],
        values: Sequence[Values],
        averaged: bool,
        wave: int = 0,
    ):
        self.rule, self.module, self.names = rule, module, names
        self.wave = wave  # steps come after those of the waves before
        self.members, self.averaged = members, averaged
        self.plain, self.device = members[0].plain, members[0].param.device
        self.over_all = rule.measure is not None and rule.over == "all"
        keys = [names.key(name) for name in rule.state]
        fresh = [all(m.state.get(key) is None for key in keys) for m in members]
        self.vectors = state.vectors(rule, names, members, values, fresh)
        self.keys = state.make(
            rule, names, members, values, averaged, module, self._neighbours()
        )
        self.carried = len(self.vectors) - 1
        carry = rule.carry if names.carry is None else names.carry
        self.counted = [key for key in (names.steps, *map(names.key, carry)) if key]
        self.scalars = names.scalars or compiled(rule)
        self.used = None if rule.settle else rule.scalar_count  # of the scalars
        self.eps = torch.finfo(members[0].param.dtype).eps  # for what is None
        self.any = self.all = self.usual = False
        self._t, self._steps = 0, b""  # if it is usual: the steps of all members
        self.active = np.zeros(0, bool)  # of each run, whether there is a gradient
        self._mask, self._known = b"", b""
        self._seen: list[bytes] = []
        self.runs = self._merged() if self.plain else [[i] for i in range(len(members))]
        sizes = [len(run) for run in self.runs]
        self.run_of = np.repeat(np.arange(len(sizes)), sizes)  # of each member
        if self.plain:
            self._bind([member.param for member in members])

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors of the state to watch: what steps work in, and the counts."""
        keys = [*self.keys, *self.counted, *FACTORS]
        found = [m.state.get(key) for m in self.members for key in keys]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    @property
    def merged(self) -> bool:
        return len(self.runs) < len(self.members)

    def uniform(self) -> bool:
        """Whether the members of each run still have done as many steps, and carry the
        same numbers: they are in the state, where all of it may be set."""
        if not self.merged or self._bytes() == self._seen:
            return True
        firsts = np.array([run[0] for run in self.runs])[self.run_of]
        return all(np.array_equal(vector, vector[firsts]) for vector in self.vectors)

    # The native step ------------------------------------------------------------------

    def _neighbours(self) -> list[list[int]]:
        """Runs of members whose parameters follow one another in memory, and whose
        gradients do, as ``flatten_`` puts them: one segment, if all else does, too."""
        places = [self._whereabouts(i) for i in range(len(self.members))]
        return joined(places)

    def _whereabouts(self, i: int) -> tuple[Any, list[Tensor]] | None:
        """What a member must have in common with its neighbours, and what must follow
        on; None if it is to be by itself."""
        member = self.members[i]
        param, grad = member.param, member.param.grad
        by_itself = self.rule.measure is not None and not self.over_all
        if by_itself or grad is None or not (member.plain and param.is_cpu):
            return None
        if not same_layout(grad, param):
            return None
        common = (
            member.group,
            *(vector[i] for vector in self.vectors),
            # Tensors may follow one another by chance, but not for long.
            param.untyped_storage().data_ptr(),
            grad.untyped_storage().data_ptr(),
        )
        return common, [param, grad]

    def _merged(self) -> list[list[int]]:
        """Those whose state follows on, too."""
        places = []
        for i, member in enumerate(self.members):
            place = self._whereabouts(i)
            if place is not None:
                common, tensors = place
                place = common, [*tensors, *(member.state[key] for key in self.keys)]
            places.append(place)
        return joined(places)

    def _bind(self, params: Sequence[Tensor]) -> None:
        """The native step over these: the parameters, or copies of them."""
        segments = []
        for r, run in enumerate(self.runs):
            member, param = self.members[run[0]], params[run[0]]
            count = sum(numbers(params[i]) for i in run)
            shape = tuple(param.shape) if self.rule.factored else (-1,)
            streams = {
                key: array(member.state[key], count)
                for key in self.keys
                if key in member.state
            }
            average = streams.pop(EMA, None) if self.averaged else None
            product = None if member.factors is None else member.factors.product
            ours = tuple(streams.values()) if product is None else ()
            segments.append(
                Segment(array(param, count, shape), ours, r, average, product)
            )
        self.count = np.zeros(1, np.int64)
        self.carry = np.zeros((2, len(self.runs), len(self.rule.carry)))
        self.step = self.module.bind(self.rule, segments, self.count, self.carry)
        self.sizes = [segment.param.size for segment in segments]
        self.places = np.array([self.members[run[0]].place for run in self.runs])
        self._here = np.zeros(len(self.runs), np.int64)
        self._taken: list[Any] = []  # gradients that the native step looks at
        self._placed = False

    # A step ---------------------------------------------------------------------------

    def take(self, grads: Sequence[Any], found: Array, moved: bool) -> bool:
        """Take the gradients, of which some may have ``moved`` since the last step;
        whether there are any."""
        if not self.plain:
            self._take_copies(grads)
        elif moved or not self._placed:
            np.take(found, self.places, out=self._here)
            self._know(self._here != 0)
            self._placed = self._place(grads)
            self.usual &= self._placed
        return self.any

    def _know(self, active: Array) -> None:
        self.active, self._mask = active, active.tobytes()
        self.any, self.all = bool(active.any()), bool(active.all())
        self.usual &= self.all

    def _place(self, grads: Sequence[Any]) -> bool:
        """Whether the native step has noted where the gradients are, and need not be
        told again before they move."""
        native = hasattr(self.step, "place")
        if native and self.step.place(self._here):
            return True
        # A native step does not take gradients that overlap what it writes.
        self._give([grads[place] for place in self.places], copied=native)
        return False

    def _give(self, grads: list[Any], copied: bool = False) -> None:
        """Give the step the gradient of each run, which begins with one of these, or a
        copy of it."""
        shaped = self.rule.factored
        arrays = [
            None if g is None else array(g, size, g.shape if shaped else (-1,))
            for g, size in zip(grads, self.sizes, strict=True)
        ]
        if copied:
            arrays = [None if a is None else a.copy() for a in arrays]
        self._taken = [grads, arrays]  # arrays do not keep a tensor's memory
        if not self.step.take(arrays):
            raise RuntimeError("the kernel refused gradients found to fit")

    def _take_copies(self, grads: Sequence[Any]) -> None:
        given = [grads[member.place] for member in self.members]
        self._know(np.array([grad is not None for grad in given]))
        if self.any:
            self._copies = [copy(member, member.param) for member in self.members]
            self._bind(self._copies)
            pairs = zip(self.members, given, strict=True)
            self._give([None if g is None else copy(m, g) for m, g in pairs])

    def end(self) -> None:
        """After a step: note what the next one needs to know, and forget the rest."""
        self.usual = (
            self.all
            and self._placed
            and len(self.kinds) == 1
            and not (self.wave or self.carried or self.averaged or self.rule.settle)
            and not isinstance(self.step, Step)  # NumPy's, which is several calls
        )
        # In this order: a signal handler may step in between.
        self._steps = self.vectors[0].tobytes()
        self._t = int(self.vectors[0].item(0))
        self._taken = []
        if not self.plain:
            self._copies, self.step = [], None

    def norm(self, factor: float, threads: int) -> tuple[float, bool]:
        """The sum of the squares of the gradients, and whether all are finite."""
        squares, finite = 0.0, True
        rows = [(factor,)] * len(self.runs)
        for r, sums in enumerate(self.step.sums("gradients", rows, threads)):
            if sums is not None:
                squares += sums[0]
                finite &= math.isfinite(sums[0]) or self._overflowed(r, factor)
        return squares, finite

    def _overflowed(self, r: int, factor: float) -> bool:
        """Whether the gradients of a run are finite, and only their squares not, which
        may be in float64 alone."""
        grads = [self.members[i].param.grad for i in self.runs[r]]
        return self.members[self.runs[r][0]].dtype in (
            torch.float64,
            torch.complex128,
        ) and all(bool(torch.isfinite(grad * factor).all()) for grad in grads)

    def prepare(self, values: Sequence[Values], factors: Sequence[float]) -> None:
        """The scalars of the step, for each run, from the hyperparameters and the
        factor for the gradients of each group."""
        seen = self._bytes()
        if seen != self._seen or self._mask != self._known:
            self._sort()
            self._seen, self._known = seen, self._mask
        self.rows: list[Any] = [None] * len(self.runs)
        self.new: list[Any] = []  # of each kind, what the rule will carry
        count = len(self.rows)
        for group, first, runs, _ in self.kinds:
            steps, *carried = [vector.item(first) for vector in self.vectors]
            given = values[group]
            if self.rule.factored and None in given:
                given = [self.eps if value is None else value for value in given]
            row = self.scalars(int(steps) + 1, *carried, *given)
            if self.carried:
                self.new.append(row[-self.carried :])
            if self.used is not None:
                row = row[: self.used]
            row = (factors[group], *row)
            if len(runs) == count:
                self.rows = [row] * count
            else:
                for r in runs:
                    self.rows[r] = row

    def goes_on(self) -> bool:
        """Whether the next step may be like the last, if that was ``usual``: all
        members have done as many steps, the rule needs no more than scalars, and
        nothing is asked beside."""
        return self.usual and self.vectors[0].tobytes() == self._steps

    def update_as_usual(
        self, values: Sequence[Values], factors: Sequence[float], threads: int
    ) -> tuple[Call, ...]:
        """The calls of a step like the last; then ``end_as_usual``."""
        group, t = self.members[0].group, self._t + 1
        row = (factors[group], *self.scalars(t, *values[group])[: self.used])
        step = partial(self.step, [row] * len(self.runs), threads)
        if self.names.steps is None:
            return (step,)
        return step, partial(self.vectors[0].fill, t)

    def end_as_usual(self) -> None:
        if self.names.steps is not None:
            self._t += 1
            self._steps = self.vectors[0].tobytes()
            # A signal handler may have stepped since.
            self.usual = self.vectors[0].item(0) == self._t

    def _bytes(self) -> list[bytes]:
        return [vector.tobytes() for vector in self.vectors]

    def _sort(self) -> None:
        """Find the kinds: runs of one group that have done as many steps, and go on
        together; they have the same scalars."""
        self._check_steps()
        kinds: dict[Any, list[int]] = {}
        for r, (first, *_) in enumerate(self.runs):
            counts = [vector[first].item() for vector in self.vectors]
            key = self.members[first].group, bool(self.active[r]), *counts
            kinds.setdefault(key, []).append(r)
        self.kinds = []
        for (group, active, *_), runs in kinds.items():
            members = [i for r in runs for i in self.runs[r]]
            goes_on = members if active or self.over_all else []
            self.kinds.append((group, members[0], runs, goes_on))

    def _check_steps(self) -> None:
        """A user may have written into the state."""
        steps = self.vectors[0]
        if not ((steps >= 0) & (steps == np.floor(steps)) & np.isfinite(steps)).all():
            for member, value in zip(self.members, steps.tolist(), strict=True):
                where = f"state[...][{self.names.steps!r}] of parameter {member.place}"
                state.check_steps(where, value)

    def sums(self, threads: int, clip_value: float) -> list[Sums]:
        """What the rule measures, of each run."""
        found = self.step.sums("rule", self.rows, threads, clip_value)
        return [
            (size, terms) if terms is not None and size else (0, None)
            for size, terms in zip(self.sizes, found, strict=True)
        ]

    def update(
        self, threads: int, extras: Extras | None, total: Sums | None
    ) -> list[Call]:
        """The calls that do the step; ``total`` is of all parts, for rules that measure
        over all. Nothing that a user sees is written before."""
        limit = math.inf if extras is None else extras.clip_value
        if self.rule.factored:
            self._advance_factors(threads, limit)
        after = [vector.copy() for vector in self.vectors]
        if self.rule.settle is None:
            if self.carried:
                for (*_, members), new in zip(self.kinds, self.new, strict=True):
                    carry(after, members, new)
            calls = self._run(threads, extras)
        elif getattr(self.step, "batches", False):
            calls = self._batches(threads, extras, after)
        else:
            self._settle(threads, limit, total, after)
            calls = self._run(threads, extras)
        steps = after[0]
        if self.all or self.over_all:
            steps += 1
        else:
            steps[self.active[self.run_of]] += 1
        if self.names.steps is None:
            np.minimum(steps, 1, out=steps)
        # The kinds fit the new state, unless settle changes what each run carries.
        settled = self.carried and self.rule.settle
        self._seen = [] if settled else [vector.tobytes() for vector in after]
        calls += [
            partial(operator.setitem, vector, ..., new)
            for vector, new in zip(self.vectors, after, strict=True)
        ]
        if self.rule.factored:
            calls += self._keep_factors()
        if not self.plain:
            calls += [
                partial(member.param.detach().copy_, made)
                for member, made, active in zip(
                    self.members, self._copies, self.active, strict=True
                )
                if active
            ]
        return calls

    def _run(self, threads: int, extras: Extras | None) -> list[Call]:
        return calls_of(self.step, self.rows, threads, *[extras] if extras else [])

    def _batches(
        self, threads: int, extras: Extras | None, after: list[Array]
    ) -> list[Call]:
        """The step of a rule with norms, in batches: its settling is compiled, and what
        it carries on is in ``carry`` when it is done."""
        now = self.count.item(0) % 2
        old = np.stack(self.vectors[1:], 1) if self.carried else self.carry[0]
        self.carry[now] = old[[run[0] for run in self.runs]]
        calls: list[Call] = [
            partial(self.step.settled, self.rows, threads, extras or PLAIN)
        ]
        for k in range(self.carried):
            after[1 + k] = np.zeros(len(self.members))
            new = self.carry[1 - now, :, k]
            calls.append(partial(new.take, self.run_of, out=after[1 + k]))
        return calls

    def _settle(
        self, threads: int, limit: float, total: Sums | None, after: list[Array]
    ) -> None:
        """The scalars of a rule with norms, and what it carries on."""
        rule, carried, rows = self.rule, self.carried, self.rows
        settle: Any = rule.settle
        totals = self.sums(threads, limit) if total is None else [total] * len(rows)
        settled = {}
        for r, (row, (n, terms)) in enumerate(zip(rows, totals, strict=True)):
            key = id(row), n, terms
            if key in settled:
                pass
            elif terms is None:  # a row without elements: no update, and no change
                left = [vector[self.runs[r][0]] for vector in self.vectors[1:]]
                settled[key] = (row[0], *(0.0,) * rule.scalar_count, *left)
            else:
                t = int(self.vectors[0][self.runs[r][0]]) + 1
                factor, *scalars = row
                settled[key] = (factor, *settle(t, float(n), *terms, *scalars))
            rows[r] = settled[key]
        new = [row[len(row) - carried :] for row in rows]
        self.rows = [row[: 1 + rule.scalar_count] for row in rows]
        for run, active, values in zip(self.runs, self.active, new, strict=True):
            if active or self.over_all:
                carry(after, run, values)

    def estimate(self, values: Sequence[Values], threads: int) -> list[Call]:
        """The calls that put an estimate into the state, from gradients of another
        kind."""
        of: Any = self.rule.estimate
        (buffer, rule), rows, grads = of, [], []
        self._check_steps()
        streams = [member.state[self.names.key(buffer)] for member in self.members]
        arrays, several = list(map(array, streams)), range(len(streams))
        step = bind_alone(self.module, rule, arrays, several)
        for stream, member, steps in zip(
            streams, self.members, self.vectors[0], strict=True
        ):
            scalars = rule.scalars(int(steps) + 1, *values[member.group])
            rows.append((1.0, *scalars[: rule.scalar_count]))
            grad = member.param.grad
            made = torch.empty_like(stream)
            grads.append(None if grad is None else made.copy_(grad.detach()))
        step.take([None if grad is None else array(grad) for grad in grads])
        self._taken = grads
        return calls_of(step, rows, threads)

    # State that is kept of rows and columns alone -------------------------------------

    def _advance_factors(self, threads: int, limit: float) -> None:
        squares = self.step.squares(self.rows, threads, limit)
        for r, (member, found) in enumerate(zip(self.members, squares, strict=True)):
            if member.factors is None or found is None:
                continue
            factor, weight, floor, least, *others = self.rows[r]
            rows, columns = (member.state[key] for key in FACTORS)
            kept = [rows.squeeze(-1).cpu().numpy(), columns.squeeze(-2).cpu().numpy()]
            member.factors.sets[0] = np.concatenate(kept, axis=-1)
            member.factors.advance(1, found, weight, least)
            self.rows[r] = (factor, 0.0, floor, least, *others)

    def _keep_factors(self) -> list[Call]:
        calls: list[Call] = []
        for member, active in zip(self.members, self.active, strict=True):
            if member.factors is not None and active:
                made = torch.from_numpy(member.factors.sets[1])
                rows, columns = made.split(list(member.param.shape[-2:]), -1)
                state: dict[str, Tensor] = member.state
                calls += [
                    partial(state["row_var"].copy_, rows.unsqueeze(-1)),
                    partial(state["col_var"].copy_, columns.unsqueeze(-2)),
                ]
        return calls


def carry(after: list[Array], members: Sequence[int], new: Sequence[float]) -> None:
    """Note what the rule carries on to the next step of these members."""
    for vector, value in zip(after[1:], new, strict=True):
        vector[members] = value


def joined(places: Sequence[Any]) -> list[list[int]]:
    """Runs of members that have the same in common, and of whose tensors each ends
    where that of the next one begins."""
    runs: list[list[int]] = []
    before: Any = None
    for i, after in enumerate(places):
        joins = before and after and before[0] == after[0]
        if joins and all(map(in_one_piece, zip(before[1], after[1], strict=True))):
            runs[-1].append(i)
        else:
            runs.append([i])
        before = after
    return runs


def copy(member: Member, tensor: Tensor) -> Tensor:
    """A parameter, or its gradient, where kernels can work in it."""
    param = member.param
    made = torch.empty(param.shape, dtype=member.dtype, device=param.device)
    return made.copy_(tensor.detach())
