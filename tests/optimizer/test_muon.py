"""Muon against its definition in float64, and torch's, whose products are bfloat16."""

import functools
import inspect
import itertools
import math

import numpy as np
import peers
import pytest
from cases import same_bits
from installed import BACKENDS

import fastopt
from fastopt import muon as module

SHAPES = {"wide": (5, 9), "tall": (9, 4), "row": (1, 6), "b": (7,), "k": (2, 3, 2)}
MATRICES = ("wide", "tall", "row")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Off their defaults, all of them.
VALUES = {"lr": 0.03, "weight_decay": 0.2, "momentum": 0.8, "nesterov": False}
VALUES |= {"eps": 1e-3, "ns_steps": 3, "match_rms_adamw": True}
ADAMW = {"lr": 0.02, "beta1": 0.7, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.3}
OTHERS = {f"adamw_{name}": value for name, value in ADAMW.items()}


def draw(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in SHAPES.items()}


def part(tree, *names):
    return {name: tree[name] for name in names}


def unlike(a, b):
    return [name for name in a if not same_bits(a[name], b[name])]


def oracle(
    p, g, b, *, lr, weight_decay, momentum, nesterov, eps, ns_steps, match_rms_adamw
):
    """Jordan et al. 2024: the quintic acts on the singular values alone."""
    b = momentum * b + (1 - momentum) * g
    u = momentum * b + (1 - momentum) * g if nesterov else b
    left, s, right = np.linalg.svd(u, full_matrices=False)
    s = s / max(np.sqrt(np.sum(s**2)), eps)
    for _ in range(ns_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = p.shape
    factor = math.sqrt(max(1, rows / columns))
    if match_rms_adamw:
        factor = 0.2 * math.sqrt(max(rows, columns))
    return (1 - lr * weight_decay) * p - lr * factor * (left * s) @ right, b


@every_backend
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("match_rms_adamw", [True, False])
def test_agrees_with_its_definition(backend, nesterov, match_rms_adamw):
    params, expected = draw(0), draw(0)
    values = VALUES | {"nesterov": nesterov, "match_rms_adamw": match_rms_adamw}
    opt = fastopt.Muon(params, backend=backend, **values, **OTHERS)
    rest = part(expected, "b", "k")
    adamw = fastopt.adamw(rest, backend="numpy", **ADAMW)
    momenta = dict.fromkeys(MATRICES, 0.0)
    for t in range(1, 31):
        grads = draw(t)
        opt.step(grads)
        adamw.step(part(grads, *rest))
        for n in momenta:
            expected[n], momenta[n] = oracle(
                expected[n], grads[n], momenta[n], **values
            )
    for n in SHAPES:
        np.testing.assert_allclose(params[n], expected[n], rtol=1e-9, atol=1e-11)
    assert not unlike(rest, params)
    assert opt.steps == 30


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_backends_have_the_same_bits(dtype):
    found = []
    for backend in BACKENDS:
        params = draw(0, dtype)
        params["large"] = np.ones((300, 200), dtype)
        opt = fastopt.Muon(params, backend=backend, threads=2, **VALUES, **OTHERS)
        for t in range(1, 4):
            grads = draw(t, dtype)
            grads["large"] = np.random.default_rng(t).random((300, 200), dtype)
            opt.step(grads, clip_value=1.5, grad_scale=0.7)
        found.append({**params, "m": opt.state["m"][5], "v": opt.state["v"][4]})
    assert not any(unlike(found[0], other) for other in found[1:])


def torchs(values, match_rms_adamw):
    """The parameters after each step of torch's Muon, and AdamW for those that it does
    not take."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    params, steps = peers.draw()
    tensors = [torch.nn.Parameter(torch.from_numpy(p)) for p in params]
    adjust = "match_rms_adamw" if match_rms_adamw else "original"
    muon = torch.optim.Muon(tensors[:1], adjust_lr_fn=adjust, **values)
    adamw = torch.optim.AdamW(tensors[1:], lr=0.02, eps=1e-3, weight_decay=0.3)
    for t, grads in enumerate(steps):
        muon.param_groups[0]["lr"] = peers.falling(values["lr"], t)
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.from_numpy(grad.copy())
        muon.step()
        adamw.step()
        yield [p.copy() for p in params]


@pytest.mark.usefixtures("numbers_in_float64")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("match_rms_adamw", [True, False])
def test_torch_agrees(nesterov, match_rms_adamw, monkeypatch):
    """Once its products are of float64, not of bfloat16."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    values = VALUES | {"nesterov": nesterov}
    del values["match_rms_adamw"]
    ours = functools.partial(fastopt.Muon, match_rms_adamw=match_rms_adamw)
    ours.estimate = None
    options = {"adamw_lr": 0.02, "adamw_eps": 1e-3, "adamw_weight_decay": 0.3}
    theirs = torchs(values, match_rms_adamw)
    assert peers.difference(ours, values | options, theirs) <= 1e-10


def test_torch_agrees_to_the_precision_of_its_products():
    values = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    (w, _), steps = peers.draw()
    opt, theirs = fastopt.Muon(w, **values), torchs(values, False)
    for t, (grad, _) in enumerate(steps[:3]):
        opt.lr = peers.falling(0.1, t)
        opt.step(grad)
        expected, _ = next(theirs)
    np.testing.assert_allclose(w, expected, atol=0.02)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_products_are_the_array_librarys(shape):
    """A tensor goes through the same lines: on a GPU, torch or CuPy own the memory."""
    torch = pytest.importorskip("torch")
    ours = np.random.default_rng(0).standard_normal(shape)
    theirs = torch.from_numpy(ours.copy())
    module.orthogonalize(ours, 5, 1e-7)
    module.orthogonalize(theirs, 5, 1e-7)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)


