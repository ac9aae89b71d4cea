"""The classes of fastopt.torch with tensors that pose as a GPU's, in Numba's simulator:
run by test_torch_cuda.py in a process of its own.

The tensors are in host memory, and so is the device memory of the simulator. What
counts are the bits, which must be those of the classes on a CPU, and what is read back
to the host: it would have to wait for a GPU.
"""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from cuda_simulator import quick_simulator  # noqa: F401
from posing_tensors import (
    MIXED,
    SHAPES,
    FakeScaler,
    drawn,
    give,
    gpu,
    kept,
    params_of,
    posing_arrays,  # noqa: F401
    quiet,
    reads,
)
from torch import Tensor

import fastopt
import fastopt.torch as ft


def run(simulated, name, steps, make, dtype=torch.float32):
    """Return what some steps leave, and what they have read after the first two."""
    found = []
    with gpu(simulated):
        params = params_of(dtype)
        opt = getattr(ft, name)(params, **make)
        for t in range(steps):
            give(params, t + 1, absent=(1,) if t == 2 else ())
            if t < 2:
                opt.step()
                continue
            with reads(found):
                opt.step()
        for param in params:
            param.grad = None
        kinds = torch.float32, torch.bfloat16, torch.float16
        tasks = [drawn(9 + i, kind) for i, kind in enumerate(kinds)]
        opt.step(grads=tasks, weights=[0.5, -1.0, 2.0])
        return kept(opt), opt.grad_norm, found


CASES = [
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("AdamW", {"lr": 0.1, "amsgrad": True}),
    ("NAdam", {"lr": 0.1}),
    ("Lion", {"lr": 0.1}),
    ("LAMB", {"lr": 0.1}),
    ("Adafactor", {"lr": 0.1}),
    ("DoG", {}),
]
HOSTS = "Adafactor", "DoG"  # whose averages, or carried sums, the host keeps


@pytest.mark.parametrize(("name", "make"), CASES, ids=[name for name, _ in CASES])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, MIXED],
    ids=["float32", "bfloat16", "float16", "mixed"],
)
@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_norms_are_not_read_back(name, make, dtype, clip_norm):
    make = {**make, "clip_norm": clip_norm, "ema": 0.5}
    expected, norm, _ = run(False, name, 5, make, dtype)
    got, same_norm, found = run(True, name, 5, make, dtype)
    for ours, theirs in zip(expected, got, strict=True):
        assert torch.equal(ours, theirs)
    assert norm == same_norm or (math.isnan(norm) and math.isnan(same_norm))
    assert (found == []) == (name not in HOSTS)


@pytest.mark.parametrize(
    ("make", "dtype", "scaled"),
    [
        ({"formats": "8bit"}, torch.float32, False),
        ({"formats": "8bit"}, MIXED, True),
        ({"formats": "8bit", "master": "bf16+r8"}, torch.bfloat16, True),
        ({"formats": "bf16", "master": "bf16+r16"}, torch.bfloat16, True),
        ({"formats": "bf16", "master": "bf16+r16"}, MIXED, True),
        ({"clip_norm": 0.1, "master": "bf16+r16"}, MIXED, True),
    ],
    ids=[
        "8bit, counted by the host",
        "8bit, mixed",
        "8bit and bf16+r8",
        "bf16 and bf16+r16",
        "bf16 and bf16+r16, mixed",
        "bf16+r16, mixed, clipped",
    ],
)
def test_formats(make, dtype, scaled):
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of(dtype, [(4099,), (7,)])
            opt = ft.AdamW(params, lr=0.1, **make)
            scaler = FakeScaler(opt)
            for t in range(3):
                give(params, t + 1, absent=(1,) if t == 0 else ())
                if t == 2:
                    params[0].grad[70] = math.inf
                if scaled:
                    scaler.step(t == 1, 2.0)
                elif t != 1:
                    opt.step()
            several = dtype is MIXED and not simulated
            assert len(opt._plan.parts) == 1 + several
            found.append([*kept(opt), torch.tensor(opt.nonfinite_groups)])
    expected, got = found
    assert len(expected) == len(got)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert bool(expected[-1]) == ("8bit" in make.values())


