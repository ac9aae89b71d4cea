"""Steps on an NVIDIA GPU, against what its memory can do and against torch fused.

    python bench/gpu.py [--json bench/results/gpu.json] [--sizes 1e6 1e8 1e9]
                        [--bursts 30] [--steps 10]

For the traffic of three kinds of rule (AdamW: 4 streams read, 3 written; SGD with
momentum and Lion: 3 and 2), and for AdamW with parameters and gradients of bfloat16
beside state of float32, it times, by events on the device, fastopt, the same traffic
without arithmetic, a copy within the device, and the fused optimizers of torch and apex
where they are installed: one after the other, for a billion parameters fill a GPU, the
median of 30 bursts of steps each. Small steps wait for the host that launches them, so
at a million it is launches that are compared. A rate is the bytes that a step must move
over its time; a copy's, the bytes it reads and writes. torch's state has the dtype of
its parameters, so that it moves fewer bytes with bfloat16.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numba import cuda

import fastopt
from fastopt.rule import Rule
from fastopt.rules.floor import FLOORS

BURSTS, STEPS = 30, 10
WARM_UP = 3
Step = Callable[[], object]


class Kind(NamedTuple):
    rule: Rule
    hyperparameters: dict[str, float]
    states: int  # buffers
    torch: str  # the class
    apex: str
    dtype: str = "float32"  # of parameters and gradients


KINDS = {
    "adamw": Kind(fastopt.adamw, {}, 2, "AdamW", "FusedAdam"),
    "adamw, bfloat16": Kind(fastopt.adamw, {}, 2, "AdamW", "FusedAdam", "bfloat16"),
    "sgd (momentum)": Kind(fastopt.sgd, {"momentum": 0.9}, 1, "SGD", "FusedSGD"),
    "lion": Kind(fastopt.lion, {}, 1, "", ""),
}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def device_array(size: int, seed: int, dtype: str = "float32") -> Any:
    """Normal numbers; large arrays repeat a million of them."""
    part = np.random.default_rng(seed).standard_normal(min(size, 2**20), np.float32)
    part = part.astype(DTYPES[dtype])
    array = cuda.device_array(size, DTYPES[dtype])
    for begin in range(0, size, part.size):
        end = min(begin + part.size, size)
        array[begin:end].copy_to_device(part[: end - begin])
    return array


def ours(kind: Kind, size: int) -> Step:
    return steps(kind.rule, kind.dtype, size, **kind.hyperparameters)


def floor(kind: Kind, size: int) -> Step:
    """The same traffic."""
    return steps(FLOORS[kind.states], kind.dtype, size, scale=1e-6)


def steps(
    rule: Rule, dtype: str, size: int, scale: float = 1.0, **hyperparameters: float
) -> Step:
    opt = rule(device_array(size, 0, dtype), backend="cuda", **hyperparameters)
    grad = device_array(size, 1, dtype)
    return lambda: opt.step(grad, grad_scale=scale)


def copy(size: int) -> Step:
    source, target = device_array(size, 0), cuda.device_array(size, np.float32)
    return lambda: target.copy_to_device(source)


def peers(torch_name: str, apex_name: str, momentum: dict[str, float]) -> Any:
    """Name -> optimizer class with its arguments, of those that are installed."""
    classes: dict[str, tuple[Any, dict[str, Any]]] = {}
    try:
        import torch
    except ImportError:
        return classes
    if torch_name and torch.cuda.is_available():
        optimizer = getattr(torch.optim, torch_name)
        classes["torch fused"] = optimizer, {"lr": 1e-3, "fused": True, **momentum}
        try:
            from apex import optimizers
        except ImportError:
            return classes
        classes["apex"] = getattr(optimizers, apex_name), {"lr": 1e-3, **momentum}
    return classes


def of_torch(optimizer: Any, options: dict[str, Any], size: int, name: str) -> Step:
    import torch

    kind = {"dtype": getattr(torch, name), "device": "cuda"}
    param = torch.randn(size, requires_grad=True, **kind)
    param.grad = torch.randn(size, **kind)
    step: Step = optimizer([param], **options).step
    return step


def milliseconds(step: Step, steps: int) -> float:
    """Of a step, between two events on the default stream, which all share."""
    begin, end = cuda.event(), cuda.event()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / steps


def release_memory() -> None:
    """torch keeps what it frees, and the next contender may need it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(name: str, size: int, bursts: int, steps: int) -> dict[str, Any]:
    """Each contender alone in memory: a billion parameters of AdamW take 16 GB."""
    kind = KINDS[name]
    make: dict[str, Callable[[], Step]] = {
        "fastopt": lambda: ours(kind, size),
        "floor": lambda: floor(kind, size),
        "device copy": lambda: copy(size),
    }
    for peer, (optimizer, options) in peers(
        kind.torch, kind.apex, kind.hyperparameters
    ).items():
        make[peer] = lambda o=optimizer, arguments=options: of_torch(
            o, arguments, size, kind.dtype
        )
    width = DTYPES[kind.dtype].itemsize
    results = {}
    for contender, build in make.items():
        step = build()
        times = [milliseconds(step, steps) for _ in range(WARM_UP + bursts)][WARM_UP:]
        of_state = width if contender == "torch fused" else 4
        moved = size * (3 * width + 2 * of_state * kind.states)
        moved = 8 * size if contender == "device copy" else moved
        median = float(np.median(times))
        results[contender] = {
            "milliseconds": median,
            "quartiles": [float(q) for q in np.quantile(times, [0.25, 0.75])],
            "GB/s": moved / median / 1e6 if median else None,
        }
        del step
        release_memory()
    return results


def machine() -> dict[str, str]:
    facts = {"date": str(date.today()), "python": platform.python_version()}
    name = getattr(cuda.get_current_device(), "name", "numba's simulator")
    facts["gpu"] = name.decode() if isinstance(name, bytes) else str(name)
    for package in ("fastopt", "numba", "numba-cuda", "torch", "apex"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bursts", type=int, default=BURSTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e6, 1e8, 1e9])
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(), "results": {}}
    print(json.dumps(record["machine"]))
    for name in KINDS:
        for size in map(int, options.sizes):
            results = measure(name, size, options.bursts, options.steps)
            record["results"].setdefault(name, {})[str(size)] = results
            for contender, result in results.items():
                rate = result["GB/s"]
                print(
                    f"{name:<16} {size:>13,} {contender:<12} "
                    f"{result['milliseconds']:>9.3f} ms  "
                    f"{'' if rate is None else f'{rate:,.0f} GB/s'}"
                )
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
