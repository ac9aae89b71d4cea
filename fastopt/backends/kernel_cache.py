"""Compiled kernels, kept on disk for the next process.

Numba's own cache keys by file and line: it misses edits in helpers, flags and closures,
unpickles whatever lies in a possibly shared directory, and fails on a truncated file
(numba#10434). Here an entry is plain object code under a key that covers all that it
was made from, with a checksum, in a directory that only its owner can write. Whatever
goes wrong costs a warning and a compilation, never a step.

An entry may be anything by the time that it is read: a link, a pipe that nobody writes
to, a terabyte. So it is opened once, without following links or waiting, and what is
open is looked at. (Access control lists are not.)
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import stat
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastopt.language import PRIMITIVES, Constant, Function

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # on Windows
    fcntl = None

_MAGIC = b"fastopt kernel 1\n"
MOST = 64 << 20  # bytes of an entry; ours have some thousands
# What an entry is called while it is written.
TEMPORARY = re.compile(r"[0-9a-f]{64}\.\w{8}\.tmp")
# Open no link to something else, wait for nobody at the other end of a pipe.
SAFELY = sum(
    getattr(os, flag, 0)
    for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY")
)


class Kernel(NamedTuple):
    """Machine code: a relocatable object or a cubin, the function to call in it, and
    what it must be linked to.

    Not a pickle of Numba's: linked by itself, its symbols cannot clash with those of
    another process's kernels, which Numba names by counters and memory addresses.
    """

    entry: str
    imports: tuple[str, ...]
    object: bytes


class Unhashable(Exception):
    """Something a function depends on has no fingerprint, so it is not cached."""


def fingerprint(function: Function) -> str:
    """Return a text of all that determines what ``function`` computes.

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
    elif value is None or isinstance(value, (bool, int, float, str, Constant)):
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
    """Return the globals and closure variables that the function's code names."""
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
    """Return the entries' folder, or None if there is no place that only we can
    write."""
    with _folder() as folder:
        return folder and folder[0]


@contextlib.contextmanager
def _folder() -> Iterator[tuple[Path, int | None] | None]:
    """Return the entries' folder, and its descriptor where the system can open files
    relative to one. Warn and return None if others could write there."""
    chosen, handle = os.environ.get("FASTOPT_CACHE_DIR"), None
    if chosen == "":
        yield None
        return
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(chosen or Path(home, "fastopt")).expanduser()
        path = Path(os.path.realpath(path))
        _make(path)
        if os.open in os.supports_dir_fd:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | SAFELY)
        reason = _distrust(path, os.stat(path if handle is None else handle))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = f"cannot be used: {error}"
    try:
        if reason:
            warn(f"the kernel cache {reason}")
        yield None if reason else (path, handle)
    finally:
        if handle is not None:
            os.close(handle)


def _make(path: Path) -> None:
    """Make a folder where there is none, for us alone. From the root on, only we and
    root may be able to put something else in the place of a folder on the way to it: so
    it stays what it is while we look at the next one."""
    for parent in reversed(path.parents):
        if not parent.exists():
            with contextlib.suppress(FileExistsError):  # now, by another process
                parent.mkdir(mode=0o700)
        status = os.lstat(parent)
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(f"{parent} is not a folder")
        reason = _distrust(parent, status, parent=True)
        if reason:
            raise PermissionError(f"its parent {reason}")
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)


def _distrust(
    path: Path, status: os.stat_result, of_root: bool = False, parent: bool = False
) -> str | None:
    """Who else could write there, and so make us run code; None if nobody could. It may
    be root's, who can do everything anyway, if so said, as a ``parent`` always may."""
    if not hasattr(os, "getuid"):
        return None
    owners = (os.getuid(), 0) if of_root or parent else (os.getuid(),)
    if status.st_uid not in owners:
        return f"{path} belongs to user {status.st_uid}, not to us"
    others = stat.S_IWGRP | stat.S_IWOTH
    if parent and status.st_mode & stat.S_ISVTX:
        others = 0  # in a sticky folder, as /tmp, owners alone move what is theirs
    elif parent and _is_ours(status.st_gid):
        others = stat.S_IWOTH
    if status.st_mode & others:
        return f"{path} is writable by others: chmod go-w {path}"
    return None


