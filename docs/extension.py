"""What the site of documentation adds to Sphinx, so that pages may stay as GitHub
shows them.

- Formulas, ``$`x`$`` and blocks of ``math``, become MathML.
- Links to files outside of this folder lead to their pages (PAGES), or to the file;
  the pages that include them need not repeat it.
- A rule's page gets its signature and a picture (gallery.py), and ``gallery.md`` all
  pictures; ``examples.md`` gets the code of examples/.
- ``reference/`` is written from the docstrings of the public names (public.py), and a
  public name that is nowhere documented is a warning.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gallery
import reference
from docutils import nodes
from make import CATALOGUE, CLASSES, called, grouped
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.ext.napoleon import NumpyDocstring
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "_build" / "gallery"
# Outside of docs -> the page of the site with the same content.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples": "examples.md",
    "docs/rules": "rules/README.md",
}
RULES = {f"rules/{rule.name}": rule for rule in CATALOGUE}
# Pages with pictures, and those of which rules.
PATHS = {
    "gallery": CATALOGUE,
    "index": [
        rule for rule in CATALOGUE if rule.name in ("sgd", "adam", "lion", "lars")
    ],
}

FORMULA = re.compile(r"\$(`[^`\n]+`)\$")
LINK = re.compile(r"\]\((?P<path>[^)#\s:/][^)#\s:]*)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"^(```+).*?^\1$", re.M | re.S)


# Pages ------------------------------------------------------------------------------


def read_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn GitHub's Markdown into MyST's, and add what only the site has."""
    text = source[0]
    if page in RULES:
        text = rule_page(app, RULES[page], text)
    elif page == "rules/README":
        for rules in grouped(CATALOGUE).values():
            text += toctree([rule.name for rule in rules])
    elif page in PATHS:
        text = text.replace("<!-- paths -->\n", grid(PATHS[page]))
    elif page == "examples":
        text += "\n" + examples()
    source[0] = converted(text, page, posixpath.dirname(f"docs/{page}"))


def read_included(
    app: Sphinx, relative_path: Path, parent: str, content: list[str]
) -> None:
    """The same for a file that a page includes."""
    if relative_path.suffix == ".md":
        folder = posixpath.dirname(f"docs/{relative_path.as_posix()}")
        content[0] = converted(content[0], parent, folder)


def converted(text: str, page: str, folder: str) -> str:
    """Return Markdown that was in a folder with the site's formulas and links, except
    in blocks of code."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["path"]))
        anchor = match["anchor"] or ""
        if target in PAGES:
            return f"](/{PAGES[target]}{anchor})"
        if target.startswith("examples/"):
            return f"](/examples.md#{slug(posixpath.basename(target))})"
        if target.startswith("docs/"):
            return f"](/{target.removeprefix('docs/')}{anchor})"
        return f"](path:{'../' * (page.count('/') + 1)}{target})"

    def prose(part: str) -> str:
        return LINK.sub(link, FORMULA.sub(r"{math}\1", part))

    parts, end = [], 0
    for block in CODE.finditer(text):
        parts += prose(text[end : block.start()]), block[0]
        end = block.end()
    return "".join([*parts, prose(text[end:])])


def slug(name: str) -> str:
    """The anchor of a heading that is a file's name."""
    return re.sub(r"[^\w-]", "", name.lower())


def rule_page(app: Sphinx, rule: reference.Rule, text: str) -> str:
    """Add how it is called, after the title or at the end, and the picture."""
    name = rule.name
    figure = (
        f"```{{figure}} /_build/gallery/{name}.svg\n"
        f":alt: The path of {called(rule)} through a curved valley to its minimum\n"
        f":figclass: path\n\n"
        f"{app.env.pictures[name]} [About this picture](/gallery.md)\n```\n\n"
    )
    text = text.replace("## Options\n", figure + "## Options\n", 1)
    if rule in CLASSES:
        return f"{text}\n## Reference\n\n{reference.described(rule)}"
    title = re.search("^# .*\n", text, re.M).end()
    return f"{text[:title]}\n{reference.signature(rule)}{text[title:]}"


