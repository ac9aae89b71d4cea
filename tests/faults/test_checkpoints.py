"""Faults while a checkpoint is saved or loaded: the end of the process at any moment,
full disks, interrupts. The file is the old one or the new one, and nothing else is
left."""

import contextlib
import errno
import functools
import os
import random
import shutil
import signal
import tempfile
import time

import pytest
from cases import alike
from checkpoints import everything, params_of, trained
from interrupts import alarm, at_every_line, at_lines
from test_faults_interrupts import plain

from fastopt.optimizer import safetensors

resource = pytest.importorskip("resource", reason="this is not POSIX")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
LAST = 4  # states that a child saves


def is_complete(path, opt, states):
    """Load a file, which must have one of these states. Its number."""
    opt.load(path)
    now = everything(opt)
    (number,) = [n for n, state in enumerate(states) if alike(now, state)]
    return number


# The end of the process ---------------------------------------------------------------


@needs_fork
def test_kills(tmp_path, campaign):
    """SIGKILL at random moments, while a child saves one state after the other. The
    file has the state that the child was saving, or the one that was there."""
    size, path, rng = 50_000, tmp_path / "run", random.Random(0)
    opt, grads = trained("adamw", 0, size), [params_of(k, size) for k in range(LAST)]
    opt.save(path, params=True)
    states, first = [everything(opt)], path.read_bytes()
    for grad in grads:
        opt.step(grad)
        states.append(everything(opt))
    begun = time.monotonic()
    opt.save(path, params=True)
    long = 1.3 * (time.monotonic() - begun)
    middle, seen = 0, set()

    def kill(saves, seconds):
        nonlocal middle
        path.write_bytes(first)
        opt.load(path)
        ready, child = start(save_all, path, opt, grads)
        try:
            for _ in range(saves):
                os.read(ready, 1)
            time.sleep(seconds)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(ready)
        number = is_complete(path, opt, states)
        assert number >= saves - 1
        seen.add(number)
        left = [name for name in os.listdir(tmp_path) if name != "run"]
        assert all(name.startswith(".run.") for name in left) and len(left) < 2
        for name in left:
            middle += 1
            os.unlink(tmp_path / name)

    count = 1000 if campaign.long else 200
    for number in range(count):
        saves, seconds = rng.randint(1, LAST), rng.uniform(0, long)
        campaign.attempt(f"{number} in save {saves}", kill, saves, seconds)
    assert middle > count // 20 and len(seen) > 2  # many in the middle of a file


def start(action, *arguments):
    """Fork a child that does something until it is killed. Where it writes how far it
    is, and its number."""
    ready, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return ready, child
    try:
        action(write, *arguments)
    finally:
        os._exit(1)


def save_all(ready, path, opt, grads):
    for grad in grads:
        opt.step(grad)
        os.write(ready, b".")
        opt.save(path, params=True)
    time.sleep(60)


@needs_fork
def test_two_processes_save_to_one_path(tmp_path, campaign):
    """The file is that of one of them."""
    size, path = 50_000, tmp_path / "run"
    states = [everything(trained("adamw", n, size)) for n in (1, 2)]

    def race():
        children = []
        for steps in (1, 2):
            child = os.fork()
            if not child:
                try:
                    opt = trained("adamw", steps, size)
                    for _ in range(5):
                        opt.save(path, params=True)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        is_complete(path, trained("adamw", 0, size), states)
        assert os.listdir(tmp_path) == ["run"]

    for number in range(40 if campaign.long else 4):
        campaign.attempt(f"race {number}", race)


# Errors while a file is written -------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    """An optimizer whose file is older than its state."""
    opt = trained("adamw", 1)
    opt.save(tmp_path / "run", params=True)
    opt.step(params_of(9))
    return opt, tmp_path / "run", (tmp_path / "run").read_bytes()


def check_refused(opt, path, data, number=None, **how):
    """A file cannot be written; the old one is as it was, and nothing else is there."""
    before = everything(opt)
    with pytest.raises(OSError) as raised:
        opt.save(path, params=True)
    if number is not None:
        assert raised.value.errno == number
    assert str(path) in str(raised.value), raised.value
    there = {path.name: data} if data is not None else {}
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == there
    assert alike(everything(opt), before)
    opt.step(params_of(10))  # it is not busy


