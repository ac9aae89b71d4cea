"""Streams in the text of CUDA kernels: how they are loaded, decoded, encoded and
stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fastopt.backends.cuda_table import Factored, Formats, dtypes_of
from fastopt.language import Word
from fastopt.memory.formats import COMPUTED, INFINITY, Format
from fastopt.memory.order import GROUP
from fastopt.rule import bits, where, word


class Stream(NamedTuple):
    """A stream in a kernel's text, which has a variable for each lane."""

    name: str  # what the names of its variables begin with
    parts: tuple[str, ...]  # the pointers
    format: Format | None = None
    # For what is drawn: 0 for the parameter; the state buffers count from 2.
    column: int = 0
    is_factored: bool = False

    def number(self, lane: int) -> str:
        return f"{self.name}_{lane}"

    @property
    def is_scaled(self) -> bool:
        return self.format is not None and self.format.scale is not None

    def loading(
        self, lanes: Iterable[int], at: str = "i", load: str = "load"
    ) -> list[str]:
        """Return the lines that load lanes from an element on. What is factored is
        multiplied."""
        if self.is_factored:
            factors = ", ".join(self.parts)
            return [
                f"{self.number(k)} = product({factors}, {at} + {k}, shape)"
                for k in lanes
            ]
        kinds = [""]
        if self.format is not None:
            kinds = ["_word", "_rest"] if self.format.remainder else ["_word"]
        return [
            f"{', '.join(self.number(k) + kind for k in lanes)}, = {load}({part}, {at})"
            for kind, part in zip(kinds, self.parts, strict=False)
        ]

    def scale_loading(self, at: str) -> list[str]:
        """Return the line that loads the scale of an element, if it has one."""
        if not self.is_scaled:
            return []
        return [f"({self.name}_scale,) = load_one({self.parts[1]}, {at} // {GROUP})"]

    def decoding(self, lanes: Iterable[int]) -> list[str]:
        """Return the lines that make numbers of what was loaded."""
        lines = []
        for number in map(self.number, lanes):
            if self.format is not None:
                word = f"{number}_word"
                if self.format.remainder:
                    word = f"{word} << {self.format.shift} | {number}_rest"
                given = f"{word}, {self.name}_scale" if self.is_scaled else word
                lines.append(f"{number} = decode_{self.format.name}({given})")
        return lines

    def encoding(self, lanes: Iterable[int]) -> list[str]:
        """Return the lines that make words of numbers."""
        lines = []
        for lane in lanes:
            number = self.number(lane)
            if self.format is not None:
                given = [number, *([f"{self.name}_scale"] if self.is_scaled else [])]
                if self.format.stochastic:
                    pair, shift = self.format.place(self.column)
                    given.append(f"{random_name(pair, lane)} << {shift}")
                word = f"encode_{self.format.name}({', '.join(given)})"
                if self.is_scaled:  # others keep their words
                    word = f"where({self.name}_finite, {word}, {number}_word)"
                lines.append(f"{number}_word = {word}")
        return lines

    def storing(
        self, lanes: Iterable[int], at: str = "i", store: str = "store"
    ) -> list[str]:
        """Return the lines that store lanes from an element on. A store leaves out the
        bits of a word that have no place."""
        numbers = [self.number(k) for k in lanes]
        stored = [numbers]
        if self.format is not None:
            words = [f"{number}_word" for number in numbers]
            upper = [f"{word} >> {self.format.shift}" for word in words]
            stored = [upper, words] if self.format.remainder else [words]
        return [
            f"{store}({part}, {at}, ({', '.join(values)},))"
            for part, values in zip(self.parts, stored, strict=False)
        ]


def streams_of(formats: Formats) -> list[Stream]:
    """Return a kernel's streams: of the tuple ``grad`` of pointers, and of the tuple
    ``buffers`` of the pointers to all parts of the others."""
    streams: list[Stream] = []
    end = 0
    for k, format in enumerate(formats):
        count = len(dtypes_of(format, COMPUTED))
        if k == 0:
            pointers = tuple(f"grad[{j}]" for j in range(count))
            name, column = "g", 0
        else:
            pointers = tuple(f"buffers[{end + j}]" for j in range(count))
            name, column = f"b{k - 1}", 0 if k == 1 else k
            end += count
        if isinstance(format, Factored):
            streams.append(Stream(name, pointers, is_factored=True))
        else:
            streams.append(Stream(name, pointers, format, column))
    return streams


def lines_of(
    kind: Callable[[Stream, Any], list[str]], streams: Iterable[Stream], of: Any
) -> list[str]:
    """Return the lines of one kind, of lanes or an element, for several streams."""
    return [line for stream in streams for line in kind(stream, of)]


