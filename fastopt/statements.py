"""Checks what a rule's functions of elements say: assignments and a return, of what
kernels can compute."""

from __future__ import annotations

import builtins
import dis
import types
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from fastopt.language import NUMPY, PRIMITIVES, Function, bits, real

_JUMPS = {*dis.hasjrel, *dis.hasjabs}
# The names of instructions that leave a value on the stack begin with these.
_VALUES = ("CALL", "LOAD", "BINARY", "COMPARE", "UNARY", "BUILD", "CONTAINS", "IS_OP")
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
# Names of functions of a whole array, which an element cannot compute.
_WHOLE = {"norm", "sum", "mean", "dot", "vdot", "std", "var", "median"}
_CALLED = {"max": "maximum", "min": "minimum", "fmax": "maximum", "fmin": "minimum"}

# An instruction of a function, and the number of its line.
Body: TypeAlias = Sequence[tuple[dis.Instruction, int]]


def body_of(function: Function) -> Body:
    """Return a function's instructions."""
    code, line = function.__code__, function.__code__.co_firstlineno
    lines = {offset: at for offset, at in dis.findlinestarts(code) if at is not None}
    body = []
    for instruction in dis.get_instructions(code):
        line = lines.get(instruction.offset, line)
        body.append((instruction, line))
    return body


def check_no_loop(name: str, function: Function, body: Body) -> None:
    """Check that a function has no loop, which not every backend can compile."""
    for instruction, line in body:
        jumps = instruction.opcode in _JUMPS
        back = jumps and instruction.argval <= instruction.offset
        if instruction.opname == "FOR_ITER" or back:
            raise ValueError(
                f"{function.__name__} of {name!r} has a loop, in "
                f"{_place(function, line)}, but may contain only assignments and a "
                f"return; write out what each round of the loop computes"
            )


def check_no_statement(name: str, function: Function, body: Body) -> None:
    """Check that a function has no expression whose value is dropped, such as a call
    of ``print``, which compiled kernels cannot do."""
    before = ""
    for instruction, line in body:
        if instruction.opname == "POP_TOP" and before.startswith(_VALUES):
            raise ValueError(
                f"{function.__name__} of {name!r} has an expression whose value is not "
                f"used, such as a call of print, in {_place(function, line)}, but may "
                f"contain only assignments and a return; to see values, call "
                f"{function.__name__} by hand with numbers, and print what it returns"
            )
        before = instruction.opname


def check_calls(name: str, function: Function, body: Body) -> None:
    """Check that a function names no other functions than the primitives, helper
    functions and NumPy's functions of elements, and no attributes of elements."""
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    own = dict(zip(code.co_freevars, cells, strict=True))
    named, value = "", None  # of what was just loaded
    ends = [*(after.opname not in _ATTRIBUTES for after, _ in body[1:]), True]
    for (instruction, line), is_whole in zip(body, ends, strict=True):
        kind, key = instruction.opname, str(instruction.argval)
        if kind in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            known = own if key in own else function.__globals__
            named, value = key, known.get(key, vars(builtins).get(key))
        elif kind in _ATTRIBUTES:
            value = getattr(value, key, None) if named else None
            named = f"{named}.{key}"
        else:
            named, value = "", None
        if named.startswith(".") or is_whole and _is_foreign(value):
            what = "reads" if value is None else "calls"
            raise TypeError(
                f"{function.__name__} of {name!r} {what} {named}, in "
                f"{_place(function, line)}, but may use only arithmetic, abs, "
                f"functions like itself, and the primitives of fastopt.rule "
                f"({', '.join(NUMPY)}){_instead(key)}"
            )


def _place(function: Function, line: int) -> str:
    return f"line {line} of {function.__code__.co_filename}"


def uses_words(function: Function) -> bool:
    """Whether a function looks at the bits of numbers."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    names = map(function.__globals__.get, function.__code__.co_names)
    return any(value is bits or value is real for value in (*names, *cells))


def _is_foreign(value: Any) -> bool:
    """Whether this is a function that kernels cannot call. Some can call NumPy's
    functions of elements, such as ``np.exp``, whose bits may differ."""
    if not callable(value) or value is abs or hasattr(value, "py_func"):  # of Numba's
        return False
    ours = any(value is primitive for primitive in PRIMITIVES)
    return not ours and not isinstance(value, (types.FunctionType, np.ufunc))


def _instead(key: str) -> str:
    """Return the advice for a function of this name."""
    if key in _WHOLE:
        return (
            "; update sees one element, so let measure= sum up what a norm needs, and "
            "settle= make a scalar of it"
        )
    if key in ("abs", "absolute", "fabs"):
        return "; write abs(x)"
    key = _CALLED.get(key, key)
    return f"; write fastopt.rule.{key}" if key in NUMPY else ""
