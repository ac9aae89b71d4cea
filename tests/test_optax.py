"""Optax agrees where it has a rule by the same definition and torch does not: 200
steps in float64, to a relative 1e-10.

JAX's default is float32, hence a process of its own.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

import fastopt

pytest.importorskip("optax", reason="optax is not installed")

BETAS = {"beta1": 0.8, "beta2": 0.97}
ADAM = "b1=0.8, b2=0.97"
# Our rule and its hyperparameters; what optax calls it. Left out, because it differs:
# adan (multiplies by 1 - b2), radam (from 5 on, eps beside the corrected root), nadam
# (without the schedule), novograd (other moments), rprop (a step late).
CASES = {
    "lion": (
        {**BETAS, "weight_decay": 0.1},
        f"optax.lion(LR, {ADAM}, weight_decay=.1)",
    ),
    "adabelief": (
        {**BETAS, "eps": 1e-6, "rectify": False},
        f"optax.adabelief(LR, {ADAM}, eps=1e-6, eps_root=1e-6)",
    ),
    "yogi": ({**BETAS, "eps": 1e-2}, f"optax.yogi(LR, {ADAM}, eps=1e-2)"),
    "adamax": ({**BETAS, "eps": 1e-3}, f"optax.adamax(LR, {ADAM}, eps=1e-3)"),
    "ademamix": (
        {**BETAS, "beta3": 0.99, "alpha": 3.0, "weight_decay": 0.1},
        f"optax.contrib.ademamix(LR, {ADAM}, b3=.99, alpha=3., weight_decay=.1)",
    ),
    "lamb": (
        {**BETAS, "weight_decay": 0.1, "always_adapt": True},
        f"optax.lamb(LR, {ADAM}, weight_decay=.1)",
    ),
    "lars": (
        {"momentum": 0.8, "weight_decay": 0.0, "eps": 0.0, "always_adapt": True},
        "optax.lars(LR, momentum=.8)",
    ),
    "prodigy": (
        {**BETAS, "use_bias_correction": True, "lr": 1.0, "d0": 1e-3},
        "optax.contrib.prodigy(1., betas=(.8, .97), estim_lr0=1e-3)",
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
LR = float(sys.argv[2])
transform = eval(sys.argv[1])
rng = np.random.default_rng(0)
params = [jax.numpy.array(rng.standard_normal(s)) for s in ((3, 5), (7,))]
state = transform.init(params)
@jax.jit
def advance(params, state, grads):
    updates, state = transform.update(grads, state, params)
    return optax.apply_updates(params, updates), state
for _ in range(200):
    grads = [jax.numpy.array(rng.standard_normal(p.shape)) for p in params]
    params, state = advance(params, state, grads)
print(json.dumps([np.asarray(p).tolist() for p in params]))
"""


@pytest.mark.parametrize("name", CASES)
def test_optax_agrees(name):
    values, transform = CASES[name]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, transform, str(LR)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(s) for s in ((3, 5), (7,))]
    opt = getattr(fastopt, name)(params, **{"lr": LR, **values})
    for _ in range(200):
        opt.step([rng.standard_normal(p.shape) for p in params])
    for ours, theirs in zip(params, json.loads(done.stdout), strict=True):
        np.testing.assert_allclose(ours, np.array(theirs), rtol=1e-10, atol=1e-13)
