"""Checkpoints that earlier versions saved are loaded, and runs go on from them with the
bits of those versions.

``checkpoints.json`` holds, for each case, the file that a version saved after 3 steps,
in base64, and a hash of everything after 5. Run as a program, with ``tests/support`` in
PYTHONPATH, this file adds the cases that are missing. What is there stays.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import bfloat16

import fastopt

FILE = Path(__file__).with_name("checkpoints.json")
SMALL = {"b": (5,), "w": (2, 3), "none": (0,)}
LARGE = {"w": (65, 64), "b": (3,)}
FLAT = {"w": (130,), "b": (6,)}
SAVED, TOTAL = 3, 5  # steps


def numbers(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Make numbers between -1.6 and 1.6, without a generator, which might change."""
    k = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return ((((k + 1) * 7919 + seed * 104729) % 1009 - 504) / 315).astype(dtype)


class Run:
    """Steps of an optimizer over a dict of arrays, or what ``arrange`` makes of it."""

    def __init__(
        self,
        make: Any,
        shapes: Any = SMALL,
        dtype: Any = np.float32,
        arrange: Any = dict,
    ):
        self.shapes, self.dtype, self.arrange = shapes, dtype, arrange
        self.params = self.arrays(0)
        self.opt = make(self.params)

    def arrays(self, seed: int) -> Any:
        return self.arrange(
            {
                name: numbers(seed + i, shape, self.dtype)
                for i, (name, shape) in enumerate(self.shapes.items())
            }
        )

    def grads(self, step: int) -> Any:
        return self.arrays(10 + 10 * step)

    def step(self, step: int) -> None:
        self.opt.step(self.grads(step))

    def save(self, folder: Path) -> list[bytes]:
        self.opt.save(folder / "file", params=True)
        return [(folder / "file").read_bytes()]

    def load(self, paths: list[Path]) -> None:
        self.opt.load(*paths)

    def digest(self) -> str:
        """A hash of the parameters."""
        found = hashlib.sha256()
        for array in self.opt._params.arrays:
            found.update(array.tobytes())
        return found.hexdigest()


class Accumulating(Run):
    """Saved when half of the next step is there, and after a step that was skipped."""

    def step(self, step: int) -> None:
        if step:
            self.opt.step()
        self.opt.step(self.arrange_nan(step), nonfinite="skip")
        self.opt.accumulate(self.grads(step))

    def arrange_nan(self, step: int) -> Any:
        grads = self.grads(step)
        grads["b"][0] = np.nan
        return grads


class Grouped(Run):
    def grads(self, step: int) -> Any:
        return [group["params"] for group in self.arrays(10 + 10 * step)]


class Sharded(Run):
    """Saved by two ranks, and loaded by one that has everything."""

    cuts = {"w": (0, 64, 130), "b": (0, 1, 6)}

    def save(self, folder: Path) -> list[bytes]:
        files = []
        for rank in range(2):
            ends = {name: self.cuts[name][rank : rank + 2] for name in self.shapes}
            params = {n: a[slice(*ends[n])].copy() for n, a in self.arrays(0).items()}
            opt = fastopt.adamw(params, lr=0.125, ema=0.75)
            for k in range(SAVED):
                grads = self.grads(k)
                opt.step({name: grads[name][slice(*ends[name])] for name in grads})
            shard = {n: (ends[n][0], shape[0]) for n, shape in self.shapes.items()}
            opt.save(folder / f"{rank}", params=True, shard=shard)
            files.append((folder / f"{rank}").read_bytes())
        return files

    def load(self, paths: list[Path]) -> None:
        self.opt.load(paths)


def groups(arrays: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    b, w, none = arrays.values()
    return [{"params": [b, none], "lr": 0.25}, {"params": w, "frozen": True}]


def adamw(**given: Any) -> Any:
    return functools.partial(fastopt.adamw, lr=0.125, **given)


RUNS = {
    "adamw": lambda: Run(adamw()),
    "float64": lambda: Run(adamw(), dtype=np.float64),
    "sgd without state": lambda: Run(functools.partial(fastopt.sgd, lr=0.125)),
    "nesterov": lambda: Run(
        functools.partial(fastopt.sgd, lr=0.125, momentum=0.75, nesterov=True)
    ),
    "average": lambda: Run(adamw(ema=0.75)),
    "accumulated": lambda: Accumulating(adamw()),
    "groups": lambda: Grouped(fastopt.lamb, arrange=groups),
    "flat": lambda: Run(adamw(), arrange=fastopt.flatten),
    "prodigy": lambda: Run(fastopt.prodigy),
    "Muon": lambda: Run(functools.partial(fastopt.Muon, lr=0.125)),
    "Adafactor": lambda: Run(functools.partial(fastopt.Adafactor, lr=0.125)),
    "Lookahead": lambda: Run(lambda p: fastopt.Lookahead(adamw()(p), k=2, alpha=0.25)),
    "8bit": lambda: Run(adamw(formats="8bit"), LARGE),
    "remainders": lambda: Run(
        adamw(formats={"param": "bf16+r8", "m": "bf16", "v": "fp16"}, seed=7),
        LARGE,
        bfloat16,
    ),
    "two ranks": lambda: Sharded(adamw(ema=0.75), FLAT),
}


def write() -> None:
    """Add the cases that are not there yet, as this version saves them."""
    cases = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, new in RUNS.items():
        if name in cases:
            continue
        run = new()
        for k in range(SAVED):
            run.step(k)
        with tempfile.TemporaryDirectory() as folder:
            files = run.save(Path(folder))
        for k in range(SAVED, TOTAL):
            run.step(k)
        cases[name] = {
            "files": [base64.b64encode(data).decode() for data in files],
            "after": run.digest(),
        }
    lines = [f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_an_earlier_version_goes_on(name, tmp_path):
    case = json.loads(FILE.read_text())[name]
    paths = []
    for number, data in enumerate(case["files"]):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(base64.b64decode(data))
    run = RUNS[name]()
    for array in run.opt._params.arrays:
        array[...] = 0
    run.load(paths)
    for k in range(SAVED, TOTAL):
        run.step(k)
    assert run.digest() == case["after"]


if __name__ == "__main__":
    write()
