"""Parameters that are changed after an optimizer was made for them; and gradients that
two of them share."""

import re
from typing import Any

import numpy as np
import pytest

import fastopt

BACKENDS = ["numpy", "cython", "numba"]
OPTIONS: list[dict[str, Any]] = [{}, {"clip_norm": 0.5}, {"zero_grads": True}]


def read_only(w):
    w.setflags(write=False)
    return lambda: w.setflags(write=True)


def other_shape(w):
    shape = w.shape
    w.shape = (3, 2)

    def undo():
        w.shape = shape

    return undo


def other_dtype(w):
    dtype = w.dtype
    w.dtype = np.int32 if dtype == np.float32 else np.int64

    def undo():
        w.dtype = dtype

    return undo


def other_order(w):
    dtype = w.dtype
    w.dtype = dtype.newbyteorder()

    def undo():
        w.dtype = dtype

    return undo


def other_strides(w):
    strides = w.strides
    w.strides = strides[1], 2 * strides[1]

    def undo():
        w.strides = strides

    return undo


CHANGES = {
    read_only: (ValueError, "read-only"),
    other_shape: (ValueError, "shape"),
    other_dtype: (TypeError, "dtype"),
    other_order: (TypeError, "dtype"),
    other_strides: (ValueError, "strides"),
}
WARNED = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def arrays(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(2, 3)).astype(dtype),
        "b": rng.normal(size=5).astype(dtype),
    }


def gradients(params):
    return {name: np.cos(3 * value) for name, value in params.items()}


@WARNED
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "Adafactor", "Muon"])
def test_a_changed_parameter_is_not_written(backend, change, options, name):
    make = getattr(fastopt, name)
    params, others = arrays(), arrays()
    opt = make(params, lr=0.03, backend=backend)
    same = make(others, lr=0.03, backend=backend)
    for one, all_of in ((opt, params), (same, others)):
        for _ in range(2):
            one.step(gradients(all_of), **options)
    grads = gradients(params)
    kept = {key: grad.copy() for key, grad in grads.items()}
    undo = change(params["w"])
    kind, word = CHANGES[change]
    for _ in range(2):
        with pytest.raises(kind, match=re.escape("params['w']") + f".*{word}.*nothing"):
            opt.step(grads, **options)
    undo()
    for key, other in others.items():
        np.testing.assert_array_equal(params[key], other)
        np.testing.assert_array_equal(grads[key], kept[key])
    assert opt.steps == 2
    opt.step(grads, **options)
    same.step(gradients(others), **options)
    for key, other in others.items():
        np.testing.assert_array_equal(params[key], other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_written_may_be_read_only(backend):
    params = arrays()
    opt = fastopt.adamw(params, lr=0.03, backend=backend)
    opt.step(gradients(params))
    before = params["w"].copy(), params["b"].copy()
    params["w"].setflags(write=False)
    opt.step({"w": None, "b": gradients(params)["b"]})
    opt.load_state_dict(opt.state_dict())
    assert opt.eval_params() is params
    np.testing.assert_array_equal(params["w"], before[0])
    assert (params["b"] != before[1]).all()
    with pytest.raises(ValueError, match="read-only"):
        opt.step(gradients(params))


@WARNED
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_doors(backend):
    params = arrays()
    opt = fastopt.schedule_free_adamw(params, lr=0.03, backend=backend)
    opt.step(gradients(params))
    grads, saved = gradients(params), opt.state_dict()
    undo = other_shape(params["w"])
    doors = [
        opt.eval_params,
        opt.state_dict,
        lambda: opt.load_state_dict(saved),
        lambda: opt.add_group({"params": np.ones(2)}),
        lambda: opt.step(grads),
    ]
    for door in doors:
        with pytest.raises(ValueError, match="had shape"):
            door()
    undo()
    opt.accumulate(grads)
    undo = other_shape(params["w"])
    with pytest.raises(ValueError, match="had shape"):
        opt.step()
    undo()
    opt.step()
    assert opt.steps == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_that_are_seen_through_others(backend):
    """Of a subclass, a FlatBuffer's, and those that come later."""
    mine = np.ones(4).view(np.recarray)
    flat = fastopt.flatten(arrays())
    later = np.ones(3)
    cases = [
        (fastopt.sgd(mine, lr=0.5, backend=backend), mine, np.ones(4)),
        (fastopt.sgd(flat, lr=0.5, backend=backend), flat.data, flat.zeros_like()),
        (fastopt.sgd(flat, lr=0.5, backend=backend), flat["w"], flat.zeros_like()),
    ]
    opt = fastopt.sgd([{"params": np.ones(2)}], lr=0.5, backend=backend)
    opt.add_group({"params": later, "lr": 0.5})
    opt.step([np.ones(2), np.ones(3)])
    cases.append((opt, later, [np.ones(2), np.ones(3)]))
    for one, array, grads in cases:
        one.step(grads)
        array.setflags(write=False)
        with pytest.raises(ValueError, match="read-only"):
            one.step(grads)
        array.setflags(write=True)
        one.step(grads)
    np.testing.assert_array_equal(mine, np.zeros(4))
    np.testing.assert_array_equal(later, np.full(3, -0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_under_the_core(backend):
    torch = pytest.importorskip("torch")
    t = torch.ones(4, dtype=torch.float64)
    opt = fastopt.sgd(t, lr=0.25, backend=backend)
    opt.step(np.ones(4))
    held = t.data
    # Torch may negate a tensor by a bit, and leave its memory as it is.
    negated = torch._neg_view(held)
    changed = {"other memory": torch.zeros_like(t), "another sign": negated}
    for message, t.data in changed.items():
        for options in ({}, {"clip_norm": 1.0}):
            with pytest.raises(ValueError, match=message):
                opt.step(np.ones(4), **options)
        with pytest.raises(ValueError, match=message):
            opt.state_dict()
    t.data = held
    opt.step(np.ones(4))
    assert t.tolist() == [0.5] * 4
    t.resize_(100000)
    with pytest.raises(ValueError, match="shape"):
        opt.step(np.ones(4))


SHARED = ["step", "tasks", "muon", "lookahead", "adafactor"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("door", SHARED)
def test_a_shared_gradient_is_not_set_to_zero(backend, door):
    """The second of two parameters would step with zeros."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 3, 2))
    make = {"muon": fastopt.Muon, "adafactor": fastopt.Adafactor}.get(
        door, fastopt.adam
    )
    opt: Any = make([a, b], lr=0.1, backend=backend)
    if door == "lookahead":
        opt = fastopt.Lookahead(opt)
    grad = rng.normal(size=(3, 2))
    more: dict[str, Any] = {"weights": [0.5, 2.0]} if door == "tasks" else {}
    grads: Any = [[grad, grad.copy()], [grad, None]] if more else [grad, grad]
    before = a.copy(), b.copy(), grad.copy()
    with pytest.raises(ValueError, match="overlap in memory"):
        opt.step(grads, zero_grads=True, **more)
    for now, then in zip((a, b, grad), before, strict=True):
        np.testing.assert_array_equal(now, then)
    opt.step(grads, **more)  # without, it is read twice
    assert (a != before[0]).all() and (b != before[1]).all()
