# cython: language_level=3
"""Python code in the arithmetic that bits are promised for; see arithmetic.h.

NumPy and Python's floats obey the thread's modes, too. The wrapper here is compiled, so
no interrupt comes between the change of the modes and the call, or between its end and
their restoration.
"""
from libc.stdint cimport uint64_t

from functools import wraps

cdef extern from "arithmetic.h":
    uint64_t fastopt_control() noexcept nogil
    void fastopt_set_control(uint64_t word) noexcept nogil
    uint64_t fastopt_enter() noexcept nogil
    void fastopt_leave(uint64_t word) noexcept nogil


def standard(function):
    """The function, run in standard arithmetic."""

    @wraps(function)
    def standardized(*args, **kwargs):
        cdef uint64_t before = fastopt_enter()
        try:
            return function(*args, **kwargs)
        finally:
            fastopt_leave(before)

    return standardized


def control():
    """The control word of this thread; 0 where we do not know it."""
    return fastopt_control()


def set_control(uint64_t word):
    fastopt_set_control(word)
