"""The README says what is so: its code runs, its figures are the committed ones."""

import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_its_links_lead_somewhere():
    """On GitHub, where the site's builder does not look."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert len(links) >= 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_examples_run():
    """One after the other; that of torch only where torch is installed."""
    names = {}
    for block in BLOCKS:
        if util.find_spec("torch") or "torch" not in block:
            exec(compile(block, "README.md", "exec"), names)
            opt = names.pop("opt")
            steps = (
                opt.steps
                if hasattr(opt, "steps")
                else opt.state_dict()["state"][0]["step"]
            )
            assert steps == 1
    assert len(BLOCKS) == 3


def test_ci_runs_the_command():
    """.ci/run takes the test command from here, so it must be there to find."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [c.split("/")[-1] for c in commands] == ["fastopt demo", "pytest"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'grep -oE "python3 -m venv .*pytest" README.md' in ci


@pytest.mark.parametrize(
    "module",
    [
        *["", "memory.flat", "rule", "adafactor", "muon", "lookahead"],
        *["schedules", "training", "tune", "multitask", "optimizer.storage"],
    ],
)
def test_docstring_examples(module):
    module = f"fastopt.{module}".removesuffix(".")
    code = (
        f"import doctest, importlib; m = importlib.import_module({module!r})\n"
        "result = doctest.testmod(m); print(result); assert not result.failed"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_docstring_examples_of_the_optimizer():
    import doctest

    from fastopt.optimizer import optimizer

    result = doctest.testmod(optimizer)
    assert result.attempted >= 5 and not result.failed
