"""Several tasks, one network: which weights? A sweep of fixed ones, and eleven methods.

    python examples/several_tasks.py [FOLDER]

Eight hidden units are to tell ten digits apart and to draw the image again, and are too
few for both. Fixed weights give one trade-off each, which together are the Pareto front
as far as training finds it; the methods weigh the gradients anew at every step, by
their products alone, and need no sweep.

Prints both losses of each and saves several_tasks.png. Needs pip install '.[demo]'.
"""

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt import multitask
from fastopt.cli import demo

STEPS, HIDDEN = 250, 8


def network():
    rng = np.random.default_rng(0)
    sizes = {"shared": (64, HIDDEN), "digit": (HIDDEN, 10), "image": (HIDDEN, 64)}
    draw = {n: rng.standard_normal(s) / np.sqrt(s[0]) for n, s in sizes.items()}
    return fastopt.flatten({n: w.astype(np.float32) for n, w in draw.items()})


def losses_and_gradients(params, tasks, x, y):
    """The two losses; their gradients go into ``tasks``, a buffer for each."""
    hidden = np.tanh(x @ params["shared"])
    scores = hidden @ params["digit"]
    scores -= scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    rows = np.arange(len(x))
    digit = -log_p[rows, y].mean()
    error = hidden @ params["image"] - x
    image = (error**2).mean()
    wrong = np.exp(log_p)
    wrong[rows, y] -= 1
    for grads, head, back in (
        (tasks[0], "digit", wrong / len(x)),
        (tasks[1], "image", 2 * error / error.size),
    ):
        grads[head][...] = hidden.T @ back
        inward = back @ params[head].T * (1 - hidden**2)
        grads["shared"][...] = x.T @ inward
    return float(digit), float(image)


def trained(weigh, data):
    """Both losses after training, with the weights that a function finds in the Gram
    matrix."""
    x, y = data.train
    params = network()
    tasks = [params.zeros_like(), params.zeros_like()]
    opt = fastopt.adam(params, lr=0.02)
    for _ in range(STEPS):
        losses_and_gradients(params, tasks, x, y)
        opt.step(tasks, weights=weigh(fastopt.gram(tasks)))
    return losses_and_gradients(params, tasks, x, y)


def methods():
    rng = np.random.default_rng(0)
    others = {*multitask.__all__} - {"gram", "pcgrad", "GradVac"}
    return {
        "pcgrad": lambda gram: multitask.pcgrad(gram, rng),
        "gradvac": multitask.GradVac(rng),
        **{name: getattr(multitask, name) for name in sorted(others)},
    }


def main():
    data = demo.digits()
    shares = (0.002, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95)
    front = [trained(lambda _, s=s: np.array([s, 1 - s]), data) for s in shares]
    losses = {name: trained(weigh, data) for name, weigh in methods().items()}

    print(f"{'':<24}{'digits':>8}{'image':>10}")
    for share, (digit, image) in zip(shares, front, strict=True):
        print(f"{f'fixed {share:g} and {1 - share:g}':<24}{digit:8.3f}{image:10.5f}")
    for name, (digit, image) in losses.items():
        print(f"{name:<24}{digit:8.3f}{image:10.5f}")

    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*front, strict=True), "o-", color="0.6", label="fixed weights")
    for marker, (name, (digit, image)) in zip(
        "sDv^<>Xphd*", losses.items(), strict=True
    ):
        axes.plot(digit, image, marker, label=name, markersize=7, alpha=0.8)
    axes.set(xscale="log", xlabel="loss of the digits")
    axes.set(yscale="log", ylabel="error of the image")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


if __name__ == "__main__":
    demo.run_example(main)
