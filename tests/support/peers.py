"""What fastopt and other people's optimizers are compared by: the same gradients under
the same falling learning rate."""

import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"


def told(tests):
    """What docs/parity.md says that the rules were compared with in this file."""
    row = rf"^\| `(\w+)` \| (.*) \| .*`{tests}`.* \| .* \|$"
    return dict(re.findall(row, PAGE.read_text("utf-8"), re.M))


def draw():
    """Parameters to begin with, and 200 steps of gradients of several sizes, of which
    the first element is always zero."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape) for shape in ((5, 3), (7,))]
    steps = []
    for t in range(200):
        size = (1.0, 0.03, 3.0)[t % 3]
        steps.append([size * rng.standard_normal(p.shape) for p in params])
        for grad in steps[-1]:
            grad.flat[0] = 0.0
    return params, steps


def falling(lr, t):
    """The learning rate after ``t`` of the steps."""
    return lr * (1 - t / 400)


def follow(rule, values):
    """The parameters after each step."""
    params, steps = draw()
    opt = rule(params, **values)
    for t, grads in enumerate(steps):
        opt.lr = falling(values["lr"], t)
        if rule.estimate and t % 10 == 0:
            opt.estimate(steps[t - 1])
        opt.step(grads)
        yield [p.copy() for p in params]


def difference(rule, values, theirs):
    """The largest of any element after any step from what it is in ``theirs``, relative
    to the largest value that it has had there."""
    worst, (first, _) = [], draw()
    largest = [np.abs(p) for p in first]
    for params, others in zip(follow(rule, values), theirs, strict=True):
        for n, (p, other) in enumerate(zip(params, others, strict=True)):
            largest[n] = np.maximum(largest[n], np.abs(other))
            worst.append(np.max(np.abs(p - other) / largest[n]))
    assert all(np.max(np.abs(p - q)) > 0.01 for p, q in zip(params, first, strict=True))
    return np.max(worst)  # NaN if any is
