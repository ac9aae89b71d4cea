"""One contender of the benchmark, in a process of its own: JSON lines on stdin, stdout.

    python contender.py NAME

    {"do": "prepare", "case": {...}}  ->  {"seconds": of one step}
    {"do": "burst"}                   ->  {"seconds": of a step, mean over a burst}
    {"do": "drop"}                    ->  {}                 frees the case's memory
    {"do": "about"}                   ->  {"versions": {...}, "OpenMP": [...]}

The reply is {"unavailable": why} if the contender cannot do this, and
{"error": traceback} if anything else goes wrong. The process ends with its stdin.

Each contender has a process of its own, because threads of one library that wait for
work slow the others down, and because all libraries of a process share an OpenMP
runtime. This file is run by its path and imports nothing from ``fastopt.bench`` but
``peers.py`` beside it. So it also runs against another build of fastopt, which
PYTHONPATH names.

apex is not a contender, because its optimizers need a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING or __package__:
    from fastopt.bench import peers
else:  # run by its path, which is first in sys.path
    import peers

BURST_SECONDS = 0.02
MOST_STEPS = 2000
PARAMS, GRADS = 0, 1  # seeds

Array = npt.NDArray[Any]


class Unavailable(Exception):
    """A contender does not have this rule, or is not installed."""


@dataclass(frozen=True)
class Case:
    """A step: a rule, hyperparameters that differ from its defaults, and tensors."""

    rule: str
    hyperparameters: dict[str, Any]
    tensors: int
    elements: int  # of each tensor
    asked: dict[str, Any] = field(default_factory=dict)  # clip_norm, ema
    dtype: str = "float32"  # of parameters and gradients


class Contender(NamedTuple):
    """A prepared step. Tests compare the parameters after it among all contenders."""

    step: Callable[[], object]
    params: Callable[[], list[Array]]
    grads: list[Any]  # `grads[0] *= 2` counts from the next step on


def fastopt_rule(case: Case) -> Any:
    import fastopt

    rule = getattr(fastopt, case.rule, None)
    if rule is None:
        raise Unavailable(f"fastopt {fastopt.__version__} has no rule {case.rule}")
    return rule


def state_count(case: Case) -> int:
    """Return the number of state buffers under the case's hyperparameters."""
    rule = fastopt_rule(case)
    on = {name for name in rule.switches if case.hyperparameters.get(name)}
    return len(rule.variant(on).state)


def every_hyperparameter(case: Case) -> dict[str, Any]:
    """Return the case's hyperparameters and the rule's defaults, which other libraries
    do not share."""
    return {**fastopt_rule(case).hyperparameters, **case.hyperparameters}


