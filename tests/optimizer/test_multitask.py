"""Gram matrices and steps with the gradients of several tasks. The oracles: exact sums,
and the same step with gradients that were accumulated one task after the other."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, DTYPES, IDS, nonzero, odd_view, same_bits
from installed import BACKENDS, NUMBA, needs_numba, numba_cpu

import fastopt
from fastopt import multitask
from fastopt.backends import cython_cpu, numpy_ref

ROOT = Path(__file__).resolve().parents[2]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# Gram matrices ------------------------------------------------------------------------


def rows(count, size, dtype, seed=0):
    """Gradients of several sizes, at several alignments."""
    rng = np.random.default_rng(seed)
    return [odd_view(nonzero(rng, size, dtype), k % 3) for k in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 9, 12])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 4095, 4096, 4097, 40_003])
@every_dtype
def test_gram_has_the_same_bits_everywhere(dtype, size, count, monkeypatch):
    if size == 40_003 and count > 5:
        count = 6
    J = rows(count, size, dtype)
    expected = fastopt.gram(J, backend="numpy")
    assert expected.dtype == np.float64 and expected.shape == (count, count)
    isas = [] if cython_cpu.missing() else cython_cpu.driver().cpu_supports()
    for isa in isas:
        kernels = cython_cpu.extension(isa)
        monkeypatch.setattr(cython_cpu, "kernels", lambda kernels=kernels: kernels)
        for threads in (1, 2, 3):
            found = fastopt.gram(J, backend="cython", threads=threads)
            assert same_bits(found, expected), (isa, threads)
    if NUMBA:
        assert same_bits(fastopt.gram(J, backend="numba"), expected)


@every_backend
@every_dtype
def test_gram_is_exact_to_the_sum_of_float64(backend, dtype):
    """Against the exact sums of the exact products: within what adding up 10,000
    numbers in float64 may lose. In float32 most digits would be wrong."""
    J = rows(3, 10_007, dtype)
    G = fastopt.gram(J, backend=backend)
    for i, a in enumerate(J):
        for j, b in enumerate(J):
            a, b = a.astype(np.float64), b.astype(np.float64)
            exact, size = math.fsum(a * b), math.fsum(np.abs(a * b))
            assert abs(G[i, j] - exact) <= 200 * 2**-53 * size
            assert G[i, j] == G[j, i]


@every_backend
def test_gram_of_trees(backend):
    """Of arrays in any structure, some of which do not matter to a task."""
    rng = np.random.default_rng(0)
    a, b, c, d = (nonzero(rng, n, np.float32) for n in (6, 5000, 6, 5000))
    first = {"w": a.reshape(2, 3), "b": [b]}
    second = {"w": c.reshape(2, 3), "b": [d]}
    third = {"w": None, "b": [b]}
    G = fastopt.gram([first, second, third], backend=backend)
    alone = [fastopt.gram([x, y], backend=backend) for x, y in ((a, c), (b, d))]
    assert same_bits(G[:2, :2].copy(), alone[0] + alone[1])
    assert same_bits(G[2, :2].copy(), np.array([alone[1][0, 0], alone[1][0, 1]]))
    assert G[2, 2] == alone[1][0, 0]
    flat = fastopt.flatten({"w": first["w"], "b": [b]})
    other = flat.zeros_like()
    other["w"][...], other["b"][0][...] = second["w"], d
    as_array = np.array([flat.data, other.data])
    for J in ([flat, other], (flat.data, other.data), as_array):
        found = fastopt.gram(J, backend=backend)
        np.testing.assert_allclose(found, G[:2, :2], rtol=1e-12)
    assert not fastopt.gram([[None], [None]], backend=backend).any()


@every_backend
def test_what_is_not_finite_is_seen_in_the_gram_matrix(backend):
    J = rows(3, 5000, np.float32)
    J[1][4097] = np.inf
    J[2][3] = np.nan
    G = fastopt.gram(J, backend=backend)
    assert math.isfinite(G[0, 0])
    assert G[1, 1] == np.inf and np.isnan(G[2]).all()
    with pytest.raises(ValueError, match=r"gram\[1\] is not finite"):
        multitask.upgrad(G)


def test_gram_of_tensors():
    torch = pytest.importorskip("torch")
    J = torch.randn(3, 1000)
    assert same_bits(fastopt.gram(J), fastopt.gram(J.numpy()))
    assert same_bits(fastopt.gram(list(J)), fastopt.gram(J.numpy()))


def test_gram_of_a_forked_process():
    """OpenMP's threads stay behind in a fork, and waiting for them would hang."""
    code = """
import os, numpy, fastopt
J = numpy.random.default_rng(0).standard_normal((3, 100_000))
before = fastopt.gram(J, threads=2)
child = os.fork()
if child == 0:
    os._exit(0 if numpy.array_equal(fastopt.gram(J, threads=2), before) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


ONE = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        ([], ValueError, "tasks is empty; pass the gradients of at least one task"),
        ({"w": ONE}, TypeError, "must be a list with the gradients of each task"),
        (fastopt.flatten([ONE]), TypeError, "got FlatBuffer"),
        (3.0, TypeError, "got float"),
        ([ONE, np.ones(4, np.float32)], ValueError, r"tasks\[1\] has shape \(4,\)"),
        ([ONE, np.ones(3)], TypeError, r"tasks\[1\] has dtype float64 but tasks\[0\]"),
        ([ONE.astype(np.float16)], TypeError, "float32 or float64 is needed"),
        ([[ONE], [ONE, ONE]], ValueError, r"tasks\[1\] has 2 entries but tasks\[0\]"),
        ([{"w": ONE}, [ONE]], TypeError, r"tasks\[1\] must be a dict like tasks\[0\]"),
        ([{"w": ONE}, {"v": ONE}], ValueError, r"it lacks 'w'; it has extra 'v'"),
        ([{"w": ONE}, {"w": 1.0}], TypeError, r"tasks\[1\]\['w'\] must be an array"),
        ([ONE, np.ones(6, np.float32)[::2]], ValueError, "not C-contiguous"),
        (np.ones((3, 2), np.float32).T, ValueError, r"tasks\[0\] is not C-contiguous"),
    ],
)
def test_gram_refuses(tasks, error, words):
    with pytest.raises(error, match=words):
        fastopt.gram(tasks)


def test_gram_refuses_threads_and_backends():
    with pytest.raises(ValueError, match="threads must be from 1"):
        fastopt.gram([ONE], threads=0)
    with pytest.raises(ValueError, match="backend must be one of"):
        fastopt.gram([ONE], backend="nothing")


# Steps --------------------------------------------------------------------------------

SIZES = (0, 1, 31, 4097, 40_003)
WEIGHTS = [0.7, -0.3, 0.0, 1.9]
ASKED = {
    "average": {},
    "all": {
        "clip_norm": 3.0,
        "clip_value": 0.02,
        "nonfinite": "raise",
        "zero_grads": True,
    },
}


def tasks_of(k, dtype):
    """The gradients of four tasks, some of which do not depend on some parameters."""
    rng = np.random.default_rng(k)
    tasks = [
        [odd_view(nonzero(rng, n, dtype), (k + t) % 3) for n in SIZES]
        for t in range(len(WEIGHTS))
    ]
    tasks[k % 3][1] = tasks[0][4] = None
    for task in tasks:
        task[2] = None
    return tasks


def run(rule, values, backend, dtype, threads=1, accumulated=False, asked="average"):
    """Two steps; everything that they write, and the optimizer."""
    rng = np.random.default_rng(99)
    params = [odd_view(nonzero(rng, n, dtype), i % 2) for i, n in enumerate(SIZES)]
    opt = rule(params, backend=backend, threads=threads, ema=0.75, **values)
    for k in range(2):
        tasks, more = tasks_of(k, dtype), dict(ASKED[asked])
        if accumulated:
            for grads, weight in zip(tasks, WEIGHTS, strict=True):
                opt.accumulate(grads, grad_scale=weight)
            more.pop("zero_grads", None)
            opt.step(grad_scale=0.7, **more)
            continue
        opt.step(tasks, weights=WEIGHTS, grad_scale=0.7, **more)
        if more.get("zero_grads"):
            assert not any(g.any() for task in tasks for g in task if g is not None)
    state = [array for arrays in opt.state.values() for array in arrays]
    return [*params, *state, *opt.ema_params, np.array(opt._bound.program.carried)], opt


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_same_bits_as_accumulated(rule, values, asked):
    """Every backend combines the tasks to the bits that accumulating them has, for each
    rule, with whatever else a step does."""
    dtype = DTYPES[
        IDS.index(next(i for i in IDS if CASES[IDS.index(i)][0] is rule)) % 2
    ]
    expected, reference = run(rule, values, "numpy", dtype, 1, True, asked)
    for backend in BACKENDS:
        found, opt = run(rule, values, backend, dtype, 3, False, asked)
        assert all(map(same_bits, expected, found)), backend
        assert repr(opt.grad_norm) == repr(reference.grad_norm)


@every_dtype
@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "prodigy"])
def test_same_bits_for_every_instruction_set_and_number_of_threads(
    name, dtype, monkeypatch
):
    rule, values = next(case for case in CASES if case[0].name == name)
    expected, _ = run(rule, values, "numpy", dtype, asked="all")
    for isa in [] if cython_cpu.missing() else cython_cpu.driver().cpu_supports():
        kernels = cython_cpu.extension(isa)
        monkeypatch.setattr(cython_cpu, "kernels", lambda kernels=kernels: kernels)
        for threads in (1, 2, 5):
            found, _ = run(rule, values, "cython", dtype, threads, asked="all")
            assert all(map(same_bits, expected, found)), (isa, threads)


@needs_numba
def test_same_bits_without_the_compiled_driver(monkeypatch):
    for rule, values in CASES[:: len(CASES) // 5]:
        expected, _ = run(rule, values, "numpy", np.float32, asked="all")
        monkeypatch.setattr(numba_cpu, "bind", numba_cpu.bind_alone)
        found, _ = run(rule, values, "numba", np.float32, asked="all")
        monkeypatch.undo()
        assert all(map(same_bits, expected, found))


@pytest.mark.parametrize("mutant", ["order", "skipped", "weight"])
def test_a_mutant_is_caught(monkeypatch, mutant):
    """The tasks in another order, one of them left out, the weights in float64."""
    rule, values = next(case for case in CASES if case[0].name == "sgd")
    expected, _ = run(rule, values, "numpy", np.float32)
    combined = numpy_ref.combined

    def other(grads, weights):
        if mutant == "order":
            return combined(grads[::-1], weights[::-1])
        if mutant == "skipped":
            return combined(grads, [*weights[:-1], 0.0])
        wide = [None if g is None else g.astype(np.float64) for g in grads]
        made = combined(wide, weights)
        return None if made is None else made.astype(np.float32)

    monkeypatch.setattr(numpy_ref, "combined", other)
    found, _ = run(rule, values, "numpy", np.float32)
    assert not all(map(same_bits, expected, found))


def adafactor(backend, accumulated, threads=1):
    rng = np.random.default_rng(0)
    shapes = [(3, 700, 5), (600, 2100), (9,), (1, 4099), (5, 0)]
    params = [nonzero(rng, math.prod(s), np.float32).reshape(s) for s in shapes]
    opt = fastopt.Adafactor(params, backend=backend, threads=threads, lr=0.1)
    for _ in range(2):
        tasks = [
            [nonzero(rng, math.prod(s), np.float32).reshape(s) for s in shapes]
            for _ in WEIGHTS
        ]
        tasks[1][0] = tasks[3][1] = None
        if accumulated:
            for grads, weight in zip(tasks, WEIGHTS, strict=True):
                opt.accumulate(grads, grad_scale=weight)
            opt.step(clip_value=2.0)
        else:
            opt.step(tasks, weights=WEIGHTS, clip_value=2.0)
    return [*params, *opt.state["v"]]


def test_factored_state_sees_the_combined_gradient():
    expected = adafactor("numpy", accumulated=True)
    for backend in BACKENDS:
        for threads in (1, 3):
            found = adafactor(backend, False, threads)
            assert all(map(same_bits, expected, found)), backend


@every_backend
def test_the_weighted_sum_is_what_the_step_takes(backend):
    """By hand: small numbers, exact in float32."""
    p = np.zeros(3, np.float32)
    J = np.array([[1, 2, 4], [8, -16, 32], [3, 3, 3]], np.float32)
    opt = fastopt.gd(p, lr=1.0, backend=backend)
    opt.step(J, weights=[0.5, 2, -1], clip_norm=1e9)
    assert p.tolist() == [-13.5, 34.0, -63.0]
    assert opt.grad_norm == pytest.approx(math.sqrt(13.5**2 + 34**2 + 63**2), 1e-15)


@every_backend
def test_a_task_without_weight_is_not_read(backend):
    p, q = np.zeros(5), np.zeros(5)
    bad = np.array([np.nan, np.inf, 1, 2, 3])
    opt = fastopt.adam(p, backend=backend)
    opt.step([bad, np.arange(5.0), bad], weights=[0, 1, -0.0], nonfinite="raise")
    fastopt.adam(q, backend=backend).step([np.arange(5.0)], weights=[1])
    assert same_bits(p, q) and p.any()
    # And is still a gradient: with momentum, the parameter moves on.
    p, zero = np.ones(2), np.zeros(2)
    opt = fastopt.sgd(p, lr=1.0, momentum=0.5, backend=backend)
    opt.step([np.ones(2)], weights=[1.0])
    opt.step([bad[:2], zero], weights=[0.0, 0.0])
    assert p.tolist() == [-0.5, -0.5] and opt.steps == 2
    opt.step([None, None], weights=[1.0, 1.0])  # and none is none
    assert p.tolist() == [-0.5, -0.5] and opt.steps == 3


@every_backend
def test_zero_gradients_of_every_task(backend):
    """Also of one without weight."""
    p, J = np.zeros(40_000), np.ones((3, 40_000))
    opt = fastopt.gd(p, lr=1.0, backend=backend, threads=2)
    opt.step(J, weights=[1, 0, 2], zero_grads=True)
    assert not J.any() and (p == -3).all()


@every_backend
def test_what_is_not_finite(backend):
    p = np.ones(4)
    J = np.ones((2, 4))
    J[1, 2] = np.nan
    opt = fastopt.gd({"w": p}, lr=1.0, backend=backend)
    tasks = [{"w": J[0]}, {"w": J[1]}]
    with pytest.raises(
        FloatingPointError, match=r"infinity or NaN in grads\[...\]\['w'\]; nothing"
    ):
        opt.step(tasks, weights=[1, 1], nonfinite="raise")
    opt.step(tasks, weights=[1, 1], nonfinite="skip", zero_grads=True)
    assert (p == 1).all() and (opt.steps, opt.skipped) == (0, 1) and not J.any()
    # Infinities of both signs cancel to NaN; squares that overflow are none.
    big = np.full(4, 1e200)
    opt.step([{"w": big}, {"w": big}], weights=[1, -0.5], nonfinite="raise")
    assert np.isfinite(p).all() and opt.steps == 1


@pytest.mark.parametrize("kind", ["flat", "groups", "lookahead", "frozen", "tensor"])
def test_every_structure(kind):
    """Each task's gradients are as those of a step alone."""
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(5)}
    J = [{k: rng.standard_normal(v.shape) for k, v in start.items()} for _ in range(3)]
    weights = [0.25, -1.5, 3.0]

    def after(combine):
        tree = {name: value.copy() for name, value in start.items()}
        if kind == "flat":
            params, tasks = fastopt.flatten(tree), [fastopt.flatten(g) for g in J]
            tree = params.views
        elif kind in ("groups", "frozen"):
            params = [{"params": tree["w"], "lr": 0.3}, {"params": [tree["b"]]}]
            params[0]["frozen"] = kind == "frozen"
            tasks = [[g["w"], [g["b"]]] for g in J]
        elif kind == "tensor":
            torch = pytest.importorskip("torch")
            params = {name: torch.from_numpy(value) for name, value in tree.items()}
            tasks = [{n: torch.from_numpy(v) for n, v in g.items()} for g in J]
        else:
            params, tasks = tree, J
        opt = fastopt.adamw(params, lr=0.1)
        if kind == "lookahead":
            opt = fastopt.Lookahead(opt, k=1)
        combine(opt, tasks)
        return [value.copy() for value in tree.values()]

    def at_once(opt, tasks):
        opt.step(tuple(tasks), weights=np.array(weights))

    def one_by_one(opt, tasks):
        for grads, weight in zip(tasks, weights, strict=True):
            opt.accumulate(grads, grad_scale=weight)
        opt.step()

    assert all(map(same_bits, after(at_once), after(one_by_one)))


