"""MARS-AdamW: AdamW on gradients of less variance. Yuan et al. 2024, arXiv:2411.10438.
This is the authors' approximate form, with the gradient of the previous step (0 at the
first step, unlike in timm). It applies to arrays of any shape, not only to matrices.
"""

from fastopt.rule import Rule, sqrt, wide


def scalars(
    t, lr=3e-3, beta1=0.95, beta2=0.99, gamma=0.025, eps=1e-8, weight_decay=0.0
):
    c = sqrt(1 - beta2**t)  # bias correction, folded into lr and eps
    ahead, step_size = gamma * beta1 / (1 - beta1), lr * c / (1 - beta1**t)
    return ahead, step_size, 1 - beta1, 1 - beta2, eps * c, lr * weight_decay


def measure(p, g, m, v, last, ahead):
    c = g + ahead * (g - last)
    return (wide(c) * wide(c),)


def settle(t, n, squares, step_size, a1, a2, eps, decay):
    return 1 / max(1.0, sqrt(squares)), step_size, a1, a2, eps, decay


def update(p, g, m, v, last, ahead, scale, step_size, a1, a2, eps, decay):
    c = scale * (g + ahead * (g - last))
    m = m + a1 * (c - m)
    v = v + a2 * (c * c - v)
    return p - (step_size * m / (sqrt(v) + eps) + decay * p), m, v, g


mars = Rule(
    update,
    scalars,
    state=("m", "v", "last_grad"),
    measure=measure,
    settle=settle,
)
