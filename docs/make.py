"""The tables in the README and the pages, a page for each rule, and stubs of rules.

    python docs/make.py            write them
    python docs/make.py --check    exit 1 if they are not up to date

A page has a table where two comments ask for it, such as

    <!-- speed: made by docs/make.py from bench/results/adamw.json -->
    <!-- /speed -->

and TABLES lists those that there are. Tables of measurements are made from the file
that the comment names (measured.py), and so is the README's picture (picture.py). All
else is made from the rules: names, defaults and state from the rule, formulas from its
code (formula.py), stubs from its signature (stubs.py), and words from the module's
docstring, whose first sentence is the summary and whose first paragraph names the
paper: authors and year, as "Kingma & Ba 2015", or "Zeiler 2012" or "Chen et al. 2023",
and after it, where there is one, "arXiv:1412.6980". Further paragraphs say what differs
from other people's code.
"""

import argparse
import ast
import difflib
import inspect
import re
import sys
from pathlib import Path

import formula
import measured
import picture
import stubs
from measured import table

import fastopt
from fastopt import backends
from fastopt.bench import loop
from fastopt.muon import adjustment, orthogonalize
from fastopt.rules import CLASS_RULES
from fastopt.rules.lookahead import lookahead
from fastopt.rules.muon import direction, muon

CLASSES = {rule: rule.name.capitalize() for rule in CLASS_RULES}
CATALOGUE = (*fastopt.RULES, *CLASSES)
# The headings of the page of all rules. A rule that is not here stands under OTHERS.
GROUPS = {
    "Gradient descent and momentum": "gd dynamic_gd sgd sgdw asgd",
    "Signs of gradients": "signum tiger lion cautious_lion rprop",
    "Adagrad and RMSprop": "adagrad adadelta rmsprop ftrl madgrad",
    "Adam": "adam adamw amsgrad amsgradw adamax nadam nadamw radam radamw",
    "Variants of Adam": "adabelief adamc adan ademamix adopt cautious_adamw "
    "cautious_decay_adamw laprop mars qhadam yogi",
    "Schedule-free": "schedule_free_sgd schedule_free_adamw schedule_free_radam",
    "Norms of arrays": "lars lamb novograd stable_adamw",
    "Rules that find the learning rate": "dog dadapt_adam prodigy",
    "Second derivatives": "sophia_g",
    "Matrices": "muon adafactor",
    "Around another optimizer": "lookahead",
}
OTHERS = "More"
ROOT = Path(__file__).resolve().parent.parent
ROWS = re.compile(r"(?<= --- \|)\n((?:\|.*\n)*)")  # of a table of Markdown

ARXIV = r"arXiv:(?P<arxiv>\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})"
NO_NAME = r"(?!(?:In|Since|Until|From|By|Of|As)\b)"
NAME = rf"(?:(?:[Vv][ao]n|[Dd]e[nr]?|[Ll][ae]) )*{NO_NAME}[^\W\d_a-zß-ÿ][\w'’-]*"
AUTHORS = rf"{NAME}(?:, {NAME})*(?: et al\.|,? (?:&|and) {NAME})?"
CITATION = re.compile(
    rf"(?P<authors>{AUTHORS}),? \(?(?P<year>(?:17|18|19|20)\d\d)\b\)?|{ARXIV}"
)


# Docstrings -------------------------------------------------------------------------


def module(rule):
    """The rule's own; its update may be another rule's."""
    own = f"fastopt.rules.{rule.name}"
    return sys.modules[own if own in sys.modules else rule.update.__module__]


def called(rule):
    """What users call it by."""
    return CLASSES.get(rule, rule.name)


def size(rule):
    """The bytes of its state for each float32 parameter."""
    if rule is lookahead:  # what it updates is kept beside the parameters
        return "4"
    least = [0] if rule.factored else []
    return span([*least, *(4 * len(one.state) for one in kinds(rule))])


def kinds(rule):
    """The rule and its variants."""
    return [rule, *rule.variants.values()]


def paragraphs(rule):
    """Those of the docstring of the rule's module."""
    text = inspect.cleandoc(module(rule).__doc__ or "")
    return re.split(r"\n\s*\n", text)


def papers(rule):
    """The papers that the first paragraph mentions: "authors year" and arXiv's number,
    either of which may be missing."""
    mentions, end, text = [], 0, " ".join(paragraphs(rule)[0].split())
    for match in CITATION.finditer(text):
        if match["authors"]:
            mentions.append([f"{match['authors']} {match['year']}", ""])
        elif mentions and not mentions[-1][1] and ";" not in text[end : match.start()]:
            mentions[-1][1] = match["arxiv"]
        else:
            mentions.append(["", match["arxiv"]])
        end = match.end()
    if not mentions:
        raise ValueError(
            f"{rule.name}: the first paragraph of the docstring names no paper; write "
            f"'Kingma & Ba 2015' or 'arXiv:1412.6980', or both with a comma between"
        )
    return mentions


