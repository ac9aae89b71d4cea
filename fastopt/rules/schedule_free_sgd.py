"""Schedule-free SGD: needs no schedule and no known number of steps. Defazio et al.
2024, arXiv:2405.15682. As in the authors' code, gradients are taken at the parameters
(y); evaluate with ``eval_params()`` (x). Weight decay is added to the gradient, at y.
"""

from fastopt.rule import Rule


def scalars(
    t,
    weight_sum,
    lr_max,
    lr=1.0,
    momentum=0.9,
    weight_decay=0.0,
    warmup_steps=0.0,
    r=0.0,
    weight_lr_power=2.0,
):
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum!r}")
    if weight_lr_power < 0:
        raise ValueError(f"weight_lr_power must be at least 0, got {weight_lr_power!r}")
    if t < warmup_steps:
        lr = lr * t / warmup_steps
    lr_max = max(lr, lr_max)
    weight = 1.0 * t**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    c = weight / weight_sum if weight_sum > 0 else 0.0
    y_step = lr * (1 - momentum * (1 - c))
    return 1 - 1 / momentum, c, y_step, lr, weight_decay, weight_sum, lr_max


def update(p, g, z, beyond, c, y_step, z_step, weight_decay):
    g = g + weight_decay * p
    return p + c * (z - p) - y_step * g, z - z_step * g


def x(p, z, beyond):
    return p + beyond * (z - p)


schedule_free_sgd = Rule(
    update,
    scalars,
    state=("z",),
    starts={"z": "p"},
    carry={"weight_sum": 0.0, "lr_max": 0.0},
    evaluate=x,
)
