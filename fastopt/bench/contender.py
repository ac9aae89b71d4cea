"""One contender of the benchmark, in a process of its own: JSON lines on stdin, stdout.

    python contender.py NAME

    {"do": "prepare", "case": {...}}  ->  {"seconds": of one step}
    {"do": "burst"}                   ->  {"seconds": of a step, mean over a burst}
    {"do": "drop"}                    ->  {}                 frees the case's memory
    {"do": "about"}                   ->  {"versions": {...}, "OpenMP": [...]}

What a contender cannot do is answered with {"unavailable": why}, whatever else goes
wrong with {"error": traceback}; at the end of stdin the process ends.

Processes of their own, because threads of one library that wait for work slow the
others down, and because an OpenMP runtime is shared by all that is loaded. This file
imports nothing else from ``fastopt.bench``, so that it also runs against another build
of fastopt, which PYTHONPATH names.

apex is no contender: its optimizers need a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

BURST_SECONDS = 0.02
MOST_STEPS = 2000
PARAMS, GRADS = 0, 1  # seeds

Array = npt.NDArray[Any]


class Unavailable(Exception):
    """A contender does not have this rule, or is not installed."""


@dataclass(frozen=True)
class Case:
    """What one step does: a rule, what differs from its defaults, and the tensors."""

    rule: str
    hyperparameters: dict[str, Any]
    tensors: int
    elements: int  # of each tensor
    asked: dict[str, Any] = field(default_factory=dict)  # beside: clip_norm, ema


class Contender(NamedTuple):
    """How to do a step; the rest lets tests see that it is the same as everybody's."""

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
    """How many state buffers the rule has under the case's hyperparameters."""
    rule = fastopt_rule(case)
    on = {name for name in rule.switches if case.hyperparameters.get(name)}
    return len(rule.variant(on).state)


def every_hyperparameter(case: Case) -> dict[str, Any]:
    """With the rule's defaults, because other libraries have others."""
    return {**fastopt_rule(case).hyperparameters, **case.hyperparameters}


