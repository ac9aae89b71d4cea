"""The README's table and the pages of docs/rules are what the rules say, and the
formulas on them compute what the rules do."""

import ast
import builtins
import copy
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import fastopt
from fastopt import Rule, adam
from fastopt import language as primitives
from fastopt.rule import cbrt, copysign, maximum, minimum, sign, sqrt, where, wide

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import formula  # noqa: E402
import make  # noqa: E402
from make import CATALOGUE  # noqa: E402

sys.path.remove(str(ROOT / "docs"))

FILE_CONSTANT = 0.25


# Rules with all that there is in rules --------------------------------------------


def towards(p, g, m, a, decay):
    """What is assigned to in here stays in here, but for m."""
    g = g + decay * p
    m = m + a * (g - m)
    return cbrt(abs(m)) * sign(m), m


def half(x, two):
    x = x / two
    return x


def all_scalars(
    t, d, seen, lr=1e-3, beta1=0.9, eps=2.5e-8, rho=2.0, weight_decay=0.1, warm=False
):
    if not 0 < rho <= 5 or (warm and rho == 3):
        raise ValueError(f"rho must be in (0, 5], got {rho!r}")
    c = 1 - beta1**t
    if warm and t < 3:
        lr = lr / (t + 1)
        c = 1.0
    elif t != 7 and not warm:
        lr = -lr * -1.5
    if t == 2 and weight_decay > 0:
        lr, eps = eps, lr
        if warm:
            rho += 1
            c = c / rho
    elif warm:
        power = 1.5
        rho = rho**power
    else:
        power = 0.5
        beta1 = beta1**power
    c *= math.sqrt(2.0) + min(lr, max(eps, 1.0)) ** 0.5 + math.exp(-math.log(rho))
    weight, m = (lr, float(rho)) if warm or t >= 2 else (1.0, abs(-c))
    lr, weight = weight, lr + FILE_CONSTANT
    large = 100.0 if t > 5 else 10.0 if t > 1 else 1.0
    step = weight * m / (lr + eps + seen)
    return lr, 1 - beta1, step, c, 0.0, 2.0, weight_decay, large, d


def all_measure(p, g, m, s, lr, a, weight, c, zero, two, decay):
    u, m = towards(p, g, m, a, half(decay, two))
    return wide(u) * wide(m), abs(p - s), m


def all_settle(t, n, um, distance, m, lr, a, weight, c, zero, two, decay, large, d):
    size = sqrt(um * um + 1) / n
    if um > 1:
        size = size / um
        weight = weight / size
    lr = lr * size
    d = max(d, distance / n) if distance > 0 else d
    return lr, a, d * weight, c - m / n, zero, two, decay, large, d, t + n


def all_update(p, g, m, s, lr, a, weight, c, zero, two, decay, large):
    u, m = towards(p, g, m, a, half(decay, two))
    size = half(u + c, two) - half(u - c, two) * half(u, two + two)
    v = minimum(maximum(g, -large), large)
    v += where((v >= zero) & (g != zero) | (p < zero), v * v * two, u)
    v = v * where(g > c, a, where(g <= -c, two, weight))
    s, v = v - s, s + copysign(v, g) / (two - -a)
    lr = lr * -(two * size)
    return p + lr * (v - (s - m)) - decay * lr, m + p * v, s


def all_evaluate(p, m, s, lr, a):
    u = p - s
    return s + (lr / a) * u


def estimate(p, g, a, lr):
    return (p + a * (g * g - p),)


def estimate_scalars(
    t, lr=1e-3, beta1=0.9, eps=1e-8, rho=2.0, weight_decay=0.1, warm=False
):
    return 1 - beta1, lr


def carried_update(p, g, step, old):
    return (p - step * g + old,)


def carried_scalars(t, d, seen, lr=1e-3, d0=1e-6):
    return d * lr, d, seen, (d + seen) / t


def swapped_scalars(t, d, seen, lr=1e-3, d0=1e-6):
    return d + lr, d, seen, d


def names_meet(p, g, m, eps, c, d, lr, decay):
    lr = lr * d
    c = c + lr
    beta1 = m - eps
    t = beta1 * c
    return p - t * lr * decay, m + p


