"""Gradients that are not in ``.grad``: those of several tasks, and accumulated sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt import backends
from fastopt.optimizer import checks, gradients
from fastopt.optimizer.state import bind_alone
from fastopt.rule import shown
from fastopt.rules import passes
from fastopt.step import Key, Program, execute, plain
from fastopt.torch import dtensors, memory
from fastopt.torch.flat import in_flat_buffer
from fastopt.torch.memory import (
    COMPUTED,
    HALVES,
    NUMPY,
    array,
    check_gradient,
    computed,
    same_layout,
)
from fastopt.torch.turns import Call


class Gradients(gradients.Gradients):
    """Gradients that a step takes in place of those in ``.grad``."""

    __slots__ = ()

    @property
    def first(self) -> list[Tensor | None]:
        """The first gradient of each parameter, or None if no task has one."""
        of_params = zip(*self.tasks, strict=True)
        return [next((g for g in of if g is not None), None) for of in of_params]

    def total(self, place: int) -> Any:
        """Return the weighted sum of the gradients of a parameter."""
        weights = self.weights or [1.0]
        pairs = zip((task[place] for task in self.tasks), weights, strict=True)
        return sum(g * weight for g, weight in pairs if g is not None and weight)


def of_tasks(params: Sequence[Tensor], grads: Any, weights: Any) -> Gradients:
    """Check the arguments ``grads`` and ``weights`` of ``step``."""
    if grads is None:
        raise TypeError("weights need the gradients of each task: step(grads=...)")
    tasks = [grads] if weights is None else grads
    if isinstance(tasks, (Tensor, str)) or not isinstance(tasks, Sequence):
        raise TypeError(
            f"grads must be a list with the gradients of each task, got {shown(tasks)}"
        )
    lists = []
    for k, task in enumerate(tasks):
        name = "grads" if weights is None else f"grads[{k}]"
        if isinstance(task, (Tensor, str)) or not isinstance(task, Sequence):
            raise TypeError(
                f"{name} must be a list with a gradient, or None, for each parameter, "
                f"got {shown(task)}"
            )
        if len(task) != len(params):
            raise ValueError(
                f"{name} has {len(task)} gradients for {len(params)} parameters; pass "
                f"None for a parameter that has none"
            )
        for i, grad in enumerate(task):
            if grad is not None and not isinstance(grad, Tensor):
                raise TypeError(
                    f"{name}[{i}] must be a tensor or None, got {shown(grad)}; "
                    f"gradients of several tasks need weights="
                )
        lists.append(list(task))
    if weights is not None:
        if isinstance(weights, Tensor):
            weights = weights.detach().tolist()
        dtypes = {NUMPY[COMPUTED.get(p.dtype, torch.float64)] for p in params}
        for dtype in sorted(dtypes, key=lambda dtype: dtype.itemsize):
            weights = checks.check_weights(weights, len(lists), dtype)
    return Gradients(lists, weights)


def of_shards(
    gradients: Gradients, params: Sequence[Tensor], zero_grads: bool
) -> Gradients:
    """Return gradients of DTensors as this process's shards."""
    if not dtensors.are_there(params):
        return gradients
    pairs = [
        pair for task in gradients.tasks for pair in zip(task, params, strict=True)
    ]
    if zero_grads and not all(dtensors.fits(*pair) for pair in pairs):
        raise ValueError(
            "zero_grads cannot set gradients to zero that are divided otherwise than "
            "their parameters, because the step takes copies; redistribute() them first"
        )
    tasks = [
        [dtensors.local_gradient(*pair) for pair in zip(task, params, strict=True)]
        for task in gradients.tasks
    ]
    return gradients._replace(tasks=tasks)


