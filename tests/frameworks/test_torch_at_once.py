"""Threads that step optimizers of torch's kind at once, with the GIL and without it."""

import contextlib
import threading

import pytest

torch = pytest.importorskip("torch")

from at_once import at_once, repeated  # noqa: E402

import fastopt.torch  # noqa: E402

SIZES = (1000, 3, 1, 257)


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def trained(seed, steps=30):
    """Step one optimizer in several ways, and return all its numbers."""
    params = parameters(seed)
    kind = (fastopt.torch.AdamW, fastopt.torch.Lion, fastopt.torch.SGD)[seed % 3]
    opt = kind(params, lr=0.01, weight_decay=0.02, ema=0.9)
    for step in range(steps):
        set_gradients(params, 1000 * seed + step)
        opt.param_groups[0]["lr"] = 0.01 / (1 + step % 4)
        if step % 7 == 3:
            opt.load_state_dict(opt.state_dict())
        opt.step(**({"clip_norm": 1.0} if step % 5 == 2 else {}))
    tensors = [
        v for of in opt.state.values() for v in of.values() if torch.is_tensor(v)
    ]
    return [tensor.detach().clone() for tensor in (*params, *tensors)]


def all_equal(first, second):
    return all(map(torch.equal, first, second)) and len(first) == len(second)


@pytest.mark.parametrize("count", [2, 8])
def test_optimizers_at_once_have_the_bits_of_one_after_the_other(count):
    alone, together = [trained(seed) for seed in range(count)], {}

    def train(seed):
        together[seed] = trained(seed)

    at_once(*[lambda seed=seed: train(seed) for seed in range(count)])
    assert all(all_equal(alone[seed], together[seed]) for seed in range(count))


def test_steps_of_one_optimizer_are_whole():
    """They wait for each other, as they do with the GIL."""
    params, alone = parameters(1), parameters(1)
    opt, other = (fastopt.torch.AdamW(of, lr=0.01, threads=1) for of in (params, alone))
    counts = []
    for of in (params, alone):
        set_gradients(of, 2)

    def step():
        done = 0

        def once():
            nonlocal done
            opt.step()
            done += 1

        repeated(once)()
        counts.append(done)

    at_once(*[step] * 4, repeated(lambda: opt.param_groups[0].update(lr=0.01)))
    for _ in range(sum(counts)):
        other.step()
    assert all_equal(params, alone)


def test_groups_and_state_that_change_meanwhile():
    """Another thread puts other lists, options and gradients in their places. A step
    takes what was there at some moment."""
    params, spare = parameters(1), parameters(1)
    opt = fastopt.torch.SGD(params, lr=1.0, threads=1)
    for param in params:
        param.grad = torch.ones_like(param)
    group, stop, start = opt.param_groups[0], threading.Event(), parameters(1)

    def change():
        numbers = iter(range(10**9))
        while not stop.is_set():
            number = next(numbers)
            group["note"] = number
            group["params"] = list(params)
            group["params"].append(spare[0])
            del group["params"][-1]
            group.pop("note")
            opt.state[spare[0]] = {"kept": number}
            opt.state.pop(spare[0], None)
            params[number % 4].grad = torch.ones_like(params[number % 4])

    def steps():
        # A list that changes while torch or we walk over it in Python is refused.
        with contextlib.suppress(RuntimeError, KeyError):
            opt.step()

    def stepping():
        repeated(steps)()
        stop.set()

    at_once(stepping, change)
    for param, first in zip(params, start, strict=True):
        moved = (first - param).detach()
        assert torch.isfinite(param).all() and (moved > 0).all()
