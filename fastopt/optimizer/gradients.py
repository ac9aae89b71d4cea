"""Gradients as they come, made into what a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastopt.backends.numpy_ref import combined
from fastopt.memory.arrays import to_host
from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array
from fastopt.optimizer import checks
from fastopt.optimizer.parameters import Parameters
from fastopt.step import Runner


def of_tasks(
    params: Parameters, grads: Any, weights: Any
) -> tuple[list[list[Any]], list[float]]:
    """The gradients of each of several tasks, lists, and their weights."""
    tasks = checks.split_tasks("grads", grads)
    gradients: list[list[Any]] = []
    for k, task in enumerate(tasks):
        gradients.append([])
        checks.collect(params.layout, task, "", gradients[k], f"grads[{k}]")
    return gradients, checks.check_weights(weights, len(tasks), params.arrays[0].dtype)


def take(
    params: Parameters,
    runner: Runner,
    tasks: list[list[Any]],
    spans: Sequence[tuple[int, int]],
    weights: list[float] | None = None,
) -> list[list[Any]]:
    """Give the gradients of each task to a runner, and return them as it took them. A
    runner that checks them itself takes plain arrays as they are. Otherwise each is
    converted and checked, which also finds the words for a refusal."""
    if "scalars" in runner.fuses:
        if runner.take(tasks[0] if weights is None else tasks, weights):
            return tasks
    fitting: list[list[Any]] = [
        [
            fit(params, i, grad, spans, "" if weights is None else f"[{k}]")
            for i, grad in enumerate(task)
        ]
        for k, task in enumerate(tasks)
    ]
    if not runner.take(fitting[0] if weights is None else fitting, weights):
        raise RuntimeError("the kernel refused gradients found to fit")
    return fitting


def check_writeable(
    params: Parameters, tasks: Sequence[Sequence[Any]], weights: Any
) -> None:
    """Check that the gradients can be set to zero."""
    names = [
        grad_name(params, i, "" if weights is None else f"[{k}]")
        for k, task in enumerate(tasks)
        for i in range(len(task))
    ]
    checks.check_writeable(names, [grad for task in tasks for grad in task])


def finite(
    grads: Sequence[Any], weights: Sequence[float] | None, grad_scale: float
) -> bool:
    """Whether the gradients of a parameter, one for each task, are finite together.
    This is asked where their squares are not: those of finite float64 may overflow."""
    there = [None if grad is None else to_host(grad) for grad in grads]
    if any(grad is not None and grad.dtype != np.float64 for grad in there):
        return False
    with np.errstate(all="ignore"):
        grad = np.asarray(combined(there, weights or [1.0]))
        return bool(np.isfinite(grad * grad_scale).all())


def grad_name(params: Parameters, i: int, task: str = "") -> str:
    """What messages call the gradient of the i-th parameter."""
    return "grads" + task + params.names[i].removeprefix("params")


def fit(
    params: Parameters,
    i: int,
    grad: Any,
    spans: Sequence[tuple[int, int]],
    task: str = "",
) -> Array | None:
    """The gradient of the i-th parameter as an array that the kernels can take."""
    if grad is None:
        return None
    of, name = params.names[i], grad_name(params, i, task)
    if isinstance(grad, FlatBuffer):  # one of the right layout is unpacked by now
        raise ValueError(
            f"{name} is a FlatBuffer of another layout than {of}; make it with the "
            f"parameters' zeros_like()"
        )
    array = checks.as_gradient(params.module, name, grad, params.arrays[i])
    checks.check_grad(name, array, of, params.arrays[i], spans)
    return array
