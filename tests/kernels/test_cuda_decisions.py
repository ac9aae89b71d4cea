"""What steps that the device decides ask of the driver, of which a stub records the
calls: how many launches, no waiting, and nothing that a graph cannot have."""

from __future__ import annotations

import gc
import weakref

import cuda_stub
import numpy as np
import pytest
from cuda_stubbed import (
    LAUNCH,
    at,
    names,
    needs_driver,
    ones,
    put,
    stream_made,
)

import fastopt
from fastopt.backends import cuda_calls, cuda_runner
from fastopt.backends.cuda_boards import NumberBoard
from fastopt.rule import Rule

pytestmark = needs_driver

WAITS = ("cuStreamSynchronize", "cuEventSynchronize", "cuMemcpyDtoHAsync_v2")
WAITS += ("cuCtxSynchronize", "cuMemAlloc_v2", "cuMemHostAlloc", "cuModuleLoadData")


def kernels(stub):
    return [call.arguments["kernel"] for call in stub.calls(LAUNCH)]


NORM = ["Sums", "Settle", "Update"]
PRODIGY = ["Settle", "Sums", "Settle", "Update"]
DECIDED = {
    "clip_norm": (fastopt.adamw, {"clip_norm": 1.0}, NORM),
    "skip": (fastopt.adamw, {"nonfinite": "skip"}, NORM),
    "both": (fastopt.sgd, {"clip_norm": 1.0, "nonfinite": "skip"}, NORM),
    "carry": (fastopt.nadam, {"clip_norm": 1.0}, NORM),
    "by segment": (fastopt.lamb, {}, NORM),
    "over all": (fastopt.dog, {}, PRODIGY),
    "scalars of what is carried": (fastopt.prodigy, {}, PRODIGY),
    "two norms": (fastopt.lamb, {"clip_norm": 1.0}, ["Sums", *PRODIGY]),
}


@pytest.mark.parametrize("count", [1, 1000])
@pytest.mark.parametrize("name", DECIDED)
def test_launches_of_a_step_that_the_device_decides(stub, name, count):
    """After the first of its kind nothing is waited for, or allocated."""
    rule, asked, expected = DECIDED[name]
    opt = rule(ones([5] * count))
    grads = ones([5] * count)
    for k in range(4):
        stub.clear()
        opt.step(grads, **asked)
        assert kernels(stub) == expected
        assert k == 0 or not stub.calls(*WAITS)
        opt.lr = 0.1 / (1 + k)


def test_what_is_asked_of_the_device_afterwards(stub):
    opt = fastopt.adamw(ones([5]))
    grads = ones([5])
    opt.step(grads, nonfinite="skip")
    for read in (lambda: opt.steps, lambda: opt.skipped, lambda: opt.grad_norm):
        stub.clear()
        read()
        assert names(stub.calls(*WAITS)) == ["cuMemcpyDtoHAsync_v2", WAITS[0]]


def made_on(stream, rule=fastopt.adamw, **options):
    """An optimizer whose arrays belong to this stream, and gradients."""
    params, grads = ones([5, 300]), ones([5, 300])
    for array in (*params, *grads):
        array.stream = lambda: stream
    return rule(params, **options), grads


CAPTURED = {
    "plain": ({}, ["Settle", "Update"]),
    "clip_norm": ({"clip_norm": 1.0}, NORM),
    "skip": ({"nonfinite": "skip"}, NORM),
}


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_step_is_captured(stub, name, warm):
    """Its launches are all that becomes part of the graph. What it needs is made beside
    it, with or without a step before."""
    stream = stream_made(stub)
    asked, expected = CAPTURED[name]
    opt, grads = made_on(stream)
    if warm:
        opt.step(grads, **asked)
    with stub.capture(stream):
        stub.clear()
        opt.step(grads, **asked)
        status = stub.capture_status(stream)
    assert status == cuda_stub.ACTIVE
    assert kernels(stub) == expected
    on_it = [call for call in stub.calls() if call.arguments.get("stream") == stream]
    assert {*names(on_it)} == {LAUNCH, "cuStreamIsCapturing"}
    failed = {*names(call for call in stub.calls() if call.result)}
    # These ask whether there is a current context.
    assert failed <= {"cuCtxGetDevice", "cuPointerGetAttribute"}


