"""The classes of ``fastopt.torch`` as Python knows them, what they are told, and what
they load."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest

import fastopt

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_tensors import Parameter, class_of, draw, flat, give, params_of  # noqa: E402

import fastopt.torch as ft  # noqa: E402

OTHERS = [*ft._OTHERS]
CLASSES = [name for name in ft.__all__ if name[0].isupper()]


def steps(opt, params, count=3, seed=10):
    for i in range(count):
        shapes, dtype = [p.shape for p in params], params[0].dtype
        give(params, draw(shapes, dtype=dtype, seed=seed + i))
        opt.step()


# Subclasses -----------------------------------------------------------------------


class Mine(ft.Lion):
    pass


class Deeper(Mine):
    """With arguments of its own."""

    def __init__(self, params, lr=0.2, *, name="deeper"):
        super().__init__(params, lr=lr, betas=(0.8, 0.9))
        self.name = name


class Passing(ft.ScheduleFreeAdamW):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Logged:
    """A mixin, with an argument of a class."""

    def __init_subclass__(cls, tag="none", **others):
        super().__init_subclass__(**others)
        cls.tag = tag

    def step(self, *args, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        return super().step(*args, **kwargs)


class Counted(Logged, ft.LAMB, tag="counted"):
    pass


class Last(ft.SGDW, Logged):
    pass


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_can_be_subclassed(name):
    kind = getattr(ft, name)
    plain = type("Plain", (kind,), {})

    def own(self, params, size=0.03):
        kind.__init__(self, params, lr=size)

    def passed(self, *args, **kwargs):
        kind.__init__(self, *args, **kwargs)

    def deepest(self, params):
        super(deep, self).__init__(params, size=0.03)

    owned = type("Owned", (plain,), {"__init__": own})
    deep = type("Deep", (owned,), {"__init__": deepest})
    passing = type("Passing", (kind,), {"__init__": passed})
    start = draw([(3, 2)], dtype=torch.float64)
    found = []
    for made in (
        lambda p: kind(p, lr=0.03),
        lambda p: plain(p, lr=0.03),
        lambda p: plain(p, 0.03),
        lambda p: owned(p),
        lambda p: deep(p),
        lambda p: passing(p, lr=0.03, clip_value=50.0),
    ):
        if name == "Muon":
            with pytest.raises(RuntimeError, match="are left to torch's own"):
                params = params_of(start)
                steps(passing(params, clip_value=50.0), params)
            continue
        params = params_of(start)
        steps(made(params), params)
        found.append(flat(params))
    assert all(torch.equal(found[0], other) for other in found)


def test_signatures_of_subclasses():
    shown = inspect.signature
    assert shown(Mine) == shown(ft.Lion)
    assert list(shown(Deeper).parameters) == ["params", "lr", "name"]
    assert list(shown(Passing).parameters) == ["args", "kwargs"]
    assert shown(Counted) == shown(ft.LAMB)
    assert shown(type("Sub", (ft.AdamW,), {})) == shown(ft.AdamW)
    with pytest.raises(TypeError, match="unexpected keyword argument 'betas'"):
        Deeper([Parameter(torch.ones(2))], betas=(0.1, 0.2))


@pytest.mark.parametrize("kind", [Mine, Deeper, Passing, Counted, Last])
def test_subclasses_are_copied_pickled_saved_and_loaded(kind):
    params = params_of(draw())
    opt = kind(params)
    steps(opt, params)
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert type(again) is kind and again.defaults.items() >= opt.defaults.items()
        others = [p for group in again.param_groups for p in group["params"]]
        before = params_of([p.detach() for p in params])
        third = kind(before)
        third.load_state_dict(copy.deepcopy(opt.state_dict()))
        steps(again, others)
        steps(third, before)
        assert torch.equal(flat(before), flat(others))
    steps(opt, params)
    assert torch.equal(flat(params), flat(others))


def test_mixins():
    params = params_of(draw())
    opt = Counted(params)
    steps(opt, params)
    assert opt.count == 3 and Counted.tag == "counted" and Last.tag == "none"


def test_a_subclass_with_groups_and_defaults_of_its_own():
    class Scaled(ft.Lion):
        def __init__(self, params, scale=1.0):
            super().__init__(params, lr=0.1 * scale)
            self.defaults["scale"] = scale

    a, b = params_of(draw([(3,), (2,)]))
    opt = Scaled([{"params": [a]}, {"params": [b], "lr": 0.5}], scale=2.0)
    assert [group["lr"] for group in opt.param_groups] == [0.2, 0.5]


# Docstrings -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_name_every_argument(name):
    kind = getattr(ft, name)
    text = vars(kind)["__doc__"]
    summary, rest = text.split("\n\n", 1)
    assert summary.rstrip(".") and "Parameters\n----------\n" in rest
    lines = rest.splitlines()
    for argument in inspect.signature(kind).parameters.values():
        given = argument.default
        start, end = f"{argument.name} : ", f", default {given!r}"
        if given is argument.empty:
            start = end = argument.name
        (line,) = [i for i, x in enumerate(lines) if x.startswith(start)]
        assert lines[line].endswith(end) and lines[line + 1].startswith("    ")
    if name in ft._OF_TORCH:
        assert f"torch.optim.{name}" in rest
    example = rest[rest.index("Examples\n--------\n") :]
    if name != "Muon":
        for line in example.splitlines():
            if line.startswith(">>> "):
                exec(line[4:], globals())


def test_lamb_and_lars_say_how_they_differ_from_others():
    for kind in (ft.LAMB, ft.LARS, fastopt.lamb, fastopt.lars):
        text = kind.__doc__
        assert "optax" in text and "timm" in text and "always_adapt" in text
    assert "clip_norm=1" in ft.LAMB.__doc__


# Schedules ------------------------------------------------------------------------


def given(name, key, value):
    """Arguments of a class with one hyperparameter, or a part of it, replaced."""
    default = inspect.signature(getattr(ft, name)).parameters[key].default
    return (value, *default[1:]) if isinstance(default, tuple) else value


@pytest.mark.parametrize("name", CLASSES)
def test_schedules_are_refused_and_what_to_do_is_said(name):
    kind = getattr(ft, name)
    schedule = fastopt.schedules.cosine(0.1, 10)
    start = draw([(3, 2)])
    skipped = {"params", "foreach", "fused", "adjust_lr_fn", *ft._classes.EXTRAS}
    for key in inspect.signature(kind).parameters.keys() - skipped:
        value, params = given(name, key, schedule), params_of(start)
        asked = [lambda p, k=key, v=value: kind(p, **{k: v})]
        asked += [lambda p, k=key, v=value: kind([{"params": p, k: v}])]
        if key == "lr":
            asked += [lambda p: kind(p, schedule)]
        for ask in asked:
            with pytest.raises(TypeError, match="lr_scheduler") as error:
                ask(params)
            message = str(error.value)
            assert message.startswith(key) and "cosine(" in message
    if name == "Muon":
        return
    params = params_of(start)
    opt = kind(params)
    steps(opt, params, 1)
    opt.param_groups[0]["lr"] = schedule
    before = flat(params)
    give(params, draw([(3, 2)], seed=5))
    with pytest.raises(TypeError, match="torch's optimizers take no schedules"):
        opt.step()
    assert torch.equal(before, flat(params))


def test_what_the_message_recommends_works():
    schedule = fastopt.schedules.cosine(0.1, 10)
    found = []
    for of_torch in (True, False):
        (param,) = params = params_of(draw([(4,)]))
        grads = [draw([(4,)], seed=i)[0] for i in range(5)]
        if of_torch:
            opt = ft.Lion(params, lr=1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
            for grad in grads:
                param.grad = grad
                opt.step()
                scheduler.step()
            found.append(param.detach().numpy())
        else:
            w = param.detach().numpy().copy()
            opt = fastopt.lion(w, lr=schedule)
            for grad in grads:
                opt.step(grad.numpy())
            found.append(w)
    assert np.array_equal(*found)


# Steps that are torch's -----------------------------------------------------------

MODES = ("dddd", "ndnd", "nndd", "ddnn")
CASES = [
    ("SGD", {"momentum": 0.9, "dampening": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("NAdam", {"decoupled_weight_decay": True}),
    ("RAdam", {}),
    ("Adamax", {}),
    ("RMSprop", {"momentum": 0.5}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adagrad", {}),
    ("Adadelta", {}),
    ("ASGD", {"t0": 2.0}),
    ("Rprop", {}),
]


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_differentiable_steps_before_and_after_ours(name, options, dtype, modes):
    found = []
    for of in (ft, torch.optim):
        params = params_of(draw([(4, 3), (), (0, 2)], dtype=dtype))
        opt = getattr(of, name)(params, lr=0.05, **options)
        for seed, mode in enumerate(modes):
            opt.param_groups[0]["differentiable"] = mode == "d"
            give(params, draw([(4, 3), (), (0, 2)], dtype=dtype, seed=seed + 1))
            with torch.no_grad():
                opt.step()
            states = copy.deepcopy(opt.state_dict()["state"])
            assert all(state.keys() == states[0].keys() for state in states.values())
        found.append(flat(params))
    bound = 3e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(*found, rtol=bound, atol=bound)
    if modes == "dddd":
        assert torch.equal(*found)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_centered_rmsprop_is_left_to_torch(momentum):
    """Autograd goes through it, and its state is saved and loaded on the way."""
    found = []
    for kind, other in ((ft.RMSprop, ft.RMSprop), (torch.optim.RMSprop,) * 2):
        start = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        factor = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
        param = start.clone()
        options = {"centered": True, "momentum": momentum, "differentiable": True}
        opt = kind([param], lr=0.1, **options)
        opt.step()  # without a gradient
        assert torch.equal(param, start)
        param.grad = factor * start
        opt.step()
        loaded = other([Parameter(param.detach().clone())], lr=0.1)
        loaded.load_state_dict(opt.state_dict())
        (group,) = loaded.param_groups
        group["differentiable"] = False
        for state in loaded.state.values():
            state.update({k: v.detach().clone() for k, v in state.items()})
        group["params"][0].grad = torch.tensor([0.3, 0.4], dtype=torch.float64)
        loaded.step()
        found.append(torch.autograd.grad(param.sum(), factor)[0])
        found.append(group["params"][0].detach())
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1], found[3], rtol=1e-12, atol=1e-12)


# Loading --------------------------------------------------------------------------


def saved_by(opt, shapes=((3, 2), (4,))):
    params = [p for group in opt.param_groups for p in group["params"]]
    steps(opt, params, 2)
    return opt.state_dict()


def fresh(name, **options):
    return getattr(ft, name)(params_of(draw([(3, 2), (4,)])), **options)


def assert_refused(opt, saved, match):
    params = [p for group in opt.param_groups for p in group["params"]]
    steps(opt, params, 1)
    before = copy.deepcopy(opt.state_dict()), flat(params)
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved)
    after = opt.state_dict(), flat(params)
    assert str(before) == str(after)
    steps(opt, params, 1)


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ("AMSGrad", "Lion"),
        ("CautiousLion", "Lion"),
        ("Lion", "CautiousLion"),
        ("AdaBelief", "LaProp"),
        ("ScheduleFreeAdamW", "ScheduleFreeRAdam"),
        ("LAMB", "AdamC"),
        ("Lion", "AdamW"),
        ("SGDW", "SGD"),
    ],
)
def test_the_state_of_another_rule_is_refused(theirs, name):
    saved = saved_by(fresh(theirs))
    assert_refused(fresh(name), saved, "the state is of rule '.*', but .* nothing was")


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ("AMSGrad", "Lion"),  # more than Lion keeps
        ("Lion", "LaProp"),
        ("Adamax", "Adam"),
        ("Adam", "Adamax"),
        ("AdamW", "SGD"),
        ("Adam", "NAdam"),
        ("RMSprop", "Adagrad"),
        ("Adagrad", "Adadelta"),
        ("SGD", "ASGD"),
        ("AdamW", "Lion"),
        ("Lion", "AdamW"),
        ("Adafactor", "AdamW"),
    ],
)
def test_keys_that_do_not_fit_are_refused(theirs, name):
    """Where a state does not say of which rule it is, as torch's do not."""
    saved = saved_by(fresh(theirs))
    saved.pop("rule", None)
    assert_refused(fresh(name), saved, "another optimizer, and nothing was loaded")


