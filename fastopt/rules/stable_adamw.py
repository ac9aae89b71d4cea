"""StableAdamW: AdamW whose learning rate is clipped, array by array, by how surprising
the gradients are. Wortsman et al. 2023, arXiv:2304.13013. As the second version of the
authors' code, and optimi: bias correction is folded into the betas, weight decay is by
the clipped learning rate.
"""

from fastopt.rule import Rule, maximum, sqrt
from fastopt.rules.adamw import update


def scalars(t, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=1e-2):
    a1, a2 = (1 - beta1) / (1 - beta1**t), (1 - beta2) / (1 - beta2**t)
    return a2, eps * eps, a1, eps, lr, weight_decay


def measure(p, g, m, v, a2, tiny):
    v = v + a2 * (g * g - v)
    return (g * g / maximum(v, tiny),)


def settle(t, n, squares, a2, tiny, a1, eps, lr, weight_decay):
    lr = lr / max(1.0, sqrt(squares / n))
    return lr, a1, a2, eps, lr * weight_decay


stable_adamw = Rule(
    update,
    scalars,
    state=("m", "v"),
    measure=measure,
    settle=settle,
    name="stable_adamw",
)
