"""Rules that are declared in passes: a direction, its norms, and the step along it."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from cases import DTYPES, nonzero, same_bits

import fastopt
from fastopt import Rule
from fastopt.rule import sqrt, wide

SIZES = (0, 1, 4097, 40_003)


def scalars(t, lr=0.1, momentum=0.9):
    return momentum, lr, 2.0


def direction(p, g, m, mu):
    m = mu * m + g
    return m + p, m


def measure(p, u):
    return wide(p) * wide(p), wide(u) * wide(u)


def settle(t, n, pp, uu, lr, two):
    return lr * sqrt(pp) / (sqrt(uu) + two), lr


def apply(p, u, step, decay):
    return (p - (step * u + decay * p),)


PASSES = (direction, measure, apply, scalars, settle)
RULE = Rule.in_passes(*PASSES, state=("m",), name="in_passes")


def whole_measure(p, g, m, mu):
    m = mu * m + g
    u = m + p
    return wide(p) * wide(p), wide(u) * wide(u)


def whole_update(p, g, m, mu, step, decay):
    m = mu * m + g
    u = m + p
    return p - (step * u + decay * p), m


def handing_on(t, n, pp, uu, mu, lr, two):
    return mu, lr * sqrt(pp) / (sqrt(uu) + two), lr


WHOLE = Rule(
    whole_update,
    scalars,
    state=("m",),
    measure=whole_measure,
    settle=handing_on,
    name="whole",
)


def after_steps(rule, backend, dtype, over):
    rng = np.random.default_rng(0)
    params = [nonzero(rng, size, dtype) for size in SIZES]
    opt = rule(params, backend=backend, threads=2)
    for _ in range(3):
        opt.step([nonzero(rng, size, dtype) for size in SIZES], clip_norm=5.0)
    return [*params, *opt.state["m"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("over", ["segment", "all"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_rule_in_passes_is_what_it_is_in_one(backend, over, dtype):
    """And what settle does not take goes on to the update as it is."""
    passes = Rule.in_passes(*PASSES, state=("m",), over=over, name="in_passes")
    whole = Rule(
        whole_update,
        scalars,
        state=("m",),
        measure=whole_measure,
        settle=handing_on,
        over=over,
        name="whole",
    )
    found = after_steps(passes, backend, dtype, over)
    expected = after_steps(whole, "numpy", dtype, over)
    assert all(map(same_bits, found, expected))


def test_what_is_composed_has_a_source():
    text = inspect.getsource(RULE.update)
    assert text.startswith("def update(p, g, m, mu, step, decay):")
    assert "direction(p, g, m, mu)" in text and "apply(p, u, step, decay)" in text
    assert inspect.getsource(fastopt.lamb.measure).count("terms(p, u)") == 1


def test_composing_imports_no_other_package():
    """csrc/render.py runs it where there is no NumPy."""
    text = Path(inspect.getfile(fastopt), "..", "composed.py").resolve().read_text()
    imports = [line for line in text.splitlines() if "import " in line]
    assert imports and not any("numpy" in x or "fastopt" in x for x in imports)


def too_few(p, g):
    return p, p


def three(p, u, g):
    return (u,)


def clashing(p, u, mu):
    return (p - mu * u,)


def lone(p):
    return (p,)


@pytest.mark.parametrize(
    ("k", "function", "message"),
    [
        (
            0,
            too_few,
            r"too_few .* must take \(p, g, \*state, \*scalars\), with 1 state",
        ),
        (1, three, r"three .* must take \(p, u\) and nothing else.*takes \(p, u, g\)"),
        (2, lone, r"lone .* must take \(p, u, \*what settle returns\).* takes \(p\)"),
        (2, clashing, "clashing takes mu, and so does direction; give it another name"),
        (0, len, "direction must be a plain Python function, got <built-in"),
    ],
)
def test_passes_that_take_something_else(k, function, message):
    given = [*PASSES]
    given[k] = function
    with pytest.raises(TypeError, match=message):
        Rule.in_passes(*given, state=("m",))


def returns_one(p, g, m, mu):
    return m


def returns_three(p, g, m, mu):
    return m, m, p


def takes_lr(p, g, m, mu, lr):
    return m, m * lr


def settles_one(t, n, pp, uu, lr, two):
    return (lr,)


def settles_all(t, n, pp, uu, a, mu, lr, two):
    return mu, lr, two


def of_any(t, n, *more):
    return more


def no_tuple(p, u):
    return wide(u)


@pytest.mark.parametrize(
    ("k", "function", "message"),
    [
        (
            0,
            returns_one,
            r"returns_one of 'direction' must return \(u, m\), a tuple of 2",
        ),
        (
            0,
            returns_three,
            r"returns_three .* must return \(u, m\), a tuple of 2, got 3",
        ),
        (0, takes_lr, "direction of .* must take the 1 results .* but takes 2"),
        (4, settles_one, "settle of .* returns 1 value, but its update takes 2 after"),
        (
            4,
            settles_all,
            "settle of .* the last results of scalars, 3 at most; it takes 8",
        ),
        (1, no_tuple, "measure of 'direction' must return a tuple"),
    ],
)
def test_passes_that_do_not_fit_together(k, function, message):
    given = [*PASSES]
    given[k] = function
    rule = Rule.in_passes(*given, state=("m",), name="direction")
    with pytest.raises(TypeError, match=message):
        rule(np.ones(3), backend="numpy")


def test_a_settle_of_any_arguments():
    with pytest.raises(TypeError, match="settle of .* must name its arguments one by"):
        Rule.in_passes(*PASSES[:4], of_any, state=("m",))
