# cython: language_level=3
"""What a step needs of its process, compiled: arithmetic modes (arithmetic.h), the CPUs that
OpenMP uses, and powers, logarithms and cosines (elementary.h).

NumPy and Python's floats obey the thread's modes, too. The wrapper for them is compiled, so
no interrupt comes between the change of the modes and the call, or between its end and
their restoration.
"""
from libc.math cimport isfinite
from libc.stdint cimport uint64_t

from functools import wraps

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef _OPENMP
    #include <omp.h>
    #endif

    /* Marks in `used` the CPUs that OpenMP binds its threads to, below `most`; returns
       how many marks were made, 0 if it binds none. A runtime binds the first thread as
       soon as it is loaded, so that thread's affinity no longer tells. */
    static int fastopt_places(char *used, int most) {
        int marked = 0;
    #if defined(_OPENMP) && _OPENMP >= 201511
        for (int place = 0; place < omp_get_num_places(); place++) {
            int count = omp_get_place_num_procs(place);
            int *cpus = (int *) malloc((count + 1) * sizeof(int));
            if (!cpus)
                return 0;
            omp_get_place_proc_ids(place, cpus);
            for (int k = 0; k < count; k++)
                if (cpus[k] >= 0 && cpus[k] < most && !used[cpus[k]]) {
                    used[cpus[k]] = 1;
                    marked++;
                }
            free(cpus);
        }
    #else
        (void) used, (void) most;
    #endif
        return marked;
    }
    """
    int fastopt_places(char* used, int most) noexcept nogil

cdef extern from "arithmetic.h":
    uint64_t fastopt_control() noexcept nogil
    void fastopt_set_control(uint64_t word) noexcept nogil
    uint64_t fastopt_enter() noexcept nogil
    void fastopt_leave(uint64_t word) noexcept nogil

cdef extern from "elementary.h":
    double fastopt_power(double x, double y) noexcept nogil
    double fastopt_log(double x) noexcept nogil
    double fastopt_cospi(double x) noexcept nogil
    int FASTOPT_HAS_COSPI


def power(double x, double y):
    """Return ``x**y``, correctly rounded, as fastopt.elementary.power does.

    >>> power(0.5, 3)
    0.125
    """
    return fastopt_power(x, y)


def log(double x):
    """Return the natural logarithm of ``x``, correctly rounded, as fastopt.elementary.log
    does.

    >>> log(2.0)
    0.6931471805599453
    """
    return fastopt_log(x)


def cospi(double x):
    """Return the cosine of pi times ``x``, correctly rounded, as fastopt.elementary.cospi
    does.

    >>> cospi(1.0)
    -1.0
    """
    return fastopt_cospi(x)


def quick_cospi(general):
    """Return ``cospi`` where the compiler could compile it, else what is given."""
    return cospi if FASTOPT_HAS_COSPI else general


def quick_powers(general):
    """Return a function that does what ``general`` does with two numbers, quickly for
    floats."""

    def raised(x, y):
        cdef double result
        if type(x) is float and (type(y) is int or type(y) is float):
            result = fastopt_power(x, y)
            if isfinite(result):
                return result
        return general(x, y)

    return raised


def standard(function):
    """Wrap a function so that it runs in standard arithmetic."""

    @wraps(function)
    def standardized(*args, **kwargs):
        cdef uint64_t before = fastopt_enter()
        try:
            return function(*args, **kwargs)
        finally:
            fastopt_leave(before)

    return standardized


def same_objects(list first, list second):
    """Whether two lists have the same objects, not only equal ones."""
    cdef Py_ssize_t i, size = len(first)
    if size != len(second):
        return False
    for i in range(size):
        if first[i] is not second[i]:
            return False
    return True


def control():
    """Return the control word of this thread, or 0 where it is not known."""
    return fastopt_control()


def set_control(uint64_t word):
    fastopt_set_control(word)


def bound_to():
    """Return the CPUs that OpenMP binds its threads to, an empty list if it binds none."""
    used = bytearray(1 << 16)
    cdef char* marks = used
    fastopt_places(marks, 1 << 16)
    return [cpu for cpu, mark in enumerate(used) if mark]
