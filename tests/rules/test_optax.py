"""Optax agrees where it has a rule by the same definition and torch does not: 200
steps in float64, to a relative 1e-10.

JAX's default is float32, hence a process of its own.
"""

import json
import subprocess
import sys

import pytest
from peers import difference, draw, falling, told

import fastopt

pytest.importorskip("optax", reason="optax is not installed")

BETAS = {"beta1": 0.8, "beta2": 0.97}
ADAM = "b1=0.8, b2=0.97"
# Our rule and its hyperparameters; what optax calls it. Left out, because it differs:
# adan (multiplies by 1 - b2), radam (from 5 on, eps beside the corrected root), nadam
# (without the schedule), rprop (a step late), lars (lr inside the momentum).
CASES = {
    "signum": (
        {"beta": 0.8, "weight_decay": 0.1},
        "optax.chain(optax.ema(.8, debias=False), optax.scale_by_sign(), "
        "optax.add_decayed_weights(.1), optax.scale_by_learning_rate(LR))",
    ),
    "lion": (
        {**BETAS, "weight_decay": 0.1},
        f"optax.lion(LR, {ADAM}, weight_decay=.1)",
    ),
    "adabelief": (
        {**BETAS, "eps": 1e-6, "rectify": False},
        f"optax.adabelief(LR, {ADAM}, eps=1e-6, eps_root=1e-6)",
    ),
    "yogi": ({**BETAS, "eps": 1e-2}, f"optax.yogi(LR, {ADAM}, eps=1e-2)"),
    "adopt": (
        {**BETAS, "eps": 1e-3, "weight_decay": 0.1},
        "optax.chain(optax.add_decayed_weights(.1), "
        f"optax.contrib.adopt(LR, {ADAM}, eps=1e-3))",
    ),
    "adamax": ({**BETAS, "eps": 1e-3}, f"optax.adamax(LR, {ADAM}, eps=1e-3)"),
    "ademamix": (
        {**BETAS, "beta3": 0.99, "alpha": 3.0, "weight_decay": 0.1},
        f"optax.contrib.ademamix(LR, {ADAM}, b3=.99, alpha=3., weight_decay=.1)",
    ),
    "lamb": (
        {**BETAS, "weight_decay": 0.1, "always_adapt": True},
        f"optax.lamb(LR, {ADAM}, weight_decay=.1)",
    ),
    "novograd": (
        {**BETAS, "eps": 1e-3, "weight_decay": 0.1},
        f"optax.novograd(LR, {ADAM}, eps=1e-3, weight_decay=.1)",
    ),
    "prodigy": (
        {**BETAS, "use_bias_correction": True, "lr": 1.0, "d0": 1e-3},
        "optax.contrib.prodigy(lambda n: LR(n) / .03, betas=(.8, .97), estim_lr0=1e-3)",
    ),
    "schedule_free_sgd": (
        {"momentum": 0.9},
        "optax.contrib.schedule_free(optax.sgd(LR), LR, b1=.9)",
    ),
}
LR = 0.03

PROGRAM = """
import json, sys
import numpy as np, jax, optax, optax.contrib
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
given = json.load(sys.stdin)
rates = jax.numpy.array(given["lr"])
LR = lambda count: rates[count]
steps = [[jax.numpy.array(g) for g in grads] for grads in given["steps"]]
found = {}
for name, transform in given["transforms"].items():
    transform, found[name] = eval(transform), []
    params = [jax.numpy.array(p) for p in given["params"]]
    state = transform.init(params)
    @jax.jit
    def advance(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state
    for grads in steps:
        params, state = advance(params, state, grads)
        found[name].append([np.asarray(p).tolist() for p in params])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def optax():
    """The parameters after each step, for all cases."""
    params, steps = draw()
    given = {
        "params": [p.tolist() for p in params],
        "steps": [[g.tolist() for g in grads] for grads in steps],
        "lr": [falling(LR, t) for t in range(len(steps))],
        "transforms": {name: transform for name, (_, transform) in CASES.items()},
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_optax_agrees(name, optax):
    values, _ = CASES[name]
    rule = getattr(fastopt, name)
    assert difference(rule, {"lr": LR, **values}, optax[name]) <= 1e-10


def test_the_page_says_so():
    rows = told("test_optax")
    assert rows.keys() == CASES.keys()
    assert all("optax `" in row for row in rows.values())
