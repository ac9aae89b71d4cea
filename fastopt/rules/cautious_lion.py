"""C-Lion: Lion that moves only elements whose update and gradient agree in sign. Liang
et al. 2024, arXiv:2411.16085. As in the authors' code, the update is scaled by
n / (k + 1), where k of n elements move, and weight decay uses the old parameters.
"""

from fastopt.rule import Rule, sign, where


def scalars(t, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):
    return 1 - beta1, 0.0, 1.0, lr, 1 - beta2, lr * weight_decay


def measure(p, g, m, a1, zero, one):
    return (where(sign(m + a1 * (g - m)) * g > zero, one, zero),)


def settle(t, n, agreeing, one, lr, a2, decay):
    return lr * n / (agreeing + 1), a2, decay


def update(p, g, m, a1, zero, lr, a2, decay):
    u = sign(m + a1 * (g - m))
    return p - (where(u * g > zero, lr * u, zero) + decay * p), m + a2 * (g - m)


cautious_lion = Rule(update, scalars, state=("m",), measure=measure, settle=settle)
