"""What a torch optimizer of ours stores: the formats of its state and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt.memory.segments import Array
from fastopt.rule import Rule
from fastopt.torch.formats import Wanted, master
from fastopt.torch.state import Names
from fastopt.torch.turns import Turns


class Storage(Optimizer):
    """A ``torch.optim.Optimizer`` whose state and parameters may have formats."""

    _names = Names()
    _encodes = True  # whether its state may have formats
    _scales = True  # and whether these may have scales
    _turns: Turns
    _not_stored: Array
    state_dtype: torch.dtype | None = None
    formats: Any = None
    master: str | None = None

    def _set_formats(
        self, state_dtype: torch.dtype | None, formats: Any, master: str | None
    ) -> None:
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"state_dtype must be torch.float32 or torch.bfloat16, got "
                f"{state_dtype!r}"
            )
        if state_dtype is not None and formats is not None:
            raise ValueError(
                "state_dtype and formats both say what state is kept in; leave one out"
            )
        self.state_dtype, self.formats, self.master = state_dtype, formats, master

    def _check_formats(self, rules: Sequence[Rule]) -> None:
        """Check the formats of state and parameters for these rules."""
        wanted = self._wanted
        if wanted.any and not self._encodes:
            raise ValueError(
                f"{type(self).__name__} has float32 state only; leave out state_dtype, "
                f"formats and master"
            )
        for rule in rules if wanted.any else ():
            wanted.of_rule(rule)

    @property
    def _wanted(self) -> Wanted:
        """The formats that were asked for."""
        formats = self.formats
        if self.state_dtype is torch.bfloat16:
            formats = "bf16"
        counts = self._names.steps is not None
        return Wanted(formats, self.master, counts, self._scales)

    @property
    def nonfinite_groups(self) -> int:
        """How often a group of 64 numbers of 8-bit state was left as it was, because
        its new numbers were not all finite."""
        return int(self._not_stored[0])

    def master_params(self) -> list[Tensor]:
        """Return each parameter with all bits that are kept of it, as a new tensor in
        the dtype that is computed in."""
        params = [param for group in self.param_groups for param in group["params"]]
        with self._turns.lock:
            return [master(param, self.state.get(param, {})) for param in params]
