"""What the classes take: the arguments that ``help`` shows, and those refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastopt import advice, docstrings
from fastopt.optimizer import checks
from fastopt.rule import Rule, shown
from fastopt.step import OPTIONS

PAIRS = {  # hyperparameters that torch has in a tuple
    **{f"beta{i}": ("betas", i - 1) for i in (1, 2, 3)},
    **{"eta_minus": ("etas", 0), "eta_plus": ("etas", 1)},
    **{"step_min": ("step_sizes", 0), "step_max": ("step_sizes", 1)},
    **{"eps1": ("eps", 0), "eps2": ("eps", 1)},
}
EXTRAS = (
    "clip_norm clip_value nonfinite ema weight_decay_mask state_dtype formats master "
    "copy_to seed shard_group threads backend"
).split()


class Arguments:
    """``__signature__`` of a class whose ``__init__`` takes what another one says. Of
    a subclass with an ``__init__`` of its own it is None: that one speaks for itself.
    """

    def __init__(self, of: Callable[[Any], inspect.Signature]):
        self.of = of

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature | None:
        first = next(cls for cls in owner.__mro__ if "__init__" in vars(cls))
        ours = vars(first).get("__signature__") is self
        return self.of(owner) if ours else None


# Those of them that an optimizer keeps in another form than it was given.
CONVERTED = {"copy_to", "shard_group"}


def refuse_options(group: Mapping[str, Any], opt: Any) -> None:
    """Refuse a group of parameters that sets what only an optimizer, or a step, can.

    Wrappers such as ``ZeroRedundancyOptimizer`` put all options of the optimizer into
    its groups, so a group may have what the optimizer has.
    """
    if group.get("frozen") is True and "frozen" not in opt.defaults:
        raise TypeError(
            "a group of fastopt.torch cannot be frozen, as one of fastopt's core can; "
            "call requires_grad_(False) of its parameters, and set their .grad to None"
        )
    for name in (*EXTRAS, "zero_grads"):
        if name not in group or name in opt.defaults:
            continue
        value, own = group[name], getattr(opt, name, None)
        same = value is own or (
            (own is not None and value is not None)
            if name in CONVERTED
            else isinstance(value, (int, float, str, dict)) and value == own
        )
        if not same:
            of = "the optimizer, or of step," if name in OPTIONS else "the optimizer,"
            instead = f"give it to the optimizer: {type(opt).__name__}(..., {name}=...)"
            if name == "zero_grads":
                of, instead = "step,", "give it to step: step(zero_grads=True)"
            raise TypeError(
                f"{name} is an option of {of} not of a group of parameters, but a "
                f"group has {name}={shown(value)}; {instead}"
            )


def refuse_schedules(named: Mapping[str, Any]) -> None:
    """Refuse hyperparameters that are functions, as fastopt's own schedules are."""
    for name, value in named.items():
        shown = {name: value}
        if isinstance(value, (tuple, list)):
            shown = {f"{name}[{i}]": part for i, part in enumerate(value)}
        for where, part in shown.items():
            if callable(part) and not isinstance(part, torch.Tensor):
                raise TypeError(
                    f"{where} must be a number, got {part!r}; torch's optimizers take "
                    f"no schedules: use one of torch.optim.lr_scheduler, such as "
                    f"LambdaLR(optimizer, schedule) with lr=1.0, or put a number into "
                    f"optimizer.param_groups before each step"
                )


def refuse_names(kind: str, named: Iterable[str], taken: Iterable[str]) -> None:
    """Refuse arguments that a class does not take. ``taken`` are those that it does, in
    addition to those that all classes take."""
    own = [name for name in taken if name not in EXTRAS]
    for name in named:
        if name in own or name in EXTRAS:
            continue
        more = advice.hint(name, [*own, *EXTRAS])
        if name in ("zero_grads", "grads", "weights"):
            more = f"; {name} is an argument of step: opt.step({name}=...)"
        raise TypeError(
            f"{kind}() got an unexpected keyword argument {name!r}; it takes "
            f"{', '.join(own)}, and the options of all classes, "
            f"{', '.join(EXTRAS)}{more}"
        )


def refuse_params(params: Any, name: str = "params") -> None:
    """Refuse what is no collection of parameters, with advice."""
    if isinstance(params, torch.Tensor):  # torch refuses it itself, or takes it
        return
    if isinstance(params, Mapping) and "params" in params:
        raise TypeError(
            f"{name} is a group of parameters, but must be a list of groups: write "
            f"[{{...}}]"
        )
    try:
        iter(params)
    except TypeError:
        raise TypeError(
            f"{name} must be an iterable of parameters, such as model.parameters(), "
            f"got {type(params).__name__}"
        ) from None


def number(value: Any) -> Any:
    """A hyperparameter, which may be a tensor."""
    if type(value) is float:
        return value
    refuse_schedules({"a hyperparameter": value})
    return value.item() if isinstance(value, torch.Tensor) else value


def spared(
    mask: Callable[[str, torch.Tensor], bool] | None,
    groups: Sequence[Mapping[str, Any]],
    rules: Sequence[Rule],
) -> set[torch.Tensor]:
    """The parameters that a ``weight_decay_mask`` spares."""
    without: set[torch.Tensor] = set()
    if mask is None:
        return without
    try:
        inspect.signature(mask).bind("", None)
    except TypeError as error:
        raise TypeError(
            f"weight_decay_mask must take the name and the parameter: {error}"
        ) from None
    except ValueError:  # some functions written in C have no signature
        pass
    for group in groups:
        params = group["params"]
        names = group.get("param_names") or [""] * len(params)
        for name, param in zip(names, params, strict=True):
            decays = mask(name, param)
            if not isinstance(decays, (bool, np.bool_)):
                raise TypeError(
                    f"weight_decay_mask must return True or False, got {decays!r}"
                )
            if not decays:
                without.add(param)
    for rule in rules if without else ():
        checks.check_decays(rule)
    return without


