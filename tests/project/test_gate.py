"""The regression gate's judgement, on times that are made up, and its sabotage.

That it catches a real slowdown is shown by `python bench/gate.py --self-test`, which
takes minutes and an idle machine, and so is run by hand.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gate(from_bench):
    return from_bench("gate")


@pytest.fixture
def machine(gate, monkeypatch):
    """Launches on an invented machine, whose placement of memory sways a process's
    times by so much, and where the tree takes so many times as long as the base."""

    def install(slowdown, noise, seed):
        rng = np.random.default_rng(seed)

        def launch(contender, case, builds, rounds):
            swayed = {name: rng.lognormal(0, noise) for name in builds}
            swayed["tree"] *= slowdown
            return {name: t / swayed["base"] for name, t in swayed.items()}

        monkeypatch.setattr(gate, "launch", launch)

    return install


def judge(gate, names=("adamw 1e3", "adamw 1e6")):
    cases = {name: gate.CASES[name] for name in names}
    return gate.compare(ROOT, ROOT, launches=10, rounds=5, cases=cases)


def test_a_slowdown_is_caught(gate, machine):
    for seed in range(20):
        machine(1.2, 0.015, seed)
        verdicts = judge(gate)
        assert all(v.slower for v in verdicts.values())
        assert gate.status(verdicts) == 1


def test_no_slowdown_is_no_alarm(gate, machine):
    for seed in range(100):
        machine(1.0, 0.03, seed)
        assert gate.status(judge(gate)) != 1


def test_a_speedup_is_no_alarm(gate, machine):
    machine(0.5, 0.01, 0)
    assert gate.status(judge(gate)) == 0


def test_a_machine_too_noisy_says_so(gate, machine):
    """Rather than that all is well."""
    machine(1.0, 0.3, 0)
    verdicts = judge(gate)
    assert all(v.blind for v in verdicts.values())
    assert gate.status(verdicts) == 2


def test_doubt_is_met_with_more_launches(gate, monkeypatch):
    made = []

    def launch(contender, case, builds, rounds):
        made.append(case.elements)
        again = 1.3 if case.elements == 1000 and len(made) % 2 else 1.0
        return {"base": 1.0, "base again": again, "tree": 1.0}

    monkeypatch.setattr(gate, "launch", launch)
    judge(gate)
    assert made.count(1000) == 20 and made.count(1_000_000) == 10


def test_the_order_of_the_builds_changes(gate, monkeypatch):
    orders = []

    def launch(contender, case, builds, rounds):
        orders.append(tuple(builds))
        return dict.fromkeys(builds, 1.0)

    monkeypatch.setattr(gate, "launch", launch)
    judge(gate, ["adamw 1e3"])
    assert len(set(orders)) == 3


def test_the_sabotage_fits_the_driver(gate, tmp_path):
    (tmp_path / "csrc").mkdir()
    driver = ROOT / "csrc" / "driver.pyx"
    shutil.copy(driver, tmp_path / "csrc")
    gate.slow_down(tmp_path, 1.2)
    text = (tmp_path / "csrc" / "driver.pyx").read_text()
    assert "begin + 1.2 * (now() - begin)" in text
    for call, slow in gate.CALLS.items():
        assert text.count(slow) == driver.read_text().count(call) > 0
    (tmp_path / "csrc" / "driver.pyx").write_text("something else")
    with pytest.raises(RuntimeError, match="change slow_down with it"):
        gate.slow_down(tmp_path, 1.2)


def test_a_real_launch(gate):
    """Three processes of the installed build; their times are nobody's business."""
    import fastopt

    built = Path(fastopt.__file__).parent.parent
    builds = {"base": built, "base again": built, "tree": built}
    found = gate.launch(*gate.CASES["adamw 1e3"], builds, rounds=1)
    assert found["base"] == 1.0 and set(found) == set(builds)


def test_the_tree_is_copied_as_it_is(gate, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    copied = gate.copy_of_tree(tmp_path)
    assert (copied / "csrc" / "driver.pyx").exists()
    assert not list(copied.glob("fastopt/*.so"))
