"""The bandwidth floor: what a step costs that only moves memory.

For each number of state buffers, a pass over the very streams of a rule with that many
(every one read; all but the gradients written) and nothing to compute: values move on
by one buffer, and one addition merges the gradient in, so that no stream can be left
out. Built and driven like a rule, so that what differs from one is the arithmetic.
"""

from fastopt.rule import Rule


def scalars(t):
    return ()


def streams0(p, g):
    return (p + g,)


def streams1(p, g, a):
    return a, p + g


def streams2(p, g, a, b):
    return a, b, p + g


def streams3(p, g, a, b, c):
    return a, b, c, p + g


def streams4(p, g, a, b, c, d):
    return a, b, c, d, p + g


# By number of state buffers.
FLOORS: tuple[Rule, ...] = (
    Rule(streams0, scalars),
    Rule(streams1, scalars, state=("a",)),
    Rule(streams2, scalars, state=("a", "b")),
    Rule(streams3, scalars, state=("a", "b", "c")),
    Rule(streams4, scalars, state=("a", "b", "c", "d")),
)