@every_backend
def test_clipping_is_by_the_norm_of_all(backend):
    params, grads = draw(0), draw(1)
    norm = math.sqrt(sum(np.sum(g**2) for g in grads.values()))
    opt = fastopt.Muon(params, backend=backend)
    opt.step(grads, clip_norm=0.5)
    assert opt.grad_norm == pytest.approx(norm, rel=1e-12)
    expected = draw(0)
    other = fastopt.Muon(expected, backend=backend)
    other.step(grads, grad_scale=0.5 / (opt.grad_norm + 1e-6))
    assert not unlike(params, expected)


@every_backend
def test_clipping_by_value_is_before_the_momentum(backend):
    params, expected, grads = draw(0), draw(0), draw(1)
    fastopt.Muon(params, backend=backend, **VALUES).step(grads, clip_value=0.3)
    clipped = {n: np.clip(g, -0.3, 0.3) for n, g in grads.items()}
    fastopt.Muon(expected, backend=backend, **VALUES).step(clipped)
    assert not unlike(params, expected)


def test_what_is_not_finite():
    params, grads = draw(0), draw(1)
    before = {n: p.copy() for n, p in params.items()}
    opt = fastopt.Muon(params)
    grads["b"][-1] = math.inf
    with pytest.raises(FloatingPointError, match=r"in grads\['b'\]; nothing was"):
        opt.step(grads, nonfinite="raise")
    opt.step(grads, nonfinite="skip", zero_grads=True)
    assert opt.skipped == 1 and opt.steps == 0 and not grads["tall"].any()
    assert not unlike(params, before)


def test_none_leaves_alone_and_zeros_stay_finite():
    params = draw(0)
    before = {n: p.copy() for n, p in params.items()}
    opt = fastopt.Muon(params, weight_decay=0)
    opt.step({**draw(1), "wide": None, "b": None, "tall": np.zeros((9, 4))})
    assert not unlike(part(params, "wide", "b", "tall"), before)
    assert not same_bits(params["row"], before["row"])
    saved = opt.state_dict()["state"]
    opt.step({**dict.fromkeys(SHAPES), "wide": draw(2)["wide"]})
    for name, arrays in opt.state.items():
        assert [*map(same_bits, arrays, saved[name])] == [n != "wide" for n in SHAPES]


