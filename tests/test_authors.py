"""The authors' own code agrees, where torch and optax have no rule by their definition:
200 steps in float64, to a relative 1e-10.
"""

import numpy as np
import pytest

import fastopt

torch = pytest.importorskip("torch", reason="torch is an optional peer")

SHAPES = ((5, 3), (7,))
OURS = {"beta1": 0.8, "beta2": 0.97}
THEIRS = {"betas": (0.8, 0.97)}
WARM = {"warmup_steps": 20}
# Our rule: the package, its class, what only it is told, what only we are, and both.
CASES = {
    "lion": ("lion_pytorch", "Lion", THEIRS, OURS, {"lr": 0.01}),
    "prodigy": ("prodigyopt", "Prodigy", THEIRS, OURS, {"lr": 0.7, "d0": 1e-3}),
    "dadapt_adam": (
        *("dadaptation", "DAdaptAdam", THEIRS | {"decouple": True}, OURS),
        {"lr": 0.7, "d0": 1e-3},
    ),
    "schedule_free_sgd": (
        *("schedulefree", "SGDScheduleFree", {}, {}),
        {"lr": 0.1, "momentum": 0.8, **WARM},
    ),
    "schedule_free_adamw": (
        *("schedulefree", "AdamWScheduleFree", THEIRS, OURS),
        {"lr": 0.01, "eps": 1e-4, **WARM},
    ),
    "schedule_free_radam": (
        *("schedulefree", "RAdamScheduleFree", THEIRS, OURS),
        {"lr": 0.01, "eps": 1e-4},
    ),
    "madgrad": ("madgrad", "MADGRAD", {}, {}, {"lr": 0.01, "momentum": 0.8}),
    "qhadam": (
        *("qhoptim.pyt", "QHAdam", THEIRS | {"nus": (0.7, 0.9)}),
        *(OURS | {"nu1": 0.7, "nu2": 0.9}, {"lr": 0.01, "eps": 1e-4}),
    ),
}


@pytest.fixture(autouse=True)
def numbers_in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_authors_agree(name, weight_decay):
    package, theirs, only_theirs, only_ours, both = CASES[name]
    module = pytest.importorskip(package, reason=f"{package} is an optional peer")
    both = {**both, "weight_decay": weight_decay}
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape) for shape in SHAPES]
    tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    opt = getattr(module, theirs)(tensors, **only_theirs, **both)
    if hasattr(opt, "train"):
        opt.train()
    ours = getattr(fastopt, name)(params, **only_ours, **both)
    first = [p.copy() for p in params]
    for _ in range(200):
        grads = [rng.standard_normal(shape) for shape in SHAPES]
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        opt.step()
        ours.step(grads)
        for p, tensor in zip(params, tensors, strict=True):
            wanted = tensor.detach().numpy()
            np.testing.assert_allclose(p, wanted, rtol=1e-10, atol=1e-10)
    assert all(np.abs(p - q).max() > 1e-3 for p, q in zip(params, first, strict=True))
