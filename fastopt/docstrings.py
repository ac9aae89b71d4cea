"""The docstrings of rules: what their files say, hyperparameters, state and code."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# What each hyperparameter means. "adamc.max_lr" is that of adamc alone. It is preferred
# to a meaning without the name of a rule.
ABOUT = {
    "lr": "Learning rate.",
    "momentum": "Momentum factor.",
    "dampening": "Dampening of the gradient in the momentum.",
    "nesterov": "Whether the momentum is Nesterov's.",
    "weight_decay": "How strongly a step pulls parameters towards 0; 0 is off.",
    "eps": "Added to the denominator.",
    "beta": "Decay rate of the average of gradients.",
    "beta1": "Decay rate of the average of gradients.",
    "beta2": "Decay rate of the average of squared gradients.",
    "centered": "Whether squares are of the gradient less its mean.",
    "initial_accumulator_value": "What the average or sum of squares starts at.",
    "always_adapt": "Whether arrays without weight decay are adapted, too.",
    "momentum_decay": "How slowly the momentum warms up.",
    "warmup_steps": "Steps in which the learning rate rises from 0.",
    "r": "Power of the step's number in the weight of its point in the average.",
    "weight_lr_power": "Power of the learning rate in that weight.",
    "d0": "First estimate of the distance to the solution.",
    "use_bias_correction": "Whether averages are corrected for their start at 0.",
    "adabelief.rectify": "Whether the step is rectified, as RAdam's.",
    "adadelta.lr": "Factor of the step.",
    "adadelta.rho": "Decay rate of both averages of squares.",
    "adagrad.lr_decay": "The learning rate is divided by 1 + this for each step.",
    "adamc.max_lr": "The largest learning rate of the run.",
    "adan.beta2": "Decay rate of the average of differences of gradients.",
    "adan.beta3": "Decay rate of the average of squares.",
    "adan.no_prox": "Whether weight decay is decoupled, not proximal.",
    "ademamix.alpha": "Weight of the slow momentum.",
    "ademamix.beta3": "Decay rate of the slow momentum.",
    "ademamix.alpha_warmup": "Steps in which ``alpha`` rises from 0.",
    "ademamix.beta3_warmup": "Steps in which ``beta3`` rises from ``beta1``.",
    "asgd.alpha": "Power of the fall of the step.",
    "asgd.lambd": "Speed of the fall of the step, and factor of a decay.",
    "asgd.t0": "Steps before the mean begins.",
    "ftrl.beta": "Added to the root of the sum of squares.",
    "ftrl.l1": "Factor of the penalty on magnitudes.",
    "ftrl.l2": "Factor of the penalty on squares.",
    "ftrl.l2_shrinkage": "Factor of a penalty on squares in the gradient alone.",
    "lars.trust_coeff": "Factor of the ratio of the norms.",
    "mars.gamma": "Factor of the correction by the previous gradient.",
    "novograd.grad_averaging": "Whether gradients enter the momentum times 1 - beta1.",
    "dog.lr": "Factor of the step; leave it at 1.",
    "dadapt_adam.lr": "Factor of the rate that is found; leave it at 1.",
    "prodigy.lr": "Factor of the rate that is found; leave it at 1.",
    "prodigy.d_coef": "Factor of the estimate of the distance.",
    "prodigy.safeguard_warmup": "Whether a warmup keeps out of the estimate.",
    "dog.reps_rel": "First distance, relative to 1 + the norm of the parameters.",
    "qhadam.nu1": "Weight of the average of gradients; the gradient has the rest.",
    "qhadam.nu2": "Weight of the average of squares; the square has the rest.",
    "rmsprop.alpha": "Decay rate of the average of squares.",
    "rprop.lr": "First step of each element.",
    "rprop.eta_minus": "Factor of a step after a change of sign.",
    "rprop.eta_plus": "Factor of a step after the same sign.",
    "rprop.step_min": "Least step.",
    "rprop.step_max": "Largest step.",
    "schedule_free_radam.silent_sgd_phase": "Whether the first steps change nothing.",
    "sophia_g.beta2": "Decay rate of the average of estimates.",
    "sophia_g.rho": "Clips the step: the larger, the fewer elements.",
    "sophia_g.bs": "Number of examples, or tokens, in a batch.",
}

PARAMS = """\
params
    As for ``fastopt.Optimizer``, whose other options follow by name."""
WIDTH = 80


class Described:
    """A ``__doc__`` that differs between a class and its instances.

    The docstring of an instance is made at each access, because reading source files
    takes too long for an import.
    """

    def __init__(self, own: str | None, about: Callable[[Any], str]):
        self.own, self.about = own, about

    def __get__(self, instance: Any, owner: Any = None) -> str | None:
        return self.own if instance is None else self.about(instance)


def module(rule: Any) -> Any:
    """Return the module of a rule, whose functions may be those of another one; None if
    it has no file of its own."""
    for function in (rule.update, rule.scalars):
        name = function.__module__ or ""
        own = f"{name.rpartition('.')[0]}.{rule.name}".removeprefix(".")
        for candidate in (name, own):
            if candidate.rpartition(".")[2] == rule.name:
                if there := sys.modules.get(candidate):
                    return there
    return None


def sentences(text: str) -> tuple[str, str]:
    """Split a text after its first sentence."""
    first, *rest = re.split(r"(?<!\bal\.)(?<!\b[A-Z]\.)(?<=\.)\s", text, maxsplit=1)
    return first, "".join(rest)


def filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False)


def words(rule: Any) -> str:
    """Return the docstring of a rule's file, with its first sentence as a paragraph."""
    text = inspect.cleandoc(getattr(module(rule), "__doc__", None) or "")
    if not text:
        return f"{rule.name}."
    first, *more = re.split(r"\n\s*\n", text)
    summary, rest = sentences(" ".join(first.split()))
    return "\n\n".join(filled(part) for part in (summary, rest, *more) if part)


