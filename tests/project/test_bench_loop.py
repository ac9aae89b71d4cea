"""fastopt bench --loop: contenders of one library train alike, and reports say what was
measured. No test asserts a time."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

from fastopt.__main__ import main
from fastopt.bench import loop, loop_contender
from fastopt.bench.loop import Measured, Timing
from fastopt.bench.loop_contender import FAMILIES, MODELS, Loop

# In a process of its own, because libraries take long to import and stay.
AGREE = """
import json, sys
import numpy as np
from fastopt.bench import contender
from fastopt.bench.loop_contender import FAMILIES, LOOPS, Loop
for model, clip in json.loads(sys.argv[2]):
    results = {}
    for name in FAMILIES[sys.argv[1]]:
        try:
            contender.import_packages(name)
        except contender.Unavailable as error:
            print("skip", error)
            sys.exit()
        calls, params = LOOPS[name](Loop(model, clip))
        start = [p.copy() for p in params()]
        for _ in range(3):
            for call in calls.values():
                call()
        results[name] = params()
        moved = max(abs(a - b).max() for a, b in zip(start, params(), strict=True))
        assert 1e-4 < moved < 1e-3, (name, moved)  # three steps of 1e-4
    first, *others = results.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
"""
LOOPS = {
    "torch": [(model, clip) for model in MODELS for clip in (None, 0.1)],
    "NumPy": [("mlp 64", None), ("mlp 64", 0.1)],
    "JAX": [("mlp 64", None), ("mlp 64", 0.1)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_contenders_of_a_library_train_alike(family):
    process = subprocess.run(
        [sys.executable, "-c", AGREE, family, json.dumps(LOOPS[family])],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    if process.stdout.startswith("skip"):
        pytest.skip(process.stdout)


def test_perceptrons_alone_are_in_numpy():
    with pytest.raises(loop_contender.contender.Unavailable, match="on torch"):
        loop_contender.fastopt_arrays(Loop("transformer"))


def bursts_of(*seconds):
    """Bursts of passes with these seconds for gradients, zero_grad, step."""
    return [
        {"calls": {"forward": g, "zero_grad": z, "step": s}, "pass": g + z + s}
        for g, z, s in seconds
    ]


def test_ratios_are_taken_within_a_round():
    bursts = {
        "fastopt torch": bursts_of((1, 0.2, 0.3), (10, 2, 3), (1, 0.2, 0.3)),
        "torch fused": bursts_of((1, 0.5, 0.5), (10, 5, 5), (1, 0.5, 0.5)),
    }
    ours, fused = (loop.timing(name, bursts) for name in bursts)
    assert (ours.optimizer, ours.whole) == (1, 1)
    assert fused.optimizer == pytest.approx(2) and fused.own == pytest.approx(1)
    assert fused.whole == pytest.approx(2 / 1.5)
    timings = {"fastopt torch": ours, "torch fused": fused}
    text = loop.markdown([Measured(Loop("mlp 64", 1.0), timings)])
    assert "| mlp 64 + clip_norm | fastopt torch |" in text
    assert text.splitlines()[-1].endswith("| 50% | 2.00 | 1.33 |")


def test_results_are_read_as_they_were_written(tmp_path):
    timing = Timing({"forward": 1e-4, "step": 2e-5}, 1.2e-4, 1.0, 1.0)
    measured = [Measured(Loop("mlp 64", 1.0), {"fastopt torch": timing})]
    path = tmp_path / "loop.json"
    loop.write(measured, {"cpu": "x"}, 3, path)
    assert loop.read(path) == measured
    loop.picture(measured).savefig(tmp_path / "loop.png")
    path.write_text('{"format": 0}')
    with pytest.raises(ValueError, match="measure again with `fastopt bench --loop`"):
        loop.read(path)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(loop.table(measured[0]))
    assert "fastopt torch" in console.export_text()


def test_the_command(tmp_path, capsys):
    arguments = ["bench", "--loop", "--quick", "--rounds", "1", "--output"]
    main([*arguments, str(tmp_path), "--against", "naive NumPy"])
    measured = loop.read(tmp_path / "loop.json")
    assert [loop.title(m.loop) for m in measured] == ["mlp 64", "mlp 64 + clip_norm"]
    assert all({*m.timings} == {"fastopt arrays", "naive NumPy"} for m in measured)
    with pytest.raises(SystemExit, match="unknown contender 'torch loop'"):
        main([*arguments, str(tmp_path), "--against", "torch loop"])
