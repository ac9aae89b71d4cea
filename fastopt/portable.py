"""Calls a rule's ``scalars`` with powers that have the same bits on every machine.

``beta2**t`` on Python's floats is C's ``pow``, which need not be rounded correctly, and
C libraries differ in the last place. So :func:`portable` makes a copy of a function,
with calls in place of ``**``. Without its source, or if it calls other functions, it is
called with :class:`Real` and :class:`Whole`, which are floats and integers in all but
their powers. What is computed from one is one again. Only numbers from other libraries,
such as ``math`` or NumPy, are plain ones there, and so are their powers: use ``sqrt``,
``log`` and ``power`` of ``fastopt.rule`` instead.
"""

from __future__ import annotations

import ast
import copy
import dis
import functools
import importlib
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

from fastopt import elementary

RAISED = "_fastopt_raised"  # what copies call ``raised``
JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))

power: Callable[[float, float], float]
"""``x**y``, correctly rounded; see :func:`fastopt.elementary.power`."""
log: Callable[[float], float]
"""The natural logarithm, correctly rounded; see :func:`fastopt.elementary.log`."""
cospi: Callable[[float], float]
"""The cosine of pi times ``x``, likewise; see :func:`fastopt.elementary.cospi`."""
raised: Callable[[Any, Any], Any]
"""``x**y``, as Python computes it, but for the last bits of floats."""


def raised_slowly(x: Any, y: Any) -> Any:
    """Do what ``raised`` does for all numbers, with the errors of Python."""
    numbers = isinstance(x, (int, float)) and isinstance(y, (int, float))
    if not numbers or (isinstance(x, int) and isinstance(y, int) and y >= 0):
        return plain(x) ** plain(y)
    result = power(x, y)
    if math.isinf(result) and x and math.isfinite(x) and math.isfinite(y):
        raise OverflowError(34, "Numerical result out of range")
    return result if math.isfinite(result) else float(x) ** float(y)


try:
    _compiled = importlib.import_module("fastopt._process")
    power, log = _compiled.power, _compiled.log
    cospi = _compiled.quick_cospi(elementary.cospi)
    raised = _compiled.quick_powers(raised_slowly)
except ImportError:  # no C compiler
    power, log, cospi = elementary.power, elementary.log, elementary.cospi
    raised = raised_slowly


@functools.lru_cache(maxsize=256)
def portable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the results of this one, ``scalars`` or ``settle`` of a
    rule, but whose powers have the same bits on every machine."""
    codes = list(codes_in(function.__code__))
    reached = {name for code in codes for name in code.co_names}
    calls = (
        "pow" in reached
        or bool(function.__closure__)
        or any(may_raise(function.__globals__.get(name)) for name in reached)
    )
    raises = any("**" in i.argrepr or "POWER" in i.opname for i in instructions(codes))
    if not (calls or raises):
        return function
    return (None if calls else rewritten(function)) or tracked(function)


def may_raise(value: Any) -> bool:
    """Whether a function that reaches this by a name may raise numbers to powers."""
    if isinstance(value, types.FunctionType):
        return value.__module__ not in ("fastopt.language", elementary.__name__)
    return isinstance(value, types.ModuleType) and value is not math


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def instructions(codes: list[types.CodeType]) -> Iterator[dis.Instruction]:
    for code in codes:
        yield from dis.get_instructions(code)


# With calls in place of operators ---------------------------------------------------


def rewritten(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a copy of a function that calls ``raised`` in place of ``**``. Return None
    if its source is not at hand, as in some interpreters."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):  # the latter for a part of an expression
        return None
    ast.increment_lineno(tree, first - 1)
    file = function.__code__.co_filename
    for node in ast.walk(tree):
        # The file may have changed since, and a line may define several functions.
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and same(
            compiled(node, file), function.__code__
        ):
            made = types.FunctionType(
                compiled(Powers().visit(node), file),
                function.__globals__,
                function.__name__,
                function.__defaults__,
                (types.CellType(raised),),
            )
            made.__kwdefaults__ = function.__kwdefaults__
            return functools.update_wrapper(made, function)
    return None


class Powers(ast.NodeTransformer):
    """Replaces ``**`` by calls."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow):
            return node
        call = ast.Call(ast.Name(RAISED, ast.Load()), [node.left, node.right], [])
        return ast.copy_location(call, node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            return self.generic_visit(node)
        before = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        value = ast.copy_location(ast.BinOp(before, node.op, node.value), node)
        return ast.copy_location(ast.Assign([node.target], self.visit(value)), node)


def compiled(node: ast.AST, file: str) -> types.CodeType:
    """Compile the tree of a function, within another one that has ``raised``."""
    outer = ast.parse(f"def outer({RAISED}): pass")
    if isinstance(node, ast.Lambda):
        statement: ast.stmt = ast.Expr(node)
    else:
        assert isinstance(node, ast.FunctionDef)
        statement = copy.copy(node)
        statement.decorator_list = []
    outer.body[0].body = [statement]  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(outer), file, "exec", dont_inherit=True)
    for _ in range(2):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType))
    return code


def same(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two codes do the same."""
    return [*meaning(a)] == [*meaning(b)]


def meaning(code: types.CodeType) -> Iterator[object]:
    """What a code does, but for what depends on the code around it: where it lies, and
    how a function is called that was imported."""
    yield code.co_varnames
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if isinstance(value, types.CodeType):
            yield from meaning(value)
        elif instruction.opcode in JUMPS:
            yield name
        elif "ATTR" in name or "METHOD" in name:
            yield value
        elif isinstance(value, str):  # perhaps the full name of a function in it
            yield name, value.rpartition(".<locals>.")[2]
        elif not any(part in name for part in ("CALL", "NULL")):
            yield name, repr(value)
    yield code.co_names


# With other numbers -----------------------------------------------------------------


class Real(float):
    """A float whose powers have the same bits on every machine."""

    __slots__ = ()


class Whole(int):
    """An integer whose powers, where they are floats, have the same bits on every
    machine."""

    __slots__ = ()


def number(value: Any) -> Any:
    """Make floats and integers such numbers; leave all else as it is."""
    kind = type(value)
    return Real(value) if kind is float else Whole(value) if kind is int else value


def plain(value: Any) -> Any:
    """Undo :func:`number`."""
    kind = type(value)
    return float(value) if kind is Real else int(value) if kind is Whole else value


def operator(compute: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *numbers: number(compute(*numbers))


def power_of(x: Any, y: Any, *modulo: Any) -> Any:
    return number(pow(plain(x), plain(y), *modulo) if any(modulo) else raised(x, y))


def reflected(y: Any, x: Any, *modulo: Any) -> Any:
    return power_of(x, y, *modulo)


for _kind, _plain in ((Real, float), (Whole, int)):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod"):
        for _operation in (f"__{_name}__", f"__r{_name}__"):
            setattr(_kind, _operation, operator(getattr(_plain, _operation)))
    for _operation in ("__neg__", "__pos__", "__abs__"):
        setattr(_kind, _operation, operator(getattr(_plain, _operation)))
    for _operation, _compute in (("__pow__", power_of), ("__rpow__", reflected)):
        setattr(_kind, _operation, _compute)


def tracked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls this one with such numbers."""

    @functools.wraps(function)
    def computed(*numbers: Any) -> Any:
        results = function(*map(number, numbers))
        return tuple(map(plain, results)) if type(results) is tuple else results

    return computed
