"""Steps during the backward pass: a gradient is gone before the next one comes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastopt.optimizer.refusals import named
from fastopt.torch.dtensors import are_there
from fastopt.torch.step import Stepping


class Released:
    """What takes the hooks off again.

    Examples
    --------
    >>> import torch, fastopt.torch
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> handle = fastopt.torch.release_gradients_(fastopt.torch.SGD([w], lr=0.5))
    >>> handle.remove()
    >>> w.sum().backward()  # no step
    >>> w.grad
    tensor([1., 1.])
    """

    def __init__(self, handles: list[Any]):
        self._handles = handles

    def remove(self) -> None:
        """Take them off: gradients stay, and ``step()`` uses them."""
        for handle in self._handles:
            handle.remove()


def release_gradients_(optimizer: Stepping) -> Released:
    """Let the optimizer step each parameter as soon as its gradient is complete, and
    free the gradient: of all gradients, only few are in memory at a time.

    Parameters
    ----------
    optimizer
        One of ``fastopt.torch``, for parameters that have no gradients in parts: each
        ``backward()`` is a step. Its ``step()`` has nothing left to do, and may be
        called as schedulers expect it. GradScaler cannot be used.

    Returns
    -------
    A handle, whose ``remove()`` ends it.

    Raises
    ------
    TypeError, ValueError
        For an optimizer whose steps need all gradients at once: ``clip_norm``,
        ``nonfinite="skip"``, rules with norms over all parameters (``Prodigy``).

    Examples
    --------
    >>> import torch, fastopt.torch
    >>> model = torch.nn.Linear(2, 1)
    >>> opt = fastopt.torch.AdamW(model.parameters(), lr=0.1)
    >>> handle = fastopt.torch.release_gradients_(opt)
    >>> model(torch.ones(1, 2)).sum().backward()  # the step, too
    >>> model.weight.grad is None
    True
    """
    if not isinstance(optimizer, Stepping):
        raise TypeError(
            f"optimizer must be one of fastopt.torch, whose parameters can be updated "
            f"one by one, got {named(optimizer)}; make one, as in "
            f"fastopt.torch.AdamW(params)"
        )
    optimizer.check_single_steps()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if are_there(params):
        raise TypeError(
            "release_gradients_ takes no DTensors, whose gradients are complete only "
            "after the backward pass of all processes; call step() after it"
        )
    handles = [
        param.register_post_accumulate_grad_hook(stepping(weakref.ref(optimizer)))
        for param in params
        if param.requires_grad
    ]
    return Released(handles)


def stepping(of: Callable[[], Stepping | None]) -> Callable[[Tensor], None]:
    """Return the hook, which does not keep the optimizer alive."""

    def hook(param: Tensor) -> None:
        optimizer = of()
        if optimizer is not None:
            optimizer.step_param(param)
            param.grad = None

    return hook
