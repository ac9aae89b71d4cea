"""thinc's Adam by our kernels: the numbers are thinc's, to rounding, and thinc finds
it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import same_bits

thinc = pytest.importorskip("thinc", reason="thinc is not installed")
from thinc import api  # noqa: E402
from thinc.backends import Ops  # noqa: E402

import fastopt.thinc as ours  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def arrays(n, seed=0):
    """Weights, gradient and two moments; none of them zero."""
    rng = np.random.default_rng(seed)
    w, g, m, v = rng.normal(size=(4, n)).astype(np.float32)
    return w, g, m, v * v + np.float32(1e-3)


def adam(w, g, m, v, beta1, beta2, eps, lr, mod_rate=1.0):
    """In float64: the bias correction is the caller's, and in lr alone. The betas are
    those of float32, from which thinc takes what the new terms weigh."""
    beta1, beta2 = float(np.float32(beta1)), float(np.float32(beta2))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return w - lr * m / (mod_rate * np.sqrt(v) + eps), m, v


# The operation ------------------------------------------------------------------------

GIVEN = {"beta1": 0.85, "beta2": 0.997, "eps": 0.05, "learn_rate": 0.02}


@pytest.mark.parametrize("n", [0, 1, 7, 64, 1001, 50_003])
def test_adam_is_that_of_numpy_ops(n):
    """To float32 rounding, after each of several steps from the same numbers."""
    w, _, m, v = arrays(n)
    rounding = 8 * np.finfo(np.float32).eps
    for step in range(5):
        _, g, _, _ = arrays(n, step)
        theirs = [a.copy() for a in (w, g, m, v)]
        want = adam(*map(np.float64, theirs), 0.85, 0.997, 0.05, 0.02)
        api.NumpyOps().adam(*theirs, *GIVEN.values())
        got = ours.FastoptOps().adam(w, g, m, v, **GIVEN)
        assert all(a is b for a, b in zip(got, (w, g, m, v), strict=True))
        assert same_bits(g, np.zeros(n, np.float32)) and same_bits(g, theirs.pop(1))
        for a, b, c in zip((w, m, v), theirs, want, strict=True):
            scale = np.maximum(np.abs(c), 0.1)
            assert np.all(np.abs(a - c) <= rounding * scale)
            assert np.all(np.abs(a - b) <= rounding * scale)


def test_mod_rate():
    """As in the operations that thinc derives all others from."""
    w, g, m, v = arrays(100)
    want = Ops.adam(
        api.NumpyOps(), *(a.copy() for a in (w, g, m, v)), 0.5, 0.75, 0.1, 0.2, 3.0
    )
    got = ours.FastoptOps().adam(w, g, m, v, 0.5, 0.75, 0.1, 0.2, 3.0)
    for i in (0, 2, 3):
        np.testing.assert_allclose(got[i], want[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
def test_any_backend(backend, monkeypatch):
    want = arrays(300)
    ours.FastoptOps().adam(*want, **GIVEN)
    monkeypatch.setattr(ours.backends, "choose", lambda rule, on_device: backend)
    got = arrays(300)
    ours.FastoptOps().adam(*got, **GIVEN)
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda w, g, m, v: (w, g[1:], m, v), ValueError, r"gradient has shape \(9,\)"),
        (lambda w, g, m, v: (w, g, m, v[:-1]), ValueError, r"mom2 has shape \(9,\)"),
        (lambda w, g, m, v: (w, np.float64(g), m, v), TypeError, "gradient has dtype"),
        (lambda w, g, m, v: (w, g, m.astype("f8"), v), TypeError, "mom1 has dtype"),
        (lambda w, g, m, v: (w, w, m, v), ValueError, "overlap"),
        (lambda w, g, m, v: (w, g, m, m), ValueError, "overlap"),
        (lambda w, g, m, v: (w[::2], g[::2], m[::2], v[::2]), ValueError, "contiguous"),
        (lambda w, g, m, v: (w, locked(g), m, v), ValueError, "gradient is read-only"),
    ],
)
def test_refusals(wrong, error, message):
    given = wrong(*arrays(10))
    before = [np.copy(a) for a in given]
    with pytest.raises(error, match=message):
        ours.FastoptOps().adam(*given, **GIVEN)
    assert all(map(same_bits, given, before))


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"weights": [1.0] * 10}, TypeError, r"weights must be a NumPy array, got \[1"),
        ({"gradient": None}, TypeError, "gradient must be a NumPy array, got None"),
        ({"mom2": "m"}, TypeError, "mom2 must be a NumPy array, got 'm'"),
        ({"learn_rate": None}, TypeError, "learn_rate must be a number, got None"),
        ({"learn_rate": np.nan}, ValueError, "learn_rate must be finite, got nan"),
        ({"learn_rate": 1e39}, ValueError, "learn_rate 1e[+]39.*too large for float32"),
        ({"eps": -1e39}, ValueError, "eps -1e[+]39.*too large for float32"),
        ({"beta1": "a"}, TypeError, "beta1 must be a number"),
        ({"beta2": 1j}, TypeError, "beta2 must be a number"),
        ({"mod_rate": 0}, ValueError, "mod_rate must not be 0"),
    ],
)
def test_other_things_are_refused(wrong, error, message):
    names = ("weights", "gradient", "mom1", "mom2")
    sound = dict(zip(names, arrays(10), strict=True))
    before = [np.copy(a) for a in sound.values()]
    with pytest.raises(error, match=message):
        ours.OPS.adam(**{**sound, **GIVEN, **wrong})
    assert all(map(same_bits, sound.values(), before))


def locked(array):
    array.flags.writeable = False
    return array


# The optimizer ------------------------------------------------------------------------


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), np.eye(10, dtype=np.float32)[y]


def train(optimizer, epochs=1):
    """A small network; the losses and the weights at the end."""
    x, y = digits()
    model = api.chain(api.Relu(32), api.Softmax())
    api.fix_random_seed(0)
    model.initialize(x[:5], y[:5])
    losses = []
    for _ in range(epochs):
        for start in range(0, 1792, 128):
            guess, backprop = model.begin_update(x[start : start + 128])
            error = guess - y[start : start + 128]
            backprop(error / len(error))
            model.finish_update(optimizer)
            optimizer.step_schedules()
            losses.append(float((error * error).sum(1).mean()))
    return losses, [n.get_param(k) for n in model.walk() for k in n.param_names]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"L2": 0.02, "grad_clip": 0.1},
        {"L2": 0.02, "L2_is_weight_decay": False, "use_averages": False, "eps": 1e-3},
        {"beta1": 0.7, "beta2": 0.9},
        {"use_radam": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_it_trains_as_thinc_does(options, monkeypatch):
    """With all that thinc's optimizer has; and it is our operation that is called."""
    calls = []

    def counted(self, *args):
        calls.append(args[0].size)
        return adam(self, *args)

    adam = ours.FastoptOps.adam
    theirs = api.Optimizer(api.warmup_linear(0.02, 5, 60), **options)
    losses, weights = train(theirs)
    assert not calls
    monkeypatch.setattr(ours.FastoptOps, "adam", counted)
    optimizer = ours.Adam(api.warmup_linear(0.02, 5, 60), **options)
    got_losses, got = train(optimizer)
    used = not options.get("use_radam")
    assert sorted(set(calls)) == ([10, 32, 320, 2048] if used else [])
    np.testing.assert_allclose(got_losses, losses, rtol=1e-3)
    assert losses[-1] < losses[0]
    for a, b in zip(got, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert (optimizer.averages is None) == (theirs.averages is None)
    if theirs.averages:
        averages = zip(
            optimizer.averages.values(), theirs.averages.values(), strict=True
        )
        for a, b in averages:
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_arrays_elsewhere_keep_their_operations():
    class OnGPU(Ops):
        def adam(self, weights, gradient, *args):
            return weights, gradient + 1, *args[:2]

    given = np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)
    optimizer = ours.Adam(0.01)
    _, gradient = optimizer._adam(OnGPU(), *given, 1.0, (0, "W"), 1)
    assert same_bits(gradient, np.ones((2, 2), np.float32))


