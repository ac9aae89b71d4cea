"""The functions ``scalars`` and ``settle`` of a rule, for CUDA kernels.

:func:`device_scalars` makes a copy of such a function from its source, as
`fastopt.portable` does. In the copy, calls replace ``**``, functions of the kernel
replace those that the function calls, and nothing is raised: the host has checked the
hyperparameters before. The copy computes in float64, with the host's bits, because all
that it calls is correctly rounded or exact.

Integers of Python have any size, those of a kernel have 64 bits, and a power of two
integers is a float there. The results are the same as long as no integer needs more
than 53 bits.
"""

from __future__ import annotations

import ast
import builtins
import copy
import dis
import functools
import math
import types
import warnings
from typing import Any, TypeAlias

import numpy as np

from fastopt import elementary, language, portable
from fastopt.backends.cuda_accesses import SIMULATED, inlined, primitives
from fastopt.backends.cuda_powers import elementary_functions, reals
from fastopt.language import Function

Definition: TypeAlias = ast.FunctionDef | ast.Lambda

# What a function may call besides the primitives of rules, and what a kernel calls it.
KNOWN: dict[str, tuple[Any, ...]] = {
    "power": (pow, portable.power, elementary.power),
    "log": (portable.log, elementary.log),
    "sqrt": (math.sqrt, np.sqrt),
    "copysign": (math.copysign, np.copysign),
    "abs": (abs, math.fabs, np.abs, np.fabs),
    "highest": (max,),
    "lowest": (min,),
    **{kind.__name__: (kind,) for kind in (float, int, bool)},
}
DOUBLE = np.dtype(np.float64)
PREFIX = "_fastopt_"  # of names in copies


