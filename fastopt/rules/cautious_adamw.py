"""C-AdamW: AdamW that moves only elements whose update and gradient agree in sign.
Liang et al. 2024, arXiv:2411.16085. As in the authors' code, the update is scaled by
n / k, at most 1000, where k of n elements move. Unlike there and as in torch, eps is
corrected for bias.
"""

from fastopt.rule import Rule, sign, sqrt, where


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2):
    c = sqrt(1 - beta2**t)  # bias correction, folded into lr and eps
    step_size, decay = lr * c / (1 - beta1**t), lr * weight_decay
    return 1 - beta1, 0.0, 1.0, step_size, 1 - beta2, eps * c, decay


def measure(p, g, m, v, a1, zero, one):
    m = m + a1 * (g - m)
    return (where(sign(m) * g > zero, one, zero),)


def settle(t, n, agreeing, one, step_size, a2, eps, decay):
    return step_size / max(agreeing / n, 1e-3), a2, eps, decay


def update(p, g, m, v, a1, zero, step_size, a2, eps, decay):
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    step = step_size * m / (sqrt(v) + eps)
    # The sign and not m itself: a product of small numbers would vanish.
    return p - (where(sign(m) * g > zero, step, zero) + decay * p), m, v


cautious_adamw = Rule(update, scalars, state=("m", "v"), measure=measure, settle=settle)
