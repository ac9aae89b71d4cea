"""What pages of the documentation list is complete."""

import re
from pathlib import Path

from fastopt.cli import info

ROOT = Path(__file__).resolve().parents[2]
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def section(page, title):
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_extra_is_explained():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    table = section(INSTALL, "Extras")
    for extra in re.findall(r"^([\w-]+) = \[", extras, re.M):
        assert re.search(rf"^\|.*`{extra}`.*\|.*\|.*\|$", table, re.M), extra


def test_every_line_of_info_is_explained():
    table = section(INSTALL, "Check it: `fastopt info`")
    for entries in info.sections().values():
        for name in entries:
            assert re.search(rf"^\|.*`{re.escape(name)}`", table, re.M), name


def test_every_environment_variable_is_explained():
    table = section(INSTALL, "Environment variables")
    sources = [path.read_text("utf-8") for path in (ROOT / "fastopt").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"FASTOPT_[A-Z_]+", text)}
    assert {"FASTOPT_ISA", "FASTOPT_CACHE_DIR"} <= names
    for name in names:
        assert f"`{name}`" in table, name
