"""Parts whose steps are counted on a GPU: by the kernels, in the tensors of the state.

The host then need not know whether a step was skipped, so it does not wait for the flag
of a GradScaler or for a norm. A step can be captured in a graph, which repeats it
without the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt.runtime.arithmetic import standard
from fastopt.step import Request, Sums
from fastopt.torch import memory, state
from fastopt.torch.part import Part
from fastopt.torch.state import Kind, Names, Values
from fastopt.torch.turns import Call


class Uncountable(Exception):
    """Raised if kernels cannot compute the scalars of a rule."""


class Scaler(NamedTuple):
    """Tensors that torch's GradScaler leaves in an optimizer for a step, or None."""

    found: Any  # not 0 if a gradient is not finite
    scale: Any  # by what the gradients are to be divided

    @property
    def on_gpu(self) -> bool:
        there = [value for value in self if value is not None]
        return all(isinstance(v, Tensor) and memory.on_gpu(v) for v in there)

    @standard
    def factor(self) -> float | None:
        """Return the factor for the gradients, or None if the step is to be skipped.
        This waits for the GPU."""
        if self.found is not None and float(self.found):
            return None
        return 1.0 if self.scale is None else 1 / float(self.scale)


NO_SCALER = Scaler(None, None)


def is_countable(kind: Kind) -> bool:
    """Whether a GPU can count the steps of these members."""
    rule, first = kind.rule, kind.members[0]
    carried = kind.names.carried(rule)
    return (
        memory.on_gpu(first.param)
        and first.plain
        and not (rule.factored or kind.is_over_all or carried or rule.carry)
    )


def are_counted(entries: Sequence[tuple[Tensor, dict[str, Any]]], names: Names) -> bool:
    """Whether a GPU has counted the steps in these entries of the state."""
    for _, entry in entries:
        steps = entry.get(names.steps or state.BEGUN)
        if isinstance(steps, Tensor):
            return memory.on_gpu(steps)
    return False


def device_counts(kind: Kind) -> Tensor:
    """Return the steps that each member has done as a vector of float32 on the GPU. The
    0-d tensors in the state, which torch has there for ``capturable`` and ``fused``
    steps, are views of it. Nothing is read back."""
    key, members = kind.names.steps or state.BEGUN, kind.members
    device = members[0].param.device
    before = [0.0] * len(members)
    if kind.names.steps is None:
        before = list(map(float, state.has_buffer(kind)))
        if not kind.rule.state:
            return torch.tensor(before, dtype=torch.float32, device=device)
    entries: list[Any] = [member.state.get(key) for member in members]
    if are_views(entries):
        vector: Tensor = entries[0].as_strided((len(entries),), (1,))
        return vector
    there = [isinstance(entry, Tensor) and memory.on_gpu(entry) for entry in entries]
    numbers = []
    for i, (member, entry, on_gpu) in enumerate(
        zip(members, entries, there, strict=True)
    ):
        if entry is not None and not on_gpu:
            where = f"state[...][{key!r}] of parameter {member.place}"
            state.check_steps(where, entry)
        numbers.append(before[i] if entry is None else 0.0 if on_gpu else float(entry))
    vector = torch.tensor(numbers, dtype=torch.float32, device=device)
    for member, entry, on_gpu, view in zip(
        members, entries, there, vector.unbind(), strict=True
    ):
        if on_gpu:
            view.copy_(entry.detach().reshape(()))
        member.state[key] = view
    return vector


def are_views(entries: Sequence[Any]) -> bool:
    """Whether these are numbers of float32 that follow one another in one storage of a
    GPU."""
    first = entries[0]
    return all(
        type(entry) is Tensor
        and memory.on_gpu(entry)
        and entry.dtype is torch.float32
        and entry.dim() == 0
        and entry.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and entry.data_ptr() == first.data_ptr() + 4 * i
        for i, entry in enumerate(entries)
    )


