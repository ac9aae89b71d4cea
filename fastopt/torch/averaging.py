"""Parameters that are evaluated elsewhere than they are trained, as those of the
schedule-free rules: ``train()`` and ``eval()``, as their authors' classes have them."""

from __future__ import annotations

from functools import partial
from operator import setitem
from typing import Any

import torch

from fastopt.atomic import uninterrupted
from fastopt.torch.state import TRAINED, evaluated
from fastopt.torch.step import Stepping


class Averaging(Stepping):
    """An optimizer whose rule has parameters to evaluate. It is made in train mode."""

    _evaluating = False

    def eval(self) -> None:
        """Put into the parameters what ``eval_params()`` returns, to evaluate and to
        save them, until :meth:`train`. What they are in training goes to the state,
        under "trained". Steps are refused meanwhile, since gradients of these
        parameters are not what the rule works with."""
        with self._turns.lock, torch.no_grad():
            mode = partial(self.__dict__.update, _evaluating=True)
            uninterrupted(self._turns.overtake, mode)
            self._renew()  # so that the next step asks for the mode
            for param, group in self._all():
                state = self.state.get(param)
                if not state or TRAINED in state:
                    continue
                values = self._values(group, self._rule(group))
                average = evaluated(
                    param, state, self._rule(group), self._names, values
                )
                uninterrupted(
                    partial(setitem, state, TRAINED, param.detach().clone()),
                    partial(param.copy_, average),
                )

    def train(self) -> None:
        """Put back what the parameters are in training, exactly. If they were changed
        since :meth:`eval`, the change is added."""
        with self._turns.lock, torch.no_grad():
            for param, group in self._all():
                state = self.state.get(param)
                if not state or TRAINED not in state:
                    continue
                values = self._values(group, self._rule(group))
                trained = state[TRAINED].to(param.device, param.dtype)
                average = evaluated(
                    trained, state, self._rule(group), self._names, values
                )
                same = torch.isclose(param, average, rtol=0, atol=0, equal_nan=True)
                back = torch.where(same, trained, trained + (param - average))
                uninterrupted(partial(param.copy_, back), partial(state.pop, TRAINED))
            self._evaluating = False

    def _check_mode(self) -> None:
        if self._evaluating:
            raise RuntimeError(
                f"{type(self).__name__} is in eval mode, in which its parameters are "
                f"those to evaluate; call train() before the forward pass of a step"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._evaluating = any(TRAINED in state for _, state in self._entries())
