"""What a torch optimizer of ours stores: the formats of its state and parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt.memory.segments import Array
from fastopt.optimizer.formats import PARAM
from fastopt.optimizer.storage import Usage
from fastopt.rule import Rule
from fastopt.step import HalfDone
from fastopt.torch import memory
from fastopt.torch.dtensors import fits, is_dtensor, local, on_shard
from fastopt.torch.formats import Wanted
from fastopt.torch.masters import master
from fastopt.torch.memory import HALVES, is_dense, same_layout
from fastopt.torch.state import Names
from fastopt.torch.turns import Turns


class Storage(Optimizer):
    """A ``torch.optim.Optimizer`` whose state and parameters may have formats."""

    _default_rule: Rule  # whatever the options of a group are
    _names = Names()
    _encodes = True  # whether its state may have formats
    _scales = True  # and whether these may have scales
    _turns: Turns
    _half_done: HalfDone | None = None  # why nothing but a checkpoint helps
    _not_stored: Array
    _not_stored_there: dict[torch.device, Tensor]  # on GPUs
    state_dtype: torch.dtype | None = None
    formats: Any = None
    master: str | None = None
    copy_to: Any = None
    shard_group: Any = None
    seed = 0

    def _set_formats(
        self, state_dtype: torch.dtype | None, formats: Any, master: str | None
    ) -> None:
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"state_dtype must be torch.float32 or torch.bfloat16, got "
                f"{state_dtype!r}"
            )
        if state_dtype is not None and formats is not None:
            raise ValueError(
                "state_dtype and formats both say what state is kept in; leave one out"
            )
        self.state_dtype, self.formats, self.master = state_dtype, formats, master

    def _check_copies(self) -> None:
        """Check ``copy_to``, and keep it by parameter."""
        if self.copy_to is None:
            return
        params = self._params
        if isinstance(self.copy_to, (Mapping, torch.nn.Module)):
            raise TypeError(
                f"copy_to must be a list with a tensor or None for each parameter, got "
                f"{type(self.copy_to).__name__}; pass list(model.parameters())"
            )
        given = list(self.copy_to)
        if len(given) != len(params):
            raise ValueError(
                f"copy_to must have a tensor or None for each of {len(params)} "
                f"parameters, got {len(given)}"
            )
        pairs = [(p, c) for p, c in zip(params, given, strict=True) if c is not None]
        for param, copy in pairs:
            check_copy(param, copy)
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
            for t in map(local, (*params, *(copy for _, copy in pairs)))
            if t.numel()
        )
        if any(a[1] > b[0] for a, b in zip(spans, spans[1:], strict=False)):
            raise ValueError("tensors in copy_to overlap each other or a parameter")
        self.copy_to = dict(pairs)  # the tensors themselves, whose memory may move

    def _check_formats(self, rules: Sequence[Rule]) -> None:
        """Check the formats of state and parameters for these rules."""
        wanted = self._wanted
        if wanted.any and not self._encodes:
            raise ValueError(
                f"{type(self).__name__} has float32 state only; leave out state_dtype, "
                f"formats and master"
            )
        for rule in rules if wanted.any else ():
            wanted.of_rule(rule)
        dtypes = {param.dtype for param in self._params}
        if self.master is not None and torch.bfloat16 not in dtypes:
            raise TypeError(
                f"master is for parameters of bfloat16, but these are of "
                f"{', '.join(sorted(map(str, dtypes)))}"
            )

    @property
    def _wanted(self) -> Wanted:
        """The formats that were asked for."""
        formats = self.formats
        if self.state_dtype is torch.bfloat16:
            formats = "bf16"
        counts = self._names.steps is not None
        keys, rules = self._names.keys, self._default_rule.all
        buffers = {name for rule in rules for name in rule.state} | {*keys}
        return Wanted(formats, self.master, counts, self._scales, keys, buffers)

    @property
    def nonfinite_groups(self) -> int:
        """How often a group of 64 numbers of 8-bit state was left as it was, because
        its new numbers were not all finite."""
        there = [int(counter) for counter in self._not_stored_there.values()]
        return int(self._not_stored[0]) + sum(there)

    def _counter(self, param: Tensor) -> Any:
        """Return where kernels count these groups: on the device of a parameter."""
        if not memory.on_gpu(param) or not self._wanted.any:
            return self._not_stored
        from fastopt.backends import cuda_driver

        device = param.device
        if device not in self._not_stored_there:
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            self._not_stored_there[device] = zero
        counter = self._not_stored_there[device]
        return cuda_driver.as_array("a count", counter).view(np.dtype(np.uint64))

    def check_whole(self) -> None:
        """Refuse to go on after a step that has failed half-way."""
        if self._half_done is not None:
            raise HalfDone(str(self._half_done)) from self._half_done

    def master_params(self) -> list[Tensor]:
        """Return each parameter with all bits that are kept of it, as a new tensor in
        the dtype that is computed in."""
        self.check_whole()
        with self._turns.lock:
            pairs = [(param, self.state.get(param, {})) for param in self._params]
            return [on_shard(master, *pair) for pair in pairs]

    def memory(self) -> Usage:
        """Return the bytes of each buffer, in all and for each parameter, as the core's
        ``opt.memory()``; of DTensors, those of this process."""
        params = self._params
        buffers: dict[str, list[Tensor]] = {PARAM: list(params)}
        for param in params:
            for key, value in list(self.state.get(param, {}).items()):
                if isinstance(value, Tensor) and value.dim():
                    buffers.setdefault(key, []).append(value)
        buffers["copy"] = list((self.copy_to or {}).values())
        rows = [
            (name, kinds(shards), sum(t.numel() * t.element_size() for t in shards))
            for name, tensors in buffers.items()
            if (shards := list(map(local, tensors)))
        ]
        return Usage(sum(local(param).numel() for param in params), tuple(rows))

    @property
    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def kinds(tensors: Sequence[Tensor]) -> str:
    """Return the names of tensors' dtypes."""
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    return ", ".join(dict.fromkeys(names))


def check_copy(param: Tensor, copy: Tensor) -> None:
    """Check that steps can copy a parameter there."""
    if copy.dtype not in HALVES or param.dtype is not torch.float32:
        raise TypeError(
            f"copy_to has {copy.dtype} for a parameter of {param.dtype}; copies are "
            f"bfloat16 or float16, of parameters of float32"
        )
    if copy.shape != param.shape:
        raise ValueError(
            f"copy_to has shape {tuple(copy.shape)} for a parameter of shape "
            f"{tuple(param.shape)}"
        )
    divided_alike = is_dtensor(copy) == is_dtensor(param) and fits(copy, param)
    param, copy = local(param), local(copy)
    alike = divided_alike and same_layout(copy, param, copy.dtype)
    if not (param.is_cpu and is_dense(param) and alike):
        raise ValueError(
            "copy_to takes dense tensors of the CPU in the layout of their parameters, "
            "such as torch.empty_like(param, dtype=torch.bfloat16)"
        )
