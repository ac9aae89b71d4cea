"""Stochastic rounding, and the random words that it takes."""

import numpy as np
import pytest
from cases import bfloat16

from fastopt.memory import formats
from fastopt.memory.formats import FORMATS
from fastopt.rule import word

WORDS = np.arange(2**16, dtype=np.uint16)
SR = FORMATS["bf16_sr"]


def test_stochastic_rounding_is_to_one_of_two_neighbours():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    numbers = np.concatenate([numbers, WORDS.view(bfloat16).astype(np.float32)])
    (words,) = SR.written(numbers, (7, 3, 2))
    down = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    nan, exact = np.isnan(numbers), numbers.view(np.uint32) & 0xFFFF == 0
    assert np.isnan(SR.read((words[nan],))).all()
    assert ((words == down) | (words == down + 1))[~nan].all()
    assert (words == down)[exact & ~nan].all()  # infinities, too
    assert (words != down)[~exact & ~nan].mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("fraction", [1, 0x1234, 0x8000, 0xFEDC])
def test_stochastic_rounding_has_the_right_mean(fraction):
    """Up with a probability of ``fraction`` of 2**16, for each stream of a pair."""
    count = 1 << 20
    numbers = np.full(count, 0x3F800000 + fraction, np.uint32).view(np.float32)
    for stream in (2, 3, 5):
        up = (SR.written(numbers, (0, 1, stream))[0] == 0x3F81).mean()
        p = fraction / 2**16
        assert abs(up - p) < 5 * np.sqrt(p * (1 - p) / count)


def test_what_is_drawn_depends_on_element_step_and_stream():
    numbers = np.full(4096, 1.001, np.float32)
    draws = [(0, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1, 4), (1, 1, 2), (4096, 1, 2)]
    words = [SR.written(numbers, draw)[0] for draw in draws]
    for i, one in enumerate(words):
        for other in words[:i]:
            assert 0.1 < (one != other).mean() < 0.6
    np.testing.assert_array_equal(words[4][:-1], words[0][1:])  # by the element alone
    np.testing.assert_array_equal(words[0], SR.written(numbers, draws[0])[0])
    (past,) = SR.written(numbers, (2**32 + 1, 2**32 + 1, 2))  # both wrap around
    np.testing.assert_array_equal(past, words[4])


def words_of_steps():
    """The random words of 1,000 steps, 4,096 elements each."""
    return np.stack([formats.drawn((4096,), 7, t, 1).array for t in range(1, 1001)])


def check_words(words):
    """The upper half, the lower half and the lowest byte, by which streams are rounded,
    are uniform. Those of two elements are independent over the steps. So the number of
    elements that a step rounds up has the variance of independent ones."""
    for width, part in ((16, words >> 16), (16, words & 0xFFFF), (8, words & 0xFF)):
        x = (part + 0.5) / 2**width
        assert abs(x.mean() - 0.5) < 5 / np.sqrt(12 * x.size)
        assert abs(12 * x.var() - 1) < 0.01
        for k in (1, 2, 64, 1000, 2048, 4095):
            assert abs(np.corrcoef(x[:, 0], x[:, k])[0, 1]) < 5 / np.sqrt(len(x))
            assert abs(np.corrcoef(x[:-1, k], x[1:, k])[0, 1]) < 5 / np.sqrt(len(x))
        up = (x < 0.1).sum(axis=1)
        assert 0.8 < up.var() / (0.09 * words.shape[1]) < 1.3
    both = np.corrcoef((words >> 16).ravel(), (words & 0xFFFF).ravel())[0, 1]
    assert abs(both) < 5 / np.sqrt(words.size)


def test_random_words_are_independent():
    check_words(words_of_steps())


@pytest.mark.parametrize(
    "random_word",
    [
        lambda element, step, pair: formats.mixed(step) + element,
        lambda element, step, pair: element * (formats.mixed(step) | formats.ONE),
        lambda element, step, pair: formats.mixed(element ^ (step + pair)),
    ],
    ids=["no slope", "no start", "one key for all"],
)
def test_random_words_that_depend_on_each_other_are_caught(random_word, monkeypatch):
    monkeypatch.setattr(formats, "random_word", random_word)
    with pytest.raises(AssertionError):
        check_words(words_of_steps())


@pytest.mark.parametrize(
    ("constant", "check"),
    [
        ("QUIET", test_stochastic_rounding_is_to_one_of_two_neighbours),
        ("STEP_FACTOR", test_what_is_drawn_depends_on_element_step_and_stream),
    ],
    ids=["NaN", "no step"],
)
def test_a_mutant_is_caught(constant, check, monkeypatch):
    monkeypatch.setattr(formats, constant, word(0))
    with pytest.raises(AssertionError):
        check()
