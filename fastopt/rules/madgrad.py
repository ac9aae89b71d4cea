"""MADGRAD: dual averaging by the cube root of the squares, with momentum. Defazio &
Jelassi 2021, arXiv:2101.11075. As the authors' code, eps is also added to lr, unless it
is 0; weight decay is added to the gradient.
"""

from fastopt.rule import Rule, cbrt, sqrt


def scalars(t, lr=1e-2, momentum=0.9, eps=1e-6, weight_decay=0.0):
    weight = (lr + eps) * sqrt(1.0 * t) if lr != 0 else 0.0
    return weight, 1 - momentum, eps, weight_decay


def update(p, g, v, s, x0, weight, c, eps, weight_decay):
    g = g + weight_decay * p
    v = v + weight * (g * g)
    s = s + weight * g
    z = x0 - s / (cbrt(v) + eps)
    return p + c * (z - p), v, s, x0


madgrad = Rule(update, scalars, state=("grad_sum_sq", "s", "x0"), starts={"x0": "p"})
