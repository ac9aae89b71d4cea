"""Mixed precision and clipping by others: GradScaler, accelerate, the Trainer,
Lightning; and optimizers that give each process a share of the parameters."""

import math
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch_tensors import Parameter, draw, flat, give, params_of  # noqa: E402

import fastopt.torch as ft  # noqa: E402

CLASSES = [name for name in ft.__all__ if name[0].isupper() and name != "Muon"]
FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]


@pytest.mark.parametrize("name", CLASSES)
def test_who_unscales_is_as_with_torch(name):
    kind, param = getattr(ft, name), [Parameter(torch.ones(2))]
    handles = "_step_supports_amp_scaling"
    assert not getattr(kind(param), handles)
    if name in FUSED:
        for fused in (True, False):
            theirs = getattr(torch.optim, name)(param, fused=fused)
            ours = kind(param, fused=fused)
            assert getattr(ours, handles) == getattr(theirs, handles, False) == fused


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion", "LAMB", "Prodigy"])
def test_steps_of_a_scaler(name, clip_norm, fused, unscaled):
    """An optimizer that unscales by itself, and one for which the scaler does."""
    if fused and name not in FUSED:
        return
    options = {"fused": True} if fused else {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    params, others = params_of(draw()), params_of(draw())
    opt = getattr(ft, name)(params, lr=0.1, clip_norm=clip_norm, **options)
    other = getattr(ft, name)(others, lr=0.1, clip_norm=clip_norm)
    for seed in range(1, 7):
        grads, scale = draw(seed=seed), scaler.get_scale()
        give(params, [grad * scale for grad in grads])
        scaler.scale(torch.zeros(1))
        before = flat(params)
        if seed in (1, 4):
            params[1].grad[2] = (math.inf, math.nan)[seed == 4]
        if unscaled:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if seed in (1, 4):
            assert torch.equal(before, flat(params))
            assert scaler.get_scale() == scale / 2
            continue
        give(others, grads)
        other.step()
        assert torch.equal(flat(params), flat(others))
        if clip_norm is not None:
            assert opt.grad_norm == other.grad_norm
    assert not hasattr(opt, "found_inf") and not hasattr(opt, "grad_scale")


def test_accelerate_sees_that_a_step_was_left_out(monkeypatch):
    """Or its schedulers would go on."""
    accelerate = pytest.importorskip("accelerate")
    params = params_of(draw())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    opt = accelerate.optimizer.AcceleratedOptimizer
    accelerate.Accelerator(cpu=True)
    wrapped = opt(ft.Lion(params, lr=0.1), scaler=scaler)
    for bad in (False, True):
        give(params, draw(seed=3))
        if bad:
            params[0].grad[0, 0] = math.inf
        scaler.scale(torch.zeros(1))
        before = flat(params)
        wrapped.step()
        assert wrapped.step_was_skipped == bad
        assert torch.equal(before, flat(params)) == bad


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["AdamW", "Lion", "LAMB", "Prodigy", "RMSprop"])
def test_lightning_clips_in_mixed_precision(name, precision):
    lightning = pytest.importorskip("lightning")

    class Line(lightning.LightningModule):
        def __init__(self, of):
            super().__init__()
            torch.manual_seed(0)
            self.line, self.of, self.norms = torch.nn.Linear(3, 1), of, []

        def training_step(self, batch, i):
            return (self.line(batch[0]) - 3).square().mean() * 10

        def on_before_optimizer_step(self, optimizer):
            grads = [p.grad for p in self.parameters()]
            self.norms.append(torch.nn.utils.get_total_norm(grads).item())

        def configure_optimizers(self):
            return getattr(self.of, name)(self.parameters(), lr=0.01)

    def trained(of):
        model = Line(of)
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 8)
        plugin = lightning.pytorch.plugins.precision.MixedPrecision(
            precision,
            "cpu",
            torch.amp.GradScaler("cpu", init_scale=64.0)
            if precision == "16-mixed"
            else None,
        )
        start = flat(model.parameters())
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            plugins=[plugin],
            gradient_clip_val=0.1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, loader)
        assert len(model.norms) == 16 and not torch.equal(
            start, flat(model.parameters())
        )
        return flat(model.parameters())

    ours = trained(ft)
    if hasattr(torch.optim, name):
        torch.testing.assert_close(ours, trained(torch.optim), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_the_trainer_clips_in_mixed_precision(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from test_torch_averages import Data, Model

    def trained(of):
        torch.manual_seed(0)
        model = Model()
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            bf16=True,
            max_steps=6,
            max_grad_norm=0.1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        optimizer = getattr(of, name), {"lr": 0.05}
        transformers.Trainer(
            model, arguments, train_dataset=Data(), optimizer_cls_and_kwargs=optimizer
        ).train()
        return flat(model.parameters())

    ours = trained(ft)
    if hasattr(torch.optim, name):
        torch.testing.assert_close(ours, trained(torch.optim), rtol=1e-5, atol=1e-6)


# Shares ---------------------------------------------------------------------------

SHARES = """
import os, sys, warnings
import torch, torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
import fastopt.torch as ft

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank,
                        world_size=int(sys.argv[3]))
CASES = [
    ("AdamW", {"clip_norm": 1.0}, {}, "clip_norm would be"),
    ("AdamW", {}, {"clip_norm": 1.0}, "clip_norm would be"),
    ("Lion", {"nonfinite": "skip"}, {}, "nonfinite='skip' would be"),
    ("Prodigy", {}, {}, "the rule's sums over all parameters would be"),
    ("AdamW", {"ema": 0.9, "clip_value": 1.0}, {}, None),
    ("LAMB", {}, {}, None),
]
for name, options, at_step, message in CASES:
    for sharded in (True, False):
        model = torch.nn.Linear(3, 2)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            kind = getattr(ft, name)
            if sharded:
                opt = ZeroRedundancyOptimizer(model.parameters(), kind, **options)
            else:
                opt = kind(model.parameters(), **options)
            for _ in range(3):
                for param in model.parameters():
                    param.grad = torch.ones_like(param)
                opt.step(**at_step)
        said = [str(w.message) for w in seen if "a share of the" in str(w.message)]
        if sharded and message and int(sys.argv[3]) > 1:
            (text,) = said  # once
            assert message in text and "by ZeroRedundancyOptimizer" in text, text
        else:
            assert not said, (name, sharded, said)
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize("count", [1, 2])
def test_shares_of_the_parameters_are_warned_of_once(tmp_path, count):
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    arguments = str(tmp_path / "meeting"), str(count)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SHARES, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        for process in running:
            told, _ = process.communicate(timeout=120)
            assert told.splitlines()[-1:] == ["done"], (process.returncode, told)
    finally:
        for process in running:
            process.kill()


# Flat models that are saved -------------------------------------------------------


def test_unflatten(tmp_path):
    save = pytest.importorskip("safetensors.torch")
    found = []
    for unflattened in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(3, 50), torch.nn.Linear(50, 1), torch.nn.Linear(1, 1)
        )
        objects = list(model.parameters())
        model[0].weight.requires_grad_(False)
        ft.flatten_(model)
        opt = ft.AdamW([p for p in objects if p.requires_grad], lr=0.1)
        for step in range(6):
            # Not from a backward pass, whose bits depend on where arrays begin: a BLAS
            # takes other ways there, as seen on an AMD EPYC.
            torch.manual_seed(step)
            for param in objects:
                if param.requires_grad:
                    draw = torch.randn(param.shape)
                    if param.grad is None:
                        param.grad = draw
                    else:
                        param.grad.copy_(draw)
            opt.step()
            if unflattened and step == 2:
                with pytest.raises(RuntimeError, match="Refusing to save"):
                    save.save_model(model, str(tmp_path / "a.safetensors"))
                values = [p.detach().clone() for p in objects]
                ft.unflatten_(model)
                assert all(map(torch.equal, values, objects))
                for param in objects:
                    for tensor in (param, param.grad):
                        if tensor is not None:
                            size = tensor.numel() * tensor.element_size()
                            assert tensor.untyped_storage().nbytes() == size
                save.save_model(model, str(tmp_path / "a.safetensors"))
                torch.save(model[2].state_dict(), tmp_path / "layer.pt")
                assert (tmp_path / "layer.pt").stat().st_size < 3000
                opt.zero_grad()
                assert all(param.grad is None for param in objects)
        assert list(map(id, objects)) == list(map(id, model.parameters()))
        found.append(flat(objects))
    assert torch.equal(*found)
    ft.unflatten_(objects)  # nothing to do
    assert torch.equal(found[1], flat(objects))
