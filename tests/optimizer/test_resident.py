"""The resident memory of parameters and state of few bits, and of a step over them."""

import subprocess
import sys
from pathlib import Path

import pytest

# Where Linux forgets the greatest size so far.
RESET = Path("/proc/self/clear_refs")
PROGRAM = """
import re
import ml_dtypes, numpy as np, fastopt

def kilobytes(name):
    text = open("/proc/self/status").read()
    return int(re.search(rf"{name}:\\s+(\\d+) kB", text)[1])

size, dtype = 50_000_000, ml_dtypes.bfloat16
grad = np.full(size, 0.5, dtype)
few = np.ones(100_000, dtype)
fastopt.adamw(few, formats="8bit").step(few.copy())  # loads kernels, starts threads
before = kilobytes("VmRSS")
param = np.ones(size, dtype)
opt = fastopt.adamw(param, formats={"param": "bf16+r8", "m": "m8", "v": "v8"})
opt.step(grad, clip_norm=1.0)
after = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
for _ in range(3):
    opt.step(grad, clip_norm=1.0, zero_grads=True)
peak = kilobytes("VmHWM")
print((after - before) * 1024 / size, peak / after - 1)
"""


@pytest.mark.skipif(not RESET.exists(), reason="needs Linux's /proc")
def test_bytes_of_8_bits_are_few_and_a_step_needs_no_more():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    kept, more = map(float, done.stdout.split())
    assert 5.0 < kept <= 5.2
    assert more < 0.01
