"""The CUDA backend without a GPU: its bits in numba's simulator, its machine code as
compiled, and the launch up to the driver. With a GPU also its bits there."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import installed_numba  # noqa: F401
import numpy as np
import pytest
from cases import closure_rule
from hashed import hashed

import fastopt
from fastopt import RULES, Rule, backends
from fastopt.backends import cuda_accesses, cuda_driver, cuda_kernels, numpy_ref
from fastopt.backends.cuda_kernels import Beside
from fastopt.language import reached
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Encoded, Segment
from fastopt.rule import cbrt, copysign, maximum, minimum, sign, sqrt, where
from fastopt.rules import passes
from fastopt.step import Request, limits

PROJECT = Path(__file__).resolve().parents[2]
SUPPORT = PROJECT / "tests" / "support"
OF_BITS = pytest.mark.parametrize(
    "name", ["cuda_simulator.py", "cuda_stored.py", "cuda_formats.py"]
)
EVERYTHING = [rule for public in RULES for rule in public.all]
WIDTH = {"float32": 4, "float64": 2}

needs_compiler = pytest.mark.skipif(
    bool(cuda_accesses.not_installed)
    or cuda_kernels.SIMULATED
    or not cuda_accesses.nvvm.is_available(),
    reason=f"the CUDA compiler is not installed: {cuda_driver.HOW_TO_GET}",
)


@pytest.mark.parametrize("name", backends.MODULES)
def test_a_backend_has_the_functions_of_the_reference(name):
    module = importlib.import_module(backends.MODULES[name])
    assert module.__all__ == numpy_ref.__all__
    functions = [name for name in module.__all__ if name != "formats"]
    assert all(callable(getattr(module, function)) for function in functions)
    assert module.formats <= FORMATS.keys()


# The bits


def report(name: str, simulated: bool) -> str:
    """What this file finds wrong. In a process of its own, because the choice is made
    when numba is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", SUPPORT / name],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulated))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout if run.returncode else ""


@pytest.mark.skipif(
    bool(cuda_accesses.not_installed), reason="numba-cuda is not installed"
)
@OF_BITS
def test_bits_in_the_simulator(name):
    assert not report(name, simulated=True)


@pytest.mark.skipif(bool(cuda_driver.missing()), reason=f"{cuda_driver.missing()}")
@OF_BITS
def test_bits_on_the_gpu(name):
    assert not report(name, simulated=False)


# The machine code


def instructions_of(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]+[\w.]*)", ptx, re.M))


def inexact(ptx: str) -> list[str]:
    """The instructions in PTX with which bits would differ, or time be lost."""
    wrong = []
    for instruction in instructions_of(ptx):
        head, *tail = instruction.split(".")
        unrounded = head in ("div", "rcp", "sqrt") and "rn" not in tail
        fused = head in ("fma", "mad") and tail[-1].startswith("f")
        may_fuse = (
            head in ("add", "sub", "mul") and tail[-1][0] == "f" and tail[0] != "rn"
        )
        if unrounded or fused or may_fuse or "approx" in tail or "ftz" in tail:
            wrong.append(instruction)
        if head == "call":
            wrong.append("a call")
        if head in ("max", "min") and tail[-1][0] == "f":
            wrong.append(f"{head}, which drops NaN")
    if re.search(r"\bfma\b", ptx) and not any("fma" in flaw for flaw in wrong):
        wrong.append("fma somewhere")
    if ".local" in ptx:
        wrong.append("local memory")
    return wrong


# What is loaded of a vector of a format.
VECTORS = {
    **dict.fromkeys(("bf16", "bf16_sr", "fp16"), ("u16",)),
    "r8": ("u16", "u8"),
    "r16": ("u16", "u16"),
    **dict.fromkeys(("m8", "v8"), ("u8",)),
}


def flaws(
    ptx: str, dtype: str, streams: int, zeroing: bool = False, formats=()
) -> list[str]:
    """What in the PTX of a kernel that writes so many streams is not as wanted."""
    width, found = WIDTH[dtype], instructions_of(ptx)
    kinds = [
        VECTORS[of.name] if of else (f"f{dtype[-2:]}",)
        for of in formats or [None] * (streams + 1)
    ]
    wanted = {
        f"{operation}.global.v{width}.{kind}": sum(of.count(kind) for of in moved)
        for kind in (f"f{dtype[-2:]}", "u16", "u8")
        for operation, moved in (("ld", kinds), ("st", kinds[not zeroing :]))
    }
    wrong = [
        f"{found[instruction]} times {instruction}, not {times}"
        for instruction, times in wanted.items()
        if found[instruction] != times
    ]
    if dtype == "float32" and ".f64" in ptx:
        wrong.append("float64")
    return wrong + inexact(ptx)


