"""What textbooks and lecture notes get wrong, run and put right.

    python examples/textbook_mistakes.py [FOLDER]

1. "A small epsilon of at least 0": it must be above 0.
2. "RMSprop averages the gradients": it averages their squares.
3. "Stochastic: take the gradient of a random coordinate": where all of them are equal
   that is gradient descent, without any noise; SGD samples examples, not coordinates.
4. "Train until the loss is small": labels that are noise leave their variance.

Prints what happens and saves textbook_mistakes.png. Needs matplotlib.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt import schedules
from fastopt.rule import Rule, sqrt


def epsilon():
    print("1. A step of RMSprop along a gradient of 0, from 1:")
    for eps in (0.0, 1e-8):
        x = np.ones(1)
        fastopt.rmsprop(x, eps=eps).step(np.zeros(1))
        print(f"   epsilon {eps:g}: {x[0]:g}")


def scalars(t, lr=0.1, alpha=0.9, eps=1e-8):
    return lr, 1 - alpha, eps


def update(p, g, s, lr, a, eps):
    s = s + a * (g - s)  # the mistake: it should be g * g
    return p - lr * g / (sqrt(s) + eps), s


def squares():
    mistaken = Rule(update, scalars, state=("s",), name="mistaken")

    def parabola(x):
        return float(x @ x), 2 * x

    print("2. 300 steps on x**2, with averages of gradients, and of their squares:")
    for start in (3.0, -3.0):
        ends = []
        for rule, more in ((mistaken, {}), (fastopt.rmsprop, {"alpha": 0.9})):
            x = np.full(1, start)
            opt = rule(x, lr=0.1, backend="numpy", **more)
            with np.errstate(invalid="ignore"):
                for _ in range(300):
                    opt.step(parabola(x)[1])
            ends.append(x[0])
        print(f"   from {start:g}: {ends[0]:.2g}, and {ends[1]:.2g}")
    print("   As soon as an average is negative, its root is NaN.")


def coordinates(axes):
    rng = np.random.default_rng(0)
    size, steps = 1000, 1000
    impostor, descent = np.full(size, 10.0), np.full(size, 10.0)
    opt, gd = fastopt.gd(impostor, lr=0.1), fastopt.gd(descent, lr=0.1)
    for _ in range(steps):
        opt.step(np.full(size, 2 * impostor[rng.integers(size)]))
        gd.step(2 * descent)
    same = (impostor == descent).all()
    print(
        f"3. {steps} steps on x**2 in {size} equal coordinates, one of them at random:"
    )
    print(f"   {impostor[0]:.3g}; the same bits as gradient descent: {same}")

    # What SGD is: the mean of a loss over examples, and steps on some of them.
    data = rng.normal(size=(size, 5))
    truth = np.arange(1.0, 6.0)
    labels = data @ truth + rng.normal(size=size)
    best = np.linalg.lstsq(data, labels, rcond=None)[0]
    print("   Least squares, 1000 steps on 10 of 1000 examples; from the solution:")
    for name, lr in {
        "lr 0.1": 0.1,
        "lr 0.1 / (1 + sqrt(t))": schedules.inverse_power(0.1),
        "lr 0.1, to 0 along a cosine": schedules.cosine(0.1, steps),
    }.items():
        w, away = np.zeros(5), []
        opt = fastopt.sgd(w, lr=lr)
        for _ in range(steps):
            rows = rng.integers(size, size=10)
            error = data[rows] @ w - labels[rows]
            opt.step(data[rows].T @ error / len(rows))
            away.append(np.linalg.norm(w - best))
        print(f"   {name:<28} {away[-1]:.2g}")
        axes.semilogy(away, label=name, linewidth=0.8)
    axes.set(xlabel="steps", ylabel="distance from the solution")
    axes.set_title("SGD stops where its noise is, unless its steps get smaller")
    axes.legend(frameon=False)


def noise():
    rng = np.random.default_rng(0)
    x, labels = rng.uniform(size=(5000, 10)), rng.uniform(size=5000)

    def squared_error(w):
        error = x @ w[:-1] + w[-1] - labels
        grad = np.append(x.T @ error, error.sum())
        return float(np.mean(error**2)), 2 * grad / len(labels)

    result = fastopt.minimize(squared_error, np.zeros(11), fastopt.adam, 2000, lr=0.02)
    print("4. Labels that are uniform noise: the least squared error is")
    print(f"   {result.loss:.4f}, their variance 1/12 = {1 / 12:.4f}")


def main(folder):
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    epsilon()
    squares()
    coordinates(figure.subplots())
    noise()
    figure.savefig(folder / "textbook_mistakes.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
