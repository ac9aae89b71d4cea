"""Parameters of one rule and device, which one native step updates together."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt.memory.segments import Array, Encoded, Segment
from fastopt.optimizer.formats import PARAM
from fastopt.optimizer.state import bind_alone
from fastopt.step import Key, Program, Request, Sums, execute, plain
from fastopt.torch import formats, state
from fastopt.torch.dtensors import local_gradient
from fastopt.torch.gradients import Gradients, fitted
from fastopt.torch.memory import HALVES, array, check_device, numbers
from fastopt.torch.runs import find_runs
from fastopt.torch.state import EMA, FACTORS, Kind, Member, Values
from fastopt.torch.turns import Call


class Part:
    """Steps over some members.

    First ``take`` the gradients, then make the calls that ``update`` returns. Only
    these calls write what a user sees. If kernels cannot work in a parameter's memory,
    because it has gaps, each step works on copies.
    """

    def __init__(self, kind: Kind, wave: int = 0):
        rule, names, module, self.averaged, members, _, self.not_stored = kind
        self.rule, self.names, self.module, self.members = rule, names, module, members
        self.wave = wave  # steps come after those of the waves before
        self.plain, self.device = members[0].plain, members[0].param.device
        self.over_all = kind.is_over_all
        self._count(kind)
        self.buffer_keys = state.make(kind, find_runs(kind, self.vectors))
        self.carried = len(names.carried(rule))
        self.counted = [key for key in (names.steps, *names.carried(rule)) if key]
        self.scalars = names.scalars or module.scalars(rule)
        self.used = None if rule.settle else rule.scalar_count  # of the scalars
        self.eps = torch.finfo(members[0].param.dtype).eps  # for what is None
        self._gradients: Gradients | None = None  # in place of those in ``.grad``
        self.any = self.all = self.usual = False
        self._t = 0  # if it is usual: the steps of all members
        self.active = np.zeros(0, bool)  # of each run, whether there is a gradient
        self._mask, self._known = b"", b""
        self._seen: list[bytes] = []
        self.runs = [[i] for i in range(len(members))]
        if self.plain:
            self.runs = find_runs(kind, self.vectors, self.buffer_keys)
        sizes = [len(run) for run in self.runs]
        self.run_of = np.repeat(np.arange(len(sizes)), sizes)  # of each member
        if self.plain:
            self._bind([member.param for member in members])

    def _count(self, kind: Kind) -> None:
        """Find or make the counts of steps, and the numbers that the rule carries."""
        self.vectors = state.vectors(kind)

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors of the state to watch: what steps work in, and the counts."""
        scales = [f"{key}_{formats.SCALE}" for key in self.buffer_keys]
        keys = [*self.buffer_keys, *scales, *self.counted, *FACTORS]
        entries = [m.state.get(key) for m in self.members for key in keys]
        entries += [member.copy for member in self.members]
        return [tensor for tensor in entries if isinstance(tensor, Tensor)]

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

    def _bind(self, params: Sequence[Tensor]) -> None:
        """Bind the native step to these: the parameters, or copies of them."""
        segments = []
        for r, run in enumerate(self.runs):
            member, param = self.members[run[0]], params[run[0]]
            count = sum(numbers(params[i]) for i in run)
            shape = tuple(param.shape) if self.rule.factored else (-1,)
            state = tuple(
                stream(self, member, name, count)
                for name in self.rule.state
                if member.factors is None
            )
            average = None
            if self.averaged:
                average = array(member.state[EMA], count, shape)
            if member.factors is not None:
                state = (member.factors.product,)
            memory = array(param, count, shape)
            if format := member.chosen.get(PARAM):
                rest = member.state.get(formats.REMAINDER)
                memory = formats.stream(param, format, rest, self.not_stored, count)
            of_copy = (
                None if member.copy is None else array(member.copy.detach(), count)
            )
            own = average, member.first, of_copy
            segments.append(Segment(memory, state, r, *own))
        self.program = Program(
            self.module,
            self.rule,
            segments,
            factors=[self.members[run[0]].factors for run in self.runs],
            carry=np.zeros((2, len(self.runs), self.carried)),
            scalars=self.scalars,
        )
        if self.device.type == "cuda":  # asked in every step, because it changes
            current = torch._C._cuda_getCurrentRawStream
            self.program.runner.stream = partial(current, self.device.index)
        self.sizes = [segment.param.size for segment in segments]
        halves = [HALVES.get(self.members[run[0]].param.dtype) for run in self.runs]
        self._halves = halves if len({*halves}) > 1 else halves[0]
        self.places = np.array([self.members[run[0]].place for run in self.runs])
        self._here = np.zeros(len(self.runs), np.int64)
        self._taken: list[Any] = []  # gradients that the runner looks at
        self._placed = False

    # A step ---------------------------------------------------------------------------

    def take(
        self, grads: Sequence[Any], addresses: Array, moved: bool, mixed: bool
    ) -> bool:
        """Take the gradients. Some may have ``moved`` since the last step. ``mixed``
        says that the dtypes of some are not those of their parameters. Return whether
        there are any."""
        if not self.plain:
            task = [grads[member.place] for member in self.members]
            self._know(np.array([grad is not None for grad in task]))
            if self.any or self.averaged or self.over_all:
                self._take_fitted([task])
        elif moved or not self._placed:
            np.take(addresses, self.places, out=self._here)
            self._know(self._here != 0)
            self._placed = self._place(grads, mixed)
            self.usual &= self._placed
        return self.any

    def _know(self, active: Array) -> None:
        self.active, self._mask = active, active.tobytes()
        self.any, self.all = bool(active.any()), bool(active.all())
        self.usual &= self.all

    def _place(self, grads: Sequence[Any], mixed: bool) -> bool:
        """Return whether the native step has noted where the gradients are, and need
        not be told again before they move."""
        runner = self.program.runner
        if "addresses" in runner.fuses and not mixed:
            if runner.place(self._here, self._halves):
                return True
        self._give([[grads[place] for place in self.places]])
        return False

    def take_gradients(self, gradients: Gradients) -> bool:
        """Take gradients that are not in ``.grad``. Return whether there are any."""
        tasks = [
            [task[member.place] for member in self.members] for task in gradients.tasks
        ]
        there = [
            any(g is not None for g in grads) for grads in zip(*tasks, strict=True)
        ]
        self._know(np.array(there))
        self._placed, self._gradients = False, gradients
        if self.any or self.averaged or self.over_all:
            self._take_fitted(tasks, gradients.weights)
        return self.any

    def _take_fitted(
        self, tasks: list[list[Any]], weights: list[float] | None = None
    ) -> None:
        """Take a gradient for each member and task, in any layout and dtype."""
        if not self.plain:
            self._copies = [copy(member, member.param) for member in self.members]
            self._bind(self._copies)

        def fit(member: Member, grad: Tensor | None) -> Tensor | None:
            if grad is None:
                return None
            if self.plain:
                return fitted(grad, member.param)
            check_device(member.param, grad)
            return copy(member, grad)

        self._give([list(map(fit, self.members, task)) for task in tasks], weights)

    def _give(self, tasks: list[list[Any]], weights: list[float] | None = None) -> None:
        """Give the runner the gradient of each run, for each task, or a copy of it. The
        tensors are those of the first member of each run."""
        shaped = self.rule.factored
        arrays = [
            [
                None if g is None else array(g, size, g.shape if shaped else (-1,))
                for g, size in zip(task, self.sizes, strict=True)
            ]
            for task in tasks
        ]
        self._taken = [tasks, arrays]  # arrays do not keep a tensor's memory
        runner = self.program.runner
        if not Gradients(arrays, weights).offer(runner):
            # A native runner does not take gradients that overlap what it writes.
            copies = [[copied(g) for g in task] for task in arrays]
            self._taken = copies
            Gradients(copies, weights).give(runner)

    def end(self) -> None:
        """After a step, note what the next one needs to know."""
        fuses = self.program.runner.fuses
        waits = self.rule.settle and ("decisions" not in fuses or self.over_all)
        self.usual = (
            self.all
            and self._placed
            and len(self.kinds) == 1
            and not (self.wave or self.carried or waits)
            and "step" in fuses
        )
        self._t = int(self.vectors[0].item(0))

    def forget(self) -> None:
        """Release the gradients."""
        self._taken, self._gradients = [], None
        if not self.plain:
            self._copies = []
            self.__dict__.pop("program", None)

    def is_finite(self, run: int, factor: float, grads: Sequence[Any]) -> bool:
        """Whether the gradients of a run are finite although their squares overflow.
        This happens in float64 only: other squares are summed in a wider dtype.
        ``grads`` are those of all parameters, for one task."""
        members = [self.members[i] for i in self.runs[run]]
        if members[0].dtype not in (torch.float64, torch.complex128):
            return False
        if self._gradients is not None:
            grads = [self._gradients.total(member.place) for member in members]
        else:
            grads = [grads[member.place] for member in members]
        return all(bool(torch.isfinite(grad * factor).all()) for grad in grads)

    def keys(self, values: Sequence[Values], factors: Sequence[float]) -> list[Key]:
        """Return the key of each run. It has the hyperparameters of the run's group,
        the factor for its gradients, its step count, and the numbers it carries."""
        now = self._bytes()
        if now != self._seen or self._mask != self._known:
            self._sort()
            self._seen, self._known = now, self._mask
        keys: list[Any] = [None] * len(self.runs)
        for group, first, runs in self.kinds:
            steps, *carried = [vector.item(first) for vector in self.vectors]
            row = values[group]
            if self.rule.factored and None in row:
                row = [self.eps if value is None else value for value in row]
            key = Key(int(steps) + 1, carried, row, factors[group])
            for run in runs:
                keys[run] = key
        return keys

    def follow(self, addresses: Array) -> bool:
        """Take new gradients at these addresses, if the last step was ``usual`` and
        they are like its own. Return whether they were taken."""
        return bool(self._placed and self.program.runner.follow(addresses, self.places))

    @property
    def goes_on(self) -> bool:
        """Whether the last step was ``usual``, and all members have done as many steps
        as then."""
        return self.usual and bool(
            self.program.runner.have_done(self.vectors[0], self._t)
        )

    def go_on(
        self,
        values: Sequence[Values],
        factors: Sequence[float],
        request: Request,
        attributes: dict[str, Any],
    ) -> tuple[Call, ...]:
        """Return the calls of a step like the last, if the part ``goes_on``: the host
        computes no more than scalars."""
        steps, runner = self.vectors[0], self.program.runner
        group, t = self.members[0].group, self._t + 1
        row = (factors[group], *self.scalars(t, *values[group])[: self.used])
        rows = [row] * (1 if "one row" in runner.fuses else len(self.runs))
        settles = self.rule.settle is not None
        numbers = [t] * len(rows) if self.program.draws or settles else None
        clips, on_device = request.clip_norm < math.inf, "decisions" in runner.fuses
        # On a device, compile and allocate here, before any part has stepped.
        if on_device and (clips or settles):
            calls = [runner.decided_by_host(rows, request, [t] * len(rows))]
            if clips:
                calls.append(partial(attributes.update, grad_norm=runner.norm))
        elif on_device:
            calls = runner.calls(rows, request, numbers)
        elif clips:
            of_norm = attributes, "grad_norm"
            calls = [partial(runner.limited, rows, request, numbers, *of_norm)]
        else:
            calls = [partial(runner, rows, request, numbers)]
        if self.names.steps is None:
            return tuple(calls)
        # If the step is not done, the next one finds other counts, and is planned.
        self._t = t
        return *calls, partial(steps.fill, t)

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
        self.kinds = [
            (group, self.runs[runs[0]][0], runs) for (group, *_), runs in kinds.items()
        ]

    def _check_steps(self) -> None:
        """Check the step counts, because a user may have written into the state."""
        steps = self.vectors[0]
        if not ((steps >= 0) & (steps == np.floor(steps)) & np.isfinite(steps)).all():
            for member, value in zip(self.members, steps.tolist(), strict=True):
                where = f"state[...][{self.names.steps!r}] of parameter {member.place}"
                state.check_steps(where, value)

    def sums(
        self, values: Sequence[Values], factors: Sequence[float], request: Request
    ) -> list[Sums]:
        """Measure each run for a rule with norms."""
        return self.program.sums(self.program.rows(self.keys(values, factors)), request)

    def update(
        self,
        values: Sequence[Values],
        factors: Sequence[float],
        request: Request,
        totals: Sequence[Sums] | None,
    ) -> list[Call]:
        """Return the calls that do the step. ``totals`` are what applies to each run of
        a rule with norms, if that is not what this part has measured."""
        rule, program = self.rule, self.program
        keys = self.keys(values, factors)
        if rule.factored:
            self._load_factors()
        if totals is None and self.decides(request):
            calls = [self._decided(keys, request)]
        else:
            calls = execute(program, keys, request, totals)
        carried = program.carried_next
        if self.carried and not self.over_all:
            for run in np.flatnonzero(~self.active):
                carried[run] = keys[run].carry
        steps = self.vectors[0] + (self.active | self.over_all)[self.run_of]
        if self.names.steps is None:
            np.minimum(steps, 1, out=steps)
        after = [steps]
        for column in carried.T:
            after.append(column[self.run_of])
            # Read it again after the step: a compiled settle writes it then.
            calls.append(partial(column.take, self.run_of, out=after[-1]))
        # The kinds fit the new state, unless settle changes what each run carries.
        settles = self.carried and rule.settle
        self._seen = (
            []
            if settles
            else [
                new.astype(old.dtype).tobytes()
                for old, new in zip(self.vectors, after, strict=True)
            ]
        )
        calls += [
            partial(operator.setitem, vector, ..., new)
            for vector, new in zip(self.vectors, after, strict=True)
        ]
        if rule.factored:
            calls += self._keep_factors()
        if not self.plain:
            copies = zip(self.members, self._copies, self.active, strict=True)
            for member, new, active in copies:
                calls += writing(member.param.detach(), new) if active else []
        return calls

    def decides(self, request: Request) -> bool:
        """Whether the device finds out what the norms of a step mean, so that the host
        need not wait for it."""
        runner = self.program.runner
        return "decisions" in runner.fuses and runner.decided_by(request) == "host"

    def _decided(self, keys: list[Key], request: Request) -> Call:
        """Return the call of a step that the device decides."""
        program = self.program
        rows = program.rows(keys)
        if self.carried:
            program.carried_next[:] = [row[-self.carried :] for row in rows]
        call: Call = program.runner.decided_by_host(
            rows, request, [key.t for key in keys]
        )
        return call

    def _load_factors(self) -> None:
        """Copy the averages of rows and columns from the state to the factors."""
        now = self.program.count.item(0) % 2
        for member in self.members:
            if member.factors is not None:
                rows, columns = (member.state[key] for key in FACTORS)
                kept = rows.squeeze(-1).cpu().numpy(), columns.squeeze(-2).cpu().numpy()
                member.factors.sets[now] = np.concatenate(kept, axis=-1)

    def _keep_factors(self) -> list[Call]:
        """Return the calls that copy the new averages to the state."""
        calls: list[Call] = []
        after = 1 - self.program.count.item(0) % 2
        for member, active in zip(self.members, self.active, strict=True):
            if member.factors is not None and active:
                averages = torch.from_numpy(member.factors.sets[after])
                rows, columns = averages.split(list(member.param.shape[-2:]), -1)
                state: dict[str, Tensor] = member.state
                calls += [
                    partial(state["row_var"].copy_, rows.unsqueeze(-1)),
                    partial(state["col_var"].copy_, columns.unsqueeze(-2)),
                ]
        return calls


