"""The promise across machines: every processor and every compiler, the same bits.

``platform_bits.json`` holds, for each rule and each way to store its numbers, a hash of
what steps leave: parameters, state, averages, gradients, and carried numbers. NumPy
made it on x86-64, so a platform that passes has the bits of x86-64. All NaN count as
one, because processors differ in their signs and payloads.

Run as a program, with ``tests/support`` in PYTHONPATH, this file writes the hashes
anew. The only reason for that is a rule whose formula has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, IDS, bfloat16, odd_view, special_values

import fastopt
from fastopt import Rule
from fastopt.backends import cython_cpu

FILE = Path(__file__).parent / "platform_bits.json"
SIZES = (4099, 65, 1, 0)  # from 4,096 elements on, state may be of fewer bits
LARGE = 40_003  # elements that threads share
PLAIN, BESIDE = 3, 2  # steps

# The dtypes of parameters and of gradients, and ``formats``.
Kind = tuple[type, type, Any]
KINDS: dict[str, Kind] = {
    "float32": (np.float32, np.float32, None),
    "float64": (np.float64, np.float64, None),
    "bf16": (bfloat16, bfloat16, None),
    "fp16": (np.float16, np.float16, None),
    "bf16 gradients": (np.float32, bfloat16, None),
    "8bit": (np.float32, np.float32, "8bit"),
    "bf16 state": (bfloat16, bfloat16, "bf16"),
    "fp16 state": (np.float32, np.float16, "fp16"),
    "bf16+r8": (bfloat16, bfloat16, {"param": "bf16+r8"}),
    "bf16+r16": (bfloat16, bfloat16, {"param": "bf16+r16"}),
}


def numbers(seed: int, size: int, dtype: type) -> np.ndarray:
    """Make numbers without a generator, which might change, and without a function
    that might be rounded otherwise elsewhere: of both signs and of magnitudes from
    2**-8 to 2, some of them zero or too small to be normal."""
    word = np.arange(1, size + 1, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    word ^= word >> np.uint64(31)
    least = {np.float64: -1060, np.float16: -20}.get(dtype, -140)
    exponent = -(word & np.uint64(7)).astype(np.int32)
    exponent[60::61] = least
    made = np.ldexp(1 + (word >> np.uint64(11)).astype(np.float64) / 2**53, exponent)
    made[66::67] = 0
    return np.where(word & np.uint64(8), -made, made).astype(dtype)


class Digest:
    """A hash of arrays and numbers, in which every NaN is the same."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def add(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        if array.dtype.kind in "fV":  # ml_dtypes' are of kind V
            nan = np.isnan(array)
            array = np.where(nan, np.ones((), array.dtype), array)
            self.hash.update(nan.tobytes())
        self.hash.update(array.tobytes())

    def add_optimizer(self, opt: Any) -> None:
        for entries in opt.state.values():
            for entry in entries:
                for array in entry if isinstance(entry, tuple) else (entry,):
                    self.add(array)
        for array in opt.ema_params or ():
            self.add(array)
        self.add(np.asarray(opt.state_dict()["carry"], np.float64))

    def __str__(self) -> str:
        return self.hash.hexdigest()[:16]


def placed(seed: int, dtype: type) -> list[np.ndarray]:
    """Arrays of all sizes; those after the first do not begin where a vector would."""
    return [odd_view(numbers(seed + k, size, dtype), k) for k, size in enumerate(SIZES)]


def steps(rule: Any, values: dict, kind: Kind, backend: str) -> str:
    """Plain steps, and steps with everything else that a step does."""
    dtype, of_grads, formats = kind
    digest = Digest()
    for beside in (False, True):
        params = placed(10, dtype)
        more = {"formats": formats} if formats else {}
        if beside:
            more["ema"] = 0.9
        opt = rule(params, backend=backend, **more, **values)
        for step in range(BESIDE if beside else PLAIN):
            grads: list[Any] = placed(100 * (step + 1), of_grads)
            if not beside:
                opt.step(grads, grad_scale=0.7)
            elif step == 0:
                opt.step(grads, clip_norm=3.0, clip_value=0.05, zero_grads=True)
            else:
                tasks = [grads, placed(500, of_grads)]
                tasks[1][1] = None
                opt.step(tasks, weights=[0.3, -0.8], grad_scale=0.7)
            for array in grads:
                digest.add(array)
        for array in params:
            digest.add(array)
            assert np.all(np.isfinite(array.astype(np.float64)))
        digest.add_optimizer(opt)
    return str(digest)


