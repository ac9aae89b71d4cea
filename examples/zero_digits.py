"""ZeRO-1 on two processes: each steps some parameters, and has the state of these.

    python examples/zero_digits.py

``shard_group=True`` says that other processes have the others. Norms of gradients, and
the sums of Prodigy, which finds its learning rate itself, then include theirs.
"""

import tempfile

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fastopt.torch

PROCESSES = 2


def train(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    model = DistributedDataParallel(torch.nn.Sequential(*layers))
    opt = ZeroRedundancyOptimizer(
        model.parameters(),
        fastopt.torch.Prodigy,
        shard_group=True,
        clip_norm=1.0,
    )
    for step in range(200):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(1500, (128,), generator=generator)
        rows = batch.chunk(PROCESSES)[rank]
        opt.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        opt.step()
    own = opt.optim
    here = sum(state["m"].numel() for state in own.state.values())
    print(
        f"process {rank} has {here} of 4810 moments, norm {own.grad_norm:.4f}\n", end=""
    )
    dist.barrier()
    if rank == 0:
        right = (model(x[1500:]).argmax(dim=1) == y[1500:]).float().mean()
        print(f"test accuracy: {right:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (folder,), nprocs=PROCESSES)
