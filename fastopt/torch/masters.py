"""The parameters with all bits that are kept of them, in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import setitem
from typing import Any

import torch
from torch import Tensor

from fastopt.memory.formats import FORMATS, Format
from fastopt.runtime.atomic import Call
from fastopt.torch.dtensors import fits, is_dtensor, local, wrapped
from fastopt.torch.formats import REMAINDER, encode, flat, tensor_dtype, words_of
from fastopt.torch.memory import computed


def master(param: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return a parameter with its remainder, as a new tensor in the dtype that is
    computed in. A remainder of data that was replaced by another dtype is ignored, as
    the next step does."""
    rest = state.get(REMAINDER)
    result = param.detach().to(computed(param), copy=True)
    if isinstance(rest, Tensor) and param.dtype is torch.bfloat16:
        format = FORMATS["r8" if rest.dtype == torch.uint8 else "r16"]
        values = format.read((words_of(param), words_of(rest)))
        flat(result).copy_(torch.from_numpy(values))
    return result


def setting(
    param: Tensor, values: Tensor, format: Format | None, entry: dict[str, Any]
) -> list[Call]:
    """Return the calls that set a parameter, and its remainder in its entry of the
    state if its format has one, to numbers of float32."""
    here, values = local(param), local(values)
    if format is None or format.second is None:
        return [partial(here.copy_, values)]
    dtype = tensor_dtype(format, second=True)
    first = torch.empty_like(here, requires_grad=False)
    rest = torch.empty_like(here, dtype=dtype, requires_grad=False)
    encode(first, rest, format, values)
    rest = wrapped(rest, param) if is_dtensor(param) else rest
    return [partial(here.copy_, first), partial(setitem, entry, REMAINDER, rest)]


def apart(masters: Sequence[Tensor], written: Sequence[Tensor]) -> list[Tensor]:
    """Return the masters, with copies of those that share memory with tensors that are
    to be written, because these would change while others are still to be read."""

    def storage(tensor: Tensor) -> int:
        place: int = local(tensor).untyped_storage().data_ptr()
        return place

    taken = set(map(storage, written))
    return [
        values.clone() if storage(values) in taken else values for values in masters
    ]


def check_masters(given: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """Check that these are numbers for each parameter, and return them as a list."""
    if isinstance(given, (Tensor, Mapping, torch.nn.Module)):
        raise TypeError(
            f"masters must be a list of tensors, one for each parameter, as "
            f"master_params() returns them, got {type(given).__name__}"
        )
    masters: list[Tensor] = list(given)
    for values in masters:
        if not isinstance(values, Tensor):
            raise TypeError(
                f"masters must have a tensor for each parameter, got "
                f"{type(values).__name__}"
            )
    shapes = [tuple(param.shape) for param in params]
    if shapes != [tuple(values.shape) for values in masters]:
        raise ValueError(f"masters must be tensors of the shapes {shapes}")
    for param, values in zip(params, masters, strict=True):
        dense = values.layout is torch.strided and not values.is_quantized
        if not dense or values.is_meta:
            raise TypeError(
                f"masters must be dense tensors with numbers, got one of "
                f"{values.dtype}, {values.layout} on {values.device}"
            )
        if is_dtensor(values) != is_dtensor(param) or not fits(values, param):
            raise TypeError(
                "masters of DTensors must be DTensors with their placements, and those "
                "of other parameters plain tensors, as master_params() returns them"
            )
        if values.is_complex() and not param.is_complex():
            raise TypeError(
                f"masters has {values.dtype} for a parameter of {param.dtype}"
            )
    return masters
