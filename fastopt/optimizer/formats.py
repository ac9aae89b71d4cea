"""The formats in which an optimizer keeps its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastopt.memory.arena import aligned
from fastopt.memory.formats import COMPUTED, FORMATS, SMALLEST, Format
from fastopt.memory.segments import Array, Encoded
from fastopt.rule import shown

if TYPE_CHECKING:
    from fastopt.optimizer.bindings import Bindings

PLAIN = "fp32"  # what a buffer is kept in that has no format
# What a single name stands for, for every buffer. Averages change little at a step, so
# rounded to the nearest they would not move.
ALL = {PLAIN: PLAIN, "bf16": "bf16_sr"}


class StateFormats(NamedTuple):
    """For each buffer of state the format in which it is kept."""

    by_name: Mapping[str, Format] = {}  # none for plain ones

    def of(self, name: str, like: Array) -> Format | None:
        """Return the format of a parameter's buffer, or None for a plain one."""
        return self.by_name.get(name) if like.size >= SMALLEST else None

    def like(self, name: str, like: Array) -> Array:
        """Return something for which an arena makes such a buffer."""
        format = self.of(name, like)
        return like if format is None else aligned(format.dtype, like.shape)

    def stream(self, name: str, buffer: Array, like: Array) -> Array | Encoded:
        """Return a buffer as kernels take it."""
        format = self.of(name, like)
        if format is None:
            return buffer
        return Encoded(format, (buffer.view(format.stored),))


def state_formats(formats: Any, opt: Bindings) -> StateFormats:
    """Check the argument ``formats`` of an optimizer whose parameters are known."""
    if formats is None:
        return StateFormats()
    rule, dtype = opt.rule, opt._params.dtype
    buffers = {name for variant in rule.all for name in variant.state}
    if isinstance(formats, str):
        if formats not in ALL:
            raise ValueError(
                f"formats must be one of {', '.join(map(repr, ALL))}, or a dict with "
                f"the format of each buffer of state, got {formats!r}"
            )
        formats = dict.fromkeys(buffers, ALL[formats])
    if not isinstance(formats, Mapping):
        raise TypeError(
            f"formats must be a string, or a dict with the format of each buffer of "
            f"state, got {shown(formats)}"
        )
    for name, kind in formats.items():
        if name not in buffers:
            raise ValueError(
                f"formats has {name!r}, but {rule.name} keeps "
                f"{', '.join(sorted(buffers)) or 'no state'}"
            )
        if kind != PLAIN and kind not in FORMATS:
            names = ", ".join(map(repr, (PLAIN, *FORMATS)))
            raise ValueError(f"formats[{name!r}] must be one of {names}, got {kind!r}")
    by_name = {name: FORMATS[kind] for name, kind in formats.items() if kind != PLAIN}
    if by_name and dtype != COMPUTED:
        raise TypeError(
            f"formats are for state of float32, but these parameters need state of "
            f"{dtype}"
        )
    if by_name and (rule.factored or not opt._leaves_state):
        raise TypeError(f"{rule.name} keeps its state in float32 only, without formats")
    for format in by_name.values():
        if format.name not in opt._module.formats:
            raise ValueError(
                f"this backend does not keep state in the format {format.name!r}"
            )
        format.dtype  # noqa: B018  (it raises if ml_dtypes is missing)
    return StateFormats(by_name)
