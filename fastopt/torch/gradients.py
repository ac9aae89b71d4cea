"""Gradients that are not in ``.grad``: those of several tasks, and accumulated sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastopt import backends
from fastopt.optimizer import checks
from fastopt.optimizer.state import bind_alone
from fastopt.rule import shown
from fastopt.rules import passes
from fastopt.step import Key, Program, execute, plain
from fastopt.torch.flat import in_flat_buffer
from fastopt.torch.memory import COMPUTED, NUMPY, array, same_layout
from fastopt.torch.turns import Call


class Gradients(NamedTuple):
    """What a step takes in place of the gradients in ``.grad``."""

    tasks: list[list[Tensor | None]]  # for each task, a gradient for each parameter
    weights: list[float] | None  # of the tasks; None: there is one

    @property
    def first(self) -> list[Tensor | None]:
        """For each parameter, the first gradient that there is."""
        of_params = zip(*self.tasks, strict=True)
        return [next((g for g in of if g is not None), None) for of in of_params]

    def total(self, place: int) -> Any:
        """The weighted sum of the gradients of a parameter."""
        weights = self.weights or [1.0]
        pairs = zip((task[place] for task in self.tasks), weights, strict=True)
        return sum(grad * weight for grad, weight in pairs if grad is not None)


def of_tasks(params: Sequence[Tensor], grads: Any, weights: Any) -> Gradients:
    """Check what ``step`` was given as ``grads`` and ``weights``."""
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
                raise TypeError(f"{name}[{i}] must be a tensor or None, got {grad!r}")
        lists.append(list(task))
    if weights is not None:
        dtypes = {NUMPY[COMPUTED.get(p.dtype, torch.float64)] for p in params}
        for dtype in sorted(dtypes, key=lambda dtype: dtype.itemsize):
            weights = checks.check_weights(weights, len(lists), dtype)
    return Gradients(lists, weights)


class Sums:
    """Sums of gradients, in the dtype of the computation, until a step takes them."""

    def __init__(self, params: Sequence[Tensor]):
        self.params = list(params)
        self.tensors = [
            torch.zeros_like(param, dtype=computed(param), requires_grad=False)
            for param in self.params
        ]
        self.given = np.zeros(len(self.params), bool)
        alike: dict[Any, list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            alike.setdefault((tensor.dtype, tensor.device), []).append(i)
        self.programs: list[tuple[list[int], Program]] = []
        for places in alike.values():
            arrays = [array(self.tensors[i]) for i in places]
            on_device = not self.tensors[places[0]].is_cpu
            module = backends.load(backends.choose(passes.accumulate, on_device))
            program = bind_alone(module, passes.accumulate, arrays)
            self.programs.append((places, program))

    def __getstate__(self) -> Any:
        return self.params, self.tensors, self.given

    def __setstate__(self, state: Any) -> None:
        params, tensors, given = state
        self.__init__(params)  # type: ignore[misc]
        self.restore([t if g else None for t, g in zip(tensors, given, strict=True)])

    @property
    def dtype(self) -> Any:
        """The narrowest dtype among the sums, which factors must be finite in."""
        dtypes = [NUMPY[COMPUTED[tensor.dtype]] for tensor in self.tensors]
        return min(dtypes, key=lambda dtype: dtype.itemsize, default=np.dtype("f4"))

    def check(self, params: Sequence[Tensor]) -> None:
        """Check that they are of these parameters."""
        if [*map(id, params)] != [*map(id, self.params)]:
            raise RuntimeError(
                "parameters were added since gradients were accumulated; step before, "
                "or drop_accumulated()"
            )

    @staticmethod
    def lacks(grad: Tensor | None) -> bool:
        """Whether a gradient has something that was not added."""
        if grad is None:
            return False
        return not in_flat_buffer(grad) or bool(grad.any())

    @property
    def gradients(self) -> Gradients:
        pairs = zip(self.tensors, self.given.tolist(), strict=True)
        return Gradients([[total if given else None for total, given in pairs]], None)

    def restore(self, saved: Sequence[Tensor | None]) -> None:
        """Take over sums that were saved."""
        wanted = [tensor.shape for tensor in self.tensors]
        shapes = [s if s is None else getattr(s, "shape", None) for s in saved]
        if len(shapes) != len(wanted) or any(
            value is not None and shape != there
            for value, shape, there in zip(saved, shapes, wanted, strict=True)
        ):
            raise ValueError(
                f"the accumulated gradients of the state must be, for each of "
                f"{len(wanted)} parameters, a tensor of its shape or None; nothing was "
                f"loaded"
            )
        for i, (tensor, value) in enumerate(zip(self.tensors, saved, strict=True)):
            self.given[i] = value is not None
            if value is not None:
                tensor.copy_(value)

    def adding(self, factor: float, threads: int) -> list[Call]:
        """Return the calls that add what is in ``.grad``, times a factor, and reset
        it."""
        grads = [param.grad for param in self.params]
        calls: list[Call] = []
        for places, program in self.programs:
            pairs = [(grads[i], self.tensors[i]) for i in places]
            fitting = [None if g is None else fitted(g, like) for g, like in pairs]
            arrays = [None if g is None else array(g) for g in fitting]
            if not program.runner.take(arrays):
                raise RuntimeError("the kernel refused gradients found to fit")
            calls += execute(program, [Key(1, (), (), factor)], plain(threads))
            # Arrays do not keep a tensor's memory.
            calls.append(partial(len, fitting))
        given = self.given | [grad is not None for grad in grads]
        calls.append(partial(self.given.__setitem__, ..., given))
        for param, grad in zip(self.params, grads, strict=True):
            if grad is not None and in_flat_buffer(grad):
                calls.append(grad.zero_)
            elif grad is not None:
                calls.append(partial(setattr, param, "grad", None))
        return calls

    def emptying(self) -> list[Call]:
        """Return the calls that set the sums to zero."""
        return [
            *[tensor.zero_ for tensor in self.gradients.tasks[0] if tensor is not None],
            partial(self.given.fill, False),
        ]


def computed(param: Tensor) -> torch.dtype:
    """The dtype that steps of a parameter compute in, complex for complex ones."""
    return param.dtype if param.is_complex() else COMPUTED[param.dtype]


def fitted(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient in the layout and dtype of another tensor: itself, or a copy."""
    if same_layout(grad, like):
        return grad.detach()
    return torch.empty_like(like, requires_grad=False).copy_(grad.detach())
