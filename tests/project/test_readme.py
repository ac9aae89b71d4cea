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
    """But for the tables that are made from measurements and rules."""
    written = re.sub(r"<!-- (\w+): made by .*?<!-- /\1 -->", "", README, flags=re.S)
    assert len(written.splitlines()) <= 145


def rule_of(block):
    """The name of the rule whose whole file a block shows, or None."""
    name = re.search(r"^(\w+) = Rule\(", block, re.M)
    return name[1] if name and block.startswith('"""') else None


def test_the_examples_run():
    """One after the other; what needs torch only where it is installed."""
    names = {}
    exec("import numpy as np, fastopt", names)
    for block in BLOCKS:
        if rule_of(block) is None and (util.find_spec("torch") or "torch" not in block):
            names.pop("opt", None)
            exec(compile(block, "README.md", "exec"), names)
            assert "opt" not in names or names["opt"].steps > 0
    assert len(BLOCKS) >= 3


def test_a_rule_that_is_shown_is_its_file():
    for block in BLOCKS:
        if name := rule_of(block):
            path = ROOT / "fastopt" / "rules" / f"{name}.py"
            assert path.read_text("utf-8") == block


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
