"""AdamW against naive NumPy, torch fused and the floor: ratios from interleaved rounds.

    python bench/ratios.py [--json bench/results/NAME.json] [--rounds 15]

Each round runs every contender once, in a burst of steps after an unmeasured one, in an
order that rotates; a ratio is taken within a round, where the machine is the same for
both, and the table shows the median with a bootstrap interval. Run nothing else
meanwhile.
"""

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np

import fastopt
from fastopt import cython_cpu, threads
from fastopt.floor import FLOORS
from fastopt.naive import Naive

SIZES = (1_000, 100_000, 250_000, 1_000_000, 50_000_000)
BURST_SECONDS = 0.02


def ours(size, backend):
    opt = fastopt.adamw(normal(size), backend=backend)
    grad = normal(size)
    return lambda: opt.step(grad)


def normal(size):
    return np.random.default_rng(0).standard_normal(size, np.float32)


def contenders(size):
    """Name -> a function that does one step of AdamW, float32, one flat buffer."""
    grad = normal(size)
    naive = Naive("adamw", [normal(size)])
    floor, small = FLOORS[2](normal(size)), grad * np.float32(1e-6)
    found = {
        "fastopt": ours(size, "cython"),
        "floor": lambda: floor.step(small),
        "naive NumPy": lambda: naive.step([grad]),
    }
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(threads.available())
    for kind in ("fused", "foreach"):
        tensor = torch.randn(size)
        tensor.grad = torch.randn(size)
        found[f"torch {kind}"] = torch.optim.AdamW([tensor], **{kind: True}).step
    return found


def backends(size):
    """Our own, apart from torch: beside Numba's threads a step of torch foreach at
    100,000 elements took 30 times as long."""
    return {"fastopt": ours(size, "cython"), "fastopt numba": ours(size, "numba")}


def burst(step, count):
    step()
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def interval(ratios):
    rng = np.random.default_rng(0)
    draws = rng.choice(ratios, (2000, len(ratios)))
    return [float(q) for q in np.quantile(np.median(draws, axis=1), [0.025, 0.975])]


def measure(steps, rounds):
    counts = {}
    for name, step in steps.items():
        step()  # compiles, allocates, touches
        counts[name] = max(1, min(2000, int(BURST_SECONDS / burst(step, 1))))
    names = list(steps)
    times = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(burst(steps[name], counts[name]))
    ours = np.array(times["fastopt"])
    return {
        name: {
            "seconds": float(np.median(t)),
            "ratio": float(np.median(np.array(t) / ours)),
            "interval": interval(np.array(t) / ours),
        }
        for name, t in times.items()
    }


def huge_pages():
    """Where programs get huge pages: "always", "never", or "madvise" (NumPy asks for
    them from 4 MiB on, torch only under THP_MEM_ALLOC_ENABLE=1)."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().split("[")[1].split("]")[0] if setting.exists() else "?"


def machine():
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (x.split(":")[1].strip() for x in lines if "model name" in x), model
        )
    found = {
        "date": str(date.today()),
        "cpu": model,
        "threads": threads.available(),
        "huge pages": huge_pages(),
        "isa": cython_cpu.kernels().ISA,
        "fastopt": fastopt.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    try:
        import torch

        found["torch"] = torch.__version__
    except ImportError:
        pass
    return found


def table(results):
    """In Markdown: fastopt's time, and the others' as multiples of it."""
    names = [name for name in next(iter(results.values())) if name != "fastopt"]
    lines = [
        "| elements | fastopt | " + " | ".join(names) + " |",
        "|--:|--:|" + "--:|" * len(names),
    ]
    for size, row in results.items():
        ratios = [f"{row[name]['ratio']:.2f}" for name in names]
        time = f"{row['fastopt']['seconds'] * 1e6:,.1f} µs"
        lines.append(f"| {int(size):,} | {time} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=float, nargs="*", default=SIZES)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes]
    results = {str(n): measure(contenders(n), options.rounds) for n in sizes}
    for n in sizes:
        apart = measure(backends(n), options.rounds)
        results[str(n)]["fastopt numba"] = apart["fastopt numba"]
    print(json.dumps(machine()))
    print(table(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "adamw float32": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
