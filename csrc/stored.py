"""Formats of streams, and the kernels that go through them in registers, as the
templates see them. render.py makes the formats from fastopt/memory/formats.py."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    """A format of stored numbers, from memory/formats.py."""

    name: str
    decode: Any  # functions, as render.py's Function
    encode: Any
    c_type: str  # of the stored words
    remainder: str  # the type of their remainders, or ""
    scale: Any  # of a group, or None
    curve: Any  # what is encoded in place of numbers, or None

    def curved(self, text):
        """Return the expression for what is encoded in place of a number."""
        return f"{self.curve.name}_f32({text})" if self.curve else text

    @property
    def mask(self):
        """The bits of a number that count for its magnitude."""
        return "0xFFFFFFFFU" if self.curve else "0x7FFFFFFFU"

    @property
    def shift(self):
        """The number of bits of a remainder."""
        return {"": 0, "uint8_t": 8, "uint16_t": 16}[self.remainder]

    @property
    def word(self):
        """The expression for the word of element i."""
        return (
            f"<uint32_t> words[i] << {self.shift} | rest[i]"
            if self.shift
            else "words[i]"
        )

    def parts(self, way):
        """Return the arguments for the arrays of a format without scales."""
        rest = f"{self.remainder}_{way} rest," if self.remainder else ""
        return f"{self.c_type}_{way} words, {rest}"

    def decoded(self, text):
        """Return the expression for a stored element's number."""
        return f"{self.decode.name}_f32({text})"

    def encoded(self, text, shift="0"):
        """Return the expression for the word to store. A stochastic format takes the
        bits of the variable ``random`` from ``shift`` down."""
        random = f", random << {shift}" if self.stochastic else ""
        return f"{self.encode.name}_f32({text}{random})"

    @property
    def stochastic(self):
        return len(self.encode.arguments) == (3 if self.scale else 2)


class Plain:
    """Numbers of float32 that are stored as they are."""

    name, c_type, remainder, scale, stochastic = "fp32", "float", "", None, False

    def decoded(self, text):
        return text

    def encoded(self, text, shift="0"):
        return text


@dataclass(frozen=True)
class Form:
    """A kernel that decodes and encodes in registers: its rule and its formats."""

    rule: Any  # render.py's Kernel
    param: Format | Plain
    grad: Format | Plain
    states: tuple[Format | Plain, ...]

    @property
    def name(self):
        streams = self.param, self.grad, *self.states
        return "_".join([self.rule.name, *(stream.name for stream in streams)])

    @property
    def buffers(self):
        """The number, name and format of each buffer of the state."""
        names = self.rule.states
        return list(zip(range(len(names)), names, self.states, strict=True))

    @property
    def grouped(self):
        """Whether it goes group by group."""
        scaled = any(format.scale for format in self.states)
        return bool(scaled or self.param.remainder)

    @property
    def paired(self):
        """Whether each stream has words of 16 bits, without remainders."""
        streams = self.param, self.grad, *self.states
        return not self.grouped and {s.c_type for s in streams} == {"uint16_t"}

    @property
    def draws(self):
        """Whether it rounds stochastically."""
        return any(format.stochastic for format in (self.param, *self.states))

    @property
    def arrays(self):
        """The arrays that a group is a part of: names, types, and addresses."""
        arrays = [("p", self.param.c_type, "row[0]"), ("g", self.grad.c_type, "row[1]")]
        if self.param.remainder:
            arrays.append(("rest", self.param.remainder, "parts[1]"))
        for k, s, format in self.buffers:
            arrays.append((s, format.c_type, f"row[{2 + k}]"))
        return arrays

    def call(self, end):
        """The first arguments for a group, in arrays whose names end like this."""
        scaled = {s for _, s, format in self.buffers if format.scale}
        return "".join(
            f"{name}{end}, "
            + (f"{name}_scale, {name}_nonfinite, " if name in scaled else "")
            for name, *_ in self.arrays
        )


# Rules with kernels that decode and encode in registers, because most people train with
# them. For all other rules, the driver makes blocks (blocks.pxi).
FUSED = (
    *("adam_update", "adamw_update", "sgd_heavy_ball", "lion_update", "sgd_update"),
    *("floor_streams0", "floor_streams1", "floor_streams2"),
)
GROUPED = FUSED[:4]  # those that have forms with scales or remainders, too


def forms(stored, rule):
    """Return the forms of a rule's kernels that decode and encode in registers."""
    if rule.name not in FUSED:
        return []
    by_name, plain = {format.name: format for format in stored}, Plain()
    bf16, r8, r16 = (by_name[name] for name in ("bf16", "r8", "r16"))
    count = len(rule.states)
    exact, rounded = (plain,) * count, (by_name["bf16_sr"],) * count
    coded = (by_name["m8"], by_name["v8"])[:count]
    states = (exact, rounded) if count else (exact,)
    kinds = [(p, bf16, s) for p in (bf16, plain) for s in states]
    if rule.name in GROUPED:
        kinds += [(p, bf16, coded) for p in (plain, r8)] + [(plain, plain, coded)]
        kinds += [(p, bf16, exact) for p in (r8, r16)]
    return [Form(rule, *kind) for kind in kinds]
