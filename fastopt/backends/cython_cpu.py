"""The compiled backend: ahead-of-time kernels, one extension per instruction set, and a
driver that calls them.

Which extension serves is decided once, by the CPU, when the first optimizer is made;
``FASTOPT_ISA=baseline | avx2 | avx512`` overrides; on x86-64, ``sse2`` is the baseline.
Only fastopt's own rules have such kernels; a user's rule goes to Numba.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastopt.backends.numpy_ref import Step
from fastopt.language import Function
from fastopt.memory.arena import state_arena
from fastopt.memory.arrays import as_array
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Array, Encoded, Product, Segment, Stream
from fastopt.portable import portable
from fastopt.rule import Rule
from fastopt.rules import CLASS_RULES, RULES
from fastopt.rules.floor import FLOORS
from fastopt.rules.muon import direction
from fastopt.rules.passes import PASSES
from fastopt.runtime import openmp

__all__ = ["as_array", "bind", "formats", "gram", "missing", "scalars", "state_arena"]

formats = frozenset(FORMATS)

HOW_TO_GET = (
    "install a C compiler (on Debian: apt-get install gcc python3-dev) and reinstall: "
    "pip install --force-reinstall --no-deps . in its folder"
)
HIDDEN = (
    "this Python was started in the source folder, which hides the installed package; "
    "start it elsewhere, or install with pip install -e ."
)


def compiled_name(function: Function) -> str:
    """Return setup.py's name for a function of ours, made of its file's and its own."""
    return f"{function.__module__.rpartition('.')[2]}_{function.__name__}"


# Looked up by the function itself, so a user's of the same name never meets ours.
PUBLIC = (*RULES, *CLASS_RULES, direction, *FLOORS, *PASSES)
OURS = [rule for public in PUBLIC for rule in public.all]
KERNELS = {rule.update: compiled_name(rule.update) for rule in OURS}
MEASURES = {r.measure: compiled_name(r.measure) for r in OURS if r.measure is not None}
SCALARS = {
    function: compiled_name(function)
    for rule in OURS
    for function in (rule.scalars, rule.settle)
    if function is not None
}


@functools.cache
def driver() -> ModuleType:
    """Return the compiled driver. Raise ImportError if it was not built."""
    return openmp.extension("_driver")


@functools.cache
def extension(isa: str) -> Any:
    """Return one instruction set's kernels. Raise ImportError if they were not
    built."""
    return driver().Kernels(openmp.extension(f"_kernels_{isa}").TABLE)


@functools.cache
def kernels() -> Any:
    """Return the kernels for this CPU, or for what ``FASTOPT_ISA`` says."""
    supported: list[str] = driver().cpu_supports()
    asked = os.environ.get("FASTOPT_ISA")
    if asked:
        names = {name: name for name in supported}
        if platform.machine().lower() in ("x86_64", "amd64"):
            names["sse2"] = "baseline"
        wanted = asked.strip().lower().replace("-", "")
        if wanted not in names:
            raise ValueError(
                f"FASTOPT_ISA={asked!r} is not among the instruction sets of this CPU "
                f"that fastopt has kernels for: {', '.join(names)}"
            )
        return extension(names[wanted])
    for isa in supported:
        with contextlib.suppress(ImportError):  # a compiler may lack a set's flags
            return extension(isa)
    return extension("baseline")


@functools.cache
def compiled(function: Function) -> Any:
    """Return the compiled form of a rule's ``scalars`` or ``settle``, or the function
    itself if it is not fastopt's own."""
    name = SCALARS.get(function)
    return driver().Scalars(function, name) if name else portable(function)


def scalars(rule: Rule) -> Any:
    """Return a rule's compiled scalars, with the bits and errors of the Python
    function."""
    return compiled(rule.scalars)


def missing() -> str | None:
    """Why this backend cannot be used and how to get it, or None."""
    try:
        kernels()
    except openmp.MissingRuntime as error:
        return str(error)
    except ImportError as error:
        in_sources = (Path(__file__).parents[2] / "setup.py").exists()
        return (
            f"the compiled kernels are not installed ({error}); "
            f"{HIDDEN + '; or ' if in_sources else ''}{HOW_TO_GET}"
        )
    return None


def bind(rule: Rule, segments: Sequence[Segment], count: Array, carry: Array) -> Step:
    """Do what :func:`numpy_ref.bind` does. The step also checks its gradients; it does
    nothing and returns False if one of them needs a closer look. Its method
    ``at`` takes hyperparameters and computes the scalars itself; ``settled`` does a
    measured step in batches, if it fuses "settle"."""
    measure = MEASURES.get(rule.measure) if rule.measure else None
    if rule.update not in KERNELS or (rule.measure and not measure):
        raise ValueError(
            f"backend 'cython' has compiled kernels only for fastopt's own rules, not "
            f"for {rule.name!r}; use backend='numba'"
        )
    return step(
        (KERNELS[rule.update], measure, *passes(rule)), rule, segments, count, carry
    )


