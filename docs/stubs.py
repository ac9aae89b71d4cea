"""Stubs for type checkers: of rules, whose hyperparameters stand in their scalars, and
of what frameworks make of rules when it is asked for.

docs/make.py writes them. Those of torch's classes are made only where this version of
torch is installed, since some take the arguments of its own classes.
"""

import importlib.metadata
import inspect
import re
import textwrap

from fastopt import docstrings

TORCH_VERSION = "2.13"
HEAD = "# Made by docs/make.py from the rules.\n\n"
# Declared with the rules, and imported by the other stubs.
NUMBER = """\
# A number, or a schedule: a function of the number of completed steps.
_Number: TypeAlias = SupportsFloat | Callable[[Any], Any]
"""


def kind(default, number):
    return "bool" if isinstance(default, bool) else number


def keywords(rule, number, leave_out=()):
    """The hyperparameters of a rule, with types, as arguments."""
    for name, default in rule.hyperparameters.items():
        if name in leave_out:
            continue
        none = " | None" if name in rule.follows else ""
        value = None if none else default
        yield f"{name}: {kind(default, number)}{none} = {value!r}"


def summary(rule):
    """A docstring of one line."""
    text, _ = docstrings.sentences(" ".join(docstrings.words(rule).split()))
    return '"""' + text + '"""'


def signature(head, arguments, result):
    """A function without a body, an argument a line."""
    lines = "".join(f"    {argument},\n" for argument in arguments)
    return f"{head}(\n{lines}) -> {result}: ..."


def method(arguments, result="None", name="__init__", ignore=""):
    text = signature(f"def {name}", ["self", *arguments], result)
    head, rest = text.split("\n", 1)
    return textwrap.indent(f"{head}{ignore}\n{rest}", "    ")


def exported(names):
    lines = "".join(f'    "{name}",\n' for name in sorted(names))
    return f"__all__: list[str] = [\n{lines}]\n"


def described(rule):
    """A docstring of one sentence, for a class."""
    lines = textwrap.wrap(summary(rule), 84)
    return textwrap.indent("\n".join(lines), "    ")


def begun(module, rules, imports=""):
    """The beginning of the stubs of what a module makes of each rule."""
    imports += f"from {module} import Optimizer\nfrom fastopt.rules import _Number\n"
    return [HEAD + imports, exported(rule.name for rule in rules)]


# What each file has ------------------------------------------------------------------


def of_rules(rules):
    """fastopt/rules/__init__.pyi: each rule has a type of its own, for its call."""
    parts = [
        HEAD + "from collections.abc import Callable\n"
        "from typing import Any, SupportsFloat, TypeAlias\n\n"
        "from typing_extensions import TypedDict, Unpack\n\n"
        "from fastopt.optimizer.optimizer import Optimizer\n"
        "from fastopt.rule import Rule\n",
        exported(["RULES", *(rule.name for rule in rules)]),
        NUMBER,
        "class _Options(TypedDict, total=False):\n"
        "    backend: str | None\n"
        "    threads: int | None\n"
        "    ema: float | None\n"
        "    weight_decay_mask: Any\n"
        "    formats: Any\n"
        "    copy_to: Any\n"
        "    seed: int\n"
        "    reduce: Callable[[Any], None] | None\n",
    ]
    for rule in sorted(rules, key=lambda rule: rule.name):
        call = method(
            [
                "params: Any",
                *(["*"] if rule.hyperparameters else []),
                *keywords(rule, "_Number"),
                "**options: Unpack[_Options]",
            ],
            "Optimizer",
            "__call__",
            "  # type: ignore[override]",
        )
        parts.append(f"class _{rule.name}(Rule):\n{described(rule)}\n\n{call}\n")
    names = "".join(f"{rule.name}: _{rule.name}\n" for rule in rules)
    lists = "RULES: tuple[Rule, ...]\nCLASS_RULES: tuple[Rule, ...]\n"
    return "\n".join([*parts, names, lists])


def of_jax(rules):
    """fastopt/jax/_rules.pyi: a function for each rule."""
    parts = begun("fastopt.jax", rules)
    for rule in sorted(rules, key=lambda rule: rule.name):
        arguments = [
            a.replace("_Number =", "_Number | None =") if a.startswith("lr:") else a
            for a in keywords(rule, "_Number")
        ]
        arguments += ["threads: int | None = None"]
        arguments += ["axis_name: str | tuple[str, ...] | None = None"]
        head = signature(f"def {rule.name}", ["*", *arguments], "Optimizer")
        head = head.removesuffix(" ...")
        parts.append(f"{head}\n{described(rule)}\n")
    return "\n".join(parts)


