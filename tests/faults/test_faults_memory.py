"""Steps beside pages that nobody may touch: nothing is read or written beyond an array,
or written to gradients, and the values are those of any other place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import Campaign
from installed import needs_numba

from fastopt.backends import cython_cpu

WORKER = Path(__file__).parents[1] / "support" / "guarded.py"
ISAS = [] if cython_cpu.missing() else cython_cpu.driver().cpu_supports()
MOST_CRASHES = 20

if not sys.platform.startswith("linux"):
    pytest.skip("mprotect is called as on Linux", allow_module_level=True)


def steps_in(campaign, door, **environment):
    """All cases of a door, in a process of its own, and in another one after those that
    kill it."""
    form, before, crashes = "long" if campaign.long else "short", campaign.tried, 0
    while True:
        begun = campaign.tried - before
        done = subprocess.run(
            [sys.executable, str(WORKER), door, form, str(begun)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=3000,
        )
        lines = done.stdout.splitlines()
        for line, outcome in zip(lines[::2], [*lines[1::2], ""], strict=False):
            campaign.attempt(line.removeprefix("begin "), judge, outcome, done)
        if not done.returncode:
            return
        assert campaign.tried > before + begun, f"not even begun: {done.stderr[-3000:]}"
        crashes += 1
        assert crashes < MOST_CRASHES, f"it crashes all the time: {campaign.failures}"


def judge(outcome, done):
    if not outcome:  # the last line of a process that was killed
        raise RuntimeError(f"killed, {done.returncode}: {done.stderr[-3000:]}")
    if outcome != "passed":
        raise RuntimeError(outcome)


@pytest.mark.skipif(not ISAS, reason="the compiled kernels are not installed")
def test_guard_pages_around_compiled_steps(campaign):
    for isa in ISAS if campaign.long else ISAS[:1]:
        steps_in(campaign, "cython", FASTOPT_ISA=isa)


@needs_numba
def test_guard_pages_around_numba_steps(campaign):
    steps_in(campaign, "numba")


@pytest.mark.skipif(not ISAS, reason="the compiled kernels are not installed")
def test_guard_pages_around_native_steps(campaign):
    steps_in(campaign, "native")


def test_guard_pages_around_torch_steps(campaign):
    pytest.importorskip("torch", reason="torch is not installed")
    steps_in(campaign, "torch")


@pytest.mark.skipif(not ISAS, reason="the compiled kernels are not installed")
def test_guard_pages_around_jax_steps(campaign):
    pytest.importorskip("jax", reason="JAX is not installed")
    steps_in(campaign, "jax", JAX_PLATFORMS="cpu")


def test_what_goes_too_far_is_found_out():
    """Each crash is one failure, and the cases after it are still done."""
    campaign = Campaign("broken", long=False)
    steps_in(campaign, "broken")
    assert campaign.tried == 6 and len(campaign.failures) == 4
    assert "reads beyond: RuntimeError: killed, " in campaign.failures[0]
    assert "writes before: RuntimeError: killed, " in campaign.failures[1]
    assert campaign.failures[2].endswith("AssertionError: written beside it")
    assert "only to be read: RuntimeError: killed, " in campaign.failures[3]
