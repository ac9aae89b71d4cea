"""A thinc model, on handwritten digits, made from a configuration as spaCy's are: of
its optimizer, only the name is fastopt's."""

import numpy as np
from thinc.api import Config, fix_random_seed, registry

import fastopt.thinc  # noqa: F401  not needed once fastopt is installed
from fastopt.cli import demo

CONFIG = """
[model]
@layers = "chain.v1"

[model.*.hidden]
@layers = "Relu.v1"
nO = 64

[model.*.output]
@layers = "Softmax.v1"

[optimizer]
@optimizers = "fastopt.Adam.v1"
L2 = 1e-3
grad_clip = 1.0

[optimizer.learn_rate]
@schedules = "warmup_linear.v1"
initial_rate = 5e-3
warmup_steps = 50
total_steps = 400
"""

(x, y), (x_test, y_test) = demo.digits()
wanted = np.eye(10, dtype=np.float32)[y]

parts = registry.resolve(Config().from_str(CONFIG))
model, optimizer = parts["model"], parts["optimizer"]
fix_random_seed(0)
model.initialize(x[:5], wanted[:5])
for epoch in range(1, 21):
    losses = []
    for batch_x, batch_y in model.ops.multibatch(64, x, wanted, shuffle=True):
        guess, backprop = model.begin_update(batch_x)
        error = guess - batch_y
        backprop(error / len(error))
        model.finish_update(optimizer)
        optimizer.step_schedules()
        losses.append(float((error * error).sum() / len(error)))
    if epoch % 5 == 0:
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}")

with model.use_params(optimizer.averages):
    right = (model.predict(x_test).argmax(axis=1) == y_test).mean()
print(f"test accuracy: {right:.3f} with the averages")
