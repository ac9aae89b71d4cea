"""FSDP2 on two processes: one line changes, and the state is divided as weights are.

    python examples/fsdp2_digits.py

A small network learns digits with ``fully_shard``. Half way, it is saved as torch's
distributed checkpoints do it, and two new processes go on.
"""

import tempfile

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastopt.torch

PROCESSES = 2


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    return torch.nn.Sequential(*layers)


def save_and_load(model, opt, folder, load):
    of_model, of_optimizer = get_state_dict(model, opt)
    states = {"model": of_model, "optimizer": of_optimizer}
    if not load:
        checkpoint.save(states, checkpoint_id=folder)
        return
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(
        model,
        opt,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
    )


def train(rank, folder, steps):
    torch.set_num_threads(1)
    store = f"file://{folder}/store{steps.start}"
    dist.init_process_group("gloo", store, rank=rank, world_size=PROCESSES)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    # The line that changes. The norm is that of the gradients of all processes.
    opt = fastopt.torch.AdamW(model.parameters(), lr=1e-2, clip_norm=1.0)
    if steps.start:
        save_and_load(model, opt, f"{folder}/{steps.start}", load=True)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(1500, (128,), generator=generator)
        rows = batch.chunk(PROCESSES)[rank]
        opt.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        opt.step()
    save_and_load(model, opt, f"{folder}/{steps.stop}", load=False)
    right = (model(x[1500:]).argmax(dim=1) == y[1500:]).float().mean()
    if rank == 0:
        moments = sum(
            state["exp_avg"].to_local().numel() for state in opt.state.values()
        )
        print(f"step {step + 1}: {moments} of 4810 moments in process 0")
        print(f"test accuracy: {right:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for steps in (range(100), range(100, 200)):
            torch.multiprocessing.spawn(train, (folder, steps), nprocs=PROCESSES)
