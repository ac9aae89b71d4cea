"""Powers and a rule's scalars in CUDA kernels have the host's bits: as Numba compiles
them for this machine's processor, and in PTX, which runs here by way of C."""

from __future__ import annotations

import math
import random
import re
import shutil
import struct
from ctypes import c_void_p

import installed_numba  # noqa: F401
import numpy as np
import pytest
from cuda_machine_code import EVERYTHING, assembled, needs_compiler
from ptx_in_c import loaded
from test_cuda import report
from test_powers import BETAS, HARD, USERS, without_source

from fastopt import elementary, portable
from fastopt.backends import (
    cuda_accesses,
    cuda_driver,
    cuda_powers,
    cuda_scalars,
    integer_powers,
)
from fastopt.rule import cbrt, copysign, log, maximum, power, sign, sqrt

numba = pytest.importorskip("numba")


def compiled(function, signature, apart):
    """Compile a function for this machine's processor, of exactly this type."""
    word, number, flag = numba.uint64, numba.int64, numba.boolean
    kinds = {"word": word, "number": number, "flag": flag, "void": numba.void}
    kinds |= {"space": word[::1], "real": numba.float64}
    kinds |= {"pair": numba.types.UniTuple(word, 2)}
    kinds |= {"parts": numba.types.Tuple([word, number])}
    kinds |= {"decided": numba.types.Tuple([flag, word])}
    kinds |= {"logarithm": numba.types.Tuple([flag, number, word, word])}
    return numba.njit(eval(signature, kinds))(function)


@pytest.fixture(scope="module")
def functions():
    own = ("bits", "real", "high", "entry", "workspace")
    return integer_powers.build(
        compiled, {name: numba.njit(getattr(integer_powers, name)) for name in own}
    )


def word_of(x: float) -> int:
    (word,) = struct.unpack("Q", struct.pack("d", math.nan if x != x else x))
    return word


def check(compute, exact, *numbers):
    got, wanted = compute(*numbers), exact(*numbers)
    assert word_of(got) == word_of(wanted), f"{numbers}: {wanted!r}, got {got!r}"


@pytest.fixture
def power_of(functions):
    compute = functions["power"]

    def check_power(x, y):
        check(compute, elementary.power, float(x), float(y))

    return check_power


# As in test_powers.py, but for more points: the functions of elementary.py are the
# oracle here, and they are tested there.


def test_betas_to_the_power_of_steps(power_of):
    rng = random.Random(0)
    for beta in BETAS:
        for t in (*range(1, 50), *(int(10 ** rng.uniform(0, 6)) for _ in range(600))):
            power_of(beta, t)
    for beta, t in HARD:
        power_of(beta, t)


def test_any_power(power_of):
    rng = random.Random(1)
    for _ in range(2000):
        x, y = struct.unpack("2d", rng.randbytes(16))
        power_of(x, y)
        power_of(abs(x), y)
        power_of(abs(x) % 4, y % 60)
        power_of(rng.uniform(0, 10), rng.uniform(-300, 300))
        near = 1 + rng.uniform(-1, 1) * 2.0 ** -rng.randint(1, 52)
        power_of(near, rng.uniform(-1, 1) * 2.0 ** rng.randint(0, 53))
        power_of(math.ldexp(rng.random(), rng.randint(-1070, 1024)), rng.random())
        power_of(rng.randint(1, 10**6), rng.choice([-0.8, 0.25, 0.75]))


def test_results_half_way_between_floats_and_below_the_smallest_normal_one(power_of):
    rng = random.Random(2)
    for _ in range(200):
        for digits, n in ((27, 2), (18, 3), (14, 4), (11, 5)):
            x = rng.randrange(2 ** (digits - 1) + 1, 2**digits, 2)
            scaled = math.ldexp(x, rng.randint(-200, 200))
            power_of(scaled, n)
            power_of(-scaled, n)
        x = rng.randrange(2**26 + 1, 2**27, 2)
        power_of(math.ldexp(x, rng.randint(-565, -535)), 2)
        power_of(math.ldexp(1 + rng.random(), rng.randint(-1074, -1022)), 1.01)
        root = rng.randrange(2**17 + 1, 2**18, 2)
        power_of(root * root, 1.5)
    for k in range(1020, 1080):
        power_of(0.5, k)
    for beta in (0.9, 0.5000001, 0.99, 0.3):
        for _ in range(60):
            power_of(beta, int(744 / -math.log(beta) * rng.uniform(0.94, 1.01)))


