"""What the CUDA backend asks of the driver: of a stub of it, without a GPU. The stub
records the calls and does what they say but for running kernels."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_stub
import numpy as np
import pytest
from cases import bfloat16
from cuda_stubbed import (
    COPY,
    LAUNCH,
    POP,
    PUSH,
    RECORD,
    WAIT,
    at,
    names,
    needs_driver,
    numbers,
    ones,
    put,
    stream_made,
)

import fastopt
from fastopt.backends import cuda_calls, cuda_driver, cuda_table
from fastopt.memory.formats import FORMATS
from fastopt.memory.order import CHUNK
from fastopt.memory.segments import Encoded, Segment
from fastopt.step import Request, limits

pytestmark = needs_driver

SUPPORT = Path(__file__).resolve().parents[1] / "support"
ROOT = SUPPORT.parents[1]
LARGE = 4096 + 63  # elements, of which the state may have 8 bits


# One launch


def single(**options):
    return lambda: (fastopt.adamw(ones([1000])[0], **options), ones([1000])[0])


def several(sizes, dtype=np.float32, of_grads=None, **options):
    def made():
        opt = fastopt.adamw(ones(sizes, dtype), **options)
        return opt, ones(sizes, of_grads or dtype)

    return made


def grouped():
    groups = [
        {"params": ones([5, 1000]), "lr": 0.1},
        {"params": ones([300]), "weight_decay": 0.5},
    ]
    return fastopt.adamw(groups), [ones([5, 1000]), ones([300])]


MIXED = [LARGE, 5, 2 * LARGE, 1]
STEPS = {
    "one tensor": (single(), {}),
    "a thousand tensors": (several(range(1, 1001)), {}),
    "groups": (grouped, {}),
    "clip_value": (several([5, 1000, 3]), {"clip_value": 0.1}),
    "an average": (several([5, 1000, 3], ema=0.9), {}),
    "zero_grads": (several([5, 1000, 3]), {"zero_grads": True}),
    "all": (
        several([5, 1000, 3], ema=0.9),
        {"zero_grads": True, "clip_value": 1.0},
    ),
    "bfloat16": (several([5, 1000, 3], bfloat16), {}),
    "gradients of bfloat16": (several([5, 1000, 3], of_grads=bfloat16), {}),
    "8 bits and none": (several(MIXED, formats="8bit"), {}),
    "empty": (several([0, 5, 0]), {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_one_launch(stub, name):
    made, asked = STEPS[name]
    opt, grads = made()
    for _ in range(2):
        stub.clear()
        opt.step(grads, **asked)
        (launch,) = stub.calls(LAUNCH)
        assert launch.arguments["kernel"] == "Update" and not launch.result
    assert opt.steps == 2
    assert stub.calls("cuMemAlloc_v2", "cuStreamSynchronize") == []


def test_a_step_of_nothing_is_no_launch(stub):
    opt = fastopt.adamw(ones([0, 0]))
    stub.clear()
    opt.step(ones([0, 0]))
    assert opt.steps == 1 and not stub.calls(LAUNCH)


def test_gradients_that_are_zeroed_and_gone(stub):
    """A segment without a gradient has the address 0, so its kernel does nothing."""
    opt, grads = several([5, 1000, 3])()
    opt.step([grads[0], None, grads[2]])
    (launch,) = stub.calls(LAUNCH)
    told = at(stub, numbers(launch)[2], 3, np.int64).tolist()
    assert told == [grads[0].address, 0, grads[2].address]


@pytest.mark.parametrize("name", sorted({*STEPS} - {"a thousand tensors", "empty"}))
def test_a_step_like_the_last_makes_few_calls(stub, name):
    """It waits for nothing but, every eighth time, for a copy that was enqueued eight
    or more steps before."""
    made, asked = STEPS[name]
    opt, grads = made()
    opt.step(grads, **asked)
    half = cuda_calls.Board.TURNS // 2
    draws = any(segment.draws for segment in opt._bound.program.runner.segments)
    for turn in range(1, 3 * cuda_calls.Board.TURNS):
        stub.clear()
        opt.step(grads, **asked)
        calls = names(stub.calls())
        begin, end = turn % half == 0, turn % half == half - 1
        copies = [*[WAIT] * begin, COPY, *[RECORD] * end] * (1 + draws)
        assert calls == [PUSH, *copies, LAUNCH, POP], turn


def test_addresses_of_gradients_are_copied_when_they_change(stub):
    opt, grads = several([5, 1000, 3])()
    other = ones([5, 1000, 3])
    opt.step(grads)
    copied = []
    for given in (grads, other, other, [None, *other[1:]], grads, grads):
        stub.clear()
        opt.step(given)
        copied.append(len(stub.calls(COPY)) - 1)
        place = numbers(stub.calls(LAUNCH)[0])[2]
        wanted = [0 if grad is None else grad.address for grad in given]
        assert at(stub, place, 3, np.int64).tolist() == wanted
    assert copied == [0, 1, 0, 1, 1, 0]


def test_pinned_memory_is_not_written_before_it_was_read(stub):
    """By the host, while the device may still copy from it."""
    opt, grads = several([5, 3])()
    pairs = grads, ones([5, 3])
    stub.hold()
    for step in range(40):
        opt.step(pairs[step % 2])
    stub.hold(False)
    read, recorded, waited = {}, {}, {}
    pinned, reused = set(), 0
    for k, call in enumerate(stub.calls()):
        if call.name == "cuMemHostAlloc":
            begin = call.arguments["address"]
            pinned |= {*range(begin, begin + call.arguments["size"])}
        elif call.name == RECORD:
            recorded[call.arguments["event"]] = k
        elif call.name == WAIT:  # for all that was enqueued before it was recorded
            event = call.arguments["event"]
            waited[event] = recorded.get(event, -1)
        elif call.name == COPY and call.arguments["from"] in pinned:
            place = call.arguments["from"]
            if place in read:
                reused += 1
                assert max(waited.values()) > read[place], k
            read[place] = k
    assert reused >= 2 * (40 - cuda_calls.Board.TURNS)


def test_what_is_on_the_device_is_what_was_written(stub):
    """Where rows of scalars change in every step: the copy of each is its own."""
    opt, grads = several([5])()
    seen = []
    for step in range(20):
        opt.lr = step + 1.0
        stub.clear()
        opt.step(grads)
        (launch,) = stub.calls(LAUNCH)
        row = at(stub, numbers(launch)[3], 6, np.float32)
        seen.append(row.tolist())
        expected = fastopt.adamw.scalars(step + 1, lr=step + 1.0)
        assert row.tolist() == np.float32([1.0, *expected]).tolist()
    assert len({*map(tuple, seen)}) == 20


# Streams


class OfLibrary:
    """An array of another library: all that it shows is the interface."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


