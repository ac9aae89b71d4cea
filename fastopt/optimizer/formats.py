"""The argument ``formats`` of an optimizer: the formats of its state and parameters.

A format with two parts adds a buffer to the state for the second part. Its name is that
of the first buffer with a suffix: "m_scale", "param_remainder".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from fastopt.memory.arena import aligned
from fastopt.memory.formats import COMPUTED, FORMATS, SMALLEST, Format
from fastopt.memory.segments import Array
from fastopt.rule import Rule, shown
from fastopt.rules import CLASS_RULES, RULES

PARAM = "param"  # what formats= calls the parameters
SPACING = 0x9E3779B1  # 2**32 times the golden ratio: its multiples are evenly spread

# What users call the formats of state. "bf16" rounds stochastically, because averages
# change little in a step, and rounding to nearest would stop them.
NAMES: Mapping[str, Format | None] = {
    "fp32": None,
    "bf16": FORMATS["bf16_sr"],
    "bf16_nearest": FORMATS["bf16"],
    "fp16": FORMATS["fp16"],
    "m8": FORMATS["m8"],
    "v8": FORMATS["v8"],
}
# The names that can be given for the whole state.
WHOLE = "fp32", "bf16", "bf16_nearest", "fp16"
# What users call the formats of parameters. They apply to parameters of bfloat16.
OF_PARAMS: Mapping[str, Format | None] = {
    "bf16": FORMATS["bf16_sr"],
    "bf16_nearest": FORMATS["bf16"],
    "bf16+r8": FORMATS["r8"],
    "bf16+r8_nearest": FORMATS["r8_nearest"],
    "bf16+r16": FORMATS["r16"],
}
# What "8bit" means for the buffers of fastopt's rules: averages of gradients, and of
# squares. Other buffers, such as copies of parameters, stay float32.
EIGHT_BITS = {
    **dict.fromkeys(("m", "momentum_buffer", "grad_avg", "d"), "m8"),
    **dict.fromkeys(("v", "square_avg", "n"), "v8"),
}

Chosen = Mapping[str, Format]  # by the name of a buffer, or PARAM; others are plain


class Formats:
    """What ``formats`` says.

    Parameters
    ----------
    given
        The argument: a name, a dict, or a callable of an array's path and the array
        that returns one of these.
    rule, buffers
        The name of the rule, and those of the buffers of its state.
    exact
        The buffers that a name leaves out. These are copies of the parameters: their
        rounding would move the parameters, or be taken for the distance that they have
        moved.
    ours
        Whether the rule is one of fastopt's. The buffers of others may contain
        anything, whatever their names, so they have no "8bit".
    """

    def __init__(
        self,
        given: Any,
        rule: str,
        buffers: Iterable[str],
        exact: Set[str] = frozenset(),
        ours: bool = False,
    ):
        self.given, self.rule, self.buffers = given, rule, sorted(set(buffers))
        self.exact, self.ours = exact, ours
        self.common = {} if self.asks else self._checked("formats", given)

    @property
    def asks(self) -> bool:
        """Whether a callable was given, which is asked about each array."""
        return callable(self.given) and not isinstance(self.given, type)

    @property
    def named(self) -> Mapping[str, str]:
        """What was given as a name or a dict, as a dict."""
        if isinstance(self.given, str):
            return self._named("formats", self.given)
        return {} if self.asks else self.given or {}

    @classmethod
    def of_rule(cls, given: Any, rule: Rule, encodes: bool) -> Formats:
        """Return the formats for a rule. ``encodes`` says whether its optimizer leaves
        the state to kernels, which encode it."""
        buffers = [name for variant in rule.all for name in variant.state]
        exact = {name for name, start in rule.starts.items() if start == "p"}
        ours = any(rule in known.all for known in (*RULES, *CLASS_RULES))
        formats = cls(given, rule.name, buffers, exact, ours)
        if (formats.common or formats.asks) and (rule.factored or not encodes):
            raise TypeError(f"{rule.name} keeps its state in float32, without formats")
        return formats

    def of(
        self, path: str, array: Any, dtype: str, like: Array, known: Set[str]
    ) -> Chosen:
        """Return the formats for an array of a dtype, if the backend has them: it has
        the ``known`` ones. ``like`` has the array's size and the dtype that kernels
        compute in."""
        chosen = self.common
        if self.asks:
            what = f"formats({path!r}, array)"
            chosen = self._checked(what, self.given(path, array))
        if chosen and like.dtype != COMPUTED:
            raise TypeError(
                f"formats are for state of float32, but these parameters need state of "
                f"{like.dtype}"
            )
        for name, format in chosen.items():
            if format.name not in known:
                raise ValueError(
                    f"formats asks for format {format.name!r} of {name!r}, which this "
                    f"backend does not have; it has {', '.join(sorted(known))}"
                )
        return {
            name: format
            for name, format in chosen.items()
            if (dtype == format.public if name == PARAM else like.size >= SMALLEST)
        }

    def check_used(self, of: Sequence[Chosen]) -> None:
        """Check that there are parameters for the parameters' format."""
        if PARAM in self.common and not any(PARAM in chosen for chosen in of):
            raise TypeError(
                f"formats has {PARAM!r}, which is for parameters of bfloat16, but none "
                f"of these is bfloat16; pass the bfloat16 arrays that the model uses"
            )

    def _checked(self, what: str, given: Any) -> Chosen:
        if given is None:
            return {}
        if isinstance(given, str):
            given = self._named(what, given)
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{what} must be a name such as 'bf16' or '8bit', a dict with the "
                f"format of each buffer of state, or a callable, got {shown(given)}"
            )
        chosen = {}
        for name, kind in given.items():
            if name != PARAM and name not in self.buffers:
                raise ValueError(
                    f"{what} has {name!r}, but {self.rule} keeps "
                    f"{', '.join(self.buffers) or 'no state'}"
                )
            names = OF_PARAMS if name == PARAM else NAMES
            check_name(f"{what}[{name!r}]", kind, names)
            if kind == "v8" and EIGHT_BITS.get(name) == "m8":
                raise ValueError(
                    f"{what}[{name!r}] is 'v8', which is for numbers that are never "
                    f"negative, such as averages of squares; use 'm8'"
                )
            if format := names[kind]:
                chosen[name] = format
                if part_name(name, format) in self.buffers:
                    raise ValueError(
                        f"format {kind!r} of {name!r} needs a buffer "
                        f"{part_name(name, format)!r}, but {self.rule} has one of that "
                        f"name"
                    )
        return chosen

    def _named(self, what: str, name: str) -> Mapping[str, str]:
        """Return what a name means for each buffer."""
        if name == "8bit" and not self.ours:
            raise ValueError(
                f"{what}='8bit' is for fastopt's own rules, whose averages it knows; "
                f"for {self.rule}, name a format for each buffer: 'v8' for averages of "
                f"squares, which are never negative, 'm8' for other averages, such as "
                f"{ {name: EIGHT_BITS.get(name, 'm8') for name in self.buffers} }"
            )
        if name == "8bit":
            given = {k: kind for k, kind in EIGHT_BITS.items() if k in self.buffers}
            if not given:
                raise ValueError(
                    f"{what}='8bit' is for averages of gradients and of their squares, "
                    f"but {self.rule} keeps "
                    f"{', '.join(self.buffers) or 'no state'}"
                )
            return given
        check_name(
            what, name, WHOLE, ", '8bit', or a dict with the format of each buffer"
        )
        return {buffer: name for buffer in self.buffers if buffer not in self.exact}