@every_backend
def test_matrices_of_any_size(backend):
    shapes = [(0, 5), (5, 0), (1, 1), (1, 40), (40, 1), (2, 3)]
    params = [np.ones(shape) for shape in shapes]
    opt = fastopt.Muon(params, backend=backend, weight_decay=0)
    opt.step([np.ones(shape) for shape in shapes])
    for p in params:
        assert np.all((0 < 1 - p) & (1 - p < 0.01))


def test_adamws_defaults_are_its_own():
    theirs = fastopt.adamw.hyperparameters.items()
    ours = module.muon.hyperparameters.items()
    assert {(f"adamw_{name}", value) for name, value in theirs} <= set(ours)
    taken = inspect.signature(fastopt.Muon).parameters
    assert all(taken[n].default == v for n, v in ours if n != "use_muon")


def test_only_matrices_or_none():
    w, b = np.eye(3), np.ones(3)
    fastopt.Muon(w).step(np.ones((3, 3)))
    opt, other = fastopt.Muon([b], **OTHERS), np.ones(3)
    opt.step([np.ones(3)])
    fastopt.adamw(other, **ADAMW).step(np.ones(3))
    assert same_bits(b, other) and opt.steps == 1
    with pytest.raises(ValueError, match="empty"):
        fastopt.Muon([])


@every_backend
def test_average_and_parts(backend):
    """The average is of all parameters; parts of gradients are their sum."""
    params, whole = draw(0), draw(0)
    how = {"lr": 0.03, "ema": 0.9, "backend": backend}
    opt, other = fastopt.Muon(params, **how), fastopt.Muon(whole, **how)
    expected = draw(0)
    for t in range(1, 4):
        first, second = draw(2 * t), draw(2 * t + 1)
        opt.accumulate(first)
        opt.accumulate(second, grad_scale=0.5)
        opt.step(clip_norm=1.0)
        other.step({n: first[n] + 0.5 * second[n] for n in SHAPES}, clip_norm=1.0)
        for n in SHAPES:
            expected[n] = 0.9 * expected[n] + 0.1 * params[n]
    assert not unlike(params, whole)
    assert opt.ema_params.keys() == SHAPES.keys()
    for n in SHAPES:
        np.testing.assert_allclose(opt.ema_params[n], expected[n], rtol=1e-12)
    with pytest.raises(TypeError, match="none have been accumulated"):
        opt.step()
    opt.accumulate(first)
    opt.drop_accumulated()
    with pytest.raises(TypeError, match="none have been accumulated"):
        opt.step()


def test_a_flat_buffers_matrices_are_matrices():
    params, grads = draw(0), draw(1)
    flat = fastopt.flatten(params)
    given = flat.zeros_like()
    for n in SHAPES:
        given[n][...] = grads[n]
    fastopt.Muon(params, lr=0.03).step(grads)
    opt = fastopt.Muon(flat, lr=0.03, ema=0.5)
    opt.step(given)
    assert not unlike(params, flat)
    assert opt.eval_params() is flat and opt.ema_params.shapes == flat.shapes


# Groups ---------------------------------------------------------------------------


def run(made, steps):
    """Steps of optimizers, each with parameters of its own; these as one dict."""
    for t in steps:
        for opt, names in made:
            grads = draw(t)
            given = [part(grads, *group) for group in names]
            opt.step(given if len(given) > 1 else given[0])


DEFAULTS = {**VALUES, **OTHERS}
OWN = [
    {},
    {"lr": 0.1, "momentum": 0.5, "nesterov": True, "adamw_lr": 0.1},
    {"ns_steps": 1, "eps": 1.0, "match_rms_adamw": False, "weight_decay": 0.0},
    {"adamw_beta1": 0.1, "adamw_beta2": 0.5, "adamw_eps": 0.1},
]
SPLITS = [[("wide", "b"), ("tall", "k", "row")], [("b",), ("wide", "tall"), ("k",)]]


