"""Adagrad: steps by the root of all squares so far. Duchi et al. 2011, JMLR 12. As
torch: eps stands outside the root, weight decay is added to the gradient.
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10
):
    if lr_decay < 0:
        raise ValueError(f"lr_decay must be at least 0, got {lr_decay!r}")
    if initial_accumulator_value < 0:
        raise ValueError(
            f"initial_accumulator_value must be at least 0, "
            f"got {initial_accumulator_value!r}"
        )
    return lr / (1 + (t - 1) * lr_decay), eps, weight_decay


def update(p, g, s, lr, eps, weight_decay):
    g = g + weight_decay * p
    s = s + g * g
    return p - lr * g / (sqrt(s) + eps), s


adagrad = Rule(
    update,
    scalars,
    state=("sum",),
    starts={"sum": "initial_accumulator_value"},
)
