"""State of 8 bits in groups that share a scale: bounds, groups of every kind, and what
steps make of them. That the backends have the same bits is in test_formats.py."""

import numpy as np
import pytest
from cases import bfloat16, same_bits
from installed import BACKENDS, needs_numba

import fastopt
from fastopt.memory import formats
from fastopt.memory.formats import FORMATS, GROUP
from fastopt.rule import word

M8, V8 = FORMATS["m8"], FORMATS["v8"]
SCALES = [1e-30, 1e-10, 1.0, 1e10, 1e30]


def spread(scale, size):
    """A scale for each element."""
    return np.repeat(scale, GROUP)[:size].astype(np.float64)


def drawn(size, factor, seed=0):
    """Numbers of very different sizes in one group."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=size) * 3)
    numbers = rng.normal(size=size) * sizes * factor / sizes.max()
    return numbers.astype(np.float32)


@pytest.mark.parametrize("factor", SCALES)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 4097])
def test_m8_is_within_its_bound(size, factor):
    """The step of the code is s (1 + |x|)**2 / 254 where m = s x. Stochastic rounding
    is off by less than a step."""
    numbers = drawn(size, factor)
    parts = M8.written(numbers, (5, 1, 2))
    got, scale = M8.read(parts).astype(np.float64), spread(parts[1], size)
    x = abs(numbers) / scale
    bound = scale * (1 + x) ** 2 / 254 * (1 + 1 / 128) * (1 + 1e-6)
    assert (abs(got - numbers) <= bound).all()
    assert (np.sign(got) * np.sign(numbers) >= 0).all()


@pytest.mark.parametrize("factor", SCALES)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 4097])
def test_v8_is_within_its_bound(size, factor):
    numbers = abs(drawn(size, factor))
    numbers[:: max(size // 5, 1)] = 0
    parts = V8.written(numbers, (5, 1, 3))
    got, scale = V8.read(parts).astype(np.float64), spread(parts[1], size)
    error = abs(np.sqrt(got) - np.sqrt(numbers.astype(np.float64)))
    assert (error <= scale * (1 + 1e-6)).all()
    assert ((got == 0) == (numbers == 0)).all()


@pytest.mark.parametrize("factor", [1e-37, 3e38])
def test_groups_at_the_ends_of_the_range(factor):
    """Sums of two such numbers are not finite, and quarters of others not normal."""
    rng = np.random.default_rng(0)
    numbers = (rng.uniform(-1, 1, 64 * GROUP) * factor).astype(np.float32)
    got = M8.read(M8.written(numbers))
    np.testing.assert_allclose(got, numbers, atol=0.02 * factor)
    got = np.sqrt(V8.read(V8.written(abs(numbers))))
    np.testing.assert_allclose(got, np.sqrt(abs(numbers)), atol=0.005 * factor**0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_v8_refuses_a_sign(backend):
    """Such a group stays as it is, with that of the other buffer, and is counted."""
    rng = np.random.default_rng(0)
    param, grad = -rng.uniform(-2, -1, (2, 4096)).astype(np.float32)
    formats = {"z": "v8", "v": "m8"}
    opt = fastopt.schedule_free_adamw(param, lr=4.0, formats=formats, backend=backend)
    opt.step(-grad)
    assert opt.nonfinite_groups == 0
    before = {name: arrays[0].copy() for name, arrays in opt.state.items()}
    grad[70] = -100.0
    opt.step(-grad)
    assert opt.nonfinite_groups == 2
    for name, (after,) in opt.state.items():
        changed = np.flatnonzero(after != before[name])
        size = 1 if name.endswith("scale") else GROUP
        assert changed.size > 9 and not (changed // size == 1).any()


@pytest.mark.parametrize("format", [M8, V8], ids=["m8", "v8"])
def test_the_greatest_of_a_group_is_exact_and_zeros_stay(format):
    numbers = abs(drawn(640, 1.0)).reshape(10, GROUP)
    numbers[3] = 0
    numbers[4] = 0
    numbers[4, 9] = 1e-37
    got = format.read(format.written(numbers))
    np.testing.assert_allclose(got.max(axis=1), numbers.max(axis=1), rtol=4e-7)
    assert not got[3].any() and np.count_nonzero(got[4]) == 1


def test_fresh_state_is_zero():
    for format in (M8, V8):
        for scale in (0, 1):
            numbers = format.read((np.zeros(64, "u1"), np.full(1, scale, "f4")))
            assert same_bits(numbers, np.zeros(64, np.float32))


@pytest.mark.parametrize("format", [M8, V8], ids=["m8", "v8"])
def test_every_code_is_encoded_as_itself(format):
    """A number that a code stands for is not rounded, whatever is drawn."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes != 0x80] if format is M8 else codes
    top = 127 if format is M8 else 255
    for scale in SCALES:
        groups = np.full((codes.size, GROUP), top, np.uint8)
        groups[:, 7] = codes
        parts = groups, np.full(codes.size, scale, np.float32)
        if format is V8:
            parts = groups, np.sqrt(parts[1]) / np.float32(255)
        for step in range(5):
            words, _ = format.written(format.read(parts), (0, step, 2))
            difference = words[:, 7].astype(np.int8) - codes.astype(np.int8)
            # Products and roots are rounded, so a code may be off by next to nothing,
            # which is then rounded away from it once in thousands of times.
            assert np.count_nonzero(difference) <= 1


