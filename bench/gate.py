"""The regression gate: is the working tree slower than a revision before it?

    python bench/gate.py               against HEAD if there are changes, else HEAD~1
    python bench/gate.py --base v0.1   against any revision
    python bench/gate.py --self-test   shows that it catches 20% and is quiet at 0%

Both are built, and run in processes of their own: the base twice, the tree once. A
round has a burst of steps of each, so a ratio is taken where the machine is the same
for all; a launch is a few rounds in new processes, because where a process gets its
memory sways all of its times. The median over launches has a bootstrap interval. The
base against itself is the noise, and a case fails when its interval lies above 1 by
more than twice that, and by more than 5%.

Exits with 0: no case is slower; 1: one is; 2: too noisy to tell a slowdown of 20%.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastopt.__main__ import at_least
from fastopt.bench.contender import Case
from fastopt.bench.measure import Worker, interval, rounds_of

ROOT = Path(__file__).resolve().parent.parent
LEAST = 0.05  # a change of code that matters to nobody moves some kernels by 3%
MUST_SEE = 0.20
# One for each regime (call overhead, many arrays, caches, memory) and for each way to
# call fastopt.
CASES: dict[str, tuple[str, Case]] = {
    "adamw 1e3": ("fastopt", Case("adamw", {}, 1, 1_000)),
    "adamw 100 arrays": ("fastopt arrays", Case("adamw", {}, 100, 1_000)),
    "adamw 1e5": ("fastopt", Case("adamw", {}, 1, 100_000)),
    "adamw 1e6": ("fastopt", Case("adamw", {}, 1, 1_000_000)),
    "adamw 1e7": ("fastopt", Case("adamw", {}, 1, 10_000_000)),
    "sgd 1e5": ("fastopt", Case("sgd", {"momentum": 0.9}, 1, 100_000)),
    "rmsprop 1e5": ("fastopt", Case("rmsprop", {}, 1, 100_000)),
    "adamw 1e7 clip, ema": (
        "fastopt",
        Case("adamw", {}, 1, 10_000_000, {"clip_norm": 1.0, "ema": 0.999}),
    ),
    "lamb 30 arrays": ("fastopt arrays", Case("lamb", {}, 30, 333_333)),
    "adamw 1e5 numba": ("fastopt numba", Case("adamw", {}, 1, 100_000)),
    # The size of a small perceptron: its weights and biases.
    "adamw 8 arrays, torch": ("fastopt torch", Case("adamw", {}, 8, 10_000)),
    "adamw 8 arrays, JAX": ("fastopt jax", Case("adamw", {}, 8, 10_000)),
    "adamw 8 arrays, C": ("fastopt C", Case("adamw", {}, 8, 10_000)),
}


@dataclass(frozen=True)
class Verdict:
    """The times of a case for the tree and the base, as multiples of the base's."""

    ratio: float
    low: float
    high: float
    noise: float  # how far from 1 the base's interval against itself reaches

    @property
    def tolerance(self) -> float:
        return max(LEAST, 2 * self.noise)

    @property
    def slower(self) -> bool:
        return self.low > 1 + self.tolerance

    @property
    def blind(self) -> bool:
        """Whether a slowdown that must be seen could pass with this spread."""
        seen_at = (1 + MUST_SEE) * self.low / self.ratio
        return not self.slower and seen_at <= 1 + self.tolerance


def verdict(tree: Sequence[float], base: Sequence[float]) -> Verdict:
    """Judge the ratios of the tree and of the base to the base, one of each launch."""
    low, high = interval(tree)
    noise = max(abs(edge - 1) for edge in interval(base))
    return Verdict(float(np.median(tree)), low, high, noise)


# Builds -----------------------------------------------------------------------------


def build(source: Path, into: Path) -> Path:
    """Install a source tree into a folder, without its dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*command, "--target", into, source], check=True)
    return into


def copy_of_tree(into: Path) -> Path:
    """Copy all that git does not ignore, including changes and new files."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).exists():  # or it was deleted, which is a change, too
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    return into


def revision(name: str, into: Path) -> Path:
    archive = into.with_suffix(".tar")
    subprocess.run(["git", "archive", "-o", archive, name], cwd=ROOT, check=True)
    shutil.unpack_archive(archive, into)
    return into


SLOWED = """
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef double now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + 1e-9 * t.tv_nsec


cdef void wait(double begin) noexcept nogil:
    cdef double end = begin + {factor} * (now() - begin)
    while now() < end:
        pass


cdef void slowed(
    kernel_t kernel, const int64_t* row, int64_t first, int64_t n, const void* constants
) noexcept nogil:
    cdef double begin = now()
    kernel(row, first, n, constants)
    wait(begin)


cdef void slowed_sums(
    measure_t measure, const int64_t* row, int64_t first, int64_t n,
    const void* constants, double* sums
) noexcept nogil:
    cdef double begin = now()
    measure(row, first, n, constants, sums)
    wait(begin)


# The kernels of any rule"""
# The calls of kernels in the driver, and what stands there instead.
CALLS = {
    "    kernel(row, ": "    slowed(kernel, row, ",
    "    job.finish(pair, ": "    slowed(job.finish, pair, ",
    "    measure(\n": "    slowed_sums(measure,\n",
}


