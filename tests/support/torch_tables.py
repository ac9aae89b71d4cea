"""Torch's optimizers, and the options that its own test of them is run over."""

import torch
from torch.testing._internal import common_optimizers as tables

import fastopt.torch

INFOS = [i for i in tables.optim_db if i.optim_cls.__name__ in fastopt.torch._OF_TORCH]
NAMES = [info.optim_cls.__name__ for info in INFOS]
INFO = dict(zip(NAMES, INFOS, strict=True))


def ours(name):
    return getattr(fastopt.torch, name)


def theirs(name):
    return getattr(torch.optim, name)


def plain_options(name, **more):
    return [
        given.kwargs for given in INFO[name].optim_inputs_func(device="cpu", **more)
    ]