@pytest.mark.parametrize(("format", "pair"), [(M8, 2), (V8, 3)], ids=["m8", "v8"])
def test_rounding_has_the_right_mean(format, pair):
    numbers = np.full((4000, GROUP), 0.3, np.float32)
    numbers[:, 0] = 1
    words, _ = format.written(numbers, (0, 1, pair))
    codes = words[:, 1:].astype(np.float64)
    exact = 254 * 0.3 / 1.3 if format is M8 else 255 * np.sqrt(0.3)
    fraction = exact % 1
    deviation = np.sqrt(fraction * (1 - fraction) / codes.size)
    assert abs(codes.mean() - exact) < 5 * deviation + 2**-15
    assert set(codes.ravel()) == {np.floor(exact), np.ceil(exact)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_groups_that_are_not_finite_stay_and_are_counted(bad, backend):
    """Others go on. Parameters are what the rule makes of them."""
    rng = np.random.default_rng(0)
    size = 70 * GROUP + 5
    param = rng.normal(size=size).astype(np.float32)
    opt = fastopt.adamw(param, backend=backend, formats="8bit", threads=2)
    opt.step(rng.normal(size=size).astype(np.float32))
    before = {name: arrays[0].copy() for name, arrays in opt.state.items()}
    grad = rng.normal(size=size).astype(np.float32)
    grad[GROUP + 3] = grad[-1] = bad
    opt.step(grad)
    assert opt.nonfinite_groups == 4  # two groups of m and of v
    for name, (after,) in opt.state.items():
        step = 1 if name.endswith("scale") else GROUP
        changed = after != before[name]
        assert not changed[step : 2 * step].any()
        assert not changed[70 * step :].any()
        for group in (0, 2, 69):
            assert changed[group * step : (group + 1) * step].any()
    opt.add_group({"params": np.ones(3, np.float32)})
    assert opt.nonfinite_groups == 4
    assert np.isnan(param[[GROUP + 3, -1]]).all()
    assert np.count_nonzero(np.isfinite(param)) == size - 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [4096, 4097, 4096 + 63, 4096 + 64, 4096 + 65])
