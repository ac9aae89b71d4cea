"""Hyperparameters at their limits, where schedules bring them, and numbers that are too
large for a dtype; and parameters that are changed under an optimizer."""

import sys
from typing import Any

import numpy as np
import pytest

import fastopt

BACKENDS = ["numpy", "cython", "numba"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_ftrl_at_a_learning_rate_of_zero(backend, dtype, l2):
    """Parameters stay; both sums go on; without the term that is infinite there."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=7).astype(dtype)
    before, grads = w.copy(), rng.normal(size=(3, 7)).astype(dtype)
    opt = fastopt.ftrl(
        w, lr=lambda n: 0.0 if n < 2 else 0.1, l1=0.25, l2=l2, beta=0.5, backend=backend
    )
    for grad in grads[:2]:
        opt.step(grad)
    np.testing.assert_array_equal(w, before)
    squares, total = 0.1 + (grads[:2] ** 2).sum(0), grads[:2].sum(0)
    np.testing.assert_allclose(opt.state["accumulator"][0], squares, rtol=1e-5)
    np.testing.assert_allclose(opt.state["linear"][0], total, rtol=1e-5, atol=1e-6)
    opt.step(grads[2])
    root = np.sqrt(squares + grads[2] ** 2)
    z = total + grads[2] - (root - np.sqrt(squares)) / 0.1 * before
    expected = (np.clip(z, -0.25, 0.25) - z) / (root / 0.1 + 2 * l2 + 0.5 / 0.1)
    np.testing.assert_allclose(w, expected, rtol=1e-4, atol=1e-6)


# These go on by their own averages of past steps, or set a step's length themselves.
OTHERS = {"rprop", "laprop", "madgrad", "dadapt_adam"}
OTHERS |= {"schedule_free_sgd", "schedule_free_adamw", "schedule_free_radam"}


@pytest.mark.parametrize("backend", ["numpy", "cython"])
@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_a_schedule_may_pass_zero(rule, backend):
    """In the first step, as warm-ups begin, and later."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 5)).astype(np.float32)
    lr: dict[str, Any] = {"lr": lambda n: 0.0 if n % 2 == 0 else 1e-3}
    given = lr if "lr" in rule.hyperparameters else {}
    if rule.name == "adamc":  # a schedule that rises says how far
        given["max_lr"] = 1e-3
    opt = rule(w, backend=backend, **given)
    for step in range(6):
        before = w.copy()
        opt.step(rng.normal(size=(3, 5)).astype(np.float32))
        assert np.isfinite(w).all() and opt.steps == step + 1
        assert all(np.isfinite(a).all() for (a,) in opt.state.values())
        if step % 2 == 0 and "lr" in rule.hyperparameters and rule.name not in OTHERS:
            np.testing.assert_array_equal(w, before)


ZEROS = [
    (rule, key)
    for rule in fastopt.RULES
    for key in ("eps", "weight_decay", "momentum", "beta1", "beta2", "beta3", "alpha")
    if key in rule.hyperparameters
    # What is trained lies between two sequences, in the ratio that these say.
    and not (rule.name.startswith("schedule_free") and key in ("beta1", "momentum"))
]


@pytest.mark.parametrize(("rule", "key"), ZEROS, ids=lambda of: getattr(of, "name", of))
def test_a_schedule_may_bring_others_to_zero(rule, key):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 5)).astype(np.float32)
    first = rule.hyperparameters[key]
    opt = rule(w, **{key: lambda n: first if n % 2 == 0 else 0.0})
    for _ in range(4):
        opt.step(rng.normal(size=(3, 5)).astype(np.float32))
        assert np.isfinite(w).all()


# Numbers that are too large ---------------------------------------------------------


def assign(opt, lr):
    opt.lr = lr


TOO_LARGE = {
    "made": lambda opt, w: fastopt.gd(w, lr=1e39),
    "assigned": lambda opt, w: assign(opt, 1e39),
    "in a group": lambda opt, w: opt.groups[0].update(lr=1e39),
    "by item": lambda opt, w: opt.groups[0].__setitem__("lr", 1e39),
    "a schedule": lambda opt, w: assign(opt, lambda n: 1e39),
    "added": lambda opt, w: opt.add_group({"params": np.ones(2, w.dtype), "lr": 1e39}),
    "loaded": lambda opt, w: opt.load_state_dict(
        opt.state_dict() | {"groups": [{"lr": 1e39, "frozen": False}]}
    ),
    "grad_scale": lambda opt, w: opt.step(np.ones(3, w.dtype), grad_scale=1e39),
    "accumulated": lambda opt, w: opt.accumulate(np.ones(3, w.dtype), grad_scale=-1e39),
}


@pytest.mark.parametrize("door", TOO_LARGE)
def test_numbers_too_large_for_float32(door):
    w = np.ones(3, np.float32)
    opt = fastopt.gd(w, lr=0.5)
    with pytest.raises(ValueError, match=r"is -?1e\+39, too large for float32"):
        TOO_LARGE[door](opt, w)
    assert opt.lr == 0.5 and len(opt.groups) == 1 and w.tolist() == [1, 1, 1]
    opt.step(w.copy())
    assert w.tolist() == [0.5, 0.5, 0.5]
    fastopt.gd(np.ones(3), lr=1e39)  # in float64 it is a number as any


