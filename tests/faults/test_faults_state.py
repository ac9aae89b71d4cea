"""Saved states that are damaged: each is loaded as it is, or refused in words of ours,
and then nothing has changed."""

import copy
import functools
import math
import os
import random
import traceback

import numpy as np
import pytest
from cases import alike, nonzero

import fastopt

PACKAGE = os.path.dirname(fastopt.__file__)


def deep(levels=100_000):
    nested = []
    for _ in range(levels):
        nested = [nested]
    return nested


def endless():
    itself = []
    itself.append(itself)
    return itself


class Unwilling:
    """An object that answers nothing."""

    def __eq__(self, other):
        raise ValueError("not comparable")

    __hash__ = object.__hash__

    def __repr__(self):
        return "<unwilling>"


# What may stand where something else should. They are made anew each time.
RUBBISH = [
    *(lambda v=v: v for v in (None, True, "x", "", 0, 1, -1, 3, 2**63, 10**400, 1.5)),
    *(lambda v=v: v for v in (math.nan, math.inf, -0.0, 1e39, 5e-324, 1j, b"x", ...)),
    *(lambda k=k: k() for k in (list, dict, set, tuple, object, Unwilling)),
    *(deep, endless, lambda: [None], lambda: [1.0], lambda: {"lr": 1.0}),
    *(lambda v=v: v for v in (np.float32(2), np.float64(math.nan), np.int64(2))),
    *(lambda v=v: v for v in (np.bool_(True), np.str_("adamw"))),
    lambda: np.zeros(3, np.float32),
    lambda: np.zeros((2, 2)),
    lambda: np.zeros(0),
    lambda: np.array(2.0),
    lambda: np.array([None, "x"], object),
    lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
]


def places(tree, path=(), depth=0):
    """The paths of all that a nested state holds."""
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    else:
        return
    for key, child in children:
        yield (*path, key)
        if depth < 6:
            yield from places(child, (*path, key), depth + 1)


def variants_of(value):
    """What is nearly the value: another dtype or shape, one more or less, another
    sign."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield value.astype(np.float64 if value.dtype == np.float32 else np.float32)
        yield np.nan_to_num(value).astype(np.int64)
        yield from (value[None], value[..., :-1] if value.ndim else value[None, None])
        yield np.concatenate([value.ravel(), value.ravel()])
        yield np.full_like(value, math.nan)
        yield value.T
        yield value.tolist()
        yield value.astype(value.dtype.newbyteorder())
        yield np.repeat(value.ravel(), 2)[::2].reshape(value.shape)
    elif isinstance(value, (int, float)):
        yield from (value + 1, -value, str(value), [value])
        if abs(value) < 1e300:  # larger integers are no floats
            yield from (float(value), np.float64(value))
    elif isinstance(value, (list, tuple)):
        yield from (value[:-1], [*value, *value], value[::-1], tuple(value), dict())
        yield dict(enumerate(value))
    elif isinstance(value, dict):
        yield from ({**value, "more": 1}, list(value.items()), list(value), {})
        yield {**value, 3: None}
        yield dict(reversed(value.items()))
    elif isinstance(value, str):
        yield from (value + "x", value.upper(), value.encode())


def damaged(saved, rng):
    """A copy with one or two places damaged; and how."""
    saved, how = copy.deepcopy(saved), []
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(list(places(saved)))
        holder = functools.reduce(lambda tree, key: tree[key], path[:-1], saved)
        if isinstance(holder, tuple):
            continue
        kind = rng.choice(("rubbish", "variant", "missing", "more"))
        variants = list(variants_of(holder[path[-1]]))
        if kind == "missing":
            del holder[path[-1]]
        elif kind == "variant" and variants:
            number = rng.randrange(len(variants))
            holder[path[-1]] = variants[number]
            kind = f"variant {number}"
        elif kind == "more" and isinstance(holder, dict):
            holder[rng.choice(("more", 3, None, "lr"))] = rng.choice(RUBBISH)()
        else:
            number = rng.randrange(len(RUBBISH))
            holder[path[-1]] = RUBBISH[number]()
            kind = f"rubbish {number}"
        how.append(f"{kind} at {path}")
        if not list(places(saved)):
            break
    return saved, " and ".join(how)


def taken(now, saved):
    """Whether an optimizer has all that was saved; what more was there is left."""
    if isinstance(now, dict) and isinstance(saved, dict):
        return now.keys() <= saved.keys() and all(taken(now[k], saved[k]) for k in now)
    return alike(now, saved)


def raised_by_us(error):
    """Whether a statement of ours raised it, to say something, and nothing else did."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.filename.startswith(PACKAGE) and frame.line.startswith("raise")


