"""A rule applied to parameters."""

from fastopt.optimizer.optimizer import Optimizer as Optimizer