@pytest.mark.parametrize(
    ("name", "dtype"), [("SGD", torch.bfloat16), ("AdamW", torch.float32)]
)
def test_state_of_16_bits(name, dtype):
    """AdamW's is rounded stochastically, SGD's to nearest."""
    more = {"momentum": 0.9} if name == "SGD" else {}
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of(dtype, [(4099,), (7,)])
            opt = getattr(ft, name)(params, lr=0.1, state_dtype=torch.bfloat16, **more)
            for t in range(2):
                give(params, t + 1)
                opt.step()
            entries = [v for entry in opt.state.values() for v in entry.values()]
            assert torch.bfloat16 in {v.dtype for v in entries}
            found.append(kept(opt))
    assert all(map(torch.equal, *found))


def test_the_norm_is_a_number():
    with gpu():
        params = params_of()
        opt = ft.AdamW(params, clip_norm=0.5)
        assert math.isnan(opt.grad_norm)
        for t in range(3):
            give(params, t)
            opt.step()
        grads = torch.cat([p.grad.flatten() for p in params])
        assert callable(vars(opt)["grad_norm"])
        assert opt.grad_norm == pytest.approx(grads.norm().item())
        for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert type(vars(other)["grad_norm"]) is float
            assert other.grad_norm == opt.grad_norm
        assert "grad_norm" not in opt.state_dict()
        opt.grad_norm = 2.0
        assert opt.grad_norm == 2.0


# Counts on the device ---------------------------------------------------------------


FLAGS = 0, 1, 0, 0, 1, 0
COUNTED = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1}),
    ("AdamW", {"lr": 0.1, "amsgrad": True}),
    ("AdamW", {"lr": 0.1, "maximize": True}),
    ("Lion", {"lr": 0.1}),
    ("LAMB", {"lr": 0.1}),
]
IDS = [f"{name}{i}" for i, (name, _) in enumerate(COUNTED)]


def run_scaled(simulated, name, make, dtype, flags=FLAGS):
    with gpu(simulated):
        params = params_of(dtype)
        opt = getattr(ft, name)(params, **make)
        scaler = FakeScaler(opt)
        for t, found in enumerate(flags):
            give(params, t + 1, absent=(1,) if t in (0, 3) else ())
            if simulated and t:
                quiet(partial(scaler.step, found, 2.0**t))
            else:
                scaler.step(found, 2.0**t)
        return kept(opt), opt.skipped


@pytest.mark.parametrize(("name", "make"), COUNTED, ids=IDS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, MIXED],
    ids=["float32", "bfloat16", "mixed"],
)
@pytest.mark.parametrize("clip_norm", [None, 0.7])
def test_what_a_scaler_has_found_is_not_read(name, make, dtype, clip_norm):
    make = {**make, "clip_norm": clip_norm, "ema": 0.5}
    expected, skipped = run_scaled(False, name, make, dtype)
    got, same = run_scaled(True, name, make, dtype)
    assert len(expected) == len(got)
    for ours, theirs in zip(expected, got, strict=True):
        assert torch.equal(ours, theirs)
    assert skipped == same == 0


