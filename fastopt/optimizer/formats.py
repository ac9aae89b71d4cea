"""The argument ``formats`` of an optimizer: the formats of its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastopt.memory.arena import aligned
from fastopt.memory.formats import COMPUTED, FORMATS, SMALLEST, Format, format_of
from fastopt.memory.segments import Array, Encoded
from fastopt.rule import shown

if TYPE_CHECKING:
    from fastopt.optimizer.bindings import Bindings

# What users call the formats of state. "bf16" rounds stochastically, because averages
# change little in a step, and rounding to nearest would stop them.
NAMES: Mapping[str, Format | None] = {
    "fp32": None,
    "bf16": FORMATS["bf16_sr"],
    "bf16_nearest": FORMATS["bf16"],
    "fp16": FORMATS["fp16"],
}


class StateFormats(NamedTuple):
    """The format of each buffer of the state."""

    by_name: Mapping[str, Format] = {}  # plain buffers are not in it

    def model(self, name: str, like: Array) -> Array:
        """Return an array that an arena makes a buffer for. ``like`` has the shape of
        the parameter and the dtype of plain state."""
        format = self.by_name.get(name)
        if format is None or like.size < SMALLEST:
            return like
        return aligned(format.dtype, like.shape)

    def stream(self, name: str, buffer: Array) -> Array | Encoded:
        """Return a buffer as kernels take it."""
        if format_of(buffer.dtype) is None:
            return buffer
        format = self.by_name[name]
        return Encoded(format, (buffer.view(format.stored),))


def state_formats(formats: Any, opt: Bindings) -> StateFormats:
    """Check an optimizer's argument ``formats`` and return what it says. The optimizer
    has its parameters already."""
    if formats is None:
        return StateFormats()
    rule, dtype = opt.rule, opt._params.dtype
    buffers = {name for variant in rule.all for name in variant.state}
    if isinstance(formats, str):
        check_name("formats", formats, ", or a dict with the format of each buffer")
        formats = dict.fromkeys(buffers, formats)
    if not isinstance(formats, Mapping):
        raise TypeError(
            f"formats must be a string, or a dict with the format of each buffer of "
            f"state, got {shown(formats)}"
        )
    by_name = {}
    for name, kind in formats.items():
        if name not in buffers:
            raise ValueError(
                f"formats has {name!r}, but {rule.name} keeps "
                f"{', '.join(sorted(buffers)) or 'no state'}"
            )
        check_name(f"formats[{name!r}]", kind)
        if format := NAMES[kind]:
            by_name[name] = format
            if format.name not in opt._module.formats:
                raise ValueError(
                    f"backend {opt.backend!r} does not keep state in format {kind!r}"
                )
            format.dtype  # noqa: B018  (raises if ml_dtypes is missing)
    if by_name and dtype != COMPUTED:
        raise TypeError(
            f"formats are for state of float32, but these parameters need state of "
            f"{dtype}"
        )
    if by_name and (rule.factored or not opt._leaves_state):
        raise TypeError(f"{rule.name} keeps its state in float32 only, without formats")
    return StateFormats(by_name)


def check_name(what: str, name: Any, more: str = "") -> None:
    """Check the name of a format."""
    if not isinstance(name, str) or name not in NAMES:
        names = ", ".join(map(repr, NAMES))
        raise ValueError(f"{what} must be one of {names}{more}, got {name!r}")