def summary(rule):
    """The first sentence."""
    text = " ".join(paragraphs(rule)[0].split())
    first = re.split(r"(?<!\bal)(?<!\b[A-Z])\. ", text)[0]
    return escaped(first.removesuffix("."))


def escaped(text):
    """Plain text as Markdown, with what stands between backticks as code."""
    parts = re.split(r"(`+[^`]+`+)", text)
    code = [f"`{part.strip('`')}`" for part in parts[1::2]]
    parts[1::2] = code
    parts[::2] = [re.sub(r"([*<$\\])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def linked(text):
    return re.sub(ARXIV, lambda m: arxiv_link(m["arxiv"], m[0]), text)


def arxiv_link(number, text):
    return f"[{text}](https://arxiv.org/abs/{number})"


def cited(rule):
    """The papers with links, for a table."""
    return "; ".join(
        arxiv_link(number, paper or f"arXiv:{number}") if number else paper
        for paper, number in papers(rule)
    )


# Tables -----------------------------------------------------------------------------


def span(numbers):
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def others(rule):
    """The options of a rule but ``lr``."""
    return ", ".join(name for name in rule.hyperparameters if name != "lr")


# Each stands where a page has a comment of its name, and nowhere else. It is made from
# the file that the comment names, and may keep something of the table as it was.
TABLES = {
    "speed": lambda source, old: measured.speed(source),
    "loop": lambda source, old: measured.torch_loops(source),
    "loops": lambda source, old: measured.loops(source),
    "training": lambda source, old: measured.training(source),
    "steps": lambda source, old: measured.steps(source),
    "results": measured.results,
}
BEFORE = r"<!-- (?P<name>\w+): made by docs/make\.py from (?P<source>\S+) -->\n"
TABLE = re.compile(
    rf"(?P<before>{BEFORE})(?P<old>.*?)(?P<after><!-- /(?P=name) -->)", re.S
)


def filled(root, page, text):
    """The text of a page, with new tables in their places."""

    def new(match):
        made = TABLES[match["name"]](root / match["source"], match["old"])
        return f"{match['before']}{made}\n{match['after']}"

    for match in re.finditer(BEFORE, text):
        if match["name"] not in TABLES:
            raise ValueError(
                f"{page.name} asks for a table {match['name']!r}, and there are "
                f"{', '.join(TABLES)}"
            )
        if not TABLE.match(text, match.start()):
            raise ValueError(f"{page.name} has no <!-- /{match['name']} --> to end it")
    return TABLE.sub(new, text)


def written(root):
    """The pages that are written by hand, in which tables may have a place."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def grouped(rules):
    """The rules under each heading."""
    heads = {name: head for head, names in GROUPS.items() for name in names.split()}
    groups = {head: [] for head in (*GROUPS, OTHERS)}
    for rule in rules:
        groups[heads.get(rule.name, OTHERS)].append(rule)
    return {head: those for head, those in groups.items() if those}


def index(rules):
    """The page of all rules."""
    names = ", ".join(f"`{name}`" for name in backends.MODULES)
    parts = [
        "# Rules",
        "Each rule is a function that makes an optimizer: `fastopt.adamw(params, "
        "lr=1e-3)`. Its page has the formula, the options, the state and the code. "
        "[Training strategy](../strategy.md) says which one to choose, and the "
        "[gallery](../gallery.md) shows how they move.",
        '"Bytes" is the optimizer state in bytes for each float32 parameter, so 8 is '
        f"twice the memory of the parameters. Every rule runs on the backends {names}.",
    ]
    head = ("rule", "what it is", "paper", "bytes ", "options beside `lr`")
    for title, those in grouped(rules).items():
        rows = [
            (
                f"[`{called(rule)}`]({rule.name}.md)",
                summary(rule),
                cited(rule),
                size(rule),
                others(rule),
            )
            for rule in those
        ]
        parts += [f"## {title}", table(head, rows)]
    return "\n\n".join(parts) + "\n"


def parity(text, rules):
    """The page of what rules were compared with, whose rows are written by hand: in the
    order of the rules, with a row for each new one."""
    head, rows, rest = ROWS.split(text, maxsplit=1)
    kept = {row.split("`")[1]: row for row in rows.splitlines()}
    lines = [
        kept.get(name, f"| `{name}` | nothing but its oracle | `test_oracle` |  |")
        for name in map(called, rules)
    ]
    return "\n".join([head, *lines, rest])


# Pages ------------------------------------------------------------------------------


def page(rule):
    """All about a rule."""
    formulas, latex = formula.Formulas(rule), formula.Latex()
    for name in rule.hyperparameters:  # they come first where two look alike
        latex.symbol(name)
    source = inspect.getsource(module(rule)).rstrip()
    about, *notes = [linked(escaped(paragraph)) for paragraph in paragraphs(rule)]
    start = "params"
    if "lr" in rule.hyperparameters:
        start += f", lr={defaults(rule)['lr']}"
    elif rule is lookahead:
        start = "fastopt.adamw(params)"
    parts = [
        f"# {called(rule)}",
        about,
        code(f"opt = fastopt.{called(rule)}({start})\nopt.step(grads)" + more(rule)),
        *notes,
        "## Options",
        options(rule, latex),
        *refusals(formulas),
        "## State",
        *state(rule, formulas, latex),
        "## Formula",
        *products(rule, latex),
        *sections(formulas, latex),
        *estimate(rule),
        "## Code",
        f"[fastopt/rules/{rule.name}.py](../../fastopt/rules/{rule.name}.py):",
        code(source),
    ]
    comment = f"<!-- Made by docs/make.py from fastopt/rules/{rule.name}.py. -->"
    return "\n\n".join([comment, *parts]) + "\n"


def code(text, language="python"):
    return f"```{language}\n{text}\n```"


def math(tex):
    return f"$`{tex}`$"  # GitHub's form in which Markdown leaves everything alone


def defaults(rule):
    """The defaults as they are written: 1e-3, not 0.001."""
    source = inspect.getsource(rule.scalars)
    arguments = ast.parse(source).body[0].args
    names = [argument.arg for argument in arguments.args[-len(arguments.defaults) :]]
    texts = [ast.get_source_segment(source, value) for value in arguments.defaults]
    return dict(zip(names, texts, strict=True))


def more(rule):
    """What else one calls."""
    lines = []
    if rule.estimate:
        lines.append("opt.estimate(other)  # now and then: see below")
    if rule.evaluate:
        lines.append("best = opt.eval_params()  # to validate with and to keep")
    return "".join(f"\n{line}" for line in lines)


def options(rule, latex):
    rows = [
        (
            f"`{name}`",
            f"that of `{rule.follows[name]}` at first"
            if name in rule.follows
            else f"`{default}`",
            math(latex.symbol(name)),
        )
        for name, default in defaults(rule).items()
    ]
    return table(("option", "default", "in the formula"), rows)


def refusals(formulas):
    """When scalars raises an error."""
    for node in formulas.refused:
        text = node.body[0].exc.args[0]
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        texts = [part.value for part in parts if isinstance(part, ast.Constant)]
        message = "".join(texts).partition(", got")[0]
        yield f"Refused where `{ast.unparse(node.test)}`: {escaped(message)}."


def switched(names):
    """Options that select a variant."""
    return " and ".join(f"`{name}`" for name in names)


def state(rule, formulas, latex):
    """The buffers, what they start at, and what is remembered beside them."""
    buffers = {}  # a buffer -> the options of the variants that have it
    options = {rule: (), **{variant: on for on, variant in rule.variants.items()}}
    for section in formulas.sections:
        if section.what == "update":
            owner, symbols = section.rule, map(latex.symbol, section.names[2:])
            for name, symbol in zip(owner.state, symbols, strict=True):
                row = f"`{name}`", math(symbol), begins(owner.starts.get(name, 0))
                buffers.setdefault(row, []).append(options[owner])
    rows = []
    for row, variants in buffers.items():
        common = [n for n in variants[-1] if all(n in names for names in variants)]
        rows.append((*row, switched(common) or "always"))
    head = ("buffer", "in the formula", "starts at", "with")
    shown = 4 if rule.variants else 3
    if rows:
        yield table(head[:shown], [row[:shown] for row in rows])
    yield f"{size(rule)} bytes for each float32 parameter."
    if rule.factored:
        v = math(latex.symbol(rule.state[0]))
        yield (
            f"Of an array of two and more dimensions, {v} is kept of rows and columns "
            f"alone: the averages of the means of rows and of columns, whose product, "
            f"over the mean of those of the rows, stands for it."
        )
    if rule.carry:
        each = "array" if rule.by_segment else "group"
        yield f"Remembered from step to step in float64, one for each {each}:"
        rows = [
            (f"`{name}`", math(latex.symbol(name)), begins(first))
            for name, first in rule.carry.items()
        ]
        yield table(("number", "in the formula", "starts at"), rows)


def begins(start):
    if start == "p":
        return "the parameter"
    return f"`{start}`" if isinstance(start, str) else f"{start:g}"


def sections(formulas, latex):
    """The formulas, each after what it is about."""
    rule = formulas.rule
    over = "each array" if rule.over == "segment" else "all arrays together"
    for section in formulas.sections:
        if section.what == "scalars":
            steps = f", with {math('t')} = 1 at the first" if section.uses("t") else ""
            yield f"Once a step{steps}:"
        elif section.what == "measure":
            forgotten = any(not line.new for line in section.lines)
            but = "; what changes here is forgotten again" if forgotten else ""
            yield f"Sums over the elements of {over}, before anything changes{but}:"
        elif section.what == "settle":
            once = ", for each array" if rule.over == "segment" else ""
            count = f", with {math('n')} elements" if section.uses("n") else ""
            yield f"From these sums{once}{count}:"
        elif section.what == "evaluate":
            x = math(latex.symbol(section.lines[-1].name))
            yield f"What `opt.eval_params()` gives, {x}:"
        elif rule is lookahead:
            slow, p = map(latex.symbol, section.names)
            yield (
                f"Every {math('k')} steps, for each element; then {math(p)} is set to "
                f"{math(slow)}:"
            )
        elif section.rule is rule:
            p, g, *_ = map(latex.symbol, section.names)
            yield f"For each element {math(p)} with its gradient {math(g)}:"
        else:
            on = {variant: names for names, variant in rule.variants.items()}
            yield f"With {switched(on[section.rule])}:"
        yield code(latex.lines(section.lines), "math")


def products(rule, latex):
    """What Muon does before its step."""
    if rule is not muon:
        return
    u, v = math("u"), math("v")
    yield f"For each element of a matrix, first, {u}, which is to be made orthogonal:"
    for section in formula.Formulas(direction).sections:
        yield code(latex.lines(section.lines), "math")
    about, block = re.split(r"\n+(?=```math)", inspect.cleandoc(orthogonalize.__doc__))
    yield from (escaped(about), block)
    values = map(formula.load, formula.arguments(adjustment))
    (factor,) = formula.Call(adjustment, values, formula.Section()).results
    yield f"This, times a factor, goes into {v}:"
    yield code(rf"v \leftarrow {latex(factor)} \, X", "math")


def estimate(rule):
    if rule.estimate:
        name, other = rule.estimate
        p, g = math("p"), math("g")
        yield f"`opt.estimate(other)`, where {p} is `{name}` and {g} is the other:"
        formulas, latex = formula.Formulas(other), formula.Latex()
        yield from (code(latex.lines(s.lines), "math") for s in formulas.sections)


# Files ------------------------------------------------------------------------------


def wanted(root, rules):
    """What is to stand in which file; None for a page that has no rule."""
    folder = root / "docs" / "rules"
    files = dict.fromkeys(folder.glob("*.md"))
    for path in written(root):
        files[path] = filled(root, path, path.read_text("utf-8"))
    files[folder / "README.md"] = index(rules)
    path = root / "docs" / "parity.md"
    files[path] = parity(files[path], rules)
    loops = loop.read(root / "bench" / "results" / "loop.json")
    files[root / "docs" / "loop.svg"] = picture.loops(loops)
    for rule in rules:
        try:
            files[folder / f"{rule.name}.md"] = page(rule)
        except ValueError as error:
            raise ValueError(f"fastopt/rules/{rule.name}.py: {error}") from error
    return files | stubs.wanted(root, [rule for rule in rules if rule not in CLASSES])


def stale(root, rules=CATALOGUE):
    """The files that are to change, and how."""
    changes = {}
    for path, text in wanted(root, rules).items():
        old = path.read_text(encoding="utf-8") if path.exists() else None
        if old != text:
            lines = [(part or "").splitlines() for part in (old, text)]
            diff = difflib.unified_diff(*lines, str(path.relative_to(root)), n=0)
            changes[path] = text, [line.rstrip("\n") for line in diff]
    return changes


def main(root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    changes = stale(root)
    for path, (text, diff) in changes.items():
        if options.check:
            print("\n".join([*diff[:20], *(["..."] if len(diff) > 20 else [])]))
        elif text is None:
            path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if options.check and changes:
        names = ", ".join(str(path.relative_to(root)) for path in changes)
        sys.exit(f"not up to date: {names}; run python docs/make.py")


if __name__ == "__main__":
    main()
