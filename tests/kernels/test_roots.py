"""Roots that AVX-512 kernels take by multiplication (csrc/roots.h) have the bits of
those that the divider takes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, IDS, same_bits

from fastopt.backends import cython_cpu

ISAS = [] if cython_cpu.missing() else cython_cpu.driver().cpu_supports()
CSRC = Path(__file__).resolve().parents[2] / "csrc"
GROUP = 64
# The comparison is in C, because Python would take an hour.
SOURCE = """
#include <stdint.h>
#include <string.h>
#define FASTOPT_GROUP 64
#include "roots.h"

static int differs(float *numbers) {
    float expected[FASTOPT_GROUP];
    for (int i = 0; i < FASTOPT_GROUP; i++)
        expected[i] = sqrtf(numbers[i]);
    fastopt_roots(numbers);
    return memcmp(numbers, expected, sizeof expected) != 0;
}

/* Count the groups that differ, of these numbers. */
int64_t count_differing(float *numbers, int64_t groups) {
    int64_t count = 0;
    for (int64_t k = 0; k < groups; k++)
        count += differs(numbers + k * FASTOPT_GROUP);
    return count;
}

/* Count them for all floats whose bits are from first to before end. */
int64_t count_all(uint64_t first, uint64_t end) {
    int64_t count = 0;
    for (uint64_t bits = first; bits < end; bits += FASTOPT_GROUP) {
        uint32_t words[FASTOPT_GROUP];
        float numbers[FASTOPT_GROUP];
        for (uint32_t i = 0; i < FASTOPT_GROUP; i++)
            words[i] = (uint32_t) bits + i;
        memcpy(numbers, words, sizeof words);
        count += differs(numbers);
    }
    return count;
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return a function that compiles SOURCE, in which a text may be replaced."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    if "avx512" not in ISAS:
        pytest.skip("this CPU has no AVX-512")

    def compile(old="", new=""):
        folder = tmp_path_factory.mktemp("roots")
        header = (CSRC / "roots.h").read_text(encoding="utf-8")
        assert old in header
        (folder / "roots.h").write_text(header.replace(old, new), encoding="utf-8")
        (folder / "roots.c").write_text(SOURCE, encoding="utf-8")
        flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-mavx512f"]
        flags += ["-shared", "-fPIC", "-o", str(folder / "roots.so")]
        subprocess.run([compiler, *flags, str(folder / "roots.c"), "-lm"], check=True)
        library = ctypes.CDLL(str(folder / "roots.so"))
        library.count_all.restype = library.count_differing.restype = ctypes.c_int64
        library.count_all.argtypes = ctypes.c_uint64, ctypes.c_uint64
        library.count_differing.argtypes = ctypes.c_void_p, ctypes.c_int64
        return library

    return compile


def test_every_float(compiled):
    assert compiled().count_all(0, 2**32) == 0


def differing(library):
    """Count the groups that differ, where numbers of all kinds lie in one group: zeros,
    subnormal, tiny, usual, huge, negative and infinite numbers, and NaN."""
    rng, groups = np.random.default_rng(0), 20_000
    anything = rng.integers(0, 2**32, groups * GROUP, np.uint32).view(np.float32)
    usual = rng.uniform(1e-8, 1e8, anything.size).astype(np.float32)
    cases = [anything, np.abs(anything), usual]
    for odd in (0.0, -0.0, 1e-45, 1e-38, 1e-31, np.inf, np.nan, -1.0, -np.inf):
        here = rng.random(usual.size) < 0.01
        cases.append(np.where(here, np.float32(odd), usual))
    return sum(library.count_differing(x.ctypes.data, groups) for x in cases)


def test_groups_of_all_kinds_of_numbers(compiled):
    assert differing(compiled()) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_mm512_fmadd_ps(error, inverse, root)", "root"),  # the last bit
        ("_mm512_set1_epi32(0x0D800000)", "_mm512_set1_epi32(0x00800000)"),
        ("maskz_rsqrt14_ps(positive[i], x[i])", "rsqrt14_ps(x[i])"),  # zeros
        ("_mm512_set1_epi32(0x7F800000)", "_mm512_set1_epi32(0x7F800001)"),
        ("inverse = _mm512_fmadd_ps(inverse, error, inverse);", ""),
    ],
)
def test_what_is_wrong_is_noticed(compiled, old, new):
    library = compiled(old, new)
    assert library.count_all(0, 2**32) + differing(library) > 0


@pytest.mark.skipif(cython_cpu.missing() is not None, reason="no kernels were built")
@pytest.mark.parametrize("odd", [0.0, 1e-25, 1e-17, 1e19, np.inf, np.nan])
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_kernels_beside_the_reference(rule, values, odd):
    """Gradients whose squares are zero, subnormal, tiny or infinite, among others."""
    rng = np.random.default_rng(0)
    size = 3 * GROUP + 7
    start = rng.standard_normal(size).astype(np.float32)
    params = {backend: start.copy() for backend in ("numpy", "cython")}
    opts = {
        backend: rule(p, backend=backend, **values) for backend, p in params.items()
    }
    for _ in range(3):
        g = rng.standard_normal(size).astype(np.float32)
        g[rng.random(size) < 0.01] = odd
        with np.errstate(all="ignore"):
            for opt in opts.values():
                opt.step(g)
    assert same_bits(*params.values())
    states = (opt.state for opt in opts.values())
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        assert same_bits(mine[0], theirs[0])
