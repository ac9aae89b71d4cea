"""Train a small network on scikit-learn's digits with JAX; the step is fastopt's.

    python examples/jax_digits.py

Forward, backward and the step are one compiled function; parameters and state are
donated to it, so the step is in place. The learning rate is warmed up and decays, as a
function of the step, which does not compile anything again. Needs jax and
pip install '.[demo]'.
"""

import jax
import jax.numpy as jnp
import numpy as np

import fastopt.jax
from fastopt.cli import demo

WIDTHS, EPOCHS, BATCH = (64, 256, 128, 10), 20, 64


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


def loss(params, x, y):
    scores = jax.nn.log_softmax(logits(params, x))
    return -jnp.take_along_axis(scores, y[:, None], axis=1).mean()


def main():
    (x, y), (x_test, y_test) = demo.digits()
    batches = len(x) // BATCH
    total = EPOCHS * batches

    def schedule(done):
        warm = jnp.minimum(1.0, (done + 1) / 20)
        return 3e-3 * warm * (1 + jnp.cos(jnp.pi * done / total)) / 2

    opt = fastopt.jax.adamw(lr=schedule, weight_decay=0.05)

    def advance(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        params, state = opt.step(params, grads, state)
        return params, state, value

    advance = jax.jit(advance, donate_argnums=(0, 1))
    params = make(jax.random.key(0))
    state = opt.init(params)
    rng = np.random.default_rng(1)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(x))[: batches * BATCH]
        for batch in order.reshape(batches, -1):
            params, state, value = advance(params, state, x[batch], y[batch])
        accuracy = (logits(params, x_test).argmax(axis=1) == y_test).mean()
        print(f"epoch {epoch + 1}: loss {value:.4f}, test accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    main()
