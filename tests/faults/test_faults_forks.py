"""Forks while another thread is in a step: the child has whole steps, and can step."""

import os
import subprocess
import sys

import pytest
from installed import BACKENDS

STEPPING = """
import os, sys, threading, time
import numpy as np, fastopt
count, size, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
w, g = np.zeros(size), np.ones(size)
opt = fastopt.gd(w, lr=1.0, backend=backend, threads=1)
opt.step(g)
stop = threading.Event()
def run():
    while not stop.is_set():
        opt.step(g)
thread = threading.Thread(target=run)
thread.start()
failed = 0
for k in range(count):
    time.sleep(0.001 * (k % 7))
    child = os.fork()
    if not child:
        try:
            whole = opt.steps
            assert (w == -whole).all(), (whole, w.min(), w.max())
            opt.step(g)
            assert (w == -whole - 1).all() and opt.steps == whole + 1
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    failed += os.waitpid(child, 0)[1] != 0
stop.set()
thread.join(20)
before = opt.steps
opt.step(g)
assert opt.steps == before + 1 and (w == -opt.steps).all()
sys.exit(1 if failed or thread.is_alive() else 0)
"""

BLOCKED = """
import os, sys, threading
import numpy as np, fastopt
inside, go = threading.Event(), threading.Event()
def lr(steps):
    if threading.current_thread() is not threading.main_thread():
        inside.set()
        go.wait(30)
    return 1.0
w = np.zeros(5)
opt = fastopt.gd(w, lr=lr)
thread = threading.Thread(target=opt.step, args=(np.ones(5),))
thread.start()
inside.wait(30)
child = os.fork()
if not child:
    opt.step(np.ones(5))
    os._exit(0 if opt.steps == 1 and (w == -1).all() else 1)
status = os.waitpid(child, 0)[1]
try:
    opt.step(np.ones(5))
    status = 1
except RuntimeError:
    pass  # in the parent, that step is still under way
go.set()
thread.join()
sys.exit(1 if status or opt.steps != 1 else 0)
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def ran(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_fork
def test_forks_while_another_thread_steps(campaign):
    for backend in BACKENDS:
        for size in (1000, 300_000):
            count = 200 if campaign.long else 5
            campaign.attempt((backend, size), ran, STEPPING, count, size, backend)


@needs_fork
def test_a_fork_does_not_wait_for_a_step_that_waits():
    ran(BLOCKED)
