"""Parameters of torch that are large enough for encoded state, and their gradients."""

import numpy as np
import torch

import fastopt.torch as ft

# State is encoded from 4,096 elements on.
SHAPES = (90, 80), (5000,), (7,), (4096,), (0,)


def drawn(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]


def give(params, seed):
    for param, grad in zip(params, drawn(seed), strict=True):
        new = torch.from_numpy(grad).to(param.dtype)
        if param.grad is None:
            param.grad = new
        else:
            param.grad.copy_(new)


def params_of(dtype, flat=False):
    params = [torch.nn.Parameter(torch.from_numpy(p).to(dtype)) for p in drawn(0)]
    if flat:
        ft.flatten_(params)
    return params
