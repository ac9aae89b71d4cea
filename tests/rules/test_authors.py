"""The authors' own code agrees, or a package's that follows it, where torch has no rule
by this definition: every option, 200 steps in float64, to a relative 1e-10.

docs/parity.md says what each rule was compared with.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
from peers import difference, draw, falling, told

import fastopt

torch = pytest.importorskip("torch", reason="torch is an optional peer")
pytestmark = pytest.mark.usefixtures("numbers_in_float64")


class Case(NamedTuple):
    """Their class and the options of both, by their names."""

    path: str
    both: dict
    switches: dict = {}  # values to try in every combination; weight decay always is
    theirs: dict = {}  # what only they are told
    ours: dict = {}


TIMM, KOZISTR = "timm_optim", "pytorch_optimizer"
ADAM = {"lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-3}
LION = {"lr": 0.01, "betas": (0.8, 0.97)}
AVERAGED = {"r": (0.0, 0.7), "weight_lr_power": (2.0, 1.5)}
CASES = {
    "sgdw": Case(
        f"{TIMM}.sgdw.SGDW",
        {"lr": 0.1},
        {"momentum": (0.0, 0.8), "dampening": (0.0, 0.3), "nesterov": (False, True)},
    ),
    "tiger": Case(f"{KOZISTR}.Tiger", {"lr": 0.01, "beta": 0.9}),
    "lion": Case("lion_pytorch.Lion", LION),
    "qhadam": Case("qhoptim.pyt.QHAdam", ADAM, {"nus": ((1.0, 1.0), (0.7, 0.9))}),
    "adabelief": Case(
        "adabelief_pytorch.AdaBelief",
        ADAM | {"eps": 1e-6},
        {"rectify": (False, True)},
        {"print_change_log": False},
    ),
    "yogi": Case(
        f"{KOZISTR}.Yogi",
        ADAM,
        theirs={"initial_accumulator": 0.1, "weight_decouple": False},
        ours={"initial_accumulator_value": 0.1},
    ),
    "laprop": Case(f"{TIMM}.laprop.LaProp", ADAM),
    # timm's own exponent of the bound is another than the authors'.
    "adopt": Case(f"{TIMM}.adopt.Adopt", ADAM, theirs={"clip_exp": 0.25}),
    "adan": Case(
        f"{TIMM}.adan.Adan",
        ADAM | {"betas": (0.8, 0.7, 0.97)},
        {"no_prox": (False, True)},
    ),
    "madgrad": Case(
        "madgrad.MADGRAD", {"lr": 0.01, "eps": 1e-3}, {"momentum": (0.0, 0.8)}
    ),
    # With this rho some elements are clipped and some are not.
    "sophia_g": Case("sophia_opt.SophiaG", LION | {"rho": 2e-4}),
    # Theirs takes the first lr for the largest.
    "adamc": Case(
        f"{TIMM}.adamw.AdamWLegacy",
        ADAM,
        theirs={"corrected_weight_decay": True},
        ours={"max_lr": ADAM["lr"]},
    ),
    "cautious_decay_adamw": Case(
        "adv_optm.AdamW_adv", ADAM, theirs={"cautious_wd": True}
    ),
    "schedule_free_sgd": Case(
        "schedulefree.SGDScheduleFree",
        {"lr": 0.1, "momentum": 0.8},
        AVERAGED | {"warmup_steps": (0, 20)},
    ),
    "schedule_free_adamw": Case(
        "schedulefree.AdamWScheduleFree", ADAM, AVERAGED | {"warmup_steps": (0, 20)}
    ),
    "schedule_free_radam": Case(
        "schedulefree.RAdamScheduleFree",
        ADAM,
        AVERAGED | {"silent_sgd_phase": (False, True)},
    ),
    "lars": Case(
        f"{TIMM}.lars.Lars",
        {"lr": 1.0, "momentum": 0.8, "trust_coeff": 0.01, "eps": 1e-3},
        {"always_adapt": (False, True)},
    ),
    "lamb": Case(
        f"{TIMM}.lamb.Lamb",
        ADAM,
        {"always_adapt": (False, True)},
        {"max_grad_norm": None},
    ),
    "novograd": Case(
        f"{TIMM}.nvnovograd.NvNovoGrad", ADAM, {"grad_averaging": (False, True)}
    ),
    "stable_adamw": Case("optimi.StableAdamW", ADAM),
    "cautious_adamw": Case(f"{TIMM}.adamw.AdamWLegacy", ADAM, theirs={"caution": True}),
    "cautious_lion": Case(f"{KOZISTR}.Lion", LION, theirs={"cautious": True}),
    # Theirs begins with the gradient itself, which clipping to 1 makes the same.
    "mars": Case(
        f"{TIMM}.mars.Mars", ADAM | {"gamma": 0.05}, theirs={"optimize_1d": True}
    ),
    "dog": Case("dog.DoG", {"lr": 0.7, "reps_rel": 1e-2, "eps": 1e-3}),
    "dadapt_adam": Case(
        "dadaptation.DAdaptAdam",
        ADAM | {"lr": 0.7, "d0": 1e-3},
        {"use_bias_correction": (False, True)},
        {"decouple": True},
    ),
    "prodigy": Case(
        "prodigyopt.Prodigy",
        ADAM | {"lr": 0.7, "d0": 1e-3},
        {
            "d_coef": (1.0, 2.0),
            "use_bias_correction": (False, True),
            "safeguard_warmup": (False, True),
        },
    ),
}
PARTS = {"betas": ("beta1", "beta2", "beta3"), "nus": ("nu1", "nu2")}


def combinations():
    """Every choice of the switches, less those that the rule refuses: the rule, its
    hyperparameters, their class and its options."""
    for name, case in CASES.items():
        rule = getattr(fastopt, name)
        switches = case.switches | {"weight_decay": (0.0, 0.1)}
        for values in itertools.product(*switches.values()):
            chosen = dict(zip(switches, values, strict=True))
            options = case.both | chosen | case.ours
            for pair, parts in PARTS.items():
                options |= zip(parts, options.get(pair, ()), strict=False)
            ours = {n: v for n, v in options.items() if n in rule.hyperparameters}
            try:
                rule.scalars(1, *rule.first_carry(ours), **ours)
            except ValueError:
                continue
            on = [n for n, value in chosen.items() if value != switches[n][0]]
            theirs = case.both | chosen | case.theirs
            yield pytest.param(rule, ours, case.path, theirs, id="-".join([name, *on]))


def their(path):
    """A class by its full name."""
    package, _, name = path.rpartition(".")
    if package.startswith(TIMM) and TIMM not in sys.modules:
        # All of timm needs torchvision, its optimizers torch alone.
        timm = importlib.util.find_spec("timm")
        if timm is None:
            pytest.skip("timm is an optional peer")
        sys.modules[TIMM] = types.ModuleType(TIMM)
        sys.modules[TIMM].__path__ = [str(Path(timm.origin).parent / "optim")]
    reason = f"{package} is an optional peer"
    return getattr(pytest.importorskip(package, reason=reason), name)


def follow(path, options):
    """The parameters after each of their steps."""
    params, steps = draw()
    tensors = [torch.nn.Parameter(torch.tensor(p)) for p in params]
    opt = their(path)(tensors, **options)
    if hasattr(opt, "train"):  # those without a schedule
        opt.train()

    def give(grads):
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)

    for t, grads in enumerate(steps):
        opt.param_groups[0]["lr"] = falling(options["lr"], t)
        if hasattr(opt, "update_hessian") and t % 10 == 0:
            give(steps[t - 1])
            opt.update_hessian()
        give(grads)
        opt.step()
        yield [tensor.detach().numpy() for tensor in tensors]


@pytest.mark.parametrize(("rule", "values", "path", "options"), list(combinations()))
def test_authors_agree(rule, values, path, options):
    assert difference(rule, values, follow(path, options)) <= 1e-10


def test_the_page_says_so():
    rows = told("test_authors")
    assert rows.keys() == {*CASES, "ftrl"}
    for name, case in CASES.items():
        assert f" `{case.path.rpartition('.')[2]}" in rows[name]


# Keras's backend is chosen once for a process, hence one of its own. That of NumPy has
# float32 somewhere on the way.
KERAS = """
import json, os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras
keras.config.set_floatx("float64")
given, found = json.load(sys.stdin), []
for options in given["options"]:
    params = [keras.Variable(p, dtype="float64") for p in given["params"]]
    opt, found = keras.optimizers.Ftrl(**options), [*found, []]
    for grads, lr in zip(given["steps"], given["lr"], strict=True):
        opt.learning_rate = lr
        arrays = [keras.ops.convert_to_tensor(g, dtype="float64") for g in grads]
        opt.apply(arrays, params)
        found[-1].append([keras.ops.convert_to_numpy(p).tolist() for p in params])
print(json.dumps(found))
"""
FTRL = {
    "l1": "l1_regularization_strength",
    "l2": "l2_regularization_strength",
    "l2_shrinkage": "l2_shrinkage_regularization_strength",
    "beta": "beta",
    "initial_accumulator_value": "initial_accumulator_value",
}


def test_keras_ftrl_agrees():
    """Every option by itself, and all of them."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is an optional peer")
    every = dict.fromkeys(FTRL, 0.3)
    cases = [{}, *({name: 0.3} for name in FTRL), every]
    params, steps = draw()
    given = {
        "params": [p.tolist() for p in params],
        "steps": [[g.tolist() for g in grads] for grads in steps],
        "lr": [falling(0.1, t) for t in range(len(steps))],
        "options": [{FTRL[n]: v for n, v in case.items()} for case in cases],
    }
    done = subprocess.run(
        [sys.executable, "-c", KERAS],
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for case, theirs in zip(cases, json.loads(done.stdout), strict=True):
        assert difference(fastopt.ftrl, {"lr": 0.1, **case}, theirs) <= 1e-10, case
