"""``fastopt bench``: measure, show the tables, write the results and the pictures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastopt.bench import pictures, report
from fastopt.bench.cases import all_elements, shape, title
from fastopt.bench.contender import Case
from fastopt.bench.machine import machine
from fastopt.bench.measure import Measured, Workers, measure


def effort(case: Case) -> float:
    """Return the effort of a burst, for the progress bar: bursts of small cases take
    the same time, those of large cases as long as their steps."""
    return 1 + all_elements(case) / 1e6


def bench(cases: list[Case], names: list[str], rounds: int, folder: Path) -> None:
    """Measure these contenders in these cases, and report into the folder."""
    console = Console()
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    measured: list[Measured] = []
    total = rounds * sum(map(effort, cases))
    with bars:
        bar = bars.add_task("starting the contenders", total=total)
        with Workers(names) as workers:
            for case in cases:
                bars.update(bar, description=f"{title(case)}, {shape(case)}")
                before = bars.tasks[bar].completed
                tick = partial(bars.advance, bar, effort(case) / len(workers))
                measured.append(measure(case, workers, rounds, tick))
                # Some contenders do not have the rule.
                bars.update(bar, completed=before + rounds * effort(case))
            where = machine(workers)
    results = report.Report(where, rounds, workers.left_out, measured)
    report.write(results, folder / "bench.json")
    written = [folder / "bench.json", *pictures.save(measured, folder)]

    console.print(report.fingerprint(where))
    for table in report.tables(measured, console.width):
        console.print(table)
    for remark in report.remarks(results):
        console.print(remark, highlight=False, markup=False)
    names_written = ", ".join(path.name for path in written)
    console.print(
        f"Written to {folder}: {names_written}", highlight=False, markup=False
    )