def sums_flaws(ptx: str, dtype: str, terms: int, words: bool = False) -> list[str]:
    """The same of a kernel for sums: its totals are of float64, its terms are not, but
    for products of what is made wide."""
    found = instructions_of(ptx)
    wrong = []
    if found["st.global.f64"] != terms:
        wrong.append(f"{found['st.global.f64']} stores, not {terms}")
    for instruction in found:
        of_arrays = instruction.startswith("ld.") and ".param" not in instruction
        kinds = [f"ld.global.f{dtype[-2:]}"]
        kinds += ["ld.global.u16", "ld.global.u8"] if words else []
        if of_arrays and instruction not in kinds:
            wrong.append(instruction)
    if dtype == "float32":
        wide = {instruction for instruction in found if ".f64" in instruction}
        exact = {"cvt.f64.f32", "add.rn.f64", "mul.rn.f64", "mov.f64", "st.global.f64"}
        wrong += sorted(wide - exact)
    return wrong + inexact(ptx)


def divides(ptx: str) -> bool:
    return bool(re.search(r"\b(?:div|rcp|sqrt)\.", ptx))


def without_division(ptx: str) -> str:
    """The PTX with a product for each quotient and a magnitude for each root and each
    reciprocal: on a GPU, these are made of fused operations themselves, which are to
    stay."""
    ptx = re.sub(r"\bdiv\.rn\.", "mul.rn.", ptx)
    return re.sub(r"\b(?:rcp|sqrt)\.rn\.", "abs.", ptx)


def fuses(instructions: str) -> bool:
    return bool(re.search(r"\b[DFH]FMA\b", instructions))


