"""Refused rules, schedules and switches: what their errors say, and that nothing was
written."""

import numpy as np
import pytest
from installed import needs_numba

import fastopt
from fastopt.rule import where

CPU_BACKENDS = ("numpy", "cython", "numba")


def scalars(t, lr=0.1):
    return (lr,)


@needs_numba
def test_rules():
    advice = "return it from scalars, and take it as an argument of <lambda>$"
    with pytest.raises(ValueError, match=f"contains the number 2, .*; {advice}"):
        fastopt.Rule(lambda p, g, lr: (p - 2 * lr * g,), scalars)
    with pytest.raises(TypeError, match="at least 3 arguments here; it takes 2"):
        fastopt.Rule(lambda p, g: (p,), scalars, state=("m",))
    with pytest.raises(TypeError, match="update must be a plain Python function"):
        fastopt.Rule(np.add, scalars)
    with pytest.raises(TypeError, match="returns 1 value.* takes 2 after"):
        fastopt.Rule(lambda p, g, lr, mu: (p - lr * g,), scalars)(np.ones(3))
    with pytest.raises(TypeError, match=r"must return \(p, m\), a tuple of 2, got 1"):
        fastopt.Rule(lambda p, g, m, lr: (p - lr * g,), scalars, state=("m",))(
            np.ones(3)
        )
    with pytest.raises(TypeError, match=r"must return \(p,\), a tuple of 1, got 2"):
        fastopt.Rule(lambda p, g, lr: (p, g), scalars)(np.ones(3))
    for name in ("groups", "threads", "backend", "_count"):
        with pytest.raises(TypeError, match=f"may not be named '{name}'"):
            fastopt.Rule(
                lambda p, g, lr: (p,), eval(f"lambda t, {name}=1.0: ({name},)")
            )
    with pytest.raises(TypeError, match="every hyperparameter a default; lr has none"):
        fastopt.Rule(lambda p, g, lr: (p,), lambda t, lr: (lr,))
    with pytest.raises(TypeError, match=r"one by one, but takes \*more"):
        fastopt.Rule(lambda p, g, lr: (p,), lambda t, **more: (1.0,))
    with pytest.raises(TypeError, match=r"by position, but takes lr by name only"):
        fastopt.Rule(lambda p, g, lr: (p,), lambda t, *, lr=1.0: (lr,))
    with pytest.raises(ValueError, match="contains the number 0.5"):
        fastopt.Rule(
            lambda p, g, lr: (p - 0.5 * lr,), scalars, variants={("lr",): fastopt.gd}
        )
    with pytest.raises(ValueError, match="halved of .* contains the number 0.5"):
        fastopt.Rule(lambda p, g, lr: (p - lr * halved(g),), scalars)
    with pytest.raises(ValueError, match="defines a function inside"):
        fastopt.Rule(lambda p, g, lr: (p - (lambda x: x)(lr),), scalars)


def halved(x):
    return 0.5 * x


def branching(p, g, lr):
    return (p - lr * (g if g > lr else p),)


def chained(p, g, lr):
    return (where(lr < g < p, p, g),)


def settled(t, n, total, lr):
    return (lr,)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("function", [branching, chained])
def test_functions_that_fail_on_arrays(function, backend):
    message = f"{function.__name__} of 'mine' fails on arrays; use where, not if, and"
    rule = fastopt.Rule(function, scalars, name="mine")
    with pytest.raises(TypeError, match=message) as raised:
        rule(np.ones(3), backend=backend)
    assert isinstance(raised.value.__cause__, (TypeError, ValueError))
    rule = fastopt.Rule(
        lambda p, g, lr: (p,), scalars, measure=function, settle=settled, name="mine"
    )
    with pytest.raises(TypeError, match=message):
        rule(np.ones(3), backend=backend)


NO_SCHEDULES = {
    "no argument": lambda: 0.1,
    "two arguments": lambda n, rate: rate,
    "by name": lambda *, n: 0.1,
}


