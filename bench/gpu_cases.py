"""The cases of bench/gpu.py: optimizers on a GPU, and the peers of each.

fastopt steps through its public names only: ``fastopt.adamw`` over device arrays, and
``fastopt.torch.AdamW`` over tensors. In Numba's simulator the tensors are torch's on
the CPU, where torch's own fused optimizers run as well.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gpu_report import (
    BYTES,
    CLIPPED,
    COPY,
    FLOOR,
    FUSED,
    GRAPHS,
    HALVES,
    MANY,
    OURS,
    OURS_OF_TORCH,
    PLAIN,
)
from numba import cuda

import fastopt
from fastopt.backends.cuda_accesses import SIMULATED
from fastopt.memory.formats import SMALLEST
from fastopt.rules.floor import FLOORS

Step = Callable[[], object]
Shapes = tuple[tuple[int, ...], ...]
DEVICE = "cpu" if SIMULATED else "cuda"  # of torch's tensors
WORDS = {
    "float32": (np.float32, np.float32),
    "bfloat16": (ml_dtypes.bfloat16, np.uint16),
}
LR = 1e-3
STATE_BYTES = {"float32": 4.0, "bf16": 2.0, "8bit": 1 + 4 / 64}
BEYOND_CACHES = 256e6  # bytes; the cache of an H200 has 60 MB
MOST_SETS = 32
PIECE = 2**27  # elements that are copied at a time


class Case(NamedTuple):
    """An optimizer over some parameters.

    Attributes
    ----------
    rule
        The name in ``fastopt``.
    buffers
        How many the state has.
    again
        Bytes for each element that norms read in a pass of their own.
    formats
        How the state is stored.
    clip, graph
        Whether gradients are clipped to a norm of 1, and whether steps are captured.
    """

    group: str
    name: str
    rule: str
    buffers: int
    shapes: Shapes
    dtype: str = "float32"
    formats: str = "float32"
    again: int = 0
    clip: bool = False
    graph: bool = False

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def width(self) -> int:
        return int(np.dtype(WORDS[self.dtype][0]).itemsize)

    @property
    def momentum(self) -> dict[str, float]:
        return {"momentum": 0.9} if self.rule == "sgd" else {}

    def moved(self, state_bytes: float | None = None) -> float:
        """Return the bytes that a step must move: parameters and state are read and
        written, gradients are read."""
        each = STATE_BYTES[self.formats] if state_bytes is None else state_bytes
        buffers = 2 * self.buffers * each
        return self.elements * (3 * self.width + buffers + self.again)

    def stored(self) -> float:
        """Return the bytes of parameters, gradients and state."""
        return self.elements * (
            2 * self.width + self.buffers * STATE_BYTES[self.formats]
        )

    def sets(self) -> int:
        """Return how many sets of buffers are stepped in turn, so that a small one is
        in memory, not in a cache of the GPU, when its turn comes."""
        most = MOST_SETS
        if SIMULATED:  # which takes a second for some thousands
            most = 2 if self.elements < SMALLEST else 1
        return min(most, math.ceil(BEYOND_CACHES / self.stored()))


class Contender(NamedTuple):
    """What makes the steps of a set of buffers; the bytes of the set, and of a step."""

    make: Callable[[], Step]
    stored: float
    moved: float


# Parameters ---------------------------------------------------------------------------


def transformer(count: int, width: int, words: int) -> Shapes:
    """Return the shapes of the first tensors of a transformer: two embeddings, then 12
    tensors for each layer, of which 8 are vectors."""
    shapes: list[tuple[int, ...]] = [(words, width), (4 * width, width)]
    layer: list[tuple[int, ...]] = [(width,), (width,), (3 * width, width)]
    layer += [(3 * width,), (width, width), (width,), (width,), (width,)]
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    while len(shapes) < count:
        shapes += layer
    return tuple(shapes[:count])


def drawn(size: int, seed: int) -> Any:
    """Return normal numbers, of which none is zero."""
    numbers = np.random.default_rng(seed).standard_normal(size, np.float32)
    return np.where(numbers == 0, np.float32(1), numbers)


def device_array(shape: Sequence[int], seed: int, dtype: str = "float32") -> Any:
    """Return normal numbers. Large arrays repeat a million of them."""
    size, (dtype_, words) = math.prod(shape), WORDS[dtype]
    made = cuda.device_array(size, words)
    done = min(size, 2**20)
    made[:done].copy_to_device(drawn(done, seed).astype(dtype_).view(words))
    while done < size:
        more = min(done, size - done)
        made[done : done + more].copy_to_device(made[:more])
        done += more
    return made.view(dtype_).reshape(shape)


def arrays(case: Case, seed: int) -> list[Any]:
    """Return a device array for each shape."""
    return [
        device_array(shape, seed + k, case.dtype) for k, shape in enumerate(case.shapes)
    ]


def tensors(case: Case) -> list[Any]:
    """Return parameters of torch, with gradients."""
    import torch

    kind = {"dtype": getattr(torch, case.dtype), "device": DEVICE}
    params = [torch.randn(s, **kind).requires_grad_() for s in case.shapes]
    for param in params:
        param.grad = torch.randn(param.shape, **kind)
    return params


# Contenders ---------------------------------------------------------------------------


def ours(case: Case) -> Step:
    options: dict[str, Any] = {"lr": LR, "backend": "cuda", **case.momentum}
    if case.formats != "float32":
        options["formats"] = case.formats
    opt = getattr(fastopt, case.rule)(arrays(case, 0), **options)
    grads = arrays(case, len(case.shapes))
    if case.clip:
        return lambda: opt.step(grads, clip_norm=1.0)
    return lambda: opt.step(grads)


def ours_of_torch(case: Case) -> Step:
    import fastopt.torch

    options: dict[str, Any] = {"lr": LR, **case.momentum}
    if case.formats != "float32":
        options["formats"] = case.formats
    if case.clip:
        options["clip_norm"] = 1.0
    if case.graph:
        # Torch's own step, to which a class may leave capturable=True, has no masks,
        # so it would be refused, and not measured as ours.
        options |= {"capturable": True, "weight_decay_mask": lambda *_: True}
    kinds = {"adamw": "AdamW", "sgd": "SGD", "lion": "Lion", "lamb": "LAMB"}
    params = tensors(case)
    step: Step = getattr(fastopt.torch, kinds[case.rule])(params, **options).step
    return captured(step, params) if case.graph else step


def torch_fused(case: Case) -> Step:
    import torch

    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[case.rule]
    options: dict[str, Any] = {"lr": LR, "fused": True, **case.momentum}
    if case.graph:
        options["capturable"] = True
    params = tensors(case)
    opt = kind(params, **options)

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()

    step: Step = clipped if case.clip else opt.step
    return captured(step, params) if case.graph else step


def apex(case: Case) -> Step:
    from apex import optimizers  # type: ignore[import-not-found, unused-ignore]

    kinds = {"adamw": "FusedAdam", "sgd": "FusedSGD", "lamb": "FusedLAMB"}
    kind = getattr(optimizers, kinds[case.rule])
    step: Step = kind(tensors(case), lr=LR, **case.momentum).step
    return step


def bitsandbytes(case: Case) -> Step:
    import bitsandbytes as bnb

    kinds = {"adamw": "AdamW", "sgd": "SGD", "lion": "Lion", "lamb": "LAMB"}
    bits = "8bit" if case.formats == "8bit" else "32bit"
    kind = getattr(bnb.optim, kinds[case.rule] + bits)
    step: Step = kind(tensors(case), lr=LR, **case.momentum).step
    return step


def floor(moved: float) -> Step:
    """Move so many bytes without arithmetic: the streams of AdamW in float32, of which
    each element is 28 bytes, whatever the case's own are."""
    size = max(1, round(moved / 28))
    opt = FLOORS[2](device_array((size,), 0), backend="cuda")
    grad = device_array((size,), 1)
    return lambda: opt.step(grad, grad_scale=1e-6)


