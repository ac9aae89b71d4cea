"""Several calls that no interrupt and no signal handler can come between.

CPython handles signals between bytecodes. The calls here are made by C code alone, so
an interrupt comes before the first of them or after the last. This holds as long as
each function is compiled, as methods of arrays and dicts and Cython's functions are,
and calls no Python code itself. (Functions of NumPy's namespace, such as
``numpy.copyto``, call a dispatcher written in Python.)
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

Call: TypeAlias = "partial[Any] | Callable[[], Any]"

_call = operator.methodcaller("__call__")


def uninterrupted(*calls: Call) -> None:
    """Call compiled functions one after the other, without a bytecode in between.

    Parameters
    ----------
    *calls
        Functions without arguments, such as ``partial(operator.setitem, a, ..., b)``
        or ``partial(vars(self).update, steps=3)``. What they return is dropped.

    Raises
    ------
    Exception
        What a call raises; those after it are then not made. Check everything first.

    Examples
    --------
    >>> from functools import partial
    >>> progress = {"steps": 0}
    >>> uninterrupted(partial(progress.update, steps=1), partial(progress.update, t=1))
    >>> progress
    {'steps': 1, 't': 1}
    """
    deque(map(_call, calls), maxlen=0)