@every_backend
@pytest.mark.parametrize("names", SPLITS, ids=["mixed", "apart"])
@pytest.mark.parametrize("own", OWN[1:])
def test_groups_are_as_optimizers_of_their_own(backend, names, own):
    together, apart = draw(0), draw(0)
    # A group's own lr is for matrices, which not every one has.
    given = [DEFAULTS | own if k == 1 else DEFAULTS for k in range(len(names))]
    groups = [
        {"params": part(together, *group), **(own if k == 1 else {})}
        for k, group in enumerate(names)
    ]
    opt = fastopt.Muon(groups, backend=backend, **DEFAULTS)
    others = [
        (fastopt.Muon(part(apart, *group), backend=backend, **values), [group])
        for group, values in zip(names, given, strict=True)
    ]
    run([(opt, names), *others], range(1, 6))
    assert not unlike(part(together, *itertools.chain(*names)), apart)


@every_backend
def test_a_group_whose_matrices_go_to_adamw(backend):
    params, expected = draw(0), draw(0)
    groups = [
        {"params": part(params, "wide", "b")},
        {"params": part(params, "tall"), "use_muon": False, "adamw_lr": 0.3},
    ]
    opt = fastopt.Muon(groups, backend=backend, **DEFAULTS)
    first = fastopt.Muon(part(expected, "wide", "b"), backend=backend, **DEFAULTS)
    second = fastopt.adamw(
        part(expected, "tall"), backend=backend, **ADAMW | {"lr": 0.3}
    )
    run(
        [
            (opt, [("wide", "b"), ("tall",)]),
            (first, [("wide", "b")]),
            (second, [("tall",)]),
        ],
        range(1, 6),
    )
    assert not unlike(part(params, "wide", "b", "tall"), expected)
    assert [group["use_muon"] for group in opt.groups] == [True, False]


@every_backend
@pytest.mark.parametrize("kind", ["callable", "tree"])
def test_a_mask_is_for_both_weight_decays(backend, kind):
    params, expected = draw(0), draw(0)
    spared = ("tall", "k")
    mask = {n: n not in spared for n in SHAPES}
    if kind == "callable":
        mask = lambda path, array: path not in ("['tall']", "['k']")  # noqa: E731
    opt = fastopt.Muon(params, backend=backend, weight_decay_mask=mask, **DEFAULTS)
    rest = [n for n in SHAPES if n not in spared]
    groups = [{"params": part(expected, *names)} for names in (rest, spared)]
    groups[1] |= {"weight_decay": 0.0, "adamw_weight_decay": 0.0}
    other = fastopt.Muon(groups, backend=backend, **DEFAULTS)
    run([(opt, [SHAPES]), (other, [rest, spared])], range(1, 4))
    assert not unlike(params, expected)


@every_backend
def test_a_frozen_group_stays_and_moves_on(backend):
    params, expected = draw(0), draw(0)
    names = [("wide", "b"), ("tall", "k")]
    groups = [{"params": part(params, *group)} for group in names]
    groups[1]["frozen"] = True
    opt = fastopt.Muon(groups, backend=backend, **DEFAULTS)
    other = fastopt.Muon(part(expected, *names[0]), backend=backend, **DEFAULTS)
    run([(opt, names), (other, names[:1])], [1, 2])
    assert not unlike(part(params, "wide", "b", "tall", "k"), expected)
    assert not opt.state["m"][2].any() and not opt.state["m"][3].any()
    opt.groups[1].frozen = False
    run([(opt, names)], [3])
    assert not any(same_bits(params[n], expected[n]) for n in ("tall", "k"))


