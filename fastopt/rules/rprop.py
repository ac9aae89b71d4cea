"""Rprop: only the gradients' signs count, and each parameter has its step. For full
batches. Riedmiller & Braun 1993, ICNN; without weight backtracking (iRprop-) as in
torch, whose step after a change of sign is none. ``lr`` is the first step; steps stay
in their bounds even if it is 0.
"""

from fastopt.rule import Rule, copysign, maximum, minimum, where


def scalars(t, lr=1e-2, eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50.0):
    if not 0 <= eta_minus <= 1 <= eta_plus:  # the limits are for schedules
        raise ValueError(
            f"eta_minus and eta_plus must be below and above 1, "
            f"got {eta_minus!r} and {eta_plus!r}"
        )
    if not 0 <= step_min <= step_max:
        raise ValueError(
            f"step_min and step_max must be in order and at least 0, "
            f"got {step_min!r} and {step_max!r}"
        )
    return eta_minus, eta_plus, step_min, step_max, 0.0, 1.0


def update(p, g, before, step, eta_minus, eta_plus, step_min, step_max, zero, one):
    same = g * before
    factor = where(same > zero, eta_plus, where(same < zero, eta_minus, one))
    step = minimum(maximum(step * factor, step_min), step_max)
    g = where(same < zero, zero, g)
    return p - where(abs(g) > zero, copysign(step, g), g), g, step


rprop = Rule(update, scalars, state=("prev", "step_size"), starts={"step_size": "lr"})
