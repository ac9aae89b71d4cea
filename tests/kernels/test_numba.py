"""What is particular to the JIT backend: compilation, cache, threads, fork.

That its bits are those of the other backends, for every rule, is tested elsewhere.
"""

import ast
import collections
import hashlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import installed_numba  # noqa: F401
import numba
import numpy as np
import pytest
from cases import DTYPES, same_bits

from fastopt.backends import kernel_cache, kernel_link, numba_cpu, numpy_ref
from fastopt.memory.segments import Segment
from fastopt.rule import Rule, copysign, maximum, minimum, sign, where
from fastopt.rule import sqrt as root
from fastopt.rules import RULES, adamw, prodigy, sophia_g
from fastopt.step import Request

ALL = [rule for public in RULES for rule in public.all]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of our own, so that no entry of an earlier run takes part."""
    path = tmp_path_factory.mktemp("cache")
    path.chmod(0o700)
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTOPT_CACHE_DIR", str(path))
    numba_cpu.own_driver(numba_cpu.serial)  # is in none of the caches that tests make
    yield path
    patch.undo()


def no_carry(rows=1):
    return np.zeros((2, rows, 0))


def run(bind, rule, params, grads, constants, threads=1, groups=None):
    """Steps from a zero state; all arrays that they leave, and the count."""
    segments = [
        Segment(p.copy(), tuple(np.zeros_like(p) for _ in rule.state), group)
        for p, group in zip(params, groups or [0] * len(params), strict=True)
    ]
    count = np.zeros(1, np.int64)
    step = bind(rule, segments, count, no_carry(1 + max(groups or [0])))
    for grad in grads:
        assert step.take(grad)
        assert step(constants, Request(threads=threads)) is True
    return [a for s in segments for a in (s.param, *s.state)], int(count[0])


BOTH = numba_cpu.bind, numba_cpu.bind_alone  # with the compiled driver and without


def agree(rule, params, grads, constants, threads=1, groups=None, binds=BOTH):
    expected, _ = run(numpy_ref.bind, rule, params, grads, constants, 1, groups)
    same = []
    for bind in binds:
        found, count = run(bind, rule, params, grads, constants, threads, groups)
        assert count == len(grads)
        same += map(same_bits, expected, found)
    return all(same)


HALF = 0.1  # a plain number, which takes the dtype of the parameters


def clipped(x, bound):
    return maximum(minimum(x, bound), -bound)


def everything(p, g, m, n, lr, a):
    m = where((g > p) & (m == m), m + a * (g - m), copysign(g, p))
    n = clipped(root(abs(m)) * HALF + sign(g), a) + n
    return p - lr * sign(m) / root(n) + minimum(p, g) * lr - maximum(n, m), m, n


odd = Rule(everything, lambda t: (0.1, 0.3), state=("m", "n"))

SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 1e-310, 3e38]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_primitive_and_special_value(dtype):
    with np.errstate(all="ignore"):
        values = np.array(SPECIAL).astype(dtype)
    p, g = (a.ravel().copy() for a in np.meshgrid(values, values))
    rng = np.random.default_rng(0)
    params = [p, rng.standard_normal(1001).astype(dtype)]
    grads = [[g, rng.standard_normal(1001).astype(dtype)] for _ in range(3)]
    assert agree(odd, params, grads, [(1.5, 0.1, 0.3)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rule_made_in_a_function(dtype):
    def rule(bound, largest):
        def limited(x):
            return minimum(largest(x, -bound), bound)

        def update(p, g, lr):
            return (p - lr * limited(g),)

        return Rule(update, lambda t: (0.1,))

    g = np.linspace(-1, 1, 101).astype(dtype)
    assert agree(rule(0.3, maximum), [g], [[g]], [(1.0, 0.1)])
    # Bytecode alone would not tell these from the first.
    assert agree(rule(0.7, maximum), [g], [[g]], [(1.0, 0.1)])
    assert agree(rule(0.3, minimum), [g], [[g]], [(1.0, 0.1)])


def ragged(dtype, none=False):
    rng = np.random.default_rng(1)
    sizes = [0, 1, 20011, 0, 15, 16, 17, 1, 30000, 3, 0, *[7] * 40, 8191, 0]
    params = [rng.standard_normal(n).astype(dtype) for n in sizes]
    grads = [[rng.standard_normal(n).astype(dtype) for n in sizes] for _ in range(3)]
    if none:
        grads = [[None if i % 5 == k else g for i, g in enumerate(gs)]
                 for k, gs in enumerate(grads)]  # fmt: skip
    return params, grads, [i % 3 for i in range(len(sizes))]


CONSTANTS = [(s, 0.01 * s, 0.1, 0.001, 1e-8, 1e-5) for s in (1.0, 0.5, -1.0)]


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_segments(dtype, none, threads):
    params, grads, groups = ragged(dtype, none)
    assert agree(adamw, params, grads, CONSTANTS, threads, groups)


def test_all_grads_none():
    params, _, groups = ragged(np.float32)
    assert agree(adamw, params, [[None] * len(params)], CONSTANTS, 2, groups)


def test_checker_sees_a_skipped_tail(monkeypatch):
    @numba_cpu.compiled
    def whole_lines(table, row, width):
        length = numba_cpu.word(table, (row + 1) * width + numba_cpu.LENGTH)
        return length // 16 * 16

    params, grads, groups = ragged(np.float32)
    monkeypatch.setenv("FASTOPT_CACHE_DIR", "")
    monkeypatch.setattr(numba_cpu, "own_driver", numba_cpu.own_driver.__wrapped__)
    alone = {"binds": [numba_cpu.bind_alone]}
    assert agree(adamw, params, grads, CONSTANTS, 1, groups, **alone)
    monkeypatch.setattr(numba_cpu, "length_of", whole_lines)
    walk = numba_cpu.compiled(numba_cpu.walk.py_func)
    monkeypatch.setattr(numba_cpu, "walk", walk)
    assert not agree(adamw, params, grads, CONSTANTS, 1, groups, **alone)


# What a user's rule may get wrong


def test_wrong_number_of_results():
    def update(p, g, m, lr):
        return (p - lr * g,)

    with pytest.raises(TypeError, match=r"must return \(p, \*state\), here 2 values"):
        run(
            numba_cpu.bind,
            Rule(update, lambda t: (1.0,), state=("m",)),
            [np.ones(3)],
            [],
            [],
        )


WIDE = np.float64(0.1)


def test_float64_in_a_float32_rule():
    def update(p, g, lr):
        return (p - WIDE * lr * g,)

    rule = Rule(update, lambda t: (1.0,))
    with pytest.raises(TypeError, match="values of type float32"):
        run(numba_cpu.bind, rule, [np.ones(3, np.float32)], [], [])


def test_what_numba_cannot_compile():
    def update(p, g, lr):
        return (p - lr * where(g),)

    with pytest.raises(TypeError, match="Numba cannot compile update of 'test_numba'"):
        run(numba_cpu.bind, Rule(update, lambda t: (1.0,)), [np.ones(3)], [], [])


@numba.njit
def printing(x):
    print(x)
    return x


@numba.njit
def raising(x):
    if x > 0.5:
        raise ValueError("it is too large")
    return x


@numba.njit
def raising_a_number(x):
    if x > 0.5:
        raise ValueError(x)
    return x


HELPERS = {
    printing: "calls functions of Python, such as print",
    raising: "may raise an exception",
    raising_a_number: "may raise an exception",
}


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("what", ["update", "measure"])
def test_compiled_helpers_that_cannot_be_in_a_step(what, helper):
    """An error in a call of Python would leave the GIL held, and the step would hang.
    An exception would only be printed."""

    def function(p, g, lr):
        return (p - lr * helper(g),)

    more = {"settle": lambda t, n, total, lr: (lr,)} if what == "measure" else {}
    plain = {"update": lambda p, g, lr: (p - lr * g,), "scalars": lambda t: (1.0,)}
    rule = Rule(**plain | more | {what: function}, name="mine")
    message = f"cannot compile {what} of 'mine' for .*: it {HELPERS[helper]}"
    if what == "measure":  # which is tried on an array to know the number of terms
        vars(rule)["terms"] = 1
    with pytest.raises(TypeError, match=message):
        run(numba_cpu.bind, rule, [np.ones(3)], [], [])


def test_too_few_scalars():
    for bind in BOTH:
        with pytest.raises(TypeError, match="takes 5 scalars, but scalars returned 2"):
            run(bind, adamw, [np.ones(3)], [[np.ones(3)]], [(1.0, 0.1, 0.2)])


# Machine code


def compiled_ir(rule, dtype):
    """The optimized LLVM IR of a rule's kernel."""
    seen = []
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTOPT_CACHE_DIR", "")
    parse = numba_cpu.llvm.parse_assembly
    patch.setattr(
        numba_cpu.llvm, "parse_assembly", lambda text: seen.append(text) or parse(text)
    )
    try:
        numba_cpu.kernel_for.__wrapped__(
            numba_cpu.update_kernel,
            rule.update,
            np.dtype(dtype),
            2 + len(rule.state),
            0,
            "",
        )
    finally:
        patch.undo()
    return seen[-1]


