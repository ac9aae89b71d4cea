"""What fastopt.jax takes as a state: as checkpoints bring it, for the same step; all
else is refused by name, before a kernel sees it."""

import pickle

import numpy as np
import pytest

import fastopt
from fastopt.backends import cython_cpu

jax = pytest.importorskip("jax", reason="JAX is not installed")
if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp  # noqa: E402
from jax_trees import arrays, same, to_jax  # noqa: E402

import fastopt.jax as fj  # noqa: E402


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def after(opt, steps=2):
    """Parameters and state after some steps."""
    params = to_jax(arrays(0))
    state = opt.init(params)
    for k in range(steps):
        params, state = opt.step(params, to_jax(arrays(1 + k)), state)
    return params, state


def restored(state, how):
    if how == "pickle":
        return pickle.loads(pickle.dumps(state))
    if how == "numpy":
        return jax.tree.map(np.asarray, state)
    if how == "dict":
        return fj.State(**jax.tree.map(np.asarray, state)._asdict())
    if how == "msgpack":
        msgpack = pytest.importorskip("msgpack")
        leaves, tree = jax.tree.flatten(state)
        packed = msgpack.packb(
            [(str(x.dtype), list(x.shape), np.asarray(x).tobytes()) for x in leaves]
        )
        return jax.tree.unflatten(
            tree,
            [
                np.frombuffer(data, dtype).reshape(shape)  # which is read-only
                for dtype, shape, data in msgpack.unpackb(packed)
            ],
        )
    count = int(state.count)
    if how == "weak":  # as jit has a number of Python's
        return state._replace(count=jax.jit(lambda n: n)(count))
    return state._replace(count=count if how == "int" else np.dtype(how).type(count))


KINDS = ["pickle", "numpy", "dict", "msgpack", "weak", "int"]
KINDS += ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", ["adamw", "novograd", "nadam"])
def test_a_state_from_a_checkpoint_goes_on_exactly(name, how):
    """As a constant and as an argument of a compiled step."""
    opt = getattr(fj, name)(lr=0.1)
    params, state = after(opt)
    grads = to_jax(arrays(9))
    wanted = opt.step(params, grads, state)
    got = restored(state, how)
    for step in (opt.step, jax.jit(opt.step)):
        new = step(params, grads, got)
        assert same(new, wanted)
        assert new[1].count.dtype == jnp.int32 and not new[1].count.weak_type
    assert same(jax.jit(opt.eval_params)(params, got), params)


@pytest.mark.parametrize("kind", [jnp.int8, jnp.uint16, jnp.int64, jnp.uint64])
def test_counts_of_other_integers(kind, x64):
    """int8 goes on beyond its own 127."""
    opt, x = fj.adam(lr=0.1), jnp.arange(1.0, 4.0, dtype=jnp.float32)
    state = opt.init(x)._replace(count=jnp.asarray(127, kind))
    wanted = opt.step(x, x, opt.init(x)._replace(count=jnp.int32(127)))
    got = jax.jit(opt.step)(x, x, state)
    assert same(got[0], wanted[0]) and int(got[1].count) == 128
    assert got[1].count.dtype == (jnp.int64 if kind(0).itemsize == 8 else jnp.int32)


def test_a_state_is_carried_by_loops():
    opt, steps = fj.nadam(lr=0.1), 5
    params, state = after(opt)
    grads = to_jax(arrays(9))
    wanted = params, state
    for _ in range(steps):
        wanted = opt.step(wanted[0], grads, wanted[1])

    def body(k, both):
        return opt.step(both[0], grads, both[1])

    assert same(jax.lax.fori_loop(0, steps, body, (params, state)), wanted)
    begun = int(state.count)
    looped = jax.lax.while_loop(
        lambda both: both[1].count < begun + steps,
        lambda both: body(0, both),
        (params, state._replace(count=begun)),  # a weak type, at first
    )
    assert same(looped, wanted)


# Refused ------------------------------------------------------------------------------

P = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, "f")}
NADAM = fj.nadam(lr=0.1)


def changed(**leaves):
    return NADAM.init(P)._replace(**leaves)


def carry(dtype="uint32", shape=(1, 1, 2)):
    return np.ones(shape, dtype)


def buffers(**others):
    return {**NADAM.init(P).buffers, **others}


