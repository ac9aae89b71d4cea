"""Hostile states, calls and frames: fastopt.jax refuses each with an error, and neither
reads nor writes beyond a buffer. In a process of its own, which may crash."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastopt.backends import cython_cpu

pytest.importorskip("jax", reason="JAX is not installed")
if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

PROGRAM = Path(__file__).parents[1] / "support" / "hostile_jax.py"


def attack(campaign, kind):
    """Count what the program did; where it ends early, its last attack did that."""
    form = "long" if campaign.long else "short"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), kind, form],
        capture_output=True,
        text=True,
        timeout=3000 if campaign.long else 300,
    )
    last = "the start"
    for line in map(json.loads, done.stdout.splitlines()):
        last = line.get("begun")
        if last is None:
            campaign.attempt(line["what"], check, line["problem"])
    if done.returncode:
        said = f"the process ended with {done.returncode}: {done.stderr[-500:]}"
        campaign.attempt(last, check, said)


def check(problem):
    if problem is not None:
        raise AssertionError(problem)


def test_hostile_states_of_jax(campaign):
    attack(campaign, "states")


def test_hostile_calls_through_xla(campaign):
    attack(campaign, "calls")


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages by mprotect")
def test_hostile_frames_for_the_target_of_xla(campaign):
    attack(campaign, "frames")
