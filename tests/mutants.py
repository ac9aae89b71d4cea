"""Do the tests still catch what they caught before some of them were cut?

    python tests/mutants.py BASE 'fastopt/rules/*.py' -- tests/rules/test_oracle.py

Puts seeded mistakes, one at a time, into a copy of the installed sources that the
pattern names: another operator, comparison, or number. The tests of the working tree
run first. Where they pass, those of the revision BASE run, too; a mistake that only
these catch is printed as lost, and the command fails. Arguments after ``--`` are
pytest's; ``{stem}`` becomes the name of the changed file, for ``-k``.

Kernels are not built again, so a changed rule is changed for NumPy and Numba alone.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import fastopt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastopt.__file__).parent
OTHER: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE},
    **{ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot},
    **{ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
}


def mutate(node: ast.AST) -> bool:
    """Put a mistake into a node; False if there is none for its kind."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            node.op = OTHER[type(op)]()
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            node.ops = [OTHER[type(op)]()]
        case ast.Constant(value=bool(value)):
            node.value = not value
        case ast.Constant(value=int(value) | float(value)):
            node.value = value + 1
        case _:
            return False
    return True


def nodes(path: Path) -> tuple[ast.Module, list[ast.AST]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tree, list(ast.walk(tree))


def mutant(path: Path, place: int) -> tuple[str, str]:
    """What is wrong in the file, and its text."""
    tree, every = nodes(path)
    node = every[place]
    before = ast.unparse(node)
    mutate(node)
    line = getattr(node, "lineno", 0)
    return f"{path.name}:{line}: {before} -> {ast.unparse(node)}", ast.unparse(tree)


def passes(tests: Path, folder: Path, arguments: list[str]) -> bool:
    """Whether tests of one revision pass with the fastopt in another folder."""
    places = [str(tests / a) if a.startswith("tests/") else a for a in arguments]
    command = [sys.executable, "-m", "pytest", "-c", tests / "pyproject.toml", "-xq"]
    done = subprocess.run(
        [*command, *("-n", "0", "-p", "no:cacheprovider", "-m", "not faults"), *places],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if done.returncode not in (0, 1, 2, 5):  # 5: -k selects no test
        raise SystemExit(f"pytest ended with {done.returncode}: {places}")
    return done.returncode in (0, 5)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("base", help="a revision with the tests as they were before")
    parser.add_argument("pattern", help="the sources to change, such as fastopt/*.py")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="+", help="tests and options, after --")
    options = parser.parse_args()
    paths = sorted(PACKAGE.parent.glob(options.pattern))
    every = [
        (path, place)
        for path in paths
        for place, node in enumerate(nodes(path)[1])
        if mutate(node)
    ]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    outcomes = []
    with TemporaryDirectory() as name:
        before, folder = Path(name, "before"), Path(name, "mutant")
        before.mkdir()
        archive = ["git", "archive", "-o", f"{name}/before.tar", options.base]
        subprocess.run(archive, cwd=ROOT, check=True)
        shutil.unpack_archive(f"{name}/before.tar", before)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "fastopt", ignore=ignored)
        for path, place in chosen:
            where, text = mutant(path, place)
            arguments = [a.format(stem=path.stem) for a in options.arguments]
            changed = folder / path.relative_to(PACKAGE.parent)
            changed.write_text(text, encoding="utf-8")
            outcome = "caught"
            if passes(ROOT, folder, arguments):
                outcome = "missed" if passes(before, folder, arguments) else "LOST"
            shutil.copy(path, changed)
            outcomes.append(outcome)
            print(f"{outcome:7} {where}", flush=True)
    print(", ".join(f"{outcomes.count(o)} {o}" for o in ("caught", "missed", "LOST")))
    return int("LOST" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