STARTING = {
    "an average": lambda params: fastopt.adamw(params, ema=0.9),
    "the parameters": fastopt.schedule_free_adamw,
    "a number": fastopt.adagrad,
}


@pytest.mark.parametrize("name", STARTING)
def test_a_first_step_that_fills_state_is_not_captured(stub, name):
    """Neither is one after a group has come. The capture goes on."""
    stream = stream_made(stub)
    params, grads = ones([5, 300, 7]), ones([5, 300, 7])
    for array in (*params, *grads):
        array.stream = lambda: stream
    opt = STARTING[name](params[:2])
    with stub.capture(stream):
        with pytest.raises(RuntimeError, match="do a step before the capture"):
            opt.step(grads[:2])
        assert stub.capture_status(stream) == cuda_stub.ACTIVE
    assert opt.steps == 0
    opt.step(grads[:2])
    opt.add_group({"params": params[2]})
    with stub.capture(stream):
        with pytest.raises(RuntimeError, match="do a step before the capture"):
            opt.step([grads[:2], grads[2]])
        assert stub.capture_status(stream) == cuda_stub.ACTIVE
    opt.step([grads[:2], grads[2]])


def test_a_capture_does_not_write_where_earlier_steps_may(stub):
    """The host writes its count beside the stream, which may be busy. An earlier step's
    kernel in the queue would then put an older count in its place."""
    stream = stream_made(stub)
    opt, grads = made_on(stream)
    opt.step(grads, clip_norm=1.0)
    decisions = opt._bound.program.runner.decisions
    earlier = decisions.steps
    opt.step(grads)
    with stub.capture(stream):
        opt.step(grads)
    assert decisions.steps.address != earlier.address
    assert at(stub, decisions.steps.address, (1,), np.int64) == [2]
    assert not at(stub, earlier.address, (1,), np.int64).any()  # no kernel runs here


def test_two_captured_steps_keep_their_gradients(stub):
    """The addresses that a graph reads are not those of later steps."""
    stream = stream_made(stub)
    opt, grads = made_on(stream)
    others = ones([5, 300])
    with stub.capture(stream):
        stub.clear()
        opt.step(grads)
        first = stub.calls(LAUNCH)[-1]
        opt.step(others)
        second = stub.calls(LAUNCH)[-1]
    opt.step(ones([5, 300]))

    def seen(launch):
        values = launch.arguments["values"]
        place = int.from_bytes(values[2], "little")
        return list(at(stub, place, (2,), np.int64))

    assert seen(first) == [grad.address for grad in grads]
    assert seen(second) == [grad.address for grad in others]


def test_replays_are_counted_whenever_one_asks(stub):
    """The stub runs no kernels, so we count in their place."""
    stream = stream_made(stub)
    opt, grads = made_on(stream)
    with stub.capture(stream):
        opt.step(grads)
    board = opt._bound.program.runner.decisions.steps
    for replays in (3, 5):
        with cuda_calls.context(0):
            cuda_calls.upload(board.address, np.array([replays]), stream)
        assert opt.steps == replays
    opt.step(grads)
    stub.clear()
    assert opt.state_dict()["steps"] == 5  # the kernel would have counted
    opt.step(grads, nonfinite="raise")  # counted by the host
    assert at(stub, board.address, (1,), np.int64).item() == 6 == opt.steps


def test_a_graph_keeps_the_memory_that_it_uses(stub):
    stream = stream_made(stub)
    opt, grads = made_on(stream)
    with stub.capture(stream):
        opt.step(grads)
    used = weakref.ref(opt._bound)
    opt.load_state_dict(opt.state_dict())
    gc.collect()
    assert used() is not None and used() is not opt._bound
    del opt
    gc.collect()
    assert used() is None


def test_nothing_is_read_in_a_capture(stub):
    """It would end the capture."""
    stream = stream_made(stub)
    opt, grads = made_on(stream, lr=lambda steps: 0.1)
    opt.step(grads, nonfinite="skip")
    with stub.capture(stream):
        for use in (
            lambda: opt.steps,
            lambda: opt.skipped,
            lambda: opt.grad_norm,
            lambda: opt.step(grads),  # the schedule asks for the number of steps
        ):
            with pytest.raises(RuntimeError, match="read them after the capture"):
                use()
        assert stub.capture_status(stream) == cuda_stub.ACTIVE
    opt.step(grads)


