"""The tests of fastopt.jax on four devices, which test_jax_shards.py runs in a process
of its own: JAX makes its devices when it starts, and other tests have one."""

import functools
import re

import numpy as np
import pytest
from cases import CASES, IDS, bfloat16, nonzero

import fastopt

jax = pytest.importorskip("jax", reason="JAX is not installed")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from jax_trees import same  # noqa: E402

import fastopt.jax as fj  # noqa: E402

DEVICES = jax.devices("cpu")
PAIR = Mesh(np.array(DEVICES[:2]), ("x",))
SQUARE = Mesh(np.array(DEVICES).reshape(2, 2), ("x", "y"))
# Arrays of all dtypes: their shapes, and the axes over which they are sharded.
TREE = {
    "f32": ((6, 7), np.float32, P("x")),
    "f64": ((4,), np.float64, P("x")),
    "bf16": ((2, 3, 2), bfloat16, P(None, None, "x")),
    "f16": ((10, 1), np.float16, P("x")),
    "empty": ((0, 2), np.float32, P("x")),
    "whole": ((5,), np.float32, P()),
    "scalar": ((), np.float64, P()),
}
QUICK = {"adamw", "sgd-momentum-nesterov", "nadam", "schedule_free_adamw", "rprop"}
QUICK |= {"lamb", "novograd", "dog", "prodigy"}


def over_cases(summed):
    """All rules that take sums, or the others; of which most take long together."""
    return pytest.mark.parametrize(
        "rule, values",
        [
            pytest.param(*case, id=name, marks=[pytest.mark.slow][: name not in QUICK])
            for case, name in zip(CASES, IDS, strict=True)
            if (case[0].settle is not None) == summed
        ],
    )


COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute)[-\w]*\("


def arrays(seed, tree=TREE):
    rng = np.random.default_rng(seed)

    def one(shape, dtype, _):
        return (
            nonzero(rng, int(np.prod(shape)), np.float64).reshape(shape).astype(dtype)
        )

    return {name: one(*kind) for name, kind in tree.items()}


def specs(tree=TREE):
    return {name: spec for name, (_, _, spec) in tree.items()}


def state_specs(opt, tree=TREE):
    return fj.State(P(), P(), {name: specs(tree) for name in opt.variant.state})


@jax.jit
def copied(tree):
    """In memory of JAX's own: that of NumPy's arrays cannot be donated."""
    return jax.tree.map(jnp.copy, tree)


def put(given, mesh, tree=TREE):
    return copied(
        {
            k: jax.device_put(v, NamedSharding(mesh, tree[k][2]))
            for k, v in given.items()
        }
    )


def mapped(opt, mesh, tree=TREE, **options):
    """The step of shards, inside shard_map, jitted and donated."""
    spec, state = specs(tree), state_specs(opt, tree)
    inner = jax.shard_map(
        opt.step,
        mesh=mesh,
        in_specs=(spec, spec, state),
        out_specs=(spec, state),
        **options,
    )
    return jax.jit(inner, donate_argnums=(0, 2))


def alone(rule, values, tree=TREE, steps=3):
    """Steps of whole arrays on one device."""
    opt = fj.optimizer(rule, **values)
    params = copied(arrays(0, tree))
    state = opt.init(params)
    for k in range(steps):
        params, state = opt.step(params, arrays(1 + k, tree), state)
    return params, state


def run(step, opt, mesh, tree=TREE, steps=3):
    params = put(arrays(0, tree), mesh, tree)
    state = opt.init(params)
    for k in range(steps):
        params, state = step(params, put(arrays(1 + k, tree), mesh, tree), state)
    return params, state


def collectives(step, opt, mesh, tree=TREE):
    """Lines of the compiled step in which devices wait for each other."""
    params = put(arrays(0, tree), mesh, tree)
    grads = put(arrays(1, tree), mesh, tree)
    text = step.lower(params, grads, opt.init(params)).compile().as_text()
    assert "fastopt_step" in text
    return [line.strip() for line in text.splitlines() if re.search(COLLECTIVES, line)]


def pointers(*trees):
    return [
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(trees)
        for shard in leaf.addressable_shards
        if shard.data.size
    ]


def same_everywhere(tree):
    """Whether devices that have the same part have the same bits of it."""
    for leaf in jax.tree.leaves(tree):
        found = {}
        for shard in leaf.addressable_shards:
            first = found.setdefault(str(shard.index), np.asarray(shard.data))
            if not same(first, shard.data):
                return False
    return True


def close(got, wanted, eps):
    """To some units of the last place of the largest."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        if a.dtype == np.uint32:  # the carry
            a, b = a.view(np.float64), b.view(np.float64)
        scale = np.max(np.abs(b.astype(float)), initial=0)
        a, b = a.astype(float), b.astype(float)
        np.testing.assert_allclose(a, b, rtol=0, atol=eps * max(scale, 1e-300))


def one_dtype(dtype):
    """Larger arrays, of more than one chunk of sums."""
    return {
        "w": ((6, 1501), dtype, P("x")),
        "b": ((10,), dtype, P("x")),
        "rows": ((3, 8), dtype, P(None, "x")),
        "empty": ((0, 2), dtype, P("x")),
        "whole": ((307,), dtype, P()),
        "scalar": ((), dtype, P()),
    }


# Rules without sums -------------------------------------------------------------------


@over_cases(summed=False)
def test_shards_have_the_bits_of_whole_arrays(rule, values):
    """Inside shard_map, and under jit where arrays are sharded."""
    opt, wanted = fj.optimizer(rule, **values), alone(rule, values)
    for step in (mapped(opt, PAIR), jax.jit(opt.step, donate_argnums=(0, 2))):
        params, state = run(step, opt, PAIR)
        assert same((params, state), wanted)
        for name, spec in specs().items():
            sharded = NamedSharding(PAIR, spec)
            if name == "empty":  # of which XLA says what it likes
                continue
            for leaf in (
                params[name],
                *(tree[name] for tree in state.buffers.values()),
            ):
                assert leaf.sharding.is_equivalent_to(sharded, leaf.ndim), name
        assert state.count.sharding.is_fully_replicated
        assert same_everywhere((params, state))


@pytest.mark.parametrize("name", ["adamw", "nadam", "gd"])
@pytest.mark.parametrize("how", ["shard_map", "Shardy", "GSPMD", "explicit"])
def test_nothing_is_gathered_and_steps_are_in_place(name, how, partitioner):
    opt = getattr(fj, name)(lr=0.1)
    mesh, step = SQUARE, jax.jit(opt.step, donate_argnums=(0, 2))
    if how == "shard_map":
        step = mapped(opt, mesh)
    partitioner(how != "GSPMD")
    tree = {**TREE, "both": ((4, 6), np.float32, P("x", "y"))}
    tree |= {"one": ((4, 6), np.float32, P(("y", "x")))}
    if how == "shard_map":
        step = mapped(opt, mesh, tree)
    if how == "explicit":
        mesh = jax.make_mesh((2, 2), ("x", "y"))
        assert "Explicit" in str(mesh.axis_types)
    assert not collectives(step, opt, mesh, tree)
    params = put(arrays(0, tree), mesh, tree)
    state = opt.init(params)
    before = pointers(params, state.buffers)
    params, state = step(params, put(arrays(1, tree), mesh, tree), state)
    assert pointers(params, state.buffers) == before
    rule = getattr(fastopt, name)
    assert same((params, state), alone(rule, {"lr": 0.1}, tree, steps=1))


def test_programs_of_different_rules_differ():
    """Or JAX could take one for another from its store of compiled programs."""
    params, texts = put(arrays(0), PAIR), set()
    for opt in (fj.adam(), fj.adabelief(), fj.lion(), fj.sgd(momentum=0.9)):
        text = jax.jit(opt.step).lower(params, params, opt.init(params)).as_text()
        texts.add(re.sub(r'backend_config = "\d+"', "", text))
    assert len(texts) == 4


@pytest.fixture
def partitioner():
    """Switches to the partitioner that JAX had before Shardy."""
    if not hasattr(jax.config, "jax_use_shardy_partitioner"):
        pytest.skip("this JAX has one partitioner")
    yield functools.partial(jax.config.update, "jax_use_shardy_partitioner")
    jax.config.update("jax_use_shardy_partitioner", True)


def test_the_state_of_shards_is_in_shards():
    opt = fj.schedule_free_adamw()
    params = put(arrays(0), PAIR)
    for buffers in opt.init(params).buffers.values():
        for name, leaf in buffers.items():
            assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)


@pytest.mark.parametrize("name", ["adamw", "nadam", "schedule_free_sgd", "sophia_g"])
def test_a_scan_inside_shard_map(name):
    """Where types must say what varies: the state is made inside, too."""
    opt, spec = getattr(fj, name)(lr=0.1), specs()
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(arrays, (1, 2, 3)))

    def train(params, grads):
        def body(both, now):
            kinds = jax.tree.map(jax.typeof, both)
            both = opt.step(both[0], now, both[1])
            assert jax.tree.map(jax.typeof, both) == kinds
            return both, None

        return jax.lax.scan(body, (params, opt.init(params)), grads)[0]

    got = jax.jit(
        jax.shard_map(
            train,
            mesh=PAIR,
            in_specs=(spec, {name: P(None, *axes) for name, axes in spec.items()}),
            out_specs=(spec, state_specs(opt)),
        )
    )(put(arrays(0), PAIR), stacked)
    assert same(got, alone(getattr(fastopt, name), {"lr": 0.1}))


def test_loops_and_vmap_under_jit():
    """vmap takes the arrays of a batch one after the other, as on one device."""
    opt = fj.nadam(lr=0.1)
    params = put(arrays(0), PAIR)

    @jax.jit
    def train(params, state):
        def body(k, both):
            return opt.step(both[0], jax.tree.map(jnp.cos, both[0]), both[1])

        return jax.lax.fori_loop(0, 3, body, (params, state))

    whole = copied(arrays(0))
    assert same(train(params, opt.init(params)), train(whole, opt.init(whole)))
    tree = {"w": ((3, 4, 2), np.float32, P(None, "x"))}
    batch, grads = put(arrays(0, tree), PAIR, tree), put(arrays(1, tree), PAIR, tree)
    got, _ = jax.jit(jax.vmap(opt.step))(batch, grads, jax.vmap(opt.init)(batch))
    for k in range(3):
        one = {"w": np.asarray(batch["w"])[k]}
        wanted, _ = opt.step(one, {"w": np.asarray(grads["w"])[k]}, opt.init(one))
        assert same(got["w"][k], wanted["w"])
    with pytest.raises(ValueError, match="`fastopt_step` cannot be differentiated"):
        jax.grad(lambda x: opt.step(x, x, opt.init(x))[0].sum())(jnp.ones(4))


def test_state_in_shards_of_parameters_that_are_whole():
    """The state stays in shards; each device steps its part of the parameters."""
    opt, tree = fj.adamw(lr=0.1), {"w": ((8, 6), np.float32, P("x"))}
    whole = {"w": ((8, 6), np.float32, P())}
    state = opt.init(put(arrays(0, tree), PAIR, tree))
    params, grads = (
        put(arrays(0, whole), PAIR, whole),
        put(arrays(1, whole), PAIR, whole),
    )
    spec = jax.tree.map(lambda leaf: leaf.sharding, state.buffers)
    step = jax.jit(
        opt.step,
        out_shardings=(params["w"].sharding, fj.State(None, None, spec)),
    )
    text = step.lower(params, grads, state).compile().as_text()
    assert len(re.findall(r"all-gather\(", text)) == 1  # of the new parameters
    params, state = step(params, grads, state)
    assert same((params, state), alone(fastopt.adamw, {"lr": 0.1}, tree, steps=1))
    assert state.buffers["m"]["w"].addressable_shards[0].data.shape == (4, 6)


@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_what_else_there_is(how):
    """Schedules, hyperparameters of a step, parameters to evaluate, estimates."""
    spec = specs()

    def wrapped(function, in_specs, out_specs):
        if how == "shard_map":
            function = jax.shard_map(
                function, mesh=PAIR, in_specs=in_specs, out_specs=out_specs
            )
        return jax.jit(function)

    opt = fj.schedule_free_adamw(lr=fastopt.schedules.cosine(0.1, 20))
    kinds = state_specs(opt)

    def step(params, grads, state, weight_decay):
        return opt.step(params, grads, state, weight_decay=weight_decay, grad_scale=0.5)

    def train(step, given, evaluate):
        params, state = given(arrays(0)), opt.init(given(arrays(0)))
        for k in range(2):
            params, state = step(params, given(arrays(1 + k)), state, jnp.float64(0.01))
        return params, state, evaluate(params, state)

    got = train(
        wrapped(step, (spec, spec, kinds, P()), (spec, kinds)),
        functools.partial(put, mesh=PAIR),
        wrapped(opt.eval_params, (spec, kinds), spec),
    )
    assert same(got, train(jax.jit(step), copied, jax.jit(opt.eval_params)))
    sophia = fj.sophia_g(lr=0.1)
    kinds = state_specs(sophia)
    params = put(arrays(0), PAIR)
    estimate = wrapped(sophia.estimate, (spec, kinds), kinds)
    wanted = sophia.estimate(arrays(1), sophia.init(arrays(0)))
    assert same(estimate(put(arrays(1), PAIR), sophia.init(params)), wanted)


# Rules with sums ----------------------------------------------------------------------


@over_cases(summed=True)
def test_sums_are_those_of_whole_arrays(rule, values):
    """Inside shard_map, and under jit where arrays are sharded."""
    for dtype, eps in ((np.float64, 1e-12), (np.float32, 2e-5)):
        tree = one_dtype(dtype)
        wanted = alone(rule, values, tree)
        opt = fj.optimizer(rule, axis_name="x", **values)
        params, state = run(mapped(opt, PAIR, tree), opt, PAIR, tree)
        close((params, state), wanted, eps)
        assert same_everywhere((params, state))
        if dtype == np.float64:
            plain = fj.optimizer(rule, **values)
            got = run(jax.jit(plain.step), plain, PAIR, tree)
            assert same(got, (params, state)) and same_everywhere(got)


@pytest.mark.parametrize("name", ["lamb", "novograd", "dog", "prodigy"])
def test_sums_over_two_axes(name):
    """Arrays are sharded over both axes, one of them or none. The order of devices is
    that of the axes, as under jit."""
    tree = one_dtype(np.float64)
    tree |= {
        "both": ((8, 6), np.float64, P("y", "x")),
        "y": ((12,), np.float64, P("y")),
    }
    tree |= {"one": ((16, 3), np.float64, P(("x", "y")))}
    rule = getattr(fastopt, name)
    wanted = alone(rule, {"lr": 0.1}, tree)
    opt = fj.optimizer(rule, lr=0.1, axis_name=("x", "y"))
    for how in (mapped(opt, SQUARE, tree), jax.jit(fj.optimizer(rule, lr=0.1).step)):
        got = run(how, opt, SQUARE, tree)
        close(got, wanted, 1e-12)
        assert same_everywhere(got)
        # One sum of words for the sums of all arrays, and nothing else.
        (line,) = collectives(how, opt, SQUARE, tree)
        assert "all-reduce" in line and "u32[4,9," in line


@pytest.mark.parametrize("name", ["lamb", "dog"])
def test_each_dtype_has_its_sums(name):
    """Rules over segments take arrays of all dtypes."""
    values, rule = {"lr": 0.1}, getattr(fastopt, name)
    tree = {k: kind for k, kind in TREE.items() if name == "lamb" or k != "f64"}
    if name == "dog":
        tree.pop("scalar")
    wanted = alone(rule, values, tree)
    opt = fj.optimizer(rule, axis_name="x", **values)
    params, state = run(mapped(opt, PAIR, tree), opt, PAIR, tree)
    for k, (_, dtype, _) in tree.items():
        eps = {8: 1e-12, 4: 1e-5, 2: 2e-2}[np.dtype(dtype).itemsize]
        close(params[k], wanted[0][k], eps)
    close(state.buffers, wanted[1].buffers, 1e-5)


def test_one_device_has_the_bits_of_no_mesh():
    tree, mesh = one_dtype(np.float32), Mesh(np.array(DEVICES[:1]), ("x",))
    for name in ("lamb", "prodigy", "novograd"):
        opt = getattr(fj, name)(lr=0.1, axis_name="x")
        got = run(mapped(opt, mesh, tree), opt, mesh, tree)
        assert same(got, alone(getattr(fastopt, name), {"lr": 0.1}, tree))


def test_sums_in_a_scan_and_in_place():
    opt, tree = fj.novograd(lr=0.1, axis_name="x"), one_dtype(np.float32)
    spec = specs(tree)
    params = put(arrays(0, tree), PAIR, tree)
    grads = put(arrays(1, tree), PAIR, tree)
    state = opt.init(params)

    def train(params, grads):
        def body(both, _):
            kinds = jax.tree.map(jax.typeof, both)
            both = opt.step(both[0], grads, both[1])
            assert jax.tree.map(jax.typeof, both) == kinds
            return both, None

        return jax.lax.scan(body, (params, opt.init(params)), None, length=3)[0]

    scanned = jax.jit(
        jax.shard_map(
            train,
            mesh=PAIR,
            in_specs=(spec, spec),
            out_specs=(spec, state_specs(opt, tree)),
        )
    )(params, grads)
    before = pointers(params, state.buffers)
    step = mapped(opt, PAIR, tree)
    for _ in range(3):
        params, state = step(params, grads, state)
    assert pointers(params, state.buffers) == before
    assert same(scanned, (params, state))


def test_numbers_that_are_not_finite_reach_all_devices():
    tree = {"w": ((4, 3), np.float32, P("x"))}
    opt, alone = fj.lamb(lr=0.1, axis_name="x"), fj.lamb(lr=0.1)
    grads = arrays(1, tree)
    grads["w"][3, 1] = np.nan
    params = put(arrays(0, tree), PAIR, tree)
    new, _ = mapped(opt, PAIR, tree)(params, put(grads, PAIR, tree), opt.init(params))
    whole, _ = alone.step(arrays(0, tree), grads, opt.init(arrays(0, tree)))
    assert same(new, whole)


def test_optax_takes_shards():
    optax = pytest.importorskip("optax", reason="optax is not installed")
    tree = one_dtype(np.float64)
    transform = optax.chain(fj.lamb(lr=0.1, axis_name="x").as_optax(), optax.scale(0.5))
    plain = optax.chain(fj.lamb(lr=0.1).as_optax(), optax.scale(0.5))
    spec = specs(tree)

    def update(transform, params, grads):
        return transform.update(grads, transform.init(params), params)[0]

    got = jax.jit(
        jax.shard_map(
            functools.partial(update, transform),
            mesh=PAIR,
            in_specs=(spec, spec),
            out_specs=spec,
        )
    )(arrays(0, tree), arrays(1, tree))
    close(got, update(plain, arrays(0, tree), arrays(1, tree)), 1e-12)


# What is refused ----------------------------------------------------------------------


def step_in(opt, spec, mesh=PAIR, grads=None, **options):
    """Trace a step of one array inside shard_map."""
    x = jnp.ones((4, 4))

    def step(p):
        g = p if grads is None else grads(p)
        return opt.step({"w": p}, {"w": g}, opt.init({"w": p}))[0]["w"]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, **options)
    return jax.jit(mapped)(x)


def test_shards_whose_sums_are_not_added_up_are_refused():
    for opt, mesh, spec, message in (
        (fj.lamb(), PAIR, P("x"), r"params\['w'\] varies over 'x': give the optimizer"),
        (fj.dog(), SQUARE, P("x", "y"), "varies over 'x' and 'y': give the optimizer"),
        (fj.lamb(axis_name="x"), SQUARE, P("x", "y"), "varies over 'y': give the opt"),
        (fj.lamb(axis_name="y"), PAIR, P("x"), "there is no axis 'y' around this one"),
        (fj.lamb(axis_name="x"), SQUARE, P("y"), "varies over 'y'"),
    ):
        with pytest.raises(ValueError, match=message):
            step_in(opt, spec, mesh)
    wanted = "takes sums over whole arrays, and inside shard_map with check_vma=False"
    with pytest.raises(ValueError, match=wanted):
        step_in(fj.lamb(), P(), check_vma=False)
    with pytest.raises(ValueError, match="with check_vma=False nothing tells which"):
        step_in(fj.lamb(axis_name="x"), P("x"), check_vma=False)
    with pytest.raises(ValueError, match="there is no axis 'x' around this one"):
        fj.lamb(axis_name="x").step(
            jnp.ones(3), jnp.ones(3), fj.lamb().init(jnp.ones(3))
        )


def test_gradients_that_were_not_summed_up_are_refused():
    def grads(p):
        return p * (1.0 + jax.lax.axis_index("x"))

    with pytest.raises(
        ValueError, match=r"grads\['w'\] varies over 'x' but params\['w'"
    ):
        step_in(fj.lamb(axis_name="x"), P(), grads=grads)


def test_names_of_axes_are_checked():
    for name, error, message in (
        (3, TypeError, "axis_name must be the name of a mesh's axis .* got 3"),
        (("x", None), TypeError, "axis_name must be the name"),
        (("x", "x"), ValueError, "axis_name has a name twice"),
    ):
        with pytest.raises(error, match=message):
            fj.lamb(axis_name=name)
    assert fj.adamw(axis_name="x").axis_name == ("x",)


def test_what_is_not_in_shards_needs_no_name():
    """Whole arrays, with gradients that were summed up; and a model for each device."""
    x = jnp.ones((4, 4))
    for name in ("lamb", "dog"):
        opt = getattr(fj, name)(lr=0.1)
        wanted, _ = opt.step({"w": x}, {"w": x}, opt.init({"w": x}))
        assert same(step_in(opt, P()), wanted["w"])
        half, _ = opt.step({"w": x[:2]}, {"w": x[:2]}, opt.init({"w": x[:2]}))
        each = getattr(fj, name)(lr=0.1, axis_name=())
        for options in ({}, {"check_vma": False}):
            got = step_in(each, P("x"), **options)
            assert same(got, jnp.concatenate([half["w"], half["w"]]))
    assert step_in(fj.adamw(axis_name="x"), P("x")).shape == (4, 4)
    assert step_in(fj.adamw(), P("x"), check_vma=False).shape == (4, 4)


def test_results_that_differ_between_devices_say_so():
    """Or out_specs=P() would take those of one device for all."""
    x = jnp.ones((4, 4))

    def refused(function, in_specs=None):
        step = jax.shard_map(
            function, mesh=PAIR, in_specs=in_specs or P(), out_specs=P()
        )
        with pytest.raises(ValueError, match="out_specs which require replication"):
            jax.jit(step)(x)

    def device():
        return 1.0 + jax.lax.axis_index("x")

    adamw, nadam, free = fj.adamw(), fj.nadam(), fj.schedule_free_sgd()
    # Gradients that differ, for parameters that do not.
    for k in range(2):
        refused(lambda p, k=k: adamw.step(p, p * device(), adamw.init(p))[k])
    # A hyperparameter that differs, and what is carried with it.
    refused(lambda p: adamw.step(p, p, adamw.init(p), lr=device())[0])
    refused(lambda p: nadam.step(p, p, nadam.init(p), beta1=device() / 9)[1].carry)
    # State that differs; and so what is carried of each array, and of all.
    refused(lambda p: free.eval_params(p, free.step(p, p * device(), free.init(p))[1]))
    for name in ("novograd", "dog"):
        opt = getattr(fj, name)(axis_name=())
        state = opt.init(x[:2])
        step = functools.partial(opt.step, state=state)
        refused(lambda p, step=step: step(p, p)[1].carry, P("x"))

    dog = fj.dog(axis_name=())
    state = dog.init({"a": x[:2], "b": x})

    def two(p):
        """The step of an array depends on that of another."""
        both = {"a": p, "b": x}
        return dog.step(both, both, state)[0]["b"]

    refused(two, P("x"))

    def apart(p):
        """Or does not."""
        both, opt = {"a": p, "b": jnp.ones(3)}, fj.adamw()
        return opt.step(both, both, opt.init(both))[0]["b"]

    jax.jit(jax.shard_map(apart, mesh=PAIR, in_specs=P("x"), out_specs=P()))(x)


def test_a_model_for_each_device_in_a_scan():
    """Whose carry varies, too."""
    opt, x = fj.novograd(lr=0.1, axis_name=()), jnp.asarray(arrays(3)["f32"])

    def train(p):
        def body(both, _):
            return opt.step(both[0], jnp.sin(both[0]), both[1]), None

        return jax.lax.scan(body, (p, opt.init(p)), None, length=2)[0][0]

    got = jax.jit(jax.shard_map(train, mesh=PAIR, in_specs=P("x"), out_specs=P("x")))(x)
    assert same(got, jnp.concatenate([train(x[:3]), train(x[3:])]))


# Checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "novograd", "prodigy"])
def test_orbax_saves_and_restores(name, tmp_path):
    """And goes on bitwise, on one device or two, whichever saved it."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    tree = one_dtype(np.float32)
    tree.pop("empty")  # which orbax does not save
    opt = getattr(fj, name)(lr=0.1)
    one = Mesh(np.array(DEVICES[:1]), ("x",))
    step = jax.jit(opt.step)

    def begun(mesh):
        return run(step, opt, mesh, tree, steps=2)

    with orbax.StandardCheckpointer() as checkpointer:
        for source, target in ((one, one), (PAIR, one), (one, PAIR), (PAIR, PAIR)):
            params, state = begun(source)
            path = tmp_path / f"{source.size}{target.size}"
            checkpointer.save(path, {"params": params, "state": state})
            checkpointer.wait_until_finished()
            empty = put(arrays(8, tree), target, tree)
            like = {"params": empty, "state": opt.init(empty)}
            kinds = jax.tree.map(
                lambda leaf, mesh=target: jax.ShapeDtypeStruct(
                    leaf.shape,
                    leaf.dtype,
                    sharding=leaf.sharding
                    if isinstance(leaf.sharding, NamedSharding)
                    else NamedSharding(mesh, P()),
                ),
                like,
            )
            found = checkpointer.restore(path, kinds)
            assert isinstance(found["state"], fj.State)
            assert same((found["params"], found["state"]), (params, state))
            grads = arrays(9, tree)
            wanted = step(params, put(grads, source, tree), state)
            got = step(found["params"], put(grads, target, tree), found["state"])
            if source is target or name == "adamw":
                assert same(got, wanted)
            close(got, wanted, 2e-6)
            assert same(
                got[0],
                step(found["params"], put(grads, target, tree), found["state"])[0],
            )
