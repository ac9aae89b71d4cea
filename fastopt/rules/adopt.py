"""ADOPT: Adam that divides by the previous second moment, and converges with any
beta2. Taniguchi et al. 2024, arXiv:2411.02853. As in the authors' code, the first step
only initializes the second moment, normalised gradients are clipped to the fourth root
of the number of completed steps, and weight decay is added to the gradient.
"""

from fastopt.rule import Rule, maximum, minimum, sqrt


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.9999, eps=1e-6, weight_decay=0.0):
    clip = (t - 1) ** 0.25
    a1, a2 = 1 - beta1, 1 - beta2
    if t == 1:
        lr, a1, a2 = 0.0, 0.0, 1.0
    return lr, a1, a2, eps, weight_decay, -clip, clip


def update(p, g, m, v, lr, a1, a2, eps, weight_decay, low, high):
    g = g + weight_decay * p
    u = minimum(maximum(g / maximum(sqrt(v), eps), low), high)
    m = m + a1 * (u - m)
    return p - lr * m, m, v + a2 * (g * g - v)


adopt = Rule(update, scalars, state=("m", "v"))
