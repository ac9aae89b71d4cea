"""SGD with momentum, weight decay decoupled. Loshchilov & Hutter 2019,
arXiv:1711.05101, algorithm 1; the momentum as in ``sgd``, the decay from the old
parameters.
"""

from fastopt.rule import Rule


def scalars(t, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=1e-2, nesterov=False):
    # Only at first: a schedule may bring the momentum to 0 later.
    if nesterov and ((momentum == 0 and t == 1) or dampening != 0):
        raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")
    # With momentum off, as in one group of several, the buffer is the gradient itself.
    fresh = 1.0 if t == 1 or momentum == 0 else 1 - dampening
    g_weight, b_weight = (1.0, momentum) if nesterov else (0.0, 1.0)
    return lr, lr * weight_decay, momentum, fresh, g_weight, b_weight


def update(p, g, lr, decay):
    return (p - (lr * g + decay * p),)


def heavy_ball(p, g, b, lr, decay, mu, fresh, g_weight, b_weight):
    b = mu * b + fresh * g
    return p - (lr * (g_weight * g + b_weight * b) + decay * p), b


sgdw = Rule(
    update,
    scalars,
    variants={
        ("momentum",): Rule(heavy_ball, scalars, state=("momentum_buffer",)),
    },
)
