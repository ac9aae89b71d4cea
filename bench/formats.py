"""Steps of AdamW over numbers of 16 and 8 bits, beside their peers and their floors.

    python bench/formats.py                                  every row
    python bench/formats.py --rows 8bit --rounds 5           one of them
    python bench/formats.py --json bench/results/formats.json

A row is measured in rounds. In each, every contender does a burst of steps, one after
the other, so that a ratio is taken where the machine is the same for all; the table has
the median over rounds. "Floor" is the time in which fastopt's float32 floor, a loop
without arithmetic, would move the bytes of our step, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fastopt
import fastopt.torch
from fastopt.__main__ import at_least
from fastopt.bench import machine
from fastopt.bench.measure import CAN_STOP
from fastopt.rules.floor import FLOORS
from fastopt.runtime.threads import available

bfloat16 = ml_dtypes.bfloat16
Step = Callable[[], Any]
OURS, FLOOR = "fastopt", "floor"
ALL_8BIT = {"param": "bf16+r8", "m": "m8", "v": "v8"}
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
BURST = 0.02  # seconds that a burst takes, at least


def drawn(size: int, seed: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(size, np.float32).astype(dtype)


def core(size: int, params: Any, grads: Any, formats: Any = None) -> Step:
    opt = fastopt.adamw(drawn(size, 0, params), formats=formats, **OPTIONS)
    grad = drawn(size, 1, grads)
    return lambda: opt.step(grad)


def floor(size: int) -> Step:
    """Move 28 bytes for each element."""
    opt, grad = FLOORS[2](drawn(size, 0)), drawn(size, 1) * 1e-6
    return lambda: opt.step(grad)


def tensor(size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(drawn(size, seed)).to(dtype)


def tensors(count: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    params = [tensor(size, k, dtype).requires_grad_() for k in range(count)]
    for k, param in enumerate(params):
        param.grad = tensor(size, count + k, dtype)
    return params


def torch_fused(size: int, dtype: torch.dtype, count: int = 1) -> Step:
    return torch.optim.AdamW(tensors(count, size, dtype), fused=True, **OPTIONS).step


def ours_of_torch(size: int, dtype: torch.dtype, count: int = 1) -> Step:
    return fastopt.torch.AdamW(tensors(count, size, dtype), **OPTIONS).step


def deepspeed(size: int, dtype: torch.dtype) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        tensors(1, size, dtype), fp32_optimizer_states=True, **OPTIONS
    ).step


def offload_in_one_call(size: int) -> Step:
    param, copy = drawn(size, 0), np.empty(size, bfloat16)
    opt = fastopt.adamw(param, copy_to=copy, **OPTIONS)
    grad = drawn(size, 1, bfloat16)
    return lambda: opt.step(grad, grad_scale=1 / 1024, clip_norm=1.0)


def offload_of_deepspeed(size: int) -> Step:
    """What ZeRO-Offload does with a partition: bfloat16 gradients become the float32
    gradients of the masters, their norm is taken, they are unscaled and clipped, the
    optimizer steps, and the masters are copied to bfloat16."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    master = tensor(size, 0, torch.float32).requires_grad_()
    master.grad = torch.empty(size)
    grad, copy = (
        tensor(size, 1, torch.bfloat16),
        torch.empty(size, dtype=torch.bfloat16),
    )
    opt = DeepSpeedCPUAdam([master], **OPTIONS)

    def step() -> None:
        given = master.grad
        if given is None:
            raise RuntimeError("the gradient of the master is gone")
        given.copy_(grad)
        norm = float(given.norm()) / 1024
        given.mul_(1 / 1024 / max(norm / 1.0, 1.0))
        opt.step()
        copy.copy_(master.detach())

    return step


def bitsandbytes(size: int) -> Step:
    import bitsandbytes

    params = tensors(1, size, torch.float32)
    return bitsandbytes.optim.AdamW8bit(params, **OPTIONS).step


class Row(NamedTuple):
    """A comparison: sizes, what our step moves, what is wanted, and the contenders."""

    name: str
    sizes: tuple[int, ...]
    moved: float  # bytes for each element
    wanted: dict[str, tuple[float, ...]]  # of each peer, for each size
    contenders: dict[str, Callable[[int], Step]]


