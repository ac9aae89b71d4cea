"""Gram matrices against BLAS, and whole steps of several tasks against TorchJD.

    python bench/several_tasks.py [--json FILE] [--tasks 4] [--sizes 1e7] [--rounds 15]

A Gram matrix is ``gram(J)``, in float64, or ``J @ J.T`` of NumPy or torch, in float32.
A whole step is that, UPGrad's weights, and Adam: of fastopt, or of TorchJD (by its
``jac_to_grad``, in both ways that it has) and torch's fused Adam. J is the same memory
for all of them, with a conflict. They take turns; each turn is several calls after one
that is not measured, and ratios are of turns of one round: medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchjd.aggregation import UPGrad
from torchjd.autojac import jac_to_grad

import fastopt
from fastopt import multitask
from fastopt.bench.machine import caches, cpu, huge_pages
from fastopt.runtime.threads import available

CALLS = 3
Contender = Callable[[], object]


def gradients(tasks: int, size: int) -> Any:
    """A row for each task; the second is against the first."""
    rng = np.random.default_rng(0)
    flat = fastopt.flatten([np.zeros((tasks, size), np.float32)])
    J = flat.views[0]
    for row in J:
        row[...] = rng.standard_normal(size, np.float32)
    if tasks > 1:
        J[1] -= J[0]
    return J


def gram_contenders(J: Any) -> dict[str, Contender]:
    tensor = torch.from_numpy(J)
    return {
        "fastopt gram(J)": lambda: fastopt.gram(J),
        "NumPy J @ J.T": lambda: J @ J.T,
        "torch J @ J.T": lambda: tensor @ tensor.T,
    }


def step_contenders(J: Any) -> dict[str, Contender]:
    flat = fastopt.flatten([np.zeros(J.shape[1], np.float32)])
    opt = fastopt.adam(flat)

    def ours() -> None:
        opt.step(J, weights=multitask.upgrad(fastopt.gram(J)))

    def theirs(in_parts: bool) -> Contender:
        param = torch.nn.Parameter(torch.zeros(J.shape[1]))
        param.jac = torch.from_numpy(J)
        adam, upgrad = torch.optim.Adam([param], fused=True), UPGrad()

        def step() -> None:
            jac_to_grad(
                [param],
                upgrad,
                retain_jac=True,
                optimize_gramian_computation=in_parts,
            )
            adam.step()
            adam.zero_grad()

        return step

    return {
        "fastopt": ours,
        "TorchJD + torch fused": theirs(False),
        "TorchJD in parts + torch fused": theirs(True),
    }


def seconds(call: Contender) -> float:
    call()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, Any]:
    """For each, milliseconds, and its time over the first one's in the same round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(seconds(call))
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


def machine() -> dict[str, Any]:
    facts = {"date": str(date.today()), "python": platform.python_version()}
    facts |= {"cpu": cpu(), "caches": caches(), "huge pages": huge_pages()}
    facts["threads"] = str(available())
    for package in ("fastopt", "numpy", "torch", "torchjd"):
        facts[package] = metadata.version(package)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e7])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(available())
    record: dict[str, Any] = {"machine": machine(), "results": {}}
    print(json.dumps(record["machine"]))
    for size in map(int, options.sizes):
        J = gradients(options.tasks, size)
        for what, make in (("gram", gram_contenders), ("step", step_contenders)):
            results = measure(make(J), options.rounds)
            record["results"][f"{what} of {options.tasks} x {size:,}"] = results
            for name, this in results.items():
                low, high = this["quartiles"]
                print(
                    f"{what} of {options.tasks} x {size:<12,} {name:<32}"
                    f"{this['milliseconds']:>10.3f} ms {this['ratio']:>7.2f} "
                    f"({low:.2f} to {high:.2f})"
                )
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
