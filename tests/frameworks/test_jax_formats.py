"""fastopt.jax over arrays of 16 bits, held to the bits of the core, whose formats are
tested in tests/kernels/test_formats.py."""

import functools

import numpy as np
import pytest
from cases import STORED, bfloat16, nonzero, same_bits, special_values

import fastopt
from fastopt.backends import cython_cpu

jax = pytest.importorskip("jax", reason="JAX is not installed")
if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp  # noqa: E402
from jax_trees import same, to_jax  # noqa: E402

import fastopt.jax as fj  # noqa: E402

# Dtypes of a parameter and of its gradients.
PAIRS = STORED | {
    "bf16, fp16 gradients": (bfloat16, np.float16),
    "bf16, float32 gradients": (bfloat16, np.float32),
    "plain": (np.float32, np.float32),
}
SIZES = (0, 1, 7, 4097)
# Decoded in registers and in blocks, with norms of each array and of all, with a carry,
# and with a start at the parameters and at a hyperparameter.
KINDS = {
    "adamw": {"weight_decay": 0.1},
    "sgd": {"momentum": 0.9},
    "lion": {},
    "lamb": {},
    "novograd": {},
    "prodigy": {},
    "schedule_free_adamw": {},
    "adagrad": {"initial_accumulator_value": 0.1},
}


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def drawn(seed, which, pairs=PAIRS, sizes=SIZES):
    """A tree of parameters (0) or gradients (1): a list of arrays for each pair. JAX
    sorts the keys of dicts."""
    rng = np.random.default_rng(seed)
    return {
        kind: [nonzero(rng, n, dtypes[which]) for n in sizes]
        for kind, dtypes in sorted(pairs.items())
    }


def of_core(rule, values, steps=3, **drawing):
    """Parameters and optimizer of NumPy's backend after some steps."""
    params = drawn(0, 0, **drawing)
    opt = rule(params, backend="numpy", **values)
    for k in range(steps):
        opt.step(drawn(1 + k, 1, **drawing))
    return params, opt


def check(params, state, expected, python):
    assert same(params, expected)
    for name, buffers in state.buffers.items():
        assert same(jax.tree.leaves(buffers), python.state[name])
    carried = [] if state.carry is None else np.asarray(state.carry).view(np.float64)
    assert np.array_equal(np.ravel(carried), python._bound.program.carried.reshape(-1))


@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_same_bits(rule):
    """Of every rule, with parameters and gradients of all dtypes in one tree."""
    values = {"lr": 0.03, **KINDS.get(rule.name, {})}
    opt = fj.optimizer(rule, **values)
    params = to_jax(drawn(0, 0))
    state = opt.init(params)
    step = jax.jit(opt.step, donate_argnums=(0, 2))
    for k in range(3):
        params, state = step(params, to_jax(drawn(1 + k, 1)), state)
    check(params, state, *of_core(rule, values))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", KINDS)
def test_same_bits_of_one_pair_and_several_threads(name, kind):
    """Not compiled, with NumPy's arrays; and compiled, in a loop."""
    drawing = {"pairs": {kind: PAIRS[kind]}, "sizes": (40_003, 0, 307)}
    values = {"lr": 0.03, **KINDS[name]}
    expected = of_core(getattr(fastopt, name), values, **drawing)
    opt = getattr(fj, name)(threads=2, **values)
    start = drawn(0, 0, **drawing)
    params, state = start, opt.init(start)
    for k in range(3):
        params, state = opt.step(params, drawn(1 + k, 1, **drawing), state)
    assert same(start, drawn(0, 0, **drawing))
    check(params, state, *expected)
    grads = [drawn(1 + k, 1, **drawing) for k in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

    def body(both, g):
        return opt.step(both[0], g, both[1]), None

    loop = jax.jit(lambda both: jax.lax.scan(body, both, stacked)[0])
    assert same(loop((to_jax(start), opt.init(start))), (params, state))


@pytest.mark.parametrize("dtype", [bfloat16, np.float16])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "schedule_free_sgd"])
def test_infinities_subnormals_and_nan(name, dtype):
    p, g = special_values(dtype)
    opt = getattr(fj, name)(lr=0.1)
    params = to_jax(p)  # a copy, because p is stepped below
    params, state = jax.jit(opt.step)(params, to_jax(g), opt.init(params))
    with np.errstate(all="ignore"):
        python = getattr(fastopt, name)(p, lr=0.1, backend="numpy")
        python.step(g)
    assert same_bits(np.asarray(params), p)
    for key, buffers in state.buffers.items():
        assert same_bits(np.asarray(buffers), python.state[key][0])


