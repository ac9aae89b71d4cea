"""The cost of a step: every rule x backend x size, beside naive NumPy and the floor.

    pytest bench                         all of it, in under a minute on two cores
    pytest bench -k "adamw and 1e5"      a part

A group is one rule at one size, so that its table compares backends with naive NumPy
and with the floor, the same traffic without arithmetic. The sizes stand for the
regimes: call overhead, cache, memory. Absolute times mean little on a shared machine;
``fastopt bench`` measures ratios, interleaved.
"""

import numpy as np
import pytest

from fastopt import RULES, backends
from fastopt.bench.naive import NAIVE, Naive
from fastopt.rules.floor import FLOORS

SIZES = {"1e3": 1_000, "1e5": 100_000, "1e6": 1_000_000, "1e7": 10_000_000}


def available(name):
    try:
        backends.load(name)
    except (ImportError, RuntimeError):
        return False
    return True


# The NumPy backend is the reference, not a contender: naive NumPy stands for its kind.
CONTENDERS = [name for name in ("cython", "numba") if available(name)]


@pytest.mark.parametrize("who", [*CONTENDERS, "naive", "floor"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_step(benchmark, rule, size, who):
    benchmark.group = f"{rule.name} {size}"
    rng = np.random.default_rng(0)
    param = rng.standard_normal(SIZES[size], np.float32)
    grad = rng.standard_normal(SIZES[size], np.float32)
    if who == "naive":
        if rule.name not in NAIVE:
            pytest.skip("nobody wrote it by hand")
        stepper, grads = Naive(rule.name, [param]), [grad]
    elif who == "floor":
        if len(rule.state) >= len(FLOORS):
            pytest.skip("no floor with so many streams")
        # Small enough that adding it at every step stays finite.
        stepper, grads = FLOORS[len(rule.state)](param), grad * np.float32(1e-6)
    else:
        stepper, grads = rule(param, backend=who), grad
    streams = 3 + 2 * len(rule.state)
    benchmark.extra_info["bytes"] = 4 * streams * SIZES[size]
    benchmark(stepper.step, grads)
