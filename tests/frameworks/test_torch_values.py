"""Values of ``param_groups`` that were changed: what torch steps with is taken, and all
else is refused, by its name, before anything is written."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
import fastopt.torch as ft  # noqa: E402

PLACE = r'^param_groups\[1\]\["{}"\]'
REFUSED = [
    ("AdamW", "betas", [0.1, 2], ValueError, r"\[1\] must be in \[0, 1\), got 2$"),
    ("Adam", "betas", (0.9, 2.0), ValueError, r"\[1\] must be in \[0, 1\), got 2.0"),
    ("Adam", "betas", (0.9, -2.0), ValueError, r"\[1\] must be in \[0, 1\), got -2"),
    ("AdamW", "betas", (1.0, 0.9), ValueError, r"\[0\] must be in \[0, 1\), got 1.0"),
    ("RAdam", "betas", (0.9, 1.0), ValueError, r"\[1\] must be in \[0, 1\), got 1.0"),
    ("Adamax", "betas", (1.0, 0.9), ValueError, r"\[0\] must be in \[0, 1\), got 1.0"),
    ("AdamW", "betas", (0.9,) * 3, ValueError, r" must have 2 numbers, got 3: \(0.9"),
    ("AdamW", "betas", (0.9,), ValueError, r" must have 2 numbers, got 1: \(0.9"),
    ("AdamW", "betas", 0.1, TypeError, " must be a tuple of 2 numbers, got 0.1"),
    ("AdamW", "betas", "ab", TypeError, " must be a tuple of 2 numbers, got 'ab'"),
    ("AdamW", "betas", (0.9, "x"), TypeError, r"\[1\] must be a number, got 'x'"),
    ("AdamW", "lr", "0.1", TypeError, " must be a number, got '0.1'"),
    ("AdamW", "lr", 1 + 2j, TypeError, r" must be a number, got \(1\+2j\)"),
    ("AdamW", "lr", torch.ones(2), TypeError, r" .*got a tensor of .* of shape \(2,\)"),
    ("SGD", "lr", None, TypeError, " must be a number, got None"),
    ("SGD", "lr", 10**400, ValueError, " must be finite, got an integer"),
    ("SGD", "lr", lambda step: 0.1, TypeError, r" must be a number, got <func.*sched"),
    ("SGD", "weight_decay", "1", TypeError, " must be a number, got '1'"),
    ("ASGD", "t0", "a", TypeError, " must be a number, got 'a'"),
    ("Rprop", "etas", (0.5, 1.2, 3), ValueError, " must have 2 numbers, got 3"),
    ("Rprop", "step_sizes", 3, TypeError, " must be a tuple of 2 numbers, got 3"),
    ("Adafactor", "eps", (1e-30,), ValueError, " must have 2 numbers, got 1"),
    ("Adafactor", "eps", (None, None), TypeError, r"\[1\] must be a number, got None"),
    ("Lion", "betas", (0.9, 2), ValueError, r"\[1\] must be in \[0, 1\), got 2$"),
    ("Lion", "betas", (0.9,) * 3, ValueError, " must have 2 numbers, got 3"),
    ("Lion", "betas", 0.1, TypeError, " must be a tuple of 2 numbers, got 0.1"),
    ("Lion", "lr", "0.1", TypeError, " must be a number, got '0.1'"),
    ("ScheduleFreeAdamW", "lr", [0.1], TypeError, r" must be a number, got \[0.1\]"),
]


def made(kind, **more):
    """Return an optimizer with two groups, after two steps, and its parameters."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(2, 3, generator=generator) + 0.1)]
    params.append(torch.nn.Parameter(params[0].detach().clone() * 0.7))
    opt = kind([{"params": [param]} for param in params], lr=0.05, **more)
    for _ in range(2):
        step(opt, params)
    return opt, params


def step(opt, params):
    for param in params:
        param.grad = param.detach() * 0.3 + 0.2
    opt.step()


@pytest.mark.parametrize("name, key, value, error, words", REFUSED)
@pytest.mark.parametrize("again", [False, True])
def test_refused_before_anything_is_written(name, key, value, error, words, again):
    kind = getattr(ft, name)
    (opt, params), (other, others) = made(kind), made(kind)
    if again:  # the first step, too
        opt.state.clear()
        other.state.clear()
    kept = opt.param_groups[1][key]
    opt.param_groups[1][key] = value
    for _ in range(2):
        with pytest.raises(error, match=PLACE.format(key) + words):
            step(opt, params)
        assert all(map(torch.equal, params, others))
    assert not (again and opt.state)
    with pytest.raises(error, match=PLACE.format(key) + words):
        opt.step_param(params[1])
    opt.param_groups[1][key] = kept
    for _ in range(2):
        step(opt, params)
        step(other, others)
    assert all(map(torch.equal, params, others))


