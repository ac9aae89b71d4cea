"""fastopt.jax: the bits of fastopt's own steps, in place, without tracing again; and
what optax composes."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, IDS

import fastopt
from fastopt.backends import cython_cpu

jax = pytest.importorskip("jax", reason="JAX is not installed")
if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp  # noqa: E402
from jax_trees import SHAPES, arrays, same, to_jax  # noqa: E402

import fastopt.jax as fj  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def compare(rule, values, dtype=np.float32, shapes=SHAPES, steps=4, threads=None):
    """Steps of both kinds of optimizer; parameters, state and carry."""
    # Two dimensions at the least, so that NumPy keeps arrays of them.
    ours = fj.optimizer(rule, threads=threads, **values)
    python = rule(start := arrays(0, dtype, shapes), backend="numpy", **values)
    params = to_jax(arrays(0, dtype, shapes))
    state = ours.init(params)
    step = jax.jit(ours.step, donate_argnums=(0, 2))
    for k in range(steps):
        grads = arrays(1 + k, dtype, shapes)
        python.step(grads)
        params, state = step(params, to_jax(grads), state)
    assert same(params, start)
    for name, buffers in state.buffers.items():
        assert same(jax.tree.leaves(buffers), python.state[name])
    carried = [] if state.carry is None else np.asarray(state.carry).view(np.float64)
    assert np.array_equal(np.ravel(carried), python._bound.program.carried.reshape(-1))
    assert int(state.count) == steps
    return ours, params, state, python


@pytest.mark.parametrize("rule, values", CASES, ids=IDS)
def test_same_bits(rule, values):
    compare(rule, values)


@pytest.mark.parametrize("name", ["adamw", "nadam", "lamb", "prodigy"])
def test_same_bits_in_float64_and_of_several_threads(name, x64):
    for dtype in (np.float32, np.float64):
        shapes = {"w": (40_003,), "b": (307,)}
        compare(getattr(fastopt, name), {"lr": 0.01}, dtype, shapes, threads=2)


@pytest.mark.parametrize("name", ["adamw", "nadam", "novograd", "gd"])
def test_dtypes_may_be_mixed(name, x64):
    """As if each had an optimizer of its own."""
    trees = [arrays(k) | {"d": arrays(k, np.float64)} for k in range(4)]
    opt = getattr(fj, name)(lr=0.01)
    params, step = to_jax(trees[0]), jax.jit(opt.step)
    state = opt.init(params)
    for grads in trees[1:]:
        params, state = step(params, to_jax(grads), state)
    halves = [{k: v for k, v in tree.items() if k != "d"} for tree in trees]
    for which in (halves, [tree["d"] for tree in trees]):
        python = getattr(fastopt, name)(which[0], lr=0.01)
        for grads in which[1:]:
            python.step(grads)
    assert same({k: v for k, v in params.items() if k != "d"}, halves[0])
    assert same(params["d"], trees[0]["d"])


def test_rules_over_all_parameters_need_one_dtype(x64):
    params = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.float32)}
    with pytest.raises(
        TypeError, match="prodigy takes sums over all .* float32 and fl"
    ):
        fj.prodigy().init(params)


# Under jit ----------------------------------------------------------------------------


def test_ten_learning_rates_are_traced_once():
    opt, traces = fj.adamw(weight_decay=0.1), 0

    @jax.jit
    def step(params, grads, state, lr):
        nonlocal traces
        traces += 1
        return opt.step(params, grads, state, lr=lr)

    lrs = np.geomspace(1e-3, 1e-1, 10).tolist()
    grads = arrays(1)
    for exact in (True, False):
        traces = 0
        params = to_jax(arrays(0))
        state = opt.init(params)
        python = fastopt.adamw(start := arrays(0), weight_decay=0.1, backend="numpy")
        for lr in lrs:
            given = fj.exact(lr) if exact else lr
            params, state = step(params, to_jax(grads), state, given)
            python.lr = lr if exact else float(np.float32(lr))
            python.step(grads)
        assert traces == 1
        assert same(params, start)
    # Not in a compiled function, Python's numbers keep all their bits.
    params, state = to_jax(arrays(0)), opt.init(to_jax(arrays(0)))
    python = fastopt.adamw(start := arrays(0), weight_decay=0.1, backend="numpy")
    for lr in lrs:
        params, state = opt.step(params, to_jax(grads), state, lr=lr)
        python.lr = lr
        python.step(grads)
    assert same(params, start)


def test_with_x64_a_traced_learning_rate_has_all_its_bits(x64):
    opt, step = fj.adamw(), jax.jit(fj.adamw().step)
    params = to_jax(arrays(0))
    params, _ = step(params, to_jax(arrays(1)), opt.init(params), lr=1 / 3)
    fastopt.adamw(start := arrays(0), lr=1 / 3).step(arrays(1))
    assert same(params, start)


def test_a_schedule_is_traced_once():
    traces = []

    def schedule(count):
        traces.append(count)
        return 0.1 / (1 + count)

    opt = fj.adamw(lr=schedule)
    assert traces == [0]  # to see whether it is good
    step = jax.jit(opt.step)
    params, state = to_jax(arrays(0)), opt.init(to_jax(arrays(0)))
    traces.clear()
    python = fastopt.adamw(
        start := arrays(0),
        lr=lambda n: float(np.float32(0.1) / np.float32(1 + n)),
        backend="numpy",
    )
    for k in range(5):
        params, state = step(params, to_jax(arrays(1 + k)), state)
        python.step(arrays(1 + k))
    assert len(traces) == 1
    assert same(params, start)


def test_grad_scale():
    opt = fj.adam(lr=0.1)
    params = to_jax(arrays(0))
    state = opt.init(params)
    step = jax.jit(opt.step)
    new, _ = step(params, to_jax(arrays(1)), state, grad_scale=-0.25)
    python = fastopt.adam(start := arrays(0), lr=0.1)
    python.step(arrays(1), grad_scale=-0.25)
    assert same(new, start)


def pointers(params, state):
    leaves = [*jax.tree.leaves(params), *jax.tree.leaves(state.buffers)]
    return [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]


def test_donated_it_is_in_place_and_else_the_old_ones_stay():
    opt = fj.adamw(lr=0.1)
    params, grads = to_jax(arrays(0)), to_jax(arrays(1))
    state = opt.init(params)
    kept, _ = jax.jit(opt.step)(params, grads, state)
    assert same(params, arrays(0)) and int(state.count) == 0
    before = pointers(params, state)
    new, state = jax.jit(opt.step, donate_argnums=(0, 2))(params, grads, state)
    assert pointers(new, state) == before
    assert same(new, kept)


def test_a_start_at_the_parameters_is_another_memory():
    """Or both could not be donated."""
    compare(fastopt.schedule_free_sgd, {"lr": 0.1})


def test_scan_and_vmap():
    opt = fj.nadam(lr=0.1)
    grads = [to_jax(arrays(1 + k)) for k in range(3)]
    params = to_jax(arrays(0))
    one = (params, opt.init(params))
    for g in grads:
        one = opt.step(one[0], g, one[1])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

    def body(both, g):
        return opt.step(both[0], g, both[1]), None

    scanned, _ = jax.jit(
        lambda: jax.lax.scan(body, (params, opt.init(params)), stacked)
    )()
    assert same(scanned, one)
    # Three models at once, each with a gradient of its own.
    states = jax.vmap(lambda _: opt.init(params))(jnp.arange(3))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params)
    found, _ = jax.jit(jax.vmap(opt.step))(many, stacked, states)
    for k, g in enumerate(grads):
        alone, _ = opt.step(params, g, opt.init(params))
        assert same(jax.tree.map(lambda leaf, k=k: leaf[k], found), alone)


def test_it_cannot_be_differentiated():
    opt, x = fj.gd(), jnp.ones(3)

    def loss(x):
        return opt.step(x, x, opt.init(x))[0].sum()

    with pytest.raises(ValueError, match="`fastopt_step` cannot be differentiated"):
        jax.grad(loss)(x)


def test_two_calls_at_a_time():
    """Each has its own parallel regions, in threads of XLA's."""
    code = """
import threading, jax, jax.numpy as jnp, numpy as np, fastopt, fastopt.jax
opt = fastopt.jax.adamw(lr=0.1, threads=2)
step = jax.jit(opt.step, donate_argnums=(0, 2))
results = {}
def run(k):
    params = {"a": jnp.full(100_000, 1.0 + k), "b": jnp.full((300, 300), 2.0)}
    state = opt.init(params)
    for _ in range(200):
        params, state = step(params, jax.tree.map(jnp.cos, params), state)
    results[k] = np.asarray(params["a"])
threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
both = dict(results)
for k in range(4):
    run(k)
    assert np.array_equal(results[k], both[k]), k
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_state_is_a_pytree_of_arrays():
    """So checkpoints of any kind take it: here through NumPy's arrays."""
    opt, params = fj.nadam(lr=0.1), to_jax(arrays(0))
    params, state = opt.step(params, to_jax(arrays(1)), opt.init(params))
    leaves, tree = jax.tree.flatten(state)
    saved = [np.asarray(leaf) for leaf in leaves]
    resumed = jax.tree.unflatten(tree, map(jnp.asarray, saved))
    grads = to_jax(arrays(2))
    assert same(opt.step(params, grads, state), opt.step(params, grads, resumed))