BAD = {
    "a tuple": (tuple(NADAM.init(P)), TypeError, "must be a fastopt.jax.State, got tu"),
    "a dict": (NADAM.init(P)._asdict(), TypeError, "got dict; .* State.\\*\\*it"),
    "None": (None, TypeError, "must be a fastopt.jax.State, got NoneType"),
    "float count": (changed(count=jnp.float32(1)), TypeError, "int32.., got float32"),
    "Python's float": (changed(count=1.0), TypeError, "state.count must .* got float$"),
    "bool count": (changed(count=True), TypeError, "state.count must .* got bool"),
    "boolean count": (changed(count=jnp.array(True)), TypeError, "got bool.."),
    "text": (changed(count="1"), TypeError, "state.count must be .*, got str"),
    "counts": (changed(count=np.zeros(1, int)), ValueError, r"got int64\[1\]; a batch"),
    "negative": (changed(count=-1), ValueError, "state.count must be from 0 to .* -1"),
    "last": (changed(count=2**31 - 1), ValueError, "from 0 to 2147483646, got 21474"),
    "huge": (changed(count=2**70), TypeError, "state.count must be one integer"),
    "carry float": (changed(carry=carry("f")), TypeError, r"uint32\[1, 1, 2\], got fl"),
    "carry uint8": (
        changed(carry=carry("uint8")),
        TypeError,
        "got uint8.*it was saved",
    ),
    "carry int64": (changed(carry=carry("int64")), TypeError, "got int64"),
    "carry swapped": (changed(carry=carry(">u4")), TypeError, "got >u4"),
    "carry list": (changed(carry=[[[0, 0]]]), TypeError, "state.carry .* got list"),
    "carry short": (changed(carry=carry(shape=(0, 1, 2))), ValueError, r"got .*\[0, 1"),
    "carry long": (changed(carry=carry(shape=(2, 1, 2))), ValueError, r"got .*\[2, 1"),
    "carry flat": (changed(carry=carry(shape=2)), ValueError, r"got uint32\[2\]"),
    "missing": (
        changed(buffers={"m": P}),
        ValueError,
        "has m, but nadam .* keeps m, v",
    ),
    "extra": (changed(buffers=buffers(z=P)), ValueError, "has m, v, z, but nadam"),
    "another's": (fj.adabelief().init(P), ValueError, "has m, s, but nadam with these"),
    "none at all": (changed(buffers={}), ValueError, "has nothing, but nadam"),
    "a list": (changed(buffers=[P, P]), TypeError, "state.buffers must be a dict"),
    "structure": (
        changed(buffers=buffers(v=P["w"])),
        ValueError,
        "'v'. has the struct",
    ),
    "narrow": (
        changed(buffers=buffers(v={**P, "b": np.ones(1, "e")})),
        TypeError,
        r"state.buffers\['v'\]\['b'\] must be .* got float16",
    ),
    "shape": (
        changed(buffers=buffers(m={**P, "w": P["w"].T})),
        ValueError,
        r"'m'\]\['w'\] is float32\[3, 2\] but params\['w'\] is float32\[2, 3\]",
    ),
    "lists": (
        changed(buffers=buffers(m={**P, "b": [1.0]})),
        TypeError,
        r"'m'\]\['b'\]\[0\] must be an array of float32",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_states_are_refused_by_name(what):
    state, kind, message = BAD[what]
    with pytest.raises(kind, match=message):
        NADAM.step(P, P, state)
    if not any(isinstance(leaf, (str, list)) for leaf in jax.tree.leaves(state)):
        with pytest.raises((TypeError, ValueError, OverflowError, RuntimeError)):
            jax.jit(NADAM.step)(P, P, state)


def test_every_door_checks_the_state():
    """As step does: eval_params and estimate."""
    free, sophia = fj.schedule_free_sgd(lr=0.1), fj.sophia_g(lr=0.1)
    for opt, door in (
        (free, lambda state: free.eval_params(P, state)),
        (sophia, lambda state: sophia.estimate(P, state)),
    ):
        good = opt.init(P)
        door(good)
        for bad, kind, message in (
            (good._asdict(), TypeError, "must be a fastopt.jax.State"),
            (good._replace(count=0.5), TypeError, "state.count must be one integer"),
            (good._replace(carry=carry(shape=(1, 9, 2))), ValueError, "carry must be"),
            (good._replace(buffers={"y": P}), ValueError, "state.buffers has y, but"),
        ):
            with pytest.raises(kind, match=message):
                door(bad)
    bad = free.init({**P, "w": P["w"].T.copy()})
    with pytest.raises(ValueError, match=r"'w'\] is float32\[3, 2\] but params"):
        free.eval_params(P, bad)


def test_another_variants_state_is_refused():
    plain, momentum = fj.sgd(lr=0.1), fj.sgd(lr=0.1, momentum=0.9)
    with pytest.raises(
        ValueError, match="has nothing, but sgd.momentum with these opt"
    ):
        momentum.step(P, P, plain.init(P))
    with pytest.raises(
        ValueError, match="has momentum_buffer, but sgd with these opti"
    ):
        plain.step(P, P, momentum.init(P))


def test_a_rule_without_carry_takes_what_older_versions_saved():
    """They stored an array without elements, which orbax does not save."""
    opt = fj.adamw(lr=0.1)
    state = opt.init(P)
    assert state.carry is None
    older = state._replace(carry=np.zeros((1, 0, 2), np.uint32))
    for step in (opt.step, jax.jit(opt.step)):
        new, after = step(P, P, state)
        same_one, kept = step(P, P, older)
        assert same(new, same_one) and same(after.buffers, kept.buffers)
        assert after.carry is None and kept.carry.shape == (1, 0, 2)
    sophia = fj.sophia_g()
    older = sophia.init(P)._replace(carry=np.zeros((1, 0, 2), np.uint32))
    assert sophia.estimate(P, older).carry.shape == (1, 0, 2)
    with pytest.raises(TypeError, match="state.carry must be uint32.1, 1, 2., got No"):
        NADAM.step(P, P, changed(carry=None))


def test_a_carry_of_numpy_for_mixed_dtypes(x64):
    opt = fj.novograd(lr=0.1)
    params = {"a": np.ones(3, np.float32), "b": np.ones(2)}
    _, state = opt.step(params, params, opt.init(params))
    assert same(
        opt.step(params, params, jax.tree.map(np.asarray, state)),
        opt.step(params, params, state),
    )


def test_a_row_of_the_carry_for_each_array():
    """It was too short, and written beyond its end."""
    opt = fj.novograd(lr=0.1)
    state = opt.init(P)
    assert state.carry.shape == (2, 1, 2)
    with pytest.raises(ValueError, match=r"uint32\[2, 1, 2\], got uint32\[1, 1, 2\]"):
        opt.step(P, P, state._replace(carry=state.carry[:1]))
    with pytest.raises(ValueError, match="state.carry must be"):
        jax.jit(opt.step)(P, P, state._replace(carry=state.carry[:1]))


def test_with_x64_a_carry_of_another_dtype_is_refused(x64):
    for kind in (jnp.int64, jnp.uint8, jnp.float64):
        with pytest.raises(TypeError, match="state.carry must be uint32"):
            NADAM.step(P, P, changed(carry=jnp.zeros((1, 1, 2), kind)))


def test_batches_of_states():
    """vmap's are one for each; outside of it they are refused."""
    opt, k = fj.nadam(lr=0.1), 3
    many = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * k), P)
    states = jax.vmap(opt.init)(many)
    with pytest.raises(
        ValueError, match=r"got int32\[3\]; a batch of states is for ja"
    ):
        opt.step(P, P, states)
    new, states = jax.vmap(opt.step)(many, many, states)
    alone, state = opt.step(P, P, opt.init(P))
    assert same(jax.tree.map(lambda a: a[2], (new, states)), (alone, state))
    free = fj.schedule_free_sgd(lr=0.1)
    states = jax.vmap(free.init)(many)
    new, states = jax.vmap(free.step)(many, many, states)
    used = jax.vmap(free.eval_params)(new, states)
    alone, state = free.step(P, P, free.init(P))
    assert same(jax.tree.map(lambda a: a[1], used), free.eval_params(alone, state))


