"""How many iterations? As many as other data allow; or a run that can end any time.

    python examples/iterations.py [FOLDER]

A network that sees 100 digits only learns them by heart: its loss on other images
falls, and rises again. Early stopping ends the run there and takes the best parameters
back. Then, with all images: a run at a constant rate can be ended at any step by a
short decay, so runs of several lengths share one trunk; a cosine has to know its end
before it begins.

Prints both and saves iterations.png. Needs pip install '.[demo]'.
"""

import numpy as np
from matplotlib.figure import Figure

import fastopt
from fastopt import schedules
from fastopt.cli import demo

FEW, MOST, PATIENCE, EVERY = 100, 1000, 10, 10
LR, ENDS, SHARE = 0.1, (50, 100, 200, 400), 5  # a fifth of a run is its decay


def learn_by_heart(data, stop):
    """Few images; return the run and, at every look, the losses of them and others."""
    x, y = (part[:FEW] for part in data.train)
    others = [part[FEW:600] for part in data.train]
    looks = []

    def value_and_grad(params):
        grads = params.zeros_like()
        demo.backward(params, grads, x, y)
        return demo.evaluate(params, x, y)[0], grads

    def validate(run):
        if run.steps % EVERY:
            return False
        loss, _ = demo.evaluate(run.params, *others)
        looks.append((run.steps, run.loss, loss))
        return stop is not None and stop.step(loss, run.params)

    result = fastopt.minimize(
        value_and_grad,
        demo.mlp(0),
        fastopt.adam,
        MOST,
        lr=0.01,
        callbacks=[validate],
        best=False,  # by the loss of what is learned by heart, the last are the best
    )
    if stop is not None:
        stop.restore(result.params)
    return result, looks


def steps(opt, params, data, count, rng):
    grads = params.zeros_like()
    for _ in range(count):
        rows = rng.integers(len(data.train[0]), size=64)
        demo.backward(params, grads, *(part[rows] for part in data.train))
        opt.step(grads)


def branches(data):
    """For each length the loss of a branch of one trunk, and of a cosine of its own."""
    trunk, final_losses = demo.mlp(0), {}
    rng = np.random.default_rng(0)
    opt, costs = fastopt.sgd(trunk, lr=LR, momentum=0.9), [0, 0]
    for end in ENDS:
        decay = end // SHARE
        ahead = end - decay - opt.steps
        steps(opt, trunk, data, ahead, rng)
        branch = fastopt.flatten(trunk.views)
        last = fastopt.sgd(branch)
        last.load_state_dict(opt.state_dict())
        last.lr = schedules.wsd(LR, end, decay, shape="1-sqrt")
        steps(last, branch, data, decay, np.random.default_rng(1))
        before = demo.evaluate(trunk, *data.train)[0]
        alone = demo.mlp(0)
        cosine = fastopt.sgd(alone, lr=schedules.cosine(LR, end), momentum=0.9)
        steps(cosine, alone, data, end, np.random.default_rng(0))
        costs = [costs[0] + ahead + decay, costs[1] + end]
        losses = [demo.evaluate(p, *data.train)[0] for p in (branch, alone)]
        final_losses[end] = before, *losses
    return final_losses, costs


def main():
    data = demo.digits()
    stop = fastopt.EarlyStopping(PATIENCE)
    stopped, _ = learn_by_heart(data, stop)
    whole, looks = learn_by_heart(data, None)
    print(f"{FEW} images, at most {MOST} steps, {PATIENCE} looks of patience:")
    for result in (stopped, whole):
        loss, right = demo.evaluate(result.params, *data.test)
        print(
            f"  {result.steps:<5} steps: loss of other images {loss:.3f}, "
            f"{right:.1%} recognized"
        )
    print(f"  best at step {stop.best_look * EVERY}, to which the first went back")

    final_losses, costs = branches(data)
    print("\nAll images: training loss at the end of runs of several lengths")
    print("  steps  before the decay  after it  cosine")
    for end, (before, after, cosine) in final_losses.items():
        print(f"  {end:<6} {before:<17.4f} {after:<9.4f} {cosine:.4f}")
    print(f"One trunk with its branches took {costs[0]} steps, the cosines {costs[1]}.")

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    at, losses, others = zip(*looks, strict=True)
    left.semilogy(at, losses, label=f"the {FEW} images")
    left.semilogy(at, others, label="others")
    left.axvline(stopped.steps, color="0.5", linestyle="--", label="early stopping")
    left.set(xlabel="steps", ylabel="loss")
    left.legend(frameon=False)
    names = "before the decay", "after it", "a cosine of this length"
    for name, values in zip(
        names, zip(*final_losses.values(), strict=True), strict=True
    ):
        right.loglog(list(final_losses), values, "o-", label=name)
    right.set(xlabel="steps in the run", ylabel="training loss at its end")
    right.legend(frameon=False)
    return figure


if __name__ == "__main__":
    demo.run_example(main)
