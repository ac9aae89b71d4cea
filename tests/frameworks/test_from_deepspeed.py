"""docs/from_deepspeed.md mentions the options of DeepSpeed's optimizers, and what it
says of formats and of saved state is so."""

import copy
import inspect
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import fastopt.deepspeed  # noqa: E402
import fastopt.torch  # noqa: E402

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_deepspeed.md").read_text(
    encoding="utf-8"
)
DEEPSPEED, BITSANDBYTES = re.split(r"\n## \w+\n", PAGE)[1:3]
CLASSES = "DeepSpeedCPUAdam", "DeepSpeedCPULion", "DeepSpeedCPUAdagrad"


@pytest.fixture
def classes():
    """DeepSpeed's, on fastopt's kernels. To import them takes seconds."""
    ops = pytest.importorskip("deepspeed.ops", reason="deepspeed is not installed")
    modules = ops.adam, ops.lion, ops.adagrad
    fastopt.deepspeed.install()
    yield {
        name: getattr(module, name)
        for name, module in zip(CLASSES, modules, strict=True)
    }
    fastopt.deepspeed.uninstall()


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_is_mentioned(classes, name):
    for option in [*inspect.signature(classes[name]).parameters][1:]:
        assert re.search(rf"^\|.*`{option}\b", DEEPSPEED, re.M), option


def test_defaults_that_differ(classes):
    adam = inspect.signature(classes["DeepSpeedCPUAdam"]).parameters
    assert adam["weight_decay"].default == 0 and adam["adamw_mode"].default is True
    lion = inspect.signature(classes["DeepSpeedCPULion"]).parameters
    assert lion["betas"].default == (0.9, 0.999)


def stepped(make, steps=5):
    """An optimizer of one parameter, and the parameter."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(50, generator=generator))
    opt = make([w])
    for _ in range(steps):
        w.grad = torch.randn(50, generator=generator)
        opt.step()
    return opt, w


@pytest.mark.parametrize(
    "name, options, ours",
    [
        ("DeepSpeedCPUAdam", {}, "AdamW"),
        ("DeepSpeedCPUAdam", {"adamw_mode": False}, "Adam"),
        ("DeepSpeedCPULion", {"betas": (0.8, 0.95)}, "Lion"),
        ("DeepSpeedCPUAdagrad", {}, "Adagrad"),
    ],
)
def test_its_classes_have_the_bits_of_ours(classes, name, options, ours):
    shared = {"lr": 0.1, "weight_decay": 0.1}
    betas = {key: value for key, value in options.items() if key == "betas"}
    kind = getattr(fastopt.torch, ours)
    _, a = stepped(lambda params: classes[name](params, **shared, **options))
    _, b = stepped(lambda params: kind(params, **shared, **betas))
    assert a.equal(b)
    row = re.search(rf"^\| `{name}\b.*`fastopt\.torch\.{ours}` \|$", DEEPSPEED, re.M)
    assert row


def test_states_go_both_ways(classes):
    def theirs(params):
        return classes["DeepSpeedCPUAdam"](params, lr=0.1, weight_decay=0.1)

    def ours(params):
        return fastopt.torch.AdamW(params, lr=0.1, weight_decay=0.1)

    for make, other in ((theirs, ours), (ours, theirs)):
        opt, w = stepped(make)
        v = torch.nn.Parameter(w.detach().clone())
        going_on = other([v])
        going_on.load_state_dict(copy.deepcopy(opt.state_dict()))
        for group in going_on.param_groups:
            group.setdefault("bias_correction", True)
        w.grad, v.grad = torch.ones(50), torch.ones(50)
        opt.step()
        going_on.step()
        assert w.equal(v)


def test_amsgrad_is_refused(classes):
    message = "DeepSpeedCPUAdam does not support the AMSGrad variant"
    with pytest.raises(RuntimeError, match=message):
        classes["DeepSpeedCPUAdam"]([torch.nn.Parameter(torch.ones(3))], amsgrad=True)
    assert message in DEEPSPEED


def test_which_classes_have_8_bits():
    refusing = {"SGD", "RMSprop", "Adagrad"}
    for name in "AdamW Adam Lion LAMB LARS AdEMAMix SGDW SGD RMSprop Adagrad".split():
        assert re.search(rf"^\|.*`{name}\b", BITSANDBYTES, re.M), name
        momentum = {"momentum": 0.9} if name in ("SGD", "SGDW") else {}
        w = torch.nn.Parameter(torch.ones(100, 50))
        w.grad = torch.ones_like(w)
        kind = getattr(fastopt.torch, name)
        if name in refusing:
            with pytest.raises(ValueError):
                kind([w], formats="8bit", **momentum)
        else:
            opt = kind([w], formats="8bit", **momentum)
            opt.step()
            stored = {value.dtype for value in opt.state[w].values()}
            assert torch.int8 in stored
