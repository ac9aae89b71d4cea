"""Native code does what Python does, bit for bit: through the table of functions, and
in the programs of docs/native.md, which are built and run as they stand there."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, DTYPES, IDS, bfloat16, nonzero, same_bits
from installed import needs_numba
from native_code import (
    API,
    BAD_ARGUMENT,
    BAD_HYPERPARAMETER,
    F64,
    I64,
    INT,
    OK,
    OTHER_VARIANT,
    OVERLAP,
    PART,
    RULE,
    RUN,
    Api,
    Optimizer,
    P,
    run_both,
    small,
    variant_name,
)

import fastopt
from fastopt import native
from fastopt.backends import cython_cpu

if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("rule, values", CASES, ids=IDS)
def test_same_bits(rule, values, dtype):
    for size, threads in ((4097, 1), (40_003, 2)):
        expected, got, python, ours = run_both(rule, values, size, dtype, threads)
        for a, b in zip(expected, got, strict=True):
            assert same_bits(a, b)
        assert np.array_equal(python._bound.program.carried.ravel(), ours.carry.ravel())


@pytest.mark.parametrize("name", ["adamw", "prodigy", "lamb"])
def test_threads_of_the_callers_own(name, monkeypatch):
    """Who does the parts in any order; here backwards, one by one."""
    done = []

    @RUN
    def run(context, parts, part, work):
        for k in reversed(range(parts)):
            PART(part)(work, k)
            done.append(k)

    step_on = STEP_ON(API.step_on)
    monkeypatch.setattr(
        Optimizer, "call", lambda _, *given: step_on(*given[:-1], 3, run, None)
    )
    rule = getattr(fastopt, name)
    expected, got, *_ = run_both(rule, rule.hyperparameters, 40_003, np.float32, 1)
    assert all(map(same_bits, expected, got))
    assert set(done) == {0, 1, 2}


STEP_ON = ctypes.CFUNCTYPE(INT, RULE, INT, I64, P, P, P, I64, F64, INT, RUN, P)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])
@pytest.mark.parametrize("name", ["lamb", "lars", "novograd"])
def test_batches(name, dtype):
    """Rules with sums over each segment: a batch is updated while the sums of the next
    are taken. Here there are three batches, by threads of OpenMP and of the caller."""
    rule, rng, turns = getattr(fastopt, name), np.random.default_rng(0), []
    columns = 2 + len(rule.state)
    most = (8 << 20) // (columns * np.dtype(dtype).itemsize)  # elements of a batch
    sizes = (most - 40_000, 0, 5, 33_333, most + 1, 40_001, 3)
    start = [nonzero(rng, n, dtype) for n in sizes]
    grads = [nonzero(rng, n, dtype) for n in sizes]
    python = rule([p.copy() for p in start], backend="numpy")

    @RUN
    def run(context, parts, part, work):
        turns.append(parts)
        for k in reversed(range(parts)):
            PART(part)(work, k)

    step_on = STEP_ON(API.step_on)
    ours = [
        Optimizer(name, [p.copy() for p in start], rule.hyperparameters)
        for _ in range(2)
    ]
    ours[1].call = lambda *given: step_on(*given[:-1], 3, run, None)
    for left_alone in (None, 3):
        here = [None if i == left_alone else grad for i, grad in enumerate(grads)]
        python.step(here, grad_scale=0.5)
        for optimizer in ours:
            assert optimizer.step(here, 0.5, 2) == OK
    # The sums of the first, two turns of an update and the next sums, the last update;
    # where the cache has no room for two batches, no turn is of both.
    assert turns == [3] * 8 or turns == [3] * 12
    for optimizer in ours:
        expected = [*python._params.arrays]
        expected += [a for key in rule.state for a in python.state[key]]
        assert all(map(same_bits, expected, optimizer.everything()))
        assert np.array_equal(
            python._bound.program.carried.ravel(), optimizer.carry.ravel()
        )


# What version 1 of fastopt.h declares, written down again: it must not change.
VERSION_1 = """
#include <stdint.h>
struct rule {
    const char *name;
    int64_t state_count, hyperparameter_count, carry_count, carry_per_segment;
    const char *const *state, *const *hyperparameters, *const *carry;
    const double *defaults;
};
struct segment { void *p; const void *g; void *const *state; int64_t n; };
typedef void (*run_t)(void *, int, void (*)(void *, int), void *);
struct api {
    uint32_t version, size;
    const char *isa;
    int64_t rule_count;
    const struct rule *const *rules;
    const struct rule *(*find)(const char *);
    int (*start)(const struct rule *, int, const double *, double *,
                 const struct segment *, int64_t);
    int (*step)(const struct rule *, int, int64_t, const double *, double *,
                const struct segment *, int64_t, double, int);
    const char *(*error)(int);
    int (*step_on)(const struct rule *, int, int64_t, const double *, double *,
                   const struct segment *, int64_t, double, int, run_t, void *);
};
static void run(void *count, int parts, void (*part)(void *, int), void *work) {
    for (int k = 0; k < parts; k++, ++*(int *) count)
        part(work, k);
}
int fit(const struct api *api, const char *name, float *p, const float *g, float *state,
        int64_t n, double *carry) {
    const struct rule *rule = api->find(name);
    void *buffers[8];
    struct segment segment = {p, g, buffers, n};
    int code, parts = 0;
    if (api->version != 1 || api->size < sizeof *api || !rule || rule->state_count > 8)
        return -1;
    for (int64_t k = 0; k < rule->state_count; k++)
        buffers[k] = state + k * n;
    code = api->start(rule, 0, rule->defaults, carry, &segment, 1);
    for (int t = 1; t < 4 && !code; t++)
        code = api->step(rule, 0, t, rule->defaults, carry, &segment, 1, 0.5, 2);
    code = code ? code : api->step_on(
        rule, 0, 4, rule->defaults, carry, &segment, 1, 0.5, 3, run, &parts);
    return code || api->error(0)[0] != 'n' ? 100 + code : parts;
}
"""


@pytest.mark.parametrize("name", ["lamb", "nadam"])
def test_a_program_compiled_for_version_1_runs(name, tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "fit.c").write_text(VERSION_1)
    flags = ["-shared", "-fPIC", "-std=c99", "-Wall", "-Werror"]
    run("cc", *flags, "fit.c", "-o", "fit.so", cwd=tmp_path)
    fit = ctypes.CDLL(str(tmp_path / "fit.so")).fit
    fit.argtypes = [P, ctypes.c_char_p, P, P, P, I64, P]
    rng = np.random.default_rng(0)
    p, g = (nonzero(rng, N, np.float32) for _ in range(2))
    rule, ours = getattr(fastopt, name), p.copy()
    state, carry = np.full((len(rule.state), N), np.nan, np.float32), np.full(1, np.nan)
    places = [array.ctypes.data for array in (ours, g, state)]
    # The parts of the last step: three for the update, and for LAMB's sums.
    turns = 2 if rule.settle else 1
    got = fit(ctypes.addressof(API), name.encode(), *places, N, carry.ctypes.data)
    assert got == 3 * turns
    opt = rule(p, backend="numpy")
    for _ in range(4):
        opt.step(g, grad_scale=0.5)
    assert same_bits(ours, p)
    for buffer, key in zip(state, rule.state, strict=True):
        assert same_bits(buffer, opt.state[key][0])


# What is refused ----------------------------------------------------------------------


def refused(optimizer, grads, **how):
    """The code, after a look that nothing was written."""
    before = [a.copy() for a in (*optimizer.everything(), optimizer.carry)]
    code = optimizer.step(grads, **how)
    for a, b in zip(before, (*optimizer.everything(), optimizer.carry), strict=True):
        assert same_bits(a, b)
    assert len(API.error(code)) > 20
    return code


def test_bad_arguments():
    opt = small()
    good = [np.ones(5, np.float32), np.ones(3, np.float32)]
    assert refused(opt, good, t=-1) == BAD_ARGUMENT
    assert refused(opt, good, threads=-1) == BAD_ARGUMENT
    opt.dtype = 2
    assert refused(opt, good) == BAD_ARGUMENT
    opt.dtype = 0
    raw = np.zeros(32, np.uint8)
    assert refused(opt, [good[0], raw[1:13].view(np.float32)]) == BAD_ARGUMENT
    opt.params[0], kept = opt.params[0][:0], opt.params[0]
    assert opt.step([good[0][:0], good[1]]) == OK  # an empty one is no error
    opt.params[0] = kept
    assert opt.step(good) == OK


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("adamw", "lr", -1e-3),
        ("adamw", "lr", np.nan),
        ("adamw", "beta1", 1.0),
        ("adamw", "weight_decay", np.inf),
        ("adamw", "lr", 1e41),  # too large for float32
        ("rprop", "eta_minus", 2.0),  # the rule's own condition
        ("prodigy", "d0", 0.0),
        ("lamb", "always_adapt", 0.5),  # neither yes nor no
        ("ftrl", "initial_accumulator_value", 0.0),
    ],
)
def test_bad_hyperparameters(name, key, value):
    opt = small(name)
    names = list(getattr(fastopt, name).hyperparameters)
    opt.values[names.index(key)] = value
    grads = [np.ones(5, np.float32), np.ones(3, np.float32)]
    assert refused(opt, grads) == BAD_HYPERPARAMETER


def test_division_by_zero_is_refused_as_in_python():
    """In settle, after the sums are taken: DoG with zero gradients and no eps."""
    opt = small("dog")
    opt.values[list(fastopt.dog.hyperparameters).index("eps")] = 0
    grads = [np.zeros(5, np.float32), np.zeros(3, np.float32)]
    assert refused(opt, grads) == BAD_HYPERPARAMETER
    python = fastopt.dog(np.ones(5), eps=0.0, backend="cython")
    with pytest.raises(ZeroDivisionError):
        python.step(np.zeros(5))


def test_an_option_that_needs_other_state_is_refused():
    grads = [np.ones(5, np.float32), np.ones(3, np.float32)]
    opt = small("sgd")
    opt.values[1] = 0.9
    assert refused(opt, grads) == OTHER_VARIANT
    with_momentum = small("sgd+momentum", momentum=0.9)
    assert with_momentum.step(grads) == OK
    with_momentum.values[1] = 0.0  # off, but its state may stay
    assert with_momentum.step(grads) == OK


def test_overlaps_in_a_segment_are_refused():
    opt = small()
    assert refused(opt, [opt.params[0], np.ones(3, np.float32)]) == OVERLAP
    opt.state[1][1] = opt.params[1]
    assert refused(opt, [None, None]) == OVERLAP


def test_the_table():
    assert (API.version, API.size) == (1, ctypes.sizeof(Api))
    assert API.isa.decode() == cython_cpu.kernels().ISA
    names = [API.rules[k].contents.name.decode() for k in range(API.rule_count)]
    rules = {variant_name(rule, values) for rule, values in CASES}
    assert set(names) == rules | {"sophia_g.estimate"}
    assert not API.find(b"no_such_rule") and not API.find(None)
    about = API.find(b"nadam").contents
    assert [about.state[k] for k in range(about.state_count)] == [b"m", b"v"]
    assert [about.carry[k] for k in range(about.carry_count)] == [b"mu_product"]
    defaults = fastopt.nadam.hyperparameters
    assert about.hyperparameter_count == len(defaults)
    for k, (name, default) in enumerate(defaults.items()):
        assert about.hyperparameters[k].decode() == name
        assert about.defaults[k] == default


def test_estimates():
    """The state buffer stands for the parameters."""
    h = [nonzero(np.random.default_rng(0), 100, np.float64)]
    g = nonzero(np.random.default_rng(1), 100, np.float64)
    python = fastopt.sophia_g(h[0].copy(), backend="numpy")
    python.state["h"][0][:] = h[0]
    python.estimate(g)
    ours = Optimizer("sophia_g.estimate", h, fastopt.sophia_g.hyperparameters)
    assert ours.step([g]) == OK
    assert same_bits(h[0], python.state["h"][0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_steps_alone():
    """OpenMP's threads stay in the parent: with them it would hang."""
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "tests" / "support")!r}]
import numpy as np, native_code as t
def run():
    opt = t.Optimizer("adamw", [np.ones(100_000)], t.fastopt.adamw.hyperparameters)
    assert opt.step([np.ones(100_000)], threads=2) == 0
