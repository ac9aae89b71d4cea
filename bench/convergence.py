"""Does every rule learn? Steps and time to a fixed training loss, over seeds.

    python bench/convergence.py                        every rule and class, 5 seeds
    python bench/convergence.py --rules adamw lion --seeds 2 --json result.json

Two networks with one hidden layer: one reads scikit-learn's digits, one guesses the
next character of this repository's licence. For a seed, every rule gets the same first
weights and the same batches in the same order. The loss is that of all training data,
taken every 10 steps; the time is that of gradients and steps, without that.

It is evidence that rules train networks, beside the tests that they compute what their
papers say. It does not rank them: settings are sensible, and not tuned further.

Exits with 1 if a rule misses a target with any seed. Needs pip install '.[demo]'.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import threadpool_limits

import fastopt
from fastopt.__main__ import at_least
from fastopt.cli import demo
from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64
LOOK = 10  # steps between two looks at the loss of all training data
ESTIMATE = 10  # steps between two estimates of curvature, as in Sophia's paper
HIDDEN, WINDOW, EMBEDDED = 64, 8, 8

# Hyperparameters that are not at their defaults, for both networks. Many defaults are
# meant for networks a million times as large.
SETTINGS: dict[str, dict[str, Any]] = {
    # A step as large as the gradient: the problem decides, and no default can fit.
    "gd": {"lr": 0.3},
    "dynamic_gd": {"lr": 3.0},
    "sgd": {"lr": 0.03, "momentum": 0.9},
    "sgdw": {"lr": 0.03, "momentum": 0.9},
    "asgd": {"lr": 0.3},
    # Sums of all squares make ever smaller steps; FTRL begins with forgetting the first
    # weights, and has to get away from zero.
    "adagrad": {"lr": 0.03},
    "ftrl": {"lr": 0.3},
    # Made for long runs of large networks.
    "lion": {"lr": 1e-3},
    "cautious_lion": {"lr": 1e-3},
    "sophia_g": {"lr": 3e-3, "bs": float(BATCH)},
    "laprop": {"lr": 1e-3},
    "adan": {"lr": 3e-3},
    "novograd": {"lr": 1e-2},
    "muon": {"lr": 2e-2},
}


@dataclass(frozen=True)
class Class:
    """An optimizer class with the interface of a rule."""

    make: type
    estimate: None = None

    @property
    def name(self) -> str:
        return self.make.__name__.lower()

    @property
    def hyperparameters(self) -> dict[str, Any]:
        parameters = inspect.signature(self.make).parameters
        return {name: parameter.default for name, parameter in parameters.items()}

    def __call__(self, params: Any, **hyperparameters: Any) -> Any:
        return self.make(params, **hyperparameters)


CLASSES = (Class(fastopt.Muon), Class(fastopt.Adafactor))

# The signs of noisy gradients would shrink its steps to nothing.
FULL_BATCH = {"rprop"}


def settings(rule: fastopt.Rule | Class) -> dict[str, Any]:
    """Return lr, and the hyperparameters that are not at their defaults."""
    lr = {name: v for name, v in rule.hyperparameters.items() if name == "lr"}
    return lr | SETTINGS.get(rule.name, {})


# The networks -----------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task: the network learns the class of each input, to a loss on all of them."""

    name: str
    x: Array  # features; or, to be looked up in an embedding, windows of symbols
    y: Array
    classes: int
    target: float
    hidden: int = HIDDEN  # the width of the hidden layer

    @property
    def embedded(self) -> bool:
        return self.x.dtype.kind == "i"


def digits() -> Task:
    """Handwritten digits, 8 x 8 pixels."""
    return Task("digits", *demo.digits().train, classes=demo.CLASSES, target=0.2)


