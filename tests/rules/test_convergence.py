"""The evidence that rules train networks: that it can fail, and is about what it says.

All rules, on all seeds, take minutes: `python bench/convergence.py`, run by hand.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from installed import needs_numba

import fastopt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def convergence(from_bench):
    return from_bench("convergence")


@pytest.fixture(autouse=True)
def console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(convergence, monkeypatch, capsys):
    """The script's exit status, output and messages, as if these were all rules."""

    def run(*arguments, rules):
        monkeypatch.setattr(fastopt, "RULES", rules)
        monkeypatch.setattr(convergence, "CLASSES", ())
        status = convergence.main(["--seeds", "1", "--backend", "numpy", *arguments])
        return status, *capsys.readouterr()

    return run


def scalars(t, lr=0.3):
    return (lr,)


def descend(p, g, lr):
    return (p - lr * g,)


def ascend(p, g, lr):
    return (p + lr * g,)


def test_rules_that_learn(run, tmp_path):
    path = tmp_path / "result.json"
    status, out, err = run("--json", str(path), rules=(fastopt.gd, fastopt.adam))
    assert (status, err) == (0, "")
    record = json.loads(path.read_text())
    assert record["backend"] == "numpy"
    assert record["targets"].keys() == {"digits", "characters"}
    done = {(r["task"], r["rule"]): r for r in record["results"]}
    assert len(done) == 4
    for (task, rule), result in done.items():
        (only,) = result["runs"]
        assert only["steps"] > 0 and only["loss"] <= record["targets"][task]
        assert only["seconds"] > 0 and only["error"] is None
        row = rf"{rule} +│ +{result['settings']['lr']:g} │ +{only['steps']} \("
        assert re.search(row, out)
    # The defaults are the rule's, and what differs from them is said.
    assert done["digits", "adam"]["settings"] == {"lr": 1e-3}


@needs_numba
@pytest.mark.parametrize("update", [ascend, descend])
def test_only_what_learns_passes(run, update):
    rule = fastopt.Rule(update, scalars, name="mine")
    status, out, err = run(rules=(rule, fastopt.gd))
    assert status == (update is ascend)
    assert ("not reached" in out) == ("not reached: mine, digits, seed 0" in err)
    assert ("not reached" in err) == (update is ascend)
    assert not re.search(r"gd .*not reached", out + err)


def test_a_rule_whose_numbers_overflow(run, convergence, monkeypatch, tmp_path):
    monkeypatch.setitem(convergence.SETTINGS, "gd", {"lr": 1e38})
    path = tmp_path / "result.json"
    status, out, err = run("--json", str(path), rules=(fastopt.gd,))
    assert status == 1
    assert re.search(r"gd +│ +1e\+38 │ not reached │ +1 of 1 seeds │ +nan", out)
    assert "not reached: gd, digits, seed 0: ended at a loss of nan" in err
    (only,) = json.loads(path.read_text())["results"][0]["runs"]
    assert only["steps"] is None and only["loss"] is None


def test_too_few_steps(run):
    status, _, err = run("--steps", "3", rules=(fastopt.adam,))
    assert status == 1
    assert re.search("not reached: adam, digits, seed 0: ended at a loss of 2", err)


def test_an_error_is_told_and_the_others_go_on(run, convergence, monkeypatch):
    monkeypatch.setitem(convergence.SETTINGS, "gd", {"learning_rate": 1.0})
    status, out, err = run(rules=(fastopt.gd, fastopt.rmsprop))
    assert status == 1
    assert re.search("not reached: gd, digits, seed 0: .*Error: .*learning_rate", err)
    assert "rmsprop" in out and "rmsprop" not in err


@pytest.mark.parametrize("arguments", [["--rules", "none"], ["--seeds", "0"]])
def test_bad_arguments_exit_2(convergence, arguments):
    with pytest.raises(SystemExit) as exit:
        convergence.main(arguments)
    assert exit.value.code == 2


def test_settings_are_hyperparameters_of_their_rule(convergence):
    rules = (*fastopt.RULES, *convergence.CLASSES)
    assert convergence.SETTINGS.keys() <= {rule.name for rule in rules}
    for rule in rules:
        for name, value in convergence.SETTINGS.get(rule.name, {}).items():
            assert value != rule.hyperparameters[name]


def test_classes_learn_too(convergence):
    task = convergence.digits()
    for optimizer in convergence.CLASSES:
        assert convergence.train(task, optimizer, 0, 3000, None).steps is not None


