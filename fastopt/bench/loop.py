"""``fastopt bench --loop``: what an optimizer costs within a training loop.

A round has a burst of passes of each contender, in random order. Ratios are taken
within a round, as measure.py says; a table has their medians.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastopt.bench import loop_contender, report
from fastopt.bench.contender import Unavailable
from fastopt.bench.loop_contender import FAMILIES, LOOPS, MODELS, Loop
from fastopt.bench.machine import machine
from fastopt.bench.measure import PAUSE_SECONDS, Workers
from fastopt.bench.pictures import LINES

FORMAT = 1
CLIP_NORM = 1.0
OPTIMIZER = "zero_grad", "clip", "step"  # the calls that are the optimizer's
REFERENCE = {
    name: next(iter(family)) for family in FAMILIES.values() for name in family
}


@dataclass
class Timing:
    """Medians over the rounds: the seconds of each call and of a pass, and multiples of
    the reference's time."""

    calls: dict[str, float]
    seconds: float  # of a pass
    optimizer: float  # multiple for the optimizer's calls
    whole: float  # multiple for the pass

    @property
    def own(self) -> float:
        """The seconds of the optimizer's calls."""
        return optimizer_seconds(self.calls)


@dataclass
class Measured:
    """The timings of a loop by contender."""

    loop: Loop
    timings: dict[str, Timing] = field(default_factory=dict)


def loops(models: tuple[str, ...] = MODELS) -> list[Loop]:
    return [Loop(model, clip) for model in models for clip in (None, CLIP_NORM)]


def title(loop: Loop) -> str:
    return loop.model + (" + clip_norm" if loop.clip_norm else "")


def optimizer_seconds(calls: dict[str, float]) -> float:
    return sum(calls.get(name, 0.0) for name in OPTIMIZER)


def measure(loop: Loop, workers: Workers, rounds: int) -> Measured:
    """Measure a loop with all contenders that have it."""
    names = []
    for name, worker in workers.items():
        try:
            worker.ask("prepare", case=asdict(loop))
        except Unavailable:
            continue
        names.append(name)
    bursts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in map(names.__getitem__, rng.permutation(len(names))):
            time.sleep(PAUSE_SECONDS)
            bursts[name].append(workers[name].ask("burst"))
    for name in names:
        workers[name].ask("drop")
    return Measured(loop, {name: timing(name, bursts) for name in names})


def timing(name: str, bursts: dict[str, list[dict[str, Any]]]) -> Timing:
    """Return a contender's medians."""
    own, reference = bursts[name], bursts[REFERENCE[name]]
    pairs = list(zip(own, reference, strict=True))
    calls = {
        call: float(np.median([burst["calls"][call] for burst in own]))
        for call in own[0]["calls"]
    }
    ratios = [
        optimizer_seconds(a["calls"]) / optimizer_seconds(b["calls"]) for a, b in pairs
    ]
    whole = [a["pass"] / b["pass"] for a, b in pairs]
    seconds = float(np.median([burst["pass"] for burst in own]))
    return Timing(calls, seconds, float(np.median(ratios)), float(np.median(whole)))


# Reports ----------------------------------------------------------------------------


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def rows(measured: Measured) -> list[list[str]]:
    """Return a row for each contender: its name, the microseconds of each call and of
    the optimizer, its share of the pass, and the two multiples."""
    lines = []
    for name, of in measured.timings.items():
        others = sum(of.calls.values()) - of.own
        calls = [of.calls.get(call) for call in OPTIMIZER]
        lines.append(
            [
                name,
                microseconds(others),
                *("" if s is None else microseconds(s) for s in calls),
                f"{of.own / of.seconds:.0%}",
                *map(report.multiple, (of.optimizer, of.whole)),
            ]
        )
    return lines


HEAD = "gradients", *OPTIMIZER, "share", "optimizer", "whole pass"


def table(measured: Measured) -> Table:
    grid = Table(
        "",
        title=title(measured.loop),
        caption="microseconds of each call; the optimizer's share of a pass; multiples "
        "of the first of its library",
    )
    for name in HEAD:
        grid.add_column(name, justify="right")
    for row in rows(measured):
        grid.add_row(*row)
    return grid


