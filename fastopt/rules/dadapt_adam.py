"""D-Adapted Adam: Adam that finds its own learning rate; leave ``lr`` at 1. Defazio &
Mishchenko 2023, arXiv:2301.07733. As the authors' code, with decoupled weight decay and
no bound on how fast the estimate d may grow. The sums are over all parameters of the
optimizer. Groups should have the same lr: one with another lr, which the authors' code
refuses, has an estimate of its own.
"""

from fastopt.rule import Rule, sqrt, wide


def scalars(
    t,
    d,
    numerator,
    lr=1.0,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    d0=1e-6,
    use_bias_correction=False,
):
    if d0 <= 0:
        raise ValueError(f"d0 must be above 0, got {d0!r}")
    dlr = d * lr
    if use_bias_correction:
        dlr = dlr * sqrt(1 - beta2**t) / (1 - beta1**t)
    root = sqrt(beta2)
    taken, m_taken, decay = (1 - root) * dlr, (1 - beta1) * dlr, weight_decay * dlr
    a2, numerator = 1 - beta2, root * numerator
    return root, taken, eps, beta1, m_taken, a2, decay, 1 - root, dlr, lr, d, numerator


def measure(p, g, m, v, s, root, taken, eps):
    return wide(g) * wide(s / (sqrt(v) + eps)), abs(root * s + taken * g)


def settle(t, n, along, norm, decay, rest, dlr, lr, d, numerator):
    numerator = numerator + rest * dlr * along
    if norm == 0:
        decay = 0.0  # no gradient yet: nothing moves
    elif lr > 0:
        d = max(d, numerator / (rest * norm))
    return decay, d, numerator


def update(p, g, m, v, s, root, taken, eps, beta1, m_taken, a2, decay):
    m = beta1 * m + m_taken * g
    v = v + a2 * (g * g - v)
    s = root * s + taken * g
    return p - (m / (sqrt(v) + eps) + decay * p), m, v, s


dadapt_adam = Rule(
    update,
    scalars,
    state=("m", "v", "s"),
    carry={"d": "d0", "numerator": 0.0},
    measure=measure,
    settle=settle,
    over="all",
)
