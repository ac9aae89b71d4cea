"""Describes the machine of a measurement, without names of people or hosts."""

from __future__ import annotations

import platform
from datetime import date
from pathlib import Path
from typing import Any

from fastopt.backends import cython_cpu
from fastopt.bench.measure import Worker
from fastopt.runtime import threads

CPU = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return models[0] if models else platform.machine()


def caches() -> str:
    """Return caches such as ``L1d 48K, L2 1024K, L3 32768K``, if Linux lists them."""
    sizes = []
    for index in sorted(CPU.glob("index*")):
        level, kind, size = (
            (index / name).read_text().strip() for name in ("level", "type", "size")
        )
        letter = "" if kind == "Unified" else kind[0].lower()
        sizes.append(f"L{level}{letter} {size}")
    return ", ".join(sizes) or "unknown"


def huge_pages() -> str:
    """Return when programs get huge pages: "always", "never", or "madvise" (NumPy asks
    for them from 4 MiB on, torch only under THP_MEM_ALLOC_ENABLE=1)."""
    if not HUGE_PAGES.exists():
        return "unknown"
    return HUGE_PAGES.read_text().split("[")[1].split("]")[0]


def machine(workers: dict[str, Worker]) -> dict[str, Any]:
    """Describe the machine. Call this after the measurement, when the workers have
    loaded all that they use."""
    about = {name: worker.ask("about") for name, worker in workers.items()}
    versions: dict[str, str] = {"python": platform.python_version()}
    for answer in about.values():
        versions |= answer["versions"]
    return {
        "date": str(date.today()),
        "cpu": cpu(),
        "caches": caches(),
        "threads": threads.available(),
        "huge pages": huge_pages(),
        "isa": cython_cpu.kernels().ISA,
        "os": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        "versions": versions,
        "OpenMP": {name: answer["OpenMP"] for name, answer in about.items()},
    }
