"""The CUDA backend against the reference, bit for bit: run by test_cuda.py in a process
of its own, in numba's simulator or on a GPU if there is one."""

from __future__ import annotations

import functools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from cases import CASES, DTYPES, IDS, closure_rule, nonzero, same_bits, special_values
from numba import cuda
from numba.cuda.simulator import kernel as simulator
from numba.cuda.simulator import kernelapi
from numba.cuda.simulator.kernel import BlockThread

import fastopt
from fastopt import factored, numba_cuda
from fastopt.rule import Rule, copysign, maximum, minimum, sign, sqrt, where

SIZES = (0, 1, 7, 63, 64, 65, 4097)
OFFSETS = (0, 1)  # elements from a 16-byte boundary
HALF, TWO = 0.5, 2

in_simulator = pytest.mark.skipif(
    not numba_cuda.SIMULATED, reason="the mutant is of the simulator's part"
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


USERS_CLOSURE = closure_rule()
EVERY = pytest.mark.parametrize(
    ("rule", "values"),
    [*CASES, *((rule, {"lr": 0.07}) for rule in (USERS, USERS_CLOSURE))],
    ids=[*IDS, "users", "closure"],
)


class AtOnce(BlockThread):
    """A simulated thread that is not one: ours never wait for each other, and starting
    threads would be nearly all of the work."""

    def start(self):
        kernelapi.threading = SimpleNamespace(current_thread=lambda: self)
        self.run()

    def is_alive(self):
        return False


@pytest.fixture(autouse=True)
def quick_simulator(monkeypatch):
    if numba_cuda.SIMULATED:
        monkeypatch.setattr(numba_cuda, "BLOCK", 32)  # few idle threads
        monkeypatch.setattr(simulator, "BlockThread", AtOnce)
        monkeypatch.setattr(kernelapi, "threading", threading)  # and put it back
    for cached in (numba_cuda.launcher, numba_cuda.plain_launcher):
        cached.cache_clear()
    yield
    for cached in (numba_cuda.launcher, numba_cuda.plain_launcher):
        cached.cache_clear()


def on_device(values, offset):
    """A device array that starts ``offset`` elements into its allocation."""
    room = np.full(values.size + offset + 1, 7, values.dtype)
    room[offset : offset + values.size] = values.reshape(-1)
    whole = cuda.to_device(room)
    assert numba_cuda.address(whole) % 16 == 0
    return whole[offset : offset + values.size].reshape(values.shape), whole


def differing(rule, values, size, dtype, offset, steps=10, reference=None):
    """What differs after some steps: buffers by position, and writes outside them."""
    rng = np.random.default_rng(size)
    shape = (size // 7, 7) if size % 7 == 0 else (size,)
    start = nonzero(rng, size, dtype).reshape(shape)
    expected = start.copy()
    got, whole = on_device(expected, offset)
    cpu = (reference or rule)(expected, backend="numpy", **values)
    gpu = rule(got, backend="cuda", **values)
    for _ in range(steps):
        grad = nonzero(rng, size, dtype).reshape(shape)
        cpu.step(grad, grad_scale=0.5)
        gpu.step(on_device(grad, offset)[0], grad_scale=0.5)
    room = whole.copy_to_host()
    pairs = [(expected, got.copy_to_host())]
    for ours, theirs in zip(cpu.state.values(), gpu.state.values(), strict=True):
        pairs.append((ours[0], theirs[0].copy_to_host()))
    wrong = [i for i, (a, b) in enumerate(pairs) if not same_bits(a, b)]
    outside = np.delete(room, range(offset, offset + size))
    assert cpu.steps == gpu.steps == steps
    assert size == 0 or not np.array_equal(expected, start)
    return wrong + ["outside"] * (not np.all(outside == 7))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(rule, values, dtype):
    for size in SIZES:
        for offset in OFFSETS:
            assert not differing(rule, values, size, dtype, offset), (size, offset)


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
    if numba_cuda.SIMULATED:
        for module in (factored, numba_cuda):
            monkeypatch.setattr(module, "TILE_ROWS", 16)
            monkeypatch.setattr(module, "TILE_COLUMNS", 64)
        monkeypatch.setattr(numba_cuda, "ROOM", numba_cuda.CHUNK)
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


def test_several_parameters_and_none():
    """Groups, odd sizes whose state shares one allocation, and a skipped gradient."""
    rng = np.random.default_rng(0)
    host = [nonzero(rng, n, np.float32) for n in (5, 0, 130, 3)]
    device = [cuda.to_device(a) for a in host]
    opts = [
        fastopt.adamw([{"params": a[:2]}, {"params": a[2:], "lr": 0.1}], backend=b)
        for a, b in ((host, "numpy"), (device, "cuda"))
    ]
    for _ in range(3):
        grads = [nonzero(rng, a.size, np.float32) for a in host]
        opts[0].step([grads[:2], [grads[2], None]])
        copies = [cuda.to_device(g) for g in grads]
        opts[1].step([copies[:2], [copies[2], None]])
    for a, b in zip(host, device, strict=True):
        assert same_bits(a, b.copy_to_host())
    for arrays in opts[1].state.values():
        assert all(numba_cuda.address(a) % 16 == 0 for a in arrays)


def test_state_starts_at_zero():
    params = [cuda.to_device(np.ones(size, np.float32)) for size in (3, 0, 70)]
    for streams in numba_cuda.state_arena(params, 2):
        assert len(streams) == 2
        assert not any(np.any(s.copy_to_host()) for s in streams)


def test_an_error_leaves_the_parameters_alone(monkeypatch):
    """The first segment must not be updated when the second has no kernel."""

    def only_aligned(blocks, make, update, states, dtype, width, beside):
        if width == 1:
            raise RuntimeError("no kernel")
        return launcher(blocks, make, update, states, dtype, width, beside)

    launcher = numba_cuda.launcher
    monkeypatch.setattr(numba_cuda, "launcher", only_aligned)
    ones = np.ones(9, np.float32)
    params = [on_device(ones, 0)[0], on_device(ones, 1)[0]]
    opt = fastopt.sgd(params, lr=0.5)
    with pytest.raises(RuntimeError, match="no kernel"):
        opt.step([cuda.to_device(ones), cuda.to_device(ones)])
    assert opt.steps == 0
    assert all(np.all(p.copy_to_host() == 1) for p in params)
    monkeypatch.undo()


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
    vector_update = numba_cuda.vector_update

    def without_tail(of, beside, dtype, width):
        if width == 1:
            return lambda i, grad, buffers, scalars: None
        return vector_update(of, beside, dtype, width)

    monkeypatch.setattr(numba_cuda, "vector_update", without_tail)
    assert differing(*CASES[0], size, np.float32, 0, steps=1) == [0]


@in_simulator
def test_a_step_too_far_is_noticed(monkeypatch):
    vector_update = numba_cuda.vector_update

    def one_further(of, beside, dtype, width):
        return vector_update(of, beside, dtype, width + 1)

    monkeypatch.setattr(numba_cuda, "vector_update", one_further)
    with pytest.raises(IndexError):
        differing(*CASES[0], 64, np.float32, 0, steps=1)


@in_simulator
def test_unequal_precision_is_noticed(monkeypatch):
    """As if a float32 kernel computed in float64."""
    vector_update = numba_cuda.vector_update

    def in_double(of, beside, dtype, width):
        def wide(*args):
            return of.update(*map(np.float64, args))

        return vector_update(of._replace(update=wide), beside, dtype, width)

    monkeypatch.setattr(numba_cuda, "vector_update", in_double)
    rule, values = next(case for case in CASES if case[0].name == "adamw")
    assert differing(rule, values, 64, np.float32, 0)
