"""fastopt: optimizers written once, at memory speed everywhere, with the same bits.

>>> import numpy as np, fastopt
>>> w = np.ones(3, np.float32)
>>> opt = fastopt.adamw(w, lr=1e-2)     # a rule called with parameters: an optimizer
>>> opt.step(np.ones(3, np.float32))    # updates w in place
>>> opt.steps
1
"""

from fastopt import multitask, rules, schedules
from fastopt.adafactor import Adafactor
from fastopt.lookahead import Lookahead
from fastopt.memory.flat import FlatBuffer, flatten
from fastopt.multitask import gram
from fastopt.muon import Muon
from fastopt.native import get_include
from fastopt.optimizer.converting import convert_state
from fastopt.optimizer.optimizer import Optimizer
from fastopt.rule import Rule
from fastopt.rules import *  # noqa: F403  every rule, and RULES; named only there
from fastopt.training import EarlyStopping, ReduceLROnPlateau, minimize
from fastopt.tune import GradientNoiseScale, lr_range_test, scale_hyperparameters

__all__ = [
    "Adafactor",
    "EarlyStopping",
    "FlatBuffer",
    "GradientNoiseScale",
    "Lookahead",
    "Muon",
    "Optimizer",
    "ReduceLROnPlateau",
    "Rule",
    "convert_state",
    "flatten",
    "get_include",
    "gram",
    "lr_range_test",
    "minimize",
    "multitask",
    "scale_hyperparameters",
    "schedules",
]
__all__ += rules.__all__

__version__ = "0.1.0"
