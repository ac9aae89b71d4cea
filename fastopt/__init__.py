"""fastopt: optimizers written once, at memory speed everywhere, with the same bits.

>>> import numpy as np, fastopt
>>> w = np.ones(3, np.float32)
>>> opt = fastopt.adamw(w, lr=1e-2)     # a rule called with parameters: an optimizer
>>> opt.step(np.ones(3, np.float32))    # updates w in place
>>> opt.steps
1
"""

from fastopt.rules import *  # noqa: F403  every rule, and RULES; named only there

# Before these modules, or their rules' modules would come in their place.
# isort: split
from fastopt import multitask as multitask
from fastopt import schedules as schedules
from fastopt.adafactor import Adafactor as Adafactor
from fastopt.lookahead import Lookahead as Lookahead
from fastopt.memory.flat import FlatBuffer as FlatBuffer
from fastopt.memory.flat import flatten as flatten
from fastopt.multitask import gram as gram
from fastopt.muon import Muon as Muon
from fastopt.native import get_include as get_include
from fastopt.optimizer.converting import convert_state as convert_state
from fastopt.optimizer.optimizer import Optimizer as Optimizer
from fastopt.rule import Rule as Rule
from fastopt.training import EarlyStopping as EarlyStopping
from fastopt.training import ReduceLROnPlateau as ReduceLROnPlateau
from fastopt.training import minimize as minimize
from fastopt.tune import GradientNoiseScale as GradientNoiseScale
from fastopt.tune import lr_range_test as lr_range_test
from fastopt.tune import scale_hyperparameters as scale_hyperparameters

__version__ = "0.1.0"
