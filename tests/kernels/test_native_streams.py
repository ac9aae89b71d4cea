"""Native code over streams that are stored in fewer bits: the bits of the core."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import CASES, IDS, STORED, bfloat16, nonzero, odd_view, same_bits
from native_code import (
    API,
    BAD_ARGUMENT,
    BF16,
    BF16_SR,
    DTYPES,
    F32,
    FP16,
    I64,
    OK,
    PART,
    RUN,
    Optimizer,
    P,
    Request,
    Stream,
    StreamOptimizer,
    Streams,
    address,
    address_of,
    variant_name,
)

import fastopt
from fastopt import native
from fastopt.backends import cython_cpu, numpy_ref
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Encoded, Segment
from fastopt.optimizer import formats as of_state
from fastopt.runtime.atomic import uninterrupted
from fastopt.step import Key, Program, execute

if cython_cpu.missing():
    pytest.skip("the compiled kernels are not installed", allow_module_level=True)

SUPPORT = Path(__file__).resolve().parents[1] / "support"
NAMES = {None: F32, "bf16": BF16_SR, "bf16_nearest": BF16, "fp16": FP16}
SIZES = 0, 1, 17, 5000


@pytest.fixture(autouse=True)
def formats_of_small_state(monkeypatch):
    """The core keeps the state of small arrays in float32, which C does not."""
    monkeypatch.setattr(of_state, "SMALLEST", 0)


def arrays(sizes, dtype, seed):
    """Random numbers that begin beside cache lines."""
    rng = np.random.default_rng(seed)
    return [
        odd_view(nonzero(rng, n, np.float32).astype(dtype), k)
        for k, n in enumerate(sizes)
    ]


def everything(opt):
    states = [opt.state[name] for name in opt._bound.rule.state]
    return [*opt._params.arrays, *(array for state in states for array in state)]


def equal(opt, ours):
    for a, b in zip(everything(opt), ours.everything(), strict=True):
        assert same_bits(a, b)
    assert np.array_equal(opt._bound.program.carried.ravel(), ours.carry.ravel())


def whole(rule, kind):
    """The format for all buffers, copies of the parameters too, which a name leaves
    out."""
    names = {name for variant in rule.all for name in variant.state}
    return kind and dict.fromkeys(names, kind)


def started(rule, params, *rows, formats=None, **more):
    """Our optimizer over streams, with the state in one format."""
    name = variant_name(rule, rows[0])
    buffers = API.find(name.encode()).contents.state_count
    kinds = [NAMES[formats]] * buffers
    ours = StreamOptimizer(name, params, *rows, formats=kinds, **more)
    assert ours.start() == OK
    return ours


# A program that includes the header ---------------------------------------------------

PROGRAM = """
#include "fastopt.h"
#include <stdlib.h>