def changed_conditions(t, d, seen, lr=0.5, d0=0.1, rho=2.0, beta1=0.9):
    """What a condition asks for may change where it holds."""
    if rho > t:
        rho = rho - t
        lr = lr * rho
    if lr > beta1:
        lr = beta1
    else:
        beta1 = lr / rho
        lr = lr + beta1
    return lr, beta1 * rho * lr, d, seen


def in_a_circle(p, g, m, s):
    return p + s, s * p, m - p


def none(t, lr=1e-3):
    return ()


def only_lr(t, lr=1e-3):
    return (lr,)


EVERYTHING = Rule(
    all_update,
    all_scalars,
    state=("m", "s"),
    starts={"s": "p", "m": 1e-6},
    carry={"d": 0.5, "seen": "lr"},
    measure=all_measure,
    settle=all_settle,
    over="all",
    evaluate=all_evaluate,
    estimate=("s", Rule(estimate, estimate_scalars)),
    name="everything",
)
CARRY = {"d": "d0", "seen": 0.5}
SYNTHETIC = (
    EVERYTHING,
    Rule(carried_update, carried_scalars, carry=CARRY, name="carried"),
    Rule(carried_update, swapped_scalars, carry=CARRY, name="swapped"),
    Rule(names_meet, adam.scalars, state=("m",), name="names_meet"),
    Rule(carried_update, changed_conditions, carry=CARRY, name="conditions"),
    Rule(in_a_circle, none, state=("m", "s"), name="in_a_circle"),
)

every_rule = pytest.mark.parametrize("rule", CATALOGUE, ids=lambda rule: rule.name)
# And the variants, with the scalars of the rule.
KERNELS = [(rule, one) for rule in (*CATALOGUE, *SYNTHETIC) for one in make.kinds(rule)]


# The formulas compute what the rules do -------------------------------------------


class Runnable(ast.NodeTransformer):
    """A formula's expression as one of Python's, with letters for primes."""

    def visit_Name(self, node):
        return ast.Name(node.id.replace("'", "_"), ast.Load())

    def visit_IfExp(self, node):
        return self.calls("where", [node.test, node.body, node.orelse])

    def visit_Call(self, node):
        return self.calls(node.func.value, node.args)

    def calls(self, name, arguments):
        arguments = [self.visit(part) for part in arguments]
        return ast.Call(ast.Name(name, ast.Load()), arguments, [])


FUNCTIONS = {f.__name__: f for f in (*primitives.PRIMITIVES, cbrt)}
FUNCTIONS |= {"sqrt": np.sqrt, "abs": np.abs, "log": np.log, "exp": np.exp}
FUNCTIONS |= {"min": np.minimum, "max": np.maximum, "sum": np.sum}


def evaluated(expression, values):
    known = {name.replace("'", "_"): value for name, value in values.items()}
    tree = ast.Expression(Runnable().visit(copy.deepcopy(expression)))
    code = compile(ast.fix_missing_locations(tree), "formula", "eval")
    return eval(code, FUNCTIONS | known)


def run(lines, values):
    """The values of all names after these lines."""
    values = dict(values)
    for line in lines:
        if line.when is None or evaluated(line.when, values):
            values[line.name] = evaluated(line.value, values)
    return values


def by_formula(rule, kernel, values, p, g, state):
    """What a step makes of parameter, state and carry, and what evaluate gives."""
    results, evaluated = (p, *state), p
    for section in formula.Formulas(rule).sections:
        what, lines, names = section.what, section.lines, section.names
        if what == "update" and section.rule is not kernel:
            continue
        if what in ("scalars", "settle"):
            values = run(lines, values)
            continue
        given = (p, *state) if what == "evaluate" else (p, g, *state)
        after = run(lines, values | dict(zip(names, given, strict=True)))
        if what == "measure":
            sums = [line.name for line in lines if "sum" in ast.dump(line.value)]
            values = values | {name: after[name] for name in sums} | {"n": p.size}
        elif what == "evaluate":
            evaluated = after[lines[-1].name]
        else:
            results = [after[name] for name in names[:1] + names[2:]]
    return results, [values[name] for name in rule.carry], evaluated


