"""Steps under modes of arithmetic that a caller has chosen; run as a program, by
test_arithmetic.py, it prints the bits of each. The data are made before.

    python tests/support/modes.py MODE WHERE BACKEND...

WHERE is "main": OpenMP's threads were started before the modes were set, and keep the
usual ones; or "everywhere": they are started after that, and inherit them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import sys
from contextlib import contextmanager

import numpy as np

import fastopt
from fastopt.backends import cython_cpu, numba_cpu
from fastopt.rule import Rule, sqrt

SIZE = 40_001  # more than the least for which a second thread is used
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")
FLUSH = 0x8040 if X86 else 1 << 24  # to zero, numbers that are read and results
ROUND = {"down": 1, "up": 2, "zero": 3}
MODES = ("flush", *ROUND)
C = ctypes.CDLL(None)


def word(mode):
    """The control word for a mode."""
    standard = 0x1F80 if X86 else 0
    if mode == "usual":
        return standard
    if mode == "flush":
        return standard | FLUSH
    # On x86 the bits are 1 for down and 2 for up; on ARM the other way round.
    bits = ROUND[mode] if X86 or mode == "zero" else 3 - ROUND[mode]
    return standard | bits << (13 if X86 else 22)


@contextmanager
def modes(mode):
    from fastopt import _process

    before = _process.control()
    _process.set_control(word(mode))
    try:
        yield
    finally:
        _process.set_control(before)


def in_force():
    """The modes of this thread, without the flags of exceptions."""
    from fastopt import _process

    now = _process.control()
    return now & 0xFFC0 if X86 else now


MADE = {}


def values(seed, dtype, size=SIZE):
    """Numbers of all magnitudes below 1, many of them too small to be normal; made when
    they are first asked for."""
    key = seed, np.dtype(dtype).name, size
    if key not in MADE:
        MADE[key] = made(seed, dtype, size)
    return MADE[key].copy()


def made(seed, dtype, size):
    rng = np.random.default_rng(seed)
    least = -149 if dtype == np.float32 else -1074
    exponents = np.where(
        rng.random(size) < 0.5,
        rng.uniform(least, least + 30, size),
        rng.uniform(least / 4, 0, size),
    )
    signs = rng.choice([-1.0, 1.0], size)
    return (signs * np.ldexp(1 + rng.random(size), exponents.astype(int))).astype(dtype)


def update(p, g, v, lr, a, eps):
    v = v + a * (g * g - v)
    return p - lr * g / (sqrt(v) + eps), v


def scalars(t, lr=0.1, beta=0.9, eps=1e-30):
    return lr / (1 - beta**t), 1 - beta, eps


USERS = Rule(update, scalars, state=("v",), name="users")
OPTIONS = {
    "plain": {},
    "clip_norm": {"clip_norm": 0.3},
    "clip_value": {"clip_value": 1e-3, "zero_grads": True},
    "nonfinite": {"nonfinite": "skip", "grad_scale": 1 / 3},
}


def jobs(backend):
    """By name: the function that makes an optimizer, of parameters, and options."""
    found = {}

    def add(name, make, asked="plain", **how):
        found[name] = make, asked, how

    def of(rule, **given):
        given = {"lr": 0.013, **given} if "lr" in rule.hyperparameters else given
        return lambda params, threads: rule(
            params, backend=backend, threads=threads, **given
        )

    if backend == "numba":
        add("users", of(USERS))
        add("adamw", of(fastopt.adamw))
        add("lamb", of(fastopt.lamb))
        return found
    for rule in fastopt.RULES:
        add(rule.name, of(rule))
    for asked in OPTIONS:
        add(f"adamw {asked}", of(fastopt.adamw, ema=0.9, eps=1e-30), asked)
    add("adamw tiny", of(fastopt.adamw, weight_decay=1e-300, eps=1e-310))
    add("adamw schedule", of(fastopt.adamw, lr=lambda t: 0.1 / (3 + t)))
    add("adamw tasks", of(fastopt.adamw), tasks=True)
    add("adamw accumulated", of(fastopt.adamw), parts=True)
    add("sophia estimate", of(fastopt.sophia_g), estimate=True)
    add("prodigy clipped", of(fastopt.prodigy), "clip_value")
    add("lamb clipped", of(fastopt.lamb), "clip_value")
    for name, made in (("adafactor", fastopt.Adafactor), ("muon", fastopt.Muon)):
        add(
            name,
            lambda params, threads, made=made: made(
                params, lr=0.013, threads=threads, backend=backend
            ),
            shape=(-1, 3),
        )
    add(
        "lookahead",
        lambda params, threads: fastopt.Lookahead(
            fastopt.adam(params, lr=0.013, threads=threads, backend=backend), k=2
        ),
    )
    return found


def steps(
    make, asked, dtype, threads, shape=None, tasks=False, parts=False, estimate=False
):
    """The bits of parameters and state after two steps, done in these modes."""
    shape = shape or (-1,)
    size = SIZE // 3 * 3
    p, *grads = (values(seed, dtype, size).reshape(shape) for seed in range(3))
    opt = make({"a": p, "b": values(9, dtype, 7)}, threads)
    others = [values(10 + seed, dtype, 7) for seed in range(2)]
    before = in_force()
    for g, other in zip(grads, others, strict=True):
        given = {"a": g, "b": other}
        if estimate:
            opt.estimate(given)
        if tasks:
            again = {"a": grads[0], "b": others[0]}
            opt.step([given, again], weights=[0.3, 0.7], **OPTIONS[asked])
        elif parts:
            opt.accumulate(given, grad_scale=1 / 3)
            opt.accumulate(given, grad_scale=2 / 3)
            opt.step(**OPTIONS[asked])
        else:
            opt.step(given, **OPTIONS[asked])
        assert in_force() == before, "the caller's modes were changed"
    evaluated = opt.eval_params()
    assert in_force() == before, "the caller's modes were changed"
    state = [array for name in opt.state for array in opt.state[name]]
    average = [] if opt.ema_params is None else list(opt.ema_params.values())
    bits = [p, evaluated["a"], evaluated["b"], *state, *average, *grads]
    return hashlib.sha256(b"".join(array.tobytes() for array in bits)).hexdigest()


def alone(dtype, threads):
    """The same of Numba's own driver, which works where the compiled one is missing."""
    from fastopt.memory.segments import Segment
    from fastopt.step import Request

    p, g, v = (values(seed, dtype) for seed in range(3))
    v = np.abs(v)
    count, carry = np.zeros(1, np.int64), np.zeros((2, 1, 0))
    step = numba_cpu.bind_alone(USERS, [Segment(p, (v,), 0)], count, carry)
    before = in_force()
    for _ in range(2):
        step.take([g])
        step([(0.7, 0.1, 0.2, 1e-30)], Request(threads=threads))
        assert in_force() == before, "the caller's modes were changed"
    return hashlib.sha256(p.tobytes() + v.tobytes()).hexdigest()


