"""``uninterrupted``, and the harness that tests claims about interrupts."""

import signal
from functools import partial
from operator import setitem

import numpy as np
import pytest
from interrupts import at_every_line

from fastopt.runtime.atomic import uninterrupted


def pair():
    return {"a": 0, "b": np.zeros(3)}


def both_or_neither(made):
    assert made["b"].tolist() == [made["a"]] * 3


def test_calls_are_made_in_order_and_drop_what_they_return():
    made = []
    uninterrupted(partial(made.append, 1), partial(made.extend, (2, 3)))
    assert made == [1, 2, 3]


def test_an_error_is_raised_and_ends_them():
    made = []
    with pytest.raises(IndexError, match="pop"):
        uninterrupted(made.pop, partial(made.append, 1))
    assert made == []


def test_no_line_lies_between_the_calls():
    def change(made):
        uninterrupted(partial(made.update, a=1), partial(setitem, made["b"], ..., 1.0))

    assert at_every_line(pair, change, both_or_neither, folder=__file__) > 0


def test_the_harness_finds_what_is_torn():
    def change(made):
        made["a"] = 1
        made["b"][:] = 1

    with pytest.raises(AssertionError):
        at_every_line(pair, change, both_or_neither, folder=__file__)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_no_signal_is_handled_between_the_calls():
    made, seen = [np.zeros(100_000), np.zeros(1)], []

    def look(*_):
        seen.append(made[0][-1] == made[1][0])

    before = signal.signal(signal.SIGALRM, look)
    try:
        for k in range(1, 300):
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (k % 100 + 1))
            uninterrupted(*(partial(setitem, array, ..., k) for array in made))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > 50 and all(seen)
