"""Steps on an NVIDIA GPU, against what its memory can do and against other packages.

    python bench/gpu.py                         all of it, in less than 8 minutes
    python bench/gpu.py --groups float32 --sizes 1e8 --no-tests
    python bench/gpu.py --simulate --no-tests --rounds 2   tiny cases, without a GPU

It needs the extras ``cuda13`` (or ``cuda12``) and ``test``. It first runs the tests of
the CUDA kernels' bits. Then it prints what it predicts, and
measures the cases of ``gpu_cases.py``: in each, fastopt over device arrays and
``fastopt.torch`` over tensors, the fused optimizers of torch, apex and bitsandbytes
where they are installed, and two bounds that move as many bytes as our step must. The
"floor" is a rule of fastopt without arithmetic, over the streams of AdamW in float32.
The "device copy" reads half of the bytes and writes the other half.

Contenders take turns, two times for 50 rounds, unless memory has room for one only. A
"step" is the median time between two events on the GPU, "host" the median time until
``step`` returned. Small cases rotate several sets of buffers, which are together larger
than the GPU's cache. Where steps wait for the host, ratios compare launches. Rates are
those of the bytes that a contender's step must move; torch's state, for example, has
the dtype of the parameters. Cases for which there is no memory or no time are left out,
and listed with the reason.

It writes ``bench/results/gpu_NAME.json``, with the GPU's name, unless ``--json`` names
another file. It returns 1 if there is no GPU or if bits differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gpu_report
from gpu_report import GROUPS
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
SIZES = 10**6, 10**8, 10**9
SIMULATED_SIZES = 70, 300
ROUNDS = 50
MINUTES = 7.5
TESTS_SHARE, LAUNCHES_SHARE = 1 / 3, 0.05  # of the time
TESTS = "cuda_simulator.py", "cuda_stored.py", "cuda_formats.py"
PACKAGES = (
    *("fastopt", "numpy", "numba", "numba-cuda", "cuda-core", "cuda-bindings"),
    *("nvidia-nvvm", "torch", "apex", "bitsandbytes"),
)


# The machine --------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """Return what a command prints; nothing if it fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict[str, Any]:
    """Describe the GPU and what drives it, without names of people or hosts."""
    from numba import cuda

    from fastopt.backends.cuda_accesses import SIMULATED
    from fastopt.bench.machine import cpu

    about: dict[str, Any] = {"date": str(date.today()), "cpu": cpu()}
    about["python"] = platform.python_version()
    if SIMULATED:
        return {"name": "Numba's simulator", "driver": "none", **about}
    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    asked = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    driver = output_of(*asked).partition("\n")[0]
    return {
        "name": name,
        "driver": driver or "unknown",
        "CUDA of the driver": told(lambda: cuda.cudadrv.driver.get_version()),
        "compute capability": told(lambda: device.compute_capability),
        "memory": told(lambda: cuda.current_context().get_memory_info().total),
        # Two for each cycle and wire, as in all such memories.
        "nominal bytes/s": told(
            lambda: device.MEMORY_CLOCK_RATE * device.GLOBAL_MEMORY_BUS_WIDTH * 250
        ),
        **about,
    }


def told(ask: Callable[[], Any]) -> Any:
    """Return what a driver says, or None: no measurement is lost for lack of it."""
    try:
        return ask()
    except Exception:
        return None


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the revision of the working tree, with a mark if it was changed."""
    revision = output_of("git", "rev-parse", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{revision} and changes" if changed else revision or "unknown"


def file_name(gpu: str) -> str:
    """Return the name of the file of results for a GPU."""
    return f"gpu_{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


# The tests ----------------------------------------------------------------------------


class Tests(NamedTuple):
    """What the tests of bits said: "passed", "failed", or why they did not end."""

    outcome: str
    summary: str
    seconds: float


def bits_tests(seconds: float, simulated: bool) -> Tests:
    """Run the tests of the CUDA kernels' bits, for so many seconds at most."""
    import fastopt
    from fastopt.runtime.threads import available

    if find_spec("pytest") is None:
        return Tests("not run", "pytest is not installed", 0.0)
    workers = min(8, available()) if find_spec("xdist") else 0
    files = [str(ROOT / "tests" / "support" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *files]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["-n", str(workers)] if workers else []
    begin = time.monotonic()
    folder = str(Path(fastopt.__file__).parents[1])  # of the fastopt that is measured
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    # Somewhere else, or Python would import fastopt from the sources.
    with tempfile.TemporaryDirectory() as elsewhere:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=elsewhere,
            env={
                **os.environ,
                "NUMBA_ENABLE_CUDASIM": str(int(simulated)),
                "PYTHONPATH": path,
            },
            start_new_session=True,  # with its workers, which must end with it
        )
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
    taken = time.monotonic() - begin
    lines = said.strip().splitlines() or [""]
    if process.returncode == -signal.SIGKILL:
        return Tests("cut short", f"no failure within {seconds:.0f} s", taken)
    if process.returncode:
        print(*lines[-40:], sep="\n")
    outcome = "failed" if process.returncode else "passed"
    return Tests(outcome, lines[-1].strip("= "), taken)


