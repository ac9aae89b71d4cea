"""Why optimize at all? Guessing against following the slope, in equally many looks.

    python examples/why_optimize.py [FOLDER]

A linear model of handwritten digits has 650 parameters. Guesses are drawn around zero,
or around the best guess so far; gradient descent and Adam look as often, at the loss
and its gradient. The fewer parameters there are, the better a guess: the last figures
show that.

Prints the losses and saves why_optimize.png. Needs pip install '.[demo]'.
"""

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt.cli import demo

LOOKS = 200


def model(x, y, classes):
    """The loss of a linear model with a softmax, and its gradient."""
    truth = np.eye(classes)[y]

    def value_and_grad(w):
        scores = x @ w
        scores -= scores.max(axis=1, keepdims=True)
        p = np.exp(scores)
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-300)).mean()
        return float(loss), x.T @ (p - truth) / len(y)

    return value_and_grad


def guesses(value_and_grad, shape, rng, near_the_best):
    """The least loss so far, after each guess."""
    best, least, curve = np.zeros(shape), np.inf, []
    for _ in range(LOOKS):
        # The best of some spreads; of one for all, none is good for both.
        spread = 10 ** rng.uniform(-2, 0)
        guess = spread * rng.normal(size=shape) + (best if near_the_best else 0)
        loss, _ = value_and_grad(guess)
        if loss < least:
            best, least = guess, loss
        curve.append(least)
    return curve


def main():
    (x, y), (x_test, y_test) = demo.digits()
    x, x_test = (np.c_[part, np.ones(len(part))].astype(float) for part in (x, x_test))
    shape = (x.shape[1], 10)
    function = model(x, y, 10)

    curves = {
        name: guesses(function, shape, np.random.default_rng(0), near_the_best)
        for name, near_the_best in (("guesses", False), ("guesses near the best", True))
    }
    for name, rule, lr in (("gd", fastopt.gd, 0.5), ("adam", fastopt.adam, 0.05)):
        result = fastopt.minimize(function, np.zeros(shape), rule, LOOKS - 1, lr=lr)
        curves[name] = result.losses
        right = ((x_test @ result.params).argmax(axis=1) == y_test).mean()
        print(f"{name}: {right:.1%} of {len(y_test)} other images are recognized")

    print(f"\nLoss after {LOOKS} looks, {np.prod(shape)} parameters; knowing nothing,")
    print(f"it is {np.log(10):.3f}")
    for name, losses in curves.items():
        print(f"  {name:<22} {losses[-1]:.3f}")

    print("\nThe same, of some of the pixels only:")
    print("  parameters  guesses near the best  adam")
    by_spread = np.argsort(-x.std(axis=0))
    for pixels in (1, 4, 16, 64):
        part, size = model(x[:, by_spread[:pixels]], y, 10), (pixels, 10)
        guessed = guesses(part, size, np.random.default_rng(0), True)[-1]
        slope = fastopt.minimize(part, np.zeros(size), fastopt.adam, LOOKS - 1, lr=0.05)
        print(f"  {10 * pixels:<11} {guessed:<22.3f} {slope.loss:.3f}")

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.items():
        axes.semilogy(losses, label=name)
    axes.set(xlabel="looks at the loss", ylabel="loss")
    axes.set_title("A slope says where to go; a guess only where one is")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    demo.run_example(main)
