"""Every rule once more, from its paper, in float64: what the tests hold fastopt to.

An oracle is one step, ``oracle(t, p, g, *state, *, hyperparameters) -> (p, *state)``,
for whole arrays and with ``t = 1`` at the first step. It is written in the algebra and,
as far as Python allows, the notation of the paper and never after the file in
``fastopt/rules``: what both have wrong no test will find. Its docstring names the paper
and where the field (torch) departs from it; its defaults are stated here again.
"""

import numpy as np

ORACLES = {}
# Bounds for float32, in units of its eps: how agreement.py measures, and found them.
FLOAT32 = {}
FLOAT64 = {}  # and for float64, in units of 1


def oracle(float32, float64=1e-12):
    """Enters a function under its name, which is its rule's."""

    def enter(function):
        ORACLES[function.__name__] = function
        FLOAT32[function.__name__] = float32
        FLOAT64[function.__name__] = float64
        return function

    return enter


@oracle(float32=40)
def gd(t, p, g, *, lr=1e-3):
    """Cauchy 1847: a step down the slope."""
    return (p - lr * g,)


@oracle(float32=40)
def dynamic_gd(t, p, g, *, lr=1e-3):
    """Zinkevich 2003 with steps falling as 1/sqrt(t); t - 1 steps are completed."""
    return (p - lr / (1 + np.sqrt(t - 1)) * g,)


@oracle(float32=40)
def sgd(
    t, p, g, b=0, *, lr=1e-3, momentum=0, dampening=0, weight_decay=0, nesterov=False
):
    """Polyak 1964; nesterov: Sutskever et al. 2013, section 2, where p is the point
    looked ahead to, which moves by the velocity and mu times the velocity's change.
    As torch: lr stands outside the velocity, whose first value is g, undampened."""
    g = g + weight_decay * p
    new = g if t == 1 or not momentum else momentum * b + (1 - dampening) * g
    return p - lr * (new + momentum * (new - b) if nesterov else new), new


@oracle(float32=100)
def rmsprop(
    t, p, g, n=0, mean=0, delta=0, *, lr=1e-2, alpha=0.99, eps=1e-8,
    weight_decay=0, momentum=0, centered=False,
):  # fmt: skip
    """Tieleman & Hinton 2012, lecture 6e; centered: Graves 2013, equations 38 to 41.
    As torch: eps outside the root, lr outside the momentum. Centered, n is the variance
    n - g^2 of the paper in the form of Finch 2009, in which nothing cancels."""
    g = g + weight_decay * p
    far = alpha * (g - mean) ** 2 if centered else g**2
    n = alpha * n + (1 - alpha) * far
    mean = alpha * mean + (1 - alpha) * g
    delta = momentum * delta + g / (np.sqrt(n) + eps)
    return p - lr * delta, n, mean, delta


@oracle(float32=40)
def adam(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0
):
    """Kingma & Ba 2015, algorithm 1. As torch: weight decay is L2, in the gradient."""
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


@oracle(float32=40)
def amsgrad(
    t, p, g, m=0, v=0, v_max=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=0,
):  # fmt: skip
    """Reddi et al. 2018, algorithm 2, where nothing is corrected for bias. As torch:
    both moments are, the second one after its maximum was taken; L2 decay."""
    g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    v_max = np.maximum(v_max, v)
    m_hat, v_hat = m / (1 - beta1**t), v_max / (1 - beta2**t)
    return p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v, v_max


@oracle(float32=40)
def adamw(
    t, p, g, m=0, v=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2
):
    """Loshchilov & Hutter 2019, algorithm 2: decay beside Adam's step, both from the
    old p. As torch: one lr scales both (the paper's eta; its alpha is 1)."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p), m, v


@oracle(float32=40)
def amsgradw(
    t, p, g, m=0, v=0, v_max=0, *, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
    weight_decay=1e-2,
):  # fmt: skip
    """Reddi et al. 2018 with the decay of Loshchilov & Hutter 2019, as in torch: see
    amsgrad and adamw."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    v_max = np.maximum(v_max, v)
    m_hat, v_hat = m / (1 - beta1**t), v_max / (1 - beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p), m, v, v_max


def trajectory(oracle, p, grads, **hyperparameters):
    """The parameters after each of the gradients, in float64."""
    p, state = p.astype(np.float64), ()
    for t, g in enumerate(grads.astype(np.float64), 1):
        p, *state = oracle(t, p, g, *state, **hyperparameters)
        yield p
