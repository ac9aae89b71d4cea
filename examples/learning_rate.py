"""How large a learning rate? A range test, a grid, and rules that need none.

    python examples/learning_rate.py [FOLDER]

The range test takes a hundred steps, each with a larger rate than the one before, and
puts everything back. The grid trains with every rate, which is what the test saves. The
rules at the end find their step size themselves.

Prints what each of them says and saves learning_rate.png. Needs pip install '.[demo]'.
"""

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt.cli import demo

STEPS, SEEDS, BATCH = 150, 3, 64


def batches(data, rng):
    """The loss of a batch, and its gradient."""
    x, y = data.train
    grads = demo.mlp(0).zeros_like()

    def value_and_grad(params):
        rows = rng.integers(len(x), size=BATCH)
        demo.backward(params, grads, x[rows], y[rows])
        return demo.evaluate(params, x[rows], y[rows])[0], grads

    return value_and_grad


def trained(make, data):
    """The loss of all training images in the end: the median of some seeds."""
    losses = []
    for seed in range(SEEDS):
        function = batches(data, np.random.default_rng(seed))
        with np.errstate(all="ignore"):
            params = demo.mlp(seed)
            opt = make(params)
            for _ in range(STEPS):
                opt.step(function(params)[1])
            used = opt.eval_params() if opt.ema is None else opt.ema_params
            losses.append(demo.evaluate(used, *data.train)[0])
    return float(np.median(np.nan_to_num(losses, nan=np.inf)))


def main():
    data = demo.digits()
    figure = Figure(figsize=(12, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)

    rng = np.random.default_rng(0)
    opt = fastopt.sgd(demo.mlp(0), momentum=0.9)
    test = fastopt.lr_range_test(batches(data, rng), opt, rng=rng)
    test.plot(left)
    left.set_title(f"The range test: {len(test.lrs)} steps")
    print("SGD with momentum 0.9. The range test suggests")
    for how in ("valley", "steepest", "minimum"):
        print(f"  {how:<9} {test.suggestion(how):.3f}")

    grid = 10 ** np.arange(-3, 0.3, 1 / 3)
    losses = [
        trained(lambda p, lr=lr: fastopt.sgd(p, lr=float(lr), momentum=0.9), data)
        for lr in grid
    ]
    best = int(np.argmin(losses))
    print(f"\n  lr      loss after {STEPS} steps")
    for lr, loss in zip(grid, losses, strict=True):
        print(f"  {lr:<7.3f} {loss:.4f}{'  the best' if loss == losses[best] else ''}")
    ratio = test.suggestion() / grid[best]
    print(f"The valley is {ratio:.2f} times the best rate of the grid.\n")

    print(f"Without a learning rate to choose, loss after {STEPS} steps")
    right.loglog(grid, losses, "o-", label="sgd, momentum 0.9")
    for name, make in {
        "prodigy": lambda p: fastopt.prodigy(p),
        "dog, averaged": lambda p: fastopt.dog(p, ema=0.9),
        "schedule_free_adamw": lambda p: fastopt.schedule_free_adamw(p),
    }.items():
        loss = trained(make, data)
        print(f"  {name:<20} {loss:.4f}")
        color = f"C{len(right.lines)}"
        right.axhline(loss, linestyle="--", color=color, label=name)
    right.axvline(test.suggestion(), color="#D55E00", label="valley")
    right.set(xlabel="learning rate", ylabel=f"training loss after {STEPS} steps")
    right.set(ylim=(None, 3), title="What a grid says")
    right.legend(frameon=False)
    return figure


if __name__ == "__main__":
    demo.run_example(main)
