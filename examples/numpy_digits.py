"""The network of ``fastopt demo``, written in NumPy, on handwritten digits: parameters
and gradients live in two flat buffers, and a step is one call."""

import numpy as np

import fastopt
from fastopt.cli import demo

EPOCHS, BATCH = 30, 64

data = demo.digits()
x, y = data.train
params = demo.mlp(0)  # fastopt.flatten makes it of arrays: params["w1"] is a view
grads = params.zeros_like()  # of the same layout; demo.backward writes into its views
rng = np.random.default_rng(0)
opt = fastopt.adamw(
    params,
    lr=lambda step: 3e-3 * min(1, (step + 1) / 50),  # a warm-up
    weight_decay=0.1,
    ema=0.99,
)
for epoch in range(1, EPOCHS + 1):
    for batch in rng.permutation(len(x)).reshape(-1, BATCH):
        demo.backward(params, grads, x[batch], y[batch])
        opt.step(grads, clip_norm=1.0)
    if epoch % 10 == 0:
        print(f"epoch {epoch}: loss {demo.evaluate(params, x, y)[0]:.4f}")

for name, weights in {"weights": params, "average of them": opt.ema_params}.items():
    _, right = demo.evaluate(weights, *data.test)
    print(f"test accuracy: {right:.3f} with the {name}")
