"""The classes of ``fastopt.torch`` by themselves: what they do with every rule, layout
and dtype, and with what moves under them."""

import copy
import itertools
import math
import pickle
import warnings
import weakref

import numpy as np
import pytest
from cases import CASES, IDS
from installed import needs_numba

import fastopt

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_tensors import (  # noqa: E402
    PLAIN,
    Parameter,
    class_of,
    draw,
    flat,
    gaps,
    give,
    in_torchs_words,
    params_of,
    transposed,
)

import fastopt.torch as ft  # noqa: E402
from fastopt.torch import memory  # noqa: E402

# Every rule -----------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_every_rule_has_a_class_with_the_same_bits(rule, values):
    """As the same rule over the same arrays. (ASGD has torch's delay of lr, and its
    numbers are of the default dtype.)"""
    arrays = [tensor.numpy() for tensor in draw()]
    params = params_of(draw())
    opt = rule(arrays, **values)
    made = class_of(rule)(params, **in_torchs_words(values))
    torchs = made._names.torchs
    for seed in range(1, 6):
        grads = draw(seed=seed)
        opt.step([grad.numpy() for grad in grads])
        give(params, grads)
        made.step()
        for param, array in zip(params, arrays, strict=True):
            if torchs:
                np.testing.assert_allclose(param.detach(), array, rtol=1e-5)
            else:
                np.testing.assert_array_equal(param.detach(), array)
    for array, used in zip(opt.eval_params(), made.eval_params(), strict=True):
        np.testing.assert_allclose(used, array, rtol=1e-5)


def over_all(rule):
    return rule.measure is not None and rule.over == "all"


@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_steps_are_counted_for_each_parameter(rule):
    """So each is as if it had an optimizer of its own; but for rules that measure all
    together, which count for all."""
    kind = class_of(rule)
    together, alone = params_of(draw()), params_of(draw())
    opt, others = kind(together), [kind([param]) for param in alone]
    for seed in range(1, 8):
        grads = draw(seed=seed)
        grads[0] = None if seed in (2, 3) else grads[0]
        grads[2] = None if seed < 4 else grads[2]
        give(together, grads)
        give(alone, grads)
        opt.step()
        for other in others:
            other.step()
    if over_all(rule):
        steps = {int(opt.state[param]["step"]) for param in together}
        assert steps == {7}
        return
    for param, other, single in zip(together, alone, others, strict=True):
        assert torch.equal(param, other)
        ours, theirs = opt.state[param], single.state[other]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_states_are_saved_and_loaded_exactly(rule):
    kind, params = class_of(rule), params_of(draw())
    opt = kind(params)
    for seed in range(1, 4):
        give(params, draw(seed=seed))
        opt.step()
    others = [Parameter(param.detach().clone()) for param in params]
    other = kind(others)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(4, 7):
        give(params, draw(seed=seed))
        give(others, draw(seed=seed))
        opt.step()
        other.step()
    assert torch.equal(flat(params), flat(others))


def test_signatures_are_torchs_and_the_rules():
    for name in ft._OF_TORCH:
        theirs = getattr(torch.optim, name)
        kind = getattr(ft, name)
        ours = list(ft._classes.inspect.signature(kind).parameters)
        wanted = list(ft._classes.inspect.signature(theirs).parameters)
        assert ours == [*wanted, *ft._classes.EXTRAS]
    param = Parameter(torch.ones(2))
    lion = ft.Lion([param], 0.5, (0.8, 0.9), maximize=True)
    assert lion.defaults == {
        **{"lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.0, "maximize": True}
    }
    assert ft.Lion is ft.Lion and ft.Lion.__module__ == "fastopt.torch"
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        ft.Lion([param], momentum=0.9)
    with pytest.raises(AttributeError, match="no attribute 'Lyon'"):
        ft.Lyon  # noqa: B018
    assert {"AdamW", "Lion", "ScheduleFreeAdamW"} <= set(ft.__all__) <= set(dir(ft))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\)"),
        ({"weight_decay": math.nan}, "weight_decay must be finite"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"ema": 1.0}, "ema must be in"),
        ({"nonfinite": "no"}, "nonfinite must be"),
        ({"threads": 0}, "threads must be from 1"),
    ],
)
def test_values_of_our_own_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ft.Lion([Parameter(torch.ones(2))], **options)


