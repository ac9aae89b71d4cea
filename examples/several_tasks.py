"""Two losses that want different things, and the front of what can be had.

    python examples/several_tasks.py [PICTURE]

Two quadratics of 20 parameters, of which the second is ten times as large. What can be
had at best, the Pareto front, is known exactly. From one start each method of
``fastopt.multitask`` takes its way there. It prints, for each, where it ends: both
losses, how far from the front that is (as a part of its extent), and in how many of the
steps a loss rose. Then UPGrad, with several preferences, finds points all along the
front. The picture, several_tasks.png by default, shows both. Takes less than a minute;
needs matplotlib.
"""

from __future__ import annotations

import sys

import numpy as np

import fastopt
from fastopt import multitask

SIZE, STEPS, LR = 20, 500, 0.03
rng = np.random.default_rng(3)


def quadratic(scale):
    """A matrix with eigenvalues from 0.3 to 3, times a number; and where it is zero."""
    axes, _ = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))
    return scale * (axes * np.geomspace(0.3, 3, SIZE)) @ axes.T, rng.standard_normal(
        SIZE
    )


TASKS = [quadratic(1.0), quadratic(10.0)]


def losses(x):
    return np.array([(x - a) @ H @ (x - a) / 2 for H, a in TASKS])


def gradients(x):
    return np.array([H @ (x - a) for H, a in TASKS])


def best(share):
    """Where a weighted sum of the losses is least; these points are the front."""
    (H, a), (K, b) = TASKS
    both = share * H + (1 - share) * K
    return np.linalg.solve(both, share * H @ a + (1 - share) * K @ b)


FRONT = np.array([losses(best(s)) for s in 1 / (1 + np.geomspace(1e-4, 1e4, 2001))])
EXTENT = FRONT.max(0) - FRONT.min(0)


def distance(reached):
    """How much better both losses could be, at the same time; 0 on the front."""
    return max(0.0, float(((reached - FRONT) / EXTENT).min(1).max()))


def descend(weigh):
    """From the start, the losses after every step."""
    x = np.full(SIZE, 1.5)
    opt = fastopt.gd(x, lr=LR)
    path = [losses(x)]
    for _ in range(STEPS):
        J = gradients(x)
        weights = weigh(fastopt.gram(J))
        # The methods differ in the lengths of their directions: here all have one.
        length = np.linalg.norm(weights @ J)
        scale = min(1.0, 1 / length) if length else 1.0
        opt.step(J, weights=weights, grad_scale=scale)
        path.append(losses(x))
    return np.array(path)


def main(picture="several_tasks.png"):
    methods = {
        "mean": multitask.mean,
        "mgda": multitask.mgda,
        "dualproj": multitask.dualproj,
        "upgrad": multitask.upgrad,
        "pcgrad": lambda G: multitask.pcgrad(G, rng),
        "gradvac": multitask.GradVac(rng),
        "cagrad": multitask.cagrad,
        "imtl_g": multitask.imtl_g,
        "aligned_mtl": multitask.aligned_mtl,
        "nash_mtl": multitask.nash_mtl,
        "fairgrad": multitask.fairgrad,
    }
    print(f"{'':12} {'loss 1':>8} {'loss 2':>8} {'from front':>11} {'rises':>6}")
    paths = {}
    for name, weigh in methods.items():
        path = paths[name] = descend(weigh)
        rises = np.count_nonzero((np.diff(path, axis=0) > 1e-12 * path[:-1]).any(1))
        first, second = path[-1]
        print(
            f"{name:12} {first:8.3f} {second:8.3f} {distance(path[-1]):11.4f} {rises:6}"
        )
    print(f"\n{'preference':12} {'loss 1':>8} {'loss 2':>8} {'from front':>11}")
    ends = []
    for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        preference = [share, 1 - share]
        end = descend(lambda G, p=preference: multitask.upgrad(G, p))[-1]
        ends.append(end)
        print(f"{share:<12} {end[0]:8.3f} {end[1]:8.3f} {distance(end):11.4f}")
    draw(paths, np.array(ends), picture)
    print(f"\n{picture}")


def draw(paths, ends, picture):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    for axes in (left, right):
        axes.plot(*FRONT.T, color="black", label="the front")
        axes.set_xlabel("loss 1")
        axes.set_ylabel("loss 2")
    for k, (name, path) in enumerate(paths.items()):
        color = plt.colormaps["tab20"](k)
        left.plot(*path.T, label=name, linewidth=1.5, color=color)
        left.plot(*path[-1], "o", color=color, markersize=6)
    left.legend(fontsize=8, ncol=2, loc="upper center")
    left.set_title("Ways to the front")
    right.plot(*ends.T, "o", label="upgrad, by preference")
    right.legend()
    right.set_title("Where preferences lead")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
