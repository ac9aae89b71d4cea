"""Whether lists have the same objects."""

from __future__ import annotations

from operator import is_
from typing import Any

from fastopt.runtime import openmp


def same_objects_slowly(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists have the same objects, not only equal ones."""
    return len(first) == len(second) and all(map(is_, first, second))


same_objects = same_objects_slowly
try:
    # Of a thousand objects it knows in 1 us, and Python in 17.
    same_objects = openmp.extension("_process").same_objects
except ImportError:  # no C compiler
    pass
