"""Builds the extensions: kernels, one for each instruction set, and what is built once.

Everything else about the package stands in pyproject.toml.
"""

import gzip
import multiprocessing
import os
import sys
import sysconfig
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # an isolated build has no such entry
from render import CSRC, renderer  # noqa: E402

RENDERED = ROOT / "build" / "kernels"
# What kernels are made of, which take long to compile; and all that is compiled.
OF_KERNELS = [
    *sorted(CSRC.glob("*.in")),
    *(CSRC / name for name in ("gram.h", "roots.h", "render.py", "stored.py")),
]
SOURCES = [
    ROOT / "fastopt" / "include" / "fastopt.h",
    ROOT / "fastopt" / "__init__.pxd",
    *sorted(path for path in CSRC.iterdir() if path.is_file()),
]

MSVC = sys.platform == "win32"
# Whether the target is x86. In a cross build, the target is not this machine.
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
# The flags are part of the promise of identical bits: every operation rounds once, as
# written. Not -ffast-math: it reorders, and sets flush-to-zero for the whole process.
FLAGS = (
    ["/O2", "/fp:precise"]
    if MSVC
    else ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
)
if not MSVC and "-g" not in os.environ.get("CFLAGS", ""):
    FLAGS += ["-g0"]  # debug information would be five sixths of an extension

OPENMP = ["/openmp"] if MSVC else ["-fopenmp"]
ISAS = {"baseline": []}
if X86 and not MSVC:
    ISAS["avx2"] = ["-mavx2"]
    ISAS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ]


def write(name, text):
    """Write a source where what is built from it will lie, too."""
    source = RENDERED / name
    if not source.exists() or source.read_text(encoding="utf-8") != text:
        source.write_text(text, encoding="utf-8")
    return str(source.relative_to(ROOT))


def extension(name, text, flags=(), sources=SOURCES):
    return Extension(
        f"fastopt.{name}",
        [write(f"{name}.pyx", text)],
        extra_compile_args=[*FLAGS, *flags],
        optional=True,  # or packing fails if it was not built
        # A source distribution takes in what an extension depends on.
        depends=[str(path.relative_to(ROOT)) for path in sources],
        include_dirs=["csrc", "fastopt/include"],
    )


def extensions():
    RENDERED.mkdir(parents=True, exist_ok=True)
    render = renderer()
    for name in ("table.pxi", "scalars.pxi", "formats.pxi", "fused.pxi"):
        write(name, render(f"{name}.in"))
    write("elementary.h", render("elementary.h.in"))
    for isa, flags in ISAS.items():
        text = render("kernels.pyx.in", isa=isa)
        yield extension(f"_kernels_{isa}", text, flags, OF_KERNELS)
    for name in ("driver", "tensors", "xla", "process"):
        yield extension(f"_{name}", (CSRC / f"{name}.pyx").read_text(encoding="utf-8"))


class BuildKernels(build_ext):
    """Adds OpenMP where the compiler has it; the kernels are serial where not. Without
    a C compiler the install goes on: `fastopt info` says what is missing."""

    def build_extensions(self):
        if not MSVC:
            self.forget_python_folder()
        if self.compiles_with(OPENMP):
            for extension in self.extensions:
                extension.extra_compile_args += OPENMP
                # The plain runtime under its plain name, so that torch, Numba and we
                # share one; a bundled copy would be a second pool of threads.
                extension.extra_link_args += [] if MSVC else OPENMP
                if (
                    sys.platform == "linux"
                ):  # so that only modules that call OpenMP need it
                    extension.extra_link_args += ["-Wl,--as-needed"]
        super().build_extensions()

    def build_extension(self, extension):
        # `optional` covers a compiler that fails, not one that is absent.
        try:
            super().build_extension(extension)
        except Exception as error:
            print(f"fastopt: no {extension.name}: {error}", file=sys.stderr)

    def forget_python_folder(self):
        """Python's own flags for the linker may name the folder that it was built for.
        The extensions need nothing from it, and it differs from machine to machine.
        Folders that LDFLAGS or LDSHARED name stay."""
        kept = [os.environ.get(name, "") for name in ("LDFLAGS", "LDSHARED")]
        kept = " ".join(kept).split()
        self.compiler.linker_so = [
            word
            for word in self.compiler.linker_so
            if word in kept or not word.startswith(("-Wl,-rpath", "-Wl,-R"))
        ]

    def compiles_with(self, flags):
        with TemporaryDirectory() as folder:
            source = Path(folder) / "openmp.c"
            source.write_text("#include <omp.h>\nint main(void){return 0;}\n")
            try:
                made = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=flags
                )
                self.compiler.link_executable(
                    made,
                    "openmp",
                    output_dir=folder,
                    extra_postargs=[] if MSVC else flags,
                )
            except Exception as error:  # any kind of compiler failure means: no
                print(f"fastopt: building without OpenMP: {error}", file=sys.stderr)
                return False
        return True


class SourceArchive(sdist):
    """Writes the same bytes from the same sources, wherever and by whom they are
    packed, if SOURCE_DATE_EPOCH is set: it is the time of every file then. (For wheels,
    setuptools sees to that.)"""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **others):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(
                base_name, format, root_dir=root_dir, base_dir=base_dir, **others
            )

        def without_owner(entry):
            entry.mtime = int(epoch)
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path, folder = f"{base_name}.tar.gz", Path(root_dir or ".", base_dir)
        self.mkpath(os.path.dirname(path))
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            archive.add(folder, base_dir, filter=without_owner)
        return path


CPUS = os.cpu_count() or 1
# Otherwise started, Cython's processes would run this file again.
PROCESSES = CPUS if multiprocessing.get_start_method() == "fork" else 0


def project_urls():
    """The addresses on the index's page, if FASTOPT_REPOSITORY says where the sources
    are, as the workflow that builds a release does."""
    home = os.environ.get("FASTOPT_REPOSITORY")
    if not home:
        return {}
    return {
        "Homepage": home,
        "Documentation": f"{home}/tree/main/docs",
        "Changelog": f"{home}/blob/main/CHANGELOG.md",
        "Issues": f"{home}/issues",
    }


setup(
    project_urls=project_urls(),
    ext_modules=cythonize(
        list(extensions()),
        include_path=[str(ROOT), str(CSRC)],
        nthreads=PROCESSES,
        # Without this, importing an extension enables the GIL (docs/threads.md).
        compiler_directives={"freethreading_compatible": True},
    ),
    cmdclass={"build_ext": BuildKernels, "sdist": SourceArchive},
    options={"build_ext": {"parallel": CPUS}},
)
