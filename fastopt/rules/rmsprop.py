"""RMSprop. Tieleman & Hinton 2012, Coursera lecture 6e; centered as in Graves 2013,
arXiv:1308.0850. eps stands outside the root, as in torch (not as in Keras or optax).

Where torch takes the root of v - a*a, rounding can make that a tiny negative number and
the parameter NaN; here its sign is dropped, so the root stays about as small and real.
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False
):
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}")
    return lr, 1 - alpha, eps, weight_decay, 1.0 if centered else 0.0, momentum


def update(p, g, v, lr, c, eps, weight_decay):
    g = g + weight_decay * p
    v = v + c * (g * g - v)
    return p - lr * (g / (sqrt(v) + eps)), v


def with_momentum(p, g, v, b, lr, c, eps, weight_decay, center, mu):
    g = g + weight_decay * p
    v = v + c * (g * g - v)
    b = mu * b + g / (sqrt(v) + eps)
    return p - lr * b, v, b


def with_mean(p, g, v, a, lr, c, eps, weight_decay, center):
    g = g + weight_decay * p
    v = v + c * (g * g - v)
    a = a + c * (g - a)
    return p - lr * (g / (sqrt(abs(v - center * (a * a))) + eps)), v, a


def with_mean_and_momentum(p, g, v, a, b, lr, c, eps, weight_decay, center, mu):
    g = g + weight_decay * p
    v = v + c * (g * g - v)
    a = a + c * (g - a)
    b = mu * b + g / (sqrt(abs(v - center * (a * a))) + eps)
    return p - lr * b, v, a, b


rmsprop = Rule(
    update,
    scalars,
    state=("square_avg",),
    variants={
        ("momentum",): Rule(
            with_momentum, scalars, state=("square_avg", "momentum_buffer")
        ),
        ("centered",): Rule(with_mean, scalars, state=("square_avg", "grad_avg")),
        ("centered", "momentum"): Rule(
            with_mean_and_momentum,
            scalars,
            state=("square_avg", "grad_avg", "momentum_buffer"),
        ),
    },
)
