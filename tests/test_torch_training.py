"""What people do with the classes of ``fastopt.torch``: long runs, networks, layouts of
memory, mixed precision, threads and forks."""

import copy
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import fastopt.torch  # noqa: E402

# Options off their defaults, such as weight decay, momentum and other betas.
OPTIONS = {
    "SGD": {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    "Adam": {"lr": 0.01, "betas": (0.8, 0.97), "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "betas": (0.8, 0.97), "weight_decay": 0.1, "eps": 1e-4},
    "NAdam": {"lr": 0.01, "betas": (0.8, 0.97), "decoupled_weight_decay": True},
    "RAdam": {"lr": 0.01, "betas": (0.8, 0.97), "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "betas": (0.8, 0.97), "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "alpha": 0.9, "momentum": 0.8, "centered": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 0.5, "rho": 0.8, "weight_decay": 0.1},
    "Rprop": {"lr": 0.01, "etas": (0.4, 1.1), "step_sizes": (1e-5, 1.0)},
    "ASGD": {"lr": 0.02, "lambd": 1e-2, "alpha": 0.6, "t0": 50.0},
    "Adafactor": {"lr": 0.02, "weight_decay": 0.1, "d": 1.5},
}
SHAPES = ((5, 3), (7,), (1,), (2, 3, 4))


def drawn(seed, dtype):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in SHAPES]


def run(kind, name, dtype, steps=200, layout=lambda t: t):
    """Parameters after steps with random gradients, of which some are missing."""
    params = [torch.nn.Parameter(layout(p)) for p in drawn(0, dtype)]
    opt = getattr(kind, name)(params, **OPTIONS[name])
    for t in range(1, steps + 1):
        for i, (param, grad) in enumerate(zip(params, drawn(t, dtype), strict=True)):
            param.grad = None if (t + i) % 5 == 0 else grad
        opt.step()
    return [param.detach() for param in params]


@pytest.mark.usefixtures("numbers_in_float64")
@pytest.mark.parametrize("name", OPTIONS)
def test_200_steps_as_torchs(name):
    pairs = zip(
        run(fastopt.torch, name, torch.float64),
        run(torch.optim, name, torch.float64),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_200_steps_in_float32(name):
    pairs = zip(
        run(fastopt.torch, name, torch.float32),
        run(torch.optim, name, torch.float32),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t[None].expand(2, *t.shape).contiguous()[1],
    ],
    ids=["transposed", "with gaps", "within another"],
)
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
def test_layouts_do_not_matter(name, layout, monkeypatch):
    monkeypatch.setitem(OPTIONS, "LAMB", {"lr": 0.01})
    plain = run(fastopt.torch, name, torch.float32, 20)
    other = run(fastopt.torch, name, torch.float32, 20, layout)
    for p, q in zip(plain, other, strict=True):
        close = (
            {"rtol": 1e-6, "atol": 1e-7} if name == "LAMB" else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(p, q, **close)


# Networks ---------------------------------------------------------------------------


def transformer():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    head = torch.nn.Linear(16, 3)
    return torch.nn.Sequential(torch.nn.TransformerEncoder(layer, 2), head)


def convolutions():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3, stride=2).to(memory_format=torch.channels_last),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(3),
    )


def losses(kind, name, network, x, steps=40, **options):
    torch.manual_seed(0)
    model = network()
    model(x)
    torch.manual_seed(1)
    opt = getattr(kind, name)(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    target = torch.randint(3, (len(x),))
    found = []
    for _ in range(steps):
        opt.zero_grad()
        out = model(x).reshape(len(x), -1, 3).mean(dim=1)
        loss = torch.nn.functional.cross_entropy(out, target)
        loss.backward()
        opt.step()
        scheduler.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "name, options", [("AdamW", {"lr": 3e-3}), ("SGD", {"lr": 0.1})]
)
@pytest.mark.parametrize("network", [transformer, convolutions])
def test_only_the_import_changes(network, name, options):
    """The losses are those with torch's class, to float32's roundings, and fall."""
    torch.manual_seed(2)
    x = torch.randn(8, 5, 16) if network is transformer else torch.randn(8, 1, 9, 9)
    ours = losses(fastopt.torch, name, network, x, **options)
    theirs = losses(torch.optim, name, network, x, **options)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert ours[-1] < 0.7 * ours[0]