@pytest.mark.parametrize("pair", STORED.values(), ids=STORED)
def test_factors_that_are_not_finite_are_refused(pair, x64):
    opt = fj.adamw()
    params, grads = (to_jax(np.ones(3, dtype)) for dtype in pair)
    step, state = jax.jit(opt.step), opt.init(params)
    for factor in (np.nan, np.inf, -np.inf, 1e39):
        with pytest.raises(jax.errors.JaxRuntimeError, match="must be finite in float"):
            jax.block_until_ready(step(params, grads, state, grad_scale=factor))
    plain = to_jax(np.ones(3, np.float32))
    new, _ = step(plain, plain, opt.init(plain), grad_scale=np.nan)
    assert np.isnan(np.asarray(new)).all()


def test_beside_float64(x64):
    """As if those that are computed in float64 had an optimizer of their own."""
    pairs = PAIRS | {"wide": (np.float64, np.float64)}
    drawing = {"pairs": pairs}
    for name in ("adamw", "novograd"):
        opt = getattr(fj, name)(lr=0.03)
        params = to_jax(drawn(0, 0, **drawing))
        state = opt.init(params)
        for k in range(3):
            grads = to_jax(drawn(1 + k, 1, **drawing))
            params, state = jax.jit(opt.step)(params, grads, state)
        for only in (PAIRS.keys(), {"wide"}):
            start = {kind: drawn(0, 0, **drawing)[kind] for kind in only}
            python = getattr(fastopt, name)(start, lr=0.03, backend="numpy")
            for k in range(3):
                python.step({kind: drawn(1 + k, 1, **drawing)[kind] for kind in only})
            assert same({kind: params[kind] for kind in only}, start)
    with pytest.raises(TypeError, match="computed in one dtype, but .* float32 and fl"):
        fj.prodigy().init(params)


@pytest.mark.parametrize("dtype", [bfloat16, np.float16])
def test_gradients_of_another_dtype_are_not_rounded(dtype):
    opt, params = fj.sgd(lr=2.0**20), jnp.ones(5000, dtype)
    grads = jnp.full(5000, 2.0**-20 + 2.0**-32)  # of 13 bits
    new, _ = jax.jit(opt.step)(params, grads, opt.init(params))
    assert same(new, np.full(5000, -(2.0**-12), dtype))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_nothing_is_copied_beside_a_donated_step(name, kind):
    opt = getattr(fj, name)(lr=0.1)
    param, grad = (jnp.ones((300, 300), dtype) for dtype in PAIRS[kind])
    state = opt.init(param)
    step = jax.jit(opt.step, donate_argnums=(0, 2)).lower(param, grad, state).compile()
    assert step.memory_analysis().temp_size_in_bytes < 1000
    before = [x.unsafe_buffer_pointer() for x in (param, *state.buffers.values())]
    new, state = step(param, grad, state)
    after = [x.unsafe_buffer_pointer() for x in (new, *state.buffers.values())]
    assert before == after and new.dtype == PAIRS[kind][0]


def test_state_is_float32():
    params = {"a": jnp.ones(5, bfloat16), "b": jnp.ones(3, np.float16)}
    opt = fj.schedule_free_adamw()
    state = opt.init(params)
    _, state = opt.step(params, params, state)
    for leaf in jax.tree.leaves(state.buffers):
        assert leaf.dtype == np.float32
    alone = fj.adam(lr=0.5)
    scalar = bfloat16(0.75)  # of ml_dtypes, not of JAX
    new, _ = alone.step(scalar, scalar, alone.init(scalar))
    assert new == 0.25 and new.dtype == bfloat16


