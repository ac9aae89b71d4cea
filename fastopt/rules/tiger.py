"""Tiger: the sign of the momentum, with defaults that train large models on one state
buffer. Su 2023, github.com/bojone/tiger. It is ``signum`` with another momentum and
weight decay; the author's scaling by the kind of layer is left to groups.
"""

from fastopt.rule import Rule
from fastopt.rules.signum import update


def scalars(t, lr=1e-3, beta=0.965, weight_decay=1e-2):
    return lr, 1 - beta, lr * weight_decay


tiger = Rule(update, scalars, state=("m",), name="tiger")
