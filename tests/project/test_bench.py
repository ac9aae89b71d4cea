"""fastopt bench: that the contenders do the same update, and the figures mean what
they say. No test asserts a time."""

import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from installed import NUMBA
from rich.console import Console

import fastopt
from fastopt.__main__ import main
from fastopt.bench import cases, contender, measure, pictures, report
from fastopt.bench.contender import Case, Unavailable
from fastopt.bench.measure import Measured, Timing, Worker

TINY = Case("adamw", {}, 2, 5)

# Cases --------------------------------------------------------------------------------


def test_every_rule_and_variant_has_cases():
    names = [rule.name for rule in fastopt.RULES]
    found = cases.cases(names, [10], [(3, 4)])
    plain = [case for case in found if not case.asked]
    assert len(plain) == 2 * sum(1 + len(rule.variants) for rule in fastopt.RULES)
    for name in names:
        asked = [case.asked for case in found if case.asked and case.rule == name]
        assert asked == [each for each in cases.ASKED.get(name, ()) for _ in range(2)]
    for case in found:
        rule = getattr(fastopt, case.rule)
        rule(np.ones(3), backend="numpy", **case.hyperparameters).step(np.ones(3))
    titles = [cases.title(case) for case in found[::2]]
    assert titles == list(dict.fromkeys(titles))
    assert {"sgd", "sgd (momentum)", "rmsprop (centered, momentum)"} <= set(titles)


def test_bytes_moved():
    def moved(**switches):
        return cases.bytes_moved(Case("rmsprop", switches, 2, 10))

    assert moved() == 20 * 20  # 4 bytes: p, v read and written, g read
    assert moved(momentum=0.9, centered=True) == 36 * 20


# The same update ----------------------------------------------------------------------

# Some steps of one contender after another, all in one process because libraries take
# long to import, and not in this one because they would stay.
AGREE = """
import json, sys
import numpy as np
import fastopt
from fastopt.bench.contender import *
done = []
for name in sys.argv[1:]:
    for case in map(lambda c: Case(**c), json.loads(sys.stdin.readline())):
        try:
            contender = CONTENDERS[name](case)
        except Unavailable:
            continue
        # Of gradients that stay the same, Adam makes the same steps for all betas.
        for _ in range(5):
            contender.step()
            for i in range(case.tensors):
                contender.grads[i] *= -0.7
        params, grads = list(normal(case, PARAMS)), list(normal(case, GRADS))
        opt = getattr(fastopt, case.rule)(
            params, backend="numpy", **case.hyperparameters
        )
        for _ in range(5):
            opt.step(grads)
            for grad in grads:
                grad *= -0.7
        for p, q in zip(contender.params(), params, strict=True):
            np.testing.assert_allclose(
                p, q, rtol=1e-4, atol=1e-4, err_msg=f"{name}, {case}"
            )
        done.append(f"{name} {case.rule}")
print(*done, sep="\\n")
"""
# Hyperparameters that peers have other defaults for, or that they could drop.
OTHERS = [
    Case("adamw", {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2}, 2, 5),
    Case("adam", {"lr": 0.1, "beta1": 0.8, "eps": 0.01}, 1, 9),
]
PEERS = {
    "fastopt": ["fastopt", "fastopt arrays", "fastopt C", "fastopt numba"],
    "numpy": ["naive NumPy"],
    "torch": [
        *("fastopt torch", "fastopt torch, flat", "torch fused", "torch foreach"),
        *("torch loop", "torch fused, huge pages"),
    ],
    "timm": ["timm"],
    "deepspeed": ["DeepSpeed"],
    "optax": ["optax"],
    "jax": ["fastopt jax"],
    "bitsandbytes": ["bitsandbytes"],
}


