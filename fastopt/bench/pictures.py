"""Draws the time of a step, and its share of the floor's speed, against size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastopt.bench.cases import title
from fastopt.bench.contender import CONTENDERS
from fastopt.bench.measure import Measured

Curve = dict[int, float]  # by number of elements


class Line(NamedTuple):
    color: str  # of Okabe and Ito's palette, which colour-blind readers tell apart
    style: str
    width: float = 1.4


# A family shares a colour, and its members differ in how they are dashed.
LINES = {
    "fastopt": Line("#000000", "-", 2.8),
    "fastopt arrays": Line("#000000", "--"),
    "fastopt numba": Line("#000000", ":"),
    "fastopt, bf16 state": Line("#555555", "-."),
    "fastopt C": Line("#555555", ":"),
    "fastopt torch": Line("#555555", "--"),
    "fastopt torch, flat": Line("#555555", "-"),
    "floor": Line("#888888", "-", 2.0),
    "naive NumPy": Line("#E69F00", "-"),
    "torch fused": Line("#0072B2", "-"),
    "torch fused, huge pages": Line("#0072B2", "--"),
    "torch foreach": Line("#56B4E9", "-"),
    "torch loop": Line("#56B4E9", "--"),
    "timm": Line("#F0E442", "-"),
    "DeepSpeed": Line("#D55E00", "-"),
    "optax": Line("#009E73", "-"),
    "fastopt jax": Line("#000000", "-."),
    "bitsandbytes": Line("#CC79A7", "-"),
}


def shown(measured: list[Measured]) -> list[Measured]:
    """Return the cases of one rule, AdamW if it was measured, with a single tensor."""
    single = [m for m in measured if m.timings and m.case.tensors == 1]
    names = [title(m.case) for m in single]
    name = "adamw" if "adamw" in names else next(iter(names), "")
    return [m for m in single if title(m.case) == name]


def spread(ends: list[float], gap: float) -> list[float]:
    """Return places in [0, 1] for labels near these ends, at least ``gap`` apart.
    Neighbours that are too close move apart until none are."""
    order = sorted(range(len(ends)), key=ends.__getitem__)
    places = list(ends)
    for _ in range(500):
        for low, high in zip(order, order[1:], strict=False):
            missing = max(0, gap - (places[high] - places[low]))
            places[low] -= missing / 2
            places[high] += missing / 2
        places = [min(max(place, 0), 1) for place in places]
    return places


def chart(heading: str, below: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Return a figure with a heading, a smaller line below it, and room for labels on
    the right, and its axes."""
    figure = Figure(figsize=(9, 5.6), dpi=150)
    figure.subplots_adjust(left=0.09, right=0.75, top=0.87, bottom=0.11)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_title(heading, loc="left", weight="bold", pad=24)
    axes.annotate(
        below,
        (0, 1),
        (0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        color="0.3",
    )
    return figure, axes


def label_ends(axes: Axes, curves: dict[str, Curve], colors: dict[str, str]) -> None:
    """Write each curve's name beside its end, with a thin line between the two."""
    axes.autoscale_view()  # matplotlib would do it when it draws
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = [to_fraction.transform(list(curve.items())[-1]) for curve in curves.values()]
    places = spread([end[1] for end in ends], gap=0.052)
    for name, end, place in zip(curves, ends, places, strict=True):
        axes.annotate(
            name,
            xy=(end[0] + 0.005, end[1]),
            xytext=(1.06, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colors[name],
            va="center",
            weight="bold" if name == "fastopt" else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.75",
                "linewidth": 0.6,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def draw(
    curves: dict[str, Curve],
    heading: str,
    below: str,
    y_label: str,
    set_up: Callable[[Axes], None],
) -> Figure:
    figure, axes = chart(heading, below, "elements (float32, one tensor)", y_label)
    for name, curve in curves.items():
        line = LINES[name]
        axes.plot(
            list(curve),
            list(curve.values()),
            color=line.color,
            linestyle=line.style,
            linewidth=line.width,
            marker="o",
            markersize=2 + line.width,
            zorder=3 if name == "fastopt" else 2,
        )
    axes.set_xscale("log")
    axes.margins(x=0.03)
    set_up(axes)
    label_ends(axes, curves, {name: line.color for name, line in LINES.items()})
    return figure


def times(rows: list[Measured]) -> Figure:
    """Draw the time of a step against size, both logarithmic."""
    curves = curves_of(rows, lambda m, name: m.timings[name].seconds)
    return draw(
        curves,
        f"{title(rows[0].case)}: the time of a step",
        "Medians of interleaved rounds; lower is faster",
        "seconds",
        lambda axes: axes.set_yscale("log"),
    )


def roofline(rows: list[Measured]) -> Figure:
    """Draw the speed relative to the same traffic without arithmetic."""
    curves = curves_of(
        [m for m in rows if "floor" in m.timings],
        lambda m, name: m.timings["floor"].ratio / m.timings[name].ratio,
    )
    del curves["floor"]  # the line at 1

    def set_up(axes: Axes) -> None:
        axes.axhline(1, color=LINES["floor"].color, linewidth=LINES["floor"].width)
        axes.annotate(
            "floor",
            (0.01, 1),
            (0, 4),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            color="0.4",
        )
        highest = max(max(curve.values()) for curve in curves.values())
        axes.set_ylim(0, 1.1 * max(1, highest))

    return draw(
        curves,
        f"{title(rows[0].case)}: share of the memory floor's speed",
        "The floor reads and writes the same buffers without arithmetic; higher is "
        "faster",
        "share of the floor's speed",
        set_up,
    )


def curves_of(
    rows: list[Measured], value: Callable[[Measured, str], float]
) -> dict[str, Curve]:
    curves = {
        name: {m.case.elements: value(m, name) for m in rows if name in m.timings}
        for name in CONTENDERS
    }
    return {n: dict(sorted(curve.items())) for n, curve in curves.items() if curve}


def save(measured: list[Measured], folder: Path) -> list[Path]:
    """Write each picture as PNG and SVG; none if there is nothing to draw."""
    rows = shown(measured)
    figures: dict[str, Figure] = {}
    if rows:
        figures["time"] = times(rows)
    if any("floor" in m.timings for m in rows):
        figures["roofline"] = roofline(rows)
    paths = []
    # The same results give the same file: no date, and no random names in the SVG.
    with matplotlib.rc_context({"svg.hashsalt": "fastopt"}):
        for name, figure in figures.items():
            for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
                paths.append(folder / f"{name}.{suffix}")
                figure.savefig(paths[-1], metadata=metadata)
    return paths
