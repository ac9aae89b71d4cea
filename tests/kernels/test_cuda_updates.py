"""The machine code of the CUDA kernels for updates, compiled without a GPU."""

from __future__ import annotations

import re

import installed_numba  # noqa: F401
import numpy as np
import pytest
from cuda_machine_code import (  # noqa: F401
    CLOSURE,
    EIGHT,
    EVERYTHING,
    HOPPER,
    ROOT,
    USERS,
    assembled,
    code_flaws,
    contracting,
    divides,
    flaws,
    inexact,
    instructions_of,
    needs_compiler,
    on_machines,
    without_comparisons,
    without_division,
)
from hashed import hashed

import fastopt
from fastopt import Rule
from fastopt.backends import cuda_kernels
from fastopt.backends.cuda_jobs import NOTHING, Beside
from fastopt.backends.cuda_kernels import update_job
from fastopt.language import reached
from fastopt.memory.formats import FORMATS

pytestmark = needs_compiler

# Registers of a thread where they are not 64, at which an SM still holds half of the
# threads that it has room for.
ROOM = {"float32": 64, "float64": 80}
ROOM_WITH_ALL = {"float32": 64, "float64": 96}
MORE = {fastopt.prodigy: 72, EIGHT: 80}  # where float32 has more than two buffers


def room(scaled, cc):
    """How many registers a kernel for encoded streams may have."""
    if not scaled:
        return 72
    return 104 if cc == (8, 0) else 80  # the assembler for sm_80 is generous


def ptx_of(job, cc=HOPPER):
    return cuda_kernels.compile_ptx(job, cc)


@on_machines([*EVERYTHING, USERS, CLOSURE, EIGHT, ROOT, hashed])
def test_machine_code(rule, dtype, cc):
    job = update_job(rule, dtype)
    ptx = ptx_of(job, cc)
    assert not flaws(ptx, job)
    names = {name for f in reached(rule.update, []) for name in f.__code__.co_names}
    assert ("sqrt.rn" in ptx) == ("sqrt" in names)
    code = assembled(ptx, cc)
    assert not code_flaws(code, job)
    assert code.accesses() == [2 + len(rule.state), 1 + len(rule.state)]
    assert code.registers <= max(ROOM[dtype], MORE.get(rule, 0))
    # The rules that divide are made sure of below.
    assert divides(ptx) or not code.fuses
    assert divides(ptx) or rule not in DIVIDING


DIVIDING = [
    *(fastopt.adamw, fastopt.adamax, fastopt.madgrad, fastopt.sophia_g, fastopt.ftrl),
    *(fastopt.adan, fastopt.lamb, fastopt.prodigy, USERS),
]


@on_machines(DIVIDING)
def test_nothing_is_fused_beside_a_division(rule, dtype, cc):
    ptx = without_division(ptx_of(update_job(rule, dtype), cc))
    assert not divides(ptx) and not inexact(ptx)
    assert not assembled(ptx, cc).fuses


ALL = Beside(clip=True, average=True, zero=True)
REPRESENTATIVES = [
    rule
    for name in ("adamw", "lamb", "prodigy", "novograd", "sgd")
    for rule in getattr(fastopt, name).all
]


@on_machines([*REPRESENTATIVES, EIGHT])
def test_machine_code_with_all_beside_the_rule(rule, dtype, cc):
    job = update_job(rule, dtype, ALL)
    ptx = ptx_of(job, cc)
    assert not flaws(ptx, job)
    code = assembled(ptx, cc)
    assert not code_flaws(code, job)
    assert code.accesses() == [3 + len(rule.state)] * 2
    assert code.registers <= max(ROOM_WITH_ALL[dtype], MORE.get(rule, 0))
    if divides(ptx):
        code = assembled(without_division(ptx), cc)
    assert not code.fuses


@pytest.mark.parametrize("field", Beside._fields)
def test_machine_code_with_one_thing_beside_the_rule(field):
    job = update_job(fastopt.adamw, "float32", NOTHING._replace(**{field: True}))
    assert not flaws(ptx_of(job), job)


