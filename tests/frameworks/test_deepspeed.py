"""DeepSpeed's optimizers on our kernels: its functions against the papers in float64,
its own classes and engine with them, and ours as its clients."""

import copy
import doctest
import json
import math
import os
import queue
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastopt.backends import cython_cpu  # noqa: E402

if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

import fastopt  # noqa: E402
import fastopt.deepspeed as ops  # noqa: E402
import fastopt.torch  # noqa: E402

SUPPORT = Path(__file__).resolve().parents[1] / "support"
KINDS = torch.float32, torch.bfloat16, torch.float16
# Half of the last place, relative to a number, and at the least number.
ROUNDING = {
    torch.float32: (2**-24, 0.0),
    torch.bfloat16: (2**-8, 0.0),
    torch.float16: (2**-11, 2**-25),
}
SIZES = (0,), (1,), (17, 3), (1003,)
ADAM = {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1}


def drawn(seed, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def tensors(shape=(1003,), param=torch.float32, state=torch.float32, grad=None):
    """Parameters, gradients, and two buffers, all of which have numbers in them."""
    p, g = drawn(0, shape, param), drawn(1, shape, grad or param)
    return p, g, drawn(2, shape, state), drawn(3, shape, state).abs()


def close(found, expected, scale=1.0):
    """Within what float32 makes of numbers of this size, and rounded once."""
    relative, least = ROUNDING[found.dtype]
    limit = 4e-7 * (scale + expected.abs()) + relative * expected.abs() + least
    return bool(((found.double() - expected).abs() <= limit).all())


def adam64(p, g, m, v, t, lr, adamw, corrected):
    """Kingma & Ba's algorithm 1; with ``adamw``, Loshchilov & Hutter's algorithm 2."""
    p, g, m, v = (x.double() for x in (p, g, m, v))
    beta1, beta2, eps, decay = ADAM.values()
    g = g if adamw else g + decay * p
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    of_m, of_v = (1 - beta1**t, 1 - beta2**t) if corrected else (1.0, 1.0)
    step = lr * (m / of_m) / ((v / of_v).sqrt() + eps)
    return (p * (1 - lr * decay) if adamw else p) - step, m, v


def adam(p, g, m, v, t, lr=0.01, corrected=True, of=7, **changes):
    values = {"lr": lr, **ADAM, **changes}
    return ops.adam_update(of, t, *values.values(), corrected, p, g, m, v)


@pytest.fixture(autouse=True)
def optimizers():
    """Number 7 decouples weight decay, and number 8 does not."""
    ops.create_adam(7, 1.0, 0.5, 0.5, 1.0, 9.0, True, False)
    ops.create_adam(8, 1.0, 0.5, 0.5, 1.0, 9.0, False, False)
    ops.create_adagrad(7, 1.0, 0.1, 9.0, False)
    ops.create_lion(7, 1.0, 0.5, 0.5, 9.0, False)
    yield
    for number in (7, 8):
        assert ops.destroy_adam(number) == 0
    assert ops.destroy_adagrad(7) == ops.destroy_lion(7) == 0


# The functions ------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("of", [7, 8])
@pytest.mark.parametrize("kinds", [*product(KINDS, KINDS, KINDS)], ids=str)
def test_adam_is_the_papers(kinds, of, corrected):
    """Step by step, from what is stored, while the learning rate changes and the count
    jumps, forwards and backwards."""
    for shape in SIZES:
        p, _, m, v = tensors(shape, *kinds)
        for seed, (t, lr) in enumerate([(1, 0.01), (2, 0.03), (900, 0.0), (5, 0.5)]):
            g = drawn(10 + seed, shape, kinds[2])
            kept = g.clone()
            expected = adam64(p, g, m, v, t, lr, of == 7, corrected)
            assert adam(p, g, m, v, t, lr, corrected, of) == 0
            for found, right in zip((p, m, v), expected, strict=True):
                assert close(found, right, 10.0 if found is v else 3.0), (shape, t)
            assert torch.equal(g, kept)


@pytest.mark.parametrize("kinds", [*product(KINDS, KINDS)], ids=str)
def test_adagrad_and_lion_are_the_papers(kinds):
    for shape in SIZES:
        p, g, m, s = tensors(shape, *kinds)
        q = p.clone()
        for t, lr in [(1, 0.1), (7, 0.2)]:
            full = g.double() + 0.3 * p.double()
            total = s.double() + full * full
            expected = p.double() - lr * full / (total.sqrt() + 1e-4)
            assert ops.adagrad_update(7, t, lr, 1e-4, 0.3, p, g, s) == 0
            assert close(p, expected) and close(s, total, 30.0)

            mixed = 0.9 * m.double() + 0.1 * g.double()
            sure = mixed.abs() > 1e-6
            expected = q.double() * (1 - lr * 0.3) - lr * mixed.sign()
            average = 0.7 * m.double() + 0.3 * g.double()
            assert ops.lion_update(7, t, lr, 0.9, 0.7, 0.3, q, g, m) == 0
            assert close(q[sure], expected[sure]) and close(m, average, 3.0)


def test_lion_leaves_alone_what_has_no_gradient():
    p, zero = torch.ones(3), torch.zeros(3)
    ops.lion_update(7, 1, 0.1, 0.9, 0.99, 0.0, p, zero, torch.zeros(3))
    assert torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_our_class(kind):
    """Whatever the number of threads."""
    p, _, m, v = tensors((100_003,), kind)
    m.zero_(), v.zero_()
    param = torch.nn.Parameter(p.clone())
    betas = ADAM["beta1"], ADAM["beta2"]
    opt = fastopt.torch.AdamW([param], betas=betas, eps=1e-6, weight_decay=0.1)
    for t in (1, 2, 3):
        param.grad = drawn(10 + t, p.shape, kind)
        opt.threads, opt.param_groups[0]["lr"] = t, 0.01 * t
        opt.step()
        adam(p, param.grad, m, v, t, 0.01 * t)
    state = opt.state[param]
    assert torch.equal(p, param.data)
    assert torch.equal(m, state["exp_avg"]) and torch.equal(v, state["exp_avg_sq"])


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind):
    """Any order of dimensions without gaps; gradients in any other, too."""
    flat = tensors((60,), kind)
    p, g, m, v = (x.clone().view(3, 5, 4).permute(2, 0, 1) for x in flat)
    for of, order in ((1, g), (2, g.contiguous()), (3, g.expand(2, *g.shape)[1])):
        adam(p, order, m, v, of)
        adam(flat[0], flat[1], *flat[2:], of)
    assert torch.equal(p, flat[0].view(3, 5, 4).permute(2, 0, 1))
    scaled = (2 * g)[:, ::2], p[:, ::2].contiguous()
    more = (x[:, ::2].contiguous() for x in (m, v))
    adam(scaled[1], scaled[0], *more, 4)
    assert torch.isfinite(scaled[1]).all()


