"""AMSGrad: Adam over the largest second moment so far. Reddi, Kale & Kumar 2018,
arXiv:1904.09237. As in torch, the maximum is taken of the uncorrected moment.
"""

from fastopt.rule import Rule, maximum, sqrt
from fastopt.rules.adam import scalars


def update(p, g, m, v, v_max, step_size, a1, a2, eps, weight_decay):
    g = g + weight_decay * p
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    v_max = maximum(v_max, v)
    return p - step_size * m / (sqrt(v_max) + eps), m, v, v_max


amsgrad = Rule(update, scalars, state=("m", "v", "v_max"))
