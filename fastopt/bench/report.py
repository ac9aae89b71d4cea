"""Measurements as JSON, and as tables for the terminal and the pages.

Times are fastopt's; those of others are shown as multiples of it. Multiples below 1 are
faster than fastopt, and marked.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from fastopt.bench.cases import bytes_moved, shape, title
from fastopt.bench.contender import CONTENDERS, Case
from fastopt.bench.measure import REFERENCE, Measured, Timing

FORMAT = 1


class Report(NamedTuple):
    """The results of a run, which the JSON file holds."""

    machine: dict[str, Any]
    rounds: int
    left_out: dict[str, str]  # contenders that are not here, and why
    measured: list[Measured]


def write(report: Report, path: Path) -> None:
    measured = [asdict(m) | {"bytes": bytes_moved(m.case)} for m in report.measured]
    record = {"format": FORMAT, **report._asdict(), "measured": measured}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> Report:
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {record.get('format')!r}, and this version reads "
            f"{FORMAT}; measure again with `fastopt bench`"
        )
    measured = [
        Measured(
            Case(**m["case"]),
            {
                name: Timing(**timing | {"interval": tuple(timing["interval"])})
                for name, timing in m["timings"].items()
            },
            m["missing"],
        )
        for m in record["measured"]
    ]
    return Report(record["machine"], record["rounds"], record["left_out"], measured)


# Words ------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def multiple(ratio: float) -> str:
    """Return a ratio with two decimals if it is small, otherwise with one."""
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:,.1f}"


def is_loss(name: str, timing: Timing) -> bool:
    """Return whether a contender is faster than fastopt, as rounded for the tables. The
    floor does no arithmetic, so it does not count."""
    return name not in (REFERENCE, "floor") and round(timing.ratio, 2) < 1


# The terminal -----------------------------------------------------------------------


def cell(name: str, measured: Measured) -> Text:
    if name not in measured.timings:
        return Text("-", style="dim")
    timing = measured.timings[name]
    if name == REFERENCE:
        first = duration(timing.seconds)
        second = f"{bytes_moved(measured.case) / timing.seconds / 1e9:.1f} GB/s"
    else:
        first = multiple(timing.ratio)
        second = "–".join(map(multiple, timing.interval))
    style = "bold red" if is_loss(name, timing) else ""
    return Text.assemble((first, style), "\n", (second, "dim"))


def tables(measured: list[Measured], width: int) -> list[Table]:
    """Return one table for each rule and variant, or several if one is too wide."""
    pages = []
    at_once = max(1, (width - 27) // 16)
    for name, group in groupby(measured, key=lambda m: title(m.case)):
        columns = list(group)
        for start in range(0, len(columns), at_once):
            pages.append(table(name, columns[start : start + at_once]))
    return pages


def table(name: str, columns: list[Measured]) -> Table:
    rows = Table(
        "elements",
        title=name,
        caption="fastopt: time of a step. Others: multiples of it and their 95% "
        "intervals, [bold red]below 1: faster than fastopt[/]",
    )
    for column in columns:
        rows.add_column(shape(column.case), justify="right")
    for who in CONTENDERS:
        if any(who in column.timings for column in columns):
            rows.add_row(who, *(cell(who, column) for column in columns))
    return rows


def remarks(report: Report) -> list[str]:
    """Return sentences that say who is missing, where, and why."""
    sentences = [f"{name} left out: {why}" for name, why in report.left_out.items()]
    for measured in report.measured:
        if not measured.timings:
            sentences.append(f"{title(measured.case)} {shape(measured.case)} skipped")
        for name, why in measured.missing.items():
            where = title(measured.case)
            if why.startswith("needs"):  # memory, which is a matter of size
                where += f", {shape(measured.case)}"
            sentences.append(f"{where} without {name}: {why}")
    return list(dict.fromkeys(sentences))


def fingerprint(machine: dict[str, Any]) -> Table:
    rows = Table(title="measured on", show_header=False)
    for name, value in machine.items():
        if isinstance(value, dict):
            lines = (
                f"{key} {', '.join(v) if isinstance(v, list) else v}"
                for key, v in value.items()
                if v
            )
            value = "\n".join(lines)
        rows.add_row(name, str(value))
    return rows


# Pages ------------------------------------------------------------------------------


def markdown(measured: list[Measured]) -> str:
    """Return the table of one rule in Markdown, with losses in bold."""
    names = [n for n in CONTENDERS if any(n in m.timings for m in measured)]
    lines = [
        "| elements | " + " | ".join(names) + " |",
        "|--:" * (1 + len(names)) + "|",
    ]
    for m in measured:
        row = [shape(m.case).replace(" x ", " × ")]
        for name in names:
            timing = m.timings.get(name)
            if timing is None:
                row.append("–")
            elif name == REFERENCE:
                row.append(duration(timing.seconds))
            else:
                text = multiple(timing.ratio)
                row.append(f"**{text}**" if is_loss(name, timing) else text)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)