def test_the_number_of_a_step_is_written_after_a_kernel_has_counted(stub):
    """Also if it is the one that was written before, as after state was set."""
    opt = fastopt.lamb(ones([5]))
    grads = ones([5])
    opt.step(grads)
    runner = opt._bound.program.runner
    opt.step(grads, clip_norm=1.0)  # a kernel writes the number
    board = runner.decisions.steps.address
    with cuda_calls.context(0):
        cuda_calls.upload(board, np.array([2]), 0)
    runner.count[0] = 0
    opt.step(grads)
    assert at(stub, board, (1,), np.int64).item() == 1


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_a_board_is_written_if_a_bit_changes(stub, dtype):
    opt = fastopt.adamw(ones([5]))
    board = NumberBoard(opt._bound.program.runner, (2,), dtype)
    for new in ([0.0, 3.0], [-0.0, 3.0], [0.0, 3.0], [0.0, 4.0]):
        with cuda_calls.context(0):
            board.write(new, 0)
        wanted = np.array(new, dtype).tobytes()
        assert at(stub, board.address, (2,), dtype).tobytes() == wanted


HOSTS = {
    "raise": lambda opt, grads: opt.step(grads, nonfinite="raise"),
    "skip and zeros": lambda opt, grads: opt.step(
        grads, nonfinite="skip", zero_grads=True
    ),
    "weights": lambda opt, grads: opt.step([grads, grads], weights=[1.0, 2.0]),
    "accumulate": lambda opt, grads: opt.accumulate(grads),
    "estimate": lambda opt, grads: opt.estimate(grads),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_what_needs_the_host_is_not_captured(stub, name, warm):
    stream = stream_made(stub)
    opt, grads = made_on(stream, fastopt.sophia_g)
    if warm:
        HOSTS[name](opt, grads)
        opt.drop_accumulated()
        stub.clear()
    steps = opt.steps
    with stub.capture(stream):
        with pytest.raises(RuntimeError, match="captured into"):
            HOSTS[name](opt, grads)
        assert stub.capture_status(stream) == cuda_stub.ACTIVE
    assert not stub.calls(LAUNCH)
    opt.step(grads)
    assert opt.steps == steps + 1


def test_a_rule_that_numba_cannot_compile_is_not_captured(stub, monkeypatch):
    rates = {1: 0.5}

    def scalars(t, lr=0.1):
        return (lr * rates.get(t, 0.25),)

    def refused(job, number):
        if type(job).__name__ == "Settle" and job.scalars is not None:
            raise TypeError("not in a kernel")
        return loaded(job, number)

    loaded = cuda_runner.cuda_jobs.loaded
    monkeypatch.setattr(cuda_runner.cuda_jobs, "loaded", refused)
    stream = stream_made(stub)
    opt, grads = made_on(stream, Rule(fastopt.gd.update, scalars))
    with stub.capture(stream), pytest.raises(RuntimeError, match="captured into"):
        opt.step(grads)
    opt.step(grads)
    assert opt.steps == 1


def test_a_failure_of_a_decision_is_not_forgotten(stub):
    opt = fastopt.adamw(ones([5]))
    grads = ones([5])
    opt.step(grads, nonfinite="skip")
    stub.fail("cuLaunchKernel", cuda_stub.ILLEGAL_ADDRESS, 2)
    with pytest.raises(RuntimeError, match="failed on the GPU"):
        opt.step(grads, nonfinite="skip")
    for use in (lambda: opt.step(grads), lambda: opt.steps, opt.state_dict):
        with pytest.raises(RuntimeError, match="failed on the GPU"):
            use()


def test_steps_that_the_host_decides_wait(stub):
    """So that the tests above could fail."""
    opt = fastopt.adamw([put(np.ones(5))])  # of float64
    grads = [put(np.ones(5))]
    opt.step(grads, nonfinite="skip")
    stub.clear()
    opt.step(grads, nonfinite="skip")
    assert stub.calls("cuMemcpyDtoHAsync_v2", "cuStreamSynchronize")