def test_flattened_models_take_the_same_steps():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    pair = []
    for flat in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
        if flat:
            (buffer,) = fastopt.torch.flatten_(model)
        opt = fastopt.torch.AdamW(model.parameters(), lr=0.01, clip_norm=0.5)
        for _ in range(5):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        pair.append(list(model.parameters()))
    for p, q in zip(*pair, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert q.grad.untyped_storage().data_ptr() == buffer.grad.data_ptr()
    assert buffer.data.numel() == sum(q.numel() for q in pair[1])


def test_memory_under_a_parameter_may_change():
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    pair = fastopt.torch.AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for t in range(4):
        for param, opt in zip((ours, theirs), pair, strict=True):
            if t == 2:
                param.data = param.data.clone() * 2
            param.grad = torch.full((5,), 1.0 + t)
            opt.step()
    torch.testing.assert_close(ours, theirs)


# What a step may do beside ----------------------------------------------------------


def test_clipping_and_the_average_are_as_written_by_hand():
    ours, theirs = (torch.nn.Parameter(torch.arange(6.0)) for _ in range(2))
    opt = fastopt.torch.AdamW([ours], lr=0.1, clip_norm=0.5, ema=0.9)
    other, average = torch.optim.AdamW([theirs], lr=0.1), theirs.detach().clone()
    for t in range(5):
        grad = torch.linspace(-1, 1, 6) * (t + 1)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        opt.step()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        other.step()
        average.lerp_(theirs.detach(), 0.1)
        assert torch.equal(ours.grad, grad)  # clipped nowhere but in the step
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(opt.ema_params()[0], average)


def test_what_is_not_finite():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = fastopt.torch.SGD([param], lr=1.0, nonfinite="skip")
    param.grad = torch.tensor([1.0, torch.inf, 1.0], dtype=torch.float64)
    opt.step()
    assert opt.skipped == 1 and torch.equal(param, torch.ones_like(param))
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        opt.step(nonfinite="raise")
    param.grad = torch.full((3,), 1e200, dtype=torch.float64)  # finite; not its square
    opt.step()
    assert opt.skipped == 1 and torch.equal(param, 1 - param.grad)


def test_a_scaler_unscales_and_skips():
    ours, theirs = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    for param, kind in ((ours, fastopt.torch), (theirs, torch.optim)):
        opt = kind.AdamW([param], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor in (1.0, torch.inf, 2.0):
            opt.zero_grad()
            scaler.scale((param * factor).sum()).backward()
            scaler.step(opt)
            scaler.update()
        assert opt.state[param]["step"] == 2
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_keep_their_state_in_float32(dtype):
    def made():
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50).to(dtype))
        return param, fastopt.torch.AdamW([param], lr=0.01)

    (param, opt), (again, other) = made(), made()
    for t in range(6):
        if t == 3:
            again.data.copy_(param.data)
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
        grad = torch.linspace(-1, 1, 50).to(dtype) * (t + 1)
        for p, o in ((param, opt), (again, other)):
            p.grad = grad
            o.step()
    assert other.state[again]["exp_avg"].dtype == torch.float32
    assert torch.equal(param, again) and param.dtype == dtype
    assert not torch.equal(param.float(), torch.zeros(50))


# Threads, forks, hooks --------------------------------------------------------------


def test_two_threads_step_two_optimizers():
    found = {}

    def work(key):
        param = torch.nn.Parameter(torch.ones(40_000))
        opt = fastopt.torch.AdamW([param], lr=0.01)
        for _ in range(30):
            param.grad = torch.full_like(param, 1.0)
            opt.step()
        found[key] = param.detach()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    work("alone")
    assert torch.equal(found[0], found["alone"]) and torch.equal(found[1], found[0])


FORK = """
import os, torch, fastopt.torch
param = torch.nn.Parameter(torch.ones(100_000))
opt = fastopt.torch.AdamW([param], lr=0.1)
param.grad = torch.ones_like(param)
opt.step()
child = os.fork()
if child == 0:
    opt.step()
    os._exit(0 if 0.79 < float(param[-1].detach()) < 0.81 else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
opt.step()
"""

LOADER = """
import torch, fastopt.torch
data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
model = torch.nn.Linear(4, 1)
opt = fastopt.torch.AdamW(model.parameters(), lr=0.01)
if __name__ == "__main__":
    for epoch in range(2):
        for x, y in torch.utils.data.DataLoader(data, 8, num_workers=2):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
    assert opt.state[model.weight]["step"] == 16
"""


def in_a_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("code", [FORK, LOADER], ids=["fork", "workers"])
def test_processes(code):
    in_a_process(code)


def test_hooks_of_autograd_may_step():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    opts = {p: fastopt.torch.SGD([p], lr=0.1) for p in model.parameters()}

    def released(param):
        opts[param].step()
        param.grad = None

    before = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(released)
    model(torch.ones(2, 3)).sum().backward()
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.grad is None and not torch.equal(p, q)


ORDER = """
import {0}, {1}
import numpy as np, torch, fastopt, fastopt.torch, fastopt.info
w = np.ones(100_000, np.float32)
fastopt.adamw(w).step(w.copy())
param = torch.nn.Parameter(torch.ones(100_000))
param.grad = torch.ones_like(param)
fastopt.torch.AdamW([param]).step()
torch.optim.AdamW([param], fused=True).step()
loaded = fastopt.info.openmp_runtimes().splitlines()
print(len([line for line in loaded if line.startswith("/")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="runtimes are told by /proc")
@pytest.mark.parametrize("order", [("torch", "fastopt"), ("fastopt", "torch")])
def test_one_openmp_runtime_in_either_order(order):
    assert in_a_process(ORDER.format(*order)).strip() == "1"