def by_rule(rule, kernel, values, p, g, state):
    """The same from the rule's functions themselves."""
    numbers = given = rule.scalars(*values.values())
    if rule.settle:
        terms = rule.measure(p, g, *state, *given[: rule.measure_count])
        handed = len(given) - rule.settle_count
        sums = map(np.sum, terms)
        settled = rule.settle(values["t"], p.size, *sums, *given[handed:])
        numbers = (*given[:handed], *settled)
    results = kernel.update(p, g, *state, *numbers[: kernel.scalar_count])
    evaluated = p
    if rule.evaluate:
        count = rule.evaluate.__code__.co_argcount - 1 - len(state)
        evaluated = rule.evaluate(p, *state, *given[:count])
    return results, numbers[len(numbers) - len(rule.carry) :], evaluated


def moved(value, power):
    return math.copysign(abs(value) ** power, value)


def settings(rule):
    """The defaults, and others, with the flags off and on."""
    flags = [n for n, value in rule.hyperparameters.items() if isinstance(value, bool)]
    for power in (1, 0.9):
        for on in [(), *((flag,) for flag in flags)]:
            values = {
                name: name in on if name in flags else moved(value or 0.1, power)
                for name, value in rule.hyperparameters.items()
            }
            whole = {"dampening": 0.0, "ns_steps": 3.0, "k": 3.0}
            values |= {name: whole[name] for name in whole.keys() & values.keys()}
            yield values


def disagreement(rule, kernel):
    """The largest relative error of the formulas at any of some steps."""
    rng, worst = np.random.default_rng(0), 0.0
    for hyperparameters in settings(rule):
        for t in (1, 2, 7):
            p, g, *state = rng.standard_normal((2 + len(kernel.state), 50))
            state = [abs(buffer) for buffer in state]  # some are under a root
            carry = dict.fromkeys(rule.carry, 0.6)
            values = {"t": t, **carry, **hyperparameters}
            with np.errstate(all="ignore"):
                wanted = by_rule(rule, kernel, values, p, g, state)
                got = by_formula(rule, kernel, values, p, g, state)
            for ours, theirs in zip(flat(got), flat(wanted), strict=True):
                error = np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1)
                worst = np.maximum(worst, np.max(error))
    return worst


def flat(result):
    buffers, carry, evaluated = result
    return [*buffers, *carry, evaluated]


@pytest.mark.parametrize(
    "rule, kernel", KERNELS, ids=[f"{r.name}-{k.name}" for r, k in KERNELS]
)
def test_the_formulas_are_the_rule(rule, kernel):
    assert disagreement(rule, kernel) < 1e-12


