"""An install without Numba, as docs/install.md has it: all but user-defined rules, the
CUDA backend and fastopt.njit works as it does with Numba. Each test is a process in
which Numba cannot be imported, so this holds where it is installed, too."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastopt.backends import cython_cpu

pytestmark = pytest.mark.skipif(
    cython_cpu.missing() is not None, reason="the compiled kernels are not installed"
)
SUPPORT = Path(__file__).resolve().parents[1] / "support"
# Python's own way of saying that a module must not be imported.
BLOCKED = f"""
import sys
sys.modules.update(numba=None, llvmlite=None)
sys.path.insert(0, {str(SUPPORT)!r})
import numpy as np
import fastopt
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_rule_is_compiled():
    """On the default backend, with the bits of the reference."""
    run("""
from cases import CASES, nonzero, same_bits
rng = np.random.default_rng(0)
for rule, values in CASES:
    start, grad = (nonzero(rng, 67, np.float32).reshape(67, 1) for _ in range(2))
    ours, expected = start.copy(), start.copy()
    opt = rule(ours, **values)
    assert opt.backend == "cython", (rule, opt.backend)
    reference = rule(expected, backend="numpy", **values)
    for _ in range(2):
        opt.step(grad, clip_value=0.5)
        reference.step(grad, clip_value=0.5)
    assert same_bits(ours, expected), rule
""")


def test_what_stands_around_a_rule(tmp_path):
    """Formats, tasks, the classes, schedules, checkpoints, accumulation."""
    run(f"""
from cases import nonzero, same_bits
rng = np.random.default_rng(0)
def trained(backend):
    rng = np.random.default_rng(0)
    params = {{n: nonzero(rng, 300, np.float32).reshape(20, 15) for n in "ab"}}
    grads = {{n: nonzero(rng, 300, np.float32).reshape(20, 15) for n in "ab"}}
    schedule = fastopt.schedules.cosine(0.01, steps=9)
    for make in (
        lambda p: fastopt.adamw(p, lr=schedule, formats="8bit", backend=backend),
        lambda p: fastopt.sgd(
            p, momentum=0.9, formats="bf16", ema=0.9, backend=backend
        ),
        lambda p: fastopt.Adafactor(p, lr=0.01, backend=backend),
        lambda p: fastopt.Muon(p, lr=0.01, backend=backend),
        lambda p: fastopt.Lookahead(fastopt.adamw(p, backend=backend), k=2),
    ):
        opt = make(params)
        opt.accumulate(grads)
        opt.step(clip_norm=1.0)
        opt.step([grads, {{n: -2 * g for n, g in grads.items()}}], weights=[0.5, 0.1])
        opt.save({str(tmp_path)!r} + "/state")
        make(params).load({str(tmp_path)!r} + "/state")
    gram = fastopt.gram([grads["a"], params["a"]], backend=backend)
    return [*params.values(), gram]
assert all(map(same_bits, trained(None), trained("numpy")))
""")


def test_every_module_can_be_imported():
    """But those that are for Numba's code, and those of frameworks that are absent."""
    found = run("""
import importlib, pkgutil
for module in pkgutil.walk_packages(fastopt.__path__, "fastopt."):
    if module.name == "fastopt.__main__":
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        while error.__cause__:
            error = error.__cause__
        if error.name in ("numba", "llvmlite"):
            print(module.name)
""")
    assert found.split() == [
        "fastopt.backends.cuda_accesses",
        "fastopt.backends.cuda_kernels",
        "fastopt.backends.cuda_powers",
        "fastopt.backends.cuda_scalars",
        "fastopt.backends.cuda_settle",
        "fastopt.backends.cuda_simulated",
        "fastopt.backends.kernel_link",
        "fastopt.backends.llvm_ir",
        "fastopt.backends.numba_cpu",
        "fastopt.njit",
    ]


def test_torch_steps_without_numba():
    pytest.importorskip("torch", reason="torch is not installed")
    run("""
import torch, fastopt.torch
torch.manual_seed(0)
p, q = (torch.nn.Parameter(torch.randn(33)) for _ in range(2))
opt = fastopt.torch.AdamW([p, q], lr=0.1, formats="8bit")
before = p.detach().clone()
(p.square().sum() + q.sum()).backward()
opt.step()
assert not torch.equal(p.detach(), before)
""")


def test_a_users_rule_is_refused_and_not_slow():
    run("""
def update(p, g, lr):
    return (p - lr * g,)
mine = fastopt.Rule(update, lambda t, lr=0.5: (lr,), name="mine")
p = np.ones(3, np.float32)
for make in (lambda: mine(p), lambda: fastopt.gd(p, backend="numba")):
    try:
        make()
    except RuntimeError as error:
        text = str(error)
        assert "'numba' is not available" in text
        assert "pip install 'numba>=" in text and "backend='numpy'" in text
    else:
        raise AssertionError("not refused")
opt = mine(p, backend="numpy")
opt.step(np.ones(3, np.float32))
assert p.tolist() == [0.5] * 3
""")


def test_njit_says_what_to_install():
    run("""
try:
    import fastopt.njit
except ImportError as error:
    assert "pip install 'numba>=" in str(error)
else:
    raise AssertionError("not refused")
""")


def test_info_says_what_is_missing():
    out = " ".join(run("from fastopt.__main__ import main\nmain(['info'])").split())
    assert "numba missing: Numba cannot be imported" in out
    assert "pip install 'numba>=" in out
    assert "cython available" in out
