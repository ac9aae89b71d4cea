"""Bad input: the right exception, a message that names the argument, no write."""

import copy
import math
import pickle

import numpy as np
import pytest
from cases import CASES
from installed import needs_numba

import fastopt
from fastopt import backends
from fastopt.memory.arrays import on_device
from fastopt.optimizer import checks, gradients

CPU_BACKENDS = ("numpy", "cython", "numba")


def weights():
    return {"w": np.ones((3, 4), np.float32), "b": np.ones(5, np.float32)}


def grads():
    return {"w": np.full((3, 4), 2, np.float32), "b": np.full(5, 2, np.float32)}


def readonly(array):
    array.flags.writeable = False
    return array


def misaligned(size, dtype):
    itemsize = np.dtype(dtype).itemsize
    raw = np.zeros(size * itemsize + 1, np.uint8)
    return raw[1:].view(dtype)


SHARED = np.ones(10, np.float32)

BAD_PARAMS = {
    "empty list": ([], ValueError, "params is empty"),
    "empty dict": ({}, ValueError, "params is empty"),
    "a number": (1.0, TypeError, "params must be an array"),
    "a list of numbers": ([1.0, 2.0], TypeError, r"params\[0\] must be an array"),
    "a scalar": (np.float32(1), TypeError, "params must be an array"),
    "None": (None, TypeError, "params must be an array"),
    "integers": (np.ones(3, np.int64), TypeError, "params has dtype int64"),
    "swapped half": (np.ones(3, ">f2"), TypeError, "params has dtype >f2"),
    "swapped": (np.ones(3, ">f4"), TypeError, "params has dtype >f4"),
    "mixed": (
        {"a": np.ones(3, np.float32), "b": np.ones(3)},
        TypeError,
        r"params\['b'\] has dtype float64 but params\['a'\] is computed in float32",
    ),
    "strided": (np.ones(8)[::2], ValueError, "params is not C-contiguous"),
    "transposed": (np.ones((2, 3)).T, ValueError, "params is not C-contiguous"),
    "misaligned": (misaligned(4, np.float32), ValueError, "params is not aligned"),
    "read-only": (readonly(np.ones(3)), ValueError, "params is read-only"),
    "twice": ([SHARED, SHARED], ValueError, r"params\[0\] and params\[1\] overlap"),
    "overlapping": (
        {"a": SHARED[:6], "b": SHARED[5:]},
        ValueError,
        r"params\['a'\] and params\['b'\] overlap",
    ),
    "in two groups": (
        [{"params": SHARED}, {"params": [SHARED[3:]]}],
        ValueError,
        r"params\[0\] and params\[1\]\[0\] overlap",
    ),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", BAD_PARAMS)
def test_params(case, backend):
    params, error, message = BAD_PARAMS[case]
    with pytest.raises(error, match=message):
        fastopt.adamw(params, backend=backend)


def with_w(value):
    return {**grads(), "w": value}


BAD_GRADS = {
    "an array": (np.ones(3), TypeError, "grads must be a dict like params"),
    "a list": ([1, 2], TypeError, "grads must be a dict like params, got list"),
    "a key lacks": ({"w": grads()["w"]}, ValueError, "it lacks 'b'"),
    "a key too many": ({**grads(), "x": 1}, ValueError, "it has extra 'x'"),
    "dtype": (
        with_w(np.ones((3, 4))),
        TypeError,
        r"grads\['w'\] has dtype float64 but params\['w'\] has float32",
    ),
    "shape": (
        with_w(np.ones((4, 3), np.float32)),
        ValueError,
        r"grads\['w'\] has shape \(4, 3\) but params\['w'\] has \(3, 4\)",
    ),
    "flat": (with_w(np.ones(12, np.float32)), ValueError, r"has shape \(12,\)"),
    "strided": (
        with_w(np.ones((3, 8), np.float32)[:, ::2]),
        ValueError,
        r"grads\['w'\] is not C-contiguous",
    ),
    "transposed": (
        with_w(np.ones((4, 3), np.float32).T),
        ValueError,
        r"grads\['w'\] is not C-contiguous",
    ),
    "misaligned": (
        with_w(misaligned(12, np.float32).reshape(3, 4)),
        ValueError,
        r"grads\['w'\] is not aligned",
    ),
    "a number": (with_w(1.0), TypeError, r"grads\['w'\] must be an array"),
    "a list inside": (with_w([1.0]), TypeError, r"grads\['w'\] must be an array"),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", BAD_GRADS)
def test_grads_are_refused_before_anything_is_written(case, backend):
    bad, error, message = BAD_GRADS[case]
    params = weights()
    # "b" comes first: a step that checks as it goes would have written it already.
    params = {"b": params["b"], "w": params["w"]}
    opt = fastopt.adamw(params, backend=backend)
    opt.step(grads())
    before, saved = copy.deepcopy(params), opt.state_dict()
    with pytest.raises(error, match=message):
        opt.step(bad)
    assert all(np.array_equal(params[name], before[name]) for name in params)
    assert all(
        np.array_equal(a, b)
        for name in saved["state"]
        for a, b in zip(saved["state"][name], opt.state[name], strict=True)
    )
    assert opt.steps == 1
    opt.step(grads())  # and it goes on
    assert opt.steps == 2


@pytest.mark.parametrize("mutant", ["does not check", "writes before it checks"])
def test_a_lax_step_is_caught(monkeypatch, mutant):
    """The test above fails for a step that accepts, or refuses too late."""
    if mutant == "does not check":
        monkeypatch.setattr(checks, "check_grad", lambda *given: None)
    else:
        fit = gradients.fit

        def late(params, *rest):
            params.arrays[0][:] = 0
            return fit(params, *rest)

        monkeypatch.setattr(gradients, "fit", late)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        test_grads_are_refused_before_anything_is_written("dtype", "numpy")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_that_overlap_parameters(backend):
    room = np.ones(20, np.float32)
    first, second = room[2:8], room[12:15]
    opt = fastopt.gd([first, second], backend=backend)
    for grad in (room[2:8], room[0:6], room[7:13], room[9:15]):
        with pytest.raises(ValueError, match=r"grads\[0\] overlaps the parameters"):
            opt.step([grad, None])
    assert np.all(room == 1)
    opt.step([None, room[8:11]])  # between them is fine, up to both edges
    opt.step([None, room[15:18]])
    assert opt.steps == 2


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_that_overlap_the_state(backend):
    opt = fastopt.adamw([np.ones(4), np.ones(3)], backend=backend)
    for grad in (opt.state["m"][0], opt.state["v"][0]):
        with pytest.raises(ValueError, match=r"grads\[0\] overlaps the parameters or"):
            opt.step([grad, None])
    assert opt.steps == 0


@needs_numba
def test_number_too_large_for_the_dtype():
    with pytest.raises(ValueError, match="lr is 1e\\+39, too large for float32"):
        fastopt.gd(np.ones(3, np.float32), lr=1e39)
    with pytest.raises(ValueError, match="lr must be finite"):
        fastopt.gd(np.ones(3), lr=10**400)
    with pytest.raises(TypeError, match="must return numbers, got None"):
        fastopt.Rule(lambda p, g, a: (p,), lambda t: (None,))(np.ones(3))


def test_a_rule_that_fails_leaves_all_as_it_was():
    def scalars(t, lr=1.0):
        return (lr,)

    rule = fastopt.Rule(fails_for_three, scalars)
    params = [np.ones(2), np.ones(3)]
    with pytest.raises(TypeError, match="ambiguous"):
        rule(params, backend="numpy")
    assert all(np.all(p == 1) for p in params)


def fails_for_three(p, g, lr):
    return (p - lr if g > lr else p + lr,)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_number_of_gradients(backend):
    opt = fastopt.gd([np.ones(2), np.ones(3)], backend=backend)
    for wrong in ([np.ones(2)], [np.ones(2), np.ones(3), None]):
        with pytest.raises(ValueError, match="entries but params has 2"):
            opt.step(wrong)
    with pytest.raises(TypeError, match="grads must be a list like params"):
        opt.step(np.ones(2))


# What may be below 0: no formula breaks, and no one's code forbids it.
UNBOUNDED = {"dampening", "nu1", "lambd", "alpha", "t0", "momentum_decay", "gamma", "r"}
UNBOUNDED |= {"alpha_warmup", "beta3_warmup", "warmup_steps"}  # then there is none


@pytest.mark.parametrize(("rule", "values"), CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_every_bounded_hyperparameter(rule, values, bad):
    names = {name for name in values if not isinstance(values[name], bool)}
    if bad == -1:
        names -= UNBOUNDED
    param = np.ones(3)
    for name in names:
        with pytest.raises(ValueError, match=rf"\b{name}\b.* must be"):
            rule(param, **{**values, name: bad})
        opt = rule(param, **values)
        with pytest.raises(ValueError, match=rf"\b{name}\b.* must be"):
            setattr(opt, name, bad)
        assert getattr(opt, name) == values[name]
    assert np.all(param == 1)


BAD_HYPERPARAMETERS = {
    "beta of one": ({"beta1": 1.0}, ValueError, r"^beta1 must be in \[0, 1\)"),
    "text": ({"lr": "0.1"}, TypeError, "^lr must be a number, got '0.1'"),
    "None": ({"lr": None}, TypeError, "^lr must be a number"),
    "array": ({"lr": np.ones(1)}, TypeError, "^lr must be a number"),
    "flag for a number": ({"eps": True}, TypeError, "^eps must be a number"),
    "unknown": ({"betas": (0.9, 0.99)}, TypeError, "no hyperparameter 'betas'; it has"),
    "schedule": ({"lr": lambda n: -1.0}, ValueError, r"^lr\(0\) must be at least 0"),
}


@pytest.mark.parametrize("case", BAD_HYPERPARAMETERS)
def test_hyperparameters(case):
    given, error, message = BAD_HYPERPARAMETERS[case]
    with pytest.raises(error, match=message):
        fastopt.adamw(np.ones(3), **given)
    with pytest.raises(
        error,
        match=message.replace("^", r'^groups\[1\]\["').replace(
            " must", '"?\\]? must', 1
        )
        if message.startswith("^") and "schedule" != case
        else "must|no hyper",
    ):
        fastopt.adamw([{"params": np.ones(3)}, {"params": np.ones(2), **given}])


def test_conditions_of_a_rule():
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0"):
        fastopt.sgd(np.ones(3), nesterov=True)
    with pytest.raises(TypeError, match="nesterov must be True or False, got 1"):
        fastopt.sgd(np.ones(3), momentum=0.9, nesterov=1)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        fastopt.rmsprop(np.ones(3), alpha=1.5)
    opt = fastopt.sgd(np.ones(3), momentum=0.9, nesterov=True)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        opt.momentum = 0.0
    assert opt.momentum == 0.9


def test_a_change_for_all_groups_happens_in_all_or_none():
    opt = fastopt.sgd(
        [{"params": np.ones(2)}, {"params": np.ones(2), "nesterov": True}], momentum=0.5
    )
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        opt.momentum = 0.0
    assert [group["momentum"] for group in opt.groups] == [0.5, 0.5]


def test_a_misspelt_hyperparameter_is_not_swallowed():
    opt = fastopt.adamw(np.ones(3))
    with pytest.raises(AttributeError, match="no hyperparameter 'learning_rate'"):
        opt.learning_rate = 0.1
    with pytest.raises(AttributeError, match="no attribute 'learning_rate'"):
        opt.learning_rate  # noqa: B018
    with pytest.raises(TypeError, match="can be changed but not removed"):
        del opt.groups[0]["lr"]


def test_grad_scale():
    param = np.ones(3)
    opt = fastopt.gd(param)
    for bad, error in ((math.nan, ValueError), ("2", TypeError), (None, TypeError)):
        with pytest.raises(error, match="^grad_scale must be"):
            opt.step(np.ones(3), grad_scale=bad)
    assert np.all(param == 1) and opt.steps == 0


def test_a_schedule_that_fails_leaves_the_step_undone():
    param = np.ones(3)
    opt = fastopt.gd(param, lr=lambda n: 0.1 if n < 1 else math.nan)
    opt.step(np.ones(3))
    after = param.copy()
    with pytest.raises(ValueError, match=r"^lr\(1\) must be finite"):
        opt.step(np.ones(3))
    assert np.array_equal(param, after) and opt.steps == 1


def test_a_step_within_a_step():
    """As from two threads: the second is refused, and the first is done."""
    param, refused = np.ones(3), []

    def schedule(n):
        if n == 1 and not refused:
            with pytest.raises(
                RuntimeError, match="is in a step, in another"
            ) as caught:
                opt.step(np.ones(3))
            refused.append(caught)
        return 0.25

    opt = fastopt.gd(param, lr=schedule)
    opt.step(np.ones(3))
    opt.step(np.ones(3))
    assert refused and opt.steps == 2 and np.all(param == 0.5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scalars_that_change_their_number(backend):
    def scalars(t, lr=0.5):
        return (lr,) if t == 1 else (lr, lr, lr)

    mine = fastopt.Rule(fastopt.gd.update, scalars)
    param = np.ones(3)
    opt = mine(param, backend=backend)
    opt.step(np.ones(3))
    opt.step(np.ones(3))  # more than the kernel takes are cut off
    assert np.all(param == 0) and opt.steps == 2


def test_threads():
    for bad, error in (
        (0, ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        (True, TypeError),
        ("2", TypeError),
        (10**6, ValueError),
        (10**10, ValueError),
    ):
        with pytest.raises(error, match="^threads must be"):
            fastopt.gd(np.ones(3), threads=bad)
        with pytest.raises(error, match="^threads must be"):
            fastopt.gd(np.ones(3)).threads = bad


def test_backends():
    with pytest.raises(ValueError, match=r"backend must be one of .*got \['numpy'\]"):
        fastopt.sgd(np.ones(2), backend=["numpy"])
    with pytest.raises(ValueError, match="backend must be one of 'numpy', .*'opencl'"):
        fastopt.gd(np.ones(3), backend="opencl")

    def update(p, g, lr):
        return (p - lr * g,)

    mine = fastopt.Rule(update, fastopt.gd.scalars)
    with pytest.raises(
        ValueError, match="only for fastopt's own rules.*backend='numba'"
    ):
        mine(np.ones(3), backend="cython")


@needs_numba
def test_missing_backend_names_the_command(monkeypatch):
    from fastopt.backends import cython_cpu

    monkeypatch.setattr(cython_cpu, "missing", lambda: "nothing here; pip install it")
    with pytest.raises(RuntimeError, match="'cython' is not available.*pip install"):
        fastopt.gd(np.ones(3), backend="cython")
    with pytest.warns(RuntimeWarning, match="backend 'numba'.*because nothing here"):
        assert fastopt.gd(np.ones(3)).backend == "numba"


class Device:
    """What a GPU array shows of itself; nothing here touches its memory."""

    shape, dtype = (3,), np.dtype(np.float32)
    __cuda_array_interface__ = {
        "shape": (3,),
        "typestr": "<f4",
        "data": (0x1000, False),
        "version": 3,
    }


def test_device_arrays_and_host_arrays_do_not_mix():
    with pytest.raises(TypeError, match=r"params is on a GPU.*backend='cuda'"):
        fastopt.gd(Device(), backend="numpy")
    opt = fastopt.gd(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="grads is on a GPU"):
        opt.step(Device())


def test_a_missing_gpu_is_named():
    try:
        backends.load("cuda")
    except (RuntimeError, ImportError) as error:
        assert "cuda" in str(error)
    else:
        pytest.skip("this machine has a GPU")
    for params in (np.ones(3, np.float32), Device()):
        with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
            fastopt.gd(params, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
        fastopt.gd(Device())


def test_copies_of_an_optimizer_are_refused():
    opt = fastopt.gd(np.ones(3))
    for copy_of in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="give it this one's state_dict"):
            copy_of(opt)


def test_a_group_without_params():
    p, own = np.ones(2), {"params": np.ones(3)}
    words = r'params\[{}\] sets lr as a group does, but has no "params"; it has'
    for groups, at in (
        ([{"param": p, "lr": 0.1}], 0),
        ([{"lr": 1, "weights": p}], 0),
        ([own, {"parameters": [p], "lr": 0.1}], 1),
    ):
        for make in (fastopt.adamw, fastopt.Muon, fastopt.Adafactor):
            with pytest.raises(TypeError, match=words.format(at)):
                make(groups)
    opt = fastopt.gd([{"w": p, "lr": np.ones(2)}], lr=0.5)  # a parameter named so
    opt.step([{"w": p * 1.0, "lr": p * 1.0}])
    assert np.all(p == 0.5)


def test_generators_are_not_lists():
    with pytest.raises(TypeError, match="got generator; pass a list of arrays"):
        fastopt.gd(np.ones(3) for _ in range(2))


def test_refused_flat_buffers():
    with pytest.raises(ValueError, match="nothing to flatten"):
        fastopt.flatten({})
    with pytest.raises(TypeError, match=r"arrays\['a'\] must be a NumPy array"):
        fastopt.flatten({"a": 1.0})
    with pytest.raises(TypeError, match=r"arrays\['a'\] has dtype int64"):
        fastopt.flatten({"a": np.arange(3)})
    with pytest.raises(TypeError, match="flatten them in two buffers"):
        fastopt.flatten([np.ones(3), np.ones(3, np.float32)])
    flat = fastopt.flatten({"a": np.ones(3), "b": np.ones(2)})
    opt = fastopt.gd(flat)
    with pytest.raises(ValueError, match="another layout than params"):
        opt.step(fastopt.flatten({"a": np.ones(5)}))
    with pytest.raises(ValueError, match="overlaps the parameters"):
        opt.step(flat)
    assert on_device(flat.data) is False


def test_bfloat16_that_numpy_has_forgotten(tmp_path):
    """``np.load`` returns words without a dtype, which ``astype`` cannot convert."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    np.save(tmp_path / "p.npy", np.ones(3, ml_dtypes.bfloat16))
    loaded = np.load(tmp_path / "p.npy")
    with pytest.raises(TypeError, match=r"call \.view\(ml_dtypes\.bfloat16\)"):
        fastopt.gd(loaded)
    fastopt.gd(loaded.view(ml_dtypes.bfloat16), lr=0.5).step(np.ones(3, np.float32))