MUTANTS = {
    "values that are replaced while others need them": (
        "Section.needed",
        lambda self, start=0: set(),
    ),
    "no primes": ("fresh", lambda name, used: name),
    "old numbers by new names": ("names_of", lambda *nodes: set()),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_flags_formulas_that_only_look_right(mutant, monkeypatch):
    name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(f"formula.{name}", wrong)
    assert not max(disagreement(rule, rule) for rule in SYNTHETIC) < 1e-12


# LaTeX ----------------------------------------------------------------------------

NODES = {
    "a + b - (c - d)": "a + b - (c - d)",
    "-(a + b) * -c / d": r"\frac{(-(a + b)) \, (-c)}{d}",
    "a * (b / c)": r"a \, \frac{b}{c}",
    "a * a * b * a": r"a^{3} \, b",
    "(a + b) * (a + b)": r"(a + b)^{2}",
    "1 - beta1**t": r"1 - \beta_{1}^{t}",
    "(a * b) ** (t - 1)": r"(a \, b)^{t - 1}",
    "2.0 * 0.5": r"2 \cdot 0.5",
    "1e-8 + 2.5e-05": r"10^{-8} + 2.5 \cdot 10^{-5}",
    "lr * weight_decay": r"\eta \, \lambda",
    "momentum * mu": r"\mu \, \mathrm{mu}",
    "lambd * weight_decay": r"\lambda \, \mathrm{weight\_decay}",
    "v_max + v_hat + s_12 + x_1_2": (r"v_{\max} + \hat{v} + s_{12} + \mathrm{x\_1\_2}"),
    "step_size * max_exp": r"\mathrm{step\_size} \, \mathrm{max\_exp}",
    "sqrt(v) + cbrt(v)": r"\sqrt{v} + \sqrt[3]{v}",
    "abs(a / b)": r"\left\lvert \frac{a}{b} \right\rvert",
    "maximum(a, minimum(b, c))": r"\max(a,\ \min(b,\ c))",
    "max(a / b, min(b, c))": r"\max\left(\frac{a}{b},\ \min(b,\ c)\right)",
    "copysign(a, sign(b))": r"\mathrm{copysign}(a,\ \mathrm{sign}(b))",
    "wide(g) * wide(g)": "g^{2}",
    "float(t)": "t",
    "math.sqrt(a) + math.log(b) + math.exp(c)": r"\sqrt{a} + \ln(b) + \exp(c)",
    "where(a > b, c, d)": (
        r"\begin{cases} c & \text{if } a > b \\ d & \text{otherwise} \end{cases}"
    ),
    "a * where((a <= b) & ((c != d) | (c >= d)), c, d)": (
        r"a \, \left(\begin{cases} c & \text{if } a \le b \text{ and } "
        r"(c \ne d \text{ or } c \ge d) \\ d & \text{otherwise} \end{cases}\right)"
    ),
    "a if not b else c if d == 1 or not 0 < t < 5 else 1": (
        r"\begin{cases} a & \text{if } \text{not } b \\ c & \text{if } d = 1 "
        r"\text{ or } (\text{not } (0 < t < 5)) \\ 1 & \text{otherwise} \end{cases}"
    ),
    "FILE_CONSTANT * a": r"0.25 \, a",
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Makes a function of a body, in a file, with all the names that it uses."""

    def function(body):
        names = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
        names -= {"math", "FILE_CONSTANT", "twice", *vars(primitives), *dir(builtins)}
        path = tmp_path / "written.py"
        path.write_text(
            "import math\nfrom fastopt.rule import *\nFILE_CONSTANT = 0.25\n"
            "def twice(x):\n    return x + x, x\n"
            f"def function({', '.join(sorted(names))}):\n"
            + textwrap.indent(body, "    ")
        )
        spec = importlib.util.spec_from_file_location("written", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "written", module)
        spec.loader.exec_module(module)
        return module.function

    return function


def read(function):
    names = formula.arguments(function)
    section = formula.Section(inputs=names)
    call = formula.Call(function, map(formula.load, names), section)
    formula.show([section])
    return call.results, section.lines


@pytest.mark.parametrize("node", NODES)
def test_every_expression(node, written):
    results, _ = read(written(f"return {node}"))
    assert formula.Latex()(*results) == NODES[node]


# Neither a rule's code nor a formula, each for a reason of its own.
NO_FORMULAS = {
    "while a: a = b\nreturn a": "While",
    "for a in b: a = c\nreturn a": "For",
    "return [a]": "List",
    "return a[b]": "Subscript",
    "return a % b": "BinOp",
    "return a // b": "BinOp",
    "return +a": "UnaryOp",
    "return ~a": "UnaryOp",
    "return a > b": "Compare",
    "return (a > b) + a": "Compare",
    "return a and b": "BoolOp",
    "return a & b": "BinOp",
    "return where(a in b, a, b)": "Compare",
    "return where(a - b, a, b)": "BinOp",
    "return where(a, b)": "Call",
    "return maximum(a, b, c)": "Call",
    "return sqrt(x=a)": "Call",
    "return sqrt(*a)": "Starred",
    "return round(a)": "Call",
    "return math.sin(a)": "Call",
    "return a.b": "Attribute",
    "return 'a'": "Constant",
    "return True": "Constant",
    "return None": "Constant",
    "return (lambda: a)()": "Call",
    "return a + twice(b)": "Call",
    "return twice(a, b)": "Call",
    "return twice(x=a)": "Call",
    "return": "Return",
    "a = b": "FunctionDef",
    "return a\nreturn b": "Return",
    "assert a\nreturn a": "Assert",
    "a.b = c\nreturn a": "Assign",
    "a = b = c\nreturn a": "Assign",
    "a, (b, c) = d, e\nreturn a": "Assign",
    "a, b = c\nreturn a": "Assign",
    "a, b = c, d, e\nreturn a": "Assign",
    "a, b = (c, d) if e else c\nreturn a": "Assign",
    "a = twice(b)\nreturn a": "Assign",
    "a: float = b\nreturn a": "AnnAssign",
    "if a: return b\nreturn c": "Return",
    "if a: raise ValueError('no')\nelse: b = c\nreturn b": "If",
    "if a:\n    b = c\n    if b: raise ValueError('no')\nreturn b": "If",
    "b = undefined_\nreturn b": "Name",
}


@pytest.mark.parametrize("body", NO_FORMULAS)
def test_what_has_no_formula_is_refused(body, written):
    function = written(body)
    if "new" in body or "undefined_" in body:  # a local name, or none at all
        text = Path(function.__code__.co_filename).read_text()
        text = re.sub(r"new\)|undefined_\)", ")", text)
        Path(function.__code__.co_filename).write_text(text)
    with pytest.raises(formula.Unsupported, match=f"for {NO_FORMULAS[body]} in"):
        results, lines = read(function)
        latex = formula.Latex()
        latex.lines(lines)
        [latex(result) for result in results]


# Pages ----------------------------------------------------------------------------


@every_rule
def test_every_rule_has_its_page_and_row(rule):
    page = (ROOT / "docs" / "rules" / f"{rule.name}.md").read_text("utf-8")
    assert inspect.getsource(make.module(rule)).rstrip() in page
    assert re.search(rf"fastopt\.{make.called(rule)}\(.*params", page)
    for name in (*rule.hyperparameters, *rule.state, *rule.carry):
        assert f"| `{name}` |" in page
    index = (ROOT / "docs" / "rules" / "README.md").read_text("utf-8")
    assert index.count(f"\n| [`{make.called(rule)}`]({rule.name}.md) |") == 1
    compared, _, _ = (ROOT / "docs" / "parity.md").read_text("utf-8").partition("\n## ")
    assert compared.count(f"\n| `{make.called(rule)}` |") == 1


@every_rule
def test_the_call_on_its_page_runs(rule):
    page = (ROOT / "docs" / "rules" / f"{rule.name}.md").read_text("utf-8")
    names = {"fastopt": fastopt, "params": [np.ones((3, 2))]}
    names |= {"grads": [np.ones((3, 2))], "other": [np.ones((3, 2))]}
    exec(re.search(r"^```python\n(.*?)^```", page, re.S | re.M)[1], names)
    assert names["opt"].steps == 1


@pytest.mark.parametrize("rule", (*CATALOGUE, EVERYTHING), ids=lambda rule: rule.name)
def test_the_latex_is_well_formed(rule, monkeypatch):
    monkeypatch.setattr(make, "paragraphs", lambda rule: ["Tests. Doe 2000."])
    page, _, _ = make.page(rule).partition("## Code")
    blocks = re.findall(r"```math\n(.*?)```|\$`(.*?)`\$", page, re.S)
    assert blocks
    for tex in map("".join, blocks):
        assert tex.count("{") == tex.count("}")
        assert tex.count(r"\left") - tex.count(r"\leftarrow") == tex.count(r"\right")
        begun = re.findall(r"\\begin{(\w+)}", tex)
        assert sorted(begun) == sorted(re.findall(r"\\end{(\w+)}", tex))
        for line in tex.split("\n"):
            assert line.count("&") <= 1 or r"\begin{cases}" in line


def test_a_page_of_everything(monkeypatch):
    monkeypatch.setattr(make, "paragraphs", lambda rule: ["Tests. Doe 2000."])
    page = make.page(EVERYTHING)
    for part in (
        "| `lr` | `1e-3` | $`\\eta`$ |",
        "Refused where `not 0 < rho <= 5 or (warm and rho == 3)`: rho must be in (0",
        "| `m` | $`m`$ | 1e-06 |",
        "| `s` | $`s`$ | the parameter |",
        "8 bytes for each float32 parameter.",
        "Remembered from step to step in float64, one for each group:",
        "| `d` | $`d`$ | 0.5 |",
        "| `seen` | $`\\mathrm{seen}`$ | `lr` |",
        "Sums over the elements of all arrays together, before anything changes",
        "From these sums, with $`n`$ elements:",
        "best = opt.eval_params()",
        "opt.estimate(other)",
    ):
        assert part in page


def test_what_docstrings_may_say(monkeypatch):
    for text, papers in {
        "Adam. Kingma & Ba 2015, arXiv:1412.6980.": [("Kingma & Ba 2015", "1412.6980")],
        "GD: descent. Cauchy 1847, Comptes rendus 25:536.": [("Cauchy 1847", "")],
        "Chen et al. 2023 (arXiv:2302.06675).": [("Chen et al. 2023", "2302.06675")],
        "Lion, arXiv:2302.06675v4.": [("", "2302.06675")],
        "Duchi, Hazan and Singer (2011).": [("Duchi, Hazan and Singer 2011", "")],
        "One of van der Maaten & Le Roux 2010, JMLR 12,\narXiv:math/0512345.": [
            ("van der Maaten & Le Roux 2010", "math/0512345")
        ],
        "In torch 2.11 as in Zeiler 2012; see arXiv:1212.5701.": [
            ("Zeiler 2012", ""),
            ("", "1212.5701"),
        ],
        "As Şimşekli-O'Neil et al. 2020, ICML.\n\nNot Doe 2000.": [
            ("Şimşekli-O'Neil et al. 2020", "")
        ],
    }.items():
        rule = Rule(estimate, estimate_scalars, name="told")
        monkeypatch.setattr(make.module(rule), "__doc__", text)
        assert [*map(tuple, make.papers(rule))] == papers
    monkeypatch.setattr(make.module(rule), "__doc__", "Mine. In 2019 I made it.")
    with pytest.raises(ValueError, match="told: .* names no paper; write"):
        make.papers(rule)
    assert make.escaped("a*b of ``x*y`` <z") == r"a\*b of `x*y` \<z"


# Up to date? ----------------------------------------------------------------------


def test_all_is_up_to_date():
    assert not make.stale(ROOT)


@pytest.fixture
def repository(tmp_path):
    """A copy of what docs/make.py reads and writes."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    for stub in ROOT.glob("fastopt/**/*.pyi"):
        copy = tmp_path / stub.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stub, copy)
    return tmp_path


def command(repository, *arguments):
    script = repository / "docs" / "make.py"
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1"},
    )


