"""The stub of CUDA's driver refuses what the driver refuses, and records all calls."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import cuda_stub
import pytest
from cuda_stub import needs_compiler

pytestmark = needs_compiler

P, SIZE, U32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
NON_BLOCKING = 1
LAUNCH = (P, *[U32] * 7, P, P, P)


class Device:
    """Calls of the stub, in a current context."""

    def __init__(self, stub):
        self.stub, self.driver = stub, stub.driver
        self.driver.cuLaunchKernel.argtypes = LAUNCH
        assert self.call("cuInit", 0) == 0
        self.context = self.made("cuDevicePrimaryCtxRetain", 0)
        assert self.call("cuCtxSetCurrent", self.context) == 0

    def call(self, name, *arguments):
        return getattr(self.driver, name)(*arguments)

    def made(self, name, *arguments):
        """A handle, or an address."""
        out = P()
        assert self.call(name, ctypes.byref(out), *arguments) == 0
        return P(out.value)

    def memory(self, size):
        return self.made("cuMemAlloc_v2", SIZE(size))

    def kernel(self, name):
        module = self.made("cuModuleLoadData", b"any image")
        return self.made("cuModuleGetFunction", module, name)

    def launch(self, kernel, stream=None, grid=1, parameters=None):
        shape = grid, 1, 1, 256, 1, 1, 0
        return self.driver.cuLaunchKernel(kernel, *shape, stream, parameters, None)


@pytest.fixture
def device(tmp_path):
    return Device(cuda_stub.Stub(cuda_stub.build(tmp_path)))


def after(address, offset):
    return P(address.value + offset)


def test_copies(device):
    size = 1000
    data, back = bytes(range(250)) * 4, ctypes.create_string_buffer(1000)
    first, second = device.memory(size), device.memory(size)
    assert first.value % 256 == second.value % 256 == 0
    assert device.call("cuMemcpyHtoD_v2", first, data, SIZE(size)) == 0
    assert device.call("cuMemcpyDtoDAsync_v2", second, first, SIZE(size), None) == 0
    assert device.call("cuMemsetD32Async", after(second, 8), 3, SIZE(2), None) == 0
    assert device.call("cuMemsetD8Async", after(second, 16), 7, SIZE(1), None) == 0
    assert device.call("cuMemcpyDtoHAsync_v2", back, second, SIZE(size), None) == 0
    wanted = data[:8] + b"\3\0\0\0\3\0\0\0\7" + data[17:]
    assert back.raw == device.stub.read(second.value, size) == wanted


def test_copies_out_of_bounds(device):
    memory, host = device.memory(100), ctypes.create_string_buffer(200)
    copies = {
        "beyond the end": ("cuMemcpyHtoD_v2", memory, host, SIZE(101)),
        "from the middle": ("cuMemcpyDtoH_v2", host, after(memory, 50), SIZE(51)),
        "before the start": ("cuMemcpyHtoD_v2", after(memory, -1), host, SIZE(1)),
        "not the device's": ("cuMemcpyHtoD_v2", host, host, SIZE(1)),
        "not the host's": ("cuMemcpyHtoD_v2", memory, memory, SIZE(1)),
        "asynchronous": ("cuMemcpyHtoDAsync_v2", memory, host, SIZE(101), None),
        "an odd address": ("cuMemsetD32Async", after(memory, 2), 0, SIZE(1), None),
        "a memset": ("cuMemsetD32Async", memory, 0, SIZE(26), None),
    }
    codes = {key: device.call(*arguments) for key, arguments in copies.items()}
    assert codes == dict.fromkeys(copies, cuda_stub.INVALID_VALUE)
    assert device.call("cuMemcpyHtoD_v2", memory, host, SIZE(100)) == 0


def test_freed_memory(device):
    memory = device.memory(100)
    assert device.stub.read(memory.value, 100) == b"\xcd" * 100  # and not zeros
    assert device.stub.live("device") == 1
    assert device.call("cuMemFree_v2", after(memory, 4)) == cuda_stub.INVALID_VALUE
    assert device.call("cuMemFreeHost", memory) == cuda_stub.INVALID_VALUE
    assert device.call("cuMemFree_v2", memory) == 0
    assert device.stub.live("device") == 0
    host = ctypes.create_string_buffer(8)
    copy = "cuMemcpyDtoH_v2", host, memory, SIZE(8)
    assert device.call(*copy) == cuda_stub.INVALID_VALUE
    assert device.call("cuMemFree_v2", memory) == cuda_stub.INVALID_VALUE
    assert device.call("cuMemAlloc_v2", ctypes.byref(P()), SIZE(1 << 40)) == 2


def test_a_context_is_current_in_each_thread_of_its_own(device):
    size = SIZE(8)
    allocation = "cuMemAlloc_v2", ctypes.byref(P()), size
    codes = []
    thread = threading.Thread(target=lambda: codes.append(device.call(*allocation)))
    thread.start()
    thread.join()
    assert codes == [cuda_stub.INVALID_CONTEXT]
    assert device.call("cuCtxPushCurrent_v2", device.context) == 0
    assert device.made("cuCtxPopCurrent_v2").value == device.context.value
    assert device.call(*allocation) == 0
    assert device.call("cuDevicePrimaryCtxRelease_v2", 0) == 0
    assert device.call(*allocation) == cuda_stub.CONTEXT_IS_DESTROYED
    assert device.stub.live("device") == device.stub.live("context") == 0


def test_nothing_works_before_the_initialization(tmp_path):
    stub = cuda_stub.Stub(cuda_stub.build(tmp_path))
    number = ctypes.c_int()
    assert stub.driver.cuDriverGetVersion(ctypes.byref(number)) == 0
    count = stub.driver.cuDeviceGetCount
    assert count(ctypes.byref(number)) == cuda_stub.NOT_INITIALIZED
    assert stub.driver.cuInit(0) == count(ctypes.byref(number)) == 0
    assert number.value == 1
    capability = []
    for attribute in (75, 76, 16):
        assert stub.driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0) == 0
        capability.append(number.value)
    assert capability == [9, 0, 16]


def test_launches_are_recorded(device):
    device.stub.parameters("adamw", [8, 4])
    kernel, stream = device.kernel(b"adamw_f32"), device.made("cuStreamCreate", 1)
    values = ctypes.c_int64(258), ctypes.c_float(1.0)
    parameters = (P * 2)(*map(ctypes.addressof, values))
    device.stub.clear()
    assert device.launch(kernel, stream, 7, parameters) == 0
    assert device.launch(kernel, stream, 0, parameters) == cuda_stub.INVALID_VALUE
    assert device.launch(kernel, stream) == cuda_stub.INVALID_VALUE
    assert device.launch(stream, stream) == cuda_stub.INVALID_HANDLE
    first, *others = device.stub.calls("cuLaunchKernel")
    assert first.arguments == {
        "kernel": "adamw_f32",
        "function": kernel.value,
        "grid": (7, 1, 1),
        "block": (256, 1, 1),
        "shared": 0,
        "stream": stream.value,
        "parameters": ctypes.addressof(parameters),
        "values": (bytes(values[0]), bytes(values[1])),
    }
    assert (first.result, [call.result for call in others]) == (0, [1, 1, 400])
    device.stub.quiet()
    device.stub.clear()
    assert device.launch(kernel, stream, 7, parameters) == 0
    assert device.stub.calls() == []


def test_what_is_destroyed_is_not_used(device):
    module = device.made("cuModuleLoadData", b"any image")
    kernel = device.made("cuModuleGetFunction", module, b"sgd")
    same = device.made("cuModuleGetFunction", module, b"sgd")
    assert kernel.value == same.value
    stream, event = device.made("cuStreamCreate", 0), device.made("cuEventCreate", 2)
    assert device.call("cuStreamDestroy_v2", stream) == 0
    assert device.launch(kernel, stream) == cuda_stub.INVALID_HANDLE
    assert device.call("cuEventRecord", event, stream) == cuda_stub.INVALID_HANDLE
    assert device.launch(kernel) == device.call("cuModuleUnload", module) == 0
    assert device.launch(kernel) == cuda_stub.INVALID_HANDLE
    assert device.call("cuEventDestroy_v2", event) == 0
    assert device.call("cuEventQuery", event) == cuda_stub.INVALID_HANDLE
    kinds = "module", "function", "stream", "event"
    assert not any(map(device.stub.live, kinds))


def test_globals(device):
    module = device.made("cuModuleLoadData", b"any image")
    size = SIZE()
    ask = "cuModuleGetGlobal_v2", ctypes.byref(P()), ctypes.byref(size), module, b"x"
    assert device.call(*ask) == cuda_stub.NOT_FOUND
    device.stub.make_global("x", 24)
    found = device.made("cuModuleGetGlobal_v2", ctypes.byref(size), module, b"x")
    assert size.value == 24
    assert device.call("cuMemcpyHtoD_v2", found, b"x" * 24, size) == 0
    assert device.call("cuMemFree_v2", found) == cuda_stub.INVALID_VALUE
    assert device.call("cuModuleUnload", module) == device.stub.live("global") == 0


def test_events_are_held(device):
    stream, kernel = device.made("cuStreamCreate", 1), device.kernel(b"sgd")
    early, late = device.made("cuEventCreate", 2), device.made("cuEventCreate", 2)
    ready, not_ready = 0, cuda_stub.NOT_READY
    assert device.call("cuEventQuery", early) == ready  # it was never recorded
    assert device.call("cuEventRecord", early, stream) == 0
    assert device.call("cuEventQuery", early) == ready
    device.stub.hold()
    for event in (early, late):
        assert device.launch(kernel, stream) == 0
        assert device.call("cuEventRecord", event, stream) == 0
    assert device.call("cuEventQuery", early) == not_ready
    assert device.call("cuEventSynchronize", early) == 0
    assert device.call("cuEventQuery", early) == ready
    assert device.call("cuEventQuery", late) == not_ready
    assert device.call("cuStreamQuery", stream) == not_ready
    assert device.call("cuStreamSynchronize", stream) == 0
    assert device.call("cuEventQuery", late) == ready
    assert device.call("cuEventRecord", late, stream) == 0
    assert device.call("cuEventQuery", late) == not_ready
    device.stub.hold(False)
    assert device.call("cuEventQuery", late) == ready


FORBIDDEN = {
    "cuMemAlloc_v2": (ctypes.byref(P()), SIZE(8)),
    "cuMemHostAlloc": (ctypes.byref(P()), SIZE(8), 0),
    "cuMemFree_v2": ("memory",),
    "cuMemcpyHtoD_v2": ("memory", b"12345678", SIZE(8)),
    "cuMemcpyDtoH_v2": (ctypes.create_string_buffer(8), "memory", SIZE(8)),
    "cuStreamSynchronize": (None,),
    "cuStreamQuery": (None,),
    "cuEventSynchronize": ("event",),
    "cuEventQuery": ("event",),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (ctypes.byref(P()), b"any image"),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_capture_forbids(device, name):
    stream, kernel = device.made("cuStreamCreate", 1), device.kernel(b"sgd")
    named = {"memory": device.memory(8), "event": device.made("cuEventCreate", 2)}
    arguments = [
        named[value] if isinstance(value, str) else value for value in FORBIDDEN[name]
    ]
    status = ctypes.c_int()
    with device.stub.capture(stream.value):
        assert device.launch(kernel, stream) == 0
        assert device.call("cuStreamIsCapturing", stream, ctypes.byref(status)) == 0
        assert status.value == cuda_stub.ACTIVE
        assert device.call(name, *arguments) == cuda_stub.CAPTURE_UNSUPPORTED
        assert device.stub.capture_status(stream.value) == cuda_stub.INVALIDATED
        assert device.launch(kernel, stream) == cuda_stub.CAPTURE_INVALIDATED
    assert device.stub.capture_status(stream.value) == cuda_stub.NONE
    assert device.call(name, *arguments) == 0


def test_the_legacy_stream_in_a_capture(device):
    kernel = device.kernel(b"sgd")
    with device.stub.capture(device.made("cuStreamCreate", NON_BLOCKING).value):
        assert device.launch(kernel) == 0
    blocking = device.made("cuStreamCreate", 0).value
    with device.stub.capture(blocking):
        assert device.launch(kernel) == cuda_stub.CAPTURE_IMPLICIT
        assert device.stub.capture_status(blocking) == cuda_stub.INVALIDATED


def test_a_stream_joins_a_capture(device):
    first, second = (device.made("cuStreamCreate", NON_BLOCKING) for _ in range(2))
    inside, outside = (device.made("cuEventCreate", 2) for _ in range(2))
    memory = device.memory(4)
    assert device.call("cuMemsetD8Async", memory, 1, SIZE(4), second) == 0
    assert device.call("cuEventRecord", outside, second) == 0
    status = device.stub.capture_status
    with device.stub.capture(first.value):
        assert device.call("cuEventRecord", inside, first) == 0
        assert device.call("cuStreamWaitEvent", second, inside, 0) == 0
        assert status(second.value) == cuda_stub.ACTIVE
        assert device.call("cuMemsetD8Async", memory, 2, SIZE(4), second) == 0
        assert device.stub.read(memory.value, 4) == b"\1" * 4  # it is only recorded
        wait = device.call("cuStreamWaitEvent", second, outside, 0)
        assert wait == cuda_stub.CAPTURE_ISOLATION
        assert status(first.value) == status(second.value) == cuda_stub.INVALIDATED
    assert status(second.value) == cuda_stub.NONE
    assert device.call("cuEventQuery", inside) == cuda_stub.CAPTURED_EVENT


def test_failures(device):
    kernel = device.kernel(b"sgd")
    device.stub.fail("cuLaunchKernel", cuda_stub.OUT_OF_MEMORY, nth=2)
    codes = [device.launch(kernel) for _ in range(3)]
    assert codes == [0, cuda_stub.OUT_OF_MEMORY, 0]
    device.stub.fail("cuLaunchKernel", cuda_stub.ILLEGAL_ADDRESS)
    words = ctypes.c_char_p()
    assert device.launch(kernel) == cuda_stub.ILLEGAL_ADDRESS
    assert device.call("cuCtxSynchronize") == cuda_stub.ILLEGAL_ADDRESS
    name = "cuGetErrorName", cuda_stub.ILLEGAL_ADDRESS, ctypes.byref(words)
    assert device.call(*name) == 0
    assert words.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    device.stub.clear_failures()
    assert device.launch(kernel) == device.call("cuCtxSynchronize") == 0


def test_threads(device):
    def work():
        assert device.call("cuCtxSetCurrent", device.context) == 0
        for _ in range(200):
            memory = device.memory(64)
            codes.append(device.call("cuMemFree_v2", memory))

    codes = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    device.stub.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 800
    assert len(device.stub.calls("cuMemAlloc_v2", "cuMemFree_v2")) == 1600


def test_the_stub_in_this_process_and_another(device):
    class Cached:
        library = None

    program = (
        "import ctypes, os, cuda_stub\n"
        "stub = cuda_stub.Stub(os.environ[cuda_stub.VARIABLE])\n"
        "ctypes.CDLL(os.environ[cuda_stub.VARIABLE]).cuInit(0)\n"
        "print(*(call.name for call in stub.calls()))\n"
    )
    with device.stub.installed((Cached, "library")):
        assert Cached.library is device.driver
        support = str(Path(cuda_stub.__file__).parent)
        environment = os.environ | {"PYTHONPATH": support}
        command = sys.executable, "-c", program
        shown = subprocess.check_output(command, env=environment, text=True)
    assert shown.split() == ["cuInit"]
    assert Cached.library is None and cuda_stub.VARIABLE not in os.environ
    assert device.stub.calls() == []
