"""How many threads a step may use."""

from __future__ import annotations

import functools
import importlib
import os
import re
from pathlib import Path


def _forked_before_the_import() -> bool:
    """On Linux: whether this process is a fork that has not started a program since
    (the flag PF_FORKNOEXEC), such as a worker of multiprocessing."""
    try:
        stat = Path("/proc/self/stat").read_text()
    except OSError:
        return False
    return bool(int(stat.rpartition(")")[2].split()[6]) & 0x40)


# Whether this process is a fork of another Python. An OpenMP runtime whose threads
# stayed behind in the parent hangs (libgomp, pytorch#58962) or aborts (Numba's), so
# steps in such a child are serial; the bits are the same. In a list, because every step
# looks, and calling a function would take longer than looking.
forked = [_forked_before_the_import()]


def _in_child() -> None:
    forked[0] = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def cgroup_quota() -> float:
    """CPUs that the container may use: cgroup v2, then v1; infinite if unlimited."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            v1 = Path("/sys/fs/cgroup/cpu")
            quota = (v1 / "cpu.cfs_quota_us").read_text().strip()
            period = (v1 / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return float("inf")
    if quota in ("max", "-1"):
        return float("inf")
    return int(quota) / int(period)


@functools.cache
def places() -> tuple[int, ...]:
    """Return the CPUs that OpenMP binds the threads of a step to, as ``OMP_PROC_BIND``,
    ``OMP_PLACES`` or ``GOMP_CPU_AFFINITY`` say; none if it does not bind them.

    OpenMP decides once, when its runtime is loaded, perhaps by another package than
    ours. From then on the first thread's affinity is that of one place.
    """
    try:
        process = importlib.import_module("fastopt._process")
    except ImportError:  # no C compiler, so no OpenMP of ours
        return ()
    return tuple(process.bound_to())


def affinity() -> int:
    """Return how many CPUs the threads of a step may run on."""
    if places():
        return len(places())
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available() -> int:
    """CPUs allowed by affinity, the container's quota and ``OMP_NUM_THREADS``."""
    limits = [float(affinity()), cgroup_quota()]
    # A list, as in OMP_NUM_THREADS=4,2, is for nested levels; the first counts.
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isascii() and asked.isdigit() and int(asked) > 0:
        limits.append(int(asked))
    return max(1, int(min(limits)))


def openmp_runtimes() -> str:
    """Return the OpenMP libraries in this process, now that the backends are loaded."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown: they can be listed on Linux only"
    # A wheel may bring its own copy under a name like libgomp-a1b2c3.so.1.
    paths = set(re.findall(r"/.*/lib(?:gomp|omp|iomp5)\b[^/\n]*\.so.*", maps))
    if len(paths) > 1:
        paths.add("more than one: each has its own threads, which compete")
    return "\n".join(sorted(paths)) or "none"