def test_rows_of_an_array_for_a_flat_buffer():
    flat = fastopt.flatten([np.zeros(3), np.zeros(2)])
    fastopt.gd(flat, lr=1.0).step(np.ones((4, 5)), weights=[1, 2, 3, 4])
    assert (flat.data == -10).all()


@every_backend
def test_a_plain_step_follows(backend):
    """Nothing of the tasks is left behind."""
    p, q = np.ones(3), np.ones(3)
    for array, before in ((p, True), (q, False)):
        opt = fastopt.gd(array, lr=1.0, backend=backend)
        if before:
            opt.step(np.zeros((2, 3)), weights=[1, 1], zero_grads=True)
        opt.step(np.full(3, 2.0))
        opt.accumulate(np.full(3, 0.5))
        opt.step(clip_value=10.0)
    assert same_bits(p, q) and p.tolist() == [-1.5] * 3


P = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("params", "grads", "weights", "error", "words"),
    [
        (P, [ONE], [1, 2], ValueError, r"weights has shape \(2,\), but there are 1"),
        (P, [ONE], 1.0, ValueError, r"weights has shape \(\), but there are 1"),
        (P, [ONE], [np.nan], ValueError, r"weights\[0\] must be finite in float32"),
        (P, [ONE], [1e39], ValueError, r"weights\[0\] must be finite in float32"),
        (P, [ONE], ["a"], TypeError, "weights must be real numbers"),
        (P, [ONE], [True], TypeError, "weights must be real numbers"),
        (P, [ONE], [[1, 2], [3]], TypeError, "weights must be numbers"),
        (P, [], [], ValueError, "grads is empty"),
        (P, {"a": ONE}, [1], TypeError, "must be a list with the gradients of each"),
        (P, ONE, [1, 1, 1], TypeError, r"grads\[0\] must be an array"),
        (P, [ONE, ONE[:2]], [1, 1], ValueError, r"grads\[1\] has shape \(2,\)"),
        (P, [ONE, np.ones(3)], [1, 1], TypeError, r"grads\[1\] has dtype float64"),
        (P, [ONE, P], [1, 1], ValueError, r"grads\[1\] overlaps the parameters"),
        ({"w": P}, [{"w": ONE}, {}], [1, 1], ValueError, r"grads\[1\] must have the"),
        ({"w": P}, [ONE], [1], TypeError, r"grads\[0\] must be a dict like params"),
        ([P], [[ONE], [ONE[::2]]], [1, 1], ValueError, r"grads\[1\]\[0\] has shape"),
    ],
)
@every_backend
def test_refusals(backend, params, grads, weights, error, words):
    """Before anything is written."""
    opt = fastopt.sgd(params, momentum=0.9, lr=1.0, backend=backend)
    with pytest.raises(error, match=words):
        opt.step(grads, weights=weights, zero_grads=True)
    assert opt.steps == 0 and not P.any() and (ONE == 1).all()
    with pytest.raises(TypeError, match="weights need the gradients of each task"):
        opt.step(weights=[1.0])


