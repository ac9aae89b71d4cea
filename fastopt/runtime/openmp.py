"""fastopt's compiled modules, and the OpenMP runtime that they need.

On Linux they need GCC's, under its plain name. A wheel with a renamed copy would add a
second pool of threads beside torch's, and the two would compete for the same CPUs. The
dynamic loader takes a ``libgomp.so.1`` that is already in the process, such as torch's,
or else the system's. Where it finds none, one is loaded here by its path, and the
module is imported once more: torch's, so that torch shares it later, or else the copy
that fastopt's wheels have beside this file.

Nothing of this happens if the modules were built without OpenMP, as on macOS, or if the
runtime has another name, as on Windows.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

__all__ = ["MissingRuntime", "extension", "runtime_of"]

RUNTIME = "libgomp.so.1"
OWN = Path(__file__).with_name(RUNTIME)  # only in wheels; .ci/repair_wheel adds it
HOW_TO_GET = (
    "install it: apt-get install libgomp1 (Debian, Ubuntu), dnf install libgomp "
    "(Fedora, RHEL), apk add libgomp (Alpine), or conda install libgomp"
)


class MissingRuntime(ImportError):
    """A compiled module needs an OpenMP runtime, and there is none."""


def extension(name: str) -> ModuleType:
    """Import a compiled module of fastopt, with the OpenMP runtime that it needs.

    Parameters
    ----------
    name
        The module's name in the package, such as ``"_driver"``.

    Raises
    ------
    MissingRuntime
        There is no OpenMP runtime. The message says how to install one.
    ImportError
        The module was not built, or cannot be loaded for another reason.

    Example
    -------
    >>> extension("_driver").__name__
    'fastopt._driver'
    """
    try:
        return importlib.import_module(f"fastopt.{name}")
    except ImportError as error:
        if RUNTIME not in str(error):  # what the dynamic loader did not find
            raise
        reasons = [str(error)]
    for path in candidates():
        try:
            ctypes.CDLL(str(path))
            return importlib.import_module(f"fastopt.{name}")
        except (ImportError, OSError) as error:
            reasons.append(str(error))
    raise MissingRuntime(
        f"fastopt.{name} needs GCC's OpenMP runtime, {RUNTIME}, and no copy of it that "
        f"can be loaded is on this system, in torch or in fastopt; {HOW_TO_GET} "
        f"({'; '.join(reasons)})"
    )


def candidates() -> Iterator[Path]:
    """Yield the paths of runtimes that the dynamic loader does not know: torch's, then
    our own. torch is not imported."""
    spec = None
    with suppress(ValueError):  # a stand-in for torch that has no spec
        spec = find_spec("torch")
    folders = (spec and spec.submodule_search_locations) or ()
    paths = [Path(folder) / "lib" / RUNTIME for folder in folders]
    yield from (path for path in (*paths, OWN) if path.is_file())


class Place(ctypes.Structure):
    """Dl_info of C's dlfcn.h."""

    _fields_ = [
        ("path", ctypes.c_char_p),
        ("start", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def runtime_of(module: ModuleType) -> str | None:
    """Return the path of the OpenMP runtime that a compiled module calls, or None if it
    calls none or if the system cannot tell, as on Windows.

    Example
    -------
    >>> runtime_of(extension("_driver"))  # doctest: +SKIP
    '/lib/x86_64-linux-gnu/libgomp.so.1'
    """
    if sys.platform == "win32" or module.__file__ is None:
        return None
    library = ctypes.CDLL(module.__file__)  # it is loaded, so this adds nothing
    try:
        function = library.omp_get_max_threads
        dladdr = ctypes.CDLL(None).dladdr
    except AttributeError:
        return None
    place = Place()
    address = ctypes.cast(function, ctypes.c_void_p)
    if not dladdr(address, ctypes.byref(place)) or not place.path:
        return None
    return str(place.path.decode(errors="replace"))
