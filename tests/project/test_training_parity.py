"""The evidence about formats in training: that it can fail, and is about what it says.

All of it takes minutes: `python bench/training_parity.py`, run by hand.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import fastopt
from fastopt.memory.formats import SMALLEST

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parity(from_bench):
    return from_bench("training_parity")


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small wait for BLAS threads on a busy machine."""
    with threadpool_limits(1, "blas"):
        yield


def test_the_quick_form(tmp_path):
    path = tmp_path / "result.json"
    arguments = "--quick --jobs 1 --tasks digits --rules adamw --seeds 2 --formats"
    script = ROOT / "bench" / "training_parity.py"
    command = [sys.executable, script, *arguments.split(), "bf16 state", "--json", path]
    env = {**os.environ, "COLUMNS": "80", "PYTHONUTF8": "1"}
    out = subprocess.check_output(command, text=True, encoding="utf-8", env=env)
    record = json.loads(path.read_text())
    assert record["seeds"] == 2 and record["quick"]
    assert record["machine"].keys() >= {"date", "cpu", "python", "numpy", "fastopt"}
    plain, rounded = record["results"]
    assert [r["format"] for r in (plain, rounded)] == ["float32", "bf16 state"]
    assert plain["losses"] != rounded["losses"]
    for these in (plain, rounded):
        assert (these["task"], these["rule"]) == ("digits", "adamw")
        assert len(these["losses"]) == 2
        assert all(0 < loss < 2 for loss in these["losses"])  # of 2.3 at first
        row = rf"adamw +│ {these['format']} +│ {these['mean']:.5f} │"
        assert re.search(row, out)
    assert f"│ {rounded['change']:+.5f} │ {rounded['error']:.5f} │    yes │" in out


def test_what_losses_say(parity):
    run = parity.Run("digits", "adamw", parity.FORMATS[1], 0, True)
    reference = [1.0, 2.0, 4.0]
    for change, within in ((0.1, True), (-1.5, True), (1.6, False), (-1.6, False)):
        losses = [1.0 + change + 0.25, 2.0 + change - 0.25, 4.0 + change]
        this = parity.result(run, losses, reference)
        assert this.mean == pytest.approx(mean(losses))
        assert this.spread == pytest.approx(stdev(losses))
        assert this.change == pytest.approx(change)
        assert this.error == pytest.approx(0.25 / math.sqrt(3))
        assert this.within is within
    assert not parity.result(run, [1.0, 2.0, math.nan], reference).within
    text = parity.as_json([parity.result(run, [1.0, 2.0, math.nan], reference)], 3, 0)
    (only,) = json.loads(text)["results"]
    assert only["losses"] == [1, 2, None] and only["mean"] is None


def test_losses_are_compared_with_float32_of_the_same_rule(parity):
    runs = [
        parity.Run("digits", rule, format, seed, True)
        for rule in ("adamw", "sgd")
        for format in parity.FORMATS[:3]
        for seed in range(2)
    ]
    losses = [1, 2, 3, 5, 1, 2, 10, 20, 11, 21, 40, 50]
    results = parity.compared(runs, losses)
    assert [r.rule for r in results] == ["adamw"] * 3 + ["sgd"] * 3
    assert [r.change for r in results] == [0, 2.5, 0, 0, 1, 30]
    assert [r.losses for r in results] == np.reshape(losses, (6, 2)).tolist()


@pytest.mark.parametrize("rule", ["adamw", "sgd", "lion", "lamb"])
def test_numbers_are_in_the_formats(parity, rule, monkeypatch):
    def decoded(params):
        seen["params"] = {p.dtype for p in params.values()}
        seen["large"] = sum(p.size >= SMALLEST for p in params.values())
        return numbers(params)

    def watched(opt, grads):
        seen["grads"] = {g.dtype for g in grads.values()}
        seen["state"] = opt.state
        step(opt, grads)

    seen, numbers, step = {}, parity.numbers, fastopt.Optimizer.step
    monkeypatch.setattr(parity, "numbers", decoded)
    monkeypatch.setattr(fastopt.Optimizer, "step", watched)
    dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    losses = set()
    for format in parity.FORMATS:
        losses.add(parity.train(parity.Run("digits", rule, format, 0, True)))
        assert seen["params"] == {np.dtype(dtypes[format.params])}
        assert seen["grads"] == {np.dtype(dtypes[format.grads])}
        assert seen["large"] == 2
        for name, buffers in seen["state"].items():
            encoded = isinstance(format.formats, str) or name in (format.formats or {})
            if name.endswith(("_scale", "_remainder")):  # second parts
                assert format.formats
                continue
            for buffer in buffers:
                assert (buffer.dtype != np.float32) == (
                    encoded and buffer.size >= SMALLEST
                )
    # In bfloat16, parameters with remainders of 8 and of 16 bits may look the same.
    assert len(losses) >= len(parity.FORMATS) - 1


@pytest.mark.parametrize("task", ["digits", "characters"])
def test_a_seed_is_the_same_weights_and_data_for_every_format(parity, task):
    plain = parity.FORMATS[0]
    named = plain._replace(name="named", formats={"m": "fp32", "other": "bf16"})
    losses = [
        parity.train(parity.Run(task, "lion", format, seed, True))
        for format, seed in ((plain, 0), (named, 0), (plain, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_rule_without_the_buffers_is_left_out(parity):
    formats = {"v": "bf16", "param": "bf16"}
    assert parity.formats_of(fastopt.adamw, formats) == formats
    assert parity.formats_of(fastopt.lion, formats) == {"param": "bf16"}
    assert parity.formats_of(fastopt.lion, {"v": "bf16"}) == {}
    momentum = {"momentum_buffer": "bf16"}
    assert parity.formats_of(fastopt.sgd, momentum) == momentum
    assert parity.formats_of(fastopt.sgd, "bf16") == "bf16"


def test_what_is_committed(parity):
    path = ROOT / "bench" / "results" / "training_parity.json"
    record = json.loads(path.read_text("utf-8"))
    assert record["settings"] == parity.RULES and not record["quick"]
    assert record["seeds"] >= 5
    plain = {}
    for these in record["results"]:
        if these["format"] == "float32":
            plain[these["task"], these["rule"]] = these["losses"]
        reference = plain[these["task"], these["rule"]]
        assert len(these["losses"]) == record["seeds"]
        changes = [a - b for a, b in zip(these["losses"], reference, strict=True)]
        assert these["change"] == pytest.approx(mean(changes))
        assert these["within"] == (abs(mean(changes)) <= stdev(reference))
    assert len(plain) == len(parity.COURSES) * len(parity.RULES)