def meaning(rule: Any, name: str) -> str:
    """Return what a hyperparameter means, or ""."""
    return ABOUT.get(f"{rule.name}.{name}", ABOUT.get(name, ""))


def hyperparameters(rule: Any, **called: str) -> Iterator[str]:
    """Yield the lines of a "Parameters" section. ``called`` gives other names to
    hyperparameters, such as ``lr="learning_rate"``; these come first."""
    for name in dict.fromkeys((*called, *rule.hyperparameters)):
        if name not in rule.hyperparameters:
            continue
        default = rule.hyperparameters[name]
        kind = "bool" if isinstance(default, bool) else "float or schedule"
        shown = f"{default}" if isinstance(default, bool) else f"{default:g}"
        if name in rule.follows:
            shown = f"that of ``{rule.follows[name]}`` at first"
        yield f"{called.get(name, name)} : {kind}, default {shown}"
        if about := meaning(rule, name):
            yield f"    {about}"


def functions(rule: Any) -> list[Any]:
    """Return the functions of a rule in the order in which a step calls them. For a
    rule in passes, these are the functions that the user wrote, not those that were
    composed of them."""
    passes = [rule.measure, rule.settle, rule.update]
    if rule.apply is not None:
        given = rule.update.__globals__
        passes = [given["direction"], given["terms"], rule.settle, rule.apply]
    variants = [variant.update for variant in rule.variants.values()]
    called = [rule.scalars, *passes, *variants, rule.evaluate]
    return list(dict.fromkeys(each for each in called if each is not None))


def code(rule: Any) -> str:
    """Return the source of a rule's functions, or "" if it is not available."""
    try:
        texts = [inspect.getsource(function) for function in functions(rule)]
    except (OSError, TypeError):  # typed in, or compiled
        return ""
    return "\n\n".join(textwrap.dedent(text).rstrip() for text in texts)


def state(rule: Any) -> str:
    """Describe the state of a rule and its size."""
    kept = [(on, variant.state) for on, variant in rule.variants.items()]
    kept = [((), rule.state), *kept] if rule.state else kept
    parts = []
    for on, names in kept:
        where = f", with {listed(on)}" if on else ""
        size = f"{4 * len(names)} bytes for each float32 parameter"
        if rule.factored:
            size = "of matrices only the means of rows and columns"
        parts.append(f"{listed(names)}, {size}{where}")
    if not rule.state:
        parts.append("otherwise none" if kept else "none")
    text = f"State: {'; '.join(parts)}."
    if rule.carry:
        each = "array" if rule.by_segment else "group"
        text += f" For each {each}, {listed(rule.carry)} in float64."
    return filled(text)


def listed(names: Iterable[str]) -> str:
    *most, last = [f"``{name}``" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def example(rule: Any) -> str:
    """Return an example with a rule of fastopt's."""
    lines = [
        ">>> import numpy as np, fastopt",
        ">>> w = np.array([1.0, -2.0])",
        f">>> opt = fastopt.{rule.name}(w)",
        ">>> for _ in range(3):",
        "...     opt.step(2 * w)",
    ]
    if rule.estimate is not None:
        lines.append(">>> opt.estimate(2 * w)")
    if rule.evaluate is not None:
        lines.append(">>> x = opt.eval_params()")
    return "\n".join([*lines, ">>> opt.steps", "3"])


def of_rule(rule: Any) -> str:
    """Return the docstring of a rule."""
    parts = [
        words(rule),
        "\n".join(["Parameters", "----------", PARAMS, *hyperparameters(rule)]),
        "Returns\n-------\nOptimizer",
        f"Notes\n-----\n{state(rule)}",
    ]
    if text := code(rule):
        once = (
            "``scalars`` runs"
            if rule.settle is None
            else "``scalars`` and ``settle`` run"
        )
        about = f"The code, of which {once} once a step and the rest for each element::"
        parts.append(f"{filled(about)}\n\n{textwrap.indent(text, '    ')}")
    own = getattr(module(rule), "__name__", "")
    if own == f"fastopt.rules.{rule.name}":
        parts.append(f"Examples\n--------\n{example(rule)}")
    return "\n\n".join(parts) + "\n"
