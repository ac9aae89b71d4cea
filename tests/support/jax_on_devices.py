"""The tests of fastopt.jax on four devices, which test_jax_shards.py runs in a process
of its own: JAX makes its devices when it starts, and other tests have one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_devices import (
    DEVICES,
    PAIR,
    SQUARE,
    TREE,
    alone,
    arrays,
    close,
    collectives,
    copied,
    mapped,
    one_dtype,
    over_cases,
    pointers,
    put,
    run,
    same_everywhere,
    specs,
    state_specs,
)
from jax_trees import same

import fastopt
import fastopt.jax as fj

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


@pytest.mark.parametrize("how", ["Shardy", "GSPMD", "explicit"])
def test_the_state_of_shards_is_in_shards(how, partitioner):
    opt, mesh = fj.schedule_free_adamw(), PAIR
    partitioner(how != "GSPMD")
    if how == "explicit":
        mesh = jax.make_mesh((2,), ("x",), devices=DEVICES[:2])
    tree = {name: kind for name, kind in TREE.items() if name != "empty"}
    params = put(arrays(0, tree), mesh, tree)
    for init in (opt.init, jax.jit(opt.init)):
        state = init(params)
        assert same(state, opt.init(arrays(0, tree)))
        for buffers in state.buffers.values():
            for name, leaf in buffers.items():
                sharding = params[name].sharding
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), name
    batch = {"w": jnp.ones((3, 4, 2), np.float32)}
    wanted = jax.vmap(opt.init)(batch)
    assert same(jax.jit(jax.vmap(opt.init))(batch), wanted)


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
