"""Compiled kernels of the CPU: linked into the process, or taken from the cache."""

# mypy: disable-error-code="attr-defined, import-untyped"

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import binding as llvm
from numba import config
from numba.core.registry import cpu_target

from fastopt.backends.kernel_cache import Kernel, Unhashable, load, save, warn


def cpu() -> tuple[str, str]:
    """Name and features, unless Numba was told others."""
    features = llvm.get_host_cpu_features().flatten()
    return config.CPU_NAME or llvm.get_host_cpu_name(), config.CPU_FEATURES or features


@functools.cache
def target_machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = cpu()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, jit=True, codemodel="jitdefault"
    )


@functools.cache
def linker() -> Any:
    # LLVM's older linker puts the sections of an object anywhere in memory. If they are
    # 4 GiB apart, it ends the process on 64-bit ARM, whose instructions reach no
    # further. The newer one does not support ARM on Windows.
    triple = target_machine().triple
    newer = triple.startswith(("aarch64", "arm64")) and "windows" not in triple
    return llvm.create_lljit_compiler(
        target_machine(), use_jit_link=newer, suppress_errors=True
    )


serial_numbers = itertools.count()
linked: list[Any] = []  # a library is unloaded when this forgets it


def address_of(name: str) -> int:
    """Return the address of a function or variable of Python's or Numba's."""
    if not llvm.address_of_symbol(name):
        cpu_target.target_context.refresh()  # Numba names its runtime when it compiles
    address: int | None = llvm.address_of_symbol(name)
    if not address:
        raise LookupError(f"there is no function {name}")
    return address


def link(kernel: Kernel) -> int:
    """Link a kernel, and return the address of its function."""
    library = llvm.JITLibraryBuilder().add_object_img(kernel.object)
    library.add_current_process()  # for memset and the like, which LLVM puts in
    library.export_symbol(kernel.entry)
    for name in kernel.imports:
        library.import_symbol(name, address_of(name))
    linked.append(library.link(linker(), f"fastopt{next(serial_numbers)}"))
    address: int = linked[-1][kernel.entry]
    return address


@functools.cache
def environment() -> tuple[Any, ...]:
    """Return what machine code depends on besides the functions it is made from."""
    settings = "OPT LOOP_VECTORIZE SLP_VECTORIZE BOUNDSCHECK DEBUGINFO_DEFAULT"
    return (
        (sys.version, np.__version__, numba.__version__, llvmlite.__version__),
        (target_machine().triple, cpu()),
        [getattr(config, name, None) for name in (*settings.split(), "ENABLE_AVX")],
    )


def obtain(identity: Callable[[], Any], make: Callable[[], Kernel]) -> int:
    """Return the address of the kernel that ``make`` returns, or of its copy on the
    disk.

    ``identity`` returns what is particular to it.
    """
    try:
        text = repr((identity(), environment()))
    except (OSError, Unhashable):
        return link(make())
    key = hashlib.sha256(text.encode()).hexdigest()
    kernel = load(key)
    if kernel:
        try:
            return link(kernel)
        except (LookupError, RuntimeError) as error:
            warn(f"the kernel {key} on disk cannot be linked: {error}")
    kernel = make()
    save(key, kernel)
    return link(kernel)
