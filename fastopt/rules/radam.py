"""RAdam: Adam, rectified while its second moment is uncertain; before that, momentum.
Liu et al. 2020, arXiv:1908.03265. As torch: eps is added to the root before the bias
correction, weight decay is added to the gradient.
"""

from fastopt.rule import Rule, sqrt, where


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    step_size, adaptive = lr / (1 - beta1**t), 0.0
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 5:
        adaptive = 1.0
        r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        step_size = step_size * sqrt(r * (1 - beta2**t))
    return step_size, 1 - beta1, 1 - beta2, eps, weight_decay, adaptive, 0.0, 1.0


def update(p, g, m, v, step_size, a1, a2, eps, weight_decay, adaptive, zero, one):
    g = g + weight_decay * p
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    return p - step_size * m / where(adaptive > zero, sqrt(v) + eps, one), m, v


radam = Rule(update, scalars, state=("m", "v"))