@pytest.mark.parametrize("name", NO_SCHEDULES)
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.adamc])
def test_schedules_take_the_completed_steps(rule, name):
    schedule, opt = NO_SCHEDULES[name], rule(np.ones(3), lr=0.1)
    message = "must be a number, or a schedule: .* completed steps, but .* one argument"
    with pytest.raises(TypeError, match=f"^lr {message}"):
        rule(np.ones(3), lr=schedule)
    with pytest.raises(TypeError, match=rf'^groups\[1\]\["lr"\] {message}'):
        rule([{"params": np.ones(3)}, {"params": np.ones(2), "lr": schedule}])
    with pytest.raises(TypeError, match=f"^lr {message}"):
        opt.lr = schedule
    assert opt.lr == 0.1


def test_errors_inside_a_schedule_are_its_own():
    def schedule(n, rate=0.1):
        return rate + "n"

    with pytest.raises(TypeError, match="unsupported operand"):
        fastopt.adamw(np.ones(3), lr=schedule)
    opt = fastopt.adamw(np.ones(3), lr=lambda n, rate=0.1: rate / (n + 1))
    opt.step(np.ones(3))
    assert opt.groups[0].at(1)[0] == 0.05


@needs_numba
def test_no_hyperparameters_at_all():
    rule = fastopt.Rule(lambda p, g, lr: (p - lr * g,), lambda t: (0.1,), name="mine")
    with pytest.raises(
        TypeError,
        match="^mine has no hyperparameter 'lr'; it has none, and the",
    ):
        rule(np.ones(3), lr=0.1)
    groups = [{"params": np.ones(3)}, {"params": np.ones(2), "foo": 1}]
    with pytest.raises(
        TypeError, match=r"^groups\[1\]: adamw has no .*'foo'; it has lr"
    ):
        fastopt.adamw(groups)


def test_switches_without_a_variant():
    def scalars(t, a=0.0, b=0.0):
        return (a,)

    with_a = fastopt.Rule(lambda p, g, s, a: (p, s), scalars, state=("s",))
    with_b = fastopt.Rule(lambda p, g, s, a: (p, s), scalars, state=("s",))
    rule = fastopt.Rule(
        lambda p, g, a: (p,), scalars, variants={("a",): with_a, ("b",): with_b}
    )
    opt = rule(np.ones(3), a=1.0, backend="numpy")
    with pytest.raises(ValueError, match="no variant for a with b; .* for a, b"):
        opt.b = 1.0
    assert opt.b == 0 and list(opt.state) == ["s"]


def test_the_name_of_a_rule():
    assert fastopt.adamw.name == "adamw" and "Loshchilov" in fastopt.adamw.__doc__

    def update(p, g, lr):
        return (p - lr * g,)

    update.__module__ = "__main__"
    assert fastopt.Rule(update, scalars).name == "update"


def test_frozen_is_no_hyperparameter():
    opt = fastopt.adamw([{"params": np.ones(2)}, {"params": np.ones(3)}])
    words = r"attribute of a group; set opt.groups\[1\].frozen"
    with pytest.raises(TypeError, match=words):
        opt.groups[1]["frozen"] = True
    with pytest.raises(TypeError, match=words):
        opt.groups[1].update(frozen=True)
    with pytest.raises(TypeError, match=r"set opt.groups\[0\].frozen"):
        fastopt.adamw(np.ones(2), frozen=True)


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
@pytest.mark.parametrize("wrong", [None, "0.5"])
def test_scalars_that_are_no_numbers_later(wrong, backend):
    """They are tried when the optimizer is made, but may change with the step."""
    update = fastopt.gd.update if backend == "cython" else halving

    def scalars(t, lr=0.5):
        return (lr if t < 2 else wrong,)

    w = np.ones(3)
    opt = fastopt.Rule(update, scalars, name="mine")(w, backend=backend)
    opt.step(np.ones(3))
    before = w.copy()
    with pytest.raises(TypeError):
        opt.step(np.ones(3))
    assert opt.steps == 1 and (w == before).all()


def halving(p, g, lr):
    return (p - lr * g,)


@pytest.mark.parametrize("wrong", ["no", 1, np.array([1, 2]), None])
def test_flags_are_true_or_false(wrong):
    w = np.ones(3)
    opt = fastopt.sgd([w], lr=0.1)
    with pytest.raises(TypeError, match="^zero_grads must be True or False, got"):
        opt.step([np.ones(3)], zero_grads=wrong)
    opt.step([np.ones(3)], zero_grads=np.bool_(True))
    assert opt.steps == 1
