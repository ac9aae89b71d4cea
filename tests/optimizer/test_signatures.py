"""How the functions of a rule are written: which arguments they take, and no loops,
statements or functions of NumPy."""

import inspect
import math

import installed
import numpy as np
import pytest

import fastopt
from fastopt.rule import where


def scalars(t, lr=0.5):
    return (lr,)


def update(p, g, lr):
    return (p - lr * g,)


def measure(p, g, lr):
    return (g * g,)


def settle(t, n, total, lr):
    return (lr,)


def only_lr(lr=0.5):
    return (lr,)


def lr_without_default(lr):
    return (lr,)


def two_defaults(beta1=0.9, lr=0.5):
    return (lr,)


def nothing():
    return (0.5,)


def all_by_name(*, lr=0.5):
    return (lr,)


def t_with_default(t=1, lr=0.5):
    return (lr,)


def several(*values):
    return values


def by_any_name(**values):
    return (0.5,)


SCALARS = {
    only_lr: r"first and without a default, but takes lr=0.5 first, .* scalars\(t, lr=",
    two_defaults: "without a default, but takes beta1=0.9 first",
    t_with_default: "without a default, but takes t=1 first",
    lr_without_default: r"but takes lr first, .* write scalars\(t, lr=...\)",
    nothing: "must take t, the number of the step, first, but takes no argument",
    all_by_name: r"by position, but takes lr by name only; remove the \*",
    several: r"one by one, t, .* first, but takes \*values",
    by_any_name: r"one by one, t, .* first, but takes \*values",
}


@pytest.mark.parametrize("function", SCALARS, ids=lambda f: f.__name__)
def test_scalars_take_t_first(function):
    with pytest.raises(TypeError, match=f"^scalars of 'mine' .*{SCALARS[function]}"):
        fastopt.Rule(update, function, name="mine")


def test_what_is_carried_has_no_default_and_is_taken_by_position():
    with pytest.raises(TypeError, match="without defaults, but k has the default"):
        fastopt.Rule(update, lambda t, k=1.0, lr=0.5: (lr, k), carry={"k": 1.0})
    with pytest.raises(TypeError, match="carry by position, but takes k by name only"):
        fastopt.Rule(update, lambda t, *, k: (k, k), carry={"k": 1.0})


SETTLES = {
    "t has a default": (lambda t=1, n=0, total=0, lr=0: (lr,), "takes t=1 first"),
    "lr has a default": (lambda t, n, total, lr=0.1: (lr,), "lr has the default 0.1"),
    "by name": (lambda t, n, total, *, lr: (lr,), "takes lr by name only"),
    "all by name": (lambda *, t, n: (1.0,), "first and by position, but takes t by"),
    "no argument": (lambda: (1.0,), "takes no argument"),
    "several": (lambda t, *sums: sums, "must name its arguments one by one"),
}


@pytest.mark.parametrize("case", SETTLES)
def test_settle(case):
    function, message = SETTLES[case]
    with pytest.raises(TypeError, match=f"^settle of 'mine' .*{message}"):
        fastopt.Rule(update, scalars, measure=measure, settle=function, name="mine")


def test_functions_of_elements():
    with pytest.raises(TypeError, match=r"must name its arguments .* takes \*rest"):
        fastopt.Rule(lambda p, g, *rest: (p,), scalars)
    with pytest.raises(TypeError, match="takes lr by name only"):
        fastopt.Rule(lambda p, g, *, lr: (p,), scalars)


def test_positional_only_arguments_are_as_good():
    rule = fastopt.Rule(
        lambda p, g, lr, /: (p - lr * g,), lambda t, /, lr=0.5: (lr,), name="mine"
    )
    w = np.ones(2)
    rule(w, backend="numpy").step(np.ones(2))
    assert w.tolist() == [0.5, 0.5]


def test_state_is_a_tuple_of_names():
    def with_m(p, g, m, lr):
        return p - lr * m, m

    wanted = r"got the string 'momentum'; write state=\('momentum',\)"
    with pytest.raises(TypeError, match=wanted):
        fastopt.Rule(with_m, scalars, state="momentum")
    with pytest.raises(TypeError, match=wanted):
        fastopt.Rule.in_passes(
            with_m, lambda p, u: (u,), update, scalars, settle, state="momentum"
        )
    for wrong in (None, 1, (1,), {"m"}):
        with pytest.raises(TypeError, match="a tuple with the name of each buffer"):
            fastopt.Rule(with_m, scalars, state=wrong)
    with pytest.raises(ValueError, match="must name each buffer once"):
        fastopt.Rule(with_m, scalars, state=("m", "m"))
    assert fastopt.Rule(with_m, scalars, state=["m"]).state == ("m",)


def for_loop(p, g, lr):
    for x in (lr, g):
        p = p - x
    return (p,)


def while_loop(p, g, lr):
    while lr < lr:
        p = p - lr * g
    return (p,)


def helper(x):
    y = x
    for z in (x, x):
        y = y + z
    return y


def calling(p, g, lr):
    return (p - lr * helper(g),)


@pytest.mark.parametrize(
    ("function", "culprit", "line"),
    [(for_loop, for_loop, 1), (while_loop, while_loop, None), (calling, helper, 2)],
    ids=["for", "while", "helper"],
)
def test_loops_are_refused_with_their_line(function, culprit, line):
    _, first = inspect.getsourcelines(culprit)
    at = r"\d+" if line is None else str(first + line)
    message = f"{culprit.__name__} of 'mine' has a loop, in line {at} of .*test_signat"
    with pytest.raises(ValueError, match=message):
        fastopt.Rule(function, scalars, name="mine")


HUGE = 10**5000  # Python refuses to write so many digits