# Docstrings -------------------------------------------------------------------------

ABOUT = {
    "params": "Parameters to update, named ones, or dicts of groups.",
    "lr": "Learning rate, a number or a tensor.",
    "betas": "Decay rates of the averages.",
    "eps": "Added to the denominator.",
    "amsgrad": "Whether the largest average of squares so far is used.",
    "maximize": "Whether to step along the gradients, not against them.",
    "decoupled_weight_decay": "Whether weight decay is as in AdamW.",
    "foreach": "Accepted for compatibility; has no effect on fastopt's steps.",
    "fused": "True: GradScaler leaves unscaling to ``step``, as with torch's.",
    "capturable": "True: CUDA graphs may capture steps; on a CPU these are torch's.",
    "differentiable": "True: steps are torch's own, and autograd goes through them.",
    "etas": "Factors of a step after a change of sign, and after the same sign.",
    "step_sizes": "Least and largest step.",
    "beta2_decay": "Power of the step's number that is the weight of new squares.",
    "Adafactor.eps": "Least mean of the averages of rows, and least norm of an array.",
    "Adafactor.lr": "The most that a relative step may be.",
    "d": "Root mean square of an update beyond which it is scaled down.",
    "ns_coefficients": "Coefficients of the polynomial of the iteration.",
    "ns_steps": "Iterations that make the momentum orthogonal.",
    "adjust_lr_fn": '"original" or "match_rms_adamw": how lr follows the shape.',
    "clip_norm": "Limit of the norm of all gradients, in every step.",
    "clip_value": "Limit of the magnitude of each of their elements.",
    "nonfinite": 'What to do about infinities and NaN: "propagate", "skip", "raise".',
    "ema": "Decay of a moving average of the parameters, ``ema_params()``.",
    "weight_decay_mask": "Where weight decay applies, by name and parameter.",
    "state_dtype": "torch.bfloat16: averages are kept in it; by default float32.",
    "formats": 'Format of the state, such as "8bit", or a dict by buffer.',
    "seed": "Chooses the random numbers of stochastic rounding.",
    "copy_to": "Tensors that steps copy float32 parameters to, in 16 bits.",
    "master": 'How bfloat16 parameters are kept: "bf16+r8", "bf16+r16", "bf16".',
    "shard_group": "True, or a group: each process has some of the parameters.",
    "threads": "The most to use on a CPU; by default as many as torch.",
    "backend": 'For CPU tensors: "cython", "numba", "numpy"; default: the fastest.',
}

EXAMPLE = """\
Examples
--------
>>> import torch, fastopt.torch
>>> w = torch.nn.Parameter(torch.ones(3, 2))
>>> opt = fastopt.torch.{name}([w])
>>> w.square().sum().backward()
>>> opt.step()
"""


def docstring(kind: Any, rule: Rule, name: str, note: str | None, own: bool) -> str:
    """Return a class's docstring: that of the rule, and the arguments. ``own``: torch
    has no class of this rule."""
    about = [docstrings.words(rule)]
    if own:
        base = f"A ``torch.optim.Optimizer`` that applies ``{rule.name}``."
        pairs = [n for n in rule.hyperparameters if n in PAIRS]
        if pairs:
            tuples = docstrings.listed(dict.fromkeys(PAIRS[n][0] for n in pairs))
            base += f" {docstrings.listed(pairs)} are in {tuples} here."
        about.append(docstrings.filled(base))
    else:
        about.append(
            f"Like ``torch.optim.{name}``: it has the same arguments and the same "
            f"state.\nfastopt computes the steps."
        )
    if note:
        about.append(inspect.cleandoc(note))
    lines = ["Parameters", "----------"]
    for argument in inspect.signature(kind).parameters.values():
        lines.append(argument.name)
        if argument.default is not argument.empty:
            lines[-1] += f" : {kind_of(argument)}, default {argument.default!r}"
        meaning = (
            ABOUT.get(f"{name}.{argument.name}")
            or docstrings.ABOUT.get(f"{rule.name}.{argument.name}")
            or ABOUT.get(argument.name)
            or docstrings.ABOUT.get(argument.name)
        )
        if meaning:
            lines.append(f"    {meaning}")
    return "\n\n".join([*about, "\n".join(lines), EXAMPLE.format(name=name)])


def kind_of(argument: inspect.Parameter) -> str:
    """What an argument with a default must be, in words."""
    noted = argument.annotation
    if noted is argument.empty:
        if isinstance(argument.default, tuple):
            return "tuple of floats"
        return "float" if argument.default is None else type(argument.default).__name__
    text = noted.__name__ if isinstance(noted, type) else str(noted)
    for old, new in (
        (" | None", ""),
        ("torch.", ""),
        (" | ", " or "),
        ("Any", "object"),
    ):
        text = text.replace(old, new)
    return text


def called(name: str) -> str:
    """Return what messages call a hyperparameter of a rule."""
    pair, i = PAIRS.get(name, (None, 0))
    return name if pair is None else f"{pair}[{i}]"
