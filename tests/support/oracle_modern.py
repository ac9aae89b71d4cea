"""Oracles, as in oracle.py, of what came after torch.optim's."""

import numpy as np
from oracle import oracle


@oracle(float32=40)
def adabelief(
    t, p, g, m=0, s=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-16, weight_decay=0,
    rectify=True,
):  # fmt: skip
    """Zhuang et al. 2020, algorithm 2; rectified as in the authors' code, from a length
    of 5 on and with eps beside the uncorrected root."""
    m = beta1 * m + (1 - beta1) * g
    s = beta2 * s + (1 - beta2) * (g - m) ** 2 + eps
    m_hat, correction = m / (1 - beta1**t), 1 - beta2**t
    most = 2 / (1 - beta2) - 1
    length = most - 2 * t * beta2**t / correction
    if not rectify:
        step = m_hat / (np.sqrt(s / correction) + eps)
    elif length >= 5:
        r = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        step = m_hat * np.sqrt(r * correction) / (np.sqrt(s) + eps)
    else:
        step = m_hat
    return p - lr * step - lr * weight_decay * p, m, s


@oracle(float32=40)
def yogi(
    t, p, g, m=None, v=None, *, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-3,
    weight_decay=0, initial_accumulator_value=1e-6,
):  # fmt: skip
    """Zaheer et al. 2018, algorithm 2. As optax: corrected for bias; L2 decay."""
    m = initial_accumulator_value if m is None else m
    v = initial_accumulator_value if v is None else v
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = v - (1 - beta2) * np.sign(v - g**2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


@oracle(float32=200)
def laprop(
    t, p, g, m=0, v=0, mean=0, *, lr=4e-4, beta1=0.9, beta2=0.999, eps=1e-15,
    weight_decay=0,
):  # fmt: skip
    """Ziyin et al. 2020, algorithm 1, the authors' code: momentum of steps, corrected
    by the mean of the learning rates in it."""
    v = beta2 * v + (1 - beta2) * g**2
    m = beta1 * m + (1 - beta1) * lr * g / (np.sqrt(v / (1 - beta2**t)) + eps)
    mean = beta1 * mean + (1 - beta1) * lr
    p = p - m / (mean / lr)
    return p - lr * weight_decay * p, m, v, mean


@oracle(float32=40)
def adopt(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.9999, eps=1e-6, weight_decay=0
):
    """Taniguchi et al. 2024, algorithm 2, with the clipping of version 3."""
    g = g + weight_decay * p
    if t == 1:
        return p, np.zeros_like(p), g**2
    bound = (t - 1) ** 0.25
    u = np.clip(g / np.maximum(np.sqrt(v), eps), -bound, bound)
    m = beta1 * m + (1 - beta1) * u
    return p - lr * m, m, beta2 * v + (1 - beta2) * g**2


@oracle(float32=300)
def adan(
    t, p, g, m=0, d=0, n=0, last=None, *, lr=1e-3, beta1=0.98, beta2=0.92, beta3=0.99,
    eps=1e-8, weight_decay=0, no_prox=False,
):  # fmt: skip
    """Xie et al. 2022, algorithm 1, with 1 - beta for beta, corrected for bias."""
    delta = 0 * g if last is None else g - last
    m = beta1 * m + (1 - beta1) * g
    d = beta2 * d + (1 - beta2) * delta
    n = beta3 * n + (1 - beta3) * (g + beta2 * delta) ** 2
    m_hat, d_hat, n_hat = m / (1 - beta1**t), d / (1 - beta2**t), n / (1 - beta3**t)
    step = lr * (m_hat + beta2 * d_hat) / (np.sqrt(n_hat) + eps)
    decay = lr * weight_decay
    p = (1 - decay) * p - step if no_prox else (p - step) / (1 + decay)
    return p, m, d, n, g


@oracle(float32=40)
def ademamix(
    t, p, g, m=0, slow=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, beta3=0.9999,
    alpha=2, alpha_warmup=0, beta3_warmup=0, eps=1e-8, weight_decay=0,
):  # fmt: skip
    """Pagliardini et al. 2024, section 3, equation AdEMAMix and its schedulers: beta3's
    half-life rises linearly."""
    if t < alpha_warmup:
        alpha = alpha * t / alpha_warmup
    if t < beta3_warmup:
        lives = [np.log(0.5) / np.log(b + 1e-8) - 1 for b in (beta1, beta3)]
        life = np.interp(t / beta3_warmup, [0, 1], lives)
        beta3 = 0.5 ** (1 / (life + 1))
    m = beta1 * m + (1 - beta1) * g
    slow = beta3 * slow + (1 - beta3) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    step = (m_hat + alpha * slow) / (np.sqrt(v_hat) + eps) + weight_decay * p
    return p - lr * step, m, slow, v


@oracle(float32=40)
def madgrad(
    t, p, g, v=0, s=0, x0=None, *, lr=1e-2, momentum=0.9, eps=1e-6, weight_decay=0
):
    """Defazio & Jelassi 2021, algorithm 1; as the authors' code, lr + eps for lr."""
    x0 = p if x0 is None else x0
    g = g + weight_decay * p
    weight = (lr + eps) * np.sqrt(t)
    v = v + weight * g**2
    s = s + weight * g
    z = x0 - s / (np.cbrt(v) + eps)
    return momentum * p + (1 - momentum) * z, v, s, x0


@oracle(float32=40)
def ftrl(
    t, p, g, n=None, z=0, *, lr=1e-3, l1=0, l2=0, l2_shrinkage=0, beta=0,
    initial_accumulator_value=0.1,
):  # fmt: skip
    """McMahan et al. 2013, algorithm 1; Keras's shrinkage."""
    n = initial_accumulator_value + 0 * p if n is None else n
    sigma = (np.sqrt(n + g**2) - np.sqrt(n)) / lr
    z = z + g + 2 * l2_shrinkage * p - sigma * p
    n = n + g**2
    w = -(z - np.sign(z) * l1) / ((beta + np.sqrt(n)) / lr + 2 * l2)
    return np.where(np.abs(z) <= l1, 0, w), n, z


@oracle(float32=300)
def sophia_g(
    t, p, g, m=0, h=0, *, lr=1e-4, beta1=0.965, beta2=0.99, rho=0.04, bs=5120,
    weight_decay=0.1,
):  # fmt: skip
    """Liu et al. 2023, algorithm 3, where the Hessian has not been estimated yet or was
    at the start: h is given."""
    m = beta1 * m + (1 - beta1) * g
    step = np.clip(m / (rho * bs * h + 1e-15), -1, 1)
    return p - lr * weight_decay * p - lr * step, m, h


@oracle(float32=40)
def adamc(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2,
    max_lr=1e-3,
):  # fmt: skip
    """Defazio 2025, algorithm 1: AdamW whose decay is weighed by lr / max_lr."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    decay = lr**2 / max_lr * weight_decay
    return p - lr * m_hat / (np.sqrt(v_hat) + eps) - decay * p, m, v


@oracle(float32=40)
def cautious_decay_adamw(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2
):
    """Chen et al. 2025, algorithm 1: decay unless step and parameter differ in sign."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return p - lr * (u + weight_decay * (u * p >= 0) * p), m, v


def averaged(t, y, z, weight_sum, lr_max, lr, beta, u, r, power):
    """Defazio et al. 2024, equations 3 to 5 in the terms of x and z: z moves by the
    step, x is the weighted mean of all z, y lies between them."""
    lr_max = max(lr, lr_max)
    weight = t**r * lr_max**power
    weight_sum = weight_sum + weight
    c = weight / weight_sum if weight_sum else 0
    x = (y - (1 - beta) * z) / beta
    z = z - lr * u
    # The x that the authors' code keeps has the new z in it before the mean is taken.
    x = (1 - c) * x + c * z
    return (1 - beta) * z + beta * x, z, weight_sum, lr_max


@oracle(float32=40)
def schedule_free_sgd(
    t, p, g, z=None, weight_sum=0, lr_max=0, *, lr=1.0, momentum=0.9, weight_decay=0,
    warmup_steps=0, r=0, weight_lr_power=2,
):  # fmt: skip
    z = p if z is None else z
    lr = lr * min(1, t / warmup_steps) if warmup_steps else lr
    u = g + weight_decay * p
    return averaged(t, p, z, weight_sum, lr_max, lr, momentum, u, r, weight_lr_power)


@oracle(float32=40)
def schedule_free_adamw(
    t, p, g, z=None, v=0, weight_sum=0, lr_max=0, *, lr=2.5e-3, beta1=0.9, beta2=0.999,
    eps=1e-8, weight_decay=0, warmup_steps=0, r=0, weight_lr_power=2,
):  # fmt: skip
    z = p if z is None else z
    lr = lr * min(1, t / warmup_steps) if warmup_steps else lr
    v = beta2 * v + (1 - beta2) * g**2
    u = g / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p
    y, z, *more = averaged(
        t, p, z, weight_sum, lr_max, lr, beta1, u, r, weight_lr_power
    )
    return y, z, v, *more


@oracle(float32=60)
def schedule_free_radam(
    t, p, g, z=None, v=0, weight_sum=0, lr_max=0, *, lr=2.5e-3, beta1=0.9, beta2=0.999,
    eps=1e-8, weight_decay=0, r=0, weight_lr_power=2, silent_sgd_phase=True,
):  # fmt: skip
    z = p if z is None else z
    most = 2 / (1 - beta2) - 1
    length = most - 2 * t * beta2**t / (1 - beta2**t)
    v = beta2 * v + (1 - beta2) * g**2
    if length > 4:
        ratio = (length - 4) * (length - 2) * most
        lr = lr * np.sqrt(ratio / ((most - 4) * (most - 2) * length))
        u = g / (np.sqrt(v / (1 - beta2**t)) + eps)
    else:
        lr = 0 if silent_sgd_phase else lr
        u = g
    u = u + weight_decay * p
    y, z, *more = averaged(
        t, p, z, weight_sum, lr_max, lr, beta1, u, r, weight_lr_power
    )
    return y, z, v, *more
