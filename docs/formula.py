"""A rule's own code as formulas: what it computes once, and for each element.

`Formulas` reads a rule. `Call` reads a function as a syntax tree, line by line, and
gives each value a name of its own, such as ``m#3``; constants that are short are put
where they are used, functions that a rule calls where it calls them. `Section.show`
then chooses the names that a reader sees: the code's own, with a prime where that name
is still needed for another value. A line gives a new name (``=``) or a new value (an
arrow). `Latex` writes the lines. Code that has no formula here is refused.
"""

import ast
import copy
import inspect
import itertools
import math
import re
import textwrap
from typing import NamedTuple

from fastopt.language import PRIMITIVES, cbrt
from fastopt.portable import log

SHORT = 2  # names and numbers in a constant that is not worth a line of its own
KNOWN = (*PRIMITIVES, cbrt, log, abs, min, max, float, math.sqrt, math.log, math.exp)
IGNORED = {"wide", "float"}  # for they change no number


class Unsupported(ValueError):
    """Something in a rule that has no formula here."""

    def __init__(self, node):
        first = ast.unparse(ast.fix_missing_locations(node)).split("\n")[0]
        super().__init__(f"no formula for {type(node).__name__} in: {first}")


# Latex ------------------------------------------------------------------------------

# How tightly an expression holds together.
CHOICE, COMPARISON, SUM, PRODUCT, POWER, ATOM = range(6)

AROUND = {  # an argument
    "sqrt": (r"\sqrt{", "}"),
    "cbrt": (r"\sqrt[3]{", "}"),
    "abs": (r"\left\lvert ", r" \right\rvert"),
}
BEFORE = {  # arguments, so many; GitHub allows no \operatorname
    "maximum": (r"\max", 2),
    "minimum": (r"\min", 2),
    "max": (r"\max", 2),
    "min": (r"\min", 2),
    "sign": (r"\mathrm{sign}", 1),
    "copysign": (r"\mathrm{copysign}", 2),
    "log": (r"\ln", 1),
    "exp": (r"\exp", 1),
}
COMPARISONS = {  # and their opposites
    ast.Lt: ("<", ast.GtE),
    ast.LtE: (r"\le", ast.Gt),
    ast.Gt: (">", ast.LtE),
    ast.GtE: (r"\ge", ast.Lt),
    ast.Eq: ("=", ast.NotEq),
    ast.NotEq: (r"\ne", ast.Eq),
}
WORDS = dict.fromkeys((ast.And, ast.BitAnd), r" \text{ and } ")
WORDS |= dict.fromkeys((ast.Or, ast.BitOr), r" \text{ or } ")
GREEK = (
    "alpha beta gamma delta zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi "
    "psi omega"
)
LETTERS = {name: rf"\{name}" for name in GREEK.split()}
LETTERS |= {"lambd": r"\lambda", "lam": r"\lambda", "eps": r"\varepsilon"}
FIELD = {"lr": r"\eta", "weight_decay": r"\lambda", "momentum": r"\mu"}
MARKS = {"hat": r"\hat{%s}", "bar": r"\bar{%s}", "max": r"%s_{\max}"}
MARKS |= {"inf": r"%s_{\infty}"}


