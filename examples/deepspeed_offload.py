"""DeepSpeed: its own configuration, and fastopt's kernels by one line.

    python examples/deepspeed_offload.py

Two processes train a bfloat16 network on digits, under ZeRO 2 with the optimizer
offloaded to the CPU: each has half of the float32 parameters and of Adam's state. The
script starts both; with DeepSpeed's launcher, only the line with ``install`` is new.
"""

import os
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE="2")  # before the import

import deepspeed
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastopt.deepspeed

# At the top level, because each process imports this file. From here on, DeepSpeed's
# CPU optimizers use fastopt's kernels, and compile nothing.
fastopt.deepspeed.install()
# Nor is its communication through shared memory needed here, which takes minutes.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

PROCESSES, STEPS = 2, 200
CONFIG = {
    "train_micro_batch_size_per_gpu": 64,
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.05}},
}


def train(rank, store):
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in number.items()})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES
    )
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        torch.tensor(x / 16, dtype=torch.bfloat16), torch.tensor(y), random_state=0
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=CONFIG
    )
    torch.manual_seed(rank)  # each process takes rows of its own
    for step in range(STEPS):
        rows = torch.randint(len(x_train), (64,))
        loss = torch.nn.functional.cross_entropy(
            engine(x_train[rows]).float(), y_train[rows]
        )
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    with torch.no_grad():
        right = engine(x_test).argmax(dim=1) == y_test
    if rank == 0:
        inner = type(engine.optimizer.optimizer).__name__
        print(f"{inner}, test accuracy: {right.float().mean():.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (f"{folder}/store",), nprocs=PROCESSES)
