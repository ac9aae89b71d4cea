"""FTRL-proximal: parameters that stay exactly zero under ``l1``. McMahan et al. 2013,
KDD. As Keras, with the power -0.5 of the accumulated squares. Where ``lr`` is 0, so
that its inverse is infinite, parameters stay as they are, and the state goes on without
the term that the inverse multiplies.
"""

from fastopt.rule import Rule, maximum, minimum, sqrt, where


def scalars(
    t,
    lr=1e-3,
    l1=0.0,
    l2=0.0,
    l2_shrinkage=0.0,
    beta=0.0,
    initial_accumulator_value=0.1,
):
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
    inverse = 0.0 if lr < 1e-38 else 1 / lr  # float32 has no inverse of what is less
    smoothing = 0.0 if lr < 1e-38 else beta / lr
    return inverse, -l1, l1, 2 * l2 + smoothing, 2 * l2_shrinkage


def update(p, g, n, z, inverse, low, high, l2, shrinkage):
    root = sqrt(n + g * g)
    z = z + (g + shrinkage * p - (root - sqrt(n)) * inverse * p)
    moved = (minimum(maximum(z, low), high) - z) / (root * inverse + l2)
    return where(inverse < inverse + inverse, moved, p), n + g * g, z


ftrl = Rule(
    update,
    scalars,
    state=("accumulator", "linear"),
    starts={"accumulator": "initial_accumulator_value"},
)
