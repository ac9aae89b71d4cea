"""How many threads a step uses where OpenMP binds them to CPUs, in processes whose
first thread is bound by the time that we look; and steps on threads with small stacks.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from installed import needs_numba

import fastopt
from fastopt.backends import cython_cpu

pytestmark = [
    pytest.mark.skipif(
        not hasattr(os, "sched_setaffinity"), reason="no affinity on this system"
    ),
    pytest.mark.skipif(
        cython_cpu.missing() is not None or not cython_cpu.driver().OPENMP,
        reason="there are no kernels with OpenMP",
    ),
]
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
needs_two = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")

IMPORTS = {
    "fastopt first": "import fastopt\nfastopt.adamw(np.ones(3))\nimport torch\n",
    "torch first": "import torch\nimport fastopt\n",
    "no torch": "import fastopt\n",
}
PROGRAM = """
from fastopt.runtime import threads
print(threads.available())
before = len(os.listdir("/proc/self/task"))
p = np.ones(200_000, np.float32)
opt = fastopt.adamw(p)
opt.step(p.copy())
print(opt.threads)
print(len(os.listdir("/proc/self/task")) - before)
"""
UNSET = dict.fromkeys(["OMP_NUM_THREADS"], "")


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **UNSET, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def counted(imports, first="", **environment):
    """What is available, what an optimizer takes, what threads a step has started."""
    if "import torch" in IMPORTS[imports]:
        pytest.importorskip("torch")
    start = f"import os\n{first}\nimport numpy as np\n"
    out = run(start + IMPORTS[imports] + PROGRAM, **environment)
    return list(map(int, out.split()))


def two_places():
    return f"{{{CPUS[0]}}},{{{CPUS[1]}}}"


BINDINGS = {
    "proc_bind": lambda: {"OMP_PROC_BIND": "true"},
    "spread": lambda: {"OMP_PROC_BIND": "spread", "OMP_PLACES": "threads"},
    "places": lambda: {"OMP_PLACES": two_places()},
    "cores": lambda: {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"},
    "gomp": lambda: {"GOMP_CPU_AFFINITY": f"{CPUS[0]} {CPUS[1]}"},
}


@needs_two
@pytest.mark.parametrize("imports", IMPORTS)
@pytest.mark.parametrize("binding", BINDINGS)
def test_a_bound_process_uses_all_its_cpus(imports, binding):
    most = 2 if binding in ("places", "gomp") else len(CPUS)
    available, taken, started = counted(imports, **BINDINGS[binding]())
    assert available == taken == most
    assert started == most - 1


@needs_two
@pytest.mark.parametrize("imports", IMPORTS)
@pytest.mark.parametrize(
    "environment",
    [{}, {"OMP_PROC_BIND": "true"}, {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}],
)
def test_restrictions_hold(imports, environment):
    """As of taskset, before OpenMP's runtime is loaded."""
    pinned = f"os.sched_setaffinity(0, {{{CPUS[1]}}})"
    assert counted(imports, pinned, **environment) == [1, 1, 0]


@needs_two
@pytest.mark.parametrize("imports", ["torch first", "no torch"])
def test_one_place_is_one_thread(imports):
    place = {"OMP_PLACES": f"{{{CPUS[0]}}}"}
    assert counted(imports, **place) == [1, 1, 0]
    assert counted(imports, GOMP_CPU_AFFINITY=str(CPUS[1])) == [1, 1, 0]


@needs_two
def test_restrictions_hold_later():
    """Without a binding the affinity is read whenever an optimizer is made."""
    code = (
        "import os, numpy as np, fastopt\np = np.ones(9)\n"
        "print(fastopt.adamw(p).threads)\n"
        f"os.sched_setaffinity(0, {{{CPUS[0]}}})\n"
        "print(fastopt.adamw(p).threads)\n"
    )
    assert run(code).split() == [str(len(CPUS)), "1"]


@needs_two
def test_limits_hold_beside_a_binding():
    bound = {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "1"}
    assert counted("no torch", **bound) == [1, 1, 0]


