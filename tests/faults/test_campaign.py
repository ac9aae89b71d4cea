"""Campaigns count what they did, and what was not borne fails a run."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS_FOLDER = Path(__file__).parents[1]
TESTS = """
import pytest

def bear(number):
    assert number != 3, "not borne"

@pytest.mark.parametrize("half", [0, 1])
def test_good_ones(campaign, half):
    for number in range(20 if campaign.long else 2):
        campaign.attempt(number, bear, 10 + number)

def test_bad_ones(campaign):
    for number in range(7):
        campaign.attempt(number, bear, number)

def test_nothing(campaign):
    pass

def test_skipped(campaign):
    pytest.skip("a package is missing")

def test_skipped_too_late(campaign):
    campaign.attempt(3, bear, 3)
    pytest.skip("a package is missing")
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("form, good", [("not faults", 4), ("faults", 40)])
def test_the_table_at_the_end(tmp_path, form, good, processes):
    """Also where several processes (pytest-xdist) have done the tests."""
    if processes > 1 and importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    for name in ("conftest.py", "support/campaign.py", "support/installed.py"):
        shutil.copy(TESTS_FOLDER / name, tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = faults: long ones\n")
    shared = ["-n", "2"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", form, *shared],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    counts = re.findall(
        r"^(good ones|bad ones|nothing|skipped.*?) +(\d+) +(\d+)$", done.stdout, re.M
    )
    assert counts == [
        ("bad ones", "7", "6"),
        ("good ones", str(good), str(good)),
        ("nothing", "0", "0"),
        ("skipped too late", "1", "0"),
    ]
    assert "bad ones: 1 of 7 failed:" in done.stdout
    assert "nothing: nothing was tried" in done.stdout
    assert "3 errors" in done.stdout