def characters() -> Task:
    """Guess the next character of the licence, a text that never changes. A table of
    its pairs has a loss of 2.1, so the target needs more than the last character."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    x, y, classes = next_characters(text)
    return Task("characters", x, y, classes, target=1.5)


def next_characters(text: str) -> tuple[Array, Array, int]:
    """Return windows of a text as numbers of symbols, the symbol that follows each, and
    how many symbols there are."""
    alphabet, symbols = np.unique(list(text), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(symbols, WINDOW + 1)
    return windows[:, :-1], windows[:, -1], len(alphabet)


TASKS = (digits, characters)


def first_weights(task: Task, seed: int, dtype: Any = np.float32) -> FlatBuffer:
    rng = np.random.default_rng(seed)
    inputs = WINDOW * EMBEDDED if task.embedded else task.x.shape[1]
    tree = {
        "w1": rng.normal(0, inputs**-0.5, (inputs, task.hidden)),
        "b1": np.zeros(task.hidden),
        "w2": rng.normal(0, task.hidden**-0.5, (task.hidden, task.classes)),
        "b2": np.zeros(task.classes),
    }
    if task.embedded:
        tree["embedding"] = rng.normal(0, 1, (task.classes, EMBEDDED))
    return fastopt.flatten({name: array.astype(dtype) for name, array in tree.items()})


# Parameters are anything with these names: a flat buffer, what eval_params() returns.


def features(params: Any, x: Array) -> Array:
    return params["embedding"][x].reshape(len(x), -1) if "embedding" in params else x


def log_probability(params: Any, x: Array) -> Array:
    return demo.forward(params, features(params, x))[1]


def loss(params: Any, x: Array, y: Array) -> float:
    """The cross-entropy."""
    return demo.evaluate(params, features(params, x), y)[0]


def backward(params: Any, grads: FlatBuffer, x: Array, y: Array) -> None:
    """Write the gradient of the loss into ``grads``."""
    delta = demo.backward(params, grads, features(params, x), y)
    if "embedding" in params:
        delta = (delta @ params["w1"].T).reshape(-1, EMBEDDED)
        one_hot = np.eye(len(params["embedding"]), dtype=delta.dtype)[x.ravel()]
        np.matmul(one_hot.T, delta, out=grads["embedding"])


# Training ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run with one seed: the steps to the target, or None, and its last loss."""

    seed: int
    steps: int | None
    seconds: float
    loss: float
    error: str | None = None

    def __str__(self) -> str:
        if self.steps is not None:
            return f"seed {self.seed}: reached in {self.steps} steps"
        why = self.error or f"ended at a loss of {self.loss:.3g}"
        return f"seed {self.seed}: {why}"


@dataclass(frozen=True)
class Result:
    """The runs of one rule on one task."""

    task: str
    rule: str
    settings: dict[str, Any]
    runs: list[Run]

    @property
    def missed(self) -> list[Run]:
        return [run for run in self.runs if run.steps is None]


