"""A process is killed in the middle of training with FSDP2: the other one raises within
the timeout, and a resumed run has the bits of an uninterrupted one."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)
if not hasattr(__import__("os"), "fork"):
    pytest.skip("no fork on this system", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "killed_ranks.py"


@pytest.mark.parametrize(
    "runs", [5, pytest.param(50, marks=pytest.mark.faults, id="all")]
)
def test_processes_killed_in_training(runs: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(runs), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120 + 60 * runs,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == runs
    assert all(line.endswith(": True True") for line in lines), done.stdout