@needs_numba
def test_a_rule_of_ones_own():
    def scalars(t, lr=0.1, momentum=0.9):
        return lr, momentum

    def update(p, g, m, lr, mu):
        m = mu * m + g
        return p - lr * m, m

    rule = fastopt.Rule(update, scalars, state=("m",), name="heavy_ball")
    kind = ft.optimizer(rule)
    assert kind.__name__ == "HeavyBall"
    params, others = params_of(draw()), params_of(draw())
    ours = kind(params, lr=0.01)
    theirs = torch.optim.SGD(others, lr=0.01, momentum=0.9)
    for seed in range(1, 5):
        for given in (params, others):
            give(given, draw(seed=seed))
        ours.step()
        theirs.step()
    torch.testing.assert_close(flat(params), flat(others))


# The most that was measured over five seeds, in units of the last place of the largest
# value that an element has had, was 28, NAdam's; weight decay is in test_torch.py.
ULPS = 60
OFF_DEFAULTS = {
    "Adadelta": {"lr": 0.3},
    "Adafactor": {"lr": 0.02},
    "Adagrad": {"lr": 0.1},
    "AdamW": {"weight_decay": 0.0},
    "ASGD": {"lr": 0.03, "t0": 20.0},
    "Muon": {"lr": 0.02},
    "RMSprop": {"momentum": 0.9},
    "SGD": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("name", ft._OF_TORCH)
def test_two_hundred_steps_in_float32(name):
    (start,) = draw([(17, 59)])
    largest, (ours, theirs) = start.abs(), params_of([start, start])
    options = OFF_DEFAULTS.get(name, {})
    opts = [
        getattr(of, name)([param], **options)
        for of, param in ((ft, ours), (torch.optim, theirs))
    ]
    for seed in range(1, 201):
        ours.grad, theirs.grad = (draw([(17, 59)], seed=seed)[0] for _ in range(2))
        for opt in opts:
            opt.step()
        largest = torch.maximum(largest, theirs.detach().abs())
        apart = (ours - theirs).detach().abs().numpy()
        assert (apart <= ULPS * np.spacing(largest.numpy())).all()


@pytest.mark.usefixtures("numbers_in_float64")
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("eps", [(None, 1e-3), (1e-4, 0.1), (0.0, 1e-3)])
def test_two_hundred_steps_of_adafactor(eps, maximize):
    options = {
        "lr": 0.03,
        "eps": eps,
        "d": 1.5,
        "weight_decay": 0.1,
        "beta2_decay": -0.7,
    }
    params = [params_of(draw(dtype=torch.float64)) for _ in range(2)]
    ours = ft.Adafactor(params[0], maximize=maximize, **options)
    theirs = torch.optim.Adafactor(params[1], maximize=maximize, **options)
    for seed in range(1, 201):
        for given in params:
            give(given, draw(dtype=torch.float64, seed=seed))
        ours.step()
        theirs.step()
    torch.testing.assert_close(*map(flat, params), rtol=1e-10, atol=0)


# Layouts and dtypes ---------------------------------------------------------------


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def shifted(tensor):
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return room[1:].view(tensor.shape).copy_(tensor)


def negated(tensor):
    return torch._neg_view(tensor.neg())


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


LAYOUTS = [PLAIN, channels_last, gaps, transposed, shifted]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "LAMB"])
@pytest.mark.parametrize("of_grad", [*LAYOUTS, negated, expanded])
@pytest.mark.parametrize("of_param", LAYOUTS)
def test_every_layout(of_param, of_grad, name):
    kind = getattr(ft, name)
    options = {"momentum": 0.9} if name == "SGD" else {}
    start, *grads = (draw([(4, 3, 2, 5)], torch.float64, seed)[0] for seed in range(4))
    odd, plain = Parameter(of_param(start)), Parameter(start.clone())
    strides = odd.stride()
    opts = kind([odd], **options), kind([plain], **options)
    for grad in grads:
        odd.grad = of_grad(grad)
        plain.grad = odd.grad.contiguous().resolve_neg()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(odd.detach(), plain.detach(), rtol=1e-12, atol=1e-12)
    assert odd.stride() == strides
    for key, value in opts[0].state[odd].items():
        torch.testing.assert_close(value, opts[1].state[plain][key])
    if name != "Adafactor" and of_param is not gaps:  # as torch's zeros_like
        assert all(
            value.stride() == strides
            for value in opts[0].state[odd].values()
            if value.dim()
        )


