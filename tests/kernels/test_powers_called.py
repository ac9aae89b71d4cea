"""Powers in the functions that a user's function calls, whatever they are called."""

import numpy as np
import our_powers
import pytest

from fastopt import portable
from fastopt.rule import power, sqrt

record = our_powers.record


def helper(x, y):
    return x**y


class Methods:
    def method(self, x, y):
        return x**y


def with_bound_methods(t, lr=0.1, beta=0.9):
    x = Methods().method(1 + lr * (t - 1), 0.75)
    power_of = Methods().method
    y = power_of(0.96, t * lr)
    return lr * x, y, 1 - pow(base=beta, exp=t), pow(*(2, t))


def own_names():
    """Names of Python's functions that mean others here."""

    def max(x, y):
        return x**y

    def inner(t, lr=0.1, beta=0.9, abs=helper):
        pow = helper
        x = max(1 + lr * (t - 1), 0.75)
        return lr * x, abs(0.96, t * lr), 1 - pow(beta, t), pow(2, t)

    return inner


@pytest.mark.parametrize("function", [with_bound_methods, own_names()])
def test_the_powers_of_what_is_called_are_ours(function, record):
    lr, beta, t = 0.3, 0.95, 77
    x, y = 1 + lr * (t - 1), t * lr
    wanted = lr * power(x, 0.75), power(0.96, y), 1 - power(beta, t), 2**t
    assert portable.portable(function)(t, lr, beta) == wanted
    assert {(x, 0.75), (0.96, y), (beta, 77.0), (2.0, 77.0)} == set(record)


@pytest.mark.parametrize(
    "call",
    ["pow(0.9, t)", "power_of(0.9, t)", "(lambda x: power_of(x, t))(0.9)", "twice(t)"],
)
def test_without_its_source_a_function_warns_of_what_it_calls(call):
    names = {"power_of": helper}
    exec(f"def twice(t): return power_of(2, t)\ndef scalars(t): return {call}", names)
    with pytest.warns(RuntimeWarning, match="the source of scalars is not at hand"):
        assert portable.portable(names["scalars"]) is names["scalars"]


@pytest.mark.parametrize("call", ["max(t, 2)", "power_of(t, 2)", "sqrt(t)"])
def test_without_its_source_a_function_without_powers_is_silent(call):
    names = {"power_of": power, "sqrt": sqrt}
    exec(f"def scalars(t): return {call}", names)
    assert portable.portable(names["scalars"]) is names["scalars"]


def test_a_name_that_is_not_pythons_pow_keeps_its_meaning(record):
    def pow(x, y):
        return x - y

    def local(t):
        from operator import add as pow

        return pow(t, 3)

    functions = (lambda t: pow(t, 3)), local, (lambda t, pow=max: pow(t, 3))
    results = [portable.portable(function)(2) for function in functions]
    assert (results, record) == ([-1, 5, 3], [])


def test_powers_of_constants(record):
    def constants(t):
        return t * 0.99**503

    assert portable.portable(constants)(1) == power(0.99, 503)
    assert record == [(0.99, 503.0)]


def test_defaults_may_change_later():
    def cubes(x, y=2.0, *, z=1.0):
        return x**y * z

    assert portable.portable(cubes)(3.0) == 9
    cubes.__defaults__, cubes.__kwdefaults__ = (3.0,), {"z": 2.0}
    assert portable.portable(cubes)(3.0) == cubes(3.0) == 54


def test_an_array_is_raised_in_place():
    def squares(t):
        x = y = np.full(2, t)
        x **= 2
        return y.tolist()

    assert portable.portable(squares)(3.0) == squares(3.0) == [9, 9]


def test_pow_with_three_numbers():
    assert portable.portable(lambda t: pow(t, 3, 5))(2) == 3


def test_powers_of_numpys_float64_are_the_same():
    def scalars(t, lr=0.1, beta=0.99):
        return (np.float64(beta) ** t, beta ** np.int64(t), beta ** np.float64(t))

    function = portable.portable(scalars)
    for t in (1, 3, 503):
        first, second, third = function(t)
        assert type(first) is type(second) is type(third) is np.float64
        assert first == second == third == power(0.99, t)
    with np.errstate(divide="ignore"):
        assert portable.portable(lambda x: x**-1)(np.float64(0)) == np.inf
    assert portable.portable(lambda x: x ** np.int64(2))(3) == 9
