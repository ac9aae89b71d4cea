"""The kernel cache under damage: whatever lies in an entry's place, whoever could write
there and whenever a process was killed, a step is done, without what is not to be
trusted, without waiting, and nothing is left behind."""

import os
import signal
import socket
import stat
import subprocess
import sys
import warnings
from contextlib import suppress

import installed_numba  # noqa: F401
import numpy as np
import pytest

from fastopt.backends import kernel_cache
from fastopt.backends.kernel_cache import Kernel

pytestmark = pytest.mark.skipif(
    not hasattr(os, "mkfifo") or not hasattr(os, "getuid"), reason="not POSIX"
)
KEY = "ab" * 32
KERNEL = Kernel("entry", ("memset",), bytes(range(256)) * 8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "parent" / "cache"
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(path))
    kernel_cache.warn.cache_clear()
    kernel_cache.save(KEY, KERNEL)
    assert kernel_cache.load(KEY) == KERNEL
    return path


def look():
    """What is loaded, and what is said about it."""
    kernel_cache.warn.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = kernel_cache.load(KEY)
    return found, " ".join(str(warning.message) for warning in said)


def remove(path):
    path.chmod(0o700) if path.is_dir() and not path.is_symlink() else None
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            inside.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def fifo(path, sound):
    os.mkfifo(path, 0o600)


def unix_socket(path, sound):
    at = os.getcwd()
    os.chdir(path.parent)  # its name may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(at)


def device(path, sound):
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero


def folder_there(path, sound):
    path.mkdir()
    (path / "inside").write_bytes(sound)


def link_to_sound(path, sound):
    other = path.parent.parent / "elsewhere"
    other.write_bytes(sound)
    path.symlink_to(other)


def link_to_zero(path, sound):
    path.symlink_to("/dev/zero")


def link_to_itself(path, sound):
    path.symlink_to(path)


def huge(path, sound):
    with open(path, "wb") as file:
        file.write(sound)
        file.truncate(1 << 40)


def unreadable(path, sound):
    path.write_bytes(sound)
    path.chmod(0o622)


def of_group(path, sound):
    path.write_bytes(sound)
    path.chmod(0o660)


def of_all(path, sound):
    path.write_bytes(sound)
    path.chmod(0o606)


def of_another(path, sound):
    path.write_bytes(sound)
    os.chown(path, 12345, 12345)


THINGS = [fifo, unix_socket, device, folder_there, link_to_sound, link_to_zero]
THINGS += [link_to_itself, huge, unreadable, of_group, of_all, of_another]


def check_thing(folder, put, sound):
    path = folder / KEY
    remove(path)
    put(path, sound)
    found, said = look()
    assert found is None and "ignoring the cached kernel" in said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel_cache.save(KEY, KERNEL)
    if not path.is_dir():  # which is left to its owner
        assert look() == (KERNEL, "")
    assert [p.name for p in folder.iterdir()] == [KEY]
    remove(path)


def test_odd_things_in_an_entrys_place(folder, campaign):
    sound = (folder / KEY).read_bytes()
    needs_root = (device, of_another)
    for put in THINGS:
        if put not in needs_root or os.getuid() == 0:
            campaign.attempt(put.__name__, check_thing, folder, put, sound)


def check_damage(folder, data):
    path = folder / KEY
    path.write_bytes(data)
    found, said = look()
    assert found is None and "it is damaged" in said


def test_damaged_entries(folder, campaign):
    sound = (folder / KEY).read_bytes()
    rng = np.random.default_rng(0)
    for k in range(20_000 if campaign.long else 300):
        kind, at = k % 4, int(rng.integers(len(sound)))
        data = bytearray(sound)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.bytes(int(rng.integers(1, 100)))
        else:
            data = bytearray(rng.bytes(at))
        campaign.attempt((kind, at), check_damage, folder, bytes(data))


HEADERS = [b'["e", [1]]', b'[1, ["e"]]', b'["e", "memset"]', b'["e", {"memset": 1}]']
HEADERS += [b"[null, null]", b'[["e"], []]', b"[" * 100_000, b'{"e": 1, "f": []}']


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_headers_of_something_else_under_a_good_checksum(folder, header):
    data = kernel_cache._sealed(KEY, header + b"\n" + KERNEL.object)
    (folder / KEY).write_bytes(data)
    found, said = look()
    assert found is None and "ignoring the cached kernel" in said
    kernel_cache.save(KEY, KERNEL)
    assert look() == (KERNEL, "")


def test_each_byte_before_the_code_and_the_entry_of_another_kernel(folder, campaign):
    sound = (folder / KEY).read_bytes()
    for at in range(len(sound) - len(KERNEL.object)):
        data = bytearray(sound)
        data[at] ^= 1 << at % 8
        campaign.attempt(at, check_damage, folder, bytes(data))
    other = "cd" * 32
    kernel_cache.save(other, KERNEL._replace(object=b"another's code"))
    data = (folder / other).read_bytes()  # sound, under its own name
    (folder / other).unlink()
    campaign.attempt("another's", check_damage, folder, data)


def check_refused(what, mode, word):
    before = stat.S_IMODE(what.stat().st_mode)
    what.chmod(mode)
    try:
        found, said = look()
    finally:
        what.chmod(before)
    assert found is None and word in said, said


def check_foreign(what):
    uid, gid = what.stat().st_uid, what.stat().st_gid
    os.chown(what, 12345, 12345)
    try:
        found, said = look()
    finally:
        os.chown(what, uid, gid)
    assert found is None and "belongs to" in said and "12345" in said, said


