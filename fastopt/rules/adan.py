"""Adan: Adam with the momentum of the gradients' differences. Xie et al. 2022,
arXiv:2208.06677. As in the authors' code, betas are 1 minus the paper's, and at the
first step the previous gradient is taken to be the current one. Weight decay is
proximal or, with ``no_prox``, decoupled as in AdamW.
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t,
    lr=1e-3,
    beta1=0.98,
    beta2=0.92,
    beta3=0.99,
    eps=1e-8,
    weight_decay=0.0,
    no_prox=False,
):
    c = sqrt(1 - beta3**t)  # bias correction, folded into the steps and eps
    m_step, d_step = lr * c / (1 - beta1**t), lr * c * beta2 / (1 - beta2**t)
    before = 0.0 if t == 1 else 1.0
    decay = lr * weight_decay
    keep, shrink = (1 - decay, 1.0) if no_prox else (1.0, 1 / (1 + decay))
    a1, a2, a3 = 1 - beta1, 1 - beta2, 1 - beta3
    return m_step, d_step, a1, a2, a3, beta2, eps * c, before, keep, shrink


def update(
    p, g, m, d, n, last, m_step, d_step, a1, a2, a3, beta2, eps, before, keep, shrink
):
    delta = before * (g - last)
    h = g + beta2 * delta
    m = m + a1 * (g - m)
    d = d + a2 * (delta - d)
    n = n + a3 * (h * h - n)
    p = (keep * p - (m_step * m + d_step * d) / (sqrt(n) + eps)) * shrink
    return p, m, d, n, g


adan = Rule(update, scalars, state=("m", "d", "n", "last_grad"))
