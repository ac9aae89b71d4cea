"""Renders csrc/kernels.pyx.in from the rules: one extension per instruction set.

The rules are read as text, because an isolated build has no NumPy or Numba to import
them with. Everything else about the package stands in pyproject.toml.
"""

import ast
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import Cython
from Cython import Tempita
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
RENDERED = ROOT / "build" / "kernels"
TEMPLATE = ROOT / "csrc" / "kernels.pyx.in"
TENSORS = ROOT / "csrc" / "tensors.pyx"
XLA = ROOT / "csrc" / "xla.pyx"
ARITHMETIC = ROOT / "csrc" / "arithmetic.pyx"
RULES = ROOT / "fastopt" / "rules"
FLOOR = ROOT / "fastopt" / "floor.py"
PASSES = ROOT / "fastopt" / "passes.py"
# What native code sees, and the kernels' table has to be; and what kernels include.
HEADERS = (
    ROOT / "fastopt" / "include" / "fastopt.h",
    ROOT / "fastopt" / "__init__.pxd",
    ROOT / "csrc" / "gram.h",
    ROOT / "csrc" / "arithmetic.h",
)

MSVC = sys.platform == "win32"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# The flags are part of the promise of identical bits: every operation rounds once, as
# written. Not -ffast-math: it reorders, and sets flush-to-zero for the whole process.
FLAGS = (
    ["/O2", "/fp:precise"]
    if MSVC
    else ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
)
OPENMP = ["/openmp"] if MSVC else ["-fopenmp"]
ISAS = {"baseline": []}
if X86 and not MSVC:
    ISAS["avx2"] = ["-mavx2"]
    ISAS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ]


# What a rule's text may call by name, and the template has in C.
PRIMITIVES = {"abs", "sqrt", "where", "maximum", "minimum", "copysign", "sign"}
PRIMITIVES |= {"wide", "cbrt"}


@dataclass
class Function:
    """What the template needs to know of a rule's function."""

    path: Path  # the file that defines it
    tree: ast.FunctionDef

    @property
    def name(self):
        return f"{self.path.stem}_{self.tree.name}"

    @property
    def arguments(self):
        return [argument.arg for argument in self.tree.args.args]

    @property
    def locals(self):
        stored = [
            node.id
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        ]
        return [name for name in dict.fromkeys(stored) if name not in self.arguments]

    @property
    def returned(self):
        """How many values it returns; 0: one, and not in a tuple."""
        (value,) = [
            node.value for node in ast.walk(self.tree) if isinstance(node, ast.Return)
        ]
        return len(value.elts) if isinstance(value, ast.Tuple) else 0

    @property
    def helpers(self):
        """The functions that it calls, by the name it calls them by."""
        called = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)}
        found = {name: defined(self.path, name) for name in sorted(called - PRIMITIVES)}
        return {name: function for name, function in found.items() if function}

    def result(self, c_type):
        return f"({f'{c_type}, ' * self.returned})" if self.returned else c_type

    def body(self, dtype):
        """The statements, with every function's name made that of its C version."""
        helpers = self.helpers

        class Concrete(ast.NodeTransformer):
            def visit_Name(self, node):
                name = helpers[node.id].name if node.id in helpers else node.id
                known = node.id in PRIMITIVES or node.id in helpers
                return ast.Name(f"{name}_{dtype}" if known else name, node.ctx)

        tree = ast.parse(ast.unparse(self.tree)).body[0]
        text = "\n".join(ast.unparse(Concrete().visit(line)) for line in tree.body)
        return text.split("\n")


@dataclass
class Kernel(Function):
    """An ``update`` or a ``measure``: something that a loop runs over the buffers."""

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


class Measure(Kernel):
    """Its loop only reads, but that of a ``Begin``."""

    way = "in"
    outputs = kept = ()

    @property
    def terms(self):
        return self.returned


@dataclass
class Begin(Measure):
    """A ``measure`` that puts the new state in its place, and keeps the rest that the
    update needs: a step with sums then reads most of its buffers once."""

    of: tuple[Function, ...]  # the update, the measure and the settle

    way = "out"
    kept = ("kept",)

    @property
    def terms(self):
        return self.returned - len(self.outputs)

    @property
    def outputs(self):
        return [*self.states, *self.kept]


