"""GD whose learning rate falls as 1 / (1 + sqrt(completed steps)). Zinkevich 2003,
ICML: steps of order 1/sqrt(t) have regret of order sqrt(t)."""

from fastopt.rule import Rule, sqrt


def scalars(t, lr=1e-3):
    return (lr / (1 + sqrt(float(t - 1))),)


def update(p, g, lr):
    return (p - lr * g,)


dynamic_gd = Rule(update, scalars)
