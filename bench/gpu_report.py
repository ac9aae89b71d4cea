"""What bench/gpu.py found: its numbers, as rows of JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import median, quantiles
from typing import Any

from rich.table import Table

OURS, OURS_OF_TORCH = "fastopt", "fastopt.torch"
FLOOR, COPY, FUSED = "floor", "device copy", "torch fused"
REFERENCES = FLOOR, COPY, FUSED
PLAIN, HALVES, BYTES = "float32", "bfloat16", "state of 8 bits"
MANY, CLIPPED, GRAPHS = "many tensors", "clip_norm=1", "CUDA graphs"
GROUPS = PLAIN, MANY, HALVES, BYTES, CLIPPED, GRAPHS
# The part of the memory's nominal rate that a pass reaches, and the part of that pass's
# rate that a step is predicted to reach.
REACHED, PREDICTED = 0.9, 0.92


@dataclass
class Timing:
    """Milliseconds for each step of a contender, by repeats and then by rounds.

    Attributes
    ----------
    device
        From one event on the GPU to another.
    host
        Until ``step`` returned.
    moved
        Bytes that a step must move.
    launches
        Kernels of one step, if they were counted.
    """

    device: list[list[float]]
    host: list[list[float]]
    moved: float
    launches: int | None = None

    @property
    def samples(self) -> list[float]:
        return list(chain.from_iterable(self.device))


@dataclass
class Result:
    """What was found in a case.

    Attributes
    ----------
    interleaved
        Whether the contenders took turns. If not, memory had room for one at a time.
    refused
        Why contenders were not measured.
    """

    group: str
    case: str
    elements: int
    tensors: int
    moved: float
    sets: int = 1
    interleaved: bool = True
    timings: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, reference: str) -> float | None:
        """Return the time of a contender in multiples of another's, if both are there.
        Contenders that took turns are compared round by round."""
        if name not in self.timings or reference not in self.timings:
            return None
        ours, theirs = self.timings[name].samples, self.timings[reference].samples
        if not min(ours) > 0 < min(theirs):  # a simulated clock may stand still
            return None
        if self.interleaved:
            return median(a / b for a, b in zip(ours, theirs, strict=True))
        return median(ours) / median(theirs)


@dataclass
class Left:
    """A case that was not measured, and why."""

    group: str
    case: str
    elements: int
    reason: str


def rows(result: Result) -> list[dict[str, Any]]:
    """Return what JSON has of each contender."""
    found = []
    for name, timing in result.timings.items():
        middle = median(timing.samples)
        several = len(timing.samples) > 1
        quarters = quantiles(timing.samples, n=4) if several else [middle] * 3
        row: dict[str, Any] = {
            "contender": name,
            "milliseconds": middle,
            "quartiles": [quarters[0], quarters[-1]],
            "repeats": [median(of) for of in timing.device],
            "host milliseconds": median(chain.from_iterable(timing.host)),
            "samples": len(timing.samples),
            "launches": timing.launches,
            "GB/s": timing.moved / middle / 1e6 if middle else None,
        }
        row |= {f"of {of}": result.ratio(name, of) for of in REFERENCES}
        found.append(row)
    return found


def as_json(result: Result) -> dict[str, Any]:
    about = {
        "group": result.group,
        "case": result.case,
        "elements": result.elements,
        "tensors": result.tensors,
        "bytes": result.moved,
        "sets": result.sets,
        "interleaved": result.interleaved,
    }
    return {**about, "contenders": rows(result), "refused": result.refused}


def time_of(milliseconds: float) -> str:
    if milliseconds < 1:
        return f"{milliseconds * 1e3:.1f} µs"
    return f"{milliseconds:.3f} ms"


def table(results: Sequence[Result]) -> Table:
    """Return the table of a group of cases. The contenders of a case stand together,
    and those that were refused stand below, with the reason."""
    made = Table(title=f"{results[0].group}: times of a step, and ratios of them")
    made.add_column("case")
    made.add_column("contender", no_wrap=True)
    for name in ("step", "host", "launches", "GB/s", *(f"÷ {of}" for of in REFERENCES)):
        made.add_column(name, justify="right")
    for result in results:
        tensors = f", {result.tensors:,} tensors" if result.tensors > 1 else ""
        alone = "" if result.interleaved else ", one by one"
        title = f"{result.case}, {result.elements:,}{tensors}{alone}"
        for row in rows(result):
            rate, launches = row["GB/s"], row["launches"]
            ratios = (row[f"of {of}"] for of in REFERENCES)
            made.add_row(
                title,
                row["contender"],
                time_of(row["milliseconds"]),
                time_of(row["host milliseconds"]),
                "–" if launches is None else f"{launches:,}",
                "–" if rate is None else f"{rate:,.0f}",
                *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
            title = ""
        made.add_section()
    found = reasons(results).items()
    made.caption = "\n".join(f"{', '.join(names)}: {why}" for why, names in found)
    made.caption_justify = "left"
    return made


def reasons(results: Sequence[Result]) -> dict[str, list[str]]:
    """Return the contenders that were refused, by the reason."""
    found: dict[str, list[str]] = {}
    for result in results:
        for name, reason in result.refused.items():
            names = found.setdefault(reason, [])
            if name not in names:
                names.append(name)
    return found


def predicted(
    group: str, case: str, elements: int, moved: float, nominal: float | None
) -> dict[str, Any]:
    """Return the milliseconds predicted for a step of ours, which moves so many bytes,
    where memory moves ``nominal`` bytes each second."""
    rate = nominal and nominal * REACHED * PREDICTED
    return {
        "group": group,
        "case": case,
        "elements": elements,
        "bytes": moved,
        "milliseconds": moved / rate * 1e3 if rate else None,
    }


def prediction_table(predictions: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="predicted, for steps that wait for memory alone")
    made.add_column("case")
    for name in ("elements", "MB", "step"):
        made.add_column(name, justify="right")
    for of in predictions:
        expected = of["milliseconds"]
        made.add_row(
            f"{of['group']}: {of['case']}",
            f"{of['elements']:,}",
            f"{of['bytes'] / 1e6:,.1f}",
            "–" if expected is None else time_of(expected),
        )
    return made
