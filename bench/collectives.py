"""What steps over shards send to other processes, for 8 to 1,024 of them.

    python bench/collectives.py

Threads stand for the processes. Each has a slice of every array. The ``reduce`` of its
optimizer counts the vectors that it is handed. The result is compared with that of one
process, and the counts with the formulas of docs/distributed.md. No time is measured,
because the threads of one machine have no network between them. The columns "GB sent
by ..." are published formulas for gradients and parameters, which the engine sends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fastopt
from fastopt.rule import Rule

PROCESSES = 8, 64, 256, 1024
STEPS = 2
SIZES = (4096, 1000, 7, 1)  # of the arrays that are stepped here
# A model of 7 billion parameters in bfloat16, of 291 arrays, for the formulas.
ELEMENTS, ARRAYS = 7e9, 291
CASES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "adamw": (fastopt.adamw, {}),
    "adamw, clipped": (fastopt.adamw, {"clip_norm": 1.0}),
    "lamb": (fastopt.lamb, {}),
    "prodigy, clipped": (fastopt.prodigy, {"clip_norm": 1.0}),
}


def vectors(rule: Rule, options: dict[str, Any], arrays: int) -> list[int]:
    """Return the formula: the lengths of the vectors of float64 in each step."""
    lengths = [2] if options else []
    if rule.measure is not None:
        lengths.append((1 + rule.terms) * (arrays if rule.by_segment else 1))
    return lengths


def cut(array: Any, rank: int, count: int) -> Any:
    bounds = [len(array) * r // count for r in (rank, rank + 1)]
    return array[slice(*bounds)].copy()


def numbers(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=size) for size in SIZES]


def simulate(
    rule: Rule, options: dict[str, Any], count: int
) -> tuple[list[list[int]], list[Any]]:
    """Return the lengths that each process has handed over, and the parameters."""
    barrier = threading.Barrier(count)
    handed: list[Any] = [None] * count
    lengths: list[list[int]] = [[] for _ in range(count)]
    params: list[Any] = [None] * count

    def reduce(rank: int) -> Callable[[Any], None]:
        def add(vector: Any) -> None:
            lengths[rank].append(len(vector))
            handed[rank] = vector.copy()
            barrier.wait()
            total = np.add.reduce(handed)
            barrier.wait()
            vector[:] = total

        return add

    def work(rank: int) -> None:
        params[rank] = [cut(array, rank, count) for array in numbers(0)]
        opt = rule(params[rank], reduce=reduce(rank), threads=1)
        for step in range(STEPS):
            opt.step([cut(g, rank, count) for g in numbers(step + 1)], **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = [np.concatenate(slices) for slices in zip(*params, strict=True)]
    return lengths, whole


def check(rule: Rule, options: dict[str, Any], count: int) -> None:
    """Compare a simulation with the formula, and with one process."""
    lengths, params = simulate(rule, options, count)
    expected = vectors(rule, options, len(SIZES)) * STEPS
    if any(of != expected for of in lengths):
        raise AssertionError(f"{rule.name}: {lengths[0]} handed over, not {expected}")
    alone = numbers(0)
    opt = rule(alone)
    for step in range(STEPS):
        opt.step(numbers(step + 1), **options)
    for ours, theirs in zip(params, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def main() -> None:
    table = Table("processes", "rule", "exchanges", "bytes handed over", "received")
    table.title = f"A step of {ELEMENTS:.0e} parameters in {ARRAYS} arrays"
    for name in ("GB sent by DDP", "by ZeRO 1, 2", "by ZeRO 3, FSDP2"):
        table.add_column(name, justify="right")
    for count in PROCESSES:
        share = (count - 1) / count
        # Rings: gradients are reduced and scattered, and parameters gathered.
        sent = [2 * share, 2 * share, 3 * share]
        for name, (rule, options) in CASES.items():
            check(rule, options, count)
            lengths = vectors(rule, options, ARRAYS)
            handed = 8 * sum(lengths)
            row = str(len(lengths)), f"{handed:,}", f"{handed * (count - 1):,}"
            gigabytes = [f"{2 * ELEMENTS * of / 1e9:.1f}" for of in sent]
            table.add_row(f"{count:,}", name, *row, *gigabytes)
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
