"""Which kernels there are, described by what they are compiled from, and where compiled
ones come from: the cache, or Numba.

Numba is imported only if a kernel is not in the cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt.backends import cuda_calls, cuda_table, kernel_cache
from fastopt.backends import cuda_device as device
from fastopt.backends.cuda_table import Formats
from fastopt.memory.formats import Format
from fastopt.rules import passes

LIMITS = passes.clip.scalar_count
# What a compiled kernel depends on besides fastopt.
COMPILERS = "numba-cuda", "llvmlite", "nvidia-nvvm", "cuda-toolkit", "cuda-core"


class Beside(NamedTuple):
    """What a kernel does besides the update."""

    clip: bool = False  # with the scalars of passes.clip
    average: bool = False  # with a buffer more, and its weight
    zero: bool = False


NOTHING = Beside()


class Update(NamedTuple):
    """An update of all segments of a table."""

    update: Any
    states: int
    dtype: np.dtype[Any]
    kinds: tuple[Formats, ...]
    stride: int  # of the table
    beside: Beside = NOTHING
    skips: bool = False  # whether the device decides that a step is skipped

    @property
    def row(self) -> int:
        """The number of scalars in a row: those of the update, then those of ``clip``
        and of ``average``."""
        own: int = self.update.__code__.co_argcount - 1 - self.states
        return own + LIMITS * self.beside.clip + self.beside.average


class Sums(NamedTuple):
    """Sums over the chunks of all segments of a table."""

    measure: Any
    states: int
    dtype: np.dtype[Any]
    kinds: tuple[Formats, ...]
    stride: int
    terms: int
    clip: bool = False

    @property
    def row(self) -> int:
        own: int = self.measure.__code__.co_argcount - 1 - self.states
        return own + LIMITS * self.clip


class Tiles(NamedTuple):
    """Sums of squares in the tiles of matrices."""

    by_column: bool
    clip: bool
    dtype: np.dtype[Any]
    format: Format | None = None


# What decisions leave for the host and the update, 64 bits each.
CONTROL = "norm", "shrink", "skip", "skipped"


class Settle(NamedTuple):
    """The decisions of a step: whether it is done, and its rows of scalars. ``stage``
    is "factor" for the factor of the gradients alone, "scalars" for the norm and the
    scalars, or "settle" for what follows from the sums of a rule."""

    scalars: Any  # None: the host has, and hyper are the number of the step and they
    settle: Any
    stage: str
    dtype: np.dtype[Any]
    stride: int  # of the table
    hyper: int  # hyperparameters
    carry: int  # numbers that the rule carries
    results: int  # of scalars
    handed: int  # those of them that settle takes
    used: int  # scalars that the update takes
    measured: int  # scalars that measure takes
    terms: int
    over_all: bool  # whether the sums are over all segments
    clip: bool
    average: bool
    norm: bool = False  # whether a norm is asked for
    skips: bool = False  # whether the step is skipped where the norm is not finite
    found: bool = False  # whether there is a flag of a gradient scaler's
    scale: bool = False  # whether the gradients' scale is on the device
    shared: bool = False  # whether all rows have the same numbers before settle
    counts: bool = False  # whether each segment has its own count of steps
    lr_column: int = -1  # of the hyperparameter that is on the device, or -1
    lr_kind: str = ""  # its dtype


@functools.cache
def source() -> str:
    """Return a hash of all files that decide what a kernel is compiled to."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("cuda_*.py")), here / "llvm_ir.py"]
    files += [here.parent / "language.py", here.parent / "rules" / "passes.py"]
    files += [here.parent / "memory" / name for name in ("formats.py", "order.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def compilers() -> Mapping[str, str]:
    """Return the versions of what compiles kernels."""
    versions = {}
    for name in COMPILERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def described(value: Any) -> Any:
    """Return what a job consists of, as a text that is the same in every process."""
    if callable(value) and not isinstance(value, tuple):
        return kernel_cache.fingerprint(value)
    if isinstance(value, (Format, cuda_table.Factored)):
        return value.name
    if isinstance(value, tuple):
        return [type(value).__name__, *map(described, value)]
    return str(value)


@functools.cache
def loaded(job: Any, number: int) -> Any:
    """Return the kernel of a job on the device of this number."""
    if device.SIMULATED:
        from fastopt.backends import cuda_kernels

        function, _ = cuda_kernels.kernel_of(job)
        return function
    context = device.context(number)
    kernel = obtained(job, context.capability)
    return cuda_calls.Kernel(context, kernel.object, kernel.entry)


def obtained(job: Any, capability: tuple[int, int]) -> kernel_cache.Kernel:
    """Return the compiled kernel of a job, from the cache if it is there."""
    try:
        text = repr((described(job), capability, source(), dict(compilers())))
    except kernel_cache.Unhashable:
        return compiled(job, capability)
    key = hashlib.sha256(text.encode()).hexdigest()
    kernel = kernel_cache.load(key)
    if kernel is None:
        kernel = compiled(job, capability)
        kernel_cache.save(key, kernel)
    return kernel


def compiled(job: Any, capability: tuple[int, int]) -> kernel_cache.Kernel:
    """Compile the kernel of a job to machine code. The driver is not given PTX, because
    it refuses what is newer than itself (numba-cuda#262)."""
    core: Any = importlib.import_module("cuda.core")

    from fastopt.backends import cuda_kernels

    ptx = cuda_kernels.compile_ptx(job, capability)
    arch = "sm_{}{}".format(*capability)
    program = core.Program(ptx, "ptx", core.ProgramOptions(arch=arch))
    code = program.compile("cubin").code
    return kernel_cache.Kernel(cuda_kernels.entry_of(ptx), (), bytes(code))


def is_refusal(error: Exception) -> bool:
    """Whether an error says that a function of a user's cannot be compiled."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TypeError", "NumbaError"})
