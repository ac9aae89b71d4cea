"""The measurement of bench/gpu.py: contenders that take turns, within a time."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from statistics import median

from gpu_cases import Case, Contender, Step, contenders, free_memory, launches
from gpu_report import FLOOR, OURS, OURS_OF_TORCH, Left, Result, Timing, time_of
from numba import cuda

from fastopt.backends.cuda_accesses import SIMULATED

REPEATS, FEWEST = 2, 5  # rounds, which are done even if time is up
BURST = 0.0 if SIMULATED else 5.0  # milliseconds that a burst takes, at least
MOST = 512  # steps in a burst
RESERVE, MEMORY_SHARE = 2e9, 0.95  # of the GPU's memory: bytes left, and part used


class Budget:
    """A time that is divided among what is left to do."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def share(self, others: int) -> float:
        """Return when the next of so many must end."""
        return time.monotonic() + self.left / others


class Runner:
    """Does the steps of several sets of buffers in turn."""

    def __init__(self, steps: Sequence[Step]):
        self.steps, self.next, self.count = steps, 0, len(steps)

    def step(self) -> None:
        step = self.steps[self.next]
        self.next = (self.next + 1) % len(self.steps)
        step()

    def burst(self) -> tuple[float, float]:
        """Return the milliseconds of a step on the GPU and on the host."""
        begin, end = cuda.event(), cuda.event()
        cuda.synchronize()
        begin.record()
        started = time.perf_counter()
        for _ in range(self.count):
            self.step()
        host = (time.perf_counter() - started) * 1e3
        end.record()
        end.synchronize()
        # The simulator's events have no times.
        device = host if SIMULATED else float(begin.elapsed_time(end))
        return device / self.count, host / self.count

    def warm_up(self) -> None:
        """Compile and make state, then choose how many steps a burst has: as many for
        each set."""
        for _ in self.steps:
            self.step()
        sets = len(self.steps)
        for _ in range(2 if BURST else 0):
            rounds = BURST / max(self.burst()) / sets
            self.count = sets * max(1, min(round(rounds), MOST // sets))


def made(contender: Contender, sets: int) -> Runner:
    """Return what does a contender's steps, ready to be measured."""
    runner = Runner([contender.make() for _ in range(sets)])
    runner.warm_up()
    return runner


def reason_of(error: Exception) -> str:
    """Return why a contender cannot be measured, in a line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = next(iter(str(error).strip().splitlines()), "")
    return f"not supported ({type(error).__name__}: {text[:200]})"


def sample(
    runners: dict[str, Runner], timings: dict[str, Timing], rounds: int, end: float
) -> None:
    """Measure contenders that take turns, until the rounds are done or time is up."""
    for repeat in range(REPEATS):
        for name in runners:
            timings[name].device.append([])
            timings[name].host.append([])
        now = time.monotonic()
        stop = now + (end - now) / (REPEATS - repeat)
        for k in range(rounds):
            if k >= FEWEST and time.monotonic() > stop:
                break
            for name in runners if k % 2 else reversed(runners):
                device, host = runners[name].burst()
                timings[name].device[-1].append(device)
                timings[name].host[-1].append(host)


def measured(
    case: Case, compared: dict[str, Contender], rounds: int, end: float, room: float
) -> Result | Left:
    """Measure a case until a time, in so many bytes of memory."""
    sets = case.sets()
    needed = {name: sets * of.stored for name, of in compared.items()}
    if needed[FLOOR] > room:
        least, there = needed[FLOOR] / 1e9, max(room, 0) / 1e9
        reason = f"the floor needs {least:.1f} GB, but there are {there:.1f}"
        return Left(case.group, case.name, case.elements, reason)
    tensors, moved = len(case.shapes), case.moved()
    result = Result(case.group, case.name, case.elements, tensors, moved, sets)
    result.interleaved = sum(needed.values()) <= room
    runners: dict[str, Runner] = {}
    for k, (name, contender) in enumerate(compared.items()):
        if needed[name] > room:
            result.refused[name] = f"it needs {needed[name] / 1e9:.1f} GB of memory"
            continue
        try:
            runners[name] = made(contender, sets)
            if not result.interleaved:
                now = time.monotonic()
                part = now + (end - now) / (len(compared) - k)
                result.timings[name] = Timing([], [], contender.moved)
                sample(runners, result.timings, rounds, part)
        except Exception as error:  # whatever a package says that it cannot do
            result.refused[name] = reason_of(error)
            if name in (OURS, OURS_OF_TORCH):  # what is to be repaired here
                traceback.print_exception(error)
            result.timings.pop(name, None)
        if not result.interleaved:
            runners.clear()
            free_memory()
    if result.interleaved:
        for name in runners:
            result.timings[name] = Timing([], [], compared[name].moved)
        sample(runners, result.timings, rounds, end)
    return result


def measure(
    cases: Sequence[Case], rounds: int, budget: Budget, say: Callable[[str], object]
) -> tuple[list[tuple[Case, Result]], list[Left]]:
    """Measure cases, and say what each one was. Return the results, and what was left
    out for lack of time or memory."""
    done: list[tuple[Case, Result]] = []
    left: list[Left] = []
    for k, case in enumerate(cases):
        title = f"{case.group}: {case.name}, {case.elements:,}"
        begin = time.monotonic()
        about = case.group, case.name, case.elements
        found: Result | Left = Left(*about, "no time was left")
        if budget.left > 2:
            end = budget.share(len(cases) - k)
            room = free_memory() * MEMORY_SHARE - RESERVE
            try:
                found = measured(case, contenders(case), rounds, end, room)
            except Exception as error:  # the other cases must not be lost
                found = Left(*about, reason_of(error))
        if isinstance(found, Left):
            left.append(found)
            say(f"{title}: left out, {found.reason}")
            continue
        done.append((case, found))
        taken = [
            f"{name} {time_of(median(found.timings[name].samples))}"
            for name in (OURS, FLOOR)
            if name in found.timings
        ]
        say(f"{title}: {', '.join(taken)} ({time.monotonic() - begin:.0f} s)")
    return done, left


def count_launches(done: Sequence[tuple[Case, Result]], budget: Budget) -> None:
    """Count the kernels of each contender's step, while time is left. A profiler may
    slow launches down from when it is first used, so this comes after the rest."""
    for case, result in sorted(done, key=lambda pair: pair[0].elements):
        for name, contender in contenders(case).items():
            if name not in result.timings or budget.left < 5:
                continue
            try:
                step = contender.make()
                for _ in range(2):
                    step()
                result.timings[name].launches = launches(step)
                del step
            except Exception:  # the times must not be lost
                continue
            finally:
                free_memory()