@pytest.mark.parametrize("theirs", ["Lion", "LAMB", "AdamW", "SGD", "SGDW"])
def test_muon_refuses_the_state_of_another_rule(theirs):
    made = []
    for name in (theirs, "Muon", "Muon"):
        param = torch.nn.Parameter(torch.ones(3, 3))
        param.grad = torch.full_like(param, 0.5)
        made.append(getattr(ft, name)([param], lr=0.1))
        made[-1].step()
    other, muon, same = made
    with pytest.raises(ValueError, match="nothing was loaded"):
        muon.load_state_dict(other.state_dict())
    muon.load_state_dict(same.state_dict())
    muon.step()


@pytest.mark.parametrize("name", CLASSES)
def test_a_buffer_that_is_missing_is_refused(name):
    if name in ("SGD", "Muon"):  # torch's SGD begins its momentum at any time
        return
    options = {"RMSprop": {"centered": True, "momentum": 0.5}}.get(name, {})
    saved = saved_by(fresh(name, **options))
    keys = saved["state"][1].keys()
    for key in keys if len(keys) > 1 else ():
        less = copy.deepcopy(saved)
        del less["state"][1][key]
        assert_refused(fresh(name, **options), less, f"parameter 1 lacks {key}")
    less = copy.deepcopy(saved)
    option = "eps" if name == "DoG" else "lr"
    del less["param_groups"][0][option]
    assert_refused(fresh(name, **options), less, f"has no '{option}'")


