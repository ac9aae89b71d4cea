"""Calls of ``fastopt.torch`` in the midst of others: in one thread, in several, and in
a fork. None waits for what cannot come. Each runs in a process of its own, which is
ended if it hangs."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch", reason="torch is not installed")

MOST_SECONDS = 120

BEGIN = """
import os, signal, sys, threading, time
import torch
import fastopt.torch as ft

def made(kind="AdamW", size=1000, **options):
    param = torch.nn.Parameter(torch.ones(size))
    param.grad = torch.ones(size)
    return param, getattr(ft, kind)([param], lr=0.01, **options)
"""


def run(*code):
    """What a program prints."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", BEGIN + "".join(map(textwrap.dedent, code))],
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise AssertionError("it hangs") from None
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_timers = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs POSIX timers and forks"
)

ACTIONS = """
import copy, random

ACTIONS = {
    "step": lambda: opt.step(),
    "step_param": lambda: opt.step_param(param),
    "state_dict": lambda: opt.state_dict(),
    "load_state_dict": lambda: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
    "add_param_group": lambda: opt.add_param_group({"params": [torch.ones(2)]}),
    "eval_params": lambda: opt.eval_params(),
    "ema_params": lambda: opt.ema_params(),
    "estimate": lambda: opt.estimate(),
}
KINDS = {"estimate": "SophiaG", "eval_params": "ScheduleFreeAdamW"}
"""


@needs_timers
def test_a_signal_handler_in_a_step():
    """It is served, as by torch's: what steps in it is counted, and no step is lost."""
    seen = run(
        ACTIONS,
        """
    def soon():
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-4))

    def handler(*_):
        global calls
        calls += 1
        ACTIONS[inner]()
        if calls < 50:
            soon()

    signal.signal(signal.SIGALRM, handler)
    for outer in ("step", "step_param"):
        for inner in ACTIONS:
            param, opt = made(KINDS.get(inner, "AdamW"), ema=0.9)
            opt.step()
            calls, steps = 0, 1
            soon()
            while calls < 50:
                ACTIONS[outer]()
                steps += 1
            steps += calls if inner.startswith("step") else 0
            print(steps - int(opt.state[param]["step"]))
    """,
    )
    assert seen == ["0"] * 16


def test_steps_within_closures_and_hooks_of_a_step():
    assert run("""
    param, opt = made()
    nested = [0]

    def inside(*_):
        if nested[0] < 6:
            nested[0] += 1
            opt.step()
            opt.load_state_dict(opt.state_dict())
            opt.step_param(param)

    opt.register_step_pre_hook(inside)
    opt.register_step_post_hook(inside)
    opt.register_state_dict_pre_hook(inside)
    opt.register_state_dict_post_hook(inside)
    opt.register_load_state_dict_pre_hook(inside)
    opt.register_load_state_dict_post_hook(inside)
    param.register_hook(inside)

    def closure():
        inside()
        (param * param.detach()).sum().backward()
        return 1.0

    opt.step(closure)
    print(int(opt.state[param]["step"]))
    """) == ["13"]


def test_steps_of_gradscaler_within_a_step():
    """And of a hook of a backward pass, which steps each parameter alone."""
    assert run("""
    param, opt = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def closure():
        scaler.scale((param * param.detach()).sum()).backward()
        scaler.step(opt)
        scaler.update()

    opt.step(closure)
    handle = ft.release_gradients_(opt)
    opt.step(lambda: (param * param.detach()).sum().backward())
    print(int(opt.state[param]["step"]))
    """) == ["3"]


def test_threads_that_save_load_and_grow_while_another_steps():
    assert run("""
    import copy
    sys.setswitchinterval(1e-5)
    param, opt = made("ScheduleFreeAdamW", ema=0.9)
    opt.step()
    saved, errors, over = copy.deepcopy(opt.state_dict()), [], threading.Event()

    def repeat(action):
        try:
            while not over.is_set():
                action()
        except BaseException as error:
            errors.append(repr(error))

    def add():
        if len(opt.param_groups) < 50:
            more = torch.nn.Parameter(torch.ones(3))
            more.grad = torch.ones(3)
            opt.add_param_group({"params": [more]})

    actions = [
        opt.step, add, opt.state_dict, opt.eval_params, opt.ema_params,
        lambda: opt.step_param(param),
    ]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    over.set()
    for thread in threads:
        thread.join()
    print(errors, len(opt.param_groups))
    """) == ["[]", "50"]


FORK = """
param, opt = made(size=3_000_000)
opt.step()
before = threading.Event()

def steps():
    while True:
        ACTION
        before.set()

thread = threading.Thread(target=steps, daemon=True)
thread.start()
before.wait()
codes = []
for k in range(10):
    time.sleep(0.001 * k)
    child = os.fork()
    if not child:
        count = opt.state[param]["step"].item()
        opt.step()
        opt.step_param(param)
        opt.state_dict()
        os._exit(0 if opt.state[param]["step"].item() == count + 2 else 1)
    until = time.monotonic() + 30
    while True:
        done, code = os.waitpid(child, os.WNOHANG)
        if done or time.monotonic() > until:
            break
        time.sleep(0.01)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        code = "hangs"
        codes.append(code)
        break
    codes.append(code)
print(*codes)
sys.stdout.flush()
os._exit(0)
"""


@needs_timers
@pytest.mark.parametrize("action", ["opt.step()", "opt.step_param(param)"])
def test_a_fork_while_another_thread_steps(action):
    assert run(FORK.replace("ACTION", action)) == ["0"] * 10


@needs_timers
def test_a_fork_in_a_signal_handler_in_a_step():
    """The child ends the interrupted step, and threads of its own can step."""
    codes = run("""
    param, opt = made()
    opt.step()
    parent, children = os.getpid(), []

    def soon():
        signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.00002 * len(children))

    def handler(*_):
        child = os.fork()
        if child:
            children.append(child)
            # A machine under load may get no further than to the next alarm.
            if len(children) < 10:
                soon()

    signal.signal(signal.SIGALRM, handler)
    soon()
    while len(children) < 10 and os.getpid() == parent:
        opt.step()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if os.getpid() != parent:
        count = opt.state[param]["step"].item()
        opt.step()
        thread = threading.Thread(target=opt.step)
        thread.start()
        thread.join()
        os._exit(0 if opt.state[param]["step"].item() == count + 2 else 1)
    print(*(os.waitpid(child, 0)[1] for child in children))
    """)
    assert len(codes) >= 10 and set(codes) == {"0"}
