"""Rules' scalars in kernels against the host's, bit for bit: run by test_cuda_powers.py
in a process of its own, in numba's simulator or on a GPU if there is one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numba import cuda

from fastopt import RULES, elementary
from fastopt.backends.cuda_powers import elementary_functions
from fastopt.backends.cuda_scalars import device_scalars
from fastopt.portable import portable
from fastopt.rule import cbrt, copysign, maximum, sign

EVERYTHING = [rule for public in RULES for rule in public.all]


def kernel_of(function, count):
    """A kernel of one thread that stores what a function returns."""
    numbers = "".join(f", numbers[{k}]" for k in range(count))
    made = {"compute": device_scalars(function)}
    text = f"""
def kernel(t, numbers, results):
    computed = compute(t[0]{numbers})
    for k in range(len(computed)):
        results[k] = computed[k]
"""
    exec(text, made)
    return cuda.jit(made["kernel"])


def computed(kernel, t, numbers, count):
    results = cuda.to_device(np.full(count, np.nan))
    kernel[1, 1](np.array([t]), np.array([*numbers], np.float64), results)
    return results.copy_to_host()


def off_the_defaults(rule, rng):
    values = {
        name: rng.uniform(0.9, 1) * default if type(default) is float else default
        for name, default in rule.hyperparameters.items()
    }
    return values | {name: 50.0 for name in values if name.endswith("warmup")}


@pytest.mark.parametrize("rule", EVERYTHING, ids=lambda rule: rule.name)
def test_scalars(rule):
    host, rng = portable(rule.scalars), random.Random(1)
    count = rule.scalars.__code__.co_argcount - 1
    kernel = kernel_of(rule.scalars, count)
    for t in (1, 2, 3, 10, 999, 10**5, *(rng.randint(4, 5000) for _ in range(5))):
        values = off_the_defaults(rule, rng)
        numbers = *rule.first_carry(values), *values.values()
        wanted = np.array(host(t, *numbers), np.float64)
        got = computed(kernel, t, numbers, len(wanted))
        assert got.tobytes() == wanted.tobytes(), numbers


@pytest.mark.parametrize(
    "rule", [r for r in EVERYTHING if r.settle is not None], ids=lambda rule: rule.name
)
def test_settle(rule):
    host, rng = portable(rule.settle), random.Random(2)
    count = rule.settle.__code__.co_argcount - 1
    kernel = kernel_of(rule.settle, count)
    for t in range(1, 9):
        numbers = [33.0, *(rng.uniform(0.1, 2) for _ in range(count - 1))]
        wanted = np.array(host(t, *numbers), np.float64)
        got = computed(kernel, t, numbers, len(wanted))
        assert got.tobytes() == wanted.tobytes(), numbers


def divided(t, x, y):
    return x / y, x**y, y**-1.0


def test_errors_are_infinities_and_nan():
    kernel = kernel_of(divided, 2)
    with np.errstate(all="ignore"):
        assert computed(kernel, 1, (1.0, 0.0), 3).tolist() == [np.inf, 1, np.inf]
        got = computed(kernel, 1, (-8.0, 1 / 3), 3)
    assert np.isnan(got[1]) and got[0] == -8.0 / (1 / 3)


def of_primitives(t, x):
    return sign(-x) * maximum(x, 0.5), copysign(x, -1.0), cbrt(x)


def test_primitives():
    got = computed(kernel_of(of_primitives, 1), 1, [0.25], 3)
    assert got.tolist() == [-0.5, -0.25, cbrt(np.float64(0.25))]


def powers(x, y, results):
    i = cuda.grid(1)
    if i < x.size:
        results[i] = power(x[i], y[i])


def logarithms(x, y, results):
    i = cuda.grid(1)
    if i < x.size:
        results[i] = log(x[i])


power, log = (elementary_functions()[name] for name in ("power", "log"))


def test_powers_and_logarithms():
    """On a GPU these are the bits of the compiled functions, for both ways."""
    rng = np.random.default_rng(3)
    roots = rng.integers(2**25, 2**26, 50) * 2.0 + 1  # their squares lie half-way
    x = np.concatenate([rng.uniform(0, 3, 100), rng.uniform(0.9, 1, 100), roots])
    y = np.concatenate(
        [rng.uniform(-90, 90, 100), rng.integers(1, 10**6, 100), 0 * roots + 2]
    )
    for kernel, exact in (
        (powers, elementary.power),
        (logarithms, lambda x, y: elementary.log(x)),
    ):
        results = cuda.to_device(np.zeros(x.size))
        cuda.jit(kernel)[1, 256](x, y, results)
        wanted = np.array([exact(*numbers) for numbers in zip(x, y, strict=True)])
        assert results.copy_to_host().tobytes() == wanted.tobytes()
