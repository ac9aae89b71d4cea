"""Powers, logarithms and cosines have the bits of the exact results, rounded once,
wherever they are computed. No compiled module asks C's mathematics library for a result
that it may round in its own way."""

import __future__

import ast
import gc
import math
import random
import shutil
import struct
import subprocess
import weakref
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import our_powers
import pytest

import fastopt
from fastopt import elementary, portable, rules
from fastopt.backends import cython_cpu
from fastopt.portable import cospi
from fastopt.rule import Rule, log, power, wide

record = our_powers.record

ROOT = Path(__file__).resolve().parents[2]
BUILT = not isinstance(power, type(elementary.power))
BETAS = (0.5, 0.8, 0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9999, 0.99999)
# Of all powers of these betas, and of 0.9995 and 0.999999, up to t = 4,000,000, these
# come closest to the middle of two floats: to 3, 7 and 15 parts in 100 million.
HARD = ((0.99999, 1148178), (0.99999, 2197470), (0.999999, 1321154))
FUNCTIONS = [pytest.param(elementary, id="python")]
if BUILT:
    FUNCTIONS.append(pytest.param(portable, id="compiled"))

# An independent library of decimal numbers, with more digits than decide the result.
DECIMALS = Context(prec=80, Emin=-(10**17), Emax=10**17, traps=[])


def exact_power(x: float, y: float) -> float:
    """The oracle. Python rounds fractions and decimals once."""
    if y == int(y) and abs(y) <= 64:
        exact = Fraction(x) ** int(y)
    else:
        exact = DECIMALS.power(Decimal(x), Decimal(y))
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def bits(x: float) -> bytes:
    return struct.pack("d", math.nan if x != x else x)


