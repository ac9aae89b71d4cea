"""The tables that are made from committed measurements, as docs/make.py puts them into
pages. Each function takes the file of results and returns Markdown."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastopt.bench import loop, report
from fastopt.bench.cases import title

LIBRARIES = "torch", "deepspeed", "jax", "optax"


def table(head, rows):
    """In Markdown; the titles of figures, which go to the right, end in a blank."""
    rule = ["--:" if title.endswith(" ") else "---" for title in head]
    lines = [[title.strip() for title in head], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(source):
    """Return the times of steps of AdamW, from a file of ``fastopt bench``."""
    measured = report.read(source).measured
    rows = report.markdown([m for m in measured if title(m.case) == "adamw"])
    machine = json.loads(source.read_text("utf-8"))["machine"]
    return (
        f"{rows}\n\nMeasured on {machine['date']} with {machine['threads']} threads. "
        f"CPU: {machine['cpu']}, {machine['isa']}."
    )


def loops(source):
    """Return all times of training loops, from ``fastopt bench --loop``."""
    return loop.markdown(loop.read(source))


def torch_loops(source):
    """Return the short table of training loops in torch."""
    return loop.summary(loop.read(source), "torch")


def training(source):
    """Return tables of how formats change losses, one for each task, from
    ``bench/training_parity.py``."""
    results = json.loads(source.read_text("utf-8"))["results"]
    rules, rows, spreads = list(dict.fromkeys(r["rule"] for r in results)), {}, {}
    for this in results:
        task, rule, name = this["task"], this["rule"], this["format"]
        if name == "float32":
            spreads[task, rule] = this["spread"]
            cell = f"{this['mean']:.4f} ± {this['spread']:.4f}"
        else:
            cell = change(this, spreads[task, rule])
        rows.setdefault((task, name), {})[rule] = cell
    tables = []
    for task in dict.fromkeys(task for task, _ in rows):
        lines = [
            (name, *(row.get(rule, "–") for rule in rules))
            for (of, name), row in rows.items()
            if of == task
        ]
        tables.append(table((task, *(f"{rule} " for rule in rules)), lines) + "\n")
    return "\n".join(tables)


def change(result, spread):
    """The difference to float32 and its error, in units of float32's spread."""
    if result["change"] is None:  # a loss was not finite
        return "**diverged**"
    text = f"{result['change'] / spread:+.3f} ± {result['error'] / spread:.3f}"
    return text if result["within"] else f"**{text}**"


def steps(source):
    """Return the times of steps over formats, from ``bench/formats.py``."""
    rows = json.loads(source.read_text("utf-8"))["table"]
    lines = [
        (
            row["row"],
            f"{row['size']:,}",
            f"{row['seconds'] * 1e3:.3g} ms",
            row["against"],
            f"{row['ratio']:.2f}",
            f"{row['floor']:.2f}",
        )
        for row in rows
    ]
    head = "formats", "elements ", "step ", "against", "takes ", "step / floor "
    return table(head, lines)


def results(folder, old):
    """Return a row for each file of results: when and where it was measured. The commit
    is written by hand, and kept from the old table: only git knows it."""
    commits = dict(re.findall(r"^\| `(\S+\.json)` \|.*\| (\S+) \|$", old, re.M))
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        record = json.loads(path.read_text("utf-8"))
        machine = record.get("machine") or record
        versions = record.get("versions") or machine.get("versions") or machine
        libraries = [f"{n} {versions[n]}" for n in LIBRARIES if n in versions]
        rows.append(
            (
                f"`{path.name}`",
                machine.get("date", "not recorded"),
                ", ".join(
                    str(machine[key]) for key in ("cpu", "isa") if key in machine
                ),
                re.sub(r"L1i \S+ ", "", machine.get("caches", "not recorded")),
                ", ".join(libraries),
                commits.get(path.name, "–"),
            )
        )
    head = "file", "measured", "CPU", "caches", "beside Python and NumPy", "commit"
    return table(head, rows)