@pytest.mark.parametrize("package", PEERS)
def test_they_do_the_same_update(package):
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")
    names = [name for name in PEERS[package] if NUMBA or "numba" not in name]
    some = cases.cases([rule.name for rule in fastopt.RULES], [], [(2, 5)])
    # A hand-written update takes what it knows.
    some += [] if package == "numpy" else OTHERS
    # Five steps of 1e-3 would hide a wrong one.
    some = [
        Case(c.rule, {"lr": 0.1} | c.hyperparameters, c.tensors, c.elements)
        for c in some
    ]
    line = json.dumps(list(map(asdict, some))) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", AGREE, *names],
        input=line * len(names),
        capture_output=True,
        text=True,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        rule = "lamb" if name == "timm" else "adam"
        assert f"{name} {rule}" in done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_they_do_the_same_update_of_16_bits(dtype):
    """Up to the last place of the parameters, and what bfloat16 leaves of averages."""
    pytest.importorskip("torch")
    case = Case("adamw", {"lr": 0.1}, 2, 5000, dtype=dtype)
    names = "fastopt", "fastopt arrays", "fastopt torch", "torch fused"
    params = {}
    for name in (*names, "fastopt, bf16 state"):
        made = contender.CONTENDERS[name](case)
        for _ in range(3):
            made.step()
        params[name] = np.concatenate(made.params()).astype(np.float32)
    for name in names[:3]:
        np.testing.assert_array_equal(params[name], params["fastopt"])
    if dtype == "float16":  # in which torch's average of small squares is 0
        del params["torch fused"]
    for name, values in params.items():
        np.testing.assert_allclose(values, params["fastopt"], 2**-6, 2**-6, name)


def test_other_dtypes_are_said():
    case = Case("adamw", {}, 1, 10, dtype="bfloat16")
    assert cases.title(case) == "adamw, bfloat16"
    assert cases.bytes_moved(case) == (3 * 2 + 8 * 2) * 10
    for name in ("optax", "fastopt C", "naive NumPy"):
        with pytest.raises(Unavailable, match="not measured with bfloat16"):
            contender.CONTENDERS[name](case)
    with pytest.raises(Unavailable, match="torch's state is float32"):
        contender.CONTENDERS["fastopt, bf16 state"](TINY)


# The protocol -------------------------------------------------------------------------


@pytest.fixture
def start():
    started = []

    def start(name, **options):
        started.append(Worker(name, **options))
        return started[-1]

    yield start
    for worker in started:
        worker.close(3)


def test_a_contender_answers(start):
    worker = start("fastopt")
    assert worker.ask("prepare", case=asdict(TINY))["seconds"] > 0
    assert worker.ask("burst")["seconds"] > 0
    about = worker.ask("about")
    assert about["versions"]["fastopt"] == fastopt.__version__
    assert not any("/" in name for name in about["OpenMP"])
    assert worker.ask("drop") == {}
    with pytest.raises(RuntimeError, match="wanted prepare, then burst"):
        worker.ask("burst")


def test_what_a_contender_does_not_have(start):
    worker = start("naive NumPy")
    with pytest.raises(Unavailable, match="nobody wrote this by hand"):
        worker.ask("prepare", case=asdict(Case("amsgrad", {}, 1, 3)))
    with pytest.raises(Unavailable, match="has no rule newest"):
        start("fastopt").ask("prepare", case=asdict(Case("newest", {}, 1, 3)))
    assert worker.ask("prepare", case=asdict(TINY))  # it goes on


def test_an_error_reaches_the_parent(start):
    case = asdict(Case("adamw", {"lr": -1.0}, 1, 3))
    with pytest.raises(RuntimeError, match="(?s)'fastopt' failed.*lr must be at least"):
        start("fastopt").ask("prepare", case=case)


def test_the_death_of_a_contender_is_told(start, tmp_path):
    (tmp_path / "numba.py").write_text("import os; os._exit(7)")
    with pytest.raises(RuntimeError, match="'fastopt numba' ended with status 7"):
        start("fastopt numba", build=tmp_path).ask("about")


def test_libraries_may_print_and_be_absent(start, tmp_path):
    """What they print is no reply; a library that is broken is left out."""
    (tmp_path / "jax.py").write_text("print('hello')\nimport os; os.write(1, b'{}')")
    (tmp_path / "optax.py").write_text("raise ImportError('built for another jax')")
    worker = start("optax", build=tmp_path)
    for _ in range(2):
        with pytest.raises(Unavailable, match="built for another jax; pip install"):
            worker.ask("about")


# Memory and statistics ----------------------------------------------------------------


def test_batches_that_fit_into_memory():
    needed = {"fastopt": 4, "a": 3, "b": 3, "c": 2, "d": 12}
    found, too_large = measure.batches(needed, 10)
    assert found == [["fastopt", "a", "b"], ["fastopt", "c"]]
    assert list(too_large) == ["d"] and "needs" in too_large["d"]
    assert measure.batches(needed, 100) == ([list(needed)], {})
    assert measure.batches(needed, 1)[0] == []