def check(functions, x: float, y: float, exact: float | None = None) -> None:
    exact = exact_power(x, y) if exact is None else exact
    got = functions.power(x, y)
    assert bits(got) == bits(exact), f"{x!r}**{y!r} is {exact!r}, got {got!r}"


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_a_beta_to_the_power_of_a_step(functions):
    rng = random.Random(0)
    for beta in BETAS:
        steps = [*range(1, 9), *(int(10 ** rng.uniform(1, 6)) for _ in range(40))]
        for t in steps:
            check(functions, beta, t)
    for beta, t in HARD:
        check(functions, beta, t)


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_any_power(functions):
    rng = random.Random(1)
    for _ in range(400):
        near = 1 + rng.uniform(-1, 1) * 2.0 ** -rng.randint(1, 52)
        check(functions, rng.uniform(0, 10), rng.uniform(-300, 300))
        check(functions, near, rng.uniform(-1, 1) * 2.0 ** rng.randint(0, 53))
        check(
            functions, math.ldexp(rng.random(), rng.randint(-1070, 1024)), rng.random()
        )
        check(functions, float(rng.randint(1, 10**6)), rng.choice([-0.8, 0.25, 0.75]))


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_what_lies_half_way_between_floats_goes_to_the_even_one(functions):
    rng = random.Random(2)
    middles = 0
    for _ in range(300):  # squares and cubes of 54 digits, which end in 1
        for digits, n in ((27, 2), (18, 3), (14, 4), (11, 5)):
            x = rng.randrange(2 ** (digits - 1) + 1, 2**digits, 2)
            middles += (x**n).bit_length() == 54
            scale = rng.randint(-200, 200)
            check(functions, math.ldexp(x, scale), n)
            check(functions, -math.ldexp(x, scale), n)
    assert middles > 200
    for _ in range(100):  # roots are exact, and their cubes lie half-way
        root = rng.randrange(2**17 + 1, 2**18, 2)
        check(functions, float(root * root), 1.5, float(root**3))
        check(functions, float(root * root), 0.5, float(root))


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_numbers_below_the_smallest_normal_one_are_rounded_once(functions):
    for k in range(1020, 1080):  # 2**-1075 lies half-way between 0 and the least
        check(functions, 0.5, k, math.ldexp(1.0, -k))
        check(functions, 3 * 2.0**-540, 2, float(Fraction(9, 2**1080)))
    rng = random.Random(3)
    for beta in (0.9, 0.5000001, 0.99, 0.3):
        end = 744 / -math.log(beta)
        for _ in range(60):
            check(functions, beta, int(end * rng.uniform(0.94, 1.01)))
    for _ in range(200):  # squares of 27 digits, of which the last are cut off
        x = rng.randrange(2**26 + 1, 2**27, 2)
        check(functions, math.ldexp(x, rng.randint(-565, -535)), 2)
    for _ in range(20):
        check(functions, math.ldexp(1 + rng.random(), rng.randint(-1074, -1022)), 1.01)


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_special_cases_are_those_of_ieee_754(functions):
    inf, nan, tiny = math.inf, math.nan, 5e-324
    for x in (0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 2.5, -2.5, tiny):
        check(functions, x, 0.0, 1.0)
        check(functions, x, -0.0, 1.0)
        check(functions, 1.0, x, 1.0)
        if x != 1:
            check(functions, nan, x or 1, nan)
    for y, odd in ((3.0, True), (2.0, False), (0.5, False), (2.0**53 + 2, False)):
        sign = -1.0 if odd else 1.0
        check(functions, 0.0, y, 0.0)
        check(functions, -0.0, y, sign * 0.0)
        check(functions, 0.0, -y, inf)
        check(functions, -0.0, -y, sign * inf)
        check(functions, inf, y, inf)
        check(functions, -inf, y, sign * inf)
        check(functions, -inf, -y, sign * 0.0)
        check(functions, -1.0, y, nan if y == 0.5 else sign)
    for y in (math.nextafter(1.0, 0), math.nextafter(1.0, 2)):  # almost odd
        check(functions, -0.0, -y, inf)
        check(functions, -inf, -y, 0.0)
    for x, up, down in (
        (0.5, 0.0, inf),
        (2.0, inf, 0.0),
        (-0.5, 0.0, inf),
        (-1.0, 1, 1),
    ):
        check(functions, x, inf, float(up))
        check(functions, x, -inf, float(down))
    check(functions, -2.0, 0.5, nan)
    check(functions, -2.0, 2.0**53 - 1, -inf)
    check(functions, -0.5, 2.0**52 + 1, -0.0)
    check(functions, 2.0, 1023, 2.0**1023)
    check(functions, 2.0, 1024, inf)
    check(
        functions,
        math.nextafter(2.0, 0),
        1024,
        exact_power(math.nextafter(2.0, 0), 1024),
    )
    for y in (1e300, -1e300, tiny, -tiny, 2.0**62, -(2.0**62)):
        check(functions, 1.0, y, 1.0)
        for x in (math.nextafter(1.0, 0), math.nextafter(1.0, 2)):
            check(functions, x, y, 1.0 if abs(y) < 1 else None if abs(y) < 1e300 else
                  (math.inf if (x > 1) == (y > 0) else 0.0))  # fmt: skip


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_logarithms(functions):
    rng = random.Random(4)
    for _ in range(600):
        near = 1 + rng.uniform(-1, 1) * 2.0 ** -rng.randint(1, 52)
        far = math.ldexp(1 + rng.random(), rng.randint(-1074, 1023))
        for x in (near, far, rng.uniform(0, 10)):
            exact = float(DECIMALS.ln(Decimal(x)))
            assert bits(functions.log(x)) == bits(exact), x
    nan, inf = math.nan, math.inf
    specials = (0.0, -inf), (-0.0, -inf), (1.0, 0.0), (inf, inf), (-1.0, nan)
    for x, result in (*specials, (-inf, nan), (nan, nan)):
        assert bits(functions.log(x)) == bits(result), x


PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781641"
)


def exact_cospi(x: float) -> Decimal:
    """The oracle: the series of the cosine of the distance to an even number."""
    distance = abs(Fraction(x) - 2 * round(Fraction(x) / 2))
    if distance.denominator == 2:
        return Decimal(0)
    angle = PI * distance.numerator / distance.denominator
    term = total = Decimal(1)
    for k in range(1, 80, 2):
        term = DECIMALS.multiply(-term, angle * angle / (k * (k + 1)))
        total = DECIMALS.add(total, term)
    return total


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_cosines(functions):
    rng = random.Random(7)
    with localcontext(DECIMALS):
        for _ in range(150):
            near = 0.5 + rng.uniform(-1, 1) * 2.0 ** -rng.randint(2, 53)
            parts = rng.randint(1, 1000) / 1001
            small = rng.random() * 2.0 ** -rng.randint(1, 60)
            wide = rng.uniform(0.24, 0.26)  # where the series need the most terms
            for x in (near, parts, small, wide, wide, wide, rng.uniform(-9, 9)):
                got, exact = functions.cospi(x), float(exact_cospi(x))
                assert bits(got) == bits(exact), f"{x!r}: {exact!r}, got {got!r}"
    for whole in (0.0, -0.0, 4.0, 2.0**53, 1e300, 5e-324):
        assert functions.cospi(whole) == 1 == -functions.cospi(2.0**52 + 1)
        assert bits(functions.cospi(-3.5)) == bits(0.0)
    for x in (math.inf, -math.inf, math.nan):
        assert math.isnan(functions.cospi(x))