@contextlib.contextmanager
def limited(size):
    """No file may be larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(old, campaign):
    """A limit on the size of files takes a part of a block first, as full disks do."""
    opt, path, data = old
    rng = random.Random(0)
    sizes = [0, 1, 8, 9, len(data) // 2, len(data) - 1]
    sizes += [rng.randrange(len(data)) for _ in range(500 if campaign.long else 50)]
    for size in sizes:

        def fill(size=size):
            with limited(size):
                check_refused(opt, path, data, errno.EFBIG)

        campaign.attempt(f"{size} bytes", fill)
    with limited(len(data)):
        opt.save(path, params=True)
    assert path.read_bytes() != data


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod", "stat"])
def test_calls_of_the_system_that_fail(function, old, monkeypatch):
    opt, path, data = old

    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError) as raised:
            opt.save(path, params=True)
    assert str(path) in str(raised.value)
    assert path.read_bytes() == data and os.listdir(path.parent) == ["run"]
    opt.save(path, params=True)


def test_the_order_of_what_is_done(old, monkeypatch):
    """All bytes are on the disk before the file has its name, and the name is after."""
    opt, path, _ = old
    done = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(number):
        name = os.readlink(f"/proc/self/fd/{number}")
        done.append(("fsync", os.path.basename(name), os.path.getsize(name)))
        fsync(number)

    def log_replace(source, target):
        done.append(("replace", os.path.basename(source), os.path.getsize(source)))
        replace(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("the system does not say which files are open")
    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    opt.save(path, params=True)
    (first, second, third) = done
    size = os.path.getsize(path)
    assert first[0] == "fsync" and second[0] == "replace" and third[0] == "fsync"
    assert first[1:] == second[1:] == (first[1], size) and first[1].startswith(".run.")
    assert third[1] == path.parent.name


def test_file_systems_whose_folders_have_no_fsync(old, monkeypatch):
    opt, path, data = old
    fsync = os.fsync

    def of_files(number, error=errno.EINVAL):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(error, os.strerror(error))
        fsync(number)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("the system does not say which files are open")
    monkeypatch.setattr(os, "fsync", of_files)
    opt.save(path, params=True)
    assert path.read_bytes() != data
    monkeypatch.setattr(os, "fsync", functools.partial(of_files, error=errno.EIO))
    with pytest.raises(OSError, match="run"):  # the file is new, but may be lost
        opt.save(path, params=True)


def test_a_folder_that_cannot_be_written():
    folder = tempfile.mkdtemp()  # pytest's own are in folders for their owner alone
    opt, path = trained("adamw"), os.path.join(folder, "run")
    try:
        opt.save(path)
        os.chmod(path, 0o644)
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            for name in ("run", "new"):
                with pytest.raises(PermissionError, match=f"'{folder}/{name}'"):
                    opt.save(os.path.join(folder, name))
        finally:
            os.seteuid(user)
        assert os.listdir(folder) == ["run"]
        opt.load(path)
    finally:
        os.chmod(folder, 0o755)
        shutil.rmtree(folder)


class Alone:
    """An optimizer with a file of an earlier state beside it."""

    def __init__(self, folder):
        self.opt = trained("adamw", 2, 70)
        self.path = folder / "run"
        self.path.unlink(missing_ok=True)
        self.opt.save(self.path, params=True)
        self.opt.step(params_of(9, 70))


def test_interrupts_while_saving(tmp_path, campaign):
    """At every line. The file is the old one or the new one, and alone."""
    made = Alone(tmp_path)
    old = made.path.read_bytes()
    made.opt.save(made.path, params=True)
    new = made.path.read_bytes()
    assert old != new

    def check(made):
        def judge():
            assert os.listdir(tmp_path) == ["run"]
            assert made.path.read_bytes() in (old, new)
            made.opt.save(made.path, params=True)
            assert made.path.read_bytes() == new

        campaign.attempt("a line", judge)

    stride = 1 if campaign.long else 5
    at_every_line(
        lambda: Alone(tmp_path),
        lambda made: made.opt.save(made.path, params=True),
        check,
        stride,
    )


def test_interrupts_while_loading(tmp_path, campaign):
    """At every line. State and parameters are those of before, or of the file."""
    for name in ("adamw", "lookahead"):

        def make(name=name):
            opt = trained(name, 3, 70)
            return opt

        path = tmp_path / name
        trained(name, 1, 70).save(path, params=True)
        at_lines(
            campaign,
            name,
            make,
            lambda opt, path=path: opt.load(path),
            lambda opt: plain(everything(opt)),
            lambda opt: opt.step(params_of(8, 70)),
            stride=1 if campaign.long else 23,
        )


def test_signals_while_saving(old, campaign):
    """A real SIGALRM whose handler raises, at random moments."""
    opt, path, data = old
    opt.save(path, params=True)
    new, rng = path.read_bytes(), random.Random(0)
    begun = time.monotonic()
    opt.save(path, params=True)
    long = 1.5 * (time.monotonic() - begun) + 1e-4

    def stop(*_):
        raise KeyboardInterrupt

    def interrupt(seconds):
        path.write_bytes(data)
        with contextlib.suppress(KeyboardInterrupt):
            with alarm(stop, seconds):
                opt.save(path, params=True)
        assert path.read_bytes() in (data, new)
        assert os.listdir(path.parent) == ["run"]

    for number in range(2000 if campaign.long else 200):
        campaign.attempt(f"signal {number}", interrupt, rng.uniform(1e-5, long))


def test_a_newer_version_says_what_to_do(old, monkeypatch):
    opt, path, _ = old
    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "VERSION", 2)
        opt.save(path)
    with pytest.raises(
        ValueError, match="version '2' .* reads 1; load it with a newer"
    ):
        opt.load(path)


def test_no_file_is_left_open(old):
    opt, path, data = old
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("the system does not say which files are open")
    before = len(os.listdir("/proc/self/fd"))
    for bad in (data, data[:-1], b""):
        path.write_bytes(bad)
        with contextlib.suppress(TypeError, ValueError):
            opt.load(path)
        opt.save(path)
        with contextlib.suppress(TypeError, ValueError):
            opt.load([path, path], shard=5)
    assert len(os.listdir("/proc/self/fd")) == before