SPECIALS = (
    *(0.0, 1.0, 2.5, 3.0, 2.0, 0.5, 5e-324, 1e-310, 1e300, math.inf, math.nan),
    *(2.0**53 + 2, 2.0**52 + 1, 2.0**53 - 1, 2.0**62, 1023.0, 1024.0, 1074.0, 1075.0),
    *(math.nextafter(1, 0), math.nextafter(1, 2), math.nextafter(2, 0)),
)


def test_special_cases(power_of, functions):
    for x in SPECIALS:
        for y in SPECIALS:
            for numbers in ((x, y), (-x, y), (x, -y), (-x, -y)):
                power_of(*numbers)
        check(functions["log"], elementary.log, x)
        check(functions["log"], elementary.log, -x)


def test_the_slow_way_alone(functions):
    slow, slow_log = functions["slow_power"], functions["slow_log"]

    def slow_power(x, y):
        word = slow(np.uint64(word_of(x)), np.uint64(word_of(y)))
        return struct.unpack("d", struct.pack("Q", int(word)))[0]

    def slow_logarithm(x):
        return struct.unpack("d", struct.pack("Q", int(slow_log(word_of(x)))))[0]

    rng = random.Random(3)
    for _ in range(1000):
        check(slow_power, elementary.power, rng.uniform(0, 9), rng.uniform(-400, 400))
        near = 1 + rng.uniform(-1, 1) * 2.0 ** -rng.randint(1, 52)
        check(slow_power, elementary.power, near, 2.0 ** rng.uniform(-60, 62))
        check(slow_logarithm, elementary.log, near)
        far = math.ldexp(1 + rng.random(), rng.randint(-1074, 1023))
        check(slow_logarithm, elementary.log, far)
        check(slow_power, elementary.power, far, rng.uniform(-1.1, 1.1))


def test_logarithms(functions):
    rng = random.Random(4)
    for _ in range(2000):
        near = 1 + rng.uniform(-1, 1) * 2.0 ** -rng.randint(1, 52)
        far = math.ldexp(1 + rng.random(), rng.randint(-1074, 1023))
        for x in (near, far, rng.uniform(0, 10)):
            check(functions["log"], elementary.log, x)


def test_the_slow_way_is_taken_where_it_is_needed(functions):
    """Else nothing above would say that the fast way knows what it cannot decide."""
    fast, undecided = functions["fast_power"], 0
    for x in range(2**27 - 401, 2**27, 2):  # their squares lie half-way
        decided, _ = fast(np.uint64(word_of(float(x))), np.uint64(word_of(2.0)))
        undecided += not decided
    assert undecided > 100


# The functions of rules

OF_RULES = [
    pytest.param(rule, of, id=f"{rule.name}-{of.__name__}")
    for rule, of in {
        of: (rule, of) for rule in EVERYTHING for of in (rule.scalars, rule.settle)
    }.values()
    if of is not None
]


def hyperparameters(rule, rng):
    """Return values off their defaults."""
    values = {
        name: rng.uniform(0.9, 1) * default if type(default) is float else default
        for name, default in rule.hyperparameters.items()
    }
    values |= {name: 50.0 for name in values if name.endswith("warmup")}
    values |= {name: rng.random() < 0.5 for name in values if values[name] is False}
    if "nesterov" in values:
        values |= {"momentum": 0.8, "dampening": 0.0}
    return values


