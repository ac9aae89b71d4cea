"""DeepSpeed's CPU optimizers on fastopt's kernels, without a compiler.

``DeepSpeedCPUAdam``, ``DeepSpeedCPULion`` and ``DeepSpeedCPUAdagrad`` compile C++ when
the first of them is made, and call it for each tensor. This module has the functions
of that C++, and ``install()`` lets the classes load it in its place. They remain
DeepSpeed's own classes, so each check of an optimizer's type passes, and configurations
need no change.

Parameters, gradients and state may be float32, bfloat16 or float16, in any combination;
kernels compute in float32. The results agree with those of DeepSpeed up to rounding.
What differs:

- The bits depend neither on the number of threads nor on the instruction set, and they
  are those of ``fastopt.torch``. The number of threads is chosen as there, too
  (docs/threads.md), and is at most torch's.
- Hyperparameters are rounded to float32 after powers and differences such as
  ``1 - beta2`` have been computed, not before.
- Lion does not move a parameter whose momentum and gradient are 0, as in the paper.
- Adagrad only reads the gradients.
- bfloat16 is vectorized on every instruction set.
- A rollback inverts the step that was made: Adam's or AdamW's, with or without bias
  correction. Gradients that are not finite cannot be undone and are refused.
- What cannot be right is an error before anything is written: a gradient of another
  shape, a tensor with gaps, memory that overlaps, an unknown dtype, a hyperparameter
  out of range.
- ZenFlow's ``overlap_step`` needs DeepSpeed's C++, whose functions for it are not here.

Examples
--------
>>> import fastopt.deepspeed
>>> fastopt.deepspeed.install()                                     # doctest: +SKIP
>>> opt = deepspeed.ops.adam.DeepSpeedCPUAdam(params, lr=1e-3)      # doctest: +SKIP
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt import native, rules
from fastopt.memory.segments import Array
from fastopt.portable import portable
from fastopt.rule import Rule, shown
from fastopt.runtime import threads
from fastopt.torch.memory import check_memory, is_dense, same_layout, simple

__all__ = [
    "adagrad_update",
    "adam_rollback",
    "adam_update",
    "create_adagrad",
    "create_adam",
    "create_lion",
    "destroy_adagrad",
    "destroy_adam",
    "destroy_lion",
    "install",
    "lion_update",
    "uninstall",
]

# The classes of DeepSpeed's that load its compiled optimizers.
BUILDERS = "CPUAdamBuilder", "CPUAdagradBuilder", "CPULionBuilder"
# The formats of fastopt.h.
FORMATS = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 4}
# As the number of a step it makes bias correction vanish, for every beta below 1.
LAST = 1 << 62
BLOCK = 1 << 16  # elements that a rollback converts to float64 at a time

_rules: dict[tuple[str, int], Rule] = {}  # by the kind and the number of an optimizer
# Of each builder that was changed, what its class itself had as "load".
_changed: dict[Any, Any] = {}


# What DeepSpeed calls -----------------------------------------------------------------


def create_adam(
    optimizer_id: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    adamw_mode: bool,
    should_log: bool,
) -> int:
    """Make an optimizer of this number: Adam, or AdamW if ``adamw_mode`` is True. The
    hyperparameters are those of each update, not these."""
    return _create(
        "adam", optimizer_id, ("adam", "adamw")[bool(adamw_mode)], should_log
    )


def adam_update(
    optimizer_id: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
) -> int:
    """Update a tensor of parameters and its state, in place.

    Parameters
    ----------
    optimizer_id
        The number that ``create_adam`` got.
    step
        The number of this step, from 1. It may be any, such as after a resume.
    lr, beta1, beta2, eps, weight_decay, bias_correction
        Hyperparameters of this step. Without ``bias_correction`` the averages are used
        as they are, which makes the first steps smaller.
    params, exp_avg, exp_avg_sq
        CPU tensors of one shape without gaps in memory, of float32, bfloat16 or
        float16.
    grads
        The gradient, of that shape and one of these dtypes.

    Returns
    -------
    0

    Raises
    ------
    TypeError, ValueError, RuntimeError
        For anything that does not fit, before anything is written.
    """
    rule = _rule("adam", optimizer_id)
    values = _of_adam(lr, beta1, beta2, eps, weight_decay)
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    t = _count(step) if bias_correction else _last(step)
    return _step(rule, t, values, params, grads, state)


def adam_rollback(
    optimizer_id: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
) -> int:
    """Undo the step of this number: ``adam_update`` with the same arguments.

    The earlier numbers come back up to rounding in float32, so all tensors must be
    float32. The rounding is that of the numbers after the step: if its gradient was 1e3
    times as large as those before, averages of squares lose six of their seven digits.
    ``beta1`` and ``beta2`` must be above 0, and ``lr * weight_decay`` of AdamW below 1.

    Returns
    -------
    0

    Raises
    ------
    TypeError, ValueError, RuntimeError
        For anything that does not fit. FloatingPointError where the result would not be
        finite, such as after a step with gradients that were not. Nothing is written.

    Examples
    --------
    >>> import torch, fastopt.deepspeed as ops
    >>> p, g = torch.ones(3), torch.full((3,), 0.5)
    >>> m, v = torch.zeros(3), torch.zeros(3)
    >>> ops.create_adam(0, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
    0
    >>> ops.adam_update(0, 1, 0.25, 0.9, 0.999, 1e-8, 0.0, True, p, g, m, v)
    0
    >>> ops.adam_rollback(0, 1, 0.25, 0.9, 0.999, 1e-8, 0.0, True, p, g, m, v)
    0
    >>> p
    tensor([1., 1., 1.])
    >>> ops.destroy_adam(0)
    0
    """
    rule = _rule("adam", optimizer_id)
    t = _count(step) if bias_correction else _last(step)
    values = _of_adam(lr, beta1, beta2, eps, weight_decay)
    _hyperparameters(rule, values)
    named = {"params": params, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    named = _checked(params, grads, named)
    for name, tensor in named.items():
        if tensor.dtype != torch.float32:
            raise TypeError(
                f"a rollback needs float32 tensors, because others have lost the bits "
                f"that would come back; {name} is {tensor.dtype}"
            )
    _check_apart(named)
    if not (beta1 > 0 and beta2 > 0):
        raise ValueError(
            f"a rollback needs beta1 and beta2 above 0, got {beta1!r} and {beta2!r}: "
            f"averages with beta 0 have forgotten what they were"
        )
    numbers = portable(rule.scalars)(t, *values)
    scalars = np.array(numbers, np.float32).tolist()
    if rule is rules.adamw and scalars[-1] >= 1:
        raise ValueError(
            f"a rollback needs lr * weight_decay below 1, got {scalars[-1]!r}"
        )
    flat = [
        tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in named.values()
    ]
    for write in (False, True):
        for first in range(0, params.numel(), BLOCK):
            blocks = [tensor[first : first + BLOCK] for tensor in flat]
            new = _before(rule, scalars, *[block.double() for block in blocks])
            for block, numbers in zip((blocks[0], *blocks[2:]), new, strict=True):
                if write:
                    block.copy_(numbers)
                elif not bool(torch.isfinite(numbers.float()).all()):
                    raise FloatingPointError(
                        "a step with gradients, parameters or state that are not "
                        "finite cannot be undone; load a checkpoint, or set "
                        "gradient_clipping, so that DeepSpeed checks first"
                    )
    return 0


def _of_adam(
    lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any
) -> tuple[float, ...]:
    """Return Adam's hyperparameters in the order of its rule."""
    given = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
    return _numbers(**given, weight_decay=weight_decay)


def _before(
    rule: Rule, scalars: list[float], p: Tensor, g: Tensor, m: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters and state as they were before a step. All is float64, but the
    scalars are those of float32 that the step was made with."""
    size, a1, a2, eps, decay = scalars
    p = p + size * m / (v.sqrt() + eps)
    if rule is rules.adamw:
        p = p / (1 - decay)
    else:
        g = g + decay * p
    v = (v - a2 * g * g) / (1 - a2)
    return p, (m - a1 * g) / (1 - a1), v.clamp_(min=0)


def destroy_adam(optimizer_id: int) -> int:
    """Forget the optimizer of this number."""
    return _destroy("adam", optimizer_id)


def create_adagrad(
    optimizer_id: int, lr: float, eps: float, weight_decay: float, should_log: bool
) -> int:
    """Make an optimizer of this number; see ``create_adam``."""
    return _create("adagrad", optimizer_id, "adagrad", should_log)


def adagrad_update(
    optimizer_id: int,
    step: int,
    lr: float,
    eps: float,
    weight_decay: float,
    params: Tensor,
    grads: Tensor,
    exp_avg_sq: Tensor,
) -> int:
    """Update a tensor of parameters and its sum of squares; see ``adam_update``."""
    rule, values = _rule("adagrad", optimizer_id), _numbers(lr=lr)
    values += (0.0, *_numbers(weight_decay=weight_decay), 0.0, *_numbers(eps=eps))
    state = {"exp_avg_sq": exp_avg_sq}
    return _step(rule, _count(step), values, params, grads, state)


def destroy_adagrad(optimizer_id: int) -> int:
    """Forget the optimizer of this number."""
    return _destroy("adagrad", optimizer_id)


def create_lion(
    optimizer_id: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    should_log: bool,
) -> int:
    """Make an optimizer of this number; see ``create_adam``."""
    return _create("lion", optimizer_id, "lion", should_log)


def lion_update(
    optimizer_id: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
) -> int:
    """Update a tensor of parameters and its momentum; see ``adam_update``."""
    rule = _rule("lion", optimizer_id)
    values = _numbers(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
    state = {"exp_avg": exp_avg}
    return _step(rule, _count(step), values, params, grads, state)


def destroy_lion(optimizer_id: int) -> int:
    """Forget the optimizer of this number."""
    return _destroy("lion", optimizer_id)


def __getattr__(name: str) -> Any:
    hint = ""
    if name.startswith("zenflow_adam"):
        hint = (
            "; ZenFlow's overlapped steps are made by DeepSpeed's C++ only: set "
            "overlap_step to false, or call fastopt.deepspeed.uninstall() first"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")


EXAMPLE = """

    Examples
    --------
    >>> import torch, fastopt.deepspeed as ops
    >>> p, g, s, s2 = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
    >>> ops.create_{kind}(0, 0.25, {numbers}, False)
    0
    >>> ops.{kind}_update(0, 1, 0.25, {numbers}, p, g, {state})
    0
    >>> p
    tensor([0.7500, 0.7500, 0.7500])
    >>> ops.destroy_{kind}(0)
    0
    """

for _kind, _numbers_of, _state in (
    ("adam", "0.9, 0.999, 1e-8, 0.0, True", "s, s2"),
    ("adagrad", "0.0, 0.0", "s"),
    ("lion", "0.9, 0.99, 0.0", "s"),
):
    for _name in (f"create_{_kind}", f"{_kind}_update", f"destroy_{_kind}"):
        globals()[_name].__doc__ += EXAMPLE.format(
            kind=_kind, numbers=_numbers_of, state=_state
        )


# In DeepSpeed's place -----------------------------------------------------------------


def install() -> None:
    """Let DeepSpeed's CPU optimizers that are made from now on use this module.

    Changes this process only. A process that DeepSpeed starts, as SuperOffload does,
    imports the main script again: call this at its top level, not below
    ``if __name__ == "__main__"``. On an accelerator for which DeepSpeed has no builder
    of an optimizer, that optimizer still raises DeepSpeed's error.

    Raises
    ------
    ModuleNotFoundError
        If deepspeed is not installed.
    RuntimeError
        If fastopt's kernels have not been compiled; the message says how to get them.

    Examples
    --------
    >>> import fastopt.deepspeed
    >>> from deepspeed.ops.op_builder import CPUAdamBuilder
    >>> fastopt.deepspeed.install()
    >>> CPUAdamBuilder().load() is fastopt.deepspeed
    True
    >>> fastopt.deepspeed.uninstall()
    """
    native.table()
    op_builder = importlib.import_module("deepspeed.ops.op_builder")
    ours = sys.modules[__name__]

    def load(self: Any, verbose: bool = True) -> Any:
        return ours

    for name in BUILDERS:
        builder = getattr(op_builder, name)
        # Accelerators share one class for all that they do not have.
        if builder.__name__ == name and builder not in _changed:
            _changed[builder] = vars(builder).get("load")
            builder.load = load


def uninstall() -> None:
    """Let DeepSpeed's optimizers that are made from now on use its own C++ again.

    Examples
    --------
    >>> import fastopt.deepspeed
    >>> fastopt.deepspeed.install()
    >>> fastopt.deepspeed.uninstall()
    """
    while _changed:
        builder, before = _changed.popitem()
        if before is None:
            del builder.load
        else:
            builder.load = before


def _create(kind: str, optimizer_id: int, name: str, should_log: bool) -> int:
    api = native.functions()
    _most_threads.cache_clear()  # the process may have been moved to other CPUs
    _rules[kind, optimizer_id] = getattr(rules, name)
    if should_log:
        print(f"{name} optimizer #{optimizer_id}: fastopt, {api.isa.decode()}")
    return 0


def _destroy(kind: str, optimizer_id: int) -> int:
    _rules.pop((kind, optimizer_id), None)
    return 0


def _rule(kind: str, optimizer_id: int) -> Rule:
    rule = _rules.get((kind, optimizer_id))
    if rule is None:
        raise ValueError(
            f"there is no {kind} optimizer #{optimizer_id!r}; call "
            f"create_{kind}({optimizer_id!r}, ...) first"
        )
    return rule


# A step -------------------------------------------------------------------------------


@functools.cache
def _most_threads() -> tuple[int, bool, bool]:
    """Return how many threads a step may use, whether the user has chosen so for
    fastopt, and whether torch has a 1 that only a launcher has set."""
    chosen = bool(threads.own_number())
    return threads.available(), chosen, threads.launched_with_one()


def _threads() -> int:
    """Return how many threads a step uses: not more than torch, as DeepSpeed's own."""
    most, chosen, launched = _most_threads()
    now: int = torch.get_num_threads()
    return most if chosen or (now == 1 and launched) else min(most, now)


@functools.cache
def _found(rule: Rule) -> int:
    """Return the address of a rule in the table."""
    return int(native.functions().find(rule.name.encode()))


@functools.lru_cache(maxsize=64)  # all tensors of a step have the same
def _hyperparameters(rule: Rule, values: tuple[float, ...]) -> tuple[Array, int]:
    """Return checked hyperparameters as the table takes them, and their address."""
    named = dict(zip(rule.hyperparameters, values, strict=True))
    numbers = native.hyperparameters(rule, **named)
    return numbers, numbers.ctypes.data


def _numbers(**given: Any) -> tuple[float, ...]:
    """Return numbers of Python's, of numbers or tensors of one element."""
    for name, value in given.items():
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
    return tuple(map(float, given.values()))


def _count(step: Any) -> int:
    """Return the number of a step, which a checkpoint may have made a tensor."""
    if isinstance(step, bool) or not hasattr(step, "__int__"):
        raise TypeError(f"step must be a whole number, got {shown(step)}")
    count = int(step)
    if count != step or not 1 <= count < LAST:
        raise ValueError(
            f"step must be a whole number of at least 1, got {shown(step)}"
        )
    return count


def _last(step: Any) -> int:
    """Check the number of a step; return that of one without bias correction."""
    _count(step)
    return LAST


def _step(
    rule: Rule,
    t: int,
    values: tuple[float, ...],
    params: Tensor,
    grads: Tensor,
    state: Mapping[str, Tensor],
) -> int:
    """Update a tensor and its state, and return 0."""
    numbers, address = _hyperparameters(rule, values)
    named = _checked(params, grads, {"params": params, **state})
    streams = (native.Stream * len(named))()
    for stream, tensor in zip(streams, named.values(), strict=True):
        stream.format = FORMATS[tensor.dtype]
        stream.parts[0] = tensor.data_ptr()
    n = params.numel()
    if n == 0:
        return 0
    segment = native.Streams(ctypes.addressof(streams), n, 0, 0)
    request = native.Request(
        ctypes.sizeof(native.Request), _threads(), 0.0, 0, None, None
    )
    table = native.functions()
    code = table.step_streams(
        *(_found(rule), 0, t, address, 1, None),
        *(ctypes.addressof(segment), 1, 1.0, ctypes.addressof(request)),
    )
    if code:
        raise ValueError(
            f"{table.error(code).decode()}: {', '.join(named)} of {n} elements; "
            f"nothing was updated"
        )
    return 0


def _check_apart(named: Mapping[str, Tensor]) -> None:
    """Check that dense tensors do not overlap."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in named.items()
        if tensor.numel()
    )
    for (_, end, first), (begin, _, second) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ValueError(
                f"{first} and {second} overlap in memory; pass tensors that are apart. "
                f"Nothing was updated"
            )


def _checked(
    params: Tensor, grads: Tensor, named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check tensors. Return parameters, gradient and state by name; the gradient as it
    is or, where its elements are in another order, a copy."""
    (first, _), *state = named.items()
    others = [grads, *(tensor for _, tensor in state)]
    tensors = all(isinstance(tensor, Tensor) for tensor in others)
    usual = tensors and all(simple([params] * len(others), others))  # and alike
    if usual and params.dtype == torch.float32:
        return {first: params, "grads": grads, **named}
    for name, tensor in {**named, "grads": grads}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {shown(tensor)}")
        if not tensor.is_cpu:
            raise ValueError(
                f"{name} is on {tensor.device}, but must be on the CPU; set "
                f"offload_optimizer to cpu in DeepSpeed's configuration"
            )
        check_memory(name, tensor)
        if tensor.dtype not in FORMATS:
            kinds = ", ".join(str(dtype).partition(".")[2] for dtype in FORMATS)
            raise TypeError(f"{name} must be one of {kinds}, got {tensor.dtype}")
        if tensor.shape != params.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but params has "
                f"{tuple(params.shape)}"
            )
    for name, tensor in named.items():
        if not is_dense(tensor) or not same_layout(tensor, params, tensor.dtype):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} "
                f"must be without gaps in memory, in the order of params, with strides "
                f"{params.stride()}; pass contiguous tensors"
            )
    if not same_layout(grads, params, grads.dtype):
        # Dense tensors keep their strides in one like them.
        grads = torch.empty_like(params, dtype=grads.dtype).copy_(grads)
    return {first: params, "grads": grads, **named}
