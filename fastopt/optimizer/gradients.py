"""Gradients as they come, made into what a step takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.backends.numpy_ref import combined
from fastopt.memory.arrays import to_host
from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array
from fastopt.memory.trees import leaves
from fastopt.optimizer import checks
from fastopt.optimizer.parameters import Parameters
from fastopt.step import Runner


class Gradients(NamedTuple):
    """The gradients of a step."""

    tasks: list[list[Any]]  # for each task, a gradient or None for each parameter
    weights: list[float] | None = None  # of the tasks; None: there is one

    def offer(self, runner: Runner) -> bool:
        """Let a runner take them. Return False if one needs a closer look."""
        tasks: list[Any] = self.tasks if self.weights else self.tasks[0]
        return runner.take(tasks, self.weights)

    def give(self, runner: Runner) -> None:
        """Let a runner take them, after that look."""
        if not self.offer(runner):
            raise RuntimeError("the kernel refused gradients found to fit")

    @property
    def labels(self) -> list[str]:
        """The names of the tasks in messages."""
        return [f"[{k}]" for k in range(len(self.tasks))] if self.weights else [""]

    def fitting(
        self, params: Parameters, spans: Sequence[tuple[int, int]]
    ) -> Gradients:
        """Convert and check each of them."""
        tasks = [
            [fit(params, i, grad, spans, label) for i, grad in enumerate(task)]
            for label, task in zip(self.labels, self.tasks, strict=True)
        ]
        return Gradients(tasks, self.weights)

    def check_writeable(self, params: Parameters) -> None:
        """Check that they can be set to zero."""
        places = range(len(params.arrays))
        names = [grad_name(params, i, label) for label in self.labels for i in places]
        checks.check_writeable(names, [grad for task in self.tasks for grad in task])

    def are_finite(self, i: int, grad_scale: float) -> bool:
        """Whether those of the i-th parameter are finite together. This is asked where
        their squares are not: those of finite float64 may overflow."""
        there = [None if task[i] is None else to_host(task[i]) for task in self.tasks]
        if any(grad is not None and grad.dtype != np.float64 for grad in there):
            return False
        with np.errstate(all="ignore"):
            grad = np.asarray(combined(there, self.weights or [1.0]))
            return bool(np.isfinite(grad * grad_scale).all())


def of_tasks(params: Parameters, grads: Any, weights: Any) -> Gradients:
    """Return the gradients of several tasks, as lists, with their weights."""
    tasks: list[list[Any]] = []
    for k, task in enumerate(checks.split_tasks("grads", grads)):
        tasks.append([])
        checks.collect(params.layout, task, "", tasks[k], f"grads[{k}]")
    dtype = params.dtype
    return Gradients(tasks, checks.check_weights(weights, len(tasks), dtype))


def take(
    params: Parameters,
    runner: Any,
    gradients: Gradients,
    spans: Sequence[tuple[int, int]],
) -> Gradients:
    """Give gradients to a runner, and return them as it took them. A runner that checks
    them itself takes plain arrays as they are. If it refuses, or does not check, each
    gradient is converted and checked here, where errors get their messages."""
    if "scalars" in runner.fuses and gradients.offer(runner):
        return gradients
    fitting = gradients.fitting(params, spans)
    fitting.give(runner)
    if "again" in runner.fuses and gradients.weights is None:
        runner.remember(gradients.tasks[0])
    return fitting


def grad_name(params: Parameters, i: int, task: str = "") -> str:
    """Return what messages call the gradient of the i-th parameter."""
    return "grads" + task + params.names[i].removeprefix("params")


def fit(
    params: Parameters,
    i: int,
    grad: Any,
    spans: Sequence[tuple[int, int]],
    task: str = "",
) -> Array | None:
    """Return the i-th parameter's gradient as an array that kernels can take."""
    if grad is None:
        return None
    of, name = params.names[i], grad_name(params, i, task)
    if isinstance(grad, FlatBuffer):  # one of the right layout is unpacked by now
        raise ValueError(
            f"{name} is a FlatBuffer of another layout than {of}; make it with the "
            f"parameters' zeros_like()"
        )
    try:
        array = checks.as_gradient(params.module, name, grad, params.arrays[i])
    except TypeError as error:
        flats = any(isinstance(tree, FlatBuffer) for _, tree in leaves(params.trees))
        if flats and isinstance(grad, (Mapping, list, tuple)):
            raise TypeError(
                f"{name} must be a FlatBuffer, like {of}, got {type(grad).__name__}; "
                f"make one with grads = flat.zeros_like(), and write into its arrays"
            ) from error
        raise
    checks.check_grad(name, array, of, params.arrays[i], spans)
    return array
