"""fastopt: optimizers written once, at memory speed everywhere, with the same bits.

>>> import numpy as np, fastopt
>>> w = np.ones(3, np.float32)
>>> opt = fastopt.adamw(w, lr=1e-2)     # a rule called with parameters: an optimizer
>>> opt.step(np.ones(3, np.float32))    # updates w in place
>>> opt.steps
1
"""

from fastopt.flat import FlatBuffer, flatten
from fastopt.optimizer import Optimizer
from fastopt.rule import Rule
from fastopt.rules import (
    RULES,
    adam,
    adamw,
    amsgrad,
    amsgradw,
    dynamic_gd,
    gd,
    rmsprop,
    sgd,
)

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "FlatBuffer",
    "Optimizer",
    "Rule",
    "adam",
    "adamw",
    "amsgrad",
    "amsgradw",
    "dynamic_gd",
    "flatten",
    "gd",
    "rmsprop",
    "sgd",
]
