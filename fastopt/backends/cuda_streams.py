"""Streams in the text of CUDA kernels: how they are loaded, decoded, encoded and
stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from fastopt.memory.formats import COMPUTED, Format

# The formats of a kernel's streams: of the gradient, of the parameter, of each state
# buffer and of the average, if there is one. None is of those that are not encoded.
Formats: TypeAlias = tuple[Format | None, ...]


def dtypes_of(format: Format | None, dtype: np.dtype[Any]) -> list[np.dtype[Any]]:
    """Return the dtypes of a stream's parts. ``dtype`` is that of streams that are not
    encoded."""
    if format is None:
        return [dtype]
    return [format.stored, *([format.second[1]] if format.second else [])]


def draws(formats: Formats) -> bool:
    """Whether a stream that a kernel writes is rounded stochastically."""
    return any(format is not None and format.stochastic for format in formats[1:])


class Stream(NamedTuple):
    """A stream in a kernel's text, which has a variable for each lane."""

    name: str  # what the names of its variables begin with
    parts: tuple[str, ...]  # the pointers
    format: Format | None
    # For what is drawn: 0 for the parameter; the state buffers count from 2.
    column: int = 0

    def number(self, lane: int) -> str:
        return f"{self.name}_{lane}"

    def loading(self, lanes: Iterable[int]) -> list[str]:
        """Return the lines that load lanes from the i-th element on."""
        kinds = [""] if self.format is None else ["_word", "_rest"][: len(self.parts)]
        return [
            f"{', '.join(self.number(k) + kind for k in lanes)}, = load({part}, i)"
            for kind, part in zip(kinds, self.parts, strict=True)
        ]

    def decoding(self, lanes: Iterable[int]) -> list[str]:
        """Return the lines that make numbers of what was loaded."""
        lines = []
        for number in map(self.number, lanes):
            if self.format is not None:
                word = f"{number}_word"
                if self.format.remainder:
                    word = f"{word} << {self.format.shift} | {number}_rest"
                lines.append(f"{number} = decode_{self.format.name}({word})")
        return lines

    def encoding(self, lanes: Iterable[int]) -> list[str]:
        """Return the lines that make words of numbers."""
        lines = []
        for lane in lanes:
            number = self.number(lane)
            if self.format is not None:
                given = [number]
                if self.format.stochastic:
                    random = random_name(self.column // 2, lane)
                    given.append(f"{random} << 16" if self.column % 2 else random)
                encoded = f"encode_{self.format.name}({', '.join(given)})"
                lines.append(f"{number}_word = {encoded}")
        return lines

    def storing(self, lanes: Iterable[int]) -> list[str]:
        """Return the lines that store lanes from the i-th element on. A store leaves
        out the bits of a word that have no place."""
        numbers = [self.number(k) for k in lanes]
        stored = [numbers]
        if self.format is not None:
            words = [f"{number}_word" for number in numbers]
            upper = [f"{word} >> {self.format.shift}" for word in words]
            stored = [upper, words] if self.format.remainder else [words]
        return [
            f"store({part}, i, ({', '.join(values)},))"
            for part, values in zip(self.parts, stored, strict=True)
        ]


def streams_of(formats: Formats) -> list[Stream]:
    """Return a kernel's streams: of the tuple ``grad`` of pointers, and of the tuple
    ``buffers`` of the pointers to all parts of the others."""
    streams: list[Stream] = []
    end = 0
    for k, format in enumerate(formats):
        count = len(dtypes_of(format, COMPUTED))
        if k == 0:
            parts = tuple(f"grad[{j}]" for j in range(count))
            streams.append(Stream("g", parts, format))
            continue
        parts = tuple(f"buffers[{end + j}]" for j in range(count))
        streams.append(Stream(f"b{k - 1}", parts, format, 0 if k == 1 else k))
        end += count
    return streams


def lines_of(
    kind: Callable[[Stream, Iterable[int]], list[str]],
    streams: Iterable[Stream],
    lanes: Iterable[int],
) -> list[str]:
    """Return the lines of one kind for several streams."""
    return [line for stream in streams for line in kind(stream, lanes)]


def random_name(pair: int, lane: int) -> str:
    return f"random{pair}_{lane}"


def drawing(streams: Sequence[Stream], lanes: Sequence[int]) -> list[str]:
    """Return the lines that draw the random words for what is encoded, from ``draw``:
    the index of the first element, and the number of the step."""
    stochastic = [s for s in streams if s.format and s.format.stochastic]
    lines = ["step = word_of(draw[1])"] if stochastic else []
    for pair in sorted({stream.column // 2 for stream in stochastic}):
        for k in lanes:
            element = f"word_of(draw[0] + i + {k})"
            random = f"random_word({element}, step, word_of({pair}))"
            lines.append(f"{random_name(pair, k)} = {random}")
    return lines