def judge(opt, saved, snapshot):
    """Load a state, which is taken as it is or refused, and then nothing changed."""
    before = snapshot(opt)
    try:
        opt.load_state_dict(saved)
    except (TypeError, ValueError, RuntimeError) as error:
        assert alike(before, snapshot(opt)), f"changed, with {error!r}"
        assert raised_by_us(error), f"not in our words: {error!r}"
    else:
        now = opt.state_dict()
        for inner, old in (now, saved), (now.get("opt"), saved.get("opt")):
            if inner and "format" in inner:
                for key in {"formats", "seed"} - old.keys():  # as older versions saved
                    del inner[key]
                if old["format"] == 2 or old["params"] is None:  # names do not matter
                    del inner["format"], inner["params"]
        assert taken(now, saved), "taken as something else"


# The core -----------------------------------------------------------------------------


def params_of(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "w": nonzero(rng, 6, dtype).reshape(3, 2),
        "b": [nonzero(rng, 3, dtype), nonzero(rng, 1, dtype)],
    }


def in_groups(params):
    return [{"params": params["w"]}, {"params": params["b"], "frozen": True}]


def trained(make, groups, accumulated):
    params = params_of()
    opt = make(in_groups(params) if groups else params)
    grads = [params["w"], params["b"]] if groups else params
    for _ in range(3):
        opt.step(copy.deepcopy(grads))
    if accumulated:
        opt.accumulate(copy.deepcopy(grads))
    return opt


OPTIMIZERS = {
    "adamw": functools.partial(fastopt.adamw, lr=0.01, ema=0.9),
    "sgd": functools.partial(fastopt.sgd, lr=0.01, momentum=0.9, nesterov=True),
    "gd": functools.partial(fastopt.sgd, lr=0.01),
    "prodigy": fastopt.prodigy,
    "lamb": fastopt.lamb,
    "adafactor": fastopt.Adafactor,
    "muon": fastopt.Muon,
    "lookahead": lambda params: fastopt.Lookahead(fastopt.adamw(params), k=2),
}


def everything(opt):
    return {**opt.state_dict(), "params": [p.copy() for p in opt._params.arrays]}


def test_damaged_state(campaign):
    rng = random.Random(0)
    for name, make in OPTIMIZERS.items():
        for groups in (False, True):
            opt = trained(make, groups, accumulated=False)
            other = trained(make, groups, accumulated=True)
            states = opt.state_dict(), other.state_dict()
            for _ in range(800 if campaign.long else 8):
                saved, how = damaged(rng.choice(states), rng)
                campaign.attempt(f"{name}: {how}", judge, opt, saved, everything)
        for rubbish in RUBBISH:
            campaign.attempt(name, judge, opt, rubbish(), everything)


# fastopt.torch ------------------------------------------------------------------------


def tensor_classes():
    import fastopt.torch as ft

    return {
        "AdamW": functools.partial(ft.AdamW, lr=0.01, amsgrad=True),
        "AdamW ema": functools.partial(ft.AdamW, lr=0.01, ema=0.9),
        "SGD": functools.partial(ft.SGD, lr=0.01, momentum=0.9),
        "RMSprop": functools.partial(ft.RMSprop, lr=0.01, centered=True),
        **{name: getattr(ft, name) for name in ("NAdam", "ASGD", "Adafactor")},
        **{name: getattr(ft, name) for name in ("Lion", "Prodigy", "LAMB")},
    }


def trained_tensors(make):
    import torch

    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (3,))]
    opt = make(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        opt.step()
    return opt, params


def as_arrays(tree):
    """Tensors as arrays, which have no memory in common with them."""
    if hasattr(tree, "detach"):
        return tree.detach().numpy().copy()
    if isinstance(tree, dict):
        return {key: as_arrays(value) for key, value in tree.items()}
    return list(map(as_arrays, tree)) if isinstance(tree, (list, tuple)) else tree


def as_tensors(tree, depth=0):
    import torch

    if isinstance(tree, np.ndarray) and tree.dtype != object:
        return torch.from_numpy(tree.astype(tree.dtype.newbyteorder("="), order="C"))
    if isinstance(tree, dict) and depth < 4:
        return {key: as_tensors(value, depth + 1) for key, value in tree.items()}
    return tree


def judge_tensors(make, saved):
    """Torch's loader refuses in its words, and takes much as it is; but nothing has
    changed where a load or the step after it has failed, and no process ends."""
    opt, params = trained_tensors(make)

    def snapshot():
        return as_arrays([opt.state_dict()["state"], params])

    before = snapshot()
    try:
        opt.load_state_dict(saved)
    except Exception as error:
        assert alike(before, snapshot()), f"changed, with {error!r}"
        return
    if any(
        group.get("differentiable", False) is not False for group in opt.param_groups
    ):
        return  # torch's own step, which does one parameter after the other
    before = as_arrays(params)
    try:
        opt.step()
    except Exception as error:
        assert alike(before, as_arrays(params)), f"a part of a step, with {error!r}"


def test_damaged_state_of_tensors(campaign):
    pytest.importorskip("torch", reason="torch is not installed")
    rng = random.Random(0)
    for name, make in tensor_classes().items():
        state = as_arrays(trained_tensors(make)[0].state_dict())
        for _ in range(400 if campaign.long else 8):
            saved, how = damaged(state, rng)
            what = f"{name}: {how}"
            campaign.attempt(what, judge_tensors, make, as_tensors(saved))
