"""FTRL-proximal: parameters that stay exactly zero under ``l1``. McMahan et al. 2013,
KDD. As Keras, with the power -0.5 of the accumulated squares. It divides by ``lr``,
which must be above 0.
"""

from fastopt.rule import Rule, maximum, minimum, sqrt


def scalars(
    t,
    lr=1e-3,
    l1=0.0,
    l2=0.0,
    l2_shrinkage=0.0,
    beta=0.0,
    initial_accumulator_value=0.1,
):
    if lr <= 0:
        raise ValueError(f"lr must be above 0, got {lr!r}")
    if l1 < 0 or l2 < 0 or l2_shrinkage < 0:
        raise ValueError(
            f"l1, l2 and l2_shrinkage must be at least 0, "
            f"got {l1!r}, {l2!r} and {l2_shrinkage!r}"
        )
    if initial_accumulator_value <= 0:
        raise ValueError(
            f"initial_accumulator_value must be above 0, "
            f"got {initial_accumulator_value!r}"
        )
    return 1 / lr, -l1, l1, 2 * l2 + beta / lr, 2 * l2_shrinkage


def update(p, g, n, z, inverse, low, high, l2, shrinkage):
    root = sqrt(n + g * g)
    z = z + (g + shrinkage * p - (root - sqrt(n)) * inverse * p)
    p = (minimum(maximum(z, low), high) - z) / (root * inverse + l2)
    return p, n + g * g, z


ftrl = Rule(
    update,
    scalars,
    state=("accumulator", "linear"),
    starts={"accumulator": "initial_accumulator_value"},
)