def test_a_layout_may_change_between_steps():
    start = draw([(4, 3)], torch.float64)[0]
    odd, plain = Parameter(start.clone()), Parameter(start.clone())
    opts = ft.AdamW([odd]), torch.optim.AdamW([plain])
    for i, (of_param, of_grad) in enumerate(
        itertools.product([PLAIN, transposed, gaps], repeat=2)
    ):
        odd.data = of_param(odd.data)
        grad = draw([(4, 3)], torch.float64, i)[0]
        odd.grad, plain.grad = of_grad(grad), grad
        for opt in opts:
            opt.step()
        torch.testing.assert_close(odd, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB", "Lion"])
def test_half_precision_computes_in_float32_and_rounds_once(dtype, name):
    """State is float32; a parameter is what a float32 step makes of it, rounded to the
    nearest."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    halves = params_of(draw(dtype=dtype))
    opt = getattr(ft, name)(halves, lr=0.1, **options)
    reference = [half.detach().float() for half in halves]
    exact = getattr(ft, name)(reference, lr=0.1, **options)
    for seed in range(1, 6):
        grads = draw(dtype=dtype, seed=seed)
        give(halves, grads)
        give(reference, [grad.float() for grad in grads])
        opt.step()
        exact.step()
        for half, full in zip(halves, reference, strict=True):
            full.copy_(full.to(dtype))
            assert half.dtype == dtype and torch.equal(half.float(), full)
    for half in halves:
        for value in opt.state[half].values():
            assert value.dtype == torch.float32


def test_float32_state_stays_so_when_it_is_loaded():
    halves = params_of(draw(dtype=torch.bfloat16))
    opt = ft.AdamW(halves)
    for seed in range(3):
        give(halves, draw(dtype=torch.bfloat16, seed=seed))
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    others = params_of([half.detach() for half in halves])
    other = ft.AdamW(others)
    seen = []
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[others[0]]["exp_avg"].dtype)
    )
    other.load_state_dict(saved)
    assert seen == [torch.float32]
    for half, made in zip(halves, others, strict=True):
        for key, value in opt.state[half].items():
            assert value.dtype == torch.float32
            assert torch.equal(other.state[made][key], value)
    # torch's own rounds it to bfloat16, and what it saved is taken up.
    theirs = torch.optim.AdamW(others)
    theirs.load_state_dict(saved)
    assert theirs.state[others[0]]["exp_avg"].dtype == torch.bfloat16
    other.load_state_dict(theirs.state_dict())
    give(others, draw(dtype=torch.bfloat16, seed=9))
    other.step()
    assert other.state[others[0]]["exp_avg"].dtype == torch.float32


def test_dtypes_may_be_mixed():
    dtypes = (
        torch.float32,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.float16,
    )
    tensors = [t.to(d) for t, d in zip(draw([(3, 4)] * 5), dtypes, strict=True)]
    together, alone = params_of(tensors), params_of(tensors)
    opt, others = ft.AdamW(together), [ft.AdamW([param]) for param in alone]
    for seed in range(4):
        grads = [
            g.to(d) for g, d in zip(draw([(3, 4)] * 5, seed=seed), dtypes, strict=True)
        ]
        give(together, grads)
        give(alone, grads)
        opt.step()
        for other in others:
            other.step()
    assert all(map(torch.equal, together, alone))


def test_gradients_of_another_dtype():
    param = Parameter(torch.ones(3))
    param.grad_dtype = None
    param.grad = torch.full((3,), 2.0, dtype=torch.float64)
    opt = ft.SGD([param], lr=0.25)
    opt.step()
    assert torch.equal(param.detach(), torch.full((3,), 0.5))


@pytest.mark.parametrize(
    "make", [torch.ones(3, dtype=torch.int32), torch.eye(3).to_sparse()]
)
def test_what_no_rule_can_take(make):
    opt = ft.Lion([make])
    make.grad = make.clone() if make.is_sparse else None
    if make.is_sparse:
        with pytest.raises(
            RuntimeError, match="Lion does not support sparse parameters"
        ):
            opt.step()
    else:
        opt.step()


def test_empty_parameters_count_steps():
    param = Parameter(torch.empty(0, 3))
    opt = ft.AdamW([param, *params_of(draw())])
    param.grad = torch.empty(0, 3)
    for _ in range(3):
        opt.step()
    assert opt.state[param]["step"] == 3


# What moves under a step ----------------------------------------------------------


def pair(name="AdamW", count=2, **options):
    """The same parameters for ours and for torch's."""
    shapes = [(4, 3)] * count
    ours, theirs = params_of(draw(shapes)), params_of(draw(shapes))
    kinds = getattr(ft, name), getattr(torch.optim, name)
    return ours, theirs, kinds[0](ours, **options), kinds[1](theirs, **options)


def step_both(ours, theirs, a, b, seed, none=()):
    grads = draw([p.shape for p in ours], seed=seed)
    for params in (ours, theirs):
        give(params, [None if i in none else g for i, g in enumerate(grads)])
    a.step()
    b.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-5, atol=1e-6)


