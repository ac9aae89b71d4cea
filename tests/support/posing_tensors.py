"""Tensors in host memory that pose as a GPU's, for Numba's simulator."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import cycle

import pytest
import torch
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from torch import Tensor

from fastopt.backends import cuda_arrays, cuda_device, cuda_driver
from fastopt.torch import memory
from fastopt.torch.state import BEGUN

SHAPES = (3, 5), (7,), (130,), (0,), (9,)
MIXED = torch.bfloat16, torch.float32, torch.bfloat16, torch.float16, torch.float32


def posing(name, tensor):
    return cuda_arrays.as_device_array(name, FakeCUDAArray(tensor.numpy()))


@pytest.fixture(autouse=True)
def posing_arrays(monkeypatch):
    monkeypatch.setattr(cuda_driver, "as_array", posing)


@contextmanager
def gpu(on=True):
    """Let tensors pose as a GPU's meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "on_gpu", lambda tensor: on)
        patch.setattr(memory, "is_captured", lambda tensors: False)
        yield


@contextmanager
def reads(found):
    """Note what is read back to the host meanwhile."""

    def noting(name, function):
        def noted(*arguments):
            found.append(name)
            return function(*arguments)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for module in (cuda_device, cuda_arrays.device):
            patch.setattr(module, "download", noting("download", module.download))
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu"):
            patch.setattr(Tensor, name, noting(name, getattr(Tensor, name)))
        yield


def quiet(function):
    """Call a function that must not wait for the device."""
    found = []
    with reads(found):
        result = function()
    assert found == []
    return result


def drawn(seed, dtype=torch.float32, shapes=SHAPES):
    """Return random tensors. ``dtype`` may be several, which take turns."""
    random = torch.Generator().manual_seed(seed)
    dtypes = cycle(dtype if isinstance(dtype, tuple) else (dtype,))
    return [torch.randn(s, generator=random).to(next(dtypes)) for s in shapes]


def params_of(dtype=torch.float32, shapes=SHAPES):
    return [torch.nn.Parameter(p) for p in drawn(0, dtype, shapes)]


def give(params, seed, absent=()):
    grads = drawn(seed, tuple(p.dtype for p in params), [p.shape for p in params])
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = None if i in absent else grad


def kept(opt):
    """Everything that steps change, in an order; but for what is only on a GPU."""
    found = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    for entry in opt.state.values():
        values = [value for key, value in entry.items() if key != BEGUN]
        found += [v.detach().float() for v in values if isinstance(v, Tensor)]
    return found


class FakeScaler:
    """Sets what GradScaler does for a step."""

    def __init__(self, opt):
        self.opt = opt

    def step(self, found, scale, **options):
        self.opt.found_inf = torch.tensor(float(found))
        self.opt.grad_scale = torch.tensor(float(scale))
        try:
            self.opt.step(**options)
        finally:
            del self.opt.found_inf, self.opt.grad_scale
