"""One contender of ``fastopt bench --loop``, in a process of its own: a training loop.

    python loop_contender.py NAME

It answers as ``contender.py`` does, but cases are loops, and a burst returns the median
seconds of each call and of a whole pass: {"calls": {"step": ...}, "pass": ...}. As in
most programs, gradients are None before each pass, so they are new tensors each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING or __package__:
    from fastopt.bench import contender
else:  # run by its path, which is first in sys.path
    import contender

BURST_SECONDS = 0.1
MOST_PASSES = 500
LR = 1e-4
INPUTS, OUTPUTS, BATCH = 17, 6, 64  # of the multilayer perceptrons
TOKENS, WIDTH = 2048, 128  # of the transformer
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Loop:
    """A training loop with Adam: a model, and a limit for the norm of gradients."""

    model: str
    clip_norm: float | None = None


class Calls(NamedTuple):
    """The calls of a pass in their order, and the parameters, which tests compare."""

    calls: Mapping[str, Callable[[], object]]
    params: Callable[[], list[Array]]


MODELS = ("mlp 64", "mlp 256", "convolutional", "transformer")


def hidden(loop: Loop) -> int:
    """Return the width of a perceptron's hidden layers."""
    kind, _, width = loop.model.partition(" ")
    if kind != "mlp":
        raise contender.Unavailable(f"the {loop.model} network is measured on torch")
    return int(width)


# torch ------------------------------------------------------------------------------


def torch_model(loop: Loop) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Return a model, its inputs, and the loss of its outputs."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(contender.available_threads())
    functional = nn.functional
    if loop.model == "convolutional":
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10)),
        )
        labels = torch.randint(10, (16,))
        loss: Any = partial(functional.cross_entropy, target=labels)
        return model, torch.randn(16, 3, 32, 32), loss
    if loop.model == "transformer":
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True
        )
        model = nn.Sequential(
            nn.Embedding(TOKENS, WIDTH),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            *(nn.Linear(WIDTH, TOKENS), nn.Flatten(0, 1)),
        )
        tokens, labels = torch.randint(TOKENS, (2, 8, 32))
        return model, tokens, partial(functional.cross_entropy, target=labels.flatten())
    width = hidden(loop)
    model = nn.Sequential(
        *(nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, OUTPUTS),
    )
    targets = torch.randn(BATCH, OUTPUTS)
    loss = partial(functional.mse_loss, target=targets)
    return model, torch.randn(BATCH, INPUTS), loss


def on_torch(loop: Loop, make: Callable[[Any], Any], clips: bool) -> Calls:
    """Return the calls with an optimizer that ``make`` makes from the model. ``clips``
    says whether it limits the norm itself."""
    import torch

    model, inputs, criterion = torch_model(loop)
    opt, params = make(model), list(model.parameters())
    loss = criterion(model(inputs))

    def forward() -> None:
        nonlocal loss
        loss = criterion(model(inputs))

    def backward() -> None:
        loss.backward()

    calls = {"zero_grad": opt.zero_grad, "forward": forward, "backward": backward}
    if loop.clip_norm is not None and not clips:
        limit = torch.nn.utils.clip_grad_norm_
        calls["clip"] = partial(limit, params, loop.clip_norm)
    calls["step"] = opt.step
    return Calls(calls, lambda: [p.detach().numpy() for p in params])


def torch_adam(loop: Loop, **how: bool) -> Calls:
    import torch

    def make(model: Any) -> Any:
        return torch.optim.Adam(model.parameters(), LR, **how)

    return on_torch(loop, make, clips=False)


def fastopt_torch(loop: Loop, flat: bool = False) -> Calls:
    import fastopt.torch

    def make(model: Any) -> Any:
        if flat:
            fastopt.torch.flatten_(model)
        return fastopt.torch.Adam(model.parameters(), LR, clip_norm=loop.clip_norm)

    return on_torch(loop, make, clips=True)


# NumPy and JAX ----------------------------------------------------------------------


def perceptron(loop: Loop) -> tuple[list[Array], Array, Array]:
    """Return weights and biases in turn, inputs and targets."""
    rng, width = np.random.default_rng(0), hidden(loop)
    sizes = [INPUTS, width, width, OUTPUTS]
    params = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        params += [rng.normal(size=(before, after)) / before**0.5, np.zeros(after)]
    inputs, targets = (
        rng.normal(size=(BATCH, INPUTS)),
        rng.normal(size=(BATCH, OUTPUTS)),
    )
    single = [array.astype(np.float32) for array in (*params, inputs, targets)]
    return single[:-2], single[-2], single[-1]


def on_numpy(loop: Loop, make: Callable[[list[Array]], Any]) -> Calls:
    """Return the calls with a step that ``make`` makes from the parameters."""
    params, inputs, targets = perceptron(loop)
    step, grads = make(params), list[Array]()

    def gradients() -> None:
        a, first, b, second, c, third = params
        x = np.tanh(inputs @ a + first)
        y = np.tanh(x @ b + second)
        out = (2 / targets.size) * (y @ c + third - targets)
        at_y = (out @ c.T) * (1 - y * y)
        at_x = (at_y @ b.T) * (1 - x * x)
        layers = (inputs, at_x), (x, at_y), (y, out)
        grads[:] = [part for x, g in layers for part in (x.T @ g, g.sum(0))]

    calls = {"forward, backward": gradients, "step": lambda: step(grads)}
    return Calls(calls, lambda: params)


