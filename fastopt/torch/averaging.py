"""Parameters that are evaluated elsewhere than they are trained, as those of the
schedule-free rules: ``train()`` and ``eval()``, as their authors' classes have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import setitem
from typing import Any

import torch
from torch import Tensor

from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call
from fastopt.torch.dtensors import local, locals_of, on_shard
from fastopt.torch.state import TRAINED, evaluated, has_begun
from fastopt.torch.step import Stepping


class Averaging(Stepping):
    """An optimizer whose rule has parameters to evaluate. It is made in train mode."""

    _evaluating = False

    def eval(self) -> None:
        """Put into the parameters what ``eval_params()`` returns, to evaluate and to
        save them, until :meth:`train`. What they are in training goes to the state,
        under "trained". Steps are refused meanwhile, since gradients of these
        parameters are not what the rule works with."""
        self._switch(True, self._to_average)

    def train(self) -> None:
        """Put back what the parameters are in training, exactly. If they were changed
        since :meth:`eval`, the change is added."""
        self._switch(False, self._to_trained)

    @standard
    def _switch(
        self, evaluating: bool, change: Callable[[Tensor, dict[str, Any]], list[Call]]
    ) -> None:
        """Change the mode and all parameters, at the same instant."""

        def calls() -> list[Call]:
            # Without plans, so that the next step asks for the mode.
            mode: dict[str, Any] = {
                "_evaluating": evaluating,
                "_plan": None,
                "_plans": {},
            }
            changes = [call for of in self._all() for call in change(*of)]
            return [*changes, partial(self.__dict__.update, mode)]

        with torch.no_grad():
            self._change(calls)

    def _to_average(self, param: Tensor, group: dict[str, Any]) -> list[Call]:
        state = self.state.get(param)
        rule = self._rule(group)
        if not has_begun(state, rule, self._names) or TRAINED in state:
            return []
        values = self._values(group, rule)
        average = on_shard(evaluated, param, state, rule, self._names, values)
        return [
            partial(setitem, state, TRAINED, param.detach().clone()),
            partial(local(param).copy_, local(average)),
        ]

    def _to_trained(self, param: Tensor, group: dict[str, Any]) -> list[Call]:
        state = self.state.get(param)
        if not state or TRAINED not in state:
            return []
        values = self._values(group, self._rule(group))
        here, of = local(param), locals_of(state, param)
        trained = of[TRAINED].to(here.device, here.dtype)
        average = evaluated(trained, of, self._rule(group), self._names, values)
        same = torch.isclose(here, average, rtol=0, atol=0, equal_nan=True)
        back = torch.where(same, trained, trained + (here - average))
        return [partial(here.copy_, back), partial(state.pop, TRAINED)]

    def _check_mode(self) -> None:
        if self._evaluating:
            raise RuntimeError(
                f"{type(self).__name__} is in eval mode, in which its parameters are "
                f"those to evaluate; call train() before the forward pass of a step"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._evaluating = any(TRAINED in state for _, state in self._entries())