def test_tails(size, backend):
    """Arrays whose last group is not full, one behind the other in memory: what is
    behind the last code and the last scale stays as it is."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=size).astype(np.float32)
    params = [numbers.copy() for _ in range(2)]
    opt = fastopt.adamw(params, backend=backend, formats="8bit", threads=3)
    for _ in range(2):
        opt.step([numbers, None])
    for arrays in opt.state.values():
        assert arrays[0].any() and not arrays[1].any()
    scales = opt.state["m_scale"][0]
    assert scales.shape == (-(-size // GROUP),) and scales.all()


def test_tails_of_every_length():
    for size in range(1, 131):
        numbers = drawn(size, 1.0, seed=size)
        for format, of in ((M8, numbers), (V8, abs(numbers))):
            parts = format.written(of)
            assert [part.size for part in parts] == [size, -(-size // GROUP)]
            padded = np.zeros(192, np.float32)
            padded[:size] = of
            whole = format.written(padded)
            for part, of_padded in zip(parts, whole, strict=True):
                assert same_bits(part, of_padded[: part.size])


# What steps make of them ------------------------------------------------------------


def test_no_drift_under_zero_gradients():
    """Others' codes do not have zero, or lose it (unsloth-zoo#962, LichtFeld#2066)."""
    param = np.full(8192, 0.5, np.float32)
    opt = fastopt.adam(param, lr=0.1, formats="8bit")
    for _ in range(500):
        opt.step(np.zeros(8192, np.float32))
    assert (param == 0.5).all()


def test_small_second_moments_do_not_vanish():
    """Codes in proportion to v, as for m, make zeros of all v that are less than 1/255
    of the greatest of the group. Then a step is divided by eps, and training diverges
    (unsloth-zoo). The root has codes for v down to 1/65025, and others keep code 1."""
    rng = np.random.default_rng(0)
    curvature = np.exp(rng.uniform(-8, 0, 4096)).astype(np.float32)
    losses = {}
    for kind in ("m8", "v8", "fp32"):
        rng = np.random.default_rng(1)
        param = np.ones(4096, np.float32)
        opt = fastopt.adam(param, lr=0.01, formats={"v": kind})
        for _ in range(200):
            noise, more = rng.normal(size=(2, 4096)).astype(np.float32)
            opt.step(curvature * (param * (1 + 0.1 * noise) + 0.01 * more))
        losses[kind] = float((curvature * param * param).sum())
    assert losses["m8"] > 1e4
    assert losses["v8"] < 1 and losses["fp32"] < 1


def test_averages_of_squares_are_not_biased():
    """The mean over elements, for gradients of different sizes within each group."""
    rng = np.random.default_rng(0)
    size = 16_384
    of = np.exp(rng.normal(size=size) * 0.5).astype(np.float32)
    opts = {
        kind: fastopt.adam(np.zeros(size, np.float32), lr=0.0, formats={"v": kind})
        for kind in ("v8", "fp32")
    }
    for _ in range(3000):
        grad = rng.normal(size=size).astype(np.float32) * of
        for opt in opts.values():
            opt.step(grad)
    (codes,), (scales,) = opts["v8"].state["v"], opts["v8"].state["v_scale"]
    got = V8.read((codes, scales)) / opts["fp32"].state["v"][0]
    assert abs(got.mean() - 1) < 0.05