def fastopt_arrays(loop: Loop) -> Calls:
    import fastopt

    def make(params: list[Array]) -> Any:
        return partial(fastopt.adam(params, lr=LR).step, clip_norm=loop.clip_norm)

    return on_numpy(loop, make)


def naive_numpy(loop: Loop) -> Calls:
    from fastopt.bench.naive import Naive

    def make(params: list[Array]) -> Any:
        naive = Naive("adam", params, lr=LR)

        def step(grads: list[Array]) -> None:
            if loop.clip_norm is not None:
                norm = np.sqrt(sum(float(np.vdot(g, g)) for g in grads))
                factor = np.float32(min(1.0, loop.clip_norm / (norm + 1e-6)))
                grads = [g * factor for g in grads]
            naive.step(grads)

        return step

    return on_numpy(loop, make)


def on_jax(loop: Loop, make: Callable[[Any, Any], tuple[Any, Any]]) -> Calls:
    """Return the calls with an optimizer: a state, and a compiled function of
    parameters, gradients and state that returns new parameters and state."""
    jax = contender.jax_on_our_threads()
    numbers, inputs, targets = perceptron(loop)
    params, grads = list(map(jax.numpy.asarray, numbers)), None
    state, advance = make(jax, params)

    def loss(params: Any) -> Any:
        a, first, b, second, c, third = params
        x = jax.numpy.tanh(inputs @ a + first)
        y = jax.numpy.tanh(x @ b + second)
        return ((y @ c + third - targets) ** 2).mean()

    gradients_of = jax.jit(jax.grad(loss))

    def gradients() -> None:
        nonlocal grads
        grads = jax.block_until_ready(gradients_of(params))

    def step() -> None:
        nonlocal params, state
        params, state = advance(params, grads, state)
        jax.block_until_ready(params)

    calls = {"forward, backward": gradients, "step": step}
    return Calls(calls, lambda: [np.asarray(p) for p in params])


def fastopt_jax(loop: Loop) -> Calls:
    def make(jax: Any, params: Any) -> tuple[Any, Any]:
        import fastopt.jax

        opt = fastopt.jax.adam(lr=LR)

        def advance(params: Any, grads: Any, state: Any) -> Any:
            if loop.clip_norm is None:
                return opt.step(params, grads, state)
            norm = jax.numpy.sqrt(sum(jax.numpy.vdot(g, g) for g in grads))
            factor = jax.numpy.minimum(1.0, loop.clip_norm / norm)
            return opt.step(params, grads, state, grad_scale=factor)

        return opt.init(params), jax.jit(advance, donate_argnums=(0, 2))

    return on_jax(loop, make)


def optax(loop: Loop) -> Calls:
    def make(jax: Any, params: Any) -> tuple[Any, Any]:
        import optax

        transform = optax.adam(LR)
        if loop.clip_norm is not None:
            limit = optax.clip_by_global_norm(loop.clip_norm)
            transform = optax.chain(limit, transform)

        def advance(params: Any, grads: Any, state: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return transform.init(params), jax.jit(advance, donate_argnums=(0, 2))

    return on_jax(loop, make)


# Contenders of one library, of which the first is what ratios refer to.
FAMILIES: dict[str, dict[str, Callable[[Loop], Calls]]] = {
    "torch": {
        "fastopt torch": fastopt_torch,
        "fastopt torch, flat": partial(fastopt_torch, flat=True),
        "torch fused": partial(torch_adam, fused=True),
        "torch default": torch_adam,
    },
    "NumPy": {"fastopt arrays": fastopt_arrays, "naive NumPy": naive_numpy},
    "JAX": {"fastopt jax": fastopt_jax, "optax": optax},
}
LOOPS = {name: make for family in FAMILIES.values() for name, make in family.items()}


class Process(contender.Process):
    """The state of this process: one contender's loop."""

    calls: Mapping[str, Callable[[], object]] | None = None

    def drop(self) -> dict[str, Any]:
        self.calls = None
        return super().drop()

    def prepare(self, case: Any) -> dict[str, Any]:
        self.drop()
        contender.import_packages(self.name)
        self.calls = LOOPS[self.name](Loop(**case)).calls
        seconds = min(sum(self.once().values()) for _ in range(5))
        self.count = max(5, min(MOST_PASSES, int(BURST_SECONDS / seconds)))
        return {"seconds": seconds}

    def once(self) -> dict[str, float]:
        """Do a pass. Return the seconds of each call."""
        seconds, clock = {}, time.perf_counter
        before = clock()
        for name, call in (self.calls or {}).items():
            call()
            after = clock()
            seconds[name] = after - before
            before = after
        return seconds

    def burst(self) -> dict[str, Any]:
        self.once()
        passes = [self.once() for _ in range(self.count)]
        calls = {name: median(p[name] for p in passes) for name in passes[0]}
        return {"calls": calls, "pass": median(sum(p.values()) for p in passes)}


if __name__ == "__main__":
    contender.main(Process)
