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


def count_all(library):
    """Count the groups that differ, of all floats: by multiplication, which is for the
    second half of a group, and by the divider."""
    return sum(library.count_all(k, 2**32 + k) for k in (0, GROUP // 2))


def test_every_float(compiled):
    assert count_all(compiled()) == 0


ESTIMATES = """
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static float real(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static uint32_t bits(float x) { uint32_t w; memcpy(&w, &x, 4); return w; }

/* As in roots.h, from an estimate on. */
static float last(float x, float root, float inverse) {
    return fmaf(fmaf(-root, root, x), inverse, root);
}

static float root_from(float x, float inverse) {
    float root = x * inverse, error;
    inverse *= 0.5f;
    error = fmaf(-root, inverse, 0.5f);
    return last(x, fmaf(root, error, root), fmaf(inverse, error, inverse));
}

/* After the step of Newton's method, both numbers are within 1.1 units in the last
 * place, whatever the estimate was. So each is one of at most three floats. Count the x
 * for which some of these give another root, and for such x the estimates that do. */
int main(void) {
    long odd = 0, wrong = 0;
    for (uint32_t w = bits(1.0f); w < bits(4.0f); w++) {
        float x = real(w), expected = sqrtf(x);
        double root = sqrt((double) x), half = 0.5 / root;
        uint32_t at_root = bits((float) root), at_half = bits((float) half);
        double unit = real(at_root + 1) - (double) real(at_root);
        double small = real(at_half + 1) - (double) real(at_half);
        int differs = 0;
        for (int i = -2; i <= 2; i++)
            for (int j = -2; j <= 2; j++) {
                float a = real(at_root + i), b = real(at_half + j);
                if (fabs(a - root) < 1.1 * unit && fabs(b - half) < 1.1 * small)
                    differs |= last(x, a, b) != expected;
            }
        if (differs) {
            uint32_t low = bits((float) ((1 - LARGEST) / root));
            uint32_t high = bits((float) ((1 + LARGEST) / root));
            odd++;
            for (uint32_t estimate = low; estimate <= high; estimate++)
                wrong += root_from(x, real(estimate)) != expected;
        }
    }
    printf("%ld %ld", odd, wrong);
    return 0;
}
"""


@pytest.mark.parametrize(("largest", "right"), [("0x1p-14", True), ("0x1p-4", False)])
def test_every_estimate(tmp_path, largest, right):
    """Processors promise an error below 2**-14, and may differ in the estimate."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or "avx2" not in ISAS:
        pytest.skip("no C compiler, or no fused multiply-add")
    (tmp_path / "estimates.c").write_text(ESTIMATES, encoding="utf-8")
    flags = ["-O2", "-mfma", "-ffp-contract=off", f"-DLARGEST={largest}"]
    source, program = tmp_path / "estimates.c", tmp_path / "estimates"
    subprocess.run([compiler, *flags, source, "-o", program, "-lm"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    odd, wrong = map(int, done.stdout.split())
    assert odd == 2 and (wrong == 0) == right


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
        ("_mm512_fmadd_ps(error, slope, root)", "root"),  # the last bit
        ("_mm512_set1_epi32(0x0D800000)", "_mm512_set1_epi32(0x00800000)"),
        ("maskz_rsqrt14_ps(nonzero[i], x[i])", "rsqrt14_ps(x[i])"),  # zeros
        ("_mm512_set1_epi32(0x7F800000)", "_mm512_set1_epi32(0x7F800001)"),
        ("slope = _mm512_fmadd_ps(slope, error, slope);", ""),
    ],
)
def test_what_is_wrong_is_noticed(compiled, old, new):
    library = compiled(old, new)
    assert count_all(library) + differing(library) > 0


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
