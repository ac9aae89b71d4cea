"""A stub of NVIDIA's driver library, built from cuda_stub.c, and what it recorded.

A test builds the library into a temporary folder and lets fastopt load it instead of
the driver::

    stub = Stub(build(tmp_path))
    with stub.installed():
        ...
    launches = stub.calls("cuLaunchKernel")

A process that a test starts loads the same library by its path: ``Stub(path)`` there
controls and reads what is recorded in that process.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

VARIABLE = "FASTOPT_LIBCUDA"
SOURCE = Path(__file__).with_name("cuda_stub.c")
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="there is no C compiler"
)

# The codes that tests name most often (CUresult).
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 1, 2, 3
INVALID_CONTEXT, INVALID_HANDLE, NOT_FOUND, NOT_READY = 201, 400, 500, 600
ILLEGAL_ADDRESS, CONTEXT_IS_DESTROYED = 700, 709
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, CAPTURE_ISOLATION = 900, 901, 905
CAPTURE_IMPLICIT, CAPTURED_EVENT = 906, 907
# The status of a stream's capture (CUstreamCaptureStatus).
NONE, ACTIVE, INVALIDATED = range(3)

STRINGS = "kernel", "global"


class Call(NamedTuple):
    """A call of the driver: its name, its arguments and the code that it returned.

    Numbers are ints, and grids and blocks are tuples of them. ``values`` of a launch is
    a tuple of the bytes of the kernel's parameters whose sizes were declared.
    """

    name: str
    arguments: dict[str, Any]
    result: int


@cache
def compiled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "libcuda.so.1"
        flags = "-shared", "-fPIC", "-O2", "-pthread", "-Wall", "-Wextra", "-Werror"
        # It has no soname: no dlopen("libcuda.so.1") finds the stub by chance.
        command = "cc", *flags, SOURCE, "-o", path
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return path.read_bytes()


def build(folder: Path) -> Path:
    """Build the library in a folder, and return its path.

    The libraries of two folders share nothing. The compiler runs once in a process.
    """
    path = folder / "libcuda.so.1"
    path.unlink(missing_ok=True)  # a process may have loaded it
    path.write_bytes(compiled())
    return path


class Stub:
    """The stub's library at a path, in this process."""

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self.driver = ctypes.CDLL(self.path)

    def control(self, name: str, *arguments: Any) -> int:
        function = getattr(self.driver, f"stub_{name}")
        function.restype = ctypes.c_int64
        return int(function(*arguments))

    @contextmanager
    def installed(self, *cached: tuple[object, str]) -> Iterator[Stub]:
        """Let fastopt load the stub as the driver, in this process and those it starts.

        Each of ``cached``, an object and the name of its attribute where a library that
        is loaded already is kept, is set to the stub's library meanwhile.
        """
        self.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, self.path)
            for owner, name in cached:
                patch.setattr(owner, name, self.driver)
            yield self

    def reset(self) -> None:
        """Forget the log and the failures; memory, modules and streams stay."""
        self.hold(False)
        self.quiet(False)
        self.clear_failures()
        self.clear()

    def calls(self, *names: str) -> list[Call]:
        """Return the calls since ``clear``, or those of functions of some names."""
        size = self.control("log", None, ctypes.c_size_t(0))
        buffer = ctypes.create_string_buffer(size + 1)
        self.control("log", buffer, ctypes.c_size_t(size + 1))
        calls = [parsed(line) for line in buffer.value.decode().splitlines()]
        return [call for call in calls if not names or call.name in names]

    def clear(self) -> None:
        self.control("clear")

    def quiet(self, on: bool = True) -> None:
        """Record nothing, so that a call takes little time."""
        self.control("quiet", on)

    def hold(self, on: bool = True) -> None:
        """Leave the work that follows unfinished until something waits for it."""
        self.control("hold", on)

    def fail(self, name: str, code: int, nth: int = 1) -> None:
        """Let the nth call of a function from now on return a code.

        After a code such as 700, all calls that need a context return it, as the driver
        does, until ``clear_failures``.
        """
        answer = self.control("fail", name.encode(), ctypes.c_int64(nth), code)
        assert answer >= 0, "there is no room for another failure"

    def clear_failures(self) -> None:
        self.control("clear_failures")

    @contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """Let a stream be captured meanwhile.

        Work on it is recorded but not done. What CUDA forbids invalidates the capture,
        which ``capture_status`` tells before its end.
        """
        begun = self.control("capture", ctypes.c_void_p(stream), 1)
        assert begun == NONE, "the stream is captured already, or cannot be"
        try:
            yield
        finally:
            self.control("capture", ctypes.c_void_p(stream), 0)

    def capture_status(self, stream: int) -> int:
        """Return the status of a stream's capture."""
        return max(0, self.control("capture_status", ctypes.c_void_p(stream)))

    def parameters(self, prefix: str, sizes: Sequence[int]) -> None:
        """Declare the sizes in bytes of the parameters of the kernels whose names begin
        with a prefix, so that launches record their values."""
        declared = (ctypes.c_int * len(sizes))(*sizes)
        answer = self.control("parameters", prefix.encode(), declared, len(sizes))
        assert answer >= 0, "there is no room for more parameters"

    def make_global(self, name: str, size: int) -> None:
        """Give every module a global variable of a name and a size in bytes."""
        answer = self.control("global", name.encode(), ctypes.c_size_t(size))
        assert answer >= 0, "there is no room for another global"

    def attribute(self, attribute: int, value: int) -> None:
        """Set what the device says of an attribute (CUdevice_attribute)."""
        answer = self.control("attribute", attribute, value)
        assert answer >= 0, "there is no room for another attribute"

    def live(self, kind: str) -> int:
        """Return how many of a kind there are that were not freed.

        The kinds are ``device``, ``host`` and ``global`` memory, ``module``,
        ``function``, ``stream``, ``event``, and ``context`` for the references to it.
        """
        return self.control("live", kind.encode())

    def read(self, address: int, size: int) -> bytes:
        """Return bytes of the device's memory, without a call of the driver."""
        return ctypes.string_at(address, size)


def parsed(line: str) -> Call:
    name, *pairs = line.split(" ")
    arguments: dict[str, Any] = {}
    for key, text in (pair.split("=", 1) for pair in pairs):
        if key in STRINGS:
            arguments[key] = text
        elif key == "values":
            arguments[key] = tuple(bytes.fromhex(v) for v in text.split(",") if v)
        elif "," in text:
            arguments[key] = tuple(map(int, text.split(",")))
        else:
            arguments[key] = int(text, 0)
    return Call(name, arguments, arguments.pop("result"))
