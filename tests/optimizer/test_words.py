"""What tools around an optimizer say to what they do not take: what was wanted, what
came, what to do."""

import numpy as np
import pytest

import fastopt
from fastopt import EarlyStopping, GradientNoiseScale, ReduceLROnPlateau, schedules

torch = pytest.importorskip("torch", reason="torch is not installed")
import fastopt.torch as ft  # noqa: E402


def param():
    return torch.nn.Parameter(torch.ones(3))


def generator():
    return (p for p in [param()])


WHAT = {  # makes it, and how messages call it
    "a class of fastopt.torch": (lambda: ft.AdamW, "the class AdamW"),
    "an optimizer of fastopt.torch": (lambda: ft.AdamW([param()]), "AdamW"),
    "a class of torch": (lambda: torch.optim.SGD, "the class SGD"),
    "an optimizer of torch": (lambda: torch.optim.SGD([param()], lr=0.1), "SGD"),
    "a rule": (lambda: fastopt.adam, "<rule adam"),
    "a number": (lambda: 1.5, "1.5"),
    "numbers": (lambda: [1.5, 2.5], r"\[1.5, 2.5\]"),
    "a generator": (generator, "<generator object"),
    "None": (lambda: None, "None"),
    "a name": (lambda: "adam", "'adam'"),
}
TORCHS = {what for what in WHAT if "torch" in what}


def quadratic(x):
    return float(x @ x), 2 * x


def gd():
    return fastopt.gd(np.ones(3))


OPT = {  # where an optimizer is wanted: what is wanted, and instead of one of torch's
    "lr_range_test": (
        lambda opt: fastopt.lr_range_test(quadratic, opt),
        "opt must be an Optimizer, or a Lookahead of one, of fastopt",
        "give fastopt's own the arrays",
    ),
    "Lookahead": (
        fastopt.Lookahead,
        "opt must be an optimizer of fastopt",
        "wrap fastopt's own",
    ),
    "ReduceLROnPlateau": (
        lambda opt: ReduceLROnPlateau().step(1.0, opt),
        "opt must be an optimizer of fastopt",
        "use torch.optim.lr_scheduler.ReduceLROnPlateau",
    ),
}


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("door", OPT)
def test_where_an_optimizer_is_wanted(door, what):
    call, wanted, instead = OPT[door]
    make, named = WHAT[what]
    advice = "call it with parameters first" if what == "a rule" else "make one of"
    advice = f"for one of torch's.*{instead}" if what in TORCHS else advice
    with pytest.raises(TypeError, match=f"^{wanted}, got {named}.*; {advice}"):
        call(make())


def run(**changes):
    given = {"value_and_grad": quadratic, "x0": np.ones(3), "opt": fastopt.gd} | changes
    return fastopt.minimize(**given, steps=2)


def noise(grads):
    GradientNoiseScale(2).update(grads)


FUNCTIONS = {  # where a function is wanted
    "lr_range_test": (
        lambda f: fastopt.lr_range_test(f, gd()),
        r"value_and_grad must be a function, value_and_grad\(params\) -> ",
    ),
    "minimize": (
        lambda f: run(value_and_grad=f),
        r"value_and_grad must be a function, value_and_grad\(params\) -> ",
    ),
    "callbacks": (
        lambda f: run(callbacks=[f]),
        r"callbacks\[0\] must be a function, called with a Run",
    ),
    "join": (
        lambda f: schedules.join([f, f], [3]),
        r"schedules\[0\] must be a callable of the step",
    ),
    "product": (
        lambda f: schedules.product([f]),
        r"schedules\[0\] must be a callable of the step",
    ),
}


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("door", FUNCTIONS)
def test_where_a_function_is_wanted(door, what):
    call, wanted = FUNCTIONS[door]
    make, named = WHAT[what]
    with pytest.raises(TypeError, match=f"^{wanted}.*, got {named}"):
        call(make())


LISTS = {  # where a list is wanted
    "callbacks": (lambda x: run(callbacks=x), "callbacks must be a list of functions"),
    "join": (
        lambda x: schedules.join(x, [3]),
        "schedules must be a list of callables of the step",
    ),
    "boundaries": (
        lambda x: schedules.join([schedules.constant(1.0)] * 2, x),
        "boundaries must be a list of steps",
    ),
    "product": (schedules.product, "schedules must be a list of callables of the step"),
    "multistep": (
        lambda x: schedules.multistep(1.0, x),
        "milestones must be a list of steps",
    ),
    "update": (noise, "grads must be a list of gradients, those of each batch"),
    "update_norms": (
        lambda x: GradientNoiseScale(2).update_norms(x, 1.0),
        "small must be a list of squared norms",
    ),
}


