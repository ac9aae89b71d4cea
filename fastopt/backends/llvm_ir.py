"""What both of Numba's targets, CPU and CUDA, build from LLVM's instructions."""

# mypy: disable-error-code="no-untyped-call,import-untyped,untyped-decorator,misc"

from __future__ import annotations

import operator
import platform
import re
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core import types as nt
from numba.core.errors import TypingError

MACHINE = platform.machine().lower()
WORD, HALF, BYTES = ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
NOTHING = ir.VoidType()


class Word(nt.Type):
    """Words, for Numba. Its integers will not do: operations widen them, and make
    float64 of a signed and an unsigned one."""

    def __init__(self, width: int) -> None:
        super().__init__(f"word{width}")
        self.width = width


# What LLVM calls the operators, and the comparisons.
OPERATORS = {
    **{"add": "add", "sub": "sub", "mul": "mul", "lshift": "shl", "rshift": "lshr"},
    **{"and": "and_", "or": "or_", "xor": "xor"},
}
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


def primitives(extending: Any) -> dict[str, Any]:
    """Return the primitives that convert numbers, for the target that this module of
    Numba's extends. The target learns what operators do with words."""

    @extending.register_model(Word)
    class Model(extending.models.PrimitiveModel):
        def __init__(self, manager: Any, kind: Word) -> None:
            super().__init__(manager, kind, ir.IntType(kind.width))

    for name, instruction in OPERATORS.items():
        for operation in (f"__{name}__", f"__i{name}__"):
            define(extending, getattr(operator, operation), instruction)
    for name in COMPARISONS:
        define(extending, getattr(operator, name), name)

    @extending.intrinsic
    def wide(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return context.cast(builder, given[0], signature.args[0], nt.float64)

        return (nt.float64(x), generate) if isinstance(x, nt.Float) else None

    @extending.intrinsic
    def is_double(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return ir.IntType(1)(signature.args[0] == nt.float64)

        return (nt.boolean(x), generate) if isinstance(x, nt.Float) else None

    def bitcast(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.bitcast(given[0], kind)

    @extending.intrinsic
    def bits(context: Any, x: Any) -> Any:
        return (Word(x.bitwidth)(x), bitcast) if isinstance(x, nt.Float) else None

    @extending.intrinsic
    def real(context: Any, w: Any) -> Any:
        if not isinstance(w, Word):
            return None
        return (nt.float32 if w.width == 32 else nt.float64)(w), bitcast

    return {"wide": wide, "is_double": is_double, "bits": bits, "real": real}


def define(extending: Any, operation: Any, instruction: str) -> None:
    """Say what an operator does with two words, or with a word and a constant, which is
    an integer of Numba's."""
    compares = instruction in COMPARISONS

    @extending.type_callable(operation)
    def typed(context: Any) -> Any:
        def result(a: Any, b: Any) -> Any:
            words = {kind for kind in (a, b) if isinstance(kind, Word)}
            others = {a, b} - words
            if len(words) != 1 or not all(isinstance(k, nt.Integer) for k in others):
                return None
            return nt.boolean if compares else words.pop()

        return result

    def lowered(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        (kind, *_) = (kind for kind in signature.args if isinstance(kind, Word))
        a, b = (resized(builder, value, kind.width) for value in given)
        if compares:
            return builder.icmp_unsigned(COMPARISONS[instruction], a, b)
        return getattr(builder, instruction)(a, b)

    for kinds in ((Word, Word), (Word, nt.Integer), (nt.Integer, Word)):
        extending.lower_builtin(operation, *kinds)(lowered)


def resized(builder: Any, value: Any, width: int) -> Any:
    """Return an integer that is not negative with another number of bits."""
    change = builder.trunc if value.type.width > width else builder.zext
    same = value.type.width == width
    return value if same else change(value, ir.IntType(width))


def enter_arithmetic(builder: Any, machine: str = MACHINE) -> Any:
    """Set this thread's modes as csrc/arithmetic.h does; the word to leave with."""
    if machine in ("x86_64", "amd64"):
        place = cgutils.alloca_once(builder, HALF)
        _call(builder, "llvm.x86.sse.stmxcsr", builder.bitcast(place, BYTES))
        before = builder.load(place)
        others = builder.and_(before, ir.Constant(HALF, 0xFFFF003F))
        builder.store(builder.or_(others, ir.Constant(HALF, 0x1F80)), place)
        _call(builder, "llvm.x86.sse.ldmxcsr", builder.bitcast(place, BYTES))
        return builder.zext(before, WORD)
    if machine in ("aarch64", "arm64"):
        before = _call(builder, "llvm.aarch64.get.fpcr", result=WORD)
        _call(builder, "llvm.aarch64.set.fpcr", ir.Constant(WORD, 0))
        return before
    return ir.Constant(WORD, 0)


def leave_arithmetic(builder: Any, word: Any, machine: str = MACHINE) -> None:
    """Set the modes to what they were before."""
    if machine in ("x86_64", "amd64"):
        place = cgutils.alloca_once(builder, HALF)
        builder.store(builder.trunc(word, HALF), place)
        _call(builder, "llvm.x86.sse.ldmxcsr", builder.bitcast(place, BYTES))
    elif machine in ("aarch64", "arm64"):
        _call(builder, "llvm.aarch64.set.fpcr", word)


def _call(builder: Any, name: str, *arguments: Any, result: Any = NOTHING) -> Any:
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def check_native(text: str) -> None:
    """Check that compiled code calls nothing of Python's, and raises nothing. Steps run
    without the GIL; an error while such a call holds it leaves it held, and all threads
    wait for it. The C function that Numba makes itself takes it once, to print an error
    that it cannot raise."""
    if len(re.findall(r"call [^\n]*@\"?\w*gil_ensure", text, re.I)) > 1:
        raise TypingError(
            "it calls functions of Python, such as print, in the compiled code, or in "
            "a helper that Numba compiles; leave them out"
        )
    if "@.const.pickle" in text:  # what is raised is stored so
        raise TypingError(
            "it may raise an exception, in the compiled code or in a helper that Numba "
            "compiles, which would be printed but not end the step; leave it out"
        )