def test_a_real_scaler():
    """torch's own, which divides no gradients itself if the class is ``fused``."""
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of(shapes=SHAPES[:3])
            opt = ft.AdamW(params, lr=0.1, fused=True, clip_norm=0.5)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            for t in range(5):
                opt.zero_grad()
                loss = sum(
                    (p * g).sum() for p, g in zip(params, drawn(t), strict=False)
                )
                scaler.scale(loss * (math.inf if t == 2 else 1.0)).backward()
                if simulated and t:
                    quiet(partial(scaler.step, opt))
                else:
                    scaler.step(opt)
                scaler.update()
            found.append(kept(opt))
            assert scaler.get_scale() == 2.0
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "make"), COUNTED, ids=IDS)
def test_steps_that_are_skipped(name, make):
    """Those with gradients that are not finite, of which the host does not know."""
    found = []
    make = {**make, "nonfinite": "skip", "clip_norm": 0.7}
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of()
            opt = getattr(ft, name)(params, **make)
            for t in range(7):
                give(params, t + 1, absent=(1,) if t == 3 else ())
                if t in (1, 2, 5):
                    params[0].grad[1, 2] = math.inf if t == 1 else math.nan
                zero = {"zero_grads": t == 5}
                if simulated and t:
                    quiet(partial(opt.step, **zero))
                else:
                    opt.step(**zero)
                assert t != 5 or not any(p.grad.any() for p in params)
            assert opt.skipped == opt.skipped == 3
            found.append([*kept(opt), torch.tensor(opt.grad_norm)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def scheduled(opt, factor):
    """Do what torch's schedulers do."""
    for group in opt.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(float(group["lr"]) * factor)
        else:
            group["lr"] *= factor


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "LAMB", "Adam"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_learning_rates_on_the_device(name, kind):
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of(shapes=(*SHAPES, (9,)))
            groups = [{"params": params[:2]}, {"params": params[2:4], "lr": 0.25}]
            groups += [{"params": params[4:], "weight_decay": 0.5}]
            opt = getattr(ft, name)(
                groups,
                lr=0.125,
                weight_decay_mask=lambda name, param: param.ndim > 1,
            )
            for i, group in enumerate(opt.param_groups):
                group["capturable"] = simulated
                if i != 1:
                    group["lr"] = torch.tensor(group["lr"], dtype=kind)
            for t in range(5):
                give(params, t + 1, absent=(0,) if t == 2 else ())
                if simulated and t:
                    quiet(opt.step)
                else:
                    opt.step()
                scheduled(opt, 0.5)
            assert opt._plan.counted == simulated
            found.append(kept(opt))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_counts_in_the_state():
    with gpu():
        params = params_of()
        opt = ft.AdamW(params, capturable=True)
        for t in range(3):
            give(params, t, absent=(1,) if t == 2 else ())
            opt.step()
        counts = [opt.state[p]["step"] for p in params]
        assert [c.item() for c in counts] == [3, 2, 3, 3, 3]
        assert {c.dtype for c in counts} == {torch.float32}
        assert len({c.untyped_storage().data_ptr() for c in counts}) == 1
        # A state of torch's has them one by one.
        saved = copy.deepcopy(opt.state_dict())
        for entry in saved["state"].values():
            entry["step"] = entry["step"].clone()
        other = ft.AdamW(params_of(), capturable=True)
        others = other.param_groups[0]["params"]
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p.data)
        other.load_state_dict(saved)
        for o in (opt, copy.deepcopy(opt), other):
            own = o.param_groups[0]["params"]
            give(own, 9)
            quiet(o.step) if o is not opt else o.step()
            assert [o.state[p]["step"].item() for p in own] == [4, 3, 4, 4, 4]
        assert all(map(torch.equal, kept(opt), kept(other)))


def test_the_host_takes_the_counts_over():
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of()
            opt = ft.AdamW(params, lr=0.1)
            scaler = FakeScaler(opt)
            for t in range(6):
                give(params, t + 1, absent=(1,) if t == 1 else ())
                if t < 3:
                    scaler.step(t == 1, 4.0)
                elif t == 3:
                    opt.step(nonfinite="raise")
                    assert not opt._plan.counted
                elif t == 4:
                    opt.step(nonfinite="skip")
                else:
                    opt.step_param(params[0])
            found.append(kept(opt))
    assert all(map(torch.equal, *found))


def test_what_only_the_host_can_count():
    with gpu():
        params = params_of()
        opt = ft.ScheduleFreeAdamW(params)
        opt.param_groups[0]["capturable"] = True
        give(params, 0)
        with pytest.raises(RuntimeError, match="capturable=True"):
            opt.step()
        nadam = ft.NAdam(params)
        scaler = FakeScaler(nadam)
        before = kept(nadam)
        scaler.step(1, 2.0)
        assert all(map(torch.equal, before, kept(nadam)))
        scaler.step(0, 2.0)
        assert not nadam._plan.counted
    opt = ft.Lion(params)
    opt.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match="capturable=True"):
        opt.step()