def copy(moved: float, graph: bool) -> Step:
    """Read half of so many bytes and write the other half."""
    pieces = pieces_of(moved)
    size = max(1, round(moved / 8 / pieces))
    if graph:
        import torch

        to, given = torch.zeros(size, device=DEVICE), torch.randn(size, device=DEVICE)
        return captured(lambda: [to.copy_(given) for _ in range(pieces)], [to])
    source, target = device_array((size,), 0), device_array((size,), 1)
    return lambda: [target.copy_to_device(source) for _ in range(pieces)]


def pieces_of(moved: float) -> int:
    """Return how often two buffers are copied to move so many bytes: large copies take
    turns in the same memory, to leave room for the other contenders."""
    return math.ceil(moved / 8 / PIECE)


def captured(step: Step, written: Sequence[Any]) -> Step:
    """Capture a step as a CUDA graph, and return its replay."""
    if SIMULATED:
        raise RuntimeError("CUDA graphs need a GPU")
    import torch

    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles kernels and makes state
            step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = written[0].detach().clone()
    graph.replay()
    if torch.equal(before, written[0].detach()):
        raise RuntimeError("the captured graph does not change the parameters")

    def replay() -> Step:
        graph.replay()
        return step  # whose buffers must live as long as the graph

    return replay


def contenders(case: Case) -> dict[str, Contender]:
    """Return what is compared in a case. Those whose packages are missing raise
    ImportError when they are made."""
    moved, stored = case.moved(), case.stored()
    copied = moved / pieces_of(moved)
    # The state of torch's classes has the dtype of the parameters.
    of_torch = case.moved(case.width)
    made = {
        OURS: Contender(partial(ours, case), stored, moved),
        OURS_OF_TORCH: Contender(partial(ours_of_torch, case), stored, moved),
        FLOOR: Contender(partial(floor, moved), moved / 28 * 16, moved),
        COPY: Contender(partial(copy, moved, case.graph), copied, moved),
    }
    if case.graph:
        del made[OURS]  # which has no graphs
    if case.rule in ("adamw", "sgd"):
        made[FUSED] = Contender(partial(torch_fused, case), stored, of_torch)
        if case.formats == "8bit":  # its state has float32
            wide = case._replace(formats="float32")
            made[FUSED] = Contender(partial(torch_fused, wide), wide.stored(), of_torch)
    if case.clip or case.graph:
        return made
    if case.rule != "lion" and case.formats == "float32":
        made["apex"] = Contender(partial(apex, case), stored, moved)
    if case.formats != "bf16":
        made["bitsandbytes"] = Contender(partial(bitsandbytes, case), stored, moved)
    return made


