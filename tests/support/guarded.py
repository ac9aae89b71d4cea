"""Arrays beside pages that nobody may touch, and steps in them.

    python tests/support/guarded.py DOOR FORM SKIP

does the cases of a door, but for the first so many, and says of each that it begins and
how it ended. What reads or writes beyond an array kills the process, so the one that
started it knows at which case, and goes on after that (``test_faults_memory.py``).
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from cases import CASES, DTYPES, STORED, bfloat16, label, nonzero, same_bits

import fastopt
from fastopt import backends
from fastopt.optimizer import formats as of_state
from fastopt.rules import RULES

PAGE = mmap.PAGESIZE
UNUSED = 0xA5  # what fills the rest of an array's pages
NOTHING, READ, WRITE = 0, 1, 3  # PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE
EDGES = "end", "begin"  # where an array touches a page of its guards

# Around the limits of vectors, lanes, blocks, chunks, tiles, and one thread's work.
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 1023, 1025)
SIZES += (2047, 2048, 2049, 4095, 4096, 4097, 6145, 8193, 33_001)
MATRICES = ((1, 1), (1, 7), (5, 3), (33, 31), (2, 3, 5), (0, 4), (513, 3), (3, 2049))

libc = ctypes.CDLL(None, use_errno=True)


def protect(address: int, nbytes: int, how: int) -> None:
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), how):
        raise OSError(ctypes.get_errno(), "mprotect")


class Region:
    """Some pages between two that nobody may touch."""

    def __init__(self, pages: int):
        self.nbytes = pages * PAGE
        self.whole = np.frombuffer(mmap.mmap(-1, self.nbytes + 2 * PAGE), np.uint8)
        self.bytes = self.whole[PAGE:-PAGE]
        self.address = self.bytes.ctypes.data
        for guard in (self.address - PAGE, self.address + self.nbytes):
            protect(guard, PAGE, NOTHING)


class Memory:
    """Gives out arrays that end where such a page begins, or begin where one ends."""

    free: dict[int, list[Region]] = {}

    def __init__(self, edge: str):
        self.edge = edge
        self.used: list[tuple[Region, int, int]] = []  # and where the array lies

    def array(self, values: np.ndarray, read_only: bool = False) -> np.ndarray:
        pages = max(1, -(-values.nbytes // PAGE))
        regions = self.free.setdefault(pages, [])
        region = regions.pop() if regions else Region(pages)
        first = 0 if self.edge == "begin" else region.nbytes - values.nbytes
        region.bytes[:] = UNUSED
        room = region.bytes[first : first + values.nbytes]
        self.used.append((region, first, first + values.nbytes))
        array = room.view(values.dtype).reshape(values.shape)
        array[...] = values
        if read_only:
            protect(region.address, region.nbytes, READ)
        return array

    def arena(
        self, params: list[np.ndarray], streams: int, near: Any = None
    ) -> list[Any]:
        """In place of ``fastopt.memory.arena.state_arena``."""
        return [
            tuple(self.array(np.zeros(p.size, p.dtype)) for _ in range(streams))
            for p in params
        ]

    def close(self) -> None:
        """See that nothing was written beside the arrays; give the pages back."""
        for region, first, last in self.used:
            protect(region.address, region.nbytes, WRITE)
            beside = region.bytes[:first], region.bytes[last:]
            assert all((part == UNUSED).all() for part in beside), "written beside it"
            self.free[region.nbytes // PAGE].append(region)


class Plain:
    """The same without guards: what the expected values are computed in."""

    def array(self, values: np.ndarray, read_only: bool = False) -> np.ndarray:
        return values.copy()


# The core -----------------------------------------------------------------------------

# How a step is asked for: of it, of the optimizer, and the number of tasks.
ASKED: tuple[tuple[dict, dict, int], ...] = (
    ({}, {}, 0),
    ({"grad_scale": 0.7}, {"ema": 0.9}, 0),
    ({"clip_norm": 0.5}, {}, 0),
    ({"clip_value": 0.05}, {}, 0),
    ({"zero_grads": True}, {}, 0),
    ({"clip_norm": 0.5, "clip_value": 0.1, "zero_grads": True}, {"ema": 0.9}, 0),
    ({"nonfinite": "skip"}, {}, 0),
    ({}, {}, 2),
    ({"clip_norm": 0.5}, {"ema": 0.9}, 5),
    ({"accumulate": True}, {}, 0),
)


def run(make: Callable, shapes: Any, dtype: type, asked: Any, memory: Any, **own: Any):
    """Three steps; everything that they wrote."""
    (of_step, of_optimizer, tasks), rng = asked, np.random.default_rng(len(shapes))

    def draw(read_only: bool = False) -> list[np.ndarray]:
        sizes = [(shape, int(np.prod(shape))) for shape in shapes]
        values = [nonzero(rng, n, dtype).reshape(shape) for shape, n in sizes]
        return [memory.array(value, read_only) for value in values]

    params, grads = draw(), []
    opt = make(params, **of_optimizer, **own)
    of_step = dict(of_step)
    accumulate = of_step.pop("accumulate", False)
    estimate = getattr(opt, "rule", opt).estimate is not None
    for step in range(3):
        # Only a step that is to zero its gradients may write to them.
        read_only = not of_step.get("zero_grads")
        if accumulate:
            for _ in range(2):
                opt.accumulate(draw(read_only))
            opt.step(**of_step)
        elif tasks:
            given = [draw(read_only) for _ in range(tasks)]
            weights = [0.5 - 0.3 * k for k in range(tasks)]
            opt.step(given, weights=weights, **of_step)
        else:
            grads = draw(read_only)
            # In the last, one is missing.
            opt.step([None if step == 2 and i == 1 else g for i, g in enumerate(grads)])
            opt.step(grads, **of_step)
        if estimate:
            opt.estimate(draw(read_only))
    averages = opt.ema_params or []
    return [*params, *grads, *averages, *states(opt)]


def states(opt: Any) -> list[np.ndarray]:
    return [np.asarray(a) for arrays in opt.state.values() for a in arrays]


@contextmanager
def guards(backend: str, edge: str) -> Iterator[Memory]:
    """State, averages and sums, too, are given out by what is yielded."""
    module, memory = backends.load(backend), Memory(edge)
    before = module.state_arena
    module.state_arena = memory.arena
    try:
        yield memory
    finally:
        module.state_arena = before
    memory.close()


Makes = tuple[str, Callable, Any]


def core_makes(shape: Any) -> Iterator[Makes]:
    """What makes an optimizer, and the shapes of its parameters."""

    def make(params: Any, rule: Any, values: Any, **options: Any) -> Any:
        if options.get("formats") == "coded":  # whatever they are averages of
            names = {name for variant in rule.all for name in variant.state}
            options["formats"] = {k: of_state.EIGHT_BITS.get(k, "m8") for k in names}
            if params[0].dtype == bfloat16:
                options["formats"]["param"] = "bf16+r8"
        return rule(params, **values, **options)

    for rule, values in CASES:
        yield label(rule, values), partial(make, rule=rule, values=values), None

    def ahead(params: Any, **options: Any) -> Any:
        return fastopt.Lookahead(fastopt.adamw(params, lr=0.1, **options), k=2)

    yield "lookahead", ahead, None
    yield "adafactor", lambda p, **o: fastopt.Adafactor(p, lr=0.1, **o), shape
    yield "muon", lambda p, **o: fastopt.Muon(p, lr=0.1, **o), shape


def core(backend: str, long: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The cases of a backend: what each is called, and what does it."""
    number, one_of = 0, {"cython": 330, "numba": 2500}[backend]
    shaped, halves = itertools.cycle(MATRICES), (np.float16, bfloat16)
    for size, edge, dtype in itertools.product(SIZES, EDGES, (*DTYPES, *halves)):
        for name, make, of_its_own in core_makes(next(shaped)):
            for turn in range(3):
                number += 1
                asked = ASKED[(number + turn * 3) % len(ASKED)]
                first = of_its_own or (size,)
                shapes = [first, (3,), (0,), (size + 1,)] if number % 3 else [first]
                if name == "muon" and asked[2]:
                    continue  # it refuses the gradients of tasks
                if dtype in halves and name not in ("muon", "adafactor"):
                    of_step, of_optimizer, tasks = asked
                    coded = number % 2 and name != "lookahead"
                    kind = {"formats": "coded" if coded else "bf16"}
                    asked = of_step, of_optimizer | kind, tasks
                what = f"{backend} {name} {shapes} {dtype.__name__} {edge} {asked}"
                if long or chosen(what, one_of):
                    case = make, shapes, dtype, asked
                    yield what, lambda c=case, e=edge: compare(backend, e, *c)
    for size, edge, dtype in itertools.product(SIZES, EDGES, DTYPES):
        what = f"{backend} gram {size} {dtype.__name__} {edge}"
        if long or chosen(what, 20):
            yield what, lambda s=size, e=edge, d=dtype: gram(backend, e, s, d)


