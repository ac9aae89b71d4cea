"""Powers in a rule's functions that have the same bits on every machine.

Python computes ``beta2**t`` with the C library's ``pow``, which is not always rounded
correctly, so that libraries differ in the last place. :func:`portable` therefore makes
a copy of a function from its source, in which calls replace ``**``. Functions that it
calls are copied, too, when they are called. The user's code is not changed.

A copy is made only if the source, compiled again, gives the very code of the function.
If the source is not at hand or has changed, a warning says so.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import dis
import functools
import linecache
import math
import operator
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastopt import elementary
from fastopt.runtime import openmp

power: Callable[[float, float], float]
"""``x**y``, correctly rounded; see :func:`fastopt.elementary.power`."""
log: Callable[[float], float]
"""The natural logarithm, correctly rounded; see :func:`fastopt.elementary.log`."""
cospi: Callable[[float], float]
"""The cosine of ``pi * x``; see :func:`fastopt.elementary.cospi`."""
raised: Callable[[Any, Any], Any]
"""``x**y``, as Python computes it, but for the last bits of floats."""


NUMPY, FLOATS = {np.float64, np.int64}, {np.float64, float}


def raised_slowly(x: Any, y: Any) -> Any:
    """Do what ``raised`` does for all numbers, with the errors of Python."""
    kinds = type(x), type(y)
    if NUMPY & {*kinds} and FLOATS & {*kinds} and {*kinds} <= NUMPY | {int, float}:
        result = power(float(x), float(y))
        return np.float64(result) if math.isfinite(result) else x**y
    if kinds == (int, int) and y >= 0 or not {*kinds} <= {int, float}:
        return x**y
    result = power(x, y)
    if math.isinf(result) and x and math.isfinite(x) and math.isfinite(y):
        raise OverflowError(34, "Numerical result out of range")
    return result if math.isfinite(result) else float(x) ** float(y)


try:
    _compiled = openmp.extension("_process")
    power, log = _compiled.power, _compiled.log
    cospi = _compiled.quick_cospi(elementary.cospi)
    raised = _compiled.quick_powers(raised_slowly)
except ImportError:  # no C compiler, or no OpenMP
    power, log, cospi = elementary.power, elementary.log, elementary.cospi
    raised = raised_slowly

# The copies of functions and codes by the id() of the original, or None if no copy is
# needed. An entry is removed when the original is freed.
_functions: dict[int, tuple[Any, types.CodeType, types.FunctionType | None]] = {}
_codes: dict[int, tuple[Any, types.CodeType | None]] = {}


def portable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function, such as a rule's ``scalars``, whose powers have the
    same bits on every machine. A function without powers, and what is not a Python
    function, is returned as it is."""
    known = _functions.get(id(function))
    if known and known[0]() is function and known[1] is function.__code__:
        return updated(known[2], function) or function
    if function is pow:
        return powers
    if isinstance(function, types.MethodType):
        return types.MethodType(portable(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    code = copied(function)
    changed = None
    if code is not None:
        changed = types.FunctionType(
            code,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        changed.__kwdefaults__ = function.__kwdefaults__
        functools.update_wrapper(changed, function)
        del changed.__dict__["__wrapped__"]  # it would keep the function alive
    _functions[id(function)] = watched(function, _functions), function.__code__, changed
    return changed or function


def updated(
    copy: types.FunctionType | None, function: Any
) -> Callable[..., Any] | None:
    """Give the copy of a function the defaults that the function has now."""
    if copy and copy.__defaults__ is not function.__defaults__:
        copy.__defaults__ = function.__defaults__
    if copy and copy.__kwdefaults__ is not function.__kwdefaults__:
        copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def powers(base: Any, exp: Any, mod: Any = None) -> Any:
    """Do what ``pow`` does, with fastopt's powers."""
    return raised(base, exp) if mod is None else pow(base, exp, mod)


def raised_in_place(x: Any, y: Any) -> Any:
    """Compute ``x **= y``, which changes an array in place."""
    if isinstance(x, (int, float)):
        return raised(x, y)
    x **= y
    return x


def copied(function: types.FunctionType) -> types.CodeType | None:
    """Return a function's code with calls in place of ``**``, or None if it has
    nothing to replace."""
    code = function.__code__
    known = _codes.get(id(code))
    if known and known[0]() is code:
        return known[1]
    copy = None
    codes = [*codes_in(code)]
    # Python computes powers of constants when it compiles, so a float may be one.
    if (
        any(map(has_powers, codes))
        or any("CALL" in i.opname for one in codes for i in dis.get_instructions(one))
        or any(isinstance(value, float) for one in codes for value in one.co_consts)
    ):
        copy = rewritten(function)
        if copy is None and takes_powers(function, set()):
            warnings.warn(
                f"the source of {function.__qualname__} is not at hand or has changed "
                f"since, so the C library computes its powers (**), whose last bits "
                f"may differ between machines; use fastopt.rule.power(x, y)",
                RuntimeWarning,
                stacklevel=3,
            )
    copy = None if copy == code else copy  # nothing was replaced
    remember(code, copy)
    for part in codes_in(copy) if copy else ():  # they need no further copy
        remember(part, None)
    return copy


def remember(code: types.CodeType, copy: types.CodeType | None) -> None:
    _codes[id(code)] = watched(code, _codes), copy


def watched(value: Any, table: dict[int, Any]) -> Any:
    """Return a weak reference to a key of a table. It removes the entry when the key
    is freed."""
    key = id(value)
    return weakref.ref(value, lambda _: table.pop(key, None))


def has_powers(code: types.CodeType) -> bool:
    return any(i.argrepr in ("**", "**=") for i in dis.get_instructions(code))


def takes_powers(function: Any, seen: set[int]) -> bool:
    """Return whether a function has powers, or names a function that does."""
    if function is pow:
        return True
    function = getattr(function, "__func__", function)  # of a method
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return False
    seen.add(id(function))
    if exact(function):
        return False
    cells = (cell for cell in function.__closure__ or () if cell != types.CellType())
    reached = [cell.cell_contents for cell in cells]
    names = {**vars(builtins), **function.__globals__}
    for code in codes_in(function.__code__):
        if has_powers(code):
            return True
        loads = (i for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
        reached += [names.get(i.argval) for i in loads]
    return any(takes_powers(value, seen) for value in reached)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions in it, in the source's order."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def rewritten(function: types.FunctionType) -> types.CodeType | None:
    """Return a function's code with calls in place of ``**``, compiled from its file.
    Return None if the file does not have this very code."""
    found = parsed(function)
    if found is None:
        return None
    tree, place = found
    code = function.__code__
    with warnings.catch_warnings():  # about the file, and about calls of strings
        warnings.simplefilter("ignore")
        changed = ast.fix_missing_locations(Powers(function).visit(tree))
        return filled([*codes_in(compiled(changed, code))][place])


def parsed(function: types.FunctionType) -> tuple[ast.Module, int] | None:
    """Return the syntax tree of a function's file, and which of the codes in it, as
    ``codes_in`` lists them, is the function's. Return None if none is."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    with warnings.catch_warnings():  # about the file
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse("".join(lines))
            # Equal code objects also have equal lines and columns, so that functions
            # on one line are not confused.
            return tree, [*codes_in(compiled(tree, code))].index(code)
        except (SyntaxError, ValueError):  # ValueError: index() did not find it
            return None


def compiled(tree: ast.Module, code: types.CodeType) -> types.CodeType:
    """Compile a file, with the imports from ``__future__`` that a function of it was
    compiled with: in a notebook, another cell may have them."""
    flags = code.co_flags & FUTURE
    result: types.CodeType = compile(
        tree, code.co_filename, "exec", flags, dont_inherit=True
    )
    return result


FUTURE = functools.reduce(
    operator.or_,
    (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names),
)
# Placeholders in the tree. Compiled code has the functions as constants in their place.
RAISED, PORTABLE = "\0fastopt.raised", "\0fastopt.portable"
IN_PLACE = "\0fastopt.raised_in_place"


def filled(code: types.CodeType) -> types.CodeType:
    """Replace the placeholders by the functions."""
    functions = {RAISED: raised, PORTABLE: portable, IN_PLACE: raised_in_place}

    def constant(value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return filled(value)
        return functions.get(value, value) if isinstance(value, str) else value

    return code.replace(co_consts=tuple(map(constant, code.co_consts)))


class Powers(ast.NodeTransformer):
    """Replaces powers by calls of ``raised``, and functions by portable copies."""

    def __init__(self, function: types.FunctionType) -> None:
        self.names = {**vars(builtins), **function.__globals__}
        for code in codes_in(function.__code__):  # what its own names mean may change
            for name in code.co_varnames + code.co_cellvars + code.co_freevars:
                self.names.pop(name, None)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow):
            return node
        return call(RAISED, node, node.left, node.right)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow) or not isinstance(node.target, ast.Name):
            return node
        before = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = call(IN_PLACE, node, before, node.value)
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        value = self.found(node.func)
        unknown = value is None or value is pow
        if unknown or isinstance(value, types.FunctionType) and not exact(value):
            node.func = call(PORTABLE, node.func, node.func)
        return node

    def found(self, node: ast.expr) -> Any:
        """Return what an expression refers to, or None if only a call can tell."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            module = self.found(node.value)
            if isinstance(module, types.ModuleType):
                return getattr(module, node.attr, None)
        return None


def exact(function: types.FunctionType) -> bool:
    """Return whether a function is a primitive of rules, which needs no copy."""
    return function.__module__ in ("fastopt.language", elementary.__name__)


def call(function: str, place: ast.AST, *arguments: ast.expr) -> ast.expr:
    node = ast.Call(ast.Constant(function), [*arguments], [])
    return ast.copy_location(node, place)
