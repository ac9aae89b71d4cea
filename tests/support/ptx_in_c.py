"""Kernels in PTX as C, to run what is compiled for a GPU where there is none.

The kernel becomes a function of one thread. Registers become variables, memory of all
kinds becomes the process's, and every instruction becomes a statement, with the meaning
that NVIDIA's description of PTX gives it. An instruction that is not known here raises
SyntaxError. What remains unseen is how PTX is assembled.
"""

from __future__ import annotations

import ctypes
import re
import subprocess

PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
static uint64_t bits(double x) { uint64_t w; memcpy(&w, &x, 8); return w; }
static double real(uint64_t w) { double x; memcpy(&x, &w, 8); return x; }
static uint64_t shl64(uint64_t a, uint32_t n) { return n > 63 ? 0 : a << n; }
static uint32_t shl32(uint32_t a, uint32_t n) { return n > 31 ? 0 : a << n; }
static uint64_t shr64(uint64_t a, uint32_t n) { return n > 63 ? 0 : a >> n; }
static uint32_t shr32(uint32_t a, uint32_t n) { return n > 31 ? 0 : a >> n; }
static uint64_t sar64(int64_t a, uint32_t n) { return a >> (n > 63 ? 63 : n); }
static uint64_t high(uint64_t a, uint64_t b) { return (unsigned __int128)a * b >> 64; }
static uint64_t bfi64(uint64_t a, uint64_t b, uint32_t from, uint32_t count) {
  uint64_t mask = (count > 63 ? ~0ull : (1ull << count) - 1) << from;
  return (b & ~mask) | (a << from & mask);
}
#define UNORDERED(x, y) ((x) != (x) || (y) != (y))
"""
FLAGS = "-O0 -w -fwrapv -fno-strict-aliasing -ffp-contract=off -shared -fPIC".split()
# The C types of PTX's. What is not signed there is cast where the sign matters.
TYPES = {f"{kind}{n}": f"uint{n}_t" for kind in "bu" for n in (8, 16, 32, 64)}
TYPES |= {f"s{n}": f"int{n}_t" for n in (8, 16, 32, 64)}
TYPES |= {"f64": "double", "pred": "int"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
# Instructions by how they begin: C, of the operands a, b, c, and d, of their type T,
# and of the unsigned type U of that width.
INTEGERS = {
    "add": "(U)a + (U)b",
    "sub": "(U)a - (U)b",
    "mul.lo": "(U)a * (U)b",
    "mul.hi.u64": "high(a, b)",
    "mad.lo": "(U)a * (U)b + (U)c",
    "div.u": "(T)a / (T)b",
    "rem.u": "(T)a % (T)b",
    "shl.b64": "shl64(a, b)",
    "shl.b32": "shl32(a, b)",
    "shr.u64": "shr64(a, b)",
    "shr.u32": "shr32(a, b)",
    "shr.s64": "sar64(a, b)",
    "and": "a & b",
    "or": "a | b",
    "xor": "a ^ b",
    "not.pred": "!a",
    "not.b": "~a",
    "neg": "-(U)a",
    "abs.s": "(T)a < 0 ? -(U)a : (U)a",
    "min": "(T)a < (T)b ? (T)a : (T)b",
    "max": "(T)a > (T)b ? (T)a : (T)b",
    "selp": "c ? a : b",
    "bfi.b64": "bfi64(a, b, c, d)",
    "cvta": "a",
    "mov": "a",
}
REALS = {
    "add.rn": "a + b",
    "sub.rn": "a - b",
    "mul.rn": "a * b",
    "div.rn": "a / b",
    "rcp.rn": "1.0 / a",
    "sqrt.rn": "sqrt(a)",
    "abs": "fabs(a)",
    "neg": "-a",
    "max": "fmax(a, b)",
    "min": "fmin(a, b)",
    "selp": "c ? a : b",
    "copysign": "copysign(b, a)",  # of the first, onto the second
    "mov": "a",
}


def loaded(ptx: str, folder) -> ctypes._CFuncPtr:
    """Compile a kernel by way of C. Return the function, whose arguments are
    addresses."""
    name, text = c_of(ptx)
    source, library = folder / "kernel.c", folder / "kernel.so"
    source.write_text(text)
    command = ["gcc", *FLAGS, "-o", library, source, "-lm"]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(library)[name]
    function.restype = None
    return function


def c_of(ptx: str) -> tuple[str, str]:
    """Return the name of the kernel in PTX, and C."""
    ptx = re.sub(r"//.*", "", ptx)
    table = r"\.global \.align \d+ \.b8 ([\w$]+)\[(\d+)\] = \{([^}]*)\};"
    tables = [
        f"static uint8_t {plain(name)}[{size}] __attribute__((aligned(8))) = {{{of}}};"
        for name, size, of in re.findall(table, ptx)
    ]
    head = r"\.(func|entry)\s*(?:\([^)]*\))?\s*([\w$]+)\s*\(([^)]*)\)\s*\{"
    kernel, declared, bodies = "", [], []
    for match in re.finditer(head, ptx):
        kind, name, parameters = match.groups()
        end, depth = match.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(ptx[end], 0)
            end += 1
        taken = [p.split()[1:] for p in parameters.split(",") if p.strip()]
        given = ", ".join(f"{TYPES[of[1:]]} {plain(what)}" for of, what in taken)
        result = "void" if kind == "entry" else "static uint32_t"
        kernel = plain(name) if kind == "entry" else kernel
        declared.append(f"{result} {plain(name)}({given})")
        back = "return" if kind == "entry" else "return func_retval0"
        bodies.append(body(ptx[match.end() : end - 1]).replace("BACK", back))
    functions = [f"{d} {{\n{b}\n}}" for d, b in zip(declared, bodies, strict=True)]
    heads = [f"{d};" for d in declared]
    return kernel, "\n".join([PRELUDE, *tables, *heads, *functions])


def plain(name: str) -> str:
    return name.replace("$", "_D_")


def body(text: str) -> str:
    """Return the statements of a function."""
    lines = ["uint32_t func_retval0 = 0;"]
    registers = r"\.reg \.(\w+)\s+%?(\w+)(?:<(\d+)>)?;"
    for of, name, count in dict.fromkeys(re.findall(registers, text)):
        names = [f"{name}{k}" for k in range(int(count))] if count else [name]
        lines += [f"{TYPES[of]} {each} = 0;" for each in names]
    local = r"\.local \.align \d+ \.b8\s+(\w+)\[(\d+)\];"
    for name, size in re.findall(local, text):
        lines.append(f"uint8_t {name}[{size}] __attribute__((aligned(16)));")
        lines.append(f"memset({name}, 0xAB, {size});")  # its content is not known
    text = re.sub(registers, "", re.sub(local, "", text))
    text = re.sub(r"([\w$]+):\s", r"label \1; ", text)
    # The braces around a call; a vector's are within an instruction.
    text = re.sub(r"^\s*([{}])\s*$", r"\1;", text, flags=re.M)
    for instruction in text.split(";"):
        lines.append(statement(" ".join(instruction.split())))
    return "\n".join(lines)


def value(operand: str) -> str:
    """Return a register, a constant or an address."""
    if operand[0] == "%":
        return operand[1:]
    if operand[:2] in ("0d", "0D"):
        return f"real(0x{operand[2:]}ull)"
    if re.fullmatch(r"-?\d+", operand):
        return f"(uint64_t)({int(operand) % 2**64}ull)"
    return f"(uint64_t){plain(operand)}"


def place(operand: str) -> tuple[str, str]:
    """Return what an operand in brackets names, and the distance from there."""
    name, distance = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand).groups()
    return name, distance or "0"


def statement(text: str) -> str:
    if text in ("", "{", "}"):
        return text
    if text == "ret":
        return "BACK;"
    predicated = re.fullmatch(r"@(!?)%(p\d+) (.*)", text)
    if predicated:
        return f"if ({predicated[1]}{predicated[2]}) {{ {statement(predicated[3])} }}"
    call = re.fullmatch(r"call\.uni \((\w+)\), ([\w$]+), \(\s*(.*?)\s*\)", text)
    if call:
        return f"{call[1]} = {plain(call[2])}({call[3]});"
    name, _, rest = text.partition(" ")
    if name == "label":
        return f"{plain(rest)}: ;"
    if name.startswith("bra"):
        return f"goto {plain(rest)};"
    if name == ".param":
        of, _, what = rest.partition(" ")
        return f"{TYPES[of[1:]]} {what};"
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", rest)
    of = name.rpartition(".")[2]
    if name.startswith(("ld.", "st.")):
        return moved(name, of, *operands)
    to, *values = map(value, operands)
    return f"{to} = {computed(name, of, operands, values)};"


def moved(name: str, of: str, first: str, second: str) -> str:
    """Return a load or a store."""
    load = name.startswith("ld.")
    register, memory = (first, second) if load else (second, first)
    base, distance = place(memory)
    if ".param" in name:
        base = plain(base)
        if load:
            return f"{value(register)} = {base};"
        given = value(register)
        return f"{base} = {f'bits({given})' if of == 'f64' else given};"
    lines = []
    for k, lane in enumerate(re.findall(r"[^{},\s]+", register)):
        c_type = TYPES[of]
        there = f"(({c_type}*)({value(base)} + {distance}))[{k}]"
        pair = (value(lane), there) if load else (there, value(lane))
        lines.append(f"{pair[0]} = {pair[1]};")
    return " ".join(lines)


def computed(name: str, of: str, operands: list[str], values: list[str]) -> str:
    """Return what an instruction computes."""
    kind, *details = name.split(".")
    a, b = (*values, "", "")[:2]
    if kind == "setp":
        how = details[0]
        if of == "f64":
            ordered = f"!UNORDERED({a}, {b})"
            if how in ("num", "nan"):
                return ordered if how == "num" else f"!({ordered})"
            compared = f"({a} {COMPARISONS[how[:2]]} {b})"
            unordered = how[2:] == "u"
            return (
                f"!({ordered}) || {compared}"
                if unordered
                else (f"{ordered} && {compared}")
            )
        return f"({TYPES[of]}){a} {COMPARISONS[how]} ({TYPES[of]}){b}"
    if kind == "cvt":
        *rounded, to, given = details
        if to != "f64" or rounded == ["rn"]:
            return f"({TYPES[to]})({TYPES[given]}){a}"
    reals = [operand.startswith("%fd") for operand in operands]
    if kind == "mov" and operands[1][0] == "%" and reals[0] != reals[1]:
        return f"real({a})" if reals[0] else f"bits({a})"
    for begin, text in (REALS if of == "f64" else INTEGERS).items():
        if name.startswith(begin):
            width = re.sub(r"\D", "", of) or "32"
            given = dict(zip("abcd", values, strict=False))
            given |= {"T": TYPES.get(of, ""), "U": f"uint{width}_t"}
            words = re.split(r"\b([abcdTU])\b", text)
            return "".join(given.get(word, word) for word in words)
    raise SyntaxError(f"{name} {', '.join(operands)}")
