"""What a C program may get wrong that would read or write beyond its memory."""

import ctypes

import numpy as np
import pytest
from cases import bfloat16, same_bits
from native_code import (
    API,
    BAD_ARGUMENT,
    BAD_HYPERPARAMETER,
    BF16,
    BF16_SR,
    F32,
    FP16,
    OK,
    OTHER_VARIANT,
    OVERLAP,
    Request,
    Rule,
    Segment,
    StreamOptimizer,
    address,
    address_of,
    small,
)

import fastopt


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


# Streams -----------------------------------------------------------------------------


def streaming(
    name="adamw", dtype=np.float32, formats=(BF16_SR, FP16), rows=1, **changes
):
    rule = getattr(fastopt, name.partition("+")[0])
    params = [np.ones(5, dtype), np.ones(3, dtype)]
    row = {**rule.hyperparameters, **changes}
    ours = StreamOptimizer(name, params, *[row] * rows, formats=list(formats))
    assert ours.start() == OK
    return ours


def refused(ours, grads, *more, change=None, **request):
    """The code, after a look that nothing was written. ``change`` is a function that
    changes the segments, which both functions must refuse then."""
    places = [*ours.everything(), ours.carry, *(g for g in grads if g is not None)]
    before = [a.copy() for a in places]
    made = ours.segments
    if change is not None:

        def segments(given):
            found = made(given)
            change(found, ours.keep)
            return found

        ours.segments = segments
        code = ours.start()
        assert ours.step(grads, *more, **request) == code
    else:
        code = ours.step(grads, *more, zero_grads=True, **request)
    ours.segments = made
    for a, b in zip(before, places, strict=True):
        assert same_bits(a, b)
    assert len(API.error(code)) > 20
    return code


GRADS = [np.ones(5, bfloat16), np.ones(3, np.float16)]


@pytest.mark.parametrize("kind", [-1, 1, 5, 15, 16, 2**31, 2**62])
@pytest.mark.parametrize("column", range(4))
def test_formats_that_do_not_exist_or_fit(column, kind):
    """1 is float64, which a step of float32 does not take."""

    def change(segments, streams):
        streams[1][column].format = kind

    ours = streaming()
    if column == 1:  # start gets no gradient, whose format it does not read
        streams = ours.segments(GRADS)
        ours.keep[1][1].format = kind
        ours.segments = lambda _: streams
        assert refused(ours, GRADS) == BAD_ARGUMENT
    else:
        assert refused(ours, GRADS, change=change) == BAD_ARGUMENT


@pytest.mark.parametrize("kind", [0, 2, 3, 4])
@pytest.mark.parametrize("column", range(4))
def test_steps_of_float64_take_nothing_else(column, kind):
    ours = streaming(dtype=np.float64, formats=(1, 1))
    grads = [np.ones(5), np.ones(3)]
    streams = ours.segments(grads)
    ours.keep[0][column].format = kind
    ours.segments = lambda _: streams
    assert refused(ours, grads) == ours.start() == BAD_ARGUMENT
    del ours.segments
    assert ours.step(grads) == OK


def test_addresses():
    def misaligned(column):
        def change(segments, streams):
            streams[1][column].parts[0] += 1

        return change

    def missing(column):
        def change(segments, streams):
            streams[1][column].parts[0] = None

        return change

    def unaligned_table(segments, streams):
        segments[1].streams += 4

    def no_table(segments, streams):
        segments[1].streams = None

    ours = streaming(dtype=bfloat16)
    changes = [misaligned(0), misaligned(2), misaligned(3)]
    changes += [missing(0), missing(2), missing(3), unaligned_table, no_table]
    for change in changes:
        assert refused(ours, GRADS, change=change) == BAD_ARGUMENT
    odd = np.ones(7, np.uint8)[1:].view(bfloat16)
    assert refused(ours, [None, odd]) == BAD_ARGUMENT
    plain = streaming()  # of float32, at an address that would do for 16 bits
    plain.params[1] = np.ones(14, np.uint8)[2:].view(np.float32)
    assert plain.params[1].ctypes.data % 4 == 2
    assert refused(plain, GRADS) == BAD_ARGUMENT
    assert ours.step(GRADS) == OK


def test_segments():
    def changed(**fields):
        def change(segments, streams):
            for name, value in fields.items():
                setattr(segments[1], name, value)

        return change

    ours = streaming(rows=2)
    for fields in (
        {"n": -1},
        {"n": 2**57},
        {"row": -1},
        {"row": 2},
        {"row": 2**62},
        {"first": -1},
    ):
        assert refused(ours, GRADS, change=changed(**fields)) == BAD_ARGUMENT

    def empty(segments, streams):
        segments[1].n, segments[1].streams = 0, None

    made = ours.segments
    ours.segments = lambda grads: (found := made(grads), empty(found, None))[0]
    assert ours.start() == ours.step(GRADS) == OK


