"""The machine code of the kernels that decide about steps."""

from __future__ import annotations

import re

import installed_numba  # noqa: F401
import numpy as np
import pytest
from cuda_machine_code import GPUS, HOPPER, assembled, inexact, needs_compiler

import fastopt
from fastopt.backends.cuda_jobs import Settle
from fastopt.backends.cuda_kernels import compile_ptx
from fastopt.backends.cuda_table import BUFFERS

pytestmark = needs_compiler


def settle_job(rule, stage="scalars", by_host=False, **more):
    """What a step of a rule compiles to decide, with everything that it may."""
    values = rule.hyperparameters
    results = len(rule.scalars(1, *rule.first_carry(values), *values.values()))
    return Settle(
        None if by_host else rule.scalars,
        rule.settle,
        stage,
        np.dtype(np.float32),
        BUFFERS + 3,
        1 + results if by_host else len(values),
        0 if by_host else len(rule.carry),
        results,
        rule.settle_count,
        rule.scalar_count,
        rule.measure_count,
        rule.terms,
        rule.settle is not None and not rule.by_segment,
        clip=True,
        average=True,
        norm=True,
        **more,
    )


SKIPS = {"skips": True, "found": True, "scale": True}
JOBS = {
    "adamw": settle_job(fastopt.adamw, **SKIPS),
    "adamw, counts": settle_job(fastopt.adamw, counts=True, **SKIPS),
    "adamw, lr": settle_job(fastopt.adamw, lr_column=0, lr_kind="float32"),
    "adamw by the host": settle_job(fastopt.adamw, by_host=True),
    "lamb": settle_job(fastopt.lamb, "settle"),
    "lamb by the host": settle_job(fastopt.lamb, "settle", by_host=True, shared=True),
    "prodigy": settle_job(fastopt.prodigy, "settle", **SKIPS),
    "a factor": settle_job(fastopt.sgd, "factor", scale=True),
}


@pytest.mark.parametrize("cc", GPUS, ids=lambda cc: "sm_{}{}".format(*cc))
@pytest.mark.parametrize("name", JOBS)
def test_machine_code_of_decisions(name, cc):
    """Measured on sm_90: 34 registers where the host computes the scalars, up to 88
    with powers, whose limbs are on the stack; nothing else is."""
    ptx = compile_ptx(JOBS[name], cc)
    flaws = [flaw for flaw in inexact(ptx) if flaw not in ("a call", "local memory")]
    powers = "fastopt_powers" in ptx
    assert not flaws
    assert powers == (name.startswith("adamw") and "host" not in name)
    code = assembled(ptx, cc)
    stack = max(map(int, re.findall(r"STACK:(\d+)", code.usage)))
    assert code.registers <= 96 and stack <= (2048 if powers else 0)


def test_threads_wait_for_each_other():
    """Sums are read only after all of them were written."""
    for name, least in (("adamw", 3), ("lamb", 1), ("prodigy", 2)):
        assert (
            len(re.findall(r"\bbar(?:rier)?\.sync", compile_ptx(JOBS[name], HOPPER)))
            >= least
        )