class Sums:
    """Sums of gradients for the next step, in the dtype of the state. The sum of a
    parameter is made when its first gradient comes."""

    def __init__(self, params: Sequence[Tensor]):
        self.params = list(params)
        self.tensors: list[Tensor | None] = [None] * len(self.params)
        # Which parameters got a gradient since the last step.
        self.received = np.zeros(len(self.params), bool)
        self.programs: list[tuple[list[int], Program]] = []

    def __getstate__(self) -> Any:
        return self.params, self.gradients.tasks[0]

    def __setstate__(self, state: Any) -> None:
        params, sums = state
        self.__init__(params)  # type: ignore[misc]
        self.restore(sums)

    def _make(self, places: Sequence[int]) -> None:
        """Make sums for those of these parameters that have none."""
        lacking = [i for i in places if self.tensors[i] is None]
        for i in lacking:
            param = self.params[i]
            self.tensors[i] = torch.zeros_like(
                param, dtype=computed(param), requires_grad=False
            )
        if not lacking:
            return
        alike: dict[Any, list[int]] = {}
        for i, total in enumerate(self.tensors):
            if total is not None:
                alike.setdefault((total.dtype, total.device), []).append(i)
        self.programs = []
        for of_kind in alike.values():
            arrays = [array(self.tensors[i]) for i in of_kind]
            on_gpu = memory.on_gpu(self.tensors[of_kind[0]])
            choice = backends.choose(passes.accumulate, on_gpu)
            program = bind_alone(backends.load(choice), passes.accumulate, arrays)
            self.programs.append((of_kind, program))

    @property
    def dtype(self) -> Any:
        """The narrowest dtype of the sums. Factors must be finite in it."""
        known = [COMPUTED[p.dtype] for p in self.params if p.dtype in COMPUTED]
        return NUMPY[torch.float32 if torch.float32 in known else torch.float64]

    def fit(self, params: Sequence[Tensor]) -> bool:
        """Whether the sums fit these parameters as they are now."""
        return [*map(id, params)] == [*map(id, self.params)] and all(
            total is None
            or (total.shape, total.device, total.dtype)
            == (param.shape, param.device, computed(param))
            for total, param in zip(self.tensors, params, strict=True)
        )

    def check(self, params: Sequence[Tensor]) -> None:
        """Refuse parameters that the sums do not fit."""
        if not self.fit(params):
            raise RuntimeError(
                "parameters were added or changed since gradients were accumulated; "
                "step before, or drop_accumulated()"
            )

    @property
    def gradients(self) -> Gradients:
        pairs = zip(self.tensors, self.received.tolist(), strict=True)
        task = [total if received else None for total, received in pairs]
        return Gradients([task])

    def restore(self, saved: Sequence[Tensor | None]) -> None:
        """Load sums that were saved."""
        if len(saved) != len(self.params) or any(
            total is not None and getattr(total, "shape", None) != param.shape
            for total, param in zip(saved, self.params, strict=True)
        ):
            raise ValueError(
                f"the accumulated gradients of the state must be, for each of "
                f"{len(self.params)} parameters, a tensor of its shape or None; "
                f"nothing was loaded"
            )
        self._make([i for i, total in enumerate(saved) if total is not None])
        for i, (tensor, total) in enumerate(zip(self.tensors, saved, strict=True)):
            if tensor is not None and total is not None:
                self.received[i] = True
                tensor.copy_(total)

    def adding(self, factor: float, threads: int) -> list[Call]:
        """Return the calls that add the gradients in ``.grad``, times a factor, and
        reset them."""
        grads = [param.grad for param in self.params]
        places = [i for i, grad in enumerate(grads) if grad is not None]
        for i in places:
            check_gradient(self.params[i], grads[i])
        self._make(places)
        calls: list[Call] = []
        for of_kind, program in self.programs:
            pairs = [(grads[i], self.tensors[i]) for i in of_kind]
            fitting = [None if g is None else fitted(g, like) for g, like in pairs]
            arrays = [None if g is None else array(g) for g in fitting]
            Gradients([arrays]).give(program.runner)
            calls += execute(program, [Key(1, (), (), factor)], plain(threads))
            # An array does not keep a tensor's memory, so a later call holds these.
            calls.append(fitting.clear)
        received = self.received | [grad is not None for grad in grads]
        calls.append(partial(self.received.__setitem__, ..., received))
        for i in places:
            param, grad = self.params[i], grads[i]
            reset = partial(setattr, param, "grad", None)
            calls.append(grad.zero_ if in_flat_buffer(grad) else reset)
        return calls

    def emptying(self) -> list[Call]:
        """Return the calls that set the sums to zero."""
        return [
            *[tensor.zero_ for tensor in self.gradients.tasks[0] if tensor is not None],
            partial(self.received.fill, False),
        ]


def is_left(grad: Tensor | None) -> bool:
    """Whether ``.grad`` has a gradient that was not accumulated and is not zero."""
    if grad is None:
        return False
    return grad.layout is not torch.strided or bool(grad.detach().any())


def fitted(grad: Tensor, like: Tensor) -> Tensor:
    """Return a gradient in the layout of another tensor and in the dtype that kernels
    compute in for it, copied if it has others. One of 16 bits that kernels decode stays
    as it is."""
    dtype = computed(like)
    encoded = dtype is torch.float32 and grad.dtype in HALVES
    if same_layout(grad, like, grad.dtype if encoded else dtype):
        return grad.detach()
    memory.check_device(like, grad)
    empty = torch.empty_like(like, dtype=dtype, requires_grad=False)
    # Otherwise, torch 2.13 forgets the sign of a negated view of float16.
    return empty.copy_(grad.detach().resolve_neg())
