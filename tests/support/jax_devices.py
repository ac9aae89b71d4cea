"""Four devices of JAX's, and sharded arrays on them, for jax_on_devices.py and
jax_sums_on_devices.py. Import this before JAX has made its devices."""

import re

import numpy as np
import pytest
from cases import CASES, IDS, bfloat16, nonzero

jax = pytest.importorskip("jax", "0.9", reason="JAX 0.9 is not installed")
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
