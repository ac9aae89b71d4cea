"""Adafactor: stores the second moments of a matrix as one per row and per column.
Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 to 6, as in torch. Use the class
``fastopt.Adafactor``, which knows the epsilon of the parameters' dtype.
"""

from fastopt.rule import Rule, maximum, sqrt, wide


def scalars(
    t,
    lr=1e-2,
    beta2_decay=-0.8,
    eps1=1.1920928955078125e-07,
    eps2=1e-3,
    d=1.0,
    weight_decay=0.0,
):
    if beta2_decay > 0:
        raise ValueError(f"beta2_decay must be at most 0, got {beta2_decay}")
    if eps1 <= 0 or d <= 0:
        raise ValueError(f"eps1 and d must be above 0, got {eps1} and {d}")
    if eps2 < 0:
        raise ValueError(f"eps2 must be at least 0, got {eps2}")
    floor = max(eps1 * eps1, 2.0**-126)  # which float32 has, too: no 0/0
    relative = min(lr, 1 / sqrt(t))
    return t**beta2_decay, floor, eps1, eps2, d, relative, lr * weight_decay


def direction(p, g, v, weight, floor):
    v = v + weight * (g * g - v)
    return g / sqrt(maximum(v, floor)), v


def measure(p, u):
    return wide(p) * wide(p), wide(u) * wide(u)


def settle(t, n, pp, uu, eps1, eps2, d, relative, decay):
    step_size = max(eps2, sqrt(pp / n)) * relative
    return step_size / max(1.0, sqrt(uu / n) / d), decay


def apply(p, u, step_size, decay):
    return (p - (step_size * u + decay * p),)


adafactor = Rule.in_passes(
    direction, measure, apply, scalars, settle, state=("v",), factored=True
)
