"""A picture for each rule: its path on one function of two variables.

    python docs/gallery.py FOLDER    draw them

The function is a curved valley, Rosenbrock's with a factor of 6 in place of 100. Every
rule starts at the same point and takes the same number of steps. All options have their
defaults, except for those in SETTINGS and for the learning rate. Of LEARNING_RATES,
``best`` takes the one with which the function is lowest on average over the path, if
the path is calm (``calm``). Rules that find a learning rate keep their default of 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from make import CATALOGUE, called
from matplotlib.figure import Figure

import fastopt

START = -1.5, 1.6
MINIMUM = 1.0, 1.0
STEPS = 150
LEARNING_RATES = [float(f"{10 ** (k / 6):.2g}") for k in range(-12, 8)]
LONGEST = 1.0  # step, or one may cross all that there is to see
LEFT, RIGHT, BOTTOM, TOP = FRAME = -2.0, 1.8, -0.9, 2.5
STEEP = 3.0

# Where a rule with its defaults would be another rule, or expects another scale.
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "sgdw": {"momentum": 0.9},
    "sophia_g": {"bs": 25},
    "dog": {"reps_rel": 0.01},
}
ESTIMATED_EVERY = 10  # steps: Sophia's estimate of the second derivatives
FINDS_ITS_OWN = "dog", "dadapt_adam", "prodigy"

# They are seen on light and dark pages alike.
LINES = "#8a8f98"
PATH = "#3b82f6"
EVALUATED = "#f59e0b"
GOAL = "#ef4444"

NOTES = {
    "adafactor": "A vector of two numbers has no rows and columns to factor.",
    "muon": "The two numbers are a matrix of one column, because vectors go to AdamW. "
    "To make a column orthogonal means to divide it by its length.",
    "lookahead": "It is around AdamW, whose learning rate is given. Every fifth step "
    "goes back to the slow weights.",
    "sophia_g": f"Every {ESTIMATED_EVERY} steps, `estimate` is called with the roots "
    "of the second derivatives without their smaller part (Gauss and Newton's).",
}


class Path2D(NamedTuple):
    """What a rule did: its options, the points that it trained and, if these differ,
    those of ``eval_params()``; one row for each step, the start first."""

    options: dict[str, float]
    trained: np.ndarray
    evaluated: np.ndarray | None


def height(x: Any, y: Any) -> Any:
    """Return the height of the valley at a point."""
    return (1 - x) ** 2 / 2 + STEEP * (y - x * x) ** 2


def slope(x: float, y: float) -> tuple[float, float]:
    """Return the gradient of ``height``."""
    off = y - x * x
    return x - 1 - 4 * STEEP * x * off, 2 * STEEP * off


def curvature(x: float, y: float) -> tuple[float, float]:
    """Return the second derivatives of ``height``, without the term of the bend."""
    return 1 + 8 * STEEP * x * x, 2 * STEEP


def walk(rule: fastopt.Rule, options: dict[str, float]) -> Path2D:
    """Step from START and return the path."""
    w = np.array(START)
    if rule.name == "muon":
        w = w.reshape(2, 1)
    opt = optimizer(rule)(w, **options)
    points, evaluated = [w.ravel().copy()], [w.ravel().copy()]
    for step in range(STEPS):
        if rule.estimate and step % ESTIMATED_EVERY == 0:
            opt.estimate(np.sqrt(curvature(*w.flat)))
        opt.step(np.array(slope(*w.flat)).reshape(w.shape))
        points.append(w.ravel().copy())
        if rule.evaluate:
            evaluated.append(np.ravel(opt.eval_params()).copy())
    return Path2D(
        options, np.array(points), np.array(evaluated) if rule.evaluate else None
    )


def optimizer(rule: fastopt.Rule) -> Callable[..., Any]:
    """Return a function that makes the rule's optimizer from an array and options."""
    if rule.name == "lookahead":
        return lambda w, **options: fastopt.Lookahead(fastopt.adamw(w, **options))
    return getattr(fastopt, called(rule))


def calm(path: Path2D) -> bool:
    """Return whether a path stays in the picture, with no step above LONGEST."""
    x, y = path.trained.T
    inside = (x > LEFT) & (x < RIGHT) & (y > BOTTOM) & (y < TOP)
    lengths = np.hypot(np.diff(x), np.diff(y))
    return bool(inside.all() and lengths.max() < LONGEST)


def best(rule: fastopt.Rule) -> Path2D:
    """Return the path with the best learning rate."""
    settings = SETTINGS.get(rule.name, {})
    if rule.name in FINDS_ITS_OWN:
        return walk(rule, {"lr": 1.0, **settings})
    with np.errstate(all="ignore"):  # too high a rate overflows
        paths = [walk(rule, {"lr": lr, **settings}) for lr in LEARNING_RATES]
    paths = [path for path in paths if calm(path)]
    if not paths:
        raise ValueError(
            f"docs/gallery.py: {rule.name} leaves the picture with all learning rates "
            f"from {LEARNING_RATES[0]:g} to {LEARNING_RATES[-1]:g}; give it SETTINGS"
        )
    return min(paths, key=lambda path: np.mean(height(*path.trained.T)))


def picture(path: Path2D, file: Path) -> None:
    """Draw a path on a transparent background."""
    figure = Figure(figsize=(4, 4 * (TOP - BOTTOM) / (RIGHT - LEFT)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.axis(FRAME)
    x, y = np.meshgrid(np.linspace(LEFT, RIGHT, 77), np.linspace(BOTTOM, TOP, 65))
    levels = [0.01 * 3**k for k in range(9)]
    axes.contour(x, y, height(x, y), levels, colors=LINES, linewidths=0.9, alpha=0.6)
    axes.plot(*path.trained.T, color=PATH, lw=1.4, marker="o", ms=2.6, mew=0)
    if path.evaluated is not None:
        axes.plot(*path.evaluated.T, color=EVALUATED, lw=1.4)
    axes.plot(*START, "o", ms=7, mfc="none", mec=PATH, mew=1.4)
    axes.plot(*MINIMUM, "*", ms=13, color=GOAL, mew=0)
    figure.savefig(file, transparent=True, metadata={"Date": None})


def caption(rule: fastopt.Rule, path: Path2D) -> str:
    """Return the caption of a picture, in Markdown."""
    options = ", ".join(f"{name}={number(v)}" for name, v in path.options.items())
    parts = [f"{STEPS} steps with `{options}`."]
    if path.evaluated is not None:
        parts.append("The orange line is `eval_params()`.")
    if rule.name in NOTES:
        parts.append(NOTES[rule.name])
    return " ".join(parts)


def number(value: float) -> str:
    """A number in few digits, which are enough to repeat the path."""
    return re.sub(r"e([+-])0", r"e\1", f"{value:.3g}")


def draw(folder: Path) -> dict[str, str]:
    """Draw all pictures and return their captions by the names of the rules."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for rule in CATALOGUE:
        path = best(rule)
        picture(path, folder / f"{rule.name}.svg")
        captions[rule.name] = caption(rule, path)
    return captions


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/gallery.py FOLDER")
    for name, text in draw(Path(sys.argv[1])).items():
        print(f"{name}: {text}")
