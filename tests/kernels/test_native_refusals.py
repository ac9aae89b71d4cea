"""What a C program may get wrong that would read or write beyond its memory."""

import ctypes

import numpy as np
from cases import same_bits
from native_code import (
    API,
    BAD_ARGUMENT,
    OK,
    OVERLAP,
    Rule,
    Segment,
    address,
    address_of,
    small,
)


def test_what_would_end_the_process_is_refused():
    """Rules of nobody's, numbers and segments off their alignment, lengths beyond
    memory, threads that cannot be started, a carry within the parameters."""
    opt = small("nadam", np.float64)
    grads = [np.ones(5), np.ones(3)]
    segments = opt.segments(grads)
    good = [
        opt.rule,
        1,
        1,
        address(opt.values),
        address(opt.carry),
        segments,
        2,
        1.0,
        1,
    ]
    long = (Segment * 1)(Segment(*[address(opt.params[0])] * 3, 2**57))
    for k, value, code in (
        (0, ctypes.pointer(Rule.from_buffer_copy(opt.rule.contents)), BAD_ARGUMENT),
        (3, address(opt.values) + 4, BAD_ARGUMENT),
        (4, address(opt.carry) + 1, BAD_ARGUMENT),
        (4, address(opt.params[1]) + 16, OVERLAP),
        (4, address(opt.state[0][1]), OVERLAP),
        (5, address_of(segments) + 4, BAD_ARGUMENT),
        (5, long, BAD_ARGUMENT),
        (6, 2**62, BAD_ARGUMENT),
        (8, 1025, BAD_ARGUMENT),
        (8, 2**31 - 1, BAD_ARGUMENT),
    ):
        before = [a.copy() for a in (*opt.everything(), opt.carry)]
        assert API.step(*good[:k], value, *good[k + 1 :]) == code, (k, value)
        assert all(map(same_bits, before, (*opt.everything(), opt.carry)))
    assert API.step(*good) == OK
