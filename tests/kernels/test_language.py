"""Words, by which rules see the bits of numbers: they are the same on every backend,
and what they are not for is refused. CUDA kernels are compared in test_cuda.py."""

import importlib.util
import math
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import hashed as module
import numpy as np
import pytest
from cases import DTYPES, same_bits, special_values
from hashed import hashed
from installed import NUMBA

from fastopt.backends import cython_cpu
from fastopt.rule import Rule, bits, cbrt, real, where, word

ROOT = Path(__file__).resolve().parents[2]


def inputs(dtype):
    """Parameters and gradients: special values, then numbers of every exponent."""
    p, g = special_values(dtype)
    whole = np.uint32 if dtype == np.float32 else np.uint64
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, np.iinfo(whole).max, (2, 1003), whole, True).view(dtype)
    return np.concatenate([p, drawn[0]]), np.concatenate([g, drawn[1]])


def steps(dtype, backend, rule=hashed):
    p, g = inputs(dtype)
    opt = rule(p, backend=backend, lr=0.03)
    for _ in range(3):
        opt.step(g)
        g = g[::-1].copy()
    return p, opt.state["m"][0]


def alike(ours, theirs):
    return all(map(same_bits, ours, theirs))


def by_integers(dtype):
    """The same steps, where hashes are Python's integers."""
    p, g = inputs(dtype)
    kind, k = dtype, int(dtype == np.float64)
    whole, width = (np.uint32, np.uint64)[k], 32 << k
    names = ("FIRST", "SECOND", "MIDDLE", "MANTISSA", "EXPONENT")
    constants = [getattr(module, name) for name in names]
    first, second, middle, mantissa, exponent = (
        (c.float32, c.float64)[k] for c in constants
    )

    def mixed(h):
        h = (h ^ h >> 16) * first % 2**width
        h = (h ^ h >> middle) * second + 1
        return h * (1 - 8) % 2**width

    def uniform(h):
        return whole(h & mantissa | exponent).view(kind)

    m, lr = np.zeros_like(p), kind(0.03)
    for _ in range(3):
        for i in range(p.size):
            finite = [a[i] if a[i] == a[i] else lr for a in (p, g, m)]
            of_p, of_g, of_m = (int(a.view(whole)) for a in finite)
            h = mixed((mixed(of_g) + of_p) % 2**width)
            other = (1 - h) % 2**width
            high, low = other >> 16, other & 0xFFFF
            if high > low or (h <= second and low != 1):
                p[i] = p[i] - lr * uniform(h)
            if not (low < first and h >= first) and low != of_m:
                p[i] = p[i] + (lr if k else uniform(h))
            m[i] = uniform(mixed(h))
        g = g[::-1].copy()
    return p, m


