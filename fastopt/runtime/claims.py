"""Busy flags on free-threaded Python, where threads run at the same time.

With the GIL, no other thread runs between a look at a busy flag and the line that sets
it (exclusive.py). Without it, two threads could both find the flag free. So a flag has
a dict there, ``holders``, and a call claims the flag by the dict's ``setdefault``,
which is atomic: of several calls, one gets its own claim back, and the others get that
one.

A claim is a list that a call makes for itself. So whether the call holds the flag can
be told from the flag alone, at any time: an interrupt may come between ``setdefault``
and whatever would note what it returned.

A fork claims the flags of all optimizers, and so waits until their steps are over and
lets no new one begin; then the child has whole steps.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

# Whether threads run at once. The GIL can come back later, when an extension that needs
# it is imported, but it does not go away.
FREE_THREADED: bool = not getattr(sys, "_is_gil_enabled", lambda: True)()
PAUSE = 1e-4  # seconds between looks
PATIENCE = 10.0  # seconds, after which a fork that holds steps up counts as over
IN_USE = (
    "this optimizer is in a step, in another thread or in one of its "
    "schedules, or is changed or saved there; wait for its end"
)
FORKING = "this thread is about to fork; step before or after it"

Claim: TypeAlias = "list[int]"  # the thread's identity; a fork's has a second number


class Flagged(Protocol):
    """An object that has a busy flag."""

    _busy: list[Any]


class Flag(list[Any]):
    """A busy flag for threads that run at once. The claim that holds it is an item of
    ``holders``, which is empty while the flag is free."""

    def __init__(self) -> None:
        super().__init__([False])
        self.holders: dict[int, Claim] = {}


P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Flagged)

living: weakref.WeakValueDictionary[int, Flagged] = weakref.WeakValueDictionary()
forks: dict[int, Claim] = {}  # the claim of the fork that is under way


def claimed(
    method: Callable[Concatenate[F, P], R],
) -> Callable[Concatenate[F, P], R]:
    """Make a method that is refused while another call holds the object's flag. With
    the GIL, this is the method itself, which looks at the flag."""
    if not FREE_THREADED:
        return method

    @functools.wraps(method)
    def alone(self: F, /, *args: P.args, **kwargs: P.kwargs) -> R:
        flag: Any = self._busy
        holders: dict[int, Claim] = flag.holders
        claim = [threading.get_ident()]
        # The claim is released twice, because a tracer may raise at the first of these
        # lines.
        try:
            try:
                while (holder := holders.setdefault(0, claim)) is not claim:
                    await_fork(holders, holder)
                return method(self, *args, **kwargs)
            finally:
                if holders.get(0) is claim:
                    holders.pop(0, None)
        finally:
            if holders.get(0) is claim:
                holders.pop(0, None)

    return alone


def await_fork(holders: dict[int, Claim], holder: Claim) -> None:
    """Wait until a fork no longer holds a flag. Raise an error if something else holds
    it."""
    if len(holder) == 1:
        raise RuntimeError(IN_USE)
    if holder[0] == threading.get_ident():
        raise RuntimeError(FORKING)
    deadline = time.monotonic() + PATIENCE
    while holders.get(0) is holder:
        time.sleep(PAUSE)
        if time.monotonic() > deadline:
            go_on(holder)


# Forks ------------------------------------------------------------------------------


def flags() -> Iterator[Any]:
    """Yield the flag of each optimizer that is still in use."""
    for reference in living.valuerefs():
        owner = reference()
        if owner is not None:
            yield owner._busy


def hold_up() -> None:
    """Claim every flag that this thread does not hold. A step in another thread may be
    waiting for this one, in a schedule, so this does not wait for ever."""
    here, deadline = threading.get_ident(), time.monotonic() + PATIENCE
    claim = [here, 1]
    while forks.setdefault(0, claim) is not claim and time.monotonic() < deadline:
        time.sleep(PAUSE)
    for flag in flags():
        while (
            flag.holders.setdefault(0, claim)[0] != here and time.monotonic() < deadline
        ):
            time.sleep(PAUSE)


def go_on(claim: Claim | None) -> None:
    """Let steps begin again, which a fork with this claim has held up."""
    for flag in flags():
        if flag.holders.get(0) is claim:
            flag.holders.pop(0, None)
    if forks.get(0) is claim:
        forks.pop(0, None)


def after_in_parent() -> None:
    """Let steps begin again after a fork of this thread."""
    claim = forks.get(0)
    if claim is not None and claim[0] == threading.get_ident():
        go_on(claim)


def after_in_child() -> None:
    """Let steps begin again. In a child, the steps of other threads are gone."""
    here = threading.get_ident()
    forks.clear()
    for flag in flags():
        if flag.holders.get(0) not in (None, [here]):
            flag.holders.clear()
            flag[0] = False
