"""Building from source: with a compiler, without, and with one that lacks OpenMP."""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fastopt
from fastopt.backends import cython_cpu

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("Cython", reason="Cython is needed to build")
pytest.importorskip("setuptools", minversion="77", reason="setuptools>=77 is needed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy, in which what Cython makes of them is kept from one test to the next."""
    copied = tmp_path_factory.mktemp("sources")
    for name in ("fastopt", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
        shutil.copytree(ROOT / name, copied / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copied)
    return copied


def build(sources, out, **env):
    """Build the extensions; their paths and the messages."""
    done = subprocess.run(
        [
            *(sys.executable, "setup.py", "build_py", "--build-lib", out),
            *("build_ext", "--build-lib", out, "--build-temp", out / "temp"),
        ],
        cwd=sources,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = (out / "fastopt").glob("_*.so")
    return sorted(built), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="CC is not how Windows compiles")
def test_without_a_compiler_the_build_goes_on(sources, tmp_path):
    nothing = str(tmp_path / "no-such-compiler")
    built, messages = build(sources, tmp_path, CC=nothing, CXX=nothing)
    assert built == []
    assert "no-such-compiler" in messages
    # Yet everything up to the compiler was done: a kernel for every rule was rendered.
    source = (sources / "build/kernels/_kernels_baseline.pyx").read_text()
    for kernel in cython_cpu.KERNELS.values():
        for dtype in ("f32", "f64"):
            assert f"cdef void {kernel}_{dtype}_kernel(" in source
    # And what native code needs is part of the package.
    for name in ("py.typed", "__init__.pxd", "include/fastopt.h"):
        assert (tmp_path / "fastopt" / name).exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is installed")
def test_a_compiler_without_openmp_makes_serial_kernels(sources, tmp_path):
    """Such as Apple's. The wrapper refuses the flag, as it does; and does not optimize,
    which would take minutes."""
    wrapper = tmp_path / "cc"
    wrapper.write_text(
        '#!/bin/sh\nfor a; do [ "$a" = -fopenmp ] && exit 1; done\nexec cc "$@" -O0\n'
    )
    wrapper.chmod(0o755)
    built, messages = build(
        sources, tmp_path, CC=str(wrapper), LDSHARED=f"{wrapper} -shared"
    )
    assert len(built) >= 1
    assert "building without OpenMP" in messages
    paths = {path.name.split(".")[0]: str(path) for path in built}
    code = f"""
import importlib.util, numpy
from fastopt import adamw
from fastopt.backends import cython_cpu
def load(name, path):
    spec = importlib.util.spec_from_file_location("fastopt." + name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
serial = load("_driver", {paths["_driver"]!r})
table = load("_kernels_baseline", {paths["_kernels_baseline"]!r}).TABLE
assert not serial.OPENMP
def run():
    p = numpy.linspace(-1, 1, 100_000)
    opt = adamw(p, backend="cython", threads=3)
    for _ in range(3):
        opt.step(numpy.cos(p))
    return p
expected = run()
cython_cpu.driver = lambda: serial
cython_cpu.kernels = lambda: serial.Kernels(table)
cython_cpu.compiled.cache_clear()
assert numpy.array_equal(expected, run())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REPOSITORY = "https://example.org/someone/fastopt"


def setup(sources, *arguments, **env):
    """Run a command of setup.py."""
    subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=sources,
        env={**os.environ, **env},
        capture_output=True,
        check=True,
    )


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """A wheel of this package. Its extensions are those that are installed: nothing is
    compiled."""
    installed = [*Path(fastopt.__file__).parent.glob("_*.*")]
    extensions = [path for path in installed if path.suffix in (".so", ".pyd")]
    if not extensions:
        pytest.skip("no extensions are installed")
    setup(sources, "build_py")
    (library,) = (sources / "build").glob("lib*")
    for path in extensions:  # they are now newer than their sources
        shutil.copy(path, library / "fastopt")
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    subprocess.run(
        [sys.executable, "-m", "pip", *build, "--wheel-dir", folder, sources],
        env={**os.environ, "FASTOPT_REPOSITORY": REPOSITORY, "CC": "false"},
        check=True,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_a_wheel_runs_without_a_compiler(wheel, tmp_path):
    """In a fresh environment, which takes other packages from this one. There is no
    compiler on its path."""
    for package in ("pip", "sklearn", "threadpoolctl", "matplotlib", "rich"):
        pytest.importorskip(package)
    venv.create(tmp_path, symlinks=os.name != "nt")
    binaries = tmp_path / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / ("python.exe" if os.name == "nt" else "python")

    def run(*command):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PATH": str(binaries), "CC": "false", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    install = ("--python", python, "install", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", *install)
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    packages = Path(run(python, "-c", where).strip())
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "others.pth").write_text("\n".join(others))

    code = """
import pathlib, shutil, fastopt
from fastopt.backends import cython_cpu
print(pathlib.Path(fastopt.__file__).parent, cython_cpu.missing())
print(*map(shutil.which, ("cc", "gcc", "clang", "cl")))
"""
    expected = [f"{packages / 'fastopt'} None", "None None None None"]
    assert run(python, "-c", code).splitlines() == expected
    report = run(binaries / "fastopt", "demo", "--epochs", "2", "--output", "demo.png")
    assert "adam" in report and (tmp_path / "demo.png").exists()


@pytest.mark.slow
def test_a_wheel_has_the_package_and_the_addresses_of_its_sources(
    wheel, sources, tmp_path
):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert f"Project-URL: Homepage, {REPOSITORY}\n" in text
    assert f"Project-URL: Issues, {REPOSITORY}/issues\n" in text
    wanted = {"fastopt/py.typed", "fastopt/include/fastopt.h", "fastopt/__init__.pxd"}
    assert wanted <= names
    inside = ("fastopt/", metadata.partition("/")[0] + "/")
    assert [name for name in names if not name.startswith(inside)] == []
    assert [n for n in names if n.endswith((".c", ".pyx", ".pxi", ".in", ".pyc"))] == []
    # Without the variable there are no addresses.
    setup(sources, "egg_info", "--egg-base", tmp_path, FASTOPT_REPOSITORY="")
    assert "Project-URL" not in (tmp_path / "fastopt.egg-info/PKG-INFO").read_text()


@pytest.mark.slow
def test_source_archives_have_the_same_bytes(sources, tmp_path):
    """Of the same sources in two folders, with other dates and modes of the files.
    Wheels take two whole builds: .ci/reproducible."""

    def packed(folder):
        subprocess.run(
            [sys.executable, "setup.py", "sdist", "--dist-dir", "archives"],
            cwd=folder,
            env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
            check=True,
            capture_output=True,
        )
        (archive,) = (folder / "archives").iterdir()
        return archive.read_bytes()

    first = packed(sources)
    shutil.rmtree(sources / "archives")
    copy = shutil.copytree(sources, tmp_path / "another folder")
    for path in copy.rglob("*"):
        path.chmod(0o775 if path.is_dir() else 0o600)
        os.utime(path, (2 * 10**9,) * 2)  # after Cython's own, or all is built anew
    with tarfile.open(fileobj=io.BytesIO(first)) as opened:
        assert {entry.mtime for entry in opened} == {1700000000}
        assert any(entry.name.endswith("csrc/driver.pyx") for entry in opened)
    assert packed(copy) == first


RULE = """
def scalars(t, lr=0.1, mu=0.9):
    return mu, lr


def direction(p, g, m, mu):
    m = mu * m + g
    return m + p, m


def measure(p, u):
    return (wide(u) * wide(u),)


def settle(t, n, uu, lr):
    return (lr / uu,)


def apply(p, u, lr):
    return (p - lr * u,)


rule = Rule.in_passes(direction, measure, apply, scalars, settle, state=("m",))
"""


@pytest.fixture(scope="module")
def kernels_of(tmp_path_factory):
    """The names of what csrc/render.py makes of the text of a rule."""
    sys.path.insert(0, str(ROOT / "csrc"))  # of the modules that it imports
    spec = importlib.util.spec_from_file_location("render", ROOT / "csrc" / "render.py")
    render = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = render  # where its dataclasses look for it
    spec.loader.exec_module(render)

    def names(text):
        path = tmp_path_factory.mktemp("rule") / "mine.py"
        path.write_text(text, encoding="utf-8")
        return {function.name for function in render.functions_of(path)}

    yield names
    del sys.modules[spec.name]


def test_a_rule_in_passes_has_a_kernel_for_each_and_for_all(kernels_of):
    of_passes = {"mine_update_begin", "mine_apply"}
    in_one = {"mine_update", "mine_measure"}
    assert kernels_of(RULE) == of_passes | in_one | {"mine_scalars", "mine_settle"}


def test_our_norms_are_taken_in_two_passes_where_they_can():
    """Of the rules that have been measured to be faster so."""
    passes = {rule.name for rule in cython_cpu.OURS if rule.apply is not None}
    assert passes == {"lamb", "adafactor"}