def test_folders_that_others_could_write(folder, campaign):
    """Its own, and any on the way to it, where others could put another there."""
    ways = [folder, folder.parent, folder.parent.parent]
    for what in ways:
        for mode in (0o770, 0o707, 0o777, 0o720, 0o702):
            if what is folder or mode & 0o002 or os.getuid() == 0:
                campaign.attempt(
                    (what.name, mode), check_refused, what, mode, "writable by others"
                )
        if os.getuid() == 0:
            campaign.attempt((what.name, "owner"), check_foreign, what)
    campaign.attempt("sticky", check_refused, folder, 0o1777, "writable by others")
    assert look() == (KERNEL, "")
    folder.parent.chmod(0o1777)  # as /tmp: there only owners move what is theirs
    assert look() == (KERNEL, "")


def test_a_folder_by_a_link(folder, monkeypatch):
    """The user's own, such as from a home to a larger disk; what it leads to counts."""
    link = folder.parent.parent / "link"
    link.symlink_to(folder)
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(link))
    assert look() == (KERNEL, "")
    folder.chmod(0o777)
    assert look()[0] is None


def test_new_folders_are_ours_alone(tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path / "a" / "b" / "c"))
        kernel_cache.save(KEY, KERNEL)
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a/b/c" / KEY).stat().st_mode) == 0o600


def test_what_is_open_is_looked_at(folder, monkeypatch):
    """Not what lay there when a path was looked at: it is another after its opening."""
    real, opened = os.fstat, []

    def fstat(handle):
        status = real(handle)
        if stat.S_ISREG(status.st_mode) and not opened:
            opened.append(handle)
            remove(folder / KEY)
            os.mkfifo(folder / KEY)
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    assert look() == (KERNEL, "") and opened


# Kills --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from fastopt.backends import kernel_cache
kernel = kernel_cache.Kernel("entry", ("memset",), bytes(range(256)) * 8)
place = int(sys.argv[1])  # a line; 0: when all is written, but under another name
seen = 0

def killed(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

if place == 0:
    os.replace = killed

def trace(frame, event, argument):
    global seen
    if frame.f_code.co_filename == kernel_cache.__file__ and event == "line":
        seen += 1
        if seen == place:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

sys.settrace(trace)
kernel_cache.save("cd" * 32, kernel)
"""


def check_kill(folder, place, killed):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(place)], capture_output=True, timeout=60
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    killed.append(done.returncode != 0)
    kernel_cache.save(KEY, KERNEL)  # as the next process does
    left = {p.name for p in folder.iterdir()} - {KEY, "cd" * 32}
    assert not left
    there = (folder / ("cd" * 32)).exists()
    assert kernel_cache.load("cd" * 32) == (KERNEL if there else None)
    with suppress(FileNotFoundError):
        (folder / ("cd" * 32)).unlink()


def test_a_kill_at_any_line_leaves_nothing(folder, campaign):
    killed = []
    for place in (0, *range(1, 140, 1 if campaign.long else 23)):
        campaign.attempt(place, check_kill, folder, place, killed)
    assert any(killed)


def test_files_in_use_are_left(folder):
    """A process that is at its writing keeps its file."""
    mine = folder / f"{KEY}.abcd1234.tmp"
    left = folder / f"{KEY}.abcd5678.tmp"
    users = folder / "notes.tmp"
    for path in (mine, left, users):
        path.write_bytes(b"half")
    with open(mine, "r+b") as file:
        assert kernel_cache._lock(file.fileno())
        kernel_cache.save(KEY, KERNEL)
        assert mine.exists() and users.exists() and not left.exists()
    kernel_cache.save(KEY, KERNEL)
    assert not mine.exists() and users.exists()


def test_a_file_taken_for_one_that_was_left(folder, monkeypatch):
    """Another process removed it between its making and its locking."""
    real, removed = kernel_cache.tempfile.mkstemp, []

    def mkstemp(*arguments):
        handle, name = real(*arguments)
        if not removed:
            os.unlink(name)
            removed.append(name)
        return handle, name

    monkeypatch.setattr(kernel_cache.tempfile, "mkstemp", mkstemp)
    (folder / KEY).unlink()
    kernel_cache.save(KEY, KERNEL)
    assert look() == (KERNEL, "") and removed


def test_without_posix(folder, monkeypatch):
    """As on Windows: no files relative to folders, no locks, no users."""
    monkeypatch.setattr(os, "supports_dir_fd", set())
    monkeypatch.setattr(kernel_cache, "fcntl", None)
    monkeypatch.delattr(os, "getuid")
    left = folder / f"{KEY}.abcd5678.tmp"
    left.write_bytes(b"half")
    kernel_cache.save(KEY, KERNEL._replace(entry="other"))
    assert look() == (KERNEL._replace(entry="other"), "")
    assert not left.exists()


WRITERS = """
import sys
from fastopt.backends import kernel_cache
kernel = kernel_cache.Kernel("entry", ("memset",), bytes(range(256)) * 8)
for _ in range(int(sys.argv[1])):
    kernel_cache.save("ab" * 32, kernel)
    assert kernel_cache.load("ab" * 32) == kernel
"""


def test_writers_at_once(folder, campaign):
    """Each finds a whole entry; none takes another's file for one that was left."""
    command = [sys.executable, "-W", "error", "-c", WRITERS]
    count = "1000" if campaign.long else "50"
    started = [
        subprocess.Popen([*command, count], stderr=subprocess.PIPE) for _ in range(4)
    ]

    def check(process):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    for k, process in enumerate(started):
        campaign.attempt(k, check, process)
    assert [p.name for p in folder.iterdir()] == [KEY]
