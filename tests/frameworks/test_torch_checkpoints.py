"""torch's distributed checkpoints: they are divided anew among other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from ranks import Ranks, fixture, numbers  # noqa: E402
from torch.distributed import checkpoint  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import distribute_tensor  # noqa: E402

import fastopt.torch  # noqa: E402

NAMES = [name for name in fastopt.torch.__all__ if name[0].isupper()]
SHAPES = (5, 3), (1, 4), (7,), (2, 3, 2), (1,)
single, pair, three = fixture(1), fixture(2), fixture(3)


def model(dtype: Any) -> Any:
    torch.manual_seed(5)
    layers = torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
    return torch.nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_lr_0_and_no_gradient_moves_nothing(name: str):
    """``torch.distributed.checkpoint`` makes the state so, before it loads it."""
    shapes = SHAPES if name != "Muon" else [(5, 3)]
    params = [
        torch.nn.Parameter(numbers(i, s, torch.float32)) for i, s in enumerate(shapes)
    ]
    before = [p.detach().clone() for p in params]
    opt = getattr(fastopt.torch, name)(params)
    get_optimizer_state_dict(torch.nn.ParameterList(params), opt)
    for param, was in zip(params, before, strict=True):
        assert torch.equal(param, was)


def trained(name: str, steps: range, folder: str, load: bool, save: bool) -> Any:
    """Train with FSDP2 from a checkpoint, and save another."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    net = model(torch.float32)
    fully_shard(net, mesh=mesh)
    opt = getattr(fastopt.torch, name)(net.parameters(), lr=0.125)

    def states() -> Any:
        return {
            "model": net.state_dict(),
            "optimizer": get_optimizer_state_dict(net, opt),
        }

    if load:
        saved = states()
        checkpoint.load(saved, checkpoint_id=folder)
        net.load_state_dict(saved["model"])
        set_optimizer_state_dict(net, opt, saved["optimizer"])
    for k in steps:
        for i, param in enumerate(net.parameters()):
            full = numbers(10 * k + i, param.shape, param.dtype)
            param.grad = distribute_tensor(full, param.device_mesh, param.placements)
        opt.step()
    if save:
        checkpoint.save(states(), checkpoint_id=folder)
    return [p.full_tensor().detach() for p in net.parameters()]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "ScheduleFreeAdamW"])
def test_checkpoints_go_on_with_other_numbers_of_processes(
    single: Ranks, pair: Ranks, three: Ranks, tmp_path: Path, name: str
):
    uninterrupted = single.run(trained, name, range(6), "", False, False)[0]
    for saving in (single, pair, three):
        folder = str(tmp_path / str(len(saving.pipes)))
        saving.run(trained, name, range(3), folder, False, True)
        for loading in (single, pair, three):
            for params in loading.run(trained, name, range(3, 6), folder, True, False):
                for ours, expected in zip(params, uninterrupted, strict=True):
                    assert torch.equal(ours, expected)
