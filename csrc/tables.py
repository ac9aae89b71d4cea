"""The constants of elementary.h.in as text, computed by fastopt/elementary.py."""

import runpy
from math import factorial
from pathlib import Path

ELEMENTARY = Path(__file__).resolve().parent.parent / "fastopt" / "elementary.py"


def words(value):
    """Return a number of 128 bits as arguments for C: its upper and its lower half."""
    return f"{value >> 64 & 2**64 - 1:#018x}, {value & 2**64 - 1:#018x}"


def tables():
    """Return what the template names."""
    functions = runpy.run_path(str(ELEMENTARY))
    found, digits = functions["tables"](), functions["TABLE_DIGITS"]
    fixed = functions["ln2"](320) >> 32
    series = [[2**127 // factorial(2 * k + j) for k in range(16)] for j in range(2)]
    return {
        "limbs": ", ".join(f"{fixed >> 32 * k & 2**32 - 1:#010x}" for k in range(10)),
        "middle": functions["MIDDLE"],
        "quarter": words(functions["pi"](126)),
        "series": [list(map(words, of)) for of in series],
        "logarithms": [(factor, words(log)) for factor, log in found.logarithms],
        "powers": [words(power) for power in found.powers],
        "c0": words(found.c[0] >> digits - 127),
        "c": [f"{of >> digits - 64 & 2**64 - 1:#018x}" for of in found.c],
        "d1": words(found.d[1] >> digits - 128),
        "d": [f"{of >> digits - 64 & 2**64 - 1:#018x}" for of in found.d],
    }