def _is_ours(gid: int) -> bool:
    """Whether a group is the one that many systems make for each user, and has no other
    member."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return gid != 0 and group.gr_name == user.pw_name and not group.gr_mem


def _read(path: Path, handle: int | None, key: str) -> bytes:
    """Return the bytes of an entry. The file is opened once and examined when it is
    open, so that it cannot be replaced in between."""
    if handle is None:
        entry = os.open(path / key, os.O_RDONLY | SAFELY)
    else:
        entry = os.open(key, os.O_RDONLY | SAFELY, dir_fd=handle)
    try:
        status = os.fstat(entry)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        reason = _distrust(path / key, status, of_root=True)
        if reason:
            raise ValueError(reason)
        if status.st_size > MOST:
            raise ValueError(f"it is damaged: it has {status.st_size} bytes")
        with open(entry, "rb", closefd=False) as file:
            return file.read(MOST + 1)
    finally:
        os.close(entry)


def load(key: str) -> Kernel | None:
    """Return the kernel under this key, or None."""
    with _folder() as folder:
        if folder is None:
            return None
        path, handle = folder
        try:
            data = _read(path, handle, key)
            payload = data[len(_MAGIC) + 32 :]
            if data != _sealed(key, payload):
                raise ValueError("it is damaged")
            header, _, code = payload.partition(b"\n")
            entry, imports = json.loads(header)
            if not (type(imports) is list and {*map(type, [entry, *imports])} <= {str}):
                raise ValueError("it is damaged: its header is not one of names")
            return Kernel(entry, tuple(imports), code)
        except FileNotFoundError:
            return None
        # RecursionError: a header of many brackets
        except (OSError, ValueError, TypeError, RecursionError) as error:
            warn(f"ignoring the cached kernel {path / key}: {error}")
            return None


def save(key: str, kernel: Kernel) -> None:
    """Store a kernel; readers see the whole entry or none."""
    header = json.dumps([kernel.entry, kernel.imports]).encode()
    data = _sealed(key, header + b"\n" + kernel.object)
    with _folder() as folder:
        if folder is None:
            return
        path, _ = folder
        try:
            _clean(path)
            while not _write(path, key, data):
                pass
        except OSError as error:
            warn(f"cannot write to the kernel cache {path}: {error}")


def _write(path: Path, key: str, data: bytes) -> bool:
    """Write an entry under a name for the time being, then rename it. False if another
    process took that file for one that was left."""
    handle, temporary = tempfile.mkstemp(".tmp", f"{key}.", path)
    try:
        with open(handle, "wb") as file:
            _lock(handle, wait=True)
            if not os.path.exists(temporary):
                return False
            file.write(data)
            file.flush()
            if fcntl is not None:  # while it is locked
                os.replace(temporary, path / key)
        if fcntl is None:  # Windows does not rename what is open
            os.replace(temporary, path / key)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return True


def _clean(path: Path) -> None:
    """Remove what processes that were killed left: files that none of them locks."""
    for name in os.listdir(path):
        if TEMPORARY.fullmatch(name):
            with contextlib.suppress(OSError):  # it is in use, or somebody removed it
                if fcntl is None:
                    os.unlink(path / name)
                    continue
                handle = os.open(path / name, os.O_RDWR | SAFELY)
                try:
                    if _lock(handle):
                        os.unlink(path / name)
                finally:
                    os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool:
    """Take the lock of an open file until it is closed; whether we have it."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another has it, or there are no locks here
        return False
    return True


def _sealed(key: str, payload: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key.encode() + payload).digest() + payload