# The command --------------------------------------------------------------------------


def size_of(text: str) -> int:
    size = int(float(text))
    if size < 1:
        raise argparse.ArgumentTypeError("a size is at least 1")
    return size


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP"
    )
    parser.add_argument("--sizes", nargs="+", type=size_of, metavar="ELEMENTS")
    parser.add_argument("--rounds", type=size_of, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    parser.add_argument("--no-tests", action="store_true", help="of bits")
    parser.add_argument("--simulate", action="store_true", help="without a GPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="to write to")
    return parser.parse_args(arguments)


def written(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    seconds = 60 * options.minutes
    # Numba reads this when it is imported, which the next imports do.
    os.environ["NUMBA_ENABLE_CUDASIM"] = str(int(options.simulate))
    from fastopt.backends import cuda_driver

    if missing := cuda_driver.missing():
        print(f"bench/gpu.py needs a GPU, but {missing}", file=sys.stderr)
        print(
            "--simulate tries it without a GPU, with Numba's simulator", file=sys.stderr
        )
        return 1
    from gpu_cases import cases
    from gpu_measure import Budget, count_launches, measure

    whole, budget = Budget(seconds), Budget(seconds * (1 - LAUNCHES_SHARE))
    width = None if sys.stdout.isatty() else 140
    console = Console(width=width, highlight=False, markup=False)
    about = machine()
    record: dict[str, Any] = {"machine": about, "versions": versions()}
    record["commit"] = commit()
    console.print_json(json.dumps(record))
    tests = Tests("not run", "--no-tests", 0.0)
    if not options.no_tests:
        console.print("tests of the CUDA kernels' bits ...")
        tests = bits_tests(seconds * TESTS_SHARE, options.simulate)
    console.print(f"tests of bits: {tests.outcome}, {tests.summary}")
    sizes = options.sizes or (SIMULATED_SIZES if options.simulate else SIZES)
    chosen = list(cases(options.groups, sizes))
    nominal = about.get("nominal bytes/s")
    predictions = [
        gpu_report.predicted(case.group, case.name, case.elements, moved, nominal)
        for case, moved in ((case, case.moved()) for case in chosen)
    ]
    console.print(gpu_report.prediction_table(predictions))
    done, left = measure(chosen, options.rounds, budget, console.print)
    results = [result for _, result in done]
    record |= {"tests": tests._asdict(), "predictions": predictions}
    record["left out"] = [vars(each) for each in left]
    path = options.json
    if path is None and not options.simulate:
        path = ROOT / "bench" / "results" / file_name(about["name"])
    record["results"] = list(map(gpu_report.as_json, results))
    written(record, path)  # before the profiler, which may fail, is used
    count_launches(done, whole)
    record["results"] = list(map(gpu_report.as_json, results))
    written(record, path)
    for group in options.groups:
        if of_group := [result for result in results if result.group == group]:
            console.print(gpu_report.table(of_group))
    for each in left:
        about_case = f"{each.group}: {each.case}, {each.elements:,}"
        console.print(f"left out: {about_case}: {each.reason}")
    if path is not None:
        console.print(f"written: {path}")
    return int(tests.outcome == "failed")


if __name__ == "__main__":
    raise SystemExit(main())
