"""More elements than 32 bits can count, on a machine that has no memory for them."""

import ctypes
import mmap
import os
import sys

import numpy as np
import pytest

import fastopt
from fastopt import backends

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="maps one file many times, by Linux's memfd"
    ),
]
CHUNK = 64 << 20
ELEMENTS = 2**31 + CHUNK // 4 + 1000
FIXED, NORESERVE = 0x10, 0x4000  # Linux's, which mmap does not name


class Sparse:
    """A float32 array of ELEMENTS whose chunks all lie in one and the same memory, but
    for the last three, which are real."""

    def __init__(self):
        size = -(-4 * ELEMENTS // CHUNK) * CHUNK
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        self.region = mmap.mmap(-1, size, flags)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self.region))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
        libc.mmap.argtypes += [ctypes.c_long]
        shared = os.memfd_create("shared")
        os.ftruncate(shared, CHUNK)
        for address in range(begin, begin + size - 3 * CHUNK, CHUNK):
            flags = mmap.MAP_SHARED | FIXED
            access = mmap.PROT_READ | mmap.PROT_WRITE
            if libc.mmap(address, CHUNK, access, flags, shared, 0) != address:
                raise OSError(ctypes.get_errno(), "mmap")
        os.close(shared)
        self.array = np.frombuffer(self.region, np.float32, ELEMENTS)


@pytest.mark.parametrize("backend", ["cython", "numba"])
@pytest.mark.parametrize("threads", [1, 2])
def test_beyond_32_bits(backend, threads):
    _, reason = backends.find(backend)
    if reason:
        pytest.skip(reason)
    param, grad = Sparse(), Sparse()
    last = slice(2**31 - 1000, None)
    rng = np.random.default_rng(0)
    param.array[last] = rng.standard_normal(param.array[last].size, np.float32)
    grad.array[last] = rng.standard_normal(grad.array[last].size, np.float32)
    expected = param.array[last].copy()
    fastopt.gd(expected, lr=0.5, backend="numpy").step(grad.array[last].copy())
    opt = fastopt.gd(param.array, lr=0.5, backend=backend, threads=threads)
    opt.step(grad.array)
    assert np.array_equal(param.array[last], expected)
