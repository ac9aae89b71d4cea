"""Which algorithm, and with which schedule? Five, on equal terms.

    python examples/which_algorithm.py [FOLDER]

Each algorithm trains a small network on handwritten digits with each schedule: with
four learning rates, of which the one with the least training loss counts, and three
seeds. All get the same first weights and the same batches.

Prints a table and saves which_algorithm.png. Needs pip install '.[demo]'.
"""

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt import schedules
from fastopt.cli import demo

STEPS, SEEDS, BATCH = 100, 3, 32

ALGORITHMS = {  # and the first of four rates, each three times the one before
    "sgd": (lambda p, lr: fastopt.sgd(p, lr=lr, momentum=0.9), 0.03),
    "rmsprop": (lambda p, lr: fastopt.rmsprop(p, lr=lr), 0.003),
    "adagrad": (lambda p, lr: fastopt.adagrad(p, lr=lr), 0.03),
    "adam": (lambda p, lr: fastopt.adam(p, lr=lr), 0.01),
    "lion": (lambda p, lr: fastopt.lion(p, lr=lr), 0.001),
}
SCHEDULES = {
    "constant": lambda lr: lr,
    "cosine": lambda lr: schedules.cosine(lr, STEPS),
    "wsd": lambda lr: schedules.wsd(lr, STEPS, decay=STEPS // 5, shape="1-sqrt"),
}


def train(make, lr, seed, data):
    """The losses of all training images and the accuracy on the others, at the end."""
    x, y = data.train
    params = demo.mlp(seed)
    grads, rng = params.zeros_like(), np.random.default_rng(seed)
    opt = make(params, lr)
    for _ in range(STEPS):
        rows = rng.integers(len(x), size=BATCH)
        demo.backward(params, grads, x[rows], y[rows])
        opt.step(grads)
    return demo.evaluate(params, x, y)[0], demo.evaluate(params, *data.test)[1]


def main():
    data = demo.digits()
    best, tried = {}, {}
    for algorithm, (make, first) in ALGORITHMS.items():
        for schedule, rate_of in SCHEDULES.items():
            runs = {}
            for lr in first * 3.0 ** np.arange(4):
                with np.errstate(all="ignore"):  # a rate may be too large
                    ends = [train(make, rate_of(lr), s, data) for s in range(SEEDS)]
                runs[lr] = np.nan_to_num(np.array(ends), nan=np.inf)
            tried[algorithm, schedule] = {
                lr: np.median(r[:, 0]) for lr, r in runs.items()
            }
            lr = min(runs, key=lambda lr: np.median(runs[lr][:, 0]))
            best[algorithm, schedule] = lr, runs[lr]

    print(f"{STEPS} steps of {BATCH} images, median (least, most) of {SEEDS} seeds")
    print("algorithm  schedule  lr      training loss            test accuracy")
    for (algorithm, schedule), (lr, runs) in best.items():
        low, loss, high = np.quantile(runs[:, 0], (0, 0.5, 1))
        bad, right, good = np.quantile(runs[:, 1], (0, 0.5, 1))
        print(
            f"{algorithm:<10} {schedule:<9} {lr:<7.2g} "
            f"{loss:.4f} ({low:.4f}, {high:.4f})  {right:.1%} ({bad:.1%}, {good:.1%})"
        )

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    for axes, schedule in zip(
        figure.subplots(1, len(SCHEDULES), sharey=True), SCHEDULES, strict=True
    ):
        for algorithm in ALGORITHMS:
            lrs, losses = zip(*tried[algorithm, schedule].items(), strict=True)
            axes.loglog(lrs, losses, "o-", label=algorithm)
        axes.set(title=schedule, xlabel="learning rate")
    figure.axes[0].set(ylabel="training loss at the end", ylim=(None, 3))
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    demo.run_example(main)
