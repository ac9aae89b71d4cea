"""bench/gpu.py without a GPU: that it runs in Numba's simulator, where its times mean
nothing, and that its figures mean what they say."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import cuda_stub
import pytest

pytest.importorskip("rich")
from rich.console import Console

BENCH = Path(__file__).resolve().parents[2] / "bench"
BOUNDS = {"floor", "device copy"}


def run(*arguments, **environment):
    command = [sys.executable, BENCH / "gpu.py", *map(str, arguments)]
    env = {**os.environ, "PYTHONUTF8": "1", **environment}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=env)


@pytest.mark.slow
def test_it_runs_in_the_simulator(tmp_path):
    pytest.importorskip("numba_cuda")
    path = tmp_path / "gpu.json"
    arguments = "--simulate --no-tests --sizes 70 --rounds 1 --json"
    done = run(*arguments.split(), path)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["machine"].keys() >= {"name", "driver", "date", "cpu", "python"}
    assert record["versions"].keys() >= {"fastopt", "numba-cuda"}
    assert record["commit"] and record["tests"]["outcome"] == "not run"
    assert not record["left out"]
    found = {(r["group"], r["case"], r["tensors"]): r for r in record["results"]}
    assert len(found) == len(record["results"]) == len(record["predictions"]) == 13
    float32 = [case for group, case, _ in found if group == "float32"]
    assert float32 == ["AdamW", "SGD, momentum", "Lion", "LAMB"]
    for (group, *_), result in found.items():
        names = {row["contender"] for row in result["contenders"]}
        if group == "CUDA graphs":  # which need a GPU
            assert "fastopt.torch" in result["refused"] and "floor" in names
            continue
        assert names >= {"fastopt", *BOUNDS}, done.stderr
        assert names | set(result["refused"]) >= {"fastopt.torch"}
        for row in result["contenders"]:
            assert row["samples"] == 2 and len(row["repeats"]) == 2
            assert row["milliseconds"] > 0 and row["of floor"] > 0
            assert (row["contender"] == "floor") == (row["of floor"] == 1)
    moved = {case[:2]: of["bytes"] / of["elements"] for case, of in found.items()}
    assert moved["float32", "AdamW"] == 28 and moved["float32", "Lion"] == 20
    assert moved["bfloat16", "AdamW, all bf16"] == 14
    assert moved["clip_norm=1", "AdamW"] == 32
    assert moved["state of 8 bits", "AdamW"] == 16.25
    for group in {group for group, *_ in found}:
        assert f"{group}: times of a step" in done.stdout
    assert re.search(r"AdamW, \d+, 3 tensors", done.stdout)


@cuda_stub.needs_compiler
def test_the_hosts_times(tmp_path):
    """``bench/gpu_host.py`` takes the steps that it measures."""
    pytest.importorskip("numba_cuda")
    pytest.importorskip("torch")
    path = tmp_path / "host.json"
    command = [sys.executable, BENCH / "gpu_host.py", "--repeats", "1", "--json", path]
    subprocess.run(command, check=True, capture_output=True, text=True)
    times = json.loads(path.read_text())["microseconds"]
    assert all(len(of_count) == 7 for of_count in times.values()) and len(times) == 3


def test_it_needs_a_gpu(tmp_path):
    path = tmp_path / "gpu.json"
    done = run("--json", path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "needs a GPU, but" in done.stderr and "--simulate" in done.stderr
    assert not path.exists() and not done.stdout


# In the simulator, in a process of its own, because Numba is imported for it.
MEMORY = """
import os
os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
import math, time
from gpu_cases import Contender, cases
from gpu_measure import Budget, measure, measured

(case, *_) = cases(["float32"], [100])
def fails():
    raise ValueError("no such kernel\\nsecond line")
def step():
    pass
some = {
    "fastopt": Contender(lambda: step, 2000, 28),
    "floor": Contender(lambda: step, 1000, 28),
    "large": Contender(lambda: step, 9000, 28),
    "faulty": Contender(fails, 10, 28),
}
def found(room):
    return measured(case, some, 3, time.monotonic() + 60, room)