def test_the_command(repository):
    assert command(repository, "--check").returncode == 0
    page = repository / "docs" / "rules" / "adam.md"
    text = page.read_text("utf-8")
    page.write_text(text.replace(r"\beta_{1}", r"\beta_{2}"), "utf-8")
    done = command(repository, "--check")
    assert done.returncode == 1
    assert "docs/rules/adam.md; run python docs/make.py" in done.stderr
    assert r"+| `beta1` | `0.9` | $`\beta_{1}`$ |" in done.stdout
    assert r"\beta_{1}" not in page.read_text("utf-8")  # nothing was written
    assert command(repository).returncode == 0
    assert page.read_text("utf-8") == text
    assert command(repository, "--check").returncode == 0


def test_stale_missing_and_left_over_files(repository):
    pages = repository / "docs" / "rules"
    (pages / "adam.md").unlink()
    (pages / "gone.md").write_text("# A rule that was\n")
    formats = repository / "docs" / "formats.md"
    text = formats.read_text("utf-8")
    formats.write_text(text.replace("| 20,000,000 |", "| 20 |"), "utf-8")
    names = {path.name for path in make.stale(repository)}
    assert names == {"adam.md", "gone.md", "formats.md"}


def test_tables_stand_where_comments_ask_for_them(repository):
    """A table may be on any page, on several or on none."""
    readme, page = repository / "README.md", repository / "docs" / "page.md"
    readme.write_text("# A page without tables\n", "utf-8")
    page.write_text(
        "Before.\n"
        "<!-- steps: made by docs/make.py from bench/results/formats.json -->\n"
        "old\n<!-- /steps -->\nBetween.\n"
        "<!-- loop: made by docs/make.py from bench/results/loop.json -->\n"
        "<!-- /loop -->\nAfter.\n",
        "utf-8",
    )
    changes = make.stale(repository)
    assert [*changes] == [page]
    new, _ = changes[page]
    assert new.startswith("Before.\n<!-- steps: made") and new.endswith("->\nAfter.\n")
    assert "| 8bit | 50,000,000 | " in new and "\nold\n" not in new
    assert "<!-- /steps -->\nBetween.\n" in new and "| mlp 64 | " in new

    page.write_text("<!-- no: made by docs/make.py from x -->\n<!-- /no -->\n", "utf-8")
    with pytest.raises(ValueError, match="page.md asks for a table 'no', and there"):
        make.stale(repository)
    page.write_text("<!-- loop: made by docs/make.py from x -->\n", "utf-8")
    with pytest.raises(ValueError, match="page.md has no <!-- /loop --> to end it"):
        make.stale(repository)