class Latex:
    """Writes expressions; two names never look the same."""

    def __init__(self):
        self.symbols = {}

    def symbol(self, name):
        if name not in self.symbols:
            plain = name.rstrip("'")
            letter = symbol(plain)
            if plain != name:
                letter = self.symbol(plain) + name[len(plain) :]
            elif letter in self.symbols.values():
                letter = roman(plain)
            self.symbols[name] = letter
        return self.symbols[name]

    def __call__(self, node, at_least=CHOICE):
        """A number, in parentheses if it is not as tight as that."""
        tex, level = self.number(node)
        return tex if level >= at_least else parenthesised(tex)

    def number(self, node):
        match node:
            case ast.Name(name):
                return self.symbol(name), ATOM
            case ast.Constant(float() | int() as value) if type(value) is not bool:
                return digits(value)
            case ast.UnaryOp(ast.USub(), operand):
                return f"-{self(operand, PRODUCT)}", SUM
            case ast.IfExp():
                return self.choice(node), CHOICE
            case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
                sign = "+" if isinstance(op, ast.Add) else "-"
                return f"{self(left, SUM)} {sign} {self(right, PRODUCT)}", SUM
            case ast.BinOp(_, ast.Mult(), _):
                return self.product(node), PRODUCT
            case ast.BinOp(left, ast.Div(), right):
                return rf"\frac{{{self(left)}}}{{{self(right)}}}", PRODUCT
            case ast.BinOp(left, ast.Pow(), right):
                return f"{self(left, ATOM)}^{{{self(right)}}}", POWER
            case ast.Call(ast.Constant("sum"), [term]):  # over elements
                return rf"\sum {self(term, PRODUCT)}", PRODUCT
            case ast.Call(ast.Constant(name), [argument]) if name in AROUND:
                return self(argument).join(AROUND[name]), ATOM
            case ast.Call(ast.Constant(name), arguments) if name in BEFORE:
                tex, count = BEFORE[name]
                if len(arguments) == count:
                    inside = r",\ ".join(map(self, arguments))
                    return tex + parenthesised(inside), ATOM
        raise Unsupported(node)

    def product(self, node):
        """Factors side by side, the same ones as a power."""
        factors = {}
        for factor in factors_of(node):
            tight = self(factor, ATOM)
            power = factors.get(tight, (0, factor))[0] + 1
            factors[tight] = power, factor
        parts = []
        for tight, (power, factor) in factors.items():
            part = f"{tight}^{{{power}}}" if power > 1 else self(factor, PRODUCT)
            dot = r" \cdot " if part[0].isdigit() else r" \, "
            parts += [dot, part] if parts else [part]
        return "".join(parts)

    def choice(self, node):
        rows = []
        while isinstance(node, ast.IfExp):
            condition, _ = self.condition(node.test)
            rows.append(rf"{self(node.body)} & \text{{if }} {condition}")
            node = node.orelse
        rows.append(rf"{self(node)} & \text{{otherwise}}")
        return r"\begin{cases} " + r" \\ ".join(rows) + r" \end{cases}"

    def condition(self, node):
        match node:
            case ast.Name(name):  # a flag
                return self.symbol(name), ATOM
            case ast.Compare(left, ops, others) if {*map(type, ops)} <= {*COMPARISONS}:
                tex = self(left, SUM)
                for op, other in zip(ops, others, strict=True):
                    tex += f" {COMPARISONS[type(op)][0]} {self(other, SUM)}"
                return tex, COMPARISON
            case ast.UnaryOp(ast.Not(), operand):
                tex, level = self.condition(operand)
                tex = tex if level >= SUM else parenthesised(tex)
                return rf"\text{{not }} {tex}", CHOICE
            case ast.BoolOp(op, parts):
                pass
            case ast.BinOp(left, ast.BitAnd() | ast.BitOr() as op, right):
                parts = [left, right]
            case _:
                raise Unsupported(node)
        texts = []
        for part in parts:
            tex, level = self.condition(part)
            alike = isinstance(part, ast.BoolOp) and type(part.op) is type(op)
            texts.append(tex if alike or level >= COMPARISON else parenthesised(tex))
        return WORDS[type(op)].join(texts), CHOICE

    def lines(self, lines):
        """Lines one below the other; unless there are any, nothing."""
        rows = []
        for line in lines:
            relation = "=" if line.new else r"\leftarrow"
            when = line.when and rf" \quad \text{{if }} {self.condition(line.when)[0]}"
            name, value = self.symbol(line.name), self(line.value)
            rows.append(f"{name} &{relation} {value}{when or ''}")
        body = " \\\\\n".join(rows)
        return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}" if rows else ""


def symbol(name):
    """``beta1`` as beta with an index; what is no letter remains a word."""
    if name in FIELD:
        return FIELD[name]
    head, index = re.fullmatch(r"(.*?)_?(\d*)", name).groups()
    head, _, mark = head.partition("_")
    letter = LETTERS.get(head, head)
    if not head or (len(head) > 1 and head not in LETTERS) or (mark and index):
        return roman(name)
    if mark:
        return MARKS.get(mark, "%s_{" + roman(mark) + "}") % letter
    return f"{letter}_{{{index}}}" if index else letter


def roman(name):
    return r"\mathrm{" + name.replace("_", r"\_") + "}"


def parenthesised(tex):
    tall = r"\frac" in tex or r"\begin" in tex
    return rf"\left({tex}\right)" if tall else f"({tex})"