def of_keras(rules):
    """fastopt/_keras.pyi: a class for each rule."""
    parts = begun("fastopt.keras", rules, "from typing import Any\n\n")
    for rule in sorted(rules, key=lambda rule: rule.name):
        own = list(keywords(rule, "_Number", ("lr", "weight_decay")))
        first = ["learning_rate: Any = None", "weight_decay: float | None = None"]
        new = method([*first, *(["*", *own] if own else []), "**options: Any"])
        parts.append(f"class {rule.name}(Optimizer):\n{described(rule)}\n\n{new}\n")
    return "\n".join(parts)


def of_scipy(rules):
    """fastopt/_scipy.pyi: a method of ``minimize`` for each rule."""
    names = "".join(f"{rule.name}: Method\n" for rule in rules)
    start = HEAD + "from fastopt.scipy import Method\n"
    return "\n".join([start, exported(rule.name for rule in rules), names])


TORCH = """\
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import TypedDict, Unpack

from fastopt.step import Nonfinite
from fastopt.torch.averaging import Averaging
from fastopt.torch.bitsandbytes import from_bitsandbytes
from fastopt.torch.classes import OfRule, optimizer
from fastopt.torch.flat import flatten_, unflatten_
from fastopt.torch.release import release_gradients_
from fastopt.torch.step import Stepping
"""


def of_torch(rules):
    """fastopt/torch/__init__.pyi: torch's own classes, and one for each other rule."""
    import fastopt.torch
    from fastopt.torch import classes

    own = fastopt.torch._OF_TORCH
    others = {
        classes.title(rule): rule
        for rule in rules
        if rule.name not in map(str.lower, own)
    }
    bases = {name: f"Stepping, torch.optim.{name}" for name in own}
    bases |= {"AdamW": "Adam, torch.optim.AdamW", "ASGD": "Averaging, torch.optim.ASGD"}
    names = {*fastopt.torch.__all__} - {*fastopt.torch._OTHERS} | {*others}
    options = "".join(f"    {line}\n" for line in extras())
    parts = [
        HEAD.replace("rules.", f"rules and torch {TORCH_VERSION}.") + TORCH,
        exported(names),
        f"class _Options(TypedDict, total=False):\n{options}",
    ]
    for name in sorted([*own, *others]):
        if name in others:
            rule, made = others[name], classes.optimizer(others[name], name)
            base = "Averaging, OfRule" if rule.evaluate else "OfRule"
        else:
            made, base = getattr(fastopt.torch, name), bases[name]
            rule = made._default_rule
        new = method(taken(made))
        parts.append(f"class {name}({base}):\n{described(rule)}\n\n{new}\n")
    return "\n".join(parts)


def extras():
    """The options of all classes, as items of a dict."""
    from fastopt.torch.step import extras

    for argument in extras():
        yield f"{argument.name}: {torch_kind(argument)}"


def taken(made):
    """What a class of fastopt.torch takes, with types."""
    from fastopt.torch.arguments import EXTRAS

    keyword = False
    for argument in inspect.signature(made).parameters.values():
        name = argument.name
        if name in EXTRAS:
            continue
        if argument.kind is argument.KEYWORD_ONLY and not keyword:
            keyword = True
            yield "*"
        if name == "params":
            yield "params: ParamsT"
        else:
            yield f"{name}: {torch_kind(argument)} = {argument.default!r}"
    yield "**options: Unpack[_Options]"


def torch_kind(argument):
    """The type of an argument of a class of fastopt.torch."""
    noted, default = argument.annotation, argument.default
    if argument.name == "lr":
        return "float | Tensor"
    if argument.name == "betas":
        each = "float | Tensor" if len(default) == 2 else "float"
        return f"tuple[{', '.join([each] * len(default))}]"
    if noted is argument.empty:
        return "float | None" if default is None else type(default).__name__
    if isinstance(noted, str):
        return noted
    text = noted.__name__ if isinstance(noted, type) else str(noted)
    return re.sub(r"\btorch\.Tensor\b", "Tensor", text)


def wanted(root, rules):
    """The stubs, by path."""
    package = root / "fastopt"
    files = {
        package / "rules" / "__init__.pyi": of_rules(rules),
        package / "jax" / "_rules.pyi": of_jax(rules),
        package / "_keras.pyi": of_keras(rules),
        package / "_scipy.pyi": of_scipy(rules),
    }
    if has_torch():
        files[package / "torch" / "__init__.pyi"] = of_torch(rules)
    return files


def has_torch():
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return version.startswith(f"{TORCH_VERSION}.")
