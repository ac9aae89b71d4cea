"""What a step does beside its rule, with every rule and backend: clipping, what is not
finite, moving averages, zeroing, accumulation; and groups that are masked, frozen or
added. The oracle is NumPy in float64 around the plain step of the NumPy backend, which
test_oracle.py holds to the papers."""

import contextlib
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from cases import CASES, DTYPES, IDS, nonzero, same_bits
from installed import BACKENDS, NUMBA, needs_numba, numba_cpu

import fastopt
from fastopt import RULES, Rule
from fastopt.backends.numpy_ref import sum_in_order
from fastopt.rule import wide

SIZES = (0, 1, 31, 4097, 40_003)
every_case = pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def arrays(seed, dtype=np.float32, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return [nonzero(rng, size, dtype) for size in sizes]


def copies(given):
    return [None if array is None else array.copy() for array in given]


def everything(opt, params):
    """All that steps have written."""
    found = [*params, *(a for each in opt.state.values() for a in each)]
    return found + list(opt.ema_params or []) + [np.array(opt._bound.program.carried)]


def run(rule, values, backend, dtype, threads=2, steps=4, **asked):
    params = arrays(0, dtype)
    opt = rule(params, backend=backend, threads=threads, ema=0.75, **values)
    for k in range(steps):
        grads = arrays(10 + k, dtype)
        grads[1 + k % 3] = None
        opt.step(grads, grad_scale=0.7, **asked)
        if asked.get("zero_grads"):
            assert not any(g.any() for g in grads if g is not None)
    return everything(opt, params), opt


ASKED = {
    "average": {},
    "all": {
        "clip_norm": 3.0,
        "clip_value": 0.02,
        "nonfinite": "raise",
        "zero_grads": True,
    },
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_same_bits(rule, values, dtype, asked):
    expected, reference = run(rule, values, "numpy", dtype, **ASKED[asked])
    for backend in BACKENDS[1:]:
        for threads in (1, 3):
            found, opt = run(rule, values, backend, dtype, threads, **ASKED[asked])
            assert all(map(same_bits, expected, found)), (backend, threads)
            assert repr(opt.grad_norm) == repr(reference.grad_norm)


@needs_numba
def test_same_bits_without_the_compiled_driver(monkeypatch):
    for rule, values in CASES[:: len(CASES) // 5]:
        expected, _ = run(rule, values, "numpy", np.float32, **ASKED["all"])
        monkeypatch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
        found, _ = run(rule, values, "numba", np.float32, **ASKED["all"])
        monkeypatch.undo()
        assert all(map(same_bits, expected, found))


# Clipping -----------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_and_what_it_does(backend, dtype):
    params, grads = arrays(0, dtype), arrays(1, dtype)
    before = copies(params)
    whole = np.concatenate(grads).astype(np.float64) * 0.5
    norm = math.sqrt(math.fsum((whole * whole).tolist()))
    opt = fastopt.gd(params, lr=1.0, backend=backend)
    opt.step(grads, grad_scale=0.5, clip_norm=2.0)
    eps = np.finfo(dtype).eps
    assert abs(opt.grad_norm - norm) <= 2 * eps * norm
    for p, old, g in zip(params, before, grads, strict=True):
        wanted = old - g.astype(np.float64) * 0.5 * (2 / (norm + 1e-6))
        assert np.all(np.abs(p - wanted) <= 4 * eps * (np.abs(old) + np.abs(wanted)))
    # A norm below the bound is left as it is, to the last bit.
    clipped, free = copies(before), copies(before)
    fastopt.gd(clipped, backend=backend).step(grads, clip_norm=1e9)
    fastopt.gd(free, backend=backend).step(grads)
    assert all(map(same_bits, clipped, free))


@every_backend
def test_the_norm_is_torchs(backend):
    torch = pytest.importorskip("torch")
    params, grads = arrays(0), arrays(1)
    theirs = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    for p, g in zip(theirs, grads, strict=True):
        p.grad = torch.from_numpy(g.copy())
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.optim.SGD(theirs, lr=0.1).step()
    opt = fastopt.gd(params, lr=0.1, backend=backend)
    opt.step(grads, clip_norm=0.5)
    assert opt.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for p, q in zip(params, theirs, strict=True):
        np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-5, atol=1e-7)


@every_backend
def test_large_gradients_have_a_norm(backend):
    """Their squares would overflow in float32."""
    grad = np.full(100, 1e30, np.float32)
    opt = fastopt.gd(np.zeros(100, np.float32), backend=backend)
    opt.step(grad, clip_norm=1.0)
    assert opt.grad_norm == pytest.approx(1e31)


@every_backend
def test_clip_value(backend):
    p = np.zeros(5)
    grad = np.array([-3.0, -0.1, 0.0, 0.2, 7.0])
    opt = fastopt.gd(p, lr=1.0, backend=backend)
    opt.step(grad, grad_scale=2, clip_value=0.3)
    assert p.tolist() == [0.3, 0.2, 0.0, -0.3, -0.3]
    assert grad.tolist() == [-3.0, -0.1, 0.0, 0.2, 7.0]


# What is not finite -------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_rule
def test_a_gradient_that_is_not_finite(rule, bad, backend):
    """In the last element of the last array: parameters, state and count stay."""
    params = arrays(0)
    opt = rule(params, backend=backend, ema=0.9)
    opt.step(arrays(1))
    before = copies(everything(opt, params))
    grads = arrays(2)
    grads[-1][-1] = bad
    with pytest.raises(FloatingPointError, match=r"NaN in grads\[4\]; nothing was"):
        opt.step(grads, nonfinite="raise")
    assert opt.skipped == 0
    opt.step(grads, nonfinite="skip", zero_grads=True)
    assert opt.skipped == 1 and opt.steps == 1
    assert all(map(same_bits, before, everything(opt, params)))
    assert not any(grad.any() for grad in grads)
    opt.step(arrays(3), nonfinite="skip")
    assert opt.skipped == 1 and opt.steps == 2
    assert all(np.isfinite(p).all() for p in params)


@every_backend
def test_a_norm_that_overflows_is_no_gradient_that_does(backend):
    p, g = np.zeros(2), np.full(2, 1e200)
    opt = fastopt.gd(p, lr=1.0, backend=backend)
    opt.step(g, nonfinite="skip")
    assert opt.skipped == 0 and opt.grad_norm == math.inf
    assert np.array_equal(p, -g)
    opt.step(np.array([1e200, math.inf]), nonfinite="skip")
    opt.step(g, grad_scale=1e200, nonfinite="skip")  # a factor too large for them
    assert opt.skipped == 2 and np.array_equal(p, -g)


@every_backend
@every_rule
def test_by_default_it_goes_where_the_rule_takes_it(rule, backend):
    """An infinity in the last element spoils no other one of an elementwise rule."""
    if rule.measure is not None:
        pytest.skip("the rule's norms are of all elements")
    params = arrays(0)
    expected = copies(params)
    grads = arrays(2)
    rule(expected, backend=backend).step(grads)
    grads[-1][-1] = math.inf
    rule(params, backend=backend).step(grads)
    for p, q in zip(params[:-1], expected[:-1], strict=True):
        assert same_bits(p, q)
    assert same_bits(params[-1][:-1], expected[-1][:-1])


# The moving average -------------------------------------------------------------------


@every_backend
def test_the_moving_average(backend):
    params = {"w": np.array([1.0, 2.0]), "b": [np.array([[4.0]])]}
    opt = fastopt.gd(params, lr=1.0, ema=0.75, backend=backend)
    params["w"][:] = [3.0, 5.0]  # set after the optimizer was made: it starts there
    average = np.array([3.0, 5.0])
    for grad in (1.0, -2.0, 0.5):
        opt.step({"w": np.full(2, grad), "b": None})
        average = 0.75 * average + 0.25 * params["w"]
    np.testing.assert_allclose(opt.ema_params["w"], average, rtol=1e-15)
    assert opt.ema_params["b"][0].tolist() == [[4.0]]
    opt.ema = 0.5
    opt.step({"w": np.zeros(2), "b": [np.ones((1, 1))]})
    average = (average + params["w"]) / 2
    np.testing.assert_allclose(opt.ema_params["w"], average, rtol=1e-15)
    assert opt.ema_params["b"][0].tolist() == [[3.5]]


def test_the_moving_average_of_a_flat_buffer():
    flat = fastopt.flatten({"w": np.ones(3), "b": np.ones((2, 2))})
    for by_segment in (None, lambda path, array: True):
        opt = fastopt.gd(flat, ema=0.9, weight_decay_mask=by_segment)
        opt.step(flat.zeros_like())
        assert type(opt.ema_params) is fastopt.FlatBuffer
        assert same_bits(opt.ema_params.data, flat.data)
        assert opt.ema_params["b"].shape == (2, 2)


def test_no_moving_average():
    opt = fastopt.gd(np.ones(3))
    assert opt.ema is None and opt.ema_params is None
    with pytest.raises(ValueError, match="decided when the optimizer is made"):
        opt.ema = 0.9
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="ema must be"):
            fastopt.gd(np.ones(3), ema=bad)


# Accumulation and zeroing -------------------------------------------------------------


@every_backend
@every_rule
def test_accumulated_gradients_are_their_sum(rule, backend):
    params = arrays(0)
    expected = copies(params)
    opt, other = rule(params, backend=backend), rule(expected, backend=backend)
    for k in range(2):
        first, second = arrays(3 + k), arrays(5 + k)
        first[2] = second[2] = second[3] = None
        opt.accumulate(first, grad_scale=0.5)
        opt.accumulate(second, grad_scale=2)
        opt.step(clip_value=1.0)
        half, two = np.float32(0.5), np.float32(2)
        sums = [
            None if a is None else a * half + (0 if b is None else b * two)
            for a, b in zip(first, second, strict=True)
        ]
        other.step(sums, clip_value=1.0)
    assert all(map(same_bits, everything(other, expected), everything(opt, params)))


def test_accumulation_in_the_wrong_order():
    opt = fastopt.gd(np.ones(3), lr=1.0)
    with pytest.raises(TypeError, match="none have been accumulated"):
        opt.step()
    opt.accumulate(np.ones(3))
    with pytest.raises(RuntimeError, match="there are accumulated gradients"):
        opt.step(np.ones(3))
    with pytest.raises(ValueError, match="shape"):
        opt.accumulate(np.ones(4))
    opt.drop_accumulated()
    opt.step(np.ones(3))
    opt.accumulate(np.full(3, 2.0))
    opt.step()
    assert opt.rule and opt.steps == 2
    with pytest.raises(TypeError, match="none have been accumulated"):
        opt.step()


@every_backend
def test_zeroing_is_refused_before_anything_is_written(backend):
    params, grad = [np.ones(3), np.ones(3)], np.ones(5)
    opt = fastopt.gd(params, backend=backend)
    with pytest.raises(ValueError, match="overlap in memory, and zero_grads"):
        opt.step([grad[:3], grad[2:]], zero_grads=True)
    grad.flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[1\] is read-only"):
        opt.step([np.ones(3), grad[:3]], zero_grads=True)
    assert opt.steps == 0 and all(np.all(p == 1) for p in params)


@every_backend
@pytest.mark.parametrize(
    "asked",
    [
        {"clip_norm": 0},
        {"clip_norm": math.inf},
        {"clip_value": -1},
        {"nonfinite": "ignore"},
    ],
    ids=str,
)
def test_what_is_asked_is_checked(asked, backend):
    p = np.ones(3)
    with pytest.raises(ValueError, match=next(iter(asked))):
        fastopt.gd(p, backend=backend).step(np.ones(3), **asked)
    assert np.all(p == 1)


# Groups -------------------------------------------------------------------------------


@every_backend
def test_a_mask_for_weight_decay(backend):
    params = {"w": np.full((2, 2), 2.0), "b": np.full(2, 2.0)}
    values = {"lr": 0.1, "weight_decay": 0.5, "backend": backend}
    grads = {"w": np.zeros((2, 2)), "b": np.zeros(2)}
    for mask in ({"w": True, "b": False}, lambda path, array: array.ndim > 1):
        opt = fastopt.adamw(params, weight_decay_mask=mask, **values)
        opt.step(grads)
        assert np.all(params["b"] == 2)
        assert np.all(params["w"] != 2)
        params["w"][:] = 2
    paths = []
    fastopt.adamw(
        fastopt.flatten(params),
        weight_decay_mask=lambda path, array: not paths.append(path),
    )
    assert paths == ["['w']", "['b']"]
    with pytest.raises(ValueError, match="structure of params"):
        fastopt.adamw(params, weight_decay_mask={"w": True})
    with pytest.raises(TypeError, match="True or False"):
        fastopt.adamw(params, weight_decay_mask={"w": 1, "b": False})
    with pytest.raises(TypeError, match="has no weight_decay"):
        fastopt.dynamic_gd(params, weight_decay_mask={"w": True, "b": False})


@every_backend
def test_a_masked_flat_buffer_takes_a_flat_gradient(backend):
    flat = fastopt.flatten({"w": np.full((2, 2), 2.0), "b": np.full(2, 2.0)})
    opt = fastopt.adamw(
        flat, weight_decay_mask=lambda path, array: array.ndim > 1, backend=backend
    )
    opt.step(flat.zeros_like())
    assert np.all(flat["b"] == 2) and np.all(flat["w"] < 2)


@every_backend
def test_a_frozen_group(backend):
    first, second = np.ones(3), np.ones(3)
    opt = fastopt.adam(
        [{"params": first}, {"params": second, "frozen": True}], backend=backend
    )
    grads = [np.ones(3), np.ones(3)]
    opt.step(grads)
    assert np.all(second == 1) and np.all(first != 1) and opt.groups[1].frozen
    assert not opt.state["m"][1].any()
    opt.groups[1].frozen = False
    opt.step(grads)
    assert np.all(second != 1)
    with pytest.raises(TypeError, match="True or False"):
        opt.groups[0].frozen = 1


def test_frozen_may_be_numpys():
    first, second = np.ones(3), np.ones(3)
    flags = [np.bool_(False), np.bool_(True)]
    groups = [
        {"params": p, "frozen": flag}
        for p, flag in zip((first, second), flags, strict=True)
    ]
    opt = fastopt.sgd(groups, lr=0.5)
    opt.step([np.ones(3)] * 2)
    assert np.all(first == 0.5) and np.all(second == 1)
    opt.groups[0].frozen, opt.groups[1].frozen = flags[::-1]
    opt.step([np.ones(3)] * 2)
    assert np.all(first == 0.5) and np.all(second == 0.5)
    assert [group.frozen for group in opt.groups] == [True, False]
    opt.add_group({"params": np.ones(2), "frozen": np.bool_(True)})
    assert opt.groups[2].frozen is True
    saved = opt.state_dict()
    for group in saved["groups"]:
        group["frozen"] = np.bool_(not group["frozen"])
    opt.load_state_dict(saved)
    assert [group.frozen for group in opt.groups] == [False, True, False]


@every_backend
@every_rule
def test_parameters_added_later(rule, backend):
    """The old go on as if nothing had happened; the new have state of their own."""
    if rule.measure is not None and rule.over == "all":
        pytest.skip("the new take part in the rule's norms")
    params, alone = arrays(0), arrays(0)
    opt, other = (
        rule(p, lr=0.01, backend=backend, ema=0.5, weight_decay_mask=mask)
        for p, mask in ((params, None), (alone, None))
    )
    for k in range(2):
        opt.step(arrays(k + 1))
        other.step(arrays(k + 1))
    new = np.ones(7, np.float32)
    opt.add_group({"params": {"new": new}, "lr": 0.05})
    assert opt.groups[1]["lr"] == 0.05 and opt.groups[0]["lr"] == 0.01
    for k in range(2):
        opt.step([arrays(k + 5), {"new": np.ones(7, np.float32)}])
        other.step(arrays(k + 5))
    assert all(map(same_bits, alone, params))
    assert not np.all(new == 1) or rule.name == "schedule_free_radam"  # still silent
    for name, buffers in other.state.items():
        assert all(map(same_bits, buffers, opt.state[name]))
        assert opt.state[name][-1].shape == (7,)
    assert all(map(same_bits, other.ema_params, opt.ema_params[0]))
    assert opt.ema_params[1]["new"].shape == (7,)


def test_a_group_that_does_not_fit_changes_nothing():
    w = np.ones(3)
    opt = fastopt.adam(w)
    for bad in ({"params": w}, {"params": np.ones(3, np.float32)}):
        with pytest.raises((ValueError, TypeError)):
            opt.add_group(bad)
    with pytest.raises(TypeError, match="no hyperparameter"):
        opt.add_group({"params": np.ones(2), "momentum": 1})
    with pytest.raises(TypeError, match='a dict with "params"'):
        opt.add_group([np.ones(2)])
    assert len(opt.groups) == 1
    opt.step(np.ones(3))


# Saving -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 4])
@every_case
def test_a_run_goes_on_exactly(rule, values, stop):
    """From a saved state, on another backend, at any step."""

    def more(opt, steps):
        for k in steps:
            opt.accumulate(arrays(20 + k))
            opt.step(clip_norm=50.0)

    params, again = arrays(0), arrays(0)
    opt = rule(params, backend="numpy", ema=0.9, **values)
    more(opt, range(stop))
    opt.accumulate(arrays(50))
    saved = opt.state_dict()
    for new, old in zip(again, params, strict=True):
        new[...] = old
    opt.step()
    more(opt, range(stop, 6))
    other = rule(again, backend=BACKENDS[-1], ema=0.5)
    other.load_state_dict(saved)
    other.ema = 0.9
    other.step()
    more(other, range(stop, 6))
    assert all(map(same_bits, everything(opt, params), everything(other, again)))
    assert opt.steps == other.steps == 7


# Sums ---------------------------------------------------------------------------------


def test_sums_are_exact_enough_and_in_order():
    rng = np.random.default_rng(0)
    for size in (0, 1, 31, 32, 33, 4095, 4096, 4097, 20_000):
        values = nonzero(rng, size, np.float32)
        exact = math.fsum(values.tolist())
        scale = math.fsum(np.abs(values).tolist())
        assert abs(sum_in_order(values) - exact) <= 1e-13 * scale


def total(p, g):
    return (g, p * g)


def kept(t, n, sum_of_g, sum_of_pg, lr):
    return (lr * sum_of_g / n,)


def shifted(p, g, shift):
    return (p - shift,)


def test_a_rule_that_measures():
    """Over each array and over all of them; and a wrong order of sums is noticed."""
    params, grads = arrays(0), arrays(1)
    for over in ("segment", "all"):
        rule = Rule(
            shifted, lambda t, lr=0.1: (lr,), measure=total, settle=kept, over=over
        )
        for backend in ("numpy", *(["numba"] if NUMBA else [])):
            found = copies(params)
            rule(found, backend=backend).step(grads)
            whole = sum(map(sum_in_order, grads)) / sum(SIZES)
            for p, old, g in zip(found, params, grads, strict=True):
                if g.size:
                    mean = whole if over == "all" else sum_in_order(g) / g.size
                    wanted = old - np.float32(0.1 * mean)
                    np.testing.assert_allclose(p, wanted, rtol=1e-6)


def test_a_measure_that_does_not_fit():
    scalars = lambda t, lr=0.1: (lr,)  # noqa: E731
    with pytest.raises(TypeError, match="belong together"):
        Rule(shifted, scalars, measure=total)
    with pytest.raises(ValueError, match="over must be"):
        Rule(shifted, scalars, measure=total, settle=kept, over="group")
    rule = Rule(shifted, scalars, measure=lambda p, g: g, settle=kept)
    with pytest.raises(TypeError, match="measure of .* must return a tuple"):
        rule(np.ones(3), backend="numpy")
    rule = Rule(shifted, lambda t, c, lr=0.1: (lr, c), carry={"c": 1.0})
    with pytest.raises(TypeError, match="must take the carry"):
        Rule(shifted, scalars, carry={"c": 1.0})
    with pytest.raises(ValueError, match="not in state"):
        Rule(shifted, scalars, starts={"z": "p"})


# What a review found ------------------------------------------------------------------


class Fresh:
    """A gradient whose memory is made when it is asked for, and nobody else keeps."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **how):
        return self.array.copy().__dlpack__(**how)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@every_backend
def test_what_is_taken_is_kept_until_it_is_read(backend):
    size = 10_000_003  # so large that it is given back to the system at once
    p, g = np.zeros(size), np.random.default_rng(0).standard_normal(size)
    opt = fastopt.gd(p, lr=1.0, backend=backend)
    opt.accumulate(Fresh(g))
    opt.step()
    assert np.array_equal(p, -g)


@every_backend
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_what_was_accumulated_in_a_frozen_group_is_gone(backend, nonfinite):
    params = [np.zeros(3), np.zeros(3)]
    opt = fastopt.gd([{"params": p} for p in params], lr=1.0, backend=backend)
    opt.groups[1].frozen = True
    opt.accumulate(
        [np.full(3, np.inf if nonfinite == "skip" else 1.0), np.full(3, 9.0)]
    )
    opt.step(nonfinite=nonfinite)
    opt.groups[1].frozen = False
    opt.accumulate([np.ones(3), np.ones(3)])
    opt.step()
    assert np.all(params[1] == -1)


def test_all_is_serial_in_a_forked_child():
    """OpenMP's threads do not survive a fork; waiting for them never ends."""
    code = """
import os, signal, numpy as np, fastopt
n = 400_000
def opts():
    yield fastopt.Lookahead(fastopt.adamw(np.ones(n), threads=2), k=1), np.ones(n)
    yield fastopt.sophia_g(np.ones(n), threads=2), np.ones(n)
    yield fastopt.Muon(np.ones((500, n // 500)), threads=2), np.ones((500, n // 500))
def use(opt, g):
    opt.step(g, clip_norm=1.0)
    opt.accumulate(g)
    opt.step()
    if hasattr(opt, "estimate") and type(opt) is fastopt.Optimizer:
        opt.estimate(g)
made = list(opts())
for opt, g in made:
    use(opt, g)
child = os.fork()
if not child:
    signal.alarm(30)
    for opt, g in made:
        use(opt, g)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_state_is_saved_between_steps():
    p = np.zeros(300_000)
    opt = fastopt.adamw(p, beta2=0.9999)
    stop = threading.Event()

    def step():
        g = np.ones_like(p)
        while not stop.is_set():
            with contextlib.suppress(RuntimeError):  # it is being saved
                opt.step(g)
            time.sleep(1e-4)  # or there would be no moment between two steps

    thread = threading.Thread(target=step)
    thread.start()
    try:
        looked, until = 0, time.monotonic() + 20
        while looked < 50 and time.monotonic() < until:
            with contextlib.suppress(RuntimeError):  # a step is under way
                saved = opt.state_dict()
                (v,) = saved["state"]["v"]  # of gradients that are all 1
                np.testing.assert_allclose(v, 1 - 0.9999 ** saved["steps"], rtol=1e-9)
                looked += 1
    finally:
        stop.set()
        thread.join()


def test_a_mask_is_asked_about_new_arrays_only():
    params = {"w": np.ones(2), "b": np.ones(2)}
    opt = fastopt.sgdw(
        params, lr=1.0, weight_decay=0.5, weight_decay_mask=lambda n, a: n != "['b']"
    )
    opt.add_group({"params": np.ones(2)})
    opt.step([{"w": np.zeros(2), "b": np.zeros(2)}, np.zeros(2)])
    assert np.all(params["b"] == 1) and np.all(params["w"] == 0.5)
    mask = {"w": True, "b": False}
    opt = fastopt.sgdw(params, weight_decay_mask=mask)
    with pytest.raises(ValueError, match="make the optimizer with a callable"):
        opt.add_group({"params": np.ones(2)})


def test_a_number_about_all_arrays_is_the_new_groups_too():
    rng = np.random.default_rng(0)
    opt = fastopt.prodigy(rng.standard_normal(50), d0=1e-3)
    for _ in range(20):
        opt.step(rng.standard_normal(50))
    opt.add_group({"params": np.ones(3)})
    d = opt.state_dict()["carry"]
    assert d[0] == d[1] and d[0][0] > 1e-3


def test_the_decay_of_the_average_is_saved():
    opt = fastopt.gd(np.ones(2), ema=0.9)
    opt.ema = 0.5
    other = fastopt.gd(np.ones(2), ema=0.9)
    other.load_state_dict(opt.state_dict())
    assert other.ema == 0.5


def test_parameters_that_were_set_before_the_first_step_are_evaluated():
    p = np.ones(2)
    opt = fastopt.schedule_free_sgd(p)
    p[:] = 5
    assert np.all(opt.eval_params() == 5)


def test_evaluate_with_norms_of_each_array():
    rule = fastopt.Rule(
        update=lambda p, g, lr: (p - lr * g,),
        scalars=lambda t, lr=0.1: (lr,),
        measure=lambda p, g: (wide(g) * wide(g),),
        settle=lambda t, n, gg, lr: (lr,),
        evaluate=lambda p, lr: p + lr,
        name="with_all",
    )
    opt = rule([np.ones(2), np.zeros(3)], lr=0.5, backend="numpy")
    first, second = opt.eval_params()
    assert np.all(first == 1.5) and np.all(second == 0.5)


def of_estimates():
    """A rule whose estimate adds to a buffer that starts at a hyperparameter."""
    added = fastopt.Rule(
        lambda p, g, lr: (p + g,), lambda t, lr=0.1, first=2.0: (lr,), name="added"
    )
    return fastopt.Rule(
        lambda p, g, h, z, lr: (z - lr * g * h, h, z),
        lambda t, lr=0.1, first=2.0: (lr,),
        state=("h", "z"),
        starts={"h": "first", "z": "p"},
        name="estimated",
        estimate=("h", added),
    )


def test_an_estimate_takes_the_hyperparameters_of_its_rule():
    estimate = of_estimates().estimate[1]
    given = {"update": lambda p, g, h, lr: (p - lr * g * h, h), "state": ("h",)}
    with pytest.raises(TypeError, match=r"same hyperparameters, lr, .* lr, first"):
        fastopt.Rule(scalars=lambda t, lr=0.1: (lr,), estimate=("h", estimate), **given)
    with pytest.raises(ValueError, match="'v' is not in state"):
        fastopt.Rule(
            scalars=lambda t, lr=0.1, first=1.0: (lr,),
            estimate=("v", estimate),
            **given,
        )


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_an_estimate_before_the_first_step_stays(backend, saved):
    w = np.zeros(3)
    opt = of_estimates()(w, backend=backend)
    opt.first = 1.0
    opt.estimate(np.full(3, 5.0))
    opt.estimate(np.full(3, 2.0))
    if saved:
        state = opt.state_dict()
        opt = of_estimates()(w, backend=backend)
        opt.load_state_dict(state)
    w[:] = 4.0  # the parameters may get their values later than that
    opt.step(np.ones(3))
    assert (opt.state["h"][0] == 8.0).all() and (w == 4.0 - 0.1 * 8.0).all()


@every_backend
def test_an_estimate_is_refused_and_frozen_as_a_step_is(backend):
    params = [np.ones(3), np.ones(3)]
    opt = fastopt.sophia_g([{"params": p} for p in params], backend=backend)
    with pytest.raises(ValueError, match="overlaps the parameters"):
        opt.estimate([np.ones(3), params[0]])
    opt.groups[1].frozen = True
    opt.estimate([np.ones(3), np.ones(3)])
    (h, frozen) = opt.state[fastopt.sophia_g.estimate[0]]
    assert h.all() and not frozen.any()
