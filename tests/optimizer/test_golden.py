"""Saved states of an earlier version load, and go on with the bits of that version.

``states.json`` holds, for each case, the state that an earlier version saved after 3
steps, and the parameters after 3 and after 5. Run as a program, with ``tests/support``
in PYTHONPATH, this file writes it anew. Nothing but a new format of saved states is a
reason for that, and then the old file stays and is tested, too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, IDS

import fastopt

FILE = Path(__file__).parent / "states.json"
SHAPES = (2, 3), (5,)
SAVED, TOTAL = 3, 5  # steps


def numbers(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Make numbers between -1.6 and 1.6, without a generator, which might change."""
    k = np.arange(np.prod(shape)).reshape(shape)
    return ((((k + 1) * 7919 + seed * 104729) % 1009 - 504) / 315).astype(np.float32)


def parameters() -> list[np.ndarray]:
    return [numbers(seed, shape) for seed, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[np.ndarray]:
    return [numbers(10 * step + i, shape) for i, shape in enumerate(SHAPES)]


class Run:
    """Steps of an optimizer of the core."""

    def __init__(self, make: Callable[..., Any], arrange: Callable[..., Any] = list):
        self.arrange, self.params = arrange, parameters()
        self.opt = make(arrange(self.params))

    def step(self, k: int) -> None:
        self.opt.step(self.arrange(gradients(k)))

    def save(self) -> Any:
        return self.opt.state_dict()

    def load(self, saved: Any) -> None:
        self.opt.load_state_dict(saved)

    def values(self) -> list[np.ndarray]:
        return self.params


class Accumulating(Run):
    """Steps of accumulated gradients, saved when half of the next one is there."""

    def step(self, k: int) -> None:
        halves = [grad / 2 for grad in gradients(k)]
        if k > 1:
            self.opt.accumulate(halves)
            self.opt.step()
        self.opt.accumulate(halves)


class OfTorch(Run):
    def __init__(self, name: str):
        import torch

        import fastopt.torch

        self.arrays = parameters()[: 1 if name == "Muon" else None]  # matrices alone
        self.params = [torch.nn.Parameter(torch.from_numpy(p)) for p in self.arrays]
        self.opt = getattr(fastopt.torch, name)(self.params, lr=0.125)

    def step(self, k: int) -> None:
        import torch

        for param, grad in zip(self.params, gradients(k), strict=False):
            param.grad = torch.from_numpy(grad)
        self.opt.step()

    def values(self) -> list[np.ndarray]:
        return self.arrays


class OfJax(Run):
    def __init__(self, rule: fastopt.Rule):
        import jax

        import fastopt.jax

        self.params = list(map(jax.numpy.asarray, parameters()))
        self.opt = fastopt.jax.optimizer(rule)
        self.state = self.opt.init(self.params)

    def step(self, k: int) -> None:
        self.params, self.state = self.opt.step(self.params, gradients(k), self.state)

    def save(self) -> Any:
        import jax

        return list(map(np.asarray, jax.tree_util.tree_leaves(self.state)))

    def load(self, saved: Any) -> None:
        import jax

        form = jax.tree_util.tree_structure(self.state.buffers)
        # Earlier states of rules that carry nothing have an array without elements.
        count, *carry = saved[: len(saved) - form.num_leaves]
        buffers = jax.tree_util.tree_unflatten(
            form, saved[len(saved) - form.num_leaves :]
        )
        self.state = type(self.state)(count, carry[0] if carry else None, buffers)

    def values(self) -> list[np.ndarray]:
        return list(map(np.asarray, self.params))


def named(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip("ba", arrays, strict=True))


def two_groups(params: list[np.ndarray]) -> Any:
    first, second = params
    return fastopt.lamb([{"params": first, "lr": 0.25}, {"params": second, "eps": 0.5}])


def masked(params: list[np.ndarray]) -> Any:
    mask = [True, False]
    return fastopt.prodigy(params, weight_decay=0.125, weight_decay_mask=mask)


RUNS: dict[str, Callable[[], Run]] = {
    **{
        name: lambda rule=rule, values=values: Run(lambda p: rule(p, **values))
        for name, (rule, values) in zip(IDS, CASES, strict=True)
    },
    "average": lambda: Run(lambda p: fastopt.adamw(p, lr=0.125, ema=0.75)),
    "mask": lambda: Run(masked),
    "names": lambda: Run(fastopt.adam, named),
    "groups": lambda: Run(two_groups, lambda arrays: [[array] for array in arrays]),
    "Muon": lambda: Run(lambda p: fastopt.Muon(p, lr=0.125)),
    "Adafactor": lambda: Run(lambda p: fastopt.Adafactor(p, lr=0.125)),
    "Lookahead": lambda: Run(lambda p: fastopt.Lookahead(fastopt.sgd(p, lr=0.125), 2)),
    "accumulated": lambda: Accumulating(lambda p: fastopt.adamw(p, lr=0.125)),
}
if importlib.util.find_spec("jax"):
    RUNS |= {f"jax.{r.name}": lambda r=r: OfJax(r) for r in fastopt.RULES}
if importlib.util.find_spec("torch"):
    import fastopt.torch

    CLASSES = [name for name in fastopt.torch.__all__ if name[0].isupper()]
    RUNS |= {f"torch.{name}": lambda name=name: OfTorch(name) for name in CLASSES}


# Plain text, in which every number keeps its bits.


def encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return {
            "dtype": array.dtype.str,
            "shape": value.shape,
            "bytes": array.tobytes().hex(),
        }
    if isinstance(value, dict):
        return {"pairs": [[key, encoded(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": list(map(encoded, value))}
    if isinstance(value, list):
        return list(map(encoded, value))
    if hasattr(value, "detach"):
        return {"tensor": encoded(value.detach().numpy())}
    return value


def decoded(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(decoded, value))
    if not isinstance(value, dict):
        return value
    if "pairs" in value:
        return {key: decoded(item) for key, item in value["pairs"]}
    if "tuple" in value:
        return tuple(map(decoded, value["tuple"]))
    if "tensor" in value:
        import torch

        return torch.from_numpy(decoded(value["tensor"]))
    array = np.frombuffer(bytes.fromhex(value["bytes"]), value["dtype"])
    return array.reshape(value["shape"]).copy()


def write() -> None:
    """Write the states that this version saves."""
    lines = []
    for name, new in RUNS.items():
        run = new()
        for k in range(SAVED):
            run.step(k)
        saved, before = encoded(run.save()), encoded(run.values())
        for k in range(SAVED, TOTAL):
            run.step(k)
        case = {"saved": saved, "before": before, "after": encoded(run.values())}
        lines.append(f"{json.dumps(name)}: {json.dumps(case, separators=(',', ':'))}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.fixture(scope="module")
def states():
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_state_of_an_earlier_version_goes_on(states, name):
    if name not in states:
        pytest.skip("it is newer than the file")
    saved, before, after = map(decoded, states[name].values())
    run = RUNS[name]()
    start_again(run, before)
    run.load(saved)
    for k in range(SAVED, TOTAL):
        run.step(k)
    for array, expected in zip(run.values(), after, strict=True):
        assert array.tobytes() == expected.tobytes()


def start_again(run: Run, values: list[np.ndarray]) -> None:
    """Set the parameters of a run."""
    if isinstance(run, OfJax):
        import jax

        run.params = list(map(jax.numpy.asarray, values))
    else:
        for param, value in zip(run.values(), values, strict=True):
            param[:] = value


if __name__ == "__main__":
    write()
