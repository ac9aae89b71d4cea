"""Tensors, and what tests of ``fastopt.torch`` do with them again and again."""

import torch

import fastopt.torch as ft
from fastopt.torch.arguments import PAIRS

Parameter = torch.nn.Parameter
SHAPES = (3, 5), (7,), (2, 3, 4), ()


def draw(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def params_of(tensors):
    return [Parameter(tensor.clone()) for tensor in tensors]


def give(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def flat(tensors):
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def class_of(rule):
    """The optimizer for a rule: that of torch's name for it, or the rule's own."""
    if rule.name in ("adam", "adamw"):
        return {"adam": ft.Adam, "adamw": ft.AdamW}[rule.name]
    found = [getattr(ft, name) for name in ft.__all__ if name.lower() == rule.name]
    return found[0] if found else getattr(ft, ft._classes.title(rule))


def in_torchs_words(values):
    found = {}
    for name, value in values.items():
        pair, i = PAIRS.get(name, (None, 0))
        if pair is None:
            found[name] = value
        else:
            found[pair] = (*found.get(pair, ()), value)
    return found


# Where a tensor lies

PLAIN = torch.Tensor.clone


def gaps(tensor):
    room = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)
    return room[..., 0].copy_(tensor)


def transposed(tensor):
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)