@pytest.mark.parametrize("what", sorted({*WHAT} - {"numbers", "a generator"}))
@pytest.mark.parametrize("door", LISTS)
def test_where_a_list_is_wanted(door, what):
    call, wanted = LISTS[door]
    make, named = WHAT[what]
    with pytest.raises(TypeError, match=f"^{wanted}.*, got {named}"):
        call(make())


def restored(params):
    stop = EarlyStopping(2)
    stop.step(1.0, np.ones(3))
    stop.restore(params)


ARRAYS = {  # where arrays are wanted
    "step": (lambda x: EarlyStopping(2).step(1.0, [x]), "params"),
    "restore": (lambda x: restored([x]), "params"),
    "minimize": (lambda x: run(x0=[x]), "x0"),
    "update": (lambda x: noise([np.ones(3), [x]]), r"grads\[1\]"),
}


@pytest.mark.parametrize("what", sorted({*WHAT} - {"numbers", "a number", "None"}))
@pytest.mark.parametrize("door", ARRAYS)
def test_where_arrays_are_wanted(door, what):
    call, name = ARRAYS[door]
    make, named = WHAT[what]
    advice = rf"; pass list\({name}\)$" if what == "a generator" else ""
    wanted = rf"^{name}\[0\] must be an array, or a list or dict of arrays"
    with pytest.raises(TypeError, match=f"{wanted}, got {named}.*{advice}"):
        call(make())


@pytest.mark.parametrize("what", WHAT)
def test_other_arguments(what):
    make, named = WHAT[what]
    for watch, more in ((EarlyStopping(2), []), (ReduceLROnPlateau(), [gd()])):
        with pytest.raises(TypeError, match=f"it is called by minimize.*got {named}"):
            watch(make())
        if what != "a number":
            words = "metric must be a number, got "
            with pytest.raises(TypeError, match=words):
                watch.step(make(), *more)
    with pytest.raises(TypeError, match=f"must be a dict.*opt.groups.*got {named}"):
        fastopt.scale_hyperparameters(make(), 2, "sqrt")
    with pytest.raises(ValueError, match='rule must be "linear" or "sqrt"'):
        fastopt.scale_hyperparameters({"lr": 0.1}, 2, make())
    if what != "a number":
        with pytest.raises(TypeError, match="lr must be a number"):
            fastopt.adamc(np.ones(3), lr=make())
        with pytest.raises(TypeError, match="lr must be a number"):
            gd().lr = make()
        with pytest.raises(TypeError, match="lr must be a number"):
            schedules.cosine(make(), 3)
        with pytest.raises(TypeError, match="steps must be numbers"):
            schedules.cosine(0.1, 3)(make() if what != "numbers" else ["a"])
    if what not in ("a rule", "a generator"):
        maker = make() if what != "numbers" else (lambda params: 3)
        with pytest.raises(TypeError, match="opt must be a rule, or make an optimizer"):
            run(opt=maker)


def test_arrays_of_strings_are_no_arrays():
    words = "must be an array, or a list or dict of arrays"
    for value in (np.array(["a"]), np.array([None])):
        with pytest.raises(TypeError, match=f"x0 {words}"):
            run(x0=value)
    with pytest.raises(TypeError, match="pass a list of arrays"):
        fastopt.flatten(x for x in [np.ones(3)])
    with pytest.raises(ValueError, match='rule must be "linear" or "sqrt"'):
        fastopt.scale_hyperparameters({"lr": 0.1}, 2, np.ones(3))
    with pytest.raises(ValueError, match='mode must be "min" or "max"'):
        EarlyStopping(1, mode=np.ones(3))


RULES = {  # where a rule is wanted
    "torch": lambda rule: ft.optimizer(rule),
    "native": lambda rule: fastopt.native.hyperparameters(rule),
    "core": lambda rule: fastopt.Optimizer(rule, np.ones(3)),
}


@pytest.mark.parametrize("what", sorted({*WHAT} - {"a rule"}))
@pytest.mark.parametrize("door", RULES)
def test_where_a_rule_is_wanted(door, what):
    make, named = WHAT[what]
    words = f"^rule must be a rule, got {named}.*; pass one of fastopt.RULES"
    with pytest.raises(TypeError, match=words):
        RULES[door](make())


