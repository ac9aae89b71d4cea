"""Bits do not depend on the modes of arithmetic that a caller has set, on one thread or
on all: flush-to-zero, rounding otherwise than to nearest. And the caller keeps them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import installed_numba  # noqa: F401
import modes
import numpy as np
import pytest
from numba import config

import fastopt
from fastopt import multitask
from fastopt.backends import cython_cpu, llvm_ir
from fastopt.rule import Rule
from fastopt.runtime import arithmetic

pytestmark = [
    pytest.mark.skipif(
        cython_cpu.missing() is not None, reason=f"cython: {cython_cpu.missing()}"
    ),
    pytest.mark.skipif(
        not (modes.X86 or modes.ARM), reason="the modes of this CPU are not known"
    ),
]
ISAS = cython_cpu.driver().cpu_supports() if not cython_cpu.missing() else []
# Numba's pool cannot have more threads than CPUs.
JIT = ["alone", "njit", "numba"] if config.NUMBA_NUM_THREADS > 1 else ["njit", "numba"]


def bits(mode, where, backends, isa):
    program = Path(modes.__file__)
    done = subprocess.run(
        [sys.executable, program, mode, where, *backends],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "FASTOPT_ISA": isa, "OMP_NUM_THREADS": ""},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def usual(backends):
    return bits("usual", "everywhere", backends, ISAS[0])


def check(mode, where, backends, isa):
    found, expected = bits(mode, where, backends, isa), usual(tuple(backends))
    assert found.keys() == expected.keys() and len(found) > 1
    differ = [key for key in found if found[key] != expected[key]]
    assert not differ, f"{len(differ)} of {len(found)} differ, as {differ[:5]}"


# Every mode with one instruction set, and every instruction set in one mode.


@pytest.mark.parametrize(
    ("where", "isa"),
    [*(("main", isa) for isa in ISAS[-1:]), *(("everywhere", isa) for isa in ISAS)],
)
def test_bits_in_flush_to_zero(where, isa):
    check("flush", where, ["cython"], isa)


@pytest.mark.parametrize(
    ("mode", "isa"),
    [
        *((mode, isa) for mode in modes.ROUND for isa in ISAS[-1:]),
        *(("down", isa) for isa in ISAS[:-1]),
    ],
)
def test_bits_in_other_roundings(mode, isa):
    check(mode, "everywhere", ["cython"], isa)


@pytest.mark.parametrize(
    ("mode", "where"),
    [("flush", "main"), ("flush", "everywhere"), ("up", "everywhere")],
)
def test_bits_of_numba_and_native_code(mode, where):
    check(mode, where, JIT, ISAS[0])


@pytest.mark.parametrize("mode", ["flush", "up"])
def test_bits_of_numpy(mode):
    check(mode, "main", ["numpy"], ISAS[0])


def test_these_data_show_it():
    """Or the tests above would pass without anything done about it."""
    p, g = (modes.values(seed, np.float32) for seed in range(2))
    plain = p - np.float32(0.013) * g
    for mode in modes.MODES:
        with modes.modes(mode):
            assert (p - np.float32(0.013) * g).tobytes() != plain.tobytes()


@pytest.mark.parametrize("mode", modes.MODES)
def test_gram_in_other_modes(mode):
    tasks = [[modes.values(seed, np.float64)] for seed in range(3)]
    for backend in ("numpy", "cython"):
        expected = multitask.gram(tasks, backend=backend)
        for threads in (1, 2):
            with modes.modes(mode):
                before = modes.in_force()
                found = multitask.gram(tasks, backend=backend, threads=threads)
                assert modes.in_force() == before
            assert found.tobytes() == expected.tobytes()


METHODS = {
    **{
        n: getattr(multitask, n)
        for n in multitask.__all__
        if n not in ("gram", "GradVac")
    },
    "pcgrad": lambda gram: multitask.pcgrad(gram, np.random.default_rng(0)),
    "GradVac": lambda gram: multitask.GradVac(np.random.default_rng(0), 0.3)(gram),
    "preference": lambda gram: multitask.mean(gram, np.array([1.0, 3.0, 7.0, 0.1])),
}


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_other_modes(method):
    """Of tasks that conflict; of small ones, too, whose products are denormal."""
    rng, differ = np.random.default_rng(1), []
    for scale in (1.0, 1e-155):
        rows = rng.normal(size=(4, 30)) * scale
        rows[1] -= rows[0] / 3
        gram = multitask.gram(rows)
        expected = METHODS[method](gram)
        for mode in modes.MODES:
            with modes.modes(mode):
                before = modes.in_force()
                found = METHODS[method](gram)
                assert modes.in_force() == before
                plain = gram / np.float64(3.0)
            assert found.tobytes() == expected.tobytes(), mode
            differ.append(plain.tobytes() != (gram / np.float64(3.0)).tobytes())
    assert any(differ)  # or this would pass without anything done


def failing(p, g, lr):
    return (p - lr * g,)


def failing_scalars(t, lr=0.1):
    return (lr / (2 - t),)  # the second step divides by zero


@pytest.mark.parametrize("mode", modes.MODES)
def test_an_error_leaves_the_modes_alone(mode):
    """Of the scalars, of the gradients."""
    p, g = np.ones(5), np.ones(5)
    wrong = Rule(failing, failing_scalars, name="wrong")
    opts = [wrong(p, backend="numpy"), wrong(p.copy(), backend="numba")]
    opts.append(fastopt.adamw(p.copy(), backend="cython"))
    for opt in opts:
        opt.step(g)
    with pytest.raises(ZeroDivisionError):
        opts[1].step(g)
    for opt in opts:
        for given in (g, np.ones(4), g.astype("f4"), None):
            for asked in ({}, {"clip_norm": 1.0}):
                with modes.modes(mode):
                    before = modes.in_force()
                    try:
                        opt.step(given, **asked)
                    except (TypeError, ValueError, ZeroDivisionError):
                        pass
                    now = modes.in_force()
                assert now == before


@pytest.mark.parametrize("standard", [arithmetic.standard, arithmetic.standard_by_libc])
@pytest.mark.parametrize("mode", modes.MODES)
def test_standard(standard, mode):
    @standard
    def seen(*args, **kwargs):
        """As it was."""
        return modes.in_force(), args, kwargs

    class Holder:
        method = seen

    @standard
    def fail():
        raise KeyError("wrong")

    with modes.modes(mode):
        before = modes.in_force()
        assert seen(1, k=2) == (modes.word("usual"), (1,), {"k": 2})
        holder = Holder()
        assert holder.method(3) == (modes.word("usual"), (holder, 3), {})
        with pytest.raises(KeyError):
            fail()
        assert modes.in_force() == before != modes.word("usual")
    assert seen.__doc__ == "As it was." and seen.__name__ == "seen"


def test_traps_are_not_sprung():
    """A caller may have had exceptions trap (feenableexcept); a step's do not."""
    if not modes.X86:
        pytest.skip("ARM's processors need not have traps")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import numpy as np, fastopt\nfrom fastopt import _process\n"
            "p = np.full(40_001, 1e300)\ng = np.full(40_001, 1e300)\n"
            "opt = fastopt.adamw(p, threads=2)\n"
            "_process.set_control(0x1900)\n"
            "opt.step(g)\n"
            "opt.step(g, clip_norm=1.0)\n"
            "trap = _process.control()\n"
            "_process.set_control(0x1F80)\n"
            "print(hex(trap & 0xFFC0))",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "0x1900\n", done.stderr


