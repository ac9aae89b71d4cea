"""One thing at a time: what steps, changes or saves an optimizer is refused while
another thread, or an outer call of the same one, does any of it.

Each optimizer has a busy flag, a list that holds False or True. It is not a lock, for
two reasons. A handler of signals that steps the optimizer it has
interrupted must get an error, where a lock would wait for ever. And an interrupt can
come between the return of ``acquire`` and the ``try`` that would release the lock.

A fork copies the memory of a step that another thread is in the middle of, but not the
thread. So a fork first waits until the steps of all other threads have written all or
nothing, and holds new ones up meanwhile; then the child has whole steps, and new flags.

All this relies on the GIL. On free-threaded Python, claims.py does it.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from fastopt.runtime import claims
from fastopt.runtime.claims import (
    FORKING,
    FREE_THREADED,
    IN_USE,
    PATIENCE,
    PAUSE,
    Flag,
    Flagged,
    claimed,
    living,
)

FOLDER = os.path.dirname(os.path.dirname(__file__))  # of the package
HELD_UP: Any = "held up"  # in place of True: by a fork

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V")
F = TypeVar("F", bound=Flagged)

put_aside: dict[int, list[Any]] = {}  # while a fork holds steps up: by its owner's id


def new_flag(owner: Flagged) -> list[Any]:
    """Return a flag for an object. Forks take care of it from now on."""
    living[id(owner)] = owner
    return Flag() if FREE_THREADED else [False]


def free_flag(owner: Flagged) -> list[Any]:
    """Wait until no fork holds an object up, and return its flag. Raise an error if
    the flag is set."""
    deadline = time.monotonic() + PATIENCE
    while (flag := owner._busy)[0] is HELD_UP:
        if in_hold_up(sys._getframe()):
            raise RuntimeError(FORKING)
        if time.monotonic() > deadline or id(owner) not in put_aside:
            go_on()
        time.sleep(PAUSE)
    if flag[0]:
        raise RuntimeError(IN_USE)
    return flag


def exclusive(
    method: Callable[Concatenate[F, P], R],
) -> Callable[Concatenate[F, P], R]:
    """Make a method that is refused while another one, or a step, is under way."""
    if FREE_THREADED:
        return claimed(method)

    @functools.wraps(method)
    def alone(self: F, /, *args: P.args, **kwargs: P.kwargs) -> R:
        busy = self._busy
        while busy[0]:
            busy = free_flag(self)
        # Set back twice, as a tracer may interrupt us at the first of these lines.
        try:
            try:
                busy[0] = True
                return method(self, *args, **kwargs)
            finally:
                busy[0] = False
        finally:
            busy[0] = False

    return alone


class computed_once(Generic[V]):
    """A ``functools.cached_property`` without a lock. Until Python 3.12 that one takes
    a lock, and so hangs in a child that was forked while another thread held it."""

    def __init__(self, method: Callable[[Any], V]):
        self.method, self.__doc__ = method, method.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> V:
        if instance is None:
            return self  # type: ignore[return-value]
        value = self.method(instance)
        vars(instance)[self.method.__name__] = value  # which is looked up first
        return value


# Forks ------------------------------------------------------------------------------


def in_hold_up(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is hold_up.__code__:
            return True
        frame = frame.f_back
    return False


def set_flags() -> Iterator[tuple[list[Any], int, FrameType]]:
    """Yield each flag that is set, the thread that set it, and that thread's innermost
    frame. The call that set a flag holds it in a local variable named ``busy``."""
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_code is free_flag.__code__:  # its caller has not set a flag yet
                frame = frame.f_back
            elif frame.f_code.co_filename.startswith(FOLDER):
                flag = frame.f_locals.get("busy")
                if flag and flag[0] is True:
                    yield flag, thread, top
            frame = frame and frame.f_back


def may_be_writing(flags: Collection[list[Any]]) -> bool:
    """Return whether another thread that has set one of these flags runs our code. If
    it runs a schedule, or a gradient's code, its step has not begun to write."""
    identities = set(map(id, flags))
    return any(
        id(flag) in identities
        and thread != threading.get_ident()
        and top.f_code.co_filename.startswith(FOLDER)
        for flag, thread, top in set_flags()
    )


def hold_up() -> None:
    """Let no new step begin, and wait until no step that has begun may be writing."""
    here = threading.get_ident()
    mine = {id(flag) for flag, thread, _ in set_flags() if thread == here}
    for reference in living.valuerefs():
        owner = reference()
        if owner is None or id(owner._busy) in mine or owner._busy[0] is HELD_UP:
            continue
        put_aside[id(owner)] = owner._busy
        vars(owner)["_busy"] = [HELD_UP]
    while may_be_writing([*put_aside.values()]):
        time.sleep(PAUSE)


def go_on(in_child: bool = False) -> None:
    """Let steps begin again. In a child, the steps of other threads are gone."""
    for identity, flag in [*put_aside.items()]:
        owner = living.get(identity)
        if owner is not None:
            vars(owner)["_busy"] = [False] if in_child else flag
        put_aside.pop(identity, None)


if hasattr(os, "register_at_fork") and FREE_THREADED:
    os.register_at_fork(
        before=claims.hold_up,
        after_in_parent=claims.after_in_parent,
        after_in_child=claims.after_in_child,
    )
elif hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=hold_up,
        after_in_parent=go_on,
        after_in_child=functools.partial(go_on, in_child=True),
    )
