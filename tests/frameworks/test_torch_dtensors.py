"""Steps over DTensors, as FSDP2 makes them, in several processes."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from ranks import Ranks, fixture, numbers  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fastopt.torch  # noqa: E402
from fastopt.torch import ranks as total_over_ranks  # noqa: E402

REFUSED = {"Adafactor"}  # averages of rows and columns
TORCHS = {"Muon"}  # whose step is torch's own, with products of bfloat16
NAMES = [
    name
    for name in fastopt.torch.__all__
    if name[0].isupper() and name not in REFUSED | TORCHS
]
ELEMENTWISE = [
    name
    for name in NAMES
    if not hasattr(getattr(fastopt.torch, name), "rule")
    or getattr(fastopt.torch, name).rule.measure is None
]
SUMS = sorted({*NAMES} - {*ELEMENTWISE})
DTYPES = torch.float32, torch.float64, torch.bfloat16
# With fewer rows than processes, an uneven number of rows, and none of a whole vector.
SHAPES = (5, 3), (1, 4), (7,), (2, 3, 2), (1,)


pair, four = fixture(2), fixture(4)


def parameters(dtype: Any, divide: Any) -> list[Any]:
    return [
        torch.nn.Parameter(divide(numbers(i, shape, dtype)))
        for i, shape in enumerate(SHAPES)
    ]


def step(opt: Any, params: list[Any], k: int, divide: Any, none: bool = False) -> None:
    """Do the k-th step. One parameter has no gradient in some steps, if ``none``."""
    for i, param in enumerate(params):
        grad = numbers(100 * k + i, SHAPES[i], param.dtype)
        param.grad = None if none and i == 2 and k % 3 else divide(grad)
    opt.step()


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(name: str, options: dict, dtype: Any, mesh: Any, placements: Any, steps: int):
    """Return all parameters, and what is noted, after steps; without a mesh, in one
    process."""

    def divide(tensor: Any) -> Any:
        if mesh is None:
            return tensor
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    params = parameters(dtype, divide)
    opt = getattr(fastopt.torch, name)(params, **options)
    for k in range(steps):
        step(opt, params, k, divide, none=True)
    state = {
        key: type(value).__name__
        for entry in opt.state.values()
        for key, value in entry.items()
        if value.dim()
    }
    return [whole(p).detach() for p in params], opt.grad_norm, opt.skipped, state


def shards(name: str, options: dict, dtype: Any, steps: int, layout: str = "rows"):
    count = torch.distributed.get_world_size()
    if layout == "rows":
        mesh, placements = init_device_mesh("cpu", (count,)), [Shard(0)]
    elif layout == "hybrid":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        placements = [Replicate(), Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "again"))
        placements = [Shard(0), Shard(0)]
    return run(name, options, dtype, mesh, placements, steps)


def agree(results: list[Any], expected: Any, tolerance: float = 0.0) -> None:
    """All processes have the same bits, which are those of one process."""
    params, norm, skipped, _ = expected
    for theirs, their_norm, their_skipped, state in results:
        assert set(state.values()) <= {"DTensor"}
        assert their_skipped == skipped
        same = their_norm == norm or math.isnan(norm) and math.isnan(their_norm)
        assert same or math.isclose(their_norm, norm, rel_tol=1e-12)
        for ours, one, first in zip(theirs, params, results[0][0], strict=True):
            assert torch.equal(ours, first)
            if tolerance:
                torch.testing.assert_close(ours, one, rtol=tolerance, atol=tolerance)
            else:
                assert torch.equal(ours, one)


def options_of(name: str) -> dict[str, Any]:
    return {"lr": 0.25} if name not in ("ASGD", "Rprop") else {}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_classes_have_the_bits_of_one_process(pair: Ranks, name: str):
    for dtype in DTYPES:
        of = name, options_of(name), dtype
        agree(pair.run(shards, *of, 20), run(*of, None, None, 20))


@pytest.mark.parametrize("name", SUMS)
def test_classes_with_sums_agree_with_one_process(pair: Ranks, name: str):
    of = name, options_of(name), torch.float64
    agree(pair.run(shards, *of, 20), run(*of, None, None, 20), 1e-12)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        of = name, options_of(name), dtype
        agree(pair.run(shards, *of, 20), run(*of, None, None, 20), tolerance)


@pytest.mark.parametrize("layout", ["rows", "hybrid", "twice"])
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Prodigy"])
def test_meshes_of_four_processes(four: Ranks, name: str, layout: str):
    options = {"lr": 0.25, "clip_norm": 0.5, "ema": 0.9, "clip_value": 0.2}
    of = name, options, torch.float64
    agree(four.run(shards, *of, 6, layout), run(*of, None, None, 6), 1e-12)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "LARS", "DoG"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_all_shards(pair: Ranks, name: str, dtype: Any):
    of = name, {"lr": 0.25, "clip_norm": 0.75}, dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.02)
    agree(pair.run(shards, *of, 6), run(*of, None, None, 6), tolerance)


class Block(torch.nn.Module):
    """A layer of a norm and two matrices, as of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(6)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(self.norm(x))))


