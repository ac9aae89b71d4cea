"""Oracles, as in oracle.py, of what torch.optim has beside, and of rules near it."""

import numpy as np
from oracle import oracle


@oracle(float32=40)
def sgdw(
    t, p, g, b=0, *, lr=1e-3, momentum=0, dampening=0, weight_decay=1e-2, nesterov=False
):
    """Loshchilov & Hutter 2019, algorithm 1: momentum of the loss alone, decay beside,
    from the old p. The momentum's conventions are those of sgd."""
    new = g if t == 1 or not momentum else momentum * b + (1 - dampening) * g
    step = g + momentum * new if nesterov else new
    return p - lr * step - lr * weight_decay * p, new


@oracle(float32=200)
def signum(t, p, g, m=0, *, lr=1e-3, beta=0.9, weight_decay=0):
    """Bernstein et al. 2018, algorithm 2."""
    m = beta * m + (1 - beta) * g
    return p - lr * (np.sign(m) + weight_decay * p), m


@oracle(float32=40)
def tiger(t, p, g, m=0, *, lr=1e-3, beta=0.965, weight_decay=1e-2):
    """Su 2023: the sign of the moving average, and decay."""
    m = beta * m + (1 - beta) * g
    return p - lr * (np.sign(m) + weight_decay * p), m


@oracle(float32=300)
def lion(t, p, g, m=0, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0):
    """Chen et al. 2023, algorithm 2."""
    c = beta1 * m + (1 - beta1) * g
    m = beta2 * m + (1 - beta2) * g
    return p - lr * (np.sign(c) + weight_decay * p), m


@oracle(float32=40)
def qhadam(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, nu1=1, nu2=1, eps=1e-8,
    weight_decay=0,
):  # fmt: skip
    """Ma & Yarats 2019, algorithm 2: g and s are corrected for bias; L2 decay."""
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    root = np.sqrt((1 - nu2) * g**2 + nu2 * v_hat)
    return p - lr * ((1 - nu1) * g + nu1 * m_hat) / (root + eps), m, v


@oracle(float32=40)
def adagrad(
    t, p, g, s=None, *, lr=1e-2, lr_decay=0, weight_decay=0,
    initial_accumulator_value=0, eps=1e-10,
):  # fmt: skip
    """Duchi et al. 2011, figure 1 with diagonal matrices. As torch: lr falls with the
    completed steps; eps outside the root."""
    s = initial_accumulator_value if s is None else s
    g = g + weight_decay * p
    s = s + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s) + eps), s


@oracle(float32=40)
def adadelta(t, p, g, v=0, a=0, *, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0):
    """Zeiler 2012, algorithm 1, and torch's lr."""
    g = g + weight_decay * p
    v = rho * v + (1 - rho) * g**2
    d = np.sqrt(a + eps) / np.sqrt(v + eps) * g
    return p - lr * d, v, rho * a + (1 - rho) * d**2


@oracle(float32=40)
def rprop(
    t, p, g, before=0, step=None, *, lr=1e-2, eta_minus=0.5, eta_plus=1.2,
    step_min=1e-6, step_max=50,
):  # fmt: skip
    """Riedmiller & Braun 1993 without backtracking (Igel & Huesken 2000, iRprop-)."""
    step = np.full_like(p, lr) if step is None else step
    factor = np.select([g * before > 0, g * before < 0], [eta_plus, eta_minus], 1)
    step = np.clip(step * factor, step_min, step_max)
    g = np.where(g * before < 0, 0, g)
    return p - np.sign(g) * step, g, step


@oracle(float32=300)
def asgd(t, p, g, ax=0, *, lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0):
    """Bottou's averaged SGD as torch has it: a step eta from the completed steps; the
    mean of the points after t0."""
    eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
    mu = 1 / max(1, (t - 1) - t0)
    p = (1 - lambd * eta) * p - eta * (g + weight_decay * p)
    return p, (1 - mu) * ax + mu * p


@oracle(float32=120)
def adamax(
    t, p, g, m=0, u=0, *, lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0
):
    """Kingma & Ba 2015, algorithm 2; as torch, eps is added to the magnitude."""
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    u = np.maximum(beta2 * u, np.abs(g) + eps)
    return p - lr / (1 - beta1**t) * m / u, m, u


def nesterov_adam(t, g, m, v, product, lr, beta1, beta2, eps, momentum_decay):
    """Dozat 2016, algorithm 8, with the schedule of section 2: the step."""
    mu, following = (
        beta1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1)
    )
    product = product * mu
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    g_hat = (1 - mu) * g / (1 - product)
    m_hat = following * m / (1 - product * following)
    v_hat = v / (1 - beta2**t)
    return lr * (g_hat + m_hat) / (np.sqrt(v_hat) + eps), m, v, product


@oracle(float32=40)
def nadam(
    t, p, g, m=0, v=0, product=1, *, lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0, momentum_decay=4e-3,
):  # fmt: skip
    g = g + weight_decay * p
    step, *state = nesterov_adam(
        t, g, m, v, product, lr, beta1, beta2, eps, momentum_decay
    )
    return p - step, *state


@oracle(float32=40)
def nadamw(
    t, p, g, m=0, v=0, product=1, *, lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=1e-2, momentum_decay=4e-3,
):  # fmt: skip
    step, *state = nesterov_adam(
        t, g, m, v, product, lr, beta1, beta2, eps, momentum_decay
    )
    return p - step - lr * weight_decay * p, *state


def rectified(t, m, v, lr, beta1, beta2, eps):
    """Liu et al. 2020, algorithm 2: the step. As torch: from a length above 5, eps
    beside the uncorrected root."""
    m_hat = m / (1 - beta1**t)
    most = 2 / (1 - beta2) - 1
    length = most - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return lr * m_hat
    r = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
    adaptive = np.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
    return lr * m_hat * np.sqrt(r) * adaptive


@oracle(float32=40)
def radam(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0
):
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    return p - rectified(t, m, v, lr, beta1, beta2, eps), m, v


@oracle(float32=40)
def radamw(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2
):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    step = rectified(t, m, v, lr, beta1, beta2, eps)
    return p - step - lr * weight_decay * p, m, v
