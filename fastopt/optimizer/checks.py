"""What is accepted as parameters and gradients, and how a refusal reads: what was
wanted, what came, what to do. Everything here runs before anything is written."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain
from operator import is_
from typing import Any, TypeAlias

import numpy as np

from fastopt.memory.arrays import as_array, of_jax, read_only, span
from fastopt.memory.flat import FlatBuffer, check_nested
from fastopt.memory.formats import (
    COMPUTED,
    DTYPES,
    WANTED_DTYPES,
    computed,
    format_of,
)
from fastopt.memory.segments import Array
from fastopt.memory.trees import branches
from fastopt.rule import Rule, check_hyperparameter, shown
from fastopt.runtime.threads import MOST
from fastopt.step import FLAG, LIMIT, OPTIONS, Request, limits, plain

LIMITING = [*inspect.signature(limits).parameters]  # the options that it takes

Placed: TypeAlias = tuple[int, int, str]  # where an array begins and ends, its name

FIXED = {float, int, bool, str, type(None)}  # types of options that cannot change


def split_groups(params: Any) -> tuple[list[Any], list[dict[str, Any]] | None]:
    """Return the parameters of each group, and the hyperparameters that each sets for
    itself; without groups, all parameters as one part, and None."""
    is_groups = (
        isinstance(params, (list, tuple))
        and len(params) > 0
        and all(isinstance(g, Mapping) and "params" in g for g in params)
    )
    if not is_groups:
        return [params], None
    own = [{k: v for k, v in group.items() if k != "params"} for group in params]
    return [group["params"] for group in params], own


def check_meant(params: Any, hyperparameters: Mapping[str, Any]) -> None:
    """Refuse a list with a dict that sets a hyperparameter to a number. Such a dict is
    meant as a group, but it lacks "params"."""
    if not isinstance(params, (list, tuple)):
        return
    for i, group in enumerate(params):
        if isinstance(group, Mapping) and "params" not in group:
            for key in hyperparameters:
                if isinstance(group.get(key), (bool, int, float)):
                    raise TypeError(
                        f'params[{i}] sets {key} as a group does, but has no "params"; '
                        f"it has the keys {', '.join(map(repr, group))}"
                    )


def as_gradient(module: Any, name: str, value: Any, param: Any = None) -> Array:
    """Return what a backend's module makes of an array that is only read. A parameter
    without dimensions may have a NumPy scalar as its gradient, because NumPy's
    arithmetic returns such scalars."""
    without = param is None or param.ndim == 0
    if isinstance(value, np.generic) and without and module.as_array is as_array:
        array = np.asarray(value)
        array.flags.writeable = False  # zero_grads=True would not reach the scalar
        return array
    converted: Array = module.as_array(name, value)
    return converted


def check_layout(name: str, array: Array, updated: bool = False) -> None:
    """Check that an array is dense and in order, because kernels walk memory element by
    element. ``updated``: the array is written to, so a copy would not help."""
    flags = array.flags
    if not flags["C_CONTIGUOUS"]:
        advice = f"pass np.ascontiguousarray({name})"
        if updated:
            advice = "make the array that you use itself so, and pass it"
            if flags["F_CONTIGUOUS"]:
                advice += f", or pass its transpose, and that of its gradient: {name}.T"
            advice += " (a copy would be updated in place of yours)"
        raise ValueError(f"{name} is not C-contiguous; {advice}")
    if isinstance(array, np.ndarray) and not array.flags.aligned:
        advice = "allocate it anew" if updated else "pass a copy"
        raise ValueError(
            f"{name} is not aligned to its {array.dtype.itemsize}-byte elements; "
            f"{advice}"
        )


def check_params(
    names: Sequence[str],
    arrays: Sequence[Array],
    originals: Sequence[Any],
    formats: Set[str],
    like: tuple[str, np.dtype[Any]] | None = None,
    placed: list[Placed] | None = None,
) -> None:
    """Check the dtype, layout and writeability of every parameter, and that none
    overlap, neither each other nor those ``placed`` before, to which they are added.
    ``formats`` are those that the backend has. ``like`` is the name of one, and what is
    computed in for it, and so must be for these, if it is not the first of these."""
    placed = [] if placed is None else placed
    for name, array, original in zip(names, arrays, originals, strict=True):
        format, kind = format_of(array.dtype), computed(array.dtype)
        if format is not None and format.name not in formats:
            raise TypeError(
                f"{name} has dtype {array.dtype}, which this backend does not store; "
                f"convert it by .astype(np.float32), or use another backend"
            )
        if kind not in DTYPES:
            how = "convert it, such as by .astype(np.float32)"
            if array.dtype == "V2":  # what np.load makes of bfloat16
                how = "if it was bfloat16, call .view(ml_dtypes.bfloat16)"
            raise TypeError(
                f"{name} has dtype {array.dtype}; {WANTED_DTYPES} is needed: {how}"
            )
        first, wanted = like = like or (name, kind)
        if kind != wanted:
            raise TypeError(
                f"{name} has dtype {array.dtype} but {first} is computed in {wanted}; "
                f"use one optimizer for each dtype"
            )
        check_layout(name, array, updated=True)
        if read_only(original) or read_only(array):
            if of_jax(original):
                raise ValueError(
                    f"{name} is read-only, as all arrays of JAX are; use fastopt.jax, "
                    f"whose steps return new arrays, or pass a copy, np.array({name})"
                )
            raise ValueError(
                f"{name} is read-only, but parameters are updated in place; pass a "
                f"writeable NumPy array of the same memory (a tensor's .numpy()), or a "
                f"copy"
            )
    check_apart(names, arrays, placed)


def check_copies(
    names: Sequence[str],
    params: Sequence[Array],
    copies: Sequence[Array | None],
    originals: Sequence[Any],
    placed: list[Placed],
) -> None:
    """Check ``copy_to``: dtypes, shapes, layouts, writeability, and that no copy
    overlaps what is ``placed``."""
    there = []
    for name, param, copy, original in zip(
        names, params, copies, originals, strict=True
    ):
        if copy is None:
            continue
        of = name.replace("params", "copy_to", 1)
        there.append((of, copy))
        if param.dtype != COMPUTED or format_of(copy.dtype) is None:
            raise TypeError(
                f"{of} has dtype {copy.dtype}, and {name} has {param.dtype}; copies "
                f"are bfloat16 or float16, of parameters of float32"
            )
        if copy.shape != param.shape:
            raise ValueError(f"{of} has shape {copy.shape} but {name} {param.shape}")
        check_layout(of, copy, updated=True)
        if read_only(original) or read_only(copy):
            raise ValueError(f"{of} is read-only; pass an array that can be written to")
    check_apart([of for of, _ in there], [copy for _, copy in there], placed)


def check_apart(
    names: Sequence[str], arrays: Sequence[Array], placed: list[Placed]
) -> None:
    """Check that no arrays overlap, neither each other nor those ``placed`` before, to
    which they are added."""
    for name, array in zip(names, arrays, strict=True):
        begin, end = span(array)
        if begin == end:
            continue
        place = bisect_left(placed, (begin, end, name))
        placed.insert(place, (begin, end, name))
        around = placed[max(place - 1, 0) : place + 2]
        for (_, end, first), (begin, _, second) in zip(
            around, around[1:], strict=False
        ):
            if begin < end:
                raise ValueError(
                    f"{first} and {second} overlap in memory, so one would be updated "
                    f"twice; pass each parameter once"
                )


def spans_of(arrays: Iterable[Array]) -> list[tuple[int, int]]:
    """Return the addresses that arrays cover. Arrays without elements cover none."""
    return sorted((begin, end) for begin, end in map(span, arrays) if begin < end)


def check_grad(
    name: str, grad: Array, of: str, param: Array, spans: Sequence[tuple[int, int]]
) -> None:
    """Check a gradient against its parameter, and against all that a step writes, whose
    spans are in order and do not overlap each other."""
    if computed(grad.dtype) != computed(param.dtype):
        raise TypeError(
            f"{name} has dtype {grad.dtype} but {of} has {param.dtype}; "
            f"convert it with .astype"
        )
    if grad.shape != param.shape:
        raise ValueError(f"{name} has shape {grad.shape} but {of} has {param.shape}")
    check_layout(name, grad)
    begin, end = span(grad)
    last = bisect_left(spans, (end,)) - 1  # of those that begin before our end
    if begin < end and last >= 0 and spans[last][1] > begin:
        raise ValueError(
            f"{name} overlaps the parameters or their state in memory; pass a copy"
        )


class Fields(list[Any]):
    """The layouts of a namedtuple's fields."""

    def __init__(self, layouts: Mapping[str, Any]):
        super().__init__(layouts.values())
        self.names = tuple(layouts)


