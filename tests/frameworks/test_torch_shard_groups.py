"""Processes that step whole parameters, each a share of them, as inside torch's
ZeroRedundancyOptimizer; and those that step all of them, in DistributedDataParallel."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from ranks import Ranks, fixture, numbers  # noqa: E402
from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import fastopt.torch  # noqa: E402

NAMES = ["SGD", "AdamW", "Adagrad", "Lion", "LAMB", "Adafactor", "Prodigy", "DoG"]
ALL = [n for n in fastopt.torch.__all__ if n[0].isupper() and n != "Muon"]
OPTIONS: list[dict[str, Any]] = [{}, {"clip_norm": 0.5}, {"nonfinite": "skip"}]


pair, three = fixture(2), fixture(3)


def model(dtype: Any) -> Any:
    torch.manual_seed(5)
    layers = torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def give(net: Any, k: int, nan: bool) -> None:
    for i, param in enumerate(net.parameters()):
        param.grad = numbers(100 * k + i, param.shape, param.dtype)
    if nan and k == 1:
        param.grad[..., 0] = math.nan  # of the last parameter, which one process has


def zero(name: str, options: dict, dtype: Any, steps: int, params: int = 4) -> Any:
    net = model(dtype)
    opt = ZeroRedundancyOptimizer(
        list(net.parameters())[:params],
        getattr(fastopt.torch, name),
        shard_group=True,
        lr=0.01,
        **options,
    )
    for k in range(steps):
        give(net, k, "nonfinite" in options)
        opt.step()
    mine = opt.optim
    return [p.detach() for p in net.parameters()], mine.grad_norm, mine.skipped


def alone(name: str, options: dict, dtype: Any, steps: int, params: int = 4) -> Any:
    net = model(dtype)
    of = list(net.parameters())[:params]
    opt = getattr(fastopt.torch, name)(of, lr=0.01, **options)
    for k in range(steps):
        give(net, k, "nonfinite" in options)
        opt.step()
    return [p.detach() for p in net.parameters()], opt.grad_norm, opt.skipped


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_zero_1_steps_as_one_process(pair: Ranks, name: str, options: dict):
    of = name, options, torch.float64, 6
    expected, norm, skipped = alone(*of)
    for params, their_norm, their_skipped in pair.run(zero, *of):
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
        assert their_skipped == skipped == (options.get("nonfinite") == "skip")
        assert math.isnan(norm) or math.isclose(norm, their_norm, rel_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_classes_have_the_bits_of_one_process(pair: Ranks, name: str, dtype: Any):
    """After 20 steps. Sums over all parameters round otherwise."""
    of = name, {}, dtype, 20
    expected, *_ = alone(*of)
    rule = getattr(fastopt.torch, name)._default_rule
    exact = rule.measure is None or rule.by_segment
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.02)
    for params, *_ in pair.run(zero, *of):
        for ours, theirs in zip(params, expected, strict=True):
            if exact:
                assert torch.equal(ours, theirs)
            else:
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["AdamW", "Prodigy"])
def test_a_process_without_parameters_takes_part(
    three: Ranks, name: str, options: dict
):
    of = name, options, torch.float64, 4, 2  # two parameters for three processes
    expected, _, skipped = alone(*of)
    for params, _, their_skipped in three.run(zero, *of):
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
        assert their_skipped == skipped


def without_gradients(name: str) -> Any:
    """The process with the smaller rank has no gradient in some steps."""
    rank = torch.distributed.get_rank()
    group = torch.distributed.group.WORLD
    param = torch.nn.Parameter(numbers(rank, (3,), torch.float64))
    opt = getattr(fastopt.torch, name)([param], clip_norm=0.5, shard_group=group)
    norms = []
    for k in range(4):
        there = rank == 1 or k in (1, 3)
        param.grad = numbers(10 * k + rank, (3,), torch.float64) if there else None
        opt.step()
        norms.append(opt.grad_norm)
    return norms


@pytest.mark.parametrize("name", ["AdamW", "Prodigy", "DoG"])
def test_gradients_of_some_processes(pair: Ranks, name: str):
    expected = [
        math.sqrt(
            sum(
                float(numbers(10 * k + rank, (3,), torch.float64).square().sum())
                for rank in (0, 1)
                if rank == 1 or k in (1, 3)
            )
        )
        for k in range(4)
    ]
    for norms in pair.run(without_gradients, name):
        assert norms == pytest.approx(expected, rel=1e-12)


def saved(name: str) -> Any:
    """Save and load the state of all processes, as the documentation says."""
    results = []
    for again in (False, True):
        net = model(torch.float64)
        opt = ZeroRedundancyOptimizer(
            net.parameters(), getattr(fastopt.torch, name), shard_group=True, lr=0.25
        )
        for k in range(6):
            if k == 3 and again:
                opt.consolidate_state_dict(0)
                box = [opt.state_dict() if torch.distributed.get_rank() == 0 else None]
                torch.distributed.broadcast_object_list(box, 0)
                opt = ZeroRedundancyOptimizer(
                    net.parameters(),
                    partial(
                        getattr(fastopt.torch, name),
                        shard_group=torch.distributed.group.WORLD,
                    ),
                    lr=0.5,
                )
                opt.load_state_dict(box[0])
            give(net, k, False)
            opt.step()
        results.append([p.detach() for p in net.parameters()])
    group = torch.distributed.group.WORLD
    with pytest.raises(TypeError, match="shard_group=True"):
        ZeroRedundancyOptimizer(
            net.parameters(), getattr(fastopt.torch, name), shard_group=group, lr=0.25
        )
    return results


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Prodigy"])
def test_the_state_of_all_processes_is_saved(pair: Ranks, name: str):
    for once, again in pair.run(saved, name):
        for a, b in zip(once, again, strict=True):
            assert torch.equal(a, b)


def late(name: str, shared: bool, when: str) -> Any:
    """Two parameters, of which one has no gradient in some steps: in two processes,
    each with one of them, or in one."""
    rank = torch.distributed.get_rank() if shared else 0
    group = torch.distributed.group.WORLD if shared else None
    here = [rank] if shared else [0, 1]
    params = {i: torch.nn.Parameter(numbers(i, (4, 3), torch.float64)) for i in here}
    make = getattr(fastopt.torch, name)
    opt = make(list(params.values()), shard_group=group, weight_decay=0.01)
    for k in range(30):
        for i, param in params.items():
            none = k < 10 if when == "late" else k % 3
            if when == "never" and k < 5:
                param.grad = None
            else:
                param.grad = None if i == 1 and none else param.detach() + 0.5
        opt.step()
    state = [opt.state[param] for param in params.values()]
    return [p.detach() for p in params.values()], [int(s["step"]) for s in state]


@pytest.mark.parametrize("when", ["sometimes", "late", "never"])
@pytest.mark.parametrize("name", ["Prodigy", "DoG", "DAdaptAdam"])
def test_rules_over_everything_go_on_without_gradients(
    pair: Ranks, name: str, when: str
):
    """As in one process, where the numbers that they carry are of all parameters."""
    params, steps = late(name, False, when)
    for rank, (theirs, their_steps) in enumerate(pair.run(late, name, True, when)):
        torch.testing.assert_close(theirs[0], params[rank], rtol=1e-12, atol=1e-12)
        if when == "sometimes":
            assert their_steps == [steps[rank]]


@pytest.mark.parametrize("group", ["world", 3, False, object()])
def test_what_is_no_group_is_refused(group: Any):
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="shard_group must be True"):
        fastopt.torch.AdamW([param], shard_group=group)


def in_ddp(name: str, options: dict) -> Any:
    net = DistributedDataParallel(model(torch.float64))
    opt = getattr(fastopt.torch, name)(net.parameters(), lr=0.01, **options)
    for k in range(20):
        opt.zero_grad()
        rows = numbers(k, (8, 6), torch.float64).chunk(2)[torch.distributed.get_rank()]
        net(rows).sum().backward()
        opt.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    "name, options",
    [(n, {}) for n in ALL] + [(n, o) for n in NAMES for o in OPTIONS if o],
)
def test_ddp_trains_as_one_process(pair: Ranks, name: str, options: dict):
    net = model(torch.float64)
    opt = getattr(fastopt.torch, name)(net.parameters(), lr=0.01, **options)
    for k in range(20):
        opt.zero_grad()
        for rows in numbers(k, (8, 6), torch.float64).chunk(2):
            (net(rows).sum() / 2).backward()
        opt.step()
    expected = [p.detach() for p in net.parameters()]
    first, second = pair.run(in_ddp, name, options)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
