"""Steps from a user's own ``@njit`` code: calls of native.py's table of functions.

Numba links the functions by name, when it compiles and when it loads what it cached, so
a caller may have ``cache=True``. The name of the rule is looked up at each call: in a
cached caller, nothing holds that another fastopt could have changed.

>>> import numba, numpy as np, fastopt
>>> from fastopt.njit import start, step
>>> @numba.njit
... def train(w, m, v, hyperparameters):
...     start("adamw", w, (m, v), hyperparameters)
...     for t in range(1, 4):
...         step("adamw", t, w, 2 * w, (m, v), hyperparameters)
>>> w, m, v = np.array([1.0, -2.0]), np.empty(2), np.empty(2)
>>> train(w, m, v, fastopt.native.hyperparameters(fastopt.adamw, lr=0.5))
>>> w.round(3)
array([-0.34 , -0.516])
"""

# What Numba compiles takes what it infers, of which its stubs know nothing.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# mypy: disable-error-code="import-untyped,attr-defined,call-overload"

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt import native
from fastopt.backends import cython_cpu

try:
    from llvmlite import binding as llvm
    from llvmlite import ir
    from numba import njit
    from numba.core import cgutils
    from numba.core import types as nt
    from numba.core.errors import TypingError
    from numba.extending import intrinsic, overload
except ImportError as error:
    raise ImportError(
        f"fastopt.njit is for code that Numba compiles, and Numba cannot be imported "
        f"({error}); pip install 'numba>=0.64'"
    ) from error

__all__ = ["start", "step"]

native.table()
SYMBOLS = {}
for name, pointer in cython_cpu.driver().native_addresses().items():
    SYMBOLS[name] = f"fastopt_native_{name}"
    llvm.add_symbol(SYMBOLS[name], pointer)
ERRORS = tuple(cython_cpu.driver().native_errors())
RULES = {entry.name: entry for entry in native.entries()}

BYTES = ir.IntType(8).as_pointer()
WORD, INT = ir.IntType(64), ir.IntType(32)
# The rule, whether the dtype is float64, and addresses: numbers, carry, segments.
ARRAYS = (nt.uintp, nt.uintp, nt.uintp, nt.int64)
START = nt.ExternalFunction(SYMBOLS["start"], nt.int32(nt.int64, nt.int32, *ARRAYS))
STEP = nt.ExternalFunction(
    SYMBOLS["step"],
    nt.int32(nt.int64, nt.int32, nt.int64, *ARRAYS, nt.float64, nt.int32),
)


def step(
    rule: str,
    t: int,
    p: Any,
    g: Any,
    state: tuple[Any, ...],
    hyperparameters: Any,
    carry: Any = None,
    grad_scale: float = 1.0,
    threads: int = 0,
) -> None:
    """Step ``t``, 1 at the first, in code that Numba compiles; the bits of opt.step.

    Parameters
    ----------
    rule
        Such as ``"adamw"`` or, for an option that changes the state,
        ``"sgd+momentum"``: a constant.
    p, g, state
        C-contiguous arrays of one dtype, float32 or float64, and of one size; ``state``
        is a tuple of them. They must not overlap.
    hyperparameters
        As :func:`fastopt.native.hyperparameters` makes them; the first is ``lr``.
    carry
        A float64 array, for rules that remember numbers from step to step.
    grad_scale
        A factor for the gradients.
    threads
        At most so many; 0: as many as in Python.

    Raises
    ------
    TypingError
        When it is compiled: for arrays or a number of them that do not fit the rule.
    ValueError
        For sizes and hyperparameters that do not. Nothing has been written.

    Examples
    --------
    >>> import numba, numpy as np, fastopt, fastopt.njit
    >>> @numba.njit
    ... def descend(w, g, hyperparameters):
    ...     fastopt.njit.step("gd", 1, w, g, (), hyperparameters)
    >>> w = np.ones(2)
    >>> descend(w, np.ones(2), fastopt.native.hyperparameters(fastopt.gd, lr=0.5))
    >>> w
    array([0.5, 0.5])
    """
    raise TypeError(
        "fastopt.njit.step is for code that Numba compiles; elsewhere call the rule "
        "with the parameters, which makes an optimizer"
    )


def start(
    rule: str, p: Any, state: tuple[Any, ...], hyperparameters: Any, carry: Any = None
) -> None:
    """Give state and carry their first values; arguments as for :func:`step`.

    Examples
    --------
    >>> import numba, numpy as np, fastopt, fastopt.njit
    >>> @numba.njit
    ... def begin(w, m, hyperparameters):
    ...     fastopt.njit.start("lion", w, (m,), hyperparameters)
    >>> m = np.full(2, np.nan)
    >>> begin(np.ones(2), m, fastopt.native.hyperparameters(fastopt.lion))
    >>> m
    array([0., 0.])
    """
    raise TypeError("fastopt.njit.start is for code that Numba compiles")


