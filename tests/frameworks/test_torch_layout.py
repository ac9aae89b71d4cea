"""Where PyTorch keeps what a tensor is, is learned at import (fastopt/torch/layout.py).
What the native code reads there is what torch says when it is asked."""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastopt.torch import dtensors, layout, memory  # noqa: E402

pytestmark = pytest.mark.skipif(memory.native is None, reason="nothing was compiled")
memory.learn()


def base(*shape, dtype=torch.float32):
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


KINDS = {
    "vector": lambda: base(7),
    "scalar": lambda: base(),
    "matrix": lambda: base(3, 5),
    "transposed": lambda: base(5, 3).t(),
    "slice": lambda: base(9, 4)[2:5],
    "strided": lambda: base(9, 4)[::2, 1:3],
    "five": lambda: base(2, 3, 2, 3, 2),
    "six": lambda: base(2, 1, 2, 3, 2, 2),
    "empty": lambda: base(0, 3),
    "empty, NumPy's": lambda: torch.from_numpy(np.ones((0, 3), np.float32)[:, :2]),
    "empty without strides": lambda: torch.from_numpy(np.ones(0, np.float32)),
    "one": lambda: base(1, 1).as_strided((1, 1), (5, 9)),
    "half": lambda: base(3, 5, dtype=torch.bfloat16),
    "double": lambda: base(3, 5, dtype=torch.float64),
    "complex": lambda: base(3, 5, dtype=torch.complex64),
    "conjugated": lambda: base(3, 5, dtype=torch.complex64).conj(),
    "negated": lambda: torch._neg_view(base(3, 5)),
}
# Ways in which a tensor becomes another one, although its object stays.
HARMLESS = "nothing", "numbers"
CLONES = []  # which share memory with a tensor until it is written to
CHANGES = {
    "nothing": lambda t: None,
    "numbers": lambda t: t.add_(1),
    "data": lambda t: setattr(t, "data", t.data.clone()),
    "dtype": lambda t: setattr(t, "data", t.data.to(torch.float16)),
    "words": lambda t: setattr(t, "data", t.data.view(torch.int32)),
    "shape": lambda t: setattr(t, "data", t.data.flatten()[None]),
    "half of it": lambda t: setattr(t, "data", t.data[:1]),
    "turned": lambda t: setattr(t, "data", t.data.clone().t()),
    "moved on": lambda t: t.as_strided_((3, 5), (5, 1), 1),
    "shorter": lambda t: t.as_strided_((2, 5), (5, 1)),
    "steeper": lambda t: t.as_strided_((3, 5), (1, 3)),
    "negated": lambda t: setattr(t, "data", torch._neg_view(t.data)),
    "freed": lambda t: t.untyped_storage().resize_(0),
    "larger": lambda t: t.untyped_storage().resize_(1 << 20),
    "shared": lambda t: CLONES.append(torch._lazy_clone(t)),
    "swapped": lambda t: torch.utils.swap_tensors(t, base(3, 5)),
}


def looks(param, buffers=(), change=lambda tensor: None):
    """What both kinds of Tensors find after a change of the last tensor: None, or the
    addresses of gradients and which of them are odd."""
    groups = [{"params": [param]}]
    watching = [
        kind([param], [True], groups, {}, list(buffers), False, None, dtensors.fits)
        for kind in (memory.native.Tensors, memory.Tensors)
    ]
    for tensors in watching:
        assert tensors.look(groups, {}) is not None
    change([param, *buffers][-1])
    return [
        None
        if tensors.look(groups, {}) is None
        else (tensors.addresses.tolist(), tensors.odd)
        for tensors in watching
    ]


def test_the_layout_is_the_same_again():
    tensors = []
    for _ in range(50):  # the heap is another one each time
        tensors.append(torch.ones(len(tensors)))
        assert layout.find() == layout.find()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_grad", KINDS)
def test_gradients_are_seen_as_torch_says(kind, of_grad):
    param, grad = KINDS[kind](), KINDS[of_grad]()
    if grad.shape != param.shape or grad.dtype != param.dtype:
        with pytest.raises(RuntimeError):
            param.grad = grad
        return
    param.grad = grad
    ours, theirs = looks(param)
    assert ours is not None and theirs is not None
    if param.numel():
        assert ours == theirs
    else:  # it is there, no matter where
        assert (ours[0] != [0], ours[1]) == (theirs[0] != [0], theirs[1])


