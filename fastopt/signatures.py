"""Checks how a rule's functions are written: their arguments, and what elements may
compute."""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from fastopt.language import NUMPY, PRIMITIVES, Function, bits, real

# These match a name, or its end, as in adamw_lr.
_AT_LEAST_ZERO = re.compile(r"(.*_)?(lr|eps|weight_decay|momentum)")
_BELOW_ONE = re.compile(r"(.*_)?beta\d*")
# What an optimizer's own attributes and arguments are called.
_RESERVED = {"params", "backend", "threads", "rule", "groups", "state", "steps", "step"}
_RESERVED |= {"state_dict", "load_state_dict", "add_group", "accumulate", "estimate"}
_RESERVED |= {"accumulated", "ema", "ema_params", "eval_params", "frozen", "grad_norm"}
_RESERVED |= {"skipped", "weight_decay_mask", "formats", "copy_to", "seed", "memory"}
_RESERVED |= {"save", "load"}


@cache
def limits(key: str) -> tuple[float, float]:
    """Return the least value of a hyperparameter of this name, and its upper bound,
    which is not allowed itself."""
    if _BELOW_ONE.fullmatch(key):
        return 0.0, 1.0
    return (0.0 if _AT_LEAST_ZERO.fullmatch(key) else -math.inf), math.inf


def state_names(state: Any) -> tuple[str, ...]:
    """Return the names of a rule's state buffers, which are given as a tuple."""
    if isinstance(state, str):
        raise TypeError(
            f"state must be a tuple with the name of each buffer, got the string "
            f"{state!r}; write state=({state!r},)"
        )
    if not isinstance(state, Sequence) or not all(isinstance(n, str) for n in state):
        raise TypeError(
            f"state must be a tuple with the name of each buffer, such as "
            f"('m', 'v'), got {state!r}"
        )
    if len(set(state)) < len(state):
        raise ValueError(f"state must name each buffer once, got {tuple(state)!r}")
    return tuple(state)


def check_scalars(name: str, scalars: Function, carry: Mapping[str, Any]) -> None:
    """Check the arguments of a rule's ``scalars``: t, what is carried, and
    hyperparameters."""
    of, parameters = f"scalars of {name!r}", list(_parameters(scalars))
    _check_first(of, parameters, "scalars(t, lr=0.1)")
    if limits(parameters[0].name) != (-math.inf, math.inf):
        first = parameters[0].name
        raise TypeError(
            f"{of} must take t, the number of the step, before the hyperparameters, "
            f"but takes {first} first, which would get this number; write "
            f"scalars(t, {first}=...)"
        )
    parameters = parameters[1:]
    carried = [parameter.name for parameter in parameters[: len(carry)]]
    if carried != list(carry):
        raise TypeError(
            f"{of} must take the carry after t, {', '.join(carry)}, but takes "
            f"{', '.join(carried)}"
        )
    for parameter in parameters[: len(carry)]:
        _check_kind(of, "the carry", parameter)
        if parameter.default is not parameter.empty:
            raise TypeError(
                f"{of} must take the carry without defaults, but {parameter.name} has "
                f"the default {parameter.default!r}; give the first value in carry="
            )
    for parameter in parameters[len(carry) :]:
        key = parameter.name
        _check_kind(of, "its hyperparameters", parameter)
        if parameter.default is parameter.empty:
            raise TypeError(
                f"{of} must give every hyperparameter a default; {key} has none"
            )
        if key in _RESERVED or key.startswith("_"):
            raise TypeError(
                f"a hyperparameter of {name!r} may not be named {key!r}, "
                f"which means something else to an optimizer"
            )


def check_settle(name: str, settle: Function) -> None:
    """Check the arguments of a rule's ``settle``: t, n, sums, and results of
    ``scalars``."""
    of, parameters = f"settle of {name!r}", list(_parameters(settle))
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{of} must name its arguments one by one: those results of scalars "
                f"that it does not name go on to update"
            )
    _check_first(of, parameters, "settle(t, n, total, lr)")
    for parameter in parameters[1:]:
        _check_kind(of, "its arguments", parameter)
        if parameter.default is not parameter.empty:
            raise TypeError(
                f"{of} must take its arguments without defaults, because it always "
                f"gets them all; {parameter.name} has the default "
                f"{parameter.default!r}"
            )


def _check_first(
    of: str, parameters: Sequence[inspect.Parameter], example: str
) -> None:
    """Check that the first argument is one for ``t``."""
    wanted = "t, the number of the step, "
    if not parameters:
        raise TypeError(
            f"{of} must take {wanted}first, but takes no argument; write {example}"
        )
    first = parameters[0]
    if first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD):
        raise TypeError(
            f"{of} must name its arguments one by one, {wanted}first, but takes "
            f"*{first.name}; write {example}"
        )
    if first.kind is first.KEYWORD_ONLY:
        raise TypeError(
            f"{of} must take {wanted}first and by position, but takes {first.name} by "
            f"name only; remove the *, and write {example}"
        )
    if first.default is not first.empty:
        raise TypeError(
            f"{of} must take {wanted}first and without a default, but takes "
            f"{first.name}={first.default!r} first, which would get this number; "
            f"write {example}"
        )


