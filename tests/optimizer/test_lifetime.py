"""Deleting an optimizer frees its memory at once, without the garbage collector."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
from installed import BACKENDS

import fastopt
from fastopt.rules import RULES


@pytest.fixture(autouse=True)
def no_garbage_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def array(seed=0):
    return np.random.default_rng(seed).normal(size=(48, 40)).astype(np.float32)


def check_freed(make, **step):
    parameter, gradients = array(), array(1)
    opt = make(parameter)
    opt.step(gradients, **step)
    opt.lr = opt.lr / 2
    opt.load_state_dict(opt.state_dict())
    held = [weakref.ref(opt), weakref.ref(parameter), weakref.ref(gradients)]
    held += [weakref.ref(a) for arrays in opt.state.values() for a in arrays]
    del opt, parameter, gradients
    assert [x() for x in held] == [None] * len(held)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_of_every_rule(rule):
    check_freed(rule)


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_every_backend(backend):
    check_freed(lambda p: fastopt.adamw(p, backend=backend))


OPTIONS = {
    "ema": {"ema": 0.9},
    "formats": {"formats": "8bit"},
    "schedule": {"lr": fastopt.schedules.cosine(0.1, 10)},
    "weight_decay_mask": {"weight_decay_mask": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_with_options(options):
    def make(p):
        opt = fastopt.adamw(p, **options)
        if callable(opt.lr):
            opt.step(array(2))
            opt.lr = 0.1
        return opt

    check_freed(make, clip_norm=1.0, nonfinite="skip")


@pytest.mark.parametrize("make", [fastopt.Adafactor, fastopt.Muon])
def test_of_classes(make):
    check_freed(make)


def test_after_accumulating():
    parameter = array()
    opt = fastopt.adamw(parameter, ema=0.5)
    opt.accumulate(array(1))
    opt.step()
    opt.add_group({"params": array(2), "lr": 0.5})
    opt.step([array(3), array(4)])
    held = [weakref.ref(opt), weakref.ref(parameter)]
    del opt, parameter
    assert [x() for x in held] == [None, None]


def test_around_another():
    parameter = array()
    opt = fastopt.Lookahead(fastopt.adamw(parameter))
    opt.step(array(1))
    held = [weakref.ref(opt), weakref.ref(parameter)]
    del opt, parameter
    assert [x() for x in held] == [None, None]


def test_a_group_that_outlives_its_optimizer_says_so():
    group = fastopt.adamw(array()).groups[0]
    for change in (
        lambda: group.update(lr=0.5),
        lambda: group.__setitem__("lr", 0.5),
        lambda: setattr(group, "frozen", True),
    ):
        with pytest.raises(ReferenceError, match="optimizer of this group no longer"):
            change()
    assert group["lr"] == 1e-3 and not group.frozen


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_group_is_not_copied(copied):
    opt = fastopt.adamw(array(), lr=0.5)
    with pytest.raises(TypeError, match=r"copied or pickled; dict\(group\) has"):
        copied(opt.groups[0])
    assert dict(opt.groups[0])["lr"] == 0.5


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Muon", "Adafactor"])
def test_of_torch(name):
    torch = pytest.importorskip("torch")
    classes = pytest.importorskip("fastopt.torch")

    def run(cls):
        parameter = torch.nn.Parameter(torch.ones(48, 40))
        parameter.grad = torch.ones(48, 40)
        opt = cls([parameter], lr=0.01)
        opt.step()
        opt.step()
        return weakref.ref(opt), weakref.ref(parameter)

    run(torch.optim.SGD)  # the first object of torch.optim is left in a cycle
    assert [x() for x in run(getattr(classes, name))] == [None, None]
