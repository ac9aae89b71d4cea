"""A rule's own code as formulas: what it computes once, and for each element.

Its functions are read as syntax trees, line by line; a line gives a new name (``=``) or
a new value (an arrow). Constants that are short are put where they are used, functions
that a rule calls where it calls them. What has no formula here is refused, rather than
written wrongly. `Formulas` reads, `Latex` writes.
"""

import ast
import builtins
import copy
import inspect
import math
import re
import textwrap
from typing import NamedTuple

from fastopt.language import PRIMITIVES

SHORT = 2  # names and numbers in a constant that is not worth a line of its own
KNOWN = (*PRIMITIVES, abs, min, max, float, math.sqrt, math.log, math.exp)
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
COMPARISONS = {
    ast.Lt: "<",
    ast.LtE: r"\le",
    ast.Gt: ">",
    ast.GtE: r"\ge",
    ast.Eq: "=",
    ast.NotEq: r"\ne",
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
        if isinstance(node, ast.Name):
            return self.symbol(node.id), ATOM
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return digits(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return f"-{self(node.operand, PRODUCT)}", SUM
        if isinstance(node, ast.IfExp):
            return self.choice(node), CHOICE
        if isinstance(node, ast.BinOp):
            left, op, right = node.left, node.op, node.right
            if isinstance(op, ast.Add):
                return f"{self(left, SUM)} + {self(right, PRODUCT)}", SUM
            if isinstance(op, ast.Sub):
                return f"{self(left, SUM)} - {self(right, PRODUCT)}", SUM
            if isinstance(op, ast.Mult):
                return self.product(node), PRODUCT
            if isinstance(op, ast.Div):
                return rf"\frac{{{self(left)}}}{{{self(right)}}}", PRODUCT
            if isinstance(op, ast.Pow):
                return f"{self(left, ATOM)}^{{{self(right)}}}", POWER
        if isinstance(node, ast.Call):
            name, arguments = node.func.value, node.args
            if name == "sum":  # over elements
                return rf"\sum {self(*arguments, PRODUCT)}", PRODUCT
            if name in AROUND and len(arguments) == 1:
                return self(*arguments).join(AROUND[name]), ATOM
            if name in BEFORE and len(arguments) == BEFORE[name][1]:
                inside = r",\ ".join(map(self, arguments))
                return BEFORE[name][0] + parenthesised(inside), ATOM
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
        if isinstance(node, ast.Name):  # a flag
            return self.symbol(node.id), ATOM
        if isinstance(node, ast.Compare) and {*map(type, node.ops)} <= {*COMPARISONS}:
            tex = self(node.left, SUM)
            for op, other in zip(node.ops, node.comparators, strict=True):
                tex += f" {COMPARISONS[type(op)]} {self(other, SUM)}"
            return tex, COMPARISON
        parts = getattr(node, "values", None)
        if isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        if parts and type(node.op) in WORDS:
            conditions = [self.condition(part) for part in parts]
            texts = [
                tex if level >= COMPARISON else parenthesised(tex)
                for tex, level in conditions
            ]
            return WORDS[type(node.op)].join(texts), CHOICE
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            tex, level = self.condition(node.operand)
            tex = tex if level >= SUM else parenthesised(tex)
            return rf"\text{{not }} {tex}", CHOICE
        raise Unsupported(node)

    def lines(self, lines):
        """Lines one below the other; unless there are any, nothing."""
        rows = []
        for line in lines:
            names = r",\ ".join(map(self.symbol, line.names))
            values = r",\ ".join(map(self, line.values))
            if len(line.names) > 1:
                names, values = parenthesised(names), parenthesised(values)
            relation = "=" if line.new else r"\leftarrow"
            when = line.when and rf" \quad \text{{if }} {self.condition(line.when)[0]}"
            rows.append(f"{names} &{relation} {values}{when or ''}")
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


OPPOSITES = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


# Functions --------------------------------------------------------------------------


class Line(NamedTuple):
    """Names that get values, all at the same time."""

    names: tuple
    values: tuple
    new: bool  # a name's first value
    when: ast.expr | None = None  # under which condition alone


class Lines(list):
    """Lines, and the names that have a meaning in them so far."""

    def __init__(self, defined=()):
        super().__init__()
        self.defined = set(defined)
        self.when = None  # the condition for what comes now

    def fresh(self, name, taken=()):
        """The name, with primes if it has another meaning."""
        while name in self.defined or name in taken:
            name += "'"
        return name

    def define(self, pairs, always=False):
        """Lines for values that are all taken before any of the names gets its own."""
        when = None if always else self.when
        left = [(name, value) for name, value in pairs if not is_name(value, name)]
        while left:
            for name, value in left:  # the first whose old value no other one needs
                if name not in names_of(*(v for n, v in left if n != name)):
                    new = name not in self.defined
                    self.append(Line((name,), (value,), new, when))
                    left.remove((name, value))
                    break
            else:
                self.append(Line(*zip(*left, strict=True), new=False, when=when))
                left = []
        self.defined.update(name for name, _ in pairs)


class Reader:
    """A call of a function: its lines go to ``lines``, its results to ``results``.

    ``given`` are the arguments. Those that are names of ``own`` may get new values, and
    so may ``targets``, which the caller will give the results; nothing else that is
    ``taken``, for it has a meaning outside.
    """

    def __init__(self, function, given, lines, own=(), taken=(), targets=()):
        self.lines, self.targets, self.outside = lines, targets, reached(function)
        tree = tree_of(function)
        self.values = dict(zip(arguments(function), given, strict=True))
        # A name in the code -> what it is called once it is assigned to.
        self.names = {
            name: value.id
            for name, value in self.values.items()
            if isinstance(value, ast.Name) and value.id in own
        }
        fixed = [value for n, value in self.values.items() if n not in self.names]
        self.taken = names_of(*fixed) | set(taken)
        self.wish(tree.body[-1])
        self.refused, self.results = [], None
        for statement in tree.body:
            if self.results is not None:
                raise Unsupported(statement)
            self.read(statement)
        if self.results is None:
            raise Unsupported(tree)

    def wish(self, last):
        """Call what is returned as the caller will, unless that is needed as it was."""
        returned = parts_of(last.value) if isinstance(last, ast.Return) else []
        for value, target in zip(returned, self.targets, strict=False):
            if not target or target in self.names.values():
                continue
            if isinstance(value, ast.Name):
                others = [v for name, v in self.values.items() if name != value.id]
                if target not in names_of(*others):
                    self.names.setdefault(value.id, target)

    def read(self, node):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            pass  # a docstring
        elif isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
            if node.orelse or self.lines.when:
                raise Unsupported(node)
            self.refused.append(node)
        elif isinstance(node, ast.If) and not chosen([node]):
            self.branches(node)
        elif isinstance(node, ast.Return) and node.value is not None:
            self.results = self.several(node.value, self.targets)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = [target(part) for part in node.targets[0].elts]
            wanted = [self.names.get(name, name) for name in names]
            values = self.several(node.value, wanted)
            if len(values) != len(names) or len(node.targets) != 1:
                raise Unsupported(node)
            self.assign(list(zip(names, values, strict=True)))
        else:
            if isinstance(node, ast.AugAssign):
                old = load(target(node.target))
                value = ast.BinOp(old, node.op, node.value)
                node = ast.Assign([node.target], value)
            if not chosen([node]):
                raise Unsupported(node)
            name, value = chosen([node])
            values = self.several(value, [self.names.get(name, name)])
            if len(values) != 1:
                raise Unsupported(node)
            self.assign([(name, values[0])])

    def branches(self, node):
        """Lines of which each says under which condition."""
        start, outer = len(self.lines), self.lines.when
        before, after = set(self.lines.defined), set()
        test = self.value(node.test)
        for condition, body in ((test, node.body), (negated(test), node.orelse)):
            both = [*conditions_of(outer), *conditions_of(condition)]
            when = ast.BoolOp(ast.And(), both) if len(both) > 1 else condition
            self.lines.defined = set(before)
            for statement in body:
                changed = {name for line in self.lines[start:] for name in line.names}
                if changed & names_of(when) or isinstance(statement, ast.Return):
                    raise Unsupported(statement)
                self.lines.when = when
                self.read(statement)
            after |= self.lines.defined
        self.lines.when, self.lines.defined = outer, after

    def assign(self, pairs):
        pairs = [pair for pair in pairs if pair[0] != "_"]
        for name, _ in pairs:
            if name not in self.names:
                new = name
                while new in self.taken or new in self.names.values():
                    new += "'"
                self.names[name] = new
        when, new = self.lines.when, []
        for name, value in pairs:
            old, name = self.values.get(name), self.names[name]
            if when and old and not is_name(old, name):  # then it needs a value, too
                self.lines.define([(name, ast.IfExp(when, value, old))], always=True)
            else:
                new.append((name, value))
        self.lines.define(new)
        self.values |= {name: load(self.names[name]) for name, _ in pairs}

    def several(self, node, targets=()):
        """The values of a tuple, or the one of anything else."""
        if isinstance(node, ast.IfExp) and isinstance(node.body, ast.Tuple):
            if len(parts_of(node.orelse)) != len(node.body.elts):
                raise Unsupported(node)
            pairs = zip(node.body.elts, parts_of(node.orelse), strict=True)
            return [self.value(ast.IfExp(node.test, a, b)) for a, b in pairs]
        if isinstance(node, ast.Call) and inspect.isfunction(self.callee(node)):
            return self.called(node, targets)
        return [self.value(part) for part in parts_of(node)]

    def value(self, node):
        """An expression in the formula's names."""
        if isinstance(node, ast.Name):
            if node.id in self.values:
                return self.values[node.id]
            if type(self.outside.get(node.id)) in (int, float):  # the file's constant
                return ast.Constant(self.outside[node.id])
            raise Unsupported(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        node = copy.copy(node)
        for field, old in ast.iter_fields(node):
            if isinstance(old, ast.expr):
                setattr(node, field, self.value(old))
            elif isinstance(old, list):
                new = [self.value(x) if isinstance(x, ast.expr) else x for x in old]
                setattr(node, field, new)
        return node

    def callee(self, node):
        """The name of a function that is known, or a function of the rule's own. By
        identity: a rule may import a primitive under any name."""
        called, function = None, node.func
        if isinstance(function, ast.Name) and function.id not in self.values:
            called = self.outside.get(function.id)
        elif isinstance(function, ast.Attribute):
            if self.outside.get(ast.unparse(function.value)) is math:
                called = getattr(math, function.attr, None)
        return called.__name__ if any(called is known for known in KNOWN) else called

    def call(self, node):
        callee = self.callee(node)
        if inspect.isfunction(callee):
            results = self.called(node)
            if len(results) == 1:
                return results[0]
        elif isinstance(callee, str) and not node.keywords:
            given = [self.value(part) for part in node.args]
            if callee == "where" and len(given) == 3:
                return ast.IfExp(*given)
            if callee in IGNORED and len(given) == 1:
                return given[0]
            return ast.Call(ast.Constant(callee), given, [])
        raise Unsupported(node)

    def called(self, node, targets=()):
        """The results of a function of the rule's own, whose lines come before."""
        helper, given = self.callee(node), []
        names = arguments(helper)
        if node.keywords or len(node.args) != len(names):
            raise Unsupported(node)
        live = self.taken | names_of(*self.values.values()) | {*self.names.values()}
        for name, part in zip(names, node.args, strict=True):
            value = self.value(part)
            if not is_short(value):
                name = self.lines.fresh(name, live | set(targets))
                self.lines.define([(name, value)])
                value = load(name)
            given.append(value)
        taken = live | self.lines.defined
        return Reader(helper, given, self.lines, (), taken, targets).results


def tree_of(function):
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not isinstance(tree, ast.FunctionDef):
        raise Unsupported(tree)
    return tree


def arguments(function):
    return [argument.arg for argument in tree_of(function).args.args]


def reached(function):
    """What the function's names mean outside of it."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    inside = {name: cell.cell_contents for name, cell in cells}
    return vars(builtins) | function.__globals__ | inside


def load(name):
    return ast.Name(name, ast.Load())


def target(node):
    if not isinstance(node, ast.Name):
        raise Unsupported(node)
    return node.id


def parts_of(node):
    return node.elts if isinstance(node, ast.Tuple) else [node]


def chosen(statements):
    """A name and its value, if to give it one is all that statements do."""
    (node, *more) = statements or [None]
    if more:
        return None
    if isinstance(node, ast.If):
        yes, no = chosen(node.body), chosen(node.orelse)
        if yes and no and yes[0] == no[0]:
            return yes[0], ast.IfExp(node.test, yes[1], no[1])
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        if isinstance(node.targets[0], ast.Name):
            return node.targets[0].id, node.value
    return None


def conditions_of(node):
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return node.values
    return [node] if node else []


def negated(condition):
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        return condition.operand
    if isinstance(condition, ast.Compare) and len(condition.ops) == 1:
        op = OPPOSITES.get(type(condition.ops[0]))
        if op:
            return ast.Compare(condition.left, [op()], condition.comparators)
    return ast.UnaryOp(ast.Not(), condition)


def is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


def names_of(*nodes):
    parts = [part for node in nodes for part in ast.walk(node)]
    return {part.id for part in parts if isinstance(part, ast.Name)}


def is_short(node):
    parts = list(ast.walk(node))
    leaves = [
        part
        for part in parts
        if isinstance(part, ast.Name)
        or (isinstance(part, ast.Constant) and not isinstance(part.value, str))
    ]
    branches = any(isinstance(part, ast.IfExp) for part in parts)
    return len(leaves) <= SHORT and not branches


# Rules ------------------------------------------------------------------------------


class Section(NamedTuple):
    """A part of what a rule computes."""

    what: str  # the function
    rule: object  # of which: the rule or a variant
    lines: Lines
    names: tuple = ()  # of the parameter, the gradient if it is taken, the state

    def uses(self, name):
        values = [value for line in self.lines for value in line.values]
        return name in names_of(*values)


class Formulas:
    """What a rule computes, in ``sections``, and the statements by which it refuses
    hyperparameters, in ``refused``."""

    def __init__(self, rule):
        self.rule, self.sections, self.refused = rule, [], []
        self.host = names = arguments(rule.scalars)
        lines = Lines(names)
        reader = Reader(rule.scalars, [*map(load, names)], lines, names)
        self.refused += reader.refused
        self.rules = [rule, *rule.variants.values()]
        takers = [arguments(r.update)[2 + len(r.state) :] for r in self.rules]
        if rule.settle:
            took = arguments(rule.settle)
            first = 2 + rule.terms
            handed = len(reader.results) - len(took) + first
            takes = [arguments(rule.measure)[2 + len(rule.state) :], *takers]
            names = [*max(takes, key=len)[:handed], *took[first:]]
            constants = self.constants(reader.results, [names], lines)
            self.add("scalars", rule, lines)
            sums, lines = took[2:first], Lines()
            names, measured = self.element(rule.measure, rule, constants, lines)
            sums = [lines.fresh(name, self.taken(constants)) for name in sums]
            totals = [ast.Call(ast.Constant("sum"), [x], []) for x in measured]
            lines.define(list(zip(sums, totals, strict=True)))
            self.add("measure", rule, lines, names)
            own = [*took[:2], *sums]
            lines = Lines({*own, *self.taken(constants)})
            given = [*map(load, own), *constants[handed:]]
            # The numbers to carry are the last of the results.
            last = getattr(tree_of(rule.settle).body[-1], "value", None)
            kept = len(parts_of(last)) - len(rule.carry)
            targets = [*[""] * kept, *rule.carry]
            reader = Reader(rule.settle, given, lines, own, self.host, targets)
            takers = [taker[handed:] for taker in takers]
            settled = self.constants(reader.results, takers, lines, rule.carry)
            settled = [*constants[:handed], *settled]
            self.add("settle", rule, lines)
        else:
            constants = self.constants(reader.results, takers, lines, rule.carry)
            self.add("scalars", rule, lines)
            settled = constants
        for variant in self.rules:
            self.new("update", variant.update, variant, settled)
        if rule.evaluate:
            self.new("evaluate", rule.evaluate, rule, constants)

    def taken(self, constants):
        """What has a meaning outside of a function that is given these."""
        return names_of(*constants) | {*self.host}

    def add(self, what, rule, lines, names=()):
        if lines:
            self.sections.append(Section(what, rule, lines, tuple(names)))

    def constants(self, results, takers, lines, carry=()):
        """What other functions get of these results: short ones as they are, others by
        the name that the function gives them, and a line here that says so."""
        kept = len(results) - len(carry)
        carried = list(zip(carry, results[kept:], strict=True))
        changing = {name for name, value in carried if not is_name(value, name)}
        constants = []
        for name, value in zip(max(takers, key=len), results[:kept], strict=False):
            if not is_short(value) or names_of(value) & changing:
                name = lines.fresh(name)
                lines.define([(name, value)])
                value = load(name)
            constants.append(value)
        lines.define(carried)
        return constants

    def new(self, what, function, rule, constants):
        """A section for the new parameter and state of an element."""
        lines = Lines()
        gradient = what == "update"
        names, results = self.element(function, rule, constants, lines, gradient)
        if gradient:
            first, *rest = zip([names[0], *names[2:]], results, strict=True)
            lines.define([*rest, first])  # the moments before the parameter
        else:
            x = lines.fresh("x", self.taken(constants))
            lines.define([(x, *results)])
        self.add(what, rule, lines, names)

    def element(self, function, rule, constants, lines, gradient=True):
        """What an element's values are called, and the results for it."""
        names = arguments(function)
        buffers = names[: 1 + gradient + len(rule.state)]
        used = constants[: len(names) - len(buffers)]
        taken = self.taken(used)
        own = [lines.fresh(name, taken) for name in buffers]
        lines.defined.update(own)
        targets = [own[0], *own[2:]] if gradient else []
        given = [*map(load, own), *used]
        return own, Reader(function, given, lines, own, taken, targets).results
