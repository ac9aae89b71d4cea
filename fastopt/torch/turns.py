"""Whose turn it is to change an optimizer: one thread's at a time, and in that thread
the call's that began last, such as one of a signal handler in the midst of a step."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fastopt.runtime.atomic import uninterrupted

Call = Callable[[], Any]
CLAIM = object()
LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()


class Overtaken(Exception):
    """Another call has changed the optimizer since this one began."""


class Turns:
    """The order of changes to an optimizer.

    A call holds ``lock`` and says ``begin``; then it prepares its change in new objects
    and makes it by ``commit``. A signal handler may do the same in between: the first
    call's change, which was prepared for what is no longer so, is then not made.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        LOCKS.add(self.lock)
        self._open: dict[object, None] = {}
        self.begin: Call = partial(self._open.__setitem__, CLAIM, None)
        self.claim: Call = partial(self._open.pop, CLAIM)
        self.overtake: Call = self._open.clear

    def commit(self, calls: Iterable[Call]) -> None:
        """Make compiled calls without a bytecode in between, or none of them if another
        change came first."""
        try:
            uninterrupted(self.claim, *calls)
        except KeyError as error:
            if self.overtaken(error):
                raise Overtaken from None
            raise

    def change(self, prepare: Callable[[], Iterable[Call]]) -> None:
        """Make a change, which consists of the compiled calls that ``prepare`` returns.
        Prepare it again if another change came first, such as a signal handler's."""
        with self.lock:
            done = False
            while not done:
                self.begin()
                try:
                    self.commit(prepare())
                    done = True
                except Overtaken:
                    done = False

    @staticmethod
    def overtaken(error: KeyError) -> bool:
        """Whether it was the claim that failed."""
        return error.args[0:1] == (CLAIM,)


def _in_child() -> None:
    """Free the locks of threads that a fork has left behind in the parent."""
    for lock in list(LOCKS):
        if not lock._is_owned():
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
