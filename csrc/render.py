"""Renders the templates: translates the rules to Cython.

The rules are read as text, because an isolated build has no NumPy or Numba to import
them with.
"""

import ast
import functools
import runpy
from dataclasses import dataclass, field
from pathlib import Path

import Cython
from Cython import Tempita
from stored import Format, forms
from tables import tables

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RULES = ROOT / "fastopt" / "rules"
COMPOSED = ROOT / "fastopt" / "composed.py"
LANGUAGE = ROOT / "fastopt" / "language.py"
ORDER = ROOT / "fastopt" / "memory" / "order.py"
FORMATS = ROOT / "fastopt" / "memory" / "formats.py"

# What a rule's text may call by name, and the template has in C.
PRIMITIVES = {"abs", "sqrt", "where", "maximum", "minimum", "copysign", "sign"}
PRIMITIVES |= {"wide", "is_double", "bits", "real"}
# The C types of numbers, and of words.
REALS = {"f32": "float", "f64": "double"}
WORDS = {"float": "uint32_t", "double": "uint64_t"}


@dataclass(frozen=True)
class Constant:
    """A number, or ``word(...)``, to which functions refer by name."""

    path: Path
    label: str
    value: float | tuple  # a word's two values

    @property
    def name(self):
        return f"{self.path.stem}_{self.label}"

    @property
    def is_word(self):
        return isinstance(self.value, tuple)

    def c_type(self, dtype):
        return WORDS[REALS[dtype]] if self.is_word else REALS[dtype]

    def text(self, dtype):
        if self.is_word:
            return f"{self.value[0]}U" if dtype == "f32" else f"{self.value[1]}ULL"
        return repr(self.value)


@dataclass
class Function:
    """A function of a rule, with what the template needs to know of it."""

    path: Path  # the file that defines it
    tree: ast.FunctionDef
    # Of a function made of a rule's passes: these, by their names in it.
    passes: dict = field(default_factory=dict, kw_only=True)

    @property
    def name(self):
        return f"{self.path.stem}_{self.tree.name}"

    @property
    def arguments(self):
        return [argument.arg for argument in self.tree.args.args]

    @functools.cached_property
    def locals(self):
        stored = [
            node.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        return [name for name in dict.fromkeys(stored) if name not in self.arguments]

    @property
    def returned(self):
        """The number of values in the tuple that it returns, or 0 if it returns one
        value without a tuple."""
        (value,) = [
            node.value for node in ast.walk(self.tree) if isinstance(node, ast.Return)
        ]
        if isinstance(value, ast.Call) and value.func.id in self.passes:
            return self.passes[value.func.id].returned
        return len(value.elts) if isinstance(value, ast.Tuple) else 0

    @functools.cached_property
    def helpers(self):
        """The functions that it calls, by the names that it uses for them."""
        if self.passes:
            return self.passes
        called = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)}
        found = {name: defined(self.path, name) for name in sorted(called - PRIMITIVES)}
        return {name: function for name, function in found.items() if function}

    @functools.cached_property
    def named(self):
        """The constants that it refers to, by the names that it uses for them."""
        own = {*self.arguments, *self.locals, *PRIMITIVES}
        names = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)}
        found = {name: constant(self.path, name) for name in sorted(names - own)}
        return {name: value for name, value in found.items() if value}

    @functools.cached_property
    def words(self):
        """The names that it uses for words: of constants, of arguments with the
        annotation ``Word``, and of what is assigned a word."""
        reals, words = set(), {n for n, value in self.named.items() if value.is_word}
        for argument in self.tree.args.args:
            annotated = ast.unparse(argument.annotation or ast.Tuple([])) == "Word"
            (words if annotated else reals).add(argument.arg)
        for line in self.tree.body:
            if isinstance(line, ast.Assign):
                (target,) = line.targets
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                kinds = self.are_words(line.value, words)
                for name, is_word in zip(names, kinds, strict=True):
                    (words if is_word else reals).add(name.id)
        if reals & words:
            raise ValueError(
                f"{', '.join(reals & words)} in {self.name} stands for a number here, "
                f"for a word there: use two names"
            )
        return words

    def are_words(self, value, words):
        """Whether a value is a word, or which values of a tuple are, if these names are
        those of words."""
        if isinstance(value, ast.Tuple):
            return [kind for part in value.elts for kind in self.are_words(part, words)]
        if isinstance(value, ast.Call):
            helper = self.helpers.get(value.func.id)
            return helper.results_are_words if helper else [value.func.id == "bits"]
        if isinstance(value, ast.BinOp):
            both = value.left, value.right
            return [any(self.are_words(part, words) == [True] for part in both)]
        return [isinstance(value, ast.Name) and value.id in words]

    @property
    def results_are_words(self):
        (line,) = [n for n in ast.walk(self.tree) if isinstance(n, ast.Return)]
        return self.are_words(line.value, self.words)

    def result(self, c_type):
        kinds = [WORDS[c_type] if word else c_type for word in self.results_are_words]
        return f"({', '.join(kinds)}, )" if self.returned else kinds[0]

    def declared(self, names, dtype):
        """Declarations of arguments or local variables."""
        real, word = REALS[dtype], WORDS[REALS[dtype]]
        return [f"{word if name in self.words else real} {name}" for name in names]

    def lines(self, dtype):
        """The lines of the C function."""
        declared = self.declared(self.locals, dtype)
        return [*(f"cdef {line}" for line in declared), *self.body(dtype)]

    def body(self, dtype):
        """The statements, in which every function has the name of its C version."""
        known = self.helpers | self.named

        class Concrete(ast.NodeTransformer):
            def visit_Name(self, node):
                if node.id in known:
                    return ast.Name(f"{known[node.id].name}_{dtype}", node.ctx)
                ours = f"_{dtype}" if node.id in PRIMITIVES else ""
                return ast.Name(f"{node.id}{ours}", node.ctx)

        tree = ast.parse(ast.unparse(self.tree)).body[0]
        text = "\n".join(ast.unparse(Concrete().visit(line)) for line in tree.body)
        return text.split("\n")


