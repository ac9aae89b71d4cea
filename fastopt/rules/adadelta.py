"""Adadelta: scales the gradient by the ratio of two running root mean squares. Zeiler
2012, arXiv:1212.5701. As in torch, there is a learning rate, and weight decay is added
to the gradient. The ratio of the two roots is computed as one root of the quotient.
"""

from fastopt.rule import Rule, sqrt


def scalars(t, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0):
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho!r}")
    return lr, rho, 1 - rho, eps, weight_decay


def update(p, g, v, a, lr, rho, c, eps, weight_decay):
    g = g + weight_decay * p
    v = rho * v + c * (g * g)
    d = sqrt((a + eps) / (v + eps)) * g
    a = rho * a + c * (d * d)
    return p - lr * d, v, a


adadelta = Rule(update, scalars, state=("square_avg", "acc_delta"))