BF16, FP16 = FORMATS["bf16"], FORMATS["fp16"]
# Of the gradient, of the parameter, of the state.
STORED = {
    "bf16": (BF16, BF16, None),
    "fp16": (FP16, FP16, None),
    "gradients": (BF16, None, None),
    "all": (FP16, BF16, FP16),
}


@pytest.mark.parametrize(
    ("rule", "stored", "beside"),
    [
        *((fastopt.adamw, stored, ALL) for stored in STORED),
        *((rule, "bf16", NOTHING) for rule in (fastopt.adamw, hashed)),
        *((rule, "fp16", NOTHING) for rule in (fastopt.gd, EIGHT)),
        (fastopt.lamb, "all", NOTHING),
    ],
    ids=lambda value: getattr(value, "name", value if type(value) is str else "also"),
)
def test_machine_code_where_streams_are_encoded(rule, stored, beside):
    """A vector of theirs has 64 bits, as entries of the table have."""
    grad, param, state = STORED[stored]
    formats = grad, param, *[state] * len(rule.state), *[None] * beside.average
    job = update_job(rule, "float32", beside, formats)
    ptx = ptx_of(job)
    assert not flaws(ptx, job)
    code = assembled(ptx)
    assert not code_flaws(code, job)
    encoded = [format is not None for format in formats]
    read, written = sum(encoded), sum(encoded[not beside.zero :])
    entries = instructions_of(ptx)["ld.global.u64"]
    assert code.accesses(64) == [read + entries, written]
    others = [len(formats) - read, len(formats) - (not beside.zero) - written]
    assert code.accesses() == others
    assert code.registers <= max(64, MORE.get(rule, 0))
    assert divides(ptx) or not code.fuses


SR, R8, R16 = (FORMATS[name] for name in ("bf16_sr", "r8", "r16"))
M8, V8 = FORMATS["m8"], FORMATS["v8"]
# Of the parameter and of each state buffer.
OF_STATE = {
    "bf16_sr": (SR, SR, SR),
    "r8": (R8, SR, SR),
    "r16": (R16, None, FP16),
    "8 bits": (R8, M8, V8),
}


@pytest.mark.parametrize("name", OF_STATE)
def test_machine_code_of_formats(name, cc=HOPPER):
    job = update_job(fastopt.adamw, "float32", ALL, (BF16, *OF_STATE[name], None))
    ptx = ptx_of(job, cc)
    assert not without_comparisons(flaws(ptx, job))
    code = assembled(ptx, cc)
    assert not code_flaws(code, job)
    assert code.registers <= room(name == "8 bits", cc)
    assert not assembled(without_division(ptx), cc).fuses
    # Four find the greatest of 16 threads; a barrier comes before its scale is stored.
    found, scaled = instructions_of(ptx), 2 if name == "8 bits" else 0
    assert found["shfl.sync.bfly.b32"] == 4 * scaled
    assert found["bar.warp.sync"] == found["atom.global.add.u64"] == scaled


# Several kinds of segments in one kernel: 8-bit state and such that is not, since small
# arrays keep theirs in float32; gradients of two dtypes; and parameters of two, as in
# models whose norms alone are in float32.
EIGHT_BITS, PLAIN = (None, None, M8, V8), (None, None, None, None)
KINDS = {
    "8 bits and none": (EIGHT_BITS, PLAIN),
    "gradients of two dtypes": (PLAIN, (BF16, None, None, None)),
    "parameters of two dtypes": (PLAIN, (BF16, BF16, None, None)),
}


@pytest.mark.parametrize("beside", [NOTHING, ALL], ids=["alone", "all"])
@pytest.mark.parametrize("name", KINDS)
def test_machine_code_of_several_kinds_of_segments(name, beside, cc=HOPPER):
    kinds = tuple((*kind, *[None] * beside.average) for kind in KINDS[name])
    jobs = [update_job(fastopt.adamw, "float32", beside, kind) for kind in kinds]
    stride = max(job.stride for job in jobs)
    job = jobs[0]._replace(kinds=kinds, stride=stride)
    ptx = ptx_of(job, cc)
    assert not without_comparisons(flaws(ptx, job))
    code = assembled(ptx, cc)
    assert not code_flaws(code, job)
    assert code.registers <= room(scaled=True, cc=cc)
    assert not assembled(without_division(ptx), cc).fuses