class Scalars(Function):
    """A ``scalars`` or a ``settle``, with the C types of what it takes: flags and
    numbers."""

    @property
    def typed(self):
        defaults = map(ast.literal_eval, self.tree.args.defaults)
        types = ["bint" if isinstance(value, bool) else "double" for value in defaults]
        names = self.arguments[1:]
        carried = ["double"] * (len(names) - len(types))
        return [f"{t} {name}" for t, name in zip(carried + types, names, strict=True)]

    @property
    def native_body(self):
        """The lines of a C function with the same bits, which takes what follows t from
        an array, puts the results into another, and returns how many they
        are; -1 where this one raises an error, its own or that of a division by zero.
        """
        ways = {"bint": "_given[{}] != 0", "double": "_given[{}]"}
        taken = [
            f"cdef {typed} = {ways[typed.split()[0]].format(k)}"
            for k, typed in enumerate(self.typed)
        ]
        tree = ast.parse("\n".join(self.body("f64")))
        text = ast.unparse(ast.fix_missing_locations(Native().visit(tree)))
        declared = [f"cdef double {name}" for name in self.locals]
        # Rules have a variable called zero, too.
        zero = ["cdef bint _zero[1]", "_zero[0] = False"]
        return [*taken, *declared, *zero, *text.split("\n")]


class Native(ast.NodeTransformer):
    """Makes of the statements of a ``Scalars`` those of a C function."""

    def visit_Raise(self, node):
        return ast.Return(ast.Constant(-1))

    def visit_BinOp(self, node):
        self.generic_visit(node)
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


def defined(path, name, kind=Function, *more):
    """The function that a file means by a name, its own or another rule's, or None."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return kind(path, node, *more)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    other = RULES / f"{node.module.rpartition('.')[2]}.py"
                    if node.module.startswith("fastopt.rules.") and other.exists():
                        return defined(other, alias.name, kind, *more)
    return None


def used(node, context=ast.Load):
    """The names that are read in it, or stored."""
    found = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {name.id for name in found if isinstance(name.ctx, context)}


def halves(update, measure, settle):
    """Of a rule with sums a ``begin`` and a ``finish``, where its update and measure
    start alike, with what settle hands on as it is, and the update has nothing left to
    do but to move p by the one value that it computed so."""
    *alike, (new, *left) = *update.tree.body[:-1], update.tree.body[-1].value.elts
    buffers = 2 + update.state_count
    states = update.arguments[2:buffers]
    given, later = (f.arguments[buffers:] for f in (measure, update))
    stored = set().union(*(used(line, ast.Store) for line in alike))
    kept = (used(new) & stored) - set(states)
    taken = settle.arguments[2 + measure.returned :][: len(given)]
    returned = dict(zip(later, settle.tree.body[-1].value.elts, strict=False))
    handed = [name in returned and ast.unparse(returned[name]) for name in given]
    if (
        len({update.path, measure.path, settle.path}) > 1
        or update.arguments[:buffers] != measure.arguments[:buffers]
        or list(map(ast.unparse, alike))
        != list(map(ast.unparse, measure.tree.body[:-1]))
        or list(map(ast.unparse, left)) != states
        or len(kept) != 1
        or kept & {"p", *later}
        or used(new) - kept - {"p", *later}
        or handed != taken
        or used(settle.tree, ast.Store) & set(taken)
    ):
        return []
    (kept,) = kept
    results = [*measure.tree.body[-1].value.elts, *left, ast.Name(kept, ast.Load())]
    begin, finish = (ast.parse(ast.unparse(f.tree)).body[0] for f in (measure, update))
    begin.name, finish.name = f"{update.tree.name}_begin", f"{update.tree.name}_finish"
    begin.body[-1] = ast.Return(ast.Tuple(results, ast.Load()))
    finish.body = [ast.Return(ast.Tuple([new], ast.Load()))]
    finish.args.args = [ast.arg(name) for name in ("p", kept, *later)]
    return [
        Begin(update.path, begin, update.state_count, (update, measure, settle)),
        Kernel(update.path, finish, 0),
    ]


def functions_of(path):
    """Those of every ``Rule(update, scalars, state=..., measure=...)`` in a file."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Rule":
            update, scalars = (argument.id for argument in call.args)
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            count = len(ast.literal_eval(given["state"])) if "state" in given else 0
            of_rule = [defined(path, update, Kernel, count)]
            if "measure" in given:
                of_rule.append(defined(path, given["measure"].id, Measure, count))
                of_rule.append(defined(path, given["settle"].id, Scalars))
                of_rule += halves(*of_rule)
            yield from of_rule
            yield defined(path, scalars, Scalars)