def check(rule: Any, p: Any, arrays: dict[str, Any], state: Any, *numbers: Any) -> None:
    """Check what can be told from the types."""
    name = getattr(rule, "literal_value", None)
    if not isinstance(name, str):
        raise TypingError(f"rule must be a constant string, got {rule}")
    if name not in RULES:
        raise TypingError(
            f"there is no native rule {name!r}; there are {', '.join(RULES)}"
        )
    about = RULES[name]
    if not isinstance(state, nt.BaseTuple) or len(state) != len(about.state):
        raise TypingError(
            f"{name} needs a tuple of {len(about.state)} state buffers "
            f"({', '.join(about.state)}), got {state}"
        )
    buffers = zip(about.state, state, strict=True)
    for what, array in {"p": p, **arrays, **dict(buffers)}.items():
        if not isinstance(array, nt.Array) or array.layout != "C" or not array.aligned:
            raise TypingError(f"{what} must be a C-contiguous array, got {array}")
        if array.dtype not in (nt.float32, nt.float64) or array.dtype != p.dtype:
            raise TypingError(
                f"{what} must have the dtype of p, float32 or float64, got {array}"
            )
        if not array.mutable and what != "g":
            raise TypingError(f"{what} is read-only, but a step writes to it")
    hyperparameters, carry = numbers
    for what, array in (("hyperparameters", hyperparameters), ("carry", carry)):
        if array in (None, nt.none) or isinstance(array, nt.Omitted):
            if what == "carry" and not about.carry:
                continue
        elif isinstance(array, nt.Array) and array.dtype == nt.float64:
            if array.layout == "C":
                continue
        raise TypingError(f"{name} needs {what}: a C-contiguous float64 array")


@intrinsic(prefer_literal=True)
def find(typingctx, rule):
    """The address of the rule's description; 0 if there is none."""

    def codegen(context, builder, signature, args):
        text = context.insert_const_string(builder.module, rule.literal_value)
        kind = ir.FunctionType(WORD, [BYTES])
        function = cgutils.get_or_insert_function(builder.module, kind, SYMBOLS["find"])
        return builder.call(function, [text])

    return nt.int64(rule), codegen


@intrinsic
def word(typingctx, address, index):
    def codegen(context, builder, signature, args):
        words = builder.inttoptr(args[0], WORD.as_pointer())
        return builder.load(builder.gep(words, [args[1]]))

    return nt.int64(address, index), codegen


@intrinsic
def sizes_differ(typingctx, p, arrays):
    """Whether the size of some array is not that of p."""

    def codegen(context, builder, signature, args):
        def size(kind, value):
            return context.make_array(kind)(context, builder, value).nitems

        wanted, differ = size(signature.args[0], args[0]), ir.Constant(ir.IntType(1), 0)
        for kind, value in zip(
            signature.args[1], cgutils.unpack_tuple(builder, args[1]), strict=True
        ):
            other = builder.icmp_signed("!=", size(kind, value), wanted)
            differ = builder.or_(differ, other)
        return differ

    return nt.boolean(p, arrays), codegen


@intrinsic
def segment(typingctx, p, g, state):
    """The address of a fastopt_segment, on the stack, of p, g (or None) and state."""

    def codegen(context, builder, signature, args):
        def data(kind, value):
            if not isinstance(kind, nt.Array):
                return ir.Constant(BYTES, None)
            array = context.make_array(kind)(context, builder, value)
            return builder.bitcast(array.data, BYTES)

        def stored(kind, parts):
            room = cgutils.alloca_once(builder, kind)
            for k, part in enumerate(parts):
                builder.store(part, builder.gep(room, [INT(0), INT(k)]))
            return builder.bitcast(room, BYTES)

        states = cgutils.unpack_tuple(builder, args[2])
        buffers = [*map(data, signature.args[2], states)]
        size = context.make_array(p)(context, builder, args[0]).nitems
        parts = [*map(data, signature.args[:2], args[:2])]
        parts += [stored(ir.ArrayType(BYTES, max(len(buffers), 1)), buffers), size]
        kind = ir.LiteralStructType([BYTES, BYTES, BYTES, WORD])
        return builder.ptrtoint(stored(kind, parts), WORD)

    return nt.uintp(p, g, state), codegen


@njit
def length(array):
    return 0 if array is None else array.size


@njit
def address(array):
    return np.uintp(0) if array is None else array.ctypes.data


@njit
def check_counts(about, p, arrays, states, hyperparameters, carry):
    """Against what is installed: the caller may have been compiled for another."""
    if about == 0 or word(about, 1) != states:
        raise ValueError("compiled for another version of the rule: clear the cache")
    if word(about, 2) != hyperparameters:
        raise ValueError("there must be as many hyperparameters as the rule has")
    if word(about, 3) != carry:
        raise ValueError("carry must have as many numbers as the rule carries")
    if sizes_differ(p, arrays):
        raise ValueError("p, g and state must have the same size")
    return about


@njit
def check_code(code):
    if code == 5:
        raise MemoryError(ERRORS[5])
    if code != 0:
        raise ValueError(ERRORS[code])


@overload(step, prefer_literal=True)
def step_in_njit(
    rule, t, p, g, state, hyperparameters, carry=None, grad_scale=1.0, threads=0
):
    check(rule, p, {"g": g}, state, hyperparameters, carry)
    double = int(p.dtype == nt.float64)

    def implementation(
        rule, t, p, g, state, hyperparameters, carry=None, grad_scale=1.0, threads=0
    ):
        about = check_counts(
            find(rule), p, (g, *state), len(state), hyperparameters.size, length(carry)
        )
        numbers, carried = address(hyperparameters), address(carry)
        at = segment(p, g, state)
        check_code(STEP(about, double, t, numbers, carried, at, 1, grad_scale, threads))

    return implementation


@overload(start, prefer_literal=True)
def start_in_njit(rule, p, state, hyperparameters, carry=None):
    check(rule, p, {}, state, hyperparameters, carry)
    double = int(p.dtype == nt.float64)

    def implementation(rule, p, state, hyperparameters, carry=None):
        about = check_counts(
            find(rule), p, state, len(state), hyperparameters.size, length(carry)
        )
        numbers, carried = address(hyperparameters), address(carry)
        at = segment(p, None, state)
        check_code(START(about, double, numbers, carried, at, 1))

    return implementation
