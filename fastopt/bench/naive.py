"""Rules as people write them by hand in NumPy, one array at a time and with
temporaries. The demo and the benchmarks compare fastopt with them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from fastopt.memory.segments import Array

State = defaultdict[str, "Array | float"]


def gd(p: Array, g: Array, s: State, t: int, lr: float = 1e-3) -> None:
    p -= lr * g


def dynamic_gd(p: Array, g: Array, s: State, t: int, lr: float = 1e-3) -> None:
    p -= lr / (1 + math.sqrt(t - 1)) * g


def sgd(
    p: Array,
    g: Array,
    s: State,
    t: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> None:
    if weight_decay:
        g = g + weight_decay * p
    if momentum:
        s["b"] = g = momentum * s["b"] + g
    p -= lr * g


def rmsprop(
    p: Array,
    g: Array,
    s: State,
    t: int,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
) -> None:
    s["v"] = alpha * s["v"] + (1 - alpha) * g**2
    p -= lr * g / (np.sqrt(s["v"]) + eps)


def adam(
    p: Array,
    g: Array,
    s: State,
    t: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    s["m"] = beta1 * s["m"] + (1 - beta1) * g
    s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
    m_hat = s["m"] / (1 - beta1**t)
    v_hat = s["v"] / (1 - beta2**t)
    p -= lr * m_hat / (np.sqrt(v_hat) + eps)


def adamw(
    p: Array, g: Array, s: State, t: int, lr: float = 1e-3, weight_decay: float = 1e-2
) -> None:
    p *= 1 - lr * weight_decay
    adam(p, g, s, t, lr)


NAIVE: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (gd, dynamic_gd, sgd, rmsprop, adam, adamw)
}


class Naive:
    """An optimizer that applies one of these functions to a list of arrays."""

    def __init__(self, rule: str, params: list[Array], **hyperparameters: float):
        self._update = NAIVE[rule]
        self._params = params
        self._hyperparameters = hyperparameters
        self._states: list[State] = [defaultdict(float) for _ in params]
        self._t = 0

    def step(self, grads: list[Array]) -> None:
        self._t += 1
        for p, g, s in zip(self._params, grads, self._states, strict=True):
            self._update(p, g, s, self._t, **self._hyperparameters)
