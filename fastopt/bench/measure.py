"""Measures bursts of all contenders in turn, and ratios within a round.

A round has one burst of each contender, in random order. Other programs on the machine
disturb all contenders of a round alike, so ratios are only taken within a round; the
result is their median over the rounds. The memory of a process stays in the same place
in all rounds, so the interval does not show how much that place matters: at a million
elements another run can differ by more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

import fastopt
from fastopt.bench import contender
from fastopt.bench.cases import all_elements
from fastopt.bench.contender import Case, Unavailable, state_count

REFERENCE = "fastopt"
# An idle process's OpenMP threads wait for work on a core, torch's for more than 10 ms:
# beside them a step of 100,000 elements took 12.9 us instead of 8.3. So a process is
# stopped when it has answered, and goes on when it is asked.
CAN_STOP = hasattr(signal, "SIGSTOP")
PAUSE_SECONDS = 0.001 if CAN_STOP else 0.05
# The share of the available memory that contenders may use.
MEMORY_SHARE = 0.6
# How many streams of memory a contender takes for each stream of the rule, if it makes
# temporaries of the parameters' size.
WITH_TEMPORARIES = {
    "naive NumPy": 3,
    "torch loop": 3,
    "torch foreach": 3,
    "timm": 3,
    "bitsandbytes": 3,
    "optax": 2,
}
BUILD = Path(fastopt.__file__).parent.parent


class Worker:
    """A contender's process, which runs a script. ``build`` is the folder with the
    fastopt it imports."""

    def __init__(
        self, name: str, build: Path = BUILD, script: str = contender.__file__
    ) -> None:
        self.name = name
        # DeepSpeed looks for ninja, which an environment that is not activated hides.
        programs = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        modules = [str(build), os.environ.get("PYTHONPATH", "")]
        self._messages = TemporaryFile()  # closed with the process, read if it fails
        self._process = process = subprocess.Popen(
            [sys.executable, script, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            encoding="utf-8",
            env=os.environ
            | {
                "PATH": os.pathsep.join(filter(None, programs)),
                "PYTHONPATH": os.pathsep.join(filter(None, modules)),
            },
        )
        assert process.stdin and process.stdout  # they are pipes
        self._requests, self._replies = process.stdin, process.stdout

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Return the reply, or raise Unavailable or RuntimeError if it says so."""
        self._go_on()
        try:
            print(json.dumps({"do": do, **more}), file=self._requests, flush=True)
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if CAN_STOP:
            self._process.send_signal(signal.SIGSTOP)
        if not line:
            raise RuntimeError(
                f"the process of {self.name!r} ended with status "
                f"{self._ended()} when asked to {do}"
                f"{self._last_words() or '; status -9 may mean too little memory'}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "unavailable" in reply:
            raise Unavailable(reply["unavailable"])
        if "error" in reply:
            raise RuntimeError(f"{self.name!r} failed to {do}:\n{reply['error']}")
        return reply

    def _ended(self) -> int:
        self._go_on()
        return self._process.wait()

    def _last_words(self) -> str:
        self._messages.seek(0)
        text = self._messages.read().decode("utf-8", "replace")
        return "".join(f"\n{line}" for line in text.splitlines()[-10:])

    def _go_on(self) -> None:
        if CAN_STOP:
            self._process.send_signal(signal.SIGCONT)

    def hang_up(self) -> None:
        """Close the stdin of the process, which then ends as soon as it is idle."""
        self._go_on()
        with suppress(BrokenPipeError):  # it has ended before
            self._requests.close()

    def close(self, seconds: float) -> None:
        """Wait for the process to end, and kill it after ``seconds``."""
        self.hang_up()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._messages.close()


class Workers(dict[str, Worker]):
    """The processes of all installed contenders, by name. They end with the block."""

    def __init__(self, names: Sequence[str], script: str = contender.__file__) -> None:
        super().__init__()
        self._names, self._script = names, script
        self.left_out: dict[str, str] = {}

    def __enter__(self) -> Workers:
        try:
            for name in self._names:
                self[name] = Worker(name, script=self._script)
            for name in self._names:
                try:
                    self[name].ask("about")
                except Unavailable as reason:
                    self.left_out[name] = str(reason)
                    self.pop(name).close(3)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.values():
            worker.hang_up()
        patience = time.monotonic() + 3
        for worker in self.values():
            worker.close(max(0, patience - time.monotonic()))


# Memory -----------------------------------------------------------------------------


def memory_needed(name: str, case: Case) -> int:
    streams = 2 + state_count(case)
    return 4 * streams * all_elements(case) * WITH_TEMPORARIES.get(name, 1)


def memory_available() -> float:
    """Return the available bytes, or infinity if there is no /proc/meminfo."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    figures = dict(line.split(":") for line in lines)
    return int(figures["MemAvailable"].split()[0]) * 1024.0


def batches(
    needed: dict[str, int], budget: float
) -> tuple[list[list[str]], dict[str, str]]:
    """Return batches of contenders that fit into memory together with the reference,
    and why other contenders fit into none."""
    groups: list[list[str]] = []
    too_large = {}
    room = 0.0
    for name in (name for name in needed if name != REFERENCE):
        together = needed[REFERENCE] + needed[name]
        if together > budget:
            too_large[name] = (
                f"needs {together / 2**30:.1f} GiB together with {REFERENCE}, and "
                f"{max(budget, 0) / 2**30:.1f} GiB may be used"
            )
            continue
        if not groups or needed[name] > room:
            groups.append([REFERENCE])
            room = budget - needed[REFERENCE]
        groups[-1].append(name)
        room -= needed[name]
    return groups, too_large


# Rounds -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """The medians of a contender's seconds, and of their ratio to fastopt's."""

    seconds: float
    ratio: float
    interval: tuple[float, float]  # of the ratio, 95%


@dataclass
class Measured:
    """The timings of a case by contender, and why other contenders have none."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def rounds_of(
    workers: dict[str, Worker], names: list[str], rounds: int, tick: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the seconds of a step in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        # A random order, so that no contender always follows the same one.
        for name in map(names.__getitem__, rng.permutation(len(names))):
            time.sleep(PAUSE_SECONDS)
            seconds[name].append(workers[name].ask("burst")["seconds"])
            tick()
    return seconds


def measure(
    case: Case,
    workers: dict[str, Worker],
    rounds: int,
    tick: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure all contenders. Call ``tick`` after each burst."""
    needed = {name: memory_needed(name, case) for name in workers}
    together, too_large = batches(needed, MEMORY_SHARE * memory_available())
    result = Measured(case, missing=too_large)
    reference: list[float] = []
    for batch in together:
        ready = []
        for name in batch:
            try:
                workers[name].ask("prepare", case=asdict(case))
                ready.append(name)
            except Unavailable as reason:
                result.missing[name] = str(reason)
        seconds = rounds_of(workers, ready, rounds, tick)
        for name in ready:
            workers[name].ask("drop")
        ours = seconds.pop(REFERENCE)
        reference += ours
        for name, theirs in seconds.items():
            ratios = np.array(theirs) / np.array(ours)
            result.timings[name] = Timing(
                float(np.median(theirs)),
                float(np.median(ratios)),
                interval(ratios.tolist()),
            )
    if reference:
        own = Timing(float(np.median(reference)), 1.0, (1.0, 1.0))
        result.timings = {REFERENCE: own} | result.timings
    return result
