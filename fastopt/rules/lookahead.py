"""Lookahead: slow weights that follow, every ``k`` steps, those of any optimizer. Zhang
et al. 2019, arXiv:1907.08610, algorithm 1. It is ``fastopt.Lookahead``, around that
optimizer, whose state is kept.

The slow weights start at the parameters. Once they have moved, the parameters are set
to them.
"""

from fastopt.rule import Rule


def scalars(t, k=5, alpha=0.5):
    if k < 1 or k % 1 != 0:
        raise ValueError(f"k must be a whole number above 0, got {k!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")
    return (alpha,)


# The slow weights are what is updated here, and the parameters stand for gradients.
def update(slow, p, alpha):
    return (slow + alpha * (p - slow),)


lookahead = Rule(update, scalars)