/* Streams, one segment after the other, and the gradients of each step. */
#ifdef __cplusplus
extern "C"
#endif
int fit(
    const fastopt_api *api, const char *name, const double *values, double *carry,
    int64_t count, const int64_t *sizes, const int64_t *formats, void *const *arrays,
    void *const *grads, int64_t steps
) {
    const fastopt_rule *rule = api->find(name);
    const int64_t columns = 2 + rule->state_count;
    fastopt_streams *segments =
        (fastopt_streams *) calloc(count, sizeof *segments);
    fastopt_stream *streams =
        (fastopt_stream *) calloc(count * columns, sizeof *streams);
    fastopt_request request = {sizeof request, 2, 2.5, 1, NULL, NULL};
    int64_t first = 0;
    int code;
    for (int64_t i = 0; i < count; i++) {
        for (int64_t c = 0; c < columns; c++) {
            streams[i * columns + c].format = formats[c];
            streams[i * columns + c].parts[0] = arrays[i * columns + c];
        }
        segments[i].streams = streams + i * columns;
        segments[i].n = sizes[i];
        segments[i].first = first;
        first += sizes[i];
    }
    code = api->start_streams(
        rule, FASTOPT_FLOAT32, values, 1, carry, segments, count);
    for (int64_t t = 1; t <= steps && !code; t++) {
        for (int64_t i = 0; i < count; i++)
            streams[i * columns + 1].parts[0] = *grads++;
        code = api->step_streams(
            rule, FASTOPT_FLOAT32, t, values, 1, carry, segments, count, 0.5,
            t == steps ? &request : NULL);
    }
    free(segments);
    free(streams);
    return code;
}
int numbers[] = {
    FASTOPT_F32, FASTOPT_F64, FASTOPT_BF16, FASTOPT_BF16_SR, FASTOPT_FP16,
    FASTOPT_R8, FASTOPT_R16, FASTOPT_M8, FASTOPT_V8,
    sizeof(fastopt_stream), sizeof(fastopt_streams), sizeof(fastopt_request)
};
"""
ASKED = {"clip_norm": 2.5, "zero_grads": True}  # in the last step
COMPILERS = {
    "cc": ("fit.c", ["-std=c99", "-pedantic"]),
    "c++": ("fit.cpp", ["-std=c++11", "-pedantic"]),
}


@pytest.fixture(scope="module", params=COMPILERS)
def program(request, tmp_path_factory):
    compiler, folder = request.param, tmp_path_factory.mktemp("streams")
    name, flags = COMPILERS[compiler]
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    (folder / name).write_text(PROGRAM)
    flags += ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{fastopt.get_include()}"]
    subprocess.run([compiler, *flags, name, "-o", "fit.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "fit.so"))
    library.fit.argtypes = [P, ctypes.c_char_p, *[P] * 2, I64, *[P] * 4, I64]
    return library


def pointers(arrays):
    return (P * len(arrays))(*map(address, arrays))


@pytest.mark.parametrize(
    "dtype, of_grads, formats",
    [(bfloat16, bfloat16, None), (np.float32, np.float16, "bf16")],
    ids=["bf16 parameters", "fp16 gradients, bf16 state"],
)
@pytest.mark.parametrize(
    "name, values",
    [("adamw", {}), ("sgd", {"momentum": 0.9}), ("lamb", {"weight_decay": 0.1})],
    ids=["adamw", "sgd", "lamb"],
)
def test_a_program(program, name, values, dtype, of_grads, formats):
    rule, sizes, steps = getattr(fastopt, name), (*SIZES, 40_001), 3
    params, ours = arrays(sizes, dtype, 0), arrays(sizes, dtype, 0)
    grads = [arrays(sizes, of_grads, 1 + t) for t in range(steps)]
    opt = rule(params, backend="numpy", formats=whole(rule, formats), **values)
    for t, of_step in enumerate(grads, 1):
        asked = ASKED if t == steps else {}
        opt.step([g.copy() for g in of_step], grad_scale=0.5, **asked)
    kinds = [buffers[0].dtype for buffers in opt.state.values()]
    state = [[np.full(p.shape, 7, kind) for kind in kinds] for p in params]
    streams = [[p, g, *s] for p, g, s in zip(ours, grads[0], state, strict=True)]
    columns = [DTYPES.index(dtype), DTYPES.index(of_grads)]
    columns += [NAMES[formats]] * len(kinds)
    numbers = native.hyperparameters(rule, **values)
    counts, columns = np.array(sizes), np.array(columns)
    code = program.fit(
        ctypes.addressof(API),
        variant_name(rule, {**rule.hyperparameters, **values}).encode(),
        *(address(numbers), None, len(sizes), address(counts), address(columns)),
        pointers([array for row in streams for array in row]),
        *(pointers([g for of_step in grads for g in of_step]), steps),
    )
    assert code == OK
    got = [*ours, *(s for states in zip(*state, strict=True) for s in states)]
    for a, b in zip(everything(opt), got, strict=True):
        assert same_bits(a, b)
    assert not any(g.any() for g in grads[-1]) and all(g.all() for g in grads[0])


def test_the_numbers_of_the_header(program):
    numbers = (ctypes.c_int * 12).in_dll(program, "numbers")
    sizes = map(ctypes.sizeof, (Stream, Streams, Request))
    assert list(numbers) == [*range(9), *sizes]
    for stored in native.FORMATS[2:]:
        format = FORMATS[stored.name]
        wanted = [(format.stored.itemsize, 1)]
        if format.second:
            _, dtype, elements = format.second
            wanted.append((dtype.itemsize, elements))
        if format.scale:
            wanted.append((8, native.ALL))
        assert list(stored.parts) == wanted


# Everything that may be asked ---------------------------------------------------------


@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_every_rule(rule, values):
    """All streams are of 16 bits. A gradient is missing once."""
    sizes = *SIZES, 300
    opt = rule(
        arrays(sizes, bfloat16, 0),
        backend="numpy",
        formats=whole(rule, "bf16"),
        **values,
    )
    ours = started(rule, arrays(sizes, bfloat16, 0), values, formats="bf16")
    for t in range(3):
        grads = arrays(sizes, (bfloat16, np.float16, np.float32)[t], 1 + t)
        grads[3] = None if t == 1 else grads[3]
        opt.step(grads, grad_scale=0.5)
        assert ours.step(grads, 0.5) == OK
        equal(opt, ours)


@pytest.mark.parametrize("formats", [None, "bf16", "bf16_nearest", "fp16"])
@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.float16])
@pytest.mark.parametrize("name", ["adamw", "sgd+momentum", "lion", "schedule_free_sgd"])
def test_every_combination_of_formats(name, dtype, formats):
    """Some of them have kernels that decode in registers."""
    rule = getattr(fastopt, name.partition("+")[0])
    values = {**rule.hyperparameters, "lr": 0.1}
    values |= {"momentum": 0.9} if "momentum" in values else {}
    opt = rule(
        arrays(SIZES, dtype, 0), backend="numpy", formats=whole(rule, formats), **values
    )
    ours = started(rule, arrays(SIZES, dtype, 0), values, formats=formats)
    for t, of_grads in enumerate((bfloat16, np.float16, np.float32, bfloat16)):
        grads = arrays(SIZES, of_grads, 1 + t)
        opt.step(grads)
        assert ours.step(grads) == OK
    equal(opt, ours)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "lamb", "prodigy"])
def test_formats_may_differ_between_segments(name):
    """Plain ones lie beside others. A gradient is missing once."""
    pairs = [*STORED.values(), (np.float32, np.float32), (bfloat16, np.float32)]
    sizes = 40_003, 0, 4097, 300, 33, 301
    rule = getattr(fastopt, name)

    def drawn(seed, which):
        rng = np.random.default_rng(seed)
        return [nonzero(rng, n, p[which]) for n, p in zip(sizes, pairs, strict=True)]

    opt = rule(drawn(0, 0), backend="numpy")
    ours = started(rule, drawn(0, 0), rule.hyperparameters)
    for t in range(3):
        grads = drawn(1 + t, 1)
        grads[0] = None if t == 1 else grads[0]
        opt.step(grads, grad_scale=0.5)
        assert ours.step(grads, 0.5, threads=2) == OK
        equal(opt, ours)


@pytest.mark.parametrize("name", ["adamw", "lamb", "novograd", "prodigy"])
@pytest.mark.parametrize(
    "asked",
    [
        {"clip_norm": 0.5},
        {"clip_norm": 1e9},
        {"zero_grads": True},
        {"clip_norm": 2.0, "zero_grads": True},
    ],
    ids=str,
)
def test_requests(name, asked):
    """By one thread, by two of OpenMP, and by threads of the caller's own, who does the
    parts backwards."""
    rule, sizes, done = getattr(fastopt, name), (40_003, 0, 5, 4999), []

    @RUN
    def run(context, parts, part, work):
        for k in reversed(range(parts)):
            PART(part)(work, k)
            done.append(k)

    opt = rule(arrays(sizes, bfloat16, 0), backend="numpy", formats=whole(rule, "bf16"))
    before = [p.copy() for p in opt._params.arrays]
    ways = {"threads": 1}, {"threads": 2}, {"threads": 3, "run": run}, {}
    all_ours = [
        started(rule, arrays(sizes, bfloat16, 0), rule.hyperparameters, formats="bf16")
        for _ in ways
    ]
    for t in range(3):
        grads = arrays(sizes, (np.float16, np.float32, bfloat16)[t], 1 + t)
        grads[2] = None if t == 1 else grads[2]
        for ours, way in zip(all_ours, ways, strict=True):
            here = [g if g is None else g.copy() for g in grads]
            assert ours.step(here, 0.25, **asked, **way) == OK
            given = [g for g in here if g is not None and g.size]
            assert all(g.any() != ("zero_grads" in asked) for g in given)
        opt.step(grads, grad_scale=0.25, **asked)
    for ours in all_ours:
        equal(opt, ours)
    assert set(done) == {0, 1, 2}
    assert not same_bits(opt._params.arrays[0], before[0])


@pytest.mark.parametrize(
    "name", ["adamw", "lamb", "novograd", "prodigy", "nadam", "rprop"]
)
def test_rows_of_hyperparameters(name):
    rule = getattr(fastopt, name)
    rows = [{**rule.hyperparameters, "lr": lr} for lr in (0.25, 0.125)]
    sizes, row_of = (300, 5000, 17, 1), (0, 0, 1, 1)
    start = arrays(sizes, bfloat16, 0)
    groups = [{"params": start[:2], **rows[0]}, {"params": start[2:], **rows[1]}]
    opt = rule(groups, backend="numpy", formats=whole(rule, "fp16"))
    params = arrays(sizes, bfloat16, 0)
    ours = started(rule, params, *rows, formats="fp16", row_of=row_of)
    for t in range(3):
        grads = arrays(sizes, bfloat16, 1 + t)
        opt.step([grads[:2], grads[2:]], clip_norm=3.0)
        assert ours.step(grads, clip_norm=3.0) == OK
    equal(opt, ours)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_batches(name):
    """Three batches, of which one is updated while the next is measured."""
    rule = getattr(fastopt, name)
    most = (8 << 20) // (4 * (2 + len(rule.state)))  # elements of a batch
    sizes = most - 40_000, 0, 33_333, most + 1, 40_001, 3
    opt = rule(arrays(sizes, bfloat16, 0), backend="numpy", formats=whole(rule, "bf16"))
    params = arrays(sizes, bfloat16, 0)
    ours = started(rule, params, rule.hyperparameters, formats="bf16")
    for t in range(2):
        grads = arrays(sizes, np.float16, 1 + t)
        opt.step(grads, clip_norm=1.0)
        assert ours.step(grads, clip_norm=1.0, threads=2) == OK
    equal(opt, ours)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["adamw", "lamb", "prodigy"])
def test_plain_streams_have_the_bits_of_segments(name, dtype):
    rule, sizes = getattr(fastopt, name), (40_003, 0, 5)
    plain = Optimizer(name, arrays(sizes, dtype, 0), rule.hyperparameters)
    ours = StreamOptimizer(name, arrays(sizes, dtype, 0), rule.hyperparameters)
    assert ours.start() == OK
    for t in range(3):
        grads = arrays(sizes, dtype, 1 + t)
        grads[t] = None
        assert plain.step(grads, 0.5, 2) == ours.step(grads, 0.5, threads=2) == OK
    for a, b in zip(plain.everything(), ours.everything(), strict=True):
        assert same_bits(a, b)
    assert np.array_equal(plain.carry, ours.carry)


def test_parameters_may_be_rounded_stochastically():
    """Which optimizers in Python do not offer; a program of the reference can."""
    rule, sizes = fastopt.adamw, (3, 5000)
    start = arrays(sizes, bfloat16, 0)
    state = [[np.zeros(n, np.float32) for _ in range(2)] for n in sizes]
    segments = [
        Segment(Encoded(FORMATS["bf16_sr"], (p.view(np.uint16),)), tuple(s), 0, None, f)
        for p, s, f in zip(start, state, (0, 3), strict=True)
    ]
    program = Program(numpy_ref, rule, segments)
    params, row = arrays(sizes, bfloat16, 0), rule.hyperparameters
    ours = started(rule, params, row, param_format=BF16_SR)
    for t in range(1, 4):
        grads = arrays(sizes, np.float32, t)
        assert program.runner.take(grads)
        key = Key(t, (), tuple(row.values()))
        uninterrupted(*execute(program, [key], fastopt.step.Request()))
        assert ours.step(grads) == OK
    assert all(map(same_bits, start, params))


def test_draws_depend_on_the_index():
    """Two halves with their indices have the bits of the whole."""
    whole, halves = (arrays((5000,), bfloat16, 0) for _ in range(2))
    halves = np.split(halves[0], [1234])
    row = fastopt.adamw.hyperparameters
    one = started(fastopt.adamw, whole, row, formats="bf16")
    two = started(fastopt.adamw, halves, row, formats="bf16")
    for t in range(3):
        (grad,) = arrays((5000,), bfloat16, 1 + t)
        assert one.step([grad]) == two.step(np.split(grad, [1234])) == OK
    for a, b in zip(one.state[0], zip(*two.state, strict=True), strict=True):
        assert same_bits(a, np.concatenate(b))


@pytest.mark.parametrize("formats", ["bf16", "fp16"])
def test_first_values_are_rounded_as_in_python(formats):
    """To float32 and then to the nearest. These lie beside a middle of two numbers, on
    which float32 puts them."""
    for lr in (0.1, 1 + 2**-8 + 2**-40, 1 + 2**-11 + 2**-40):
        opt = fastopt.rprop(
            np.ones(3, np.float32), backend="numpy", formats=formats, lr=lr
        )
        row = {**fastopt.rprop.hyperparameters, "lr": lr}
        ours = started(fastopt.rprop, [np.ones(3, np.float32)], row, formats=formats)
        equal(opt, ours)
        (first, *_) = ours.state[0][1]
        assert first == np.float32(lr).astype(first.dtype)


@pytest.mark.parametrize("isa", cython_cpu.driver().cpu_supports())
def test_the_kernels_of_each_instruction_set(isa):
    try:
        cython_cpu.extension(isa)
    except ImportError:
        pytest.skip(f"no kernels were built for {isa}")
    code = f"""
