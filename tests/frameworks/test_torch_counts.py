"""Steps in the state of torch's classes that are no number of steps."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")

import fastopt.torch as ft  # noqa: E402

BAD = [math.nan, math.inf, -1.0, 2.5, "3", [1, 2], 1j]
CLASSES = ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Rprop"]
CLASSES += ["Adadelta", "ASGD", "Adafactor", "LAMB", "Lion", "ScheduleFreeAdamW"]
CLASSES += ["Prodigy", "AdEMAMix"]


def made(name, shapes=((3, 2), (5,))):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    opt = getattr(ft, name)(params, lr=0.03)
    for _ in range(2):
        steps(params, opt)
    return params, opt


def steps(params, opt):
    for param in params:
        param.grad = torch.cos(param.detach() * 3)
    opt.step()


def seen(params, opt):
    return copy.deepcopy([[p.detach() for p in params], opt.state_dict()["state"]])


def same(a, b):
    return repr(a) == repr(b)


@pytest.mark.parametrize("name", [n for n in CLASSES if hasattr(ft, n)])
@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_state_with_such_steps_is_not_loaded(name, bad, tensor):
    if tensor and isinstance(bad, str):
        pytest.skip("tensors have no text")
    params, opt = made(name)
    saved = copy.deepcopy(opt.state_dict())
    if "step" not in saved["state"][1]:
        pytest.skip(f"{name} does not count")
    saved["state"][1]["step"] = torch.tensor(bad) if tensor else bad
    saved["param_groups"][0]["lr"] = 0.5
    before = seen(params, opt)
    with pytest.raises(ValueError, match=r"'step' in the state of parameter 1 is "):
        opt.load_state_dict(saved)
    assert same(seen(params, opt), before)
    assert opt.param_groups[0]["lr"] == 0.03
    steps(params, opt)  # as if nothing had been tried
    others, other = made(name)
    steps(others, other)
    assert same(seen(params, opt), seen(others, other))


@pytest.mark.parametrize("name", [n for n in CLASSES if hasattr(ft, n)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 2.5], ids=repr)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_step_says_that_such_steps_were_written(name, bad, replaced):
    params, opt = made(name)
    state = opt.state[params[1]]
    if "step" not in state:
        pytest.skip(f"{name} does not count")
    held = state["step"]
    if replaced:
        state["step"] = torch.tensor(bad)
    else:
        held.fill_(bad)
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        ValueError, match=r"of parameter 1 is .*the number of completed"
    ):
        steps(params, opt)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert opt.state[params[0]]["step"] == 2
    state["step"] = held
    held.fill_(2)
    steps(params, opt)  # goes on, with the right values
    others, other = made(name)
    steps(others, other)
    assert same(seen(params, opt), seen(others, other))
