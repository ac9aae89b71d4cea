"""A small network of NumPy's, on handwritten digits: parameters and gradients live in
two flat buffers, and a step is one call."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastopt

EPOCHS, BATCH = 30, 64

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
x, x_test, y, y_test = train_test_split(images, labels, random_state=0)

rng = np.random.default_rng(0)
params = fastopt.flatten(
    {
        "w1": rng.normal(0, 0.1, (64, 64)).astype(np.float32),
        "b1": np.zeros(64, np.float32),
        "w2": rng.normal(0, 0.1, (64, 10)).astype(np.float32),
        "b2": np.zeros(10, np.float32),
    }
)
grads = params.zeros_like()  # of the same layout: grads["w1"] is a view into it


def forward(params, x):
    """The hidden layer, and the probability of each digit."""
    hidden = np.maximum(x @ params["w1"] + params["b1"], 0)
    scores = hidden @ params["w2"] + params["b2"]
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, scores / scores.sum(axis=1, keepdims=True)


def backward(x, y):
    """Write the gradients of the cross-entropy into their buffer, and return it."""
    hidden, probability = forward(params, x)
    loss = -np.log(probability[np.arange(len(y)), y]).mean()
    probability[np.arange(len(y)), y] -= 1
    error = probability / len(y)
    grads["w2"][:], grads["b2"][:] = hidden.T @ error, error.sum(axis=0)
    error = error @ params["w2"].T * (hidden > 0)
    grads["w1"][:], grads["b1"][:] = x.T @ error, error.sum(axis=0)
    return loss


opt = fastopt.adamw(
    params,
    lr=lambda step: 3e-3 * min(1, (step + 1) / 50),  # a warm-up
    weight_decay=0.1,
    ema=0.99,
)
for epoch in range(1, EPOCHS + 1):
    order = rng.permutation(len(x))
    losses = []
    for start in range(0, len(x), BATCH):
        batch = order[start : start + BATCH]
        losses.append(backward(x[batch], y[batch]))
        opt.step(grads, clip_norm=1.0)
    if epoch % 10 == 0:
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}")

for name, weights in {"weights": params, "average of them": opt.ema_params}.items():
    right = (forward(weights, x_test)[1].argmax(axis=1) == y_test).mean()
    print(f"test accuracy: {right:.3f} with the {name}")
