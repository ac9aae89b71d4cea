"""AdamC's ``max_lr`` follows the first lr of each group, unless it is given."""

import os

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


def test_max_lr_is_never_below_an_lr_that_is_assigned_later():
    def halving(lr, first, **given):
        w = np.array([1.0, -2.0, 3.0])
        opt = fastopt.adamc(w, lr=first, weight_decay=0.1, **given)
        for i in range(4):
            opt.lr = lr / 2**i
            opt.step(np.array([0.3, -0.1, 0.2]) * (i - 2.5))
        return w, opt.max_lr

    fresh, _ = halving(1.0, 1.0)
    assigned, most = halving(1.0, 1e-3)
    assert np.array_equal(assigned, fresh) and most == 1.0
    warm, most = halving(1e-3, 1.0)  # a warm-up by hand: the constructor had the most
    assert most == 1.0 and not np.array_equal(warm, halving(1e-3, 1e-3)[0])
    assert halving(1.0, 1e-3, max_lr=2.0)[1] == 2.0
    with pytest.raises(ValueError, match="lr is 0 at first; give max_lr, too"):
        fastopt.adamc(np.ones(3), lr=0.0)
    fastopt.adamc(np.ones(3), lr=0.0, max_lr=1.0)


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
def test_a_larger_lr_decays_as_adamw(backend):
    a, b = (np.array([1.0, -2.0, 3.0]) for _ in range(2))
    adamc = fastopt.adamc(a, lr=0.5, max_lr=0.01, weight_decay=0.1, backend=backend)
    adamw = fastopt.adamw(b, lr=0.5, weight_decay=0.1, backend=backend)
    for i in range(3):
        adamc.step(np.array([0.3, -0.1, 0.2]) * (i - 2.5))
        adamw.step(np.array([0.3, -0.1, 0.2]) * (i - 2.5))
    assert np.array_equal(a, b) and np.isfinite(a).all()


def test_an_lr_that_rises_in_torch_and_a_range_test():
    torch = pytest.importorskip("torch")
    import fastopt.torch as ft

    a, b = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    adamc, adamw = ft.AdamC([a], weight_decay=0.1), ft.AdamW([b], weight_decay=0.1)
    for step in range(3):
        for opt, p in ((adamc, a), (adamw, b)):
            opt.param_groups[0]["lr"] = 0.25 * (step + 1)
            p.grad = torch.full((3,), 0.3 - step, dtype=torch.float64)
            opt.step()
    assert torch.equal(a, b)
    w = np.ones(3)
    opt = fastopt.adamc(w, lr=0.5)
    result = fastopt.lr_range_test(
        lambda x: (0.5 * x @ x, x.copy()), opt, lo=1e-4, hi=2, num=9
    )
    assert len(result.lrs) == 9 and opt.max_lr == opt.lr == 0.5


def test_max_lr_scales_with_lr():
    scaled = fastopt.scale_hyperparameters({"lr": 0.1, "max_lr": 0.4}, 4, "linear")
    assert scaled == {"lr": 0.4, "max_lr": 1.6}
    assert fastopt.scale_hyperparameters({"lr": 0.1, "max_lr": 0.4}, 4, "sqrt") == {
        "lr": 0.2,
        "max_lr": 0.8,
    }


def test_keras(tmp_path):
    """The first learning rate of a run, which goes on when the model is loaded."""
    pytest.importorskip("torch")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("keras has another backend here")
    import fastopt.keras

    def model(optimizer):
        made = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
        made.compile(optimizer, loss="mse")
        return made

    x, y = np.ones((8, 3), np.float32), np.ones(8, np.float32)
    first = model(fastopt.keras.adamc(learning_rate=0.5))
    first.fit(x, y, verbose=0)
    first.optimizer.learning_rate = 0.125
    first.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert loaded.optimizer._optimizer.max_lr == 0.5
    for each in (first, loaded):
        each.fit(x, y, epochs=3, verbose=0)
    for ours, theirs in zip(first.get_weights(), loaded.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)
    schedules = keras.optimizers.schedules
    rising = schedules.CosineDecay(0.01, 10, warmup_target=0.5, warmup_steps=3)
    with pytest.raises(ValueError, match="must be the largest lr.*give max_lr, too"):
        model(fastopt.keras.adamc(rising)).fit(x, y, verbose=0)
    model(fastopt.keras.adamc(rising, max_lr=0.5)).fit(x, y, verbose=0)
    warm_up = schedules.CosineDecay(0.0, 10, warmup_target=0.5, warmup_steps=3)
    model(fastopt.keras.adamc(warm_up, max_lr=0.5)).fit(x, y, verbose=0)


def test_jax_cannot_know_what_is_traced():
    jax = pytest.importorskip("jax")
    import fastopt.jax

    def of(lr):
        params = {"w": jax.numpy.ones(3)}
        opt = fastopt.jax.adamc(lr=lr)
        return opt.step(params, params, opt.init(params))[0]

    with pytest.raises(TypeError, match="max_lr must be the largest lr.*give max_lr"):
        jax.jit(of)(0.5)
    optax = pytest.importorskip("optax")
    with pytest.raises(TypeError, match="max_lr must be the largest lr.*give max_lr"):
        make = optax.inject_hyperparams(lambda lr: fastopt.jax.adamc(lr=lr).as_optax())
        make(lr=optax.linear_schedule(0.1, 0.01, 3)).init({"w": jax.numpy.ones(3)})
    with pytest.raises(TypeError, match="lr of adamc does more than scale"):
        fastopt.jax.adamc(lr=None)


@pytest.mark.parametrize("rule", [fastopt.sgd, fastopt.sgdw], ids=lambda r: r.name)
@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
def test_a_schedule_may_bring_nesterovs_momentum_to_zero(rule, backend):
    w, opt = np.array([1.0, -2.0, 3.0]), None
    opt = rule(
        w,
        lr=0.5,
        weight_decay=0.0,
        nesterov=True,
        momentum=lambda n: 0.5 if n == 0 else 0.0,
        backend=backend,
    )
    opt.step(np.array([0.25, 1.0, -2.0]))
    before = w.copy()
    opt.step(np.array([0.5, -0.25, 1.0]))
    assert np.array_equal(w, before - 0.5 * np.array([0.5, -0.25, 1.0]))