@every_backend
@pytest.mark.parametrize("first", [("wide",), ("b",)])
def test_a_group_added_later(backend, first):
    """The first matrix, or the first of what is none."""
    (later,) = {("wide",), ("b",)} - {first}
    params, expected = draw(0), draw(0)
    opt = fastopt.Muon(part(params, *first), backend=backend, ema=0.9, **DEFAULTS)
    groups = [{"params": part(expected, *first)}]
    groups.append({"params": part(expected, *later), **DEFAULTS, "adamw_lr": 0.2})
    if later == ("b",):  # with an lr of no use
        groups[1]["lr"] = 0.5
    other = fastopt.Muon(groups, backend=backend, ema=0.9, **DEFAULTS)
    run([(opt, [first])], [1, 2])
    for t in (1, 2):
        other.step([part(draw(t), *first), None])
    added = {k: v for k, v in groups[1].items() if k != "params"}
    opt.add_group({"params": part(params, *later), **added})
    run([(opt, [first, later]), (other, [first, later])], [3, 4])
    assert not unlike(part(params, "wide", "b"), expected)
    assert opt.steps == 4 and len(opt.groups) == 2
    assert not unlike(opt.ema_params[0], other.ema_params[0])


def test_hyperparameters_may_change_and_be_schedules():
    params, expected = draw(0), draw(0)
    schedules = {"lr": lambda n: 0.1 / (n + 1), "momentum": lambda n: 0.5 + n / 10}
    schedules |= {"adamw_lr": lambda n: 0.3 / (n + 1), "ns_steps": lambda n: 1 + n}
    opt, other = fastopt.Muon(params, **schedules), fastopt.Muon(expected)
    for n in range(3):
        for name, schedule in schedules.items():
            setattr(other, name, schedule(n))
        run([(opt, [SHAPES]), (other, [SHAPES])], [n])
    assert not unlike(params, expected)
    opt.momentum, opt.nesterov = other.momentum, other.nesterov = 0.1, False
    opt.groups[0].update(lr=0.5, adamw_lr=0.1, ns_steps=2)
    other.lr, other.adamw_lr, other.ns_steps = 0.5, 0.1, 2
    run([(opt, [SHAPES]), (other, [SHAPES])], [4, 5])
    assert not unlike(params, expected)
    assert opt.lr == 0.5 and opt.groups[0]["momentum"] == 0.1


# Refusals, interrupts, resumption -------------------------------------------------


