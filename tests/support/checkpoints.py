"""Runs that are saved: optimizers with all that their state may have, over arrays of
odd sizes, with gradients that any process can draw again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import CASES, IDS, bfloat16, nonzero

import fastopt
from fastopt.memory.flat import expanded
from fastopt.memory.trees import leaves

SHAPES = {"w": (3, 5), "b": (7,), "none": (0,), "one": (1,), "scalar": ()}
LARGE = {"w": (65, 64), "b": (4099,), "small": (5,)}  # enough for formats


def draw(seed: int, shapes: dict[str, tuple[int, ...]], dtype: Any) -> dict[str, Any]:
    """Random arrays, without zeros."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(rng.normal(size=shape) + 1e-3, dtype)
        for name, shape in shapes.items()
    }


class Run:
    """Steps of an optimizer that ``make`` makes, over parameters that ``arrange`` puts
    into a structure."""

    def __init__(
        self,
        make: Callable[[Any], Any],
        arrange: Callable[[dict[str, Any]], Any] = dict,
        shapes: dict[str, tuple[int, ...]] = SHAPES,
        dtype: Any = np.float32,
        accumulates: bool = False,
    ):
        self.arrange, self.shapes, self.dtype = arrange, shapes, dtype
        self.accumulates, self.next = accumulates, 0
        arranged = arrange(draw(1000, shapes, dtype))
        self.opt = make(arranged)
        self.trees = self.opt._params.trees

    def grads(self, seed: int) -> Any:
        arranged = self.arrange(draw(seed, self.shapes, self.dtype))
        if len(self.trees) > 1:
            return [group["params"] for group in arranged]
        return arranged

    def go_on(self, steps: int) -> None:
        """Do some steps more. One is skipped, and one gradient is accumulated, if this
        run does so, and left for the next step."""
        for seed in range(self.next, self.next + steps):
            if self.opt._pending is not None:
                self.opt.step()
            else:
                self.opt.step(self.grads(seed), grad_scale=0.5)
            if seed == 1:
                grads = self.grads(seed)
                of_all = (a for _, a in leaves(list(map(expanded, [grads]))))
                next(a for a in of_all if a.size)[...] = np.nan
                self.opt.step(grads, nonfinite="skip")
            if self.accumulates:
                self.opt.accumulate(self.grads(seed + 500))
        self.next += steps

    @property
    def params(self) -> list[np.ndarray]:
        return self.opt._params.arrays

    def take_params(self, other: Run) -> None:
        for ours, theirs in zip(self.params, other.params, strict=True):
            ours[...] = theirs
        self.next = other.next

    def everything(self) -> Any:
        """A copy of all that a run has."""
        return everything(self.opt)


def groups(arrays: dict[str, Any]) -> list[dict[str, Any]]:
    first, *others = arrays.values()
    return [
        {"params": [first]},
        {"params": others[:1], "frozen": True},
        {"params": tuple(others[1:]), "lr": 0.02},
    ]


def flat(arrays: dict[str, Any]) -> fastopt.FlatBuffer:
    return fastopt.flatten(arrays)


def nested(arrays: dict[str, Any]) -> Any:
    first, *others = arrays.values()
    return {"deep": [first, {"é\n'": others}]}


def as_list(arrays: dict[str, Any]) -> list[Any]:
    return list(arrays.values())


def first_alone(arrays: dict[str, Any]) -> Any:
    return next(iter(arrays.values()))


def schedule(steps: int) -> float:
    return 0.1 / (1 + steps)


def lookahead(params: Any) -> Any:
    return fastopt.Lookahead(fastopt.adamw(params, lr=0.07), k=2, alpha=0.3)


def new(rule: Any, **given: Any) -> Callable[[Any], Any]:
    return functools.partial(rule, **given)


adamw = new(fastopt.adamw, lr=0.07, beta1=0.8)
ARRANGED = {
    "groups": groups,
    "flat": flat,
    "nested": nested,
    "list": as_list,
    "array": first_alone,
}
# What makes a new run, by name.
RUNS: dict[str, Callable[[], Run]] = {
    **{
        name: functools.partial(Run, new(rule, **values))
        for name, (rule, values) in zip(IDS, CASES, strict=True)
    },
    **{
        f"adamw {name}": functools.partial(Run, adamw, arrange)
        for name, arrange in ARRANGED.items()
    },
    "prodigy flat": functools.partial(Run, fastopt.prodigy, flat),
    "lamb groups": functools.partial(Run, fastopt.lamb, groups),
    "float64": functools.partial(Run, adamw, dtype=np.float64),
    "bfloat16": functools.partial(Run, adamw, dtype=bfloat16),
    "float16": functools.partial(Run, adamw, dtype=np.float16),
    "ema": functools.partial(Run, new(fastopt.nadam, lr=0.07, ema=0.9)),
    "accumulated": functools.partial(Run, adamw, accumulates=True),
    "accumulated flat": functools.partial(
        Run, new(fastopt.adamw, ema=0.8), flat, dtype=np.float64, accumulates=True
    ),
    "schedule": functools.partial(Run, new(fastopt.adamw, lr=schedule)),
    "mask": functools.partial(
        Run, new(fastopt.prodigy, weight_decay_mask=lambda path, array: array.ndim > 1)
    ),
    "Muon": functools.partial(Run, new(fastopt.Muon, lr=0.07)),
    "Adafactor": functools.partial(Run, new(fastopt.Adafactor, lr=0.07)),
    "Lookahead": functools.partial(Run, lookahead),
    **{
        f"formats {name}": functools.partial(
            Run,
            new(fastopt.adamw, lr=0.07, formats=formats, seed=3),
            shapes=LARGE,
            dtype=dtype,
        )
        for name, formats, dtype in (
            ("bf16", "bf16", np.float32),
            ("nearest", "bf16_nearest", np.float32),
            ("fp16", "fp16", np.float32),
            ("8bit", "8bit", np.float32),
            ("8bit of bf16", "8bit", bfloat16),
            ("r8", {"param": "bf16+r8", "m": "m8"}, bfloat16),
            ("r16", {"param": "bf16+r16", "m": "bf16", "v": "v8"}, bfloat16),
        )
    },
    "formats flat": functools.partial(
        Run, new(fastopt.adamw, lr=0.07, formats="8bit"), flat, shapes=LARGE
    ),
}


# What tests of faults save: small optimizers after a few steps.
TRAINED: dict[str, Callable[[Any], Any]] = {
    "adamw": new(fastopt.adamw, lr=0.01, ema=0.9),
    "8bit": new(fastopt.adamw, lr=0.01, formats="8bit"),
    "lookahead": lambda params: fastopt.Lookahead(fastopt.prodigy(params), k=2),
}


def params_of(seed: int = 0, size: int = 4099) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (size,), "b": (2, 3), "none": (0,)}
    return {
        name: nonzero(rng, int(np.prod(shape)), np.float32).reshape(shape)
        for name, shape in shapes.items()
    }


def trained(name: str, steps: int = 2, size: int = 4099) -> Any:
    opt = TRAINED[name](params_of(size=size))
    for seed in range(steps):
        opt.step(params_of(1 + seed, size))
    return opt


def everything(opt: Any) -> dict[str, Any]:
    """A copy of all that an optimizer has, and of its parameters."""
    return {**opt.state_dict(), "arrays": [p.copy() for p in opt._params.arrays]}
