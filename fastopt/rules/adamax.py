"""Adamax: Adam by the largest gradient instead of the mean square. Kingma & Ba 2015,
arXiv:1412.6980, section 7.1. As torch, eps is added to the gradient's magnitude, and
weight decay to the gradient.
"""

from fastopt.rule import Rule, maximum


def scalars(t, lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    return lr / (1 - beta1**t), 1 - beta1, beta2, eps, weight_decay


def update(p, g, m, u, step_size, a1, beta2, eps, weight_decay):
    g = g + weight_decay * p
    m = m + a1 * (g - m)
    u = maximum(beta2 * u, abs(g) + eps)
    return p - step_size * m / u, m, u


adamax = Rule(update, scalars, state=("m", "u"))
