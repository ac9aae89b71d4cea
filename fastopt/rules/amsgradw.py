"""AMSGrad with decoupled weight decay: AdamW under torch's ``amsgrad=True``.
Reddi, Kale & Kumar 2018, arXiv:1904.09237; Loshchilov & Hutter 2019, arXiv:1711.05101.
"""

from fastopt.rule import Rule, maximum, sqrt
from fastopt.rules.adamw import scalars


def update(p, g, m, v, v_max, step_size, a1, a2, eps, decay):
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    v_max = maximum(v_max, v)
    p = p - (step_size * m / (sqrt(v_max) + eps) + decay * p)
    return p, m, v, v_max


amsgradw = Rule(update, scalars, state=("m", "v", "v_max"))