def batches(n: int, batch: int, seed: int) -> Iterator[Array]:
    """Yield the indices of batches for ever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(n)
        yield from order[: n - n % batch].reshape(-1, batch)


def train(
    task: Task, rule: fastopt.Rule | Class, seed: int, most: int, backend: str | None
) -> Run:
    """Train to the target, to a loss that is not finite, or for all steps."""
    params = first_weights(task, seed)
    grads = params.zeros_like()
    # Arrays, not one flat buffer: some rules take a norm of each.
    opt = rule(params.views, backend=backend, **settings(rule))
    batch = len(task.y) if rule.name in FULL_BATCH else BATCH
    guesses = np.random.default_rng([seed, 1])  # apart, so that batches stay the same
    seconds, now = 0.0, math.nan
    for done, chosen in enumerate(islice(batches(len(task.y), batch, seed), most), 1):
        x, y = task.x[chosen], task.y[chosen]
        begin = perf_counter()
        if rule.estimate is not None and done % ESTIMATE == 1:
            # Gauss, Newton and Bartlett: labels drawn from what the network believes.
            log_p = log_probability(params, x)
            drawn = (log_p + guesses.gumbel(size=log_p.shape)).argmax(axis=1)
            backward(params, grads, x, drawn)
            opt.estimate(grads.views)
        backward(params, grads, x, y)
        opt.step(grads.views)
        seconds += perf_counter() - begin
        if done % LOOK == 0 or done == most:
            shown = params.views if isinstance(rule, Class) else opt.eval_params()
            now = loss(shown, task.x, task.y)
            if now <= task.target:
                return Run(seed, done, seconds, now)
            if not math.isfinite(now):
                break
    return Run(seed, None, seconds, now)


def train_all(
    task: Task, rule: fastopt.Rule | Class, seeds: int, most: int, backend: str | None
) -> Result:
    """Train with each seed. An error becomes the result of its run."""
    runs = []
    for seed in range(seeds):
        try:
            with np.errstate(all="ignore"):  # the loss tells who diverges
                runs.append(train(task, rule, seed, most, backend))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            runs.append(Run(seed, None, math.nan, math.nan, what))
    return Result(task.name, rule.name, settings(rule), runs)


# What is shown ----------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Return the median, the least and the largest value."""
    return f"{median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def table(results: Sequence[Result], title: str) -> Table:
    """Return a table with a row for each rule, and the worst of its last losses."""
    rows = Table(
        "rule", title=title, caption="; ".join(filter(None, map(more, results)))
    )
    for header in ("lr", "steps", "ms", "loss"):
        rows.add_column(header, justify="right", no_wrap=True)
    for result in results:
        runs, missed = result.runs, result.missed
        steps, ms = "not reached", f"{len(missed)} of {len(runs)} seeds"
        if not missed:
            steps = spread([run.steps for run in runs if run.steps is not None])
            ms = spread([1e3 * run.seconds for run in runs])
        rows.add_row(
            result.rule,
            f"{result.settings['lr']:g}" if "lr" in result.settings else "",
            steps,
            ms,
            f"{np.max([run.loss for run in runs]):.4g}",
            style="red" if missed else "",
        )
    return rows


def more(result: Result) -> str:
    """Return the hyperparameters besides lr that are not at their defaults."""
    others = [f"{k}={v:g}" for k, v in result.settings.items() if k != "lr"]
    return f"{result.rule}: {', '.join(others)}" if others else ""


def as_json(
    tasks: Sequence[Task], results: Sequence[Result], backend: str | None
) -> str:
    """Write a loss that is not finite as null, because JSON has no name for it."""
    record = {
        "fastopt": fastopt.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "backend": backend or "default",
        "targets": {task.name: task.target for task in tasks},
        "results": list(map(asdict, results)),
    }
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1, allow_nan=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    rules = {rule.name: rule for rule in (*fastopt.RULES, *CLASSES)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--rules", nargs="+", choices=rules, default=list(rules), metavar="RULE"
    )
    parser.add_argument("--seeds", type=at_least(1), default=5)
    parser.add_argument("--steps", type=at_least(1), default=3000, help="at most")
    parser.add_argument("--backend", choices=["numpy", "cython", "numba"])
    parser.add_argument("--json", type=Path, metavar="PATH", help="to write to")
    options = parser.parse_args(arguments)
    console = Console()
    tasks = [task() for task in TASKS]
    results: list[Result] = []
    numbers = options.seeds, options.steps
    # Products this small gain nothing from BLAS threads and, on a busy machine, wait.
    with threadpool_limits(1, "blas"):
        for task in tasks:
            for name in track(options.rules, task.name, console=console):
                result = train_all(task, rules[name], *numbers, options.backend)
                results.append(result)
    for task in tasks:
        mine = [result for result in results if result.task == task.name]
        title = f"{task.name}: to a loss of {task.target:g}, median (min–max) of seeds"
        console.print(table(mine, title))
    if options.json:
        text = as_json(tasks, results, options.backend)
        options.json.write_text(text, encoding="utf-8")
    missed = [(result, run) for result in results for run in result.missed]
    for result, run in missed:
        print(f"not reached: {result.rule}, {result.task}, {run}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
