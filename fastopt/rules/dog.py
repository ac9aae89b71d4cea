"""DoG: SGD whose step is the distance from the start over the gradients' norms; leave
``lr`` at 1. Ivgi et al. 2023, arXiv:2302.12022. As the authors' code: the first
distance is ``reps_rel * (1 + norm of the parameters)``; weight decay is added to the
gradient. The norms are over all parameters of the optimizer (the authors': of each
group). The authors average the parameters: ``ema`` does.
"""

from fastopt.rule import Rule, sqrt, wide


def scalars(t, distance, squares, lr=1.0, reps_rel=1e-6, eps=1e-8, weight_decay=0.0):
    if reps_rel <= 0:
        raise ValueError(f"reps_rel must be above 0, got {reps_rel!r}")
    return weight_decay, lr, reps_rel, eps, distance, squares


def measure(p, g, x0, weight_decay):
    g = g + weight_decay * p
    return (
        wide(p - x0) * wide(p - x0),
        wide(p) * wide(p),
        wide(g) * wide(g),
    )


def settle(t, n, moved, norm, gg, lr, reps_rel, eps, distance, squares):
    if distance == 0:
        distance = reps_rel * (1 + sqrt(norm))
    distance = max(distance, sqrt(moved))
    squares = squares + gg
    return lr * distance / sqrt(squares + eps), distance, squares


def update(p, g, x0, weight_decay, step):
    return p - step * (g + weight_decay * p), x0


dog = Rule(
    update,
    scalars,
    state=("x0",),
    starts={"x0": "p"},
    carry={"distance": 0.0, "squares": 0.0},
    measure=measure,
    settle=settle,
    over="all",
)
