"""What a run needs to go on exactly: saved as plain data, and checked on its return."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastopt.memory.arrays import to_host
from fastopt.memory.factored import kept_shape
from fastopt.memory.formats import DTYPES
from fastopt.memory.segments import Array
from fastopt.optimizer.accumulation import new_pending
from fastopt.optimizer.checks import check_decay, check_same_kind
from fastopt.optimizer.formats import PARAM, buffers_of, spelled
from fastopt.optimizer.state import fill, filling
from fastopt.rule import check_hyperparameter, shown
from fastopt.runtime.atomic import Call

if TYPE_CHECKING:
    from fastopt.optimizer.bindings import Bindings
    from fastopt.optimizer.parameters import Parameters, Part

FORMAT = 3
WITHOUT_NAMES = 2  # an older one, which was of format 3 but for the parameters' names
KEYS = (
    "format rule steps skipped switched_on params groups state carry ema_decay ema "
    "accumulated".split()
)


def save(opt: Bindings, take: Callable[[Array], Array] = to_host) -> dict[str, Any]:
    """Everything but the parameters, and the schedules: a copy, or what ``take`` makes
    of each array."""
    bound, pending = opt._bound, opt._pending
    bound.program.check_working()
    return {
        "format": FORMAT,
        "rule": opt.rule.name,
        "steps": opt.steps,
        "skipped": opt.skipped,
        "switched_on": sorted(bound.on),
        "params": [
            [[name, list(shape)] for name, shape in part] for part in bound.params.parts
        ],
        "groups": [
            {k: v for k, v in group.items() if not callable(v)}
            | {"frozen": group.frozen}
            for group in opt.groups
        ],
        "state": {
            name: list(map(take, arrays)) for name, arrays in bound.state.items()
        },
        "formats": formats_of(bound.params),
        "seed": opt.seed,
        "carry": bound.program.carried.tolist(),
        "ema_decay": opt.ema,
        "ema": None if opt.ema is None else list(map(take, bound.averages or ())),
        "accumulated": pending
        and [None if sums is None else take(sums) for sums in pending.gradients],
    }


def formats_of(params: Parameters) -> dict[str, dict[str, str]]:
    """Return the formats of the arrays that have any, by the arrays' names."""
    return {
        name: {stream: format.name for stream, format in chosen.items()}
        for part, chosen in zip(params.parts, params.chosen, strict=True)
        for name, _ in part
        if chosen
    }


Arrange: TypeAlias = Callable[[str, Sequence[Any]], Sequence[Any]]


def by_name(saved: Mapping[str, Any], opt: Bindings) -> Arrange:
    """Return a function that puts saved things, one for each parameter, into the order
    of an optimizer's own parameters, by name, whether in a FlatBuffer or not."""
    here, arrays = opt._bound.params.parts, opt._bound.params.arrays
    if saved["format"] == WITHOUT_NAMES or saved["params"] is None:
        return lambda what, items: items
    try:
        there = [
            [(as_name(name), tuple(map(operator.index, shape))) for name, shape in part]
            for part in saved["params"]
        ]
    except (TypeError, ValueError) as error:
        raise TypeError(
            'state["params"] must have for each array the names and shapes of its '
            "parts, as they were saved, or be None"
        ) from error
    check_formats(saved.get("formats"), formats_of(opt._bound.params), there)
    if there == here:
        return lambda what, items: in_shape_of(arrays, here, items)
    ours, theirs = ([name for part in p for name, _ in part] for p in (here, there))
    if sorted(ours) != sorted(theirs) or len(set(ours)) < len(ours):
        shapes_here, shapes_there = (
            [s for p in o for _, s in p] for o in (here, there)
        )
        alike = shapes_here == shapes_there
        advice = (
            ". If they are the same in this order, give them those names or, to "
            'load_state_dict, pass the state with state["params"] = None'
        )
        raise ValueError(
            f"the state is of the parameters {listed(theirs)}, but this optimizer has "
            f"{listed(ours)} (each after the number of its group){advice * alike}"
        )

    shapes = dict(one for part in here for one in part)
    for name, shape in (one for part in there for one in part):
        if shape != shapes[name]:
            raise ValueError(
                f"parameter {name} has shape {shape} in the state, but shape "
                f"{shapes[name]} in this optimizer"
            )

    def arrange(what: str, items: Sequence[Any]) -> list[Any]:
        check_sequence(what, items)
        if len(items) != len(there):
            raise ValueError(
                f"{what} has {len(items)} arrays for {len(there)} parameters"
            )
        pieces: dict[str, Any] = {}
        for part, item in zip(there, items, strict=True):
            pieces |= split(what, part, item)
        parts = [joined(what, part, pieces) for part in here]
        return list(in_shape_of(arrays, here, parts))

    return arrange


