"""Every number of every rule at 0, where a schedule may bring it: every CPU backend,
the classes of torch beside torch's own, and traced values in JAX."""

import functools
from typing import Any

import numpy as np
import pytest

import fastopt

# Refused at 0, in words, before anything is written: the formula divides by it, takes a
# logarithm of it, or is another one there.
REFUSED = {
    "adamc": {"max_lr"},
    "dadapt_adam": {"d0"},
    "dog": {"reps_rel"},
    "ftrl": {"initial_accumulator_value"},
    "prodigy": {"d0", "d_coef"},
    "rprop": {"eta_plus", "step_max"},
    "schedule_free_sgd": {"momentum"},
    "schedule_free_adamw": {"beta1"},
    "schedule_free_radam": {"beta1"},
    "sophia_g": {"bs"},
}
# What is left of a step at lr 0, by the papers' formulas.
MOVES = {
    "rprop": "lr is the first step alone, and no step is shorter than step_min",
    "laprop": "the momentum holds the learning rates of the steps before",
    "madgrad": "the parameters go on to the point that the sums of before say",
    "dadapt_adam": "the momentum holds the learning rates of the steps before",
    "schedule_free_sgd": "what is trained goes on to z by the largest lr so far",
    "schedule_free_adamw": "what is trained goes on to z by the largest lr so far",
    "schedule_free_radam": "what is trained goes on to z by the largest lr so far",
}
SHAPE = (3, 5)


@functools.cache
def arrays(count=6):
    rng = np.random.default_rng(3)
    return [rng.normal(size=SHAPE) for _ in range(count)]


def keys(rule):
    """The numbers among the hyperparameters."""
    defaults = rule.hyperparameters.items()
    return [key for key, default in defaults if not isinstance(default, bool)]


def usual(rule):
    """All of them off their limits."""
    # From 0 on, these are switched on.
    there = {"weight_decay": 0.1, "momentum": 0.5, "lr": 0.05, "max_lr": 0.05}
    given = {key: there[key] for key in keys(rule) if key in there}
    if rule.name == "schedule_free_radam":
        given["silent_sgd_phase"] = False  # in which there is no step
    return given


def at(number, key, value):
    """What holds at a step: the limit at 2 and 3 of 5."""
    return 0.0 if number in (2, 3) else value


@functools.cache
def run(rule, key, backend):
    """Parameters after each step, and state: (after the first, ..., after the last)."""
    first, *grads = arrays()
    w, seen = first.astype(np.float32), []
    given: dict[str, Any] = usual(rule)
    value = given.get(key, rule.hyperparameters[key])
    given[key] = lambda n: at(n, key, value)
    opt = rule(w, backend=backend, **given)
    for grad in grads:
        opt.step(grad.astype(np.float32))
        state = [a[0].copy() for a in opt.state.values()]
        seen.append([w.copy(), *state])
    return seen


@pytest.mark.parametrize("backend", ["numpy", "cython", "numba"])
@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_backends(rule, backend):
    for key in keys(rule):
        if key in REFUSED.get(rule.name, ()):
            with pytest.raises(ValueError, match=key):
                rule(np.ones(3), **{key: 0.0})
            w = np.ones(3)
            opt = rule(w, backend=backend)
            with pytest.raises(ValueError, match=key):
                setattr(opt, key, 0.0)
            continue
        seen, expected = run(rule, key, backend), run(rule, key, "numpy")
        for ours, reference in zip(seen, expected, strict=True):
            for a, b in zip(ours, reference, strict=True):
                assert np.isfinite(a).all(), key
                assert a.tobytes() == b.tobytes(), key
        before, after = seen[1][0], seen[3][0]
        assert not np.array_equal(seen[3][0], seen[4][0]), key
        if key == "lr":
            assert np.array_equal(before, after) == (rule.name not in MOVES)


@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_a_first_step_at_lr_zero_moves_nothing(rule):
    """But Rprop's, whose least step is not 0."""
    w = arrays()[0].copy()
    if "lr" not in rule.hyperparameters:
        return
    opt = rule(w, lr=lambda n: 0.0, **({"max_lr": 1.0} if rule.name == "adamc" else {}))
    opt.step(arrays()[1])
    step = 1e-6 if rule.name == "rprop" else 0.0
    np.testing.assert_allclose(
        w, arrays()[0] - step * np.sign(arrays()[1]), rtol=0, atol=1e-15
    )


# torch ------------------------------------------------------------------------------


def classes():
    try:
        import fastopt.torch as ft
    except ImportError:
        return []
    made = {name: getattr(ft, name) for name in ft.__all__}
    return sorted(n for n, of in made.items() if isinstance(of, type) and n != "Muon")


def numbers(group):
    """Places of numbers in a group of torch's: a key, and which of a tuple."""
    for key, value in group.items():
        if key in ("clip_norm", "clip_value", "params"):
            continue
        if isinstance(value, tuple):
            yield from ((key, i) for i, part in enumerate(value) if part is not None)
        elif isinstance(value, float | int) and not isinstance(value, bool):
            yield key, None


