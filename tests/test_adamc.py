"""AdamC's ``max_lr`` follows the first lr of each group, unless it is given."""

import numpy as np
import pytest

import fastopt


def run(max_lr, lr=1.0, **options):
    given = {} if max_lr is None else {"max_lr": max_lr}
    w = np.array([1.0, -2.0, 3.0])
    opt = fastopt.adamc(w, lr=lr, weight_decay=0.1, **given, **options)
    for i in range(5):
        opt.step(np.array([0.3, -0.1, 0.2]) * (i - 2.5))
        if not callable(opt.lr):
            opt.lr = opt.lr / 2
    return w


def test_the_default_follows_the_first_lr():
    assert np.array_equal(run(None), run(1.0)) and not np.array_equal(
        run(1.0), run(2.0)
    )
    falling = fastopt.schedules.cosine(0.5, 10)
    assert np.array_equal(run(None, falling), run(0.5, falling))
    rising = fastopt.schedules.warmup_cosine(0.5, steps=10, warmup=3)
    with pytest.raises(ValueError, match="max_lr must be the largest lr.*give max_lr"):
        run(None, rising)
    assert np.isfinite(run(0.5, rising)).all()
    groups = [{"params": np.ones(2), "lr": 0.2}, {"params": np.ones(2)}]
    opt = fastopt.adamc(groups, lr=0.7)
    opt.add_group({"params": np.ones(2), "lr": 0.3})
    assert [group["max_lr"] for group in opt.groups] == [0.2, 0.7, 0.3]
    assert fastopt.native.hyperparameters(fastopt.adamc, lr=0.7)[-1] == 0.7


def test_the_class_of_torch():
    torch = pytest.importorskip("torch")
    import fastopt.torch as ft

    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = ft.AdamC([{"params": [a], "lr": torch.tensor(0.5)}, {"params": [b]}], lr=1.0)
    assert [group["max_lr"] for group in opt.param_groups] == [0.5, 1.0]
    given = ft.AdamC([a], lr=1.0, max_lr=3.0)
    assert given.param_groups[0]["max_lr"] == 3.0
    assert ft.AdamC([a]).param_groups[0]["max_lr"] == 1e-3
    w = np.ones(3, np.float32)
    core = fastopt.adamc(w, lr=1.0)
    opt = ft.AdamC([b], lr=1.0)
    for _ in range(4):
        b.grad = torch.full((3,), 0.3)
        opt.step()
        core.step(np.full(3, 0.3, np.float32))
    assert np.array_equal(w, b.detach().numpy())


def test_jax():
    pytest.importorskip("jax")
    import fastopt.jax

    assert fastopt.jax.adamc(lr=0.7).hyperparameters["max_lr"] == 0.7
    assert fastopt.jax.adamc(lr=0.7, max_lr=2.0).hyperparameters["max_lr"] == 2.0