def _check_kind(of: str, what: str, parameter: inspect.Parameter) -> None:
    """Check that an argument is one alone, and given by position."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise TypeError(
            f"{of} must name {what} one by one, but takes *{parameter.name}"
        )
    if parameter.kind is parameter.KEYWORD_ONLY:
        raise TypeError(
            f"{of} must take {what} by position, but takes {parameter.name} by name "
            f"only; remove the *"
        )


def _parameters(function: Function) -> Sequence[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def check_named(name: str, element: Function) -> None:
    """Check that a function of elements takes arguments by position, one by one."""
    for parameter in _parameters(element):
        _check_kind(f"{element.__name__} of {name!r}", "its arguments", parameter)


def check_no_loop(name: str, function: Function) -> None:
    """Check that a function has no loop, which not every backend can compile."""
    jumps = {*dis.hasjrel, *dis.hasjabs}
    for instruction, line in _instructions(function):
        back = instruction.opcode in jumps and instruction.argval <= instruction.offset
        if instruction.opname == "FOR_ITER" or back:
            raise ValueError(
                f"{function.__name__} of {name!r} has a loop, in {line}, but may "
                f"contain only assignments and a return; write out what each round of "
                f"the loop computes"
            )


# How the names of the instructions begin that leave a value.
_VALUES = ("CALL", "LOAD", "BINARY", "COMPARE", "UNARY", "BUILD", "CONTAINS", "IS_OP")


def check_no_statement(name: str, function: Function) -> None:
    """Check that a function has no expression whose value is dropped, such as a call
    of ``print``, which compiled kernels cannot do."""
    before = ""
    for instruction, line in _instructions(function):
        if instruction.opname == "POP_TOP" and before.startswith(_VALUES):
            raise ValueError(
                f"{function.__name__} of {name!r} has an expression whose value is not "
                f"used, such as a call of print, in {line}, but may contain only "
                f"assignments and a return; to see values, call {function.__name__} "
                f"by hand with numbers, and print what it returns"
            )
        before = instruction.opname


# What people write for numbers that are of a whole array, not of one element.
_WHOLE = {"norm", "sum", "mean", "dot", "vdot", "std", "var", "median"}
_CALLED = {"max": "maximum", "min": "minimum", "fmax": "maximum", "fmin": "minimum"}


def check_calls(name: str, function: Function) -> None:
    """Check that a function names no other functions than the primitives and helper
    functions, and no attributes of elements."""
    code = function.__code__
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    known = {**vars(builtins), **function.__globals__}
    known |= dict(zip(code.co_freevars, cells, strict=True))
    named, owner = "", None  # of the module that was just loaded
    for instruction, line in _instructions(function):
        kind, key = instruction.opname, str(instruction.argval)
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            value = getattr(owner, key, None) if named else None
            named = f"{named}.{key}"
        elif kind in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            value, named = known.get(key), key
        else:
            named, owner = "", None
            continue
        if _is_foreign(value) or named.startswith("."):
            what = f"calls {named}" if value is not None else f"reads {named}"
            raise TypeError(
                f"{function.__name__} of {name!r} {what}, in {line}, but may use only "
                f"arithmetic, abs, functions like itself, and the primitives of "
                f"fastopt.rule ({', '.join(NUMPY)}){_instead(key)}"
            )
        owner = value
        if not isinstance(value, types.ModuleType):
            named = named if value is not None else ""


def uses_words(function: Function) -> bool:
    """Whether a function looks at the bits of numbers."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    names = map(function.__globals__.get, function.__code__.co_names)
    return any(value is bits or value is real for value in (*names, *cells))


def _is_foreign(value: Any) -> bool:
    """Whether this is a function that kernels cannot call, or whose bits differ."""
    if not callable(value) or value is abs or hasattr(value, "py_func"):  # of Numba's
        return False
    ours = any(value is primitive for primitive in PRIMITIVES)
    return not ours and not isinstance(value, types.FunctionType)


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


def _instructions(function: Function) -> Iterator[tuple[dis.Instruction, str]]:
    """Yield each instruction of a function, and what messages call its line."""
    code, line = function.__code__, function.__code__.co_firstlineno
    lines = {offset: at for offset, at in dis.findlinestarts(code) if at is not None}
    for instruction in dis.get_instructions(code):
        line = lines.get(instruction.offset, line)
        yield instruction, f"line {line} of {code.co_filename}"