@pytest.mark.parametrize("formats", [PLAIN, EIGHT_BITS, (FP16, BF16, FP16, FP16)])
def test_elements_one_by_one_are_computed_alike(formats):
    """Where buffers are misaligned, and at the ends: no kernel is compiled apart."""
    job = update_job(fastopt.adamw, "float32", NOTHING, formats)
    found = instructions_of(ptx_of(job))
    divided = found["sqrt.rn.f32"]
    # A group is of one body; others have a loop besides, which may have been unrolled.
    assert divided >= (4 if formats is EIGHT_BITS else 4 + 1)
    assert found["div.rn.f32"] >= divided


@pytest.mark.parametrize("cc", [(7, 5), (8, 9), (12, 0)])
def test_other_gpus(cc):
    job = update_job(fastopt.amsgradw, "float32")
    ptx = ptx_of(job, cc)
    assert not flaws(ptx, job)
    assert not assembled(ptx, cc).spills


# That these checks can fail


def test_contraction_is_refused(contracting, monkeypatch):  # noqa: F811
    plain = update_job(fastopt.adamw, "float32")
    with pytest.raises(RuntimeError, match="fuses"):
        ptx_of(plain)
    monkeypatch.setattr(cuda_kernels, "check", lambda ptx, single: ptx)
    for job in (plain, update_job(fastopt.adamw, "float32", ALL)):
        assert "fma.rn.f32" in flaws(ptx_of(job), job)


@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.gd])
def test_fusing_by_the_assembler_is_noticed(rule):
    """It may, where an addition does not say how to round."""
    ptx = ptx_of(update_job(rule, "float32"))
    loose = re.sub(r"\b(add|sub|mul)\.rn\.", r"\1.", without_division(ptx))
    assert inexact(loose)
    assert assembled(loose).fuses


def test_scalar_accesses_are_noticed(monkeypatch):
    job = update_job(fastopt.adamw, "float32")
    update_of = cuda_kernels.update_of
    monkeypatch.setattr(cuda_kernels, "update_of", lambda *of: update_of(*of[:-1], 1))
    ptx = ptx_of(job)
    assert "0 times ld.global.v4.f32, not 4" in flaws(ptx, job)
    assert "[0, 0] accesses of 128 bits, not [4, 3]" in code_flaws(assembled(ptx), job)


def test_an_access_too_many_is_noticed():
    """Of the table, and of what no kernel loads."""
    job = update_job(fastopt.adamw, "float32")
    ptx = ptx_of(job)
    for old, new in {
        "ld.global.u64": "ld.global.u64 \t%rd1, [%rd1];\n\tld.global.u64",
        "ld.global.v4.f32": "ld.global.u32 \t%r1, [%rd1];\n\tld.global.v4.f32",
    }.items():
        assert flaws(ptx.replace(old, new, 1), job)


PI = 3.140625


DOUBLE_PI = np.float64(np.pi)


def with_double(p, g, lr):
    return (p - lr * g * DOUBLE_PI,)


def with_global(p, g, lr):
    return (p - lr * g * PI,)


def test_float64_in_a_float32_kernel_is_refused(monkeypatch):
    def scalars(t, lr=0.1):
        return (lr,)

    job = update_job(Rule(with_global, scalars), "float32")
    assert not flaws(ptx_of(job), job)
    job = update_job(Rule(with_double, scalars), "float32")
    with pytest.raises(TypeError, match="return its constants from scalars"):
        ptx_of(job)
    monkeypatch.setattr(cuda_kernels, "check", lambda ptx, single: ptx)
    assert "float64" in flaws(ptx_of(job), job)


def test_spills_are_noticed():
    job = update_job(EIGHT, "float64")
    ptx = ptx_of(job)
    tight = re.sub(r"^\)\n\{", ")\n.maxnreg 24\n{", ptx, count=1, flags=re.M)
    assert tight != ptx
    code = assembled(tight)
    assert code.spills and "spills" in code_flaws(code, job)
