"""Interrupts at every line: what Ctrl-C can do to a call, tried at each place where it
can arrive in Python code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import fastopt

PACKAGE = os.path.dirname(fastopt.__file__)


def interrupted(action: Callable[[], Any], line: int, folder: str = PACKAGE) -> bool:
    """Do something, with a KeyboardInterrupt at the line-th line of Python code below
    ``folder`` that it comes to, counted from 0. Whether it came so far; if not, the
    action was done without one."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(folder):
            return None
        if event == "line":
            count += 1
            if count > line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


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