def in_shape_of(
    arrays: Sequence[Any], parts: Sequence[Sequence[Part]], items: Sequence[Any]
) -> Sequence[Any]:
    """Return saved arrays in the shapes of an optimizer's. Where one parameter is a
    segment by itself, that is flat in a FlatBuffer."""
    if not isinstance(items, (list, tuple)) or len(items) != len(arrays):
        return items  # which is refused later
    result = []
    for array, part, item in zip(arrays, parts, items, strict=True):
        shapes = {part[0][1], (math.prod(part[0][1]),)} if len(part) == 1 else set()
        got = item.shape if isinstance(item, np.ndarray) else None
        other = got in shapes and array.shape in shapes
        result.append(item.reshape(array.shape) if other else item)
    return result


def check_formats(
    saved: Any, ours: Mapping[str, Any], there: Sequence[Sequence[Part]]
) -> None:
    """Check that state was saved in the formats that it has here. States of older
    versions do not say in which; then the dtypes decide."""
    if saved is None:
        return
    if not isinstance(saved, Mapping):
        raise TypeError(f'state["formats"] must be a dict, got {shown(saved)}')
    names = [name for name, _ in itertools.chain(*there)]
    if extra := [name for name in saved if name not in names]:
        raise ValueError(
            f'state["formats"] has {shown(extra[0])}, but the state has the parameters '
            f"{listed(names)}"
        )
    for name in names:
        if saved.get(name, {}) != ours.get(name, {}):
            theirs, here = saved.get(name) or {}, ours.get(name) or {}
            if not isinstance(theirs, Mapping):
                raise TypeError(f'state["formats"][{name!r}] must be a dict')
            advice = "or use fastopt.convert_state"
            if theirs.get(PARAM) != here.get(PARAM):
                advice = "or see convert_state, master_params and load_master_params"
            raise ValueError(
                f"the state of parameter {name} has the formats "
                f"{spelled(theirs) or 'of plain state'}, but this optimizer has "
                f"{spelled(here) or 'plain state'}; make it with the formats that the "
                f"state was saved with, {advice}"
            )


def as_name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the name of a parameter must be a string, got {shown(value)}")
    return value


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def split(what: str, part: Sequence[Part], item: Any) -> dict[str, Any]:
    """A saved array of a segment as those of the arrays that were in it."""
    if len(part) == 1 or item is None:
        return {name: item for name, _ in part}
    sizes = [math.prod(shape) for _, shape in part]
    if not isinstance(item, np.ndarray) or item.shape != (sum(sizes),):
        raise ValueError(
            f"{what} must have an array of {sum(sizes)} elements for a FlatBuffer, got "
            f"{getattr(item, 'shape', type(item).__name__)}"
        )
    ends = np.cumsum(sizes, dtype=np.int64)[:-1]
    return {
        name: piece.reshape(shape)
        for piece, (name, shape) in zip(np.split(item, ends), part, strict=True)
    }


def joined(what: str, part: Sequence[Part], pieces: Mapping[str, Any]) -> Any:
    """The saved array for a segment, of those for the arrays that are in it."""
    arrays = [pieces[name] for name, _ in part]
    if len(part) == 1 or all(piece is None for piece in arrays):
        return arrays[0]
    for piece, (name, shape) in zip(arrays, part, strict=True):
        if piece is None:
            raise ValueError(
                f"{what} has nothing for {name}, but something for others that are in "
                f"one FlatBuffer with it here; load it where they are apart"
            )
        got = getattr(piece, "shape", type(piece).__name__)
        if got != shape or piece.dtype != arrays[0].dtype:
            raise ValueError(
                f"{what} of {name} has shape {got}, but the parameter has {shape}"
                if got != shape
                else f"{what} has dtype {piece.dtype} for {name}, {arrays[0].dtype} "
                f"for {part[0][0]}"
            )
    return np.concatenate([piece.reshape(-1) for piece in arrays])