def test_float64_needs_x64():
    """JAX would round it: of NumPy's parameters, as of the state."""
    wide = np.ones(3)
    with pytest.raises(
        TypeError, match="params is float64, which JAX rounds .* is off"
    ):
        fj.gd().init(wide)
    with pytest.raises(TypeError, match="params is float64, which JAX rounds"):
        fj.gd().step(wide, wide, fj.gd().init(wide.astype("f")))
    x = np.ones(3, np.float32)
    with pytest.raises(TypeError, match="grads is float64, which JAX rounds"):
        fj.gd().step(x, wide, fj.gd().init(x))


def test_scalars_of_numpy_are_arrays():
    opt, x = fj.adam(lr=0.1), np.float32(0.75)
    new, _ = opt.step(x, x, opt.init(x))
    fastopt.adam(python := np.array([0.75], "f"), lr=0.1).step(python.copy())
    assert same([new], [python[0]])


def test_what_only_runs_tells_is_an_error_of_the_step():
    """A count is known when the compiled step runs."""
    opt, x = fj.adam(lr=0.1), jnp.ones(3)
    state = opt.init(x)
    for count in (-1, -(2**31), 2**31 - 1):  # one more is below zero
        with pytest.raises(jax.errors.JaxRuntimeError, match="step must be at least 1"):
            bad = state._replace(count=jnp.int32(count))
            jax.block_until_ready(jax.jit(opt.step)(x, x, bad))


@pytest.mark.parametrize(
    "value",
    [jnp.ones(1), jnp.ones((2, 2)), jnp.array(True), jnp.ones((), jnp.complex64)],
    ids=lambda value: f"{value.dtype}{list(value.shape)}",
)
def test_traced_hyperparameters_are_scalars(value):
    opt, x = fj.adam(), jnp.ones(3)
    for step in (opt.step, jax.jit(opt.step)):
        with pytest.raises(TypeError, match="lr must be a number, got"):
            step(x, x, opt.init(x), lr=value)
        with pytest.raises(TypeError, match="grad_scale must be a number, got"):
            step(x, x, opt.init(x), grad_scale=value)


def test_hyperparameters_of_any_dtype(x64):
    x = jnp.arange(1.0, 4.0, dtype=jnp.float32)
    for value in (jnp.bfloat16(0.25), jnp.int8(2), jnp.float64(1 / 3), jnp.uint32(3)):
        opt = fj.adam()
        wanted, _ = opt.step(x, x, opt.init(x), lr=float(value))
        got, _ = jax.jit(opt.step)(x, x, opt.init(x), lr=value)
        assert same(got, wanted)
