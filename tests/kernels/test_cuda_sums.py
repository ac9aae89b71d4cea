"""The machine code of the CUDA kernels for sums and tiles, compiled without a GPU."""

from __future__ import annotations

import re

import installed_numba  # noqa: F401
import numpy as np
import pytest
from cuda_machine_code import (  # noqa: F401
    EVERYTHING,
    HOPPER,
    WIDTH,
    assembled,
    contracting,
    divides,
    each_dtype,
    each_gpu,
    inexact,
    instructions_of,
    needs_compiler,
    on_machines,
    sums_flaws,
    without_division,
)

import fastopt
from fastopt.backends import cuda_kernels, cuda_table
from fastopt.backends.cuda_jobs import Tiles
from fastopt.backends.cuda_kernels import sums_job
from fastopt.memory.formats import FORMATS
from fastopt.memory.order import LANES
from fastopt.rules import passes
from fastopt.rules.adafactor import adafactor

pytestmark = needs_compiler

BF16, FP16 = FORMATS["bf16"], FORMATS["fp16"]
SR, R8, R16 = (FORMATS[name] for name in ("bf16_sr", "r8", "r16"))
M8, V8 = FORMATS["m8"], FORMATS["v8"]
# Exchanges between the threads of a warp that add up a term of float64: one for each
# half of a number and each time that the lanes are halved.
EXCHANGES = 2 * (LANES.bit_length() - 1)


def ptx_of(job, cc=HOPPER):
    return cuda_kernels.compile_ptx(job, cc)


def exchanges(ptx):
    return instructions_of(ptx)["shfl.sync.bfly.b32"]


@on_machines([*(rule for rule in EVERYTHING if rule.measure), passes.norm])
def test_machine_code_of_sums(rule, dtype, cc):
    """Measured: from 36 registers to 62, and 68 (lamb in float64)."""
    ptx = ptx_of(sums_job(rule, dtype, clip=True), cc)
    assert not sums_flaws(ptx, dtype, rule.terms)
    assert exchanges(ptx) == EXCHANGES * rule.terms
    code = assembled(ptx, cc)
    assert not code.spills
    # A warp's lanes are side by side in memory.
    assert code.accesses() == [0, 0]
    assert code.registers <= (64 if dtype == "float32" else 72)
    assert divides(ptx) or not code.fuses


@each_dtype
@pytest.mark.parametrize("clip", [True, False])
def test_no_sum_is_fused_beside_a_division(dtype, clip):
    ptx = ptx_of(sums_job(fastopt.lamb, dtype, clip))
    assert divides(ptx) and not sums_flaws(ptx, dtype, 2)
    assert not assembled(without_division(ptx)).fuses


@each_gpu
@pytest.mark.parametrize("state", [(R16, SR), (M8, V8)], ids=["r16", "8 bits"])
def test_machine_code_of_sums_of_formats(state, cc):
    formats = BF16, R8, *state
    ptx = ptx_of(sums_job(fastopt.lamb, "float32", formats=formats), cc)
    assert not sums_flaws(ptx, "float32", 2, words=True)
    assert not assembled(ptx, cc).spills


@pytest.mark.parametrize(
    "formats", [(BF16, BF16, None, None), (FP16, BF16, FP16, FP16)], ids=["bf16", "all"]
)
def test_machine_code_of_sums_where_streams_are_encoded(formats):
    ptx = ptx_of(sums_job(fastopt.lamb, "float32", True, formats))
    assert not sums_flaws(ptx, "float32", 2, words=True)
    loads = instructions_of(ptx)["ld.global.u16"]
    # The compiler unrolls the loop.
    assert loads and loads % sum(format is not None for format in formats) == 0
    assert not assembled(ptx).spills
    assert not assembled(without_division(ptx)).fuses


@each_gpu
def test_machine_code_of_sums_of_several_kinds_of_segments(cc):
    """8-bit state, and such that is not."""
    kinds = (None, None, M8, V8), (None,) * 4, (BF16, R8, M8, V8)
    jobs = [sums_job(fastopt.lamb, "float32", True, kind) for kind in kinds]
    job = jobs[0]._replace(kinds=kinds, stride=max(each.stride for each in jobs))
    ptx = ptx_of(job, cc)
    assert not sums_flaws(ptx, "float32", 2 * len(kinds), words=True)
    assert not assembled(ptx, cc).spills


@pytest.mark.parametrize("dtype", WIDTH)
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_machine_code_of_squares(by_column, clip, dtype, cc=HOPPER):
    ptx = ptx_of(Tiles(by_column, clip, np.dtype(dtype)), cc)
    exact = re.findall(r"\b(?:add|mul|fma)\.\S*f\d\d", ptx)
    assert {*exact} == {"add.rn.f64", "mul.rn.f64", f"mul.rn.f{dtype[-2:]}"}
    assert exchanges(ptx) == (0 if by_column else EXCHANGES)
    code = assembled(ptx, cc)
    assert not code.spills and not code.fuses
    assert code.registers <= 64


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("format", [BF16, FP16], ids=["bf16", "fp16"])
def test_machine_code_of_squares_of_what_is_encoded(by_column, format):
    ptx = ptx_of(Tiles(by_column, True, np.dtype("f4"), format))
    found = instructions_of(ptx)
    assert found["ld.global.u16"]
    assert found["ld.global.f32"] == 3  # the scalars
    exact = re.findall(r"\b(?:add|mul|fma)\.\S*f\d\d", ptx)
    assert {*exact} - {"mul.rn.f32"} == {"add.rn.f64", "mul.rn.f64"}
    assert not assembled(ptx).spills


@each_dtype
def test_machine_code_of_state_that_is_factored(dtype):
    """Of its factors the kernel makes numbers, element by element."""
    rule, formats = adafactor, (None, None, cuda_table.FACTORED)
    job = cuda_kernels.update_job(rule, dtype, formats=formats)
    ptx = ptx_of(job)
    width = WIDTH[dtype]
    found = instructions_of(ptx)
    kind = f"v{width}.f{dtype[-2:]}"
    assert found[f"ld.global.{kind}"] == 2 and found[f"st.global.{kind}"] == 1
    assert dtype == "float64" or ".f64" not in ptx
    code = assembled(ptx)
    assert not code.spills and code.registers <= 80
    ptx = ptx_of(sums_job(rule, dtype, formats=formats))
    assert not sums_flaws(ptx, dtype, rule.terms)
    assert not assembled(ptx).spills


# That these checks can fail


def test_contraction_is_refused(contracting, monkeypatch):  # noqa: F811
    job = sums_job(fastopt.lamb, "float32")
    with pytest.raises(RuntimeError, match="fuses"):
        ptx_of(job)
    monkeypatch.setattr(cuda_kernels, "check", lambda ptx, single: ptx)
    assert "fma.rn.f64" in sums_flaws(ptx_of(job), "float32", 2)


def test_sums_that_are_rounded_are_noticed():
    """Terms of float32, and products that are not exact in float64."""
    ptx = ptx_of(sums_job(fastopt.lamb, "float32"))
    assert "add.rn.f32, rounded" not in sums_flaws(ptx, "float32", 2)
    rounded = ptx.replace("cvt.f64.f32", "cvt.rn.f32.f64", 1)
    assert sums_flaws(rounded, "float32", 2)
    assert inexact(ptx.replace("add.rn.f64", "add.f64", 1))