# Cases --------------------------------------------------------------------------------

NORMS_OF_LAMB = 16  # bytes: parameters, gradients and state are read for the norms


def lists() -> list[Shapes]:
    """Return the lists of 150 and of 1,000 tensors; short ones for the simulator."""
    if SIMULATED:
        return [transformer(3, 2, 5), transformer(6, 2, 5)]
    return [transformer(150, 768, 50_257), transformer(1000, 256, 32_000)]


def cases(groups: Sequence[str], sizes: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of some groups, in the order of the groups. Within one, cases of
    the middle size come first, because they say most."""
    middle = sorted(sizes)[len(sizes) // 2 : len(sizes) // 2 + 1]
    ordered = [*middle, *(size for size in sizes if size not in middle)]
    flat: list[Shapes] = [((size,),) for size in ordered]
    several = lists()
    for group in groups:
        if group == PLAIN:
            for shapes in flat:
                yield Case(group, "AdamW", "adamw", 2, shapes)
                yield Case(group, "SGD, momentum", "sgd", 1, shapes)
                yield Case(group, "Lion", "lion", 1, shapes)
                yield Case(group, "LAMB", "lamb", 2, shapes, again=NORMS_OF_LAMB)
        elif group == MANY:
            for shapes in several:
                yield Case(group, "AdamW", "adamw", 2, shapes)
        elif group == HALVES:
            adamw = partial(Case, group, rule="adamw", buffers=2, dtype="bfloat16")
            for shapes in flat:
                yield adamw(name="AdamW, bf16; float32 state", shapes=shapes)
                yield adamw(name="AdamW, all bf16", shapes=shapes, formats="bf16")
        elif group == BYTES:
            for shapes in [((SMALLEST,),)] if SIMULATED else flat:
                yield Case(group, "AdamW", "adamw", 2, shapes, formats="8bit")
        elif group == CLIPPED:
            for shapes in (flat[0], several[0]):  # gradients are read for the norm
                yield Case(group, "AdamW", "adamw", 2, shapes, again=4, clip=True)
        elif group == GRAPHS:
            for shapes in (((min(sizes),),), several[0]):
                yield Case(group, "AdamW", "adamw", 2, shapes, graph=True)


# Memory and launches ------------------------------------------------------------------


def free_memory() -> float:
    """Return the bytes that are free on the GPU, after giving back what nothing uses.
    Numba and torch both keep memory that was freed, and the other may need it."""
    gc.collect()
    if not SIMULATED:
        cuda.current_context().deallocations.clear()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return float(cuda.current_context().get_memory_info().free)


def launches(step: Step) -> int | None:
    """Count the kernels that a step launches, if torch is there to count them."""
    if SIMULATED or not find_spec("torch"):
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        cuda.synchronize()
    names = [e.name for e in found.events() if e.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None