class Leaves(list[None]):
    """The layout of a list of arrays, in which no child needs a look of its own."""


def layout(tree: Any, level: int = 0) -> Any:
    """Return the shape of a tree of parameters for :func:`collect`: plain dicts and
    lists, and at the leaves None, or the layout of a FlatBuffer."""
    children = branches(tree, level)
    if children is None:
        if not isinstance(tree, FlatBuffer):
            return None
        # A step recognizes gradients by their layout, if it is the same object. For a
        # nested buffer it must check each array instead, so its layout is a copy.
        return tuple([*tree.shapes]) if tree.nested else tree.shapes
    layouts = {key: layout(child, level + 1) for key, child in children}
    if hasattr(tree, "_fields"):
        return Fields(layouts)
    if isinstance(tree, Mapping):
        return layouts
    listed = list(layouts.values())
    return Leaves(listed) if not any(child is not None for child in listed) else listed


def collect(
    tree: Any,
    grads: Any,
    path: str,
    gathered: list[Any],
    name: str = "grads",
    like: str = "params",
) -> None:
    """Append the leaves of ``grads`` in the order of ``tree``, a :func:`layout` that
    it must have; None stands for a whole branch of None."""
    if type(grads) is FlatBuffer and type(tree) in (dict, list, Leaves, Fields):
        grads = grads.views  # of one whose arrays are taken one by one
    if type(tree) is dict:
        if grads is None:
            grads = dict.fromkeys(tree)
        if not isinstance(grads, Mapping):
            raise TypeError(
                f"{name}{path} must be a dict like {like}{path}, "
                f"got {type(grads).__name__}"
            )
        if grads.keys() != tree.keys():
            lacking = [k for k in tree if k not in grads]
            extra = [k for k in grads if k not in tree]
            raise ValueError(
                f"{name}{path} must have the keys of {like}{path}: "
                + "; ".join(
                    f"{what} {', '.join(map(repr, keys))}"
                    for what, keys in (("it lacks", lacking), ("it has extra", extra))
                    if keys
                )
                + " (None leaves a parameter alone)"
            )
        try:
            children = [(key, child, grads[key]) for key, child in tree.items()]
        except KeyError as error:
            raise changed(name + path) from error
    elif isinstance(tree, list):
        if grads is None:
            grads = [None] * len(tree)
        if not isinstance(grads, (list, tuple)):
            raise TypeError(
                f"{name}{path} must be a list like {like}{path}, "
                f"got {type(grads).__name__}"
            )
        if len(grads) != len(tree):
            raise ValueError(
                f"{name}{path} has {len(grads)} entries but {like}{path} has "
                f"{len(tree)}; pass None for a parameter to leave alone"
            )
        if type(tree) is Leaves:  # a loop would be most of the time
            before = len(gathered)
            gathered.extend(grads)
            if len(gathered) - before != len(tree):
                raise changed(name + path)
            return
        if isinstance(tree, Fields):
            fields = getattr(grads, "_fields", tree.names)
            if fields != tree.names:
                raise ValueError(
                    f"{name}{path} has the fields {', '.join(fields)}, but "
                    f"{like}{path} has {', '.join(tree.names)}; pass them in that order"
                )
        try:
            children = list(zip(range(len(tree)), tree, grads, strict=True))
        except ValueError as error:
            raise changed(name + path) from error
    else:
        same_layout = type(grads) is FlatBuffer and grads.shapes == tree
        if same_layout:
            check_nested(grads, name + path)
        gathered.append(grads.data if same_layout else grads)
        return
    for key, child, grad in children:
        if child is None:  # most are; a call for each would be most of the time
            gathered.append(grad)
        else:
            collect(child, grad, f"{path}[{key!r}]", gathered, name, like)