def test_where_a_rule_is_wanted_for_jax():
    pytest.importorskip("jax", reason="jax is not installed")
    import fastopt.jax

    for rule, named in (("adam", "'adam'"), (fastopt.Muon, "the class Muon")):
        with pytest.raises(TypeError, match=f"^rule must be a rule, got {named}; pass"):
            fastopt.jax.optimizer(rule)


@pytest.mark.parametrize("what", sorted({*WHAT} - {"an optimizer of fastopt.torch"}))
def test_where_an_optimizer_of_fastopt_torch_is_wanted(what):
    make, named = WHAT[what]
    words = f"^optimizer must be one of fastopt.torch.*got {named}.*; make one"
    with pytest.raises(TypeError, match=words):
        ft.release_gradients_(make())


@pytest.mark.parametrize("what", sorted({*WHAT} - {"a generator"}))
def test_where_a_model_is_wanted(what):
    make, named = WHAT[what]
    named = "one with 1.5 in it" if what == "numbers" else named
    named = "one with 'a' in it" if what == "a name" else named
    words = f"^model must be a torch.nn.Module, or a list of parameters, got {named}"
    for move in (ft.flatten_, ft.unflatten_):
        with pytest.raises(TypeError, match=words):
            move(make())
        with pytest.raises(TypeError, match=r"got tensor.*; pass \[param\]"):
            move(torch.ones(3))


def test_parameters_of_another_optimizer():
    mine, other = param(), param()
    mine.grad, other.grad = torch.ones(3), torch.ones(3)
    opt = ft.AdamW([mine], lr=0.1)
    shape = r"a Parameter of torch.Size\(\[3\]\)"
    for wrong, got in ((other, shape), (None, "None"), ("w", "'w'")):
        with pytest.raises(
            TypeError, match=f"one of the optimizer's.*got {got}, which"
        ):
            opt.step_param(wrong)
    assert torch.equal(mine.data, torch.ones(3)) and not opt.state
    opt.step_param(mine)
    assert not torch.equal(mine.data, torch.ones(3))


def hollow():
    """Tensors that NumPy cannot copy, and why."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.two_tensor import TwoTensor

    ones = torch.ones(3)
    return [
        (ones.bfloat16(), "BFloat16"),
        (torch._neg_view(ones), "negative bit"),
        (ones.to_sparse(), "Sparse"),
        (ones.to("meta"), "meta"),
        (TwoTensor(ones, ones.clone()), "subclasses"),
        (FakeTensorMode().from_tensor(ones), "subclasses"),
    ]


COPIES = {  # where arrays are copied
    "step": ("params", lambda stop, x: stop.step(1.0, {"w": [x]})),
    "minimize": ("x0", lambda stop, x: run(x0={"w": [x]})),
    "update": (r"grads\[0\]", lambda stop, x: noise([{"w": [x]}] * 2)),
}


@pytest.mark.parametrize("door", COPIES)
def test_where_arrays_are_copied(door):
    name, call = COPIES[door]
    for tensor, reason in hollow():
        stop = EarlyStopping(2)
        words = rf"^{name}\['?w'?\]\[0\] cannot be copied into a NumPy.*{reason}"
        with pytest.raises(TypeError, match=words):
            call(stop, tensor)
        assert stop.state_dict() == EarlyStopping(2).state_dict()


WATCHES = {
    "EarlyStopping": (
        lambda: EarlyStopping(2),
        {"best_look": -2, "looks": -1, "wait": -1, "best_params": "abc"},
    ),
    "ReduceLROnPlateau": (ReduceLROnPlateau, {"bad": -1, "cooling": -1}),
}


@pytest.mark.parametrize("door", WATCHES)
def test_saved_looks_are_checked(door):
    make, fields = WATCHES[door]
    watch, more = make(), [gd()] if door == "ReduceLROnPlateau" else [np.ones(3)]
    watch.step(2.0, *more)
    saved = watch.state_dict()
    for key, less in fields.items():
        wrong = ["abc", object()] if key == "best_params" else ["abc", None, 1.5, less]
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=f"^{key} must be"):
                watch.load_state_dict(saved | {key: value})
    again = make()
    again.load_state_dict(saved)
    assert str(again.state_dict()) == str(saved)