def test_numbers_may_be_tensors():
    """As what a scheduler or a checkpoint leaves."""
    p, g, m, v = tensors()
    q, n, w = p.clone(), m.clone(), v.clone()
    adam(p, g, m, v, torch.tensor(3.0), torch.tensor(0.25), beta1=np.float64(0.75))
    adam(q, g, n, w, 3, 0.25, beta1=0.75)
    assert torch.equal(p, q) and torch.equal(v, w)


WRONG = {
    "id": ({"of": 99}, ValueError, "no adam optimizer #99"),
    "step 0": ({"t": 0}, ValueError, "step must be"),
    "half a step": ({"t": 1.5}, ValueError, "step must be"),
    "no step": ({"t": None}, TypeError, "step must be"),
    "step 0, uncorrected": ({"t": 0, "corrected": False}, ValueError, "step must be"),
    "lr": ({"lr": -0.1}, ValueError, "lr must be at least 0"),
    "nan": ({"lr": math.nan}, ValueError, "lr must be finite"),
    "words": ({"lr": "0.1"}, TypeError, "lr must be a number"),
    "beta": ({"beta2": 1.0}, ValueError, r"beta2 must be in \[0, 1\)"),
    "decay": ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0"),
    "shape": ({"g": torch.ones(17, 59)}, ValueError, r"grads has shape \(17, 59\) but"),
    "state": ({"v": torch.ones(1002)}, ValueError, r"exp_avg_sq has shape \(1002,\)"),
    "float64": ({"g": torch.ones(1003).double()}, TypeError, "grads must be one of"),
    "gaps": ({"m": torch.ones(2006)[::2]}, ValueError, "exp_avg of shape .* gaps"),
    "meta": ({"g": torch.ones(1003, device="meta")}, ValueError, "must be on the CPU"),
    "none": ({"g": None}, TypeError, "grads must be a tensor"),
    "sparse": ({"g": torch.ones(1003).to_sparse()}, RuntimeError, "sparse grads"),
    "array": ({"p": np.ones(1003, np.float32)}, TypeError, "params must be a tensor"),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", WRONG)
def test_nothing_is_written_if_something_does_not_fit(case, kind):
    changes, error, message = WRONG[case]
    named = dict(zip("pgmv", tensors((1003,), kind), strict=True))
    named = {**named, "t": 3, **changes}
    before = copy.deepcopy(named)
    with pytest.raises(error, match=message):
        adam(**named)
    for name in "pgmv":
        there = named[name]
        if isinstance(there, torch.Tensor) and not there.is_sparse and there.is_cpu:
            assert torch.equal(there, before[name])


def test_overlapping_memory_is_refused():
    p, g, m, v = tensors()
    for wrong in ((p, g, p, v), (p, g, m, m), (p, p, m, v)):
        before = [x.clone() for x in wrong]
        with pytest.raises(ValueError, match="overlap .* nothing was updated"):
            adam(*wrong, 1)
        with pytest.raises(ValueError, match="overlap in memory"):
            undo(*wrong, 1)
        assert all(map(torch.equal, wrong, before))
    both = torch.ones(1500)
    with pytest.raises(ValueError, match="params and grads overlap"):
        undo(both[:1000], both[500:], m[:1000], v[:1000], 1)


def test_memory_that_was_freed_is_refused():
    p, g, m, v = tensors()
    m.untyped_storage().resize_(16)
    before = p.clone()
    with pytest.raises(RuntimeError, match="freed or made smaller"):
        adam(p, g, m, v, 1)
    assert torch.equal(p, before)


def test_what_was_destroyed_is_gone():
    ops.create_adam(3, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
    ops.destroy_adam(3)
    with pytest.raises(ValueError, match=r"call create_adam\(3, ...\) first"):
        adam(*tensors(), 1, of=3)
    assert ops.destroy_adam(3) == 0  # as DeepSpeed, at the end of Python


def test_it_says_what_runs_if_asked_to(capsys):
    ops.create_lion(5, 1e-3, 0.9, 0.99, 0.0, True)
    ops.destroy_lion(5)
    assert "lion optimizer #5: fastopt" in capsys.readouterr().out


def test_other_names_are_told():
    with pytest.raises(AttributeError, match="overlap_step to false"):
        getattr(ops, "zenflow_adam_create")  # noqa: B009
    assert not hasattr(ops, "adam_downdate")


def test_threads(monkeypatch):
    """Not more than torch, unless they were chosen for us."""
    monkeypatch.delenv("FASTOPT_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ops.create_adam(3, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
        assert ops._threads() == 1
        monkeypatch.setenv("FASTOPT_NUM_THREADS", "3")
        assert ops._threads() == 1
        ops.create_adam(3, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
        assert ops._threads() == 3
    finally:
        torch.set_num_threads(before)
        monkeypatch.undo()
        ops.destroy_adam(3)
        ops.create_lion(3, 1e-3, 0.9, 0.99, 0.0, False)  # looks again
        ops.destroy_lion(3)


def test_the_examples_in_docstrings():
    result = doctest.testmod(ops)
    assert result.attempted >= 12 and not result.failed


# Rollback -----------------------------------------------------------------------------


def undo(p, g, m, v, t, lr=0.01, corrected=True, of=7, **changes):
    values = {"lr": lr, **ADAM, **changes}
    return ops.adam_rollback(of, t, *values.values(), corrected, p, g, m, v)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("of", [7, 8])
def test_a_rollback_undoes_a_step(of, corrected):
    """To float32's rounding, so that a step with other gradients is as it would be."""
    for shape in [*SIZES, (100_003,)]:
        p, g, m, v = tensors(shape)
        v += 0.1  # or its last place would decide how far a step goes
        adam(p, g, m, v, 4, 0.02, corrected, of)
        before = [x.clone() for x in (p, m, v)]
        wrong = drawn(9, shape)
        adam(p, wrong, m, v, 5, 0.03, corrected, of)
        assert undo(p, wrong, m, v, 5, 0.03, corrected, of) == 0
        for x, y in zip((p, m, v), before, strict=True):
            assert close(x, y.double(), 3.0)
        after = adam64(before[0], g, *before[1:], 5, 0.03, of == 7, corrected)
        adam(p, g, m, v, 5, 0.03, corrected, of)
        for x, y in zip((p, m, v), after, strict=True):
            assert close(x, y, 5.0)


def test_a_rollback_of_the_first_step_leaves_no_negative_square():
    p, g = drawn(0, (5000,)), drawn(1, (5000,))
    m, v = torch.zeros(5000), torch.zeros(5000)
    before = p.clone()
    adam(p, g, m, v, 1)
    undo(p, g, m, v, 1)
    assert (v >= 0).all() and v.max() < 1e-7 and m.abs().max() < 1e-7
    assert close(p, before.double())


CANNOT = {
    "16 bits": ({}, torch.bfloat16, TypeError, "float32 tensors"),
    "beta": ({"beta1": 0.0}, torch.float32, ValueError, "beta1 and beta2 above 0"),
    "decay": ({"lr": 10.0}, torch.float32, ValueError, r"lr \* weight_decay below 1"),
    "gradient": (
        {"g": math.inf},
        torch.float32,
        FloatingPointError,
        "cannot be undone",
    ),
    "parameter": (
        {"p": math.nan},
        torch.float32,
        FloatingPointError,
        "cannot be undone",
    ),
    "shape": ({"g": torch.ones(3)}, torch.float32, ValueError, "grads has shape"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_rollback_that_cannot_be_right_is_refused(case):
    changes, kind, error, message = CANNOT[case]
    named = dict(zip("pgmv", tensors((100_003,), kind), strict=True))
    for name in named:
        if isinstance(changes.get(name), float):  # in the last block
            named[name][-1] = changes[name]
    options = {k: x for k, x in changes.items() if k not in named or torch.is_tensor(x)}
    named |= options
    before = {name: named[name].clone() for name in "pgmv"}
    with pytest.raises(error, match=message):
        undo(t=2, **named)
    for name in "pgmv":
        assert torch.equal(named[name].nan_to_num(), before[name].nan_to_num())


# Its classes --------------------------------------------------------------------------


@pytest.fixture
def installed():
    """DeepSpeed's optimizers, on our kernels."""
    pytest.importorskip("deepspeed")
    import deepspeed.ops

    ops.install()
    yield deepspeed.ops
    ops.uninstall()


def trained(kind, dtype=torch.float32, steps=20, **values):
    """Two groups, of which the second one has a learning rate of its own."""
    params = [torch.nn.Parameter(drawn(k, (40 + k,), dtype)) for k in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.005}]
    opt = kind(groups, **values)
    for step in range(steps):
        for k, param in enumerate(params):
            grad = drawn(100 * step + k, param.shape, torch.float32)
            param.grad = None if step == 3 and k == 1 else grad.to(dtype)
        opt.param_groups[0]["lr"] = values["lr"] * (1 + step)
        opt.step()
    return opt, params


def test_its_adam_is_torchs(installed):
    values = {"lr": 0.01, "betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    for adamw in (True, False):
        opt, params = trained(
            installed.adam.DeepSpeedCPUAdam, adamw_mode=adamw, **values
        )
        assert type(opt) is installed.adam.DeepSpeedCPUAdam and opt.ds_opt_adam is ops
        torchs = torch.optim.AdamW if adamw else torch.optim.Adam
        for a, b in zip(
            params, trained(torchs, torch.float64, **values)[1], strict=True
        ):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


def test_its_adagrad_is_torchs(installed):
    values = {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1}
    _, params = trained(installed.adagrad.DeepSpeedCPUAdagrad, **values)
    expected = trained(torch.optim.Adagrad, torch.float64, **values)[1]
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


def test_its_lion_is_ours(installed):
    values = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    _, params = trained(installed.lion.DeepSpeedCPULion, **values)
    for a, b in zip(params, trained(fastopt.torch.Lion, **values)[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full", [True, False])
def test_its_state_has_its_dtype(installed, kind, full):
    values = {"lr": 0.01, "weight_decay": 0.1, "fp32_optimizer_states": full}
    opt, params = trained(installed.adam.DeepSpeedCPUAdam, kind, **values)
    assert opt.state[params[0]]["exp_avg"].dtype == (torch.float32 if full else kind)
    assert opt.state[params[0]]["step"] == 20 and opt.state[params[1]]["step"] == 19
    del values["fp32_optimizer_states"]
    expected = trained(fastopt.torch.AdamW, kind, **values)[1]
    if full:  # our class has the same state, and the same bits
        assert all(map(torch.equal, params, expected))
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_sparse_gradients_of_its_adagrad(installed):
    embedding = torch.nn.Embedding(50, 4, sparse=True)
    opt = installed.adagrad.DeepSpeedCPUAdagrad(embedding.parameters(), lr=0.1)
    other = copy.deepcopy(embedding)
    theirs = torch.optim.Adagrad(other.parameters(), lr=0.1)
    for rows in ([3, 7, 7], [0, 3], [49]):
        for table, by in ((embedding, opt), (other, theirs)):
            by.zero_grad()
            (table(torch.tensor(rows)) * drawn(1, (len(rows), 4))).sum().backward()
            table.weight.grad = table.weight.grad.coalesce()
            by.step()
    torch.testing.assert_close(embedding.weight, other.weight, rtol=1e-6, atol=1e-6)


def test_uninstall_puts_its_own_back(installed):
    from deepspeed.ops.op_builder import CPUAdamBuilder, CPULionBuilder

    assert CPUAdamBuilder().load() is CPULionBuilder().load(verbose=False) is ops
    ops.install()  # once more changes nothing
    opt, params = trained(installed.adam.DeepSpeedCPUAdam, lr=0.01, steps=1)
    ops.uninstall()
    for builder in (CPUAdamBuilder, CPULionBuilder):
        assert "load" not in vars(builder)
    opt.step()  # goes on
    assert opt.state[params[0]]["step"] == 2
    ops.uninstall()


def test_accelerators_without_an_optimizer_keep_their_error(installed, monkeypatch):
    """They share one class for all that they do not have."""
    from deepspeed.ops import op_builder

    ops.uninstall()
    absent = type("NotImplementedBuilder", (), {})
    monkeypatch.setattr(op_builder, "CPULionBuilder", absent)
    ops.install()
    assert not hasattr(absent, "load")
    assert op_builder.CPUAdamBuilder().load() is ops


def test_superoffload_steps_and_rolls_back(installed):
    """Its worker, with tasks as the engine sends them: a step, which is undone and done
    again with clipped gradients."""
    utils = pytest.importorskip("deepspeed.runtime.superoffload.superoffload_utils")
    param, grad, clipped = drawn(0, (700,)), drawn(1, (700,)), drawn(1, (700,)) / 8
    values = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    tasks, results = queue.SimpleQueue(), queue.SimpleQueue()
    moving = param.clone()
    for g, rollback in (
        (clipped, False),
        (grad, False),
        (grad, True),
        (clipped, False),
    ):
        task = {"param_data": moving, "param_grad": g, "param_group_id": 0}
        tasks.put({**task, "sub_group_id": 2, "rollback": rollback, "lr": 0.02})
    tasks.put(None)
    config = {**values, "amsgrad": False}
    utils.superoffload_optimizer_worker(tasks, results, config, 700, pin_memory=False)
    events = [results.get() for _ in range(4)]
    assert [e.get("event_type") for e in events] == [
        *("adam_step", "adam_step", "rollback", "adam_step"),
    ], events
    alone = torch.nn.Parameter(param)
    opt = torch.optim.AdamW([alone], **{**values, "lr": 0.02})
    for _ in range(2):
        alone.grad = clipped
        opt.step()
    torch.testing.assert_close(moving, alone.data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["whole_steps", "known_norm", "updates"])
def test_the_benchmark_compares_the_same(installed, from_bench, monkeypatch, name):
    """Its sequences of passes and the one pass of ours, at a small size."""
    bench = from_bench("deepspeed_offload")

    def makers(names):
        return {n: lambda p: torch.optim.AdamW(p, **bench.VALUES) for n in names}

    monkeypatch.setattr(bench, "optimizers", makers)
    contenders, held = getattr(bench, name)(1003)
    bench.check(contenders, held)
    assert [*bench.measure(contenders, 2)][0] == bench.OWN
    held[-1].master.data[7] += 1e-3
    with pytest.raises(RuntimeError, match="fastopt.torch is"):
        bench.check({n: list for n in contenders}, held)


# Its engine, in two processes ---------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("deepspeed")
    if (
        not torch.distributed.is_available()
        or not torch.distributed.is_gloo_available()
    ):
        pytest.skip("torch without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    started = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "zero_ranks.py"), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), said[0] + said[1]
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_zero_has_the_bits_of_one_process(ranks):
    """Stages 1, 2 and 3, with and without offload, in float32 and bfloat16; and every
    class whose rule takes no norms."""
    cases = [r for r in ranks if r["what"] == "steps" and r["kind"] != "Adagrad"]
    elementwise = {
        name
        for name in fastopt.torch.__all__
        if name[0].isupper()
        and getattr(fastopt.torch, name)._default_rule.measure is None
    }
    assert {case["kind"] for case in cases} >= elementwise - {"Adagrad", "Muon"}
    assert len(cases) >= 2 * 12 + 5 * 3
    assert [r for r in cases if not r["same"]] == []
    for case in cases:
        assert case["inner"].rpartition(".")[2] == case["kind"]


def test_zero_keeps_bfloat16_masters(ranks):
    """Which it does for DeepSpeedCPUAdam only, and for no class derived from it."""
    cases = [r for r in ranks if r["what"] == "bf16 masters"]
    assert len(cases) == 2 and all(r["same"] for r in cases), cases


def test_zero_goes_on_from_its_checkpoints(ranks):
    cases = [r for r in ranks if r["what"] == "resumed"]
    assert len(cases) == 6 and all(r["same"] for r in cases), cases


def test_zero_clips_before_the_step(ranks):
    """It rounds clipped gradients, which our own clip_norm does not."""
    cases = [r for r in ranks if r["what"] == "clipped"]
    assert len(cases) == 6 and all(r["error"] < 1e-6 for r in cases), cases


def test_zero_takes_torchs_adagrad_in_place_of_ours(ranks):
    """It makes a new torch.optim.Adagrad of whatever is one. ``optimizer(adagrad)`` is
    none, and stays."""
    cases = [r for r in ranks if r["kind"] == "Adagrad"]
    assert {r["inner"] for r in cases} == {"torch.optim.adagrad.Adagrad"}
    assert all(r["error"] < 1e-5 for r in cases)
    own = [r for r in ranks if r["kind"] == "OwnAdagrad"]
    assert {r["inner"] for r in own} == {"__main__.OwnAdagrad"}
    assert len(own) == 3 and all(r["same"] for r in own)


# Its own C++ --------------------------------------------------------------------------


@pytest.mark.faults  # its compiler takes minutes
@pytest.mark.parametrize("of", [7, 8])
@pytest.mark.parametrize("corrected", [True, False])
def test_its_own_kernels_agree(own, of, corrected):
    """As far as its hyperparameters, which it rounds to float32 first, let them."""
    for kinds in [KINDS[:1] * 2, *product(KINDS[1:], KINDS[:1])]:
        results = []
        for module in (own, ops):
            p, _, m, v = tensors((10_007,), *kinds)
            m.zero_(), v.zero_()
            for t, lr in [(1, 0.01), (2, 0.02), (3, 0.03), (10, 0.1), (11, 0.2)]:
                g = drawn(10 + t, p.shape, p.dtype)
                values = lr, *ADAM.values(), corrected
                module.adam_update(of, t, *values, p, g, m, v)
            results.append((p.double(), m.double(), v.double()))
        unit = ROUNDING[kinds[0]][0]
        for theirs, ours in zip(*results, strict=True):
            error = (theirs - ours).abs() / (1 + ours.abs())
            assert error.max() < 1e-5 + 4 * unit * (theirs is results[0][0])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    with pytest.MonkeyPatch.context() as patch:
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("ext")))
        tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        patch.setenv("PATH", tools)  # ninja
        try:
            module = CPUAdamBuilder().load()
        except RuntimeError as error:
            pytest.skip(f"DeepSpeed cannot compile here: {error}")
    for number, adamw in ((7, True), (8, False)):
        module.create_adam(number, 1.0, 0.5, 0.5, 1.0, 9.0, adamw, False)
    return module
