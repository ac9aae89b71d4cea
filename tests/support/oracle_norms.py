"""Oracles, as in oracle.py, of the rules with norms: the array is all there is."""

import numpy as np
from oracle import oracle


def norm(x):
    return np.sqrt(np.sum(x**2))


@oracle(float32=40)
def lars(
    t, p, g, b=0, *, lr=1.0, momentum=0.9, weight_decay=5e-4, trust_coeff=1e-3,
    eps=1e-8, always_adapt=False,
):  # fmt: skip
    """You et al. 2017, algorithm 1, lr outside the momentum; without decay SGD."""
    local = 1
    if (weight_decay or always_adapt) and norm(p) and norm(g):
        local = trust_coeff * norm(p) / (norm(g) + weight_decay * norm(p) + eps)
    b = momentum * b + local * (g + weight_decay * p)
    return p - lr * b, b


@oracle(float32=40)
def lamb(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=1e-2,
    always_adapt=False,
):  # fmt: skip
    """You et al. 2020, algorithm 2 with phi the identity; as apex, arrays without decay
    have a ratio of 1, as have zeros."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + weight_decay * p
    ratio = norm(p) / norm(u) if norm(p) and norm(u) else 1
    return p - lr * (ratio if weight_decay or always_adapt else 1) * u, m, v


@oracle(float32=100)
def novograd(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.95, beta2=0.98, eps=1e-8, weight_decay=0,
    grad_averaging=False,
):  # fmt: skip
    """Ginsburg et al. 2019, algorithm 1; grad_averaging as in section 3."""
    v = norm(g) ** 2 if t == 1 else beta2 * v + (1 - beta2) * norm(g) ** 2
    taken = 1 - beta1 if grad_averaging else 1
    m = beta1 * m + taken * (g / (np.sqrt(v) + eps) + weight_decay * p)
    return p - lr * m, m, v


@oracle(float32=40)
def stable_adamw(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=1e-2
):
    """Wortsman et al. 2023, algorithm 2: the betas hold the bias corrections."""
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (beta1, beta2))
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    rms = np.sqrt(np.mean(g**2 / np.maximum(v, eps**2)))
    lr = lr / max(1, rms)
    return p - lr * weight_decay * p - lr * m / (np.sqrt(v) + eps), m, v


@oracle(float32=300)
def mars(
    t, p, g, m=0, v=0, last=0, *, lr=3e-3, beta1=0.95, beta2=0.99, gamma=0.025,
    eps=1e-8, weight_decay=0,
):  # fmt: skip
    """Yuan et al. 2024, algorithm 2 with the gradient of the step before."""
    c = g + gamma * beta1 / (1 - beta1) * (g - last)
    c = c / norm(c) if norm(c) > 1 else c
    m = beta1 * m + (1 - beta1) * c
    v = beta2 * v + (1 - beta2) * c**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p), m, v, g


@oracle(float32=100)
def cautious_adamw(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2
):
    """Liang et al. 2024, algorithm 1, on AdamW."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    u = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
    mask = (u * g > 0).astype(float)
    u = u * mask / max(np.mean(mask), 1e-3)
    return p - lr * (u + weight_decay * p), m, v


@oracle(float32=100)
def cautious_lion(t, p, g, m=0, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0):
    """Liang et al. 2024, algorithm 1, on Lion, with the code's share of the mask."""
    u = np.sign(beta1 * m + (1 - beta1) * g)
    mask = (u * g > 0).astype(float)
    u = u * mask * mask.size / (np.sum(mask) + 1)
    return p - lr * (u + weight_decay * p), beta2 * m + (1 - beta2) * g


@oracle(float32=2000)
def dog(
    t, p, g, x0=None, far=0, squares=0, *, lr=1.0, reps_rel=1e-6, eps=1e-8,
    weight_decay=0,
):  # fmt: skip
    """Ivgi et al. 2023, equation 2: the farthest from the start so far."""
    x0 = p if x0 is None else x0
    g = g + weight_decay * p
    far = reps_rel * (1 + norm(p)) if t == 1 else max(far, norm(p - x0))
    squares = squares + norm(g) ** 2
    return p - lr * far / np.sqrt(squares + eps) * g, x0, far, squares


@oracle(float32=300)
def dadapt_adam(
    t, p, g, m=0, v=0, s=0, d=None, numerator=0, *, lr=1.0, beta1=0.9, beta2=0.999,
    eps=1e-8, weight_decay=0, d0=1e-6, use_bias_correction=False,
):  # fmt: skip
    """Defazio & Mishchenko 2023, algorithm 5, the authors' code: the numerator's
    product is with the second moment of before."""
    d = d0 if d is None else d
    factor = np.sqrt(1 - beta2**t) / (1 - beta1**t) if use_bias_correction else 1
    dlr, root = d * lr * factor, np.sqrt(beta2)
    product = dlr * np.sum(g * s / (np.sqrt(v) + eps))
    numerator = root * numerator + (1 - root) * product
    s = root * s + (1 - root) * dlr * g
    m = beta1 * m + (1 - beta1) * dlr * g
    v = beta2 * v + (1 - beta2) * g**2
    p = p - weight_decay * dlr * p - m / (np.sqrt(v) + eps)
    d = max(d, numerator / ((1 - root) * np.sum(np.abs(s))))
    return p, m, v, s, d, numerator


@oracle(float32=700_000, float64=1e-9)
def prodigy(
    t, p, g, m=0, v=0, s=0, p0=None, d=None, d_max=None, numerator=0, *, lr=1.0,
    beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, d0=1e-6, d_coef=1,
    use_bias_correction=False, safeguard_warmup=False,
):  # fmt: skip
    """Mishchenko & Defazio 2023, algorithm 4, the authors' code."""
    p0, beta3 = p if p0 is None else p0, np.sqrt(beta2)
    d, d_max = (d0, d0) if d is None else (d, d_max)
    factor = np.sqrt(1 - beta2**t) / (1 - beta1**t) if use_bias_correction else 1
    dlr = d * lr * factor
    m = beta1 * m + (1 - beta1) * d * g
    v = beta2 * v + (1 - beta2) * (d * g) ** 2
    numerator = beta3 * numerator + d / d0 * dlr * np.sum(g * (p0 - p))
    s = beta3 * s + d / d0 * (d if safeguard_warmup else dlr) * g
    estimate = d_coef * numerator / np.sum(np.abs(s))
    if d == d0:
        d = max(d, estimate)
    d_max = max(d_max, estimate)
    d = d_max
    p = p - weight_decay * dlr * p - dlr * m / (np.sqrt(v) + d * eps)
    return p, m, v, s, p0, d, d_max, numerator
