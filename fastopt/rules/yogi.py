"""Yogi: Adam whose second moment moves by a bounded amount. Zaheer et al. 2018,
NeurIPS. As optax: both moments start at 1e-6 and are corrected for bias. Weight decay
is added to the gradient.
"""

from fastopt.rule import Rule, sign, sqrt


def scalars(
    t,
    lr=1e-2,
    beta1=0.9,
    beta2=0.999,
    eps=1e-3,
    weight_decay=0.0,
    initial_accumulator_value=1e-6,
):
    if initial_accumulator_value < 0:
        raise ValueError(
            f"initial_accumulator_value must be at least 0, "
            f"got {initial_accumulator_value!r}"
        )
    c = sqrt(1 - beta2**t)  # bias correction, folded into lr and eps
    return lr * c / (1 - beta1**t), 1 - beta1, 1 - beta2, eps * c, weight_decay


def update(p, g, m, v, step_size, a1, a2, eps, weight_decay):
    g = g + weight_decay * p
    m = m + a1 * (g - m)
    v = v - a2 * (sign(v - g * g) * (g * g))
    return p - step_size * m / (sqrt(v) + eps), m, v


yogi = Rule(
    update,
    scalars,
    state=("m", "v"),
    starts={"m": "initial_accumulator_value", "v": "initial_accumulator_value"},
)
