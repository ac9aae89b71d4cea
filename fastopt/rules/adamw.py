"""AdamW: Adam, weight decay decoupled. Loshchilov & Hutter 2019, arXiv:1711.05101."""

from fastopt.rule import Rule, sqrt


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2):
    c = sqrt(1 - beta2**t)  # bias correction, folded into lr and eps
    return lr * c / (1 - beta1**t), 1 - beta1, 1 - beta2, eps * c, lr * weight_decay


def update(p, g, m, v, step_size, a1, a2, eps, decay):
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    p = p - (step_size * m / (sqrt(v) + eps) + decay * p)
    return p, m, v


adamw = Rule(update, scalars, state=("m", "v"))