CODES = 2 * (1 + 4 / 64)  # bytes to read and write a code and its share of a scale
ROWS = (
    Row(
        "all bf16",
        (1_000_000, 20_000_000),
        14,
        {"torch fused": (1.7, 1.35)},
        {
            OURS: lambda n: core(n, bfloat16, bfloat16, "bf16"),
            "torch fused": lambda n: torch_fused(n, torch.bfloat16),
        },
    ),
    Row(
        "bf16 p, g; float32 m, v",
        (1_000_000, 20_000_000),
        22,
        {"DeepSpeed": (1.1, 1.0)},
        {
            OURS: lambda n: core(n, bfloat16, bfloat16),
            "DeepSpeed": lambda n: deepspeed(n, torch.bfloat16),
        },
    ),
    Row(
        "offload: bf16 g, clip, bf16 copy",
        (50_000_000,),
        2 + 26 + 2,
        {"DeepSpeed": (1.4,)},
        {OURS: offload_in_one_call, "DeepSpeed": offload_of_deepspeed},
    ),
    Row(
        "bf16 g, m, v; float32 p",
        (50_000_000,),
        18,
        {"float32": (1.2,)},
        {
            OURS: lambda n: core(n, np.float32, bfloat16, "bf16"),
            "float32": lambda n: core(n, np.float32, np.float32),
        },
    ),
    Row(
        "all bf16, large",
        (50_000_000,),
        14,
        {"float32": (1.25,)},
        {
            OURS: lambda n: core(n, bfloat16, bfloat16, "bf16"),
            "float32": lambda n: core(n, np.float32, np.float32),
        },
    ),
    Row(
        "8bit",
        (50_000_000,),
        12 + 2 * CODES,
        {"float32": (0.8,), "bitsandbytes": (30,)},
        {
            OURS: lambda n: core(n, np.float32, np.float32, "8bit"),
            "float32": lambda n: core(n, np.float32, np.float32),
            "bitsandbytes": bitsandbytes,
        },
    ),
    Row(
        "bf16+r8, 8bit, bf16 g",
        (50_000_000,),
        6 + 2 + 2 * CODES,
        {"torch fused": (0.8,)},
        {
            OURS: lambda n: core(n, bfloat16, bfloat16, ALL_8BIT),
            "torch fused": lambda n: torch_fused(n, torch.float32),
        },
    ),
    Row(
        "fastopt.torch bf16, 100 x 1,000",
        (1_000,),
        22,
        {"torch fused": (4,)},
        {
            OURS: lambda n: ours_of_torch(n, torch.bfloat16, 100),
            "torch fused": lambda n: torch_fused(n, torch.bfloat16, 100),
        },
    ),
)
SLOW = {"bitsandbytes"}  # measured in the first two rounds only


@dataclass
class Result:
    """Times of a row at one size."""

    row: str
    size: int
    seconds: dict[str, list[float]]  # of a step of each contender, by rounds
    moved: float

    def ratio(self, name: str) -> float:
        """How long a contender takes, in multiples of ours."""
        pairs = zip(self.seconds[name], self.seconds[OURS], strict=False)
        return float(np.median([theirs / ours for theirs, ours in pairs]))

    @property
    def of_floor(self) -> float:
        """How long ours takes, in multiples of its floor."""
        return 28 / self.moved / self.ratio(FLOOR)


def burst(step: Step, steps: int) -> float:
    """Return the mean time of so many steps. A quarter as many come before, which wake
    the threads of a process that was stopped."""
    for _ in range(steps // 4):
        step()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - begin) / steps


def makers(row: Row, size: int) -> dict[str, Callable[[int], Step]]:
    """Return what makes the contenders, and the floor."""
    # That of many tensors is the floor of all of them in one array.
    whole = 100 * size if row.sizes == (1_000,) else size
    return {**row.contenders, FLOOR: lambda _: floor(whole)}


def serve(pipe: Connection, row: str, name: str, size: int) -> None:
    """Do bursts of steps of a contender, and send their times."""
    torch.set_num_threads(available())
    of = next(of for of in ROWS if of.name == row)
    step = makers(of, size)[name](size)
    pipe.send(0.0)  # it is ready
    while count := pipe.recv():
        pipe.send(burst(step, count))


