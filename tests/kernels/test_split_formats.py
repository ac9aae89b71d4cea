"""bfloat16 parameters with a remainder, or rounded stochastically: their bounds, and
what steps make of them. That the backends have the same bits is in test_formats.py."""

import numpy as np
import pytest
from cases import bfloat16, same_bits

import fastopt
from fastopt.memory import formats
from fastopt.memory.formats import FORMATS
from fastopt.rule import word

R8, R16 = FORMATS["r8"], FORMATS["r16"]
NEAREST = FORMATS["r8_nearest"]
MANTISSAS = np.arange(1 << 23, dtype=np.uint32)
# Signs and exponents: subnormal, the least, around 1, the greatest.
UPPER = [0x000, 0x001, 0x07F, 0x17E, 0x0FE, 0x1FE]


def numbers_of(upper):
    """All float32 numbers with this sign and exponent."""
    return (MANTISSAS | np.uint32(upper << 23)).view(np.float32)


def bfloat16_of(words):
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


@pytest.mark.parametrize("upper", UPPER)
def test_16_bits_of_remainder_are_exact(upper):
    numbers = numbers_of(upper)
    words, rest = R16.written(numbers)
    assert same_bits(R16.read((words, rest)), numbers)
    # The bfloat16 number alone is the nearest: within half of its last place.
    with np.errstate(over="ignore", invalid="ignore"):
        error = abs(bfloat16_of(words) - numbers.astype(np.float64))
    half = 2.0 ** (max(upper & 0xFF, 1) - 127 - 8)
    assert (error[np.isfinite(error)] <= half).all()
    assert np.isfinite(error).all() or (upper & 0xFF) == 0xFE  # rounded to infinity


@pytest.mark.parametrize("upper", UPPER)
def test_8_bits_of_remainder_are_within_the_bound(upper):
    """Half of the last of 16 places: 2**(e - 16) for numbers from 2**e on. Subnormals
    have the places of the least e."""
    numbers = numbers_of(upper)
    got = NEAREST.read(NEAREST.written(numbers))
    with np.errstate(over="ignore", invalid="ignore"):
        error = abs(got.astype(np.float64) - numbers)
    exponent = max((upper & 0xFF) - 127, -126)
    finite = np.isfinite(got)
    assert error[finite].max() <= 2.0 ** (exponent - 16)
    assert finite.all() or ((upper & 0xFF) == 0xFE and finite[:-128].all())
    again = NEAREST.read(NEAREST.written(got))
    assert same_bits(again, got)


@pytest.mark.parametrize("upper", UPPER)
def test_8_bits_of_remainder_are_rounded_to_a_neighbour(upper):
    """One of the two around a number, and itself if it is one of them."""
    numbers = numbers_of(upper)
    got = R8.read(R8.written(numbers, (3, 5, 0)))
    bits, of = got.view(np.uint32), numbers.view(np.uint32)
    lower = of & np.uint32(0xFFFFFF00)
    up = bits != lower
    assert (bits[up] == lower[up] + 0x100).all() and not up[of == lower].any()
    fraction = (of & np.uint32(0xFF)).astype(np.float64) / 256
    deviation = np.sqrt((fraction * (1 - fraction)).sum())
    assert abs(up.sum() - fraction.sum()) < 5 * deviation
    again = R8.read(R8.written(got, (3, 6, 0)))
    assert same_bits(again, got)


@pytest.mark.parametrize("format", [R8, NEAREST, R16], ids=["r8", "nearest", "r16"])
def test_infinities_and_nan(format):
    """NaN stays NaN, in bfloat16 alone, too, whatever its bits are."""
    nan = np.array(
        [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF808000, 0x7F80FFFF],
        np.uint32,
    ).view(np.float32)
    parts = format.written(nan)
    assert np.isnan(format.read(parts)).all() and np.isnan(bfloat16_of(parts[0])).all()
    infinite = np.array([np.inf, -np.inf], np.float32)
    parts = format.written(infinite)
    assert same_bits(format.read(parts), infinite)
    assert same_bits(bfloat16_of(parts[0]), infinite)


