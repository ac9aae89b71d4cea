"""What a step on a GPU costs the host, measured without a GPU.

A stub stands for the driver: it does nothing, so that what is left is ours. The kernels
are compiled as for a GPU. Times are of a step of AdamW: a runner's, with gradients that
are where they were ("same"), have moved, or are clipped; the core optimizer's over as
many arrays, or over one flat buffer of that size; and fastopt.torch's over tensors that
pose as a GPU's ("torch"), also where every second one is of bfloat16 and the norm of
all gradients is clipped ("mixed").

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

ELEMENTS, STEPS = 1000, 200
COUNTS = 1, 150, 1000


def microseconds(step: Callable[[], object], repeats: int) -> float:
    """Return the time of one call, the median of several batches."""
    batches = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
        batches.append((time.perf_counter() - begin) / STEPS)
    return 1e6 * statistics.median(batches)


def measured(count: int, repeats: int) -> dict[str, float]:
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

    def clipped() -> None:
        t = int(done[0]) + 1
        row = (1.0, *rule.scalars(t, *values))
        runner.decided_by_host([row], Request(clip_norm=1.0), [t])()

    runner.place(places[0])
    opt = rule(params)
    flat, grad = (cuda_arrays.empty((count * ELEMENTS,), "f4", 0) for _ in range(2))
    whole = rule(flat)
    steps: dict[str, Callable[[], object]] = {
        "same": step,
        "moved": moved,
        "clip_norm": clipped,
        "optimizer": lambda: opt.step(grads[0]),
        "flat": lambda: whole.step(grad),
        "torch": of_torch(params, grads[0]),
        "mixed": of_torch(params, grads[0], mixed=True, clip_norm=1.0),
    }
    return {name: microseconds(call, repeats) for name, call in steps.items()}


def of_torch(
    params: list[Any], grads: list[Any], mixed: bool = False, **options: Any
) -> Callable[[], object]:
    """Return a step of fastopt.torch, over tensors on the CPU that it takes for a
    GPU's: the stub's device memory is the host's."""
    import torch

    from fastopt.backends import cuda_arrays, cuda_driver
    from fastopt.torch import AdamW, memory

    def tensor(i: int, array: cuda_arrays.DeviceArray) -> torch.Tensor:
        place: Any = (ctypes.c_char * array.nbytes).from_address(array.address)
        dtype = torch.bfloat16 if mixed and i % 2 else torch.float32
        numbers = torch.frombuffer(place, dtype=dtype, count=array.size)
        numbers.owner = array
        return numbers

    def as_array(name: str, of: Any) -> cuda_arrays.DeviceArray:
        if isinstance(of, cuda_arrays.DeviceArray):
            return of
        shape, dtype = tuple(of.shape), of.numpy().dtype  # bfloat16 comes as int16
        return cuda_arrays.DeviceArray(of.data_ptr(), shape, dtype, of, 0)

    cuda_driver.as_array = as_array
    memory.on_gpu = lambda tensor: True
    memory.is_captured = lambda tensors: False
    tensors = [tensor(i, param) for i, param in enumerate(params)]
    named = [torch.nn.Parameter(param) for param in tensors]
    for i, (param, grad) in enumerate(zip(named, grads, strict=True)):
        param.grad = tensor(i, grad)
    opt = AdamW(named, **options)
    for _ in range(3):
        opt.step()
    return opt.step


def main() -> None:
    parser = argparse.ArgumentParser(description="the host's time of a step on a GPU")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--repeats", type=int, default=30, help="batches of steps")
    given = parser.parse_args()
    path = given.json
    folder = Path(tempfile.mkdtemp())
    library = cuda_stub.build(folder)
    os.environ["FASTOPT_LIBCUDA"] = str(library)
    stub = cuda_stub.Stub(library)
    stub.quiet()
    results: dict[str, dict[str, float]] = {}
    for count in COUNTS:
        times = results[str(count)] = measured(count, given.repeats)
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