@pytest.mark.skipif(not BUILT, reason="fastopt was built without a C compiler")
def test_python_and_c_agree():
    rng = random.Random(5)
    for k in range(6000):
        x, y = struct.unpack("2d", rng.randbytes(16))
        if k % 3:
            x, y = abs(x) % 4, rng.choice([y % 60, rng.randint(1, 10**5)])
        for a, b in ((x, y), (abs(x), y)):
            assert bits(power(a, b)) == bits(elementary.power(a, b)), (a, b)
        assert bits(log(x)) == bits(elementary.log(x)), x
        assert bits(cospi(x)) == bits(elementary.cospi(x)), x


@pytest.mark.skipif(not BUILT, reason="fastopt was built without a C compiler")
def test_scalars_have_the_same_bits_in_python_and_c():
    rng, rules_with_powers = random.Random(6), 0
    for rule in {rule for public in cython_cpu.PUBLIC for rule in public.all}:
        compute = portable.portable(rule.scalars)
        rules_with_powers += compute is not rule.scalars
        for t in (1, 2, 3, 10, 999, 10**5, *(rng.randint(4, 5000) for _ in range(20))):
            values = {
                name: rng.uniform(0.9, 1) * default
                if type(default) is float
                else default
                for name, default in rule.hyperparameters.items()
            }
            values |= {name: 50.0 for name in values if name.endswith("warmup")}
            numbers = t, *rule.first_carry(values), *values.values()
            results = list(map(bits, compute(*numbers)))
            assert results == list(map(bits, cython_cpu.scalars(rule)(*numbers))), rule
    assert rules_with_powers >= 25


# The functions of a user ------------------------------------------------------------


def scalars(t, lr=0.1, beta=0.9):
    return lr * (1 + lr * (t - 1)) ** 0.75, 0.96 ** (t * lr), 1 - beta**t, 2**t


def statements(t, lr=0.1, beta=0.9):
    x = 1 + lr * (t - 1)
    x **= 0.75
    return lr * x, (lambda y: 0.96**y)(t * lr), 1 - beta**t, 2**t


def helper(x, y):
    return x**y


class Static:
    @staticmethod
    def helper(x, y):
        return x**y


def with_helper(t, lr=0.1, beta=0.9):
    x = helper(1 + lr * (t - 1), 0.75)
    return lr * x, helper(0.96, t * lr), 1 - helper(beta, t), helper(2, t)


def with_pow(t, lr=0.1, beta=0.9):
    x = pow(1 + lr * (t - 1), 0.75)
    return lr * x, pow(0.96, t * lr), 1 - pow(beta, t), pow(2, t)


def closure():
    power_of = helper

    def inner(t, lr=0.1, beta=0.9):
        x = power_of(1 + lr * (t - 1), 0.75)
        return lr * x, power_of(0.96, t * lr), 1 - power_of(beta, t), power_of(2, t)

    return inner


def with_a_method(t, lr=0.1, beta=0.9):
    x = Static.helper(1 + lr * (t - 1), 0.75)
    power_of = helper
    return lr * x, power_of(0.96, t * lr), 1 - usual(beta) ** t, helper(2, t)


def usual(beta):
    if beta > 2:
        raise ValueError("want beta**t")
    return beta


def without_source():
    names = {}
    text = "\n".join(Path(__file__).read_text(encoding="utf-8").splitlines())
    (tree,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "scalars"
    )
    exec(compile(ast.Module([tree], []), "<no file>", "exec"), names)
    return names["scalars"]


# fmt: off
several = [lambda t: (t,), lambda t, lr=0.1, beta=0.9: (lr * (1 + lr * (t - 1)) ** 0.75, 0.96 ** (t * lr), 1 - beta**t, 2**t), lambda t: (t**0.5,)]  # noqa: E501
# fmt: on

USERS = {
    "function": scalars,
    "statements": statements,
    "lambda": several[1],
    "helper function": with_helper,
    "pow": with_pow,
    "closure": closure(),
    "static method": with_a_method,
}