def in_parallel(name: str, parallel: bool) -> Any:
    """Train with tensor parallelism, under which gradients of the norm are partial."""
    torch.manual_seed(5)
    net = Block().double()
    if parallel:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(),
        }
        parallelize_module(net, mesh, plan)
    opt = getattr(fastopt.torch, name)(net.parameters(), lr=0.01, clip_norm=0.5)
    for k in range(3):
        opt.zero_grad()
        x = numbers(k, (2, 4, 6), torch.float64)
        if parallel:
            rank = torch.distributed.get_rank()
            x = DTensor.from_local(x.chunk(2, 1)[rank], mesh, [Shard(1)])
        net(x).square().sum().backward()
        opt.step()
    return [whole(p).detach() for p in net.parameters()], opt.grad_norm


@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Prodigy"])
def test_tensor_parallelism_trains_as_one_process(pair: Ranks, name: str):
    expected, norm = in_parallel(name, False)
    for params, their_norm in pair.run(in_parallel, name, True):
        torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-10)
        assert math.isclose(norm, their_norm, rel_tol=1e-10)


def with_nan(nonfinite: str, where: int) -> Any:
    """Steps of which one has a NaN in the shard of one process."""
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.float32, lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    opt = fastopt.torch.AdamW(params, nonfinite=nonfinite)
    for k in range(3):
        for i, param in enumerate(params):
            grad = numbers(100 * k + i, SHAPES[i], param.dtype)
            param.grad = distribute_tensor(grad, mesh, [Shard(0)])
        if k == 1 and torch.distributed.get_rank() == where:
            params[0].grad.to_local()[0] = math.nan
        before = [p.to_local().clone() for p in params]
        try:
            opt.step()
        except FloatingPointError:
            assert k == 1 and nonfinite == "raise"
        if k == 1:
            pairs = zip(before, params, strict=True)
            assert all(torch.equal(b, p.to_local()) for b, p in pairs)
    return opt.skipped, [int(s["step"]) for s in opt.state.values()]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_nan_of_one_process_stops_all(pair: Ranks, nonfinite: str, where: int):
    for skipped, steps in pair.run(with_nan, nonfinite, where):
        assert skipped == (nonfinite == "skip")
        assert steps == [2] * len(SHAPES)


def model(dtype: Any) -> Any:
    torch.manual_seed(5)
    layers = torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
    return torch.nn.Sequential(*layers).to(dtype)