def test_scalars_that_kernels_cannot_compute():
    def scalars(t, lr=0.1):
        return (float(str(lr)) / t,)

    def update(p, g, lr):
        return (p - lr * g,)

    rule = fastopt.Rule(update, scalars)
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of()
            opt = ft.optimizer(rule, "Own")(params)
            for t in range(3):
                give(params, t)
                opt.step(nonfinite="skip")
            assert not opt._plan.counted
            found.append(kept(opt))
            opt.param_groups[0]["capturable"] = True
            with pytest.raises(RuntimeError, match="capturable=True"):
                opt.step()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    "then", ["same plan", "group", "reload", "copy", "host", "no momentum", "torch"]
)
def test_a_first_step_that_was_skipped_is_not_the_first(then):
    """torch counts no steps of SGD: the first is that without a buffer, which is there
    on a GPU."""
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of(shapes=SHAPES[:2])
            opt = ft.SGD(params, lr=1.0, momentum=0.9, dampening=0.5)
            give(params, 0)
            params[0].grad[1] = math.inf
            opt.step(nonfinite="skip")
            give(params, 1, absent=(1,))
            if then != "same plan":
                opt.step(nonfinite="skip")
            if then == "no momentum":
                opt.param_groups[0].update(momentum=0.0, dampening=0.0)
                give(params, 4)
                opt.step(nonfinite="skip")
                opt.param_groups[0].update(momentum=0.9, dampening=0.5)
            elif then == "torch":
                opt.param_groups[0]["differentiable"] = True
                give(params, 4)
                with torch.no_grad():
                    opt.step()
                opt.param_groups[0]["differentiable"] = False
            elif then == "group":
                opt.add_param_group({"params": params_of(shapes=[(2,)])})
            elif then == "reload":
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            elif then == "copy":
                opt = pickle.loads(pickle.dumps(opt))
                params = opt.param_groups[0]["params"]
            nonfinite = "raise" if then == "host" else "skip"
            for t in (2, 3):
                give(params, t)
                params[1].grad.sub_(params[1].grad)  # which tells -0.0 from 0.0
                opt.step(nonfinite=nonfinite)
            found.append(kept(opt))
            assert opt.skipped == 1
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_skipped_steps_of_two_plans():
    """Those with gradients in ``.grad`` and others take turns, and nobody waits."""
    with gpu():
        params = params_of(shapes=SHAPES[:2])
        opt = ft.AdamW(params, nonfinite="skip")
        for t in range(3):
            for value in (1.0, math.nan):
                grads = [torch.full_like(p, value) for p in params]
                for given in (None, grads):
                    for param, grad in zip(params, grads, strict=True):
                        param.grad = None if given else grad
                    step = partial(opt.step, grads=given)
                    quiet(step) if t else step()
        assert opt.skipped == 6
        opt.skipped = 0
        give(params, 0)
        opt.step()
        assert opt.skipped == 0


def test_a_scalers_steps_do_not_count_as_skipped():
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of()
            opt = ft.AdamW(params, lr=0.1, nonfinite="skip")
            scaler = FakeScaler(opt)
            for t, flag in enumerate((0, 1, 0, 0, 1)):
                give(params, t + 1)
                if t in (3, 4):
                    params[2].grad[7] = math.nan
                scaler.step(flag, 2.0)
            assert opt.skipped == 1
            found.append(kept(opt))
    assert all(map(torch.equal, *found))


def test_accumulated_gradients():
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of()
            opt = ft.AdamW(params, lr=0.1)
            for t in range(3):
                for k in range(2):
                    give(params, 2 * t + k, absent=(1,) if k == t else ())
                    opt.accumulate(grad_scale=0.5)
                opt.step(nonfinite="skip", clip_norm=0.5)
            found.append([*kept(opt), torch.tensor(opt.grad_norm)])
    assert all(map(torch.equal, *found))


def test_release_in_the_backward_pass():
    """Each parameter is stepped alone, with its own count."""
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = params_of()
            opt = ft.AdamW(params, lr=0.1)
            opt.param_groups[0]["capturable"] = simulated
            for t in range(3):
                give(params, t)
                for param in params[t:]:
                    opt.step_param(param)
            give(params, 9)
            opt.step()
            found.append(kept(opt))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64,)])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_norms_that_the_host_takes(dtypes, clip_norm, nonfinite):
    """Those over several dtypes, and those in float64 that squares may overflow."""
    several, needed = len(dtypes) > 1, clip_norm is not None or nonfinite == "skip"
    host = needed if several else nonfinite == "skip"
    found = []
    for simulated in (False, True):
        with gpu(simulated):
            params = [p for dtype in dtypes for p in params_of(dtype, SHAPES[:2])]
            opt = ft.AdamW(params, lr=0.1, clip_norm=clip_norm, nonfinite=nonfinite)
            scaler = FakeScaler(opt)
            for t in range(5):
                for i, param in enumerate(params):
                    (grad,) = drawn(10 * t + i, param.dtype, [param.shape])
                    param.grad = grad * (1e200 if param.dtype.itemsize == 8 else 1)
                if t == 3 and nonfinite == "skip":
                    params[1].grad[0] = math.nan
                scaler.step(t == 1, 2.0)
            assert opt._plan.counted == (simulated and not host)
            assert opt.skipped == (nonfinite == "skip")
            found.append([*kept(opt), torch.tensor(opt.grad_norm)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
