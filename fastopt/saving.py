"""What a run needs to go on exactly: saved as plain data, and checked on its return."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.checks import check_decay, check_same_kind
from fastopt.factored import kept_shape
from fastopt.flat import Array
from fastopt.rule import check_hyperparameter, shown

if TYPE_CHECKING:
    from fastopt.optimizer import Optimizer

FORMAT = 2
KEYS = (
    "format rule steps skipped switched_on groups state carry ema_decay ema "
    "accumulated".split()
)


def save(opt: Optimizer) -> dict[str, Any]:
    """A copy of everything but the parameters, and the schedules."""
    bound, pending = opt._bound, opt._pending
    return {
        "format": FORMAT,
        "rule": opt.rule.name,
        "steps": opt.steps,
        "skipped": opt.skipped,
        "switched_on": sorted(bound.on),
        "groups": [
            {k: v for k, v in group.items() if not callable(v)}
            | {"frozen": group.frozen}
            for group in opt.groups
        ],
        "state": {
            name: list(map(to_host, arrays)) for name, arrays in bound.state.items()
        },
        "carry": bound.carried.tolist(),
        "ema_decay": opt.ema,
        "ema": None if opt.ema is None else list(map(to_host, bound.averages or ())),
        "accumulated": pending
        and [
            to_host(array) if given else None
            for array, given in zip(pending.sums, pending.given, strict=True)
        ],
    }


def to_host(array: Any) -> Array:
    host: Array = array.copy_to_host() if hasattr(array, "copy_to_host") else array
    return np.array(host)


def check(saved: Any, opt: Optimizer) -> None:
    """A saved state against the optimizer that is to load it."""
    rule, groups = opt.rule, opt.groups
    if not isinstance(saved, Mapping) or any(key not in saved for key in KEYS[:1]):
        got = list(saved) if isinstance(saved, Mapping) else type(saved).__name__
        raise TypeError(
            f"expected a state_dict() with the keys {', '.join(KEYS)}; got {got}"
        )
    number = saved["format"]
    if not isinstance(number, (int, float, np.number)) or number != FORMAT:
        raise ValueError(
            f"the state has format {shown(number)}, this version of fastopt reads "
            f"{FORMAT}; load it with the version that saved it"
        )
    if any(key not in saved for key in KEYS):
        raise TypeError(
            f"expected a state_dict() with the keys {', '.join(KEYS)}; "
            f"got {list(saved)}"
        )
    if not isinstance(saved["rule"], str) or saved["rule"] != rule.name:
        raise ValueError(
            f"the state is of rule {shown(saved['rule'])}, this optimizer's is "
            f"{rule.name!r}"
        )
    for key in ("steps", "skipped"):
        try:
            valid = 0 <= operator.index(saved[key]) < 2**62
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(
                f'state["{key}"] must be an integer >= 0, got {shown(saved[key])}'
            )
    check_sequence('state["groups"]', saved["groups"])
    if len(saved["groups"]) != len(groups):
        raise ValueError(
            f"the state has {len(saved['groups'])} groups, this optimizer has "
            f"{len(groups)}"
        )
    for i, (group, values) in enumerate(zip(groups, saved["groups"], strict=True)):
        if not isinstance(values, Mapping):
            raise TypeError(f'state["groups"][{i}] must be a dict, got {shown(values)}')
        if not isinstance(values.get("frozen"), bool):
            raise TypeError(f'state["groups"][{i}]["frozen"] must be True or False')
        for key in group:
            if key not in values and not callable(group[key]):
                raise ValueError(
                    f"the state has no {key} for groups[{i}], where it was a schedule; "
                    f"set one here too before loading"
                )
    on = saved["switched_on"]
    if not isinstance(on, Set):
        check_sequence('state["switched_on"]', on)
    if not all(isinstance(name, str) and name in rule.switches for name in on):
        raise ValueError(
            f'state["switched_on"] is {shown(on)}, of which {rule.name} '
            f"knows {sorted(rule.switches)}"
        )
    check_buffers(saved, opt)


def check_buffers(saved: Mapping[str, Any], opt: Optimizer) -> None:
    """The arrays and numbers of a saved state against the parameters."""
    rule, on = opt.rule, set(saved["switched_on"])
    buffers = rule.variant(on).state
    if not isinstance(saved["state"], Mapping):
        raise TypeError(f'state["state"] must be a dict, got {shown(saved["state"])}')
    if set(saved["state"]) != set(buffers):
        raise ValueError(
            f"the state has buffers {list(saved['state'])}, but {rule.name} with "
            f"{sorted(on)} on keeps {list(buffers)}"
        )
    for buffer, arrays in saved["state"].items():
        shapes = [kept_shape(rule, param) for param in opt._bound.params.arrays]
        check_arrays(f'state["{buffer}"]', arrays, opt, shapes=shapes)
    if (saved["ema"] is None) != (opt.ema is None):
        here, there = ("none", "one") if opt.ema is None else ("one", "none")
        raise ValueError(
            f"the state has {there} of the parameters' moving averages, this "
            f"optimizer {here}; make it with the ema that it was saved with"
        )
    check_same_kind("ema_decay", saved["ema_decay"], opt.ema)
    check_decay("ema_decay", saved["ema_decay"])
    if saved["ema"] is not None:
        check_arrays('state["ema"]', saved["ema"], opt)
    if saved["accumulated"] is not None:
        check_arrays('state["accumulated"]', saved["accumulated"], opt, optional=True)
    rows, numbers = len(opt._bound.sets), len(rule.carry)
    carry = saved["carry"]
    check_sequence('state["carry"]', carry)
    for i, row in enumerate(carry):
        check_sequence(f'state["carry"][{i}]', row)
    if len(carry) != rows or any(len(row) != numbers for row in carry):
        raise ValueError(
            f'state["carry"] must have {rows} rows of {numbers} numbers, '
            f"got {shown(carry)}"
        )
    for row in carry:
        for number in row:
            if not isinstance(number, float):
                check_hyperparameter("", 'state["carry"]', number, 1.0)


def check_arrays(
    name: str,
    arrays: Sequence[Any],
    opt: Optimizer,
    optional: bool = False,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> None:
    """Saved arrays, one for each parameter, in its shape if no other is given."""
    params = opt._bound.params
    check_sequence(name, arrays)
    if len(arrays) != len(params.arrays):
        raise ValueError(
            f"{name} has {len(arrays)} arrays for {len(params.arrays)} parameters"
        )
    shapes = shapes or [param.shape for param in params.arrays]
    for i, (array, of, param, shape) in enumerate(
        zip(arrays, params.names, params.arrays, shapes, strict=True)
    ):
        if array is None and optional:
            continue
        if not isinstance(array, np.ndarray) or array.dtype != param.dtype:
            raise TypeError(
                f"{name}[{i}] must be a NumPy array of {param.dtype}, as it was saved, "
                f"got {getattr(array, 'dtype', type(array).__name__)}"
            )
        if array.shape != shape:
            kept = "has" if shape == param.shape else "needs"
            raise ValueError(
                f"{name}[{i}] has shape {array.shape} but {of} {kept} {shape}"
            )


def check_sequence(name: str, value: Any) -> None:
    """That something is a list, or what some formats make of one."""
    listed = isinstance(value, (list, tuple)) or (
        isinstance(value, np.ndarray) and value.ndim
    )
    if not listed:
        raise TypeError(f"{name} must be a list, got {shown(value)}")
