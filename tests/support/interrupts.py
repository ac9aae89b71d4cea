"""Interrupts at every line: what Ctrl-C can do to a call, tried at each place where it
can arrive in Python code."""

from __future__ import annotations

import contextlib
import dis
import functools
import operator
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fastopt

PACKAGE = os.path.dirname(fastopt.__file__)


@contextlib.contextmanager
def traced(trace: Callable[[Any, str, Any], Any]) -> Iterator[None]:
    """Let a function trace what is done meanwhile."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def at_line(
    action: Callable[[], Any],
    handler: Callable[[], Any],
    line: int,
    folder: str = PACKAGE,
) -> bool:
    """Do something, and call a handler before the line-th line of Python code below
    ``folder``, counted from 0, as if a signal had come. Return whether the action came
    so far."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line" and count <= line:
            count += 1
            if count > line:
                sys.settrace(None)
                handler()
        return trace

    with traced(trace):
        action()
    return count > line


def interrupted(action: Callable[[], Any], line: int, folder: str = PACKAGE) -> bool:
    """Do something, with a KeyboardInterrupt before the line-th line, as ``at_line``.
    Return whether the action came so far; if not, it was done without one."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        return at_line(action, interrupt, line, folder)
    except KeyboardInterrupt:
        return True


HANDLED_AFTER = "CALL", "JUMP_BACKWARD", "RESUME"  # see eval_breaker in CPython
code_of: Callable[[Any], bytes] = functools.cache(operator.attrgetter("co_code"))


def at_place(
    action: Callable[[], Any],
    handler: Callable[[], Any],
    place: int,
    folder: str = PACKAGE,
) -> bool:
    """Do something, and call a handler at the place-th place, counted from 0. Places
    are where Python may call the handlers of signals in code below ``folder``; one that
    is reached again does not count again. Return whether the action came so far."""
    places, last = set[tuple[Any, int]](), dict[Any, str]()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, code = last.get(frame, ""), code_of(frame.f_code)
            last[frame] = dis.opname[code[frame.f_lasti]]
            if before.startswith(HANDLED_AFTER):
                places.add((frame.f_code, frame.f_lasti))
            if len(places) > place:
                sys.settrace(None)
                handler()
        return trace

    with traced(trace):
        action()
    return len(places) > place


def at_every_line(
    make: Callable[[], Any],
    action: Callable[[Any], Any],
    check: Callable[[Any], None],
    stride: int = 1,
    folder: str = PACKAGE,
) -> int:
    """Interrupt ``action(make())`` at each of its lines, or at every ``stride``-th, on
    a new object each time, and ``check`` the object after each interrupt. The number
    of interrupts tried."""
    line = tried = 0
    while True:
        made = make()
        if not interrupted(lambda made=made: action(made), line, folder):
            check(made)
            return tried
        check(made)
        tried += 1
        line += stride


def at_lines(
    campaign: Any,
    what: str,
    make: Callable[[], Any],
    action: Callable[[Any], Any],
    state: Callable[[Any], Any],
    go_on: Callable[[Any], Any],
    *,
    stride: int = 1,
    changes: bool = True,
) -> None:
    """Interrupt ``action(make())`` at its lines, or at every ``stride``-th: its
    ``state`` is that of before or of after, and ``go_on`` then does what it would have
    done. ``changes``: whether the action is to change anything."""
    made = make()
    states = [state(made)]
    action(made)
    states.append(state(made))
    assert (states[0] != states[1]) == changes
    go_on(made)
    ends = [None, state(made)]
    made = make()
    go_on(made)
    ends[0] = state(made)
    came = [True]

    def check(line: int) -> None:
        made = make()
        came[0] = interrupted(lambda: action(made), line)
        now = state(made)
        assert now in states, "torn"
        assert came[0] or now == states[1], "not done"
        go_on(made)
        assert state(made) == ends[states.index(now)], "another way on"

    line = 0
    while came[0]:
        campaign.attempt(f"{what}, line {line}", check, line)
        line += stride


@contextlib.contextmanager
def alarm(handler: Callable[..., None], seconds: float) -> Iterator[None]:
    """Call a handler so many seconds later, wherever the program is by then."""
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