@needs_two
def test_torch_classes_use_as_many_as_torch():
    pytest.importorskip("torch")
    code = (
        "import torch, fastopt.torch\n"
        "opt = fastopt.torch.AdamW([torch.nn.Parameter(torch.ones(9))])\n"
        "print(opt._threads(), torch.get_num_threads())"
    )
    ours, torchs = run(code, OMP_PROC_BIND="true").split()
    assert ours == torchs == str(len(CPUS))


@needs_two
def test_info_says_so():
    code = "import fastopt.__main__ as m\nm.main(['info'])"
    text = " ".join(run(code, OMP_PLACES=two_places()).split())
    assert "a step uses at most 2" in text
    assert f"OpenMP binds a step to CPUs {CPUS[0]}, {CPUS[1]}, as OMP_PROC_BIND" in text
    text = " ".join(run(code).split())
    assert f"CPU affinity {len(CPUS)} of {os.cpu_count()} CPUs" in text


# Launchers ----------------------------------------------------------------------------

ALL = len(CPUS)


@needs_two
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALL),
        ({"FASTOPT_NUM_THREADS": "7", "OMP_NUM_THREADS": "1"}, 7),
        ({"FASTOPT_NUM_THREADS": ""}, ALL),
        ({"LOCAL_WORLD_SIZE": "2"}, ALL // 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": str(4 * ALL)}, 1),
        ({"SLURM_NTASKS_PER_NODE": "1"}, ALL),
        ({"LOCAL_WORLD_SIZE": "two"}, ALL),
        ({"OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_processes_share_the_cpus(environment, expected):
    """This process has no OMP_NUM_THREADS, so its children's is by a launcher, but only
    if there are several of them."""
    code = "import numpy as np, fastopt; print(fastopt.adamw(np.ones(9)).threads)"
    assert run(code, **environment) == f"{expected}\n"


@pytest.mark.parametrize("text", ["0", "-3", "two", "2000", "9" * 5000])
def test_a_number_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv("FASTOPT_NUM_THREADS", text)
    with pytest.raises(ValueError, match="FASTOPT_NUM_THREADS must be a whole number"):
        fastopt.adamw(np.ones(9))


@needs_two
def test_a_process_that_is_bound_does_not_share():
    """As by mpirun --bind-to core: its parent may use more CPUs."""
    code = (
        "import os\n"
        f"os.sched_setaffinity(0, {{{CPUS[1]}}})\n"
        "from fastopt.runtime import threads\n"
        "print(threads.is_bound(), [limit.why for limit in threads.limits()])\n"
    )
    assert run(code, LOCAL_WORLD_SIZE="2") == "True ['CPU affinity', 'cgroup quota']\n"


# A line is written at once, because two processes write to one pipe.
OF_TORCHRUN = """
import os, torch
from fastopt.runtime import threads
threads.affinity, threads.cgroup_quota = lambda: 8, lambda: float("inf")
threads.is_bound = lambda: False
import fastopt.torch
opt = fastopt.torch.AdamW([torch.nn.Parameter(torch.ones(9))])
asked = fastopt.torch.AdamW([torch.nn.Parameter(torch.ones(9))], threads=3)
counts = torch.get_num_threads(), opt._threads(), asked._threads()
os.write(1, "{} {} {}\\n".format(*counts).encode())
torch.set_num_threads(2)
os.write(1, "{}\\n".format(opt._threads()).encode())
"""


@pytest.mark.parametrize("given", [None, "1", "2"])
def test_torchrun_with_two_processes(given, tmp_path):
    """It sets OMP_NUM_THREADS to 1 unless the user has set it, which counts."""
    pytest.importorskip("torch")
    script = tmp_path / "script.py"
    script.write_text(OF_TORCHRUN)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {} if given is None else {"OMP_NUM_THREADS": given}
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    process = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    first = {None: "1 4 3", "1": "1 1 3", "2": "2 2 3"}[given]
    second = "1" if given == "1" else "2"
    assert sorted(process.stdout.split("\n")) == sorted(["", *[first, second] * 2])


# Contention ---------------------------------------------------------------------------


def contended():
    """An optimizer and its runner."""
    opt = fastopt.adamw(np.ones(100_000, np.float32), backend="cython", threads=2)
    return opt, opt._bound.program.runner


def test_one_thread_steps_if_several_are_slow_and_it_is_faster():
    (opt, runner), turns = contended(), []
    for _ in range(3):
        while runner.alone:
            opt.step(np.ones(100_000, np.float32))
        for _ in range(6):
            runner.judge(True, 1e-5, 1000)
        for seconds in (1.0,) * 5 + (1e-5, 1.0):  # a fast one makes up for a slow one
            runner.judge(True, seconds, 1000)
            assert runner.alone == 0
        runner.judge(True, 1.0, 1000)
        turns.append(runner.alone)
        runner.judge(False, 1e-3, 1000)
        assert runner.alone == turns[-1]
    assert turns == [64, 128, 256]  # then several are tried again


def slow(runner, turns):
    for _ in range(turns):
        assert runner.alone == 0
        runner.judge(True, 1.0, 1000)


def test_several_threads_step_if_one_is_slower():
    """Then slow turns are not judged for a while."""
    _, runner = contended()
    slow(runner, 6)
    runner.judge(False, 2.0, 1000)
    slow(runner, 128 + 6)
    assert runner.alone == 128


def test_large_turns_take_long():
    _, runner = contended()
    for _ in range(9):
        runner.judge(True, 0.1, 10**9)
    assert runner.alone == 0


def test_one_thread_has_the_same_bits_as_several():
    params = [np.ones(100_000, np.float32) for _ in range(2)]
    rng = np.random.default_rng(0)
    opts = [fastopt.adamw(p, backend="cython", threads=2) for p in params]
    for step in range(4):
        grad = rng.normal(size=100_000).astype(np.float32)
        for opt in opts:
            opt.step(grad, clip_norm=1.0)
        for _ in range(6 * (step == 1)):
            opts[0]._bound.program.runner.judge(True, 1.0, 1000)
    assert opts[0]._bound.program.runner.alone > 0
    assert (params[0] == params[1]).all()


NATIVE = """
import sys, numpy as np, fastopt
sys.path.insert(0, {support!r})
from native_code import OK, Optimizer
from fastopt.backends import cython_cpu

driver, values = cython_cpu.driver(), fastopt.adamw.hyperparameters
rng = np.random.default_rng(0)
grads = [[rng.normal(size=100_000).astype(np.float32)] for _ in range(4)]
params = []
for alone in (False, True):  # by two threads, and by one
    for _ in range(6 * alone):
        driver.native_judge(True, 1.0, 1000)
    opt = Optimizer("adamw", [np.ones(100_000, np.float32)], values)
    for step in range(4):
        assert driver.native_alone() == (64 - step if alone else 0)
        assert opt.step(grads[step], threads=2) == OK
    params.append(opt.params[0])
assert (params[0] == params[1]).all()
"""


def test_steps_of_native_code_are_judged_together():
    """Their table has no object for each optimizer; the bits are the same."""
    code = NATIVE.format(support=str(Path(__file__).parents[1] / "support"))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Small stacks -------------------------------------------------------------------------

# Optimizers are made on the first thread; the steps are on one with so small a stack
# that 64 KiB of scratch overrun it, and on OpenMP's threads that it starts.
STACKS = """
import sys, threading, numpy as np, fastopt
sys.path.insert(0, {support!r})
from cases import CASES, label
from fastopt import multitask
from fastopt.backends import numba_cpu
from fastopt.memory.segments import Segment
from fastopt.step import Request, limits
rng = np.random.default_rng(0)

def data(dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)

jobs = []

def add(name, opt, *shape, **asked):
    dtype = opt._params.arrays[0].dtype
    given = {{"a": data(dtype, *shape), "b": data(dtype, 1000)}}
    jobs.append((name, opt, given, asked))

def params(dtype, *shape):
    return {{"a": data(dtype, *shape), "b": data(dtype, 1000)}}

options = [{{}}, {{"clip_value": 0.1}}, {{"clip_norm": 0.1}}, {{"zero_grads": True}},
           {{"nonfinite": "skip", "grad_scale": 0.5}}]
N = 50_001
for backend in ("cython", "numba"):
    for dtype in ("f4", "f8"):
        how = dict(threads=2, backend=backend)
        several = CASES if backend == "cython" and dtype == "f4" else CASES[::40]
        for rule, values in several:
            add(label(rule, values), rule(params(dtype, N), **values, **how), N)
        for asked in options:
            add("adamw", fastopt.adamw(params(dtype, N), ema=0.9, **how), N, **asked)
            add("lamb", fastopt.lamb(params(dtype, N), ema=0.9, **how), N, **asked)
            of = fastopt.Adafactor(params(dtype, 300, 200), **how)
            add("adafactor", of, 300, 200, **asked)
        many = [data(dtype, N) for _ in range(20)]
        batches = fastopt.lamb([data(dtype, N) for _ in many], **how)
        jobs.append(("batches", batches, many, {{"clip_value": 0.1}}))
        tall = fastopt.Adafactor(params(dtype, 20, 30, 100), **how)
        add("adafactor of three", tall, 20, 30, 100)
        slow = fastopt.Lookahead(fastopt.adamw(params(dtype, N), **how), k=1)
        jobs.append(("lookahead", slow, params(dtype, N), {{}}))

class Alone:
    # Numba's own driver, as where the compiled one is missing; on its threads, too.
    def __init__(self, rule, dtype):
        self.p, self.g = data(dtype, N), data(dtype, N)
        state = tuple(np.abs(data(dtype, N)) for _ in rule.state)
        average = data(dtype, N)
        parts = [Segment(self.p, state, 0, average)], np.zeros(1, np.int64)
        self.next = numba_cpu.bind_alone(rule, *parts, np.zeros((2, 1, 0)))
        self.scalars = (1.0, *rng.uniform(0.1, 0.2, rule.scalar_count).tolist())

    def step(self, given, **asked):
        for threads in (1, 2):
            before = self.p.copy()
            self.next.take([self.g])
            asked = dict(ema_weight=0.1, zero_grads=True, threads=threads)
            self.next([self.scalars], Request(limits=limits(0.05), **asked))
            self.g[:] = before
            assert not np.array_equal(self.p, before)

for rule in (fastopt.gd, fastopt.adamw, fastopt.adan, fastopt.schedule_free_adamw):
    jobs += [("alone", Alone(rule, dtype), {{}}, {{}}) for dtype in ("f4", "f8")]

def work():
    for name, opt, given, asked in jobs:
        opt.step(given, **asked)
        if name in ("adamw", "lamb", "adafactor"):
            again = {{key: array.copy() for key, array in given.items()}}
            opt.step([given, again], weights=[0.5, 0.5], **asked)
            opt.accumulate(given)
            opt.step(**asked)
    multitask.gram([data("f4", N), data("f4", N)], threads=2)
    done.append(True)

done = []
work()  # what Python and NumPy do once, they have done
threading.stack_size({size})
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert len(done) == 2
"""


@needs_numba
@pytest.mark.parametrize(
    ("size", "environment"),
    [
        (64 << 10, {"OMP_STACKSIZE": "64k"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (64 << 10, {}),
                (0, {"OMP_STACKSIZE": "64k"}),
                (0, {"OMP_STACKSIZE": "64k", "FASTOPT_ISA": "baseline"}),
            )
        ),
    ],
)
def test_small_stacks(size, environment):
    support = str(Path(__file__).parents[1] / "support")
    run(STACKS.format(support=support, size=size), **environment)


def test_small_stacks_in_jax():
    """XLA's threads have large ones, but they call us as any thread could."""
    pytest.importorskip("jax")
    code = (
        "import jax.numpy as jnp, fastopt.jax\n"
        "opt = fastopt.jax.lamb(threads=2)\n"
        "p = jnp.ones(50_000)\n"
        "s = opt.init(p)\n"
        "p, s = opt.step(p, p, s)\n"
        "assert p.shape == (50_000,)\n"
    )
    run(code, OMP_STACKSIZE="64k")
