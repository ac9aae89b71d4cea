"""Muon: momentum made orthogonal, for matrices; AdamW for all other arrays. Jordan et
al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982, for
``match_rms_adamw``. Use the class ``fastopt.Muon``, which computes the products.

As in torch, the momentum is an average of the gradients, and weight decay is decoupled.
For a matrix, ``v`` holds the orthogonalized update. Only the step itself changes the
momentum, so a step that is interrupted during the products has changed nothing.
"""

from fastopt.rule import Rule, sqrt, where


def weights(t, momentum=0.95, nesterov=True):
    return 1 - momentum, momentum if nesterov else 1.0


def push(u, g, m, a, mixed):
    ahead = m + a * (g - m)
    return g + mixed * (ahead - g), m


# What is to be made orthogonal.
direction = Rule(push, weights, state=("m",), name="direction")


def scalars(
    t,
    lr=1e-3,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    eps=1e-7,
    ns_steps=5,
    match_rms_adamw=False,
    adamw_lr=1e-3,
    adamw_beta1=0.9,
    adamw_beta2=0.999,
    adamw_eps=1e-8,
    adamw_weight_decay=1e-2,
    use_muon=True,
):
    if ns_steps < 1 or ns_steps % 1 != 0:
        raise ValueError(f"ns_steps must be a whole number above 0, got {ns_steps!r}")
    c = sqrt(1 - adamw_beta2**t)  # as adamw
    step_size = adamw_lr * c / (1 - adamw_beta1**t)
    a1, decay, orthogonal = 1 - adamw_beta1, adamw_lr * adamw_weight_decay, 0.0
    if use_muon:
        step_size, a1 = lr, 1 - momentum
        decay, orthogonal = lr * weight_decay, 1.0
    return step_size, a1, 1 - adamw_beta2, adamw_eps * c, decay, orthogonal, 0.0


def update(p, g, m, v, step_size, a1, a2, eps, decay, orthogonal, zero):
    m = m + a1 * (g - m)
    v = where(orthogonal > zero, v, v + a2 * (g * g - v))
    step = where(orthogonal > zero, step_size * v, step_size * m / (sqrt(v) + eps))
    return p - (step + decay * p), m, v


muon = Rule(update, scalars, state=("m", "v"))
