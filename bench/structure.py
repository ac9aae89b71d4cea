"""Counts sizes, imports and circles of the code: python bench/structure.py 1c0b3a8 HEAD

Tests are not counted. An arrow is a module that imports another of fastopt, anywhere in
it but for types alone. A room is a folder or a file directly in ``fastopt/``. A circle
is a set of modules, or of rooms, that import each other, directly or through others.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

SOURCES = ("*.py", "*.pyx", "*.pyx.in", "*.pxi", "*.pxd", "*.h", "*.c")
Arrows = set[tuple[str, str]]
# Runs setup.py up to where Cython would start, which is after the rendering.
RENDER = """
import runpy, sys, Cython.Build
Cython.Build.cythonize = lambda *args, **options: []
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py")
"""


def lines(*paths: Path) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def modules(package: Path) -> dict[str, ast.Module]:
    def name(path: Path) -> str:
        parts = path.relative_to(package.parent).with_suffix("").parts
        return ".".join(parts).removesuffix(".__init__")

    return {name(p): ast.parse(p.read_text("utf-8")) for p in package.rglob("*.py")}


def imported(node: ast.AST) -> Iterator[str]:
    """The names that a piece of code imports, without those for types alone."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        for child in ast.iter_child_nodes(node):
            yield from imported(child)


def arrows(trees: dict[str, ast.Module]) -> Arrows:
    """Between modules. ``fastopt/__init__.py`` imports nearly all, so it has none."""
    pairs = {
        (name, target if target in trees else target.rpartition(".")[0])
        for name, tree in trees.items()
        for target in imported(tree)
    }
    inner = trees.keys() - {"fastopt"}
    return {(a, b) for a, b in pairs if a != b and {a, b} <= inner}


def circles(pairs: Arrows) -> str:
    reach: dict[str, set[str]] = {}
    for start, _ in pairs:
        reach[start], new = set(), {start}
        while new:
            new = {b for a, b in pairs if a in new} - reach[start]
            reach[start] |= new
    sets = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in reach}
    return " and ".join(str(size) for size in sorted(map(len, sets)) if size) or "none"


def measure(tree: Path) -> dict[str, str]:
    """All figures of a folder of sources."""
    paths = [path for pattern in SOURCES for path in tree.rglob(pattern)]
    paths = [path for path in paths if tree / "tests" not in path.parents]
    longest = max(paths, key=lines)
    trees = modules(tree / "fastopt")
    size, largest = max(
        ((node.end_lineno or 0) - node.lineno + 1, node.name)
        for module in trees.values()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    )
    between = arrows(trees)
    rooms = {(a.split(".")[1], b.split(".")[1]) for a, b in between}
    rooms -= {(a, a) for a, _ in rooms}
    subprocess.check_output([sys.executable, "-c", RENDER], cwd=tree)
    return {
        "files": f"{len(paths)}",
        "lines": f"{lines(*paths):,}",
        "rendered lines": f"{lines(*(tree / 'build' / 'kernels').glob('*.pyx')):,}",
        "longest file": f"{longest.name}, {lines(longest)}",
        "longest class": f"{largest}, {size}",
        "arrows of modules": f"{len(between)}",
        "sizes of circles": circles(between),
        "arrows of rooms": f"{len(rooms)}",
        "sizes of their circles": circles(rooms),
    }


def main(revisions: list[str]) -> None:
    table, columns = Table("", *revisions), []
    with TemporaryDirectory() as name:
        for revision in revisions:
            archive, tree = f"{name}/tree.tar", Path(name, revision)
            subprocess.run(["git", "archive", "-o", archive, revision], check=True)
            shutil.unpack_archive(archive, tree)
            columns.append(measure(tree))
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:] or ["HEAD"])
