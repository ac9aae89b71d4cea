"""Rules as optimizers of Keras 3, on its torch backend: its conventions hold, and the
steps are fastopt's to the bit."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from cases import same_bits
from installed import needs_numba

import fastopt

pytest.importorskip("torch", reason="torch is not installed")
os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="keras is not installed")
if keras.backend.backend() != "torch":
    pytest.skip("keras has another backend here", allow_module_level=True)
import torch  # noqa: E402

import fastopt.keras as optimizers  # noqa: E402

SHAPES = {"kernel": (5, 3), "bias": (3,), "scale": (1,), "tower": (2, 3, 2)}
ATTRIBUTES = [  # set before the first step, and then
    ("adamw", {"beta1": (0.5, 0.0), "eps": (1e-3, 1e-2)}),
    ("sgd", {"momentum": (0.0, 0.75)}),
    ("sgd", {"momentum": (0.5, 0.25), "nesterov": (True, False)}),
    ("lion", {"beta2": (0.75, 0.5), "beta1": (0.25, 0.125)}),
]
SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.7)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these only wait for more, on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def variables(dtype="float32"):
    rng = np.random.default_rng(1)
    return [
        keras.Variable(rng.normal(size=shape), dtype=dtype, name=name)
        for name, shape in SHAPES.items()
    ]


def gradients(steps, dtype=np.float32):
    rng = np.random.default_rng(2)
    return [
        [rng.normal(size=shape).astype(dtype) for shape in SHAPES.values()]
        for _ in range(steps)
    ]


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def tensors(grads):
    return [None if g is None else torch.from_numpy(g.copy()) for g in grads]


def trained(optimizer, steps=7):
    """The variables after so many steps with this optimizer."""
    weights = variables()
    for grads in gradients(steps):
        optimizer.apply(tensors(grads), weights)
    assert int(optimizer.iterations) == steps // (
        optimizer.gradient_accumulation_steps or 1
    )
    return values(weights)


def plainly_trained(rule, steps=7, dtype=np.float32, **hyperparameters):
    params = values(variables(dtype=np.dtype(dtype).name))
    opt = rule(params, **hyperparameters)
    for grads in gradients(steps, dtype):
        opt.step(grads)
    return params, opt


# The steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [rule.name for rule in fastopt.RULES])
def test_every_rule_does_its_own_steps(name):
    """With a schedule of Keras's; and its class comes back from what is written."""
    rule, made = getattr(fastopt, name), getattr(optimizers, name)
    assert issubclass(made, keras.optimizers.Optimizer) and name in dir(optimizers)
    optimizer = made(SCHEDULE)
    lr = [float(SCHEDULE(n)) for n in range(7)]
    want, opt = plainly_trained(rule, lr=lambda n: lr[min(n, 6)])
    assert all(map(same_bits, trained(optimizer), want))
    for got, wanted in zip(optimizer.eval_params(), opt.eval_params(), strict=True):
        assert same_bits(got, wanted)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(again) is made
    default = made()
    assert float(default.learning_rate) == pytest.approx(rule.hyperparameters["lr"])


def test_hyperparameters():
    given = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.2}
    want, _ = plainly_trained(fastopt.adamw, lr=np.float32(0.02), **given)
    optimizer = optimizers.adamw(0.02, **given)
    assert all(map(same_bits, trained(optimizer), want))
    config = optimizer.get_config()
    assert given.items() <= config.items()
    again = optimizers.adamw.from_config(config)
    assert all(map(same_bits, trained(again), want))
    with pytest.raises(ValueError, match="not recognized.*lr"):
        optimizers.adamw(lr=0.1)
    with pytest.raises(ValueError, match="beta1 must be in"):
        optimizers.adamw(beta1=2.0).build(variables())


