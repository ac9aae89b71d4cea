"""fastopt's own options are of an optimizer, and not of a group of its parameters."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
import fastopt.torch as ft  # noqa: E402
from fastopt.torch.arguments import EXTRAS  # noqa: E402

VALUES = {
    "clip_norm": 0.001,
    "clip_value": 0.5,
    "nonfinite": "skip",
    "ema": 0.9,
    "weight_decay_mask": lambda name, param: True,
    "state_dtype": torch.bfloat16,
    "formats": "bf16",
    "master": "bf16+r8",
    "copy_to": [torch.zeros(3, dtype=torch.bfloat16)],
    "seed": 3,
    "shard_group": True,
    "threads": 1,
    "backend": "numpy",
    "zero_grads": True,
}


def param():
    return torch.nn.Parameter(torch.ones(3))


def test_there_is_a_value_for_each_option():
    assert VALUES.keys() == {*EXTRAS, "zero_grads"}


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Lion", "ScheduleFreeAdamW"])
@pytest.mark.parametrize("name", VALUES)
def test_groups_have_no_options(name, kind):
    group = {"params": [param()], name: VALUES[name]}
    message = f"^{name} is an option of (the optimizer|step).* not of a group of param"
    with pytest.raises(TypeError, match=message):
        getattr(ft, kind)([group], lr=0.1)
    opt = getattr(ft, kind)([param()], lr=0.1)
    with pytest.raises(TypeError, match=message):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1


def test_the_message_says_where_an_option_goes():
    def message(name):
        with pytest.raises(TypeError) as raised:
            ft.SGD([{"params": [param()], name: VALUES[name]}], lr=0.1)
        return str(raised.value)

    assert message("clip_norm") == (
        "clip_norm is an option of the optimizer, or of step, not of a group of "
        "parameters, but a group has clip_norm=0.001; give it to the optimizer: "
        "SGD(..., clip_norm=...)"
    )
    assert "step" not in message("ema")
    assert message("zero_grads").endswith("give it to step: step(zero_grads=True)")


def test_what_a_wrapper_puts_into_groups_is_no_error():
    """ZeroRedundancyOptimizer puts all arguments of the class into them."""
    options = {
        name: value
        for name, value in VALUES.items()
        if name not in ("zero_grads", "state_dtype", "master", "shard_group")
    }
    first, second = param(), param()
    opt = ft.AdamW([{"params": [first], **options}], **options)
    del options["copy_to"]
    opt = ft.AdamW([{"params": [first], **options}], **options)
    opt.add_param_group({"params": [second], **options})
    with pytest.raises(TypeError, match="clip_norm is an option"):
        opt.add_param_group({"params": [param()], **options, "clip_norm": 2.0})
    opt = ft.AdamW([{"params": [first], "clip_norm": None, "seed": 0}])
    assert opt.clip_norm is None


def test_keys_of_nobody_and_of_loaded_states_are_kept():
    first = param()
    opt = ft.AdamW([{"params": [first], "name": "body", "lr_mult": 0.5}], lr=0.1)
    first.sum().backward()
    opt.step()
    saved = opt.state_dict()
    saved["param_groups"][0]["clip_norm"] = 0.1  # as a state of before had it
    opt.load_state_dict(saved)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.param_groups[0]["lr_mult"] == 0.5
        assert other.param_groups[0]["name"] == "body"
        other.step()


@pytest.mark.parametrize(
    ("kind", "betas", "error", "message"),
    [
        ("Lion", 0.9, TypeError, "betas.* must be a tuple of 2 numbers, got 0.9"),
        ("Lion", None, TypeError, "betas.* must be a tuple of 2 numbers, got None"),
        ("Lion", "ab", TypeError, "betas.* must be a tuple of 2 numbers, got 'ab'"),
        ("Lion", (0.9, 0.9, 0.9), ValueError, "betas.* must have 2 numbers, got 3: "),
        ("Adan", (0.9, 0.9), ValueError, "betas.* must have 3 numbers, got 2: "),
    ],
)
def test_tuples_have_as_many_numbers_as_the_rule(kind, betas, error, message):
    cls = getattr(ft, kind)
    with pytest.raises(error, match=message):
        cls([param()], betas=betas)
    opt = cls([param()])
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [param()], "betas": betas})
    assert len(opt.param_groups) == 1
    for numbers in ([0.5, 0.6, 0.7], torch.tensor([0.5, 0.6, 0.7])):
        cls([param()], betas=numbers[: 3 if kind == "Adan" else 2])


def test_frozen_groups_of_the_core_are_refused():
    opt = ft.AdamW([{"params": [param()], "frozen": False}])
    with pytest.raises(TypeError, match="cannot be frozen.*requires_grad_"):
        opt.add_param_group({"params": [param()], "frozen": True})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("late", [False, True])
def test_adagrads_sum_starts_at_the_optimizers_number(late):
    sums = []
    for module in (torch.optim, ft):
        first, second = param(), param()
        group = {"params": [second], "initial_accumulator_value": 0.3}
        opt = module.Adagrad([first] if late else [{"params": [first]}, group], lr=0.1)
        if late:
            opt.add_param_group(group)
        second.grad = torch.full_like(second, 0.5)
        opt.step()
        sums.append(opt.state[second]["sum"].tolist())
    assert sums == [[0.25] * 3] * 2