@pytest.mark.parametrize("name", [n for n in ft._OF_TORCH if n != "Muon"])
def test_states_of_torchs_own_class_are_loaded(name):
    """With options, before and after a step, and into subclasses."""
    for options in (case[1] for case in [*CASES, (name, {})] if case[0] == name):
        params = params_of(draw([(3, 2), (4,)]))
        opt = getattr(torch.optim, name)(params, **options)
        for count in (0, 2):
            steps(opt, params, count)
            copies = params_of([p.detach() for p in params])
            made = type("Sub", (getattr(ft, name),), {})(copies)
            made.load_state_dict(copy.deepcopy(opt.state_dict()))
            steps(made, copies, 2, seed=40)
        steps(opt, params, 2, seed=40)
        bound = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(flat(params), flat(copies), **bound)


@pytest.mark.parametrize("rule", fastopt.rules.RULES, ids=lambda rule: rule.name)
def test_states_without_a_name_are_loaded(rule):
    """As older versions have saved them, with and without a moving average."""
    kind = class_of(rule)
    for ema in (None, 0.9):
        params = params_of(draw([(3, 2), (4,)]))
        opt = kind(params, ema=ema)
        steps(opt, params, 2)
        saved = copy.deepcopy(opt.state_dict())
        if kind.__name__ in OTHERS:
            assert saved.pop("rule") == rule.name
        assert saved.keys() == {"state", "param_groups"}
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        copies = params_of([p.detach() for p in params])
        other = kind(copies)
        other.load_state_dict(torch.load(file, weights_only=True))
        steps(opt, params, 2, seed=40)
        steps(other, copies, 2, seed=40)
        assert torch.equal(flat(params), flat(copies))


def test_a_class_of_torch_needs_torchs_plateau():
    opt = fresh("Lion")
    with pytest.raises(TypeError, match="torch.optim.lr_scheduler.ReduceLROnPlateau"):
        fastopt.ReduceLROnPlateau().step(1.0, opt)
