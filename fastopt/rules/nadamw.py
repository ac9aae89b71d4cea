"""NAdamW: NAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``. Dozat
2016, ICLR workshop; Loshchilov & Hutter 2019, arXiv:1711.05101.
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t,
    mu_product,
    lr=2e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=1e-2,
    momentum_decay=4e-3,
):
    c = sqrt(1 - beta2**t)  # bias correction, folded into the steps and eps
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    following = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    mu_product = mu_product * mu
    g_step = lr * c * (1 - mu) / (1 - mu_product)
    m_step = lr * c * following / (1 - mu_product * following)
    decay = lr * weight_decay
    return g_step, m_step, 1 - beta1, 1 - beta2, eps * c, decay, mu_product


def update(p, g, m, v, g_step, m_step, a1, a2, eps, decay):
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    p = p - ((g_step * g + m_step * m) / (sqrt(v) + eps) + decay * p)
    return p, m, v


nadamw = Rule(update, scalars, state=("m", "v"), carry={"mu_product": 1.0})
