"""The CUDA backend without a GPU: its bits in numba's simulator. With a GPU also its
bits there. What is compiled and launched is in test_cuda_updates.py, test_cuda_sums.py
and test_cuda_launches.py."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import installed_numba  # noqa: F401
import pytest

from fastopt import backends
from fastopt.backends import cuda_accesses, cuda_driver, numpy_ref
from fastopt.memory.formats import FORMATS

PROJECT = Path(__file__).resolve().parents[2]
SUPPORT = PROJECT / "tests" / "support"
OF_BITS = pytest.mark.parametrize(
    "name", ["cuda_simulator.py", "cuda_stored.py", "cuda_formats.py"]
)


@pytest.mark.parametrize("name", backends.MODULES)
def test_a_backend_has_the_functions_of_the_reference(name):
    module = importlib.import_module(backends.MODULES[name])
    assert module.__all__ == numpy_ref.__all__
    functions = [name for name in module.__all__ if name != "formats"]
    assert all(callable(getattr(module, function)) for function in functions)
    assert module.formats <= FORMATS.keys()


# The bits


def report(name: str, simulated: bool) -> str:
    """What this file finds wrong. In a process of its own, because the choice is made
    when numba is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", SUPPORT / name],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulated))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout if run.returncode else ""


@pytest.mark.skipif(
    bool(cuda_accesses.not_installed), reason="numba-cuda is not installed"
)
@OF_BITS
def test_bits_in_the_simulator(name):
    assert not report(name, simulated=True)


@pytest.mark.skipif(bool(cuda_driver.missing()), reason=f"{cuda_driver.missing()}")
@OF_BITS
def test_bits_on_the_gpu(name):
    assert not report(name, simulated=False)


def test_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install '.[cuda13]'" in cuda_driver.missing()


@pytest.mark.parametrize("library", ["/nowhere/libcuda.so.1", os.devnull])
def test_missing_says_that_there_is_no_driver(library):
    pytest.importorskip("numba_cuda")  # which is missed first
    code = "from fastopt.backends import cuda_driver; print(cuda_driver.missing())"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTOPT_LIBCUDA": library, "NUMBA_ENABLE_CUDASIM": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "no NVIDIA GPU with a working driver was found" in said.stdout
    assert "nvidia-smi" in said.stdout


def test_missing_without_numba_cuda():
    """In a process that cannot import it, the module can still be asked."""
    code = (
        "import sys; sys.modules['numba_cuda'] = None; "
        "from fastopt.backends import cuda_driver; print(cuda_driver.missing())"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "pip install '.[cuda13]'" in said.stdout