class CountedPart(Part):
    """A part whose steps a GPU counts.

    Its members are not merged into runs, because the host does not know whether they
    have done as many steps. Before a step, ``heed`` says which tensors it depends on.
    Their numbers are copied to memory of the part's own, where kernels find them.
    """

    def __init__(self, kind: Kind, wave: int = 0):
        from fastopt.backends.cuda_decisions import Counts

        super().__init__(kind, wave)
        self.groups = list(dict.fromkeys(member.group for member in self.members))
        row_of = {group: row for row, group in enumerate(self.groups)}
        rows = [row_of[member.group] for member in self.members]
        self._counts = Counts(self.steps.data_ptr(), tuple(rows))
        self._copies_of: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._scaler, self._lrs = NO_SCALER, list[Tensor | None]()

    def _count(self, kind: Kind) -> None:
        self.vectors, self.steps = [], device_counts(kind)

    def uniform(self) -> bool:
        return True

    def heed(self, scaler: Scaler | None, lrs: Sequence[Tensor | None]) -> None:
        """Note what the next step depends on besides gradients: what a GradScaler has
        left, and the learning rates that are on the GPU, by groups."""
        self._scaler = scaler or NO_SCALER
        self._lrs = [lrs[group] for group in self.groups]

    def update(
        self,
        values: Sequence[Values],
        factors: Sequence[float],
        request: Request,
        totals: Sequence[Sums] | None,
    ) -> list[Call]:
        places, calls = self._places(values)
        call = self.program.runner.decided_by_device(
            [values[group] for group in self.groups],
            [factors[group] for group in self.groups],
            request,
            places,
            self._counts,
        )
        if call is None:
            raise Uncountable
        return [*calls, call]

    def _places(self, values: Sequence[Values]) -> tuple[Any, list[Call]]:
        """Return where kernels find numbers, and the calls that copy them there."""
        from fastopt.backends.cuda_decisions import Places

        calls: list[Call] = []
        found, scale, lr = 0, 0, 0
        if self._scaler.found is not None:
            found, (view,) = self._copied("found", 1, torch.float32)
            calls.append(copying(view, self._scaler.found))
        if self._scaler.scale is not None:
            scale, (view,) = self._copied("scale", 1, torch.float32)
            calls.append(copying(view, self._scaler.scale))
        if any(tensor is not None for tensor in self._lrs):
            lr, views = self._copied("lr", len(self._lrs), torch.float64)
            column = list(self.rule.hyperparameters).index("lr")
            for i, (view, tensor) in enumerate(zip(views, self._lrs, strict=True)):
                number = values[self.groups[i]][column]
                if tensor is not None:
                    calls.append(copying(view, tensor))
                else:  # in every step, because a graph may have filled in another
                    calls.append(partial(view.fill_, number))
        return Places(found, scale, lr, "float64" if lr else ""), calls

    def _copied(
        self, name: str, count: int, dtype: torch.dtype
    ) -> tuple[int, list[Tensor]]:
        """Return the address of a vector, and its elements."""
        if name not in self._copies_of:
            memory.refuse_capture(member.param for member in self.members)
            vector = torch.zeros(count, dtype=dtype, device=self.device)
            self._copies_of[name] = vector, list(vector.unbind())
        vector, views = self._copies_of[name]
        return vector.data_ptr(), views

    def end(self) -> None:
        self.usual = self.all and self._placed and not self.wave

    @property
    def goes_on(self) -> bool:
        return self.usual

    def go_on(
        self,
        values: Sequence[Values],
        factors: Sequence[float],
        request: Request,
        attributes: dict[str, Any],
    ) -> tuple[Call, ...]:
        return tuple(self.update(values, factors, request, None))


def copying(to: Tensor, number: Tensor) -> Call:
    """Return the call that copies a number within the GPU."""
    return partial(to.copy_, number.detach().reshape(()))


def noting(
    parts: Sequence[CountedPart], request: Request, own: dict[str, Any]
) -> list[Call]:
    """Return the calls that note in an optimizer's attributes which runner knows the
    norm, and which knows how many steps were skipped. If a norm is needed, there is
    only one part."""
    if memory.is_captured(part.steps for part in parts):
        # A graph uses their memory after they have been replaced.
        own.setdefault("_captured", []).extend(parts)
    if not request.needs_norm:
        return []
    runner = parts[0].program.runner
    calls: list[Call] = [partial(own.update, grad_norm=runner.norm)]
    tellers = own.get("_tellers", ())
    if request.nonfinite == "skip" and runner not in tellers:
        # Two, because steps with gradients in ``.grad`` and others may take turns.
        for teller in tellers[:-1]:
            own["skipped"] += teller.skips()
        calls.append(partial(own.update, _tellers=(*tellers[-1:], runner)))
    return calls
