"""The pages of the API reference: one for each public module, of its docstrings.

What stands on them is decided by ``public.py``. A rule is not a function but may be
called as one; its page in ``rules/`` has its signature and everything else.
"""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import public
from make import CLASSES, called, defaults

import fastopt
from fastopt import Rule

OPTIMIZERS = [getattr(fastopt, name) for name in CLASSES.values()]
PAGES = {module: module.replace(".", "_") for module in public.MODULES}


def write(folder: Path) -> None:
    """Write them, if they have changed."""
    folder.mkdir(exist_ok=True)
    wanted = {folder / f"{page}.md": text(module) for module, page in PAGES.items()}
    wanted[folder / "index.md"] = index()
    for path in folder.glob("*.md"):
        if path not in wanted:
            path.unlink()
    for path, content in wanted.items():
        if not path.exists() or path.read_text("utf-8") != content:
            path.write_text(content, "utf-8")


def text(module: str) -> str:
    """The page of a module."""
    parts = [f"# {module}", rst(f".. automodule:: {module}")]
    if module == "fastopt":
        parts.append("Each optimizer has [a page of its own](/rules/README.md).")
    owners: dict[int, str] = {}  # a method -> the first class on the page that has it
    for name, value in named(module).items():
        first = places()[name]
        if first == name and not on_page_of_rule(value):
            parts.append(rst(directive(name, value, owners)))
        elif first != name:
            parts.append(rst(f"``{name}`` is :py:obj:`{first}`."))
    return "\n\n".join(parts) + "\n"


def undocumented() -> list[str]:
    """Public names, and methods of public classes, without a docstring."""
    found = []
    for module in public.MODULES:
        for name, value in named(module).items():
            parts = {name: value.__doc__}
            for member in public.members(value) if inspect.isclass(value) else ():
                parts[f"{name}.{member}"] = inspect.getdoc(getattr(value, member))
            found += [name for name, text in parts.items() if not text]
    return found


def index() -> str:
    """The page with links to all others."""
    rows = [
        f"- [`{module}`]({page}.md): {public.MODULES[module].replace('``', '`')}"
        for module, page in PAGES.items()
    ]
    tree = "\n".join(["```{toctree}", ":hidden:", "", *PAGES.values(), "```"])
    return "\n".join(["# API reference", "", *rows, "", tree]) + "\n"


def on_page_of_rule(value: Any) -> bool:
    """Whether it is documented where the rule's formula is."""
    return isinstance(value, Rule) or value in OPTIMIZERS


def named(module: str) -> dict[str, Any]:
    """The public objects of a module by their full names."""
    return {**public.objects(module), **public.results(module)}


@cache
def places() -> dict[str, str]:
    """All public names, and for each the first name of the same object, which is where
    it is documented."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(value), name)
        for module in public.MODULES
        for name, value in named(module).items()
    }


def directive(name: str, value: Any, owners: dict[int, str]) -> str:
    """The directive of autodoc for an object. What classes inherit from each other is
    documented once."""
    if not inspect.isclass(value):
        return f".. auto{'function' if callable(value) else 'data'}:: {name}"
    members = public.members(value)
    new = [m for m in members if owners.setdefault(id(members[m]), name) == name]
    lines = [f".. autoclass:: {name}"]
    if new:  # those that have the docstring of what they override are shown without
        lines += [f"   :members: {', '.join(new)}", "   :undoc-members:"]
    others = {owners[id(method)] for method in members.values()} - {name}
    for other in sorted(others):
        lines.append(f"\n   It has the methods of :py:class:`{other}`.")
    return "\n".join(lines)


def rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```"


def signature(rule: Rule) -> str:
    """How a rule is called, for its page."""
    options = ", ".join(f"{name}={value}" for name, value in defaults(rule).items())
    return (
        f"```{{py:function}} fastopt.{called(rule)}(params, *, {options}, **more)\n\n"
        f"Return an optimizer of `params`. See {{py:class}}`fastopt.Optimizer` for the "
        f"other arguments.\n```\n"
    )


def described(rule: Rule) -> str:
    """The class of a rule that has one of its own, for its page."""
    name = f"fastopt.{called(rule)}"
    everyone = public.members(fastopt.Optimizer).values()
    owners = dict.fromkeys(map(id, everyone), "fastopt.Optimizer")
    return rst(directive(name, getattr(fastopt, called(rule)), owners)) + "\n"