@pytest.mark.parametrize("param", [np.float32, bfloat16])
def test_saved_and_converted_state(param):
    rng = np.random.default_rng(0)
    shapes = {"a": (70, 80), "b": (5,), "c": (4099,)}

    def made(formats, **options):
        params = {k: np.ones(shape, param) for k, shape in shapes.items()}
        return params, fastopt.adamw(params, lr=0.1, formats=formats, **options)

    def grads():
        return {k: rng.normal(size=shape).astype("f4") for k, shape in shapes.items()}

    params, opt = made("8bit")
    for _ in range(3):
        opt.step(grads())
    saved = opt.state_dict()
    again, other = made("8bit", backend="numpy")
    other.load_state_dict(saved)
    for name in shapes:
        again[name][:] = params[name]
    for _ in range(2):
        same = grads()
        opt.step(same)
        other.step(same)
    for name in shapes:
        assert same_bits(params[name], again[name])

    plain = fastopt.convert_state(saved, "fp32")
    assert set(plain["state"]) == {"m", "v"} and plain["formats"] == {}
    expected = M8.read(
        (saved["state"]["m"][0].view("u1"), saved["state"]["m_scale"][0])
    )
    assert same_bits(plain["state"]["m"][0], expected)
    _, exact = made(None)
    exact.load_state_dict(plain)
    back = fastopt.convert_state(plain, "8bit")
    assert back["formats"] == saved["formats"]
    for name, arrays in saved["state"].items():
        for a, b in zip(arrays, back["state"][name], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
    m = M8.read((back["state"]["m"][0].view("u1"), back["state"]["m_scale"][0]))
    np.testing.assert_allclose(m, expected, rtol=1e-5, atol=1e-7)
    half = fastopt.convert_state(saved, {"m": "bf16"})
    assert half["state"]["m"][0].dtype == bfloat16 and "v_scale" not in half["state"]
    first = 70 * 80 + 5  # elements before those of "c"
    draw = first, saved["steps"], 2  # "m" is the column after those of p and g
    (words,) = FORMATS["bf16_sr"].written(plain["state"]["m"][2], draw)
    assert same_bits(half["state"]["m"][2].view("u2"), words)
    _, halved = made({"m": "bf16"})
    halved.load_state_dict(half)
    with pytest.raises(ValueError, match=r"\[0\]\['a'\] has the formats .*convert_st"):
        halved.load_state_dict(saved)
    with pytest.raises(TypeError, match="takes what an optimizer's state_dict"):
        fastopt.convert_state({"m": 1}, "fp32")
    with pytest.raises(ValueError, match="leave 'param' out"):
        fastopt.convert_state(saved, {"param": "bf16+r8"})


def test_formats_by_path():
    """An embedding keeps float32 state, as others let their users ask for."""
    params = {"embedding": np.ones((64, 80), "f4"), "w": np.ones((64, 80), "f4")}
    opt = fastopt.adamw(
        params, formats=lambda path, array: "fp32" if "emb" in path else "8bit"
    )
    opt.step({k: np.ones((64, 80), "f4") for k in params})
    assert [a.dtype for a in opt.state["m"]] == [np.float32, np.int8]
    assert [a.size for a in opt.state["m_scale"]] == [0, 80]
    opt.add_group({"params": {"w": np.ones(4096, "f4")}})
    assert [a.dtype for a in opt.state["v"]] == [np.float32, np.uint8, np.uint8]
    with pytest.raises(
        ValueError, match=r"formats\(\"\['w'\]\", array\) must be one of"
    ):
        fastopt.adamw(params, formats=lambda path, array: "w" in path and "9" or None)


def test_8_bits_are_for_averages():
    for rule in (fastopt.dog, fastopt.gd):
        with pytest.raises(ValueError, match="'8bit' is for averages of gradients"):
            rule(np.ones(5000, np.float32), formats="8bit")
    opt = fastopt.schedule_free_adamw(np.ones(5000, np.float32), formats="8bit")
    assert [arrays[0].dtype for arrays in opt.state.values()][:2] == ["f4", "u1"]


def test_memory():
    params = [np.ones(6400, bfloat16), np.ones(64, bfloat16)]
    opt = fastopt.adamw(
        params, formats={"param": "bf16+r8", "m": "m8", "v": "v8"}, ema=0.9
    )
    usage = opt.memory()
    by_name = {name: size for name, _, size in usage.buffers}
    assert by_name == {
        "param": 2 * 6464,
        "m": 6400 + 4 * 64,
        "m_scale": 400,
        "v": 6400 + 4 * 64,
        "v_scale": 400,
        "param_remainder": 6464,
        "ema": 4 * 6464,
    }
    assert usage.total == sum(by_name.values())
    assert "m                int8, float32" in str(usage)
    alone = fastopt.adamw(
        np.ones(64_000, bfloat16), formats={"param": "bf16+r8", "m": "m8", "v": "v8"}
    )
    assert alone.memory().per_parameter == 5.125


def test_a_seed_draws_others():
    """And a state remembers its seed."""
    results = []
    for seed in (0, 1, 1, 2**31):
        param = np.ones(5000, np.float32)
        opt = fastopt.adamw(param, lr=0.1, formats="8bit", seed=seed)
        for step in range(3):
            opt.step(np.random.default_rng(step).normal(size=5000).astype("f4"))
        results.append(opt.state["m"][0].copy())
    assert same_bits(results[1], results[2])
    assert not same_bits(results[0], results[1])
    assert not same_bits(results[0], results[3])
    other = fastopt.adamw(np.ones(5000, np.float32), formats="8bit", seed=3)
    with pytest.raises(ValueError, match="saved with seed 2147483648, but this op"):
        other.load_state_dict(opt.state_dict())
    for bad in (-1, 2**32, 1.5, True, "a"):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            fastopt.adamw(np.ones(5, np.float32), seed=bad)


# Mutants ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("UNIT", 0.0, lambda: test_v8_is_within_its_bound(4097, 1.0)),
        ("QUARTER", 1.0, lambda: test_groups_at_the_ends_of_the_range(3e38)),
        ("MIDDLE", 384.5, lambda: test_rounding_has_the_right_mean(M8, 2)),
        ("OFFSET", 256.5, lambda: test_rounding_has_the_right_mean(V8, 3)),
        ("SIGN8", word(0), test_fresh_state_is_zero),
    ],
)
def test_a_mutant_of_a_codec_is_caught(name, value, check, monkeypatch):
    monkeypatch.setattr(formats, name, value)
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check()