def streams(rule):
    """How many buffers an update must read and write: not what it only hands on."""
    source = textwrap.dedent(inspect.getsource(rule.update))
    names = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)]
    loads = collections.Counter(n.id for n in names if isinstance(n.ctx, ast.Load))
    assigned = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    taken = rule.update.__code__.co_varnames[2 : 2 + len(rule.state)]
    kept = [name for name in taken if name not in assigned]
    unread = [name for name in kept if loads[name] == 1]
    return 2 + len(taken) - len(unread), 1 + len(taken) - len(kept)


def test_streams_of_an_update():
    assert streams(adamw) == (4, 3)
    assert streams(sophia_g) == (4, 2)  # the estimate of the curvature is read
    assert streams(prodigy) == (5, 4)  # p0 is for measure


@pytest.mark.parametrize(
    "dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("rule", [*ALL, odd], ids=lambda r: r.name)
def test_vectorised_without_contraction_or_float64(rule, dtype):
    text = compiled_ir(rule, dtype)
    kind = {np.float32: "float", np.float64: "double"}[dtype]
    if dtype is np.float32:
        assert "double" not in text
    assert not re.search(r"\bfma\b|fmuladd|\bfast\b|\bcontract\b", text)
    # No version of the loop for streams that overlap: LLVM knows that they do not.
    assert "vector.memcheck" not in text
    width = max(map(int, re.findall(rf"<(\d+) x {kind}>", text)))
    assembly = kernel_link.target_machine().emit_assembly(
        numba_cpu.llvm.parse_assembly(text)
    )
    assert "vfmadd" not in assembly and "vfnmadd" not in assembly
    if not numba_cpu.llvm.get_host_cpu_features().get("avx2"):
        pytest.skip("this CPU has no 256-bit vectors")
    assert width * np.dtype(dtype).itemsize >= 32
    # Every stream is read and written by whole vectors.
    vector = rf"<{width} x {kind}>"
    read, written = streams(rule)
    assert len(re.findall(rf"= load {vector}", text)) >= read
    assert len(re.findall(rf"store {vector}", text)) >= written
    for name in ("sqrt", "div"):
        scalar = rf"v{name}s[sd]"
        if re.search(scalar, assembly):  # the loop's tail
            wide = [v for v in assembly.splitlines() if re.search(f"v{name}p[sd]", v)]
            assert any(re.search("[yz]mm", v) for v in wide)


# The cache


PROGRAM = """
import sys, numpy as np
from fastopt.backends import numba_cpu
from fastopt.memory.segments import Segment
from fastopt.rules import adamw
from fastopt.step import Request
made = []
original = numba_cpu.compile_kernel
numba_cpu.compile_kernel = lambda *a, **k: made.append(a) or original(*a, **k)
rng = np.random.default_rng(0)
p = rng.standard_normal(50_000).astype("f4")
segment = Segment(p, (np.zeros_like(p), np.zeros_like(p)), 0)
count, carry = np.zeros(1, np.int64), np.zeros((2, 1, 0))
step = numba_cpu.bind_alone(adamw, [segment], count, carry)
for _ in range(2):
    g = rng.standard_normal(p.size).astype("f4")
    step.take([g])
    step([(1.0, 0.01, 0.1, 0.001, 1e-8, 1e-5)], Request(threads=2))
import ast
import collections
import hashlib
import inspect
print(len(made), hashlib.sha256(p.tobytes()).hexdigest())
"""


def start(program, cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FASTOPT_CACHE_DIR": str(cache),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What it printed, as words, and its warnings."""
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors
    return out.split(), errors


@pytest.fixture(scope="module")
def digest():
    """The parameters that PROGRAM ends with."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(50_000).astype("f4")]
    grads = [[rng.standard_normal(50_000).astype("f4")] for _ in range(2)]
    arrays, _ = run(numpy_ref.bind, adamw, params, grads, [CONSTANTS[0]])
    return hashlib.sha256(arrays[0].tobytes()).hexdigest()


@pytest.mark.slow
def test_four_processes_at_once_then_none_compiles(tmp_path, digest):
    cache = tmp_path / "new" / "cache"
    for process in [start(PROGRAM, cache) for _ in range(4)]:
        (_, found), errors = finish(process)
        assert found == digest and errors == ""
    assert cache.stat().st_mode & 0o777 == 0o700
    assert len(list(cache.iterdir())) == 2  # the kernel and the parallel region
    assert finish(start(PROGRAM, cache)) == (["0", digest], "")
    # The code does not depend on the threading layer it is linked to.
    assert finish(start(PROGRAM, cache, NUMBA_THREADING_LAYER="workqueue")) == (
        ["0", digest],
        "",
    )


def rebind(rule=odd):
    """Bind as a new process would."""
    patch = pytest.MonkeyPatch()
    patch.setattr(numba_cpu, "kernel_for", numba_cpu.kernel_for.__wrapped__)
    made = []
    original = numba_cpu.compile_kernel
    patch.setattr(
        numba_cpu, "compile_kernel", lambda *a, **k: made.append(a) or original(*a, **k)
    )
    kernel_cache.warn.cache_clear()
    try:
        p, g = np.linspace(-2, 2, 99), np.linspace(1, -1, 99)
        binds = [numba_cpu.bind_alone]
        assert agree(rule, [p], [[g]], [(1.0, 0.1, 0.3)], binds=binds)
    finally:
        patch.undo()
    return len(made)


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """The one file of a cache that holds `odd`."""
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    assert rebind() == 1
    assert rebind() == 0
    (path,) = tmp_path.iterdir()
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"x",
        lambda data: b"\x80\x04garbage" * 1000,
        *(
            lambda data, at=at: (
                data[: int(len(data) * at)]
                + bytes([data[int(len(data) * at)] ^ 4])
                + data[int(len(data) * at) + 1 :]
            )
            for at in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.9999)
        ),
    ],
)
def test_a_damaged_file_is_made_anew(entry, damage):
    sound = entry.read_bytes()
    entry.write_bytes(damage(sound))
    with pytest.warns(RuntimeWarning, match="it is damaged"):
        assert rebind() == 1
    assert rebind() == 0


def test_an_entry_under_anothers_name_is_refused(entry):
    other = entry.with_name("0" * 64)
    entry.rename(other)
    with pytest.warns(RuntimeWarning, match="it is damaged"):
        assert kernel_cache.load(other.name) is None


def test_an_entry_that_cannot_be_linked(entry):
    kernel = kernel_cache.load(entry.name)
    kernel_cache.save(entry.name, kernel._replace(imports=("no_such_function",)))
    with pytest.warns(RuntimeWarning, match="no_such_function"):
        assert rebind() == 1
    kernel_cache.save(entry.name, kernel._replace(object=b"not an object"))
    with pytest.warns(RuntimeWarning, match="cannot be linked"):
        assert rebind() == 1
    assert rebind() == 0


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_can_write_is_refused(entry, mode):
    entry.parent.chmod(mode)
    with pytest.warns(RuntimeWarning, match="writable by others: chmod go-w"):
        assert rebind() == 1


def test_a_directory_of_anothers_is_refused(entry, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        assert rebind() == 1


def test_no_room(entry, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    entry.unlink()
    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert rebind() == 1
    assert list(entry.parent.iterdir()) == []


def test_a_directory_that_cannot_be_written(entry, monkeypatch):
    entry.unlink()
    entry.parent.chmod(0o500)
    if os.access(entry.parent, os.W_OK):  # root may write anywhere

        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(kernel_cache.tempfile, "mkstemp", refused)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        assert rebind() == 1


def test_a_directory_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert rebind() == 1


def test_empty_switches_it_off(monkeypatch, recwarn):
    monkeypatch.setenv("FASTOPT_CACHE_DIR", "")
    assert rebind() == rebind() == 1
    assert not recwarn.list


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTOPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.directory() == tmp_path / "fastopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kernel_cache.directory() == tmp_path / ".cache" / "fastopt"


def made_from(text, name="update"):
    scope = {}
    exec("from fastopt.rule import sqrt, maximum, minimum\n" + text, scope)
    return scope[name]


HELPED = """
LEAST = 0.1
def inner(x): return maximum(x, LEAST)
def helper(x): return inner(sqrt(x))
def update(p, g, lr): return (p - lr * helper(g),)
"""


@pytest.mark.parametrize(
    "before, after",
    [
        ("LEAST = 0.1", "LEAST = 0.2"),
        ("LEAST = 0.1", "LEAST = 1"),
        ("maximum(x, LEAST)", "minimum(x, LEAST)"),
        ("maximum(x, LEAST)", "maximum(LEAST, x)"),
        ("import sqrt, maximum, minimum", "import sqrt, minimum, minimum as maximum"),
        ("p - lr * helper(g)", "p - lr * inner(g)"),
    ],
)
def test_an_edit_anywhere_changes_the_fingerprint(before, after):
    whole = "from fastopt.rule import sqrt, maximum, minimum\n" + HELPED
    assert before in whole
    first = kernel_cache.fingerprint(made_from(HELPED))
    edited = {}
    exec(whole.replace(before, after), edited)
    assert kernel_cache.fingerprint(edited["update"]) != first
    moved = made_from("\n\n# moved\n" + HELPED)
    assert kernel_cache.fingerprint(moved) == first


def test_an_edited_helper_is_compiled_anew(entry):
    results = []
    for text in (HELPED, HELPED.replace("0.1", "0.5"), HELPED):
        rule = Rule(made_from(text), lambda t: (1.0,), name="helped")
        patch = pytest.MonkeyPatch()
        patch.setattr(numba_cpu, "kernel_for", numba_cpu.kernel_for.__wrapped__)
        params, grads = [np.zeros(20)], [[np.full(20, 0.04)]]
        (found,), _ = run(numba_cpu.bind, rule, params, grads, [(1.0, 1.0)])
        (expected,), _ = run(numpy_ref.bind, rule, params, grads, [(1.0, 1.0)])
        patch.undo()
        assert same_bits(found, expected)
        results.append(found[0])
    assert results == [-0.2, -0.5, -0.2]
    assert len(list(entry.parent.iterdir())) == 3


COMPLEX = 0.5j


def test_what_cannot_be_hashed_is_not_cached(entry):
    def update(p, g, lr):
        return (p - lr * g * abs(COMPLEX),)

    rule = Rule(update, lambda t: (1.0,))
    p, g = np.ones(9), np.ones(9)
    with pytest.raises(kernel_cache.Unhashable):
        kernel_cache.fingerprint(update)
    (found,), _ = run(numba_cpu.bind, rule, [p], [[g]], [(1.0, 1.0)])
    assert found[0] == 0.5
    assert len(list(entry.parent.iterdir())) == 1


# Processes and threads


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_concurrent_python_threads(cache, layer):
    """Without the lock, workqueue ends the process here."""
    program = """
    import hashlib, threading, numpy as np
    from fastopt.backends import numba_cpu
    from fastopt.memory.segments import Segment
    from fastopt.rules import adamw, amsgrad, sgd
    from fastopt.step import Request
    import numba
    numba.set_num_threads(1)
    def work(rule, out):
        rng = np.random.default_rng(3)
        p = rng.standard_normal(40_000)
        segment = Segment(p, tuple(np.zeros_like(p) for _ in rule.state), 0)
        step = numba_cpu.bind_alone(
            rule, [segment], np.zeros(1, np.int64), np.zeros((2, 1, 0))
        )
        scalars = [(1.0, 0.01, 0.1, 0.001, 1e-8, 1e-5)[: 1 + rule.scalar_count]]
        for _ in range(60):
            step.take([rng.standard_normal(p.size)])
            step(scalars, Request(threads=2))
        out.append(hashlib.sha256(p.tobytes()).hexdigest())
    rules = [adamw, amsgrad, sgd, adamw]
    alone, together = [[] for _ in rules], [[] for _ in rules]
    for rule, out in zip(rules, alone):
        work(rule, out)
    assert numba.get_num_threads() == 1, "the caller's setting is kept"
    threads = [threading.Thread(target=work, args=a) for a in zip(rules, together)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(alone == together)
    """
    process = start(program, cache, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    assert finish(process)[0] == ["True"]


def test_other_python_threads_run_during_a_step():
    """The kernel releases the GIL."""
    p = np.ones(4_000_000)
    segment = Segment(p, (np.zeros_like(p), np.zeros_like(p)), 0)
    step = numba_cpu.bind_alone(adamw, [segment], np.zeros(1, np.int64), no_carry())
    stop, ticks, during = threading.Event(), [0], 0

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    # With the GIL held, none could fall between two readings in one native call.
    for _ in range(20):
        before = ticks[0]
        step.take([p])
        step([CONSTANTS[0]])
        during += ticks[0] - before
    stop.set()
    thread.join()
    assert during > 100
