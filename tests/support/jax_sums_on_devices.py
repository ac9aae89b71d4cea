"""The tests of rules that take sums over arrays, on four devices; as jax_on_devices.py,
test_jax_shards.py runs them in a process of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
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
@pytest.mark.parametrize("how", ["explicit", "partly", "vmap"])
def test_sums_elsewhere(name, how):
    """On a mesh whose axes are in types; where shard_map splits one axis and the jit
    around it another; and of a batch."""
    tree = {"w": ((8, 6), np.float64, P("x", "y"))}
    wanted, _ = alone(getattr(fastopt, name), {"lr": 0.1}, tree, steps=1)
    axes = ("x",) if how == "partly" else ("x", "y")
    opt = getattr(fj, name)(lr=0.1, axis_name=axes)
    mesh = jax.make_mesh((2, 2), ("x", "y")) if how == "explicit" else SQUARE
    params, grads = put(arrays(0, tree), mesh, tree), put(arrays(1, tree), mesh, tree)

    def step(params, grads):
        return opt.step(params, grads, opt.init(params))[0]

    if how == "vmap":
        step = jax.vmap(step)
        params, grads, wanted = jax.tree.map(
            lambda leaf: jnp.stack([leaf, leaf]), (params, grads, wanted)
        )
    spec = P(*([None] if how == "vmap" else []), *axes)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(spec, spec), out_specs=spec, axis_names={*axes}
    )
    close(jax.jit(mapped)(params, grads), wanted, 1e-12)


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
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="or pmap, nothing tells"):
        jax.pmap(lambda p: fj.lamb().step(p, p, fj.lamb().init(p))[0])(x)
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
