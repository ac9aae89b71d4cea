"""docs/from_torch.md mentions every option of torch's optimizers, and what it says of
them is so."""

import inspect
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import fastopt.torch  # noqa: E402

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from_torch.md").read_text(
    encoding="utf-8"
)
THEIRS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
}
ABSENT = {"LBFGS", "SparseAdam"}
VALUES = {
    **{"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    **{"lambd": 0.01, "alpha": 0.6, "t0": 3.0, "rho": 0.7, "beta2_decay": -0.5},
    **{"d": 1.5, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "ns_steps": 3},
    **{"momentum": 0.8, "dampening": 0.3, "momentum_decay": 0.02, "etas": (0.4, 1.4)},
    **{"step_sizes": (1e-3, 1.0), "ns_coefficients": (3.0, -4.0, 2.0)},
    "adjust_lr_fn": "match_rms_adamw",
}


def section(title):
    """The rows of the table under this heading, by their first cell."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)[^`]*`.*?\|(.*)\|$", text, re.M)
    assert len(rows) > 3
    return dict(rows)


CLASSES = section("Classes")
SHARED = section("Options that classes have in common")
OPTIONS = [
    (name, option)
    for name, kind in THEIRS.items()
    if name not in ABSENT
    for option in [*inspect.signature(kind).parameters][1:]
]


def test_every_class_has_its_row():
    assert {*CLASSES} == {*THEIRS}
    assert {name for name in THEIRS if not hasattr(fastopt.torch, name)} == ABSENT


@pytest.mark.parametrize("name, option", OPTIONS)
def test_every_option_is_mentioned(name, option):
    assert option in SHARED or f"`{option}`" in CLASSES[name].rpartition("|")[2]


def test_every_option_that_is_mentioned_is_there():
    for name in {*CLASSES} - ABSENT:
        for option in re.findall(r"`(\w+)`", CLASSES[name].rpartition("|")[2]):
            assert option in inspect.signature(THEIRS[name]).parameters, (name, option)
    of_one = {option for _, option in OPTIONS}
    assert {*SHARED} <= of_one | {"params"}


def test_every_option_of_ours_is_mentioned():
    added = {*inspect.signature(fastopt.torch.AdamW).parameters}
    added -= {*inspect.signature(torch.optim.AdamW).parameters}
    text = PAGE.split("\n## Options that torch does not have\n")[1].split("\n## ")[0]
    for option in added:
        assert re.search(rf"`{option}\b", text), option


def trained(kind, name, option):
    """The parameters after some steps with this option, or the error."""
    options = {option: VALUES.get(option, True)}
    if name == "Adafactor" and option == "eps":
        options["eps"] = (1e-3, 1e-2)
    if name == "SGD" and option in ("nesterov", "dampening"):
        options["momentum"] = 0.9
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = [torch.nn.Parameter(drawn(*shape)) for shape in ((3, 4), (5, 2))]
    try:
        opt = kind(params, **options)
        for _ in range(6):
            for param in params:
                param.grad = drawn(*param.shape)
            opt.step()
    except (AssertionError, RuntimeError) as error:
        return type(error), str(error)
    return [param.detach() for param in params]


@pytest.mark.parametrize("name, option", OPTIONS)
def test_every_option_does_what_it_does_in_torch(name, option):
    theirs = trained(THEIRS[name], name, option)
    ours = trained(getattr(fastopt.torch, name), name, option)
    if isinstance(theirs, tuple):
        assert option in ("capturable", "differentiable") and ours == theirs
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)


def test_what_is_refused_where_steps_are_torchs_own():
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    opt = fastopt.torch.AdamW([w], differentiable=True, clip_norm=1.0)
    with pytest.raises(RuntimeError) as error:
        opt.step()
    start = "differentiable=True are left to torch's own AdamW, which has no clip_norm"
    assert str(error.value).startswith(start) and start in PAGE.replace("\n", " ")
    with pytest.raises(TypeError, match="lr must be a number, got <function"):
        fastopt.torch.AdamW([w], lr=lambda step: 1e-3)
    with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
        fastopt.torch.AdamW([w], lr=torch.tensor(0.1), foreach=True)
    with pytest.raises(TypeError, match="fused"):
        fastopt.torch.Lion([w], fused=True)


def test_the_state_of_16_bits_and_what_loading_makes_of_it():
    def opt_of(kind):
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        w.grad = torch.ones_like(w)
        opt = kind([w])
        opt.step()
        return opt, opt.state[w]

    ours, our_state = opt_of(fastopt.torch.AdamW)
    theirs, their_state = opt_of(torch.optim.AdamW)
    assert our_state["exp_avg"].dtype == torch.float32
    assert their_state["exp_avg"].dtype == torch.bfloat16
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    (entry,) = ours.state.values()
    assert entry["exp_avg"].dtype == torch.float32


def test_a_state_of_another_optimizer():
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    adam = fastopt.torch.Adam([w])
    adam.step()
    with pytest.raises(ValueError) as error:
        fastopt.torch.SGD([w], momentum=0.9).load_state_dict(adam.state_dict())
    assert str(error.value) in re.sub(r"\s+", " ", PAGE)
    torch.optim.SGD([w], momentum=0.9).load_state_dict(adam.state_dict())
    fastopt.torch.AdamW([w]).load_state_dict(adam.state_dict())


def test_averages_are_those_of_an_averaged_model():
    utils = torch.optim.swa_utils
    model = torch.nn.Linear(2, 1).double()
    opt = fastopt.torch.SGD(model.parameters(), lr=0.1, ema=0.9)
    averaged = utils.AveragedModel(
        model, multi_avg_fn=utils.get_ema_multi_avg_fn(0.9), use_buffers=False
    )
    averaged.update_parameters(model)
    for _ in range(4):
        opt.zero_grad()
        model(torch.ones(1, 2).double()).square().sum().backward()
        opt.step()
        averaged.update_parameters(model)
    torch.testing.assert_close(
        opt.ema_params(), [p.detach() for p in averaged.module.parameters()]
    )


def test_scaled_gradients_are_clipped_by_their_unscaled_norm():
    for fused in (False, True):
        w = torch.nn.Parameter(torch.ones(4))
        opt = fastopt.torch.SGD([w], lr=1.0, clip_norm=1.0, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(w.sum()).backward()
        scaler.step(opt)
        assert opt.grad_norm == 2 and w.tolist() == pytest.approx([0.5] * 4, rel=1e-5)
