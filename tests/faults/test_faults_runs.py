"""Steps beside other threads, and runs that are saved and resumed."""

import copy
import pickle
import random
import threading

import numpy as np
import pytest
from cases import CASES, DTYPES, alike, label, nonzero, same_bits
from installed import BACKENDS

import fastopt

# Races --------------------------------------------------------------------------------


def race(backend, make, seed, steps):
    """Threads step one optimizer, change its lr, save it and load. Each is whole, or
    refused because another one is at work: what all steps have done together is what as
    many do one after the other."""
    rng = np.random.default_rng(seed)
    start = [nonzero(rng, n, np.float32) for n in (500, 3)]
    params = [p.copy() for p in start]
    opt = make(params, lr=0.01, backend=backend, threads=2)
    grads = [np.full_like(p, 0.25) for p in params]
    done, refused, wrong, saved = [], [], [], []
    begin = threading.Barrier(4)

    def attempts(action, count):
        begin.wait()
        for _ in range(count):
            try:
                done.append(action())
            except RuntimeError as error:
                (refused if "is in a step" in str(error) else wrong).append(error)
            except BaseException as error:
                wrong.append(error)

    def step():
        opt.step(grads)
        return "step"

    def change():
        opt.lr = 0.01

    def save():
        saved.append(opt.state_dict())

    actions = [(step, steps), (step, steps), (change, steps), (save, steps // 4)]
    threads = [threading.Thread(target=attempts, args=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    assert not wrong, wrong[:3]
    assert opt.steps == done.count("step")

    # The same number of steps, alone; and what was saved is of some whole step of it.
    alone = [p.copy() for p in start]
    other = make(alone, lr=0.01, backend=backend)
    states = {other.steps: other.state_dict()}
    for _ in range(opt.steps):
        other.step(grads)
        states[other.steps] = other.state_dict()
    assert all(map(same_bits, params, alone)), "a step was torn"
    for state in saved:
        assert alike(state, states[state["steps"]]), "what was saved was torn"


def test_races(campaign):
    makes = [fastopt.adamw, fastopt.lamb, fastopt.prodigy, fastopt.sgd]
    for backend in BACKENDS:
        for make in makes:
            for seed in range(25 if campaign.long else 1):
                what = backend, make.name, seed
                campaign.attempt(what, race, backend, make, seed, 40)


def race_of_tensors(kind, seed):
    """The same of torch's classes, where a step waits for the one before."""
    import torch

    torch.manual_seed(seed)
    start = [torch.randn(500), torch.randn(3)]
    grads = [torch.randn(500), torch.randn(3)]
    found = []
    for count, threads in ((15, 3), (45, 1)):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        opt, wrong = kind(params, lr=0.01), []

        def steps(opt=opt, wrong=wrong, count=count):
            try:
                for _ in range(count):
                    opt.step()
                    opt.state_dict()
                    opt.param_groups[0]["lr"] = 0.01
            except BaseException as error:
                wrong.append(error)

        running = [threading.Thread(target=steps) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(120)
            assert not thread.is_alive(), "a thread hangs"
        assert not wrong, wrong[:3]
        states = [v for s in opt.state.values() for v in s.values()]
        found.append([p.detach() for p in params] + states)
    assert all(map(torch.equal, *found)), "a step was torn"


def test_races_of_tensors(campaign):
    pytest.importorskip("torch", reason="torch is not installed")
    import fastopt.torch as ft

    for kind in (ft.AdamW, ft.SGD, ft.Lion, ft.LAMB):
        for seed in range(25 if campaign.long else 1):
            campaign.attempt((kind.__name__, seed), race_of_tensors, kind, seed)


# Resumes ------------------------------------------------------------------------------


def history(rng, rule, length):
    """What is done to an optimizer, drawn at random: names of actions, and numbers."""
    actions = ["step"] * 6 + ["skip", "lr", "scaled", "clipped", "accumulate", "frozen"]
    if rule.estimate is not None:
        actions.append("estimate")
    return [(rng.choice(actions), rng.random()) for _ in range(length)]


def play(opt, params, actions, offset):
    """Do these; the gradients depend on the parameters and on the place alone."""
    for place, (action, number) in enumerate(actions, offset):
        factor = params[0].dtype.type(0.5 + place % 7)
        grads = [p * factor + params[0].dtype.type(number) for p in params]
        if action == "step":
            opt.step(grads)
        elif action == "skip":
            opt.step([None, *grads[1:]])
        elif action == "lr":
            opt.lr = 0.001 + number / 50
        elif action == "scaled":
            opt.step(grads, grad_scale=number)
        elif action == "clipped":
            opt.step(grads, clip_norm=0.5 + number, clip_value=0.4)
        elif action == "accumulate":
            opt.accumulate(grads, grad_scale=0.5)
            if number < 0.7:
                opt.step()
            else:
                opt.drop_accumulated()
        elif action == "frozen":
            opt.groups[0].frozen = not opt.groups[0].frozen
        elif action == "estimate":
            opt.estimate(grads)


def resumed(rng, rule, values, dtype, backends):
    """A history in one go, and in pieces: at some places all is saved, and a new
    optimizer, on another backend maybe, goes on in its place."""
    seed, length = rng.random(), rng.randrange(3, 25)
    draw = random.Random(seed)
    actions = history(draw, rule, length)
    cuts = sorted({rng.randrange(length) for _ in range(3)})
    start = [nonzero(np.random.default_rng(length), n, dtype) for n in (67, 1, 0)]
    ema = rng.choice((None, 0.9))

    whole = [p.copy() for p in start]
    expected = rule(whole, ema=ema, backend=backends[0], **values)
    play(expected, whole, actions, 0)

    params = [p.copy() for p in start]
    opt = rule(params, ema=ema, backend=backends[0], **values)
    at = 0
    for cut in [*cuts, length]:
        play(opt, params, actions[at:cut], at)
        at = cut
        saved = pickle.loads(pickle.dumps(copy.deepcopy(opt.state_dict())))
        params = [p.copy() for p in params]
        opt = rule(params, ema=ema, backend=rng.choice(backends), **values)
        opt.load_state_dict(saved)
        assert alike(opt.state_dict(), saved), "a loaded state is another one"
    assert all(map(same_bits, whole, params)), "other parameters after it was resumed"
    assert alike(expected.state_dict(), opt.state_dict()), "another state"


def test_resumes(campaign):
    rng = random.Random(0)
    backends = BACKENDS if campaign.long else [b for b in BACKENDS if b != "numba"]
    for rule, values in CASES[:: 1 if campaign.long else 5]:
        for dtype in DTYPES:
            for _ in range(10 if campaign.long else 1):
                what = label(rule, values), dtype.__name__
                campaign.attempt(what, resumed, rng, rule, values, dtype, backends)
