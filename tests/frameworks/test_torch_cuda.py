"""The classes of fastopt.torch on CUDA tensors: their bits in Numba's simulator, and
what a captured step asks of the driver, of which there is a stub."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_stub
import numpy as np
import pytest

from fastopt.backends import cuda_arrays, cuda_calls, cuda_driver, cuda_jobs
from fastopt.backends.cuda_device import SIMULATED
from fastopt.backends.kernel_cache import Kernel

torch = pytest.importorskip("torch", reason="torch is not installed")

import fastopt.torch as ft  # noqa: E402
from fastopt.torch import memory  # noqa: E402

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def test_in_the_simulator():
    pytest.importorskip("numba_cuda")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", SUPPORT / "torch_cuda.py"],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# With a stub of the driver ----------------------------------------------------------


def forget():
    gc.collect()
    cached = cuda_calls.library, cuda_calls.prepared, cuda_calls.context
    for function in (*cached, cuda_jobs.loaded):
        function.cache_clear()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The stub, a stream, and tensors that pose as those of a GPU."""

    def named(job, capability):
        stage = getattr(job, "stage", "")
        return Kernel(type(job).__name__ + stage.title(), (), b"any image")

    def as_array(name, tensor):
        if isinstance(tensor, cuda_arrays.DeviceArray):
            return tensor
        numbers = tensor.numpy()
        of = numbers.ctypes.data, numbers.shape, numbers.dtype, tensor, 0
        return cuda_arrays.DeviceArray(*of, lambda: stream)

    stub = cuda_stub.Stub(cuda_stub.build(tmp_path))
    forget()
    with stub.installed():
        monkeypatch.setattr(cuda_jobs, "obtained", named)
        monkeypatch.setattr(cuda_driver, "missing", lambda: None)
        monkeypatch.setattr(cuda_driver, "as_array", as_array)
        monkeypatch.setattr(memory, "on_gpu", lambda tensor: True)
        handle = cuda_calls.Handle()
        with cuda_calls.context(0):
            cuda_calls.prepared("cuStreamCreate")(cuda_calls.ctypes.byref(handle), 1)
        stream = handle.value
        monkeypatch.setattr(
            memory,
            "is_captured",
            lambda tensors: stub.capture_status(stream) != cuda_stub.NONE,
        )
        yield SimpleNamespace(stub=stub, stream=stream)
        forget()


def in_device_memory(shape, dtype=torch.float32):
    """A parameter in the stub's device memory."""
    stored = np.dtype(f"i{dtype.itemsize}")
    array = cuda_arrays.empty(shape, stored, 0)
    memory = (cuda_calls.ctypes.c_char * array.nbytes).from_address(array.address)
    memory.owner = array
    tensor = torch.from_numpy(np.frombuffer(memory, stored).reshape(shape))
    return torch.nn.Parameter(tensor.view(dtype))


def give(params):
    for param in params:
        param.grad = torch.ones_like(param)


CASES = {
    "plain": ("AdamW", {}, ["SettleScalars", "Update"]),
    "clipped": (
        "AdamW",
        {"clip_norm": 1.0},
        ["Sums", "SettleScalars", "Update"],
    ),
    "skipping": (
        "Lion",
        {"nonfinite": "skip"},
        ["Sums", "SettleScalars", "Update"],
    ),
    "LAMB": (
        "LAMB",
        {"clip_norm": 1.0},
        ["Sums", "SettleScalars", "Sums", "SettleSettle", "Update"],
    ),
}


@cuda_stub.needs_compiler
@pytest.mark.skipif(SIMULATED, reason="the simulator has no driver")
@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_kernels_alone(gpu, case):
    """Nothing that it does besides invalidates the capture, or is a part of it. One
    launch is for parameters of all dtypes that are computed in float32."""
    name, make, kernels = CASES[case]
    params = [in_device_memory((3, 5)), in_device_memory((7,), torch.bfloat16)]
    opt = getattr(ft, name)(params, **make)
    opt.param_groups[0]["capturable"] = True
    opt.param_groups[0]["lr"] = torch.tensor(0.125)
    for _ in range(3):
        give(params)
        opt.step()
    give(params)  # they have moved
    gpu.stub.clear()
    with gpu.stub.capture(gpu.stream):
        opt.step()
        assert gpu.stub.capture_status(gpu.stream) == cuda_stub.ACTIVE
    enqueued = [
        call
        for call in gpu.stub.calls()
        if call.arguments.get("stream") == gpu.stream
        and call.name != "cuStreamIsCapturing"
    ]
    launched = [call.arguments.get("kernel", call.name) for call in enqueued]
    assert launched == kernels
    # Another graph, and a step that is not captured, have their own numbers.
    gpu.stub.clear()
    with gpu.stub.capture(gpu.stream):
        opt.step()
        assert gpu.stub.capture_status(gpu.stream) == cuda_stub.ACTIVE
    opt.step()
    assert gpu.stub.calls("cuLaunchKernel")
    assert not gpu.stub.calls("cuMemcpyDtoHAsync_v2")
    # What graphs use stays allocated when the steps are planned anew.
    live = gpu.stub.live("device")
    opt.load_state_dict(opt.state_dict())
    opt.step()
    gc.collect()
    assert gpu.stub.live("device") > live


@cuda_stub.needs_compiler
@pytest.mark.skipif(SIMULATED, reason="the simulator has no driver")
def test_an_optimizer_that_has_failed_refuses_to_go_on(gpu):
    """Until a checkpoint is loaded, on whichever path the step was."""
    for steps in (0, 3):
        params = [in_device_memory((5,)), in_device_memory((300,))]
        give(params)
        opt = ft.AdamW(params)
        saved = opt.state_dict()
        for _ in range(steps):
            opt.step()
        gpu.stub.fail("cuLaunchKernel", cuda_stub.OUT_OF_MEMORY)
        for use in (opt.step, opt.step, opt.state_dict, opt.step):
            with pytest.raises(RuntimeError, match="failed on the GPU"):
                use()
        gpu.stub.clear_failures()
        opt.load_state_dict(saved)
        opt.step()
        opt.state_dict()


def test_what_must_be_prepared_is_not_captured(gpu):
    params = [in_device_memory((3, 5))]
    opt = ft.AdamW(params, capturable=True)
    give(params)
    with gpu.stub.capture(gpu.stream):
        with pytest.raises(RuntimeError, match="run a few steps before capturing"):
            opt.step()
        assert gpu.stub.capture_status(gpu.stream) == cuda_stub.ACTIVE
    assert not opt.state
    opt.step()
    opt.found_inf = torch.tensor(0.0)
    with gpu.stub.capture(gpu.stream):
        with pytest.raises(RuntimeError, match="run a few steps before capturing"):
            opt.step()
    del opt.found_inf
    opt.step()
    with gpu.stub.capture(gpu.stream):
        opt.step()


@cuda_stub.needs_compiler
@pytest.mark.skipif(SIMULATED, reason="the simulator has no driver")
@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
@pytest.mark.parametrize("make", [{}, {"clip_norm": 1.0}], ids=["plain", "clipped"])
def test_steps_that_the_host_counts_are_not_captured(gpu, name, make):
    params = [in_device_memory((3, 5))]
    opt = getattr(ft, name)(params, **make)
    for _ in range(3):
        give(params)
        opt.step()
    with gpu.stub.capture(gpu.stream):
        with pytest.raises(RuntimeError, match="capturable=True"):
            opt.step()
        assert gpu.stub.capture_status(gpu.stream) == cuda_stub.ACTIVE
    gpu.stub.clear()
    opt.step()
    assert gpu.stub.calls("cuLaunchKernel")
