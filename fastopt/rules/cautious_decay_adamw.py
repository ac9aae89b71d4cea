"""AdamW that decays only what its step does not make larger. Chen et al. 2025,
arXiv:2510.12402 (cautious weight decay), algorithm 1: where the step is zero, as it is
before the first gradient, there is decay.
"""

from fastopt.rule import Rule, sign, sqrt, where


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2):
    c = sqrt(1 - beta2**t)  # bias correction, folded into lr and eps
    decay = lr * weight_decay
    return lr * c / (1 - beta1**t), 1 - beta1, 1 - beta2, eps * c, decay, 0.0


def update(p, g, m, v, step_size, a1, a2, eps, decay, zero):
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    step = step_size * m / (sqrt(v) + eps)
    # The sign and not the step itself: a product of small numbers would vanish.
    return p - (step + where(sign(step) * p < zero, zero, decay) * p), m, v


cautious_decay_adamw = Rule(update, scalars, state=("m", "v"))