def normal(case: Case, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    for _ in range(case.tensors):
        yield rng.standard_normal(case.elements, np.float32).astype(numpy_dtype(case))


def numpy_dtype(case: Case) -> np.dtype[Any]:
    name: Any = case.dtype
    if name == "bfloat16":  # not NumPy's own
        name = importlib.import_module("ml_dtypes").bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


# fastopt, its floor and NumPy -------------------------------------------------------


def flat_buffers(case: Case) -> tuple[Any, Any]:
    import fastopt

    params = fastopt.flatten(list(normal(case, PARAMS)))
    grads = params.zeros_like()
    for view, values in zip(grads.views, normal(case, GRADS), strict=True):
        view[...] = values
    return params, grads


def fastopt_flat(case: Case, backend: str, **options: Any) -> Contender:
    params, grads = flat_buffers(case)
    step = fastopt_step(case, params, grads, backend, **options)
    return Contender(step, lambda: params.views, grads.views)


def fastopt_bf16_state(case: Case) -> Contender:
    """Keep the state in bfloat16, as torch's optimizers do for such parameters."""
    if case.dtype == "float32":
        raise Unavailable("torch's state is float32 for parameters of float32")
    return fastopt_flat(case, "cython", formats="bf16")


def fastopt_step(
    case: Case, params: Any, grads: Any, backend: str, **options: Any
) -> Any:
    asked, options = dict(case.asked), {**case.hyperparameters, **options}
    if "ema" in asked:  # old versions have none
        options = {**options, "ema": asked.pop("ema")}
    opt = fastopt_rule(case)(params, backend=backend, **options)
    return partial(opt.step, grads, **asked)


def fastopt_arrays(case: Case) -> Contender:
    params, grads = list(normal(case, PARAMS)), list(normal(case, GRADS))
    single = case.tensors == 1
    p, g = (params[0], grads[0]) if single else (params, grads)
    step = fastopt_step(case, p, g, "cython")
    return Contender(step, lambda: params, grads)


def refuse_extras(case: Case, dtypes: bool = False) -> None:
    """Raise Unavailable if a contender that only does plain steps is asked for more, or
    for other dtypes than float32, unless it has them."""
    if case.dtype != "float32" and not dtypes:
        raise Unavailable(f"it is not measured with {case.dtype}")
    if case.asked:
        raise Unavailable(f"it has no {' and '.join(case.asked)}")


def floor(case: Case) -> Contender:
    from fastopt.rules.floor import FLOORS

    refuse_extras(case, dtypes=True)
    count = state_count(case)
    if count >= len(FLOORS):
        raise Unavailable(f"there is no floor with {count} state buffers")
    params, grads = flat_buffers(case)
    grads.data *= 1e-6  # every step adds them
    opt = FLOORS[count](params, backend="cython")
    return Contender(partial(opt.step, grads), lambda: params.views, grads.views)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, as it does in programs whose heap has grown. In a
    fresh process, temporaries return to the system and cost page faults, which made
    NumPy's step of 100,000 elements 5 times as long. glibc returns arrays of more than
    32 MiB in any case.
    """
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    )
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the largest value that it accepts


def naive_numpy(case: Case) -> Contender:
    from fastopt.bench.naive import NAIVE, Naive

    refuse_extras(case)
    by_hand = NAIVE.get(case.rule)
    known = inspect.signature(by_hand).parameters if by_hand else {}
    if not by_hand or not case.hyperparameters.keys() <= known.keys():
        raise Unavailable("nobody wrote this by hand in fastopt/bench/naive.py")
    params, grads = list(normal(case, PARAMS)), list(normal(case, GRADS))
    opt = Naive(case.rule, params, **case.hyperparameters)
    return Contender(partial(opt.step, grads), lambda: params, grads)


# The peers ---------------------------------------------------------------------------


def in_table(table: dict[str, Any], case: Case, peer: str) -> Any:
    if peer not in ("torch", "timm"):
        refuse_extras(case, dtypes=peer == "DeepSpeed")
    if case.rule not in table:
        raise Unavailable(f"{peer} does not have this rule")
    return table[case.rule]


def module_of(*names: str) -> Any:
    """Import the first of these modules of fastopt that exists. An older revision that
    is measured may have it under another name."""
    for name in names[:-1]:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return importlib.import_module(names[-1])


def available_threads() -> int:
    return int(module_of("fastopt.runtime.threads", "fastopt.threads").available())


def torch_tensors(case: Case) -> list[Any]:
    """Return parameters with gradients, both from torch's own allocator."""
    import torch

    torch.set_num_threads(available_threads())
    params = []
    for param, grad in zip(normal(case, PARAMS), normal(case, GRADS), strict=True):
        kind = getattr(torch, case.dtype)
        values, gradients = (x.astype(np.float32) for x in (param, grad))
        tensor = torch.tensor(values, dtype=kind).requires_grad_()
        tensor.grad = torch.tensor(gradients, dtype=kind)
        params.append(tensor)
    return params


def torch_contender(
    step: Callable[[], object], params: list[Any], **asked: Any
) -> Contender:
    return Contender(
        peers.torch_sequence(asked, step, params),
        lambda: [p.detach().float().numpy() for p in params],
        [p.grad for p in params],
    )


def torch_optimizer(case: Case, **how: bool) -> Contender:
    import torch

    if case.rule == "lamb" and how == {"foreach": False}:
        return torch_lamb(case)
    name, options = in_table(peers.TORCH, case, "torch")
    optimizer = getattr(torch.optim, name)
    for option in how.keys() - inspect.signature(optimizer).parameters.keys():
        raise Unavailable(f"torch.optim.{name} has no {option}=True")
    params = torch_tensors(case)
    values = peers.with_betas(every_hyperparameter(case))
    opt = optimizer(params, **values, **options, **how)
    return torch_contender(opt.step, params, **case.asked)


def fastopt_torch(case: Case, flat: bool = False) -> Contender:
    """Use the drop-in class on torch's tensors, after ``flatten_`` if ``flat``."""
    import fastopt.torch

    name, options = in_table(peers.TORCH, case, "torch")
    params = torch_tensors(case)
    if flat:
        fastopt.torch.flatten_(params)
    values = peers.with_betas(every_hyperparameter(case))
    opt = getattr(fastopt.torch, name)(params, **values, **options, **case.asked)
    return torch_contender(opt.step, params)


def torch_lamb(case: Case) -> Contender:
    """Use LAMB as people write it for torch, with a loop over the parameters."""
    import torch

    refuse_extras(case)
    params, values = torch_tensors(case), every_hyperparameter(case)
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    beta1, beta2, steps = values["beta1"], values["beta2"], 0

    def step() -> None:
        nonlocal steps
        steps += 1
        with torch.no_grad():
            for p, (m, v) in zip(params, state, strict=True):
                advance(p, m, v)

    def advance(p: Any, m: Any, v: Any) -> None:
        m.lerp_(p.grad, 1 - beta1)
        v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        root = (v.sqrt() / (1 - beta2**steps) ** 0.5).add_(values["eps"])
        u = (m / (1 - beta1**steps)).div_(root).add_(p, alpha=values["weight_decay"])
        ratio = p.norm() / u.norm()
        one = torch.ones_like(ratio)
        ratio = torch.where((ratio > 0) & torch.isfinite(ratio), ratio, one)
        p.add_(u.mul_(ratio), alpha=-values["lr"])

    return torch_contender(step, params)


def torch_huge_pages(case: Case) -> Contender:
    # torch reads this at its first allocation and asks for huge pages from then on.
    # NumPy always does.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    return torch_optimizer(case, fused=True)


def deepspeed(case: Case) -> Contender:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    options = in_table(peers.DEEPSPEED, case, "DeepSpeed")
    params = torch_tensors(case)
    values = peers.with_betas(every_hyperparameter(case))
    try:
        opt = DeepSpeedCPUAdam(params, **values, **options)
    except RuntimeError as error:  # it compiles its kernel on first use
        raise Unavailable(f"{error} {error.__cause__ or ''}".strip()) from error
    return torch_contender(opt.step, params)


def timm(case: Case) -> Contender:
    """Use timm's default, which updates several tensors at a time where it can."""
    module, _, name = in_table(peers.TIMM, case, "timm").rpartition(".")
    peers.import_timm_optimizers_only()
    params, asked = torch_tensors(case), dict(case.asked)
    values = peers.with_betas(every_hyperparameter(case))
    if case.rule == "lamb":
        values["max_grad_norm"] = asked.pop("clip_norm", None)
    optimizer = getattr(importlib.import_module(f"timm.optim.{module}"), name)
    return torch_contender(optimizer(params, **values).step, params, **asked)


def bitsandbytes(case: Case) -> Contender:
    from bitsandbytes import optim

    name = in_table(peers.BITSANDBYTES, case, "bitsandbytes")
    values = peers.with_betas(every_hyperparameter(case))
    if case.rule == "rmsprop" and values["momentum"]:
        raise Unavailable("bitsandbytes' RMSprop takes momentum and ignores it")
    params = torch_tensors(case)
    try:
        opt = getattr(optim, name)(params, **values)
    except NotImplementedError as error:
        raise Unavailable(str(error)) from error
    return torch_contender(opt.step, params)


def optax(case: Case) -> Contender:
    refuse_extras(case)
    jax = jax_on_our_threads()
    from optax import apply_updates

    transforms = peers.optax_transforms(every_hyperparameter(case))
    transform = in_table(transforms, case, "optax")()

    def advance(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return apply_updates(params, updates), state

    return jax_contender(case, jax, transform.init, advance)


def fastopt_c(case: Case) -> Contender:
    """Call the table of fastopt.h by ctypes. Version 1 does not change, so each
    function has a fixed place: ``find`` is word 4, ``start`` 5, ``step`` 6."""
    from fastopt import native

    refuse_extras(case)
    rule = fastopt_rule(case)
    values = native.hyperparameters(rule, **case.hyperparameters)
    on = {name for name in rule.switches if case.hyperparameters.get(name)}
    count, pointer, code = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    capsule = ctypes.pythonapi.PyCapsule_GetPointer
    capsule.restype, capsule.argtypes = pointer, [ctypes.py_object, ctypes.c_char_p]
    table = capsule(native._api, b"fastopt.native._api")
    find_at, start_at, step_at = (count * 7).from_address(table)[4:]
    find = ctypes.CFUNCTYPE(pointer, ctypes.c_char_p)(find_at)
    arrays = (pointer, pointer, pointer, count)  # values, carry, segments, their count
    start = ctypes.CFUNCTYPE(code, pointer, code, *arrays)(start_at)
    step = ctypes.CFUNCTYPE(
        code, pointer, code, count, *arrays, ctypes.c_double, ctypes.c_int
    )(step_at)

    variant = rule.variant(on)
    params, grads = list(normal(case, PARAMS)), list(normal(case, GRADS))
    state = [[np.empty_like(p) for _ in variant.state] for p in params]
    places = [np.array([s.ctypes.data for s in each], np.uintp) for each in state]
    carry = np.empty((case.tensors, len(variant.carry)))
    rows = zip(params, grads, places, strict=True)
    segments = np.array(
        [(p.ctypes.data, g.ctypes.data, s.ctypes.data, p.size) for p, g, s in rows]
    )
    handle = find(native.called(rule, on).encode())
    addresses = [array.ctypes.data for array in (values, carry, segments)]
    arguments = (*addresses, case.tensors)
    if start(handle, 0, *arguments):
        raise RuntimeError(f"fastopt.h refused to start {case}")
    steps = itertools.count(1)

    def advance(_alive: Any = (values, carry, segments, places, state)) -> None:
        if step(handle, 0, next(steps), *arguments, 1.0, 0):
            raise RuntimeError(f"fastopt.h refused a step of {case}")

    return Contender(advance, lambda: params, grads)


def fastopt_jax(case: Case) -> Contender:
    refuse_extras(case)
    rule, jax = fastopt_rule(case), jax_on_our_threads()
    from fastopt.jax import optimizer

    opt = optimizer(rule, **case.hyperparameters)

    def advance(params: Any, state: Any, grads: Any) -> Any:
        return opt.step(params, grads, state)

    return jax_contender(case, jax, opt.init, advance)


def jax_on_our_threads() -> Any:
    if hasattr(os, "sched_setaffinity"):  # XLA has a thread for each CPU it may use
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[: available_threads()])
    import jax

    jax.config.update("jax_platforms", "cpu")
    return jax


def jax_contender(case: Case, jax: Any, init: Any, advance: Any) -> Contender:
    params = [jax.numpy.array(values) for values in normal(case, PARAMS)]
    grads = [jax.numpy.array(values) for values in normal(case, GRADS)]
    state = init(params)
    advance = jax.jit(advance, donate_argnums=(0, 1))  # so that it may work in place

    def step() -> None:
        nonlocal params, state
        params, state = advance(params, state, grads)
        jax.block_until_ready(params)

    return Contender(step, lambda: [np.asarray(p) for p in params], grads)


CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    "fastopt": partial(fastopt_flat, backend="cython"),
    "fastopt arrays": fastopt_arrays,
    "fastopt, bf16 state": fastopt_bf16_state,
    "fastopt C": fastopt_c,
    "floor": floor,
    "naive NumPy": naive_numpy,
    "fastopt torch": fastopt_torch,
    "fastopt torch, flat": partial(fastopt_torch, flat=True),
    "torch fused": partial(torch_optimizer, fused=True),
    "torch fused, huge pages": torch_huge_pages,
    "torch foreach": partial(torch_optimizer, foreach=True),
    "torch loop": partial(torch_optimizer, foreach=False),
    "timm": timm,
    "DeepSpeed": deepspeed,
    "optax": optax,
    "fastopt jax": fastopt_jax,
    "bitsandbytes": bitsandbytes,
    "fastopt numba": partial(fastopt_flat, backend="numba"),
}