@pytest.mark.parametrize(
    "call",
    [
        lambda: fastopt.adamw(np.ones(3), lr=HUGE),
        lambda: fastopt.adamw(np.ones(3), threads=HUGE),
        lambda: fastopt.adamw(np.ones(3), backend=HUGE),
        lambda: fastopt.adamw(np.ones(3), weight_decay_mask=HUGE),
        lambda: fastopt.schedules.onecycle(1.0, steps=HUGE),
        lambda: fastopt.schedules.inverse_sqrt(1.0, warmup=HUGE),
    ],
)
def test_huge_integers_are_refused_in_words(call):
    with pytest.raises((TypeError, ValueError), match="got an integer of 16610 bits"):
        call()


def printing(p, g, lr):
    """Show a parameter."""
    print(p)
    return (p - lr * g,)


def printing_in_between(p, g, lr):
    new = p - lr * g
    print(f"{new}", new) if lr else print(p)
    return (new,)


def computing(p, g, lr):
    p * g
    return (p - lr * g,)


def helped(p, g, lr):
    return printing(p, g, lr)


def with_a_docstring(p, g, lr):
    """Swap twice, compare, and choose."""
    a, b = p, g
    b, a = a, b
    p, g = b, a
    both = (p < g) & (g < lr)
    return (where(both, p, p - lr * abs(g)),)


STATEMENTS = {
    printing: "printing",
    printing_in_between: "printing_in_between",
    computing: "computing",
    helped: "printing",
}


@pytest.mark.parametrize("function", STATEMENTS)
@pytest.mark.parametrize("what", ["update", "measure", "evaluate"])
def test_expressions_whose_values_are_dropped(function, what):
    """Compiled, a call of ``print`` failed while it held the GIL, and hung."""
    more = {what: function}
    if what == "measure":
        more["settle"] = settle
    if what == "evaluate":
        more["evaluate"] = lambda p, lr: function(p, p, lr)
    name = STATEMENTS[function]
    line = rf"in line \d+ of .*{__name__.rpartition('.')[2]}.py"
    message = f"{name} of 'mine' has an expression .*, {line}, .* call {name} by hand"
    with pytest.raises(ValueError, match=message):
        fastopt.Rule(**{"update": update, "scalars": scalars, "name": "mine"} | more)


def test_a_docstring_is_no_such_expression():
    rule, w = fastopt.Rule(with_a_docstring, scalars), np.ones(2)
    rule(w, backend="numpy").step(np.array([3.0, -2.0]))
    assert w.tolist() == [-0.5, 0.0]


FOREIGN = {
    "np.linalg.norm": (lambda p, g, lr: (p / np.linalg.norm(g),), "let measure= sum"),
    "np.float32": (lambda p, g, lr: (p - np.float32(lr),), r"bits, real\)$"),
    "math.sqrt": (lambda p, g, lr: (math.sqrt(p),), "write fastopt.rule.sqrt$"),
    "math.fabs": (lambda p, g, lr: (math.fabs(p),), r"write abs\(x\)$"),
    "max": (lambda p, g, lr: (max(p, g),), "write fastopt.rule.maximum$"),
    ".mean": (lambda p, g, lr: (p - g.mean(),), "let measure= sum"),
    ".sum": (lambda p, g, lr: (p / (g * g).sum(),), "let measure= sum"),
}


def test_numpys_functions_of_elements_are_left_to_the_backend():
    """They run, but nothing promises that they have the same bits everywhere."""
    rule = fastopt.Rule(lambda p, g, lr: (p - lr * np.tanh(g),), scalars, name="tanh")
    for backend in installed.BACKENDS:
        if backend != "cython":
            w = np.ones(3)
            rule(w, backend=backend).step(np.full(3, 0.5))
            np.testing.assert_allclose(w, 1 - rule.hyperparameters["lr"] * np.tanh(0.5))


@pytest.mark.parametrize("named", FOREIGN)
def test_functions_that_are_no_primitives(named):
    function, advice = FOREIGN[named]
    message = (
        f"of 'mine' (calls|reads) {named}, in line .*, but may use only .*{advice}"
    )
    for more in (
        {"update": function},
        {"update": lambda p, g, lr: function(p, g, lr)},
        {"update": update, "measure": function, "settle": settle},
    ):
        with pytest.raises(TypeError, match=message):
            fastopt.Rule(scalars=scalars, name="mine", **more)


def late(t, lr=0.5):
    return (lr / (t - 2),)


def early(t, lr=0.5):
    return (math.exp(lr * 2000),)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("lr", [0.25, lambda steps: 0.25])
def test_errors_in_scalars_say_what_it_was_called_with(backend, lr):
    rule = fastopt.Rule(update, late, name="mine")
    opt = rule(np.ones(3), lr=lr, backend=backend)
    opt.step(np.ones(3))
    with pytest.raises(ZeroDivisionError, match="division by zero") as raised:
        opt.step(np.ones(3))
    (note,) = raised.value.__notes__
    assert note == (
        "This is from scalars of the rule 'mine', called for step t with t=2, lr=0.25."
    )
    opt.state_dict()  # it is not busy
    with pytest.raises(OverflowError) as overflow:
        fastopt.Rule(update, early, name="mine")(np.ones(3), backend=backend)
    assert overflow.value.__notes__[0].endswith("t=1, lr=0.5.")


def test_arguments_of_a_rule_that_do_not_exist():
    message = (
        r"Rule has no argument 'states'; it has update, .*; did you mean state or st"
    )
    with pytest.raises(TypeError, match=message):
        fastopt.Rule(update, scalars, states=("m",))
    with pytest.raises(TypeError, match="did you mean starts"):
        fastopt.Rule(update, scalars, start={"m": 0.5})
    assert next(iter(inspect.signature(fastopt.Rule).parameters)) == "update"
