"""RMSprop. Tieleman & Hinton 2012, Coursera lecture 6e; centered as in Graves 2013,
arXiv:1308.0850. eps stands outside the root, as in torch (not as in Keras or optax).

Centered, v is the running variance itself (Finch 2009): torch's mean of squares less
the squared mean cancels where gradients hardly vary, to nothing or to a negative number
and NaN. So v is torch's square_avg less the square of its grad_avg.
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False
):
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    # Groups that differ in `centered` share one kernel, so it is two factors there.
    center, keep = (1.0, alpha) if centered else (0.0, 1.0)
    return lr, 1 - alpha, eps, weight_decay, center, keep, momentum


def update(p, g, v, lr, c, eps, weight_decay):
    g = g + weight_decay * p
    v = v + c * (g * g - v)
    return p - lr * (g / (sqrt(v) + eps)), v


def with_momentum(p, g, v, b, lr, c, eps, weight_decay, center, keep, mu):
    g = g + weight_decay * p
    v = v + c * (g * g - v)
    b = mu * b + g / (sqrt(v) + eps)
    return p - lr * b, v, b


def with_mean(p, g, v, a, lr, c, eps, weight_decay, center, keep):
    g = g + weight_decay * p
    d = g - center * a
    v = v + c * (keep * (d * d) - v)
    a = a + c * (g - a)
    return p - lr * (g / (sqrt(v) + eps)), v, a


def with_mean_and_momentum(p, g, v, a, b, lr, c, eps, weight_decay, center, keep, mu):
    g = g + weight_decay * p
    d = g - center * a
    v = v + c * (keep * (d * d) - v)
    a = a + c * (g - a)
    b = mu * b + g / (sqrt(v) + eps)
    return p - lr * b, v, a, b


rmsprop = Rule(
    update,
    scalars,
    state=("v",),
    variants={
        ("momentum",): Rule(with_momentum, scalars, state=("v", "momentum_buffer")),
        ("centered",): Rule(with_mean, scalars, state=("v", "grad_avg")),
        ("centered", "momentum"): Rule(
            with_mean_and_momentum,
            scalars,
            state=("v", "grad_avg", "momentum_buffer"),
        ),
    },
)