run()
child = os.fork()
if not child:
    run()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "7\n", done.stderr


@pytest.mark.parametrize("isa", cython_cpu.driver().cpu_supports())
def test_the_table_is_of_the_instruction_set_in_use(isa):
    try:
        cython_cpu.extension(isa)
    except ImportError:
        pytest.skip(f"no kernels were built for {isa}")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests" / "support")!r}]
import cases, numpy as np, native_code as t
assert t.API.isa == b"{isa}"
for name, (rule, values) in zip(cases.IDS, cases.CASES):
    if rule.name in ("adamw", "nadam", "prodigy", "cautious_lion"):
        for dtype in cases.DTYPES:
            expected, got, *_ = t.run_both(rule, values, 4097, dtype, 1)
            assert all(map(cases.same_bits, expected, got)), name
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTOPT_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_hyperparameters_are_checked():
    values = native.hyperparameters(fastopt.sgd, momentum=0.9, nesterov=True)
    assert values.tolist() == [1e-3, 0.9, 0.0, 0.0, 1.0]
    with pytest.raises(TypeError, match="sgd has no hyperparameter 'beta'"):
        native.hyperparameters(fastopt.sgd, beta=0.9)
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        native.hyperparameters(fastopt.sgd, lr=-1)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        native.hyperparameters(fastopt.sgd, nesterov=True)


