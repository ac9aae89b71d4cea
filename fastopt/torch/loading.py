"""What ``load_state_dict`` refuses, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastopt.rule import Rule
from fastopt.torch.arguments import EXTRAS, PAIRS
from fastopt.torch.memory import Unsupported
from fastopt.torch.state import EMA, TRAINED, check_steps, has_begun

if TYPE_CHECKING:
    from fastopt.torch.step import Stepping

RULE = "rule"  # the key of its name, in a state_dict of a class that torch has not
BESIDE = {EMA, TRAINED}  # keys of a state that are not the rule's


def check(saved: Mapping[str, Any], opt: Stepping, own: Rule | None) -> None:
    """Check that a state is one of this optimizer. ``own``: its rule, if torch has no
    class of it."""
    kind, there = type(opt).__name__, saved.get(RULE)
    if there not in (None, own and own.name):
        here = f"of {own.name!r}" if own else "one of torch's classes"
        raise ValueError(
            f"the state is of rule {there!r}, but {kind} is {here}; nothing was loaded"
        )
    pairs = zip(saved["param_groups"], opt.param_groups, strict=False)
    options = {
        PAIRS.get(name, (name, 0))[0]
        for rule in opt._rules
        for name in rule.hyperparameters
    }
    if not opt._rules:  # its steps are torch's own, as Muon's
        options = {*opt.defaults} - {*EXTRAS} - {"differentiable"}  # which torch adds
    for number, group in enumerate(completed(opt, [theirs for theirs, _ in pairs])):
        for name in sorted(options - group.keys()):
            raise ValueError(
                f"param_groups[{number}] of the state has no {name!r}, which {kind} "
                f"needs; it is of another optimizer, and nothing was loaded"
            )
        key = opt._names.steps
        entries = [(index, saved["state"].get(index)) for index in group["indices"]]
        entries = [(i, state) for i, state in entries if isinstance(state, Mapping)]
        for index, state in entries:
            if key and state.get(key) is not None:
                check_steps(f"{key!r} in the state of parameter {index}", state[key])
        try:
            rule = opt._rule(group)
        except Unsupported:
            continue  # torch's own step knows what it needs
        for index, state in entries:
            if has_begun(state, rule, opt._names):
                foreign = own is not None and there is None
                check_keys(index, state, opt, rule, foreign)


def completed(opt: Stepping, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of saved groups with what torch adds to those of older versions."""
    copies = [{**g, "params": [], "indices": g["params"]} for g in groups]
    theirs: Any = next(
        cls for cls in type(opt).__mro__ if cls.__module__.startswith("torch.optim")
    )
    blank = theirs.__new__(theirs)
    blank.__setstate__(
        {"defaults": dict(opt.defaults), "state": {}, "param_groups": copies}
    )
    return copies


def check_keys(
    index: Any, state: Mapping[str, Any], opt: Stepping, rule: Rule, foreign: bool
) -> None:
    """Check the keys of a parameter's state. ``foreign``: those of other rules, too."""
    names = opt._names
    if names.steps is None:
        return  # torch's SGD begins its momentum at any time
    buffers = {names.key(name) for name in rule.state}
    if rule.factored and "row_var" in state:
        buffers = {"row_var", "col_var"}
    needed = {*buffers, names.steps, *names.carried(rule)}
    lacking = [key for key in sorted(needed) if state.get(key) is None]
    known = {names.key(name) for one in rule.all for name in one.state} | needed
    strange = sorted({*state} - known - BESIDE) if foreign else []
    if lacking or strange:
        what = f"lacks {', '.join(lacking)}" if lacking else f"has {strange}, too"
        raise ValueError(
            f"the state of parameter {index} {what}: {type(opt).__name__} keeps "
            f"{', '.join(sorted(needed))}; it is of another optimizer, and nothing was "
            f"loaded"
        )
