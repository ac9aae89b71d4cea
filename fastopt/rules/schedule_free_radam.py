"""Schedule-free RAdam: needs no schedule, no warmup and no known number of steps.
Defazio et al. 2024, arXiv:2405.15682; Liu et al. 2020, arXiv:1908.03265. As in the
authors' code, the first steps, which are not rectified, change nothing or, without
``silent_sgd_phase``, move by the gradient. Evaluate with ``eval_params()``.
"""

from fastopt.rule import Rule, sqrt, where
from fastopt.rules.schedule_free_adamw import evaluate


def scalars(
    t,
    weight_sum,
    lr_max,
    lr=2.5e-3,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    r=0.0,
    weight_lr_power=2.0,
    silent_sgd_phase=True,
):
    if beta1 == 0:
        raise ValueError("beta1 must be above 0: x lies beyond y by 1 / beta1")
    if weight_lr_power < 0:
        raise ValueError(f"weight_lr_power must be at least 0, got {weight_lr_power!r}")
    adaptive, rectified = 0.0, 0.0 if silent_sgd_phase else 1.0
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 4:
        adaptive, b = 1.0, (rho_inf - 4) * (rho_inf - 2) * rho
        rectified = sqrt((rho - 4) * (rho - 2) * rho_inf / b)
    lr = lr * rectified
    lr_max = max(lr, lr_max)
    weight = 1.0 * t**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    c = weight / weight_sum if weight_sum > 0 else 0.0
    y_step = lr * (1 - beta1 * (1 - c))
    root = sqrt(1 - beta2**t)
    beyond, a2 = 1 - 1 / beta1, 1 - beta2
    eps = eps * root
    return (
        beyond,
        c,
        y_step,
        lr,
        a2,
        root,
        eps,
        weight_decay,
        adaptive,
        0.0,
        weight_sum,
        lr_max,
    )


def update(p, g, z, v, beyond, c, y_step, z_step, a2, root, eps, decay, adaptive, zero):
    v = v + a2 * (g * g - v)
    u = where(adaptive > zero, root * g / (sqrt(v) + eps), g) + decay * p
    return p + c * (z - p) - y_step * u, z - z_step * u, v


schedule_free_radam = Rule(
    update,
    scalars,
    state=("z", "v"),
    starts={"z": "p"},
    carry={"weight_sum": 0.0, "lr_max": 0.0},
    evaluate=evaluate,
)
