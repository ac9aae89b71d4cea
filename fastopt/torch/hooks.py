"""What torch does around a step: hooks, and the profiler's label."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.optim import optimizer as torchs


def hooked_step(func: Callable[..., Any]) -> Callable[..., Any]:
    """Call hooks and set the profiler's label around a step, as torch does. The label
    is set only if there is a profiler, because it takes as long as a small step."""
    before = torchs._global_optimizer_pre_hooks
    after = torchs._global_optimizer_post_hooks
    profiled = torch.autograd._profiler_enabled

    @functools.wraps(func)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if profiled():
            label = f"Optimizer.step#{type(self).__name__}.step"
            with torch.autograd.profiler.record_function(label):
                return hooked(self, *args, **kwargs)
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if own or before or after:
            return hooked(self, *args, **kwargs)
        return func(self, *args, **kwargs)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        own = self._optimizer_step_pre_hooks
        for hook in chain(before.values(), own.values()):
            changed = hook(self, args, kwargs)
            if changed is None:
                continue
            if not isinstance(changed, tuple) or len(changed) != 2:
                raise RuntimeError(
                    f"{func} must return None or a tuple of (new_args, "
                    f"new_kwargs), but got {changed}."
                )
            args, kwargs = changed
        out = func(*args, **kwargs)
        self._optimizer_step_code()
        own = self._optimizer_step_post_hooks
        for hook in chain(own.values(), after.values()):
            hook(self, args, kwargs)
        return out

    return step
