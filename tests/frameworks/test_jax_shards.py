"""fastopt.jax on several devices: the tests of ``support/jax_on_devices.py`` and
``support/jax_sums_on_devices.py``, in a process that has four."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastopt.backends import cython_cpu

pytest.importorskip("jax", "0.9", reason="JAX 0.9 is not installed")
if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

SUPPORT = Path(__file__).parents[1] / "support"
PROGRAMS = [SUPPORT / "jax_on_devices.py", SUPPORT / "jax_sums_on_devices.py"]


def run(which):
    command = ["-m", "pytest", "-q", "-n", "0", "-m", which, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, PROGRAMS)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert " passed" in done.stdout


def test_on_devices():
    run("not slow")


@pytest.mark.slow
def test_all_rules_on_devices():
    run("slow")
