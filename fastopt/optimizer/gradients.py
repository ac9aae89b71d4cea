"""Gradients as they come, made into what a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastopt.backends.numpy_ref import Step
from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array
from fastopt.optimizer import checks
from fastopt.optimizer.parameters import Parameters


def of_tasks(
    params: Parameters, grads: Any, weights: Any
) -> tuple[list[list[Any]], list[float]]:
    """The gradients of each of several tasks, lists, and their weights."""
    tasks = checks.split_tasks("grads", grads)
    found: list[list[Any]] = []
    for k, task in enumerate(tasks):
        found.append([])
        checks.collect(params.layout, task, "", found[k], f"grads[{k}]")
    return found, checks.check_weights(weights, len(tasks), params.arrays[0].dtype)


def take(
    params: Parameters,
    step: Step,
    found: list[Any],
    spans: Sequence[tuple[int, int]],
    weights: list[float] | None = None,
) -> list[Any]:
    """Give gradients to a step: as they are, if it checks them itself and they are
    plain arrays that fit; else after a look at each, which finds the words for a
    refusal. With weights, a list for each task."""
    if hasattr(step, "at") and step.take(found, weights):
        return found
    fitting: list[Any] = (
        [fit(params, i, grad, spans) for i, grad in enumerate(found)]
        if weights is None
        else [
            [fit(params, i, grad, spans, f"[{k}]") for i, grad in enumerate(task)]
            for k, task in enumerate(found)
        ]
    )
    if not step.take(fitting, weights):
        raise RuntimeError("the kernel refused gradients found to fit")
    return fitting


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
