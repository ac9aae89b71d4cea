"""AdEMAMix: AdamW with a second, slow momentum. Pagliardini et al. 2024,
arXiv:2409.03137. ``alpha_warmup`` and ``beta3_warmup`` are steps, 0 for none, in which
alpha rises from 0 and the slow momentum's half-life from that of beta1; as in the
authors' code, that of a beta 1e-8 larger. Weight decay is decoupled.
"""

from fastopt.rule import Rule, log, sqrt


def scalars(
    t,
    lr=1e-3,
    beta1=0.9,
    beta2=0.999,
    beta3=0.9999,
    alpha=2.0,
    alpha_warmup=0.0,
    beta3_warmup=0.0,
    eps=1e-8,
    weight_decay=0.0,
):
    c = sqrt(1 - beta2**t)  # bias correction, folded into the steps and eps
    if t < alpha_warmup:
        alpha = alpha * t / alpha_warmup
    if t < beta3_warmup:
        first = log(0.5) / log(beta1 + 1e-8) - 1
        last = log(0.5) / log(beta3 + 1e-8) - 1
        half_life = first + t / beta3_warmup * (last - first)
        beta3 = 0.5 ** (1 / (half_life + 1))
    m_step, slow_step = lr * c / (1 - beta1**t), lr * c * alpha
    a1, a2, a3 = 1 - beta1, 1 - beta2, 1 - beta3
    return m_step, slow_step, a1, a2, a3, eps * c, lr * weight_decay


def update(p, g, m, slow, v, m_step, slow_step, a1, a2, a3, eps, decay):
    m = m + a1 * (g - m)
    slow = slow + a3 * (g - slow)
    v = v + a2 * (g * g - v)
    p = p - ((m_step * m + slow_step * slow) / (sqrt(v) + eps) + decay * p)
    return p, m, slow, v


ademamix = Rule(update, scalars, state=("m", "m_slow", "v"))