def test_overlaps():
    """Byte by byte: five elements of bfloat16 have 10 bytes, and of float32 20."""
    ours, memory = (
        streaming(dtype=bfloat16, formats=(F32, BF16)),
        np.zeros(64, np.uint8),
    )
    for param, state, gradient, of_grads, code in (
        (0, 10, 20, bfloat16, OK),
        (0, 8, 20, bfloat16, OVERLAP),
        (10, 0, 20, bfloat16, OK),
        (8, 0, 20, bfloat16, OVERLAP),
        (0, 10, 18, bfloat16, OVERLAP),
        (0, 40, 20, np.float32, OK),
        (0, 38, 20, np.float32, OVERLAP),
        (30, 40, 20, bfloat16, OK),
        (30, 40, 20, np.float32, OVERLAP),
    ):
        size = 10 if of_grads is bfloat16 else 20
        ours.params[0] = memory[param : param + 10].view(bfloat16)
        ours.state[0][1] = memory[state : state + 10].view(bfloat16)
        grad = memory[gradient : gradient + size].view(of_grads)
        if code == OVERLAP:
            assert refused(ours, [grad, None]) == OVERLAP, (param, state, gradient)
        else:
            assert ours.step([grad, None]) == OK, (param, state, gradient)
    for name, buffers in (("nadam", 2), ("novograd", 1)):  # which carries one for each
        ours = streaming(name, formats=[BF16] * buffers)
        ours.params[0] = np.ones(4, np.float32)
        carry = ours.carry[-1].view(bfloat16)
        ours.state[0] = [np.zeros(4, bfloat16), carry][-buffers:]
        assert refused(ours, [None, None]) == OVERLAP


def test_requests_that_are_refused():
    ours = streaming()
    for request in (
        {"threads": -1},
        {"threads": 1025},
        {"clip_norm": -1.0},
        {"clip_norm": np.nan},
        {"clip_norm": np.inf},
    ):
        assert refused(ours, GRADS, **request) == BAD_ARGUMENT
    for factor in (np.nan, np.inf, 1e39):
        assert refused(ours, GRADS, factor) == BAD_ARGUMENT
    ours.t = -1
    assert refused(ours, GRADS) == BAD_ARGUMENT
    ours.t = 0
    assert ours.step(GRADS) == OK


def test_other_versions_of_the_request_are_refused():
    """By their sizes: of a program that was compiled for another one, or that left the
    field out."""
    ours = streaming()
    places = [*ours.everything()]
    before = [a.copy() for a in places]
    for size in (0, ctypes.sizeof(Request) - 8, ctypes.sizeof(Request) + 8):
        request = Request(zero_grads=1)
        request.size = size
        code = API.step_streams(
            *(ours.rule, 0, 1, address(ours.values), 1, None, ours.segments(GRADS)),
            *(2, 1.0, address_of(request)),
        )
        assert code == BAD_ARGUMENT
    assert all(map(same_bits, before, places))


def test_arguments_of_the_call():
    ours = streaming("nadam", rows=2)
    segments = ours.segments(GRADS)
    good = [ours.rule, 0, 1, address(ours.values), 2, address(ours.carry), segments, 2]
    places = [*ours.everything(), ours.carry]
    before = [a.copy() for a in places]
    for k, value in (
        (0, None),
        (1, 2),
        (1, -1),
        (2, 0),
        (3, None),
        (3, address(ours.values) + 4),
        (4, 0),
        (4, -1),
        (4, 2**62),
        (5, None),
        (5, address(ours.carry) + 4),
        (6, None),
        (6, address_of(segments) + 4),
        (7, -1),
        (7, 2**62),
    ):
        given = [*good[:k], value, *good[k + 1 :]]
        assert API.step_streams(*given, 1.0, None) == BAD_ARGUMENT, (k, value)
        if k != 2:
            assert API.start_streams(*given[:2], *given[3:]) == BAD_ARGUMENT, (k, value)
    assert all(map(same_bits, before, places))
    assert API.step_streams(*good, 1.0, None) == OK


def test_hyperparameters_of_every_row():
    ours = streaming(rows=3)
    ours.values[2, 0] = -1
    assert refused(ours, GRADS) == ours.start() == BAD_HYPERPARAMETER
    ours = streaming("sgd", formats=(), rows=2)
    ours.values[1, 1] = 0.9
    assert refused(ours, GRADS) == OTHER_VARIANT


def test_no_row_is_settled_if_one_cannot_be():
    """DoG without eps cannot divide by the sum of zero gradients."""
    ours = streaming("dog", formats=(BF16,), rows=2)
    assert ours.step(GRADS) == OK
    zeros = [np.zeros_like(g) for g in GRADS]
    fresh = streaming("dog", formats=(BF16,), rows=2)
    fresh.values[1, list(fastopt.dog.hyperparameters).index("eps")] = 0
    assert refused(fresh, zeros) == BAD_HYPERPARAMETER
    fresh.values[1] = fresh.values[0]
    assert fresh.step(zeros) == OK