def functions():
    """Those of the rules named in RULES, the only list of them, and of those that have
    a class of their own; of the floor and of what a step does beside; and the helper
    functions that they call."""
    tree = ast.parse((RULES / "__init__.py").read_text(encoding="utf-8"))
    (names,) = [node.value for node in tree.body if isinstance(node, ast.AnnAssign)]
    rules = [*(name.id for name in names.elts), "adafactor", "muon", "lookahead"]
    files = [*(RULES / f"{name}.py" for name in rules), FLOOR, PASSES]
    found = {}
    waiting = [function for file in files for function in functions_of(file)]
    for function in waiting:
        if function.name not in found:
            found[function.name] = function
            if not isinstance(function, Scalars):
                waiting += function.helpers.values()
    return list(found.values())


def each(before, names, after=""):
    """A comma-separated part of an argument list."""
    return "".join(f"{before}{name}{after}, " for name in names)


def extension(name, template, text, flags):
    """From a source that is written where what is built from it will lie, too."""
    source = RENDERED / f"{name}.pyx"
    if not source.exists() or source.read_text(encoding="utf-8") != text:
        source.write_text(text, encoding="utf-8")
    return Extension(
        f"fastopt.{name}",
        [str(source.relative_to(ROOT))],
        extra_compile_args=FLAGS + flags,
        optional=True,  # or packing fails if it was not built
        # A source distribution takes in what an extension depends on.
        depends=[str(path.relative_to(ROOT)) for path in (template, *HEADERS)],
        include_dirs=[str(path.parent.relative_to(ROOT)) for path in HEADERS],
    )


def extensions():
    RENDERED.mkdir(parents=True, exist_ok=True)
    template = Tempita.Template(TEMPLATE.read_text(encoding="utf-8"))
    found = functions()
    for isa, flags in ISAS.items():
        text = template.substitute(
            isa=isa,
            updates=[f for f in found if type(f) is Kernel],
            measures=[f for f in found if isinstance(f, Measure)],
            helpers=[f for f in found if type(f) is Function],
            scalars=[f for f in found if type(f) is Scalars],
            each=each,
            cython=Cython.__version__,
        )
        yield extension(f"_kernels_{isa}", TEMPLATE, text, flags)
    others = {"_tensors": TENSORS, "_xla": XLA, "_arithmetic": ARITHMETIC}
    for name, source in others.items():
        yield extension(name, source, source.read_text(encoding="utf-8"), [])


class BuildKernels(build_ext):
    """Adds OpenMP where the compiler has it; the kernels are serial where not. Without
    a C compiler the install goes on: `fastopt info` says what is missing."""

    def build_extensions(self):
        if self.compiles_with(OPENMP):
            for extension in self.extensions:
                extension.extra_compile_args += OPENMP
                # The plain runtime under its plain name, so that torch, Numba and we
                # share one; a bundled copy would be a second pool of threads.
                extension.extra_link_args += [] if MSVC else OPENMP
        super().build_extensions()

    def build_extension(self, extension):
        # `optional` covers a compiler that fails, not one that is absent.
        try:
            super().build_extension(extension)
        except Exception as error:
            print(f"fastopt: no {extension.name}: {error}", file=sys.stderr)

    def compiles_with(self, flags):
        with TemporaryDirectory() as folder:
            source = Path(folder) / "openmp.c"
            source.write_text("#include <omp.h>\nint main(void){return 0;}\n")
            try:
                made = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=flags
                )
                self.compiler.link_executable(
                    made,
                    "openmp",
                    output_dir=folder,
                    extra_postargs=[] if MSVC else flags,
                )
            except Exception as error:  # any kind of compiler failure means: no
                print(f"fastopt: building without OpenMP: {error}", file=sys.stderr)
                return False
        return True


setup(
    ext_modules=cythonize(list(extensions()), include_path=[str(ROOT)]),
    cmdclass={"build_ext": BuildKernels},
    options={"build_ext": {"parallel": len(ISAS)}},  # half the time on two cores
)
