"""QHAdam: Adam whose moments are mixed with the gradient itself. Ma & Yarats 2019,
arXiv:1810.06801. The authors' defaults (``nu1 = nu2 = 1``) are Adam; they recommend
``nu1=0.7, beta1=0.995``. Weight decay is added to the gradient.
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t, lr=1e-3, beta1=0.9, beta2=0.999, nu1=1.0, nu2=1.0, eps=1e-8, weight_decay=0.0
):
    if not 0 <= nu2 <= 1:
        raise ValueError(f"nu2 must be in [0, 1], got {nu2!r}")
    m_weight, v_weight = nu1 / (1 - beta1**t), nu2 / (1 - beta2**t)
    a1, a2 = 1 - beta1, 1 - beta2
    return lr, a1, a2, m_weight, 1 - nu1, v_weight, 1 - nu2, eps, weight_decay


def update(p, g, m, v, lr, a1, a2, m_weight, g1, v_weight, g2, eps, weight_decay):
    g = g + weight_decay * p
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    root = sqrt(v_weight * v + g2 * (g * g)) + eps
    return p - lr * (m_weight * m + g1 * g) / root, m, v


qhadam = Rule(update, scalars, state=("m", "v"))
