"""The driver's stub as the driver of the CUDA backend, for tests in this process."""

from __future__ import annotations

import gc

import cuda_stub
import numpy as np
import pytest

from fastopt.backends import cuda_calls, cuda_driver, cuda_jobs
from fastopt.backends.cuda_arrays import empty
from fastopt.backends.cuda_device import SIMULATED
from fastopt.backends.kernel_cache import Kernel

needs_driver = [
    cuda_stub.needs_compiler,
    pytest.mark.skipif(SIMULATED, reason="the simulator has no driver"),
]

PUSH, POP = "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"
COPY, LAUNCH = "cuMemcpyHtoDAsync_v2", "cuLaunchKernel"
RECORD, WAIT = "cuEventRecord", "cuEventSynchronize"
# What all of the kernels take: numbers of 64 bits.
PARAMETERS = {"Update": 8, "Sums": 7, "Tiles": 6}


def forget():
    """Let the driver and what belongs to it be found anew."""
    gc.collect()
    cached = cuda_calls.library, cuda_calls.prepared, cuda_calls.context
    for function in (*cached, cuda_jobs.loaded):
        function.cache_clear()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The stub in place of the driver, and a name in place of each kernel."""

    def named(job, capability):
        return Kernel(type(job).__name__, (), b"any image")

    stub = cuda_stub.Stub(cuda_stub.build(tmp_path_factory.mktemp("driver")))
    forget()
    with stub.installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_jobs, "obtained", named)
        patch.setattr(cuda_driver, "missing", lambda: None)  # without numba-cuda, too
        for kernel, count in PARAMETERS.items():
            stub.parameters(kernel, [8] * count)
        yield stub
        forget()


@pytest.fixture
def stub(driver):
    gc.collect()
    driver.reset()
    yield driver
    driver.reset()


def put(values, offset=0):
    """A device array that begins so many elements into its memory."""
    values = np.asarray(values)
    room = empty((values.size + offset,), values.dtype, 0)
    part = room[offset:]
    if values.size:
        part[:] = values.reshape(-1)
    return part.reshape(values.shape)


def ones(sizes, dtype=np.float32):
    return [put(np.ones(size, dtype)) for size in sizes]


def names(calls):
    return [call.name for call in calls]


def numbers(launch):
    """The parameters of a launch."""
    values = launch.arguments["values"]
    return [int.from_bytes(value, "little", signed=True) for value in values]


def at(stub, address, shape, dtype):
    """What is in the device's memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(stub.read(address, size), dtype).reshape(shape)


def stream_made(stub):
    """A new stream."""
    stream = cuda_calls.Handle()
    with cuda_calls.context(0):
        cuda_calls.prepared("cuStreamCreate")(cuda_calls.ctypes.byref(stream), 1)
    return stream.value