@dataclass
class Kernel(Function):
    """An ``update`` or a ``measure``, which a loop applies to the buffers."""

    state_count: int

    @property
    def states(self):
        return [f"s{k}" for k in range(self.state_count)]

    @property
    def outputs(self):
        return ["p", *self.states]

    @property
    def constants(self):
        return [f"c{k}" for k in range(len(self.arguments) - 2 - self.state_count)]

    @functools.cached_property
    def halves(self):
        """The update before and after its only square root: a function that returns
        what the root is taken of, and one that takes the root as its first argument.
        None if there is no such root, or if there are quotients before it, which both
        functions would compute."""
        body, roots = self.tree.body, list(map(is_root, ast.walk(self.tree)))
        if self.passes or sum(roots) != 1:
            return None
        number = [any(map(is_root, ast.walk(line))) for line in body].index(True)
        (root,) = filter(is_root, ast.walk(body[number]))
        before = [*body[:number], ast.Return(root.args[0])]
        if any(isinstance(n, ast.Div) for line in before for n in ast.walk(line)):
            return None

        class Taken(ast.NodeTransformer):
            def visit_Call(self, node):
                self.generic_visit(node)
                return ast.Name("square_root", ast.Load()) if is_root(node) else node

        tree = ast.parse(ast.unparse(self.tree)).body[0]
        after = [Taken().visit(line) for line in tree.body]
        name, arguments = self.tree.name, ", ".join(self.arguments)
        halves = (
            function_of(f"{name}_radicand", arguments, before),
            function_of(f"{name}_rooted", f"square_root, {arguments}", after),
        )
        return [Function(self.path, half) for half in halves]


class Measure(Kernel):
    """A ``measure``. Its loop only reads, except in a ``Begin``."""

    way = "in"
    outputs = kept = ()

    @property
    def terms(self):
        return self.returned


@dataclass
class Terms(Function):
    """The ``measure`` of a rule in passes: of a parameter and its direction."""

    @property
    def name(self):
        return f"{super().name}_terms"

    def result(self, c_type):
        return super().result("double")


class Begin(Measure):
    """The first of two passes: it sums up, writes the new state, and keeps the
    direction."""

    way = "out"
    kept = ("kept",)
    locals = ()
    words = frozenset()

    @property
    def name(self):
        return f"{self.path.stem}_update_begin"

    @property
    def terms(self):
        return super().returned

    @property
    def returned(self):
        return self.terms + len(self.outputs)

    @property
    def results_are_words(self):
        return [False] * self.returned

    @property
    def outputs(self):
        return [*self.states, *self.kept]

    def body(self, dtype):
        direction, terms = self.passes["direction"], self.passes["terms"]
        c_type = REALS[dtype]
        sums = [f"sums[{k}]" for k in range(self.terms)]
        new = [f"new[{k}]" for k in (*range(1, direction.returned), 0)]
        return [
            f"cdef {direction.result(c_type)} new",
            f"cdef {terms.result(c_type)} sums",
            f"new = {direction.name}_{dtype}({', '.join(self.arguments)})",
            f"sums = {terms.name}_{dtype}({self.arguments[0]}, new[0])",
            f"return {', '.join([*sums, *new])}",
        ]


