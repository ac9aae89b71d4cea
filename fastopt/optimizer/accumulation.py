"""Gradients that come in parts: their sums, until a step takes them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from fastopt.memory.arena import zeros
from fastopt.memory.segments import Array
from fastopt.optimizer import checks
from fastopt.optimizer.state import bind_alone, filling
from fastopt.rules import passes
from fastopt.runtime.atomic import Call
from fastopt.step import Key, Program, Request, execute


class Pending(NamedTuple):
    """Sums of gradients, until a step takes them."""

    sums: list[Array]
    received: list[bool]  # whether any gradient came, by parameter
    program: Program
    spans: list[tuple[int, int]]

    @property
    def gradients(self) -> list[Array | None]:
        """The sums as the gradients of a step."""
        pairs = zip(self.sums, self.received, strict=True)
        return [array if received else None for array, received in pairs]

    @property
    def emptied(self) -> Pending:
        """The same memory, to be used again when it is zeros."""
        return self._replace(received=[False] * len(self.received))

    def added(
        self, grads: Sequence[Any], grad_scale: float, threads: int
    ) -> tuple[Pending, list[Call]]:
        """Return what this will be with more gradients, which our runner has taken, and
        the calls that add them."""
        pairs = zip(self.received, grads, strict=True)
        received = [before or grad is not None for before, grad in pairs]
        request = Request(threads=threads)
        calls = execute(self.program, [Key(1, (), (), grad_scale)], request)
        return self._replace(received=received), calls

    def restored(self, saved: Sequence[Array | None]) -> Pending:
        """Return new sums, as they were saved."""
        for to, array in zip(self.sums, saved, strict=True):
            if array is not None:
                filling(to, array)()
        return self._replace(received=[array is not None for array in saved])


def new_pending(module: ModuleType, arrays: Sequence[Array]) -> Pending:
    """Return sums of nothing, for these parameters."""
    (sums,) = zeros(module.state_arena, arrays, 1)
    program = bind_alone(module, passes.accumulate, sums)
    return Pending(sums, [False] * len(sums), program, checks.spans_of(sums))
