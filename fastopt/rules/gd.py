"""GD: gradient descent. Cauchy 1847, Comptes rendus 25:536."""

from fastopt.rule import Rule


def scalars(t, lr=1e-3):
    return (lr,)


def update(p, g, lr):
    return (p - lr * g,)


gd = Rule(update, scalars)