@pytest.mark.parametrize("name", USERS)
def test_the_powers_of_a_users_function_are_ours(name, record):
    compute = portable.portable(USERS[name])
    lr, beta, t = 0.3, 0.95, 77
    results = compute(t, lr, beta)
    x, y = 1 + lr * (t - 1), t * lr
    wanted = lr * power(x, 0.75), power(0.96, y), 1 - power(beta, t), 2**t
    assert results == wanted
    assert [type(result) for result in results] == [float, float, float, int]
    assert {(x, 0.75), (0.96, y), (beta, 77.0), (2.0, 77.0)} == set(record)


def test_without_its_source_a_function_warns():
    function = without_source()
    with pytest.warns(RuntimeWarning, match="the source of scalars is not at hand"):
        assert portable.portable(function) is function
    assert portable.portable(function) is function  # without a second warning


@pytest.mark.parametrize(
    "text",
    [
        "def scalars(t, beta=0.9):\n    return (2 - beta**t,)\n",
        "\ndef scalars(t, beta=0.9):\n    return (1 - beta**t,)\n",
        "def scalars(t, beta=0.9):\n    return (1 - beta**t,\n",  # half saved
        'def scalars(t, beta=0.9):\n    return """\n',
        "",
    ],
)
def test_a_function_whose_file_has_changed_is_not_taken_from_it(tmp_path, text):
    file = tmp_path / "changed.py"
    file.write_text("def scalars(t, beta=0.9):\n    return (1 - beta**t,)\n")
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match="not at hand or has changed"):
        assert portable.portable(names["scalars"]) is names["scalars"]


def test_a_function_of_a_notebook(record, tmp_path):
    """Its cell is compiled with what other cells have imported from __future__."""
    file = tmp_path / "cell.py"
    file.write_text("def scalars(t, beta=0.9):\n    return (1 - beta**t,)\n")
    names, flags = {}, __future__.annotations.compiler_flag
    exec(compile(file.read_text(), str(file), "exec", flags), names)
    assert portable.portable(names["scalars"])(3, 0.5) == (0.875,)
    assert record == [(0.5, 3.0)]


# fmt: off
alike = [lambda t, b: (b**t if (t > 1 and b > 2) or t < 5 else 0.0,), lambda t, b: (b**t if t > 1 and (b > 2 or t < 5) else 0.0,)]  # noqa: E501
nested = [lambda b, t: b**2 * max(t, min(3.0, b, t)), lambda b, t: b**2 * max(t, min(3.0, b), t)]  # noqa: E501
# fmt: on


@pytest.mark.parametrize("function", [*alike, *nested])
def test_functions_on_one_line_are_not_confused(function, record):
    for numbers in ((1, 0.5), (0.5, 1.5), (3, 2.5), (7, 3.0)):
        assert portable.portable(function)(*numbers) == function(*numbers)
    assert record


def words(t, lr=0.1):
    if lr > 5:
        raise ValueError(f"want lr < beta**t, got {lr}")
    x = [lr]
    x[0] **= t
    return (x[0],)


def test_powers_in_words_and_in_places():
    w = np.ones(3)
    Rule(descend, words, name="words")(w, lr=0.5, backend="numpy").step(np.ones(3))
    assert w.tolist() == [0.5] * 3
    with pytest.raises(ValueError, match=r"want lr < beta\*\*t, got 6"):
        portable.portable(words)(1, 6)


def test_what_a_function_reaches_may_change(record):
    later, base = None, 2.0

    def compute(t):
        return (later or helper)(base, t), later(base, t) if later else base**t

    assert portable.portable(compute)(3.0) == (8.0, 8.0)

    def twice(x, y):
        return 2 * x**y

    later, base = twice, 3.0
    assert portable.portable(compute)(3.0) == (54.0, 54.0)
    assert record == [(2.0, 3.0)] * 2 + [(3.0, 3.0)] * 2
    copy = portable.portable(helper)
    assert copy is portable.portable(helper) and copy is not helper


def test_a_function_gets_other_code(record):
    def compute(t):
        return t**2.0

    def another(t):
        return t**3.0

    assert portable.portable(compute)(2.0) == 4.0
    compute.__code__ = another.__code__
    assert portable.portable(compute)(2.0) == 8.0
    assert record == [(2.0, 2.0), (2.0, 3.0)]