def test_the_loss_is_taken_where_the_rule_says(convergence):
    """At what it would use, such as an average, not at where gradients are taken."""

    def vanished(p, lr):
        return p - p

    task = convergence.digits()
    plain = fastopt.Rule(descend, scalars, name="plain")
    shown = fastopt.Rule(descend, scalars, name="shown", evaluate=vanished)
    assert convergence.train(task, plain, 0, 200, "numpy").steps is not None
    run = convergence.train(task, shown, 0, 200, "numpy")
    assert run.steps is None
    assert run.loss == pytest.approx(np.log(10))  # all classes are as likely


def test_an_estimate_every_ten_steps_from_drawn_labels(convergence, monkeypatch):
    def update(p, g, h, lr):
        return p - lr * g, h

    def estimate(h, g, lr):
        return (g,)

    def record(opt, grads):
        estimates[opt.steps] = grads["w1"].copy()

    task, estimates = convergence.digits(), {}
    of_h = "h", fastopt.Rule(estimate, scalars, name="of_h")
    rule = fastopt.Rule(update, scalars, state=("h",), name="mine", estimate=of_h)
    monkeypatch.setattr(fastopt.Optimizer, "estimate", record)
    convergence.train(task, rule, 0, 30, "numpy")
    assert list(estimates) == [0, 10, 20]  # completed steps

    params = convergence.first_weights(task, 0)
    grads = params.zeros_like()
    chosen = next(convergence.batches(len(task.y), convergence.BATCH, 0))
    convergence.backward(params, grads, task.x[chosen], task.y[chosen])
    assert grads["w1"].any() and not np.allclose(grads["w1"], estimates[0], rtol=0.1)


def test_batches_are_each_pass_a_permutation(convergence):
    first, second, other = (convergence.batches(10, 3, seed) for seed in (0, 0, 1))
    passes = [[next(b) for _ in range(6)] for b in (first, second, other)]
    assert np.array_equal(passes[0], passes[1])
    assert not np.array_equal(passes[0], passes[2])
    for begin in (0, 3):
        chosen = np.concatenate(passes[0][begin : begin + 3])
        assert len(set(chosen.tolist())) == 9 and set(chosen.tolist()) <= set(range(10))


def test_a_seed_is_the_same_weights_and_data_for_every_rule(convergence, monkeypatch):
    backward, task, seen = convergence.backward, convergence.digits(), []

    def watched(params, grads, x, y):
        seen[-1].append((params["w1"].copy(), x, y))
        backward(params, grads, x, y)

    monkeypatch.setattr(convergence, "backward", watched)
    for rule, seed in ((fastopt.gd, 5), (fastopt.adam, 5), (fastopt.gd, 6)):
        seen.append([])
        convergence.train(task, rule, seed, 30, "numpy")
    ours, theirs, others = seen
    assert np.array_equal(ours[0][0], theirs[0][0])
    assert not np.array_equal(ours[1][0], theirs[1][0])
    for mine, its in zip(ours, theirs, strict=True):
        assert all(map(np.array_equal, mine[1:], its[1:]))
    assert not any(map(np.array_equal, ours[0], others[0]))


def test_runs_repeat_themselves(convergence):
    task = convergence.characters()
    first, second, other = (
        convergence.train(task, fastopt.adam, seed, 20, "numpy").loss
        for seed in (3, 3, 4)
    )
    assert first == second != other


def test_gradients_of_the_networks(convergence):
    rng = np.random.default_rng(0)
    for task in (convergence.digits(), convergence.characters()):
        chosen = rng.integers(0, len(task.y), 20)
        x, y = task.x[chosen], task.y[chosen]
        params = convergence.first_weights(task, 1, np.float64)
        grads = params.zeros_like()
        convergence.backward(params, grads, x, y)
        h = 1e-6
        for key in params.views:
            # Those of symbols or pixels that do not occur are zero, and tell nothing.
            places = np.flatnonzero(grads[key])
            assert len(places) > 3
            for i in rng.choice(places, 4):
                value, loss = params[key].flat[i], []
                for moved in (value + h, value - h):
                    params[key].flat[i] = moved
                    loss.append(convergence.loss(params, x, y))
                params[key].flat[i] = value
                slope = (loss[0] - loss[1]) / (2 * h)
                assert slope == pytest.approx(grads[key].flat[i], rel=1e-6, abs=1e-8)
