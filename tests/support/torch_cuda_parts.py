"""The classes of fastopt.torch with tensors that pose as a GPU's, where the parameters
are of several dtypes, share memory, or are in several processes: see torch_cuda.py."""

from __future__ import annotations

import math
from functools import partial

import pytest
import ranks
import torch
from cuda_simulator import quick_simulator  # noqa: F401
from posing_tensors import (
    MIXED,
    SHAPES,
    FakeScaler,
    drawn,
    give,
    gpu,
    kept,
    params_of,
    posing,
    posing_arrays,  # noqa: F401
    quiet,
)

import fastopt.torch as ft
from fastopt.backends import cuda_driver

two_ranks = ranks.fixture(2)


@pytest.mark.parametrize("simulated", [False, True])
def test_the_order_of_a_norm_over_several_dtypes(simulated):
    """The squares of one parameter after another are added to those before."""
    with gpu(simulated):
        dtypes = torch.float32, *[torch.bfloat16] * 8, torch.float16
        params = params_of(dtypes, [(1,)] + [(2,)] * 8 + [(1,)])
        for param in params:  # each adds half of the last bit of 1, which is even
            param.grad = torch.full_like(param, 2.0**-27)
        params[0].grad = torch.ones(1)
        params[-1].grad = torch.zeros(1, dtype=torch.float16)
        opt = ft.SGD(params, lr=0.1, clip_norm=0.5)
        opt.step()
        assert opt.grad_norm == 1


@pytest.mark.parametrize("simulated", [False, True])
def test_the_order_of_a_norm_is_that_of_dtypes(simulated):
    """Those of the first parameter's dtype come first."""
    with gpu(simulated):
        dtypes = torch.bfloat16, torch.float32, *[torch.bfloat16] * 7
        params = params_of(dtypes, [(2,), (1,)] + [(2,)] * 7)
        for param in params:
            param.grad = torch.full_like(param, 2.0**-27)
        params[1].grad = torch.ones(1)
        opt = ft.SGD(params, lr=0.1, clip_norm=0.5)
        opt.step()
        assert opt.grad_norm == math.sqrt(1 + 2.0**-50)


@pytest.mark.parametrize("simulated", [False, True])
def test_the_order_of_a_norm_where_memory_is_shared(simulated):
    """Parameters that share memory come after all others, whatever their dtypes."""
    with gpu(simulated):
        base = torch.zeros(2)
        params = [torch.nn.Parameter(base[:]) for _ in range(4)]
        params.append(torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
        for param in params:
            param.grad = torch.full_like(param, 2.0**-27)
        params[-1].grad = torch.ones_like(params[-1])
        opt = ft.SGD(params, lr=0.1, clip_norm=0.5)
        opt.step()
        assert opt.grad_norm == 1


@pytest.mark.parametrize("name", ["Prodigy", "DoG", "DAdaptAdam"])
def test_rules_over_everything_step_all_dtypes(name):
    """A parameter without a gradient, or with a later first one, counts the steps of
    the others, in whatever dtype it is: these rules carry one number for all."""
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of(MIXED)
            opt = getattr(ft, name)(params)
            for t in range(5):
                absent = {0: (3, 4), 1: (0, 2), 3: (0, 2, 3)}
                give(params, t + 1, absent=absent.get(t, ()))
                opt.step()
            assert [float(opt.state[p]["step"]) for p in params] == [5] * 5
            found.append(kept(opt))
    assert all(map(torch.equal, *found))


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_shards(mesh, clip_norm):
    """The local tensors of DTensors are stepped in the same way."""
    from torch.distributed.tensor import Shard, distribute_tensor

    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = [
                torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)]))
                for p in drawn(0, shapes=SHAPES[:3])
            ]
            opt = ft.AdamW(params, lr=0.1, clip_norm=clip_norm)
            scaler = FakeScaler(opt)
            for t in range(4):
                for p, g in zip(params, drawn(t + 1), strict=False):
                    p.grad = distribute_tensor(g, mesh, [Shard(0)])
                if simulated and t:
                    quiet(partial(scaler.step, t == 1, 2.0))
                else:
                    scaler.step(t == 1, 2.0)
            assert opt._plan.counted == simulated
            found.append([p.to_local().detach().clone() for p in params])
            found[-1] += [opt.state[p]["step"] for p in params]
    assert all(map(torch.equal, *found))


def of_shards(simulated, name, clip_norm):
    """Run in one of two processes: return its shards after each step."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, after = init_device_mesh("cpu", (2,)), []
    with gpu(simulated), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_driver, "as_array", posing)

        def divided(seed):
            tensors = drawn(seed, MIXED, [(9, 3), (5, 2), (7,)])
            return [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]

        params = list(map(torch.nn.Parameter, divided(0)))
        opt = getattr(ft, name)(params, lr=0.1, clip_norm=clip_norm)
        for t in range(4):
            for param, grad in zip(params, divided(t + 1), strict=True):
                param.grad = grad
            opt.step()
            after += [p.to_local().detach().float().tolist() for p in params]
        after.append(opt.grad_norm if clip_norm else 0.0)
    return after


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Prodigy"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_shards_in_two_processes(two_ranks, name, clip_norm):
    """What rules measure, and norms, are of all processes in each step."""
    expected = two_ranks.run(of_shards, False, name, clip_norm)
    assert two_ranks.run(of_shards, True, name, clip_norm) == expected