class Scalars(Function):
    """A ``scalars`` or a ``settle``, which takes flags and numbers."""

    @property
    def native_body(self):
        """The lines of a C function with the same bits, which takes what follows t from
        an array, puts the results into another, and returns how many they are; -1
        where this one raises an error, its own or that of a division by zero.
        """
        defaults = [ast.literal_eval(value) for value in self.tree.args.defaults]
        names = self.arguments[1:]
        pairs = zip(reversed(names), reversed(defaults), strict=False)
        flags = {name for name, default in pairs if isinstance(default, bool)}
        taken = [
            f"cdef bint {name} = _taken[{k}] != 0"
            if name in flags
            else f"cdef double {name} = _taken[{k}]"
            for k, name in enumerate(names)
        ]
        tree = ast.parse("\n".join(self.body("f64")))
        text = ast.unparse(ast.fix_missing_locations(Native().visit(tree)))
        # Rules have a variable called zero, too.
        zero = ["cdef bint _zero[1]", "_zero[0] = False"]
        return [*taken, declared("double", self.locals), *zero, *text.split("\n")]


class Native(ast.NodeTransformer):
    """Makes of the statements of a ``Scalars`` those of a C function."""

    def visit_Raise(self, node):
        return ast.Return(ast.Constant(-1))

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.Pow):
            return ast.Call(ast.Name("power"), [node.left, node.right], [])
        if isinstance(node.op, ast.Div) and not isinstance(node.right, ast.Constant):
            node.right = ast.Call(
                ast.Name("checked"), [node.right, ast.Name("_zero")], []
            )
        return node

    def visit_Assign(self, node):
        """Of tuples to choose from, C has none: a choice of assignments."""
        self.generic_visit(node)
        value = node.value
        if isinstance(value, ast.IfExp) and isinstance(value.body, ast.Tuple):
            a, b = (
                ast.Assign(node.targets, part) for part in (value.body, value.orelse)
            )
            return ast.If(value.test, [a], [b])
        return node

    def visit_Return(self, node):
        self.generic_visit(node)
        values = node.value.elts
        places = [ast.parse(f"_results[{k}]").body[0].value for k in range(len(values))]
        stores = [ast.Assign([p], v) for p, v in zip(places, values, strict=True)]
        return [*stores, ast.parse(f"return -1 if _zero[0] else {len(values)}").body[0]]


def is_root(node):
    """Whether this is a call of sqrt."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "sqrt"


def function_of(name, arguments, body):
    """Return the definition of a function."""
    definition = ast.parse(f"def {name}({arguments}): pass").body[0]
    definition.body = body
    return ast.fix_missing_locations(definition)


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def found(path, name, kind):
    """Find the statement of this kind that defines what a file calls by a name, in this
    file, in another rule's or in language.py. Return the file and the statement, or
    None."""
    for node in parsed(path).body:
        if isinstance(node, kind):
            if name in (getattr(node, "name", ""), ast.unparse(node).split(" = ")[0]):
                return path, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    other = RULES / f"{node.module.rpartition('.')[2]}.py"
                    if node.module == "fastopt.rule":
                        return found(LANGUAGE, alias.name, kind)
                    if node.module.startswith("fastopt.rules.") and other.exists():
                        return found(other, alias.name, kind)
    return None


def defined(path, name, kind=Function, *more):
    """Find the function that a file calls by a name. Return None if there is none."""
    place = found(path, name, ast.FunctionDef)
    return place and kind(*place, *more)


def constant(path, name):
    """Find the constant that a file calls by a name. Return None if there is none."""
    place = found(path, name, ast.Assign)
    if place is None:
        return None
    path, node = place
    words = {"word": lambda first, *second: (first, *(second or [first]))}
    value = eval(ast.unparse(node.value), {"__builtins__": {}}, words)
    return Constant(path, node.targets[0].id, value)


def functions_of(path):
    """Yield the functions of a file's rules: of ``Rule(update, scalars, ...)`` and of
    ``Rule.in_passes(direction, measure, apply, scalars, settle, ...)``."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        count = len(ast.literal_eval(given["state"])) if "state" in given else 0
        names = [getattr(argument, "id", "") for argument in call.args]
        if ast.unparse(call.func) == "Rule":
            update, scalars = names
            yield defined(path, update, Kernel, count)
            if "measure" in given:
                yield defined(path, given["measure"].id, Measure, count)
                yield defined(path, given["settle"].id, Scalars)
        elif ast.unparse(call.func) == "Rule.in_passes":
            direction, measure, apply, scalars, settle = names
            yield from in_passes(path, direction, measure, apply, count)
            yield defined(path, settle, Scalars)
        else:
            continue
        yield defined(path, scalars, Scalars)


