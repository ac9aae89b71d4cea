"""The optimizers: torch's under torch's names, and one for every other rule."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fastopt import rules
from fastopt.optimizer.refusals import check_rule
from fastopt.portable import portable
from fastopt.rule import Rule
from fastopt.rules.adafactor import adafactor
from fastopt.rules.muon import muon
from fastopt.torch.arguments import (
    EXTRAS,
    PAIRS,
    Arguments,
    called,
    docstring,
    number,
    refuse_names,
    refuse_schedules,
)
from fastopt.torch.averaging import Averaging
from fastopt.torch.loading import RULE
from fastopt.torch.memory import Unsupported
from fastopt.torch.state import Names
from fastopt.torch.step import Stepping, extras

MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}


class SGD(Stepping, torch.optim.SGD):
    _default_rule = rules.sgd
    _names = Names(steps=None)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return rules.sgd.variant({"momentum"} if group["momentum"] else set())

    def _values(self, group: Mapping[str, Any], rule: Rule) -> list[Any]:
        values = super()._values(group, rule)
        if not group["momentum"]:
            values[-1] = False  # nesterov, which torch then ignores
        return values


class Adam(Stepping, torch.optim.Adam):
    _default_rule: Rule = rules.adam
    _names = Names(MOMENTS)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        decoupled = group["decoupled_weight_decay"]
        if group["amsgrad"]:
            return rules.amsgradw if decoupled else rules.amsgrad
        return rules.adamw if decoupled else rules.adam


class AdamW(Adam, torch.optim.AdamW):
    _default_rule = rules.adamw


class NAdam(Stepping, torch.optim.NAdam):
    _default_rule = rules.nadam
    _names = Names(MOMENTS, torchs=True)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return rules.nadamw if group["decoupled_weight_decay"] else rules.nadam


class RAdam(Stepping, torch.optim.RAdam):
    _default_rule = rules.radam
    _names = Names(MOMENTS)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return rules.radamw if group["decoupled_weight_decay"] else rules.radam


class Adamax(Stepping, torch.optim.Adamax):
    _default_rule = rules.adamax
    _names = Names({"m": "exp_avg", "u": "exp_inf"})


class RMSprop(Stepping, torch.optim.RMSprop):
    """As torch's; but ``state`` has the variance of centered gradients in place of
    "square_avg", which only a ``state_dict`` has: torch's difference of two means
    cancels."""

    _default_rule = rules.rmsprop
    _names = Names({"v": "square_avg"})
    _scales = False

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        on = {name for name in ("momentum", "centered") if group[name]}
        return rules.rmsprop.variant(on)

    def _inward(self, state: dict[str, Any]) -> None:
        if "grad_avg" in state:
            square, mean = (state[key].double() for key in ("square_avg", "grad_avg"))
            variance = (square - mean * mean).clamp_(min=0)
            state["square_avg"] = variance.to(state["square_avg"].dtype)

    def _outward(self, state: dict[str, Any]) -> dict[str, Any]:
        if "grad_avg" not in state:
            return state
        variance, mean = (state[key].double() for key in ("square_avg", "grad_avg"))
        # The rounding error of 16 bits could be greater than the variance.
        dtype = torch.promote_types(state["square_avg"].dtype, torch.float32)
        return {**state, "square_avg": (variance + mean * mean).to(dtype)}


class Adagrad(Stepping, torch.optim.Adagrad):
    _default_rule = rules.adagrad

    def _values(self, group: Mapping[str, Any], rule: Rule) -> list[Any]:
        values = super()._values(group, rule)
        # Torch takes that of the optimizer, whatever a group says.
        i = list(rule.hyperparameters).index("initial_accumulator_value")
        values[i] = self.defaults["initial_accumulator_value"]
        return values

    def share_memory(self) -> None:
        super().share_memory()
        self._renew()  # state has moved


class Adadelta(Stepping, torch.optim.Adadelta):
    _default_rule = rules.adadelta


class Rprop(Stepping, torch.optim.Rprop):
    _default_rule = rules.rprop


def asgd_scalars(
    t: int,
    eta: float,
    mu: float,
    lr: float,
    lambd: float,
    alpha: float,
    t0: float,
    weight_decay: float,
) -> tuple[float, ...]:
    """Compute the scalars of ``asgd`` as torch does: a new ``lr`` acts one step
    later."""
    after = lr / (1 + lambd * lr * t) ** alpha, 1 / max(1.0, t - t0)
    return mu, 1.0, eta, 1 - lambd * eta, weight_decay, *after


class ASGD(Averaging, torch.optim.ASGD):
    _default_rule = rules.asgd
    _names = Names(
        carry={"eta": "lr", "mu": 1.0}, scalars=portable(asgd_scalars), torchs=True
    )


class Adafactor(Stepping, torch.optim.Adafactor):
    _encodes = False
    _default_rule = adafactor
    _names = Names({"v": "variance"}, real=True)

    def _values(self, group: Mapping[str, Any], rule: Rule) -> list[Any]:
        values = super()._values(group, rule)
        if values[2] == 0:  # eps1, which the rule divides by
            values[2] = 1e-300
        return values


class Muon(Stepping, torch.optim.Muon):
    """As torch's, and by torch: its time is that of its products of matrices."""

    _default_rule = muon
    _names = Names(steps=None)
    _encodes = False

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        raise Unsupported("products of matrices")


