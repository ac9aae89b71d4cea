"""What the machine code of CUDA kernels must be like, and what it is: without a GPU."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import closure_rule

import fastopt
from fastopt import RULES, Rule
from fastopt.backends import cuda_accesses, cuda_driver, cuda_jobs, cuda_kernels
from fastopt.rule import cbrt, copysign, maximum, minimum, sign, sqrt, where

EVERYTHING = [rule for public in RULES for rule in public.all]
WIDTH = {"float32": 4, "float64": 2}
# The compute capabilities of an A100, of an H100 and of a B200.
GPUS = (8, 0), (9, 0), (10, 0)
HOPPER = 9, 0
# Rules whose code is checked on every GPU.
FEW = [fastopt.adamw, fastopt.amsgrad, fastopt.lamb, fastopt.prodigy, fastopt.sgd]

needs_compiler = pytest.mark.skipif(
    bool(cuda_accesses.not_installed)
    or cuda_kernels.SIMULATED
    or not cuda_accesses.nvvm.is_available(),
    reason=f"the CUDA compiler is not installed: {cuda_driver.HOW_TO_GET}",
)
each_dtype = pytest.mark.parametrize("dtype", WIDTH)
each_gpu = pytest.mark.parametrize("cc", GPUS, ids=lambda cc: "sm_{}{}".format(*cc))


def on_machines(rules):
    """Each rule on an H100 in both dtypes; a few of them on other GPUs, whose code
    differs in nothing that depends on the rule."""
    cases = [(rule, dtype, HOPPER) for rule in rules for dtype in WIDTH]
    others = [cc for cc in GPUS if cc != HOPPER]
    few = [rule for rule in rules if rule in FEW] or rules[:1]
    cases += [(rule, "float32", cc) for rule in few for cc in others]
    return pytest.mark.parametrize(
        ("rule", "dtype", "cc"),
        cases,
        ids=["{}-{}-sm_{}{}".format(r.name, d, *cc) for r, d, cc in cases],
    )


# Rules besides fastopt's own


def threshold(x: Any, cut: Any) -> Any:
    return sign(x) * maximum(abs(x) - cut, cut - cut)


def users_update(
    p: Any, g: Any, m: Any, v: Any, lr: Any, beta: Any, cut: Any
) -> tuple[Any, ...]:
    m = where((g > cut) | (g < -cut), beta * m, copysign(m, g))
    v = minimum(maximum(v, g * g), cut)
    return p - lr * threshold(m, cut) / (sqrt(v) + cut), m, v


def users_scalars(
    t: int, lr: float = 0.1, beta: float = 0.9, cut: float = 0.3
) -> tuple[float, ...]:
    return lr, beta, cut


CLOSURE = closure_rule()
USERS = Rule(users_update, users_scalars, state=("m", "v"))


def eight_states(  # type: ignore[no-untyped-def]
    p, g, a, b, c, d, e, f, h, k, lr
):
    return p - lr * (g + a * b + c * d + e * f + h * k), k, h, f, e, d, c, b, a


EIGHT = Rule(eight_states, lambda t, lr=0.1: (lr,), state=tuple("abcdefhk"))


def only_root(p: Any, g: Any, lr: Any) -> tuple[Any]:
    return (p - lr * g * cbrt(abs(g)),)


ROOT = Rule(only_root, lambda t, lr=0.1: (lr,))  # of fastopt's own operations


# What is wanted

# What a thread loads and stores of a stream at once, by its format: a vector of each
# part. A scale is a number of its own, and the counts of groups are never loaded.
VECTORS = {
    "float32": ("v4.f32",),
    "float64": ("v2.f64",),
    "bf16": ("v4.u16",),
    "bf16_sr": ("v4.u16",),
    "fp16": ("v4.u16",),
    "r8": ("v4.u16", "v4.u8"),
    "r16": ("v4.u16", "v4.u16"),
    "m8": ("v4.u8",),
    "v8": ("v4.u8",),
}
BITS = {"v4.f32": 128, "v2.f64": 128, "v4.u16": 64, "v4.u8": 32}
# The places of a stream's parts in the table: the number of parts, where it is not one.
PLACES = {"r8": 2, "r16": 2, "m8": 3, "v8": 3}
SCALED = "m8", "v8"
STOCHASTIC = "bf16_sr", "r8", "m8", "v8"
# The table's entries that every kernel reads: the segment of the block, its size, its
# row, its first block, and the address of its gradient.
ENTRIES = 5


class Wanted(NamedTuple):
    """How often the code for some segments loads and stores what: vectors by their
    kind, and single numbers at least and at most."""

    vectors: Counter[str]
    least: Counter[str]
    most: Counter[str]


def names_of(formats: Sequence[Any], dtype: str) -> list[str]:
    return [dtype if format is None else format.name for format in formats]


def vectors_of(formats: Sequence[Any], dtype: str, operation: str) -> Counter[str]:
    """Return the vectors that are moved of streams."""
    names = names_of(formats, dtype)
    vectors = [vector for name in names for vector in VECTORS[name]]
    return Counter(f"{operation}.global.{vector}" for vector in vectors)


def singles_of(
    formats: Sequence[Any], dtype: str, operation: str, turns: int
) -> Counter[str]:
    """Return what is moved of streams one by one, in so many turns, and the scales."""
    found: Counter[str] = Counter()
    for vector, times in vectors_of(formats, dtype, operation).items():
        found[re.sub(r"v\d\.", "", vector)] += turns * times
    scaled = sum(name in SCALED for name in names_of(formats, dtype))
    found[f"{operation}.global.f32"] += scaled
    return found


def wanted_of(job: cuda_jobs.Update) -> Wanted:
    """Return what the kernel of a job loads and stores: whole vectors of all streams,
    and in another place the elements of those that have none.

    That place is a loop that may have been unrolled, and written twice where the rule
    asks something of a scalar. Besides these, the kernel loads a row of scalars and
    entries of the table."""
    dtype, beside = job.dtype.name, job.beside
    number, width = f"f{dtype[-2:]}", WIDTH[dtype]
    vectors: Counter[str] = Counter()
    least = Counter({f"ld.global.{number}": job.row, "ld.global.u64": ENTRIES})
    if len(job.kinds) > 1:
        least["ld.global.u64"] += 1
    if any(name in STOCHASTIC for of in job.kinds for name in names_of(of[1:], dtype)):
        least["ld.global.u64"] += 2  # the index of the first element, and the step
    most = least.copy()
    for formats in job.kinds:
        grad, param, average = formats[:1], formats[1:2], formats[-1:]
        vectors += vectors_of(formats, dtype, "ld")
        vectors += vectors_of(formats[not beside.zero :], dtype, "st")
        grouped = any(name in SCALED for name in names_of(formats[1:], dtype))
        places = [PLACES.get(name, 1) for name in names_of(formats[1:], dtype)]
        entries = 1 + sum(places)  # whether the segment is aligned
        if beside.average:  # which moves without a gradient, too
            entries += places[0] + 1
        for found, turns in ((least, 1), (most, 2 * width)):
            found["ld.global.u64"] += entries
            found += singles_of(formats, dtype, "ld", width if grouped else turns)
            found += singles_of(formats[1:], dtype, "st", width if grouped else turns)
            if beside.zero:
                found += singles_of(grad, dtype, "st", width if grouped else turns)
            if beside.average:
                found += singles_of(param + average, dtype, "ld", turns)
                found += singles_of(average, dtype, "st", turns)
    return Wanted(vectors, least, most)


# What there is


def instructions_of(ptx: str) -> Counter[str]:
    return Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]+[\w.]*)", ptx, re.M))


def inexact(ptx: str) -> list[str]:
    """Return the instructions in PTX with which bits would differ, or time be lost."""
    wrong = []
    for instruction in instructions_of(ptx):
        head, *tail = instruction.split(".")
        real = tail[-1:] and tail[-1].startswith("f")
        unrounded = real and head in ("div", "rcp", "sqrt") and "rn" not in tail
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


def flaws(ptx: str, job: cuda_jobs.Update) -> list[str]:
    """Return what in the PTX of an update's kernel is not as wanted."""
    found, wanted = instructions_of(ptx), wanted_of(job)
    for operation in ("ld", "st"):  # from sm_100 on, four bytes are a whole number
        bytes_, whole = f"{operation}.global.v4.u8", f"{operation}.global.u32"
        if not found[bytes_] and wanted.vectors[bytes_] <= found[whole]:
            found[bytes_] = wanted.vectors[bytes_]
            found[whole] -= wanted.vectors[bytes_]
    for bits in ("32", "64"):  # a number may be stored as a whole one, such as 0
        found[f"st.global.f{bits}"] += found.pop(f"st.global.u{bits}", 0)
    found = +found
    wrong = []
    for instruction in wanted.vectors | wanted.most:
        exactly = wanted.vectors[instruction]
        least = exactly + wanted.least[instruction]
        most, count = exactly + wanted.most[instruction], found[instruction]
        if not least <= count <= most:
            times = f"{least} to {most}" if most > least else f"{most}"
            wrong.append(f"{count} times {instruction}, not {times}")
    for instruction in found:
        head, *tail = instruction.split(".")
        others = head in ("ld", "st") and "param" not in tail
        if others and instruction not in wanted.vectors | wanted.most:
            wrong.append(f"{found[instruction]} times {instruction}")
    if job.dtype == np.float32 and ".f64" in ptx:
        wrong.append("float64")
    return wrong + inexact(ptx)


