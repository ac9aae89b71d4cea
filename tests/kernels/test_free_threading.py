"""Threads that run at once, as on free-threaded Python: what each does is whole, or it
is refused. With the GIL the same holds, and the same tests run.
"""

import contextlib
import os
import random
import subprocess
import sys
import sysconfig
import threading
import time

import numpy as np
import pytest
from at_once import at_once, repeated

import fastopt
from fastopt import backends
from fastopt.runtime import claims

IS_BUILT_SO = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
MANY = 8
REFUSED = "this optimizer is in a step, in another thread or in one of its schedules"


def available(name):
    try:
        backends.load(name)
    except (ImportError, RuntimeError):
        return False
    return True


BACKENDS = [name for name in ("cython", "numba", "numpy") if available(name)]


@pytest.fixture(autouse=True)
def frequent_switches():
    """With the GIL, threads take turns of 5 ms by default, longer than many steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# The GIL ------------------------------------------------------------------------------

IMPORTS = """
import importlib, pkgutil, sys, warnings
warnings.filterwarnings("error", ".*enabled to load module 'fastopt", RuntimeWarning)
import numpy
assert not sys._is_gil_enabled()
import fastopt
names = [m.name for m in pkgutil.walk_packages(fastopt.__path__, "fastopt.")
         if not m.name.endswith("__main__")]
compiled = [name for name in names if name.startswith("fastopt._")]
for name in compiled:
    importlib.import_module(name)