def test_vmap_and_grad():
    opt = fj.adamw(lr=0.1)
    params, grads = drawn(0, 0, sizes=(9,)), drawn(1, 1, sizes=(9,))
    many = [
        jax.tree.map(lambda a: jnp.stack([a, -a, 2 * a]), t) for t in (params, grads)
    ]
    states = jax.vmap(opt.init)(many[0])
    new, _ = jax.jit(jax.vmap(opt.step))(*many, states)
    alone, _ = opt.step(params, grads, opt.init(params))
    assert same(jax.tree.map(lambda a: a[0], new), alone)
    x = jnp.ones(3, bfloat16)
    with pytest.raises(ValueError, match="`fastopt_step` cannot be differentiated"):
        jax.grad(lambda x: opt.step(x, x, opt.init(x))[0].sum())(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_parameters_to_evaluate(compiled):
    values = {"lr": 0.03}
    _, python = of_core(fastopt.schedule_free_sgd, values)
    opt = fj.schedule_free_sgd(**values)
    params = to_jax(drawn(0, 0))
    state = opt.init(params)
    for k in range(3):
        params, state = opt.step(params, to_jax(drawn(1 + k, 1)), state)
    evaluate = jax.jit(opt.eval_params) if compiled else opt.eval_params
    used = evaluate(params, state)
    assert same(used, python.eval_params()) and not same(used, params)


def test_estimates():
    """Their gradients may be of 16 bits, or wider than those of the step."""
    opt = fj.sophia_g(lr=0.1)
    params, start = to_jax(drawn(0, 0)), drawn(0, 0)
    python = fastopt.sophia_g(start, lr=0.1, backend="numpy")
    state = opt.init(params)
    wide = jax.tree.map(lambda a: a.astype(np.float32), drawn(2, 1))
    for grads in (drawn(1, 1), wide):
        state = jax.jit(opt.estimate)(to_jax(grads), state)
        python.estimate(grads)
        params, state = jax.jit(opt.step)(params, to_jax(drawn(3, 1)), state)
        python.step(drawn(3, 1))
    check(params, state, start, python)


# optax --------------------------------------------------------------------------------


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, np.float32), tree)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_updates_are_taken_before_parameters_are_rounded(name, compiled):
    """Rounded once, to the dtype of parameter and gradient, as optax' own have it."""
    optax = pytest.importorskip("optax", reason="optax is not installed")
    opt = getattr(fj, name)(lr=0.03, **KINDS[name])
    transform = opt.as_optax()
    params, grads = to_jax(drawn(0, 0)), to_jax(drawn(1, 1))
    state = transform.init(params)
    assert same(state, opt.init(params))
    update = jax.jit(transform.update) if compiled else transform.update
    updates, after = update(grads, state, params)
    new, expected = opt.step(wide(params), grads, state)
    assert same(after, expected)
    moved = jax.tree.map(lambda a, b: a - b, new, wide(params))
    kinds = jax.tree.map(
        lambda p, g: jnp.promote_types(p.dtype, g.dtype), params, grads
    )
    assert same(updates, jax.tree.map(lambda u, dtype: u.astype(dtype), moved, kinds))
    applied = optax.apply_updates(params, updates)
    stepped, _ = opt.step(params, grads, state)
    for a, b in zip(*map(jax.tree.leaves, (applied, stepped)), strict=True):
        assert a.dtype == b.dtype
        eps = 2 * float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(*wide((a, b)), rtol=eps, atol=eps)


