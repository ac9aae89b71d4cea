"""The optimizer's part of ZeRO-Offload on the CPU, in one process.

    python bench/deepspeed_offload.py [--json FILE] [--size 5e7] [--rounds 11]
                                      [--threads N]

DeepSpeed takes a pass over memory for each part of a step; ``fastopt.torch`` does all
of it in one, or in two where it needs the norm. Three tables:

- bfloat16 gradients on the host: widen them to float32, take their norm, unscale and
  clip them, update the float32 parameters, write them as bfloat16;
- float32 gradients and a norm that the GPU has computed: all but the first two;
- the update alone.

The rows are DeepSpeed with its own C++, which it compiles first (for minutes, unless
TORCH_EXTENSIONS_DIR has it); DeepSpeed's own class after ``fastopt.deepspeed.install``;
and ``fastopt.torch.AdamW`` with ``clip_norm`` and ``copy_to``. torch's fused AdamW in
DeepSpeed's sequence is there to compare with. They take turns; each turn is several
steps after one that is not measured, and ratios are of turns of one round: medians and
quartiles. All have the same gradients; before, their results are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported

import numpy as np
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

import fastopt.deepspeed
import fastopt.torch
from fastopt.bench.machine import caches, cpu, huge_pages
from fastopt.runtime.threads import available

STEPS = 3  # in a turn
LOSS_SCALE, CLIP_NORM = 128.0, 1.0
VALUES = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
OWN, INSTALLED = "DeepSpeed", "DeepSpeed, install()"
TORCH, FUSED = "DeepSpeed, torch fused", "fastopt.torch"
Step = Callable[[], object]


def numbers(size: int, seed: int) -> Any:
    """Normal numbers; large tensors repeat a million of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(min(size, 2**20), generator=generator).repeat(-(-size // 2**20))[
        :size
    ]


class Parameters:
    """The float32 parameters of an optimizer, and their copy."""

    def __init__(self, size: int):
        self.master = torch.nn.Parameter(numbers(size, 0))
        self.copy = torch.zeros(size, dtype=torch.bfloat16)


def optimizers(names: list[str]) -> dict[str, Callable[[list[Any]], Any]]:
    """What makes an optimizer, by the name of the row."""

    def installed(params: list[Any]) -> Any:
        fastopt.deepspeed.install()
        try:
            return DeepSpeedCPUAdam(params, **VALUES)
        finally:
            fastopt.deepspeed.uninstall()

    made = {
        OWN: lambda params: DeepSpeedCPUAdam(params, **VALUES),
        INSTALLED: installed,
        TORCH: lambda params: torch.optim.AdamW(params, fused=True, **VALUES),
    }
    return {name: made[name] for name in names}


def whole_steps(size: int) -> tuple[dict[str, Step], list[Parameters]]:
    """From bfloat16 gradients on the host."""
    grads = (numbers(size, 1) * LOSS_SCALE).bfloat16()
    contenders: dict[str, Step] = {}
    held = []
    for name, make in optimizers([OWN, INSTALLED, TORCH]).items():
        params, opt = Parameters(size), None
        wide = params.master.grad = torch.empty(size)
        opt = make([params.master])

        def step(p: Parameters = params, g: Any = wide, opt: Any = opt) -> None:
            g.copy_(grads)
            norm = g.norm() / LOSS_SCALE
            clip = torch.clamp((norm + 1e-6) / CLIP_NORM, min=1.0)
            g.mul_(1.0 / (clip * LOSS_SCALE))
            opt.step()
            p.copy.copy_(p.master.data)

        contenders[name] = step
        held.append(params)
    params = Parameters(size)
    params.master.grad_dtype = torch.bfloat16
    params.master.grad = grads
    opt = fastopt.torch.AdamW(
        [params.master], clip_norm=CLIP_NORM, copy_to=[params.copy], **VALUES
    )
    opt.grad_scale = torch.tensor(LOSS_SCALE)
    contenders[FUSED] = opt.step
    return contenders, [*held, params]


def known_norm(size: int) -> tuple[dict[str, Step], list[Parameters]]:
    """From float32 gradients that were copied to the host, whose norm is known."""
    scale = LOSS_SCALE * float(numbers(size, 1).norm() + 1e-6) / CLIP_NORM
    contenders: dict[str, Step] = {}
    held = []
    for name, make in optimizers([OWN, INSTALLED, TORCH]).items():
        params = Parameters(size)
        # The first step scales them in place, and the others multiply by 1, which takes
        # as long: so all steps have the same gradients.
        params.master.grad = numbers(size, 1) * LOSS_SCALE
        opt, factors = make([params.master]), [1.0 / scale]

        def step(p: Parameters = params, opt: Any = opt, f: Any = factors) -> None:
            p.master.grad.mul_(f[0])
            f[0] = 1.0
            opt.step()
            p.copy.copy_(p.master.data)

        contenders[name] = step
        held.append(params)
    params = Parameters(size)
    params.master.grad = numbers(size, 1) * LOSS_SCALE
    opt = fastopt.torch.AdamW([params.master], copy_to=[params.copy], **VALUES)
    opt.grad_scale = torch.tensor(scale, dtype=torch.float64)
    contenders[FUSED] = opt.step
    return contenders, [*held, params]


def updates(size: int) -> tuple[dict[str, Step], list[Parameters]]:
    contenders: dict[str, Step] = {}
    held = []
    makers = optimizers([OWN, INSTALLED, TORCH])
    makers[FUSED] = lambda params: fastopt.torch.AdamW(params, **VALUES)
    grads = numbers(size, 1)
    for name, make in makers.items():
        params = Parameters(size)
        params.master.grad = grads
        contenders[name] = make([params.master]).step
        held.append(params)
    return contenders, held


def check(contenders: dict[str, Step], held: list[Parameters]) -> None:
    """Two steps of each come to the same numbers, but for rounding."""
    for step in contenders.values():
        step(), step()
    first, *others = held
    for name, other in zip(list(contenders)[1:], others, strict=True):
        error = (first.master - other.master).abs().max().item()
        copies = (first.copy.float() - other.copy.float()).abs().max().item()
        if error > 1e-5 or copies > 0.05:
            raise RuntimeError(f"{name} is {error} from {OWN}, its copy {copies}")


def seconds(step: Step) -> float:
    step()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - begin) / STEPS