@pytest.mark.parametrize("format", [R8, R16], ids=["r8", "r16"])
def test_a_parameter_that_a_user_sets_to_zero_stays_almost_zero(format):
    """Its remainder is still there. Without care, -1 below zero would be a NaN."""
    words, rest = format.written(np.array([1 - 2**-10, 1 + 2**-10, -1 + 2**-11], "f4"))
    for zero in (0, 0x8000):
        got = format.read((np.full_like(words, zero), rest))
        assert (abs(got) < 1e-38).all()


@pytest.mark.parametrize("kind", ["bf16+r8", "bf16+r16"])
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.sgd, fastopt.lamb])
def test_steps_are_those_of_float32(rule, kind):
    """With 16 bits, parameters are exactly those of a float32 run. With 8 they are
    near, because each step rounds once more."""
    rng = np.random.default_rng(1)
    start = rng.normal(size=5003).astype(bfloat16)
    param, exact = start.copy(), start.astype(np.float32)
    opt = rule(param, lr=1e-3, formats={"param": kind})
    of_float32 = rule(exact, lr=1e-3)
    for _ in range(20):
        grad = rng.normal(size=5003).astype(np.float32)
        opt.step(grad)
        of_float32.step(grad)
    masters = opt.master_params()
    assert masters.dtype == np.float32
    if kind == "bf16+r16":
        assert same_bits(masters, exact)
        assert (param == exact.astype(bfloat16)).mean() > 0.999  # ties differ
    else:
        np.testing.assert_allclose(masters, exact, rtol=20 * 2**-15, atol=1e-6)


@pytest.mark.parametrize("kind", ["bf16+r8", "bf16+r16"])
@pytest.mark.parametrize("backend", ["numpy", "cython"])
def test_master_parameters_can_be_loaded(kind, backend):
    rng = np.random.default_rng(1)
    masters = {"w": rng.normal(size=(90, 70)), "b": rng.normal(size=3)}
    masters = {k: v.astype(np.float32) for k, v in masters.items()}
    params = {k: np.zeros(v.shape, bfloat16) for k, v in masters.items()}
    opt = fastopt.adamw(params, backend=backend, formats={"param": kind})
    opt.load_master_params(masters)
    got = opt.master_params()
    for name, array in masters.items():
        tolerance = 0 if kind == "bf16+r16" else 2**-15
        np.testing.assert_allclose(got[name], array, rtol=tolerance)
        np.testing.assert_allclose(
            params[name].astype("f4"), array, rtol=2**-8 + 2**-15
        )
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(3,\), but its ma"):
        opt.load_master_params({**masters, "b": masters["w"]})
    with pytest.raises(ValueError, match="must have the keys"):
        opt.load_master_params({"w": masters["w"]})
    assert same_bits(opt.master_params()["w"], got["w"])


def test_masters_of_a_flat_buffer_and_of_groups():
    start = {"w": np.full((90, 70), 0.3, np.float32), "b": np.full(3, 0.7, np.float32)}
    flat = fastopt.flatten({k: v.astype(bfloat16) for k, v in start.items()})
    opt = fastopt.sgd(flat, lr=1e-3, formats={"param": "bf16+r16"})
    opt.load_master_params(fastopt.flatten(start))
    masters = opt.master_params()
    assert same_bits(masters["w"], start["w"]) and same_bits(masters["b"], start["b"])
    groups = [{"params": [np.ones(5, bfloat16)]}, {"params": [np.ones(6, "f4")]}]
    opt = fastopt.sgd(groups, lr=2**-12, formats={"param": "bf16+r16"})
    opt.step([[np.ones(5, "f4")], [np.ones(6, "f4")]])
    (first,), (second,) = opt.master_params()
    assert set(first.tolist()) == set(second.tolist()) == {1 - 2**-12}


def test_stochastic_parameters_move_on_average():
    """Steps that are far smaller than half of the last place: to the nearest, no
    parameter would move."""
    start = np.ones(100_000, bfloat16)
    moved = {}
    for kind in ("bf16", "bf16_nearest"):
        param = start.copy()
        opt = fastopt.gd(param, lr=1e-6, formats={"param": kind})
        for _ in range(1000):
            opt.step(np.ones(100_000, np.float32))
        moved[kind] = 1 - param.astype(np.float64).mean()
    assert moved["bf16_nearest"] == 0
    # Each step moves a parameter by 2**-8 with probability 1e-6 / 2**-8.
    deviation = np.sqrt(1e-3 * 2**-8 / 100_000)
    assert abs(moved["bf16"] - 1e-3) < 5 * deviation