assert len(compiled) > 4 and not sys._is_gil_enabled(), "the GIL is back"
for name in names:  # some of which import packages that may bring it back
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert not (error.name or "").startswith("fastopt"), error
"""


@pytest.mark.skipif(not IS_BUILT_SO, reason="this Python is not free-threaded")
@pytest.mark.skipif("cython" not in BACKENDS, reason="there are no compiled modules")
def test_no_module_brings_the_gil_back():
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON_GIL"}
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_info_says_so():
    code = "from fastopt.cli.info import interpreter; print(interpreter())"
    expected = {"": ", with the GIL"}
    if IS_BUILT_SO:
        expected = {
            "0": ", free-threaded, without the GIL",
            "1": ", free-threaded, but now with the GIL",
        }
    for chosen, words in expected.items():
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHON_GIL": chosen},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip().endswith(words)


# Optimizers that share nothing --------------------------------------------------------


def data(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def trained(seed, steps, **how):
    """Make an optimizer, do steps of several kinds, and change, save and load it in
    between. Return the parameters and the state in the end."""
    rule = (fastopt.adamw, fastopt.lamb, fastopt.adamw, fastopt.sgd)[seed % 4]
    dtype = np.float64 if seed % 3 == 0 else np.float32
    sizes = (1000, 3, 0, 1, 257)
    params = [data((seed, k), n, dtype=dtype) for k, n in enumerate(sizes)]
    more = {"momentum": 0.8} if rule is fastopt.sgd else {"eps": 1e-5}
    opt = rule(params, lr=0.01, weight_decay=0.02, ema=0.7, **more, **how)
    for step in range(steps):
        grads = [data((seed, step, k), n, dtype=dtype) for k, n in enumerate(sizes)]
        if step % 5 == 1:
            opt.lr = 0.01 / (1 + step)
        if step % 5 == 2:
            saved = opt.state_dict()
            opt.step(grads)
            opt.load_state_dict(saved)
        if step % 5 == 3:
            opt.accumulate(grads, grad_scale=0.5)
            opt.step()
        opt.step(grads, **[{}, {"clip_norm": 0.9}, {"nonfinite": "skip"}][step % 3])
    state = [array for arrays in opt.state.values() for array in arrays]
    return [array.copy() for array in (*params, *state, *opt.ema_params)]


def all_equal(first, second):
    return all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [2, MANY])
def test_optimizers_at_once_have_the_bits_of_one_after_the_other(backend, count):
    seeds, steps = range(count), 30 if backend == "cython" else 12
    alone = [trained(seed, steps, backend=backend) for seed in seeds]
    together = {}

    def train(seed):
        together[seed] = trained(seed, steps, backend=backend)

    at_once(*[lambda seed=seed: train(seed) for seed in seeds])
    assert all(all_equal(alone[seed], together[seed]) for seed in seeds)


@pytest.mark.skipif("cython" not in BACKENDS, reason="there are no compiled kernels")
def test_several_threads_each():
    """Each thread of Python's has OpenMP's threads of its own."""

    def train(seed):
        p = data(seed, 100_003)
        opt = fastopt.adamw(p, lr=0.01, threads=2, backend="cython")
        for step in range(20):
            opt.step(data((seed, step), 100_003), clip_norm=3.0)
        return [p]

    alone, together = [train(seed) for seed in range(3)], {}
    at_once(
        *[lambda k=k: together.__setitem__(k, train(k)) for k in range(3)],
    )
    assert all(all_equal(alone[k], together[k]) for k in range(3))


# One optimizer ------------------------------------------------------------------------

KINDS = {
    "gd": (fastopt.gd, {}),
    "adamw": (fastopt.adamw, {}),
    "lamb": (fastopt.lamb, {}),
    "averaged": (fastopt.adamw, {"ema": 0.9}),
    "scheduled": (fastopt.adamw, {"lr": lambda steps: 0.02 / (1 + steps % 3)}),
}
N = 1000


def made(kind, backend):
    rule, values = KINDS[kind]
    w = data(7, N)
    return w, rule(w, **{"lr": 0.01, **values}, backend=backend, threads=1)


def attempted(action):
    """Return whether something was done, and not refused."""
    try:
        action()
    except RuntimeError as error:
        assert str(error).startswith(REFUSED), error
        return False
    return True


def numbers_of(opt):
    """Return all numbers of an optimizer's state, by the number of steps."""
    saved = opt.state_dict()
    parts = [*saved["state"].values(), *([saved["ema"]] if "ema" in saved else [])]
    return saved["steps"], repr(parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_one_optimizer_are_whole_or_refused(kind, backend):
    """Four threads step it, and others change and save it meanwhile."""
    (w, opt), grad, counts, saved = made(kind, backend), np.ones(N, np.float32), [], []

    def step():
        done = 0

        def once():
            nonlocal done
            success = attempted(lambda: opt.step(grad))
            done += success
            return success

        repeated(once)()
        counts.append(done)

    def change():
        attempted(lambda: setattr(opt, "threads", 1))
        attempted(lambda: setattr(opt.groups[0], "frozen", False))
        if kind != "scheduled":
            attempted(lambda: setattr(opt, "lr", 0.01))

    def save():
        return attempted(lambda: saved.append(numbers_of(opt)))

    at_once(*[step] * 4, repeated(change), repeated(save))
    assert opt.steps == sum(counts)

    # As many steps one after the other, and what was saved is of one of them.
    alone, other = made(kind, backend)
    wanted, states = dict(saved), dict([numbers_of(other)])
    for _ in range(opt.steps):
        other.step(grad)
        if other.steps in wanted:
            states.update([numbers_of(other)])
    assert all_equal([w], [alone])
    assert numbers_of(opt) == numbers_of(other)
    assert all(states[steps] == numbers for steps, numbers in saved)


def test_the_second_of_two_steps_is_refused():
    """The first one is in its schedule meanwhile, so this is not a matter of chance."""
    inside, go = threading.Event(), threading.Event()

    def lr(steps):
        inside.set()
        assert go.wait(30)
        return 0.5

    w = np.zeros(3)
    opt = fastopt.gd(w, lr=lambda steps: 0.5 if steps < 1 else lr(steps))
    opt.step(np.ones(3))
    refused = []

    def others():
        assert inside.wait(30)
        actions = [
            lambda: opt.step(np.ones(3)),
            lambda: opt.state_dict(),
            lambda: setattr(opt, "lr", 0.1),
            lambda: setattr(opt, "threads", 1),
            lambda: opt.accumulate(np.ones(3)),
        ]
        refused.extend(not attempted(action) for action in actions)
        go.set()

    at_once(lambda: opt.step(np.ones(3)), others)
    assert refused == [True] * 5
    assert opt.steps == 2 and (w == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_gradients_that_changes_meanwhile(backend):
    """Each array is taken as it was at some moment, or the list is refused."""
    sizes = (500, 7, 0, 40)
    params = [np.zeros(n, np.float32) for n in sizes]
    opt = fastopt.gd(params, lr=1.0, backend=backend, threads=1)
    ones = [np.ones(n, np.float32) for n in sizes]
    grads, done, errors, stop = list(ones), [], [], threading.Event()

    def mutate():
        rng = random.Random(0)
        while not stop.is_set():
            place = rng.randrange(len(sizes))
            with contextlib.suppress(IndexError):
                grads[place] = rng.choice([None, np.ones(sizes[place], np.float32)])
                grads.append(grads.pop() if rng.random() < 0.5 else None)
                del grads[len(sizes) :]
                grads[:] = ones

    def step():
        try:
            opt.step(grads)
            done.append(1)
        except (TypeError, ValueError) as error:
            errors.append(error)

    def stepping():
        repeated(step)()
        stop.set()

    at_once(stepping, mutate)
    assert opt.steps == len(done) > 0
    for p in params:  # nothing was applied in part
        assert (p == p[:1]).all() and (-len(done) <= p).all() and (p <= 0).all()
    assert all("grads" in str(error) for error in errors), errors[:3]


# Flags --------------------------------------------------------------------------------


class Owner:
    """An object with a flag, whose method is refused while another one runs."""

    def __init__(self):
        self._busy = claims.Flag()
        self.inside = self.most = self.count = 0


def test_claims_are_exclusive(monkeypatch):
    """Without the GIL, a flag alone would let two calls in."""
    monkeypatch.setattr(claims, "FREE_THREADED", True)

    @claims.claimed
    def enter(self):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.count += 1
        self.inside -= 1

    owner, done = Owner(), []

    def once():
        success = attempted(lambda: enter(owner))
        if success:
            done.append(1)
        return success

    at_once(*[repeated(once)] * 4)
    assert owner.most == 1 and owner.inside == 0
    assert owner.count == len(done) > 0
    assert not owner._busy.holders


def test_claims_are_given_up_after_errors_and_within_calls(monkeypatch):
    monkeypatch.setattr(claims, "FREE_THREADED", True)

    @claims.claimed
    def enter(self, action):
        return action()

    owner = Owner()
    with pytest.raises(ZeroDivisionError):
        enter(owner, lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="in a step"):
        enter(owner, lambda: enter(owner, int))
    assert enter(owner, lambda: 3) == 3
    assert not owner._busy.holders


def test_a_fork_holds_claims_up(monkeypatch):
    """Until it is over. The forking thread is refused: it would wait for ever."""
    monkeypatch.setattr(claims, "FREE_THREADED", True)
    living = {}
    monkeypatch.setattr(claims, "flags", lambda: iter(living.values()))

    @claims.claimed
    def enter(self):
        return 3

    owner, returned = Owner(), []
    living[0] = owner._busy
    claims.hold_up()
    with pytest.raises(RuntimeError, match="about to fork"):
        enter(owner)
    thread = threading.Thread(target=lambda: returned.append(enter(owner)))
    thread.start()
    time.sleep(0.05)
    assert not returned
    claims.after_in_parent()
    thread.join(10)
    assert returned == [3] and not owner._busy.holders and not claims.forks


def test_a_child_has_free_flags(monkeypatch):
    """But for those of the thread that has forked, which goes on in the child."""
    mine, theirs = Owner(), Owner()
    mine._busy.holders[0] = [threading.get_ident()]
    theirs._busy.holders[0], theirs._busy[0] = [1], True
    monkeypatch.setattr(claims, "flags", lambda: iter([mine._busy, theirs._busy]))
    claims.after_in_child()
    assert mine._busy.holders and not theirs._busy.holders
    assert theirs._busy == [False]


# Tables that are made once ------------------------------------------------------------

TABLE = """
import sys, threading
sys.setswitchinterval(1e-6)
import fastopt.native
begin, tables = threading.Barrier(8), []
def get():
    begin.wait()
    tables.append(fastopt.native.table())
threads = [threading.Thread(target=get) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(tables) == 8 and len(set(map(id, tables))) == 1, tables
"""


@pytest.mark.skipif("cython" not in BACKENDS, reason="there are no compiled kernels")
def test_the_table_of_native_code_is_made_once():
    """Its rules are compared by their addresses."""
    done = subprocess.run(
        [sys.executable, "-c", TABLE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
