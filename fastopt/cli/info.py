"""``fastopt info`` says what is installed, what a step will use, and why."""

from __future__ import annotations

import os
import pkgutil
import platform
import shutil
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from importlib import metadata

import fastopt
from fastopt import backends
from fastopt.backends import cython_cpu
from fastopt.runtime import openmp, threads


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def availability(backend: str) -> str:
    """Return whether a backend is available or, in its own words, why not."""
    try:
        _, reason = backends.find(backend)
    # A half-installed GPU stack can fail in any way, which this report must show.
    except Exception as error:
        reason = str(error) or type(error).__name__
    return f"missing: {reason}" if reason else "available"


def interpreter() -> str:
    """Describe the Python that runs this, and whether it has the GIL."""
    text = f"{platform.python_version()} ({platform.platform()})"
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return f"{text}, with the GIL"
    if getattr(sys, "_is_gil_enabled", lambda: True)():
        return f"{text}, free-threaded, but now with the GIL"
    return f"{text}, free-threaded, without the GIL"


def kernels() -> Iterator[tuple[str, str]]:
    """Describe the compiled kernels: which are used, supported and built."""
    modules = [module.name for module in pkgutil.iter_modules(fastopt.__path__)]
    prefix = "_kernels_"
    built = [name.removeprefix(prefix) for name in modules if name.startswith(prefix)]
    try:
        used = cython_cpu.kernels()
    except (ImportError, ValueError):  # the section on backends says why
        yield "in use", "none"
    else:
        override = os.environ.get("FASTOPT_ISA")
        why = "FASTOPT_ISA" if override else "the best of them; FASTOPT_ISA overrides"
        yield "in use", f"{used.ISA} ({why})"
        driver = cython_cpu.driver()
        yield "this CPU", ", ".join(driver.cpu_supports())
        yield "built by", f"Cython {driver.CYTHON}"
        without = "no: the compiler lacked it, so steps are serial"
        runtime = openmp.runtime_of(driver) or "yes"
        yield "OpenMP", runtime if driver.OPENMP else without
    yield "built", ", ".join(built) or "none"


def threading() -> Iterator[tuple[str, str]]:
    """Describe how many threads a step uses, and the limits that determine it."""
    try:
        least = min(threads.limits())
    except ValueError as error:
        yield "a step uses", f"none, and is refused: {error}"
    else:
        yield "a step uses", f"at most {threads.available()}, because of {least.why}"
    if threads.places():
        places = ", ".join(map(str, threads.places()))
        why = "OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY"
        yield "CPU affinity", f"OpenMP binds a step to CPUs {places}, as {why} says"
    elif hasattr(os, "sched_getaffinity"):
        yield "CPU affinity", f"{threads.affinity()} of {os.cpu_count()} CPUs"
    else:
        yield "CPUs", str(os.cpu_count())
    quota = threads.cgroup_quota()
    yield "cgroup quota", "none" if quota == float("inf") else f"{quota:g} CPUs"
    name, count = threads.ranks()
    if count > 1:
        own = "each is bound to CPUs of its own" if threads.is_bound() else "they share"
        yield "processes", f"{count} on this machine, as {name} says; {own}"
    asked = os.environ.get("OMP_NUM_THREADS") or "not set"
    if threads.launched_with_one():
        asked += ", by a launcher, which does not count"
    yield "OMP_NUM_THREADS", asked
    yield "FASTOPT_NUM_THREADS", os.environ.get("FASTOPT_NUM_THREADS") or "not set"


def cache() -> str:
    """Return the folder of the kernels that Numba compiles, or why there is none."""
    try:
        from fastopt.backends import kernel_cache
    except (ImportError, OSError) as error:
        return f"none: Numba cannot be imported ({error})"
    return str(kernel_cache.directory() or "off")


def sections() -> dict[str, dict[str, str]]:
    """Return the report: its titles, and the entries below each."""
    return {
        f"fastopt {fastopt.__version__}": {
            "Python": interpreter(),
            "NumPy": version("numpy"),
            "Numba": version("numba"),
            "numba-cuda": version("numba-cuda"),
        },
        "backends": {name: availability(name) for name in backends.MODULES},
        "compiled kernels (cython)": dict(kernels()),
        "threads": dict(threading()),
        "OpenMP runtimes loaded": {"paths": threads.openmp_runtimes()},
        "kernel cache": {"directory": cache()},
    }


def info() -> None:
    """Print the report, wrapped to the terminal."""
    width = shutil.get_terminal_size().columns
    for title, entries in sections().items():
        print(title)
        for name, text in entries.items():
            for line in text.split("\n"):
                print(
                    textwrap.fill(
                        line,
                        width,
                        initial_indent=f"  {name:<20}",
                        subsequent_indent=" " * 22,
                        break_long_words=False,
                        break_on_hyphens=False,
                    )
                )
                name = ""
