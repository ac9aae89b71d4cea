"""NovoGrad: momentum of gradients normalised array by array, with one number for each
array's second moment. Ginsburg et al. 2019, arXiv:1905.11286. As the authors' code and
optax, and unlike apex: the first second moment is the first square, nothing is
corrected for bias, weight decay goes into the momentum.
"""

from fastopt.rule import Rule, sqrt, wide


def scalars(
    t,
    v,
    lr=1e-3,
    beta1=0.95,
    beta2=0.98,
    eps=1e-8,
    weight_decay=0.0,
    grad_averaging=False,
):
    taken = 1 - beta1 if grad_averaging else 1.0
    return lr, beta1, taken, weight_decay, beta2, eps, v


def measure(p, g, m):
    return (wide(g) * wide(g),)


def settle(t, n, squares, taken, weight_decay, beta2, eps, v):
    v = squares if v == 0 else beta2 * v + (1 - beta2) * squares
    norm = sqrt(v) + eps
    return taken / norm if norm > 0 else 0.0, taken * weight_decay, v


def update(p, g, m, lr, beta1, g_weight, p_weight):
    m = beta1 * m + (g_weight * g + p_weight * p)
    return p - lr * m, m


novograd = Rule(
    update,
    scalars,
    state=("m",),
    carry={"v": 0.0},
    measure=measure,
    settle=settle,
)
