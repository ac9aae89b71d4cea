"""The peers of the benchmark: what they import, and what they call our rules.

Each table maps a rule to the peer's name for the same update. A rule that is not in it,
or that does something else there, is one that the peer does not have.

This file imports nothing from fastopt, because ``contender.py`` also runs against other
builds of it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

# What a contender imports besides NumPy and fastopt.
PACKAGES: dict[str, tuple[str, ...]] = {
    "fastopt torch": ("torch",),
    "fastopt torch, flat": ("torch",),
    "torch fused": ("torch",),
    "torch fused, huge pages": ("torch",),
    "torch foreach": ("torch",),
    "torch loop": ("torch",),
    "torch default": ("torch",),
    "timm": ("torch", "timm"),
    "DeepSpeed": ("torch", "deepspeed"),
    "optax": ("jax", "optax"),
    "fastopt jax": ("jax",),
    "bitsandbytes": ("torch", "bitsandbytes"),
    "fastopt numba": ("numba",),
}

TORCH: dict[str, tuple[str, dict[str, bool]]] = {
    "gd": ("SGD", {}),
    "sgd": ("SGD", {}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "adamw": ("AdamW", {}),
    "amsgradw": ("AdamW", {"amsgrad": True}),
    "adamax": ("Adamax", {}),
    "nadam": ("NAdam", {}),
    "nadamw": ("NAdam", {"decoupled_weight_decay": True}),
    "radam": ("RAdam", {}),
    "radamw": ("RAdam", {"decoupled_weight_decay": True}),
    "adagrad": ("Adagrad", {}),
    "adadelta": ("Adadelta", {}),
    "rprop": ("Rprop", {}),
    "asgd": ("ASGD", {}),
}

DEEPSPEED = {"adam": {"adamw_mode": False}, "adamw": {"adamw_mode": True}}

TIMM = {"lamb": "lamb.Lamb", "lion": "lion.Lion"}

BITSANDBYTES = {
    "sgd": "SGD32bit",
    "rmsprop": "RMSprop32bit",
    "adam": "Adam32bit",
    "adamw": "AdamW32bit",
}

PAIRS = {
    "betas": ("beta1", "beta2"),
    "etas": ("eta_minus", "eta_plus"),
    "step_sizes": ("step_min", "step_max"),
}


def with_betas(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Use torch's names, which DeepSpeed and bitsandbytes share."""
    values = dict(hyperparameters)
    for pair, names in PAIRS.items():
        if names[0] in values:
            values[pair] = tuple(map(values.pop, names))
    return values


def import_timm_optimizers_only() -> None:
    """All of timm would need torchvision, which needs its own torch."""
    spec = None if "timm" in sys.modules else importlib.util.find_spec("timm")
    for place in (spec and spec.submodule_search_locations) or ():
        for name in ("timm", "timm.optim"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [place]
            place = os.path.join(place, "optim")


def torch_sequence(asked: dict[str, Any], step: Any, params: list[Any]) -> Any:
    """Return a step with the code that a torch user writes to clip and average."""
    import torch

    if not asked:
        return step
    norm, ema = asked.get("clip_norm"), asked.get("ema")
    averages = [p.detach().clone() for p in params] if ema else []

    def sequence() -> None:
        if norm:
            torch.nn.utils.clip_grad_norm_(params, norm, foreach=True)
        step()
        if ema:  # as in torch.optim.swa_utils
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - ema)

    return sequence


def optax_transforms(values: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return functions that make optax' transformations with these hyperparameters.
    AMSGrad is missing: optax takes the maximum of the corrected second moment."""
    import jax.numpy as jnp
    import optax

    lr, momentum = values["lr"], values.get("momentum") or None
    names = {"b1": "beta1", "b2": "beta2", "eps": "eps"}
    adam = {theirs: values.get(ours) for theirs, ours in names.items()}
    return {
        "gd": lambda: optax.sgd(lr),
        "dynamic_gd": lambda: optax.sgd(lambda done: lr / (1 + jnp.sqrt(done))),
        "sgd": lambda: optax.sgd(lr, momentum),
        "rmsprop": lambda: optax.rmsprop(
            lr,
            values["alpha"],
            values["eps"],
            eps_in_sqrt=False,
            centered=values["centered"],
            momentum=momentum,
        ),
        "adam": lambda: optax.adam(lr, **adam),
        "adamw": lambda: optax.adamw(lr, **adam, weight_decay=values["weight_decay"]),
    }
