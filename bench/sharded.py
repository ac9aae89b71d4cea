"""Steps over DTensors, as FSDP2 makes them: fastopt's and torch's, in two processes.

    python bench/sharded.py [--json FILE] [--tensors 300] [--size 4096] [--rounds 15]

Each process has a half of every tensor. The contenders take turns, each with gradients
of its own that are new in each step, as in a training loop. Ratios are of turns of one
round, and the table has medians and quartiles. "look" is how much more time a step over
DTensors takes than one over plain tensors of the same shards, for each tensor.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fastopt.torch
from fastopt.bench.machine import cpu

PROCESSES = 2
OURS, PLAIN, CLIPPED = "fastopt.torch", "fastopt.torch, plain", "fastopt.torch, clipped"
THEIRS = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}}
WITH_NORM = "torch fused, clip_grad_norm_"


class Contender:
    """An optimizer and its parameters; ``step`` is timed, with new gradients."""

    def __init__(self, make: Callable[[list[Any]], Any], params: list[Any]):
        self.params, self.opt = params, make(params)
        self.seconds: list[float] = []

    def give(self) -> None:
        for param in self.params:
            if isinstance(param, DTensor):
                # As FSDP2 makes them, which keeps the parameters' own placement.
                new = torch.full_like(param._local_tensor, 0.01)
                param.grad = DTensor(new, param._spec, requires_grad=False)
            else:
                param.grad = torch.full_like(param, 0.01)

    def step(self) -> None:
        self.opt.step()

    def turn(self, timed: bool) -> None:
        self.give()
        dist.barrier()
        begin = time.perf_counter()
        self.step()
        if timed:
            self.seconds.append(time.perf_counter() - begin)


class Clipping(Contender):
    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.opt.step()


def measure(rank: int, options: Any, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))

    def params(divide: bool) -> list[Any]:
        tensors = [torch.ones(options.size) for _ in range(options.tensors)]
        shards = [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]
        if not divide:
            shards = [s.to_local().clone() for s in shards]
        return list(map(torch.nn.Parameter, shards))

    contenders = {
        OURS: Contender(lambda ps: fastopt.torch.AdamW(ps), params(True)),
        PLAIN: Contender(lambda ps: fastopt.torch.AdamW(ps), params(False)),
        CLIPPED: Contender(
            lambda ps: fastopt.torch.AdamW(ps, clip_norm=1.0), params(True)
        ),
    }
    for name, chosen in THEIRS.items():
        make = lambda ps, chosen=chosen: torch.optim.AdamW(ps, **chosen)  # noqa: E731
        contenders[name] = Contender(make, params(True))
    fused = THEIRS["torch fused"]
    contenders[WITH_NORM] = Clipping(
        lambda ps: torch.optim.AdamW(ps, **fused), params(True)
    )
    for round in range(options.rounds + 2):
        for contender in contenders.values():
            contender.turn(timed=round > 1)
    if rank == 0:
        found = {name: of.seconds for name, of in contenders.items()}
        Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--size", type=int, default=4096, help="elements of a tensor")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = f"{folder}/store", f"{folder}/results"
        torch.multiprocessing.spawn(measure, (options, *files), nprocs=PROCESSES)
        seconds = json.loads(Path(files[1]).read_text())
    table = Table("step", "µs", "time / fastopt.torch", "quartiles")
    table.title = (
        f"{options.tensors} DTensors of {options.size} elements, two processes"
    )
    rows: dict[str, Any] = {}
    for name, of in seconds.items():
        base = CLIPPED if name == WITH_NORM else OURS
        ratios = np.array(of) / np.array(seconds[base])
        low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        rows[name] = {
            "us": np.median(of) * 1e6,
            "ratio": ratio,
            "quartiles": [low, high],
        }
        shown = f"{rows[name]['us']:.0f}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"
        table.add_row(name, *shown)
    more = np.median(np.array(seconds[OURS]) - np.array(seconds[PLAIN]))
    rows["look"] = {"us": float(more) / options.tensors * 1e6}
    table.add_row("look, each tensor", f"{rows['look']['us']:.2f}", "", "")
    Console().print(table)
    if options.json:
        about = {
            "cpu": cpu(),
            "python": platform.python_version(),
            "date": str(date.today()),
        }
        options.json.write_text(
            json.dumps({**about, "torch": torch.__version__, "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
