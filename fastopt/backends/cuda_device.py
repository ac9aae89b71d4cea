"""The device that kernels run on: a GPU, by its driver, or Numba's simulator."""

from __future__ import annotations

import os
from types import ModuleType

from fastopt.backends import cuda_calls

# As Numba reads it, which is not imported for it.
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0").strip().lower() not in (
    "",
    "0",
    "false",
)

calls: ModuleType = cuda_calls
if SIMULATED:
    from fastopt.backends import cuda_simulated

    calls = cuda_simulated

Board, Event, Launch, Memory, Pinned = (
    getattr(calls, name) for name in ("Board", "Event", "Launch", "Memory", "Pinned")
)
clear, context, copy = calls.clear, calls.context, calls.copy
device_of, download, upload = calls.device_of, calls.download, calls.upload
is_capturing, missing, set_aside = calls.is_capturing, calls.missing, calls.set_aside
DriverError = cuda_calls.DriverError