_kinds = SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, Rprop, ASGD
for _kind in (*_kinds, Adafactor, Muon):
    _about = _kind._default_rule, _kind.__name__, _kind.__doc__
    _kind.__doc__ = docstring(_kind, *_about, own=False)


# Rules that torch has not -----------------------------------------------------------


class OfRule(Stepping):
    """An optimizer made from a rule: its hyperparameters, in its order, but ``beta1``,
    ``beta2`` as ``betas``; and ``maximize``."""

    rule: Rule
    _variants: Mapping[frozenset[str], Rule]
    _arguments: inspect.Signature

    def __init__(self, *arguments: Any, **options: Any):
        name, taken = type(self).__name__, list(self._arguments.parameters)[1:]
        refuse_names(name, options, taken)
        try:
            bound = self._arguments.bind(*arguments, **options)
        except TypeError as error:
            raise TypeError(f"{name}(): {error}") from None
        bound.apply_defaults()
        extras = {name: bound.arguments.pop(name) for name in EXTRAS}
        super().__init__(bound.arguments.pop("params"), bound.arguments, **extras)

    @Arguments
    def __signature__(cls) -> inspect.Signature:
        taken: inspect.Signature = cls._arguments
        return taken

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return self._variants[frozenset(n for n in self.rule.switches if group[n])]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), RULE: self.rule.name}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        checked = {**self.defaults, **param_group}
        refuse_schedules({name: checked[name] for name in self.defaults})
        follows = [n for n in self.rule.follows if checked[n] is None]
        first = self.rule.complete(checked)
        for name in follows:
            param_group[name] = checked[name] = number(first[name])
        values = super()._values(checked, self.rule)
        named = zip(self.rule.hyperparameters, values, strict=True)
        self.rule.checked(dict(named), called)
        super().add_param_group(param_group)


def optimizer(rule: Rule, name: str | None = None) -> type[OfRule]:
    """A ``torch.optim.Optimizer`` that applies a rule: one of fastopt's or your own.

    Parameters
    ----------
    rule
        Such as ``fastopt.lion``.
    name
        Of the class; by default the rule's, spelled as in its docstring.

    Returns
    -------
    A class. It takes the parameters, the rule's hyperparameters, ``maximize``, and
    what every class of ``fastopt.torch`` takes, such as ``clip_norm``.

    Raises
    ------
    TypeError
        For anything but a rule.

    Examples
    --------
    >>> import torch, fastopt, fastopt.torch
    >>> Lion = fastopt.torch.optimizer(fastopt.lion)
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> opt = Lion([w], lr=0.1, betas=(0.9, 0.99))
    >>> w.sum().backward(); opt.step()
    >>> w.data
    tensor([0.9000, 0.9000, 0.9000])
    """
    check_rule("rule", rule)
    options: dict[str, Any] = {}
    for key, default in rule.hyperparameters.items():
        pair, _ = PAIRS.get(key, (None, 0))
        if pair is None:
            options[key] = None if key in rule.follows else default
        else:
            options[pair] = (*options.get(pair, ()), default)
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter("params", either),
        *(inspect.Parameter(n, either, default=d) for n, d in options.items()),
        inspect.Parameter("maximize", inspect.Parameter.KEYWORD_ONLY, default=False),
        *extras(),
    ]
    on = [(), *rule.variants]
    kind = type(
        name or title(rule),
        (Averaging, OfRule) if rule.evaluate else (OfRule,),
        {
            "rule": rule,
            "_own": rule,
            "_default_rule": rule,
            "_variants": {frozenset(names): rule.variant(set(names)) for names in on},
            "_arguments": inspect.Signature(parameters),
            # As a namedtuple's: where it is, so that it can be pickled.
            "__module__": sys._getframe(1).f_globals.get("__name__", __name__),
        },
    )
    kind.__doc__ = docstring(kind, rule, kind.__name__, None, own=True)
    return kind


def title(rule: Rule) -> str:
    """A class's name: the rule's, spelled as in its docstring."""
    text = sys.modules[rule.update.__module__].__doc__ or ""
    own = sys.modules.get(f"fastopt.rules.{rule.name}")
    text = (own.__doc__ if own else text) or ""

    def spelled(word: str) -> str:
        for ending in ("", "w"):
            letters = "-?".join(word.removesuffix(ending))
            match = re.search(rf"\b{letters}", text, re.I)
            if match and word.endswith(ending):
                word = match[0].replace("-", "") + ending.upper()
                break
        return word[:1].upper() + word[1:]

    return "".join(map(spelled, rule.name.split("_")))
