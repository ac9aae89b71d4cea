"""LAMB: Adam's step in proportion to each array's norm. You et al. 2020,
arXiv:1904.00962. As apex: arrays without weight decay keep lr, unless ``always_adapt``;
apex's clipping of all gradients first is ``clip_norm=1`` of the step.

timm's Lamb is the same with ``clip_norm=1``, its default ``max_grad_norm``. optax's
lamb clips nothing and adapts all arrays: it is ``always_adapt=True`` with
``weight_decay=0``, its default.
"""

from fastopt.rule import Rule, sqrt, wide


def scalars(
    t,
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-6,
    weight_decay=1e-2,
    always_adapt=False,
):
    c = sqrt(1 - beta2**t)  # bias correction, folded into the step and eps
    adapt = 1.0 if always_adapt or weight_decay != 0 else 0.0
    m_weight, a1, a2 = c / (1 - beta1**t), 1 - beta1, 1 - beta2
    return m_weight, a1, a2, eps * c, weight_decay, lr, adapt


def direction(p, g, m, v, m_weight, a1, a2, eps, weight_decay):
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    return m_weight * m / (sqrt(v) + eps) + weight_decay * p, m, v


def measure(p, u):
    return wide(p) * wide(p), wide(u) * wide(u)


def settle(t, n, pp, uu, lr, adapt):
    if adapt > 0 and pp > 0 and uu > 0:
        lr = lr * (sqrt(pp) / sqrt(uu))
    return (lr,)


def apply(p, u, lr):
    return (p - lr * u,)


lamb = Rule.in_passes(direction, measure, apply, scalars, settle, state=("m", "v"))