def test_what_does_not_fit_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(measure, "memory_available", lambda: 1000.0)
    workers = dict.fromkeys(["fastopt", "floor"])  # which are not asked
    result = measure.measure(Case("adamw", {}, 1, 1000), workers, 2)
    assert result.timings == {} and "may be used" in result.missing["floor"]


def test_memory_of_temporaries_is_counted():
    case = Case("adamw", {}, 2, 100)
    assert measure.memory_needed("fastopt", case) == 4 * 4 * 200
    assert measure.memory_needed("torch loop", case) == 3 * 4 * 4 * 200
    assert 2**20 < measure.memory_available()


def test_the_interval_of_a_median():
    assert measure.interval([2.0] * 9) == (2.0, 2.0)
    rng = np.random.default_rng(1)
    few, many = (rng.lognormal(0, 0.3, n).tolist() for n in (15, 400))
    for ratios in (few, many):
        low, high = measure.interval(ratios)
        assert low <= np.median(ratios) <= high
        assert measure.interval(ratios) == (low, high)
    assert np.ptp(measure.interval(many)) < np.ptp(measure.interval(few))
    # 95 of 100 times the true median, which is 1, lies inside; here, of 200.
    inside = [measure.interval(rng.lognormal(0, 0.3, 15)) for _ in range(200)]
    assert sum(low <= 1 <= high for low, high in inside) >= 180


def test_ratios_are_taken_within_a_round():
    class Scripted:
        def __init__(self, seconds):
            self.seconds = iter(seconds)

        def ask(self, do, **_):
            return {"seconds": next(self.seconds)} if do == "burst" else {}

    # The machine gets slower and slower; the other is always twice as slow.
    workers = {"fastopt": Scripted([1, 10, 100]), "floor": Scripted([2, 20, 200])}
    ticks = []
    result = measure.measure(TINY, workers, 3, lambda: ticks.append(1))
    assert result.timings["floor"] == Timing(20.0, 2.0, (2.0, 2.0))
    assert result.timings["fastopt"] == Timing(10.0, 1.0, (1.0, 1.0))
    assert len(ticks) == 6


# What is shown ------------------------------------------------------------------------


def invented(rule="adamw", sizes=(1000, 100_000)):
    return [
        Measured(
            Case(rule, {}, 1, size),
            {
                "fastopt": Timing(1e-9 * size, 1.0, (1.0, 1.0)),
                "floor": Timing(0.7e-9 * size, 0.7, (0.6, 0.8)),
                "torch fused": Timing(0.9e-9 * size, 0.9, (0.85, 0.95)),
                "optax": Timing(25e-9 * size, 25.0, (24.0, 26.0)),
            },
            {"DeepSpeed": "it does not"},
        )
        for size in sizes
    ]


def text_of(table, **options):
    console = Console(file=StringIO(), width=120, **options)
    console.print(table)
    return console.file.getvalue()


def test_the_table_marks_losses():
    (table,) = report.tables(invented(), width=120)
    plain = text_of(table)
    assert re.search(r"fastopt +│ +1.0 µs │ +100.0 µs", plain)
    assert re.search(r"torch fused +│ +0.90 │ +0.90", plain)
    assert "0.85–0.95" in plain and "28.0 GB/s" in plain
    colored = text_of(table, force_terminal=True, color_system="standard")
    assert "\x1b[1;31m0.90" in colored
    assert "\x1b[1;31m0.70" not in colored  # the floor
    assert len(report.tables(invented(), width=50)) == 2


def test_the_readmes_table():
    many = Measured(Case("adamw", {}, 3, 1000), {"fastopt": Timing(0.002, 1.0, (1, 1))})
    assert report.markdown([*invented(sizes=[1000]), many]).split("\n") == [
        "| elements | fastopt | floor | torch fused | optax |",
        "|--:|--:|--:|--:|--:|",
        "| 1,000 | 1.0 µs | 0.70 | **0.90** | 25.0 |",
        "| 3 × 1,000 | 2.0 ms | – | – | – |",
    ]