def measured(row: Row, size: int, rounds: int, tick: Callable[[], object]) -> Result:
    """Measure a row. Each contender has a process of its own, because the threads of
    several pools would wait for work at the same time. Those that wait are stopped."""
    context, pipes, children = get_context("spawn"), {}, {}
    for name in makers(row, size):
        pipes[name], theirs = context.Pipe()
        of = theirs, row.name, name, size
        children[name] = context.Process(target=serve, args=of, daemon=True)
        children[name].start()
    try:
        return result_of(row, size, rounds, tick, pipes, children)
    finally:
        for name, child in children.items():
            signaled(child, "SIGCONT")
            with suppress(BrokenPipeError):
                pipes[name].send(0)
            child.join()


def signaled(child: BaseProcess, name: str) -> None:
    """Send a signal to a process, on systems that have it."""
    if CAN_STOP and child.pid is not None:
        os.kill(child.pid, getattr(signal, name))


def result_of(
    row: Row,
    size: int,
    rounds: int,
    tick: Callable[[], object],
    pipes: dict[str, Connection],
    children: Mapping[str, BaseProcess],
) -> Result:
    def seconds_of(name: str, count: int) -> float:
        signaled(children[name], "SIGCONT")
        pipes[name].send(count)
        taken: float = pipes[name].recv()
        signaled(children[name], "SIGSTOP")
        return taken

    # What others do meanwhile, such as importing torch, would make steps seem slow.
    for name, pipe in pipes.items():
        pipe.recv()
        signaled(children[name], "SIGSTOP")

    def count_of(name: str) -> int:
        """Return how many steps take as long as a burst. The first steps plan and touch
        memory, so the last of a few bursts decides."""
        count = 1
        for _ in range(1 if name in SLOW else 3):
            count = max(1, int(BURST / seconds_of(name, count)))
        return count

    counts = {name: count_of(name) for name in pipes}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for k in range(rounds):
        for name in pipes if k % 2 else reversed(pipes):
            if name not in SLOW or k < 2:
                seconds[name].append(seconds_of(name, counts[name]))
        tick()
    return Result(row.name, size, seconds, row.moved)


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the table, one for each peer."""
    rows = []
    for result in results:
        row = next(row for row in ROWS if row.name == result.row)
        for peer, wanted in row.wanted.items():
            rows.append(
                {
                    "row": row.name,
                    "against": peer,
                    "size": result.size,
                    "seconds": float(np.median(result.seconds[OURS])),
                    "wanted": wanted[row.sizes.index(result.size)],
                    "ratio": result.ratio(peer),
                    "floor": result.of_floor,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="AdamW: multiples of the time of our step")
    for name in "row against elements step wanted measured floor".split():
        made.add_column(name, justify="left" if name in ("row", "against") else "right")
    for row in rows:
        made.add_row(
            row["row"],
            row["against"],
            f"{row['size']:,}",
            f"{row['seconds'] * 1e3:.3f} ms",
            f"{row['wanted']:g}",
            f"{row['ratio']:.2f}",
            f"{row['floor']:.2f}",
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = [row.name for row in ROWS]
    parser.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW"
    )
    parser.add_argument("--rounds", type=at_least(1), default=11)
    parser.add_argument(
        "--divide", type=at_least(1), default=1, help="sizes, for a try"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="to write to")
    options = parser.parse_args(arguments)
    chosen = [(row, n) for row in ROWS if row.name in options.rows for n in row.sizes]
    results = []
    with Progress(transient=True) as progress:
        task = progress.add_task("steps", total=options.rounds * len(chosen))
        for row, size in chosen:
            result = measured(
                row,
                size // options.divide,
                options.rounds,
                lambda: progress.advance(task),
            )
            result.size = size
            results.append(result)
    rows = rows_of(results)
    Console(width=120).print(table(rows))
    if options.json:
        record = {
            "machine": {"cpu": machine.cpu(), "caches": machine.caches()},
            "versions": {"torch": torch.__version__, "fastopt": fastopt.__version__},
            "table": rows,
            "results": list(map(asdict, results)),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