def without_comparisons(flaws: list[str]) -> list[str]:
    """Return flaws other than minima and maxima, which codecs with scales write as
    comparisons of numbers that are not NaN: groups that are not finite are not
    stored."""
    return [flaw for flaw in flaws if not flaw.endswith("which drops NaN")]


def sums_flaws(ptx: str, dtype: str, terms: int, words: bool = False) -> list[str]:
    """Return what is not as wanted in a kernel for sums: its totals are of float64, its
    terms are not, but for products of what is made wide."""
    found = instructions_of(ptx)
    wrong = []
    if found["st.global.f64"] != terms:
        wrong.append(f"{found['st.global.f64']} stores, not {terms}")
    for instruction in found:
        of_arrays = instruction.startswith("ld.") and ".param" not in instruction
        kinds = [f"ld.global.f{dtype[-2:]}", "ld.global.u64"]  # entries of the table
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
    """Return the PTX with a product for each quotient and a magnitude for each root and
    each reciprocal: on a GPU, these are made of fused operations themselves, which are
    to stay."""
    ptx = re.sub(r"\bdiv\.rn\.", "mul.rn.", ptx)
    return re.sub(r"\b(?:rcp|sqrt)\.rn\.", "abs.", ptx)


class Code(NamedTuple):
    """Machine code."""

    usage: str
    instructions: str

    @property
    def spills(self) -> bool:
        """Whether there is anything in local memory."""
        sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", self.usage)
        assert sizes, self.usage
        moves = re.search(r"\b(?:LDL|STL)\b", self.instructions)
        return any(map(int, sizes)) or bool(moves)

    @property
    def registers(self) -> int:
        return max(map(int, re.findall(r"REG:(\d+)", self.usage)))

    @property
    def fuses(self) -> bool:
        return bool(re.search(r"\b[DFH]FMA\b", self.instructions))

    def accesses(self, bits: int = 128) -> list[int]:
        """Return how many loads and stores of so many bits there are."""
        kinds = (rf"\b{op}\.E\.{bits}\b" for op in ("LDG", "STG"))
        return [len(re.findall(kind, self.instructions)) for kind in kinds]


