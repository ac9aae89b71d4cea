"""Which backend serves an optimizer. They are modules, imported on first use: Numba
alone takes longer to import than everything else together."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from fastopt.rule import Rule, shown

MODULES = {
    "numpy": "fastopt.backends.numpy_ref",
    "cython": "fastopt.backends.cython_cpu",
    "numba": "fastopt.backends.numba_cpu",
    "cuda": "fastopt.backends.cuda_driver",
}
# How to get what an install without Numba lacks. (The compiled backend needs no Numba.)
BY_NUMBA = {
    "numba": "pip install 'numba>=0.64', or pass backend='numpy', which is slow",
    "cuda": "pip install '.[cuda13]' in fastopt's folder, or '.[cuda12]' if nvidia-smi "
    "shows a CUDA version of 12",
}


def find(name: str) -> tuple[ModuleType | None, str | None]:
    """Return a backend's module, and why it cannot be used and how to get it, or
    None."""
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:  # OSError: a library of LLVM's is missing
        if name not in BY_NUMBA:
            raise
        return None, f"Numba cannot be imported ({error}); {BY_NUMBA[name]}"
    return module, module.missing()


def load(name: str) -> ModuleType:
    """Return a backend's module. An error says how to install it."""
    if name not in list(MODULES):  # a list, because name may be unhashable
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, MODULES))}, got {shown(name)}"
        )
    module, reason = find(name)
    if module is None or reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return module


def choose(rule: Rule, on_device: bool) -> str:
    """Return the default backend: the device's for device arrays, else the compiled
    kernels for our own rules and Numba for a user's."""
    if on_device:
        return "cuda"
    from fastopt.backends import cython_cpu

    if rule.update not in cython_cpu.KERNELS:
        return "numba"
    reason = cython_cpu.missing()
    if reason is None:
        return "cython"
    warnings.warn(
        f"using backend 'numba', which compiles on first use, because {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
    return "numba"
