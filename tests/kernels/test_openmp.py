"""The OpenMP runtime: whose it is, that there is one, and what happens without any."""

import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastopt
from fastopt.backends import cython_cpu
from fastopt.cli import info
from fastopt.runtime import openmp

PACKAGE = Path(fastopt.__file__).parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="this is Linux's loader")


def in_a_process(code, *before, path=PACKAGE.parent):
    """What a fresh Python prints, in lines."""
    done = subprocess.run(
        [*before, sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module", autouse=True)
def needs_openmp():
    if cython_cpu.missing() or not cython_cpu.driver().OPENMP:
        pytest.skip("the kernels are not installed, or were built without OpenMP")


# Each computes, so that what is loaded late is loaded, too.
STEPS = {
    "fastopt": """
import numpy, fastopt
w = numpy.ones(100_000, numpy.float32)
fastopt.adamw(w).step(w.copy())
""",
    "torch": "import torch; torch.ones(100_000).add_(1)\n",
    "sklearn": "import sklearn\n",
}
RUNTIMES = r"""
import re
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"/.*/lib(?:gomp|omp|iomp5)\b.*", maps))), sep="\n")
"""
ORDERS = list(itertools.permutations(STEPS))


def runtimes(order, *before, path=PACKAGE.parent):
    """The OpenMP runtimes of a process that imports packages in this order."""
    code = "".join(STEPS[name] for name in order)
    return in_a_process(code + RUNTIMES, *before, path=path)


def plain(paths):
    """Those that are not a package's renamed copy, such as scikit-learn's."""
    return [path for path in paths if re.search(r"/libgomp\.so\.1[^/]*$", path)]


@pytest.fixture(scope="module")
def without_fastopt():
    """How many runtimes torch and scikit-learn have together."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    return len(runtimes(("torch", "sklearn")))


@linux
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_fastopt_adds_no_runtime(order, without_fastopt):
    """fastopt and torch share one; scikit-learn's wheel has a renamed copy that nobody
    else can use."""
    loaded = runtimes(order)
    assert len(plain(loaded)) == 1
    assert len(loaded) == without_fastopt


# Without the system's runtime ---------------------------------------------------------

# Runs a command in a namespace of its own, in which the system has no libgomp.
WITHOUT = r"""
set -eu
scratch=$1; shift
known=$(ldconfig -p | sed -n 's,.*=> \(/.*\)/libgomp\.so\.1$,\1,p')
for folder in $(realpath $known | sort -u); do
    mount -t tmpfs tmpfs "$scratch"
    mkdir "$scratch/upper" "$scratch/work"
    mount -t overlay overlay \
        -o "lowerdir=$folder,upperdir=$scratch/upper,workdir=$scratch/work" "$folder"
    rm "$folder"/libgomp.so.1*
done
exec "$@"
"""


@pytest.fixture(scope="module")
def without_the_systems(tmp_path_factory):
    """A command before Python's that hides the system's libgomp from it."""
    scratch = str(tmp_path_factory.mktemp("scratch"))
    command = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", WITHOUT)
    command += ("sh", scratch)
    if sys.platform != "linux" or not shutil.which("unshare"):
        pytest.skip("there is no unshare here")
    done = subprocess.run([*command, "true"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"libgomp cannot be hidden here: {done.stderr.strip()}")
    return command


@pytest.mark.parametrize("first", ["fastopt", "torch"])
def test_torchs_runtime_serves_where_the_system_has_none(first, without_the_systems):
    torch = pytest.importorskip("torch")
    bundled = Path(torch.__file__).with_name("lib") / openmp.RUNTIME
    if not bundled.exists():
        pytest.skip("this build of torch has no libgomp of its own")
    order = sorted(("fastopt", "torch"), key=lambda name: name != first)
    assert runtimes(order, *without_the_systems) == [str(bundled.resolve())]


NO_TORCH = "import sys; sys.modules['torch'] = None\n"  # as if it were not installed
RUNTIME_OF_OURS = """
from fastopt.backends import cython_cpu
print(fastopt.runtime.openmp.runtime_of(cython_cpu.driver()))
"""


def test_the_wheels_own_runtime_serves_where_there_is_no_other(
    without_the_systems, tmp_path
):
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(PACKAGE, tmp_path / "fastopt", ignore=ignored)
    own = copy / "runtime" / openmp.RUNTIME
    shutil.copy(openmp.runtime_of(cython_cpu.driver()), own)
    code = NO_TORCH + STEPS["fastopt"] + RUNTIME_OF_OURS
    assert in_a_process(code, *without_the_systems, path=tmp_path) == [str(own)]


NONE = """
import warnings
import numpy, fastopt
p = numpy.linspace(-1, 1, 1000)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    opt = fastopt.adamw(p)
print(opt.backend, *(warning.message for warning in caught))
opt.step(numpy.cos(p))
print(p.sum().hex())
try:
    fastopt.adamw(numpy.ones(3), backend="cython")
except RuntimeError as error:
    print(error)
"""


def test_without_any_runtime_fastopt_says_what_to_install(without_the_systems):
    """And Numba serves meanwhile, with a warning, as where kernels were not built."""
    pytest.importorskip("numba")
    if openmp.OWN.exists():
        pytest.skip("this fastopt was installed from a wheel, which has a runtime")
    chosen, total, refused = in_a_process(NO_TORCH + NONE, *without_the_systems)
    assert chosen.startswith("numba using backend 'numba', which compiles on first use")
    for message in chosen, refused:
        assert "fastopt._driver needs GCC's OpenMP runtime, libgomp.so.1" in message
        assert "apt-get install libgomp1" in message
        assert "compiler" not in message
    p = np.linspace(-1, 1, 1000)
    fastopt.adamw(p, backend="cython").step(np.cos(p))
    assert p.sum().hex() == total


# The search, where nothing can be hidden ----------------------------------------------


@pytest.fixture
def loader(monkeypatch, tmp_path):
    """A dynamic loader that knows no libgomp, and whose log says what was loaded."""
    log = SimpleNamespace(loaded=[], usable=set())

    def imported(name):
        if not log.usable.intersection(log.loaded):
            raise ImportError(f"{openmp.RUNTIME}: cannot open shared object file")
        return SimpleNamespace(__name__=name)

    torch = SimpleNamespace(submodule_search_locations=[str(tmp_path / "torch")])
    log.torchs = tmp_path / "torch" / "lib" / openmp.RUNTIME
    log.own = tmp_path / openmp.RUNTIME
    log.torchs.parent.mkdir(parents=True)
    for path in log.torchs, log.own:
        path.touch()
    monkeypatch.setattr(openmp, "find_spec", {"torch": torch}.get)
    monkeypatch.setattr(openmp, "OWN", log.own)
    monkeypatch.setattr(openmp.importlib, "import_module", imported)
    monkeypatch.setattr(openmp.ctypes, "CDLL", log.loaded.append)
    return log


def test_torchs_is_tried_before_our_own(loader):
    loader.usable = {str(loader.torchs), str(loader.own)}
    assert openmp.extension("_driver").__name__ == "fastopt._driver"
    assert loader.loaded == [str(loader.torchs)]


@pytest.mark.parametrize("there", [True, False])
def test_our_own_is_the_last(loader, there):
    loader.usable = {str(loader.own)}
    if not there:
        loader.torchs.unlink()
    openmp.extension("_driver")
    assert loader.loaded == [str(loader.torchs)] * there + [str(loader.own)]


def test_no_runtime_is_an_error_that_says_what_was_tried(loader):
    with pytest.raises(openmp.MissingRuntime, match="install it: .*dnf") as error:
        openmp.extension("_process")
    assert "cannot open shared object file" in str(error.value)
    assert loader.loaded == [str(loader.torchs), str(loader.own)]


def test_other_errors_load_nothing(loader, monkeypatch):
    def failing(name):
        raise ImportError("undefined symbol: PyNothing")

    monkeypatch.setattr(openmp.importlib, "import_module", failing)
    with pytest.raises(ImportError, match="PyNothing") as error:
        openmp.extension("_driver")
    assert type(error.value) is ImportError
    assert loader.loaded == []


def test_a_torch_without_a_spec_is_no_torch(loader, monkeypatch):
    def failing(name):
        raise ValueError("torch.__spec__ is None")

    monkeypatch.setattr(openmp, "find_spec", failing)
    assert list(openmp.candidates()) == [loader.own]


@linux
def test_the_runtime_is_told_by_the_module_that_calls_it():
    path = openmp.runtime_of(importlib.import_module("fastopt._driver"))
    assert str(Path(path).resolve()) in fastopt.runtime.threads.openmp_runtimes()
    assert dict(info.kernels())["OpenMP"] == path
    assert (
        openmp.runtime_of(importlib.import_module("fastopt._kernels_baseline")) is None
    )
