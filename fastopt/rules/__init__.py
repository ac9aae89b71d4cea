"""The optimizers, one file each. ``RULES`` is the only list of them: kernels, tests,
benchmarks and tables follow from it."""

from fastopt.rule import Rule as _Rule
from fastopt.rules.adam import adam as adam
from fastopt.rules.adamw import adamw as adamw
from fastopt.rules.amsgrad import amsgrad as amsgrad
from fastopt.rules.amsgradw import amsgradw as amsgradw
from fastopt.rules.dynamic_gd import dynamic_gd as dynamic_gd
from fastopt.rules.gd import gd as gd
from fastopt.rules.rmsprop import rmsprop as rmsprop
from fastopt.rules.sgd import sgd as sgd

RULES: tuple[_Rule, ...] = (
    gd,
    dynamic_gd,
    sgd,
    rmsprop,
    adam,
    amsgrad,
    adamw,
    amsgradw,
)
