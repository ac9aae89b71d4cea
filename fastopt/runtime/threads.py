"""How many threads a step may use, and why.

``FASTOPT_NUM_THREADS`` decides if it is set. Otherwise the number is the least of: the
CPUs that affinity allows, the container's quota, this process's share of them if a
launcher has started several processes on the machine, and ``OMP_NUM_THREADS``, unless
it is a 1 that a launcher has set because the user had set nothing.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import NamedTuple

from fastopt.runtime.openmp import extension

# The variables in which launchers tell a process how many they have started on this
# machine: torchrun, accelerate and DeepSpeed; Open MPI; MPICH and Intel MPI; Slurm.
RANKS = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)


MOST = 1024  # threads that a user can ask for


class Limit(NamedTuple):
    """A limit for the number of threads."""

    threads: float
    why: str


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


def contents(path: str) -> str:
    """Return the text in a file."""
    with open(path, encoding="ascii") as file:  # pathlib takes as long again
        return file.read()


def cgroup_quota() -> float:
    """CPUs that the container may use: cgroup v2, then v1; infinite if unlimited."""
    try:
        quota, period = contents("/sys/fs/cgroup/cpu.max").split()
    except (OSError, ValueError):
        try:
            quota = contents("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
            period = contents("/sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
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
        process = extension("_process")
    except ImportError:  # no C compiler, or no OpenMP
        return ()
    return tuple(process.bound_to())


def affinity() -> int:
    """Return how many CPUs the threads of a step may run on."""
    if places():
        return len(places())
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def number(variable: str) -> int:
    """Return the number in an environment variable; 0 if there is none above 0."""
    # A list, as in OMP_NUM_THREADS=4,2, is for nested levels; the first counts.
    text = os.environ.get(variable, "").split(",")[0].strip()
    return int(text) if text.isascii() and text.isdigit() else 0


def ranks() -> tuple[str, int]:
    """Return the variable that counts this machine's processes, and their number."""
    found = [(name, number(name)) for name in RANKS if number(name)]
    return found[0] if found else ("", 1)


def is_bound() -> bool:
    """Whether a launcher has given this process CPUs of its own, fewer than it has."""
    try:
        return len(os.sched_getaffinity(os.getppid())) > affinity()
    except (AttributeError, OSError):  # not Linux, or the launcher has ended
        return False


def launched_with_one() -> bool:
    """Whether a launcher has set ``OMP_NUM_THREADS`` to 1, as torchrun does for several
    processes if the user has not set it: the launcher itself was started without it."""
    if number("OMP_NUM_THREADS") != 1 or ranks()[1] < 2:
        return False
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    names = [entry.partition(b"=")[0] for entry in environment.split(b"\0")]
    return b"OMP_NUM_THREADS" not in names


def own_number() -> int:
    """Return the number that the user has chosen for fastopt alone; 0 if none."""
    text = os.environ.get("FASTOPT_NUM_THREADS", "").strip()
    if text and not (text.isascii() and text.isdigit() and len(text) < 9):
        text = "0"
    if text and not 1 <= int(text) <= MOST:
        raise ValueError(
            f"FASTOPT_NUM_THREADS must be a whole number from 1 to {MOST}, got "
            f"{os.environ['FASTOPT_NUM_THREADS']!r}"
        )
    return int(text or 0)


def limits() -> list[Limit]:
    """Return what limits the threads of a step; the least counts."""
    if own_number():
        return [Limit(own_number(), "FASTOPT_NUM_THREADS")]
    cpus, quota = affinity(), cgroup_quota()
    found = [Limit(cpus, "CPU affinity"), Limit(quota, "cgroup quota")]
    name, count = ranks()
    if count > 1 and not is_bound():
        found.append(Limit(min(cpus, quota) // count, f"{name}={count}"))
    if number("OMP_NUM_THREADS") and not launched_with_one():
        found.append(Limit(number("OMP_NUM_THREADS"), "OMP_NUM_THREADS"))
    return found


def available() -> int:
    """Return how many threads a step may use."""
    return max(1, int(min(limits()).threads))


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