def changed(name: str) -> ValueError:
    """Return the error for a tree that another thread changes while it is read."""
    return ValueError(f"{name} was changed while it was read; step again")


def split_tasks(name: str, tasks: Any) -> list[Any]:
    """Return the gradients of each of several tasks."""
    if isinstance(tasks, (list, tuple)):
        split = list(tasks)
    elif getattr(tasks, "shape", ()):
        split = [tasks[k] for k in range(tasks.shape[0])]
    else:
        raise TypeError(
            f"{name} must be a list with the gradients of each task, or an array with "
            f"a row for each, got {type(tasks).__name__}"
        )
    if not split:
        raise ValueError(f"{name} is empty; pass the gradients of at least one task")
    return split


def check_weights(
    value: Any, count: int, dtype: np.dtype[Any], name: str = "weights"
) -> list[float]:
    """Return a weight for each of so many tasks, as plain numbers."""
    try:
        weights = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers: {error}") from error
    if weights.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got {shown(value)}")
    if weights.shape != (count,):
        raise ValueError(
            f"{name} has shape {weights.shape}, but there are {count} tasks; pass one "
            f"number for each"
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite(weights.astype(dtype))
    for k in np.flatnonzero(~finite).tolist():
        raise ValueError(f"{name}[{k}] must be finite in {dtype}, got {weights[k]}")
    numbers: list[float] = weights.astype(np.float64).tolist()
    return numbers


def check_threads(threads: Any) -> int:
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads must be an integer or None, got {shown(threads)}")
    # No machine has more, and OpenMP ends a process whose threads it cannot start.
    if not 1 <= threads <= MOST:
        raise ValueError(f"threads must be from 1 to {MOST}, got {shown(threads)}")
    return int(threads)


def check_factor(value: Any, dtype: np.dtype[Any]) -> float:
    """Return a factor for gradients of this dtype, or raise if it is none."""
    number = float(check_hyperparameter("", "grad_scale", value, 1.0))
    if abs(number) > float(np.finfo(dtype).max):
        raise ValueError(f"grad_scale is {number!r}, too large for {dtype}")
    return number


def check_decay(name: str, value: Any) -> float | None:
    """Return the decay of a moving average, or raise if it is none."""
    if value is None:
        return None
    number = float(check_hyperparameter("", name, value, 1.0))
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), or None, got {shown(value)}")
    return number