def test_every_table_of_measurements_has_a_page():
    pages = [path.read_text("utf-8") for path in make.written(ROOT)]
    tables = {match["name"] for page in pages for match in make.TABLE.finditer(page)}
    assert {*make.TABLES} == tables


def test_the_tables_of_training(tmp_path):
    """Bold is what is beyond the spread; what was not trained, or diverged, says so."""

    def result(task, rule, format, mean, change, within):
        names = {"task": task, "rule": rule, "format": format, "within": within}
        return names | {"mean": mean, "spread": 0.5, "change": change, "error": 0.1}

    results = [
        result("digits", "adamw", "float32", 2.0, 0.0, True),
        result("digits", "adamw", "bf16", 1.75, -0.25, True),
        result("digits", "lion", "float32", 3.0, 0.0, True),
        result("digits", "lion", "fp16", 4.0, 1.0, False),
        result("text", "adamw", "float32", 1.0, 0.0, True),
        result("text", "adamw", "bf16", None, None, False),
    ]
    (tmp_path / "r.json").write_text(json.dumps({"results": results}))
    digits, text = make.measured.training(tmp_path / "r.json").split("| text |")
    assert digits.startswith("| digits | adamw | lion |\n")
    assert "\n| float32 | 2.0000 ± 0.5000 | 3.0000 ± 0.5000 |\n" in digits
    assert "\n| bf16 | -0.500 ± 0.200 | – |\n" in digits
    assert "\n| fp16 | – | **+2.000 ± 0.200** |\n" in digits
    assert "\n| bf16 | **diverged** | – |\n" in text