def loads(streams: Sequence[Stream], lanes: Sequence[int], width: int) -> list[str]:
    """Return the lines that load lanes of all streams, ``width`` at a time.

    Where groups share scales, all threads of a group take part. Those that have no
    element load the last one once more. It changes no maximum, and is not stored."""
    whole = lines_of(Stream.loading, streams, lanes)
    if not any(stream.is_scaled for stream in streams):
        return whole
    single = []
    for k in lanes:
        for stream in streams:
            single += stream.loading([k], f"min(i + {k}, size - 1)", "load_one")
    scales = lines_of(Stream.scale_loading, streams, "min(i, size - 1)")
    return [*either(whole, single, lanes, width), *scales]


def stores(streams: Sequence[Stream], lanes: Sequence[int], width: int) -> list[str]:
    """Return the lines that store lanes of all streams likewise. One thread of a group
    stores its scale."""
    whole = lines_of(Stream.storing, streams, lanes)
    scaled = [stream for stream in streams if stream.is_scaled]
    if not scaled:
        return whole
    single = []
    for k in lanes:
        single.append(f"if i + {k} < size:")
        for stream in streams:
            single += indented(stream.storing([k], f"i + {k}", "store_one"))
    lines = either(whole, single, lanes, width)
    lines.append(f"if i % {GROUP} == 0 and i < size:")
    for stream in scaled:
        _, scale, count = stream.parts
        value = f"({stream.name}_scale,)"
        lines += indented(
            [
                f"if {stream.name}_finite:",
                f"    store_one({scale}, i // {GROUP}, {value})",
                "else:",
                f"    count({count})",
            ]
        )
    return lines


def either(
    whole: list[str], single: list[str], lanes: Sequence[int], width: int
) -> list[str]:
    """Return the lines for a whole vector where there is one, and those for single
    elements elsewhere."""
    if width == 1:
        return single
    head = f"if aligned and i + {len(lanes)} <= size:"
    return [head, *indented(whole), "else:", *indented(single)]


def indented(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def sharing(streams: Sequence[Stream], lanes: Sequence[int]) -> list[str]:
    """Return the lines that find the scales of new numbers."""
    lines, finite = [], []
    for stream in streams:
        if stream.is_scaled and stream.format:
            name, top = stream.name, f"{stream.name}_top"
            kind, numbers = stream.format.name, [stream.number(k) for k in lanes]
            if stream.format.curve:
                lines += [f"{number} = curve_{kind}({number})" for number in numbers]
            lines.append(f"{top} = word_of(0)")
            lines += [f"{top} = higher_{kind}({top}, {number})" for number in numbers]
            lines.append(f"{top} = greatest({top})")
            lines.append(f"{name}_finite = is_finite({top})")
            lines.append(f"{name}_scale = scale_{kind}({top})")
            finite.append(f"{name}_finite")
    if len(finite) > 1:  # buffers that belong together are stored together
        lines.append(f"every_finite = {' & '.join(finite)}")
        lines += [f"{name} = every_finite" for name in finite]
    return lines


INFINITE = word(INFINITY)


def higher(top: Word, x: Any) -> Any:
    """Return the bits of the greater of two magnitudes."""
    magnitude = bits(abs(x))
    return where(magnitude > top, magnitude, top)


def higher_curved(top: Word, x: Any) -> Any:
    """Do the same for a number of a curve. A sign makes it greater than all others."""
    magnitude = bits(x)
    return where(magnitude > top, magnitude, top)


def scaling(format: Format) -> dict[str, Any]:
    """Return the functions that find a format's scales, by their names in kernels."""
    if format.scale is None:
        return {}
    functions: dict[str, Any] = {
        f"scale_{format.name}": format.scale,
        f"higher_{format.name}": higher_curved if format.curve else higher,
        "is_finite": is_finite,
    }
    if format.curve:
        functions[f"curve_{format.name}"] = format.curve
    return functions


def is_finite(top: Word) -> Any:
    """Whether all numbers are finite of which this magnitude is the greatest."""
    return top < INFINITE


def random_name(pair: int, lane: int) -> str:
    return f"random{pair}_{lane}"


def drawing(streams: Sequence[Stream], lanes: Sequence[int]) -> list[str]:
    """Return the lines that draw the random words for what is encoded, from ``draw``:
    the index of the first element, and the number of the step."""
    stochastic = [s for s in streams if s.format and s.format.stochastic]
    lines = ["step = word_of(draw[1])"] if stochastic else []
    pairs = {s.format.place(s.column)[0] for s in stochastic if s.format}
    for pair in sorted(pairs):
        for k in lanes:
            element = f"word_of(draw[0] + i + {k})"
            random = f"random_word({element}, step, word_of({pair}))"
            lines.append(f"{random_name(pair, k)} = {random}")
    return lines