def test_float64():
    weights = variables("float64")
    optimizer = optimizers.adam(SCHEDULE)
    for grads in gradients(3, np.float64):
        optimizer.apply(tensors(grads), weights)
    want, _ = plainly_trained(
        fastopt.adam, 3, np.float64, lr=lambda n: float(SCHEDULE(n))
    )
    assert all(map(same_bits, values(weights), want))


def test_a_learning_rate_that_is_set():
    weights, optimizer = variables(), optimizers.gd(0.5)
    before = values(weights)
    optimizer.learning_rate = 0.25
    optimizer.apply([torch.ones(v.shape) for v in weights], weights)
    optimizer.learning_rate.assign(0.0)
    optimizer.apply([torch.ones(v.shape) for v in weights], weights)
    for new, old in zip(values(weights), before, strict=True):
        assert same_bits(new, old - np.float32(0.25))


@pytest.mark.parametrize("name, options", ATTRIBUTES)
def test_hyperparameters_that_are_set(name, options):
    """Before the first step, and between two."""
    rule, optimizer = getattr(fastopt, name), getattr(optimizers, name)(0.125)
    params, weights = values(variables()), variables()
    opt = rule(params, lr=0.125)
    for attribute, (first, _) in options.items():
        assert getattr(optimizer, attribute) == rule.hyperparameters[attribute]
        for made in (optimizer, opt):
            setattr(made, attribute, first)
    for i, grads in enumerate(gradients(4)):
        if i == 2:
            for attribute, (_, second) in options.items():
                setattr(optimizer, attribute, second)
                setattr(opt, attribute, second)
        optimizer.apply(tensors(grads), weights)
        opt.step(grads)
    assert all(map(same_bits, values(weights), params))
    config = optimizer.get_config()
    again = type(optimizer).from_config(config)
    for attribute, (_, second) in options.items():
        assert config[attribute] == second == getattr(optimizer, attribute)
        assert getattr(again, attribute) == second


def test_hyperparameters_that_cannot_be_set():
    weights, optimizer = variables(), optimizers.adamw(0.125)
    for _ in range(2):
        with pytest.raises(ValueError, match="beta1 must be in"):
            optimizer.beta1 = 2.0
        with pytest.raises(TypeError, match="eps must be a number, got 'a'"):
            optimizer.eps = "a"
        with pytest.raises(AttributeError, match="is called learning_rate"):
            optimizer.lr = 0.5
        with pytest.raises(AttributeError, match="'adamw' object has no attribute 'x'"):
            _ = optimizer.x
        assert (optimizer.beta1, optimizer.eps) == (0.9, 1e-8)
        optimizer.apply(tensors(gradients(1)[0]), weights)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lion", "gd"])
def test_no_weight_decay(name, built):
    """None after the optimizer was made: 0, as to Keras, and so it is saved."""
    results = []
    for none in (None, 0.0):
        optimizer = getattr(optimizers, name)(0.125, weight_decay=0.5)
        weights = variables()
        for i, grads in enumerate(gradients(3)):
            if i == int(built):
                optimizer.weight_decay = none
            optimizer.apply(tensors(grads), weights)
        again = type(optimizer).from_config(optimizer.get_config())
        other = variables()
        for grads in gradients(3):
            again.apply(tensors(grads), other)
        results.append([*values(weights), *values(other)])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize(
    "rate", [fastopt.schedules.cosine(0.1, 10), lambda step: 0.1, type(SCHEDULE)]
)
def test_learning_rates_that_keras_cannot_call(rate):
    words = "learning_rate must be a float.* got <?.*; use a keras LearningRateSchedule"
    with pytest.raises(TypeError, match=words):
        optimizers.adamw(rate)
    optimizer = optimizers.adamw(lambda: 0.125)
    with pytest.raises(TypeError, match=words):
        optimizer.learning_rate = rate
    want, _ = plainly_trained(fastopt.adamw, lr=0.125)
    assert all(map(same_bits, trained(optimizer), want))


