"""What messages advise those to do who mistook a name or a thing for another."""

import inspect
import pickle

import numpy as np
import pytest

import fastopt
from fastopt import advice
from fastopt.optimizer import refusals


def weights():
    return np.ones(3, np.float32)


def refused(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def test_the_lists_of_options_are_complete():
    def by_name(function):
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    assert [*refusals.OF_OPTIMIZER] == by_name(fastopt.Optimizer.__init__)
    assert {*by_name(fastopt.Optimizer.step)} <= {*refusals.OF_STEP}


@pytest.mark.parametrize("name", refusals.OF_STEP)
def test_arguments_of_step(name):
    where = f"; {name} is an argument of step: opt.step(grads, {name}=...)"
    assert where in refused(TypeError, lambda: fastopt.adamw(weights(), **{name: 1.0}))
    opt = fastopt.adamw(weights())
    assert where in refused(AttributeError, lambda: setattr(opt, name, 1.0))
    assert where in refused(AttributeError, lambda: setattr(opt.groups[0], name, 1.0))
    assert where in refused(TypeError, lambda: opt.groups[0].update({name: 1.0}))
    groups = [{"params": weights(), name: 1.0}]
    assert where in refused(TypeError, lambda: fastopt.adamw(groups))


@pytest.mark.parametrize("name", refusals.OF_OPTIMIZER)
def test_options_of_the_optimizer(name):
    where = f"; {name} is for all groups together, and is given when the optimizer is"
    groups = [{"params": weights(), name: None}]
    assert where in refused(TypeError, lambda: fastopt.adamw(groups))
    opt = fastopt.adamw(weights())
    assert where in refused(AttributeError, lambda: setattr(opt.groups[0], name, 1.0))
    if name not in ("ema", "threads"):
        assert where in refused(AttributeError, lambda: setattr(opt, name, 1.0))


MEANT = {
    "learning_rate": "lr",
    "Lr": "lr",
    "betas": "beta1 and beta2",
    "b1": "beta1",
    "b2": "beta2",
    "decay": "weight_decay",
    "epsilon": "eps",
    "weigth_decay": "weight_decay or weight_decay_mask",
    "format": "formats",
    "thread": "threads",
}


@pytest.mark.parametrize("name", MEANT)
def test_names_that_are_like_others(name):
    message = refused(TypeError, lambda: fastopt.adamw(weights(), **{name: 0.1}))
    assert message.startswith(f"adamw has no hyperparameter {name!r}; it has lr, beta1")
    assert ", weight_decay, and the options of an optimizer, backend, thr" in message
    assert message.endswith(f"; did you mean {MEANT[name]}?")


def test_names_that_are_like_none():
    message = refused(TypeError, lambda: fastopt.adamw(weights(), xyz=0.1))
    assert message.endswith("copy_to, seed, reduce")
    opt = fastopt.lion(weights())
    message = refused(AttributeError, lambda: setattr(opt, "learning_rate", 0.1))
    assert message.endswith("beta2, weight_decay; did you mean lr?")
    assert advice.meant("betas", ["lr", "momentum"]) == []


def test_hyperparameters_have_names():
    wanted = r"^adamw takes .* by name, as in adamw\(params, lr=...\), but got 0.001"
    with pytest.raises(TypeError, match=wanted):
        fastopt.adamw(weights(), 1e-3)


def test_groups_have_items():
    opt = fastopt.adamw([{"params": weights()}, {"params": weights()}])
    message = refused(
        AttributeError, lambda: setattr(opt.groups[1], "weight_decay", 0.5)
    )
    assert message.endswith('an item; write opt.groups[1]["weight_decay"] = 0.5')
    for name in ("nothing", "number", "update"):
        refused(AttributeError, lambda name=name: setattr(opt.groups[1], name, 1))
    assert "weight_decay" not in vars(opt.groups[1])
    opt.groups[1].frozen = True
    opt.groups[1]["weight_decay"] = 0.5
    assert opt.groups[1].frozen and opt.groups[1]["weight_decay"] == 0.5


def test_a_state_with_a_mask_needs_a_mask():
    def made(mask=None):
        groups = [{"params": [np.ones((2, 2)), np.ones(2)]} for _ in range(2)]
        return fastopt.adamw(groups, weight_decay_mask=mask)

    both = made(lambda path, array: array.ndim > 1)
    one = made(lambda path, array: path != "[0][1]")
    for saved, opt, said in (
        (both, made(), "has 4 rows, but this optimizer has 2: .* saved with a weight_"),
        (made(), both, "has 2 rows, but this optimizer has 4: .* saved without a we"),
        (one, both, "has 3 rows, but this optimizer has 4: .* saved with another we"),
    ):
        with pytest.raises(ValueError, match=said):
            opt.load_state_dict(saved.state_dict())


def test_states_of_other_parameters(tmp_path):
    def made(dtype=np.float32, **shapes):
        return fastopt.adamw({n: np.ones(s, dtype) for n, s in shapes.items()})

    path, saved = tmp_path / "saved.safetensors", made(a=3, b=2)
    saved.save(path)
    for load in (
        lambda opt: opt.load(path),
        lambda opt: opt.load_state_dict(saved.state_dict()),
    ):
        said = refused(ValueError, lambda: load(made(a=3, c=2)))  # noqa: B023
        assert said.endswith(
            "If they are the same in this order, give them those names or, to "
            'load_state_dict, pass the state with state["params"] = None'
        )
        for others in ({"a": 3}, {"a": 3, "c": 4}, {"b": 3, "c": 2, "d": 1}):
            said = refused(ValueError, lambda: load(made(**others)))  # noqa: B023
            assert said.endswith("(each after the number of its group)")
        said = refused(TypeError, lambda: load(made(float, a=3, b=2)))  # noqa: B023
        assert "saved for parameters that are computed in float32, but" in said
        assert "['a'] is computed in float64" in said and "formats" not in said


FILES = {
    "a zip file, as torch.save": lambda file: np.savez(file, a=np.ones(3)),
    "a pickle": lambda file: pickle.dump({"a": 1}, file),
    "an array that np.save wrote": lambda file: np.save(file, np.ones(3)),
}


@pytest.mark.parametrize("what", FILES)
def test_files_of_other_kinds(what, tmp_path):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        FILES[what](file)
    said = refused(ValueError, lambda: fastopt.adamw(weights()).load(path))
    assert f"it is not a safetensors file, but {what}" in said


def test_flat_buffers():
    flat = fastopt.flatten({"w": np.ones(3), "x": np.ones(())})
    opt = fastopt.sgd(flat, lr=0.5)
    for wrong in ({"w": np.ones(3), "x": np.ones(())}, [np.ones(3)]):
        message = refused(TypeError, lambda wrong=wrong: opt.step(wrong))
        assert "grads must be a FlatBuffer, like params" in message
        assert "flat.zeros_like()" in message
    message = refused(TypeError, lambda: flat.__setitem__("w", np.zeros(3)))
    assert message.endswith("flat['w'][:] = values")
    message = refused(TypeError, lambda: flat.__setitem__("x", 0.0))
    assert message.endswith("flat['x'][...] = values")
    flat["w"] += 1  # which changes the array, and assigns it to where it was
    assert flat.data.tolist() == [2, 2, 2, 1]
    array = fastopt.flatten(np.ones(3))
    array[:] += 1
    array[0] = 5
    array[[1, 2]] *= 2
    assert array.data.tolist() == [5, 4, 4]


def test_tuples_of_torch():
    def said(make, **options):
        return refused(TypeError, lambda: make(np.ones((2, 2)), **options))

    end = said(fastopt.rprop, etas=(0.5, 1.2))
    assert end.endswith("did you mean eta_minus and eta_plus?")
    end = said(fastopt.rprop, step_sizes=(0.1, 1.0))
    assert end.endswith("did you mean step_min and step_max?")
    end = said(fastopt.Adafactor, eps=(None, 1e-3))
    assert end.endswith("did you mean eps1 and eps2?")


def test_attributes_of_a_group():
    group = fastopt.sgd(np.ones(3)).groups[0]
    assert refused(AttributeError, lambda: group.lr) == (
        "opt.groups[0] has no attribute 'lr', but an item; write opt.groups[0][\"lr\"]"
    )
    message = refused(AttributeError, lambda: setattr(group, "lr", 2))
    assert message.endswith('write opt.groups[0]["lr"] = 2')
    assert "did you mean momentum?" in refused(AttributeError, lambda: group.momentm)
    assert "argument of step" in refused(AttributeError, lambda: group.clip_norm)
    assert not hasattr(group, "_repr_html_")
    new = type(group).__new__(type(group))
    assert "no attribute '_rule'" in refused(AttributeError, lambda: new.lr)


def test_names_of_the_package():
    def said(name):
        return refused(AttributeError, lambda: getattr(fastopt, name))

    assert "did you mean fastopt.adamw? The classes for tensors" in said("AdamW")
    assert said("lbfgs").endswith("no attribute 'lbfgs'; fastopt.RULES has all rules")
    assert said("adamw8bit").endswith(
        '; fastopt.adamw(..., formats="8bit") has its state in 8 bits'
    )
    assert said("__wrapped__") == "module 'fastopt' has no attribute '__wrapped__'"
    assert "no attribute 'a.b'" in said("a.b")
    assert not hasattr(fastopt, "nothing_like_it")


def test_an_example_of_formats_of_ones_own_rule():
    rule = fastopt.Rule(
        lambda p, g, m, v, lr: (p, m, v),
        lambda t, lr=0.1: (lr,),
        state=("m", "v"),
        name="mine",
    )
    params = np.ones(5000, np.float32)
    message = refused(ValueError, lambda: rule(params, formats="8bit"))
    assert message.endswith("such as {'m': 'm8', 'v': 'v8'}")
    rule(params, formats={"m": "m8", "v": "v8"})


def test_counts_of_one():
    rule = fastopt.Rule(lambda p, g, lr, mu: (p,), lambda t, lr=0.1: (lr,), name="mine")
    assert "returns 1 value, but" in refused(TypeError, lambda: rule(np.ones(3)))


def test_submodules_are_to_be_imported(monkeypatch):
    import fastopt.scipy  # noqa: F401  which may be there from another test

    monkeypatch.delattr(fastopt, "scipy")
    message = refused(AttributeError, lambda: fastopt.scipy)
    assert message.endswith("; write import fastopt.scipy")


def test_tensors_and_models_of_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import fastopt.torch

    model = torch.nn.Linear(2, 2)
    use = "fastopt.torch.AdamW(model.parameters())"
    things = [
        model,
        model.parameters(),
        model.named_parameters(),
        [*model.parameters()],
    ]
    for thing in things:
        assert use in refused(TypeError, lambda thing=thing: fastopt.adamw(thing))
    message = refused(TypeError, lambda: fastopt.adamw([*model.parameters()]))
    assert "pass params[0].detach(), or" in message and use in message
    opt = fastopt.adamw(weights())
    message = refused(TypeError, lambda: opt.step(torch.ones(3, requires_grad=True)))
    assert message.endswith("; pass grads.detach()")
    name, said = "Lamb", r"; did you mean fastopt.torch.LAMB\?$"
    with pytest.raises(AttributeError, match=said):
        getattr(fastopt.torch, name)
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        with pytest.raises(AttributeError, match=r'h\.AdamW\(..., formats="8bit"\)'):
            getattr(fastopt.torch, name)
    for name in ("LBFGS", "SparseAdam"):
        with pytest.raises(AttributeError, match=f"'{name}'; use torch.optim.{name}$"):
            getattr(fastopt.torch, name)
    with pytest.raises(AttributeError, match="'Xyzzy'; fastopt.torch.__all__ lists"):
        fastopt.torch.Xyzzy  # noqa: B018


def test_arrays_of_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    import fastopt.jax

    w = jax.numpy.ones(3)
    message = refused(ValueError, lambda: fastopt.adamw({"w": w}))
    assert "params['w'] is read-only" in message and "use fastopt.jax" in message
    fastopt.adamw({"w": np.array(w)}).step({"w": w})  # as a gradient it is fine
    message = refused(TypeError, lambda: jax.jit(fastopt.adamw)(w))
    assert message.endswith("; use fastopt.jax, whose steps are functions for jax.jit")
    message = refused(TypeError, lambda: fastopt.jax.adamw(w, lr=0.1))
    assert "opt = fastopt.jax.adamw(...); state = opt.init(params)" in message
    message = refused(TypeError, lambda: fastopt.jax.adamw(learning_rate=0.1))
    assert message.endswith("did you mean lr?")
    message = refused(AttributeError, lambda: fastopt.jax.AdamW)
    assert message.endswith("did you mean fastopt.jax.adamw?")


ATTRIBUTES = {
    "zero_grad": r"; gradients are arguments of step.* step\(grads, zero_grads=True\)",
    "param_groups": "; opt.groups has the hyperparameters",
    "defaults": "; opt.groups has the hyperparameters",
    "betas": r"; did you mean opt.beta1 and opt.beta2\?",
    "weight_decays": r"; did you mean opt.weight_decay\?",
    "state_dicts": "; did you mean opt.state_dict or",
    "update": r"; opt.step\(grads\) updates the parameters in place",
    "params": "; an optimizer updates in place the arrays that it was made with",
    "__array_interfaces__": "$",
    "colour": "$",
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_other_optimizers(name):
    opt = fastopt.adamw(weights())
    with pytest.raises(AttributeError, match=f"attribute '{name}'{ATTRIBUTES[name]}"):
        getattr(opt, name)


def test_views_of_dicts_are_no_lists():
    layers = {"w": weights(), "b": weights()}
    for view in (layers.values(), layers.keys(), layers.items(), {1, 2}):
        with pytest.raises(TypeError, match="; pass a list of arrays$"):
            fastopt.adamw(view)
        with pytest.raises(TypeError, match="; pass a list of arrays$"):
            fastopt.flatten(view)
    opt = fastopt.adamw([*layers.values()])
    with pytest.raises(TypeError, match=r"grads must be a list .*, got dict_values$"):
        opt.step(layers.values())


def test_lists_of_numbers_are_no_arrays():
    opt = fastopt.adamw(weights())
    for grads in ([1.0, 2.0, 3.0], (1.0, 2.0, 3.0), 1.0):
        with pytest.raises(TypeError, match=r"pass np.asarray\(grads\), of the dtype"):
            opt.step(grads)
    opt = fastopt.adamw({"w": weights()})
    with pytest.raises(TypeError, match=r"pass np.asarray\(grads\['w'\]\), of the"):
        opt.step({"w": [1.0, 2.0, 3.0]})
    for params in ([1.0, 2.0], 1.0, np.float32(1)):
        with pytest.raises(TypeError, match="make an array of numbers first"):
            fastopt.adamw(params)


def test_masks_take_a_path_and_an_array():
    message = r"weight_decay_mask must be .* cannot be called with a path and an array"
    for mask in (lambda path: True, lambda *, path, array: True, lambda a, b, c: True):
        with pytest.raises(TypeError, match=message):
            fastopt.adamw(weights(), weight_decay_mask=mask)

    def failing(path, array):
        raise TypeError("of its own")

    with pytest.raises(TypeError, match="^of its own$"):
        fastopt.adamw(weights(), weight_decay_mask=failing)
    fastopt.adamw([weights()], weight_decay_mask=lambda *both: True)


SCHEDULES = {
    "cosine_annealing": "cosine",
    "CosineAnnealingLR": "cosine",
    "StepLR": "step",
    "OneCycleLR": "onecycle",
    "SequentialLR": "join",
    "warmup_cosin": "warmup_cosine",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_other_libraries(name):
    schedules = fastopt.schedules
    with pytest.raises(AttributeError) as raised:
        getattr(schedules, name)
    end = f"; did you mean fastopt.schedules.{SCHEDULES[name]}"
    assert end in str(raised.value) and not hasattr(schedules, "__path__")


def test_arguments_of_schedules():
    schedules = fastopt.schedules
    for make, said in (
        (lambda: schedules.warmup_cosine(0.1, total_steps=3), "did you mean steps"),
        (lambda: schedules.cosine(0.1, T_max=3), "did you mean steps"),
        (lambda: schedules.wsd(0.1, 9, warmup_steps=2), "did you mean warmup"),
        (lambda: schedules.step(0.1, colour=3), "step has no argument 'colour'; it"),
    ):
        with pytest.raises(TypeError, match=said):
            make()
    signature = inspect.signature(schedules.cosine)
    assert [*signature.parameters] == ["lr", "steps", "end", "power"]
    one = schedules.cosine(lr=0.1, steps=3)
    assert pickle.loads(pickle.dumps(one)) == one == schedules.cosine(0.1, 3)
