"""Which backends there are to test: fastopt may be installed without Numba, and built
without a compiler."""

from __future__ import annotations

from typing import Any

import pytest

from fastopt import backends

NUMBA = backends.find("numba")[1] is None
needs_numba = pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
BACKENDS = [b for b in ("numpy", "numba", "cython") if backends.find(b)[1] is None]
# What makes a step when Numba's code calls Numba's own driver.
numba_cpu: Any = backends.find("numba")[0]