def njit_steps(dtype):
    """Of native code: a step called from Numba's."""
    import numba

    from fastopt import native, njit

    @numba.njit
    def run(p, g, m, v, given):
        for t in range(1, 3):
            njit.step("adamw", t, p, g, (m, v), given, None, 1 / 3, 2)

    p, g = values(0, dtype), values(1, dtype)
    given = native.hyperparameters(fastopt.adamw, lr=0.013, eps=1e-30)
    m, v = np.zeros_like(p), np.zeros_like(p)
    run(
        np.ones(3, dtype),
        np.ones(3, dtype),
        np.ones(3, dtype),
        np.ones(3, dtype),
        given,
    )
    return lambda: run(p, g, m, v, given), lambda: p.tobytes() + m.tobytes()


def everything(mode, where, backends):
    """All bits, by backend, job, dtype and threads."""
    if where == "main":  # the pool is started now
        opt = fastopt.adamw(np.ones(SIZE, np.float32), threads=2)
        opt.step(np.ones(SIZE, np.float32))
    kinds, compiled, found = (np.float32, np.float64), {}, {}
    for dtype in kinds:  # data and Numba's code are made in the usual modes
        for size in (7, SIZE // 3 * 3, SIZE):
            for seed in range(12):
                values(seed, dtype, size)
        if "alone" in backends:
            alone(dtype, 1)
        if "njit" in backends:
            compiled[dtype] = njit_steps(dtype)
    with modes(mode):
        for dtype in kinds:
            name = np.dtype(dtype).name
            for threads in (1, 2) if "alone" in backends else ():
                found[f"alone {name} {threads}"] = alone(dtype, threads)
            if dtype in compiled:
                run, bits = compiled[dtype]
                before = in_force()
                run()
                assert in_force() == before, "the caller's modes were changed"
                found[f"njit {name}"] = hashlib.sha256(bits()).hexdigest()
            for backend in {*backends} - {"alone", "njit"}:
                for job, (make, asked, how) in jobs(backend).items():
                    for threads in (1, 2) if backend != "numpy" else (1,):
                        key = f"{backend} {job} {name} {threads}"
                        found[key] = steps(make, asked, dtype, threads, **how)
    return found


if __name__ == "__main__":
    assert cython_cpu.missing() is None
    _, mode, where, *backends = sys.argv
    print(json.dumps(everything(mode, where, backends)))