def passes(rule: Rule) -> tuple[str | None, str | None]:
    """Return the names of a rule's two passes, or None for both."""
    if rule.apply is None or not rule.by_segment:
        return None, None
    return compiled_name(rule.update) + "_begin", compiled_name(rule.apply)


@functools.cache
def last_cache() -> int:
    """Bytes of a CPU's last cache, or 0 where Linux does not say. (sysconf adds those
    of all CPUs up: 64 MB on an EPYC where a core reaches 8.)"""
    for level in (3, 2):
        size = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
        with contextlib.suppress(OSError):
            return int(size.read_text().strip().removesuffix("K")) * 1024
    return 0


def step(
    functions: tuple[str | int | None, ...],
    rule: Rule,
    segments: Sequence[Segment],
    count: Array,
    carry: Array,
) -> Step:
    """Return the step over these segments. Its kernels are ours, by name, or Numba's,
    by address: the update, what is measured, and the first and the last of two
    passes."""
    addresses = [
        (
            address(segment.param),
            0,
            *map(address, segment.state),
            segment.param.size,
            segment.row,
        )
        for segment in segments
    ]
    bound: Step = driver().Step(
        kernels(),
        *functions,
        scalars(rule),
        addresses=addresses,
        shapes=[segment.param.shape for segment in segments],
        averages=addresses_of([segment.average for segment in segments]),
        streams=streams_of(segments),
        copies=[
            (row, s.copy.format, address(s.copy), s.copy.parts[0].nbytes)
            for row, s in enumerate(segments)
            if s.copy is not None
        ],
        double=segments[0].param.dtype == np.float64,
        sets=carry.shape[1],
        scalar_count=rule.scalar_count,
        terms=rule.terms,
        measured=rule.measure_count,
        settle=settle_of(rule),
        settle_count=rule.settle_count,
        count_address=count.ctypes.data,
        carry_address=carry.ctypes.data,
        carried=carry.shape[2],
        last_cache=last_cache(),
        keep=(segments, count, carry),
    )
    return bound


def streams_of(segments: Sequence[Segment]) -> list[tuple[Any, ...]]:
    """Return the streams whose blocks are made: row, column, "product" or a format, the
    number of the first element, and what the blocks are made of: addresses, each with
    its number of bytes. For a product, numbers of rows and columns follow."""
    streams: list[tuple[Any, ...]] = []
    for row, segment in enumerate(segments):
        for column, stream in enumerate((segment.param, None, *segment.state)):
            if isinstance(stream, Product):
                sizes = [part.shape[1] for part in stream]
                parts = [*map(address, stream), *sizes]
                streams.append((row, column, "product", 0, [(k, 0) for k in parts]))
            elif isinstance(stream, Encoded):
                of = [(address(part), part.nbytes) for part in stream.parts]
                streams.append((row, column, stream.format, segment.first, of))
    return streams


def settle_of(rule: Rule) -> Any:
    """Return the compiled settle of a rule whose norms are those of each segment."""
    ours = rule.settle in SCALARS and rule.by_segment
    return compiled(rule.settle) if ours else None


def gram(tasks: Sequence[Sequence[Array | None]], threads: int) -> Array:
    """Do what :func:`numpy_ref.gram` does, in one pass over each segment."""
    products = np.zeros((len(tasks), len(tasks)))
    for arrays in zip(*tasks, strict=True):
        given = [(k, array) for k, array in enumerate(arrays) if array is not None]
        if given:
            here = [k for k, _ in given]
            addresses = [address(array) for _, array in given]
            size, double = given[0][1].size, given[0][1].dtype == np.float64
            found = driver().gram(kernels(), addresses, size, double, threads)
            products[np.ix_(here, here)] += found
    return products


def address(stream: Stream) -> int:
    """Return the address of an array, or of what is encoded; 0 for a product."""
    if isinstance(stream, Product):
        return 0
    array = stream.parts[0] if isinstance(stream, Encoded) else stream
    place: int = array.__array_interface__["data"][
        0
    ]  # array.ctypes takes 3 times as long
    return place


def addresses_of(averages: Sequence[Array | None]) -> list[int] | None:
    """Return the addresses of the moving averages, or None if there are none."""
    found = [average.ctypes.data for average in averages if average is not None]
    return found or None