def measure(contenders: dict[str, Step], rounds: int) -> dict[str, Any]:
    """For each, milliseconds, and its time over the first one's in the same round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            times[name].append(seconds(step))
    first = np.array(next(iter(times.values())))
    results = {}
    for name, these in times.items():
        low, median, high = np.quantile(np.array(these) / first, [0.25, 0.5, 0.75])
        results[name] = {
            "milliseconds": 1e3 * float(np.median(these)),
            "ratio": float(median),
            "quartiles": [float(low), float(high)],
        }
    return results


def machine(threads: int) -> dict[str, Any]:
    facts = {"date": str(date.today()), "python": platform.python_version()}
    facts |= {"cpu": cpu(), "caches": caches(), "huge pages": huge_pages()}
    facts["threads"] = str(threads)
    for package in ("fastopt", "numpy", "torch", "deepspeed"):
        facts[package] = metadata.version(package)
    return facts


TABLES = {
    "bfloat16 gradients, norm, clip, update, copy": whole_steps,
    "float32 gradients, known norm, update, copy": known_norm,
    "the update alone": updates,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=float, default=5e7)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=available())
    options = parser.parse_args()
    os.environ["FASTOPT_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)  # DeepSpeed's threads are those of torch
    size = int(options.size)
    record: dict[str, Any] = {"machine": machine(options.threads), "size": size}
    print(json.dumps(record["machine"]))
    for title, make in TABLES.items():
        contenders, held = make(size)
        check(contenders, held)
        record[title] = results = measure(contenders, options.rounds)
        print(f"\n{title}; {size:,} parameters")
        for name, this in results.items():
            low, high = this["quartiles"]
            print(
                f"{name:<24}{this['milliseconds']:>10.2f} ms {this['ratio']:>6.2f} "
                f"({low:.2f} to {high:.2f})"
            )
        del contenders, held
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