BAD = {
    "lr": -1,
    "momentum": -0.1,
    "eps": -1,
    "weight_decay": -1,
    "ns_steps": 0,
    "nesterov": 1,
    "match_rms_adamw": "original",
    "adamw_lr": -1,
    "adamw_beta2": 1.0,
    "adamw_eps": -1e-8,
    "adamw_weight_decay": -0.1,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyperparameters_are_named(name):
    w = np.eye(3)
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        fastopt.Muon(w, **{name: BAD[name]})
    opt = fastopt.Muon(w)
    where = name if name == "ns_steps" else rf'groups\[1\]\["{name}"\]'
    group = {"params": np.ones((2, 2)), name: BAD[name]}
    with pytest.raises((TypeError, ValueError), match=f"^{where} must be"):
        opt.add_group(group)
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        setattr(opt, name, BAD[name])
    assert len(opt.groups) == 1 and opt.ns_steps == 5


def test_what_a_group_has_no_use_for():
    w, b = np.eye(3), np.ones(3)
    for group in (
        {"params": [w], "use_muon": False, "lr": 0.1},
        {"params": [b], "lr": 0.1},
        {"params": fastopt.flatten({"b": b}), "eps": 0.1},
    ):
        name = next(n for n in ("lr", "eps") if n in group)
        message = rf'groups\[1\]\["{name}"\] is for matrices.* set "adamw_{name}"'
        with pytest.raises(TypeError, match=message):
            fastopt.Muon([{"params": np.ones((2, 2))}, group])
        opt = fastopt.Muon(np.ones((2, 2)))
        with pytest.raises(TypeError, match=message):
            opt.add_group(group)
        fastopt.Muon([group | {f"adamw_{name}": 0.1}])
    with pytest.raises(TypeError, match=r'groups\[0\]\["use_muon"\] must be True or'):
        fastopt.Muon([{"params": w, "use_muon": lambda n: n > 5}])
    with pytest.raises(TypeError, match="betas"):
        fastopt.Muon([{"params": w, "betas": (0.9, 0.95)}])


def test_use_muon_may_be_numpys():
    a, b = draw(0)["wide"], draw(0)["wide"]
    for flag in (True, False):
        numpys = fastopt.Muon([{"params": a, "use_muon": np.bool_(flag)}])
        pythons = fastopt.Muon([{"params": b, "use_muon": flag}])
        numpys.groups[0]["use_muon"] = np.bool_(flag)
        numpys.step([draw(1)["wide"]])
        pythons.step([draw(1)["wide"]])
        assert numpys.groups[0]["use_muon"] is flag and same_bits(a, b)
        with pytest.raises(ValueError, match=f"is {flag} and cannot become"):
            numpys.groups[0]["use_muon"] = np.bool_(not flag)


def test_use_muon_stays():
    w = np.eye(3)
    opt = fastopt.Muon([{"params": w}, {"params": np.ones(2)}])
    message = r"use_muon of groups\[0\] is True and cannot become False"
    with pytest.raises(ValueError, match=message):
        opt.groups[0]["use_muon"] = False
    with pytest.raises(ValueError, match=message):
        opt.use_muon = False
    opt.groups[0].update(use_muon=True, lr=0.5)
    assert opt.groups[0]["lr"] == 0.5
    saved = opt.state_dict()
    saved["groups"][0] |= {"use_muon": False, "lr": 0.1}
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert opt.groups[0]["lr"] == 0.5


def broken(n):
    if n == 1:
        raise ArithmeticError
    return 0.01


WANTED = {
    "shape": r"grads\['b'\] has shape",
    "dtype": r"grads\['w'\] has dtype",
    "read-only": r"grads\['b'\] is read-only",
    "parameter": r"grads\['w'\] overlaps the parameters",
    "state": r"grads\['b'\] overlaps the parameters or their state",
    "shared": "overlap in memory, and zero_grads=True would",
    "schedule": None,
}


@every_backend
@pytest.mark.parametrize("case", WANTED)
def test_a_step_is_done_or_not(case, backend):
    params = {"w": np.eye(3), "b": np.ones(3), "v": np.ones(3)}
    opt = fastopt.Muon(params, lr=broken, adamw_lr=0.1, backend=backend)
    opt.step({n: np.ones_like(p) for n, p in params.items()})
    if case != "schedule":
        opt.lr = 0.01
    grads = {n: np.ones_like(p) for n, p in params.items()}
    if case == "shape":
        grads["b"] = np.ones(2)
    elif case == "dtype":
        grads["w"] = np.ones((3, 3), np.float32)
    elif case == "read-only":
        grads["b"].flags.writeable = False
    elif case == "parameter":
        grads["w"] = params["w"]
    elif case == "state":
        grads["b"] = opt.state["v"][0][1]
    elif case == "shared":
        grads["b"] = grads["w"][0]
    saved, before = opt.state_dict()["state"], {n: p.copy() for n, p in params.items()}
    given = {n: g.copy() for n, g in grads.items()}
    error = {"schedule": ArithmeticError, "dtype": TypeError}.get(case, ValueError)
    with pytest.raises(error, match=WANTED[case]):
        opt.step(grads, zero_grads=True)
    assert opt.steps == 1 and not unlike(params, before) and not unlike(grads, given)
    for name, arrays in opt.state.items():
        assert all(map(same_bits, arrays, saved[name]))


def test_parameters_are_looked_at_together():
    w = np.eye(3)
    with pytest.raises(TypeError, match=r"params\['b'\] has dtype float32 but"):
        fastopt.Muon({"w": w, "b": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"params\['w'\] and params\['b'\] overlap"):
        fastopt.Muon({"w": w, "b": w[1]})


@every_backend
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupt_among_the_products_changes_nothing(backend, at, monkeypatch):
    params, expected = draw(0), draw(0)
    opt, other = fastopt.Muon(params, backend=backend), fastopt.Muon(expected)
    run([(opt, [SHAPES]), (other, [SHAPES])], [1])
    count = itertools.count(1)

    def interrupted(*given):
        if next(count) == at:
            raise KeyboardInterrupt
        orthogonalize(*given)

    orthogonalize = module.orthogonalize
    monkeypatch.setattr(module, "orthogonalize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step(draw(9))
    monkeypatch.undo()
    assert not unlike(params, expected) and opt.steps == 1
    assert all(map(same_bits, opt.state["m"], other.state["m"]))
    run([(opt, [SHAPES]), (other, [SHAPES])], [2, 3])
    assert not unlike(params, expected)


def grouped(params):
    """Of each kind, and hyperparameters that are not the defaults."""
    wide, tall, row, b, k = params.values()
    return [
        {"params": {"wide": wide, "k": k}, "ns_steps": 2, "adamw_lr": 0.1},
        {"params": tall, "use_muon": False, "adamw_beta1": 0.5},
        {"params": [row, b], "frozen": True, "momentum": 0.5},
    ]


@every_backend
@pytest.mark.parametrize("stop", range(4))
def test_a_run_goes_on_exactly(stop, backend):
    def gradients(t):
        wide, tall, row, b, k = draw(t).values()
        return [{"wide": wide, "k": None if t == 2 else k}, tall, [row, b]]

    def mask(path, array):
        return array.ndim > 1

    params = draw(0)
    how = {"weight_decay_mask": mask, "ema": 0.9, "backend": backend}
    opt = fastopt.Muon(grouped(params), **how, **DEFAULTS)
    for t in range(4):
        if t == stop:
            saved, again = opt.state_dict(), {n: p.copy() for n, p in params.items()}
        opt.groups[2].frozen = t < 2
        opt.step(gradients(t), clip_norm=3.0)
    other = fastopt.Muon(grouped(again), **how)
    other.load_state_dict(saved)
    for t in range(stop, 4):
        other.groups[2].frozen = t < 2
        other.step(gradients(t), clip_norm=3.0)
    assert not unlike(params, again)
    assert all(map(same_bits, opt.state["v"], other.state["v"]))
    assert all(map(same_bits, opt._averages[1], other._averages[1]))
    assert [dict(group) for group in opt.groups] == [dict(g) for g in other.groups]


def test_a_load_is_done_or_not():
    def made():
        return fastopt.Muon({"w": np.eye(3), "b": np.ones(3)})

    opt, other = made(), made()
    opt.step({"w": np.full((3, 3), np.nan), "b": np.ones(3)}, nonfinite="skip")
    opt.step({"w": np.ones((3, 3)), "b": np.ones(3)})
    saved = opt.state_dict()
    saved["groups"][0]["adamw_lr"] = -1.0
    with pytest.raises(ValueError, match="adamw_lr must be at least 0"):
        other.load_state_dict(saved)
    assert other.steps == 0 and not other.state["m"][0].any()
    saved["groups"][0]["adamw_lr"] = 0.1
    other.load_state_dict(saved)
    assert other.steps == 1 and other.skipped == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_several_tasks(backend):
    """A step of their weighted sum, in which a task may have none."""
    params, expected, (first, second) = draw(0), draw(0), map(draw, (1, 2))
    second["row"] = None
    both = {
        n: 0.5 * first[n] + 2.0 * (0 if g is None else g) for n, g in second.items()
    }
    fastopt.Muon(params, backend=backend).step([first, second], weights=[0.5, 2.0])
    fastopt.Muon(expected, backend=backend).step(both)
    assert all(same_bits(params[n], expected[n]) for n in SHAPES)
