"""How far a rule is from its oracle, and how far it may be."""

import itertools

import numpy as np
from oracle import trajectory

# The largest error of any element at any of the steps, relative to the largest value
# that this element has had so far. Measured worst in float64: 2e-14, but for Prodigy,
# whose p0 - p loses the digits that a step of 1e-6 is smaller than p: 4e-11.
FLOAT64 = 1e-12

# The same in units of float32's eps, 2**-23, against the float64 oracle on the same
# float32 inputs. Rounding p 200 times is a random walk of 200 times up to half an ulp,
# a standard deviation of 4; over 20 seeds of 1003 elements the worst was 14 to 16 for
# most rules. RMSprop (42) divides g + weight_decay * p by its own size: where the sum
# cancels, its rounding errors come out as large as the step; so do NovoGrad, LaProp and
# Adan. Rules by the sign (Lion 68) round lr once, and then go 200 times the same way;
# so do those that round a factor close to 1 (ASGD 83). DoG (440) and Prodigy (15; with
# a single parameter 210,000: 2.5 percent) take the distance p - p0 of parameters that
# have hardly moved.


def settings(rule):
    """Every choice of the options (0 or False by default), with the rest at defaults,
    their square roots and fourth roots (of 1: 0.7 and 0.5); without the choices that
    the rule refuses."""
    defaults = rule.hyperparameters
    flags = [name for name, default in defaults.items() if isinstance(default, bool)]
    numbers = {n: default for n, default in defaults.items() if default}
    numbers = {n: default for n, default in numbers.items() if n not in flags}
    on = {name: 0.1 for name in defaults if name not in numbers}
    on |= {name: 0.9 for name in on if name == "momentum"}
    on |= {name: not defaults[name] for name in flags}
    chosen = itertools.product(*((defaults[name], on[name]) for name in on))
    for options, power in itertools.product(chosen, (1, 1 / 2, 1 / 4)):
        ones = {1: 1.0, 1 / 2: 0.7, 1 / 4: 0.5}[power]
        values = {n: ones if d == 1 else d**power for n, d in numbers.items()}
        values |= dict(zip(on, options, strict=True))
        try:
            rule.scalars(1, *rule.first_carry(values), **values)
        except ValueError:
            continue
        yield values


def data(size=1003, steps=200, dtype=np.float64):
    rng = np.random.default_rng(size)
    p, grads = rng.standard_normal(size), rng.standard_normal((steps, size))
    assert np.all(grads)
    return p.astype(dtype), grads.astype(dtype)


def error(rule, oracle, p, grads, backend="numpy", **hyperparameters):
    """Return the largest error of ``rule`` against an oracle, in the unit given above,
    or NaN if any error is NaN."""
    p, errors = p.copy(), []
    opt = rule(p, backend=backend, **hyperparameters)
    largest = np.abs(p).astype(np.float64)
    for g, true in zip(
        grads, trajectory(oracle, p, grads, **hyperparameters), strict=True
    ):
        opt.step(g)
        largest = np.maximum(largest, np.abs(true))
        errors.append(np.abs(p - true) / largest)
    return np.max(errors)