def device_scalars(function: Function) -> Any:
    """Return a function for kernels, with the arguments of a rule's ``scalars`` or
    ``settle``, that returns a tuple of float64. In the simulator it is plain Python.

    Raises
    ------
    TypeError
        If the function calls what a kernel cannot compute with the same bits, or if its
        source is needed but not at hand.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    numbers = ", ".join(names)
    # No hyperparameter has such a name.
    made = {f"{PREFIX}reals": reals(), f"{PREFIX}copy": kernel_copy(function, ())}
    text = f"def scalars({numbers}): return {PREFIX}reals({PREFIX}copy({numbers}))"
    exec(text, made)
    return inlined(made["scalars"])


def kernel_copy(function: Any, callers: tuple[Any, ...]) -> Any:
    """Return a copy of a function, inlined, in which what it calls is a kernel's."""
    if function in callers:
        raise TypeError(
            f"{function.__qualname__} calls itself, which kernels cannot do"
        )
    code, changes = function.__code__, Changes(function, callers)
    found = portable.parsed(function)
    if found is not None:
        tree, place = found
        with warnings.catch_warnings():  # about the file
            warnings.simplefilter("ignore", SyntaxWarning)
            changes.change(definition(tree, place, code))
            changed = portable.compiled(ast.fix_missing_locations(tree), code)
        code = [*portable.codes_in(changed)][place]
    elif needs_source(code):
        raise TypeError(
            f"the source of {function.__qualname__} is not at hand or has changed "
            f"since, but a CUDA kernel needs it for what the function calls, raises "
            f"or takes to a power (**); define it in a file"
        )
    names = function.__code__.co_freevars
    cells = dict(zip(names, function.__closure__ or (), strict=True))
    of_kernel = types.FunctionType(
        code,
        {**function.__globals__, **changes.made},
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    return inlined(of_kernel)


def needs_source(code: types.CodeType) -> bool:
    return any(
        i.argrepr in ("**", "**=") or "CALL" in i.opname or "RAISE" in i.opname
        for i in dis.get_instructions(code)
    )


def definition(tree: ast.Module, place: int, code: types.CodeType) -> Definition:
    """Return the function in a tree whose code is at this place among all codes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            decorators = [decorator.lineno for decorator in node.decorator_list]
            if min([node.lineno, *decorators]) == code.co_firstlineno:
                return node
        if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno:
            # Several may stand in a line: ours has another code if its body changes.
            body = node.body
            node.body = ast.Tuple([copy.deepcopy(body)] * 2, ast.Load())
            ast.fix_missing_locations(tree)
            changed = [*portable.codes_in(portable.compiled(tree, code))][place]
            node.body = body
            if changed != code:
                return node
    raise TypeError(f"{code.co_qualname} is not a plain function")


class Changes(ast.NodeTransformer):
    """Makes what a kernel can compute of a function. ``made`` has what it calls."""

    def __init__(self, function: Any, callers: tuple[Any, ...]) -> None:
        self.function, self.callers = function, (*callers, function)
        self.made: dict[str, Any] = {}
        self.helpers: dict[str, Any] = {}
        code = function.__code__
        self.names = {**vars(builtins), **function.__globals__}
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        empty = types.CellType()
        self.names |= {n: cell.cell_contents for n, cell in cells if cell != empty}
        for name in code.co_varnames + code.co_cellvars:
            self.names.pop(name, None)

    def change(self, node: Definition) -> None:
        """Change the body of a function, not what is computed when it is defined."""
        if isinstance(node, ast.Lambda):
            node.body = self.visit(node.body)
        else:
            node.body = [self.visit(statement) for statement in node.body]

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow):
            return node
        return self.call("power", node, node.left, node.right)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow) or not isinstance(node.target, ast.Name):
            return node
        before = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = self.call("power", node, before, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        value, refusal = self.found(node.func), self.refusal(node)
        node.args = [self.visit(argument) for argument in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        for name, meant in KNOWN.items():
            if any(value is one for one in meant):
                return self.known(name, node, refusal)
        if not isinstance(value, types.FunctionType):
            raise refusal
        # By a name of its own, because two modules may have a function of one name.
        taken = [name for name, of in self.helpers.items() if of is value]
        name = taken[0] if taken else f"{PREFIX}helper{len(self.helpers)}"
        if not taken:
            self.helpers[name] = value
            self.made[name] = helper(value, self.callers)
        node.func = ast.copy_location(ast.Name(name, ast.Load()), node.func)
        return node

    def known(self, name: str, node: ast.Call, refusal: TypeError) -> ast.AST:
        """Return the call of a function that kernels have."""
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        chained = name in ("highest", "lowest")
        wanted = 2 if chained or name in ("power", "copysign") else 1
        count = len(node.args)
        if node.keywords or starred or count < wanted or count > wanted and not chained:
            raise refusal
        if not chained:
            return self.call(name, node, *node.args)
        return functools.reduce(functools.partial(self.call, name, node), node.args)

    def call(self, name: str, place: ast.AST, *arguments: ast.expr) -> ast.expr:
        self.made[f"{PREFIX}{name}"] = functions()[name]
        function = ast.copy_location(ast.Name(f"{PREFIX}{name}", ast.Load()), place)
        return ast.copy_location(ast.Call(function, [*arguments], []), place)

    def found(self, node: ast.expr) -> Any:
        """Return what an expression refers to, or None if that is not known before."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.found(node.value)
            if isinstance(owner, (types.ModuleType, type)):
                return getattr(owner, node.attr, None)
        return None

    def refusal(self, node: ast.Call) -> TypeError:
        code = self.function.__code__
        return TypeError(
            f"{self.function.__qualname__} calls {ast.unparse(node)}, in line "
            f"{node.lineno} of {code.co_filename}, which a CUDA kernel does not "
            f"compute with the host's bits; it may call sqrt, log and power of "
            f"fastopt.rule, abs, min, max, float, int and bool, and functions like "
            f"itself, by their names or as attributes of modules and classes"
        )


def helper(function: Any, callers: tuple[Any, ...]) -> Any:
    """Return what takes the place of a function in a kernel: a primitive, or a copy."""
    if function.__module__ != language.__name__:
        return kernel_copy(function, callers)
    ours = primitives(np.float64)
    if any(function is primitive for primitive in language.PRIMITIVES):
        return ours[function.__name__]
    return inlined(language.concrete(function, DOUBLE, ours, inlined))


@functools.cache
def functions() -> dict[str, Any]:
    """Return what calls in copies mean."""

    def highest(a: Any, b: Any) -> Any:
        return b if b > a else a  # as Python's max has it, with NaN, too

    def lowest(a: Any, b: Any) -> Any:
        return b if b < a else a

    library: Any = np if SIMULATED else math
    return {
        **{kind.__name__: kind for kind in (float, int, bool)},
        **elementary_functions(),
        **{"sqrt": library.sqrt, "copysign": library.copysign, "abs": abs},
        **{"highest": inlined(highest), "lowest": inlined(lowest)},
    }