def test_formats_of_parameters_need_bfloat16():
    with pytest.raises(TypeError, match="but none of these is bfloat16"):
        fastopt.adamw(np.ones(5, np.float32), formats={"param": "bf16+r8"})
    with pytest.raises(ValueError, match=r"formats\['param'\] must be one of 'bf16'"):
        fastopt.adamw(np.ones(5, bfloat16), formats={"param": "m8"})
    mixed = [np.ones(5, bfloat16), np.ones(5, np.float32)]
    opt = fastopt.adamw(mixed, formats={"param": "bf16+r8"})
    shapes = [array.shape for array in opt.state["param_remainder"]]
    assert shapes == [(5,), (0,)]


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("SIGN16", 0, test_16_bits_of_remainder_are_exact),
        ("HALF8", 0, test_8_bits_of_remainder_are_within_the_bound),
        ("FIRST_FACTOR", 0, test_8_bits_of_remainder_are_rounded_to_a_neighbour),
    ],
)
def test_a_mutant_of_a_remainder_is_caught(name, value, check, monkeypatch):
    monkeypatch.setattr(formats, name, word(value))
    with pytest.raises(AssertionError):
        check(0x07F)


def test_a_mutant_that_keeps_the_bits_of_nan_is_caught(monkeypatch):
    monkeypatch.setattr(formats, "UPPER16", word(0xFFFFFFFF))
    with pytest.raises(AssertionError):
        test_infinities_and_nan(R16)


def test_a_run_goes_on_with_float32_parameters():
    """And the error of a state that does not fit says what users can type."""
    param = np.ones(5000, bfloat16)
    opt = fastopt.adamw(param, lr=1e-3, formats={"param": "bf16+r8", "m": "m8"})
    opt.step(np.ones(5000, np.float32))
    saved = opt.state_dict()
    with pytest.raises(
        ValueError, match=r"'param': 'bf16\+r8'.* see convert_state, ma"
    ):
        fastopt.adamw(np.ones(5000, bfloat16)).load_state_dict(saved)
    masters = opt.master_params()
    exact = fastopt.adamw(masters, lr=1e-3)
    exact.load_state_dict(fastopt.convert_state(saved, "fp32"))
    for other in (exact, opt):
        other.step(np.ones(5000, np.float32))
    np.testing.assert_allclose(opt.master_params(), masters, rtol=2**-15)
    assert set(exact.state) == {"m", "v"}
    kept = fastopt.convert_state(saved, {"m": "bf16"})
    assert kept["state"].keys() == {"m", "v", "param_remainder"}


@pytest.mark.parametrize(
    "rule",
    [fastopt.dog, fastopt.schedule_free_adamw, fastopt.madgrad, fastopt.prodigy],
    ids=lambda rule: rule.name,
)
def test_what_begins_as_a_copy_of_the_parameters_has_their_remainders(rule):
    """And so have moving averages."""
    exact = np.full(5003, 1.001, np.float32)
    opt = rule(
        np.ones(5003, bfloat16), formats={"param": "bf16+r16"}, ema=0.5, backend="numpy"
    )
    opt.load_master_params(exact)
    other = rule(exact, ema=0.5)
    for seed in range(3):
        grad = np.random.default_rng(seed).normal(size=5003).astype(np.float32)
        opt.step(grad)
        other.step(grad)
    assert same_bits(opt.master_params(), exact)
    assert same_bits(opt.ema_params, other.ema_params)
    for name, (array,) in other.state.items():
        assert same_bits(opt.state[name][0], array)


@pytest.mark.parametrize("name", ["bf16", "8bit"])
@pytest.mark.parametrize(
    "rule", [fastopt.schedule_free_adamw, fastopt.sgd, fastopt.rmsprop]
)
def test_converted_state_fits_an_optimizer_of_that_name(rule, name):
    """Copies of the parameters stay float32. Switches that are off have no state."""
    param = np.ones(5000, np.float32)
    opt = rule(param, lr=0.1)
    opt.step(np.ones(5000, np.float32))
    other = rule(param, lr=0.1, formats=name)
    other.load_state_dict(fastopt.convert_state(opt.state_dict(), name))
    again = fastopt.convert_state(other.state_dict(), name)
    rule(param, lr=0.1, formats=name).load_state_dict(again)
