"""What the tensors of ``fastopt.torch`` may be made into between two steps, and tensors
that have no memory of their own."""

import subprocess
import sys

import pytest

import fastopt

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_tensors import Parameter, class_of, draw, flat, give, params_of  # noqa: E402

import fastopt.torch as ft  # noqa: E402
from fastopt.torch import memory  # noqa: E402

SQUARES = [(4, 4)] * 3


@pytest.fixture(params=["native", "python"])
def look(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(memory, "native", None)


def negated(tensor):
    return torch._neg_view(tensor.data)


def set_data(change):
    def changed(tensor):
        tensor.data = change(tensor.data)

    return changed


CHANGES = {
    "transposed": lambda t: t.t_(),
    "strided": lambda t: t.as_strided_((4, 4), (1, 4)),
    "data transposed": set_data(lambda t: t.t()),
    "negated": set_data(negated),
    "other data": set_data(lambda t: t.flip(0)),
    "other memory": lambda t: t.set_(t.clone().t() * 0.5),
}
RESIZED = {  # which torch itself refuses for parameters
    "resized": lambda t: t.resize_(2, 8),
    "smaller": lambda t: t.resize_as_(torch.empty(3, 4)),
}
SHAPES = {
    "data of fewer rows": set_data(lambda t: t[:3]),
    "data of another rank": set_data(lambda t: t.reshape(2, 2, 4)),
    "memory of fewer": lambda t: t.set_(torch.ones(5, dtype=t.dtype)),
}


def run(name, change, what, flattened):
    """Parameters after some steps, the second gradient, parameter or buffer changed in
    place before the third."""
    params = params_of(draw(SQUARES, torch.float64))
    give(params, draw(SQUARES, torch.float64, 1))
    if flattened:
        ft.flatten_(params)
    opt = getattr(ft, name)(params, lr=0.05)
    for step in range(5):
        grads = draw(SQUARES, torch.float64, step + 1)
        for param, grad in zip(params, grads, strict=True):
            param.grad.copy_(grad)
        if step == 2:
            second = params[1]
            buffers = [v for v in opt.state[second].values() if v.dim()]
            tensor = {"param": second, "grad": second.grad, "state": buffers[0]}[what]
            with torch.no_grad():
                change(tensor)
        opt.step()
    return flat(params)


@pytest.mark.usefixtures("look")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("what", ["param", "grad", "state"])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_a_change_in_place_of_a_flat_model_is_noticed(name, what, change):
    """Each in a flat model as in one that is not, and there as by torch's class."""
    ours = run(name, change, what, True)
    torch.testing.assert_close(ours, run(name, change, what, False), rtol=0, atol=0)
    if name == "AdamW":
        kind, ft.AdamW = ft.AdamW, torch.optim.AdamW
        try:
            theirs = run(name, change, what, False)
        finally:
            ft.AdamW = kind
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("look")
@pytest.mark.parametrize(
    ("what", "change"),
    [
        *((what, change) for what in ("param", "grad") for change in SHAPES.values()),
        *(("grad", change) for change in RESIZED.values()),
    ],
)
@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
@pytest.mark.parametrize("flattened", [False, True])
def test_another_shape_is_refused_before_anything_is_written(
    flattened, name, what, change
):
    params = params_of(draw(SQUARES, torch.float64))
    give(params, draw(SQUARES, torch.float64, 1))
    if flattened:
        ft.flatten_(params)
    opt = getattr(ft, name)(params, lr=0.05)
    for _ in range(3):
        opt.step()
    second = params[1]
    with torch.no_grad():
        change({"param": second, "grad": second.grad}[what])
    before = [param.detach().clone() for param in params]
    counts = [opt.state[param]["step"].clone() for param in params]
    with pytest.raises((RuntimeError, ValueError), match="shape|size"):
        opt.step()
    for param, was, count in zip(params, before, counts, strict=True):
        assert torch.equal(param, was)
        assert torch.equal(opt.state[param]["step"], count)


@pytest.mark.usefixtures("look")
@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_state_of_a_flat_model_that_is_reset_in_place(rule):
    """A parameter whose state is set to zeros begins anew, and the others go on."""
    found = []
    for flattened in (False, True):
        params = params_of(draw(SQUARES, torch.float64))
        give(params, draw(SQUARES, torch.float64, 1))
        if flattened:
            ft.flatten_(params)
        opt = class_of(rule)(params)
        for step in range(6):
            grads = draw(SQUARES, torch.float64, step + 1)
            for param, grad in zip(params, grads, strict=True):
                param.grad.copy_(grad)
            if step == 3:
                for value in opt.state[params[1]].values():
                    value.zero_()
            opt.step()
        found.append(flat(params))
    torch.testing.assert_close(*found, rtol=1e-13, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("flattened", [False, True])
def test_a_gradient_that_is_its_parameter(flattened, name):
    """It is read before anything is written, and the others, whose gradients follow one
    another, step as ever."""
    found = []
    for module in (torch.optim, ft):
        params = params_of(draw([(3,), (5,), (4, 2)], torch.float64))
        give(params, draw([(3,), (5,), (4, 2)], torch.float64, 1))
        if flattened:
            ft.flatten_(params)
        opt = getattr(module, name)(params, lr=0.05)
        for step in range(4):
            if step == 1:
                params[0].grad = params[0].data
            opt.step()
        found.append(flat(params))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


HOLLOW = """
import sys, torch, fastopt.torch as ft
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.testing._internal.two_tensor import TwoTensor

def two():
    return TwoTensor(torch.ones(3), torch.ones(3))

def fake():
    with FakeTensorMode():
        return torch.ones(3)

def batched():
    return torch._C._functorch._add_batch_dim(torch.ones(2, 3), 0, 1)

def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor

kinds = {
    "TwoTensor": two, "FakeTensor": fake, "wrapper": batched, "freed": freed,
    "AsyncCollectiveTensor": lambda: AsyncCollectiveTensor(torch.ones(3)),
}
for name in ("LAMB", "Lion", "Signum", "AdamW"):
    for word, make in kinds.items():
        for what in ("param", "grad", "state"):
            param = torch.nn.Parameter(torch.ones(3))
            param.grad = torch.ones(3)
            if what == "param" and word != "wrapper":
                param = torch.nn.Parameter(make())
                param.grad = make() if word == "freed" else torch.ones_like(param)
            opt = getattr(ft, name)([param], lr=0.1)
            if what != "param":
                opt.step()
            if what == "grad":
                if word == "freed":
                    param.grad.untyped_storage().resize_(0)
                else:
                    param.grad = make()
            elif what == "state":
                for key, value in opt.state[param].items():
                    if value.dim():
                        opt.state[param][key] = make()
            refused = name != "AdamW" or word == "freed"
            if (what, word) == ("param", "wrapper"):
                refused = False
            before = param.detach().clone() if what != "param" else None
            try:
                opt.step()
            except RuntimeError as error:
                assert not refused or word in str(error), (name, word, what, error)
                assert before is None or torch.equal(before, param) or name == "AdamW"
            except Exception as error:
                assert name == "AdamW", (name, word, what, error)
            else:
                assert not refused, (name, word, what)
param = torch.nn.Parameter(torch.ones(3))
opt = ft.LAMB([param], lr=0.1)
for step in range(2):
    param.grad = torch.ones(3)
    with FakeTensorMode():
        try:
            opt.step()
            raise SystemExit("a step under a FakeTensorMode")
        except RuntimeError as error:
            assert "FakeTensorMode" in str(error)
    opt.step()
pairs = []
for of in (torch.optim, ft):
    param = torch.nn.Parameter(two())
    opt = of.AdamW([param], lr=0.1)
    for step in range(3):
        param.grad = TwoTensor(torch.full((3,), step - 0.7), torch.ones(3))
        opt.step()
    pairs.append(torch.cat([param.detach().a, param.detach().b]))
assert torch.equal(*pairs)
for tensor in (two(), fake()):
    try:
        ft.flatten_([torch.nn.Parameter(tensor)])
        raise SystemExit("flattened")
    except ValueError as error:
        assert type(tensor).__name__ in str(error)
"""


@pytest.mark.parametrize("native", [True, False])
def test_tensors_without_memory_of_their_own(native):
    """In a process of its own, for some ended it."""
    pytest.importorskip("torch.distributed._functional_collectives")
    first = "" if native else "from fastopt.torch import memory; memory.native = None\n"
    done = subprocess.run(
        [sys.executable, "-c", first + HOLLOW],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("look")
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
@pytest.mark.parametrize("flattened", [False, True])
def test_a_gradient_that_two_share_is_set_to_zero_when_both_have_read_it(
    name, flattened
):
    found = []
    for zero_grads in (False, True):
        params = params_of(draw([(5, 3)] * 3))
        if flattened:
            ft.flatten_(params)
        opt = getattr(ft, name)(params, lr=0.1)
        for seed in range(1, 4):
            params[0].grad, params[2].grad = draw([(5, 3)] * 2, seed=seed)
            params[1].grad = params[0].grad
            opt.step(zero_grads=zero_grads)
            zeros = [not param.grad.any() for param in params]
            assert zeros == [zero_grads] * 3
        found.append(flat(params))
    assert torch.equal(*found)


@pytest.mark.usefixtures("look")
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
@pytest.mark.parametrize("flattened", [False, True])
def test_a_parameter_that_is_cut_is_refused_before_anything_is_written(name, flattened):
    params = params_of(draw(SQUARES))
    give(params, draw(SQUARES, seed=1))
    if flattened:
        ft.flatten_(params)
    opt = getattr(ft, name)(params)
    opt.step()
    params[1].data = params[1].data[:3]
    params[1].grad = torch.ones(3, 4)
    before = flat(params)
    with pytest.raises(ValueError, match="cut or pad the state"):
        opt.step()
    assert torch.equal(flat(params), before)
    params[1].data = torch.ones(1, 1).expand(4, 4)
    params[1].grad = torch.ones(4, 4)
    kept = [v.clone() for p in params for v in opt.state[p].values()]
    with pytest.raises(ValueError, match="expanded"):
        opt.step()
    now = [v for p in params for v in opt.state[p].values()]
    assert all(map(torch.equal, kept, now))


def test_a_parameter_that_is_not_initialized_yet_is_left_alone():
    lazy = torch.nn.LazyLinear(2)
    params = [Parameter(torch.ones(3)), *lazy.parameters()]
    opt = ft.SGD(params, lr=0.5)
    params[0].grad = torch.ones(3)
    opt.step()
    lazy(torch.ones(1, 3)).sum().backward()
    before = lazy.weight.detach().clone()
    opt.step()
    assert torch.equal(params[0].detach(), torch.zeros(3))
    torch.testing.assert_close(lazy.weight.detach(), before - 0.5)


def without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.ones(3)
    return TwoTensor(torch.ones(3), torch.ones(3)), freed, fake


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_the_core_refuses_tensors_without_memory_of_their_own():
    """NumPy makes an array of its own where a tensor gives it a null address."""
    for tensor in without_memory():
        with pytest.raises(TypeError, match=r"params\[0\] is a .* without memory of"):
            fastopt.adamw([tensor])
        w = torch.ones(3)
        opt = fastopt.adamw([w], lr=0.1)
        with pytest.raises(TypeError, match=r"grads\[0\] is a .* without memory of"):
            opt.step([tensor])
        assert w.tolist() == [1, 1, 1] and opt.steps == 0
    empty = torch.ones(0)
    fastopt.adamw([empty]).step([torch.ones(0)])  # has no memory either, and needs none


@pytest.mark.parametrize("change", ["estimate", "accumulate"])
def test_a_change_holds_the_memory_of_copied_gradients(change, monkeypatch):
    """A gradient in another layout is copied. An array of the copy does not keep its
    memory, which must stay as it is until the kernels have read it."""

    def changed(overwrite):
        params = params_of(draw(SQUARES, torch.float32))
        opt = ft.SophiaG(params, lr=0.1)
        for param, grad in zip(params, draw(SQUARES, torch.float32, 1), strict=True):
            param.grad = grad.t()
        commit = opt._turns.commit

        def commit_later(calls):
            calls, taken = list(calls), []
            if overwrite:  # memory that was freed is what is handed out first
                taken = [torch.full((4, 4), float("nan")) for _ in range(100)]
            commit(calls)
            del taken

        monkeypatch.setattr(opt._turns, "commit", commit_later)
        getattr(opt, change)()
        estimates = [opt.state[param].get("h") for param in params]
        return estimates if change == "estimate" else opt._sums.tensors

    expected, tensors = changed(False), changed(True)
    assert all(map(torch.equal, tensors, expected))
    assert all(bool(tensor.any()) for tensor in tensors)
