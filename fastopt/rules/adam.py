"""Adam; weight decay is added to the gradient, as in torch. Kingma & Ba 2015,
arXiv:1412.6980."""

from fastopt.rule import Rule, sqrt


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    c = sqrt(1 - beta2**t)  # bias correction, folded into lr and eps
    return lr * c / (1 - beta1**t), 1 - beta1, 1 - beta2, eps * c, weight_decay


def update(p, g, m, v, step_size, a1, a2, eps, weight_decay):
    g = g + weight_decay * p
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    return p - step_size * m / (sqrt(v) + eps), m, v


adam = Rule(update, scalars, state=("m", "v"))
