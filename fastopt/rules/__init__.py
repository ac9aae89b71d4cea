"""The optimizers, one file each. ``RULES`` is the only list of them: kernels, tests,
benchmarks and tables follow from it."""

from fastopt.rule import Rule
from fastopt.rules.adam import adam
from fastopt.rules.adamw import adamw
from fastopt.rules.amsgrad import amsgrad
from fastopt.rules.amsgradw import amsgradw
from fastopt.rules.dynamic_gd import dynamic_gd
from fastopt.rules.gd import gd
from fastopt.rules.rmsprop import rmsprop
from fastopt.rules.sgd import sgd

RULES: tuple[Rule, ...] = (
    gd,
    dynamic_gd,
    sgd,
    rmsprop,
    adam,
    amsgrad,
    adamw,
    amsgradw,
)
