"""fastopt for native code: C, C++, Cython and whatever calls C. See docs/native.md.

The functions are those of the compiled backend, for the instruction set that it takes;
``include/fastopt.h`` declares them. Steps have the bits of ``Optimizer.step``.

>>> import fastopt
>>> flags = f"-I{fastopt.native.get_include()}"
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt.memory.order import GROUP
from fastopt.memory.segments import Array
from fastopt.optimizer.refusals import check_rule
from fastopt.rule import Rule, limits
from fastopt.runtime.threads import available, forked

__all__ = ["get_include", "hyperparameters"]


def get_include() -> str:
    """The folder of ``fastopt.h``, for a compiler's ``-I``.

    >>> import fastopt, os
    >>> os.listdir(fastopt.get_include())
    ['fastopt.h']
    """
    return str(Path(__file__).parent / "include")


class Entry(NamedTuple):
    """What the table has of a rule: names, and the compiled functions by theirs."""

    name: str
    state: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    carry: tuple[str, ...]
    by_segment: bool
    starts: list[str | float]  # of the state and then the carry
    limits: Mapping[str, tuple[float, float]]
    off: frozenset[str]  # the options that select another variant
    update: str
    scalars: str
    scalar_count: int
    measure: str | None
    measure_count: int
    terms: int
    settle: str | None
    settle_count: int
    begin: str | None  # the first and the last of two passes
    finish: str | None


class Stored(NamedTuple):
    """A format of streams in the table of functions."""

    name: str  # the name of its codecs
    # The format in which a state buffer gets its first values, which are not drawn at
    # random; None: kernels read such streams in memory.
    start: str | None
    # For each part the bytes of a word, and the number of elements that share it.
    parts: tuple[tuple[int, int], ...]


ALL = 1 << 62  # elements that share a counter

# The formats of ``fastopt.h``, in the order of their numbers there.
FORMATS = (
    Stored("fp32", None, ((4, 1),)),
    Stored("fp64", None, ((8, 1),)),
    Stored("bf16", "bf16", ((2, 1),)),
    Stored("bf16_sr", "bf16", ((2, 1),)),
    Stored("fp16", "fp16", ((2, 1),)),
    Stored("r8", "r8_nearest", ((2, 1), (1, 1))),
    Stored("r16", "r16", ((2, 1), (2, 1))),
    Stored("m8", "m8", ((1, 1), (4, GROUP), (8, ALL))),
    Stored("v8", "v8", ((1, 1), (4, GROUP), (8, ALL))),
)


def entries() -> Iterator[Entry]:
    """Yield every rule and every variant: ``sgd``, ``sgd+momentum``."""
    from fastopt.rules import RULES

    for rule in RULES:
        for on in ((), *rule.variants):
            variant = rule.variant(set(on))
            yield entry(called(rule, on), variant, rule.switches - set(on))
        if rule.estimate is not None:
            yield entry(f"{rule.name}.estimate", rule.estimate[1], frozenset())


def called(rule: Rule, on: Collection[str]) -> str:
    """Return the name in the table of a rule with these options on."""
    names = next((n for n in rule.variants if set(n) == set(on)), ())
    return "+".join([rule.name, *names])


def entry(name: str, rule: Rule, off: frozenset[str]) -> Entry:
    from fastopt.backends.cython_cpu import KERNELS, MEASURES, SCALARS, passes

    begin, finish = passes(rule)
    return Entry(
        name=name,
        state=rule.state,
        hyperparameters=rule.hyperparameters,
        carry=tuple(rule.carry),
        by_segment=rule.by_segment,
        starts=[*(rule.starts.get(s, 0.0) for s in rule.state), *rule.carry.values()],
        limits={key: limits(key) for key in rule.hyperparameters},
        off=off,
        update=KERNELS[rule.update],
        scalars=SCALARS[rule.scalars],
        scalar_count=rule.scalar_count,
        measure=None if rule.measure is None else MEASURES[rule.measure],
        measure_count=rule.measure_count,
        terms=rule.terms,
        settle=None if rule.settle is None else SCALARS[rule.settle],
        settle_count=rule.settle_count,
        begin=begin,
        finish=finish,
    )


_making: Any = threading.RLock()
if hasattr(os, "register_at_fork"):  # in a child, nobody would release it
    os.register_at_fork(after_in_child=lambda: _making._at_fork_reinit())


def table() -> Any:
    """Return the capsule with the table. RuntimeError says how to get kernels."""
    # It is made once in a process, because rules are compared by their addresses in it;
    # ``functools.cache`` alone lets two threads make what neither has found.
    with _making:
        return _table()


@functools.cache
def _table() -> Any:
    from fastopt import backends

    backends.load("cython")
    from fastopt.backends import cython_cpu

    return cython_cpu.driver().native_table(
        cython_cpu.kernels(),
        list(entries()),
        FORMATS,
        available(),
        forked[0],
        cython_cpu.last_cache(),
    )


def __getattr__(name: str) -> Any:
    # Only now, so that `import fastopt` loads no kernels.
    if name == "_api":
        return table()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def hyperparameters(rule: Rule, **changes: Any) -> Array:
    """Return a rule's hyperparameters in the order in which native code takes them.

    Parameters
    ----------
    rule
        Such as ``fastopt.adamw``.
    **changes
        Values that are not the defaults.

    Returns
    -------
    array of float64

    Raises
    ------
    TypeError, ValueError
        For hyperparameters that the rule has not, or values out of their range.

    Examples
    --------
    >>> import fastopt
    >>> fastopt.native.hyperparameters(fastopt.adamw, lr=0.5).tolist()
    [0.5, 0.9, 0.999, 1e-08, 0.01]
    """
    check_rule("rule", rule)
    rule.check_names(changes)
    return np.array(list(map(float, rule.checked(rule.complete(changes)).values())))


# The table, as ctypes sees it; see fastopt.h ------------------------------------------


class Stream(ctypes.Structure):
    _fields_ = [("format", ctypes.c_int64), ("parts", ctypes.c_void_p * 4)]


class Streams(ctypes.Structure):
    _fields_ = [
        ("streams", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("first", ctypes.c_int64),
    ]


class Request(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("threads", ctypes.c_int),
        ("clip_norm", ctypes.c_double),
        ("zero_grads", ctypes.c_int64),
        ("run", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class Api(ctypes.Structure):
    """Functions release the GIL. Those that nobody calls are addresses."""

    _fields_ = [
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("isa", ctypes.c_char_p),
        ("rule_count", ctypes.c_int64),
        ("rules", ctypes.c_void_p),
        ("find", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)),
        ("start", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("error", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)),
        ("step_on", ctypes.c_void_p),
        ("start_streams", ctypes.c_void_p),
        (
            "step_streams",
            ctypes.CFUNCTYPE(
                ctypes.c_int,  # what is returned: an error, or 0
                ctypes.c_void_p,  # rule
                ctypes.c_int,  # dtype
                ctypes.c_int64,  # t
                ctypes.c_void_p,  # hyperparameters
                ctypes.c_int64,  # rows
                ctypes.c_void_p,  # carry
                ctypes.c_void_p,  # segments
                ctypes.c_int64,  # count
                ctypes.c_double,  # grad_scale
                ctypes.c_void_p,  # request
            ),
        ),
    ]


@functools.cache
def functions() -> Api:
    """Return the table. RuntimeError says how to get kernels."""
    pointer: Any = ctypes.cast(ctypes.pythonapi.PyCapsule_GetPointer, ctypes.c_void_p)
    called = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    address = called(pointer.value)(table(), b"fastopt.native._api")
    return Api.from_address(address)
