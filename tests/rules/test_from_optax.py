"""docs/from_optax.md: what it calls the same is the same, in float64 over 40 steps, and
it mentions all of optax's optimizers."""

import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastopt

optax = pytest.importorskip("optax", reason="optax is not installed")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_optax.md").read_text(
    encoding="utf-8"
)
LR, STEPS = 0.03, 40


def rows(title):
    """The two columns of the table under a heading, without its head."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    pairs = re.findall(r"^\| `(.*)` \| `(.*)` \|$", text, re.M)
    assert len(pairs) > 3
    return pairs


def in_fours():
    batches = itertools.count(1)

    def step(opt, grads):
        opt.accumulate(grads, grad_scale=1 / 4)
        if next(batches) % 4 == 0:
            opt.step()

    return step


SAME = rows("The same numbers")
# What the table of transformations says: optax's side, and ours.
TRANSFORMED = {
    "clip(c)": (
        "optax.chain(optax.clip(0.5), optax.adam(LR))",
        lambda opt, grads: opt.step(grads, clip_value=0.5),
        lambda params: fastopt.adam(params, lr=LR),
    ),
    "add_decayed_weights(w)` before": (
        "optax.chain(optax.add_decayed_weights(.1), optax.adam(LR))",
        lambda opt, grads: opt.step(grads),
        lambda params: fastopt.adam(params, lr=LR, weight_decay=0.1),
    ),
    "add_decayed_weights(w)` after": (
        "optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(.1), "
        "optax.scale_by_learning_rate(LR))",
        lambda opt, grads: opt.step(grads),
        lambda params: fastopt.adamw(params, lr=LR, weight_decay=0.1),
    ),
    "add_decayed_weights(w, mask)": (
        "optax.adamw(LR, weight_decay=.1, mask=[True, False])",
        lambda opt, grads: opt.step(grads),
        lambda params: fastopt.adamw(
            params, lr=LR, weight_decay=0.1, weight_decay_mask=[True, False]
        ),
    ),
    "scale(s)": (
        "optax.chain(optax.scale(-1.), optax.adam(LR))",
        lambda opt, grads: opt.step(grads, grad_scale=-1),
        lambda params: fastopt.adam(params, lr=LR),
    ),
    "scale_by_trust_ratio` after": (
        "optax.chain(optax.scale_by_adam(eps=1e-6), optax.add_decayed_weights(.1), "
        "optax.scale_by_trust_ratio(), optax.scale_by_learning_rate(LR))",
        lambda opt, grads: opt.step(grads),
        lambda params: fastopt.lamb(params, lr=LR, weight_decay=0.1, always_adapt=True),
    ),
    "multi_transform` (`partition`)": (
        "optax.multi_transform({'a': optax.adam(LR), 'b': optax.adam(LR / 3)}, "
        "['a', 'b'])",
        lambda opt, grads: opt.step(grads),
        lambda params: fastopt.adam(
            [{"params": params[0]}, {"params": params[1], "lr": LR / 3}], lr=LR
        ),
    ),
    "masked`, `set_to_zero`": (
        "optax.multi_transform({'a': optax.adam(LR), 'b': optax.set_to_zero()}, "
        "['a', 'b'])",
        lambda opt, grads: opt.step([grads[0], None]),
        lambda params: fastopt.adam(params, lr=LR),
    ),
}
# As optax has it: close, for the reason that the page gives.
CLOSE = {
    "chain(clip_by_global_norm(c), ...)": (
        "optax.chain(optax.clip_by_global_norm(1.), optax.adam(LR))",
        lambda opt, grads: opt.step(grads, clip_norm=1.0),
    ),
    "MultiSteps(tx, k)": (
        "optax.MultiSteps(optax.adam(LR), 4).gradient_transformation()",
        in_fours(),
    ),
}
# The table of other definitions: not the same, and how far apart.
OTHERS = {
    "optax.rmsprop(LR)": "fastopt.rmsprop(params, lr=LR, alpha=0.9)",
    "optax.radam(LR)": "fastopt.radam(params, lr=LR)",
    "optax.amsgrad(LR)": "fastopt.amsgrad(params, lr=LR)",
    "optax.nadam(LR)": "fastopt.nadam(params, lr=LR)",
    "optax.adan(LR)": "fastopt.adan(params, lr=LR)",
    "optax.rprop(LR)": "fastopt.rprop(params, lr=LR)",
    "optax.lars(LR, weight_decay=.1)": "fastopt.lars(params, lr=LR, weight_decay=.1, "
    "eps=0., always_adapt=True)",
    "optax.contrib.dadapt_adamw(1.)": "fastopt.dadapt_adam(params)",
    "optax.contrib.madgrad(LR)": "fastopt.madgrad(params, lr=LR)",
}

PROGRAM = """
import json, sys
import numpy as np, jax, optax, optax.contrib
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
given = json.load(sys.stdin)
LR, found = given["lr"], {}
for call in given["calls"]:
    transform = eval(call)
    params = [jax.numpy.array(p) for p in given["params"]]
    state = transform.init(params)
    @jax.jit
    def advance(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state
    for grads in given["grads"]:
        params, state = advance(params, state, [jax.numpy.array(g) for g in grads])
    found[call] = [np.asarray(p).tolist() for p in params]
params = [jax.numpy.array(p) for p in given["params"]]
params = optax.LookaheadParams.init_synced(params)
transform = optax.lookahead(optax.adam(LR), 5, .5)
state = transform.init(params)
for grads in given["grads"]:
    updates = [jax.numpy.array(g) for g in grads]
    updates, state = transform.update(updates, state, params)
    params = optax.apply_updates(params, updates)
found["lookahead"] = [np.asarray(p).tolist() for p in params.slow]
schedules = {call: eval(call) for call in given["schedules"]}
values = {call: [float(f(n)) for n in range(40)] for call, f in schedules.items()}
print(json.dumps([found, values]))
"""


def draw():
    rng = np.random.default_rng(0)
    drawn = [[rng.normal(size=(4, 3)), rng.normal(size=5)] for _ in range(STEPS + 1)]
    return drawn[0], drawn[1:]


SCHEDULES = {
    "constant_schedule(0.1)": "constant(0.1)",
    "linear_schedule(0.1, 0.01, 20)": "linear(0.1, 20, 0.01)",
    "polynomial_schedule(0.1, 0.01, 2, 20)": "polynomial(0.1, 20, 2, 0.01)",
    "cosine_decay_schedule(0.1, 20, 0.2)": "cosine(0.1, 20, 0.2 * 0.1)",
    "warmup_cosine_decay_schedule(0.01, 0.1, 5, 20, 0.02)": (
        "warmup_cosine(0.1, 20, 5, 0.01, 0.02)"
    ),
    "exponential_decay(0.1, 5, 0.5)": "exponential(0.1, 0.5, 5)",
    "exponential_decay(0.1, 5, 0.5, staircase=True)": "step(0.1, 5, 0.5)",
    "piecewise_constant_schedule(0.1, {5: 0.5, 9: 0.5})": "multistep(0.1, [5, 9], 0.5)",
}


@pytest.fixture(scope="module")
def theirs():
    """The parameters after optax's steps, by the call, and the values of schedules."""
    params, grads = draw()
    calls = [call for call, _ in SAME]
    calls += [call for call, *_ in (*TRANSFORMED.values(), *CLOSE.values())]
    given = {
        "params": [p.tolist() for p in params],
        "grads": [[g.tolist() for g in each] for each in grads],
        "lr": LR,
        "calls": [*calls, *OTHERS],
        "schedules": [f"optax.{call}" for call in SCHEDULES],
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def difference(make, theirs, step=None):
    """The largest, relative to the largest parameter."""
    params, grads = draw()
    opt = make(params)
    for each in grads:
        (step or type(opt).step)(opt, each)
    pairs = zip(params, map(np.array, theirs), strict=True)
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


def called(call):
    return lambda params: eval(call, {"fastopt": fastopt, "LR": LR, "params": params})


@pytest.mark.parametrize("call, ours", SAME)
def test_what_is_called_the_same_is(call, ours, theirs):
    assert difference(called(ours), theirs[0][call]) <= 1e-10


@pytest.mark.parametrize("row", TRANSFORMED)
def test_transformations(row, theirs):
    assert f"| `{row}" in PAGE
    call, step, make = TRANSFORMED[row]
    assert difference(make, theirs[0][call], step) <= 1e-10


def test_lookahead(theirs):
    def make(params):
        return fastopt.Lookahead(fastopt.adam(params, lr=LR), k=5, alpha=0.5)

    assert STEPS % 5 == 0 and difference(make, theirs[0]["lookahead"]) <= 1e-10


@pytest.mark.parametrize("row", CLOSE)
def test_close_transformations(row, theirs):
    assert f"| `{row}" in PAGE
    call, step = CLOSE[row]
    made = difference(lambda p: fastopt.adam(p, lr=LR), theirs[0][call], step)
    assert 1e-12 < made <= 1e-7


@pytest.mark.parametrize("call", OTHERS)
def test_other_definitions_differ(call, theirs):
    name = re.match(r"optax\.((?:contrib\.)?\w+)", call)[1]
    table = PAGE.split("\n## Other definitions\n")[1].split("\n## ")[0]
    assert f"`{name}" in table
    made = difference(called(OTHERS[call]), theirs[0][call])
    assert made > 1e-10 and (name != "radam" or made < 1e-8)


def test_schedules(theirs):
    table = PAGE.split("\n## Schedules\n")[1].split("\n## ")[0]
    for call, ours in SCHEDULES.items():
        name, mine = call.partition("(")[0], ours.partition("(")[0]
        assert re.search(rf"^\| `{name}\(.*\| `{mine}\(", table, re.M)
        schedule = eval(f"fastopt.schedules.{ours}")
        values = [schedule(n) for n in range(40)]
        np.testing.assert_allclose(values, theirs[1][f"optax.{call}"], rtol=1e-12)


def test_every_optimizer_is_mentioned():
    """Whatever takes a learning rate, but the parts of a chain."""
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name, value in vars(module).items():
            if not inspect.isfunction(value) or name.startswith(("_", "scale_by")):
                continue
            if "learning_rate" in inspect.signature(value).parameters:
                assert re.search(rf"`(optax\.)?({prefix})?{name}\b", PAGE), name
