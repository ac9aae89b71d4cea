"""The README says what is so: its code runs, its figures are the committed ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("block", [0, 1])
def test_the_examples_run(block):
    names = {}
    exec("import numpy as np, fastopt", names)
    exec(compile(BLOCKS[block], "README.md", "exec"), names)
    assert names["opt"].steps == 1


def test_the_rule_is_the_file():
    assert (ROOT / "fastopt" / "rules" / "adamw.py").read_text("utf-8") == BLOCKS[2]


def test_the_table_is_the_measurement(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import readme

    from fastopt.bench import report

    assert readme.filled(README) == README
    assert report.read(readme.measurement(README)).machine["cpu"] in README
    with pytest.raises(ValueError, match="has no <!-- speed"):
        readme.filled("")


def test_ci_runs_the_command():
    """.ci/run takes the test command from here, so it must be there to find."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [c.split("/")[-1] for c in commands] == ["fastopt demo", "pytest"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'grep -oE "python3 -m venv .*pytest" README.md' in ci


def test_contributings_worked_example_is_a_rule():
    import numpy as np

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"( +)```python\n(.*?)```", text, re.S)
    lines = [line.removeprefix(code[1]) for line in code[2].splitlines()]
    names = {"__name__": "lion"}
    exec(compile("\n".join(lines), "CONTRIBUTING.md", "exec"), names)
    param = np.ones(3)
    names["lion"](param, lr=0.5, backend="numpy").step(np.array([1.0, -2.0, 0.0]))
    assert param.tolist() == [0.5, 1.5, 1.0]


@pytest.mark.parametrize("module", ["fastopt", "fastopt.flat", "fastopt.rule"])
def test_docstring_examples(module):
    code = (
        f"import doctest, importlib; m = importlib.import_module({module!r})\n"
        "result = doctest.testmod(m); print(result); assert not result.failed"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_docstring_examples_of_the_optimizer():
    import doctest

    from fastopt import optimizer

    result = doctest.testmod(optimizer)
    assert result.attempted >= 5 and not result.failed
