"""SGD with momentum. Polyak 1964; Nesterov's form as in Sutskever et al. 2013, ICML.

torch's conventions: the first step of a run puts the gradient into the buffer
undampened, and the learning rate stands outside it. Without momentum, no buffer; one
that is switched on later starts dampened, unlike torch's.
"""

from fastopt.rule import Rule


def scalars(t, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    # Only at first: a schedule may bring the momentum to 0 later.
    if nesterov and ((momentum == 0 and t == 1) or dampening != 0):
        raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")
    # With momentum off, as in one group of several, the buffer is the gradient itself.
    fresh = 1.0 if t == 1 or momentum == 0 else 1 - dampening
    g_weight, b_weight = (1.0, momentum) if nesterov else (0.0, 1.0)
    return lr, weight_decay, momentum, fresh, g_weight, b_weight


def update(p, g, lr, weight_decay):
    return (p - lr * (g + weight_decay * p),)


def heavy_ball(p, g, b, lr, weight_decay, mu, fresh, g_weight, b_weight):
    g = g + weight_decay * p
    b = mu * b + fresh * g
    return p - lr * (g_weight * g + b_weight * b), b


sgd = Rule(
    update,
    scalars,
    variants={
        ("momentum",): Rule(heavy_ball, scalars, state=("momentum_buffer",)),
    },
)
