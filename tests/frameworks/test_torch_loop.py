"""Steps within a training loop: new gradients each time, and the shortest paths."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fastopt.torch")
stateful = pytest.importorskip("fastopt.torch.stateful")

WAYS = [
    {},
    {"clip_norm": 0.5},
    {"clip_norm": 1e9, "maximize": True},
    {"clip_value": 0.01},
    {"ema": 0.9},
    {"ema": 0.9, "clip_norm": 0.5, "clip_value": 0.02},
    {"clip_norm": 0.5, "formats": "bf16"},
]


def trained(kind, options, dtype, forgetful, steps=5):
    """Return a model, its optimizer and the norms after some steps. If ``forgetful``,
    each step is planned anew."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(17, 400), torch.nn.Tanh(), torch.nn.Linear(400, 6)
    model = torch.nn.Sequential(*layers).to(dtype)
    opt = kind(model.parameters(), lr=0.01, **options)
    inputs, norms = torch.randn(steps, 8, 17).to(dtype), []
    for batch in inputs:
        opt.zero_grad()
        model(batch).square().mean().backward()
        if forgetful:
            opt._plan = None
        opt.step()
        norms.append(opt.grad_norm)
    return model, opt, norms


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", [ft.Adam, ft.SGDW, ft.NAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_shortest_path_has_the_same_bits(kind, options, dtype):
    if dtype is torch.float64 and "formats" in options:
        pytest.skip("formats are for state of float32")
    model, opt, norms = trained(kind, options, dtype, forgetful=False)
    other, planned, expected = trained(kind, options, dtype, forgetful=True)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    torch.testing.assert_close(norms, expected, rtol=0, atol=0, equal_nan=True)
    if "ema" in options:
        assert all(map(torch.equal, opt.ema_params(), planned.ema_params()))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_are_propagated_as_torch_does(bad):
    results = []
    for kind in (ft.Adam, torch.optim.Adam):
        param = torch.nn.Parameter(torch.ones(50))
        opt = kind([param], lr=0.1, **({"clip_norm": 1.0} if kind is ft.Adam else {}))
        for step in range(3):
            param.grad = torch.full((50,), 0.5)
            if step == 2:
                param.grad[3] = bad
            if kind is torch.optim.Adam:
                torch.nn.utils.clip_grad_norm_([param], 1.0)
            opt.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, equal_nan=True)


def test_zero_grad_is_torchs():
    """With None, with zeros, under the profiler, and for parameters without any."""
    model = torch.nn.Linear(4, 3)
    opt = ft.SGD(model.parameters(), lr=0.1)
    opt.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    opt.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    model.bias.grad = None
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    with torch.profiler.profile() as profiler:
        opt.zero_grad()
        opt.step()
    names = {event.key for event in profiler.key_averages()}
    assert {"Optimizer.zero_grad#SGD.zero_grad", "Optimizer.step#SGD.step"} <= names
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("change", ["nothing", "other", "dtype", "none", "more"])
def test_zero_grad_of_flattened_gradients(change):
    """They stay in their buffer, as long as they are there."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    (buffer,) = ft.flatten_(model)
    extra = torch.nn.Parameter(torch.ones(3))
    opt = ft.Adam([*model.parameters(), extra], lr=0.1)
    first = model[0].weight

    def backward():
        model(torch.ones(2, 4)).sum().backward()

    for _ in range(3):
        opt.zero_grad()
        assert not buffer.grad.any()
        backward()
        opt.step()
    assert opt._plan._flat is not None
    if change == "other":
        first.grad = torch.ones(3, 4)
    elif change == "dtype":
        model.double()
    elif change == "none":
        first.grad = None
    elif change == "more":
        extra.grad = torch.ones(3)
    opt.zero_grad()
    assert extra.grad is None
    others = [p.grad for p in model.parameters() if p is not first]
    assert all(g is None or not g.any() for g in others)
    if change in ("nothing", "more"):
        assert first.grad is not None and not buffer.grad.any()
    else:
        assert first.grad is None or not first.grad.any()


def test_zero_grad_while_a_destructor_changes_the_groups(monkeypatch):
    monkeypatch.setattr(stateful, "flattened_any", [False])  # by tests before
    opt = ft.SGD([torch.nn.Parameter(torch.ones(3)) for _ in range(50)], lr=0.1)
    params = opt.param_groups[0]["params"]
    kept = list(params)

    class Last:
        def __del__(self):
            params.clear()

    for param in kept:
        param.grad = torch.ones(3)
    gradient = kept[0].grad
    gradient.last = Last()
    del gradient
    opt.zero_grad()
    assert not params and all(p.grad is None for p in kept)
    opt.param_groups[0]["params"] = tuple(kept)  # torch takes these, too
    kept[1].grad = torch.ones(3)
    opt.zero_grad()
    assert kept[1].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_is_its_parameter(dtype):
    start = torch.arange(1, 6).to(dtype)
    param = torch.nn.Parameter(start.clone())
    param.grad = param.detach()
    ft.SGD([param], lr=0.5).step()
    assert torch.equal(param, start / 2)


def test_a_decay_that_changes_in_place():
    """The averages are those of the number that it is at each step."""
    averages, decay = [], np.array(0.9)
    for given in (lambda number: decay, float):
        param = torch.nn.Parameter(torch.ones(7))
        opt = ft.AdamW([param], lr=0.1, ema=0.9)
        for step in range(5):
            param.grad = torch.full((7,), float(step + 1))
            decay[...] = 1 / (step + 2)
            opt.ema = given(1 / (step + 2))
            opt.step()
        averages.append(opt.ema_params()[0].clone())
    assert torch.equal(*averages)
