"""How large a batch? The noise scale of the gradients, and what it predicts.

    python examples/batch_size.py [FOLDER]

First the noise scale is measured some times in a run. Then runs with batches of several
sizes, each with the best of some learning rates, are stopped at the same loss. If B is
the batch size at which noise and signal are equal, they should take about 1 + B / batch
times the fewest steps, and 1 + batch / B times the fewest examples; it is that order
of magnitude, not more.

Prints both and saves batch_size.png. Needs pip install '.[demo]'.
"""

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt.cli import demo

TARGET, MOST = 0.35, 1200  # the loss at which runs end, and their most steps
SIZES, RATES, SEEDS = (4, 16, 64, 256), (0.1, 0.2, 0.4, 0.8, 1.6), range(3)
LOOK = 256  # the images of which the loss is taken, at every other step


def noise_scale(params, data, rng):
    """Of the gradients at these parameters, from 20 times 8 batches of 8."""
    x, y = data.train
    scale = fastopt.GradientNoiseScale(8, beta=1)
    for _ in range(20):
        grads = [params.zeros_like() for _ in range(8)]
        for grad in grads:
            rows = rng.integers(len(x), size=8)
            demo.backward(params, grad, x[rows], y[rows])
        scale.update(grads)
    return scale


def steps_to_target(size, lr, seed, data):
    x, y = data.train
    params, rng = demo.mlp(seed), np.random.default_rng(seed)
    grads, opt = params.zeros_like(), fastopt.sgd(params, lr=lr)
    for step in range(MOST):
        if step % 2 == 0:
            loss, _ = demo.evaluate(params, x[:LOOK], y[:LOOK])
            if loss <= TARGET:
                return step
            if not loss < 10:  # it diverges
                break
        rows = rng.integers(len(x), size=size)
        demo.backward(params, grads, x[rows], y[rows])
        opt.step(grads)
    return np.inf


def main():
    data = demo.digits()
    x, y = data.train
    params, rng = demo.mlp(0), np.random.default_rng(0)
    grads, opt = params.zeros_like(), fastopt.sgd(params, lr=0.3)
    print("In a run with batches of 32:")
    measured = []
    for step in range(121):
        if step % 30 == 0:
            scale = noise_scale(params, data, rng)
            loss, _ = demo.evaluate(params, x, y)
            print(f"  step {step:<4} loss {loss:.2f}  {scale!r}")
            measured.append((loss, scale.value))
        rows = rng.integers(len(x), size=32)
        demo.backward(params, grads, x[rows], y[rows])
        opt.step(grads)

    print(f"\nTo a loss of {TARGET}, by SGD, median of {len(SEEDS)} seeds:")
    print("  batch  lr     steps  examples")
    steps = []
    with np.errstate(all="ignore"):
        for size in SIZES:
            taken = {
                lr: np.median([steps_to_target(size, lr, s, data) for s in SEEDS])
                for lr in RATES
            }
            lr = min(taken, key=taken.get)
            steps.append(taken[lr])
            print(f"  {size:<6} {lr:<6g} {taken[lr]:<6g} {taken[lr] * size:g}")

    # steps = fewest * (1 + B / batch) is a line over 1 / batch.
    sizes, steps = np.array(SIZES, float), np.array(steps, float)
    slope, fewest = np.polyfit(1 / sizes, steps, 1, w=1 / steps)
    print(f"\nFrom the steps: B = {slope / fewest:.0f}, at least {fewest:.0f} steps")
    before = [value for loss, value in measured if loss > TARGET and value > 0]
    print(f"From the noise, until that loss: B = {before[0]:.0f} to {before[-1]:.0f}")
    scaled = fastopt.scale_hyperparameters({"lr": 0.15}, 4, "linear")
    print(f"Four times the batch, by the linear rule: lr 0.15 becomes {scaled['lr']:g}")

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    line = np.geomspace(2, 512)
    axes.loglog(sizes, steps, "o", color="C0", label="steps")
    axes.loglog(line, fewest * (1 + slope / fewest / line), color="C0")
    axes.loglog(sizes, steps * sizes, "s", color="C1", label="examples")
    axes.loglog(line, (fewest * (1 + slope / fewest / line)) * line, color="C1")
    axes.axvline(slope / fewest, color="0.5", linestyle="--", label="B, from the steps")
    axes.set(xlabel="batch size", ylabel=f"to a loss of {TARGET}")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    demo.run_example(main)
