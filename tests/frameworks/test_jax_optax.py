"""as_optax: what every alias of optax does and is put into, every rule of ours does and
can be; and schedules and hyperparameters that are traced."""

import re

import numpy as np
import pytest

import fastopt
from fastopt import schedules
from fastopt.backends import cython_cpu

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp  # noqa: E402
from jax_trees import arrays, same, to_jax  # noqa: E402

import fastopt.jax as fj  # noqa: E402

NAMES = [rule.name for rule in fastopt.RULES]
# With a carry, sums of segments and of all, a start at the parameters, and without.
KINDS = ["sgd", "adamw", "nadam", "novograd", "prodigy", "schedule_free_adamw"]
SHAPES = {"w": (3, 2), "b": (2,), "scalar": (), "empty": (0, 2)}


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def transform(name, **values):
    values = {"lr": 0.0625, **values}
    if name == "sgd":
        values["momentum"] = 0.9
    return getattr(fj, name)(**values).as_optax()


def tree(seed):
    return to_jax(arrays(seed, shapes=SHAPES))


def run(opt, steps=3, params=None, **extra):
    """Parameters and state after compiled steps."""
    params = tree(0) if params is None else params
    state = opt.init(params)

    @jax.jit
    def advance(params, state, grads):
        updates, state = opt.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for k in range(steps):
        params, state = advance(params, state, tree(1 + k))
    return params, state


def near(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7)


# What every alias does ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_extra_arguments_are_ignored(name):
    opt = transform(name)
    assert isinstance(opt, optax.GradientTransformationExtraArgs)
    plain = run(opt)
    assert same(run(opt, value=jnp.float32(1.5), anything=[1, None]), plain)
    chained = optax.chain(opt, optax.identity())
    assert same(run(chained, value=1.0)[0], plain[0])


