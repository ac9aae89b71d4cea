"""The classes of fastopt.torch on CUDA tensors: their bits in Numba's simulator, and
what a captured step asks of the driver, of which there is a stub."""

import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_stub
import numpy as np
import pytest

from fastopt.backends import (
    cuda_arrays,
    cuda_calls,
    cuda_device,
    cuda_driver,
    cuda_jobs,
)
from fastopt.backends.cuda_device import SIMULATED
from fastopt.backends.kernel_cache import Kernel

torch = pytest.importorskip("torch", reason="torch is not installed")

import fastopt.torch as ft  # noqa: E402
from fastopt.torch import memory  # noqa: E402

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.mark.parametrize("file", ["torch_cuda.py", "torch_cuda_parts.py"])
def test_in_the_simulator(file):
    pytest.importorskip("numba_cuda")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", SUPPORT / file],
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
        monkeypatch.setattr(cuda_device, "device_of", lambda address: 0)
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


KINDS = torch.float32, torch.float64  # whose launches are two


def with_two_launches(name, **options):
    params = [in_device_memory((300,), dtype) for dtype in KINDS]
    give(params)
    return getattr(ft, name)(params, **options)


@cuda_stub.needs_compiler
@pytest.mark.skipif(SIMULATED, reason="the simulator has no driver")
@pytest.mark.parametrize("use", ["step", "estimate", "accumulate"])
def test_no_door_leads_on(gpu, use):
    """The second of two launches fails."""
    opt = with_two_launches("SophiaG", ema=0.5)
    opt.step()
    saved = opt.state_dict()
    if use == "accumulate":
        opt.accumulate()
        give(opt.param_groups[0]["params"])
    gpu.stub.fail("cuLaunchKernel", cuda_stub.OUT_OF_MEMORY, 2)
    with pytest.raises(RuntimeError, match="failed on the GPU"):
        getattr(opt, use)()
    gpu.stub.clear_failures()
    opt.zero_grad()
    if use != "accumulate":  # there are sums, and there may not be both
        give(opt.param_groups[0]["params"])
    ones = [torch.ones(300), torch.ones(300, dtype=torch.float64)]
    doors = {
        "step": opt.step,
        "a parameter": lambda: opt.step_param(opt.param_groups[0]["params"][0]),
        "estimate": opt.estimate,
        "accumulate": opt.accumulate,
        "masters": lambda: opt.load_master_params([g.float() for g in ones]),
        "a group": lambda: opt.add_param_group({"params": [in_device_memory((3,))]}),
        "parameters": opt.eval_params,
        "their masters": opt.master_params,
        "averages": opt.ema_params,
        "state": opt.state_dict,
        "copy": lambda: copy.deepcopy(opt),
        "pickle": lambda: pickle.dumps(opt),
    }
    if use != "accumulate":
        doors["gradients"] = lambda: opt.step(grads=ones)
    for door in doors.values():
        gpu.stub.clear()
        with pytest.raises(RuntimeError, match="failed on the GPU"):
            door()
        assert not gpu.stub.calls("cuLaunchKernel")
    opt.load_state_dict(saved)
    give(opt.param_groups[0]["params"])
    opt.step()
    opt.estimate()


@cuda_stub.needs_compiler
@pytest.mark.skipif(SIMULATED, reason="the simulator has no driver")
@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
@pytest.mark.parametrize("shared", [False, True], ids=["two dtypes", "shared memory"])
@pytest.mark.parametrize("steps", [2, 3])
def test_all_launches_are_prepared_before_the_first(gpu, name, shared, steps):
    """What cannot be, changes nothing: here memory for the second launch of a kind."""
    if shared:
        first = in_device_memory((400,)).detach()
        params = [torch.nn.Parameter(part) for part in (first[:300], first[100:])]
        give(params)
        opt = getattr(ft, name)(params)
    else:
        opt = with_two_launches(name)
    for _ in range(steps):
        opt.step()
    fails = False
    for nth in range(1, 40):
        gpu.stub.clear()
        gpu.stub.fail("cuMemAlloc_v2", cuda_stub.OUT_OF_MEMORY, nth)
        before = [float(entry["step"]) for entry in opt.state.values()]
        try:
            opt.step(clip_value=0.5)
        except RuntimeError as error:
            gpu.stub.clear_failures()
            fails = True
            if gpu.stub.calls("cuLaunchKernel") and "Update" in {
                call.arguments["kernel"] for call in gpu.stub.calls("cuLaunchKernel")
            }:
                assert shared and name == "LAMB" and "load a checkpoint" in str(error)
                with pytest.raises(RuntimeError, match="load a checkpoint"):
                    opt.step()
                return
            after = [float(entry["step"]) for entry in opt.state.values()]
            assert before == after and "OUT_OF_MEMORY" in str(error)
        else:
            break
    gpu.stub.clear_failures()
    assert fails and not (shared and name == "LAMB")
    opt.step()


def test_a_gradient_on_another_device_is_refused():
    param = torch.nn.Parameter(torch.ones(3))
    opt = ft.AdamW([param])
    with pytest.raises(ValueError, match="gradient is on meta, but its parameter on c"):
        memory.check_device(param, torch.ones(3, device="meta"))
    opt.step(grads=[torch.ones(3)])


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Prodigy", "NAdam"])
def test_loaded_counts_stay_in_host_memory(name):
    """Where torch leaves them, for the host goes on counting; "meta" is like a GPU."""
    opt = getattr(ft, name)([torch.nn.Parameter(torch.ones(3))])
    give(opt.param_groups[0]["params"])
    opt.step()
    meta = [torch.nn.Parameter(torch.ones(3, device="meta"))]
    other = getattr(ft, name)(meta)
    other.load_state_dict(opt.state_dict())
    entry = other.state[meta[0]]
    assert {entry[key].device.type for key in entry if entry[key].dim()} == {"meta"}
    assert entry["step"].device.type == "cpu"


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
