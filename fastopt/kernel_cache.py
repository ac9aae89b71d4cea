"""Compiled kernels: linked into the process, and kept on disk for the next one.

Numba's own cache keys by file and line: it misses edits in helpers, flags and closures,
unpickles whatever lies in a possibly shared directory, and fails on a truncated file
(numba#10434). Here an entry is plain object code under a key that covers all that it
was made from, with a checksum, in a directory that only its owner can write. Whatever
goes wrong costs a warning and a compilation, never a step.
"""

# mypy: disable-error-code="attr-defined, import-untyped"

from __future__ import annotations

import builtins
import functools
import hashlib
import itertools
import json
import os
import stat
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy as np
from llvmlite import binding as llvm
from numba import config
from numba.core.registry import cpu_target

from fastopt.rule import PRIMITIVES, Function

_MAGIC = b"fastopt kernel 1\n"


class Kernel(NamedTuple):
    """A relocatable object, the function to call in it, and what it must be linked to.

    Not a pickle of Numba's: linked by itself, its symbols cannot clash with those of
    another process's kernels, which Numba names by counters and memory addresses.
    """

    entry: str
    imports: tuple[str, ...]
    object: bytes


class Unhashable(Exception):
    """Something a function depends on has no fingerprint, so it is not cached."""


def fingerprint(function: Function) -> str:
    """A text of all that determines what ``function`` computes.

    That is its bytecode and constants and, recursively, the functions and constants it
    reaches by name; line numbers and file names are left out.
    """
    return "\n".join(_parts(function, set()))


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    value = getattr(value, "py_func", value)  # a helper that the user has jitted
    if isinstance(value, types.FunctionType):
        if any(value is primitive for primitive in PRIMITIVES):
            yield f"primitive {value.__name__}"
        elif id(value) not in seen:
            seen.add(id(value))
            yield from _code(value.__code__)
            yield from _parts(value.__defaults__, seen)
            for name, used in sorted(_reached(value).items()):
                yield f"{name}:"
                yield repr(getattr(used, "targetoptions", None))
                yield from _parts(used, seen)
    elif isinstance(value, tuple):
        for item in value:
            yield from _parts(item, seen)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield repr(value)
    elif isinstance(value, np.generic):
        yield f"{value.dtype} {value.tobytes().hex()}"
    elif isinstance(value, types.ModuleType) and value.__name__ in ("math", "numpy"):
        yield value.__name__  # the versions of Python and NumPy are part of every key
    else:
        raise Unhashable(f"{type(value).__name__} {value!r}")


def _code(code: types.CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_argcount, code.co_flags, code.co_names, code.co_varnames))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield repr(constant)


def _reached(function: types.FunctionType) -> dict[str, Any]:
    """The globals and closure variables that the function's code names."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    found = {n: c.cell_contents for n, c in zip(names, cells, strict=True)}
    for name in function.__code__.co_names:
        if name in function.__globals__:
            found[name] = function.__globals__[name]
        elif not hasattr(builtins, name):
            found[name] = None  # an attribute; what it is an attribute of is covered
    return found


@functools.cache
def warn(message: str) -> None:
    warnings.warn(
        f"{message}; kernels are compiled anew in each process "
        "(FASTOPT_CACHE_DIR names another directory, an empty one switches this off)",
        RuntimeWarning,
        stacklevel=2,
    )


def directory() -> Path | None:
    """Where the entries lie, or None if there is no place that only we can write."""
    chosen = os.environ.get("FASTOPT_CACHE_DIR")
    if chosen == "":
        return None
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(chosen or Path(home, "fastopt")).expanduser()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        warn(f"the kernel cache cannot be used: {error}")
        return None
    # Whoever can write there can make us run code.
    if hasattr(os, "getuid"):
        if status.st_uid != os.getuid():
            warn(f"the kernel cache {path} belongs to user {status.st_uid}, not to us")
            return None
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            warn(f"the kernel cache {path} is writable by others: chmod go-w {path}")
            return None
    return path


def load(key: str) -> Kernel | None:
    """The kernel under this key, or None."""
    path = directory()
    if path is None:
        return None
    try:
        data = (path / key).read_bytes()
        payload = data[len(_MAGIC) + 32 :]
        if data != _sealed(key, payload):
            raise ValueError("it is damaged")
        header, _, code = payload.partition(b"\n")
        entry, imports = json.loads(header)
        return Kernel(entry, tuple(imports), code)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        warn(f"ignoring the cached kernel {path / key}: {error}")
        return None


def save(key: str, kernel: Kernel) -> None:
    """Store a kernel; readers see the whole entry or none."""
    path = directory()
    if path is None:
        return
    header = json.dumps([kernel.entry, kernel.imports]).encode()
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path)
        with os.fdopen(handle, "wb") as file:
            file.write(_sealed(key, header + b"\n" + kernel.object))
        os.replace(temporary, path / key)
    except OSError as error:
        warn(f"cannot write to the kernel cache {path}: {error}")
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def _sealed(key: str, payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key.encode() + payload).digest() + payload


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
    return llvm.create_lljit_compiler(target_machine(), suppress_errors=True)


serial_numbers = itertools.count()
linked: list[Any] = []  # a library is unloaded when this forgets it


def address_of(name: str) -> int:
    """The address of a function or variable of Python's or Numba's."""
    if not llvm.address_of_symbol(name):
        cpu_target.target_context.refresh()  # Numba names its runtime when it compiles
    address: int | None = llvm.address_of_symbol(name)
    if not address:
        raise LookupError(f"there is no function {name}")
    return address


def link(kernel: Kernel) -> int:
    """The address of a kernel's entry."""
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
    """What machine code depends on besides the functions it is made from."""
    settings = "OPT LOOP_VECTORIZE SLP_VECTORIZE BOUNDSCHECK DEBUGINFO_DEFAULT"
    return (
        (sys.version, np.__version__, numba.__version__, llvmlite.__version__),
        (target_machine().triple, cpu()),
        [getattr(config, name, None) for name in (*settings.split(), "ENABLE_AVX")],
    )


def obtain(identity: Callable[[], Any], make: Callable[[], Kernel]) -> int:
    """The address of the kernel that ``make`` makes, or of its copy on the disk.

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