# The process ------------------------------------------------------------------------


def import_packages(name: str) -> None:
    for package in peers.PACKAGES.get(name, ()):
        try:
            if package == "timm":
                peers.import_timm_optimizers_only()
            importlib.import_module(package)
        except ImportError as error:
            raise Unavailable(
                f"{package} cannot be imported: {error}; pip install {package}"
            ) from error


def about(name: str) -> dict[str, Any]:
    """Return versions, and the file names of the OpenMP runtimes that are loaded."""
    from fastopt import __version__

    loaded = module_of("fastopt.runtime.threads", "fastopt.info").openmp_runtimes()
    paths = [line for line in loaded.split("\n") if line.startswith("/")]
    packages = ("numpy", *peers.PACKAGES.get(name, ()))
    return {
        "versions": {"fastopt": __version__}
        | {package: metadata.version(package) for package in packages},
        "OpenMP": sorted({os.path.basename(path) for path in paths}),
    }


def timed(step: Callable[[], object], count: int) -> float:
    """Return the mean seconds of ``count`` steps, after one that is not measured."""
    step()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) / count
    finally:
        gc.enable()


class Process:
    """The state of this process: one contender, prepared for one case."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.contender: Contender | None = None
        self.count = 1

    def drop(self) -> dict[str, Any]:
        self.contender = None
        gc.collect()
        return {}

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.drop()
        import_packages(self.name)
        self.contender = CONTENDERS[self.name](Case(**case))
        self.contender.step()  # compiles, allocates, touches
        # The fastest of three: a single slow step would make all bursts short.
        seconds = min(timed(self.contender.step, 1) for _ in range(3))
        self.count = max(1, min(MOST_STEPS, int(BURST_SECONDS / seconds)))
        return {"seconds": seconds}

    def burst(self) -> dict[str, Any]:
        if self.contender is None:
            raise ValueError("wanted prepare, then burst")
        return {"seconds": timed(self.contender.step, self.count)}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "about":
            import_packages(self.name)
            return about(self.name)
        if request["do"] == "prepare":
            return self.prepare(request["case"])
        if request["do"] == "drop":
            return self.drop()
        if request["do"] == "burst":
            return self.burst()
        raise ValueError(f"wanted prepare, burst, drop or about; got {request}")


def serve(process: Process, requests: Iterable[str], replies: TextIO) -> None:
    for line in requests:
        try:
            reply = process.answer(json.loads(line))
        except Unavailable as error:
            process.drop()
            reply = {"unavailable": str(error)}
        except Exception:  # the parent raises it
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


def main(kind: Callable[[str], Process] = Process) -> None:
    # Libraries that import a "report" of their own must not get this folder's.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]
    # Only replies go to stdout. What libraries print goes to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    keep_freed_memory()
    # For all OpenMP runtimes, which read it when they are loaded.
    os.environ["OMP_NUM_THREADS"] = str(available_threads())
    try:
        serve(kind(sys.argv[1]), sys.stdin, replies)
    except KeyboardInterrupt:  # Ctrl-C goes to parent and children; the parent reports
        sys.exit(130)


if __name__ == "__main__":
    main()