def normal(case: Case, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    for _ in range(case.tensors):
        yield rng.standard_normal(case.elements, np.float32)


# fastopt, its floor and NumPy -------------------------------------------------------


def flat_buffers(case: Case) -> tuple[Any, Any]:
    import fastopt

    params = fastopt.flatten(list(normal(case, PARAMS)))
    grads = params.zeros_like()
    for view, values in zip(grads.views, normal(case, GRADS), strict=True):
        view[...] = values
    return params, grads


def fastopt_flat(case: Case, backend: str) -> Contender:
    params, grads = flat_buffers(case)
    step = fastopt_step(case, params, grads, backend)
    return Contender(step, lambda: params.views, grads.views)


def fastopt_step(case: Case, params: Any, grads: Any, backend: str) -> Any:
    of_step = {k: v for k, v in case.asked.items() if k != "ema"}
    of_opt = {k: v for k, v in case.asked.items() if k == "ema"}  # an old one has none
    rule = fastopt_rule(case)
    opt = rule(params, backend=backend, **of_opt, **case.hyperparameters)
    return partial(opt.step, grads, **of_step)


def fastopt_arrays(case: Case) -> Contender:
    params, grads = list(normal(case, PARAMS)), list(normal(case, GRADS))
    given = (params, grads) if case.tensors > 1 else (params[0], grads[0])
    step = fastopt_step(case, given[0], given[1], "cython")
    return Contender(step, lambda: params, grads)


def alone(case: Case) -> None:
    """A contender does steps, and nothing beside."""
    if case.asked:
        raise Unavailable(f"it has no {' and '.join(case.asked)}")


def floor(case: Case) -> Contender:
    from fastopt.rules.floor import FLOORS

    alone(case)
    count = state_count(case)
    if count >= len(FLOORS):
        raise Unavailable(f"there is no floor with {count} state buffers")
    params, grads = flat_buffers(case)
    grads.data *= 1e-6  # every step adds them
    opt = FLOORS[count](params, backend="cython")
    return Contender(partial(opt.step, grads), lambda: params.views, grads.views)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as it does in programs whose heap has grown. In a
    fresh one, temporaries go back to the system and come back by page faults: that
    made NumPy's step of 100,000 elements 5 times as long, which is not its arithmetic.
    Arrays of more than 32 MiB glibc gives back all the same.
    """
    mallopt = (
        getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    )
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the most that it takes


def naive_numpy(case: Case) -> Contender:
    from fastopt.bench.naive import NAIVE, Naive

    alone(case)
    by_hand = NAIVE.get(case.rule)
    known = inspect.signature(by_hand).parameters if by_hand else {}
    if not by_hand or not case.hyperparameters.keys() <= known.keys():
        raise Unavailable("nobody wrote this by hand in fastopt/bench/naive.py")
    params, grads = list(normal(case, PARAMS)), list(normal(case, GRADS))
    opt = Naive(case.rule, params, **case.hyperparameters)
    return Contender(partial(opt.step, grads), lambda: params, grads)


# The peers. Each table maps our rule to the peer's name for the same update; a rule
# that is not in it, or does something else there, is one that the peer does not have.


def looked_up(table: dict[str, Any], case: Case, peer: str) -> Any:
    if peer not in ("torch", "timm"):
        alone(case)
    if case.rule not in table:
        raise Unavailable(f"{peer} does not have this rule")
    return table[case.rule]


PAIRS = {
    "betas": ("beta1", "beta2"),
    "etas": ("eta_minus", "eta_plus"),
    "step_sizes": ("step_min", "step_max"),
}


def with_betas(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """torch's spelling, which DeepSpeed and bitsandbytes share."""
    given = dict(hyperparameters)
    for pair, names in PAIRS.items():
        if names[0] in given:
            given[pair] = tuple(map(given.pop, names))
    return given


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
    """Parameters with gradients, both in memory from torch's own allocator."""
    import torch

    torch.set_num_threads(available_threads())
    params = []
    for values, grad in zip(normal(case, PARAMS), normal(case, GRADS), strict=True):
        tensor = torch.from_numpy(values).clone().requires_grad_()
        tensor.grad = torch.from_numpy(grad).clone()
        params.append(tensor)
    return params


def of_torch(opt: Any, params: list[Any]) -> Contender:
    return Contender(
        opt.step,
        lambda: [p.detach().numpy() for p in params],
        [p.grad for p in params],
    )


TORCH: dict[str, tuple[str, dict[str, bool]]] = {
    "gd": ("SGD", {}),
    "sgd": ("SGD", {}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "adamw": ("AdamW", {}),
    "amsgradw": ("AdamW", {"amsgrad": True}),
    "adamax": ("Adamax", {}),
    "nadam": ("NAdam", {}),
    "nadamw": ("NAdam", {"decoupled_weight_decay": True}),
    "radam": ("RAdam", {}),
    "radamw": ("RAdam", {"decoupled_weight_decay": True}),
    "adagrad": ("Adagrad", {}),
    "adadelta": ("Adadelta", {}),
    "rprop": ("Rprop", {}),
    "asgd": ("ASGD", {}),
}


def torch_optimizer(case: Case, **how: bool) -> Contender:
    import torch

    if case.rule == "lamb" and how == {"foreach": False}:
        return torch_lamb(case)
    name, options = looked_up(TORCH, case, "torch")
    optimizer = getattr(torch.optim, name)
    for option in how.keys() - inspect.signature(optimizer).parameters.keys():
        raise Unavailable(f"torch.optim.{name} has no {option}=True")
    params = torch_tensors(case)
    given = with_betas(every_hyperparameter(case))
    opt = optimizer(params, **given, **options, **how)
    contender = of_torch(opt, params)
    return contender._replace(step=torch_sequence(case.asked, opt.step, params))


def fastopt_torch(case: Case, flat: bool = False) -> Contender:
    """The drop-in class, over torch's tensors; ``flat``: after ``flatten_``."""
    import fastopt.torch

    name, options = looked_up(TORCH, case, "torch")
    params = torch_tensors(case)
    if flat:
        fastopt.torch.flatten_(params)
    given = with_betas(every_hyperparameter(case))
    opt = getattr(fastopt.torch, name)(params, **given, **options, **case.asked)
    return of_torch(opt, params)


def torch_sequence(asked: dict[str, Any], step: Any, params: list[Any]) -> Any:
    """What a torch user writes around a step for what is asked beside."""
    import torch

    if not asked:
        return step
    norm, ema = asked.get("clip_norm"), asked.get("ema")
    averages = [p.detach().clone() for p in params] if ema else []

    def sequence() -> None:
        if norm:
            torch.nn.utils.clip_grad_norm_(params, norm, foreach=True)
        step()
        if ema:  # as in torch.optim.swa_utils
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 1 - ema)

    return sequence


def torch_lamb(case: Case) -> Contender:
    """LAMB as it is written for torch: a loop over the parameters."""
    import torch

    alone(case)
    params, given = torch_tensors(case), every_hyperparameter(case)
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    beta1, beta2, steps = given["beta1"], given["beta2"], 0

    def step() -> None:
        nonlocal steps
        steps += 1
        with torch.no_grad():
            for p, (m, v) in zip(params, state, strict=True):
                advance(p, m, v)

    def advance(p: Any, m: Any, v: Any) -> None:
        m.lerp_(p.grad, 1 - beta1)
        v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        root = (v.sqrt() / (1 - beta2**steps) ** 0.5).add_(given["eps"])
        u = (m / (1 - beta1**steps)).div_(root).add_(p, alpha=given["weight_decay"])
        ratio = p.norm() / u.norm()
        one = torch.ones_like(ratio)
        ratio = torch.where((ratio > 0) & torch.isfinite(ratio), ratio, one)
        p.add_(u.mul_(ratio), alpha=-given["lr"])

    return Contender(
        step,
        lambda: [p.detach().numpy() for p in params],
        [p.grad for p in params],
    )


def torch_huge_pages(case: Case) -> Contender:
    # torch reads this when it first allocates, and asks for huge pages from then on,
    # as NumPy does without being told.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    return torch_optimizer(case, fused=True)


DEEPSPEED = {"adam": {"adamw_mode": False}, "adamw": {"adamw_mode": True}}


def deepspeed(case: Case) -> Contender:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    options = looked_up(DEEPSPEED, case, "DeepSpeed")
    params = torch_tensors(case)
    given = with_betas(every_hyperparameter(case))
    try:
        opt = DeepSpeedCPUAdam(params, **given, **options)
    except RuntimeError as error:  # it compiles its kernel on first use
        raise Unavailable(f"{error} {error.__cause__ or ''}".strip()) from error
    return of_torch(opt, params)


TIMM = {"lamb": "lamb.Lamb", "lion": "lion.Lion"}


def only_timms_optimizers() -> None:
    """All of timm needs torchvision, which needs a torch of its own."""
    found = None if "timm" in sys.modules else importlib.util.find_spec("timm")
    for place in (found and found.submodule_search_locations) or ():
        for name in ("timm", "timm.optim"):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [place]
            place = os.path.join(place, "optim")


def timm(case: Case) -> Contender:
    """As it comes: its tensors are taken four at a time or one by one, as it likes."""
    module, _, name = looked_up(TIMM, case, "timm").rpartition(".")
    only_timms_optimizers()
    params, asked = torch_tensors(case), dict(case.asked)
    given = with_betas(every_hyperparameter(case))
    if case.rule == "lamb":
        given["max_grad_norm"] = asked.pop("clip_norm", None)
    optimizer = getattr(importlib.import_module(f"timm.optim.{module}"), name)
    opt = optimizer(params, **given)
    contender = of_torch(opt, params)
    return contender._replace(step=torch_sequence(asked, opt.step, params))


BITSANDBYTES = {
    "sgd": "SGD32bit",
    "rmsprop": "RMSprop32bit",
    "adam": "Adam32bit",
    "adamw": "AdamW32bit",
}


def bitsandbytes(case: Case) -> Contender:
    from bitsandbytes import optim

    name = looked_up(BITSANDBYTES, case, "bitsandbytes")
    given = with_betas(every_hyperparameter(case))
    if case.rule == "rmsprop" and given["momentum"]:
        raise Unavailable("bitsandbytes' RMSprop takes momentum and ignores it")
    params = torch_tensors(case)
    try:
        opt = getattr(optim, name)(params, **given)
    except NotImplementedError as error:
        raise Unavailable(str(error)) from error
    return of_torch(opt, params)


def optax_transform(case: Case) -> Any:
    """AMSGrad is missing: optax takes the maximum of the corrected second moment."""
    import jax.numpy as jnp
    import optax

    given = every_hyperparameter(case)
    lr, momentum = given["lr"], given.get("momentum") or None
    adam = {"b1": given.get("beta1"), "b2": given.get("beta2"), "eps": given.get("eps")}
    table = {
        "gd": lambda: optax.sgd(lr),
        "dynamic_gd": lambda: optax.sgd(lambda done: lr / (1 + jnp.sqrt(done))),
        "sgd": lambda: optax.sgd(lr, momentum),
        "rmsprop": lambda: optax.rmsprop(
            lr,
            given["alpha"],
            given["eps"],
            eps_in_sqrt=False,
            centered=given["centered"],
            momentum=momentum,
        ),
        "adam": lambda: optax.adam(lr, **adam),
        "adamw": lambda: optax.adamw(lr, **adam, weight_decay=given["weight_decay"]),
    }
    return looked_up(table, case, "optax")()


def optax(case: Case) -> Contender:
    alone(case)
    jax = jax_on_our_threads()
    from optax import apply_updates

    transform = optax_transform(case)

    def advance(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return apply_updates(params, updates), state

    return of_jax(case, jax, transform.init, advance)


def fastopt_jax(case: Case) -> Contender:
    alone(case)
    rule, jax = fastopt_rule(case), jax_on_our_threads()
    from fastopt.jax import optimizer

    opt = optimizer(rule, **case.hyperparameters)

    def advance(params: Any, state: Any, grads: Any) -> Any:
        return opt.step(params, grads, state)

    return of_jax(case, jax, opt.init, advance)


def jax_on_our_threads() -> Any:
    if hasattr(os, "sched_setaffinity"):  # XLA has a thread for each CPU it may use
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[: available_threads()])
    import jax

    jax.config.update("jax_platforms", "cpu")
    return jax


def of_jax(case: Case, jax: Any, init: Any, advance: Any) -> Contender:
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

# What a contender imports, beside NumPy and fastopt.
PACKAGES: dict[str, tuple[str, ...]] = {
    "fastopt torch": ("torch",),
    "fastopt torch, flat": ("torch",),
    "torch fused": ("torch",),
    "torch fused, huge pages": ("torch",),
    "torch foreach": ("torch",),
    "torch loop": ("torch",),
    "timm": ("torch", "timm"),
    "DeepSpeed": ("torch", "deepspeed"),
    "optax": ("jax", "optax"),
    "fastopt jax": ("jax",),
    "bitsandbytes": ("torch", "bitsandbytes"),
    "fastopt numba": ("numba",),
}


# The process ------------------------------------------------------------------------


def import_packages(name: str) -> None:
    for package in PACKAGES.get(name, ()):
        try:
            if package == "timm":
                only_timms_optimizers()
            importlib.import_module(package)
        except ImportError as error:
            raise Unavailable(
                f"{package} cannot be imported: {error}; pip install {package}"
            ) from error


def about(name: str) -> dict[str, Any]:
    """Versions and, by their file names only, the OpenMP runtimes loaded so far."""
    from fastopt import __version__

    loaded = module_of("fastopt.runtime.threads", "fastopt.info").openmp_runtimes()
    paths = [line for line in loaded.split("\n") if line.startswith("/")]
    packages = ("numpy", *PACKAGES.get(name, ()))
    return {
        "versions": {"fastopt": __version__}
        | {package: metadata.version(package) for package in packages},
        "OpenMP": sorted({os.path.basename(path) for path in paths}),
    }


def timed(step: Callable[[], object], count: int) -> float:
    """Seconds of a step: the mean of ``count``, after one that is not measured."""
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
    """What this process holds: one contender, prepared for one case."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.contender: Contender | None = None
        self.count = 1

    def drop(self) -> dict[str, Any]:
        self.contender = None
        gc.collect()
        return {}

    def prepare(self, case: Case) -> dict[str, Any]:
        self.drop()
        import_packages(self.name)
        self.contender = CONTENDERS[self.name](case)
        self.contender.step()  # compiles, allocates, touches
        # The least of some: after a single one's hiccup all bursts would be short.
        seconds = min(timed(self.contender.step, 1) for _ in range(3))
        self.count = max(1, min(MOST_STEPS, int(BURST_SECONDS / seconds)))
        return {"seconds": seconds}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "about":
            import_packages(self.name)
            return about(self.name)
        if request["do"] == "prepare":
            return self.prepare(Case(**request["case"]))
        if request["do"] == "drop":
            return self.drop()
        if request["do"] == "burst" and self.contender:
            return {"seconds": timed(self.contender.step, self.count)}
        raise ValueError(f"wanted prepare, then burst; drop or about; got {request}")


def serve(name: str, requests: Iterable[str], replies: TextIO) -> None:
    process = Process(name)
    for line in requests:
        try:
            reply = process.answer(json.loads(line))
        except Unavailable as error:
            process.drop()
            reply = {"unavailable": str(error)}
        except Exception:  # the parent raises it
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


def main() -> None:
    # This folder's modules are not for the libraries that import their own "report".
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]
    # Libraries print; stdout is for the replies alone, so theirs goes to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    keep_freed_memory()
    # For all OpenMP runtimes, which read it when they are loaded.
    os.environ["OMP_NUM_THREADS"] = str(available_threads())
    try:
        serve(sys.argv[1], sys.stdin, replies)
    except KeyboardInterrupt:  # Ctrl-C goes to parent and children; the parent reports
        sys.exit(130)


if __name__ == "__main__":
    main()