def test_results_come_back_from_json(tmp_path):
    written = report.Report({"cpu": "a"}, 3, {"optax": "why"}, invented())
    path = tmp_path / "bench.json"
    report.write(written, path)
    assert report.read(path) == written
    assert json.loads(path.read_text())["measured"][0]["bytes"] == 28_000
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99.*measure again"):
        report.read(path)


def test_remarks_say_who_is_missing():
    skipped = Measured(Case("gd", {}, 1, 10), {}, {"floor": "needs 2 GiB"})
    found = report.Report({}, 3, {"optax": "why"}, [*invented(), skipped])
    assert report.remarks(found) == [
        "optax left out: why",
        "adamw without DeepSpeed: it does not",
        "gd 10 skipped",
        "gd, 10 without floor: needs 2 GiB",
    ]


def test_the_pictures(tmp_path):
    both = [*invented("sgd", [10]), *invented()]
    assert {m.case.rule for m in pictures.shown(both)} == {"adamw"}
    paths = pictures.save(both, tmp_path)
    names = [f"{n}.{s}" for n in ("time", "roofline") for s in ("png", "svg")]
    assert [path.name for path in paths] == names
    first = [path.read_bytes() for path in paths]
    assert all(len(data) > 10_000 for data in first)
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]
    pictures.save(both, tmp_path)
    assert [path.read_bytes() for path in paths] == first
    assert pictures.save([], tmp_path) == []
    assert pictures.LINES.keys() == contender.CONTENDERS.keys()


def test_labels_keep_apart():
    places = pictures.spread([0.5, 0.51, 0.5, 0.99, 1.0, 0.0], 0.05)
    assert np.diff(sorted(places)).min() > 0.049
    assert 0 <= min(places) and max(places) <= 1
    assert pictures.spread([0.2, 0.6], 0.05) == [0.2, 0.6]


# The command --------------------------------------------------------------------------

COMMAND = ["--rules", "sgd", "--sizes", "100", "--tensors", "3x10", "--rounds", "2"]


def test_the_command(tmp_path, capsys):
    output = tmp_path / "found"
    arguments = [*COMMAND, "--against", "naive NumPy", "--output", str(output)]
    main(["bench", *arguments])
    found = report.read(output / "bench.json")
    assert [cases.title(m.case) for m in found.measured] == [
        *["sgd"] * 2,
        *["sgd (momentum)"] * 2,
    ]
    for measured in found.measured:
        assert set(measured.timings) == {"fastopt", "floor", "naive NumPy"}
    assert found.machine["versions"]["numpy"] == np.__version__
    assert len(list(output.iterdir())) == 5
    out = capsys.readouterr().out
    for part in ("measured on", "sgd (momentum)", "3 x 10", "naive NumPy", "GB/s"):
        assert part in out
    # A fingerprint of the machine, and not of its owner.
    text = (output / "bench.json").read_text()
    assert platform.node() not in text and str(Path.home()) not in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rules", "nonsense"], "invalid choice: 'nonsense'"),
        (["--sizes", "0"], "must be an integer >= 1"),
        (["--sizes", "1e-3"], "must be an integer >= 1"),
        (["--tensors", "100"], "such as 100x1000"),
        (["--rounds", "0"], "must be an integer >= 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_refusals_before_measuring(tmp_path):
    with pytest.raises(SystemExit, match="unknown contender 'torch'; .*'torch fused'"):
        main(["bench", "--against", "torch"])
    with pytest.raises(SystemExit, match="cannot write to .*: No such file"):
        main(["bench", "--output", str(tmp_path / "none" / "there")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_an_interrupt_leaves_no_process_behind(tmp_path):
    command = [sys.executable, "-m", "fastopt", "bench", *COMMAND[:-1], "100000"]
    command += ["--against", "naive NumPy", "--output", str(tmp_path)]
    bench = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores the signal, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")

    def wait_for(condition):
        patience = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < patience
            time.sleep(0.05)

    wait_for(lambda: len(children.read_text().split()) == 3)
    workers = children.read_text().split()
    time.sleep(1)  # in the middle of it
    bench.send_signal(signal.SIGINT)
    _, messages = bench.communicate(timeout=20)
    assert bench.returncode == 130
    assert messages.strip() == "fastopt bench: interrupted; nothing is written"
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
