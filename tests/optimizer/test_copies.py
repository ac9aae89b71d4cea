"""copy_to: copies of float32 parameters in 16 bits, written by the step itself."""

import numpy as np
import pytest
from cases import bfloat16, same_bits
from installed import BACKENDS

import fastopt

SHAPES = (70, 90), (3,), (0,), (1,), (40_001,)
OPTIONS = [
    {},
    {"clip_norm": 1.0, "grad_scale": 0.5},
    {"clip_value": 0.1, "zero_grads": True},
]


def drawn(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in SHAPES]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "norm", "value"])
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.lamb, fastopt.sgd])
@pytest.mark.parametrize("dtype", [bfloat16, np.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_are_the_parameters_rounded(backend, dtype, rule, options):
    params, alone = drawn(0), drawn(0)
    copies = [param.astype(dtype) for param in params]
    copies[1] = None
    values = {"backend": backend, "threads": 3, "lr": 0.1}
    opt = rule(params, copy_to=copies, **values)
    other = rule(alone, **values)
    for step in range(1, 4):
        kinds = bfloat16 if step % 2 else np.float32
        opt.step(drawn(step, kinds), **options)
        other.step(drawn(step, kinds), **options)
    for param, expected, copy in zip(params, alone, copies, strict=True):
        assert same_bits(param, expected)
        assert copy is None or same_bits(copy, param.astype(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_what_does_not_move_stay(backend):
    params = drawn(0)
    copies = [np.full(param.shape, 7, bfloat16) for param in params]
    opt = fastopt.adamw(
        params, copy_to=copies, backend=backend, ema=0.9, formats="8bit"
    )
    grads = drawn(1)
    grads[0] = None
    opt.step(grads)
    assert (copies[0] == 7).all()
    assert same_bits(copies[4], params[4].astype(bfloat16))
    opt.step(grads, nonfinite="skip")
    grads[4][0] = np.nan
    before = copies[4].copy()
    opt.step(grads, nonfinite="skip")
    assert same_bits(copies[4], before)


def test_copies_in_the_structure_of_the_parameters():
    tree = {"w": np.ones((3, 4), "f4"), "b": [np.ones(5, "f4")]}
    flat = fastopt.flatten(tree)
    copies = np.zeros(17, bfloat16)
    fastopt.gd(flat, lr=0.5, copy_to=copies).step(fastopt.flatten(tree))
    assert (copies == 0.5).all()
    copies = {"w": np.zeros((3, 4), np.float16), "b": [None]}
    opt = fastopt.gd([{"params": tree}], lr=0.5, copy_to=[copies])
    opt.step([tree | {"w": np.ones((3, 4), "f4"), "b": [np.ones(5, "f4")]}])
    assert (copies["w"] == tree["w"]).all()
    with pytest.raises(RuntimeError, match="with copy_to takes no more groups"):
        opt.add_group({"params": [np.ones(2, "f4")]})


@pytest.mark.parametrize(
    ("param", "copy", "error", "message"),
    [
        (np.ones(4, "f4"), np.ones(4, "f4"), TypeError, "copies are bfloat16 or"),
        (np.ones(4), np.ones(4, bfloat16), TypeError, "of parameters of float32"),
        (np.ones(4, bfloat16), np.ones(4, bfloat16), TypeError, "params has bfloat16"),
        (np.ones(4, "f4"), np.ones(5, bfloat16), ValueError, r"shape \(5,\) but"),
        (np.ones(4, "f4"), np.ones(8, "f2")[::2], ValueError, "not C-contiguous"),
        (np.ones(4, "f4"), [np.ones(4, "f2")], TypeError, "copy_to"),
    ],
)
def test_refused_copies(param, copy, error, message):
    with pytest.raises(error, match=message):
        fastopt.gd(param, copy_to=copy)
    read_only = np.ones(4, bfloat16)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="copy_to is read-only"):
        fastopt.gd(np.ones(4, "f4"), copy_to=read_only)


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlaps_are_refused(backend):
    memory = np.zeros(10, np.float16)
    with pytest.raises(ValueError, match="overlap in memory"):
        fastopt.gd(memory[:8].view("f4"), copy_to=memory[4:8], backend=backend)
    copy = memory[:4]
    opt = fastopt.gd(np.ones(4, "f4"), copy_to=copy, backend=backend)
    with pytest.raises(ValueError, match="overlaps the parameters or their state"):
        opt.step(copy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_follow_whatever_moves_the_parameters(backend):
    """A Lookahead's synchronization, and loaded masters."""
    param, copy = np.ones(5000, np.float32), np.zeros(5000, bfloat16)
    opt = fastopt.Lookahead(fastopt.gd(param, lr=0.5, copy_to=copy, backend=backend), 2)
    for _ in range(2):
        opt.step(np.ones(5000, np.float32))
    assert (param == 0.5).all() and (copy == 0.5).all()
    opt.load_master_params(np.full(5000, 3, np.float32))
    assert (param == 3).all() and (copy == 3).all()
