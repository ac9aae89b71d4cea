"""What a step does besides its rule, in the same pass over memory. It is written as
rules are, so every backend compiles it, and the bits are the same."""

from fastopt.rule import Rule, maximum, minimum, wide


def none(t):
    return ()


def square(p, g):
    return (wide(g) * wide(g),)


def settled(t, n, squares):
    return ()


def add(p, g):
    return (p + g,)


# The sum of gradients.
accumulate = Rule(add, none)

# The norm of gradients, which is the root of what this rule measures.
norm = Rule(add, none, measure=square, settle=settled, over="all")


def product(p, g):
    return (wide(p) * wide(g),)


# The product of two gradients, of which a Gram matrix is made pair by pair.
inner = Rule(add, none, measure=product, settle=settled, over="all")


def approach(p, g, weight):
    return (p + weight * (g - p),)


def weights(t, weight=1.0):
    return (weight,)


# The moving average p of what stands in for the gradients: the parameters.
average = Rule(approach, weights)


def limited(p, g, low, high):
    return (minimum(maximum(g, low), high),)


def bounds(t, low=-1.0, high=1.0):
    return low, high


# A copy p of the gradients, with each element limited.
clip = Rule(limited, bounds)

PASSES = (accumulate, norm, inner, average, clip)