# Refused here in words; in torch a ZeroDivisionError, or what its constructor refuses.
REFUSED_IN_TORCH = {("Adafactor", "d", None), ("Rprop", "etas", 1)}
REFUSED_IN_TORCH |= {("Rprop", "step_sizes", 1)}


def put(group, key, place, value):
    if place is None:
        group[key] = value
    else:
        parts = list(group[key])
        parts[place] = value
        group[key] = tuple(parts)


def steps_of_torch(kind, key, place, options):
    """After each step the parameter, or the error that refuses it; as ``run``."""
    import torch

    first, *grads = arrays()
    w, seen = torch.nn.Parameter(torch.from_numpy(first.copy())), []
    opt = kind([w], **options)
    group = opt.param_groups[0]
    value = group[key] if place is None else group[key][place]
    for number, grad in enumerate(grads):
        put(group, key, place, at(number, key, value))
        w.grad = torch.from_numpy(grad.copy())
        try:
            opt.step()
        except ValueError as error:
            return str(error)
        seen.append(w.detach().numpy().copy())
    return seen


@pytest.mark.usefixtures("numbers_in_float64")
@pytest.mark.parametrize("name", classes())
def test_torch(name):
    import torch

    import fastopt.torch as ft

    ours, theirs = getattr(ft, name), getattr(torch.optim, name, None)
    probe = ours([torch.nn.Parameter(torch.ones(3))]).param_groups[0]
    options = {key: v for key, v in {"momentum": 0.5}.items() if key in probe}
    options |= {"weight_decay": 0.1} if "weight_decay" in probe else {}
    options |= {"silent_sgd_phase": False} if "silent_sgd_phase" in probe else {}
    for key, place in list(numbers(probe)):
        if name == "SGDW" and key == "momentum":
            # As torch's, which leaves the buffer alone then; the core's goes on.
            options, theirs = {**options, "weight_decay": 0.0}, torch.optim.SGD
        seen = steps_of_torch(ours, key, place, options)
        if (name, key, place) in REFUSED_IN_TORCH:
            assert isinstance(seen, str) and "must be" in seen
            continue
        if (name, key, place) == ("Rprop", "etas", 0):  # torch takes 0 for no change
            expected = in_the_core(fastopt.rprop, "eta_minus", options)
        elif theirs is not None:
            expected = steps_of_torch(theirs, key, place, options)
        else:
            rule = ours.rule
            pairs = {v: k for k, v in PAIRS().items() if k in rule.hyperparameters}
            in_core = key if place is None else pairs[key, place]
            if in_core in REFUSED.get(rule.name, ()):
                assert isinstance(seen, str) and in_core in seen
                continue
            expected = in_the_core(rule, in_core, options)
        assert not isinstance(seen, str), (key, seen)
        for a, b in zip(seen, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13, err_msg=key)
        if key == "lr":
            stays = name.lower() not in {n.replace("_", "") for n in MOVES}
            begin = 2 if name == "ASGD" else 1  # as torch's, a step later
            assert np.array_equal(seen[begin], seen[3]) == stays


def PAIRS():
    from fastopt.torch.arguments import PAIRS

    return PAIRS


def in_the_core(rule, key, options):
    first, *grads = arrays()
    w, seen = first.copy(), []
    value = options.get(key, rule.hyperparameters[key])
    opt = rule(w, backend="numpy", **{**options, key: lambda n: at(n, key, value)})
    for grad in grads:
        opt.step(grad)
        seen.append(w.copy())
    return seen


# JAX --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", fastopt.RULES, ids=lambda rule: rule.name)
def test_jax_traced(rule):
    """The bits of the core, of values that are known when it runs alone."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    import fastopt.jax as fj

    given = usual(rule)
    selected = {k: v for k, v in given.items() if k in fj.selecting(rule)}
    opt = fj.optimizer(rule, **selected)
    traced = [key for key in keys(rule) if key not in fj.selecting(rule)]
    step = jax.jit(opt.step)
    first, *grads = (array.astype(np.float32) for array in arrays())
    values = {key: given.get(key, rule.hyperparameters[key]) for key in traced}
    for key in traced:
        refused = key in REFUSED.get(rule.name, ())
        params, state = first, fj.optimizer(rule, **given).init(first)
        for number, grad in enumerate(grads):
            now = {**values, key: at(number, key, values[key])}
            now = {name: fj.exact(value) for name, value in now.items()}
            if refused and number == 2:
                words = f"{rule.name}: a hyperparameter is out of its range"
                with pytest.raises((ValueError, RuntimeError), match=words):
                    jax.block_until_ready(step(params, grad, state, **now))
                break
            params, state = step(params, grad, state, **now)
            if not refused:
                expected = run(rule, key, "numpy")[number][0]
                assert np.asarray(params).tobytes() == expected.tobytes(), key