@pytest.mark.parametrize("what", ["parameter", "buffer"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, what):
    roomy = base(4, 5)[:3]
    tensors = [roomy] if what == "parameter" else [base(3), roomy]
    found = looks(tensors[0], tensors[1:], CHANGES[change])
    assert [look is None for look in found] == [change not in HARMLESS] * 2


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("keys", "negated"),
        ("data", "larger"),
        ("offset", "moved on"),
        ("dtype", "words"),
        ("deleter", "shared"),
    ],
)
def test_reading_the_wrong_word_misses_a_change(word, change):
    found = layout.find()
    try:
        # The first word is the same for all. (Sizes are compared with DLPack's.)
        memory.know(found._replace(**{word: 0}))
        ours, theirs = looks(base(4, 5)[:3], change=CHANGES[change])
    finally:
        memory.know(found)
    assert ours is not None and theirs is None


def test_lazy_clones_stay_as_they_are():
    """A step writes to parameters and, with zero_grads, to gradients. (State lies in
    memory of NumPy's, of which torch makes no lazy clones.)"""
    ft = pytest.importorskip("fastopt.torch")
    param = torch.nn.Parameter(base(3, 5))
    opt = ft.Adam([param], 0.1)
    for _ in range(3):
        param.grad = base(3, 5)
        opt.step()
        clones = [torch._lazy_clone(tensor) for tensor in (param.data, param.grad)]
        before = [clone.tolist() for clone in clones]
        opt.step(zero_grads=True)
        assert [clone.tolist() for clone in clones] == before
        assert not param.grad.any() and param.tolist() != before[0]


UNDER = {
    "nothing": "first()",
    "grad": "torch.func.grad(lambda x: (first(), (x * 2).sum())[1])(torch.ones(3))",
    "vmap": "torch.func.vmap(lambda x: (first(), x * 2)[1])(torch.ones(3))",
    "inference mode": "with torch.inference_mode(): first()",
    "fake tensors": "with FakeTensorMode(): first()",
}


@pytest.mark.parametrize("under", UNDER)
def test_the_first_import_may_be_anywhere(under):
    """The layout is known after the first plan."""
    code = f"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
def first():
    import fastopt.torch
{UNDER[under]}
import fastopt.torch
from fastopt.torch import memory
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
with torch.inference_mode({under == "inference mode"}):
    opt = fastopt.torch.SGD([param], 0.5)
    opt.step()
assert param.tolist() == [0.5] * 3 and memory.known
assert memory.native.simple([param], [None], memory.SIMPLE_TYPES)[0]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_negated_views_of_every_dtype(dtype):
    ft = pytest.importorskip("fastopt.torch")
    for flip in (torch._neg_view, torch.clone):
        ours, theirs = (
            torch.nn.Parameter(flip(torch.ones(4, dtype=dtype))) for _ in range(2)
        )
        for param, module in ((ours, ft), (theirs, torch.optim)):
            param.grad = torch._neg_view(torch.full((4,), 0.5, dtype=dtype))
            module.SGD([param], 0.5).step()
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("compiled", [True, False])
def test_a_gradient_whose_storage_shrinks_between_steps(compiled, monkeypatch):
    ft = pytest.importorskip("fastopt.torch")
    if not compiled:
        monkeypatch.setattr(memory, "native", None)
    param = torch.nn.Parameter(torch.ones(100))
    param.grad = torch.ones(100)
    opt = ft.SGD([param], 0.5)
    opt.step()
    param.grad.untyped_storage().resize_(4 * 99)
    with pytest.raises(RuntimeError, match="made smaller"):
        opt.step()
    assert param.tolist() == [0.5] * 100


def test_empty_parameters_step_as_others_do():
    """Those of NumPy's have strides of 0."""
    ft = pytest.importorskip("fastopt.torch")
    for empty in ("empty", "empty, NumPy's", "empty without strides"):
        param = torch.nn.Parameter(KINDS[empty]().float())
        opt = ft.Adam([param, torch.nn.Parameter(torch.ones(3))], 0.1)
        for _ in range(3):
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.from_numpy(np.ones(p.shape, np.float32))
            opt.step()
        assert opt.state[param]["step"] == 3