import sys
sys.path[:0] = [{str(SUPPORT)!r}, {str(Path(__file__).parent)!r}]
import test_native_streams as t
assert t.API.isa == b"{isa}"
t.of_state.SMALLEST = 0
for name in ("adamw", "sgd+momentum", "lion"):
    for dtype in (t.np.float32, t.bfloat16):
        for formats in (None, "bf16"):
            t.test_every_combination_of_formats(name, dtype, formats)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTOPT_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Formats of several parts -------------------------------------------------------------

R8, R16, M8, V8 = range(5, 9)
PARTS = {
    "bf16+r8": ("m8", "v8", (R8, M8, V8)),
    "bf16+r16": ("m8", "m8", (R16, M8, M8)),
}


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.lamb], ids=lambda r: r.name)
@pytest.mark.parametrize("kind", PARTS)
def test_formats_of_several_parts_have_the_bits_of_python(kind, rule, size, bad):
    m, v, (param, *states) = PARTS[kind]
    start = arrays([size], bfloat16, 0)[0]
    opt = rule(start.copy(), lr=0.1, formats={"param": kind, "m": m, "v": v})
    stored, groups = start.copy(), -(-size // 64)
    rest = np.zeros(size, np.uint8 if kind == "bf16+r8" else np.uint16)
    codes = [np.full(size, 77, np.uint8) for _ in states]
    scales = [np.full(groups, np.nan, np.float32) for _ in states]
    counts = np.zeros(2, np.int64)
    handle, carry = API.find(rule.name.encode()), np.zeros(1)
    values = np.array([[*map(float, opt.groups[0].values())]])

    def segments(grad):
        streams = (Stream * 4)(
            Stream(param, (address(stored), address(rest))),
            Stream(BF16, (grad if grad is None else address(grad),)),
            *(
                Stream(of, (address(code), address(scale), counts[k:].ctypes.data))
                for k, (of, code, scale) in enumerate(
                    zip(states, codes, scales, strict=True)
                )
            ),
        )
        return streams, (Streams * 1)(Streams(address_of(streams), size, 0, 0))

    keep, segment = segments(None)
    API.start_streams(handle, 0, address(values), 1, address(carry), segment, 1)
    for step in range(1, 4):
        (grad,) = arrays([size], bfloat16, step)
        if bad and size and step == 2:
            grad[size // 2] = np.nan
        keep, segment = segments(grad)
        code = API.step_streams(
            *(handle, 0, step, address(values), 1, address(carry)),
            *(segment, 1, 1.0, None),
        )
        assert code == OK and keep
        opt.step(grad)
    assert stored.tobytes() == opt._params.arrays[0].tobytes()
    assert rest.tobytes() == opt.state["param_remainder"][0].tobytes()
    for name, code, scale in zip(("m", "v"), codes, scales, strict=True):
        assert code.tobytes() == opt.state[name][0].tobytes()
        assert scale.tobytes() == opt.state[f"{name}_scale"][0].tobytes()
    assert counts.sum() == opt.nonfinite_groups
    keep, segment = segments(arrays([size], bfloat16, 9)[0])
    keep[1].format = M8
    refused = API.step_streams(
        *(handle, 0, 4, address(values), 1, address(carry), segment, 1, 1.0, None)
    )
    assert refused == (BAD_ARGUMENT if size else OK)
