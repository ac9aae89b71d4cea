"""``fastopt demo`` trains a small network on digits with five optimizers.

The network is written in NumPy. Its parameters live in one flat buffer, its gradients
in another of the same layout, and the backward pass writes straight into the views.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import fastopt
from fastopt.bench.naive import Naive
from fastopt.bench.pictures import chart, label_ends
from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array

INPUTS, HIDDEN, CLASSES = 64, 128, 10
TRAIN, BATCH = 1280, 64  # images; the other 517 are for the test

# The network ------------------------------------------------------------------------


class Digits(NamedTuple):
    """8 x 8 images in [0, 1] and their labels."""

    train: tuple[Array, Array]
    test: tuple[Array, Array]


def digits() -> Digits:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(
        x, y, train_size=TRAIN, stratify=y, random_state=0
    )
    return Digits((x, y), (x_test, y_test))


def mlp(seed: int, dtype: npt.DTypeLike = np.float32) -> FlatBuffer:
    """Return the parameters of a network with one hidden layer."""
    rng = np.random.default_rng(seed)

    def weights(rows: int, columns: int) -> Array:
        return rng.normal(0, rows**-0.5, (rows, columns)).astype(dtype)

    return fastopt.flatten(
        {
            "w1": weights(INPUTS, HIDDEN),
            "b1": np.zeros(HIDDEN, dtype),
            "w2": weights(HIDDEN, CLASSES),
            "b2": np.zeros(CLASSES, dtype),
        }
    )


def forward(params: FlatBuffer, x: Array) -> tuple[Array, Array]:
    """Return the hidden layer and the logarithms of the class probabilities."""
    hidden = np.tanh(x @ params["w1"] + params["b1"])
    scores = hidden @ params["w2"] + params["b2"]
    scores -= scores.max(axis=1, keepdims=True)
    return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def evaluate(params: FlatBuffer, x: Array, y: Array) -> tuple[float, float]:
    """Return the cross-entropy and the accuracy."""
    _, log_probability = forward(params, x)
    loss = -log_probability[np.arange(len(y)), y].mean()
    return float(loss), float((log_probability.argmax(axis=1) == y).mean())


def backward(params: FlatBuffer, grads: FlatBuffer, x: Array, y: Array) -> Array:
    """Write the gradient of the cross-entropy into ``grads``, and return that of the
    first layer's sums."""
    hidden, log_probability = forward(params, x)
    delta: Array = np.exp(log_probability)
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    np.matmul(hidden.T, delta, out=grads["w2"])
    delta.sum(axis=0, out=grads["b2"])
    delta = delta @ params["w2"].T * (1 - hidden * hidden)
    np.matmul(x.T, delta, out=grads["w1"])
    delta.sum(axis=0, out=grads["b1"])
    return delta


# Training and timing ----------------------------------------------------------------


class Run(NamedTuple):
    """One curve of the picture and one row of the table."""

    rule: fastopt.Rule
    batch: int
    color: str  # of Okabe and Ito's palette, which colour-blind readers tell apart
    hyperparameters: dict[str, Any]


# gd and dynamic_gd are meant for the exact gradient, the others for noisy ones.
RUNS = (
    Run(fastopt.gd, TRAIN, "#D55E00", {"lr": 0.8}),
    Run(fastopt.dynamic_gd, TRAIN, "#CC79A7", {"lr": 2.0}),
    Run(fastopt.sgd, BATCH, "#000000", {"lr": 0.03, "momentum": 0.9}),
    Run(fastopt.rmsprop, BATCH, "#009E73", {"lr": 1e-3}),
    Run(fastopt.adam, BATCH, "#0072B2", {"lr": 3e-3}),
)