def chosen(what: str, one_of: int) -> bool:
    """Whether a case is among those of the short form."""
    return zlib.crc32(what.encode()) % one_of == 0


def compare(backend: str, edge: str, make: Any, *of: Any) -> None:
    with small_state_has_formats():
        compare_in(backend, edge, make, *of)


@contextmanager
def small_state_has_formats() -> Iterator[None]:
    before, of_state.SMALLEST = of_state.SMALLEST, 0
    try:
        yield
    finally:
        of_state.SMALLEST = before


def compare_in(backend: str, edge: str, make: Any, *of: Any) -> None:
    expected = run(make, *of, Plain(), backend="numpy")
    with guards(backend, edge) as memory:
        threads = 3 if of[0][0][0] > 10_000 else 1
        got = run(make, *of, memory, backend=backend, threads=threads)
        for a, b in zip(expected, got, strict=True):
            assert same_bits(a, b), "other values than without guards"


def gram(backend: str, edge: str, size: int, dtype: type) -> None:
    rng = np.random.default_rng(size)
    J = [nonzero(rng, size, dtype) for _ in range(5)]
    with guards(backend, edge) as memory:
        got = fastopt.gram([memory.array(row, True) for row in J], backend=backend)
    assert same_bits(got, fastopt.gram(J, backend="numpy"))


