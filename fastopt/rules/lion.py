"""Lion: the sign of a mixture of momentum and gradient. Chen et al. 2023,
arXiv:2302.06675. Weight decay is decoupled; where the mixture is zero, so is the step.
"""

from fastopt.rule import Rule, sign


def scalars(t, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):
    return lr, 1 - beta1, 1 - beta2, lr * weight_decay


def update(p, g, m, lr, a1, a2, decay):
    u = sign(m + a1 * (g - m))
    return p - (lr * u + decay * p), m + a2 * (g - m)


lion = Rule(update, scalars, state=("m",))
