"""Classes whose parameters are evaluated elsewhere than they are trained: ``train()``
and ``eval()``, as the authors' classes have them; and who calls them."""

import copy
import io
import pickle

import pytest

import fastopt

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_tensors import Parameter, class_of, draw, flat, give, params_of  # noqa: E402

import fastopt.torch as ft  # noqa: E402

RULES = [rule for rule in fastopt.rules.RULES if rule.evaluate is not None]
OPTIONS = {"asgd": {"t0": 1.0, "lr": 0.1}}
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def made(rule, params, **options):
    return class_of(rule)(
        params, **{"lr": 0.05, **OPTIONS.get(rule.name, {}), **options}
    )


def steps(opt, params, seeds):
    for seed in seeds:
        shapes, dtype = [p.shape for p in params], params[0].dtype
        give(params, draw(shapes, dtype=dtype, seed=seed))
        opt.step()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_evaluations_change_no_bit_of_a_run(rule, dtype):
    params, others = (params_of(draw(dtype=dtype)) for _ in range(2))
    opt, plain = made(rule, params), made(rule, others)
    opt.eval()
    opt.train()
    for seed in range(1, 20, 3):
        steps(opt, params, range(seed, seed + 3))
        steps(plain, others, range(seed, seed + 3))
        trained = flat(params)
        average = flat(opt.eval_params())
        for _ in range(2):
            opt.eval()
            assert torch.equal(flat(params), average)
            assert torch.equal(flat(opt.eval_params()), average)
        if seed > 4:
            assert not torch.equal(trained, average)
        for _ in range(2):
            opt.train()
            assert torch.equal(flat(params), trained)
    assert torch.equal(flat(params), flat(others))
    assert str(opt.state_dict()) == str(plain.state_dict())


@every_rule
def test_steps_in_eval_mode_are_refused(rule):
    params = params_of(draw())
    opt = made(rule, params)
    for _ in range(2):  # before the first step, and after some
        opt.eval()
        give(params, draw(seed=3))
        before = flat(params), copy.deepcopy(opt.state_dict())

        def closure():
            raise AssertionError("called")

        for step in (
            opt.step,
            lambda: opt.step(closure),
            lambda: opt.step(clip_norm=1.0),
            lambda: opt.step_param(params[0]),
        ):
            with pytest.raises(RuntimeError, match=r"in eval mode.*call train\(\)"):
                step()
        assert torch.equal(before[0], flat(params))
        assert str(before[1]) == str(opt.state_dict())
        opt.train()
        steps(opt, params, range(4))


@every_rule
@pytest.mark.parametrize("how", ["loaded", "copied", "pickled"])
def test_what_is_saved_in_eval_mode_goes_on_the_same(rule, how):
    """With the parameters to evaluate in the model's file, as one wants them there."""
    params = params_of(draw())
    opt = made(rule, params)
    steps(opt, params, range(5))
    opt.eval()
    saved = copy.deepcopy((opt.state_dict(), [p.detach() for p in params]))
    assert torch.equal(flat(saved[1]), flat(opt.eval_params()))
    if how == "loaded":
        file = io.BytesIO()
        torch.save(saved[0], file)
        file.seek(0)
        others = params_of(saved[1])
        other = made(rule, others, lr=1.0)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        again = (
            copy.deepcopy
            if how == "copied"
            else lambda o: pickle.loads(pickle.dumps(o))
        )
        other = again(opt)
        others = [p for group in other.param_groups for p in group["params"]]
    with pytest.raises(RuntimeError, match="in eval mode"):
        other.step()
    for one in (opt, other):
        one.train()
    assert torch.equal(flat(params), flat(others))
    steps(opt, params, range(5, 9))
    steps(other, others, range(5, 9))
    assert torch.equal(flat(params), flat(others))
    # A state of train mode ends the eval mode of what loads it.
    other.eval()
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(other, others, [9])


@every_rule
def test_a_change_in_eval_mode_is_kept(rule):
    params = params_of(draw(dtype=torch.float64))
    opt = made(rule, params)
    steps(opt, params, range(5))
    trained = flat(params)
    opt.eval()
    with torch.no_grad():
        params[0] += 0.25
    opt.train()
    moved = flat(params) - trained
    count = params[0].numel()
    torch.testing.assert_close(moved[:count], torch.full_like(moved[:count], 0.25))
    assert not moved[count:].any()


