"""The CUDA backend against the reference, bit for bit: run by test_cuda.py in a process
of its own, in numba's simulator or on a GPU if there is one."""

from __future__ import annotations

import functools
import math
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from cases import CASES, DTYPES, IDS, closure_rule, nonzero, same_bits, special_values
from hashed import hashed
from numba import cuda
from numba.cuda.simulator import kernel as simulator
from numba.cuda.simulator import kernelapi
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
from numba.cuda.simulator.kernel import BlockThread

import fastopt
from fastopt.backends import (
    cuda_accesses,
    cuda_device,
    cuda_driver,
    cuda_jobs,
    cuda_kernels,
    cuda_settle,
    cuda_simulated,
    cuda_sums,
    cuda_table,
    numpy_ref,
)
from fastopt.memory import factored
from fastopt.memory.arrays import to_host
from fastopt.memory.order import CHUNK
from fastopt.memory.trees import leaves
from fastopt.rule import Rule, copysign, maximum, minimum, sign, sqrt, where
from fastopt.step import Request, limits

SIZES = (0, 1, 7, 63, 64, 65, 4097)
OFFSETS = (0, 1)  # elements from a 16-byte boundary
HALF, TWO = 0.5, 2

in_simulator = pytest.mark.skipif(
    not cuda_kernels.SIMULATED, reason="the mutant is of the simulator's part"
)


def soft(x, threshold):
    return sign(x) * maximum(abs(x) - threshold, threshold - threshold)


def update(p, g, m, v, lr, beta, cut):
    m = where((g > cut) | (g < -cut), beta * m + g, copysign(m, g) - HALF * g)
    v = maximum(v, minimum(g * g, cut))
    return p - lr * (sign(g) + TWO * soft(m, cut) / (sqrt(v) + cut)), m, v


def constants(t, lr=0.1, beta=0.9, cut=0.3):
    return lr / t, beta, cut


USERS = Rule(update, constants, state=("m", "v"))


BY_ID = dict(zip(IDS, CASES, strict=True))
BY_ID["hashed"] = hashed, {"lr": 0.03}
BY_ID |= {"users": (USERS, {"lr": 0.07}), "closure": (closure_rule(), {"lr": 0.07})}


def cases(*ids):
    """The cases of these names."""
    return pytest.mark.parametrize(
        ("rule", "values"), [BY_ID[name] for name in ids], ids=ids
    )


EVERY = cases(*BY_ID)
MEASURED = [name for name, (rule, _) in BY_ID.items() if rule.measure is not None]
FEW = ("adamw", "sgd-momentum-nesterov", "users", "closure")


class AtOnce(BlockThread):
    """A simulated thread that is not one: ours never wait for each other, and starting
    threads would be nearly all of the work."""

    def start(self):
        kernelapi.threading = SimpleNamespace(current_thread=lambda: self)
        self.run()

    def is_alive(self):
        return False

    def syncthreads(self):
        raise RuntimeError("its kernel must say that its threads wait")


class InTurns(BlockThread):
    """A simulated thread that runs until it waits for the others of its block, while
    these stand still. So the simulator need not look again and again who waits."""

    def __init__(self, *of):
        super().__init__(*of)
        self.turn, self.given_back = threading.Semaphore(0), threading.Semaphore(0)
        self.syncthreads_event = SimpleNamespace(
            wait=self.wait, set=self.go_on, clear=lambda: None
        )

    def start(self):
        super().start()
        self.go_on()

    def go_on(self):
        self.turn.release()
        self.given_back.acquire()

    def wait(self):
        self.given_back.release()
        self.turn.acquire()

    def run(self):
        self.turn.acquire()
        super().run()
        self.given_back.release()


@pytest.fixture(autouse=True)
def quick_simulator(monkeypatch):
    if cuda_kernels.SIMULATED:
        monkeypatch.setattr(cuda_table, "BLOCK", 32)  # few idle threads
        monkeypatch.setattr(kernelapi, "threading", threading)  # and put it back
        monkeypatch.setattr(cuda_simulated.Launch, "__call__", launched)
    cuda_jobs.loaded.cache_clear()
    yield
    cuda_jobs.loaded.cache_clear()


LAUNCH = cuda_simulated.Launch.__call__


def launched(launch, stream):
    """Launch a kernel with threads as it needs them."""
    simulator.BlockThread = InTurns if launch.waits else AtOnce
    try:
        LAUNCH(launch, stream)
    finally:
        simulator.BlockThread = BlockThread
        kernelapi.threading = threading


def on_device(values, offset):
    """A device array that starts ``offset`` elements into its allocation."""
    room = np.full(values.size + offset + 1, 7, values.dtype)
    room[offset : offset + values.size] = values.reshape(-1)
    whole = cuda.to_device(room)
    assert cuda_table.address(cuda_driver.as_array("whole", whole)) % 16 == 0
    return whole[offset : offset + values.size].reshape(values.shape), whole