@pytest.fixture
def on_this_machine(monkeypatch, functions):
    """Compile copies of rules' functions for this machine's processor."""
    if cuda_accesses.not_installed:
        pytest.skip("numba-cuda is not installed")

    def jitted(function):
        return numba.njit(error_model="numpy", inline="always")(function)

    of_kernels = cuda_scalars.functions.__wrapped__
    monkeypatch.setattr(cuda_scalars, "elementary_functions", lambda: functions)
    monkeypatch.setattr(cuda_scalars, "inlined", jitted)
    monkeypatch.setattr(cuda_scalars, "SIMULATED", False)
    table = of_kernels()
    monkeypatch.setattr(cuda_scalars, "functions", lambda: table)
    monkeypatch.setattr(cuda_scalars, "reals", lambda: jitted(lambda numbers: numbers))
    return lambda function: cuda_scalars.device_scalars(function)


@pytest.mark.parametrize("rule", EVERYTHING, ids=lambda rule: rule.name)
def test_scalars_as_numba_types_them(rule, on_this_machine):
    """The host's integers are integers of 64 bits there, and flags are booleans."""
    compute, host = on_this_machine(rule.scalars), portable.portable(rule.scalars)
    rng = random.Random(5)
    for t in (1, 2, 3, 10, 999, 10**5, *(rng.randint(4, 5000) for _ in range(20))):
        values = hyperparameters(rule, rng)
        numbers = t, *rule.first_carry(values), *values.values()
        got = [word_of(float(x)) for x in compute(*numbers)]
        assert got == [word_of(x) for x in host(*numbers)], numbers


@pytest.mark.parametrize(
    "rule", [r for r in EVERYTHING if r.settle is not None], ids=lambda rule: rule.name
)
def test_settle_as_numba_types_it(rule, on_this_machine):
    compute, host = on_this_machine(rule.settle), portable.portable(rule.settle)
    rng = random.Random(6)
    for t in range(1, 40):
        values = [rng.uniform(0, 2) * (rng.random() < 0.9) for _ in host_names(host)]
        got = [word_of(float(x)) for x in compute(t, 33.0, *values)]
        try:
            wanted = [word_of(float(x)) for x in host(t, 33.0, *values)]
        except (ZeroDivisionError, ValueError):  # of a root
            continue
        assert got == wanted, values


def host_names(settle):
    return settle.__code__.co_varnames[2 : settle.__code__.co_argcount]


def test_a_users_functions(on_this_machine):
    lr, beta, t = 0.3, 0.95, 77
    for name in ("function", "lambda", "helper function", "pow", "closure"):
        compute = on_this_machine(USERS[name])
        wanted = portable.portable(USERS[name])(t, lr, beta)
        assert [*map(float, compute(t, lr, beta))] == [*map(float, wanted)], name


several = [lambda t, b: (b**t, 0.0), lambda t, b: (b**t, max(1, t, b)), lambda t, b: (1,)]  # noqa: E501  # fmt: skip


def test_lambdas_on_one_line_are_not_confused(on_this_machine):
    for function in several:
        wanted = portable.portable(function)(7, 0.9)
        assert [*map(float, on_this_machine(function)(7, 0.9))] == [*map(float, wanted)]


def test_errors_are_not_raised(on_this_machine, tmp_path):
    file = tmp_path / "checked.py"  # pytest changes assertions in its own files
    file.write_text("""
def checked(t, lr=0.1, beta=0.9):
    assert lr < 6, "a learning rate is small"
    if lr > 5:
        raise ValueError(f"want lr < beta**t, got {lr} and {[x for x in (lr, beta)]}")
    lr = max(lr, 1e-3)
    return lr, min(lr, beta, t) + abs(-lr), sqrt(power(beta, t)) * log(1 + lr)
""")
    names = {"sqrt": sqrt, "power": power, "log": log}
    exec(compile(file.read_text(), file, "exec"), names)
    compute = on_this_machine(names["checked"])
    assert compute(3, 0.5, 0.25) == names["checked"](3, 0.5, 0.25)
    assert compute(3, 7.0, 0.25) == (7.0, 7.25, sqrt(power(0.25, 3)) * log(8.0))
    with pytest.raises(AssertionError):
        names["checked"](3, 7.0, 0.25)