def test_functions_are_forgotten():
    def one(x):
        return lambda t: (x + t) ** 0.5

    functions = [one(x) for x in range(10)]
    copies = [portable.portable(function) for function in functions]
    assert [copy(1) for copy in copies] == [function(1) for function in functions]
    held = [weakref.ref(function) for function in functions]
    del functions, copies
    gc.collect()
    assert not any(ref() for ref in held)


def test_other_numbers_keep_their_powers():
    def compute(x, y):
        return x**y

    copy = portable.portable(compute)
    assert copy is not compute
    with np.errstate(divide="ignore"):
        assert copy(np.float64(0.0), -1.0) == np.inf
    assert type(copy(2, np.float64(2))) is np.float64
    assert copy(np.arange(3.0), 2).tolist() == [0.0, 1.0, 4.0]
    assert copy(True, 3) == 1 and copy(2.0, True) == 2.0


def test_functions_without_powers_are_called_as_they_are():
    for rule in (rules.sgd, rules.lion, rules.rmsprop):
        assert portable.portable(rule.scalars) is rule.scalars


def test_errors_are_those_of_python():
    how = portable.portable

    def tried(t, x=1.0, y=1.0):
        return (x**y,)

    for x, y, error in (
        (0.0, -1.0, ZeroDivisionError),
        (1e300, 2.0, OverflowError),
        (10.0, 400, OverflowError),
    ):
        with pytest.raises(error) as ours:
            how(tried)(1, x, y)
        with pytest.raises(error) as pythons:
            tried(1, x, y)
        assert str(ours.value) == str(pythons.value)
    assert how(tried)(1, -8.0, 1 / 3) == tried(1, -8.0, 1 / 3)  # a complex number
    assert how(tried)(1, math.inf, 2.0) == (math.inf,)
    assert how(tried)(1, 2, 3) == (8,)
    assert how(tried)(1, 2, -3) == (0.125,)


def scale(t, lr=0.1, beta=0.9):
    return (lr * (1 - beta**t),)


def descend(p, g, lr):
    return (p - lr * g,)


def squares(p, g):
    return (wide(g) * wide(g),)


def normalized(t, n, total, lr):
    return (lr * total**-0.5,)


def mean(p, lr):
    return lr * p


def one_step(rule):
    """The parameters after a step from 1, and those for evaluation."""
    w = np.ones(4)
    opt = rule(w, backend="numpy")
    opt.step(np.ones(4))
    return w[0], opt.eval_params()[0] if rule.evaluate else None


def test_the_steps_of_a_users_rule_take_our_powers(monkeypatch):
    """With a wrong power the step is wrong, so no other power was taken."""
    plain = Rule(descend, scale, evaluate=mean, name="plain")
    norms = Rule(descend, lambda t, lr=0.1: (lr,), measure=squares, settle=normalized)
    size = 0.1 * (1 - 0.9)
    assert one_step(plain) == (1 - size, size * (1 - size))
    assert one_step(norms) == (1 - 0.1 * 0.5, None)
    our_powers.forget()
    monkeypatch.setattr(portable, "raised", lambda x, y: 7.0)
    try:
        size = 0.1 * (1 - 7)
        assert one_step(plain) == (1 - size, size * (1 - size))
        assert one_step(norms) == (1 - 0.1 * 7, None)
    finally:
        our_powers.forget()


# The compiled modules ---------------------------------------------------------------

# The functions of C's mathematics library but for those whose results are exact or
# correctly rounded everywhere: sqrt, fabs, fmod, floor, ceil, trunc, rint, ldexp.
INEXACT = """
acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf erfc exp exp10 exp2 expm1 hypot
j0 j1 lgamma log log10 log1p log2 pow sin sincos sinh tan tanh tgamma y0 y1
""".split()


def test_compiled_modules_import_nothing_that_is_rounded_in_several_ways():
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    modules = sorted((ROOT / "fastopt").glob("_*.so")) or sorted(
        Path(fastopt.__file__).parent.glob("_*.so")
    )
    if not modules:
        pytest.skip("fastopt was built without a C compiler")
    for module in modules:
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", module],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = {line.split()[-1].partition("@")[0] for line in symbols.splitlines()}
        assert "PyModuleDef_Init" in names, module  # so these are the names
        for kind in ("", "f", "l"):
            found = names & {f"{name}{kind}" for name in INEXACT}
            assert not found, f"{module.name} imports {found}"