@pytest.mark.parametrize("dtype", DTYPES)
def test_hashes_are_those_of_integers(dtype):
    with np.errstate(all="ignore"):
        expected = by_integers(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's of words that wrap around
        assert alike(expected, steps(dtype, "numpy"))
    if NUMBA:
        assert alike(expected, steps(dtype, "numba"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hashes_of_one_number_do_not_warn(dtype):
    """NumPy warns where a scalar wraps around, unless its functions are called."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = module.mixed(bits(dtype(-1.5)))
        assert not isinstance(one.array, np.ndarray) or one.array.shape == ()
        many = module.mixed(bits(np.full(3, -1.5, dtype)))
    assert np.all(many == one)


@pytest.fixture(scope="module")
def render():
    """csrc/render.py."""
    pytest.importorskip("Cython", reason="Cython is needed to build")
    sys.path.insert(0, str(ROOT / "csrc"))  # of the modules that it imports
    spec = importlib.util.spec_from_file_location("render", ROOT / "csrc" / "render.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def in_c(render, tmp_path_factory):
    """The kernels of the hash and of nothing else, compiled as setup.py does."""
    if cython_cpu.missing() or shutil.which("cc") is None:
        pytest.skip("there is no C compiler, or no compiled driver")
    patch = pytest.MonkeyPatch()
    rules = tmp_path_factory.mktemp("rules")
    patch.setattr(render, "RULES", rules)
    for name in ("floor", "passes"):
        shutil.copy(ROOT / "fastopt" / "rules" / f"{name}.py", rules)
    shutil.copy(module.__file__, rules)
    (rules / "__init__.py").write_text("from fastopt.rules.hashed import hashed\n")
    built = tmp_path_factory.mktemp("built")
    rendered = render.renderer()
    patch.undo()
    for name in ("table.pxi", "formats.pxi", "fused.pxi"):
        (built / name).write_text(rendered(f"{name}.in"))
    (built / "words.pyx").write_text(rendered("kernels.pyx.in", isa="words"))
    commands = (
        [sys.executable, "-m", "cython", "-3", "-I", built, "words.pyx"],
        [
            *("cc", "-shared", "-fPIC", "-O1", "-ffp-contract=off", "words.c"),
            *("-Wall", "-Werror=overflow", "-Wno-unused-function"),
            *("-I", ROOT / "csrc", "-I", sysconfig.get_path("include")),
            *("-o", "words.so"),
        ],
    )
    for command in commands:
        done = subprocess.run(command, cwd=built, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("words", built / "words.so")
    words = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(words)
    return cython_cpu.driver().Kernels(words.TABLE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hashes_in_c(in_c, monkeypatch, dtype):
    monkeypatch.setattr(cython_cpu, "kernels", lambda: in_c)
    monkeypatch.setitem(cython_cpu.KERNELS, hashed.update, "hashed_update")
    assert alike(steps(dtype, "numpy"), steps(dtype, "cython"))


def test_one_name_for_a_number_and_a_word_is_refused_in_c(render, tmp_path):
    """C would convert the one to the other."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from fastopt.rule import bits, real\n"
        "def update(p, g, lr):\n    g = bits(g)\n    return (real(g),)\n"
    )
    update = render.defined(path, "update")
    with pytest.raises(ValueError, match="g in mine_update stands for a number here"):
        update.declared(update.arguments, "f32")


# The cube root, which is written with words


def by_signed_integers(x):
    """Its definition, by NumPy's signed integers."""
    magic, rounds = (0x54A21D2A, 3) if x.dtype == "f4" else (0x553EF0FF289DD796, 4)
    third, four_thirds = x.dtype.type(1 / 3), x.dtype.type(4 / 3)
    whole = x.view(x.dtype.str.replace("f", "i"))
    whole = (whole >> 2) + (whole >> 4)
    for k in (4, 8, 16):
        whole = whole + (whole >> k)
    y = (whole.dtype.type(magic) - whole).view(x.dtype)
    for _ in range(rounds):
        y = y * (four_thirds - third * (x * y * y * y))
    return x * y * y


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_cube_root(dtype):
    whole = np.uint32 if dtype == np.float32 else np.uint64
    rng = np.random.default_rng(0)
    x = rng.integers(0, np.iinfo(whole).max // 2, 1_000_000, whole).view(dtype)
    x[:6] = [0, np.inf, np.nan, 1, np.finfo(dtype).tiny, np.finfo(dtype).max]
    with np.errstate(all="ignore"):
        assert same_bits(cbrt(x), by_signed_integers(x))
        assert same_bits(cbrt(-x), -cbrt(x))
    assert np.signbit(cbrt(dtype(-0.0)))
    x = x[(x > np.finfo(dtype).tiny) & (x < np.inf)]
    np.testing.assert_allclose(cbrt(x), np.cbrt(x), rtol=4.1 * np.finfo(dtype).eps)


def test_the_cube_root_of_one_number():
    assert type(cbrt(8.0)) is np.float64 and cbrt(8.0) == cbrt(np.full(1, 8.0))
    assert cbrt(np.float32(-27)).dtype == np.float32


# What words are not for

NUMBER, WORD, FAR = 3, word(3), word(32)

REFUSED = {
    "a word meets array": lambda p, g, lr: (p + bits(g),),
    "a word meets np.float32": lambda p, g, lr: (real(NUMBER * bits(g)),),
    "which is not a word of its width": lambda p, g, lr: (real(bits(g) & lr),),
    "a word is not a number: real": lambda p, g, lr: (where(g > p, bits(g), p),),
    "neither true nor false": lambda p, g, lr: (p if bits(g) else g,),
    "a word of 32 bits cannot be shifted by 32": lambda p, g, lr: (
        real(bits(g) >> 32),
    ),
    "cannot be shifted by 32": lambda p, g, lr: (real(bits(g) << FAR),),
    "or by a constant NAME = word": lambda p, g, lr: (real(bits(g) >> bits(p)),),
    "that is written there": lambda p, g, lr: (real(bits(g) >> NUMBER),),
    "unsupported operand .* 'Word'": lambda p, g, lr: (real(bits(g) / bits(p)),),
    "bad operand type for abs": lambda p, g, lr: (real(abs(bits(g))),),
    "real takes a word .* got array": lambda p, g, lr: (real(p),),
    "real takes a word that was computed": lambda p, g, lr: (real(WORD),),
    "bits takes numbers of float32 or float64": lambda p, g, lr: (bits(p > g),),
    "must return numbers of the parameters' dtype": lambda p, g, lr: (bits(p),),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_what_words_are_not_for(message, backend):
    rule = Rule(REFUSED[message], lambda t, lr=0.1: (lr,), name="mine")
    p = np.ones(3)
    with pytest.raises(TypeError, match=message):
        rule(p, backend=backend)


FAR_IN_FLOAT64, NARROW = word(3, 70), np.uint32(5)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(
    "update, message",
    [
        (lambda p, g, lr: (real(bits(p) >> FAR_IN_FLOAT64),), "64 bits .* by 70"),
        (lambda p, g, lr: (real(bits(p) + NARROW),), "not a word of its width"),
    ],
)
def test_words_are_tried_at_the_width_of_the_parameters(update, message, backend):
    """LLVM may return anything for a shift that is too far."""
    rule = Rule(update, lambda t, lr=0.1: (lr,), name="mine")
    p = np.linspace(1, 2, 5)
    with pytest.raises(TypeError, match=message):
        rule(p, backend=backend)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(
    "functions, message",
    [
        ({"evaluate": lambda p, lr: bits(p)}, "evaluate .* must return numbers"),
        ({"evaluate": lambda p, lr: real(p)}, "real takes a word"),
        ({"measure": lambda p, g: (bits(p),)}, "measure .* must return a tuple of"),
        ({"measure": lambda p, g: (bits(p) > bits(g),)}, "must return a tuple of"),
    ],
)
def test_words_are_no_results(functions, message, backend):
    if "measure" in functions:
        functions = {**functions, "settle": lambda t, n, total, lr: (lr,)}
    scalars, update = lambda t, lr=0.1: (lr,), lambda p, g, lr: (p - lr * g,)
    with pytest.raises(TypeError, match=message):
        Rule(update, scalars, name="mine", **functions)(np.ones(3), backend=backend)


TENTHS = 0.1, (0.1, 0.1)


def by_default(x, limit=0.1, pair=(0.1, 0.1)):
    low, high = pair
    return where((x > limit) | (x > low) | (x > high), x, -x)


def by_tuple(x):
    tenth, (other, _) = TENTHS
    return where((x > tenth) | (x > other), x, -x)


@pytest.mark.parametrize("helper", [by_default, by_tuple])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_numbers_that_a_helper_reaches_take_the_dtype(helper, backend):
    """float32(0.1) is larger than 0.1, so a wider number shows in a comparison."""
    rule = Rule(lambda p, g, lr: (p - lr * helper(g),), lambda t, lr=1.0: (lr,))
    p = np.zeros(3, np.float32)
    rule(p, backend=backend).step(np.full(3, 0.1, np.float32))
    assert (p == np.float32(0.1)).all()


def test_numbers_that_are_attributes_are_refused():
    for update in (
        lambda p, g, lr: (p - g * math.pi,),
        lambda p, g, lr: (p - g * np.ma.core.np.e,),
    ):
        with pytest.raises(ValueError, match="contains the number [23]"):
            Rule(update, lambda t, lr=1.0: (lr,))


def test_numbers_say_how_far_to_shift_and_nothing_else():
    def scalars(t, lr=0.1):
        return (lr,)

    def both(p, g, lr):
        return (real((bits(p) >> 3) + 3),)

    Rule(lambda p, g, lr: (real(bits(p) << 3 >> 3),), scalars)
    message = r"contains the number 3, .*, or name it outside: NAME = word\(3\)"
    for update in (both, lambda p, g, lr: (real(bits(p) & 3),)):
        with pytest.raises(ValueError, match=message):
            Rule(update, scalars)
    for number in (3 << 1, 2.5):
        with pytest.raises(ValueError, match="contains the number"):
            update = eval(f"lambda p, g, lr: (p * {number},)")
            Rule(update, scalars)


@pytest.mark.parametrize("values", [(-1,), (2**32,), (1.5,), (True,), (1, 2**64)])
def test_constants_fit_words(values):
    with pytest.raises(ValueError, match="must be an integer from 0 to 2"):
        word(*values)
