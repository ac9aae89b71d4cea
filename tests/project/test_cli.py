"""The command line: what it says, what it refuses, and that the demo is honest."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fastopt
from fastopt import backends
from fastopt.__main__ import main
from fastopt.bench.naive import NAIVE, Naive
from fastopt.cli import demo

# Makes the named modules, and those whose names they begin, fail to import.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({names!r}):
            raise {error}(f"No module named {{name!r}}")
sys.meta_path.insert(0, Blocked())
from fastopt.__main__ import main
main({arguments!r})
"""


def run(*arguments, without=(), error="ModuleNotFoundError"):
    """The exit status, output and messages of a fresh process; spaces are folded."""
    code = BLOCKED.format(names=tuple(without), error=error, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    return done.returncode, *(" ".join(t.split()) for t in (done.stdout, done.stderr))


def test_version_and_help_as_a_module():
    for option, wanted in (
        ("--version", f"fastopt {fastopt.__version__}"),
        ("-h", "info"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fastopt", option], capture_output=True, text=True
        )
        assert done.returncode == 0
        assert wanted in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["info", "--epochs", "3"],
        ["demo", "--epochs", "0"],
        ["demo", "--epochs", "2.5"],
        ["demo", "--seed", "-1"],
        ["demo", "--output", "demo.jpg"],
    ],
)
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: fastopt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked", [["--sizes", "1e3"], ["--rules", "sgd", "--dtypes", "bfloat16"]]
)
def test_a_loop_refuses_what_is_for_steps(asked, tmp_path):
    """And measures nothing else instead."""
    with pytest.raises(SystemExit, match="--loop measures Adam") as exit:
        main(["bench", "--loop", *asked, "--output", str(tmp_path / "none")])
    assert all(name in str(exit.value) for name in asked if name.startswith("--"))
    assert not (tmp_path / "none").exists()


def test_info_names_every_backend_and_needs_no_rich():
    status, out, err = run("info", without=["rich"])
    assert status == 0 and "Traceback" not in err
    for name in backends.MODULES:
        assert re.search(rf"\b{name} (available|missing: \w)", out)
    for title in ("NumPy", "compiled kernels", "threads", "OpenMP", "kernel cache"):
        assert title in out


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_info_into_a_pipe_that_ends():
    command = [sys.executable, "-m", "fastopt", "info"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_info_without_compiled_kernels():
    status, out, _ = run("info", without=["fastopt._kernels_"])
    assert status == 0
    assert "cython missing: the compiled kernels are not installed" in out
    assert "pip install --force-reinstall" in out
    assert "in use none" in out


@pytest.mark.parametrize("error", ["ModuleNotFoundError", "OSError", "AttributeError"])
def test_info_with_a_broken_gpu_stack(error):
    status, out, err = run("info", without=["numba_cuda", "numba.cuda"], error=error)
    assert status == 0
    assert "cuda missing: " in out
    assert "numpy available" in out
    assert "Traceback" not in err


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "rich"])
def test_demo_without_an_extra(package, tmp_path):
    output = tmp_path / "demo.png"
    status, out, err = run("demo", "--output", str(output), without=[package])
    assert (status, out) == (1, "")
    assert package in err and "pip install '.[demo]'" in err
    assert "Traceback" not in err
    assert not output.exists()


def test_demo_to_a_place_that_cannot_be_written(tmp_path):
    status, out, err = run("demo", "--output", str(tmp_path / "none" / "demo.png"))
    assert (status, out) == (1, "")
    assert "cannot write" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "demo.png"
    main(["demo", "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    out = capsys.readouterr().out
    assert str(output) in out
    assert max(map(len, out.replace(str(output), "").splitlines())) <= 80
    row = r"│ (\w+) +│ +(\w+) │ +([\d.]+) │ +([\d.]+)% │ +[\d.]+ µs │ +[\d.]+ µs │"
    rows = re.findall(row, out)
    assert [name for name, *_ in rows] == [
        *("gd", "dynamic_gd", "sgd", "rmsprop", "adam")
    ]
    assert all(float(accuracy) > 92 for *_, accuracy in rows)
    # What the picture's title says.
    loss = {
        batch: [float(r[2]) for r in rows if r[1] == batch] for batch in ("full", "64")
    }
    assert max(loss["64"]) < min(loss["full"])


def test_demo_repeats_itself():
    data = demo.digits()
    for run in demo.RUNS:
        first, second = (list(demo.train(run, demo.mlp(5), data, 2, 5)) for _ in "ab")
        assert first == second
        assert len(first) == 3 and first[-1] < first[0]


def test_gradient_of_the_network():
    rng = np.random.default_rng(0)
    x, y = rng.random((20, demo.INPUTS)), rng.integers(0, demo.CLASSES, 20)
    params = demo.mlp(1, np.float64)
    grads = params.zeros_like()
    demo.backward(params, grads, x, y)
    h = 1e-6
    for key in params.views:
        for i in rng.integers(0, params[key].size, 5):
            value, loss = params[key].flat[i], []
            for moved in (value + h, value - h):
                params[key].flat[i] = moved
                loss.append(demo.evaluate(params, x, y)[0])
            params[key].flat[i] = value
            slope = (loss[0] - loss[1]) / (2 * h)
            assert slope == pytest.approx(grads[key].flat[i], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", NAIVE)
def test_naive_steps_do_the_same(name):
    """What the demo and the benchmarks time is the same update."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=s).astype(np.float32) for s in ((3, 4), 5)]
    by_hand = [p.copy() for p in params]
    opt, naive = getattr(fastopt, name)(params), Naive(name, by_hand)
    for _ in range(20):
        grads = [rng.normal(size=p.shape).astype(np.float32) for p in params]
        opt.step(grads)
        naive.step(grads)
    for p, q in zip(params, by_hand, strict=True):
        assert q.dtype == np.float32
        np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-5)


def test_demo_refuses_to_time_different_updates(monkeypatch):
    monkeypatch.setitem(NAIVE, "gd", lambda p, g, state, t, lr: None)
    start = demo.mlp(0)
    grads = start.zeros_like()
    grads.data[:] = 1
    with pytest.raises(RuntimeError, match="differs from its NumPy version"):
        demo.compare(demo.RUNS[0], start, grads, bursts=1)