def slow_down(source: Path, factor: float) -> Path:
    """Make every kernel of a source tree take ``factor`` times as long."""
    driver = source / "csrc" / "driver.pyx"
    text = driver.read_text(encoding="utf-8")
    place = SLOWED.rpartition("\n")[2]
    if text.count(place) != 1 or any(call not in text for call in CALLS):
        raise RuntimeError(f"{driver.name} has changed; change slow_down with it")
    for call, slow in CALLS.items():
        text = text.replace(call, slow)
    text = text.replace(place, SLOWED.format(factor=factor).lstrip())
    driver.write_text(text, encoding="utf-8")
    return source


# Launches ---------------------------------------------------------------------------


def launch(
    contender: str, case: Case, builds: dict[str, Path], rounds: int
) -> dict[str, float]:
    """Return the time of each build, in new processes, as a multiple of the base's."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, folder in builds.items():
            workers[name] = Worker(contender, folder)
            stack.callback(workers[name].close, 3)
        for worker in workers.values():
            worker.ask("prepare", case=asdict(case))
        seconds = rounds_of(workers, list(workers), rounds, lambda: None)
    of_base = np.array(seconds["base"])
    return {name: float(np.median(t / of_base)) for name, t in seconds.items()}


def compare(
    base: Path,
    tree: Path,
    launches: int,
    rounds: int,
    cases: dict[str, tuple[str, Case]],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Verdict]:
    """The verdict on each case. The launches of all cases take turns, so that a bad
    minute of the machine spreads over them; where noise hides what must be seen, there
    are as many again."""
    builds = {"base": base, "base again": base, "tree": tree}
    ratios: dict[str, list[dict[str, float]]] = {name: [] for name in cases}

    def run(names: Sequence[str]) -> dict[str, Verdict]:
        for turn in range(launches):
            # The order of the processes decides who gets which memory.
            shift = turn % len(builds)
            order = dict([*builds.items()][shift:] + [*builds.items()][:shift])
            for name in names:
                ratios[name].append(launch(*cases[name], order, rounds))
                tick()
        return {
            name: verdict(
                [launched["tree"] for launched in ratios[name]],
                [launched["base again"] for launched in ratios[name]],
            )
            for name in cases
        }

    verdicts = run(list(cases))
    unclear = [name for name, case in verdicts.items() if case.blind]
    return run(unclear) if unclear else verdicts


def table(verdicts: dict[str, Verdict], title: str) -> Table:
    shown = Table("case", title=title)
    for header in ("tree / base", "95%", "noise", "fails above", ""):
        shown.add_column(header, justify="right")
    for name, v in verdicts.items():
        word = "[red]slower" if v.slower else "too noisy" if v.blind else "ok"
        shown.add_row(
            name,
            f"{v.ratio:.3f}",
            f"{v.low:.3f} to {v.high:.3f}",
            f"{v.noise:.3f}",
            f"{1 + v.tolerance:.3f}",
            word,
        )
    return shown


def gate(
    base: Path, tree: Path, options: argparse.Namespace, title: str
) -> dict[str, Verdict]:
    """Measure with a progress bar, print the table, return the verdicts."""
    console = Console()
    cases = {name: CASES[name] for name in options.cases}
    with Progress(console=console) as bars:
        bar = bars.add_task(title, total=len(cases) * options.launches)
        tick = partial(bars.advance, bar)
        numbers = options.launches, options.rounds
        measured = compare(base, tree, *numbers, cases, tick)
    console.print(table(measured, title))
    return measured


BUILT = ("csrc", "fastopt", "setup.py", "pyproject.toml")  # the sources of a build


def default_base() -> str:
    """Return HEAD if the sources have changes or new files, otherwise HEAD~1."""
    command = ["git", "status", "--porcelain", "--", *BUILT]
    changes = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    return "HEAD" if changes else "HEAD~1"


def status(verdicts: dict[str, Verdict]) -> int:
    if any(v.slower for v in verdicts.values()):
        return 1
    return 2 if any(v.blind for v in verdicts.values()) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--base", help="a revision; by default HEAD if there are changes, else HEAD~1"
    )
    parser.add_argument("--self-test", action="store_true")
    # Five medians are the fewest whose bootstrap interval means anything.
    parser.add_argument("--launches", type=at_least(5), default=10)
    parser.add_argument("--rounds", type=at_least(1), default=5, help="in each launch")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        tree = build(copy_of_tree(folder / "tree"), folder / "tree-built")
        if not options.self_test:
            base = options.base or default_base()
            source = revision(base, folder / "base")
            built = build(source, folder / "base-built")
            return status(gate(built, tree, options, f"the tree against {base}"))
        slow = slow_down(copy_of_tree(folder / "slow"), 1 + MUST_SEE)
        slowed = build(slow, folder / "slow-built")
        same = gate(tree, tree, options, "the tree against itself")
        worse = gate(tree, slowed, options, "kernels slowed by 20%")
    alarms = [name for name, v in same.items() if v.slower]
    # Numba's kernels are not the template's, so they were not slowed.
    passed = [n for n, v in worse.items() if not v.slower and "numba" not in n]
    print(f"Against itself: {', '.join(alarms) or 'no'} alarm.")
    print(f"Slowed by 20%: missed {', '.join(passed) or 'nowhere'}.")
    return 1 if alarms or passed else 0


if __name__ == "__main__":
    sys.exit(main())