# The programs of docs/native.md -------------------------------------------------------

PAGE = (ROOT / "docs" / "native.md").read_text(encoding="utf-8")
PROGRAMS = {
    re.search(r"[\w.]+\.\w+", text)[0]: text
    for text in re.findall(r"```(?:c|c\+\+|cython|python)\n(.*?)```", PAGE, re.S)
}
N = 40_001  # two threads share


def write(tmp_path, *names):
    for name in names:
        (tmp_path / name).write_text(PROGRAMS[name])


def run(*command, cwd):
    """The installed package, or the one that is tested, for what is run."""
    package = str(Path(fastopt.__file__).parent.parent)
    paths = [package, sysconfig.get_path("platlib"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout


def fitted(rule, *params, **values):
    """What the programs compute."""
    opt = rule(list(params), backend="cython", **values)
    targets = [np.arange(p.size).astype(p.dtype) for p in params]
    for _ in range(10):
        opt.step([p - target for p, target in zip(params, targets, strict=True)])
    return params


def embedding(compiler):
    """What builds a program with Python in it, or a skip with the reason."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    found = sysconfig.get_config_vars()
    folder = found["LIBDIR"]
    library = f"python{found['LDVERSION']}"
    if not list(Path(folder).glob(f"lib{library}.*")):
        pytest.skip(f"this Python has no lib{library} to embed")
    return [
        f"-I{sysconfig.get_path('include')}",
        f"-I{fastopt.get_include()}",
        f"-L{folder}",
        f"-Wl,-rpath,{folder}",
        f"-l{library}",
        *found["LIBS"].split(),
        *found["SYSLIBS"].split(),
    ]


def printed(text):
    return np.array([float.fromhex(line) for line in text.split()])


def test_the_c_program(tmp_path):
    flags = embedding("cc")
    write(tmp_path, "fit.c")
    warnings = ["-Wall", "-Wextra", "-Werror", "-std=c11", "-D_DEFAULT_SOURCE"]
    run("cc", "-O2", *warnings, "fit.c", "-o", "fit", *flags, cwd=tmp_path)
    got = printed(run(tmp_path / "fit", N, cwd=tmp_path))
    (expected,) = fitted(fastopt.adamw, np.zeros(N, np.float32), lr=0.1)
    assert same_bits(got.astype(np.float32), expected)


def test_the_c_program_of_16_bits(tmp_path):
    flags = embedding("cc")
    write(tmp_path, "fit_bf16.c")
    warnings = ["-Wall", "-Wextra", "-Werror", "-std=c11", "-D_DEFAULT_SOURCE"]
    run("cc", "-O2", *warnings, "fit_bf16.c", "-o", "fit", *flags, cwd=tmp_path)
    got = printed(run(tmp_path / "fit", N, cwd=tmp_path))
    p, target = np.zeros(N, bfloat16), np.arange(N, dtype=np.float32)
    opt = fastopt.adamw(p, lr=0.1, formats="bf16", backend="cython")
    for _ in range(10):
        opt.step(p.astype(np.float32) - target, clip_norm=100.0)
    assert same_bits(got.astype(np.float32), p.astype(np.float32)) and p.any()


def test_the_cpp_program(tmp_path):
    flags = embedding("c++")
    write(tmp_path, "fit.cpp")
    warnings = ["-Wall", "-Wextra", "-Werror", "-std=c++17"]
    run("c++", "-O2", *warnings, "fit.cpp", "-o", "fit", *flags, cwd=tmp_path)
    got = printed(run(tmp_path / "fit", N, cwd=tmp_path))
    expected = fitted(fastopt.lamb, np.ones(N), np.ones(7), lr=0.1)
    assert same_bits(got, np.concatenate(expected))


def test_another_version_is_refused(tmp_path):
    """By a program that was compiled for it."""
    flags = embedding("cc")
    write(tmp_path, "fit.c")
    header = (Path(fastopt.get_include()) / "fastopt.h").read_text()
    later = header.replace("FASTOPT_API_VERSION 1", "FASTOPT_API_VERSION 2")
    larger = header.replace("} fastopt_api;", "void *more; } fastopt_api;")
    for changed, message in (
        (later, "for version 2 of fastopt's table, but the fastopt that is installed"),
        (larger, "compiled for a newer fastopt, whose table has"),
    ):
        assert changed != header
        (tmp_path / "fastopt.h").write_text(changed)
        run("cc", "fit.c", "-o", "fit", "-I.", *flags, cwd=tmp_path)
        with pytest.raises(AssertionError, match=message):
            run(tmp_path / "fit", N, cwd=tmp_path)


def test_the_cython_module(tmp_path):
    pytest.importorskip("Cython", reason="Cython is needed to build")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    write(tmp_path, "fit.pyx", "setup.py")
    run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tmp_path)
    code = (
        f"import fit, numpy as np; p = np.zeros({N}, np.float32); fit.fit(p, 10); "
        "np.save('p.npy', p)"
    )
    run(sys.executable, "-c", code, cwd=tmp_path)
    (expected,) = fitted(fastopt.sgd, np.zeros(N, np.float32), lr=0.125, momentum=0.9)
    assert same_bits(np.load(tmp_path / "p.npy"), expected)


@needs_numba
def test_the_numba_function(tmp_path):
    """Twice: the second process takes it from Numba's cache."""
    write(tmp_path, "fit.py")
    (expected,) = fitted(fastopt.nadam, np.zeros(N), lr=0.1)
    code = "from fit import *; np.save('p.npy', p); print(len(fit.stats.cache_hits))"
    for hits in ("0\n", "1\n"):
        assert run(sys.executable, "-c", code, cwd=tmp_path) == hits
        assert same_bits(np.load(tmp_path / "p.npy"), expected)


# fastopt.njit -------------------------------------------------------------------------


def njit_steps(name):
    """A function that Numba compiles; the rule is a constant there."""
    import numba

    from fastopt.njit import start, step

    @numba.njit
    def steps(p, g, state, values, carry, count, threads):
        start(name, p, state, values, carry)
        for t in range(1, count + 1):
            step(name, t, p, g, state, values, carry, 0.5, threads)

    return steps


@needs_numba
@pytest.mark.parametrize(
    "name, dtype, shape",
    [
        ("gd", np.float32, (5,)),
        ("lamb", np.float64, (131, 307)),  # two threads share
        ("rmsprop+centered+momentum", np.float32, (7, 1, 3)),
        ("prodigy", np.float32, (0, 4)),
    ],
)
def test_numba_has_the_same_bits(name, dtype, shape):
    rule, *on = name.split("+")
    rule = getattr(fastopt, rule)
    values = {**rule.hyperparameters, **dict.fromkeys(on, 0.9)}
    if "centered" in on:
        values["centered"] = True
    rng = np.random.default_rng(0)
    p, g = (nonzero(rng, int(np.prod(shape)), dtype).reshape(shape) for _ in range(2))
    ours, about = p.copy(), API.find(name.encode()).contents
    state = tuple(np.full_like(p, np.nan) for _ in range(about.state_count))
    carry = np.full(about.carry_count, np.nan)
    numbers = native.hyperparameters(rule, **values)
    njit_steps(name)(ours, g, state, numbers, carry, 4, 2)
    opt = rule(p, backend="numpy", **values)
    for _ in range(4):
        opt.step(g, grad_scale=0.5)
    assert same_bits(ours, p)
    for buffer, name in zip(state, opt._bound.rule.state, strict=True):
        assert same_bits(buffer, opt.state[name][0])
    assert np.array_equal(carry, opt._bound.program.carried.ravel())


@needs_numba
def test_numba_refuses():
    from numba.core.errors import TypingError

    p, values = np.ones(4), native.hyperparameters(fastopt.adamw)
    good = p, p.copy(), (p.copy(), p.copy()), values, None, 1, 1
    adamw = njit_steps("adamw")
    for change, message in (
        ({2: (p,)}, "adamw needs a tuple of 2 state buffers .m, v., got UniTuple"),
        ({1: np.ones(4, np.float32)}, "g must have the dtype of p, float32 or float64"),
        ({0: np.ones((4, 2))[:, 0]}, "p must be a C-contiguous array"),
        ({3: values.astype(np.float32)}, "adamw needs hyperparameters: a C-contiguous"),
    ):
        with pytest.raises(TypingError, match=message):
            adamw(*(change.get(k, value) for k, value in enumerate(good)))
    with pytest.raises(TypingError, match="there is no native rule 'sgd.momentum"):
        njit_steps("sgd-momentum")(*good)
    with pytest.raises(TypingError, match="nadam needs carry: a C-contiguous float64"):
        njit_steps("nadam")(*good)
    for change, message in (
        ({3: values[:3].copy()}, "as many hyperparameters as the rule has"),
        ({1: np.ones(3)}, "p, g and state must have the same size"),
        ({3: -values}, "a hyperparameter is out of its range"),
        ({1: p}, "parameters, gradients and state of a segment overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw(*(change.get(k, value) for k, value in enumerate(good)))
        assert np.array_equal(p, np.ones(4))
    from fastopt import njit

    with pytest.raises(TypeError, match="is for code that Numba compiles"):
        njit.step("adamw", 1, *good[:4])
