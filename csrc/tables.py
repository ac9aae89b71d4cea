"""The constants of elementary.h.in, computed from fastopt/elementary.py."""

import runpy
from fractions import Fraction
from math import factorial
from pathlib import Path

ELEMENTARY = Path(__file__).resolve().parent.parent / "fastopt" / "elementary.py"
DIGITS = 400  # of what is computed here
LOGARITHMS, POWERS = 1024, 512  # the sizes of the tables
MIDDLE = 424  # the first place of mantissas from the root of 2 on


def words(value):
    """Return a number of 128 bits as arguments for C: its upper and its lower half."""
    return f"{value >> 64 & 2**64 - 1:#018x}, {value & 2**64 - 1:#018x}"


def tables():
    """Return what the template names."""
    functions = runpy.run_path(str(ELEMENTARY))
    ln, exp = functions["ln"], functions["exp"]
    ln2 = functions["ln2"](DIGITS)
    logarithms = []
    for k in range(LOGARITHMS):
        factor = round(Fraction(2**13 * LOGARITHMS, 2 * (LOGARITHMS + k) + 1))
        if k in (0, LOGARITHMS - 1):  # next to 1, logarithms are exact
            factor = 2**12 if k == 0 else 2**11
        c = factor / (2**12 if k < MIDDLE else 2**11)
        logarithms.append((factor, words(-(ln(c, DIGITS) << 116) // ln2)))
    powers = [exp(k * ln2 // POWERS, DIGITS) >> DIGITS - 127 for k in range(POWERS)]
    # Of log2(1 + r) = c[0] * r - c[1] * r**2 + ..., and of 2**r - 1 = d[1] * r + ...
    c = [(1 << 2 * DIGITS) // (ln2 * k) for k in range(1, 9)]
    d = [1 << DIGITS]
    for k in range(1, 7):
        d.append((d[-1] * ln2 >> DIGITS) // k)
    fixed = functions["ln2"](320) >> 32
    series = [[2**127 // factorial(2 * k + j) for k in range(16)] for j in range(2)]
    return {
        "limbs": ", ".join(f"{fixed >> 32 * k & 2**32 - 1:#010x}" for k in range(10)),
        "middle": MIDDLE,
        "quarter": words(functions["pi"](126)),
        "series": [list(map(words, of)) for of in series],
        "logarithms": logarithms,
        "powers": [words(power) for power in powers],
        "c0": words(c[0] >> DIGITS - 127),
        "c": [f"{of >> DIGITS - 64 & 2**64 - 1:#018x}" for of in c],
        "d1": words(d[1] >> DIGITS - 128),
        "d": [f"{of >> DIGITS - 64 & 2**64 - 1:#018x}" for of in d],
    }