def check_name(what: str, name: Any, known: Iterable[str], more: str = "") -> None:
    """Check the name of a format."""
    if not isinstance(name, str) or name not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{what} must be one of {names}{more}, got {name!r}")


def spelled(chosen: Mapping[str, str]) -> dict[str, str]:
    """Return formats, by their own names, as users write them."""
    names = {
        (stream, format.name): name
        for stream, table in ((PARAM, OF_PARAMS), ("", NAMES))
        for name, format in table.items()
        if format
    }
    return {
        stream: names.get((PARAM if stream == PARAM else "", str(kind)), str(kind))
        for stream, kind in chosen.items()
    }


def first_element(seed: Any) -> int:
    """Return the index from which stochastic rounding counts the elements. Each seed
    starts at a distant index, so it draws different random numbers."""
    whole = isinstance(seed, (int, np.integer)) and type(seed) is not bool
    if not whole or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed must be a whole number from 0 to 2**32 - 1, got {shown(seed)}"
        )
    return int(seed) * SPACING % 2**32


def part_name(stream: str, format: Format) -> str | None:
    """Return the name of the buffer for the second part of a format, or None."""
    return f"{stream}_{format.second[0]}" if format.second else None


class Buffer(NamedTuple):
    """A buffer of the state: the first or second part of an encoded stream."""

    stream: str  # the rule's name for it, or PARAM
    second: bool = False

    def model(self, chosen: Chosen, like: Array) -> Array:
        """Return an array that an arena makes this buffer for, for an array with these
        formats. ``like`` has its shape and the dtype of plain state."""
        format = chosen.get(self.stream)
        if not self.second:
            return like if format is None else aligned(format.dtype, like.shape)
        if format is None or format.second is None:
            return aligned(COMPUTED, (0,))
        _, dtype, elements = format.second
        whole = -(-like.size // elements)
        return aligned(dtype, like.shape if elements == 1 else (whole,))


def buffers_of(state: Sequence[str], of: Sequence[Chosen]) -> dict[str, Buffer]:
    """Return the buffers of a rule's state by name, for arrays with these formats."""
    buffers = {}
    for stream in (*state, PARAM):
        if stream != PARAM:
            buffers[stream] = Buffer(stream)
        kinds = {chosen[stream] for chosen in of if stream in chosen}
        for name in sorted(filter(None, (part_name(stream, kind) for kind in kinds))):
            buffers[name] = Buffer(stream, True)
    return buffers