@every_backend
def test_refusals_of_arrays_that_are_set_to_zero(backend):
    p, g = np.zeros(4), np.ones(4)
    opt = fastopt.gd([p], backend=backend)
    with pytest.raises(ValueError, match=r"grads\[0\]\[0\] and grads\[1\]\[0\] over"):
        opt.step([[g], [g]], weights=[1, 1], zero_grads=True)
    g.flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\] is read-only"):
        opt.step([[np.ones(4)], [g]], weights=[1, 1], zero_grads=True)
    assert not p.any() and opt.steps == 0
    opt.step([[g], [g]], weights=[1, 1])  # which only reads
    assert p.any()


def test_accumulated_gradients_are_in_the_way():
    opt = fastopt.gd(np.zeros(2))
    opt.accumulate(np.ones(2))
    with pytest.raises(RuntimeError, match="there are accumulated gradients"):
        opt.step(np.ones((2, 2)), weights=[1, 1])


def test_the_page_is_so():
    """Its code runs, and its table has every method."""
    page = (ROOT / "docs" / "multitask.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(compile(code, "multitask.md", "exec"), names)
    assert names["opt"].steps == 1
    table = page.partition("## Which method")[2].partition("##")[0]
    methods = {*multitask.__all__} - {"gram"}
    assert all(f"`{name}`" in table for name in methods)


def test_the_benchmark_runs(tmp_path):
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    record = tmp_path / "record.json"
    command = [sys.executable, ROOT / "bench" / "several_tasks.py", "--json", record]
    done = subprocess.run(
        [*command, "--sizes", "1e3", "--rounds", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(record.read_text())["results"]
    assert list(results) == ["gram of 4 x 1,000", "step of 4 x 1,000"]
    for contenders in results.values():
        assert [each["ratio"] for each in contenders.values()][0] == 1
        assert len(contenders) == 3