@every_rule
def test_flat_models(rule):
    found = []
    for flattened in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        if flattened:
            ft.flatten_(model)
        opt = made(rule, model.parameters())
        for seed in range(6):
            opt.zero_grad()
            model(torch.full((2, 3), 1.0 + seed)).square().mean().backward()
            opt.step()
            opt.eval()
            opt.train()
        opt.eval()
        found.append(flat(model.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RAdam"])
def test_beside_the_authors(name):
    theirs = pytest.importorskip("schedulefree")
    kind = getattr(theirs, f"{name}ScheduleFree")
    options = {"lr": 0.05, "weight_decay": 0.1}
    params, others = (params_of(draw(dtype=torch.float64)) for _ in range(2))
    opt = getattr(ft, f"ScheduleFree{name}")(params, **options)
    other = kind(others, **options)
    for seed in range(0, 12, 3):
        for one, given in ((opt, params), (other, others)):
            one.train()
            steps(one, given, range(seed, seed + 3))
        torch.testing.assert_close(flat(params), flat(others), rtol=1e-9, atol=1e-9)
        opt.eval()
        other.eval()
        torch.testing.assert_close(flat(params), flat(others), rtol=1e-9, atol=1e-9)


def test_only_rules_that_are_evaluated_elsewhere_have_modes():
    with_modes = {name for name in ft.__all__ if hasattr(getattr(ft, name), "eval")}
    assert with_modes == {class_of(rule).__name__ for rule in RULES}
    mine = ft.optimizer(RULES[-1], "Mine")
    assert callable(mine.train) and callable(mine.eval)


# Who calls them -------------------------------------------------------------------


class Model(torch.nn.Module):
    """What the Trainer trains: a line, whose loss it returns."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)
        self.seen = []

    def forward(self, x, labels=None):
        if not self.training:
            self.seen.append(flat(self.line.parameters()))
        out = self.line(x)
        loss = (out - labels).square().mean()
        return {"loss": loss, "logits": out}


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        x = torch.randn(3, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x.sum(0, keepdim=True)}


@pytest.mark.parametrize("name", ["ScheduleFreeAdamW", "ScheduleFreeSGD", "ASGD"])
def test_the_trainer_evaluates_and_saves_the_average(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    def trainer(steps):
        torch.manual_seed(0)
        model = Model()
        kwargs = {"lr": 0.05, **({"t0": 2.0} if name == "ASGD" else {})}
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=steps,
            eval_strategy="steps",
            eval_steps=4,
            save_steps=4,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            max_grad_norm=0.5,
        )
        return model, transformers.Trainer(
            model,
            arguments,
            train_dataset=Data(),
            eval_dataset=Data(),
            optimizer_cls_and_kwargs=(getattr(ft, name), kwargs),
        )

    model, whole = trainer(8)
    whole.train()
    opt = whole.optimizer.optimizer
    opt.eval()
    average = flat(opt.eval_params())
    assert torch.equal(model.seen[-1], average)
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert torch.equal(flat([saved["line.weight"], saved["line.bias"]]), average)
    opt.train()
    assert not torch.equal(flat(model.line.parameters()), average)
    trained = flat(model.line.parameters())
    model, resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    resumed.optimizer.train()
    assert torch.equal(flat(model.line.parameters()), trained)


def test_accelerate_passes_the_modes_on():
    accelerate = pytest.importorskip("accelerate")
    (param,) = params = [Parameter(torch.tensor([1.0, -2.0]))]
    accelerator = accelerate.Accelerator(cpu=True)
    opt = accelerator.prepare(ft.ScheduleFreeAdamW(params, lr=0.1))
    for _ in range(3):
        opt.train()
        param.grad = torch.tensor([0.3, -0.1])
        opt.step()
    trained = param.detach().clone()
    (average,) = opt.optimizer.eval_params()
    opt.eval()
    assert torch.equal(param, average) and not torch.equal(param, trained)
    opt.train()
    assert torch.equal(param, trained)