def test_updates_that_are_lost_in_the_parameter():
    """They are there for what follows in a chain."""
    optax = pytest.importorskip("optax", reason="optax is not installed")
    params = jnp.full(9, 100, bfloat16)
    grads = jnp.linspace(-1, 1, 9, dtype=bfloat16)
    opt = fj.adamw(lr=0.01, weight_decay=0.0)
    new, _ = opt.step(params, grads, opt.init(params))
    assert same(new, params)
    lr = optax.scale_by_learning_rate(0.01)
    for transform in (
        opt.as_optax(),
        optax.chain(fj.adamw(lr=None, weight_decay=0.0).as_optax(), lr),
    ):
        updates, _ = transform.update(grads, transform.init(params), params)
        assert updates.dtype == bfloat16
        wanted = -0.01 * np.sign(np.linspace(-1, 1, 9))
        np.testing.assert_allclose(wide(updates), wanted, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb", "prodigy"])
def test_in_what_optax_wraps(name):
    """Dtypes stay as they are in loops and conditions."""
    optax = pytest.importorskip("optax", reason="optax is not installed")
    pairs = {"a": (bfloat16, bfloat16), "b": (np.float32, np.float32)}
    take = functools.partial(drawn, pairs=pairs, sizes=(0, 5, 33))
    opt = getattr(fj, name)(lr=0.03, **KINDS[name]).as_optax()
    for wrapped in (
        optax.chain(optax.clip_by_global_norm(1.0), opt, optax.scale(0.5)),
        optax.apply_if_finite(opt, 2),
        optax.masked(opt, {"a": True, "b": False}),
        optax.multi_transform({"x": opt, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
        optax.inject_hyperparams(
            lambda lr: getattr(fj, name)(lr=lr, **KINDS[name]).as_optax()
        )(lr=0.03),
        optax.MultiSteps(opt, 2),
    ):
        params = to_jax(take(0, 0))
        grads = [take(1 + k, 1) for k in range(4)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

        def body(both, grads, wrapped=wrapped):
            updates, state = wrapped.update(grads, both[1], both[0])
            for update, grad in zip(
                *map(jax.tree.leaves, (updates, grads)), strict=True
            ):
                assert update.dtype == grad.dtype
            return (optax.apply_updates(both[0], updates), state), None

        (new, _), _ = jax.lax.scan(body, (params, wrapped.init(params)), stacked)
        for a, b in zip(*map(jax.tree.leaves, (new, params)), strict=True):
            assert a.dtype == b.dtype and np.isfinite(wide(a)).all()
        assert not same(new["a"], params["a"]) or name == "prodigy"  # moves too little


def test_close_to_optax():
    """optax in float32, over the same numbers."""
    optax = pytest.importorskip("optax", reason="optax is not installed")
    theirs = optax.adamw(0.03, weight_decay=0.1)
    ours = fj.adamw(lr=0.03, weight_decay=0.1).as_optax()
    params = to_jax(drawn(0, 0))
    states = ours.init(params), theirs.init(wide(params))
    for k in range(4):
        grads = to_jax(drawn(1 + k, 1))
        got, mine = ours.update(grads, states[0], params)
        wanted, other = theirs.update(wide(grads), states[1], wide(params))
        states = mine, other
        for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            # Of the difference, one place of the parameter in float32.
            eps = float(jnp.finfo(a.dtype).eps)
            np.testing.assert_allclose(wide(a), b, rtol=eps, atol=1e-5)


# What is refused ----------------------------------------------------------------------


def test_refusals(x64):
    opt = fj.adamw()
    narrow = {"w": jnp.ones((2, 3), bfloat16)}
    state = opt.init(narrow)
    plain = {"w": jnp.ones((2, 3), jnp.float64)}
    fit = "it must be float32 or bfloat16 or float16, of shape .2, 3."
    for do in (
        lambda: opt.step(narrow, plain, state),
        lambda: jax.jit(opt.step)(narrow, plain, state),
        lambda: opt.as_optax().update(plain, state, narrow),
    ):
        with pytest.raises(
            ValueError,
            match=r"grads\['w'\] is float64.2, 3. but params\['w'\] is bfl.*" + fit,
        ):
            do()
    with pytest.raises(ValueError, match=r"is bfloat16.* float64.2, 3.; it must be fl"):
        opt.step(plain, narrow, opt.init(plain))
    for grads in ({"w": jnp.ones((3, 2), bfloat16)}, {"w": jnp.ones(6, np.float16)}):
        with pytest.raises(ValueError, match=r"but params\['w'\] is bfloat16.2, 3."):
            opt.step(narrow, grads, state)
    for kind in (jnp.float8_e4m3fn, jnp.int16, jnp.uint16, jnp.complex64):
        other = {"w": jnp.ones((2, 3), kind)}
        for change in ({"params": other}, {"grads": other}):
            arguments = {"params": narrow, "grads": narrow, "state": state} | change
            (name,) = change
            with pytest.raises(
                TypeError,
                match=rf"{name}\['w'\] must be an array of float32, float64, bfloat16 "
                rf"or float16, got {jnp.dtype(kind)}",
            ):
                opt.step(**arguments)


@pytest.mark.parametrize("kind", [bfloat16, np.float16])
def test_state_of_16_bits_is_refused(kind, x64):
    """As a checkpoint may bring it that casts all leaves."""
    opt, params = fj.adamw(), {"w": jnp.ones((2, 3), bfloat16)}
    state = opt.init(params)
    for dtype, error in ((kind, TypeError), (np.float64, ValueError)):
        cast = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), state.buffers)
        with pytest.raises(error, match=r"state.buffers\['m'\]\['w'\] .*float32"):
            opt.step(params, params, state._replace(buffers=cast))
