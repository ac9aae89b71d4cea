"""Averaged SGD: SGD with a falling step; ``eval_params()`` is the mean of all points
after ``t0``. Polyak & Juditsky 1992, SIAM J. Control Optim. 30; the steps of Bottou's
sgd as in torch, which has the mean in its state ``ax``. Here a changed ``lr`` acts at
once, in torch one step later.
"""

from fastopt.rule import Rule, where


def scalars(t, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0):
    eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
    mu = 1 / max(1.0, t - 1 - t0)
    return mu, 1.0, eta, 1 - lambd * eta, weight_decay


def update(p, g, ax, mu, one, eta, keep, weight_decay):
    g = g + weight_decay * p
    p = keep * p - eta * g
    return p, where(mu < one, ax + mu * (p - ax), p)


def mean(p, ax):
    return ax


asgd = Rule(update, scalars, state=("ax",), starts={"ax": "p"}, evaluate=mean)
