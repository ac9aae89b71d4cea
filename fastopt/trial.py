"""Tries the functions of a rule on small arrays before a user's arrays are touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.language import NUMPY, Function, concrete

if TYPE_CHECKING:
    from fastopt.rule import Rule


def note_scalars(rule: Rule, error: ArithmeticError) -> None:
    """Add to an error that ``scalars`` has raised what it was called with."""
    code, trace = rule.scalars.__code__, error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        name, file, line = code.co_name, code.co_filename, code.co_firstlineno
        here = frame.f_code  # perhaps a portable copy
        if (here.co_name, here.co_filename, here.co_firstlineno) == (name, file, line):
            names = here.co_varnames[: here.co_argcount]
            values = [
                f"{n}={frame.f_locals[n]!r}" for n in names if n in frame.f_locals
            ]
            error.add_note(
                f"This is from scalars of the rule {rule.name!r}, called for step t "
                f"with {', '.join(values)}."
            )
            return
        trace = trace.tb_next


def check_results(
    rule: Rule, t: int, results: tuple[float, ...], dtype: np.dtype[Any], surplus: bool
) -> None:
    """Check that the functions fit together, by one call of each on two elements, in
    float32, which shows results that are wider, and in the parameters' ``dtype``.
    ``results`` are those of ``scalars``; with ``surplus`` there may be more of them,
    for other variants of a rule."""
    check_numbers(rule, "scalars", results, dtype)
    for kind in dict.fromkeys([np.dtype(np.float32), dtype]):
        check_elements(rule, t, results, kind, surplus)


def check_elements(
    rule: Rule, t: int, results: tuple[float, ...], dtype: np.dtype[Any], surplus: bool
) -> None:
    """Check the functions of elements in one dtype."""
    buffers = [np.ones(2, dtype) for _ in range(2 + len(rule.state))]
    if rule.apply is not None:
        check_direction(rule, buffers, results)
    handed = 0  # of them, past settle
    if rule.measure is not None and rule.settle is not None:
        terms = tried(rule, rule.measure, *buffers, *results[: rule.measure_count])
        if not isinstance(terms, tuple) or not all(map(is_real, terms)):
            raise TypeError(
                f"measure of {rule.name!r} must return a tuple of numbers, got "
                f"{terms!r}"
            )
        sums, named = [float(x[0]) for x in terms], rule.settle_count
        handed = len(results) - named
        if not 0 <= handed <= len(results):
            raise TypeError(
                f"settle of {rule.name!r} must take t, n, {len(sums)} sums, and "
                f"the last results of scalars, {len(results)} at most; it takes "
                f"{named + 2 + len(sums)} arguments"
            )
        if rule.apply is not None and rule.measure_count != handed:
            raise TypeError(
                f"direction of {rule.name!r} must take the {handed} "
                f"results of scalars that settle does not take, but takes "
                f"{rule.measure_count}"
            )
        settled = rule.settle(t, 2.0, *sums, *results[handed:])
        check_numbers(rule, "settle", settled, dtype)
        results = (*results[:handed], *settled)
    last = "scalars" if rule.settle is None else "settle"
    given = len(results) - len(rule.carry)
    if given < rule.scalar_count or (given > rule.scalar_count and not surplus):
        carried = f" and {len(rule.carry)} to carry" if rule.carry else ""
        count = len(results) - handed
        values = "value" if count == 1 else "values"
        raise TypeError(
            f"{last} of {rule.name!r} returns {count} {values}, but its "
            f"update takes {rule.scalar_count - handed} after (p, g, *state"
            f"{', *what settle does not take' if handed else ''}){carried}"
        )
    with np.errstate(all="ignore"):
        used = list(map(dtype.type, results[: rule.scalar_count]))
    if rule.evaluate is not None:
        count = rule.evaluate.__code__.co_argcount - 1 - len(rule.state)
        p, _, *state = buffers
        evaluated = tried(rule, rule.evaluate, p, *state, *used[:count])
        if getattr(evaluated, "dtype", None) != dtype:
            raise TypeError(
                f"evaluate of {rule.name!r} must return numbers of the parameters' "
                f"dtype; from {dtype} it made {evaluated!r}"
            )
    result = tried(rule, rule.update, *buffers, *used)
    wanted = ", ".join(["p", *rule.state]) if rule.state else "p,"
    if not isinstance(result, tuple) or len(result) != 1 + len(rule.state):
        got = len(result) if isinstance(result, tuple) else repr(result)
        raise TypeError(
            f"update of {rule.name!r} must return ({wanted}), a tuple of "
            f"{1 + len(rule.state)}, got {got}"
        )
    for new in result:
        if getattr(new, "dtype", None) != dtype:
            raise TypeError(
                f"update of {rule.name!r} must return numbers of the parameters' "
                f"dtype; from {dtype} it made {new!r}"
            )


def check_direction(
    rule: Rule, buffers: Sequence[Any], results: tuple[float, ...]
) -> None:
    """Check the first pass of a rule in passes."""
    direction = rule.update.__globals__["direction"]
    new = tried(rule, direction, *buffers, *results[: rule.measure_count])
    if not isinstance(new, tuple) or len(new) != 1 + len(rule.state):
        got = len(new) if isinstance(new, tuple) else repr(new)
        raise TypeError(
            f"{direction.__name__} of {rule.name!r} must return "
            f"({', '.join(['u', *rule.state])}), a tuple of {1 + len(rule.state)}, "
            f"got {got}"
        )


def is_real(term: Any) -> bool:
    """Whether something is an array of numbers, not of words or conditions."""
    return getattr(term, "dtype", np.dtype(bool)).kind == "f"


def tried(rule: Rule, function: Function, *arguments: Any) -> Any:
    """Call a function of a rule in the dtype of the first argument."""
    dtype = arguments[0].dtype
    try:
        with np.errstate(all="ignore"):
            return concrete(function, dtype, NUMPY, lambda helper: helper)(*arguments)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{function.__name__} of {rule.name!r} fails on arrays; use where, not "
            f"if, and the primitives of fastopt.rule, not those of math: {error}"
        ) from error


def check_numbers(rule: Rule, what: str, results: Any, dtype: np.dtype[Any]) -> None:
    if not isinstance(results, tuple):
        raise TypeError(f"{what} of {rule.name!r} must return a tuple, got {results!r}")
    for constant in results:
        if not isinstance(constant, (int, float)):
            raise TypeError(
                f"{what} of {rule.name!r} must return numbers, got {constant!r}"
            )
    kept = len(results) - len(rule.carry)
    with np.errstate(all="ignore"):
        for constant in results[:kept]:
            if math.isfinite(constant) and not np.isfinite(dtype.type(constant)):
                raise ValueError(
                    f"{what} of {rule.name!r} returned {constant!r}, too large for "
                    f"{dtype}"
                )
