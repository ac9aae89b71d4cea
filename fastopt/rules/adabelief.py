"""AdaBelief: Adam by the gradients' distance from their mean. Zhuang et al. 2020,
arXiv:2010.07468. As the authors' code: eps is added to the second moment at each step,
the step is rectified as RAdam's (``rectify=False``: as in the paper), weight decay is
decoupled.
"""

from fastopt.rule import Rule, sqrt, where


def scalars(
    t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-16, weight_decay=0.0, rectify=True
):
    step_size, adaptive, c = lr / (1 - beta1**t), 1.0, sqrt(1 - beta2**t)
    outer = eps
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if not rectify:
        outer, step_size = eps * c, step_size * c
    elif rho >= 5:
        r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        step_size = step_size * c * sqrt(r)
    else:
        adaptive = 0.0
    decay = lr * weight_decay
    return step_size, 1 - beta1, 1 - beta2, eps, outer, decay, adaptive, 0.0, 1.0


def update(p, g, m, s, step_size, a1, a2, eps, outer, decay, adaptive, zero, one):
    m = m + a1 * (g - m)
    s = s + a2 * ((g - m) * (g - m) - s) + eps
    step = step_size * m / where(adaptive > zero, sqrt(s) + outer, one)
    return p - (step + decay * p), m, s


adabelief = Rule(update, scalars, state=("m", "s"))