OfCupy = type("ndarray", (OfLibrary,), {"__module__": "cupy"})
OfTorch = type("Tensor", (OfLibrary,), {"__module__": "torch"})


@pytest.fixture(params=["cupy", "torch"])
def library(request, monkeypatch):
    """A class of a library's arrays, and a function that sets its current stream."""
    current = SimpleNamespace(ptr=0)
    if request.param == "cupy":
        asked = SimpleNamespace(get_current_stream=lambda: current)
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=asked))
        kind = OfCupy
    else:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        numbers = {0: current}
        monkeypatch.setattr(
            torch._C,
            "_cuda_getCurrentRawStream",
            lambda number: numbers[number].ptr,
            raising=False,
        )
        kind = OfTorch
    return kind, lambda stream: setattr(current, "ptr", stream)


def used(stub):
    """The streams of all that was enqueued, but for what is prepared aside."""
    calls = [call for call in stub.calls() if "stream" in call.arguments]
    aside = cuda_calls.context(0).aside.value
    return {call.arguments["stream"] for call in calls} - {aside}


@pytest.mark.parametrize(
    "asked",
    [
        *({}, {"clip_norm": 0.5}, {"zero_grads": True, "clip_value": 1.0}),
        {"weights": [0.5, 2.0], "zero_grads": True},
        {"weights": [0.5, 2.0], "clip_norm": 0.5},
    ],
    ids=lambda asked: " ".join(asked) or "plain",
)
@pytest.mark.parametrize("name", ["adamw", "lamb", "Adafactor"])
def test_a_step_is_on_the_current_stream(stub, library, name, asked):
    """All that it enqueues, and what it waits for: also when the stream has changed."""
    kind, choose = library
    opt = getattr(fastopt, name)(list(map(kind, ones([(5, 3), (33,)]))))
    grads = list(map(kind, ones([(5, 3), (33,)])))
    if "weights" in asked:
        grads = [grads, list(map(kind, ones([(5, 3), (33,)])))]
    for stream in (stream_made(stub), 0, stream_made(stub)):
        choose(stream)
        for _ in range(2):
            stub.clear()
            opt.step(grads, **asked)
            assert stub.calls(LAUNCH) and opt.steps
            enqueued = used(stub)
            if opt.steps > 1:  # what is allocated is cleared apart
                assert enqueued == {stream}
            else:
                assert enqueued <= {stream, 0}


