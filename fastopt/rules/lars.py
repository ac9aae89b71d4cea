"""LARS: SGD with momentum in proportion to each array's norm. You et al. 2017,
arXiv:1708.03888. As timm: lr stands outside the momentum, arrays without weight decay
keep it, unless ``always_adapt``; the paper's momentum and decay are the defaults.

timm's Lars has the defaults ``momentum=0`` and ``weight_decay=0``, and no clipping but
with its ``trust_clip``. optax's lars adapts all arrays, as ``always_adapt=True``, has
lr inside the momentum, and divides by the norm of the gradient with its decay, where
here and in the paper the norms of the two are added; its defaults are
``weight_decay=0``, ``eps=0``, and lr must be given.
"""

from fastopt.rule import Rule, sqrt, wide


def scalars(
    t,
    lr=1.0,
    momentum=0.9,
    weight_decay=5e-4,
    trust_coeff=1e-3,
    eps=1e-8,
    always_adapt=False,
):
    if trust_coeff < 0:
        raise ValueError(f"trust_coeff must be at least 0, got {trust_coeff!r}")
    adapt = 1.0 if always_adapt or weight_decay != 0 else 0.0
    return lr, momentum, weight_decay, trust_coeff, eps, adapt


def measure(p, g, b):
    return wide(p) * wide(p), wide(g) * wide(g)


def settle(t, n, pp, gg, weight_decay, trust_coeff, eps, adapt):
    ratio = 1.0
    if adapt > 0 and pp > 0 and gg > 0:
        norm = sqrt(pp)
        ratio = trust_coeff * norm / (sqrt(gg) + weight_decay * norm + eps)
    return weight_decay, ratio


def update(p, g, b, lr, mu, weight_decay, ratio):
    b = mu * b + ratio * (g + weight_decay * p)
    return p - lr * b, b


lars = Rule(update, scalars, state=("momentum_buffer",), measure=measure, settle=settle)