def digits(value):
    mantissa, _, exponent = repr(value).removesuffix(".0").partition("e")
    if not exponent:
        return mantissa, ATOM
    power = f"10^{{{int(exponent)}}}"
    if mantissa == "1":
        return power, POWER
    return rf"{mantissa} \cdot {power}", PRODUCT


def factors_of(node):
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*factors_of(node.left), *factors_of(node.right)]
    return [node]


# Names ------------------------------------------------------------------------------


class Line(NamedTuple):
    """A name that gets a value."""

    name: str
    value: ast.expr
    new: bool  # the name's first value
    when: ast.expr | None = None  # under which condition alone


class Value(NamedTuple):
    """A value under a name of its own."""

    id: str
    value: ast.expr
    when: ast.expr | None = None  # under which condition it is not the old one
    old: ast.expr | None = None


NUMBERS = itertools.count()


def unique(name):
    return f"{name}#{next(NUMBERS)}"


def plain(id):
    """The name that the code has for it."""
    return id.partition("#")[0]


def fresh(name, used):
    """The name, with primes if it has another meaning."""
    while name in used:
        name += "'"
    return name


class Section:
    """A part of what a rule computes: a function's ``values``, one after the other.

    ``inputs`` are the ids of what it starts with, such as the parameter, the gradient
    and the state; ``outputs`` has the ids of the values that replace some of them.
    ``show`` makes ``lines`` of the values, and ``names`` of the inputs.
    """

    def __init__(self, what="", rule=None, inputs=()):
        self.what, self.rule, self.inputs = what, rule, [*inputs]
        self.values, self.outputs, self.lines, self.names = [], {}, [], []

    def bind(self, name, value, *condition):
        """Give a value an id of its own; return the id as an expression."""
        self.values.append(Value(unique(name), value, *condition))
        return load(self.values[-1].id)

    def replace(self, results):
        """Note what replaces inputs, or numbers to carry: a value that is there already
        if it goes by no input's name, or another value."""
        left = {id: value for id, value in results.items() if not is_name(value, id)}
        names = {value.id: plain(value.id) for value in self.values}
        inputs = {*map(plain, self.inputs)}
        for id, value in [*left.items()]:
            there = isinstance(value, ast.Name) and names.pop(value.id, None)
            if there and there not in inputs - {plain(id)}:
                self.outputs[id] = left.pop(id).id
        while left:  # first the one whose old value no other one needs
            needed = {id: names_of(*(left[o] for o in left if o != id)) for id in left}
            id = next((id for id in left if id not in needed[id]), next(iter(left)))
            self.outputs[id] = self.bind(plain(id), left.pop(id)).id

    def needed(self, start=0):
        """The ids that values need from this one on."""
        return names_of(*(part for value in self.values[start:] for part in value[1:]))

    def show(self, names, taken, after):
        """Choose a name for each value, and make the lines.

        ``names`` has what ids are called, and gets more. The names that are ``taken``
        have a meaning in other sections, which need the ids in ``after``.
        """
        for id in self.inputs:
            names.setdefault(id, fresh(plain(id), taken))
        self.names = [names[id] for id in self.inputs]
        wanted = {new: names.get(old, old) for old, new in self.outputs.items()}
        own = {*self.names, *wanted.values()}
        outside = {names[id] for id in self.needed() if id in names} - own
        defined = own | outside
        for k, (id, value, when, old) in enumerate(self.values):
            later = self.needed(k + 1) | {*wanted} | after
            used = {names.get(other, other) for other in later - {id}} | outside
            used |= taken - own if id in after else set()
            name = fresh(wanted.get(id, plain(id)), used)
            value, when, old = (renamed(part, names) for part in (value, when, old))
            if old and not is_name(old, name):  # then it needs a value, too
                value, when = ast.IfExp(when, value, old), None
            self.lines.append(Line(name, value, name not in defined, when))
            names[id] = name
            defined.add(name)
        for id, name in wanted.items():
            if names[id] != name:
                self.lines.append(Line(name, load(names[id]), False))

    def uses(self, name):
        return any(name in names_of(line.value, line.when) for line in self.lines)


def show(sections):
    """Choose the names in sections that follow each other."""
    names = {id: id for id in sections[0].inputs}
    taken = {*names}
    for k, section in enumerate(sections):
        after = set().union(*(later.needed() for later in sections[k + 1 :]))
        section.show(names, taken, after)
        taken |= {names[value.id] for value in section.values if value.id in after}


# Functions --------------------------------------------------------------------------