@needs_numba
def test_a_rule_of_your_own():
    def update(p, g, lr):
        return (p - lr * g,)

    rule = fastopt.Rule(update, lambda t, lr=0.125: (lr,), name="mine")

    class Mine(optimizers.Optimizer):
        pass

    Mine.rule = rule
    assert all(map(same_bits, trained(Mine()), trained(optimizers.gd(0.125))))


def test_gradients_of_any_kind():
    """None, of another dtype, not contiguous, of a graph."""
    weights, optimizer = variables(), optimizers.sgd(0.5, momentum=0.9)
    before = values(weights)
    grads = tensors(gradients(1)[0])
    given = [
        torch.from_numpy(np.asfortranarray(grads[0].numpy())),
        None,
        grads[2].double(),
        grads[3].requires_grad_() * 1,
    ]
    assert not given[0].is_contiguous() and given[3].requires_grad
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply(given, weights)
    for i, (new, old) in enumerate(zip(values(weights), before, strict=True)):
        moved = 0 if i == 1 else np.float32(0.5) * grads[i].detach().numpy()
        assert same_bits(new, old - moved)


# What is Keras's ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.7},
        {"global_clipnorm": 0.7},
        {"clipvalue": 0.3},
        {"use_ema": True, "ema_momentum": 0.6, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 8.0},
        {"weight_decay": 0.3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_every_optimizer(options):
    """What Keras's own gradient descent does with them, gd does, to rounding; the decay
    of a rule that has none is Keras's."""
    steps = 8
    want = trained(keras.optimizers.SGD(0.1, **options), steps)
    got = trained(optimizers.gd(0.1, **options), steps)
    plain = trained(optimizers.gd(0.1), steps)
    for a, b, c in zip(got, want, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)
        assert np.abs(a - c).max() > 1e-3


@pytest.mark.parametrize("by", ["list", "name"])
def test_weight_decay_spares_what_is_excluded(by):
    """As with Keras's AdamW, here in the pass of the step."""

    def run(optimizer):
        weights = variables()
        if by == "list":
            optimizer.exclude_from_weight_decay(var_list=[weights[1], weights[3]])
        else:
            optimizer.exclude_from_weight_decay(var_names=["bias", "tower"])
        for grads in gradients(6):
            optimizer.apply(tensors(grads), weights)
        with pytest.raises(ValueError, match="before the optimizer is built"):
            optimizer._optimizer and optimizer.exclude_from_weight_decay()
        return values(weights)

    class Theirs(keras.optimizers.AdamW):
        """The same, but for what is not asked about here."""

    got = run(optimizers.adamw(0.05, weight_decay=0.9, eps=1e-8))
    all_of_them = trained(optimizers.adamw(0.05, weight_decay=0.9, eps=1e-8), 6)
    none_of_them = trained(optimizers.adamw(0.05, weight_decay=0.0, eps=1e-8), 6)
    for i, given in enumerate(got):
        assert same_bits(given, (none_of_them if i in (1, 3) else all_of_them)[i])
        assert not same_bits(none_of_them[i], all_of_them[i])
    theirs = keras.optimizers.AdamW(0.05, weight_decay=0.9, epsilon=1e-8)
    theirs.exclude_from_weight_decay(var_names=["bias", "tower"])
    for a, b in zip(got, trained(theirs, 6), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_scaled_losses():
    """LossScaleOptimizer skips what is not finite, and the step does not count."""
    weights, inner = variables(), optimizers.adam(0.01)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    (grads,) = gradients(1)
    optimizer.apply(tensors([g * 4 for g in grads]), weights)
    want = trained(optimizers.adam(0.01), 1)
    assert all(map(same_bits, values(weights), want))
    grads[1][0] = np.inf
    optimizer.apply(tensors(grads), weights)
    assert all(map(same_bits, values(weights), want))
    assert int(inner.iterations) == 1 and inner._optimizer.steps == 1


# Whole models -------------------------------------------------------------------------

X = np.random.default_rng(3).normal(size=(40, 6)).astype(np.float32)
Y = (X[:, :1] * X[:, 1:2] > 0).astype(np.float32)


def model(optimizer, **kwargs):
    keras.utils.set_random_seed(4)
    layers = [
        keras.layers.Input((6,)),
        keras.layers.Dense(8, activation="tanh"),
        keras.layers.BatchNormalization(),  # with variables that are not trained
        keras.layers.Dense(1, activation="sigmoid"),
    ]
    made = keras.Sequential(layers)
    made.compile(optimizer, loss="binary_crossentropy", **kwargs)
    return made


def fit(made, epochs):
    history = made.fit(X, Y, batch_size=10, epochs=epochs, shuffle=False, verbose=0)
    return history.history["loss"]


def test_fit_does_what_keras_does():
    given = {"learning_rate": 0.02, "weight_decay": 0.01}
    ours = model(optimizers.adamw(eps=1e-8, **given))
    theirs = model(keras.optimizers.AdamW(epsilon=1e-8, **given))
    losses = fit(ours, 15)
    np.testing.assert_allclose(losses, fit(theirs, 15), rtol=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert int(ours.optimizer.iterations) == 60


@pytest.mark.parametrize(
    "name, options",
    [
        ("adamw", {"weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", {"centered": True, "momentum": 0.5}),
        ("nadam", {}),
        ("lamb", {}),
        ("prodigy", {}),
        ("schedule_free_adamw", {"use_ema": True}),
        ("gd", {}),
    ],
)
def test_a_saved_model_goes_on_exactly(name, options, tmp_path):
    def new():
        optimizer = getattr(optimizers, name)(0.03, **options)
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta"])
        return model(optimizer)

    once, first = new(), new()
    fit(once, 4)
    fit(first, 2)
    first.save(tmp_path / "model.keras")
    second = keras.models.load_model(tmp_path / "model.keras")
    assert type(second.optimizer) is type(first.optimizer)
    assert second.optimizer.get_config() == first.optimizer.get_config()
    fit(second, 2)
    if not options.get("use_ema"):  # which changes the weights after each fit
        assert all(map(same_bits, second.get_weights(), once.get_weights()))
    fit(first, 2)
    assert all(map(same_bits, second.get_weights(), first.get_weights()))
    second.save(tmp_path / "again.keras")
    third = keras.models.load_model(tmp_path / "again.keras")
    fit(third, 1), fit(first, 1)
    assert all(map(same_bits, third.get_weights(), first.get_weights()))


def excluding(by, name="adamw", **options):
    """A model whose biases do not decay, and the optimizer's own variables."""
    made = model("sgd")
    optimizer = getattr(optimizers, name)(0.05, **{"weight_decay": 0.9, **options})
    spared = [v for v in made.trainable_variables if v.name in ("bias", "beta")]
    assert len(spared) == 3
    if by == "list":
        optimizer.exclude_from_weight_decay(var_list=spared)
    elif by == "name":
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta"])
    made.compile(optimizer, loss="binary_crossentropy")
    return made


def saved(made, path):
    made.save(path)
    return keras.models.load_model(path)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("by", ["list", "name"])
@pytest.mark.parametrize("name", ["adamw", "gd"])
def test_what_is_excluded_from_decay_is_saved(name, by, epochs, scaled, tmp_path):
    """Before the optimizer is built and after; of gd, the decay is Keras's own."""
    once, first, all_decay = (excluding(how, name) for how in (by, by, None))
    for made in (once, first, all_decay) if scaled else ():
        optimizer = keras.optimizers.LossScaleOptimizer(made.optimizer)
        made.compile(optimizer, loss="binary_crossentropy")
    fit(first, epochs) if epochs else None
    second = saved(saved(first, tmp_path / "a.keras"), tmp_path / "b.keras")
    assert second.optimizer.get_config() == first.optimizer.get_config()
    fit(second, 2), fit(once, epochs + 2), fit(all_decay, epochs + 2)
    assert all(map(same_bits, second.get_weights(), once.get_weights()))
    assert not all(map(same_bits, all_decay.get_weights(), once.get_weights()))


def test_what_is_excluded_stands_in_the_configuration():
    made = excluding("name")
    config = made.optimizer.get_config()
    assert config["exclude_from_weight_decay"]["var_names"] == ["beta", "bias"]
    again = optimizers.adamw.from_config(config)
    assert config == made.optimizer.get_config() == again.get_config()
    again.exclude_from_weight_decay()  # another choice takes the place of that
    assert "exclude_from_weight_decay" not in again.get_config()
    again.build(made.trainable_variables)
    assert again._decays == [True] * len(made.trainable_variables)
    assert "exclude_from_weight_decay" not in optimizers.adamw().get_config()


def test_excluded_variables_that_have_another_name_now(tmp_path):
    """They cannot be told from others, unless the state that was saved knows them."""
    made = excluding("list")
    config = made.optimizer.get_config()
    paths = config["exclude_from_weight_decay"]["paths"]
    paths[0] = "another/bias"
    optimizer = optimizers.adamw.from_config(config)
    optimizer.build(made.trainable_variables)
    before = made.get_weights()
    grads = [torch.ones(v.shape) for v in made.trainable_variables]
    with pytest.raises(ValueError, match="another/bias: what was excluded from weight"):
        optimizer.apply(grads, made.trainable_variables)
    assert all(map(same_bits, made.get_weights(), before))
    made.optimizer.build(made.trainable_variables)
    store = {}
    made.optimizer.save_own_variables(store)
    optimizer.load_own_variables(store)
    optimizer.apply(grads, made.trainable_variables)
    assert optimizer._decays == made.optimizer._decays


@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.2},
        {"clipvalue": 0.01},
        {"use_ema": True, "ema_momentum": 0.6, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 3},  # an epoch ends between two
        {"loss_scale_factor": 8.0},
        {"name": "mine", "beta2": 0.98},
        {"learning_rate": SCHEDULE},
        {"weight_decay": 0.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_setting_is_saved(options, epochs, tmp_path):
    """And steps as it did, before training and amid it."""
    given = {"learning_rate": 0.03, "weight_decay": 0.1, **options}
    once, first = (model(optimizers.adamw(**given)) for _ in range(2))
    fit(first, epochs) if epochs else None
    second = saved(first, tmp_path / "model.keras")
    assert second.optimizer.get_config() == first.optimizer.get_config()
    fit(once, epochs) if epochs else None
    fit(once, 2), fit(second, 2)
    assert all(map(same_bits, second.get_weights(), once.get_weights()))
    plain = model(optimizers.adamw(0.03, weight_decay=0.1))
    fit(plain, epochs) if epochs else None
    fit(plain, 2)
    if options != {"loss_scale_factor": 8.0}:  # of two to a power, it leaves no trace
        assert not all(map(same_bits, plain.get_weights(), second.get_weights()))


def test_settings_that_change_are_saved(tmp_path):
    """The learning rate and the decay, which count from the next step on."""

    def new():
        return model(optimizers.adamw(0.05, weight_decay=0.5))

    once, first, unchanged = new(), new(), new()
    for made in (once, first, unchanged):
        fit(made, 1)
        made.optimizer.learning_rate = 0.02
    for made in (once, first):
        made.optimizer.weight_decay = 0.1
        made.optimizer.beta1 = 0.5
    second = saved(first, tmp_path / "model.keras")
    assert float(second.optimizer.learning_rate) == np.float32(0.02)
    assert second.optimizer.weight_decay == 0.1 and second.optimizer.beta1 == 0.5
    fit(once, 1), fit(second, 1), fit(unchanged, 1)
    assert all(map(same_bits, second.get_weights(), once.get_weights()))
    assert not all(map(same_bits, once.get_weights(), unchanged.get_weights()))


@pytest.mark.parametrize("first, then", [(0.5, 0.0), (0.0, 0.5)])
def test_momentum_that_is_switched_is_saved(first, then, tmp_path):
    once, other = (model(optimizers.sgd(0.05, momentum=first)) for _ in range(2))
    for made in (once, other):
        fit(made, 1)
        made.optimizer.momentum = then
        fit(made, 1)
    second = saved(other, tmp_path / "model.keras")
    for momentum in (then, 0.75):
        once.optimizer.momentum = second.optimizer.momentum = momentum
        fit(once, 1), fit(second, 1)
        assert all(map(same_bits, second.get_weights(), once.get_weights()))


def test_states_that_do_not_fit(tmp_path):
    lion, adam = model(optimizers.lion(0.01)), model(optimizers.adam(0.01))
    fit(lion, 1), fit(adam, 1)
    lion.save_weights(tmp_path / "lion.weights.h5")
    theirs = model(keras.optimizers.Adam(0.01))
    fit(theirs, 1)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    before = adam.optimizer._optimizer.state_dict()["state"]["v"]
    adam.save_weights(tmp_path / "adam.weights.h5")
    with pytest.raises(ValueError, match="other state than adam here: v_0, v_1, v_2"):
        adam.load_weights(tmp_path / "lion.weights.h5")
    with pytest.raises(ValueError, match="other state than lion here: v_0, v_1, v_2"):
        lion.load_weights(tmp_path / "adam.weights.h5")
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        adam.load_weights(tmp_path / "theirs.weights.h5")
    after = adam.optimizer._optimizer.state_dict()["state"]["v"]
    assert all(map(same_bits, before, after))
    optimizer = optimizers.adam()  # not built
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        optimizer.load_own_variables({"0": 1, "1": 1, "steps": 3})
    with pytest.raises(ValueError, match="has not been built"):
        optimizer.eval_params()


# Refusals -----------------------------------------------------------------------------


def test_variables_that_moved():
    weights, optimizer = variables(), optimizers.adam()
    optimizer.build(weights)
    weights[2].value.data = weights[2].value.data.clone()
    with pytest.raises(RuntimeError, match="scale has moved to other memory"):
        optimizer.apply(tensors(gradients(1)[0]), weights)
    assert optimizer._optimizer.steps == 0


@pytest.mark.parametrize("change", ["strides", "sign"])
def test_variables_that_lie_otherwise_in_the_same_memory(change):
    rng = np.random.default_rng(3)
    variable = keras.Variable(rng.normal(size=(3, 3)), dtype="float32", name="square")
    optimizer = optimizers.adam(0.125)
    optimizer.apply([torch.ones(3, 3)], [variable])
    data = variable.value.data
    before = data.clone()
    variable.value.data = data.t() if change == "strides" else torch._neg_view(data)
    with pytest.raises(RuntimeError, match="square has moved.* or lies there"):
        optimizer.apply([torch.ones(3, 3)], [variable])
    assert optimizer._optimizer.steps == 1 and torch.equal(data, before)
    variable.value.data = data
    optimizer.apply([torch.ones(3, 3)], [variable])
    assert optimizer._optimizer.steps == 2


def test_variables_that_do_not_fit():
    with pytest.raises(TypeError, match="float32 or float64"):
        optimizers.adam().build(variables("float16"))
    mixed = [*variables(), *variables("float64")]
    with pytest.raises(TypeError, match="one optimizer for each dtype"):
        optimizers.adam().build(mixed)


def test_other_backends_are_refused():
    pytest.importorskip("jax", reason="jax is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "import fastopt.keras"],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "ImportError: fastopt.keras updates variables in place" in done.stderr
    assert "this is 'jax'; set KERAS_BACKEND=torch" in done.stderr


def test_docstring_examples():
    import doctest

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.testmod(optimizers)
    assert result.attempted >= 5 and not result.failed