def check_same_kind(name: str, value: Any, now: Any) -> None:
    """Check that a value is None if and only if it is None now."""
    if (value is None) != (now is None):
        raise ValueError(
            f"{name} is {shown(now)} and cannot become {shown(value)}: whether there "
            f"is one is decided when the optimizer is made"
        )


def check_count(name: str, value: Any, least: int) -> int:
    """Return it as an int, or raise if it is none or too small."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {shown(value)}")
    return int(value)


def check_limit(name: str, value: Any) -> float:
    """Return a bound for gradients; None means no bound."""
    if value is None:
        return math.inf
    return check_positive(name, value)


def check_positive(name: str, value: Any) -> float:
    """Return it as a float, or raise if it is no number above 0."""
    number = float(check_hyperparameter("", name, value, 1.0))
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {shown(value)}")
    return number


def check_choice(name: str, value: Any, *choices: str) -> str:
    """Return it if it is one of these words, or raise an error that names them."""
    if not isinstance(value, str) or value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        wanted = f"{', '.join(others)} or {last}"
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}")
    return str(value)


def check_option(name: str, value: Any) -> Any:
    """Return the value of an option of ``step`` as a Request has it, or raise."""
    if name not in OPTIONS:
        raise TypeError(
            f"step() got an unexpected keyword argument {name!r}; its options are "
            f"{', '.join(OPTIONS)}, and see help(step) for its other arguments"
        )
    kind = OPTIONS[name]
    if kind is LIMIT:
        return check_limit(name, value)
    if kind is FLAG:
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {shown(value)}")
        return bool(value)
    return check_choice(name, value, *kind)


def check_options(
    options: Mapping[str, Any], ema: float | None, threads: int
) -> Request:
    """Return the request of a step with these options. ``ema`` is the decay of the
    moving average of the parameters, if there is one."""
    if not options and ema is None:
        return plain(threads)
    checked = {name: check_option(name, value) for name, value in options.items()}
    of_limits = {name: checked.pop(name) for name in LIMITING if name in checked}
    weight = 0.0 if ema is None else 1 - ema
    return Request(
        **checked, limits=limits(**of_limits), ema_weight=weight, threads=threads
    )


class Requests:
    """The requests of steps. Most steps of a training ask for the same, by the same
    objects, which need not be checked again."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], Request] = (), plain(1)

    def of(
        self, options: Mapping[str, Any], ema: float | None, threads: int
    ) -> Request:
        """Return what :func:`check_options` does."""
        given = ema, threads, *chain.from_iterable(options.items())
        known, request = self._last
        if len(given) != len(known) or not all(map(is_, given, known)):
            request = check_options(options, ema, threads)
            if all(type(value) in FIXED for value in given):
                self._last = given, request
        return request


def check_decays(rule: Rule) -> None:
    """Check that a rule has something for a mask to switch off."""
    if "weight_decay" not in rule.hyperparameters:
        raise TypeError(
            f"{rule.name} has no weight_decay for a weight_decay_mask to spare"
        )


def check_writeable(names: Sequence[str], grads: Sequence[Array | None]) -> None:
    """Check that gradients can be set to zero: that they are writeable, and apart from
    each other."""
    placed = []
    for name, grad in zip(names, grads, strict=True):
        if grad is None:
            continue
        if read_only(grad):
            raise ValueError(
                f"{name} is read-only, but zero_grads=True writes to it; pass a "
                f"writeable array, or leave zero_grads out"
            )
        begin, end = span(grad)
        if begin < end:
            placed.append((begin, end, name))
    placed.sort()
    for (_, end, first), (begin, _, second) in zip(placed, placed[1:], strict=False):
        if begin < end:
            raise ValueError(
                f"{first} and {second} overlap in memory, and zero_grads=True would "
                f"set one to zero before it is read; pass copies"
            )
