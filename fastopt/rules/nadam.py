"""NAdam: Adam with Nesterov's momentum, warmed up. Dozat 2016, ICLR workshop. As torch
(and unlike optax and Keras): the paper's schedule of the momentum, with the decay as a
hyperparameter; weight decay is added to the gradient.
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t,
    mu_product,
    lr=2e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    momentum_decay=4e-3,
):
    c = sqrt(1 - beta2**t)  # bias correction, folded into the steps and eps
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    following = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    mu_product = mu_product * mu
    g_step = lr * c * (1 - mu) / (1 - mu_product)
    m_step = lr * c * following / (1 - mu_product * following)
    return g_step, m_step, 1 - beta1, 1 - beta2, eps * c, weight_decay, mu_product


def update(p, g, m, v, g_step, m_step, a1, a2, eps, weight_decay):
    g = g + weight_decay * p
    m = m + a1 * (g - m)
    v = v + a2 * (g * g - v)
    return p - (g_step * g + m_step * m) / (sqrt(v) + eps), m, v


nadam = Rule(update, scalars, state=("m", "v"), carry={"mu_product": 1.0})