def train(
    run: Run, params: FlatBuffer, data: Digits, epochs: int, seed: int
) -> Iterator[float]:
    """Train in place, and yield the loss on all training images before the first epoch
    and after each."""
    x, y = data.train
    grads = params.zeros_like()
    opt = run.rule(params, **run.hyperparameters)
    rng = np.random.default_rng(seed)
    yield evaluate(params, x, y)[0]
    for _ in range(epochs):
        for batch in np.split(rng.permutation(TRAIN), TRAIN // run.batch):
            backward(params, grads, x[batch], y[batch])
            opt.step(grads)
        yield evaluate(params, x, y)[0]


class Steps(NamedTuple):
    """Seconds of a step, and the difference of the results relative to the largest
    value."""

    fastopt: float
    numpy: float
    difference: float


def compare(
    run: Run, start: FlatBuffer, grads: FlatBuffer, bursts: int = 60, burst: int = 20
) -> Steps:
    """Time the same steps of fastopt and of NumPy, in alternating bursts."""
    params = fastopt.flatten(start.views)
    opt = run.rule(params, **run.hyperparameters)
    by_hand = {k: p.copy() for k, p in params.views.items()}
    naive = Naive(run.rule.name, list(by_hand.values()), **run.hyperparameters)
    contenders: list[tuple[Callable[[Any], None], Any, list[float]]]
    contenders = [
        (opt.step, grads, []),
        (naive.step, list(grads.views.values()), []),
    ]
    for _ in range(bursts):
        for step, gradients, seconds in contenders:
            begin = perf_counter()
            for _ in range(burst):
                step(gradients)
            seconds.append((perf_counter() - begin) / burst)
    apart = max(abs(params[k] - p).max() for k, p in by_hand.items())
    difference = float(apart / abs(params.data).max())
    if not difference < 1e-4:  # the times of two different updates mean nothing
        raise RuntimeError(
            f"{run.rule.name} differs from its NumPy version by {difference:.0e} of "
            f"the largest parameter"
        )
    fast, slow = (median(seconds) for *_, seconds in contenders)
    return Steps(fast, slow, difference)


# What is shown ----------------------------------------------------------------------


def picture(losses: dict[str, list[float]], path: Path) -> None:
    """Draw the loss curves, each with its name at its end."""
    figure, axes = chart(
        f"{TRAIN // BATCH} steps on small batches beat one exact step",
        f"A {INPUTS}-{HIDDEN}-{CLASSES} network on {TRAIN} of scikit-learn's digits",
        "epochs (passes over the training images)",
        "training loss (cross-entropy)",
    )
    for run in RUNS:
        style = "--" if run.batch == TRAIN else "-"
        axes.semilogy(losses[run.rule.name], color=run.color, linestyle=style)
    axes.margins(x=0)
    for style, label in (
        ("--", "full batch: 1 step an epoch"),
        ("-", f"batches of {BATCH}: {TRAIN // BATCH} steps an epoch"),
    ):
        axes.plot([], color="0.3", linestyle=style, label=label)
    axes.legend(frameon=False)
    curves = {name: dict(enumerate(values)) for name, values in losses.items()}
    label_ends(axes, curves, {run.rule.name: run.color for run in RUNS})
    figure.savefig(path)


def run_example(main: Callable[[], Figure]) -> None:
    """Run the main function of an example, and save the figure that it returns, under
    the example's name, in the folder that the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    with threadpool_limits(1, "blas"):
        figure = main()
    figure.savefig(folder / f"{Path(sys.argv[0]).stem}.png")


def demo(output: Path, epochs: int, seed: int) -> None:
    """Train, print the table, save the picture."""
    console = Console()
    data = digits()
    start = mlp(seed)
    losses: dict[str, list[float]] = {}
    accuracy: dict[str, float] = {}
    bars = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        console=console,
    )
    # Products this small gain nothing from BLAS threads and, on a busy machine, wait.
    with bars, threadpool_limits(1, "blas"):
        for run in RUNS:
            name = run.rule.name
            params = fastopt.flatten(start.views)
            bar = bars.add_task(name, total=1 + epochs, loss=math.nan)
            losses[name] = []
            for loss in train(run, params, data, epochs, seed):
                losses[name].append(loss)
                bars.update(bar, advance=1, loss=loss)
            _, accuracy[name] = evaluate(params, *data.test)

    grads = start.zeros_like()
    backward(start, grads, *data.train)
    steps = {run.rule.name: compare(run, start, grads) for run in RUNS}
    apart = max(step.difference for step in steps.values())

    table = Table(
        "algorithm",
        title=f"{epochs} epochs, {TRAIN} images, {start.data.size} parameters",
        caption="fastopt, NumPy: median time of one step, an update of all parameters;"
        f"\nNumPy's is the same update written by hand (they agree to {apart:.0e})",
    )
    for header in ("batch", "train loss", "test acc.", "fastopt", "NumPy", "ratio"):
        table.add_column(header, justify="right")
    for run in RUNS:
        name = run.rule.name
        step = steps[name]
        table.add_row(
            name,
            "full" if run.batch == TRAIN else str(run.batch),
            f"{losses[name][-1]:.4f}",
            f"{accuracy[name]:.1%}",
            f"{step.fastopt * 1e6:.1f} µs",
            f"{step.numpy * 1e6:.1f} µs",
            f"{step.numpy / step.fastopt:.1f}",
        )
    console.print(table)
    picture(losses, output)
    console.print(f"The loss curves are in {output}", soft_wrap=True, highlight=False)
