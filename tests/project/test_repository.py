"""The repository's own files: the issue forms are as GitHub takes them, and the version
is the same wherever it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt

ROOT = Path(__file__).resolve().parents[2]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        (
            "github-issue-forms",
            [path for path in FORMS.glob("*.yml") if path.stem != "config"],
        ),
        ("github-issue-config", [FORMS / "config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=["forms", "config", "citation"],
)
def test_files_follow_their_schema(schema, files):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--default-filetype", "yaml"]
    done = subprocess.run(
        [*command, "--builtin-schema", f"vendor.{schema}", *files],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_reports_of_bugs_come_with_what_info_prints():
    for name in ("bug", "numbers", "speed"):
        form = (FORMS / f"{name}.yml").read_text(encoding="utf-8")
        _, asked = form.split("label: Output of `fastopt info`")
        assert "required: true" in asked


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("pyproject.toml", '^version = "(.*)"$'),
        ("CITATION.cff", "^version: (.*)$"),
        ("CHANGELOG.md", "^## ([0-9.]+)"),  # the newest one is the first
    ],
)
def test_versions_are_the_same(file, pattern):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.findall(pattern, text, re.M)[0] == fastopt.__version__
