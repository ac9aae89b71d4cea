"""Prodigy: Adam that finds its own learning rate; leave ``lr`` at 1. Mishchenko &
Defazio 2023, arXiv:2306.06101. As the authors' code, with decoupled weight decay, with
beta3 the root of beta2, and without a bound on how fast the estimate d may grow. The
sums are over all parameters of the optimizer. Groups should have the same lr: one
with another lr, which the authors' code refuses, has an estimate of its own.
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
    d_coef=1.0,
    use_bias_correction=False,
    safeguard_warmup=False,
):
    if d0 <= 0:
        raise ValueError(f"d0 must be above 0, got {d0!r}")
    if d_coef <= 0:
        raise ValueError(f"d_coef must be above 0, got {d_coef!r}")
    beta3 = sqrt(beta2)
    dlr = d * lr
    if use_bias_correction:
        dlr = dlr * sqrt(1 - beta2**t) / (1 - beta1**t)
    taken = d / d0 * (d if safeguard_warmup else dlr)
    m_taken, v_taken = d * (1 - beta1), d * d * (1 - beta2)
    return (
        beta3,
        taken,
        beta1,
        m_taken,
        beta2,
        v_taken,
        dlr,
        weight_decay,
        eps,
        d0,
        d_coef,
        lr,
        d,
        beta3 * numerator,
    )


def measure(p, g, m, v, s, p0, beta3, taken):
    return wide(g) * wide(p0 - p), abs(beta3 * s + taken * g)


def settle(
    t, n, along, denominator, dlr, weight_decay, eps, d0, d_coef, lr, d, numerator
):
    numerator = numerator + d / d0 * dlr * along
    if denominator == 0:
        dlr = 0.0  # no gradient yet: nothing moves
    elif lr > 0:
        d = max(d, d_coef * numerator / denominator)
    return dlr, weight_decay * dlr, d * eps, d, numerator


def update(
    p, g, m, v, s, p0, beta3, taken, beta1, m_taken, beta2, v_taken, dlr, decay, eps
):
    m = beta1 * m + m_taken * g
    v = beta2 * v + v_taken * (g * g)
    s = beta3 * s + taken * g
    return p - (dlr * m / (sqrt(v) + eps) + decay * p), m, v, s, p0


prodigy = Rule(
    update,
    scalars,
    state=("m", "v", "s", "p0"),
    starts={"p0": "p"},
    carry={"d": "d0", "numerator": 0.0},
    measure=measure,
    settle=settle,
    over="all",
)
