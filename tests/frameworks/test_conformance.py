"""What others build around an optimizer, with ours in it: torch's schedulers over every
class, and libraries that take an optimizer of torch's. ``docs/frameworks.md`` has the
table of what was run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from test_torch_training import SCHEDULERS  # noqa: E402
from torch_tensors import draw, give, params_of  # noqa: E402

import fastopt.torch as ft  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")

# Torch's schedulers -------------------------------------------------------------------

# Muon takes matrices only, and is torch's.
CLASSES = [name for name in ft.__all__ if isinstance(getattr(ft, name), type)]
CLASSES = [name for name in CLASSES if name != "Muon"]


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", CLASSES)
def test_schedulers_set_what_they_set_in_torch(name, kind):
    """Every number of every group, after every step, and through a saved state; of a
    class that torch has not, as in torch's with the same numbers."""
    ours = getattr(ft, name)
    theirs = getattr(torch.optim, name, None)
    params = params_of(draw())[:2]
    probe = ours(params).param_groups[0]
    cycles = kind in ("CyclicLR", "OneCycleLR")
    if cycles and not {"momentum", "betas"} & set(probe):
        return  # they need one of these
    options = {key: probe[key] for key in ("betas",) if key in probe}
    options |= {"momentum": 0.9} if "momentum" in probe else {}
    if theirs is None:
        theirs = torch.optim.Adam if "betas" in options else torch.optim.SGD
        options = {k: v[:2] if k == "betas" else v for k, v in options.items()}
        if name == "Adan" or len(probe.get("betas", (0, 0))) != 2:
            options = {}
            if cycles:
                return
    histories = []
    for of in (ours, theirs):
        params = params_of(draw())[:2]
        opt = of([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], lr=0.05)
        for group in opt.param_groups:
            group.update(options)
        made, history = SCHEDULERS[kind](opt), []
        for step in range(10):
            give(params, draw(seed=step)[:2])
            opt.step()
            made.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            if step == 5:
                saved = made.state_dict()
                made = SCHEDULERS[kind](opt) if kind != "LambdaLR" else made
                made.load_state_dict(saved)
                opt.load_state_dict(opt.state_dict())
            history += [
                [group[key] for key in ("lr", *options)] for group in opt.param_groups
            ]
        histories.append(history)
    assert histories[0] == histories[1]


# Libraries ----------------------------------------------------------------------------


