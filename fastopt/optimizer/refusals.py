"""Error messages of the tools around an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MappingView
from typing import Any, NoReturn

from fastopt import advice
from fastopt.memory.flat import FlatBuffer
from fastopt.memory.trees import leaves
from fastopt.optimizer.checks import check_count
from fastopt.rule import Rule, shown
from fastopt.step import OPTIONS

# Arguments of an optimizer's step, and of the optimizer itself.
OF_STEP = (*OPTIONS, "grad_scale", "weights")
OF_OPTIMIZER = (
    *("backend", "threads", "ema", "weight_decay_mask", "formats", "copy_to"),
    *("seed", "reduce"),
)
RETURNS = "value_and_grad(params) -> (loss, grads)"


def of_torch(value: Any) -> bool:
    """Whether this is an optimizer of torch's, or a class of them."""
    kind = value if isinstance(value, type) else type(value)
    return any(base.__module__.startswith("torch.optim") for base in kind.__mro__)


def named(value: Any) -> str:
    """Describe an argument in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if of_torch(value):  # whose representation has many lines
        return type(value).__name__
    return shown(value)


def no_optimizer(opt: Any, instead: str, wanted: str = "an optimizer") -> TypeError:
    """Return the error for what is not an optimizer of the core. ``instead`` is the
    advice for one of torch."""
    if of_torch(opt):
        advice = f"; for one of torch's, those of fastopt.torch among them, {instead}"
    elif isinstance(opt, (type, Rule)) or callable(opt):
        advice = "; call it with parameters first, as in fastopt.adam(params)"
    else:
        advice = "; make one of parameters, as in fastopt.adam(params)"
    return TypeError(f"opt must be {wanted} of fastopt, got {named(opt)}{advice}")


def no_parameter(value: Any) -> NoReturn:
    """Raise the error for a tensor that is not one of an optimizer's parameters."""
    shape = getattr(value, "shape", None)
    got = named(value) if shape is None else f"a {type(value).__name__} of {shape}"
    raise TypeError(
        f"param must be one of the optimizer's parameters, the same object, got {got}, "
        f"which is in none of its param_groups"
    )


def is_function(value: Any) -> bool:
    """Whether this is a function of numbers. Rules and classes make objects instead."""
    return callable(value) and not isinstance(value, (type, Rule))


def check_function(name: str, value: Any, call: str) -> None:
    if not is_function(value):
        raise TypeError(f"{name} must be a function, {call}, got {named(value)}")


def check_rule(name: str, value: Any) -> None:
    """Check that this is a rule, not its name, a class or an optimizer."""
    if not isinstance(value, Rule):
        raise TypeError(
            f"{name} must be a rule, got {named(value)}; pass one of fastopt.RULES, "
            f"such as fastopt.adamw, or a fastopt.Rule of your own"
        )


def where_option(rule: Rule, name: str) -> str:
    """Say where a name belongs that is an option, and not a hyperparameter; "" if it is
    none."""
    if name in OF_STEP:
        return f"; {name} is an argument of step: opt.step(grads, {name}=...)"
    if name in OF_OPTIMIZER:
        return (
            f"; {name} is for all groups together, and is given when the optimizer is "
            f"made: {rule.name}(params, {name}=...)"
        )
    return ""


# Attributes that optimizers of other libraries have.
ATTRIBUTES = {
    "zero_grad": (
        "gradients are arguments of step, so there are none to forget; "
        "step(grads, zero_grads=True) sets those arrays to zero when it has read them"
    ),
    "param_groups": "opt.groups has the hyperparameters of each group",
    "defaults": "opt.groups has the hyperparameters of each group",
    "update": "opt.step(grads) updates the parameters in place",
    "apply_gradients": "opt.step(grads) updates the parameters in place",
    "params": "an optimizer updates in place the arrays that it was made with",
    "parameters": "an optimizer updates in place the arrays that it was made with",
}


def no_attribute(opt: Any, name: str, hyperparameters: Iterable[str]) -> AttributeError:
    """Return the error for an attribute that an optimizer does not have."""
    more = ""
    if name in ATTRIBUTES:
        more = f"; {ATTRIBUTES[name]}"
    elif not name.startswith("_"):  # programs look for such names
        public = [known for known in dir(type(opt)) if not known.startswith("_")]
        more = advice.hint(name, [*hyperparameters, *public], "opt.")
    return AttributeError(f"{type(opt).__name__} has no attribute {name!r}{more}")


def check_names(
    rule: Rule, names: Iterable[str], where: str = "", making: bool = False
) -> None:
    """Check that a rule has these hyperparameters. ``making``: an optimizer is being
    made, which takes options as well."""
    for name in names:
        if name not in rule.hyperparameters:
            more = where_option(rule, name)
            if not more and making:
                options = ", ".join(OF_OPTIMIZER)
                more = advice.hint(name, [*rule.hyperparameters, *OF_OPTIMIZER])
                more = f", and the options of an optimizer, {options}{more}"
            elif not more:
                more = advice.hint(name, rule.hyperparameters)
            raise TypeError(
                f"{where}{rule.name} has no hyperparameter {name!r}; it has "
                f"{', '.join(rule.hyperparameters) or 'none'}{more}"
            )


def check_maker(opt: Any) -> None:
    """Check that a call with arrays can make an optimizer."""
    if not callable(opt) or of_torch(opt):
        raise _no_maker(
            f"got {named(opt)}" + "; torch's take no arrays" * of_torch(opt)
        )


def check_made(opt: Any) -> None:
    if not callable(getattr(opt, "step", None)):
        raise _no_maker(f"but made {named(opt)}")


def _no_maker(got: str) -> TypeError:
    return TypeError(
        f"opt must be a rule, or make an optimizer of parameters, {got}; pass a rule, "
        f"such as fastopt.adam"
    )


def items(name: str, value: Any, what: str) -> list[Any]:
    """Return the elements of a list, or of another iterable."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of {what}, got {named(value)}")
    try:
        return list(value)
    except TypeError as error:  # an array without dimensions
        raise TypeError(
            f"{name} must be a list of {what}, got {named(value)}"
        ) from error


def is_array(leaf: Any) -> bool:
    if isinstance(leaf, (FlatBuffer, int, float)):
        return True
    kind = getattr(getattr(leaf, "dtype", None), "kind", "f")  # torch's have none
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and kind not in "OSU"


def check_arrays(name: str, tree: Any) -> None:
    """Check that the leaves of a tree are arrays or numbers."""
    for path, leaf in leaves(tree):
        if not is_array(leaf):
            # People pass generators such as model.parameters().
            several = isinstance(leaf, (Iterator, MappingView))
            advice = f"; pass list({name})" if several else ""
            raise TypeError(
                f"{name}{path} must be an array, or a list or dict of arrays, got "
                f"{named(leaf)}{advice}"
            )


def check_seen(saved: Mapping[str, Any]) -> None:
    """Check the counts and arrays of a saved ``state_dict``. Its best metric is checked
    elsewhere."""
    for key, value in saved.items():
        if key == "best_params" and value is not None:
            check_arrays(key, value)
        elif key not in ("best", "best_params"):
            check_count(key, value, -1 if key == "best_look" else 0)


def check_reduce(reduce: Any, rule: Rule, takes_shards: bool) -> None:
    """Check what adds sums up over processes that have slices of the parameters."""
    if reduce is None:
        return
    check_function("reduce", reduce, "reduce(vector)")
    if rule.factored or not takes_shards:
        raise TypeError(
            f"{rule.name} needs whole matrices, so its parameters cannot be divided "
            f"among processes; leave reduce out, and give each process whole arrays"
        )