@pytest.mark.parametrize("mode", modes.MODES)
def test_torch_in_other_modes(mode):
    torch = pytest.importorskip("torch")
    from fastopt import torch as fastopt_torch

    def steps(dtype, how, asked):
        p, *grads = (torch.from_numpy(modes.values(k, np.float32)) for k in range(4))
        param = torch.nn.Parameter(p.to(dtype))
        cls = getattr(fastopt_torch, how)
        opt = cls([param], lr=0.013, **asked)
        grads = [grad.to(dtype) for grad in grads]
        yield
        for grad in grads:
            param.grad = grad
            before = modes.in_force()
            opt.step()
            assert modes.in_force() == before
        state = [v for v in opt.state[param].values() if isinstance(v, torch.Tensor)]
        yield b"".join(
            t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            for t in (param, *state)
        )

    for dtype in (torch.float32, torch.bfloat16):
        for how in ("AdamW", "SGD", "Lion", "LAMB", "Adafactor"):
            for asked in ({}, {"clip_norm": 0.3, "ema": 0.9}):
                expected, *_ = list(steps(dtype, how, asked))[1:]
                work = steps(dtype, how, asked)
                next(work)
                with modes.modes(mode):
                    found = next(work)
                assert found == expected, (dtype, how, asked)


@pytest.mark.parametrize("mode", modes.MODES)
@pytest.mark.parametrize("rule", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_eval_and_train_in_other_modes(mode, rule):
    torch = pytest.importorskip("torch")
    from fastopt import torch as fastopt_torch

    for dtype, size in (
        (torch.float32, 1.0),
        (torch.float32, 2e-38),
        (torch.bfloat16, 1.0),
    ):
        p, *grads = (torch.from_numpy(modes.values(k, np.float32)) for k in range(4))
        param = torch.nn.Parameter((p * size).to(dtype))
        opt = getattr(fastopt_torch, rule)([param], lr=0.013 * size)
        for grad in grads:
            param.grad = grad.to(dtype)
            opt.step()
        trained, average = param.detach().clone(), opt.eval_params()[0]
        assert not same(average, trained)
        with modes.modes(mode):
            opt.eval()
        assert same(param.detach(), average)
        with modes.modes(mode):
            opt.train()
        assert same(param.detach(), trained)


def same(one, other):
    """Whether tensors have the same bits."""
    import torch

    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_jax_keeps_denormal_numbers():
    """XLA flushes them on its threads."""
    jax = pytest.importorskip("jax")
    import fastopt.jax

    p, *grads = (modes.values(seed, np.float32) for seed in range(3))
    given = {"lr": 0.013, "eps": 1e-30}
    ours = fastopt.adamw(p.copy(), **given)
    core = ours._params.arrays[0]
    opt = fastopt.jax.adamw(threads=2, **given)
    params, state = jax.numpy.array(p), opt.init(jax.numpy.array(p))
    for g in grads:
        ours.step(g)
        params, state = opt.step(params, jax.numpy.array(g), state)
    assert np.asarray(params).tobytes() == core.tobytes()


@pytest.mark.parametrize(
    ("machine", "triple", "reads", "writes"),
    [
        ("x86_64", "x86_64-linux-gnu", "stmxcsr", "ldmxcsr"),
        ("aarch64", "aarch64-linux-gnu", "mrs", "msr\tFPCR"),
    ],
)
def test_what_numba_compiles(machine, triple, reads, writes):
    """For another CPU than this one, too."""
    from llvmlite import binding as llvm
    from llvmlite import ir

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module, kind = ir.Module(), ir.FunctionType(ir.VoidType(), [])
    module.triple = triple
    step, work = (ir.Function(module, kind, name) for name in ("step", "work"))
    builder = ir.IRBuilder(step.append_basic_block())
    before = llvm_ir.enter_arithmetic(builder, machine)
    builder.call(work, [])
    llvm_ir.leave_arithmetic(builder, before, machine)
    builder.ret_void()
    target = llvm.Target.from_triple(triple).create_target_machine(opt=3)
    text = target.emit_assembly(llvm.parse_assembly(str(module)))
    entered, left = text.split("work", 1)
    assert entered.count(reads) == 1 and entered.count(writes) == 1
    assert left.count(reads) == 0 and left.count(writes) == 1
