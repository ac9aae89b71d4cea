"""Known failures of low precision: they happen in the formats that are known for them,
and not in the others. A new format is a word in these lists.

That averages of squares stop when they are rounded to the nearest, and only then, is in
test_formats.py.
"""

from functools import partial

import numpy as np
import pytest
from cases import bfloat16, same_bits

import fastopt
from fastopt.memory.formats import SMALLEST
from fastopt.optimizer.formats import EIGHT_BITS, OF_PARAMS, WHOLE

# Formats of parameters: "float32"; or a format by its name in formats={"param": name},
# in arrays of bfloat16. "nearest" is what such arrays have without it.
PARAMETERS = ("float32", "bf16", "bf16+r8", "bf16+r16")
LOSING = ("nearest",)
# Formats of state: by their names in formats=.
STATE = ("fp32", "bf16", "bf16_nearest", "8bit")
VANISHING = ("fp16",)  # where squares become 0
COUNT = SMALLEST + 37  # in groups of any size, and a part of one


def parameters(kind):
    """Parameters from 0.5 to 1, and the ``formats`` that keep them as this."""
    params = np.random.default_rng(0).uniform(0.5, 1, COUNT).astype(np.float32)
    if kind == "float32":
        return params, None
    return params.astype(bfloat16), None if kind == "nearest" else {"param": kind}


def moved(kind, make, grads, steps):
    """How far each parameter moves, and where it began, in float64."""
    params, formats = parameters(kind)
    start = params.astype(np.float64)
    opt = make(params, formats=formats)
    for _ in range(steps):
        opt.step(grads)
    return params.astype(np.float64) - start, start


def small_steps(kind):
    """Steps of 1e-6, which is far below the last place of a bfloat16: what they come to
    in all, over what they should."""
    grads = np.random.default_rng(1).normal(size=COUNT).astype(np.float32)
    make = partial(fastopt.adam, lr=1e-6)
    apart, _ = moved(kind, make, grads, 8000)
    return (apart * -np.sign(grads)).mean() / 8e-3


def small_decay(kind):
    """2,000 times a hundred-thousandth is taken away: what is, over what should be."""
    make = partial(fastopt.adamw, lr=1e-3, weight_decay=1e-2)
    apart, start = moved(kind, make, np.zeros(COUNT, np.float32), 2000)
    return apart.sum() / (start.sum() * ((1 - 1e-5) ** 2000 - 1))


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("done", [small_steps, small_decay])
def test_small_changes_add_up(done, kind):
    assert done(kind) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", LOSING)
@pytest.mark.parametrize("done", [small_steps, small_decay])
def test_small_changes_are_lost_in_parameters_of_few_bits(done, kind):
    assert done(kind) == 0


def test_small_steps_are_lost_in_24_bits_to_nearest():
    """They are below 2**-17 of the parameters; decay of a hundred-thousandth is not."""
    assert small_steps("bf16+r8_nearest") == 0
    assert small_decay("bf16+r8_nearest") == pytest.approx(1, abs=0.2)


# State ------------------------------------------------------------------------------

# Rules whose parameters move without gradients forget them (FTRL), or begin with state
# or decay that is off here.
OFF = {"weight_decay", "lambd", "initial_accumulator_value"}
STILL = [rule for rule in fastopt.RULES if rule.name != "ftrl"]


def copies(rule):
    """The buffers that begin as copies of the parameters."""
    starts = {k: v for variant in rule.all for k, v in variant.starts.items()}
    return {name for name, start in starts.items() if start == "p"}


def without_gradients(rule, kind):
    """An optimizer after steps under zero gradients, what its parameters were before,
    and are."""
    params = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
    start = params.copy()
    off = dict.fromkeys(OFF & rule.hyperparameters.keys(), 0.0)
    on = {"momentum": 0.9} if rule.name == "sgd" else {}
    if kind == "8bit" and not EIGHT_BITS.keys() & {*rule.variant({*on}).state}:
        pytest.skip("it has no averages that 8 bits are for")
    opt = rule(params, formats=kind, **off, **on)
    for _ in range(10):
        opt.step(np.zeros_like(params))
    return opt, start, params


@pytest.mark.parametrize("kind", [*STATE, *VANISHING])
@pytest.mark.parametrize(
    "rule", [r for r in STILL if not copies(r)], ids=lambda r: r.name
)
def test_parameters_do_not_drift_without_gradients(rule, kind):
    _, start, params = without_gradients(rule, kind)
    assert same_bits(params, start)


@pytest.mark.parametrize("kind", [*STATE, *VANISHING])
@pytest.mark.parametrize("rule", [r for r in STILL if copies(r)], ids=lambda r: r.name)
def test_parameters_do_not_drift_to_copies_of_them(rule, kind):
    """Schedule-free rules and MADGRAD move parameters to a buffer that begins as their
    copy. DoG and Prodigy measure how far they are from it, and choose lr by that."""
    opt, start, params = without_gradients(rule, kind)
    assert same_bits(params, start)
    for name in copies(rule):
        assert same_bits(opt.state[name][0].astype(np.float32), start)


def longest_step(kind):
    """The longest of Adam's first steps, over lr, under small gradients, which differ
    by a factor of up to 10, and then under none: 1, where numbers are exact."""
    rng = np.random.default_rng(0)
    grads = (10 ** rng.uniform(-5, -4, COUNT)).astype(np.float32)
    params = np.zeros(COUNT, np.float32)
    opt, longest = fastopt.adam(params, lr=1.0, formats=kind), 0.0
    for given in [grads] * 9 + [np.zeros_like(grads)]:
        before = params.copy()
        opt.step(given)
        longest = max(longest, abs(params - before).max())
    return longest


@pytest.mark.parametrize("kind", STATE)
def test_steps_are_as_long_as_lr_under_small_gradients(kind):
    assert longest_step(kind) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", VANISHING)
def test_steps_explode_where_squares_vanish(kind):
    assert longest_step(kind) > 100


def test_every_format_is_in_a_list():
    assert {*STATE, *VANISHING} == {*WHOLE, "8bit"}
    nearest = {"bf16_nearest", "bf16+r8_nearest"}
    assert {*PARAMETERS, *LOSING} == {"float32", "nearest", *OF_PARAMS} - nearest