@pytest.fixture
def disassemble(tmp_path):
    """From machine code to its resource usage and instructions, by the pip wheel."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="no cuda-pathfinder")
    # The first calls the second, which it finds beside itself.
    find = pathfinder.find_nvidia_binary_utility
    tool, disassembler = find("cuobjdump"), find("nvdisasm")
    if tool is None or disassembler is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install '.[cuda-test]'")

    def disassemble(cubin: bytes) -> list[str]:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(cubin)
        return [
            subprocess.run(
                [tool, what, path], check=True, capture_output=True, text=True
            ).stdout
            for what in ("-res-usage", "-sass")
        ]

    return disassemble


def assemble(ptx: str, arch: str = "sm_90") -> bytes:
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    program = core.Program(ptx, "ptx", core.ProgramOptions(arch=arch))
    return program.compile("cubin").code


def spills(usage: str, instructions: str) -> bool:
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert sizes, usage
    return any(map(int, sizes)) or bool(re.search(r"\b(?:LDL|STL)\b", instructions))


def registers(usage: str) -> int:
    return max(map(int, re.findall(r"REG:(\d+)", usage)))


def wide_accesses(instructions: str, bits: int = 128) -> list[int]:
    kinds = (rf"\b{op}\.E\.{bits}\b" for op in ("LDG", "STG"))
    return [len(re.findall(kind, instructions)) for kind in kinds]


def threshold(x, cut):
    return sign(x) * maximum(abs(x) - cut, cut - cut)


def users_update(p, g, m, v, lr, beta, cut):
    m = where((g > cut) | (g < -cut), beta * m, copysign(m, g))
    v = minimum(maximum(v, g * g), cut)
    return p - lr * threshold(m, cut) / (sqrt(v) + cut), m, v


def users_scalars(t, lr=0.1, beta=0.9, cut=0.3):
    return lr, beta, cut


CLOSURE = closure_rule()
USERS = Rule(users_update, users_scalars, state=("m", "v"))


def eight_states(p, g, a, b, c, d, e, f, h, k, lr):
    return p - lr * (g + a * b + c * d + e * f + h * k), k, h, f, e, d, c, b, a


EIGHT = Rule(eight_states, lambda t, lr=0.1: (lr,), state=tuple("abcdefhk"))


def only_root(p, g, lr):
    return (p - lr * g * cbrt(abs(g)),)


ROOT = Rule(only_root, lambda t, lr=0.1: (lr,))  # of fastopt's own operations


def of_each(rules):
    return pytest.mark.parametrize("rule", rules, ids=lambda rule: f"{rule.name}")


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
@of_each([*EVERYTHING, USERS, CLOSURE, EIGHT, ROOT, hashed])
def test_machine_code(rule, dtype, disassemble):
    streams = 1 + len(rule.state)
    ptx = cuda_kernels.compile_ptx(rule, dtype)
    assert not flaws(ptx, dtype, streams)
    names = {name for f in reached(rule.update, []) for name in f.__code__.co_names}
    assert ("sqrt.rn" in ptx) == ("sqrt" in names)
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions)
    assert wide_accesses(instructions) == [streams + 1, streams]
    # At 64 registers, an SM still holds half of the threads it has room for.
    assert registers(usage) <= (80 if rule is EIGHT else 64)
    # The rules that divide are made sure of below.
    assert divides(ptx) or not fuses(instructions)
    assert divides(ptx) or rule not in DIVIDING


DIVIDING = [
    *(fastopt.adamw, fastopt.adamax, fastopt.madgrad, fastopt.sophia_g, fastopt.ftrl),
    *(fastopt.adan, fastopt.lamb, fastopt.prodigy, USERS),
]


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
@of_each(DIVIDING)
def test_nothing_is_fused_beside_a_division(rule, dtype, disassemble):
    ptx = without_division(cuda_kernels.compile_ptx(rule, dtype))
    assert not divides(ptx) and not inexact(ptx)
    assert not fuses(disassemble(assemble(ptx))[1])


ALL = Beside(clip=True, average=True, zero=True)
REPRESENTATIVES = [
    rule
    for name in ("adamw", "lamb", "prodigy", "novograd", "sgd")
    for rule in getattr(fastopt, name).all
]
ROOM = {fastopt.prodigy: 72, EIGHT: 80}  # registers, where it is not 64


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
@of_each([*REPRESENTATIVES, EIGHT])
def test_machine_code_with_all_beside_the_rule(rule, dtype, disassemble):
    """Measured: from 26 registers (sgd) to 56 (adamw, lamb) and 70 (prodigy)."""
    streams = 2 + len(rule.state)
    ptx = cuda_kernels.compile_ptx(rule, dtype, beside=ALL)
    assert not flaws(ptx, dtype, streams, zeroing=True)
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions)
    assert wide_accesses(instructions) == [streams + 1, streams + 1]
    assert registers(usage) <= ROOM.get(rule, 64)
    if divides(ptx):
        _, instructions = disassemble(assemble(without_division(ptx)))
    assert not fuses(instructions)


BF16, FP16 = FORMATS["bf16"], FORMATS["fp16"]
# Of the gradient, of the parameter, of the state.
STORED = {
    "bf16": (BF16, BF16, None),
    "fp16": (FP16, FP16, None),
    "gradients": (BF16, None, None),
    "all": (FP16, BF16, FP16),
}


@needs_compiler
@pytest.mark.parametrize(
    ("rule", "stored", "beside"),
    [
        *((fastopt.adamw, stored, ALL) for stored in STORED),
        *((rule, "bf16", cuda_kernels.NOTHING) for rule in (fastopt.adamw, hashed)),
        *((rule, "fp16", cuda_kernels.NOTHING) for rule in (fastopt.gd, EIGHT)),
        (fastopt.lamb, "all", cuda_kernels.NOTHING),
    ],
    ids=lambda value: getattr(value, "name", value if type(value) is str else "also"),
)
def test_machine_code_where_streams_are_encoded(rule, stored, beside, disassemble):
    """A vector of theirs has 64 bits."""
    grad, param, state = STORED[stored]
    formats = grad, param, *[state] * len(rule.state), *[None] * beside.average
    ptx = cuda_kernels.compile_ptx(rule, "float32", beside=beside, formats=formats)
    assert not flaws(ptx, "float32", len(formats) - 1, beside.zero, formats)
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions)
    encoded = [format is not None for format in formats]
    read, written = sum(encoded), sum(encoded[not beside.zero :])
    assert wide_accesses(instructions, 64) == [read, written]
    both = [len(formats) - read, len(formats) - (not beside.zero) - written]
    assert wide_accesses(instructions) == both
    assert registers(usage) <= ROOM.get(rule, 64)
    assert divides(ptx) or not fuses(instructions)


@needs_compiler
@pytest.mark.parametrize("stored", ["bf16", "all"])
def test_machine_code_of_single_elements_that_are_encoded(stored):
    grad, param, state = STORED[stored]
    formats = grad, param, state, state, None
    ptx = cuda_kernels.compile_ptx(
        fastopt.adamw, "float32", aligned=False, beside=ALL, formats=formats
    )
    assert not inexact(ptx) and ".f64" not in ptx
    assert not re.search(r"(?:ld|st)\.global\.v", ptx)
    wrong = flaws(ptx, "float32", 4, zeroing=True, formats=formats)
    assert any("0 times ld.global.v4.u16, not" in flaw for flaw in wrong)


SR, R8, R16 = (FORMATS[name] for name in ("bf16_sr", "r8", "r16"))
M8, V8 = FORMATS["m8"], FORMATS["v8"]
# Of the parameter and of each state buffer.
OF_STATE = {
    "bf16_sr": (SR, SR, SR),
    "r8": (R8, SR, SR),
    "r16": (R16, None, FP16),
    "8 bits": (R8, M8, V8),
}


def without_comparisons(flaws):
    """Flaws other than minima and maxima, which codecs with scales write as comparisons
    of numbers that are not NaN: groups that are not finite are not stored."""
    return [flaw for flaw in flaws if not flaw.endswith("which drops NaN")]


@needs_compiler
@pytest.mark.parametrize("name", OF_STATE)
def test_machine_code_of_formats(name, disassemble):
    """Measured: from 52 registers (bf16_sr) to 62 (8 bits)."""
    formats = BF16, *OF_STATE[name], None
    ptx = cuda_kernels.compile_ptx(
        fastopt.adamw, "float32", beside=ALL, formats=formats
    )
    found = flaws(ptx, "float32", len(formats) - 1, True, formats)
    assert not without_comparisons(found)
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions) and registers(usage) <= 64
    assert not fuses(disassemble(assemble(without_division(ptx)))[1])
    # Four find the greatest of 16 threads; a barrier comes before its scale is stored.
    found, scaled = instructions_of(ptx), 2 if name == "8 bits" else 0
    assert found["shfl.sync.bfly.b32"] == 4 * scaled
    assert found["bar.warp.sync"] == found["atom.global.add.u64"] == scaled


@needs_compiler
def test_machine_code_of_sums_of_formats(disassemble):
    for state in ((R16, SR), (M8, V8)):
        formats = BF16, R8, *state
        ptx = cuda_kernels.compile_sums_ptx(fastopt.lamb, "float32", formats=formats)
        assert not sums_flaws(ptx, "float32", 2, words=True)
        assert not spills(*disassemble(assemble(ptx)))


@needs_compiler
def test_machine_code_where_groups_are_misaligned(disassemble):
    formats = None, None, M8, V8
    ptx = cuda_kernels.compile_ptx(
        fastopt.adamw, "float32", aligned=False, formats=formats
    )
    assert not without_comparisons(inexact(ptx)) and ".f64" not in ptx
    assert not re.search(r"(?:ld|st)\.global\.v", ptx)
    assert not spills(*disassemble(assemble(ptx)))


@needs_compiler
@pytest.mark.parametrize("stored", ["bf16", "all"])
def test_machine_code_of_sums_where_streams_are_encoded(stored, disassemble):
    grad, param, state = STORED[stored]
    formats = grad, param, state, state
    ptx = cuda_kernels.compile_sums_ptx(
        fastopt.lamb, "float32", clip=True, formats=formats
    )
    assert not sums_flaws(ptx, "float32", 2, words=True)
    loads = instructions_of(ptx)["ld.global.u16"]
    # The compiler unrolls the loop.
    assert loads and loads % sum(format is not None for format in formats) == 0
    assert not spills(*disassemble(assemble(ptx)))
    assert not fuses(disassemble(assemble(without_division(ptx)))[1])
    for by_column in (False, True):
        ptx = cuda_kernels.compile_tiles_ptx(by_column, "float32", True, format=grad)
        found = instructions_of(ptx)
        assert found["ld.global.u16"] and not found["ld.global.f32"]
        exact = re.findall(r"\b(?:add|mul|fma)\.\S*f\d\d", ptx)
        assert {*exact} - {"mul.rn.f32"} == {"add.rn.f64", "mul.rn.f64"}
        assert not spills(*disassemble(assemble(ptx)))


@needs_compiler
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("field", Beside._fields)
def test_machine_code_with_one_thing_beside_the_rule(field, aligned):
    beside = Beside()._replace(**{field: True})
    ptx = cuda_kernels.compile_ptx(
        fastopt.adamw, "float32", aligned=aligned, beside=beside
    )
    if aligned:
        assert not flaws(ptx, "float32", 3 + beside.average, beside.zero)
    else:
        assert not inexact(ptx) and ".f64" not in ptx
        assert not re.search(r"(?:ld|st)\.global\.v", ptx)


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
@of_each([rule for rule in EVERYTHING if rule.measure] + [passes.norm])
def test_machine_code_of_sums(rule, dtype, disassemble):
    """Measured: from 24 registers (novograd) to 48 (dadapt_adam), and all threads of an
    SM have room with 32."""
    ptx = cuda_kernels.compile_sums_ptx(rule, dtype, clip=True)
    assert not sums_flaws(ptx, dtype, rule.terms)
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions)
    # A warp's lanes are side by side in memory.
    assert wide_accesses(instructions) == [0, 0]
    assert registers(usage) <= 48
    assert divides(ptx) or not fuses(instructions)


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
def test_no_sum_is_fused_beside_a_division(dtype, disassemble):
    for clip in (True, False):
        ptx = cuda_kernels.compile_sums_ptx(fastopt.lamb, dtype, clip=clip)
        assert divides(ptx) and not sums_flaws(ptx, dtype, 2)
        assert not fuses(disassemble(assemble(without_division(ptx)))[1])


@needs_compiler
def test_machine_code_that_adds_up(disassemble):
    function, signature = cuda_kernels.lanes_kernel()
    ptx, _ = cuda_kernels.cuda.compile_ptx(function, signature, cc=(9, 0))
    arithmetic = r"(?:add|sub|mul|fma|div)\.[\w.]*f\d+"
    assert set(re.findall(arithmetic, ptx)) == {"add.f64"}  # with nothing to fuse
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions) and not fuses(instructions)
    assert registers(usage) <= 32


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
def test_machine_code_that_multiplies(dtype, disassemble):
    function, signature = cuda_kernels.product_kernel(np.dtype(dtype))
    ptx, _ = cuda_kernels.cuda.compile_ptx(function, signature, cc=(9, 0))
    arithmetic = r"(?:add|sub|mul|fma|div)\.[\w.]*f\d+"
    kind = f"mul.f{dtype[-2:]}"
    assert set(re.findall(arithmetic, ptx)) == {kind}  # with nothing to fuse
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions) and registers(usage) <= 40  # 36: 64-bit %


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
def test_machine_code_for_unaligned_buffers(dtype, disassemble):
    ptx = cuda_kernels.compile_ptx(fastopt.adamw, dtype, aligned=False)
    assert not re.search(r"(?:ld|st)\.global\.v", ptx)
    usage, instructions = disassemble(assemble(ptx))
    assert not spills(usage, instructions)
    assert wide_accesses(instructions) == [0, 0]


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_machine_code_of_squares(by_column, dtype, clip, disassemble):
    ptx = cuda_kernels.compile_tiles_ptx(by_column, dtype, clip)
    exact = re.findall(r"\b(?:add|mul|fma)\.\S*f\d\d", ptx)
    assert set(exact) == {"add.rn.f64", "mul.rn.f64", f"mul.rn.f{dtype[-2:]}"}
    assert not spills(*disassemble(assemble(ptx)))


@needs_compiler
@pytest.mark.parametrize("cc", [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus(cc, disassemble):
    ptx = cuda_kernels.compile_ptx(fastopt.amsgradw, "float32", cc=cc)
    assert not flaws(ptx, "float32", 4)
    assert not spills(*disassemble(assemble(ptx, f"sm_{cc[0]}{cc[1]}")))


# That these checks can fail


@pytest.fixture
def contracting(monkeypatch):
    """The compiler as if it did not know the option against contraction."""
    original = cuda_accesses.nvvm.compile_ir

    def compile_ir(code, **options):
        assert options.pop("fma") is False
        return original(code, **options)

    monkeypatch.setattr(cuda_accesses.nvvm, "compile_ir", compile_ir)


@needs_compiler
def test_contraction_is_refused(contracting, monkeypatch):
    with pytest.raises(RuntimeError, match="fuses"):
        cuda_kernels.compile_ptx(fastopt.adamw, "float32")
    monkeypatch.setattr(cuda_kernels, "check", lambda ptx, single: ptx)
    ptx = cuda_kernels.compile_ptx(fastopt.adamw, "float32")
    assert "fma.rn.f32" in flaws(ptx, "float32", 3)
    ptx = cuda_kernels.compile_ptx(fastopt.adamw, "float32", beside=ALL)
    assert "fma.rn.f32" in flaws(ptx, "float32", 4, zeroing=True)
    ptx = cuda_kernels.compile_sums_ptx(fastopt.lamb, "float32")
    assert "fma.rn.f64" in sums_flaws(ptx, "float32", 2)


@needs_compiler
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.gd])
def test_fusing_by_the_assembler_is_noticed(rule, disassemble):
    """It may, where an addition does not say how to round."""
    ptx = cuda_kernels.compile_ptx(rule, "float32")
    loose = re.sub(r"\b(add|sub|mul)\.rn\.", r"\1.", without_division(ptx))
    assert inexact(loose)
    assert fuses(disassemble(assemble(loose))[1])


@needs_compiler
def test_scalar_accesses_are_noticed():
    ptx = cuda_kernels.compile_ptx(fastopt.adamw, "float32", aligned=False)
    assert "0 times ld.global.v4.f32, not 4" in flaws(ptx, "float32", 3)


PI = 3.140625


DOUBLE_PI = np.float64(np.pi)


def with_double(p, g, lr):
    return (p - lr * g * DOUBLE_PI,)


def with_global(p, g, lr):
    return (p - lr * g * PI,)


@needs_compiler
def test_float64_in_a_float32_kernel_is_refused(monkeypatch):
    def scalars(t, lr=0.1):
        return (lr,)

    assert not flaws(
        cuda_kernels.compile_ptx(Rule(with_global, scalars), "float32"), "float32", 1
    )
    rule = Rule(with_double, scalars)
    with pytest.raises(TypeError, match="return its constants from scalars"):
        cuda_kernels.compile_ptx(rule, "float32")
    monkeypatch.setattr(cuda_kernels, "check", lambda ptx, single: ptx)
    assert "float64" in flaws(cuda_kernels.compile_ptx(rule, "float32"), "float32", 1)


@needs_compiler
def test_spills_are_noticed(disassemble):
    ptx = cuda_kernels.compile_ptx(EIGHT, "float64")
    tight = re.sub(r"^\)\n\{", ")\n.maxnreg 24\n{", ptx, count=1, flags=re.M)
    assert tight != ptx
    assert spills(*disassemble(assemble(tight)))


# The launch


class Launches(list):
    """When a test fails, pytest prints what it was given, and machine code asked how it
    is printed waits for a driver for ever."""

    def __repr__(self):
        return f"{len(self)} launches"


@pytest.fixture
def launches(monkeypatch):
    """What would go to the driver of an H100."""
    from numba.cuda import codegen, dispatcher

    found = Launches()
    library = codegen.CUDACodeLibrary
    monkeypatch.setattr(
        dispatcher,
        "get_current_device",
        lambda: SimpleNamespace(compute_capability=(9, 0)),
    )
    monkeypatch.setattr(library, "_ensure_cc", lambda self, cc: cc or (9, 0, "a"))
    monkeypatch.setattr(
        library, "get_cufunc", lambda self: SimpleNamespace(kernel=self.get_cubin())
    )
    monkeypatch.setattr(dispatcher._Kernel, "bind", lambda self: None)
    monkeypatch.setattr(dispatcher, "launch", lambda stream, *call: found.append(call))
    for cached in (cuda_driver.compiled, cuda_driver.launcher):
        cached.cache_clear()
    yield found
    for cached in (cuda_driver.compiled, cuda_driver.launcher):
        cached.cache_clear()


class OnDevice(SimpleNamespace):
    """An array of so many float32, or others, at an address."""

    def __init__(self, address: int, size: int, dtype="float32"):
        interface = {"data": (address, False)}
        super().__init__(
            size=size, dtype=np.dtype(dtype), __cuda_array_interface__=interface
        )


@needs_compiler
def test_launch(launches, disassemble):
    where_ = [4096, 8192, 12288]
    places = [
        [OnDevice(a, 4097) for a in where_],
        [OnDevice(a + 4, 4097) for a in where_],
        [OnDevice(a, 0) for a in where_],
        [OnDevice(a, 12) for a in where_],
    ]
    segments = [
        Segment(p, tuple(state), group)
        for (p, *state), group in zip(places, (0, 1, 1, 0), strict=True)
    ]
    count = np.zeros(1, np.int64)
    step = cuda_driver.bind(fastopt.adamw, segments, count, np.zeros((2, 2, 0)))
    grads = [OnDevice(16384, s.param.size) for s in segments[:3]] + [None]
    scalars = [(0.5, 0.1, 0.2, 0.3, 0.4, 0.6), (1.0, 0.6, 0.5, 0.4, 0.3, 0.2)]
    assert step.take(grads) and step(scalars, Request())
    assert count[0] == 1
    vectors, singles = launches
    for (config, _, *arguments), blocks, offset, values in (
        (vectors, -(-(1024 + 1) // 256), 0, scalars[0]),
        (singles, -(-4097 // 256), 4, scalars[1]),
    ):
        assert (config.grid, config.block) == ((blocks, 1, 1), (256, 1, 1))
        numbers = [getattr(argument, "value", argument) for argument in arguments]
        assert numbers[:5] == [4097, 16384, *(a + offset for a in where_)]
        assert numbers[5:] == list(map(float, np.float32(values)))
    usage, instructions = disassemble(vectors[1].code)
    assert wide_accesses(instructions) == [4, 3]
    assert not spills(usage, instructions)


@needs_compiler
def test_launch_where_streams_are_encoded(launches, disassemble):
    """At 8 bytes a vector of 16 bits begins, but none of float32."""

    def words(address: int) -> Encoded:
        return Encoded(BF16, (OnDevice(address, 4097, np.uint16),))

    where_ = [(4096 + 8, 8192), (4096 + 4, 8192), (4096 + 8, 8192 + 8)]
    state = [(OnDevice(m, 4097), OnDevice(1 << 20, 4097)) for _, m in where_]
    pairs = zip(where_, state, strict=True)
    segments = [Segment(words(p), buffers, 0) for (p, _), buffers in pairs]
    count = np.zeros(1, np.int64)
    step = cuda_driver.bind(fastopt.adamw, segments, count, np.zeros((1, 2, 0)))
    assert step.take([words(16384 + 8)] * 3)
    assert step([(0.5, 0.1, 0.2, 0.3, 0.4, 0.6)], Request())
    blocks = [config.grid[0] for config, *_ in launches]
    assert blocks == [-(-(1024 + 1) // 256), *[-(-4097 // 256)] * 2]
    assert launches[0][3:7] == (16384 + 8, 4096 + 8, 8192, 1 << 20)
    found = [disassemble(launch[1].code)[1] for launch in launches]
    assert [wide_accesses(each, 64) for each in found] == [[2, 1], [0, 0], [0, 0]]
    assert [wide_accesses(each) for each in found] == [[2, 2], [0, 0], [0, 0]]


@needs_compiler
def test_launch_where_groups_share_scales(launches, disassemble):
    """Four elements for each thread; all parts; and what is drawn."""
    size, groups = 4097, 65
    m = OnDevice(4096, size, np.uint8), OnDevice(1 << 16, groups), OnDevice(64, 1, "i8")
    v = OnDevice(8192, size, np.uint8), OnDevice(1 << 17, groups), OnDevice(72, 1, "i8")
    state = Encoded(M8, m), Encoded(V8, v)
    segment = Segment(OnDevice(1 << 20, size), state, 1, first=7)
    count = np.zeros(1, np.int64)
    step = cuda_driver.bind(fastopt.adamw, [segment], count, np.zeros((2, 2, 0)))
    assert step.take([OnDevice(1 << 21, size)])
    (call,) = step.calls([(0.5, *[0.25] * 5)] * 2, Request(), [5, 9])
    assert call()
    ((config, kernel, *arguments),) = launches
    assert config.grid == (-(-size // (4 * 256)), 1, 1)
    numbers = [getattr(argument, "value", argument) for argument in arguments]
    assert numbers[:3] == [size, 1 << 21, 1 << 20]
    assert numbers[3:9] == [4096, 1 << 16, 64, 8192, 1 << 17, 72]
    assert numbers[9:] == [0.5, *[0.25] * 5, 7, 9]
    usage, instructions = disassemble(kernel.code)
    assert wide_accesses(instructions) == [2, 1]
    assert not spills(usage, instructions)


class Room(OnDevice):
    """What is allocated, and what is read from it."""

    def __getitem__(self, places):
        address, _ = self.__cuda_array_interface__["data"]
        return OnDevice(address + 8 * places.start, self.size - places.start)

    def copy_to_host(self):
        return np.arange(float(self.size))


@needs_compiler
def test_launches_for_sums(launches, monkeypatch):
    """Without a warning, and with one kernel for the lanes, whatever their number."""
    made = []

    def allocated(size, dtype):
        made.append((size, dtype))
        return Room(1 << 40 + len(made), size)

    monkeypatch.setattr(cuda_kernels.cuda, "device_array", allocated)
    sizes = (4097, 0, 33, 5)
    segments = [
        Segment(OnDevice(4096 + i, n), (OnDevice(4096, n), OnDevice(8192, n)), i % 2)
        for i, n in enumerate(sizes)
    ]
    count, carry = np.zeros(1, np.int64), np.zeros((2, 2, 0))
    rows = [(0.5, *[0.25] * fastopt.lamb.measure_count, 9.0), (1.0, *[2.0] * 9)]
    step = cuda_driver.bind(fastopt.lamb, segments, count, carry)
    step.take([*(OnDevice(16384, n) for n in sizes[:3]), None])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = step.sums("rule", rows, Request(limits=limits(0.75)))
    assert not warned
    # Two chunks and one, each with two terms, which are numbered here.
    assert found == [(0.0 + 2.0, 1.0 + 3.0), (0.0, 0.0), (4.0, 5.0), None]
    assert made == [(3 * 2 * 32, np.float64), (3 * 2, np.float64)]
    (first, _, *given), (second, _, *rest), (last, lanes_kernel, *of_lanes) = launches
    values = [
        [getattr(x, "value", x) for x in each] for each in (given, rest, of_lanes)
    ]
    constants = [0.5, *[0.25] * fastopt.lamb.measure_count, -0.75, 0.75]
    assert values[0] == [4097, 16384, 4096, 4096, 8192, *constants, 1 << 41]
    assert values[1][:3] == [33, 16384, 4098]
    assert values[1][-1] == (1 << 41) + 8 * 2 * 2 * 32
    assert values[2] == [6, 1 << 41, 1 << 42]
    assert [each.grid for each in (first, second, last)] == [(1, 1, 1)] * 3
    many = [Segment(OnDevice(4096, 4096 * 1000), (), 0)]
    step = cuda_driver.bind(fastopt.gd, many, count, carry)
    step.take([OnDevice(1 << 30, 4096 * 1000)])
    step.sums("gradients", [(1.0,)], Request())
    *_, (config, again, *_) = launches
    assert config.grid == (-(-1000 // 256), 1, 1)
    once = again is lanes_kernel  # pytest would take minutes to print machine code
    assert once


@needs_compiler
@pytest.mark.parametrize("dtype", WIDTH)
def test_linking_does_not_fuse(launches, disassemble, dtype):
    """Nor does numba's own way from PTX to machine code."""
    update = fastopt.gd.update
    of = update, 0, np.dtype(dtype), WIDTH[dtype], cuda_kernels.NOTHING
    kernel = cuda_driver.compiled(cuda_kernels.kernel, *of)
    (overload,) = kernel.overloads.values()
    _, instructions = disassemble(overload.library.get_cubin().code)
    assert re.search(r"\b[DF]MUL\b", instructions)
    assert not fuses(instructions)


