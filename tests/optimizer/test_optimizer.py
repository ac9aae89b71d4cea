"""The public interface: what can be optimized, changed, saved and resumed."""

import copy
import os
import pickle
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
from cases import CASES, DTYPES, IDS, nonzero, same_bits
from installed import needs_numba

import fastopt
from fastopt.backends import cython_cpu


def three(dtype=np.float64):
    rng = np.random.default_rng(3)
    return {
        "layer": {
            "w": nonzero(rng, 12, dtype).reshape(3, 4),
            "b": nonzero(rng, 4, dtype),
        },
        "out": [nonzero(rng, 5, dtype), np.array(2.5, dtype)],
    }


def arrays_of(tree):
    if isinstance(tree, dict):
        return [a for child in tree.values() for a in arrays_of(child)]
    if isinstance(tree, (list, tuple)):
        return [a for child in tree for a in arrays_of(child)]
    return [tree]


def scaled(tree, factor):
    if isinstance(tree, dict):
        return {key: scaled(child, factor) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [scaled(child, factor) for child in tree]
    return np.asarray(tree * factor)


def test_structures_give_the_same_bits():
    """Nested, as a list, as single arrays, flat, in groups: one arithmetic."""
    nested, grads = three(), scaled(three(), 0.25)
    listed = arrays_of(three())
    single = arrays_of(three())
    flat = fastopt.flatten(three())
    tree = three()
    grouped = [{"params": tree["layer"]}, {"params": tree["out"], "lr": 0.02}]
    opts = [
        (fastopt.adamw(nested, lr=0.02), grads),
        (fastopt.adamw(listed, lr=0.02), arrays_of(grads)),
        (fastopt.adamw(flat, lr=0.02), fastopt.flatten(grads)),
        (fastopt.adamw(grouped, lr=0.02), [grads["layer"], grads["out"]]),
        *(
            (fastopt.adamw(array, lr=0.02), grad)
            for array, grad in zip(single, arrays_of(grads), strict=True)
        ),
    ]
    for _ in range(3):
        for opt, given in opts:
            opt.step(given)
    expected = arrays_of(nested)
    for result in (listed, single, arrays_of(flat.views), arrays_of(tree)):
        assert all(same_bits(a, b) for a, b in zip(expected, result, strict=True))
    assert not np.array_equal(expected[0], arrays_of(three())[0])


def test_none_leaves_a_parameter_and_its_state_alone():
    params = three()
    opt = fastopt.adamw(params, lr=0.1)
    opt.step(params_grads := scaled(params, 1.0))
    before = [a.copy() for a in arrays_of(params)]
    moments = [m.copy() for m in opt.state["m"]]
    opt.step({"layer": {"w": None, "b": params_grads["layer"]["b"]}, "out": None})
    changed = [
        not np.array_equal(a, b) for a, b in zip(before, arrays_of(params), strict=True)
    ]
    moved = [
        not np.array_equal(a, b) for a, b in zip(moments, opt.state["m"], strict=True)
    ]
    assert changed == moved == [False, True, False, False]
    opt.step(None)
    assert opt.steps == 3


def test_groups_have_their_own_hyperparameters():
    a, b, alone = np.ones(4), np.ones(4), np.ones(4)
    opt = fastopt.adam([{"params": a, "lr": 0.5}, {"params": [b]}], lr=0.1)
    other = fastopt.adam(alone, lr=0.5)
    grad = np.arange(1.0, 5.0)
    opt.step([grad, [grad]])
    other.step(grad)
    assert same_bits(a, alone) and not np.array_equal(a, b)
    with pytest.raises(AttributeError, match="the groups differ in lr"):
        opt.lr  # noqa: B018
    opt.lr = 0.25
    assert opt.lr == 0.25 == opt.groups[1]["lr"]
    opt.groups[0]["lr"] = 0.75
    assert [dict(group)["lr"] for group in opt.groups] == [0.75, 0.25]
    assert "lr" in opt.groups[0] and len(opt.groups[0]) == 5


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
def test_an_empty_group(backend):
    param = np.ones(3)
    opt = fastopt.adamw([{"params": param}, {"params": [], "lr": 1.0}], backend=backend)
    opt.step([np.ones(3), []])
    assert np.all(param < 1)


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
def test_schedules_and_changes(backend):
    """A schedule sees the completed steps; setting the value by hand is the same."""
    by_schedule, by_hand = np.ones(5), np.ones(5)
    opt = fastopt.adam(by_schedule, lr=lambda n: 0.1 / (1 + n), backend=backend)
    other = fastopt.adam(by_hand, backend=backend)
    for n in range(4):
        opt.step(np.full(5, 0.5))
        other.lr = 0.1 / (1 + n)
        other.step(np.full(5, 0.5))
    assert same_bits(by_schedule, by_hand)
    opt.lr = 0.5
    assert opt.lr == 0.5


def test_any_hyperparameter_changes_the_next_step():
    for name, value in {
        "beta1": 0.5,
        "beta2": 0.5,
        "eps": 1.0,
        "weight_decay": 0.9,
    }.items():
        changed, unchanged = np.ones(3), np.ones(3)
        first, second = fastopt.adamw(changed, lr=0.1), fastopt.adamw(unchanged, lr=0.1)
        for opt in (first, second):
            opt.step(np.array([1.0, -2.0, 3.0]))
        setattr(first, name, value)
        for opt in (first, second):
            opt.step(np.array([-1.0, 2.0, 5.0]))
        assert not np.array_equal(changed, unchanged), name


def test_a_switch_can_be_flipped_during_a_run():
    """Momentum gets its buffer when it is first wanted, and keeps it."""
    param = np.ones(3)
    opt = fastopt.sgd(param, lr=0.1)
    opt.step(np.ones(3))
    assert opt.state == {}
    opt.momentum = 0.5
    opt.step(np.ones(3))
    assert list(opt.state) == ["momentum_buffer"]
    opt.momentum = 0.0
    opt.step(np.ones(3))
    assert list(opt.state) == ["momentum_buffer"]
    np.testing.assert_allclose(param, 0.7)


def test_grad_scale_is_a_product_before_the_rule():
    one, other = np.ones(3), np.ones(3)
    a, b = fastopt.adamw(one, lr=0.1), fastopt.adamw(other, lr=0.1)
    for _ in range(3):
        a.step(np.array([1.0, -2.0, 3.0]), grad_scale=-0.5)
        b.step(np.array([1.0, -2.0, 3.0]) * -0.5)
    assert same_bits(one, other)


def test_gradients_are_only_read():
    grad = np.ones(100)
    grad.flags.writeable = False
    fastopt.adamw(np.ones(100)).step(grad, grad_scale=0.5)
    assert np.all(grad == 1)


def test_a_copy_of_a_flat_buffer_holds_together():
    flat = fastopt.flatten({"w": np.ones((2, 3)), "b": [np.zeros(3)]})
    for again in (
        copy.copy(flat),
        copy.deepcopy(flat),
        pickle.loads(pickle.dumps(flat)),
    ):
        assert again.shapes == flat.shapes and np.array_equal(again.data, flat.data)
        again.data[:] = 7
        assert np.all(again["w"] == 7) and np.all(again["b"][0] == 7)
    assert np.all(flat["w"] == 1)
    assert "w" in flat and list(flat) == ["w", "b"]


def test_numbers_of_other_libraries():
    """Schedules of optax and others return arrays without dimensions."""
    params = np.ones(3), np.ones(3), np.ones(3)
    for param, lr in zip(params, (0.5, np.float32(0.5), np.asarray(0.5)), strict=True):
        opt = fastopt.gd(param, lr=lambda n, lr=lr: lr)
        opt.step(np.ones(3), grad_scale=np.float32(2))
        assert fastopt.gd(param, lr=lr).lr == 0.5
    assert all(np.all(param == 0) for param in params)


class SharesMemory:
    """Anything with ``__array_interface__``."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
def test_arrays_of_other_kinds(backend):
    plain, shared, view = np.ones(6), np.ones(6), np.ones(6)
    opts = [
        (fastopt.adam(plain, backend=backend), np.full(6, 3.0)),
        (
            fastopt.adam(SharesMemory(shared), backend=backend),
            SharesMemory(np.full(6, 3.0)),
        ),
        (
            fastopt.adam(view.view(np.matrix).reshape(6).A1, backend=backend),
            np.full(6, 3.0),
        ),
    ]
    for opt, grad in opts:
        opt.step(grad)
        opt.step(grad)
    assert same_bits(plain, shared) and same_bits(plain, view)


def test_jax_gradients_and_refused_jax_parameters():
    jnp = pytest.importorskip("jax.numpy", reason="JAX is an optional peer")
    param = np.ones(4, np.float32)
    fastopt.gd(param, lr=0.5).step(jnp.ones(4, jnp.float32))
    assert np.all(param == 0.5)
    with pytest.raises(ValueError, match="params is read-only"):
        fastopt.gd(jnp.ones(4, jnp.float32))


def test_a_memory_map_is_updated_in_its_file(tmp_path):
    path = tmp_path / "weights"
    mapped = np.memmap(path, np.float32, "w+", shape=(7,))
    mapped[:] = 1
    fastopt.gd(mapped, lr=0.5).step(np.ones(7, np.float32))
    mapped.flush()
    assert np.all(np.fromfile(path, np.float32) == 0.5)


# Saving and resuming ------------------------------------------------------------------


def trained(rule, values, dtype, steps, resume_at=None, backends=("cython", "cython")):
    rng = np.random.default_rng(7)
    params = {"a": nonzero(rng, 33, dtype), "b": [nonzero(rng, 5, dtype).reshape(5, 1)]}
    opt = rule(params, backend=backends[0], **values)
    before = {}
    for n in range(steps):
        if n == resume_at:
            saved = opt.state_dict()
            opt.step({"a": params["a"] * 0, "b": [None]}, grad_scale=0.0)  # goes astray
            params = {"a": before["a"], "b": [before["b"]]}
            opt = rule(params, backend=backends[1])
            opt.load_state_dict(saved)
        opt.step({"a": nonzero(rng, 33, dtype), "b": [nonzero(rng, 5, dtype)[:, None]]})
        before = {"a": params["a"].copy(), "b": params["b"][0].copy()}
    return [
        before["a"],
        before["b"],
        *(a for arrays in opt.state.values() for a in arrays),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "values"), CASES, ids=IDS)
def test_resume_is_exact(rule, values, dtype):
    """At any step, and on another backend than the one that saved."""
    expected = trained(rule, values, dtype, 6)
    for resume_at in (1, 4, 5):
        got = trained(rule, values, dtype, 6, resume_at)
        assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True))
    got = trained(rule, values, dtype, 6, 3, ("cython", "numpy"))
    assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("lost", ["steps", "a moment"])
def test_a_resume_that_forgets_is_caught(monkeypatch, lost):
    """The check above fails if the step count (a stale bias correction) or a buffer is
    not restored."""
    rule, values = next(case for case in CASES if case[0].name == "adamw")
    load = fastopt.Optimizer.load_state_dict

    def forgetful(self, saved):
        load(self, saved)
        if lost == "steps":
            self._bound.program.count[0] = 0
        else:
            self.state["m"][0][:] = 0

    expected = trained(rule, values, np.float64, 6)
    monkeypatch.setattr(fastopt.Optimizer, "load_state_dict", forgetful)
    with pytest.raises(AssertionError):
        got = trained(rule, values, np.float64, 6, 3)
        assert all(same_bits(a, b) for a, b in zip(expected, got, strict=True))


def test_a_saved_state_is_plain_and_separate():
    param = np.ones(3, np.float32)
    opt = fastopt.adamw(param, lr=lambda n: 0.1)
    opt.step(np.ones(3, np.float32))
    saved = opt.state_dict()
    assert "lr" not in saved["groups"][0]
    opt.step(np.ones(3, np.float32))
    assert saved["steps"] == 1 and not np.array_equal(
        saved["state"]["m"][0], opt.state["m"][0]
    )
    other = fastopt.adamw(param.copy(), lr=lambda n: 0.2)
    other.load_state_dict(saved)
    assert other.lr(0) == 0.2 and other.steps == 1
    with pytest.raises(ValueError, match="the state has no lr"):
        fastopt.adamw(param.copy()).load_state_dict(saved)


def change(saved, *path, to):
    *parents, last = path
    inner = saved
    for key in parents:
        inner = inner[key]
    inner[last] = to


BAD_STATES = {
    "not a dict": (lambda s: None, TypeError, "expected a state_dict"),
    "another version": (lambda s: change(s, "format", to=99), ValueError, "format 99"),
    "another rule": (
        lambda s: change(s, "rule", to="adam"),
        ValueError,
        "of rule 'adam'",
    ),
    "steps": (lambda s: change(s, "steps", to=-1), ValueError, 'state."steps".'),
    "groups": (lambda s: change(s, "groups", to=[]), ValueError, "has 0 groups"),
    "unknown hyperparameter": (
        lambda s: change(s, "groups", 0, "betas", to=1),
        TypeError,
        "'betas'",
    ),
    "bad value": (
        lambda s: change(s, "groups", 0, "lr", to=-1.0),
        ValueError,
        "lr must be",
    ),
    "buffers": (lambda s: change(s, "state", "x", to=[]), ValueError, "has buffers"),
    "number of arrays": (
        lambda s: change(s, "state", "m", to=[]),
        ValueError,
        "0 arrays for 2",
    ),
    "dtype": (
        lambda s: change(s, "state", "v", 1, to=np.ones(2)),
        TypeError,
        r'"v".*float32',
    ),
    "shape": (
        lambda s: change(s, "state", "v", 1, to=np.ones(3, np.float32)),
        ValueError,
        r'"v".*shape \(3,\)',
    ),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(case):
    spoil, error, message = BAD_STATES[case]
    opt = fastopt.adamw([np.ones(3, np.float32), np.ones(2, np.float32)], lr=0.5)
    opt.step([np.ones(3, np.float32), np.ones(2, np.float32)])
    before = opt.state_dict()
    saved = opt.state_dict()
    for arrays in saved["state"].values():
        arrays[0][:] = 7
    saved["steps"], saved["groups"][0]["lr"] = 5, 0.25
    spoil(saved)
    with pytest.raises(error, match=message):
        opt.load_state_dict(None if case == "not a dict" else saved)
    after = opt.state_dict()
    assert after["groups"] == before["groups"] and after["steps"] == before["steps"]
    assert all(
        same_bits(a, b)
        for name in before["state"]
        for a, b in zip(before["state"][name], after["state"][name], strict=True)
    )
    opt.step([np.ones(3, np.float32), np.ones(2, np.float32)])


def test_a_state_with_more_buffers_is_loaded():
    """Saved with momentum, loaded where it was off; and the other way round."""
    first, second = np.ones(3), np.ones(3)
    a, b = fastopt.sgd(first, momentum=0.9), fastopt.sgd(second)
    a.step(np.ones(3))
    second[:] = first
    b.load_state_dict(a.state_dict())
    a.step(np.ones(3))
    b.step(np.ones(3))
    assert b.momentum == 0.9 and same_bits(first, second)
    plain = fastopt.sgd(np.ones(3)).state_dict()
    a.load_state_dict(plain)
    assert a.momentum == 0 and a.state == {}


@pytest.mark.parametrize("rule", [fastopt.sgd, fastopt.rmsprop])
def test_resume_is_exact_where_more_was_switched_on(rule):
    """Buffers that the saved run did not have must not gather a history."""
    on = (
        {"momentum": 0.9}
        if rule is fastopt.sgd
        else {"momentum": 0.9, "centered": True}
    )
    first, grad = np.ones(3), np.array([1.0, -2.0, 3.0])
    a = rule(first, lr=0.1)
    a.step(grad)
    second = first.copy()
    b = rule(second, lr=0.1, **on)
    b.load_state_dict(a.state_dict())
    for opt in (a, b):
        opt.step(grad)
        opt.groups[0].update(on)
        opt.step(grad)
        opt.step(-grad)
    assert same_bits(first, second)


# A user's own rule ------------------------------------------------------------------


@needs_numba
def test_a_users_own_rule():
    from fastopt.rule import sign, where

    def scalars(t, lr=1e-4, beta1=0.9, beta2=0.99):
        return lr, 1 - beta1, 1 - beta2

    def lion(p, g, m, lr, a1, a2):
        u = sign(m + a1 * (g - m))
        return p - lr * where(u > g, u, -u), m + a2 * (g - m)

    mine = fastopt.Rule(lion, scalars, state=("m",))
    assert mine.name == "lion" and "beta1=0.9" in repr(mine)
    results = []
    for backend in ("numpy", "numba", None):
        rng = np.random.default_rng(0)
        param = nonzero(rng, 101, np.float32)
        opt = mine(param, lr=0.01, backend=backend)
        for _ in range(5):
            opt.step(nonzero(rng, 101, np.float32))
        results.append(param)
    assert opt.backend == "numba"
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@needs_numba
def test_a_users_rule_of_the_same_name_does_not_get_our_kernel():
    def update(p, g, m, v, step_size, a1, a2, eps, decay):
        return p - g, m, v

    mine = fastopt.Rule(update, fastopt.adamw.scalars, state=("m", "v"), name="adamw")
    param = np.ones(3)
    mine(param).step(np.ones(3))
    assert np.all(param == 0)


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_users_constants_take_the_dtype_on_every_backend(dtype):
    """Not only what scalars returns: numbers that a rule or helper finds by name."""
    results = []
    for backend in ("numpy", "numba"):
        param = nonzero(np.random.default_rng(1), 1001, dtype)
        mine = fastopt.Rule(with_globals, lambda t, lr=0.3: (lr,), name="mine")
        mine(param, backend=backend).step(
            nonzero(np.random.default_rng(2), 1001, dtype)
        )
        results.append(param)
    assert same_bits(*results)


THIRD, TENTH = 1 / 3, 0.1


def helper(x):
    return x * TENTH


def with_globals(p, g, lr):
    return (p - THIRD * TENTH * lr * helper(g),)


@needs_numba
def test_a_changed_global_is_seen(monkeypatch):
    for factor in (2.0, 3.0):
        monkeypatch.setitem(with_globals.__globals__, "THIRD", factor)
        monkeypatch.setitem(with_globals.__globals__, "TENTH", 1.0)
        param = np.zeros(3)
        mine = fastopt.Rule(with_globals, lambda t, lr=1.0: (lr,), name="mine")
        mine(param, backend="numba").step(np.ones(3))
        assert np.all(param == -factor)


# Costs and processes ----------------------------------------------------------------


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


def test_the_first_step_does_not_import_numba():
    done = python(
        "import sys, numpy, fastopt\n"
        "fastopt.adamw(numpy.ones(3)).step(numpy.ones(3))\n"
        "assert not {'numba', 'llvmlite', 'torch', 'rich'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ["baseline", "sse2", "SSE2", "nonsense"])
def test_FASTOPT_ISA(isa):
    if isa.lower() == "sse2" and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("a name of x86")
    done = python(
        "import numpy, fastopt\nfrom fastopt.backends import cython_cpu\n"
        "fastopt.adamw(numpy.ones(3), backend='cython')\n"
        "print(cython_cpu.kernels().ISA)",
        FASTOPT_ISA=isa,
    )
    if isa != "nonsense":
        assert done.stdout == "baseline\n", done.stderr
    else:
        assert "FASTOPT_ISA='nonsense' is not among" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    ("backend", "layer"), [("cython", ""), ("numba", "omp"), ("numba", "workqueue")]
)
def test_a_forked_child_steps_serially_with_the_same_bits(backend, layer):
    done = python(
        f"""
import os, signal, sys, numpy, fastopt
def run():
    p = numpy.linspace(-1, 1, 200_003)
    opt = fastopt.adamw(p, backend={backend!r}, threads=2)
    for _ in range(3):
        opt.step(numpy.cos(p))
    return p
parent = run()                      # the OpenMP threads exist now
child = os.fork()
if child == 0:
    signal.alarm(60)                # a hang ends as a failure
    os._exit(0 if numpy.array_equal(run(), parent) else 1)
_, status = os.waitpid(child, 0)
assert numpy.array_equal(run(), parent)
sys.exit(os.waitstatus_to_exitcode(status))
""",
        **({"NUMBA_THREADING_LAYER": layer} if layer else {}),
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="told by a flag of Linux's")
def test_an_import_after_a_fork_is_noticed():
    """As in a worker of multiprocessing whose parent's torch has started threads."""
    done = python("""
import os, sys
child = os.fork()
from fastopt.runtime import threads
if child == 0:
    os._exit(0 if threads.forked[0] else 1)
assert not threads.forked[0]
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
@pytest.mark.parametrize("backend", ["cython", "numba"])
def test_interrupts_leave_whole_steps(backend):
    """200 times Ctrl-C at any moment: a step is done or not, and the next one goes."""
    done = python(f"""
import signal, numpy as np, fastopt
def new(p):
    return fastopt.adamw([p[:5000], p[5000:]], lr=0.1, backend={backend!r})
def step(opt, p, g):
    opt.step([g[:5000], g[5000:]])
g = np.linspace(-1, 1, 10_000)
p, q = np.ones(10_000), np.ones(10_000)
opt, reference = new(p), new(q)
step(opt, p, g); step(reference, q, g)
count = 0
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
while count < 200:
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + 1e-6 * (count % 50))
        for _ in range(100):
            step(opt, p, g)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        count += 1
    while reference.steps < opt.steps:
        step(reference, q, g)
    assert np.array_equal(p, q), count
    for name in opt.state:
        assert all(map(np.array_equal, opt.state[name], reference.state[name])), count
step(opt, p, g)
""")
    assert done.returncode == 0, done.stderr


def test_omp_num_threads_and_affinity_limit_the_threads():
    code = "from fastopt.runtime import threads; print(threads.available())"
    assert python(code, OMP_NUM_THREADS="1").stdout == "1\n"
    if hasattr(os, "sched_setaffinity"):
        pinned = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        assert python(pinned + code, OMP_NUM_THREADS="").stdout == "1\n"


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
def test_gradients_that_change_the_optimizer_are_refused(backend):
    """Their structure may be anybody's code; a step goes by one state of affairs."""
    if backend == "cython" and cython_cpu.missing():
        pytest.skip(cython_cpu.missing())

    class Meddling(dict):
        def __init__(self, meddle):
            super().__init__(w=np.ones(3))
            self.meddle = meddle

        def keys(self):
            self.meddle()
            return super().keys()

    param = np.ones(3)
    opt = fastopt.sgd({"w": param}, lr=0.5, backend=backend)
    saved = opt.state_dict()
    for meddle in (
        lambda: setattr(opt, "momentum", 0.9),
        lambda: setattr(opt, "lr", 0.0),
        lambda: opt.load_state_dict(saved),
        lambda: opt.step({"w": np.ones(3)}),
    ):
        with pytest.raises(RuntimeError, match="is in a step"):
            opt.step(Meddling(meddle))
        assert opt.steps == 0 and param.tolist() == [1, 1, 1]
    opt.step({"w": np.ones(3)})
    assert opt.steps == 1 and param.tolist() == [0.5, 0.5, 0.5]
