"""Powers and logarithms in CUDA kernels, with the bits that the host computes.

Each function of `integer_powers` is compiled apart, so that a kernel with several
powers has the code once. numba-cuda cannot compile the functions of a kernel without a
GPU, but it can compile what an intrinsic is made of.
"""

# mypy: disable-error-code="no-untyped-call,import-untyped,untyped-decorator"

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir

from fastopt import portable
from fastopt.backends.cuda_accesses import SIMULATED, types, unfused
from fastopt.backends.integer_powers import TABLE, WORKSPACE, build
from fastopt.language import Function

try:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic
except ImportError:  # cuda_accesses says so
    pass

INTEGER = ir.IntType(64)


@functools.cache
def elementary_functions() -> dict[str, Any]:
    """Return ``power`` and ``log`` for kernels. They compute with float64, and take
    integers, too. Where Python raises an error or returns a complex number, they return
    what IEEE 754 says: an infinity, or NaN."""
    if SIMULATED:
        return {"power": simulated_power, "log": simulated_log}
    functions = build(called, intrinsics())
    return {name: functions[name] for name in ("power", "log")}


def simulated_power(x: Any, y: Any) -> Any:
    return np.float64(portable.power(float(x), float(y)))


def simulated_log(x: Any) -> Any:
    return np.float64(portable.log(float(x)))


def called(function: Function, signature: str, apart: bool) -> Any:
    """Return what calls a function of integers in a kernel."""
    word, number, flag = types.uint64, types.int64, types.boolean
    kinds = {"word": word, "number": number, "flag": flag, "void": types.void}
    kinds |= {"space": types.CPointer(word), "real": types.float64}
    kinds |= {"pair": types.UniTuple(word, 2), "parts": types.Tuple([word, number])}
    kinds |= {"decided": types.Tuple([flag, word])}
    kinds |= {"logarithm": types.Tuple([flag, number, word, word])}
    of_type = eval(signature, kinds)

    def generate(context: Any, builder: Any, _: Any, given: Any) -> Any:
        compiled = context.compile_subroutine(builder, function, of_type)
        name = compiled.fndesc.llvm_func_name
        for module in compiled.library.modules:
            own = module.globals.get(name)
            if apart and own is not None and not own.is_declaration:
                own.attributes.add("noinline")
        return context.call_internal(builder, compiled.fndesc, of_type, given)

    # An intrinsic must name its arguments.
    names = ", ".join(function.__code__.co_varnames[: len(of_type.args)])
    made: dict[str, Any] = {"result": (of_type, generate)}
    exec(f"def {function.__name__}(context, {names}): return result", made)
    return intrinsic(made[function.__name__])


def intrinsics() -> dict[str, Any]:
    """Return what the functions of integers find in a kernel."""
    word = types.uint64

    def bitcast(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.bitcast(given[0], kind)

    def bits(context: Any, x: Any) -> Any:
        return word(types.float64), bitcast

    def real(context: Any, word_: Any) -> Any:
        return types.float64(word), bitcast

    def high(context: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = ir.FunctionType(INTEGER, [INTEGER, INTEGER])
            name = "llvm.nvvm.mulhi.ull"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            return builder.call(function, given)

        return word(word, word), generate

    def entry(context: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            name = "fastopt_powers"
            table = builder.module.globals.get(name)
            if table is None:
                kind = ir.ArrayType(INTEGER, len(TABLE))
                # In global memory. All functions that read it share one.
                table = cgutils.add_global_variable(builder.module, kind, name, 1)
                table.linkage = "linkonce_odr"
                table.global_constant = True
                table.initializer = kind([*map(int, TABLE)])
            at = builder.gep(table, [ir.IntType(32)(0), given[0]], inbounds=True)
            return builder.load(at)

        return word(types.int64), generate

    def workspace(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            space = cgutils.alloca_once(builder, ir.ArrayType(INTEGER, WORKSPACE))
            return builder.bitcast(space, INTEGER.as_pointer())

        return types.CPointer(word)(), generate

    return {f.__name__: intrinsic(f) for f in (bits, real, high, entry, workspace)}


@functools.cache
def reals() -> Any:
    """Return a function that makes a tuple of float64 of a tuple of numbers. Nothing is
    fused in a kernel that calls it."""

    def reals(context: Any, numbers: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            unfused(context)
            values = [
                context.cast(builder, value, kind, types.float64)
                for value, kind in zip(
                    cgutils.unpack_tuple(builder, given[0]), numbers, strict=True
                )
            ]
            return context.make_tuple(builder, signature.return_type, values)

        if not isinstance(numbers, types.BaseTuple):
            return None
        return types.UniTuple(types.float64, len(numbers))(numbers), generate

    return simulated_reals if SIMULATED else intrinsic(reals)


def simulated_reals(numbers: Any) -> tuple[Any, ...]:
    return tuple(map(np.float64, numbers))
