"""Every example runs, and all code on the pages in docs/: in a process of its own, as
people would start it, where its framework is installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
DISTRIBUTED = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
# The last is a table of tests.
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:-1])
PIECES = [
    pytest.param(code, id=name)
    for name, text in SECTIONS.items()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
]
OF_SEVERAL = re.findall(r"^```python\n(.*?)^```", DISTRIBUTED, re.S | re.M)
# Of these each piece is a program, or tests beside their subject run them.
APART = {"frameworks", "distributed", "jax", "multitask", "native", "strategy"}
CODE = {
    page.stem: re.findall(
        r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M
    )
    for page in sorted((ROOT / "docs").glob("*.md"))
}
PROGRAMS = [name for name, blocks in CODE.items() if blocks and name not in APART]
EXCERPTS = [
    pytest.param(ROOT / "examples" / file, code, id=name)
    for name, text in SECTIONS.items()
    for file, code in re.findall(
        r"\(\.\./examples/(\w+\.py)\):\n\n```text\n(.*?)^```", text, re.S | re.M
    )
]


def output(*command):
    """What Python prints; a skip if what fails is that a module is not installed."""
    done = subprocess.run(
        [sys.executable, *command],
        # Small networks only wait for more threads, on a machine that is busy.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        *_, last = done.stderr.strip().splitlines() or [""]
        missing = re.match(r"ModuleNotFoundError: No module named '(\w+)", last)
        if missing and importlib.util.find_spec(missing[1]) is None:
            pytest.skip(f"{missing[1]} is not installed")
        pytest.fail(done.stdout + done.stderr)
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path):
    """It also learns, and says so; or it prints a table and saves a picture."""
    printed = output(path)
    found = re.findall(r"test accuracy: ([\d.]+)", printed)
    picture = Path(f"{path.stem}.png")
    if f"saves {picture}" in path.read_text(encoding="utf-8"):
        assert picture.stat().st_size > 10_000 and re.search(r"\d\.\d", printed)
        assert "nan" not in printed or path.stem == "textbook_mistakes", printed
    else:
        assert found and float(found[-1]) > 0.85, printed


@pytest.mark.parametrize("code", OF_SEVERAL)
def test_piece_of_the_page_on_several_processes(code):
    output("-c", code)


@pytest.mark.parametrize("code", PIECES)
def test_piece_of_the_page(code):
    output("-c", code)


@pytest.mark.parametrize("page", PROGRAMS)
def test_page_is_a_program(page, tmp_path, monkeypatch):
    """Its code from the first line to the last, in a folder where it may write."""
    monkeypatch.chdir(tmp_path)
    output("-c", "\n".join(CODE[page]))


@pytest.mark.parametrize("path, excerpt", EXCERPTS)
def test_excerpt_on_the_page(path, excerpt):
    there = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    assert {line.strip() for line in excerpt.splitlines()} <= there


def test_each_section_shows_something():
    assert {shown.id for shown in (*PIECES, *EXCERPTS)} == {*SECTIONS}
    assert len(SECTIONS) >= 6


def test_what_is_missing_is_told_from_what_fails():
    with pytest.raises(pytest.skip.Exception, match="no_such_module is not installed"):
        output("-c", "import no_such_module.part")
    for wrong in ("import fastopt.no_such_module", "import pytest.no_such", "1 / 0"):
        with pytest.raises(pytest.fail.Exception):
            output("-c", wrong)
