"""What a step on a GPU costs the host, measured without a GPU.

A stub stands for the driver: it does nothing, so that what is left is ours. The kernels
are compiled as for a GPU. Times are of a step of AdamW: a runner's, with gradients that
are where they were ("same"), have moved, or are clipped; the core optimizer's over as
many arrays, or over one flat buffer of that size; and fastopt.torch's over tensors that
pose as a GPU's.

    python bench/gpu_host.py

It needs numba-cuda (the extra ``cuda13``), pytest and a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

import cuda_stub  # noqa: E402

ELEMENTS, REPEATS, STEPS = 1000, 30, 200
COUNTS = 1, 150, 1000


def microseconds(step: Callable[[], object]) -> float:
    """Return the time of one call, the median of several batches."""
    batches = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
        batches.append((time.perf_counter() - begin) / STEPS)
    return 1e6 * statistics.median(batches)


def measured(count: int) -> dict[str, float]:
    """Return the host's times of steps over so many tensors."""
    import fastopt
    from fastopt.backends import cuda_arrays, cuda_driver
    from fastopt.memory.segments import Segment
    from fastopt.step import PLAIN, Request

    def arrays() -> list[cuda_arrays.DeviceArray]:
        whole = cuda_arrays.empty((count * ELEMENTS,), np.float32, 0)
        return [whole[i * ELEMENTS : (i + 1) * ELEMENTS] for i in range(count)]

    params, m, v, *grads = (arrays() for _ in range(5))
    segments = [Segment(p, state, 0) for p, *state in zip(params, m, v, strict=True)]
    rule, done = fastopt.adamw, np.zeros(1, np.int64)
    runner = cuda_driver.bind(rule, segments, done, np.zeros((2, 1, 0)))
    places = [np.array([g.address for g in each]) for each in grads]
    order = np.arange(count)
    values = list(rule.hyperparameters.values())

    def step(request: Request = PLAIN) -> None:
        row = (1.0, *rule.scalars(int(done[0]) + 1, *values))
        runner([row], request)

    def moved() -> None:
        places.reverse()
        runner.follow(places[0], order)
        step()

    noted: dict[str, object] = {}

    def clipped() -> None:
        row = (1.0, *rule.scalars(int(done[0]) + 1, *values))
        runner.limited([row], Request(clip_norm=1.0), None, noted, "norm")

    runner.place(places[0])
    times = {"same": microseconds(step), "moved": microseconds(moved)}
    times["clip_norm"] = microseconds(clipped)
    opt = rule(params)
    times["optimizer"] = microseconds(lambda: opt.step(grads[0]))
    flat, grad = (cuda_arrays.empty((count * ELEMENTS,), "f4", 0) for _ in range(2))
    whole = rule(flat)
    times["flat"] = microseconds(lambda: whole.step(grad))
    times["torch"] = microseconds(of_torch(params, grads[0]))
    return times


def of_torch(params: list[Any], grads: list[Any]) -> Callable[[], object]:
    """Return a step of fastopt.torch, over tensors on the CPU that it takes for a
    GPU's: the stub's device memory is the host's."""
    import torch

    from fastopt.backends import cuda_arrays, cuda_driver
    from fastopt.torch import AdamW, memory

    def tensor(array: cuda_arrays.DeviceArray) -> torch.Tensor:
        place: Any = (ctypes.c_char * array.nbytes).from_address(array.address)
        numbers = torch.frombuffer(place, dtype=torch.float32)
        numbers.owner = array
        return numbers

    def as_array(name: str, of: Any) -> cuda_arrays.DeviceArray:
        if isinstance(of, cuda_arrays.DeviceArray):
            return of
        shape, dtype = tuple(of.shape), of.numpy().dtype
        return cuda_arrays.DeviceArray(of.data_ptr(), shape, dtype, of, 0)

    cuda_driver.as_array = as_array
    memory.on_gpu = lambda tensor: True
    memory.is_captured = lambda tensors: False
    named = [torch.nn.Parameter(tensor(param)) for param in params]
    for param, grad in zip(named, grads, strict=True):
        param.grad = tensor(grad)
    opt = AdamW(named)
    for _ in range(3):
        opt.step()
    return opt.step


def main() -> None:
    parser = argparse.ArgumentParser(description="the host's time of a step on a GPU")
    parser.add_argument("--json", type=Path, help="a file for the results")
    path = parser.parse_args().json
    folder = Path(tempfile.mkdtemp())
    library = cuda_stub.build(folder)
    os.environ["FASTOPT_LIBCUDA"] = str(library)
    stub = cuda_stub.Stub(library)
    stub.quiet()
    results: dict[str, dict[str, float]] = {}
    for count in COUNTS:
        times = results[str(count)] = measured(count)
        if len(results) == 1:
            print(" tensors", *(f"{name:>10}" for name in times), "(us)")
        print(f"{count:8}", *(f"{time:10.1f}" for time in times.values()))
    if path is not None:
        from fastopt.bench import machine

        about = {"date": str(date.today()), "cpu": machine.cpu()}
        about |= {"caches": machine.caches(), "python": platform.python_version()}
        record = {"format": 1, "machine": about, "microseconds": results}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
