"""Train a network on scikit-learn's digits whose parameters and state are in shards.

    python examples/jax_shards.py

Two devices (of the CPU) each keep half of every parameter and of the optimizer's state,
and take half of every batch. Inside shard_map a device gathers the parameters for its
forward pass; JAX sums up the gradients and hands each device those of its half; and
fastopt steps that half in place. LAMB's norms are of whole arrays: with axis_name, the
sums of shards are added up. Needs jax and pip install '.[demo]'.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fastopt.jax
from fastopt.cli import demo

WIDTHS, EPOCHS, BATCH = (64, 256, 128, 10), 15, 64


def make(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        {
            "w": jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m),
            "b": jnp.zeros(n),
        }
        for k, m, n in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(shards, x, y):
    params = jax.tree.map(
        lambda shard: jax.lax.all_gather(shard, "x", tiled=True), shards
    )
    scores = jax.nn.log_softmax(logits(params, x))
    here = -jnp.take_along_axis(scores, y[:, None], axis=1).mean()
    return jax.lax.pmean(here, "x")


def main():
    jax.config.update("jax_num_cpu_devices", 2)
    (x, y), (x_test, y_test) = demo.digits()
    batches = len(x) // BATCH
    opt = fastopt.jax.lamb(lr=0.01, weight_decay=0.02, axis_name="x")

    def advance(shards, state, x, y):
        value, grads = jax.value_and_grad(loss)(shards, x, y)
        shards, state = opt.step(shards, grads, state)
        return shards, state, value

    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")), ("x",))
    state_spec = fastopt.jax.State(count=P(), carry=P(), buffers=P("x"))
    advance = jax.jit(
        jax.shard_map(
            advance,
            mesh=mesh,
            in_specs=(P("x"), state_spec, P("x"), P("x")),
            out_specs=(P("x"), state_spec, P()),
        ),
        donate_argnums=(0, 1),
    )
    params = jax.device_put(make(jax.random.key(0)), NamedSharding(mesh, P("x")))
    state = opt.init(params)  # in shards, as the parameters are
    rng = np.random.default_rng(1)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(x))[: batches * BATCH]
        for batch in order.reshape(batches, -1):
            params, state, value = advance(params, state, x[batch], y[batch])
        accuracy = (logits(params, x_test).argmax(axis=1) == y_test).mean()
        print(f"epoch {epoch + 1}: loss {value:.4f}, test accuracy: {accuracy:.3f}")
    for shard in state.buffers["m"][0]["w"].addressable_shards:
        print(f"{shard.device} has {shard.data.shape} of {WIDTHS[:2]}")


if __name__ == "__main__":
    main()