class Call(ast.NodeTransformer):
    """A call of a function: its values go to a section, and what it returns to
    ``results``; ``refused`` are the statements that raise errors."""

    def __init__(self, function, values, section, when=None):
        tree = tree_of(function)
        self.names = dict(zip(arguments(function), values, strict=True))
        self.section, self.when, self.outside = section, when, reached(function)
        self.refused, self.results = [], None
        for statement in tree.body:
            if self.results is not None:
                raise Unsupported(statement)
            self.read(statement)
        if self.results is None:
            raise Unsupported(tree)

    def read(self, node):
        match node:
            case ast.Expr(ast.Constant()):
                pass  # a docstring
            case ast.If(_, [ast.Raise(), *_], orelse):
                if orelse or self.when:
                    raise Unsupported(node)
                self.refused.append(node)
            case ast.If():
                self.branches(node)
            case ast.Return(ast.expr() as value):
                self.results = self.several(value)
            case ast.Assign([place], value):
                self.assign(node, parts_of(place), value)
            case ast.AugAssign(place, op, value):
                self.assign(node, [place], ast.BinOp(place, op, value))
            case _:
                raise Unsupported(node)

    def branches(self, node):
        """Lines of which each says under which condition."""
        outer, test = self.when, self.value(node.test)
        for condition, body in ((test, node.body), (negated(test), node.orelse)):
            both = [outer, condition]
            self.when = ast.BoolOp(ast.And(), both) if outer else condition
            for statement in body:
                if isinstance(statement, ast.Return):
                    raise Unsupported(statement)
                self.read(statement)
        self.when = outer

    def assign(self, node, places, value):
        values, names = self.several(value), {}
        if len(values) != len(places):
            raise Unsupported(node)
        for place, value in zip(places, values, strict=True):
            if not isinstance(place, ast.Name):
                raise Unsupported(node)
            if self.when or not isinstance(value, ast.Name):
                old = self.when and self.names.get(place.id)
                value = self.section.bind(place.id, value, self.when, old)
            names[place.id] = value
        self.names |= names

    def several(self, node):
        """The values of a tuple, or the one of anything else."""
        match node:
            case ast.IfExp(test, ast.Tuple(yes), ast.Tuple(no)) if len(yes) == len(no):
                pairs = zip(yes, no, strict=True)
                return [self.value(ast.IfExp(test, a, b)) for a, b in pairs]
            case ast.Call() if inspect.isfunction(self.callee(node)):
                return self.called(node)
        return [self.value(part) for part in parts_of(node)]

    def value(self, node):
        """An expression, with ids in place of the code's names."""
        return self.visit(copy.deepcopy(node))

    def visit_Name(self, node):
        if node.id in self.names:
            return self.names[node.id]
        value = self.outside.get(node.id)
        if type(value) in (int, float):  # the file's constant
            return ast.Constant(value)
        raise Unsupported(node)

    def visit_Call(self, node):
        callee = self.callee(node)
        if inspect.isfunction(callee):
            results = self.called(node)
            if len(results) == 1:
                return results[0]
        elif isinstance(callee, str) and not node.keywords:
            values = [self.value(part) for part in node.args]
            if callee == "where" and len(values) == 3:
                return ast.IfExp(*values)
            if callee in IGNORED and len(values) == 1:
                return values[0]
            return ast.Call(ast.Constant(callee), values, [])
        raise Unsupported(node)

    def callee(self, node):
        """The name of a function that is known, or a function of the rule's own. By
        identity: a rule may import a primitive under any name."""
        called = None
        match node.func:
            case ast.Name(name) if name not in self.names:
                called = self.outside.get(name)
            case ast.Attribute(module, name):
                if self.outside.get(ast.unparse(module)) is math:
                    called = getattr(math, name, None)
        return called.__name__ if any(called is known for known in KNOWN) else called

    def called(self, node):
        """The results of a function of the rule's own, whose lines come before."""
        helper = self.callee(node)
        names = arguments(helper)
        if node.keywords or len(node.args) != len(names):
            raise Unsupported(node)
        values = [self.value(part) for part in node.args]
        values = [
            value if is_short(value) else self.section.bind(name, value, self.when)
            for name, value in zip(names, values, strict=True)
        ]
        return Call(helper, values, self.section, self.when).results


def tree_of(function):
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not isinstance(tree, ast.FunctionDef):
        raise Unsupported(tree)
    return tree


