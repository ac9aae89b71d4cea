"""Formats of state and of parameters: the tensors that they are stored in.

A format with two parts has two tensors in a parameter's state: "exp_avg" and
"exp_avg_scale"; or, for the parameter itself, "remainder".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastopt.memory.arena import aligned
from fastopt.memory.formats import COMPUTED, FORMATS, Format
from fastopt.memory.order import GROUP
from fastopt.memory.segments import Array, Encoded
from fastopt.optimizer.formats import (
    OF_PARAMS,
    PARAM,
    Chosen,
    Formats,
    check_name,
    spelled,
)
from fastopt.rule import Rule
from fastopt.torch import memory
from fastopt.torch.memory import array, at_address, computed, is_dense, numbers

# The tensors of a format's parts, by the names of their dtypes.
TENSORS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "uint16": torch.int16,  # few of torch's functions take its uint16
}
WORDS = {torch.int8, torch.uint8, torch.int16}  # the dtypes of codes and remainders
CODES = {torch.int8: FORMATS["m8"], torch.uint8: FORMATS["v8"]}
SCALE = "scale"
REMAINDER = "remainder"  # the key of a parameter's second part


class Wanted(NamedTuple):
    """The arguments of an optimizer that choose formats.

    Attributes
    ----------
    formats
        As the core's, or None. A callable takes a parameter's name and the parameter.
    master
        The format of the parameters, or None.
    counts
        Whether the optimizer counts steps. What is rounded stochastically needs that.
    scales
        Whether its state may have scales.
    keys
        The keys of the state, by the rule's names of buffers.
    buffers
        The rule's names of all buffers that options of groups may ask for.
    """

    formats: Any = None
    master: str | None = None
    counts: bool = True
    scales: bool = True
    keys: Mapping[str, str] = {}
    buffers: Set[str] = frozenset()

    @property
    def any(self) -> bool:
        return self.formats is not None or self.master is not None

    def of(self, formats: Formats, name: str, param: Tensor, known: Set[str]) -> Chosen:
        """Return the formats for a parameter: ``formats`` are those of its rule, and
        its kernels have the ``known`` ones."""
        if not self.any or computed(param) is not torch.float32:
            return {}
        kind, like = str(param.dtype).removeprefix("torch."), (numbers(param),)
        chosen = formats.of(name, param, kind, aligned(COMPUTED, like), known)
        return {stream: self._counted(stream, of) for stream, of in chosen.items()}

    def of_rule(self, rule: Rule) -> Formats:
        """Check the arguments for a rule, and return them as the core's."""
        if self.master is not None:
            check_name("master", self.master, OF_PARAMS)
        given = self.formats
        if callable(given) and not isinstance(given, type):

            def given(*about: Any) -> Any:
                return self._with_master(self.formats(*about), rule)

        elif self.any:
            given = self._with_master(given, rule)
        formats = Formats.of_rule(given, rule, True)
        for stream, format in formats.common.items():
            self._counted(stream, format)
        return formats

    def _with_master(self, given: Any, rule: Rule) -> Any:
        """Return formats with that of the parameters, by the rule's names."""
        if isinstance(given, Mapping):
            given = self._for_rule(given, rule)
        if self.master is None:
            return given
        named = {} if given is None else Formats.of_rule(given, rule, True).named
        if PARAM in named:
            raise ValueError(
                f"master and formats[{PARAM!r}] both say how parameters are kept; "
                f"leave one out"
            )
        return {**named, PARAM: self.master}

    def _for_rule(self, given: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
        """Return formats by the rule's names of buffers, without those that only the
        options of other groups ask for."""
        rules, named = {key: name for name, key in self.keys.items()}, {}
        own = {name for variant in rule.all for name in variant.state} | {PARAM}
        for key, kind in given.items():
            name = rules.get(key, key)
            if name not in own | self.buffers:
                keys = (self.keys.get(name, name) for name in own | self.buffers)
                raise ValueError(
                    f"formats has {key!r}, but this optimizer has "
                    f"{', '.join(sorted(keys))}"
                )
            if name in own:
                named[name] = kind
        return named

    def _counted(self, stream: str, format: Format) -> Format:
        """Return a format, or that which rounds to nearest if steps are not counted."""
        (name,) = spelled({stream: format.name}).values()
        if format.scale is not None and not self.scales:
            raise ValueError(
                f"this optimizer's state cannot have format {name!r}, because "
                f"its state_dict has other numbers; use 'bf16'"
            )
        if self.counts or not format.stochastic:
            return format
        if format is FORMATS["r8"]:
            return FORMATS["r8_nearest"]
        if format is FORMATS["bf16_sr"] and stream != PARAM:
            return FORMATS["bf16"]
        instead = "'bf16+r16'" if stream == PARAM else "'bf16', which rounds to nearest"
        raise ValueError(
            f"format {name!r} of {stream!r} draws random numbers by the number of the "
            f"step, but this optimizer does not count its steps, as torch's does not; "
            f"use {instead} here, or another optimizer, such as SGDW"
        )


def names_of(groups: Sequence[dict[str, Any]]) -> dict[Tensor, str]:
    """Return the names that torch has for parameters; empty ones if it has none."""
    names: dict[Tensor, str] = {}
    for group in groups:
        params = group["params"]
        of = group.get("param_names") or [""] * len(params)
        names |= dict(zip(params, of, strict=False))
    return names


def second_shape(param: Tensor, format: Format) -> tuple[int, ...]:
    """Return the shape of a second part."""
    if format.scale is None:
        return tuple(param.shape)
    return (-(-numbers(param) // GROUP),)


def tensor_dtype(format: Format, second: bool = False) -> torch.dtype:
    """Return the dtype of a part's tensor."""
    if second and format.second is not None:
        return TENSORS[str(format.second[1])]
    return TENSORS[format.public]


def part(tensor: Tensor, dtype: np.dtype[Any], count: int) -> Any:
    """Return ``count`` elements of a tensor, in the order of memory, as its device's
    kernels take them."""
    if not memory.on_gpu(tensor):
        if not count:
            return np.empty(0, dtype)
        return at_address(tensor.data_ptr(), count, dtype)
    from fastopt.backends import cuda_driver

    flat = tensor.detach().as_strided((count,), (1,))
    if dtype != COMPUTED:
        flat = flat.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
    return cuda_driver.as_array("state", flat).view(dtype)


def stream(
    tensor: Tensor,
    format: Format | None,
    second: Tensor | None,
    counter: Any,
    count: int | None = None,
) -> Any:
    """Return a tensor as kernels take it, with the second part of its format; ``count``
    elements, if those of other tensors follow."""
    if format is None:
        return array(tensor, count)
    count = numbers(tensor) if count is None else count
    parts = [part(tensor, format.stored, count)]
    if format.second is not None and second is not None:
        _, dtype, elements = format.second
        parts.append(part(second, dtype, -(-count // elements)))
    if format.scale is not None:
        parts.append(counter)
    return Encoded(format, tuple(parts))


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of memory, in which groups are
    formed."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def words_of(tensor: Tensor) -> Array:
    """Return the elements of a tensor of 8 or 16 bits as unsigned integers."""
    bits = torch.uint8 if tensor.element_size() == 1 else torch.int16
    array: Array = flat(tensor).view(bits).cpu().numpy()
    return array.view(f"u{array.itemsize}")


def set_words(tensor: Tensor, words: Array) -> None:
    """Set the elements of a tensor of 8 or 16 bits to unsigned integers."""
    bits, of = (torch.uint8, "u1") if words.itemsize == 1 else (torch.int16, "i2")
    flat(tensor).view(bits).copy_(torch.from_numpy(words.view(of)))


def decoded(state: Mapping[str, Any], key: str) -> Tensor:
    """Return a buffer of a parameter's state, as float32 if it is codes with scales."""
    tensor: Tensor = state[key]
    if tensor.dtype not in CODES:
        return tensor
    scales = scales_of(state, key)
    tensor = tensor if is_dense(tensor) else tensor.contiguous()
    parts = words_of(tensor), scales.detach().cpu().numpy()
    values = torch.from_numpy(CODES[tensor.dtype].read(parts))
    result = torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
    flat(result).copy_(values)
    return result


def scales_of(state: Mapping[str, Any], key: str) -> Tensor:
    """Return the scales of a buffer of 8 bits in a parameter's state."""
    scales, groups = state.get(f"{key}_{SCALE}"), -(-state[key].numel() // GROUP)
    if not isinstance(scales, Tensor) or scales.shape != (groups,):
        raise ValueError(
            f"the state has {key!r} in 8 bits, which needs {key}_{SCALE!s} with "
            f"{groups} numbers; load the state as it was saved"
        )
    return scales


def check_remainder(remainder: Any, param: Tensor, format: Format) -> None:
    """Check that the remainder in a parameter's state is of a format."""
    dtype = tensor_dtype(format, second=True)
    is_tensor = isinstance(remainder, Tensor)
    if is_tensor and (remainder.dtype, remainder.shape) == (dtype, param.shape):
        return
    what = (
        f"{remainder.dtype} and shape {tuple(remainder.shape)}"
        if is_tensor
        else f"type {type(remainder).__name__}"
    )
    raise ValueError(
        f"the remainder of a parameter has {what} in the state, but this optimizer's "
        f"has {dtype} and shape {tuple(param.shape)}; make it with the same master"
    )


def fit(
    state: dict[str, Any],
    keys: Mapping[str, str],
    param: Tensor,
    chosen: Mapping[str, Format],
) -> None:
    """Decode the buffers of a loaded state that have 8 bits, where this optimizer has
    other ``chosen`` formats, and leave out a remainder that it does not have. ``keys``
    has the keys of the buffers by the rule's names."""
    for name, key in keys.items():
        format, tensor = chosen.get(name), state.get(key)
        if isinstance(tensor, Tensor) and tensor.dtype in CODES:
            scales_of(state, key)
            if format is None or format.scale is None:
                state[key] = decoded(state, key)
                del state[f"{key}_{SCALE}"]
    format = chosen.get(PARAM)
    if format is None or format.second is None:
        state.pop(REMAINDER, None)
    elif REMAINDER in state:
        check_remainder(state[REMAINDER], param, format)


def encode(first: Tensor, second: Tensor, format: Format, values: Tensor) -> None:
    """Write numbers into the two parts of a format."""
    like = torch.empty_like(first, dtype=torch.float32, device="cpu").copy_(values)
    words, rest = format.nearest.written(flat(like).numpy())
    set_words(first, words)
    if format.scale is None:
        set_words(second, rest)
    else:
        second.copy_(torch.from_numpy(rest))
