"""What a step costs that can be counted, and so must never grow: memory, Python calls,
native calls. Counts are the same on every machine; times belong to the benchmarks.

The other counts are in test_machine_code.py (vector instructions in each compiled
kernel) and test_cuda.py (loads and stores in each CUDA kernel's PTX and machine code).
"""

import gc
import sys
import tracemalloc

import installed
import numpy as np
import pytest

import fastopt
from fastopt.backends import cython_cpu

RULES = [rule.name for rule in fastopt.RULES]
MODULES = {"cython": cython_cpu, "numba": installed.numba_cpu}
BACKENDS = [name for name in MODULES if name in installed.BACKENDS]
SIZE = 50_000  # above the size from which steps are parallel


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect():
    """Hide the objects of other tests from the garbage collector. With them, a
    collection takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tree(kind, count=1):
    """Parameters or gradients of ``count`` arrays."""
    arrays = [np.full(SIZE // count, 0.5, np.float32) for _ in range(count)]
    return {
        "array": arrays[0],
        "list": arrays,
        "flat": fastopt.flatten(arrays),
        "dict": {str(k): array for k, array in enumerate(arrays)},
    }[kind]


def stepper(rule, backend, kind="flat", count=1):
    opt = getattr(fastopt, rule)(tree(kind, count), backend=backend)
    grads = tree(kind, count)
    for _ in range(3):
        opt.step(grads)
    return lambda: opt.step(grads)


def allocated(step, steps=100):
    """Bytes that a step leaves, and the most that it has at one time."""
    tracemalloc.start()
    try:
        step()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(steps):
            step()
        _, peak = tracemalloc.get_traced_memory()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / steps, peak - before


# The gradients, the scalars and the frames of one step; one of its arrays is 40,000.
SOME_NUMBERS = 16_000


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_allocates_nothing(backend, rule):
    step = stepper(rule, backend, "list", count=5)
    # Some freed tuples Python keeps to use again: a leak would grow at every try.
    left, most = map(min, zip(*(allocated(step) for _ in range(3)), strict=True))
    assert left < 100
    assert most < SOME_NUMBERS


def test_an_allocation_would_be_noticed():
    param, grad = tree("array"), tree("array")
    kept = []

    def temporary():
        np.subtract(param, 0.1 * grad, out=param)

    def leak():
        kept.append(bytes(100))

    assert allocated(temporary)[1] > 4 * SIZE
    assert allocated(leak)[0] > 100


def calls(rule, kind, count, backend="cython"):
    """The Python functions that a compiled step calls, native code's entry among them,
    and those of Python's own in C."""
    params = tree(kind, count)
    opt = getattr(fastopt, rule)(params, backend=backend)
    grads = params.zeros_like() if kind == "flat" else tree(kind, count)
    opt.step(grads)  # the first takes what state starts with
    *plan, compiled, averaged = opt._plan  # which a profile does not show

    def native(*arguments):
        return compiled(*arguments)

    if compiled is not None:
        opt._plan = *plan, native, averaged
    python, builtin = [], []

    def note(frame, event, argument):
        if event == "call":
            python.append(frame.f_code.co_name)
        elif event == "c_call":
            builtin.append(argument.__name__)

    opt.step(grads)
    sys.setprofile(note)
    try:
        opt.step(grads)
    finally:
        sys.setprofile(None)
    assert opt.steps == 3 and builtin.pop() == "setprofile"
    return python, builtin


needs_kernels = pytest.mark.skipif(
    "cython" not in BACKENDS, reason="the compiled kernels are missing"
)


@needs_kernels
@pytest.mark.parametrize("rule", RULES)
def test_calls_of_a_compiled_step(rule):
    """One from Python into native code, and nothing on the way that is not needed. With
    norms: two, and the scalars before and between for each array."""
    if getattr(fastopt, rule).measure is not None:
        few, many = (len(calls(rule, "list", count)[0]) for count in (3, 13))
        assert few <= 45 and many - few <= 10 * 6
        return
    for backend in BACKENDS:
        for kind, count in (("array", 1), ("flat", 1), ("flat", 7)):
            assert calls(rule, kind, count, backend) == (["step", "native"], [])


@needs_kernels
@pytest.mark.parametrize("kind", ["list", "dict"])
def test_calls_do_not_grow_with_the_number_of_arrays(kind):
    few, many = (calls("adamw", kind, count) for count in (3, 100))
    assert few[0] == many[0] and few[0].count("native") == 1
    # But for the cheapest, one for each array in a dict: the gradient is put into a
    # list. Those in a list are put there together.
    each = kind == "dict"
    assert many[1].count("append") == 100 * each
    assert len(many[1]) - 100 * each == len(few[1]) - 3 * each <= 9


@needs_kernels
def test_a_detour_would_be_noticed(monkeypatch):
    step = fastopt.Optimizer.step
    monkeypatch.setattr(fastopt.Optimizer, "step", lambda self, g: step(self, g))
    assert calls("adamw", "array", 1)[0] == ["<lambda>", "step", "native"]


@needs_kernels
def test_the_compiled_steps_have_openmp():
    """Or a step would be serial: half the speed, and no other test would see it."""
    assert cython_cpu.driver().OPENMP