@pytest.mark.parametrize("name", KINDS)
def test_in_what_optax_wraps(name):
    """Each as by hand: chain, masked, multi_transform, MultiSteps, apply_if_finite."""
    opt = transform(name)
    plain, state = run(opt)
    assert same(run(optax.chain(opt))[0], plain)
    assert same(run(optax.apply_if_finite(opt, 2))[0], plain)
    params, grads = tree(0), tree(1)
    # A step that is not finite leaves state and parameters alone.
    wary = optax.apply_if_finite(opt, 2)
    bad = {**grads, "b": grads["b"] * np.nan}
    updates, after = jax.jit(wary.update)(bad, wary.init(params), params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert same(after.inner_state, opt.init(params))
    # The others are handed through.
    mask = {"w": True, "b": False, "scalar": True, "empty": True}
    some = {k: params[k] for k in params if mask[k]}
    gradients = {k: grads[k] for k in some}
    wanted, _ = opt.update(gradients, opt.init(some), some)
    masked = optax.masked(opt, mask)
    updates, _ = jax.jit(masked.update)(grads, masked.init(params), params)
    assert same(updates, {**grads, **wanted})
    labels = {k: "ours" if mask[k] else "none" for k in params}
    both = optax.multi_transform({"ours": opt, "none": optax.set_to_zero()}, labels)
    updates, _ = jax.jit(both.update)(grads, both.init(params), params)
    assert same(updates, {**jax.tree.map(jnp.zeros_like, grads), **wanted})
    # A step with the mean of two gradients.
    several = optax.MultiSteps(opt, 2)
    state = several.init(params)
    updates, state = jax.jit(several.update)(grads, state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    updates, state = jax.jit(several.update)(tree(2), state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, grads, tree(2))
    wanted, _ = opt.update(mean, opt.init(params), params)
    near(updates, wanted)


@pytest.mark.parametrize("name", KINDS)
def test_trees_of_state(name):
    """Structure, dtypes and shapes stay as they are, as lax.cond and scan need it, and
    optax's maps over the parameters in a state find them."""
    opt, params = transform(name), tree(0)
    state = opt.init(params)
    assert same(optax.tree_utils.tree_map_params(opt, lambda leaf: leaf, state), state)
    doubled = optax.tree_utils.tree_map_params(opt, lambda leaf: 2 * leaf, state)
    assert same(doubled.buffers, jax.tree.map(lambda leaf: 2 * leaf, state.buffers))
    assert same((doubled.count, doubled.carry), (state.count, state.carry))
    updates, new = jax.eval_shape(opt.update, params, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)

    def body(both, grads):
        updates, state = opt.update(grads, both[1], both[0])
        return (optax.apply_updates(both[0], updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(tree, (1, 2, 3)))
    scanned, _ = jax.jit(lambda both: jax.lax.scan(body, both, stacked))(
        (params, state)
    )
    assert same(scanned, run(opt))
    kept = jax.jit(
        lambda yes: jax.lax.cond(
            yes, lambda: opt.update(params, state, params), lambda: (params, state)
        )
    )
    assert same(kept(False), (params, state))


@pytest.mark.parametrize("name", ["adamw", "novograd", "prodigy"])
def test_other_trees(name):
    """No leaf, None in between, and a single array."""
    opt = transform(name)
    for params in ({}, [], {"a": None}):
        updates, state = opt.update(params, opt.init(params), params)
        assert updates == params and int(state.count) == 1
    params = {"a": None, "b": (jnp.ones(3), None)}
    updates, _ = opt.update(params, opt.init(params), params)
    alone, _ = opt.update([jnp.ones(3)], opt.init([jnp.ones(3)]), [jnp.ones(3)])
    assert same(updates, alone)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("dtype", ["complex64", "float8_e5m2", "int32", "bool"])
def test_other_dtypes_are_refused_by_name(dtype):
    opt, x = transform("adam"), jnp.ones(3)
    other = {"w": jnp.ones(3).astype(dtype)}
    with pytest.raises(TypeError, match=rf"params\['w'\] must be .* got {dtype}"):
        opt.init(other)
    for update in (opt.update, jax.jit(opt.update)):
        with pytest.raises(TypeError, match=rf"grads\['w'\] must be .* got {dtype}"):
            update(other, opt.init({"w": x}), {"w": x})


def test_on_a_mesh_of_one_device():
    """shard_map and pmap, each with a step of its own."""
    opt, params, grads = transform("lamb"), tree(0), tree(1)
    state = opt.init(params)
    wanted = jax.jit(opt.update)(grads, state, params)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("d",))
    spec = jax.sharding.PartitionSpec()
    if hasattr(jax, "shard_map"):
        mapped = jax.shard_map(
            opt.update, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        assert same(jax.jit(mapped)(grads, state, params), wanted)
    more = jax.tree.map(lambda leaf: leaf[None], (grads, state, params))
    got = jax.pmap(opt.update, devices=jax.devices("cpu")[:1])(*more)
    assert same(jax.tree.map(lambda leaf: leaf[0], got), wanted)


# lr=None ------------------------------------------------------------------------------

NOT_A_FACTOR = {"rprop", "asgd", "laprop", "madgrad", "ftrl", "adamc", "prodigy"}
NOT_A_FACTOR |= {"dadapt_adam", "schedule_free_sgd", "schedule_free_adamw"}
NOT_A_FACTOR |= {"schedule_free_radam"}


@pytest.mark.parametrize("name", NAMES)
def test_without_a_learning_rate(name):
    """Neither scaled nor negated, for what follows."""
    if name in NOT_A_FACTOR:
        with pytest.raises(TypeError, match=f"lr of {name} does more than scale"):
            transform(name, lr=None)
        return
    params = tree(0)
    opt = transform(name, lr=None)
    updates, _ = jax.jit(opt.update)(tree(1), opt.init(params), params)
    one = transform(name, lr=1.0)
    whole, _ = jax.jit(one.update)(tree(1), one.init(params), params)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(whole), strict=True):
        assert np.array_equal(a, -b)
    if name == "dog":  # which looks how far the parameters went
        return
    rate = optax.linear_schedule(0.1, 0.02, 3)
    for a, b in zip(
        jax.tree.leaves(run(optax.chain(opt, optax.scale_by_learning_rate(rate)))[0]),
        jax.tree.leaves(run(transform(name, lr=rate))[0]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (fj.adadelta(lr=None, eps=1e-6), optax.adadelta(None)),
        (fj.adam(lr=None, eps=1e-8), optax.adam(None)),
        (
            fj.lion(lr=None, beta2=0.99, weight_decay=0.1),
            optax.lion(None, weight_decay=0.1),
        ),
        (fj.sgd(lr=None, momentum=0.9), optax.sgd(None, momentum=0.9)),
    ],
    ids=["adadelta", "adam", "lion", "sgd"],
)
def test_without_a_learning_rate_as_optax(ours, theirs):
    states = [t.init(tree(0)) for t in (ours.as_optax(), theirs)]
    for k in range(3):
        updates = []
        for i, t in enumerate((ours.as_optax(), theirs)):
            update, states[i] = jax.jit(t.update)(tree(1 + k), states[i], tree(0))
            updates.append(update)
        for a, b in zip(*map(jax.tree.leaves, updates), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-5, atol=1e-5)


def test_without_a_learning_rate_a_step_needs_one():
    opt, params = fj.adam(lr=None), tree(0)
    state = opt.init(params)
    with pytest.raises(TypeError, match="lr is None, which leaves it to what follows"):
        opt.step(params, tree(1), state)
    got = opt.step(params, tree(1), state, lr=0.1)
    assert same(got, fj.adam(lr=0.1).step(params, tree(1), state))
    with pytest.raises(TypeError, match="lr must be a number, got None"):
        opt.step(params, tree(1), state, lr=None)
    with pytest.raises(TypeError, match="beta1 must be a number, got None"):
        fj.adam(beta1=None)
    sophia = fj.sophia_g(lr=None)
    estimated = sophia.estimate(tree(1), sophia.init(params))
    assert same(estimated, fj.sophia_g().estimate(tree(1), fj.sophia_g().init(params)))


# Hyperparameters that are traced ------------------------------------------------------


def numbers(name):
    """Those of a rule that may be injected, off their defaults."""
    rule = getattr(fastopt, name)
    fixed = fj.selecting(rule)
    values = {k: float(v) for k, v in rule.hyperparameters.items() if k not in fixed}
    return {**values, "lr": 0.0625}


@pytest.mark.parametrize("name", NAMES)
def test_injected_hyperparameters(name):
    """All numbers of every rule, in compiled steps; then one changes in the state."""
    values = numbers(name)
    narrow = {k: float(np.float32(v)) for k, v in values.items()}
    signature = ", ".join(values)
    scope = {"make": getattr(fj, name)}
    pairs = ", ".join(f"{k}={k}" for k in values)
    factory = eval(f"lambda {signature}: make({pairs}).as_optax()", scope)
    opt = optax.inject_hyperparams(factory)(**values)
    params, grads = tree(0), tree(1)
    state = jax.jit(opt.init)(params)
    assert set(state.hyperparams) == set(values)
    plain = getattr(fj, name)(**narrow).as_optax()
    before = plain.init(params)
    assert same(state.inner_state, before)
    updates, state = jax.jit(opt.update)(grads, state, params)
    wanted = jax.jit(plain.update)(grads, before, params)
    assert same((updates, state.inner_state), wanted)
    state.hyperparams["lr"] = jnp.float32(0.03125)
    updates, _ = jax.jit(opt.update)(grads, state, params)
    other = getattr(fj, name)(**{**narrow, "lr": 0.03125}).as_optax()
    assert same(updates, jax.jit(other.update)(grads, wanted[1], params)[0])


def test_injected_schedules_and_extra_arguments(x64):
    rate = schedules.warmup_cosine(0.1, 9, 3)
    opt = optax.inject_hyperparams(lambda lr: fj.adamw(lr=lr).as_optax())(lr=rate)
    assert same(run(opt, value=1.0)[0], run(transform("adamw", lr=rate))[0])


def test_what_selects_cannot_be_injected():
    opt = optax.inject_hyperparams(
        lambda lr, momentum: fj.sgd(lr=lr, momentum=momentum).as_optax()
    )(lr=0.1, momentum=0.9)
    with pytest.raises(TypeError, match="momentum selects .* name it in static_args"):
        jax.jit(opt.init)(tree(0))
    opt = optax.inject_hyperparams(
        lambda lr, momentum: fj.sgd(lr=lr, momentum=momentum).as_optax(),
        static_args="momentum",
    )(lr=0.0625, momentum=0.9)
    assert same(run(opt)[0], run(transform("sgd"))[0])


def test_hyperparameters_in_words_when_it_is_made():
    """All bits of a float64, for the start of a state, too."""

    def go(lr, d0):
        opt = fj.prodigy(lr=lr, d0=d0)
        params = tree(0)
        return opt.step(params, tree(1), opt.init(params))

    wanted = go(1 / 3, 1e-5 / 3)
    assert same(go(fj.exact(1 / 3), fj.exact(1e-5 / 3)), wanted)
    assert same(jax.jit(go)(fj.exact(1 / 3), fj.exact(1e-5 / 3)), wanted)

    def rprop(lr):
        return fj.rprop(lr=lr).init(tree(0))

    assert same(jax.jit(rprop)(fj.exact(1 / 3)), rprop(1 / 3))
    with pytest.raises(TypeError, match=r"lr must be a number, got float32\[2\]"):
        jax.jit(rprop)(jnp.ones(2))


def test_one_traced_out_of_its_range_is_an_error_when_it_runs():
    def go(beta1):
        opt = fj.adam(beta1=beta1)
        return opt.step(tree(0), tree(1), opt.init(tree(0)))

    with pytest.raises(jax.errors.JaxRuntimeError, match="out of its range"):
        jax.block_until_ready(jax.jit(go)(1.5))
    free, params = fj.schedule_free_sgd(), tree(0)
    state = free.init(params)

    def used(lr):
        return fj.schedule_free_sgd(lr=lr).eval_params(params, state)

    assert same(jax.jit(used)(fj.exact(0.5)), used(0.5))


# Schedules of ours --------------------------------------------------------------------

S = schedules
ALL = [
    S.constant(0.3),
    S.step(0.1, 3, 0.7),
    S.multistep(0.1, (2, 5), 0.3),
    S.exponential(0.1, 0.9, 3, begin=2, end=0.05),
    S.inverse_power(0.1, 0.3, 0.7),
    S.inverse_sqrt(0.1, 4),
    S.polynomial(0.1, 9, 1.7, 0.01),
    S.linear(0.1, 9, 0.01, 2),
    S.cosine(0.1, 9, 0.01, 1.3),
    S.warmup_cosine(0.1, 9, 3, 0.02),
    S.cosine_restarts(0.1, 2, 2),
    S.onecycle(0.1, 10),
    S.cyclic(0.01, 0.1, 2, 3, "exp_range", 0.9),
    S.wsd(0.1, 9, 4, 2, shape="1-sqrt"),
    S.join([S.linear(0.0, 3, end=0.1), S.cosine(0.1, 5)], [3]),
    S.product(
        [S.warmup_cosine(0.1, 9, 3), S.join([S.constant(1.0), S.step(1.0, 2)], [4])]
    ),
]


def test_all_schedules_are_here():
    kinds = {
        kind
        for kind in vars(schedules).values()
        if isinstance(kind, type) and issubclass(kind, schedules.Schedule)
    }
    assert {type(schedule) for schedule in ALL} == kinds - {schedules.Schedule}


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_schedules_where_the_step_is_traced(schedule):
    """All bits outside, which float32 rounds; in a step, all of them."""
    compiled = jax.jit(schedule)
    for t in (-1, 0, 1, 4, 11):
        got = compiled(t)
        assert got.dtype == jnp.float32 and got.shape == ()
        assert got == np.float32(schedule(t))
    steps = np.arange(12).reshape(3, 4)
    assert same(compiled(steps), schedule(steps).astype("f"))
    assert same(jax.jit(jax.vmap(schedule))(steps), schedule(steps).astype("f"))
    assert compiled(2.5) == np.float32(schedule(2.5))
    params, start = tree(0), arrays(0, shapes=SHAPES)
    opt = fj.adamw(lr=schedule, weight_decay=S.linear(0.3, 5))
    python = fastopt.adamw(
        start, lr=schedule, weight_decay=S.linear(0.3, 5), backend="numpy"
    )
    state = opt.init(params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(tree, range(1, 7)))

    def body(both, grads):
        return opt.step(both[0], grads, both[1]), None

    scanned, _ = jax.jit(lambda both: jax.lax.scan(body, both, stacked))(
        (params, state)
    )
    step = jax.jit(opt.step)
    for k in range(6):
        params, state = step(params, tree(1 + k), state)
        python.step(arrays(1 + k, shapes=SHAPES))
    assert same(params, start) and same(scanned, (params, state))


def test_with_x64_a_traced_schedule_has_all_its_bits(x64):
    for schedule in ALL:
        got = jax.jit(schedule)(7)
        assert got.dtype == jnp.float64 and float(got) == schedule(7)


def test_schedules_of_several_kinds():
    """Those of others are traced; ours with them, too."""
    others = optax.exponential_decay(1.0, 3, 0.5)
    for schedule in (
        S.join([optax.linear_schedule(0.0, 0.1, 4), S.cosine(0.1, 3), others], [4, 6]),
        S.product([S.cosine(0.1, 9), others, optax.constant_schedule(0.5)]),
        S.product([S.join([others, S.constant(0.5)], [2]), S.linear(1.0, 9)]),
    ):
        steps = np.arange(12)
        got = jax.jit(schedule)(steps)
        np.testing.assert_allclose(got, schedule(steps), rtol=1e-6, atol=1e-9)
        assert jax.jit(schedule)(-3) == got[0]
        assert np.isfinite(run(transform("adam", lr=schedule))[0]["w"]).all()
    theirs = optax.adam(S.cosine(0.1, 5))  # and ours in what is optax's
    assert same(
        run(theirs)[0], run(optax.adam(lambda n: jax.jit(S.cosine(0.1, 5))(n)))[0]
    )


def test_steps_of_a_schedule_that_are_no_numbers():
    for steps in (jnp.array(True), jnp.ones(2, jnp.complex64)):
        with pytest.raises(TypeError, match="steps must be numbers, got"):
            jax.jit(S.cosine(0.1, 5))(steps)
    with pytest.raises(Exception, match=re.escape("steps must be finite")):
        jax.block_until_ready(jax.jit(S.cosine(0.1, 5))(np.float32(np.nan)))