STEPPED = [
    ("AdamW", "lr", -0.1),  # such as where a schedule rounds
    ("SGD", "lr", -0.1),
    ("SGD", "lr", 2),
    ("SGD", "lr", np.float32(0.25)),
    ("AdamW", "lr", torch.tensor(0.02)),
    ("AdamW", "lr", torch.tensor([0.02])),
    ("AdamW", "lr", True),
    ("AdamW", "lr", float("nan")),
    ("AdamW", "betas", (-0.5, 0.9)),
    ("AdamW", "betas", [0.5, 0.9]),
    ("Adamax", "betas", (0.9, 1.5)),
    ("Adam", "eps", 0),
    ("Adam", "weight_decay", -0.1),
    ("SGD", "momentum", -0.5),
    ("Adafactor", "eps", (None, 0.01)),
]


@pytest.mark.parametrize("name, key, value", STEPPED)
def test_what_torch_steps_with_is_taken(name, key, value):
    ours, theirs = made(getattr(ft, name)), made(getattr(torch.optim, name))
    for opt, params in (ours, theirs):
        opt.param_groups[1][key] = value
        for _ in range(3):
            step(opt, params)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_negative_lr_of_a_rule_that_torch_has_not():
    opt, (_, param) = made(ft.Lion)
    before = param.detach().clone()
    opt.param_groups[1]["lr"] = -0.25
    step(opt, [param])
    assert ((param - before).abs() == 0.25).all()


def test_other_methods_refuse_values_too():
    opt, params = made(ft.ScheduleFreeAdamW)
    opt.param_groups[1]["betas"] = (0.9,)
    for call in (opt.eval, opt.eval_params, opt.accumulate):
        with pytest.raises(ValueError, match=PLACE.format("betas") + " must have 2"):
            call()


ARGUMENTS = [
    ("AdamW", {"lr": "0.1"}, TypeError, "^lr must be a number, got '0.1'$"),
    ("AdamW", {"lr": None}, TypeError, "^lr must be a number, got None$"),
    ("AdamW", {"betas": 0.1}, TypeError, "^betas must be a tuple of 2 numbers, got"),
    ("AdamW", {"betas": (0.9,)}, ValueError, "^betas must have 2 numbers, got 1"),
    ("AdamW", {"betas": (0.9, "x")}, TypeError, r"^betas\[1\] must be a number, got"),
    ("SGD", {"weight_decay": "1"}, TypeError, "^weight_decay must be a number, got"),
    ("Lion", {"lr": "0.1"}, TypeError, "^lr must be a number, got '0.1'$"),
    ("Lion", {"betas": 0.1}, TypeError, "^betas must be a tuple of 2 numbers, got"),
    ("Lion", {"betas": (0.9,) * 3}, ValueError, "^betas must have 2 numbers, got 3"),
    ("Lion", {"beta1": 0.9}, TypeError, r"^Lion\(\) got .*; did you mean betas\?$"),
    ("Lion", {"fused": True}, TypeError, r"^Lion\(\) got .* takes lr, betas, .*clip_n"),
    ("Lion", {"max_norm": 1.0}, TypeError, r"did you mean clip_norm\?$"),
    ("Lion", {"zero_grads": True}, TypeError, r"of step: opt.step\(zero_grads=...\)$"),
    ("AdamW", {"beta1": 0.9}, TypeError, r"^AdamW\(\) got .*; did you mean betas\?$"),
    ("AdamW", {"learning_rate": 1.0}, TypeError, r"; did you mean lr\?$"),
    ("AdamW", {"max_norm": 1.0}, TypeError, r"; did you mean clip_norm\?$"),
    ("Rprop", {"eta_plus": 1.5}, TypeError, r"; did you mean etas\?$"),
]


@pytest.mark.parametrize("name, arguments, error, words", ARGUMENTS)
def test_arguments_of_the_class(name, arguments, error, words):
    with pytest.raises(error, match=words):
        getattr(ft, name)([torch.nn.Parameter(torch.ones(2, 2))], **arguments)


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Muon"])
def test_what_is_no_list_of_parameters(name):
    kind, model = getattr(ft, name), torch.nn.Linear(3, 2, bias=False)
    for wrong in (model, model.parameters, None, 3.0):
        said = f"an iterable of parameters, .*model.parameters.*{type(wrong).__name__}$"
        with pytest.raises(TypeError, match=f"^params must be {said}"):
            kind(wrong)
        with pytest.raises(TypeError, match=f'^"params" of a group must be {said}'):
            kind([{"params": wrong}])
    with pytest.raises(TypeError, match="must be a list of groups"):
        kind({"params": [model.weight]})
    with pytest.raises(KeyError, match="params"):  # as torch's
        kind([{"lr": 0.1}])
    for fine in (model.parameters(), model.named_parameters(), {model.weight: 0}):
        assert kind(fine).param_groups[0]["params"] == [model.weight]


def test_arguments_by_position():
    param = torch.nn.Parameter(torch.ones(2))
    for arguments in ((), ([param], 1, 2, 3, 4, 5)):
        with pytest.raises(TypeError, match=r"^Lion\(\): "):
            ft.Lion(*arguments)


@pytest.mark.parametrize("wrong", [[torch.ones(2)], torch.ones(2), 3.0])
def test_a_closure_that_is_none(wrong):
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    opt = ft.AdamW([param])
    with pytest.raises(TypeError, match=r"^closure must be .*: step\(grads=...\)$"):
        opt.step(wrong)
    assert not opt.state
