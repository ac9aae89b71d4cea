"""fastopt: optimizers written once, at memory speed everywhere, with the same bits.

>>> import numpy as np, fastopt
>>> w = np.ones(3, np.float32)
>>> opt = fastopt.adamw(w, lr=1e-2)     # a rule called with parameters: an optimizer
>>> opt.step(np.ones(3, np.float32))    # updates w in place
>>> opt.steps
1
"""

from fastopt import multitask as multitask
from fastopt.adafactor import Adafactor as Adafactor
from fastopt.flat import FlatBuffer as FlatBuffer
from fastopt.flat import flatten as flatten
from fastopt.lookahead import Lookahead as Lookahead
from fastopt.multitask import gram as gram
from fastopt.muon import Muon as Muon
from fastopt.optimizer import Optimizer as Optimizer
from fastopt.rule import Rule as Rule
from fastopt.rules import *  # noqa: F403  every rule, and RULES; named only there

__version__ = "0.1.0"