def test_parameters_to_evaluate():
    """Inside jit and outside, the bits of NumPy's."""
    opt, params, state, python = compare(fastopt.schedule_free_adamw, {"lr": 0.1})
    expected = python.eval_params()
    assert same(opt.eval_params(params, state), expected)
    assert same(jax.jit(opt.eval_params)(params, state), expected)
    assert not same(params, expected)
    assert fj.adamw().eval_params(params, state) is params


def test_estimates():
    opt = fj.sophia_g(lr=0.1)
    params = to_jax(arrays(0))
    python = fastopt.sophia_g(start := arrays(0), lr=0.1, backend="numpy")
    state = jax.jit(opt.estimate)(to_jax(arrays(1)), opt.init(params))
    python.estimate(arrays(1))
    params, state = jax.jit(opt.step)(params, to_jax(arrays(2)), state)
    python.step(arrays(2))
    assert same(params, start)
    assert same(jax.tree.leaves(state.buffers["h"]), python.state["h"])
    with pytest.raises(TypeError, match="adamw does not use estimates"):
        fj.adamw().estimate(params, state)


# optax --------------------------------------------------------------------------------


def run_optax(transform, steps=20):
    from optax import apply_updates

    params = to_jax(arrays(0))
    state = transform.init(params)

    @jax.jit
    def advance(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return apply_updates(params, updates), state

    for k in range(steps):
        params, state = advance(params, state, to_jax(arrays(1 + k)))
    return params


def test_optax_agrees_and_composes(x64):
    optax = pytest.importorskip("optax", reason="optax is not installed")
    given = {"weight_decay": 0.1, "eps": 1e-6}
    schedule = optax.cosine_decay_schedule(0.03, 60)
    for lr, around in (
        (0.03, lambda t: t),
        (schedule, lambda t: optax.chain(optax.clip_by_global_norm(1.0), t)),
        (0.03, lambda t: optax.chain(t, optax.scale(0.5))),
        (0.03, lambda t: optax.masked(t, dict.fromkeys(SHAPES, True) | {"w": False})),
        (schedule, lambda t: optax.MultiSteps(t, 2)),
    ):
        got = run_optax(around(fj.adamw(lr=lr, **given).as_optax()))
        expected = run_optax(around(optax.adamw(lr, **given)))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_updates_are_the_new_less_the_old():
    pytest.importorskip("optax", reason="optax is not installed")
    opt = fj.lamb(lr=0.1)
    transform, params, grads = opt.as_optax(), to_jax(arrays(0)), to_jax(arrays(1))
    updates, state = transform.update(grads, transform.init(params), params)
    new, expected = opt.step(params, grads, opt.init(params))
    assert same(updates, jax.tree.map(lambda a, b: a - b, new, params))
    assert same(state, expected)
    with pytest.raises(ValueError, match="lamb needs the parameters"):
        transform.update(grads, state)


# What is refused ----------------------------------------------------------------------


def test_refusals_when_made():
    mine = fastopt.Rule(
        lambda p, g, lr: (p - lr * g,), lambda t, lr=0.1: (lr,), name="m"
    )
    with pytest.raises(TypeError, match="m has no compiled kernels, which fastopt.jax"):
        fj.optimizer(mine)
    with pytest.raises(
        TypeError, match="adamw has no hyperparameter 'beta'; it has lr"
    ):
        fj.adamw(beta=0.9)
    with pytest.raises(ValueError, match="beta1 must be in .0, 1., got 1.0"):
        fj.adamw(beta1=1.0)
    with pytest.raises(ValueError, match="lr.0. must be at least 0"):
        fj.adamw(lr=lambda n: -1.0)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        fj.sgd(nesterov=True)
    with pytest.raises(TypeError, match="momentum selects what is compiled"):
        fj.sgd(momentum=lambda n: 0.9)
    with pytest.raises(ValueError, match="threads must be from 1 to"):
        fj.adamw(threads=0)
    with pytest.raises(AttributeError, match="fastopt.jax' has no attribute 'adamv'"):
        fj.adamv  # noqa: B018


def test_refusals_when_traced():
    opt = fj.sgd(momentum=0.9)
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    state = opt.init(params)
    with pytest.raises(TypeError, match=r"params\['w'\] must be an array of .* int32"):
        opt.init({"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(
        TypeError, match="must be an array of float32, .* or float16, got float8_e4m3fn"
    ):
        opt.init(jnp.ones(3, jnp.float8_e4m3fn))
    with pytest.raises(TypeError, match="params must be an array of .* got float"):
        opt.init(1.0)
    with pytest.raises(ValueError, match="grads has the structure"):
        opt.step(params, {"w": jnp.ones(3)}, state)
    with pytest.raises(
        ValueError, match=r"grads\['b'\] is float32.3. but params\['b'\] is"
    ):
        opt.step(params, {"w": jnp.ones(3), "b": jnp.ones(3)}, state)
    with pytest.raises(ValueError, match="state.buffers.'momentum_buffer'..'w'. is"):
        opt.step(params, params, opt.init({**params, "w": jnp.ones(4)}))
    with pytest.raises(
        TypeError, match="momentum selects what is compiled; give it to"
    ):
        opt.step(params, params, state, momentum=0.5)
    with pytest.raises(TypeError, match="sgd has no hyperparameter 'beta'"):
        opt.step(params, params, state, beta=0.5)
    with pytest.raises(ValueError, match="lr must be at least 0, got -1.0"):
        opt.step(params, params, state, lr=-1.0)


def test_refusals_when_run():
    """What is traced is checked by the kernels."""
    opt = fj.adamw()
    x = jnp.ones(3)
    step = jax.jit(opt.step)
    message = (
        "fastopt: adamw: a hyperparameter is out of its range, or the rule refuses"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(step(x, x, opt.init(x), lr=-1.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(step(x, x, opt.init(x), grad_scale=1.0, beta2=1.5))
    assert np.all(np.isfinite(step(x, x, opt.init(x), lr=1.0)[0]))  # and it works again


def test_another_device_is_refused(monkeypatch):
    x, opt = jnp.ones(3), fj.adamw()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    opt.step(x, x, opt.init(x))  # arrays that are on the CPU
    with pytest.raises(ValueError, match="is on gpu, but fastopt.jax works on the CPU"):
        jax.jit(opt.step)(x, x, opt.init(x))
    with jax.default_device(jax.devices("cpu")[0]):
        jax.jit(opt.step)(x, x, opt.init(x))


# The page ----------------------------------------------------------------------------


def test_the_page():
    pytest.importorskip("optax", reason="optax is not installed")
    page = (ROOT / "docs" / "jax.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    code = "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(blocks) >= 2 and done.returncode == 0, done.stderr


def test_the_docstrings():
    import doctest

    result = doctest.testmod(fj)
    assert result.attempted >= 5 and not result.failed