def special(rule: Any, values: dict, dtype: type, backend: str) -> str:
    """Steps over infinities, NaN, zeros of both signs, subnormals and extremes."""
    digest = Digest()
    param, grad = special_values(dtype)
    opt = rule(param, backend=backend, **values)
    with np.errstate(all="ignore"):
        for scale in (1, -0.5, 1):
            opt.step(grad * dtype(scale))
    digest.add(param)
    digest.add_optimizer(opt)
    return str(digest)


def large(rule: Any, values: dict, dtype: type, backend: str) -> str:
    digest = Digest()
    param = numbers(0, LARGE, dtype)
    threads = 1 if backend == "numpy" else 3
    opt = rule(param, backend=backend, threads=threads, **values)
    for step in range(3):
        opt.step(numbers(1 + step, LARGE, dtype))
    digest.add(param)
    digest.add_optimizer(opt)
    return str(digest)


def hashes(rule: Any, values: dict, backend: str) -> Iterator[tuple[str, str]]:
    """Yield what is hashed, and the hash."""
    for name, kind in KINDS.items():
        if kind[2] is not None and refuses(rule, values, kind):
            continue
        yield name, steps(rule, values, kind, backend)
    for dtype in (np.float32, np.float64):
        name = np.dtype(dtype).name
        yield f"special {name}", special(rule, values, dtype, backend)
        yield f"large {name}", large(rule, values, dtype, backend)


def refuses(rule: Any, values: dict, kind: Kind) -> bool:
    """Whether a rule has no buffers for these formats."""
    try:
        rule(placed(0, kind[0]), formats=kind[2], backend="numpy", **values)
    except (TypeError, ValueError):
        return True
    return False


def factored(backend: str) -> str:
    """Steps with state of rows and columns, of several matrices in one array, too."""
    digest = Digest()
    shapes = (133, 77), (3, 40, 100), (70, 1), (5,), (0, 3)
    sizes = [int(np.prod(shape)) for shape in shapes]
    for dtype, of_grads in ((np.float32, bfloat16), (np.float64, np.float64)):
        params, *given = (
            [
                numbers(9 * k + i, size, kind).reshape(shapes[i])
                for i, size in enumerate(sizes)
            ]
            for k, kind in enumerate((dtype, of_grads, of_grads, of_grads))
        )
        opt = fastopt.Adafactor(params, backend=backend)
        for grads in given:
            opt.step(grads, clip_value=1.0)
        for array in params:
            digest.add(array)
        digest.add_optimizer(opt)
    return str(digest)


def gram(backend: str) -> str:
    """The products of gradients of several tasks."""
    digest = Digest()
    for dtype in (np.float32, np.float64):
        for size in (*SIZES, LARGE):
            tasks = [[numbers(k, size, dtype)] for k in range(5)]
            digest.add(fastopt.gram(tasks, backend=backend))
    return str(digest)


def of_rule(rule: Rule, values: dict) -> Callable[[str], dict[str, str]]:
    return lambda backend: dict(hashes(rule, values, backend))


# Functions of a backend that return hashes by what they are of.
RUNS: dict[str, Callable[[str], dict[str, str]]] = {
    **{name: of_rule(*case) for name, case in zip(IDS, CASES, strict=True)},
    "Adafactor": lambda backend: {"steps": factored(backend)},
    "gram": lambda backend: {"products": gram(backend)},
}


def backends() -> Iterator[tuple[str, str]]:
    """Yield each backend, with each instruction set of this processor. Numba's are
    compared with NumPy's in test_bits.py."""
    yield "numpy", ""
    if cython_cpu.missing() is None:
        for isa in cython_cpu.driver().cpu_supports():
            yield "cython", isa


def write() -> None:
    lines = []
    for name, run in RUNS.items():
        lines.append(f"{json.dumps(name)}: {json.dumps(run('numpy'))}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.fixture(scope="module")
def expected():
    return json.loads(FILE.read_text())


@pytest.mark.parametrize(("backend", "isa"), [*backends()])
@pytest.mark.parametrize("name", RUNS)
def test_bits_of_every_platform(expected, name, backend, isa, monkeypatch):
    if name not in expected:
        pytest.skip("it is newer than the file")
    if isa:
        monkeypatch.setattr(cython_cpu, "kernels", lambda: cython_cpu.extension(isa))
    assert RUNS[name](backend) == expected[name]


def test_a_changed_bit_is_seen(monkeypatch):
    """Of a parameter, of state and of a zero's sign; but not of a NaN."""

    def digest(*given: float) -> str:
        made = Digest()
        made.add(np.array(given, np.float32))
        return str(made)

    assert digest(1.0) != digest(float(np.nextafter(np.float32(1), np.float32(2))))
    assert digest(0.0) != digest(-0.0)
    assert digest(np.nan) == digest(-np.nan) != digest(1.0)


if __name__ == "__main__":
    write()