def test_data_that_is_swapped():
    ours, theirs, a, b = pair()
    for seed in range(6):
        if seed in (2, 3, 5):
            for param in ours:
                old = param.data
                param.data = old.clone()
                old.fill_(math.nan)
        step_both(ours, theirs, a, b, seed)


def test_gradients_that_stay_and_change():
    ours, theirs, a, b = pair()
    for params in (ours, theirs):
        give(params, [torch.zeros_like(p) for p in params])
    for seed in range(5):
        for params in (ours, theirs):
            for param, grad in zip(params, draw([(4, 3)] * 2, seed=seed), strict=True):
                param.grad.copy_(grad)
                if seed == 3:
                    param.grad.data = param.grad.data.clone()
        a.step()
        b.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-5, atol=1e-6)


def test_state_that_is_replaced():
    ours, theirs, a, b = pair()
    for seed in range(12):
        for opt in (a, b):
            first, second = opt.param_groups[0]["params"]
            if seed == 2:
                opt.state[first]["exp_avg"] = opt.state[first]["exp_avg"].clone() * 2
            elif seed == 4:
                opt.state[second] = {}
            elif seed == 5:
                opt.state.clear()
            elif seed == 7:
                opt.state[first]["exp_avg_sq"].mul_(0.5)
                opt.state[second]["step"].fill_(10)
            elif seed == 8:
                opt.state[first]["exp_avg"].data = opt.state[first]["exp_avg"] + 1
            elif seed == 9:
                opt.state[first]["exp_avg"] = (
                    opt.state[first]["exp_avg"].t().clone().t()
                )
            elif seed == 10:
                opt.state = type(opt.state)(dict)
        step_both(ours, theirs, a, b, seed)
        assert a.state[ours[0]]["step"] == b.state[theirs[0]]["step"]


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_parameter_that_is_replaced(name):
    """As code for Gaussian splatting does it: other tensors, and state cut to fit."""
    ours, theirs, a, b = pair(name)
    step_both(ours, theirs, a, b, 0)
    for params, opt in ((ours, a), (theirs, b)):
        group = opt.param_groups[0]
        state = opt.state.pop(group["params"][0], None)
        made = Parameter(group["params"][0].detach()[:2].clone())
        group["params"][0] = params[0] = made
        if state:
            kept = {k: v[:2].clone() if v.dim() else v for k, v in state.items()}
            opt.state[made] = kept
    for seed in (1, 2):
        step_both(ours, theirs, a, b, seed)


def test_options_that_change():
    ours, theirs, a, b = pair("SGD", lr=0.1)
    changes = {
        2: {"momentum": 0.9, "dampening": 0.5},
        4: {"lr": 0.01, "weight_decay": 0.1},
        5: {"momentum": 0.0},
        7: {"momentum": 0.8, "dampening": 0.0, "nesterov": True},
        9: {"maximize": True, "lr": torch.tensor(0.02)},
    }
    for seed in range(12):
        for opt in (a, b):
            opt.param_groups[0].update(changes.get(seed, {}))
        step_both(ours, theirs, a, b, seed)


def test_groups_and_parameters_that_are_added():
    ours, theirs, a, b = pair(count=2)
    for seed in range(9):
        if seed in (3, 5):
            for params, opt in ((ours, a), (theirs, b)):
                params += params_of(draw([(2, 3)], seed=100))
                opt.add_param_group({"params": params[-1:], "lr": 0.1, "amsgrad": True})
        step_both(ours, theirs, a, b, seed, none=(1,) if seed == 6 else ())
    assert [int(a.state[p]["step"]) for p in ours] == [9, 8, 6, 4]
    # A boundary between groups that moves.
    for opt in (a, b):
        groups = opt.param_groups
        groups[1]["params"].append(groups[0]["params"].pop())
        opt.state[groups[1]["params"][-1]]["max_exp_avg_sq"] = torch.ones(4, 3)
    step_both(ours, theirs, a, b, 9)


