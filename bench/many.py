"""Thousands of parameters in one optimizer, and thousands of optimizers.

    python bench/many.py [--tensors 5000] [--size 10] [--rounds 20]

Per-parameter offloaders make one optimizer for each tensor. Printed are microseconds
for each tensor: to make the optimizers, to do the first step, which plans the others,
and to do one of the others (the median). torch's are there to compare with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import fastopt
import fastopt.torch


def parameters(count: int, size: int) -> list[Any]:
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(size)
    return params


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(
    make: Callable[[Any], Any], given: list[Any], rounds: int, *grads: Any
) -> list[str]:
    """Return the microseconds to make an optimizer of each of these parameters, of
    their first step and of later ones, for each tensor."""
    begin = time.perf_counter()
    opts = [make(params) for params in given]
    made = time.perf_counter() - begin

    def step() -> None:
        for opt in opts:
            opt.step(*grads)

    first = seconds(step)
    later = statistics.median(seconds(step) for _ in range(rounds))
    count = sum(map(len, given))
    return [f"{part / count * 1e6:.2f}" for part in (made, first, later)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=5000)
    parser.add_argument("--size", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    count, size, rounds = options.tensors, options.size, options.rounds
    few = max(1, count // 10)
    kinds: dict[str, Callable[[Any], Any]] = {
        "fastopt.torch": lambda params: fastopt.torch.Adam(params, 1e-3),
        "torch, fused": lambda params: torch.optim.Adam(params, 1e-3, fused=True),
        "torch, foreach": lambda params: torch.optim.Adam(params, 1e-3),
    }
    table = Table("Adam", "make", "first step", "step")
    table.title = "microseconds for each tensor"
    for make in kinds.values():
        measure(make, [parameters(3, size)], 1)  # what is imported or made once
    for name, make in kinds.items():
        shown = measure(make, [parameters(count, size)], rounds)
        table.add_row(f"{name}, one optimizer of {count}", *shown)
    arrays, grads = (
        [np.ones(size, np.float32) for _ in range(count)] for _ in range(2)
    )
    shown = measure(fastopt.adam, [arrays], rounds, grads)
    table.add_row(f"fastopt, one optimizer of {count}", *shown)
    table.add_section()
    for name, make in kinds.items():
        shown = measure(make, [[param] for param in parameters(few, size)], rounds)
        table.add_row(f"{name}, {few} optimizers of one", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
