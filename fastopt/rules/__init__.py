"""The optimizers, one file each.

``RULES``, and ``CLASS_RULES`` for those that have a class of their own, are the only
lists of them: kernels, tests, benchmarks and tables follow from these.
"""

from fastopt.rule import Rule as _Rule
from fastopt.rules.adabelief import adabelief as adabelief
from fastopt.rules.adadelta import adadelta as adadelta
from fastopt.rules.adafactor import adafactor as _adafactor
from fastopt.rules.adagrad import adagrad as adagrad
from fastopt.rules.adam import adam as adam
from fastopt.rules.adamax import adamax as adamax
from fastopt.rules.adamc import adamc as adamc
from fastopt.rules.adamw import adamw as adamw
from fastopt.rules.adan import adan as adan
from fastopt.rules.ademamix import ademamix as ademamix
from fastopt.rules.adopt import adopt as adopt
from fastopt.rules.amsgrad import amsgrad as amsgrad
from fastopt.rules.amsgradw import amsgradw as amsgradw
from fastopt.rules.asgd import asgd as asgd
from fastopt.rules.cautious_adamw import cautious_adamw as cautious_adamw
from fastopt.rules.cautious_decay_adamw import (
    cautious_decay_adamw as cautious_decay_adamw,
)
from fastopt.rules.cautious_lion import cautious_lion as cautious_lion
from fastopt.rules.dadapt_adam import dadapt_adam as dadapt_adam
from fastopt.rules.dog import dog as dog
from fastopt.rules.dynamic_gd import dynamic_gd as dynamic_gd
from fastopt.rules.ftrl import ftrl as ftrl
from fastopt.rules.gd import gd as gd
from fastopt.rules.lamb import lamb as lamb
from fastopt.rules.laprop import laprop as laprop
from fastopt.rules.lars import lars as lars
from fastopt.rules.lion import lion as lion
from fastopt.rules.lookahead import lookahead as _lookahead
from fastopt.rules.madgrad import madgrad as madgrad
from fastopt.rules.mars import mars as mars
from fastopt.rules.muon import muon as _muon
from fastopt.rules.nadam import nadam as nadam
from fastopt.rules.nadamw import nadamw as nadamw
from fastopt.rules.novograd import novograd as novograd
from fastopt.rules.prodigy import prodigy as prodigy
from fastopt.rules.qhadam import qhadam as qhadam
from fastopt.rules.radam import radam as radam
from fastopt.rules.radamw import radamw as radamw
from fastopt.rules.rmsprop import rmsprop as rmsprop
from fastopt.rules.rprop import rprop as rprop
from fastopt.rules.schedule_free_adamw import schedule_free_adamw as schedule_free_adamw
from fastopt.rules.schedule_free_radam import schedule_free_radam as schedule_free_radam
from fastopt.rules.schedule_free_sgd import schedule_free_sgd as schedule_free_sgd
from fastopt.rules.sgd import sgd as sgd
from fastopt.rules.sgdw import sgdw as sgdw
from fastopt.rules.signum import signum as signum
from fastopt.rules.sophia_g import sophia_g as sophia_g
from fastopt.rules.stable_adamw import stable_adamw as stable_adamw
from fastopt.rules.tiger import tiger as tiger
from fastopt.rules.yogi import yogi as yogi

# In the order of the tables: plain, adaptive, without schedules, with norms.
RULES: tuple[_Rule, ...] = (
    gd,
    dynamic_gd,
    sgd,
    sgdw,
    signum,
    tiger,
    lion,
    qhadam,
    rmsprop,
    adagrad,
    adadelta,
    rprop,
    asgd,
    adam,
    amsgrad,
    adamw,
    amsgradw,
    adamax,
    nadam,
    nadamw,
    radam,
    radamw,
    adabelief,
    yogi,
    laprop,
    adopt,
    adan,
    ademamix,
    madgrad,
    ftrl,
    sophia_g,
    adamc,
    cautious_decay_adamw,
    schedule_free_sgd,
    schedule_free_adamw,
    schedule_free_radam,
    lars,
    lamb,
    novograd,
    stable_adamw,
    cautious_adamw,
    cautious_lion,
    mars,
    dog,
    dadapt_adam,
    prodigy,
)

# Each has a class that applies it: fastopt.Adafactor, fastopt.Muon, fastopt.Lookahead.
CLASS_RULES: tuple[_Rule, ...] = (_adafactor, _muon, _lookahead)

__all__ = ["RULES", *(rule.name for rule in RULES)]