@pytest.mark.parametrize("rows", [6, 600])
def test_parameters_that_share_memory(rows):
    """Each is updated by itself, one after the other, as by torch; also when there is
    enough of them for two threads."""
    found = []
    for kind in (ft.AdamW, torch.optim.AdamW):
        whole = draw([(rows, 100)])[0]
        params = [Parameter(whole[:-2]), Parameter(whole[2:]), Parameter(whole)]
        opt = kind([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
        for seed in range(1, 5):
            give(params, draw([p.shape for p in params], seed=seed))
            opt.step()
        found.append(whole)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_parameter_that_is_there_twice():
    found = []
    for kind in (ft.Adam, torch.optim.Adam):
        param = Parameter(torch.ones(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = kind([param, param], lr=0.1, foreach=False)
        for _ in range(3):
            param.grad = torch.ones(3)
            opt.step()
        assert opt.state[param]["step"] == 6
        found.append(param.detach())
    torch.testing.assert_close(*found)


def test_a_gradient_that_is_the_parameter():
    param = Parameter(draw([(5,)])[0])
    expected = param.detach() * 0.9
    param.grad = param.data
    opt = ft.SGD([param], lr=0.1)
    opt.step()
    torch.testing.assert_close(param.detach(), expected)
    opt.step()
    torch.testing.assert_close(param.detach(), expected * 0.9)


def test_autograd_notices_a_step():
    w = Parameter(torch.ones(3))
    opt = ft.SGD([w], lr=0.1)
    w.grad = torch.ones(3)
    for step in (opt.step, opt.step):
        loss = (w * w).sum()
        step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_optimizer_is_freed():
    params = params_of(draw())
    opt = ft.AdamW(params)
    give(params, draw(seed=1))
    opt.step()
    grads, gone = [weakref.ref(p.grad) for p in params], weakref.ref(opt)
    opt.zero_grad()
    assert not any(grad() is not None for grad in grads)  # a plan keeps no gradients
    del opt
    assert gone() is None


def test_an_optimizer_that_has_lost_its_parameters():
    for empty in (list.clear, lambda params: None):
        opt = ft.AdamW(params_of(draw()))
        empty(opt.param_groups[0]["params"])
        if opt.param_groups[0]["params"]:
            opt.param_groups[0]["params"] = []
        opt.step()
        opt.step()


def test_a_parameter_that_goes_to_its_neighbours_group():
    """The parameters are the same ones, in the same order."""
    found = []
    for of in (ft, torch.optim):
        params = params_of(draw([(3,)] * 2))
        opt = of.SGD([{"params": [p]} for p in params], lr=0.1)
        opt.param_groups[1]["lr"] = 0.0
        for _ in range(2):
            give(params, draw([(3,)] * 2, seed=1))
            opt.step()
            first, second = opt.param_groups
            if second["params"]:
                first["params"].append(second["params"].pop())
        found.append(flat(params))
    assert torch.equal(*found)


def test_steps_whose_memory_is_gone():
    """Counts are worked in where they are, and kept alive."""
    params = params_of(draw([(3,)]))
    opt = ft.Adam(params)
    give(params, draw([(3,)], seed=1))
    opt.step()
    saved, memory = opt.state_dict(), np.full(1, 1.0, np.float32)
    gone = weakref.ref(memory)
    saved["state"][0]["step"] = torch.from_numpy(memory).reshape(())
    opt.load_state_dict(saved)
    opt.step()
    opt.step()
    del saved, memory
    opt.state[params[0]]["step"].data = torch.tensor(100.0)
    opt.step()
    assert float(opt.state[params[0]]["step"]) == 101
    assert gone() is None or gone()[0] == 3


def test_nothing_is_put_into_the_state_of_a_step_that_is_torchs():
    """Sparse gradients: the first step of SGD's momentum is without dampening."""
    found = []
    for of in (ft, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 1)
        params = [*model[0].parameters(), *model[1].parameters()]
        opt = of.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
        for _ in range(2):
            opt.zero_grad()
            model[1](model[0](torch.tensor([1, 3]))).sum().backward()
            opt.step()
        found.append(flat(params))
    torch.testing.assert_close(*found)
    opt = ft.Adam([torch.nn.Embedding(5, 3, sparse=True).weight])
    (param,) = opt.param_groups[0]["params"]
    param.grad = torch.ones(5, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert not opt.state.get(param)


def test_complex_parameters_to_evaluate():
    start = draw([(3,)])[0] * (1 + 2j)
    param, pair = Parameter(start), Parameter(torch.view_as_real(start).clone())
    opts = [ft.ScheduleFreeAdamW([p], lr=0.1) for p in (param, pair)]
    for seed in range(3):
        grad = draw([(3,)], seed=seed)[0] * (2 - 1j)
        param.grad, pair.grad = grad, torch.view_as_real(grad).clone()
        for opt in opts:
            opt.step()
    (ours,), (reals,) = (opt.eval_params() for opt in opts)
    assert torch.equal(torch.view_as_real(ours), reals)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be"):
        ft.Adam(params_of(draw()), backend="nope")


Mine = ft.optimizer(fastopt.lion, "Mine")


def test_classes_of_ones_own_can_be_pickled():
    params = params_of(draw())
    opt = Mine(params, lr=0.1)
    give(params, draw(seed=1))
    opt.step()
    again = pickle.loads(pickle.dumps(opt))
    assert type(again) is Mine and len(again.state) == len(params)


# Without what makes it fast -------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(
    "name", ["SGD", "AdamW", "NAdam", "Adafactor", "LAMB", "Prodigy"]
)
def test_every_backend_has_the_same_bits(name, backend):
    found = []
    for chosen in (None, backend):
        params = params_of(draw())
        opt = getattr(ft, name)(params, clip_value=0.7, backend=chosen)
        for seed in range(1, 5):
            grads = draw(seed=seed)
            give(params, [None if seed == 3 else grads[0], *grads[1:]])
            opt.step()
        found.append(flat(params))
    assert torch.equal(*found)


def test_without_the_native_look(monkeypatch):
    """All that is above about what moves, once more in Python."""
    monkeypatch.setattr(memory, "native", None)
    test_data_that_is_swapped()
    test_gradients_that_stay_and_change()
    test_state_that_is_replaced()
    test_a_parameter_that_is_replaced("SGD")
    test_options_that_change()
    test_groups_and_parameters_that_are_added()
    test_parameters_that_share_memory(6)
    test_a_layout_may_change_between_steps()
    opt = ft.AdamW(params_of(draw()))
    give(opt.param_groups[0]["params"], draw(seed=1))
    opt.step()
    assert type(opt._plan.tensors) is memory.Tensors


def test_more_dimensions_than_the_native_look_has_room_for():
    param, other = (Parameter(draw([(2, 1) * 5])[0]) for _ in range(2))
    param.grad = draw([(2, 1) * 5], seed=1)[0]
    other.grad = param.grad.clone()
    ft.AdamW([param]).step()
    torch.optim.AdamW([other]).step()
    torch.testing.assert_close(param, other)


def test_a_parameter_alone_that_is_left_to_torch():
    """Here by ``differentiable``, which fastopt has no kernels for."""
    params = [torch.full((3,), 2.0) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    opt = ft.SGD(params, lr=0.5, differentiable=True)
    opt.step_param(params[1])
    assert [param.tolist() for param in params] == [[2.0] * 3, [1.5] * 3]
    assert opt.param_groups[0]["params"] == params
    opt.step()
    assert [param.tolist() for param in params] == [[1.5] * 3, [1.0] * 3]


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("starts", [(1e-3, 1e-6), (1e-6, 1e-3)])
def test_groups_start_with_numbers_of_their_own(name, dtype, starts):
    """A rule carries one number for all, but each group begins with its own."""
    params = [Parameter(torch.linspace(-1, 1, 6).to(d)) for d in (torch.float32, dtype)]
    pairs = zip(params, starts, strict=True)
    opt = getattr(ft, name)([{"params": [p], "d0": d0} for p, d0 in pairs])
    alone = []
    for param, d0 in zip(params, starts, strict=True):
        param.grad = torch.ones_like(param)
        other = Parameter(param.detach().clone())
        other.grad = torch.ones_like(other)
        getattr(ft, name)([other], d0=d0).step()
        alone.append(other.detach())
    opt.step()
    for param, expected in zip(params, alone, strict=True):
        assert torch.allclose(param.detach(), expected, rtol=1e-6, atol=0)


def test_a_bad_count_in_another_dtype_is_named():
    params = [Parameter(torch.ones(6).to(d)) for d in (torch.float32, torch.float64)]
    opt = ft.Prodigy(params)
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    opt.state[params[0]]["step"], opt.state[params[1]]["step"] = 1, "x"
    with pytest.raises(ValueError, match="parameter 1 is 'x'; it must be the number"):
        opt.step()
