"""The tests under AddressSanitizer and UndefinedBehaviorSanitizer, with GCC on Linux.

    python tests/sanitize.py                 the long campaigns: pytest -m faults
    python tests/sanitize.py tests/kernels   any other tests, or options of pytest's
    python tests/sanitize.py --self-test     shows that it catches an overflow in
                                             each kind of extension, and no other

All extensions (kernels, ``_driver``, ``_tensors``, ``_xla``) are built once more, from
a copy of the working tree in ``build/sanitized``; those of the working tree stay. The
first error of a process kills it, and whatever any process reports fails the run, even
where a test has borne that death.

What it cannot see: Numba's kernels, which GCC does not compile, and the vector
instructions of ours, because GCC leaves loops with checks in them as they are, one
element at a time. Guard pages (``guarded.py``) see both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = ROOT / "build" / "sanitized"
# No recovery: what goes on after an error may hide it.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
# The first two before everything else; exceptions of C++ are caught by the third.
RUNTIMES = "libasan.so", "libubsan.so", "libstdc++.so"
# Python frees nothing at its end. A fault of the processor is no error of these (the
# campaigns have their own), and ends the process as it does elsewhere.
ASAN = "halt_on_error=1:abort_on_error=1:detect_leaks=0:handle_segv=0"
ASAN += ":allocator_may_return_null=1"
UBSAN = "halt_on_error=1:abort_on_error=1:print_stacktrace=1"

# What is built in by --self-test: a file, what stands there, what is put in its place,
# and a script that then goes too far.
OVERFLOWS = {
    "kernels": (
        "csrc/kernels.pyx.in",
        "    for i in range(n):\n        new = {{name}}(",
        "    for i in range(n + 1):\n        new = {{name}}(",
        "import numpy, fastopt; p = numpy.ones(1000, numpy.float32); "
        "fastopt.adamw(p, backend='cython').step(p.copy())",
    ),
    "_driver": (
        "csrc/matrices.pxi",
        "malloc(count * sizeof(int64_t))",
        "malloc((count - 1) * sizeof(int64_t))",
        "import numpy; from fastopt.backends import cython_cpu; a = [numpy.ones(100)]; "
        "cython_cpu.gram([a, a], 1)",
    ),
    "_tensors": (
        "csrc/tensors.pyx",
        "(len(params) + len(buffers) + 1) * WORDS, sizeof",
        "(len(params) + len(buffers)) * WORDS - 2 * MOST_DIMENSIONS, sizeof",
        "import torch, fastopt.torch; p = torch.nn.Parameter(torch.ones(2, 2, 2)); "
        "p.grad = torch.ones(2, 2, 2); opt = fastopt.torch.AdamW([p]); "
        "opt.step(); opt.step()",
    ),
    "_xla": (
        "csrc/xla.pyx",
        "rule.state_count * sizeof(void*)) + 1",
        "rule.state_count * sizeof(void*)) - 8",
        "import jax, fastopt.jax; opt = fastopt.jax.adamw(); p = jax.numpy.ones(3); "
        "jax.block_until_ready(opt.step(p, p, opt.init(p)))",
    ),
}


def copy_of_tree(into: Path) -> None:
    """All that git does not ignore. What has not changed keeps its time, so that it is
    not compiled again."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout
    present = {n for n in names.decode().split("\0") if n and (ROOT / n).is_file()}
    for folder in ("fastopt", "tests", "docs", "examples"):
        for old in (into / folder).rglob("*.py"):  # one that is deleted by now
            if str(old.relative_to(into)) not in present:
                old.unlink()
    for name in present:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, into / name)


def build(tree: Path) -> None:
    # As part of the compiler's name, so that setup.py finds OpenMP with them, too.
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        check=True,
        env={**os.environ, "CC": f"gcc {FLAGS}", "CFLAGS": "-g1"},
    )
    for name in extensions(tree):
        linked = subprocess.run(["ldd", name], capture_output=True, text=True).stdout
        wanted = ["libasan", "libubsan", *(["libgomp"] if "_driver" in name else [])]
        assert all(library in linked for library in wanted), f"{name}: {linked}"


def extensions(tree: Path) -> list[str]:
    """Those that were built, and should have been."""
    sources = (tree / "build" / "kernels").glob("*.pyx")
    found = [list((tree / "fastopt").glob(f"{path.stem}.*.so")) for path in sources]
    assert found and all(found), "not all extensions could be built"
    return [str(path) for paths in found for path in paths]


def runtime(name: str) -> str:
    command = ["gcc", f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if path == name:  # GCC's answer where it has none
        raise SystemExit(f"GCC has no {name}; install it (Debian: libgcc-dev)")
    return path


def run(tree: Path, command: Sequence[str], **environment: str) -> tuple[int, str]:
    """Python with the sanitizers, and with the extensions of a tree; its exit status,
    and what it and the processes that it started have reported."""
    reports = tree / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(map(runtime, RUNTIMES)),
            "PYTHONMALLOC": "malloc",  # Python's own would hide where objects end
            "PYTHONPATH": str(tree),
            "ASAN_OPTIONS": f"{ASAN}:log_path={reports}/report",
            "UBSAN_OPTIONS": f"{UBSAN}:log_path={reports}/report",
            **environment,
        },
    )
    texts = [path.read_text(errors="replace") for path in sorted(reports.iterdir())]
    return done.returncode, "\n".join(texts)


def self_test() -> None:
    tree = SANITIZED.with_name("sanitized_with_overflows")
    scripts = {}
    copy_of_tree(tree)
    for what, (name, right, wrong, script) in OVERFLOWS.items():
        text = (tree / name).read_text()
        assert text.count(right) == 1, f"{name} has changed: change {__file__}"
        (tree / name).write_text(text.replace(right, wrong))
        scripts[what] = script
    build(tree)
    names = [Path(path).name for path in extensions(tree)]
    isas = [n.split(".")[0].split("_")[2] for n in names if n.startswith("_kernels")]
    checks = {f"{isa} kernels": ("kernels", isa) for isa in sorted(isas)}
    checks |= {what: (what, "") for what in OVERFLOWS if what != "kernels"}
    for good, of in ((False, tree), (True, SANITIZED)):
        for name, (what, isa) in checks.items():
            status, report = run(of, ["-c", scripts[what]], FASTOPT_ISA=isa)
            caught = "heap-buffer-overflow" in report and status != 0
            if caught == good or (good and (status or report)):
                raise SystemExit(f"{name}, {good=}: status {status}, {report!r}")
            print(f"{name}: {'quiet' if good else 'caught'}")


def main(arguments: list[str]) -> int:
    copy_of_tree(SANITIZED)
    build(SANITIZED)
    if arguments == ["--self-test"]:
        self_test()
        return 0
    tests = arguments or ["-m", "faults"]
    status, report = run(SANITIZED, ["-m", "pytest", "-n", "0", *tests])
    print(report or "the sanitizers have nothing to report")
    return status or bool(report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
