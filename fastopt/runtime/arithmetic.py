"""The arithmetic that bits are promised for, whatever a program has chosen.

A processor can be told to take numbers below the smallest normal one for zero, as
``torch.set_flush_denormal(True)`` does, or to round otherwise than to the nearest
number. Each thread has such modes of its own; Python's floats and NumPy obey them, too.
A step is computed with denormal numbers and rounding to nearest, on every thread, and
each thread gets back the modes that it had.

The compiled kernels see to that themselves (``csrc/arithmetic.h``), and so does Numba's
driver; what Python computes around them runs in a function that is ``standard``. Modes
are known of x86-64 and 64-bit ARM.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fastopt.runtime.openmp import extension

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["standard"]

# FE_DFL_ENV of glibc and musl, and more room than an environment takes.
DEFAULT, ROOM = ctypes.c_void_p(-1), 64


def standard_by_libc(function: F) -> F:
    """Do what ``standard`` does without our compiled module: by C's fenv.h, on
    Linux."""
    if sys.platform != "linux":
        return function
    c = ctypes.CDLL(None)
    if not hasattr(c, "fesetenv"):  # a Python without C's mathematics
        return function

    @functools.wraps(function)
    def standardized(*args: Any, **kwargs: Any) -> Any:
        before = ctypes.create_string_buffer(ROOM)
        c.fegetenv(before)
        try:
            c.fesetenv(DEFAULT)
            return function(*args, **kwargs)
        finally:
            c.fesetenv(before)

    return standardized  # type: ignore[return-value]


if TYPE_CHECKING:
    from fastopt._process import standard
else:
    try:
        standard = extension("_process").standard
    except ImportError:  # no C compiler, or no OpenMP
        standard = standard_by_libc