# How thinc finds it -------------------------------------------------------------------

FINDS = """
from thinc.api import get_ops, registry, use_ops, get_current_ops
ops = get_ops("fastopt")
print(type(ops).__module__, type(ops).__name__, type(get_ops("cpu")).__name__)
with use_ops("fastopt"):
    print(get_current_ops().name)
config = {"@optimizers": "fastopt.Adam.v1", "learn_rate": 0.25, "L2": 0.5}
made = registry.resolve({"optimizer": config})["optimizer"]
print(type(made).__module__, type(made).__name__, made.learn_rate(0), made.L2(0))
"""


def test_thinc_finds_it_when_it_is_installed(tmp_path):
    """Without an import of it, by the entry points that pyproject declares."""
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(
        r"^\[project\.entry-points\.(thinc_\w+)\]\n(.*?)\n\n", declared, re.M | re.S
    )
    assert [group for group, _ in found] == ["thinc_ops", "thinc_optimizers"]
    installed = tmp_path / "declared-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\n")
    (installed / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{lines}\n" for group, lines in found).replace('"', "")
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", FINDS],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "fastopt.thinc FastoptOps NumpyOps",
        "fastopt",
        "fastopt.thinc Adam 0.25 0.5",
    ], done.stderr


def test_it_is_there_once_it_is_imported():
    assert type(api.get_ops("fastopt")) is ours.FastoptOps
    assert api.registry.optimizers.get("fastopt.Adam.v1") is ours.Adam


def test_docstring_examples():
    import doctest

    result = doctest.testmod(ours)
    assert result.attempted >= 6 and not result.failed
