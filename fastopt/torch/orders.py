"""What is asked of a step, and what has been read of the groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastopt.rule import Rule
from fastopt.step import Request
from fastopt.torch.counts import Scaler
from fastopt.torch.gradients import Gradients
from fastopt.torch.state import Values

# Of each group the rule, its hyperparameters, and the sign of its gradients.
Read = tuple[list[Rule], Sequence[Values], list[float]]


class Order(NamedTuple):
    """A step that was asked for."""

    request: Request
    scale: float = 1.0  # for the gradients
    single: Tensor | None = None  # the parameter to update; None: all of them
    gradients: Gradients | None = None  # in place of those in ``.grad``
    summed: bool = False  # whether these are accumulated sums
    scaler: Scaler | None = None  # what has not been read: no ``scale`` yet

    def entries(self, state: dict[Any, Any]) -> dict[Any, Any]:
        """The entries of the state that the step uses."""
        if self.single is None:
            return state
        return {self.single: state[self.single]} if self.single in state else {}