def copy(member: Member, tensor: Tensor) -> Tensor:
    """Copy a parameter or its gradient to memory that kernels can work in."""
    param = member.param
    empty = torch.empty(param.shape, dtype=member.dtype, device=param.device)
    return empty.copy_(tensor.detach().resolve_neg())


def writing(param: Tensor, new: Tensor) -> list[Call]:
    """Return the calls that write new numbers into a parameter. Into a negated view,
    they are written in its dtype, because torch 2.13 forgets the sign if it copies from
    float32 to float16."""
    if not param.is_neg():
        return [partial(param.copy_, new)]
    same = torch.empty(param.shape, dtype=param.dtype, device=param.device)
    return [partial(same.copy_, new), partial(param.copy_, same)]


def copied(gradient: Any) -> Any:
    """Return a copy of a gradient as kernels take it, or None."""
    if isinstance(gradient, Encoded):
        return gradient._replace(parts=tuple(part.copy() for part in gradient.parts))
    return None if gradient is None else gradient.copy()


def stream(part: Part, member: Member, name: str, count: int | None = None) -> Any:
    """Return a buffer of a member's state as kernels take it."""
    key, format = part.names.key(name), member.chosen.get(name)
    scales = member.state.get(f"{key}_{formats.SCALE}")
    return formats.stream(member.state[key], format, scales, part.not_stored, count)


def estimate(part: Part, values: Sequence[Values], threads: int) -> list[Call]:
    """Return the calls that put an estimate into the state. The gradients are of
    another kind than those of a step."""
    estimate: Any = part.rule.estimate
    (buffer, rule), grads = estimate, []
    part._check_steps()
    tensors = [member.state[part.names.key(buffer)] for member in part.members]
    arrays = [stream(part, member, buffer) for member in part.members]
    keys = []
    program = bind_alone(part.module, rule, arrays, range(len(arrays)))
    for tensor, member, steps in zip(
        tensors, part.members, part.vectors[0], strict=True
    ):
        keys.append(Key(int(steps) + 1, (), values[member.group]))
        grad = local_gradient(member.owner.grad, member.owner)
        empty = torch.empty_like(tensor, dtype=member.dtype)
        grads.append(None if grad is None else empty.copy_(grad.detach().resolve_neg()))
    program.runner.take([None if grad is None else array(grad) for grad in grads])
    # An array does not keep a tensor's memory, so the last call holds the gradients.
    return [*execute(program, keys, plain(threads)), grads.clear]