def in_a_process(code, *needed):
    for name in needed:
        pytest.importorskip(name, reason=f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


MODEL = """
import copy, os, socket, sys, tempfile, warnings
import torch, fastopt.torch
torch.manual_seed(0)
torch.set_num_threads(1)

def model():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

x, y = torch.randn(32, 6), torch.randn(32, 1)

def same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

def trained(kind, steps=6, **options):
    m = model()
    opt = kind(m.parameters(), lr=0.01, **options)
    for k in range(steps):
        opt.zero_grad()
        (m(x) - y).square().mean().backward()
        opt.step()
    return m
"""

DEEPSPEED = """
import deepspeed, deepspeed.ops
# Or it compiles, for minutes, what only several processes need.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
for stage in (0, 1):
    os.environ.update(MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1",
                      LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    m = model()
    opt = fastopt.torch.AdamW(m.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(
        model=m, optimizer=opt, dist_init_required=True,
        config={
            "train_micro_batch_size_per_gpu": 32,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    for k in range(6):
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
    same(m, trained(torch.optim.AdamW))
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder)
        engine.load_checkpoint(folder)
    (engine(x) - y).square().mean()
"""

DDP = """
import torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

def work(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = slice(16 * rank, 16 * rank + 16)
    for sharded in (False, True):
        m = DistributedDataParallel(model())
        if sharded:
            opt = ZeroRedundancyOptimizer(m.parameters(), fastopt.torch.AdamW, lr=0.01)
        else:
            opt = fastopt.torch.AdamW(m.parameters(), lr=0.01)
        for k in range(6):
            opt.zero_grad()
            (m(x[half]) - y[half]).square().mean().backward()
            opt.step()
        same(m, trained(torch.optim.AdamW))
        if sharded:
            opt.consolidate_state_dict(0)
            if rank == 0:
                saved = opt.state_dict()
                assert len(saved["state"]) == 4, saved
    dist.destroy_process_group()

context = mp.get_context("fork")
port = free_port()
workers = [context.Process(target=work, args=(rank, port)) for rank in range(2)]
for worker in workers: worker.start()
for worker in workers: worker.join(120)
assert [worker.exitcode for worker in workers] == [0, 0]
"""

DCP = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
warnings.simplefilter("ignore")
for name in ("AdamW", "SGD", "Lion", "RMSprop", "Prodigy"):
    kind, runs = getattr(fastopt.torch, name), []
    options = {"momentum": 0.9} if name == "SGD" else {}
    m = trained_first = model()
    opt = kind(m.parameters(), lr=0.01, **options)
    def steps(m, opt):
        for k in range(4):
            opt.zero_grad()
            (m(x) - y).square().mean().backward()
            opt.step()
    steps(m, opt)
    with tempfile.TemporaryDirectory() as folder:
        params, states = get_state_dict(m, opt)
        dcp.save({"model": params, "optim": states}, checkpoint_id=folder)
        other = model()
        with torch.no_grad():
            for p in other.parameters(): p.zero_()
        other_opt = kind(other.parameters(), lr=0.5, **options)
        params, states = get_state_dict(other, other_opt)
        dcp.load({"model": params, "optim": states}, checkpoint_id=folder)
        set_state_dict(
            other, other_opt, model_state_dict=params, optim_state_dict=states
        )
    steps(m, opt)
    steps(other, other_opt)
    assert all(map(torch.equal, m.parameters(), other.parameters())), name
"""

ACCELERATE = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
m = model()
opt = fastopt.torch.AdamW(m.parameters(), lr=0.01)
schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 0.9**n)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
m, opt, data, schedule = accelerator.prepare(m, opt, data, schedule)
reference = model()
plain = torch.optim.AdamW(reference.parameters(), lr=0.01)
plain_schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda n: 0.9**n)
for epoch in range(3):
    for k, (a, b) in enumerate(data):
        with accelerator.accumulate(m):
            accelerator.backward((m(a) - b).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(m.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()
        ((reference(a) - b).square().mean() / 2).backward()
        if k % 2:
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            plain.step()
            plain_schedule.step()
            plain.zero_grad()
same(m, reference)
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    before = copy.deepcopy(opt.state_dict()["state"])
    accelerator.load_state(folder)
    after = opt.state_dict()["state"]
    assert before.keys() == after.keys() and len(before) == 4
    for k in before:
        assert all(torch.equal(before[k][n], after[k][n]) for n in before[k])
"""

LIGHTNING = """
import lightning, logging
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")

class Module(lightning.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.model, self.kind = model(), kind
    def training_step(self, batch, _):
        a, b = batch
        return (self.model(a) - b).square().mean()
    def configure_optimizers(self):
        opt = self.kind(self.parameters(), lr=0.01)
        return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)]

made = []
data = torch.utils.data.TensorDataset(x, y)
for kind in (fastopt.torch.AdamW, torch.optim.AdamW):
    module = Module(kind)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, gradient_clip_val=0.5, default_root_dir=folder,
            accumulate_grad_batches=2,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
        trainer.save_checkpoint(folder + "/last.ckpt")
        more = lightning.Trainer(
            max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False,
        )
        again = Module(kind)
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        more.fit(again, loader, ckpt_path=folder + "/last.ckpt")
        made.append(again)
same(*made)
"""

TRAINER = """
from transformers import Trainer, TrainingArguments
warnings.simplefilter("ignore")

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model()
    def forward(self, a, labels):
        out = self.model(a)
        return {"loss": (out - labels).square().mean(), "logits": out}

made = []
data = [{"a": a, "labels": b} for a, b in zip(x, y)]
for kind in (fastopt.torch.AdamW, torch.optim.AdamW):
    net = Net()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True,
            lr_scheduler_type="cosine", weight_decay=0.05, max_grad_norm=0.5,
            gradient_accumulation_steps=2, save_strategy="epoch", report_to=[],
            disable_tqdm=True, seed=3, logging_strategy="no",
        )
        options = {"optimizer_cls_and_kwargs": (kind, {"lr": 0.01})}
        Trainer(net, arguments, train_dataset=data, **options).train()
        first = sorted(os.listdir(folder), key=lambda name: int(name.split("-")[1]))[0]
        again = Net()
        trainer = Trainer(again, arguments, train_dataset=data, **options)
        trainer.train(resume_from_checkpoint=os.path.join(folder, first))
    same(net, again)
    made.append(net)
same(*made)
"""


def test_deepspeed_takes_it():
    """Its engine, without ZeRO and with stage 1, in one process with gloo."""
    in_a_process(MODEL + DEEPSPEED, "deepspeed")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_ddp_and_zero_redundancy_with_gloo():
    """Two processes train what one does, each on half of the data."""
    in_a_process(MODEL + DDP)


def test_distributed_checkpoints():
    """Saved, loaded by a new optimizer, and gone on with, to the same bits."""
    in_a_process(MODEL + DCP)


def test_accelerate_takes_it():
    in_a_process(MODEL + ACCELERATE, "accelerate")


def test_lightning_takes_it():
    """With clipping and accumulation, and from a checkpoint."""
    in_a_process(MODEL + LIGHTNING, "lightning")


def test_trainer_takes_it():
    """With clipping and accumulation, and from a checkpoint, as one go."""
    in_a_process(MODEL + TRAINER, "transformers", "accelerate")


# The page -----------------------------------------------------------------------------


def rows():
    """Of the page's table: what, its version, and the tests."""
    table = PAGE.partition("## What was run")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_test_of_the_table_exists():
    assert len(rows()) >= 17
    for _, version, tests in rows():
        assert re.fullmatch(r"\w[\w.-]* [\d.]+(, \w[\w.-]* [\d.]+)*", version), version
        named = re.findall(r"`(\w+)\.py(?:::(\w+))?`", tests)
        assert named, tests
        for file, test in named:
            (path,) = (ROOT / "tests").glob(f"*/{file}.py")
            text = path.read_text(encoding="utf-8")
            assert f"def {test or 'test_'}" in text, (file, test)
