"""Signum: the sign of the momentum. Bernstein et al. 2018, arXiv:1802.04434, algorithm
2; weight decay is decoupled, as there.
"""

from fastopt.rule import Rule, sign


def scalars(t, lr=1e-3, beta=0.9, weight_decay=0.0):
    return lr, 1 - beta, lr * weight_decay


def update(p, g, m, lr, a, decay):
    m = m + a * (g - m)
    return p - (lr * sign(m) + decay * p), m


signum = Rule(update, scalars, state=("m",))