def in_passes(path, direction, measure, apply, count):
    """Yield the functions that are made of a rule's passes, and the last pass."""
    passes = {
        "direction": defined(path, direction),
        "terms": defined(path, measure, Terms),
        "apply": defined(path, apply, Kernel, 0),
    }
    taken = [passes[name].arguments for name in ("direction", "apply")]
    text = runpy.run_path(str(COMPOSED))["text"](*taken, count)
    update, measure = ast.parse(text).body
    yield Kernel(path, update, count, passes=passes)
    yield Measure(path, measure, count, passes=passes)
    yield Begin(path, measure, count, passes=passes)
    yield passes["apply"]


def functions():
    """Return the functions of the rules that rules/__init__.py imports, of floor.py and
    of passes.py, and the helper functions that they call."""
    tree = ast.parse((RULES / "__init__.py").read_text(encoding="utf-8"))
    modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    rules = [name.rpartition(".")[2] for name in modules if ".rules." in name]
    files = [RULES / f"{name}.py" for name in (*rules, "floor", "passes")]
    found = {}
    waiting = [function for file in files for function in functions_of(file)]
    for function in waiting:
        known = found.setdefault(function.name, function)
        if ast.dump(known.tree) != ast.dump(function.tree):
            raise ValueError(f"there are two functions {function.name}: rename one")
        if known is function:
            if not isinstance(function, Scalars):
                waiting += function.helpers.values()
    return list(found.values())


def formats():
    """Return the formats of fastopt/memory/formats.py."""
    stored = ast.literal_eval(found(FORMATS, "STORED", ast.Assign)[1].value)
    formats = []
    for call in ast.walk(parsed(FORMATS)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Format":
            name, decode, encode, public = call.args
            more = {keyword.arg: keyword.value for keyword in call.keywords}
            remainder = more.get("remainder")
            scale, curve = (
                defined(FORMATS, more[key].id) if key in more else None
                for key in ("scale", "curve")
            )
            formats.append(
                Format(
                    name.value,
                    defined(FORMATS, decode.id),
                    defined(FORMATS, encode.id),
                    f"{stored[public.value]}_t",
                    f"{remainder.value}_t" if remainder else "",
                    scale,
                    curve,
                )
            )
    return formats


def numbers():
    """Return the numbers of fastopt/memory/order.py, by name."""
    tree = ast.parse(ORDER.read_text(encoding="utf-8"))
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }


def each(before, names, after=""):
    """Return a comma-separated part of an argument list."""
    return "".join(f"{before}{name}{after}, " for name in names)


def declared(c_type, names):
    """Return a declaration of local variables."""
    return f"cdef {c_type} {', '.join(names)}" if names else ""


def buffers(c_type, count):
    """Return the first so many addresses of a row, for a loop that begins at start."""
    return "".join(f"<{c_type}*> row[{k}] + start, " for k in range(count))


def renderer():
    """Return a function that renders a template of csrc with these values."""
    found, stored = functions(), formats()
    updates = [f for f in found if type(f) is Kernel]
    codecs = [of.decode for of in stored] + [of.encode for of in stored]
    codecs += [f for of in stored for f in (of.scale, of.curve) if f]
    codecs.append(defined(FORMATS, "random_word"))
    for codec in codecs:  # which grows by what they call
        codecs += codec.helpers.values()
    codecs = list({codec.name: codec for codec in codecs}.values())
    compiled = [f for f in (*found, *codecs) if type(f) is not Scalars]
    named = {c.name: c for function in compiled for c in function.named.values()}
    namespace = {
        "constants": list(named.values()),
        "updates": updates,
        "clip": next(f for f in updates if f.name == "passes_limited"),
        "measures": [f for f in found if isinstance(f, Measure)],
        "helpers": [f for f in found if type(f) in (Function, Terms)],
        "formats": stored,
        "codecs": codecs,
        "forms": [form for rule in updates for form in forms(stored, rule)],
        "scalars": [f for f in found if type(f) is Scalars],
        "each": each,
        "declared": declared,
        "buffers": buffers,
        "numbers": numbers(),
        "tables": tables(),
        "cython": Cython.__version__,
    }

    def render(name, **values):
        template = Tempita.Template((CSRC / name).read_text(encoding="utf-8"))
        return template.substitute(namespace | values)

    return render