everything = found(math.inf)
assert everything.interleaved and everything.timings.keys() == {
    "fastopt", "floor", "large"
}
assert everything.refused == {"faulty": "not supported (ValueError: no such kernel)"}
by_turns = found(5000)
assert not by_turns.interleaved and by_turns.timings.keys() == {"fastopt", "floor"}
assert "GB of memory" in by_turns.refused["large"]
for result in everything, by_turns:
    for timing in result.timings.values():
        assert list(map(len, timing.device)) == [3, 3] == list(map(len, timing.host))
assert "the floor needs" in found(1500).reason
done, (left,) = measure([case], 3, Budget(0), print)
assert not done and left.reason == "no time was left"
"""


def test_what_memory_and_time_leave():
    pytest.importorskip("numba_cuda")
    command = [sys.executable, "-c", MEMORY]
    path = os.pathsep.join(filter(None, [str(BENCH), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("body", "outcome", "summary"),
    [
        ("pass", "passed", "1 passed"),
        ("assert False", "failed", "1 failed"),
        ("__import__('time').sleep(600)", "cut short", "no failure within 6 s"),
    ],
)
def test_the_tests_of_bits(from_bench, monkeypatch, tmp_path, body, outcome, summary):
    gpu = from_bench("gpu")
    path = tmp_path / "test_bits.py"
    simulated = "import os\n    assert os.environ['NUMBA_ENABLE_CUDASIM'] == '0'"
    path.write_text(f"def test():\n    {simulated}\n    {body}\n")
    monkeypatch.setattr(gpu, "TESTS", [str(path)])
    said = gpu.bits_tests(6 if outcome == "cut short" else 300, simulated=False)
    assert said.outcome == outcome
    assert summary in said.summary


def text_of(table):
    console = Console(file=StringIO(), width=140, markup=False)
    console.print(table)
    return console.file.getvalue()


def test_the_table(from_bench):
    """Ratios are those of rounds, of which each has another pace."""
    report = from_bench("gpu_report")

    def timing(times, launches=None):
        return report.Timing([times, times[::-1]], [[0.002]], 28e6, launches)

    made = report.Result("float32", "AdamW", 10**6, 150, 28e6)
    made.timings = {
        "fastopt": timing([1, 20, 3], 1),
        "floor": timing([0.5, 10, 1.5]),
        "device copy": timing([0.25, 5, 0.75]),
    }
    made.refused = {"torch fused": "not supported [really]", "apex": "not installed"}
    ours, floor, _ = report.rows(made)
    assert (ours["milliseconds"], ours["launches"], ours["samples"]) == (3, 1, 6)
    assert (ours["of floor"], ours["of device copy"]) == (2, 4)
    assert ours["of torch fused"] is None and floor["of floor"] == 1
    assert ours["GB/s"] == pytest.approx(28 / 3)
    assert report.as_json(made)["refused"] == made.refused
    text = text_of(report.table([made]))
    row = r"AdamW, 1,000,000, 150 tensors │ fastopt +│ 3.000 ms │ 2.0 µs │ +1 │ +9 │"
    assert re.search(row + r" +2.00 │ +4.00 │ +– │", text)
    assert "torch fused: not supported [really]" in text
    made.interleaved = False
    assert report.rows(made)[0]["of floor"] == 2  # of medians
    made.timings["floor"] = timing([3, 1, 2])
    assert report.rows(made)[0]["of floor"] == 1.5
    assert "one by one" in text_of(report.table([made]))


def test_the_prediction(from_bench):
    report = from_bench("gpu_report")
    of = "float32", "AdamW", 10**9, 28e9
    found = report.predicted(*of, 4.8e12)
    assert found["milliseconds"] == pytest.approx(28 / 4.8 / 0.9 / 0.92)
    unknown = report.predicted(*of, None)
    assert unknown["milliseconds"] is None
    text = text_of(report.prediction_table([found, unknown]))
    assert "7.045 ms" in text and "28,000.0" in text


def test_names_of_files(from_bench):
    assert from_bench("gpu").file_name("NVIDIA H200 (141 GB)") == (
        "gpu_nvidia_h200_141_gb.json"
    )
