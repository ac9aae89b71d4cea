"""Train a small network on scikit-learn's digits with JAX; the step is fastopt's.

    python examples/jax_digits.py

Forward, backward and the step are one compiled function; parameters and state are
donated to it, so the step is in place. The learning rate is warmed up and decays, as a
function of the step, which does not compile anything again. Needs jax and scikit-learn.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import fastopt.jax

WIDTHS = (64, 256, 128, 10)


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()

    data, target = load_digits(return_X_y=True)
    data, target = (data / 16).astype(np.float32), target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(data))
    test, train = order[:360], order[360:]
    batches = len(train) // asked.batch
    total = asked.epochs * batches

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
    for epoch in range(asked.epochs):
        for batch in rng.permutation(train)[: batches * asked.batch].reshape(
            batches, -1
        ):
            params, state, value = advance(params, state, data[batch], target[batch])
        accuracy = (logits(params, data[test]).argmax(axis=1) == target[test]).mean()
        print(f"epoch {epoch + 1}: loss {value:.4f}, test accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    main()