@needs_compiler
def test_contraction_is_refused_before_a_launch(launches, contracting):
    segment = Segment(OnDevice(4096, 8), (), 0)
    count = np.zeros(1, np.int64)
    step = cuda_driver.bind(fastopt.gd, [segment], count, np.zeros((2, 1, 0)))
    step.take([OnDevice(8192, 8)])
    with pytest.raises(RuntimeError, match="fuses"):
        step([(1.0, 0.1)])
    assert not launches and count[0] == 0


def test_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cuda_driver, "not_installed", "No module named 'numba_cuda'")
    assert "pip install '.[cuda13]'" in cuda_driver.missing()


def test_missing_without_numba_cuda():
    """In a process that cannot import it, the module can still be asked."""
    code = (
        "import sys; sys.modules['numba_cuda'] = None; "
        "from fastopt.backends import cuda_driver; print(cuda_driver.missing())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "pip install '.[cuda13]'" in said.stdout


def test_the_gpu_benchmark_runs(tmp_path):
    """In the simulator, where its times mean nothing: on a GPU it must work at once."""
    pytest.importorskip("numba_cuda")
    record = tmp_path / "gpu.json"
    command = [PROJECT / "bench" / "gpu.py", "--json", record]
    command += ["--sizes", "70", "--bursts", "1", "--steps", "1"]
    subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        check=True,
        capture_output=True,
    )
    results = json.loads(record.read_text())["results"]
    assert set(results) == {"adamw", "adamw, bfloat16", "sgd (momentum)", "lion"}
    for kind in results.values():
        assert {"fastopt", "floor", "device copy"} <= set(kind["70"])
