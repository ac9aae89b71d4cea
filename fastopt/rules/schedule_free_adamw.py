"""Schedule-free AdamW: needs no schedule and no known number of steps. Defazio et al.
2024, arXiv:2405.15682. As in the authors' code, gradients are taken at the parameters
(y); evaluate with ``eval_params()`` (x). Weight decay is applied at y.
"""

from fastopt.rule import Rule, sqrt
from fastopt.rules.schedule_free_sgd import x


def scalars(
    t,
    weight_sum,
    lr_max,
    lr=2.5e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    warmup_steps=0.0,
    r=0.0,
    weight_lr_power=2.0,
):
    if beta1 == 0:
        raise ValueError("beta1 must be above 0: x lies beyond y by 1 / beta1")
    if weight_lr_power < 0:
        raise ValueError(f"weight_lr_power must be at least 0, got {weight_lr_power!r}")
    if t < warmup_steps:
        lr = lr * t / warmup_steps
    lr_max = max(lr, lr_max)
    weight = 1.0 * t**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    c = weight / weight_sum if weight_sum > 0 else 0.0
    y_step = lr * (1 - beta1 * (1 - c))
    root = sqrt(1 - beta2**t)
    beyond, a2 = 1 - 1 / beta1, 1 - beta2
    eps = eps * root
    return beyond, c, y_step, lr, a2, root, eps, weight_decay, weight_sum, lr_max


def update(p, g, z, v, beyond, c, y_step, z_step, a2, root, eps, weight_decay):
    v = v + a2 * (g * g - v)
    u = root * g / (sqrt(v) + eps) + weight_decay * p
    return p + c * (z - p) - y_step * u, z - z_step * u, v


def evaluate(p, z, v, beyond):
    return x(p, z, beyond)


schedule_free_adamw = Rule(
    update,
    scalars,
    state=("z", "v"),
    starts={"z": "p"},
    carry={"weight_sum": 0.0, "lr_max": 0.0},
    evaluate=evaluate,
)