def test_what_is_read_waits_for_the_steps(stub, library):
    """State and parameters are copied to the host on the stream of the steps."""
    kind, choose = library
    opt = fastopt.adamw(kind(ones([33])[0]), ema=0.9)
    grad = kind(ones([33])[0])
    stream = stream_made(stub)
    choose(stream)
    opt.step(grad)
    stub.clear()
    opt.state_dict()
    copies = stub.calls("cuMemcpyDtoHAsync_v2")
    assert copies and used(stub) == {stream}


# Addresses


def test_the_table_has_the_addresses(stub):
    """Of misaligned views and of sizes of all kinds."""
    sizes, offsets = (4097, 0, 1, 33, 4096), (0, 0, 1, 0, 3)
    places = [
        [put(np.ones(n, np.float32), k) for _ in range(3)]
        for n, k in zip(sizes, offsets, strict=True)
    ]
    segments = [
        Segment(p, (m, v), row, first=100 * k)
        for k, ((p, m, v), row) in enumerate(zip(places, (0, 1, 1, 0, 2), strict=True))
    ]
    count = np.zeros(1, np.int64)
    step = cuda_driver.bind(fastopt.adamw, segments, count, np.zeros((2, 3, 0)))
    grads = [*ones(sizes[:3]), None, put(np.ones(4096, np.float32), 1)]
    rows = [tuple(np.arange(6.0) + row) for row in range(3)]
    stub.clear()
    assert step.take(grads) and step(rows, Request())
    assert count[0] == 1
    (launch,) = stub.calls(LAUNCH)
    covered = 256 * 4  # elements of a block
    blocks = [-(-size // covered) for size in sizes]
    assert launch.arguments["grid"] == (sum(blocks), 1, 1)
    assert launch.arguments["block"] == (256, 1, 1)
    of_blocks, table, of_grads, board, _, by_row, *_ = numbers(launch)
    assert by_row == 1
    segment_of = at(stub, of_blocks, sum(blocks), np.int64).tolist()
    assert segment_of == np.repeat(range(5), blocks).tolist()
    told = at(stub, of_grads, 5, np.int64).tolist()
    empty, none = -1, 0
    assert told == [grads[0].address, empty, grads[2].address, none, grads[4].address]
    assert grads[4].address % 16 == 4
    assert at(stub, board, (3, 6), np.float32).tolist() == [[*row] for row in rows]
    entries = at(stub, table, (5, cuda_table.BUFFERS + 3), np.int64)
    wanted = [[array.address for array in arrays] for arrays in places]
    assert entries[:, cuda_table.BUFFERS :].tolist() == wanted
    assert entries[:, cuda_table.SIZE].tolist() == list(sizes)
    assert entries[:, cuda_table.ROW].tolist() == [0, 1, 1, 0, 2]
    assert entries[:, cuda_table.ALIGNED].tolist() == [1, 1, 0, 1, 0]
    first = np.cumsum([0, *blocks[:-1]]).tolist()
    assert entries[:, cuda_table.FIRST_BLOCK].tolist() == first
    assert entries[:, cuda_table.FIRST_ELEMENT].tolist() == [0, 100, 200, 300, 400]


def test_the_table_where_streams_are_encoded(stub):
    """At 8 bytes a vector of 16 bits begins, but none of float32; all parts are there,
    and what is drawn."""
    bf16, m8, v8 = (FORMATS[name] for name in ("bf16", "m8", "v8"))
    size, groups = 4097, 65

    def words(offset):
        return Encoded(bf16, (put(np.ones(size, np.uint16), offset),))

    def eight(format):
        parts = np.ones(size, np.uint8), np.ones(groups, np.float32), np.zeros(1, "i8")
        return Encoded(format, tuple(map(put, parts)))

    numbers_of = [put(np.ones(size, np.float32), k) for k in (0, 0, 2)]
    other = put(np.ones(size, np.float32))
    kinds = [
        (words(4), (numbers_of[0], other)),
        (words(2), (numbers_of[1], other)),
        (words(4), (numbers_of[2], other)),
        (words(4), (eight(m8), eight(v8))),
    ]
    segments = [Segment(p, state, k % 2, first=7) for k, (p, state) in enumerate(kinds)]
    count = np.zeros(1, np.int64)
    step = cuda_driver.bind(fastopt.adamw, segments, count, np.zeros((2, 2, 0)))
    grads = [words(4)] * 4
    step.take(grads)
    rows = [(0.5, *[0.25] * 5), (0.75, *[0.125] * 5)]
    (call,) = step.calls(rows, Request(), [5, 9])
    stub.clear()
    assert call()
    (launch,) = stub.calls(LAUNCH)
    _, table, of_grads, board, steps, by_row, by_step, _ = numbers(launch)
    stride = cuda_table.BUFFERS + 1 + 3 + 3
    entries = at(stub, table, (4, stride), np.int64)
    for row, (param, state) in zip(entries, kinds, strict=True):
        parts = [part for s in (param, *state) for part in cuda_table.parts(s)]
        addresses = [part.address for part in parts]
        begin = cuda_table.BUFFERS
        assert row[begin : begin + len(parts)].tolist() == addresses
    assert entries[:, cuda_table.ALIGNED].tolist() == [1, 0, 0, 1]
    assert entries[:, cuda_table.KIND].tolist() == [0, 0, 0, 1]
    assert at(stub, of_grads, 4, np.int64).tolist() == [
        grad.parts[0].address for grad in grads
    ]
    assert at(stub, board, (2, 6), np.float32).tolist() == [[*row] for row in rows]
    assert at(stub, steps, 2, np.int64).tolist() == [5, 9] and by_row == by_step == 1


def test_sums_are_one_launch(stub):
    """And its sums are added up by chunks, in order."""
    sizes = CHUNK + 1, 0, 33, 5
    segments = [
        Segment(put(np.ones(n, np.float32), k), tuple(ones([n, n])), k % 2)
        for k, n in enumerate(sizes)
    ]
    count, carry = np.zeros(1, np.int64), np.zeros((2, 2, 0))
    rows = [(0.5, *[0.25] * fastopt.lamb.measure_count, 9.0), (1.0, *[2.0] * 9)]
    step = cuda_driver.bind(fastopt.lamb, segments, count, carry)
    step.take([*ones(sizes[:3]), None])
    step._measuring._sums[2] = put(
        np.arange(8.0).reshape(4, 2)
    )  # as if the kernel had been run
    stub.clear()
    found = step.sums("rule", rows, Request(limits=limits(0.75)))
    assert found == [(0.0 + 2.0, 1.0 + 3.0), (0.0, 0.0), (4.0, 5.0), None]
    (launch,) = stub.calls(LAUNCH)
    assert launch.arguments["kernel"] == "Sums"
    of_chunks, total, table, of_grads, board, sums, by_row = numbers(launch)
    assert (total, by_row, sums) == (4, 1, step._measuring._sums[2].address)
    assert launch.arguments["grid"] == (1, 1, 1)
    assert at(stub, of_chunks, 4, np.int64).tolist() == [0, 0, 2, 3]
    constants = fastopt.lamb.measure_count
    wanted = [[*row[: 1 + constants], -0.75, 0.75] for row in rows]
    shape = 2, 3 + constants
    assert at(stub, board, shape, np.float32).tolist() == wanted
    told = at(stub, of_grads, 4, np.int64)
    assert told[1] == -1 and told[3] == 0 and told[0] and told[2]
    entries = at(stub, table, (4, cuda_table.BUFFERS + 3), np.int64)
    assert entries[:, cuda_table.FIRST_CHUNK].tolist() == [0, 2, 2, 3]
    stub.clear()
    step.sums("rule", rows, Request(limits=limits(0.75)))
    assert not stub.calls("cuMemAlloc_v2", "cuMemHostAlloc")


def test_arrays_on_several_devices_are_refused(stub):
    params, grads = ones([5, 7]), ones([5, 7])
    opt = fastopt.adamw(params)
    grads[1].number = 1
    with pytest.raises(ValueError, match="gradient is on device 1, but .* device 0"):
        opt.step(grads)
    assert opt.steps == 0 and not stub.calls(LAUNCH)
    params[1].number = 1
    with pytest.raises(ValueError, match="are on the devices 0, 1; make an"):
        fastopt.adamw(params)


@pytest.mark.parametrize("name", sorted({*STEPS} - {"a thousand tensors"}))
def test_memory_is_freed_with_the_optimizer(stub, name):
    kinds = "device", "host", "event"
    before = list(map(stub.live, kinds))
    made, asked = STEPS[name]
    opt, grads = made()
    opt.step(grads, **asked)
    opt.step(grads, clip_norm=1.0)
    assert all(
        now > old for now, old in zip(map(stub.live, kinds), before, strict=True)
    )
    del opt, grads
    gc.collect()
    assert list(map(stub.live, kinds)) == before


@pytest.mark.parametrize("nth", range(1, 6))
def test_memory_is_freed_if_a_board_cannot_be_made(stub, nth):
    """Whichever call fails, also the one that waits for memory to be made."""
    kinds = "device", "host", "event"
    context = cuda_calls.context(0)
    before = list(map(stub.live, kinds))
    for function in ("cuStreamSynchronize", "cuThreadExchangeStreamCaptureMode"):
        stub.fail(function, cuda_stub.OUT_OF_MEMORY, nth)
        with contextlib.suppress(cuda_calls.DriverError):
            cuda_calls.Board(context, 8)
        gc.collect()
        assert list(map(stub.live, kinds)) == before
        stub.clear_failures()


def test_parameters_outlive_the_optimizer(stub):
    param, grad = ones([33, 33])
    opt = fastopt.adamw(param)
    opt.step(grad)
    address = param.address
    del opt
    gc.collect()
    assert param.copy_to_host().tolist() == [1.0] * 33 and param.address == address


# Kernels from the cache

PROGRAM = """
import sys
import numpy as np
import cuda_stub
import fastopt
from fastopt.backends.cuda_arrays import empty
stub = cuda_stub.Stub(sys.argv[1])
opt = fastopt.adamw(empty((33,), np.float32, 0))
opt.step(empty((33,), np.float32, 0), nonfinite="skip")
kernels = [call.arguments["kernel"] for call in stub.calls("cuLaunchKernel")]
assert len(kernels) == 3 and all("fastopt" in kernel for kernel in kernels), kernels
print(*sorted({"numba", "llvmlite", "cuda.core"} & {*sys.modules}))
"""


def test_a_kernel_from_the_cache_needs_no_numba(tmp_path):
    pytest.importorskip("numba_cuda")
    pytest.importorskip("cuda.core")
    path = cuda_stub.build(tmp_path)
    environment = {
        **os.environ,
        cuda_stub.VARIABLE: str(path),
        "FASTOPT_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT, ROOT))),
    }
    imported = []
    for _ in range(2):
        command = sys.executable, "-c", PROGRAM, str(path)
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        imported.append(run.stdout.split())
    assert "numba" in imported[0] and imported[1] == []