# The other doors ----------------------------------------------------------------------


def native(long: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """The table for C: numbers and carry are beside guards, too."""
    import native_code

    def steps(rule: Any, values: Any, size: int, dtype: type, memory: Any) -> list[Any]:
        rng = np.random.default_rng(size)
        sizes = size, 3, 0
        params = [memory.array(nonzero(rng, n, dtype)) for n in sizes]
        opt = native_code.Optimizer(
            native_code.variant_name(rule, values), params, values
        )
        opt.state = [[memory.array(s) for s in states] for states in opt.state]
        opt.carry, opt.values = map(memory.array, (opt.carry, opt.values))
        for _ in range(2):
            grads = [memory.array(nonzero(rng, n, dtype), True) for n in sizes]
            assert opt.step(grads, 0.5, 2) == native_code.OK
        return [*opt.everything(), opt.carry]

    def streams(rule: Any, values: Any, size: int, dtype: type, memory: Any) -> list:
        rng = np.random.default_rng(size)
        sizes, formats = (size, 3, 0), (native_code.BF16_SR, native_code.FP16)
        name = native_code.variant_name(rule, values)
        buffers = native_code.API.find(name.encode()).contents.state_count
        params = [nonzero(rng, n, np.float32).astype(dtype) for n in sizes]
        opt = native_code.StreamOptimizer(
            *(name, list(map(memory.array, params)), values),
            formats=[formats[k % 2] for k in range(buffers)],
        )
        opt.state = [[memory.array(s) for s in states] for states in opt.state]
        opt.carry, opt.values = map(memory.array, (opt.carry, opt.values))
        assert opt.start() == native_code.OK
        for step, of_grads in enumerate((np.float32, dtype)):
            drawn = [nonzero(rng, n, np.float32).astype(of_grads) for n in sizes]
            grads = [memory.array(g, not step) for g in drawn]
            asked = {"threads": 2, "clip_norm": 0.5, "zero_grads": step}
            assert opt.step(grads, 0.5, **asked) == native_code.OK
        return [*opt.everything(), *grads, opt.carry]

    def check(edge: str, do: Callable, *case: Any) -> None:
        expected, memory = do(*case, Plain()), Memory(edge)
        assert all(map(same_bits, expected, do(*case, memory)))
        memory.close()

    halves = (np.float16, bfloat16)
    for size, edge, dtype in itertools.product(SIZES, EDGES, (*DTYPES, *halves)):
        do = streams if dtype in halves else steps
        for rule, values in CASES:
            what = f"native {label(rule, values)} {size} {dtype.__name__} {edge}"
            if long or chosen(what, 100):
                yield what, lambda c=(edge, do, rule, values, size, dtype): check(*c)


def torch(long: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Parameters, gradients and state of every class but Muon, which is torch's."""
    import torch
    from torch_tensors import class_of

    import fastopt.torch

    classes = [class_of(rule) for rule in RULES]
    classes += [fastopt.torch.AdamW, fastopt.torch.Adafactor]
    dtypes = {torch.float32: torch.uint32, torch.float64: torch.uint64}
    dtypes |= {torch.bfloat16: torch.uint16, torch.float16: torch.uint16}

    def steps(kind: Any, shape: Any, dtype: Any, asked: Any, memory: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(1)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            words = tensor.contiguous().view(-1).numpy(force=True)
            array = memory.array(words.reshape(tensor.shape))
            return torch.from_numpy(array)

        def draw() -> torch.Tensor:
            drawn = torch.randn(shape, generator=generator)
            words = drawn.to(dtype).view(-1).view(dtypes[dtype])
            return place(words).view(dtype).view(shape)

        params = [torch.nn.Parameter(draw()) for _ in range(2)]
        opt = kind(params, lr=0.01, ema=asked[1])
        for step in range(3):
            for param in params:
                param.grad = draw()
            opt.step(**asked[0])
            if step:
                continue
            for state in opt.state.values():
                for key, value in state.items():
                    if value.dim():
                        state[key] = place(value)
        tensors = [*params, *(v for s in opt.state.values() for v in s.values())]
        return [t.detach().double().numpy() for t in tensors]

    def check(edge: str, *case: Any) -> None:
        expected, memory = steps(*case, Plain()), Memory(edge)
        assert all(map(same_bits, expected, steps(*case, memory)))
        memory.close()

    options = ({}, None), ({"clip_norm": 0.5, "zero_grads": True}, 0.9)
    shapes = [(n,) for n in SIZES] + [s for s in MATRICES if len(s) == 2]
    for shape, edge, dtype in itertools.product(shapes, EDGES, dtypes):
        for kind in classes:
            for asked in options:
                case = kind, shape, dtype, asked
                what = f"torch {kind.__name__} {shape} {dtype} {edge} {asked}"
                if long or chosen(what, 800):
                    yield what, lambda e=edge, c=case: check(e, *c)


def jax(long: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Gradients, which XLA reads where they are: the rest of its memory is its own."""
    import jax

    import fastopt.jax

    jax.config.update("jax_enable_x64", True)

    def steps(rule: Any, values: Any, size: int, dtypes: Any, memory: Any) -> list[Any]:
        rng = np.random.default_rng(size)
        opt = fastopt.jax.optimizer(rule, **values)
        params = jax.numpy.asarray(nonzero(rng, size, dtypes[0]))
        state = opt.init(params)
        for _ in range(2):
            array = memory.array(nonzero(rng, size, dtypes[1]))
            grads = jax.device_put(array, may_alias=True)
            if isinstance(memory, Memory):
                assert grads.unsafe_buffer_pointer() == array.ctypes.data, "a copy"
            params, state = opt.step(params, grads, state)
        jax.block_until_ready((params, state))
        return [np.asarray(a) for a in (params, *state.buffers.values())]

    def check(edge: str, *case: Any) -> None:
        expected, memory = steps(*case, Plain()), Memory(edge)
        assert all(map(same_bits, expected, steps(*case, memory)))
        memory.close()

    # It takes memory as it is where that begins with a cache line.
    kinds = {dtype.__name__: (dtype, dtype) for dtype in DTYPES} | STORED
    for size, edge, (kind, dtypes) in itertools.product(SIZES, EDGES, kinds.items()):
        if not size or (edge == "end" and size * np.dtype(dtypes[1]).itemsize % 64):
            continue
        for rule, values in CASES:
            what = f"jax {label(rule, values)} {size} {kind} {edge}"
            if chosen(what, 8 if long else 400):
                yield what, lambda c=(edge, rule, values, size, dtypes): check(*c)


def broken(long: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to be found out: one that is good, and others that go too far."""

    def touch(edge: str, place: int, write: bool) -> None:
        memory = Memory(edge)
        address = memory.array(np.ones(3, np.float32)).ctypes.data + 4 * place
        if write:
            ctypes.memset(address, 0, 4)
        else:
            ctypes.string_at(address, 4)
        memory.close()

    yield "within", lambda: touch("end", 2, True)
    yield "reads beyond", lambda: touch("end", 3, False)
    yield "writes before", lambda: touch("begin", -1, True)
    yield "writes beside", lambda: touch("end", -1, True)

    def write_to_read_only() -> None:
        ctypes.memset(Memory("end").array(np.ones(3), True).ctypes.data, 0, 4)

    yield "writes to what is only to be read", write_to_read_only
    yield "within again", lambda: touch("begin", 0, False)


DOORS: dict[str, Callable[[bool], Iterator[tuple[str, Callable[[], None]]]]] = {
    "cython": lambda long: core("cython", long),
    "numba": lambda long: core("numba", long),
    "native": native,
    "torch": torch,
    "jax": jax,
    "broken": broken,
}


def main(door: str, form: str, skip: str) -> None:
    for number, (what, check) in enumerate(DOORS[door](form == "long")):
        if number < int(skip):
            continue
        print(f"begin {what}", flush=True)
        try:
            check()
        except Exception as error:
            words = " ".join(str(error).split())
            print(f"failed {type(error).__name__}: {words}", flush=True)
        else:
            print("passed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