def test_the_scale_of_the_neighbour_is_caught(monkeypatch):
    spread = formats.spread
    monkeypatch.setattr(formats, "spread", lambda g, of: spread(np.roll(g, 1), of))
    with pytest.raises(AssertionError):
        test_m8_is_within_its_bound(4097, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.lamb, fastopt.nadam])
def test_averages_are_stored_together(rule, backend):
    """The square of 1e20 overflows. Without its square, the average of such gradients
    would make a step of any length. The parameters become what float32 makes of them,
    and the groups of both averages stay as they were."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=5000).astype(np.float32)
    param = start.copy()
    opt = rule(param, lr=0.01, formats="8bit", backend=backend, threads=2)
    for step in range(6):
        grad = rng.normal(size=5000).astype(np.float32)
        before = {name: arrays[0].copy() for name, arrays in opt.state.items()}
        if step == 3:
            grad[5] = grad[4999] = 1e20
        opt.step(grad)
        if step == 3:
            assert opt.nonfinite_groups == 4
            for name, (after,) in opt.state.items():
                size = 1 if name.endswith("scale") else GROUP
                assert same_bits(after[:size], before[name][:size])
                assert not same_bits(after[size:], before[name][size:])
    finite = np.isfinite(param)
    assert (abs(param - start)[finite] < 1).all()
    assert finite.all() or rule is fastopt.lamb


def velocity(p, g, v, lr, mu):
    v = mu * v + g
    return p - lr * v, v


@needs_numba
def test_8bit_is_refused_for_other_rules():
    """ "v" of a user's rule may be negative, which v8 cannot be."""
    rule = fastopt.Rule(
        velocity, lambda t, lr=0.1, mu=0.9: (lr, mu), state=("v",), name="mine"
    )
    param = np.ones(5000, np.float32)
    for given in ("8bit", lambda path, array: "8bit"):
        with pytest.raises(ValueError, match="for mine, name a format for each buffer"):
            rule(param, formats=given)
    opt = rule(param, formats={"v": "m8"})
    opt.step(np.full(5000, -1, np.float32))
    assert (opt.state["v"][0].astype(int) == -127).all()
    state = rule(np.ones(5000, np.float32)).state_dict()
    with pytest.raises(ValueError, match="for mine, name a format for each buffer"):
        fastopt.convert_state(state, "8bit")


def test_a_seed_must_match_only_where_something_is_drawn():
    param = np.ones(5000, np.float32)
    saved = fastopt.adamw(param, formats="8bit", seed=7).state_dict()
    with pytest.raises(ValueError, match="saved with seed 7, .* make it with seed=7"):
        fastopt.adamw(param, formats="8bit").load_state_dict(saved)
    plain = fastopt.adamw(param)
    plain.load_state_dict(fastopt.convert_state(saved, "fp32"))
    assert plain.state_dict()["seed"] == 0