def differing(
    rule, values, size, dtype, offset, steps=10, reference=None, of_grads=None
):
    """What differs after some steps: buffers by position, and writes outside them."""
    rng = np.random.default_rng(size)
    shape = (size // 7, 7) if size % 7 == 0 else (size,)
    start = nonzero(rng, size, dtype).reshape(shape)
    expected = start.copy()
    got, whole = on_device(expected, offset)
    cpu = (reference or rule)(expected, backend="numpy", **values)
    gpu = rule(got, backend="cuda", **values)
    for _ in range(steps):
        grad = nonzero(rng, size, of_grads or dtype).reshape(shape)
        cpu.step(grad, grad_scale=0.5)
        gpu.step(on_device(grad, offset)[0], grad_scale=0.5)
    room = whole.copy_to_host()
    pairs = [(expected, got.copy_to_host())]
    for ours, theirs in zip(cpu.state.values(), gpu.state.values(), strict=True):
        pairs.append((ours[0], theirs[0].copy_to_host()))
    wrong = [i for i, (a, b) in enumerate(pairs) if not same_bits(a, b)]
    outside = np.delete(room, range(offset, offset + size))
    assert cpu.steps == gpu.steps == steps
    # Small steps may leave parameters of 16 bits where they are.
    moved = of_grads and any(np.any(a) for a, _ in pairs[1:])
    assert size == 0 or moved or not np.array_equal(expected, start)
    return wrong + ["outside"] * (not np.all(outside == 7))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(rule, values, dtype):
    for size, offset in ((7, 1), (65, 0)):
        assert not differing(rule, values, size, dtype, offset), (size, offset)


@cases(*FEW)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_size(rule, values, dtype):
    for size in SIZES:
        for offset in OFFSETS:
            steps = 3 if size > 100 else 10
            assert not differing(rule, values, size, dtype, offset, steps), (
                size,
                offset,
            )


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(rule, values, dtype):
    p, g = special_values(dtype)
    got = cuda.to_device(p)
    cpu = rule(p, backend="numpy", **values)
    gpu = rule(got, backend="cuda", **values)
    with np.errstate(all="ignore"):
        for scale in (1, -0.5, 1):
            cpu.step(g, grad_scale=scale)
            gpu.step(cuda.to_device(g), grad_scale=scale)
    assert same_bits(p, got.copy_to_host())
    for ours, theirs in zip(cpu.state.values(), gpu.state.values(), strict=True):
        assert same_bits(ours[0], theirs[0].copy_to_host())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip_value", [None, 0.3])
def test_same_bits_where_state_is_factored(monkeypatch, dtype, clip_value):
    """Tiles and stretches so small that some matrices have several of them."""
    if cuda_kernels.SIMULATED:
        for module in (factored, cuda_kernels, cuda_sums):
            monkeypatch.setattr(module, "TILE_ROWS", 16)
            monkeypatch.setattr(module, "TILE_COLUMNS", 64)
    shapes = [(7,), (), (3, 5), (2, 3, 4), (1, 9), (70, 80), (0, 3), (4, 4)]
    rng = np.random.default_rng(0)
    host = [nonzero(rng, int(np.prod(s)), dtype).reshape(s) for s in shapes]
    device = [on_device(a, k % 3)[0] for k, a in enumerate(host)]
    values = {"lr": 0.1, "eps1": 1e-3, "weight_decay": 0.1, "ema": 0.9}
    cpu = fastopt.Adafactor(host, backend="numpy", **values)
    gpu = fastopt.Adafactor(device, backend="cuda", **values)
    for _ in range(3):
        grads = [nonzero(rng, a.size, dtype).reshape(a.shape) for a in host]
        copies = [on_device(g, k % 2)[0] for k, g in enumerate(grads)]
        grads[-1] = copies[-1] = None
        asked = {"clip_value": clip_value, "clip_norm": 2.0, "zero_grads": True}
        cpu.step(grads, **asked)
        gpu.step(copies, **asked)
        assert not any(c.copy_to_host().any() for c in copies[:-1])
    again = fastopt.Adafactor(device, **values)
    again.load_state_dict(cpu.state_dict())
    for i, (ours, theirs) in enumerate(zip(host, device, strict=True)):
        assert same_bits(ours, theirs.copy_to_host())
        assert same_bits(cpu.ema_params[i], gpu.ema_params[i].copy_to_host())
        for opt in (gpu, again):
            state = opt.state["v"][i]
            state = state if isinstance(state, np.ndarray) else state.copy_to_host()
            assert same_bits(cpu.state["v"][i], state)
    assert cpu.grad_norm == gpu.grad_norm


def test_state_is_aligned():
    """Of arrays of odd sizes, whose state shares one allocation."""
    params = [cuda.to_device(a) for a in drawn(0, (5, 0, 130, 3))]
    for arrays in fastopt.adamw(params).state.values():
        assert all(cuda_table.address(a) % 16 == 0 for a in arrays)


def test_state_starts_at_zero():
    params = [cuda.to_device(np.ones(size, np.float32)) for size in (3, 0, 70)]
    for streams in cuda_driver.state_arena(params, 2):
        assert len(streams) == 2
        assert not any(np.any(s.copy_to_host()) for s in streams)


def test_an_error_leaves_the_parameters_alone(monkeypatch):
    """Nothing is updated if there is no kernel."""

    def refused(job, number):
        raise RuntimeError("no kernel")

    ones = np.ones(9, np.float32)
    params = [on_device(ones, 0)[0], on_device(ones, 1)[0]]
    opt = fastopt.sgd(params, lr=0.5)
    monkeypatch.setattr(cuda_jobs, "loaded", refused)
    with pytest.raises(RuntimeError, match="no kernel"):
        opt.step([cuda.to_device(ones), cuda.to_device(ones)])
    assert opt.steps == 0
    assert all(np.all(p.copy_to_host() == 1) for p in params)
    monkeypatch.undo()
    opt.step([cuda.to_device(ones), cuda.to_device(ones)])
    assert all(np.all(p.copy_to_host() == 0.5) for p in params)


# Whole runs: what a function does with backend "numpy" and arrays in host memory, and
# with "cuda" and arrays on the device. It returns the optimizer and its parameters.


def everything(opt, params):
    """All that steps have written, by name, in host memory."""
    found = {f"params{path}": array for path, array in leaves(params)}
    one = getattr(opt, "opt", opt)
    found |= {f"state{path}": array for path, array in leaves(one.state)}
    found |= {f"ema{path}": array for path, array in leaves(one.ema_params)}
    found["carry"] = one._bound.program.carried
    found["counts"] = np.array([one.steps, one.skipped])
    found["norm"] = np.array(one.grad_norm)
    slow = getattr(opt, "_slow", [])
    found |= {f"slow{i}": array for i, array in enumerate(slow)}
    return {name: to_host(a) for name, a in found.items() if a is not None}


def unlike(run):
    """The names of what a run leaves different on the two backends."""
    device = lambda values, offset=0: on_device(values, offset)[0]  # noqa: E731
    with np.errstate(all="ignore"):
        expected = everything(*run("numpy", lambda values, offset=0: values.copy()))
        got = everything(*run("cuda", device))
    assert expected.keys() == got.keys()
    return [name for name in got if not same_bits(expected[name], got[name])]


def drawn(seed, sizes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [nonzero(rng, size, dtype) for size in sizes]


BESIDE = {
    "clip_norm": 3.0,
    "clip_value": 0.2,
    "nonfinite": "raise",
    "zero_grads": True,
}


def run_beside(
    rule, values, dtype=np.float32, sizes=(7, 0, 65, 33), steps=3, of_grads=None
):
    """A run with all that a step does beside its rule, in which every gradient is None
    once; every second array is misaligned, or every second gradient."""

    def run(backend, put):
        params = [put(p, i % 2) for i, p in enumerate(drawn(0, sizes, dtype))]
        opt = rule(params, backend=backend, ema=0.75, **values)
        zeroed = []
        for k in range(steps):
            grads = [
                put(g, (i + k) // 2 % 2)
                for i, g in enumerate(drawn(1 + k, sizes, of_grads or dtype))
            ]
            grads[-1 - k % len(grads)] = None
            opt.step(grads, grad_scale=0.7, **BESIDE)
            zeroed += [g for g in grads if g is not None]
        return opt, {"params": params, "zeroed": zeroed}

    return run


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_the_rule(rule, values, dtype):
    assert not unlike(run_beside(rule, values, dtype))


@pytest.fixture
def small_chunks(quick_simulator, monkeypatch):
    """For many of them in little time; a GPU's kernels were compiled for large ones."""
    if cuda_kernels.SIMULATED:
        for module in (*(cuda_kernels, cuda_settle, cuda_sums, cuda_table, numpy_ref),):
            monkeypatch.setattr(module, "CHUNK", 128)
            if hasattr(module, "SPAN"):
                monkeypatch.setattr(module, "SPAN", 2)


def chunks(*sizes):
    """So many chunks and elements more, (2, 33): two chunks and 33 elements."""
    return [many * numpy_ref.CHUNK + more for many, more in sizes]


@cases(*MEASURED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_several_chunks(rule, values, dtype, small_chunks):
    sizes = chunks((2, 33), (0, 5), (1, 0), (1, 1))
    assert not unlike(run_beside(rule, values, dtype, sizes))


@cases(*MEASURED, "adamw")
def test_decisions_over_several_spans(rule, values, small_chunks):
    sizes = chunks((5, 33), (0, 5), (4, 0), (2, 1))
    assert not unlike(run_decided(rule, values, sizes=sizes))


def run_sums(rule, values, dtype, sizes, of_grads=None):
    """The sums themselves, which may agree in float32 where they differ."""

    def run(backend, put):
        params = [put(p, i % 2) for i, p in enumerate(drawn(0, sizes, dtype))]
        opt = rule(params, backend=backend, **values)
        kind = of_grads or dtype
        opt.step(list(map(put, drawn(1, sizes, kind))))
        grads = [put(g, i // 2 % 2) for i, g in enumerate(drawn(2, sizes, kind))]
        step = opt._bound.program.runner
        as_array = opt._module.as_array
        step.take([*(as_array("a gradient", g) for g in grads[:-1]), None])
        rows = [(0.7, *[0.3 + i] * rule.measure_count) for i in range(len(sizes))]
        found = {"params": params}
        for what in ("gradients", "rule"):
            for limit in (math.inf, 0.5):
                *sums, last = step.sums(what, rows, Request(limits=limits(limit)))
                assert last is None and len(sums) == len(sizes) - 1
                found[f"{what}, {limit}"] = np.array(sums)
        return opt, found

    return run


@cases(*MEASURED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(rule, values, dtype, small_chunks):
    sizes = chunks((2, 33), (0, 0), (0, 5), (1, 0), (1, 1), (0, 9))
    assert not unlike(run_sums(rule, values, dtype, sizes))


@cases("lamb", "prodigy")
def test_sums_over_whole_chunks(rule, values):
    assert CHUNK == cuda_table.CHUNK == numpy_ref.CHUNK
    assert not unlike(run_beside(rule, values, sizes=(2 * CHUNK + 33, 31), steps=1))


def run_plain(rule, values, sizes=(130, 3), **asked):
    """Two steps without a moving average."""

    def run(backend, put):
        params = list(map(put, drawn(0, sizes)))
        opt = rule(params, backend=backend, **values)
        for k in range(2):
            opt.step(list(map(put, drawn(1 + k, sizes))), **asked)
        return opt, params

    return run


@pytest.mark.parametrize("asked", BESIDE)
@cases("adamw", "lamb", "prodigy")
def test_one_thing_beside_the_rule(rule, values, asked):
    assert not unlike(run_plain(rule, values, **{asked: BESIDE[asked]}))


DECIDED = (
    {"clip_norm": 2.0, "nonfinite": "skip"},
    {"nonfinite": "skip", "clip_value": 0.4},
    {"clip_norm": 0.5},
    {},
    {"clip_norm": 3.0, "nonfinite": "skip"},
    {"clip_norm": 1.5, "clip_value": 0.2, "zero_grads": True},
)


def run_decided(
    rule, values, dtype=np.float32, bad=(1, 4), of_grads=None, sizes=(65, 0, 7)
):
    """Steps whose norms and decisions need not come back to the host. Some are skipped,
    one of which is the first that the device decides."""

    def run(backend, put):
        params = [put(p, i % 2) for i, p in enumerate(drawn(0, sizes, dtype))]
        opt = rule(params, backend=backend, ema=0.75, **values)
        norms = []
        for k, asked in enumerate(DECIDED):
            grads = drawn(1 + k, sizes, of_grads or dtype)
            if k in bad:
                grads[0][-1] = math.nan
            grads = [put(g, (i + k) // 2 % 2) for i, g in enumerate(grads)]
            grads[-1] = None if k == 2 else grads[-1]
            opt.step(grads, grad_scale=0.7, **asked)
            norms += [opt.grad_norm] if k % 2 else []
        return opt, {"params": params, "norms": np.array(norms)}

    return run


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_decisions(rule, values, dtype):
    assert not unlike(run_decided(rule, values, dtype))


@cases("adamw", "lamb", "prodigy", "nadam", "novograd")
def test_decisions_of_which_the_first_is_to_skip(rule, values):
    assert not unlike(run_decided(rule, values, bad=(0, 1)))


@cases("adamw", "lamb", "prodigy")
def test_no_decision_comes_back_to_the_host(rule, values, monkeypatch):
    """Nothing is copied from the device after the first step, also if a hyperparameter
    changes, and counts are right after."""
    copied = []
    of_all = cuda_device.download

    def noted(*given):
        copied.append(given)
        of_all(*given)

    monkeypatch.setattr(cuda_device, "download", noted)
    params = [on_device(p, 0)[0] for p in drawn(0, (65, 7))]
    opt = rule(params, backend="cuda", **values)
    for k in range(4):
        grads = drawn(1 + k, (65, 7))
        grads[0][3] = math.nan if k == 2 else 0.5
        opt.step([on_device(g, 0)[0] for g in grads], clip_norm=1.0, nonfinite="skip")
        if k == 0:
            copied.clear()
        opt.lr = 0.1 / (1 + k)
    assert not copied
    assert (opt.steps, opt.skipped) == (3, 1)
    assert copied


def test_scalars_that_cannot_be_compiled_are_left_to_the_host(monkeypatch):
    """A user's, which may be any Python."""
    table = {1: 0.5}

    def scalars(t, lr=0.1):
        return (lr * table.get(t, 0.25),)

    rule = Rule(fastopt.gd.update, scalars)
    if cuda_kernels.SIMULATED:  # which runs all that is Python
        refusing = TypeError("not in a kernel")
        monkeypatch.setattr(cuda_settle, "device_scalars", raising(refusing))
    assert not unlike(run_decided(rule, {}))


def raising(error):
    def raises(*given):
        raise error

    return raises


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@cases("adamw", "lamb", "prodigy")
def test_what_is_not_finite(rule, values, bad):
    def run(backend, put):
        params = list(map(put, drawn(0, (65, 3))))
        opt = rule(params, backend=backend, ema=0.9, **values)
        opt.step(list(map(put, drawn(1, (65, 3)))))
        wrong = drawn(2, (65, 3))
        wrong[0][64] = bad
        grads = list(map(put, wrong))
        before = everything(opt, params)
        with pytest.raises(FloatingPointError, match=r"infinity or NaN in grads\[0\]"):
            opt.step(grads, nonfinite="raise", zero_grads=True)
        opt.step(grads, nonfinite="skip")
        assert all(map(same_bits, wrong, map(to_host, grads)))
        opt.step(grads, nonfinite="skip", zero_grads=True)
        assert not any(to_host(g).any() for g in grads)
        assert (opt.steps, opt.skipped) == (1, 2)
        after = everything(opt, params)
        changed = {k for k in after if not same_bits(before[k], after[k])}
        assert changed - {"norm"} == {"counts"}
        opt.step(list(map(put, drawn(3, (65, 3)))), nonfinite="skip")
        opt.step(list(map(put, wrong)))  # propagated
        return opt, params

    assert not unlike(run)


def run_in_parts(rule, values):
    """Gradients that come in parts, of which one parameter gets none and another one
    only a single one."""

    def run(backend, put):
        sizes = (65, 0, 7, 33)
        params = [put(p, i % 2) for i, p in enumerate(drawn(0, sizes))]
        opt = rule(params, backend=backend, **values)
        for k in range(2):
            for part, scale in ((0, 0.5), (1, 2)):
                grads = [put(g, part) for g in drawn(10 * part + k, sizes)]
                grads[2] = None
                grads[3] = None if part else grads[3]
                opt.accumulate(grads, grad_scale=scale)
            opt.step(clip_norm=1.0 + k)
        opt.accumulate(list(map(put, drawn(50, sizes))))
        left = [a.copy() for a in opt.state_dict()["accumulated"]]
        opt.drop_accumulated()
        return opt, {"params": params, "left": left}

    return run


@cases(*FEW, "lamb", "prodigy")
def test_gradients_in_parts(rule, values):
    assert not unlike(run_in_parts(rule, values))


def run_tasks(rule, values, dtype=np.float32, **asked):
    """The gradients of several tasks, one of which has no weight, and some of which do
    not depend on some parameters; also on zero gradients, and with a Gram matrix."""

    def run(backend, put):
        sizes, weights = (65, 0, 7, 33), [0.7, 0.0, -1.9]
        params = [put(p, i % 2) for i, p in enumerate(drawn(0, sizes, dtype))]
        opt = rule(params, backend=backend, ema=0.5, **values)
        given = []
        for k in range(2):
            for t in range(3):
                given.append([put(g, t % 2) for g in drawn(9 * k + t, sizes, dtype)])
            tasks = given[-3:]
            tasks[k][0] = tasks[2][2] = None
            for task in tasks:
                task[3] = None
            opt.step(tasks, weights=weights, grad_scale=0.7, **asked)
        left = fastopt.gram(given, backend=backend)
        return opt, {"params": params, "left": left, "given": given}

    return run


@cases(*FEW, "lamb", "prodigy")
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tasks(rule, values, dtype):
    for asked in ({}, BESIDE):
        assert not unlike(run_tasks(rule, values, dtype, **asked))


def test_several_tasks_where_state_is_factored():
    def run(backend, put):
        params = [put(p.reshape(5, 9)) for p in drawn(0, (45,))]
        opt = fastopt.Adafactor(params, backend=backend)
        for k in range(2):
            tasks = [[put(g.reshape(5, 9))] for g in drawn(1 + k, (45, 45))]
            opt.step(tasks, weights=[1.5, -0.5])
        return opt, params

    assert not unlike(run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matrices(dtype):
    tasks = [drawn(t, (0, 1, 33, 4097, 9001), dtype) for t in range(3)]
    tasks[1][2] = None
    put = lambda a, t: None if a is None else on_device(a, t % 2)[0]  # noqa: E731
    there = [[put(a, t) for a in task] for t, task in enumerate(tasks)]
    assert same_bits(fastopt.gram(there), fastopt.gram(tasks, backend="numpy"))
    with pytest.raises(TypeError, match=r"tasks\[0\]\[0\] is on a GPU"):
        fastopt.gram(there, backend="numpy")


def run_groups(rule):
    """Groups that differ, one of them frozen for a while, one added later; weight decay
    for matrices only; and a state that goes to another optimizer."""

    def run(backend, put):
        shapes = [(5, 7), (7,), (0,), (33,), (3, 4), (9,)]
        many = [math.prod(shape) for shape in shapes]

        def made(seed):
            arrays = zip(drawn(seed, many), shapes, strict=True)
            return [put(a.reshape(s), i % 2) for i, (a, s) in enumerate(arrays)]

        params = made(0)
        groups = [
            {"params": {"w": params[0], "b": params[1]}, "lr": 0.3},
            {"params": params[2:4], "lr": 0.05, "frozen": True},
        ]
        how = {"backend": backend, "ema": 0.5}
        how["weight_decay_mask"] = lambda path, array: array.ndim > 1
        opt = rule(groups, **how, weight_decay=0.4)
        for k in range(5):
            w, b, *more = made(1 + k)
            grads = [{"w": w, "b": b}, more[:2], more[2:]]
            opt.step(grads[: len(opt.groups)], clip_value=2.0)
            if k == 1:
                opt.groups[1].frozen = False
                group = {"params": params[4:], "lr": 0.7, "weight_decay": 0.1}
                opt.add_group(group)
            if k == 3:
                groups.append(group)
                groups[1].pop("frozen")
                saved, opt = opt.state_dict(), rule(groups, **how)
                opt.load_state_dict(saved)
        return opt, params

    return run


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "prodigy", "novograd"])
def test_groups(name):
    assert not unlike(run_groups(getattr(fastopt, name)))


@cases("sophia_g")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_estimate(rule, values, dtype):
    def run(backend, put):
        params = [put(p, i) for i, p in enumerate(drawn(0, (65, 7), dtype))]
        groups = [{"params": params[:1], "beta2": 0.5}, {"params": params[1:]}]
        opt = rule(groups, backend=backend, **values)
        for k in range(4):
            opt.step([[put(g)] for g in drawn(1 + k, (65, 7), dtype)])
            if k % 2 == 0:
                first, _ = drawn(10 + k, (65, 7), dtype)
                opt.estimate([[put(first)], [None]], grad_scale=0.3)
        return opt, params

    assert not unlike(run)


@cases(*(name for name, (rule, _) in BY_ID.items() if rule.evaluate is not None))
def test_parameters_to_use(rule, values):
    def run(backend, put):
        a, b = drawn(0, (65, 3))
        params = {"a": put(a.reshape(5, 13)), "b": [put(b, 1)]}
        opt = rule(params, backend=backend, **values)
        for k in range(2):
            a, b = drawn(1 + k, (65, 3))
            opt.step({"a": put(a.reshape(5, 13)), "b": [put(b)]})
        return opt, {"params": params, "used": opt.eval_params()}

    assert not unlike(run)


class Foreign:
    """An array of another library, such as CuPy: all that it shows is the interface."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    @property
    def __cuda_array_interface__(self):
        return {**self.array.__array_interface__, "version": 3, "stream": None}


def taken(foreign):
    """What the simulator lacks: numba's array of what an interface says."""
    memory = SimpleNamespace(__array_interface__=foreign.__cuda_array_interface__)
    return FakeCUDAArray(np.asarray(memory))


@in_simulator
def test_arrays_of_other_libraries(monkeypatch):
    """They are updated in place, by the backend that they call for."""
    monkeypatch.setattr(cuda, "as_cuda_array", taken, raising=False)
    rng = np.random.default_rng(0)
    start = {"w": nonzero(rng, 33, np.float32), "b": nonzero(rng, 7, np.float32)}
    cpu, gpu = ({name: array.copy() for name, array in start.items()} for _ in range(2))
    opt = fastopt.adamw({name: Foreign(array) for name, array in gpu.items()}, ema=0.9)
    reference = fastopt.adamw(cpu, ema=0.9, backend="numpy")
    assert opt.backend == "cuda"
    for _ in range(3):
        grads = {name: nonzero(rng, a.size, np.float32) for name, a in start.items()}
        reference.step(grads, clip_norm=0.5)
        opt.step({n: Foreign(g) for n, g in grads.items()}, clip_norm=0.5)
    for name, array in start.items():
        assert same_bits(gpu[name], cpu[name]) and not same_bits(cpu[name], array)
    cpu["w"].flags.writeable = False
    with pytest.raises(ValueError, match="params is read-only"):
        fastopt.adamw(Foreign(cpu["w"]))


def run_muon(**asked):
    def run(backend, put):
        shapes = {"wide": (5, 9), "tall": (9, 4), "b": (7,), "none": (0,)}

        def made(seed):
            flat = drawn(seed, map(math.prod, shapes.values()))
            pairs = zip(shapes.items(), flat, strict=True)
            return {name: put(a.reshape(shape)) for (name, shape), a in pairs}

        params = made(0)
        opt = fastopt.Muon(params, backend=backend, lr=0.1, adamw_lr=0.05)
        given = [made(1), {**made(2), "tall": None}, {**made(3), "b": None}]
        for grads in given:
            opt.step(grads, grad_scale=0.7, **asked)
        return opt, {"params": params, "grads": given}

    return run


def test_muon():
    for asked in ({}, BESIDE, {"nonfinite": "skip"}):
        assert not unlike(run_muon(**asked))


def test_what_is_refused_before_the_first_step_only():
    """Also if the host does not know yet that there was one."""
    param = on_device(np.ones(5, np.float32), 0)[0]
    opt = fastopt.sgd(param, backend="cuda")
    with pytest.raises(ValueError, match="needs momentum"):
        opt.nesterov = True
    grad = on_device(np.ones(5, np.float32), 0)[0]
    opt.step(grad, nonfinite="skip")
    opt.nesterov = True
    for _ in range(2):
        opt.step(grad, nonfinite="skip")
    assert opt.nesterov and opt.steps == 3


@pytest.mark.parametrize("name", ["sgd", "lamb", "prodigy"])
def test_lookahead_where_steps_are_skipped(name):
    """Those after which the slow weights would have moved, and others."""

    def run(backend, put):
        params = [put(p, i) for i, p in enumerate(drawn(0, (65, 7)))]
        inner = getattr(fastopt, name)(params, lr=0.1, backend=backend)
        opt = fastopt.Lookahead(inner, k=2, alpha=0.3)
        for k in range(7):
            grads = drawn(1 + k, (65, 7))
            if k in (1, 2, 4):
                grads[1][3] = math.nan
            opt.step(list(map(put, grads)), nonfinite="skip")
        return opt, params

    assert not unlike(run)


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_lookahead(name):
    def run(backend, put):
        params = [put(p, i) for i, p in enumerate(drawn(0, (65, 7)))]
        inner = getattr(fastopt, name)(params, lr=0.1, backend=backend, ema=0.5)
        opt = fastopt.Lookahead(inner, k=2, alpha=0.3)
        for k in range(5):
            *grads, last = map(put, drawn(1 + k, (65, 7, 33)))
            opt.step(grads if k < 3 else [grads, last], clip_norm=2.0)
            if k == 2:
                new = put(drawn(9, (33,))[0])
                opt.add_group({"params": new})
        return opt, [*params, new]

    assert not unlike(run)


# That these tests can fail


def test_swapped_scalars_are_noticed():
    rule, values = next(case for case in CASES if case[0].name == "adamw")

    @functools.wraps(rule.scalars)
    def swapped(t, lr, beta1, beta2, eps, weight_decay):
        return rule.scalars(t, lr, beta2, beta1, eps, weight_decay)

    mutant = Rule(rule.update, swapped, state=rule.state)
    assert differing(mutant, values, 64, np.float32, 0, reference=rule) == [0, 1, 2]


@in_simulator
@pytest.mark.parametrize("size", [size for size in SIZES if size % 4])
def test_a_skipped_tail_is_noticed(monkeypatch, size):
    update_of = cuda_kernels.update_of

    def without_tail(*of):
        if of[-1] == 1:  # the width
            return lambda *given: None
        return update_of(*of)

    monkeypatch.setattr(cuda_kernels, "update_of", without_tail)
    assert differing(*CASES[0], size, np.float32, 0, steps=1) == [0]


@in_simulator
def test_a_step_too_far_is_noticed(monkeypatch):
    update_of = cuda_kernels.update_of

    def one_further(*of):
        return update_of(*of[:-1], of[-1] + 1)

    assert not differing(*CASES[0], 64, np.float32, 0, steps=1)
    monkeypatch.setattr(cuda_kernels, "update_of", one_further)
    cuda_jobs.loaded.cache_clear()
    assert "outside" in differing(*CASES[0], 64, np.float32, 0, steps=1)


COMPILED = cuda_kernels.compiled


def rewritten(pattern, new):
    """What makes kernels' functions, of lines in which something is replaced."""

    def compiled(lines, names):
        return COMPILED([re.sub(pattern, new, line) for line in lines], names)

    return compiled


@in_simulator
def test_unequal_precision_is_noticed(monkeypatch):
    """As if a float32 kernel computed in float64."""
    in_double = rewritten(r"update\((.*)\)", r"update(*map(wide, (\1,)))")
    monkeypatch.setattr(cuda_kernels, "compiled", in_double)
    rule, values = next(case for case in CASES if case[0].name == "adamw")
    assert differing(rule, values, 64, np.float32, 0)


MUTANTS = {
    "clipping by other limits": (r"clip\((.*), .*, (.*)\)", r"clip(\1, \2, \2)"),
    "no clipping": (r"clip\((\w+), .*", r"(\1,)"),
    "no average": (r"average\((\w+), .*", r"(\1,)"),
    "an average by the old weight": (r"average\((\w+), (\w+)", r"average(\2, \1"),
    "no zeros": (r"store\(grad.*", "pass"),
}


@in_simulator
@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_wrong_beside_the_rule_is_noticed(monkeypatch, mutant):
    assert not unlike(run_beside(*BY_ID["adamw"]))
    monkeypatch.setattr(cuda_kernels, "compiled", rewritten(*MUTANTS[mutant]))
    cuda_jobs.loaded.cache_clear()
    assert unlike(run_beside(*BY_ID["adamw"]))


def one_by_one(x, term):
    """The lanes not by halves."""
    lane = cuda.threadIdx.x % 32
    cuda_accesses.SUMS[lane, term] = x
    total = 0.0
    for k in range(lane + 1):
        total += cuda_accesses.SUMS[k, term]
    return total


SUMS_MUTANTS = {
    "simulated_halves": one_by_one,
    "CHUNK": 2048,
    "compiled": rewritten(r"wide\((x\d)\)", r"wide(__import__('numpy').float32(\1))"),
}


@in_simulator
@pytest.mark.parametrize("mutant", SUMS_MUTANTS)
@pytest.mark.parametrize("name", ["lamb", "prodigy"])
def test_another_order_of_sums_is_noticed(monkeypatch, name, mutant):
    """And other chunks, and terms in float32."""
    for module in (cuda_kernels, cuda_accesses, cuda_settle, cuda_sums, cuda_table):
        if hasattr(module, mutant):
            monkeypatch.setattr(module, mutant, SUMS_MUTANTS[mutant])
    wrong = unlike(run_sums(*BY_ID[name], np.float64, (2500, 2800, 3000, 7)))
    assert {f"params['{of}, inf']" for of in ("rule", "gradients")} <= {*wrong}


@in_simulator
def test_rows_of_another_group_are_noticed(monkeypatch):
    bind = cuda_driver.bind

    def first_row(rule, segments, count, carry):
        return bind(rule, [s._replace(row=0) for s in segments], count, carry)

    monkeypatch.setattr(cuda_driver, "bind", first_row)
    for rule in (fastopt.adamw, fastopt.lamb):
        assert unlike(run_groups(rule))


@in_simulator
def test_sums_of_misplaced_arrays_are_noticed(monkeypatch):
    """As if a None gradient's array kept its place among the sums."""
    sums = cuda_driver.OnDevice.sums

    def shifted(self, *asked):
        found = sums(self, *asked)
        return [found[-1], *found[:-1]] if None in found else found

    monkeypatch.setattr(cuda_driver.OnDevice, "sums", shifted)
    assert unlike(run_beside(*BY_ID["lamb"]))


@in_simulator
def test_an_average_that_stands_still_is_noticed(monkeypatch):
    """Where there is no gradient."""
    assert not unlike(run_beside(*BY_ID["adamw"], sizes=(7, 5)))
    monkeypatch.setattr(cuda_kernels, "averaging", lambda *of: [])
    cuda_jobs.loaded.cache_clear()
    assert unlike(run_beside(*BY_ID["adamw"], sizes=(7, 5))) == ["ema[0]", "ema[1]"]


@pytest.mark.skipif(
    not cuda_kernels.SIMULATED, reason="arrays on a device are writeable"
)
def test_a_parameter_that_was_made_read_only_is_not_written():
    param, grad = cuda.to_device(np.ones(3)), cuda.to_device(np.ones(3))
    opt = fastopt.sgd(param, lr=0.25, backend="cuda")
    opt.step(grad)
    param._ary.setflags(write=False)
    with pytest.raises(ValueError, match="read-only now"):
        opt.step(grad)
    param._ary.setflags(write=True)
    opt.step(grad)
    np.testing.assert_array_equal(param.copy_to_host(), np.full(3, 0.5))
    assert opt.steps == 2
