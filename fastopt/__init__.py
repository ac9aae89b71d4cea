"""fastopt: optimizers written once, at memory speed everywhere, with the same bits.

>>> import numpy as np, fastopt
>>> w = np.ones(3, np.float32)
>>> opt = fastopt.adamw(w, lr=1e-2)     # a rule called with parameters: an optimizer
>>> opt.step(np.ones(3, np.float32))    # updates w in place
>>> opt.steps
1
"""

from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING

from fastopt import advice as _advice
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

if not TYPE_CHECKING:  # a type checker would believe that there is every name

    def __getattr__(name):
        """Say which name may be meant."""
        names, other, also = __all__, "; fastopt.RULES has all rules", ""
        if name[:1].isupper():  # as torch's classes are
            also = " The classes for tensors of torch are in fastopt.torch."
        if name.isidentifier() and name[0] != "_" and _find_spec(f"fastopt.{name}"):
            names, other = [], f"; write import fastopt.{name}"
        raise _advice.no_attribute("fastopt", name, names, other, also)
