"""What the compiler made of the kernels and their driver, read from their disassembly:
the baseline really is baseline, every kernel is vectorised, and nothing is contracted.
"""

import platform
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastopt.backends import cython_cpu
from fastopt.memory.formats import FORMATS

X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64") and sys.platform == "linux"
# Under an emulator, only the second is found, or the first cannot read what runs there.
OBJDUMP = (ARM and shutil.which("aarch64-linux-gnu-objdump")) or shutil.which("objdump")
of_x86 = pytest.mark.skipif(not X86, reason="it is about the instructions of x86")
of_arm = pytest.mark.skipif(not ARM, reason="it is about those of ARM, on Linux")
pytestmark = [
    pytest.mark.skipif(OBJDUMP is None, reason="objdump (binutils) is not installed"),
    pytest.mark.skipif(
        cython_cpu.missing() is not None, reason=f"cython: {cython_cpu.missing()}"
    ),
]
WIDTH = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}


def disassembly(path):
    """The instructions of each function of a binary, as (mnemonic, operands)."""
    text = subprocess.run(
        [OBJDUMP, "-d", "--no-show-raw-insn", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions, current = {}, []
    for line in text.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = functions.setdefault(start[1], [])
        elif instruction := re.match(r"\s+[0-9a-f]+:\t(\S+)\s*(.*)", line):
            current.append(instruction.groups())
    return functions


@pytest.fixture(scope="module")
def built():
    """The disassembly of every extension that was built, this CPU's or not, by its
    instruction set; and of the driver."""
    found = {"driver": disassembly(find_spec("fastopt._driver").origin)}
    for isa in WIDTH:
        try:
            found[isa] = disassembly(find_spec(f"fastopt._kernels_{isa}").origin)
        except AttributeError:  # None: not built
            pass
    return found


@pytest.fixture(scope="module")
def by_gcc():
    """Clang makes shorter vectors of a few kernels: whose sums are of float64, and
    which decode or encode 8 bits. It vectorises the others as fully."""
    driver = Path(find_spec("fastopt._driver").origin)
    if b"clang version" in driver.read_bytes():
        pytest.skip("Clang compiled the kernels: these are the widths of GCC's vectors")


def beyond_sse2(functions):
    """Instructions that a CPU with nothing above SSE2 would not know."""
    newer = re.compile(
        r"v[a-z]|pshufb|ptest|round[ps]|blend|pmull[dw]d|insertps|extractps|h(add|sub)p"
        r"|(mov|pmov)[sz]x[bwd]|popcnt|[lt]zcnt|crc32"
    )
    return {
        (name, mnemonic)
        for name, instructions in functions.items()
        for mnemonic, operands in instructions
        if re.search("[yz]mm", operands)
        or (newer.match(mnemonic) and mnemonic not in ("verr", "verw"))
    }


def contracted(functions):
    """Functions with fused multiply-adds, which round once where the rule says twice,
    beside the five that a root takes (csrc/roots.h)."""
    fused = re.compile(r"vf(n?m(add|sub)|maddsub|msubadd)")
    return {
        name
        for name, instructions in functions.items()
        if sum(bool(fused.match(mnemonic)) for mnemonic, _ in instructions)
        != 5 * sum(mnemonic == "vrsqrt14ps" for mnemonic, _ in instructions)
    }


ROOTS = {"adamw_update", "adam_update", "rmsprop_update", "adagrad_update"}


@of_x86
def test_roots_are_taken_by_multiplication_with_avx512(built):
    for isa, functions in built.items():
        taking = {
            name
            for name, instructions in functions.items()
            if any(mnemonic == "vrsqrt14ps" for mnemonic, _ in instructions)
        }
        assert bool(taking) == (isa == "avx512"), isa
        for rule in ROOTS if taking else ():
            assert any(re.search(f"_{rule}_f32_(kernel|loop)", name) for name in taking)


@of_x86
def test_x86_builds_all_three(built):
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert set(built) == {*WIDTH, "driver"}


@of_x86
@pytest.mark.parametrize("name", ["baseline", "driver"])
def test_baseline_needs_nothing_above_sse2(built, name):
    assert not beyond_sse2(built[name])


@of_x86
def test_nothing_is_contracted(built):
    for isa, functions in built.items():
        assert not contracted(functions), isa


@of_x86
def test_only_the_avx512_extension_uses_its_registers(built):
    for isa in ("baseline", "avx2"):
        for name, instructions in built.get(isa, {}).items():
            assert not any("zmm" in operands for _, operands in instructions), name


# Of rules whose update is in two passes.
HALVES = [
    f"{rule}_{half}"
    for rule in ("lamb", "adafactor")
    for half in ("update_begin", "apply")
]


@of_x86
@pytest.mark.parametrize("isa", WIDTH)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kernel", [*sorted(cython_cpu.KERNELS.values()), *HALVES])
def test_every_kernel_is_vectorised_at_full_width(built, by_gcc, kernel, dtype, isa):
    if isa not in built:
        pytest.skip(f"no {isa} extension was built here")
    suffix = "ps" if dtype == "f32" else "pd"
    # A kernel, and its loop where the compiler has left it a function of its own, maybe
    # with fewer arguments (.isra.0).
    name = re.compile(rf".*_kernels_{isa}_{kernel}_{dtype}_(kernel|loop)(\..*)?")
    bodies = [body for found, body in built[isa].items() if name.fullmatch(found)]
    instructions = [instruction for body in bodies for instruction in body]
    used = {mnemonic.lstrip("v") for mnemonic, _ in instructions}
    packed = {
        mnemonic.lstrip("v") for mnemonic, place in instructions if WIDTH[isa] in place
    }
    # What stands in the scalar tail stands in the vector body too.
    scalar = {m for m in used if m[:-2] in ("add", "sub", "mul", "div", "sqrt")}
    assert scalar and {m[:-2] + suffix for m in scalar} <= packed


CODECS = [f"{way}_{name}" for way in ("load", "store") for name in FORMATS]
STATES = {"adamw_update": 2, "adam_update": 2, "sgd_heavy_ball": 1, "lion_update": 1}
FUSED = [
    "_".join([rule, param, "bf16", *[state] * count])
    for rule, count in STATES.items()
    for param in ("bf16", "fp32")
    for state in ("bf16_sr", "fp32")
]


@of_x86
@pytest.mark.parametrize("isa", WIDTH)
@pytest.mark.parametrize("function", [*CODECS, *FUSED])
def test_what_decodes_and_encodes_is_vectorised_at_full_width(
    built, by_gcc, function, isa
):
    if isa not in built:
        pytest.skip(f"no {isa} extension was built here")
    inlined = function.replace("load_", "decode_(group_)?")
    inlined = inlined.replace("store_", "encode_(group_)?")
    name = re.compile(
        rf".*_kernels_{isa}_({function}|{inlined})(_kernel|_loop|)(\..*)?"
    )
    bodies = [body for found, body in built[isa].items() if name.fullmatch(found)]
    instructions = [instruction for body in bodies for instruction in body]
    # Shifts and masks of words are what decoding and encoding consist of; codes of 8
    # bits are decoded without shifts.
    packed = [m for m, operands in instructions if WIDTH[isa] in operands]
    assert any(re.match(r"v?p(s[lr]ld|x?ord?|ternlogd)", name) for name in packed)


@of_x86
def test_nothing_takes_much_of_a_stack(built):
    """Threads may have stacks of 64 KiB, of which Python and OpenMP take their part."""
    for isa, functions in built.items():
        for name, instructions in functions.items():
            for mnemonic, operands in instructions:
                taken = re.fullmatch(r"\$0x([0-9a-f]+),%rsp", operands)
                if mnemonic == "sub" and taken:
                    room = int(taken[1], 16)  # or, above 2**63, it is given back
                    assert room <= 8192 or room >> 63, (isa, name)


@of_x86
def test_the_readers_would_notice(tmp_path):
    """A loop compiled for AVX2 with contraction on is caught by both."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    source, binary = tmp_path / "loop.c", tmp_path / "loop.o"
    source.write_text(
        "void f(float *restrict p, const float *restrict g, float lr, long n)"
        "{ for (long i = 0; i < n; i++) p[i] = p[i] - lr * g[i]; }"
    )
    flags = ["-O3", "-mavx2", "-mfma", "-ffp-contract=fast", "-c"]
    done = subprocess.run([compiler, *flags, source, "-o", binary], capture_output=True)
    if done.returncode:
        pytest.skip("the compiler does not make x86 code")
    functions = disassembly(binary)
    assert beyond_sse2(functions) and contracted(functions)


# ARM's baseline has vectors of 128 bits, and fused multiply-adds.
FUSED_ON_ARM = re.compile(r"f(n?m(add|sub)|ml[as]l?2?)")
NUMBERS_ON_ARM = {"f32": ".4s", "f64": ".2d"}


@of_arm
def test_nothing_is_contracted_on_arm(built):
    assert set(built) == {"baseline", "driver"}
    for functions in built.values():
        for name, instructions in functions.items():
            assert not [m for m, _ in instructions if FUSED_ON_ARM.fullmatch(m)], name


@of_arm
@pytest.mark.parametrize("dtype", NUMBERS_ON_ARM)
@pytest.mark.parametrize("kernel", [*sorted(cython_cpu.KERNELS.values()), *HALVES])
def test_every_kernel_is_vectorised_on_arm(built, by_gcc, kernel, dtype):
    name = re.compile(rf".*_kernels_baseline_{kernel}_{dtype}_(kernel|loop)(\..*)?")
    used, packed = set(), set()
    for found, instructions in built["baseline"].items():
        for mnemonic, operands in instructions if name.fullmatch(found) else ():
            if mnemonic in ("fadd", "fsub", "fmul", "fdiv", "fsqrt"):
                used.add(mnemonic)
                if NUMBERS_ON_ARM[dtype] in operands.split(",")[0]:
                    packed.add(mnemonic)
    assert used and used == packed


@of_arm
@pytest.mark.parametrize("function", [*CODECS, *FUSED])
def test_what_decodes_and_encodes_is_vectorised_on_arm(built, by_gcc, function):
    inlined = function.replace("load_", "decode_(group_)?")
    inlined = inlined.replace("store_", "encode_(group_)?")
    name = re.compile(
        rf".*_kernels_baseline_({function}|{inlined})(_kernel|_loop|)(\..*)?"
    )
    packed = {
        mnemonic
        for found, instructions in built["baseline"].items()
        for mnemonic, operands in (instructions if name.fullmatch(found) else ())
        if re.match(r"v\d+\.(4s|8h|16b)", operands)
    }
    assert packed & {"shl", "ushr", "ushll", "sli", "sri", "and", "orr", "eor", "bsl"}


@of_arm
def test_the_reader_for_arm_would_notice(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-gcc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    source, binary = tmp_path / "loop.c", tmp_path / "loop.o"
    source.write_text("double f(double a, double b, double c) { return a * b + c; }")
    flags = ["-O3", "-ffp-contract=fast", "-c"]
    subprocess.run([compiler, *flags, source, "-o", binary], check=True)
    assert any(FUSED_ON_ARM.fullmatch(m) for m, _ in disassembly(binary)["f"])