def arguments(function):
    return [argument.arg for argument in tree_of(function).args.args]


def reached(function):
    """What the function's names mean outside of it."""
    names = inspect.getclosurevars(function)
    return {**names.builtins, **names.globals, **names.nonlocals}


def load(name):
    return ast.Name(name, ast.Load())


def parts_of(node):
    return node.elts if isinstance(node, ast.Tuple) else [node]


def negated(condition):
    match condition:
        case ast.UnaryOp(ast.Not(), operand):
            return operand
        case ast.Compare(left, [op], others) if type(op) in COMPARISONS:
            return ast.Compare(left, [COMPARISONS[type(op)][1]()], others)
    return ast.UnaryOp(ast.Not(), condition)


def is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


def names_of(*nodes):
    parts = [part for node in nodes if node for part in ast.walk(node)]
    return {part.id for part in parts if isinstance(part, ast.Name)}


def renamed(node, names):
    node = copy.deepcopy(node)
    for part in ast.walk(node) if node else ():
        if isinstance(part, ast.Name):
            part.id = names.get(part.id, part.id)
    return node


def is_short(node):
    kinds = [type(part) for part in ast.walk(node)]
    leaves = kinds.count(ast.Name) + kinds.count(ast.Constant) - kinds.count(ast.Call)
    return leaves <= SHORT and ast.IfExp not in kinds


# Rules ------------------------------------------------------------------------------


class Formulas:
    """What a rule computes, in ``sections``, and the statements by which it refuses
    hyperparameters, in ``refused``."""

    def __init__(self, rule):
        self.rule, self.rules = rule, [rule, *rule.variants.values()]
        host = arguments(rule.scalars)
        scalars = Section("scalars", rule, host)
        call = Call(rule.scalars, [*map(load, host)], scalars)
        results, self.refused, self.sections = call.results, call.refused, [scalars]
        takers = [arguments(r.update)[2 + len(r.state) :] for r in self.rules]
        taken = max(takers, key=len)
        if rule.settle:
            names = arguments(rule.settle)
            first = 2 + rule.terms
            sums, names = names[2:first], names[first:]
            handed = len(results) - len(names)
            takes = arguments(rule.measure)[2 + len(rule.state) :]
            names = [*max(takes, taken, key=len)[:handed], *names]
            constants = constants_for(scalars, names, results)
            measure, terms = self.element("measure", rule.measure, rule, constants)
            totals = [ast.Call(ast.Constant("sum"), [term], []) for term in terms]
            totals = [*map(measure.bind, sums, totals)]
            settle = Section("settle", rule, [total.id for total in totals])
            values = [load("t"), load("n"), *totals, *constants[handed:]]
            results = Call(rule.settle, values, settle).results
            settled = constants_for(settle, taken[handed:], results, rule.carry)
            settled = [*constants[:handed], *settled]
            self.sections.append(settle)
        else:
            settled = constants = constants_for(scalars, taken, results, rule.carry)
        for variant in self.rules:
            update, results = self.element("update", variant.update, variant, settled)
            first, _, *state = update.inputs
            # The moments before the parameter.
            new = [*results[1:], results[0]]
            update.replace(dict(zip([*state, first], new, strict=True)))
        if rule.evaluate:
            evaluate, results = self.element("evaluate", rule.evaluate, rule, constants)
            evaluate.bind("x", *results)
        show(self.sections)
        self.sections = [section for section in self.sections if section.lines]

    def element(self, what, function, rule, constants):
        """A section for the values of an element, and the results for it."""
        names = arguments(function)
        count = 1 + (what != "evaluate") + len(rule.state)
        section = Section(what, rule, map(unique, names[:count]))
        self.sections.append(section)
        values = [*map(load, section.inputs), *constants[: len(names) - count]]
        return section, Call(function, values, section).results


def constants_for(section, names, results, carry=()):
    """What other functions get of these results: short ones as they are, others by the
    name that the function gives them, and a line here that says so."""
    kept = len(results) - len(carry)
    carried = dict(zip(carry, results[kept:], strict=True))
    changing = {name for name, value in carried.items() if not is_name(value, name)}
    constants = [
        value
        if is_short(value) and not names_of(value) & changing
        else section.bind(fresh(name, section.inputs), value)
        for name, value in zip(names, results[:kept], strict=False)
    ]
    section.replace(carried)
    return constants