def grid(rules: Iterable[reference.Rule]) -> str:
    """The pictures of rules, with links to their pages."""
    rows = [
        f"- [![The path of {called(rule)}](/_build/gallery/{rule.name}.svg)"
        f" `{called(rule)}`](/rules/{rule.name}.md)"
        for rule in rules
    ]
    return "\n".join(["````{container} gallery", *rows, "````"]) + "\n"


def toctree(pages: list[str]) -> str:
    """A table of contents for the sidebar alone."""
    return "\n".join(["", "```{toctree}", ":hidden:", "", *pages, "```"]) + "\n"


def examples() -> str:
    """The code of all examples."""
    parts = [
        f"## {path.name}\n\n```{{literalinclude}} ../examples/{path.name}\n```\n"
        for path in sorted((HERE.parent / "examples").glob("*.py"))
    ]
    return "\n".join(parts)


# Formulas ---------------------------------------------------------------------------


def formula(visitor: nodes.NodeVisitor, node: nodes.Element, block: bool) -> None:
    """Write a formula as MathML."""
    try:
        text = LatexToMathML(fancy_error=False).convert_with_local_state(
            node.astext(), displaystyle=block
        )
    except LatexError as error:
        logger.warning("no formula: %s", error, location=node, type="formula")
        text = visitor.encode(node.astext())
    tag = "div" if block else "span"
    visitor.body.append(f'<{tag} class="math notranslate">{text}</{tag}>')
    raise nodes.SkipNode


def inline(visitor: nodes.NodeVisitor, node: nodes.Element) -> None:
    formula(visitor, node, block=False)


def displayed(visitor: nodes.NodeVisitor, node: nodes.Element) -> None:
    formula(visitor, node, block=True)


# The build --------------------------------------------------------------------------


def prepare(app: Sphinx) -> None:
    """Draw the pictures and write the pages of the reference."""
    logger.info("drawing the paths of %d rules ...", len(CATALOGUE))
    app.env.pictures = gallery.draw(PICTURES)
    try:
        reference.write(HERE / "reference")
    except ModuleNotFoundError as error:
        raise ExtensionError(
            f"the reference describes all modules of fastopt, but {error.name} is not "
            f"installed; run pip install '.[docs]'"
        ) from error


def check_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that are on no page or have no docstring."""
    documented = {name for name, *_ in env.get_domain("py").get_objects()}
    for name, place in reference.places().items():
        if place not in documented:
            logger.warning("%s is on no page", name, type="reference")
    for name in reference.undocumented():
        logger.warning("%s has no docstring", name, type="reference")


def read_property(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Read a property's docstring as a method's: napoleon takes what stands before a
    colon in its first line for a type, and knows no sections in it."""
    if what == "property":
        comment = "..", ""  # so that the first line has no colon
        lines[:] = *comment, *NumpyDocstring(lines, app.config, app, "method").lines()


def find_name(
    app: Sphinx, env: BuildEnvironment, node: nodes.Element, child: nodes.TextElement
) -> nodes.Element | None:
    """Find what a docstring calls by the end of its name, or by another of its names,
    as ``minimize`` or ``fastopt.training.minimize`` for ``fastopt.minimize``."""
    if node.get("refdomain") != "py":
        return None
    target, objects = node["reftarget"], env.get_domain("py").objects
    target = reference.places().get(target, target)
    names = [name for name in objects if f".{name}".endswith(f".{target}")]
    if not names:
        return None
    name = min(names, key=lambda name: (name.count("."), name))
    to = objects[name].docname, objects[name].node_id
    return make_refnode(app.builder, node["refdoc"], *to, child, name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
    app.connect("builder-inited", prepare)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", read_property, priority=400)
    app.connect("missing-reference", find_name)
    app.connect("env-check-consistency", check_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