def test_pages_name_the_machine_of_their_tables():
    for page in make.written(ROOT):
        text = page.read_text("utf-8")
        for match in make.TABLE.finditer(text):
            if match["name"] in ("speed", "loop"):
                record = json.loads((ROOT / match["source"]).read_text("utf-8"))
                assert record["machine"]["cpu"] in " ".join(text.split())


def test_the_table_of_results(tmp_path):
    """It names the machine of every file, and keeps the commits that are known."""
    machine = {"date": "2026-01-02", "cpu": "CPU", "caches": "L1d 1K, L1i 2K, L2 3K"}
    records = {
        "a": {"machine": machine | {"isa": "avx2", "versions": {"torch": "2"}}},
        "b": {"machine": machine | {"jax": "0.10"}},
        "c": {"cpu": "CPU", "date": "2026-03-04", "torch": "2.13", "rows": []},
        "d": {"machine": {"cpu": "CPU"}, "versions": {"torch": "2"}},
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    old = "| `b.json` | then | CPU |  |  | 1234567 |\n"
    rows = make.measured.results(tmp_path, old).splitlines()[2:]
    assert rows == [
        "| `a.json` | 2026-01-02 | CPU, avx2 | L1d 1K, L2 3K | torch 2 | – |",
        "| `b.json` | 2026-01-02 | CPU | L1d 1K, L2 3K | jax 0.10 | 1234567 |",
        "| `c.json` | 2026-03-04 | CPU | not recorded | torch 2.13 | – |",
        "| `d.json` | not recorded | CPU | not recorded | torch 2 | – |",
    ]


def test_rows_of_what_was_compared_are_kept_and_added(repository):
    page = repository / "docs" / "parity.md"
    text = page.read_text("utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `adam` |"))
    page.write_text(text.replace(row + "\n", "") + "| `adam` | elsewhere |\n", "utf-8")
    (made, _), *others = make.stale(repository).values()
    assert not others
    new = "| `adam` | nothing but its oracle | `test_oracle` |  |"
    assert made == text.replace(row, new) + "| `adam` | elsewhere |\n"


def test_a_rule_without_a_formula_is_named(repository, written, monkeypatch):
    update = written("return (a - c // b,)")
    monkeypatch.setattr(make, "paragraphs", lambda rule: ["Tests. Doe 2000."])
    rule = Rule(update, only_lr, name="floored")
    with pytest.raises(
        ValueError, match="floored.py: no formula for BinOp in: lr // b"
    ):
        make.stale(repository, (rule,))