def in_fsdp(name: str, options: dict, dtype: Any) -> Any:
    """Train with FSDP2, each process on its half of a batch."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    net = model(dtype)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    opt = getattr(fastopt.torch, name)(net.parameters(), **options)
    for k in range(4):
        opt.zero_grad()
        rows = numbers(k, (8, 6), dtype).chunk(2)[torch.distributed.get_rank()]
        net(rows).sum().backward()
        opt.step()
    return [p.full_tensor().detach() for p in net.parameters()], opt.grad_norm


def alone(name: str, options: dict, dtype: Any) -> Any:
    net = model(dtype)
    opt = getattr(fastopt.torch, name)(net.parameters(), **options)
    for k in range(4):
        opt.zero_grad()
        for rows in numbers(k, (8, 6), dtype).chunk(2):
            (net(rows).sum() / 2).backward()
        opt.step()
    return [p.detach() for p in net.parameters()], opt.grad_norm


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB"])
def test_fsdp2_trains_as_one_process(pair: Ranks, name: str, options: dict):
    expected, norm = alone(name, {"lr": 0.01, **options}, torch.float64)
    for params, their_norm in pair.run(
        in_fsdp, name, {"lr": 0.01, **options}, torch.float64
    ):
        torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
        assert math.isnan(norm) or math.isclose(norm, their_norm, rel_tol=1e-12)


def counted(name: str, options: dict) -> Any:
    """Return the lengths of the vectors that each step hands to other processes, the
    bytes of each buffer, and the numbers of elements."""
    original, lengths = total_over_ranks.total, []

    def total(vector: Any, group: Any) -> Any:
        assert vector.dtype == "float64"
        lengths[-1].append(vector.size)
        return original(vector, group)

    total_over_ranks.total = total
    try:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        of = [torch.nn.Parameter(torch.ones(s)) for s in SHAPES]
        params = [
            torch.nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in of
        ]
        opt = getattr(fastopt.torch, name)(params, **options)
        for k in range(3):
            lengths.append([])
            step(opt, params, k, lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    finally:
        total_over_ranks.total = original
    bytes_of = {name: size for name, _, size in opt.memory().buffers}
    return lengths, bytes_of, [p.to_local().numel() for p in params]


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"nonfinite": "skip"}])
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "Prodigy"])
def test_processes_exchange_what_the_documentation_says(
    pair: Ranks, name: str, options: dict
):
    rule = getattr(fastopt.torch, name)._default_rule
    expected = [2] if options else []
    if rule.measure is not None:
        expected.append((1 + rule.terms) * (len(SHAPES) if rule.by_segment else 1))
    for lengths, bytes_of, sizes in pair.run(counted, name, options):
        assert lengths == [expected] * 3
        assert len(bytes_of) == 1 + len(rule.state)
        assert set(bytes_of.values()) == {4 * sum(sizes)}


def layouts() -> list[str]:
    """Gradients that are divided otherwise than their parameters."""
    mesh = init_device_mesh("cpu", (2,))
    start, full = numbers(1, (4, 3), torch.float64), numbers(2, (4, 3), torch.float64)
    expected = torch.nn.Parameter(start.clone())
    expected.grad = full.clone()
    fastopt.torch.AdamW([expected]).step()
    seen = []
    for placement in (Shard(0), Shard(1), Replicate(), Partial()):
        if placement.is_partial():
            grad = DTensor.from_local(full / 2, mesh, [Partial()])
        else:
            grad = distribute_tensor(full, mesh, [placement])
        for of in (Shard(0), Shard(1), Replicate()):
            param = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [of]))
            param.grad = grad
            opt = fastopt.torch.AdamW([param])
            opt.step()
            assert torch.equal(param.full_tensor(), expected)
            seen.append(f"{placement} {of}")
    return seen


def test_gradients_may_be_divided_otherwise(pair: Ranks):
    for seen in pair.run(layouts):
        assert len(seen) == 12


def empty_shards() -> Any:
    """Gradients that are copied first, of a parameter of which one process has
    nothing."""
    mesh = init_device_mesh("cpu", (2,))
    full = numbers(2, (1, 4), torch.float32)
    counts = []
    for kind in ("partial", "replicated", "float64", "asynchronous"):
        param = torch.nn.Parameter(
            distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)])
        )
        opt = fastopt.torch.LAMB([param])
        for _ in range(3):
            grad = DTensor.from_local(full / 2, mesh, [Partial()])
            if kind == "replicated":
                grad = distribute_tensor(full, mesh, [Replicate()])
            elif kind == "float64":
                grad = distribute_tensor(full.double(), mesh, [Shard(0)])
            elif kind == "asynchronous":
                grad = grad.redistribute(mesh, [Shard(0)], async_op=True)
            param.grad = None
            param.grad_dtype = grad.dtype
            param.grad = grad
            opt.step(zero_grads=True)
            assert not param.grad.full_tensor().any()
        counts.append(int(opt.state[param]["step"]))
        assert isinstance(opt.state[param]["m"], DTensor)
    return counts


def test_empty_shards_count_steps(pair: Ranks):
    assert pair.run(empty_shards) == [[3, 3, 3, 3]] * 2


def outside() -> Any:
    """A process that is not of the mesh has nothing to do."""
    mesh = DeviceMesh("cpu", [0])
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    opt = fastopt.torch.LAMB([param], clip_norm=1.0)
    for _ in range(2):
        param.grad = param.detach().clone()
        opt.step()
    return param.to_local().numel()


def test_processes_outside_of_the_mesh(pair: Ranks):
    assert pair.run(outside) == [12, 0]


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))

    def param(placement: Any) -> Any:
        if placement.is_partial():
            return torch.nn.Parameter(
                DTensor.from_local(torch.ones(8, 600), mesh, [placement])
            )
        return torch.nn.Parameter(
            distribute_tensor(torch.ones(8, 600), mesh, [placement])
        )

    def stepped(name: str, of: Any, **options: Any) -> None:
        of.grad = of.detach().clone()
        getattr(fastopt.torch, name)([of], **options).step()

    divided = param(Shard(0))
    calls = [
        lambda: stepped("Lion", param(Partial())),
        lambda: stepped("Adafactor", param(Shard(0))),
        lambda: stepped("AdamW", param(Shard(0)), formats="8bit"),
        lambda: fastopt.torch.flatten_([divided]),
        lambda: fastopt.torch.release_gradients_(fastopt.torch.AdamW([divided])),
        lambda: fastopt.torch.AdamW([divided]).accumulate(),
        lambda: stepped("AdamW", divided, shard_group=torch.distributed.group.WORLD),
        lambda: fastopt.torch.AdamW([divided]).step(
            grads=[distribute_tensor(torch.ones(1, 600), mesh, [Replicate()])]
        ),
        lambda: fastopt.torch.AdamW([divided]).step(
            grads=[distribute_tensor(torch.ones(8, 600), mesh, [Replicate()])],
            zero_grads=True,
        ),
    ]
    said = []
    for call in calls:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            call()
        said.append(str(error.value))
        assert torch.equal(divided.to_local(), torch.ones(4, 600))
    return said


def test_what_cannot_be_right_is_refused(pair: Ranks):
    words = (
        *("partial sums", "rows and columns", "8 bits", *["DTensor"] * 3),
        *("shard_group", "over all processes", "redistribute"),
    )
    for said in pair.run(refusals):
        for word, message in zip(words, said, strict=True):
            assert word in message


def doors() -> None:
    """What else reads or writes parameters and state."""
    mesh = init_device_mesh("cpu", (2,))

    def divide(tensor: Any) -> Any:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    def both(name: str, dtype: Any, **options: Any) -> Any:
        pairs = []
        for how in (divide, lambda tensor: tensor):
            params = parameters(dtype, how)
            copies = options.pop("copies", None)
            if copies:
                of = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
                pairs.append((params, getattr(fastopt.torch, name)(params, copy_to=of)))
                options["copies"] = True
            else:
                pairs.append((params, getattr(fastopt.torch, name)(params, **options)))
            for k in range(3):
                step(pairs[-1][1], params, k, how)
        return pairs

    def same(theirs: Any, ours: Any) -> None:
        for a, b in zip(theirs, ours, strict=True):
            assert isinstance(a, DTensor)
            assert torch.equal(a.full_tensor(), b)

    (params, opt), (plain, one) = both("ScheduleFreeAdamW", torch.float32, ema=0.9)
    same(opt.ema_params(), one.ema_params())
    same(opt.eval_params(), one.eval_params())
    for of in (opt, one):
        of.eval()
    same(params, plain)
    for of in (opt, one):
        of.train()
    same(params, plain)
    (params, opt), (plain, one) = both("AdamW", torch.bfloat16, master="bf16+r16")
    same(opt.master_params(), one.master_params())
    masters = [p + 1 / 512 for p in opt.master_params()]
    opt.load_master_params(masters)
    one.load_master_params([m.full_tensor() for m in masters])
    same(opt.master_params(), one.master_params())
    with pytest.raises(TypeError, match="DTensors"):
        opt.load_master_params([m.full_tensor() for m in masters])
    (params, opt), (plain, one) = both("AdamW", torch.float32, copies=True)
    same(
        [opt.copy_to[p] for p in params],
        [one.copy_to[p] for p in plain],
    )
    shards = sum(p.to_local().numel() for p in params)
    assert opt.memory().elements == shards
    for k in range(2):  # gradients that are handed over, and of several tasks
        grads = [
            numbers(7 * k + i, shape, torch.float32) for i, shape in enumerate(SHAPES)
        ]
        opt.step(grads=list(map(divide, grads)), zero_grads=True)
        one.step(grads=grads)
        tasks = [grads, [g + 1 for g in grads]]
        opt.step(grads=[list(map(divide, task)) for task in tasks], weights=[0.5, 2.0])
        one.step(grads=tasks, weights=[0.5, 2.0])
    same(params, plain)
    # A new local tensor, as FSDP2 may make one.
    params[0]._local_tensor = params[0]._local_tensor.clone()
    for of, tensors, how in ((opt, params, divide), (one, plain, lambda t: t)):
        step(of, tensors, 5, how)
    same(params, plain)
    # Stochastic rounding by the element's index in the whole parameter.
    options = {"master": "bf16", "formats": "bf16"}
    (params, opt), (plain, one) = both("AdamW", torch.bfloat16, **options)
    same(params, plain)


def test_other_doors(pair: Ranks):
    pair.run(doors)
