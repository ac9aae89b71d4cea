"""Whether two threads that step two optimizers take half the time of one thread.

    python bench/free_threading.py [--rounds N]

Each optimizer steps with one thread of its own, so with the GIL two of them take turns
but for the time in kernels, and on free-threaded Python they run at once. Rounds of
both kinds alternate in one process, and the least time of each counts, because other
programs on the machine only make them longer. Time of the CPU tells whether threads
make each other's steps more expensive, also where they do not get a core each.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

import fastopt

SIZES = 1_000, 10_000, 100_000, 4_000_000
BURST = 0.004  # seconds that a thread steps in a round, about


def numpy_step(size: int) -> Callable[[], object]:
    """Return a step of AdamW over an array."""
    opt = fastopt.adamw(np.ones(size, np.float32), threads=1)
    grad = np.full(size, 0.1, np.float32)
    return lambda: opt.step(grad)


def torch_step(size: int) -> Callable[[], object]:
    """Return a step of torch's class over a parameter."""
    torch = importlib.import_module("torch")
    fast = importlib.import_module("fastopt.torch")
    param = torch.nn.Parameter(torch.ones(size))
    param.grad = torch.full((size,), 0.1)
    step: Callable[[], object] = fast.AdamW([param], threads=1).step
    return step


class Times(NamedTuple):
    """Seconds from the first begin to the last end, and of the CPU, of all threads."""

    wall: float
    cpu: float


class Pair:
    """Two threads that each make something to do, and do it again and again."""

    def __init__(self, make: Callable[[], Callable[[], object]]):
        self.count, self.done = 1, threading.Semaphore(0)
        self.spans: list[tuple[float, float, float]] = []  # begin, end, of the CPU
        self.gates = [threading.Semaphore(0) for _ in range(2)]
        for gate in self.gates:
            work = threading.Thread(target=self.work, args=(make, gate), daemon=True)
            work.start()

    def work(
        self, make: Callable[[], Callable[[], object]], gate: threading.Semaphore
    ) -> None:
        # Made here, because a thread uses its own objects faster than another one's.
        action = make()
        while gate.acquire():
            begin, cpu = time.perf_counter(), time.thread_time()
            for _ in range(self.count):
                action()
            cpu = time.thread_time() - cpu
            self.spans.append((begin, time.perf_counter(), cpu))
            self.done.release()

    def times(self, count: int, at_once: bool) -> Times:
        """Let both do so much, at once or one after the other."""
        self.count, self.spans = count, []
        for gate in self.gates:
            gate.release()
            if not at_once:
                self.done.acquire()
        for _ in self.gates if at_once else ():
            self.done.acquire()
        begins, ends, cpu = zip(*self.spans, strict=True)
        return Times(max(ends) - min(begins), sum(cpu))


def measured(
    make: Callable[[int], Callable[[], object]], size: int, rounds: int
) -> str:
    """Return a row of the table."""
    pair = Pair(partial(make, size))
    pair.times(3, False)
    count = max(1, int(BURST / (pair.times(3, False).cpu / 6)))
    alone, together = [], []
    for _ in range(rounds):
        alone.append(pair.times(count, False))
        together.append(pair.times(count, True))
    row = [f"{size:,}"]
    for of in (lambda times: times.wall, lambda times: times.cpu):
        one, two = min(map(of, alone)), min(map(of, together))
        row += [f"{time * 1e6 / count / 2:.2f}" for time in (one, two)]
        row.append(f"{one / two:.2f}")
    return f"| {' | '.join(row)} |"


def report(rounds: int) -> Iterator[str]:
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    which = "with" if has_gil else "without"
    yield f"Python {platform.python_version()} {which} the GIL"
    doors = {"fastopt.adamw": numpy_step}
    if find_spec("torch"):
        doors["fastopt.torch.AdamW"] = torch_step
    for door, make in doors.items():
        yield f"\n{door}: microseconds a step\n"
        yield (
            "| elements | one by one | at once | ratio "
            "| CPU time: one by one | at once | ratio |"
        )
        yield "|---" * 7 + "|"
        for size in SIZES:
            yield measured(make, size, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    for line in report(parser.parse_args().rounds):
        print(line, flush=True)
