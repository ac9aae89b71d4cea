"""RAdam, weight decay decoupled, as torch's ``decoupled_weight_decay``. Liu et al.
2020, arXiv:1908.03265; Loshchilov & Hutter 2019, arXiv:1711.05101.
"""

from fastopt.rule import Rule, sqrt, where


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2):
    step_size, adaptive = lr / (1 - beta1**t), 0.0
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 5:
        adaptive = 1.0
        r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        step_size = step_size * sqrt(r * (1 - beta2**t))
    return step_size, 1 - beta1, 1 - beta2, eps, lr * weight_decay, adaptive, 0.0, 1.0


def update(p, g, m, v, step_size, a1, a2, eps, decay, adaptive, zero, one):
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    step = step_size * m / where(adaptive > zero, sqrt(v) + eps, one)
    return p - (step + decay * p), m, v


radamw = Rule(update, scalars, state=("m", "v"))
