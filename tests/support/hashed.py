"""A rule that hashes the bits of its inputs, with every operator that words have."""

from fastopt.rule import Rule, Word, bits, is_double, real, where, word

FIRST = word(0x7FEB352D, 0xBF58476D1CE4E5B9)
SECOND = word(0x846CA68B, 0x94D049BB133111EB)
MIDDLE = word(15, 27)
LOW = word(0xFFFF)
ONE = word(1)
MANTISSA = word(0x007FFFFF, 0x000FFFFFFFFFFFFF)
EXPONENT = word(0x3F800000, 0x3FF0000000000000)


def scalars(t, lr=0.1):
    return (lr,)


def mixed(h: Word):
    h ^= h >> 16
    h = h * FIRST
    h = h ^ (h >> MIDDLE)
    h = SECOND * h + ONE
    return h - (h << 3)


def halves(h: Word):
    return h >> 16, LOW & h


def update(p, g, m, lr):
    # The bits of a NaN differ between machines.
    g, m = where(g == g, g, lr), where(m == m, m, lr)
    h = mixed(mixed(bits(g)) + bits(where(p == p, p, lr)))
    high, low = halves(ONE - h)
    uniform = real((h & MANTISSA) | EXPONENT)
    p = where((high > low) | (h <= SECOND) & (low != ONE), p - lr * uniform, p)
    other = p + where(is_double(p), lr, uniform)
    p = where((low < FIRST) & (h >= FIRST) | (low == bits(m)), p, other)
    return p, real((mixed(h) & MANTISSA) | EXPONENT)


hashed = Rule(update, scalars, state=("m",), name="hashed")