def exponential(t, lr=0.1):
    return (lr * math.exp(-t),)


def endless(t, lr=0.1):
    return endless(t, lr)


def renamed(t, lr=0.1):
    root = sqrt
    return (root(lr),)


def three(t, lr=0.1):
    return (pow(t, 2, 3),)


def least(t, lr=0.1):
    return (min((t, lr)),)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (exponential, r"exponential calls math.exp\(-t\), in line \d+ of .*test_cuda"),
        (endless, "endless calls itself"),
        (renamed, r"calls root\(lr\).*may call sqrt, log and power of fastopt.rule"),
        (three, r"calls pow\(t, 2, 3\)"),
        (least, r"calls min\(\(t, lr\)\)"),
        (without_source(), "the source of scalars is not at hand"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_kernels_cannot_compute_is_refused(function, why, on_this_machine):
    with pytest.raises(TypeError, match=why):
        on_this_machine(function)


def test_a_function_that_calls_nothing_needs_no_source(on_this_machine):
    names = {}
    exec("def scalars(t, lr=0.1, beta=0.9): return lr, lr * beta / t", names)
    assert on_this_machine(names["scalars"])(2, 0.5, 0.25) == (0.5, 0.0625)


# The machine code


def kernel_of(function):
    """A kernel of one thread, and its signature."""
    types = cuda_accesses.types
    count = function.__code__.co_argcount - 1
    numbers = ", ".join(["t", *(f"numbers[{k}]" for k in range(count))])
    made = {"compute": cuda_scalars.device_scalars(function)}
    text = f"""
def kernel(steps, numbers, results):
    t = steps[0]
    computed = compute({numbers})
    for k in range(len(computed)):
        results[k] = computed[k]
"""
    exec(text, made)
    pointer = types.CPointer(types.float64)
    return made["kernel"], types.void(types.CPointer(types.int64), pointer, pointer)


def inexact(ptx: str) -> list[str]:
    """The instructions with which bits would differ. Minima and maxima with a constant
    are those of the comparisons that they replace."""
    wrong = re.findall(r"\bfma\S*|\S*approx\S*|\S*\.ftz\S*|\bmad\.\S*f\d+", ptx)
    wrong += re.findall(r"\b(?:add|sub|mul)\.f\d+", ptx)  # may be fused
    wrong += re.findall(r"\b(?:div|rcp|sqrt)\.(?!rn\.)\S*f\d+", ptx)
    return wrong + re.findall(r"\S*\.f32", ptx)


def of_primitives(t, n, x):
    return sign(-x) * maximum(x, 0.5) * n, copysign(x, -1.0), cbrt(x)


OF_RULES.append(pytest.param(None, of_primitives, id="primitives"))


def outcome(host, *numbers):
    """What the host computes, or None if Python raises an error."""
    try:
        return np.array(host(*numbers), np.float64)
    except (ZeroDivisionError, ValueError):  # of a root
        return None


@needs_compiler
@pytest.mark.parametrize(("rule", "function"), OF_RULES)
def test_what_is_compiled_for_gpus(rule, function, tmp_path):
    kernel, signature = kernel_of(function)
    ptx = cuda_accesses.cuda.compile_ptx(kernel, signature, cc=(9, 0))[0]
    assert not inexact(ptx)
    has_powers = "fastopt_powers" in ptx
    assert has_powers == called(function)
    # One table, for all calls.
    assert len(re.findall(r"^\S.*fastopt_powers\[", ptx, re.M)) == has_powers
    # Measured: from 1,900 to 3,000, or from 309,000 to 330,000 with powers, of which
    # 138,000 are the table.
    assert len(ptx) < (400_000 if has_powers else 6_000)
    if not shutil.which("gcc"):
        return
    compute, host = loaded(ptx, tmp_path), portable.portable(function)
    rng = random.Random(7)
    for t in (1, 2, 3, 10, 999, 10**5, *(rng.randint(4, 5000) for _ in range(50))):
        if function is getattr(rule, "scalars", None):
            values = hyperparameters(rule, rng)
            numbers = *rule.first_carry(values), *values.values()
        else:
            taken = range(function.__code__.co_argcount - 2)
            numbers = 33.0, *(rng.random() * (rng.random() < 0.9) for _ in taken)
        wanted = outcome(host, t, *numbers)
        if wanted is not None:
            got, given = np.full(len(wanted), np.nan), np.array(numbers, np.float64)
            steps = np.array([t])
            compute(*(c_void_p(x.ctypes.data) for x in (steps, given, got)))
            assert got.tobytes() == wanted.tobytes(), (t, numbers)


@needs_compiler
@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")
def test_what_is_compiled_for_gpus_of_powers(tmp_path):
    """Both ways, each by itself, in 12,000 points."""
    own = cuda_powers.elementary_functions()
    power_of, log_of = own["power"], own["log"]

    def kernel(numbers):
        numbers[2] = power_of(numbers[0], numbers[1])
        numbers[3] = log_of(numbers[0])

    types = cuda_accesses.types
    signature = types.void(types.CPointer(types.float64))
    ptx = cuda_accesses.cuda.compile_ptx(kernel, signature, cc=(9, 0))[0]
    compute, rng = loaded(ptx, tmp_path), random.Random(8)

    def check_both(x, y):
        numbers = np.array([x, y, 0, 0], np.float64)
        compute(c_void_p(numbers.ctypes.data))
        check(lambda *_: numbers[2], elementary.power, x, y)
        check(lambda _: numbers[3], elementary.log, x)

    for _ in range(1500):
        x, y = struct.unpack("2d", rng.randbytes(16))
        check_both(x, y)
        check_both(abs(x) % 4, y % 60)
        check_both(rng.choice(BETAS), float(int(10 ** rng.uniform(0, 6))))
        near = 1 + rng.uniform(-1, 1) * 2.0 ** -rng.randint(1, 52)
        check_both(near, rng.uniform(-1, 1) * 2.0 ** rng.randint(0, 53))
        odd = rng.randrange(2**26 + 1, 2**27, 2)
        check_both(math.ldexp(odd, rng.randint(-565, -200)), 2.0)
        check_both(math.ldexp(1 + rng.random(), rng.randint(-1074, -1022)), 1.01)
        check_both(float(rng.randrange(2**17 + 1, 2**18, 2) ** 2), 1.5)
    for x in SPECIALS:
        for y in SPECIALS:
            for numbers in ((x, y), (-x, y), (x, -y), (-x, -y)):
                check_both(*numbers)


def called(function):
    """Whether a function calls a function of elementary.py."""
    return portable.has_powers(function.__code__) or "log" in function.__code__.co_names


@needs_compiler
@pytest.mark.parametrize("cc", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("name", ["adamw", "ademamix", "sgd"])
def test_machine_code_of_scalars(name, cc):
    """Measured: up to 82 registers, and 1.5 kB of stack for limbs."""
    (rule,) = {rule for rule in EVERYTHING if rule.name == name}
    kernel, signature = kernel_of(rule.scalars)
    ptx = cuda_accesses.cuda.compile_ptx(kernel, signature, cc=cc)[0]
    assert not inexact(ptx)
    code = assembled(ptx, cc)
    stack = max(map(int, re.findall(r"STACK:(\d+)", code.usage)))
    assert code.registers <= 96 and stack <= 2048


@pytest.mark.skipif(
    bool(cuda_accesses.not_installed), reason="numba-cuda is not installed"
)
def test_scalars_in_the_simulator():
    assert not report("cuda_scalars.py", simulated=True)


@pytest.mark.skipif(bool(cuda_driver.missing()), reason=f"{cuda_driver.missing()}")
def test_scalars_on_the_gpu():
    assert not report("cuda_scalars.py", simulated=False)