def markdown(measured: list[Measured]) -> str:
    """Return the tables of all loops as one in Markdown."""
    lines = [
        "| loop | contender | " + " | ".join(HEAD) + " |",
        "| --- | --- |" + " --: |" * len(HEAD),
    ]
    for m in measured:
        for i, row in enumerate(rows(m)):
            first = title(m.loop) if i == 0 else ""
            lines.append("| " + " | ".join([first, *row]) + " |")
    return "\n".join(lines)


def summary(measured: list[Measured], family: str) -> str:
    """Return a table in Markdown with a row for each loop: fastopt's microseconds for
    zero_grad, clipping and the step, and the multiples that other contenders of a
    library take for these, and for the whole pass."""
    first, *others = FAMILIES[family]
    head = ["loop", f"{first}, µs", *others]
    head += [f"whole pass: {first}, µs", *others]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    for m in measured:
        timings = [m.timings[name] for name in others if name in m.timings]
        if first not in m.timings or len(timings) < len(others):
            continue
        own = m.timings[first]
        cells = [title(m.loop), microseconds(own.own)]
        cells += [report.multiple(of.optimizer) for of in timings]
        cells += [microseconds(own.seconds)]
        cells += [report.multiple(of.whole) for of in timings]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(measured: list[Measured]) -> Figure:
    """Draw the time of a pass: gradients, and the optimizer's calls."""
    bars = [len(m.timings) for m in measured]
    figure = Figure(figsize=(9, 1 + 0.35 * sum(bars) + 0.4 * len(bars)), dpi=150)
    grid = figure.subplots(len(bars), 1, squeeze=False, height_ratios=bars)
    all_axes = grid[:, 0]
    for axes, m in zip(all_axes, measured, strict=True):
        names = [*m.timings][::-1]
        for i, name in enumerate(names):
            of, left = m.timings[name], 0.0
            color = LINES.get(name, LINES["torch foreach"]).color
            others = sum(of.calls.values()) - of.own
            for shade, seconds in (("#CCCCCC", others), (color, of.own)):
                axes.barh(i, seconds * 1e6, left=left, color=shade)
                left += seconds * 1e6
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title(m.loop), loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel(
        "microseconds of a pass: gradients (grey), and zero_grad, clipping, step"
    )
    figure.tight_layout()
    return figure


def write(
    measured: list[Measured], about: dict[str, Any], rounds: int, path: Path
) -> None:
    record = {"format": FORMAT, "machine": about, "rounds": rounds}
    record["measured"] = [asdict(m) for m in measured]
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[Measured]:
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {record.get('format')!r}, and this version reads "
            f"{FORMAT}; measure again with `fastopt bench --loop`"
        )
    return [
        Measured(
            Loop(**m["loop"]),
            {name: Timing(**timing) for name, timing in m["timings"].items()},
        )
        for m in record["measured"]
    ]


def bench(cases: list[Loop], names: list[str], rounds: int, folder: Path) -> None:
    """Measure these loops with these contenders, and report into the folder."""
    console, measured = Console(), list[Measured]()
    with Progress(console=console) as bars:
        bar = bars.add_task("starting the contenders", total=len(cases))
        script = loop_contender.__file__
        with Workers(names, script) as workers:
            for case in cases:
                bars.update(bar, description=title(case))
                measured.append(measure(case, workers, rounds))
                bars.advance(bar)
            where = machine(workers)
            left_out = workers.left_out
    write(measured, where, rounds, folder / "loop.json")
    with matplotlib.rc_context({"svg.hashsalt": "fastopt"}):
        picture(measured).savefig(folder / "loop.png")
    console.print(report.fingerprint(where))
    for m in measured:
        console.print(table(m))
    for name, why in left_out.items():
        console.print(f"{name} left out: {why}", highlight=False, markup=False)
    console.print(f"Written to {folder}: loop.json, loop.png", highlight=False)


def contenders(against: list[str] | None) -> list[str]:
    """Return the contenders to measure: those asked for, and what they refer to."""
    chosen = {*LOOPS} if against is None else {*against}
    return [name for name in LOOPS if name in chosen | {REFERENCE[n] for n in chosen}]