def of_core(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved state, or the one inside a Lookahead's."""
    inner = saved.get("opt", saved)
    return inner if isinstance(inner, Mapping) else {}


def as_it_is(array: Array) -> Array:
    return array


def loading(opt: Bindings, saved: Mapping[str, Any]) -> Callable[..., None]:
    """Check a saved state and make everything ready. The result commits it all, and
    the calls that it is given, at the same instant."""
    opt._params.watch.check()
    saved = check(saved, opt)
    steps = operator.index(saved["steps"])
    groups = [dict(group) for group in saved["groups"]]
    frozen = [group.pop("frozen") for group in groups]
    values = [
        group.checked(changes, steps)
        for group, changes in zip(opt.groups, groups, strict=True)
    ]
    check_switches(saved, values, opt)
    # Exactly what was saved: a buffer of a switch that was off there is dropped.
    bound = opt._bind(
        values,
        on=frozenset(saved["switched_on"]),
        carried=saved["carry"],
        steps=steps,
    )
    pending = None
    if saved["accumulated"] is not None:
        pending = new_pending(opt._module, opt._params.likes)
        pending = pending.restored(saved["accumulated"])
    pairs = {
        name: list(zip(buffers, saved["state"][name], strict=True))
        for name, buffers in bound.state.items()
    }
    # The saved state does not say whether there was an estimate before the first step.
    # If there was, its buffer differs from a new one, and the first step must keep it.
    estimates = pairs[opt.rule.estimate[0]] if opt.rule.estimate is not None else []
    estimated = any(not np.array_equal(to_host(new), old) for new, old in estimates)
    for new, old in itertools.chain(*pairs.values()):
        fill(new, old)
    averages = zip(bound.averages or (), saved["ema"] or (), strict=True)
    calls = [filling(average, old) for average, old in averages]

    def commit(*also: Call) -> None:
        opt._commit(
            values,
            bound,
            frozen=frozen,
            also=[*calls, *also],
            ema=saved["ema_decay"],
            _pending=pending,
            _spare=None,
            _estimated=estimated,
            _skipped=operator.index(saved["skipped"]),
            _decider=None,
        )

    return commit


def check(saved: Any, opt: Bindings) -> Mapping[str, Any]:
    """A saved state against the optimizer that is to load it; in the order of its
    parameters."""
    rule, groups = opt.rule, opt.groups
    known = isinstance(saved, Mapping)
    got = list(saved) if known else type(saved).__name__
    wanted = f"expected a state_dict() with the keys {', '.join(KEYS)}; got {got}"
    if not known or "format" not in saved:
        raise TypeError(wanted)
    number = saved["format"]
    formats = (FORMAT, WITHOUT_NAMES)
    if not isinstance(number, (int, float, np.number)) or number not in formats:
        raise ValueError(
            f"the state has format {shown(number)}, this version of fastopt reads "
            f"{FORMAT} and {WITHOUT_NAMES}; load it with the version that saved it"
        )
    unnamed = {"params"} if saved["format"] == WITHOUT_NAMES else set()
    if any(key not in saved for key in {*KEYS} - unnamed):
        raise TypeError(wanted)
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
        if not isinstance(values.get("frozen"), (bool, np.bool_)):
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
    if len(set(on)) < len(on):
        raise ValueError(f'state["switched_on"] has a name twice: {shown(on)}')
    seed = saved.get("seed", opt.seed)
    draws = any(f.stochastic for chosen in opt._params.chosen for f in chosen.values())
    if not isinstance(seed, (int, np.integer)) or (draws and seed != opt.seed):
        raise ValueError(
            f"the state was saved with seed {shown(seed)}, but this optimizer has seed "
            f"{opt.seed}, so its steps would draw other random numbers; make it with "
            f"seed={shown(seed)}"
        )
    arranged = arrange(saved, opt)
    check_buffers(arranged, opt)
    return arranged


def check_switches(
    saved: Mapping[str, Any], values: Sequence[Mapping[str, Any]], opt: Bindings
) -> None:
    """Check that the state has the buffers that its hyperparameters need."""
    for name in sorted(opt.rule.switches - set(saved["switched_on"])):
        for i, group in enumerate(values):
            if group[name]:
                raise ValueError(
                    f"groups[{i}] would have {name} {shown(group[name])}, but the "
                    f"state lacks the buffers for it: {name} is not in its switched_on"
                )


def arrange(saved: Mapping[str, Any], opt: Bindings) -> Mapping[str, Any]:
    """A saved state in the order of an optimizer's parameters."""
    if not isinstance(saved["state"], Mapping):
        raise TypeError(f'state["state"] must be a dict, got {shown(saved["state"])}')
    order, carry = by_name(saved, opt), saved["carry"]
    if opt._bound.sets is opt._bound.params.set_of:  # a row for each segment
        carry = order('state["carry"]', carry)
    optional = {
        key: None if saved[key] is None else order(f'state["{key}"]', saved[key])
        for key in ("ema", "accumulated")
    }
    state = {
        name: order(f'state["{name}"]', arrays)
        for name, arrays in saved["state"].items()
    }
    return {**saved, **optional, "state": state, "carry": carry}


def check_buffers(saved: Mapping[str, Any], opt: Bindings) -> None:
    """The arrays and numbers of a saved state against the parameters."""
    rule, on = opt.rule, set(saved["switched_on"])
    chosen, likes = opt._params.chosen, opt._params.likes
    buffers = buffers_of(rule.variant(on).state, chosen)
    if set(saved["state"]) != set(buffers):
        raise ValueError(
            f"the state has buffers {list(saved['state'])}, but {rule.name} with "
            f"{sorted(on)} on keeps {list(buffers)}"
        )
    for buffer, arrays in saved["state"].items():
        models = list(map(buffers[buffer].model, chosen, likes))
        kinds = [model.dtype for model in models]
        shapes = [
            kept_shape(rule, param) if model is like else model.shape
            for param, model, like in zip(
                opt._params.arrays, models, likes, strict=True
            )
        ]
        check_arrays(f'state["{buffer}"]', arrays, opt, shapes=shapes, kinds=kinds)
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
    of_groups = opt._bound.sets is not opt._bound.params.set_of
    if len(carry) != rows and of_groups and all(len(row) == numbers for row in carry):
        there = "without a" if len(carry) == len(opt.groups) else "with a"
        there = "with another" if there == "with a" and opt._params.masked else there
        raise ValueError(
            f'state["carry"] has {len(carry)} rows, but this optimizer has {rows}: one '
            f"for each group and, with a weight_decay_mask, one more for what that "
            f"spares in a group. The state was saved {there} weight_decay_mask; make "
            f"the optimizer as it was then"
        )
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
    opt: Bindings,
    optional: bool = False,
    shapes: Sequence[tuple[int, ...]] | None = None,
    kinds: Sequence[np.dtype[Any]] | None = None,
) -> None:
    """Saved arrays, one for each parameter, in its shape and in the dtype that is
    computed in, if no others are given."""
    params = opt._bound.params
    check_sequence(name, arrays)
    if len(arrays) != len(params.arrays):
        raise ValueError(
            f"{name} has {len(arrays)} arrays for {len(params.arrays)} parameters"
        )
    shapes = shapes or [param.shape for param in params.arrays]
    kinds = kinds or [like.dtype for like in params.likes]
    for i, (array, of, param, shape, kind) in enumerate(
        zip(arrays, params.names, params.likes, shapes, kinds, strict=True)
    ):
        if array is None and optional:
            continue
        if not isinstance(array, np.ndarray) or array.dtype != kind:
            if {getattr(array, "dtype", None), kind} == {*DTYPES}:
                raise TypeError(
                    f"{name}[{i}] has dtype {array.dtype}, because it was saved for "
                    f"parameters that are computed in {array.dtype}, but {of} is "
                    f"computed in {kind}; load it for parameters of the dtype that "
                    f"they had then"
                )
            raise TypeError(
                f"{name}[{i}] must be a NumPy array of {kind}, which this optimizer "
                f"keeps, got {getattr(array, 'dtype', type(array).__name__)}; make it "
                f"with the formats that it was saved with"
            )
        if array.shape != shape:
            kept = "has" if shape == param.shape else "needs"
            raise ValueError(
                f"{name}[{i}] has shape {array.shape} but {of} {kept} {shape}"
            )


def check_sequence(name: str, value: Any) -> None:
    """Check that something is a list, or what some formats make of one."""
    listed = isinstance(value, (list, tuple)) or (
        isinstance(value, np.ndarray) and value.ndim
    )
    if not listed:
        raise TypeError(f"{name} must be a list, got {shown(value)}")