def test_a_schedule_that_grows_too_large_leaves_the_step_undone():
    w = np.ones(3, np.float32)
    opt = fastopt.gd(w, lr=lambda n: 0.5 if n < 1 else 1e39)
    opt.step(w.copy())
    with pytest.raises(ValueError, match=r"lr\(1\) is 1e\+39, too large for float32"):
        opt.step(w.copy())
    assert opt.steps == 1 and w.tolist() == [0.5, 0.5, 0.5]


def test_a_product_that_is_too_large_is_refused_when_it_is_assigned():
    opt = fastopt.adamw(np.ones(3, np.float32), weight_decay=1e20)
    with pytest.raises(ValueError, match="too large for float32"):
        opt.lr = 1e20
    assert opt.lr == 1e-3


# Parameters that are changed under an optimizer -------------------------------------


@pytest.mark.parametrize("kind", ["alone", "a view", "a subclass", "flat"])
def test_memory_of_parameters_is_not_resized(kind):
    """Steps would write to what was freed."""
    own = np.ones(8)
    param = {"a view": own[:4], "a subclass": own.view(np.matrix).T}.get(kind, own)
    if kind == "flat":
        flat = fastopt.flatten([own])
        own, opt = flat.data, fastopt.gd(flat)
    else:
        opt = fastopt.gd(np.ones(8) if kind == "a subclass" else param)
        own = opt._params.arrays[0] if kind == "a subclass" else own
    with pytest.raises(ValueError, match="cannot resize|does not own"):
        own.resize(1000, refcheck=False)
    assert own.shape == (8,) and opt.steps == 0


def test_arrays_can_be_resized_when_the_optimizer_is_gone():
    own = np.ones(8)
    opt = fastopt.gd(own)
    opt.step(np.ones(8))
    del opt
    own.resize(4, refcheck=False)
    assert own.shape == (4,)


def test_the_array_of_a_flat_buffer_stays():
    """Its views and the optimizer would go on with the old one. That of gradients may
    be replaced."""
    flat = fastopt.flatten({"w": np.ones(3), "b": np.ones(2)})
    opt = fastopt.gd(flat, lr=0.5)
    with pytest.raises(AttributeError, match="replaced; write into it"):
        flat.data = np.zeros(5)
    flat.data *= 2
    opt.step(flat.zeros_like())
    grads = flat.zeros_like()
    grads.data[:] = 1.0
    opt.step(grads)
    assert np.all(flat.data == 1.5) and np.all(flat["w"] == 1.5)
    grads.data = np.full(5, 3.0)
    opt.step(grads)
    assert np.all(flat.data == 0) and np.all(flat["w"] == 0)


@pytest.mark.parametrize("around", [lambda flat: flat, lambda flat: {"x": flat}])
def test_replaced_arrays_of_a_nested_flat_buffer_are_refused(around):
    """A step would take the buffer, and ignore the new array."""
    tree = {"layer": {"w": np.ones(2)}, "more": [np.ones(1), {"b": np.ones(3)}]}
    flat = fastopt.flatten(tree)
    opt = fastopt.gd(around(flat), lr=0.5)
    grads = flat.zeros_like()
    grads["layer"]["w"] += 1
    grads["more"][1]["b"][:] = 1
    opt.step(around(grads))
    places = [(grads["layer"], "w"), (grads["more"], 0), (grads["more"], 1)]
    for place, key in [*places, (grads["more"][1], "b")]:
        old, place[key] = place[key], np.full(2, 5.0)
        with pytest.raises(TypeError, match="replaced or removed; put the old one"):
            opt.step(around(grads))
        place[key] = old
    gone = grads["more"].pop()
    with pytest.raises(TypeError, match="replaced or removed"):
        opt.step(around(grads))
    grads["more"].append(gone)
    with pytest.raises(AttributeError, match="cannot be replaced"):
        grads.views = {}
    opt.step(around(grads))
    assert opt.steps == 2 and np.all(flat.data == [0, 0, 1, 0, 0, 0])


def test_adding_a_group_costs_what_is_in_it():
    """Counted are the calls that Python makes, for few groups and for many."""
    counts = []
    for groups in (20, 60):
        opt = fastopt.adamw([{"params": np.ones(3, np.float32)}], ema=0.9)
        opt.add_group({"params": np.ones(3, np.float32)})  # from one group to several
        opt.step([np.ones(3, np.float32)] * 2)
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        for number in range(groups):
            opt.add_group({"params": np.ones(3, np.float32), "lr": 0.1 + number})
        sys.setprofile(None)
        counts.append(calls / groups)
        grads = [np.ones(3, np.float32)] * (groups + 2)
        opt.step(grads)
        assert opt.steps == 2 and len(opt.state["m"]) == groups + 2
        assert [group["lr"] for group in opt.groups[2:]] == [
            0.1 + number for number in range(groups)
        ]
    assert counts[1] == pytest.approx(counts[0], rel=0.1)
