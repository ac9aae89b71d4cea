"""Does a format of parameters, gradients or state change what a network learns?

    python bench/training_parity.py [--json FILE]       all of it, 5 seeds, minutes
    python bench/training_parity.py --rules lion --formats "bf16 state" --seeds 20

The networks are those of convergence.py, of more parameters, so that formats apply to
them: one reads scikit-learn's digits, one guesses the next character of the text of
Python's help. For a seed, every format gets the same first weights and batches. The
learning rate warms up and goes to zero. The loss is that of all training data, at the
end, of the parameters as they are stored.

For each format, from the seeds' losses:

- ``mean``, and ``spread``: their standard deviation (of a sample, n - 1);
- ``change``: the mean of this loss minus that of float32 with the same seed, and
  ``error``, the standard error of that mean. A pair has the same first weights and
  batches, so the error does not contain what these decide. A change of more than 2.8
  errors is not noise (5 seeds, 95% confidence), however small it is;
- ``within``: the change is at most float32's spread, up or down. So the format changes
  the loss less than another seed does. This says little if the error is as large as the
  spread: then use more seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib import metadata
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from convergence import Task, backward, batches, first_weights, loss, next_characters
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import threadpool_limits

import fastopt
from fastopt.__main__ import at_least
from fastopt.bench.machine import cpu
from fastopt.cli import demo
from fastopt.memory.segments import Array
from fastopt.runtime.threads import available

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
PACKAGES = ("fastopt", "numpy", "scikit-learn", "ml_dtypes")


class Format(NamedTuple):
    """What is stored in which format. Of a dict, ``formats``, a rule takes the buffers
    that it has; where it has none of them, the format is left out."""

    name: str
    params: str  # dtypes
    grads: str
    formats: str | Mapping[str, str] | None


ALL_8BIT = {"param": "bf16+r8", "momentum_buffer": "m8", "m": "m8", "v": "v8"}
FORMATS = (
    Format("float32", "float32", "float32", None),  # what others are compared with
    Format("bf16 gradients", "float32", "bfloat16", None),
    Format("bf16 state", "float32", "float32", "bf16"),
    Format("bf16_nearest state", "float32", "float32", "bf16_nearest"),
    Format("bf16 parameters", "bfloat16", "float32", None),
    Format("all bf16", "bfloat16", "bfloat16", "bf16"),
    Format("bf16 parameters, stochastic", "bfloat16", "float32", {"param": "bf16"}),
    Format("bf16+r8 parameters", "bfloat16", "float32", {"param": "bf16+r8"}),
    Format("bf16+r16 parameters", "bfloat16", "float32", {"param": "bf16+r16"}),
    Format("8bit state", "float32", "float32", "8bit"),
    Format("bf16+r8, 8bit, bf16 gradients", "bfloat16", "bfloat16", ALL_8BIT),
)
REFERENCE = FORMATS[0].name

# Hyperparameters, tuned by hand for float32: lr is about half of what is best.
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"digits": 3e-3, "characters": 5e-3, "weight_decay": 0.01},
    "sgd": {"digits": 0.1, "characters": 0.2, "momentum": 0.9},
    "lion": {"digits": 5e-4, "characters": 1e-3, "weight_decay": 0.1},
    "lamb": {"digits": 5e-3, "characters": 1e-2, "weight_decay": 0.01},
}


class Course(NamedTuple):
    """How a task is learned."""

    epochs: int
    batch: int


COURSES = {"digits": Course(20, 64), "characters": Course(4, 256)}
CHARACTERS, QUICK_CHARACTERS = 100_000, 5_000


@cache
def task(name: str, quick: bool) -> Task:
    if name == "digits":
        return Task("digits", *demo.digits().train, demo.CLASSES, 0.0, hidden=512)
    text = "".join(topics[topic] for topic in sorted(topics))
    symbols = next_characters(text[: QUICK_CHARACTERS if quick else CHARACTERS])
    return Task("characters", *symbols, 0.0, hidden=384)


# Training ---------------------------------------------------------------------------


class Run(NamedTuple):
    """A training with one seed."""

    task: str
    rule: str
    format: Format
    seed: int
    quick: bool


def formats_of(rule: fastopt.Rule, formats: Any) -> Any:
    """Return what of a dict of formats a rule has buffers for."""
    if not isinstance(formats, Mapping):
        return formats
    buffers = {"param"}.union(*(variant.state for variant in rule.all))
    return {name: kind for name, kind in formats.items() if name in buffers}


def numbers(params: Mapping[str, Array]) -> dict[str, Array]:
    """Return parameters as float32, in which the network computes."""
    return {name: param.astype(np.float32) for name, param in params.items()}


def train(run: Run) -> float:
    """Return the last loss, of all training data."""
    this, course = task(run.task, run.quick), COURSES[run.task]
    per_epoch = len(this.y) // course.batch
    steps = per_epoch * (1 if run.quick else course.epochs)
    kept, given = DTYPES[run.format.params], DTYPES[run.format.grads]
    first = first_weights(this, run.seed)
    params = {name: view.astype(kept) for name, view in first.views.items()}
    rule = getattr(fastopt, run.rule)
    settings = {k: v for k, v in RULES[run.rule].items() if k not in COURSES}
    lr = fastopt.schedules.warmup_cosine(RULES[run.rule][run.task], steps, steps // 20)
    formats = formats_of(rule, run.format.formats)
    opt = rule(params, lr=lr, threads=1, formats=formats, **settings)
    grads = first.zeros_like()
    for chosen in islice(batches(len(this.y), course.batch, run.seed), steps):
        backward(numbers(params), grads, this.x[chosen], this.y[chosen])
        opt.step({name: view.astype(given) for name, view in grads.views.items()})
    return loss(numbers(params), this.x, this.y)


# Statistics -------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """The last losses of a rule with a format, one for each seed, and what they say."""

    task: str
    rule: str
    format: str
    losses: list[float]
    mean: float
    spread: float
    change: float
    error: float
    within: bool


def result(run: Run, losses: Sequence[float], reference: Sequence[float]) -> Result:
    """Compare losses with those of float32 with the same seeds."""
    changes = np.subtract(losses, reference)
    change = float(changes.mean())
    return Result(
        run.task,
        run.rule,
        run.format.name,
        list(losses),
        mean=float(np.mean(losses)),
        spread=float(np.std(losses, ddof=1)),
        change=change,
        error=float(changes.std(ddof=1) / math.sqrt(len(losses))),
        within=bool(abs(change) <= np.std(reference, ddof=1)),
    )


def compared(runs: Sequence[Run], losses: Sequence[float]) -> list[Result]:
    """Return a result for each format of each rule and task, in the order of runs."""
    results: list[Result] = []
    of_float32: list[float] = []
    pairs = zip(runs, losses, strict=True)
    for _, group in groupby(pairs, key=lambda pair: pair[0][:3]):
        (run, *_), these = zip(*group, strict=True)
        if run.format.name == REFERENCE:
            of_float32 = list(these)
        results.append(result(run, these, of_float32))
    return results


# What is shown ----------------------------------------------------------------------


def table(name: str, results: Sequence[Result]) -> Table:
    """Return a table with a row for each rule and format."""
    rows = Table("rule", "format", title=f"{name}: the loss after training")
    for header in ("mean", "spread", "change", "error", "within"):
        rows.add_column(header, justify="right", no_wrap=True)
    for this in results:
        cells = [f"{this.mean:.5f}", f"{this.spread:.5f}"]
        if this.format == REFERENCE:
            rows.add_section()
        else:
            cells += [f"{this.change:+.5f}", f"{this.error:.5f}"]
            cells += ["yes" if this.within else "no"]
        style = "" if this.within else "red"
        rows.add_row(this.rule, this.format, *cells, style=style)
    return rows


def as_json(results: Sequence[Result], seeds: int, quick: bool) -> str:
    """Write numbers that are not finite as null, because JSON has no names for them."""
    machine = {"date": str(date.today()), "cpu": cpu()}
    machine["python"] = platform.python_version()
    machine |= {package: metadata.version(package) for package in PACKAGES}
    record = {
        "machine": machine,
        "seeds": seeds,
        "quick": quick,
        "settings": RULES,
        "formats": [format._asdict() for format in FORMATS],
        "results": list(map(asdict, results)),
    }
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1, allow_nan=False) + "\n"


def one_thread() -> None:
    """Products this small gain nothing from BLAS threads."""
    threadpool_limits(1, "blas")


def main(arguments: Sequence[str] | None = None) -> int:
    formats = {format.name: format for format in FORMATS}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, known in (("tasks", COURSES), ("rules", RULES), ("formats", formats)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=list(known), metavar="NAME"
        )
    parser.add_argument("--seeds", type=at_least(2), default=5)
    parser.add_argument(
        "--jobs", type=at_least(1), default=available(), help="processes at a time"
    )
    parser.add_argument("--quick", action="store_true", help="one epoch, of less text")
    parser.add_argument("--json", type=Path, metavar="PATH", help="to write to")
    options = parser.parse_args(arguments)
    runs = [
        Run(name, rule, format, seed, options.quick)
        for name in options.tasks
        for rule in options.rules
        for format in FORMATS
        if format.name in (REFERENCE, *options.formats)
        if formats_of(getattr(fastopt, rule), format.formats) != {}
        for seed in range(options.seeds)
    ]
    console = Console()
    # Not forks: those of a process whose libraries have threads may hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=one_thread) as pool:
        losses = [*track(pool.map(train, runs), "training", len(runs), console=console)]
    results = compared(runs, losses)
    for name in options.tasks:
        console.print(table(name, [this for this in results if this.task == name]))
    if options.json:
        text = as_json(results, options.seeds, options.quick)
        options.json.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