@functools.cache
def tool() -> str:
    """Return the path of what disassembles machine code, of the pip wheel."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="no cuda-pathfinder")
    # The first calls the second, which it finds beside itself.
    find = pathfinder.find_nvidia_binary_utility
    found, disassembler = find("cuobjdump"), find("nvdisasm")
    if found is None or disassembler is None:
        pytest.skip("no cuobjdump and nvdisasm: pip install '.[cuda-test]'")
    return str(found)


def disassembled(cubin: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        texts = [
            subprocess.run(
                [tool(), what, path], check=True, capture_output=True, text=True
            ).stdout
            for what in ("-res-usage", "-sass")
        ]
    return Code(*texts)


def assembled(ptx: str, cc: tuple[int, int] = HOPPER) -> Code:
    """Return what becomes of PTX."""
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    options = core.ProgramOptions(arch="sm_{}{}".format(*cc))
    return disassembled(core.Program(ptx, "ptx", options).compile("cubin").code)


def code_flaws(code: Code, job: cuda_jobs.Update) -> list[str]:
    """Return what in the machine code of an update's kernel is not as wanted."""
    vectors = wanted_of(job).vectors
    wanted = [
        sum(
            times
            for instruction, times in vectors.items()
            if instruction.startswith(operation)
            and BITS[instruction.split(".global.")[1]] == 128
        )
        for operation in ("ld", "st")
    ]
    wrong = []
    if code.accesses() != wanted:
        wrong.append(f"{code.accesses()} accesses of 128 bits, not {wanted}")
    if code.spills:
        wrong.append("spills")
    return wrong


@pytest.fixture
def contracting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler be as if it did not know the option against contraction."""
    original = cuda_accesses.nvvm.compile_ir

    def compile_ir(code: Any, **options: Any) -> Any:
        assert options.pop("fma") is False
        return original(code, **options)

    monkeypatch.setattr(cuda_accesses.nvvm, "compile_ir", compile_ir)
