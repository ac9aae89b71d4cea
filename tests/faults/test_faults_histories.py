"""Random histories of each of torch's optimizers and ours, beside each other: all that
a training may do with one, in any order."""

import copy
import io
import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("expecttest", reason="torch's tables of options need expecttest")

from torch.nn import Parameter  # noqa: E402
from torch_tables import NAMES, ours, plain_options, theirs  # noqa: E402

# Muon's step is torch's.
CLASSES = [name for name in NAMES if name != "Muon"]
# torch's Adafactor divides by the number of elements.
SHAPES = (3, 2), (5,), (), (0, 2), (2, 1, 3)
# Of float64, in other orders of operations; 1e-12 was measured.
BOUNDS = {"rtol": 1e-10, "atol": 1e-12}


class Side:
    """An optimizer of either kind, its parameters, and what is done with them."""

    def __init__(self, kind, options, seed):
        self.kind, self.options = kind, options
        self.generator = torch.Generator().manual_seed(seed)
        shapes = [s for s in SHAPES if 0 not in s or "Adafactor" not in kind.__name__]
        self.params = [Parameter(self.draw(shape)) for shape in shapes]
        self.make([{"params": [p]} for p in self.params[:2]])
        self.opt.add_param_group({"params": self.params[2:]})

    def make(self, groups):
        self.opt = self.kind(groups, **self.options)

    def draw(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def gradients(self, kind):
        for i, param in enumerate(self.params):
            grad = self.draw(param.shape)
            if kind == "some" and i % 2:
                param.grad = None
            elif kind == "added" and param.grad is not None:
                param.grad.add_(grad)
            elif kind == "transposed" and grad.dim() == 2:
                param.grad = grad.t().contiguous().t()
            elif kind == "strided":
                param.grad = torch.stack([grad, grad], -1)[..., 1]
            else:
                param.grad = grad

    def step(self, kind):
        self.gradients(kind)
        self.opt.step()

    def closure(self, kind):
        def closure():
            self.opt.zero_grad()
            losses = [(p * p * self.draw(p.shape)).sum() for p in self.params]
            loss = torch.stack(losses).sum()
            loss.backward()
            return loss

        return self.opt.step(closure).item()

    def step_again(self, kind):
        """With whatever gradients there are."""
        self.opt.step()

    def zero_grad(self, kind):
        self.opt.zero_grad(set_to_none=kind != "some")

    def lr(self, number):
        group = self.opt.param_groups[int(number * 100) % len(self.opt.param_groups)]
        group["lr"] = 0.001 + number / 20

    def option(self, number):
        group = self.opt.param_groups[-1]
        if number < 0.5 and "maximize" in group:
            group["maximize"] = not group["maximize"]
        elif number < 0.7 and "betas" in group:
            group["betas"] = (0.5 + number / 3, 0.9)
        elif "weight_decay" in group:
            group["weight_decay"] = number / 10

    def round_trip(self, number):
        """Saved, and loaded by the same optimizer, or by a new one."""
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if number < 0.6:
            self.make([{"params": g["params"]} for g in self.opt.param_groups])
        self.opt.load_state_dict(saved)

    def group(self, number):
        if len(self.params) > 8:
            return
        self.params.append(Parameter(self.draw((4, 2))))
        self.opt.add_param_group({"params": self.params[-1], "lr": 0.02 * number})

    def data(self, number):
        """A parameter's values are set, or they are put elsewhere."""
        param = self.params[int(number * 100) % len(self.params)]
        with torch.no_grad():
            if number < 0.5:
                param.copy_(self.draw(param.shape))
            else:
                param.data = param.data.clone() * 0.5

    def frozen(self, number):
        self.params[0].requires_grad_(not self.params[0].requires_grad)
        self.params[0].grad = None

    def copied(self, number):
        self.params, self.opt = copy.deepcopy((self.params, self.opt))


STEPS = ("step", "closure", "step_again", "zero_grad")
KINDS = ("all", "some", "added", "transposed", "strided")
OTHERS = ("lr", "option", "round_trip", "group", "data", "frozen", "copied")


def history(rng, name):
    options = rng.choice(plain_options(name))
    seed = rng.randrange(1 << 30)
    kinds = ours(name), theirs(name)
    sides = [Side(kind, copy.deepcopy(options), seed) for kind in kinds]
    done = []
    for _ in range(rng.randrange(4, 16)):
        if rng.random() < 0.65:
            action, how = rng.choice(STEPS), rng.choice(KINDS)
        else:
            action, how = rng.choice(OTHERS), rng.random()
        done.append((action, how))
        results = [getattr(side, action)(how) for side in sides]
        words = lambda text, done=done: f"{options}, {done}: {text}"  # noqa: E731
        if results[0] is not None:
            torch.testing.assert_close(*results, **BOUNDS, msg=words)
        params = [list(side.params) for side in sides]
        torch.testing.assert_close(*params, **BOUNDS, msg=words)
        states = [side.opt.state_dict() for side in sides]
        assert same_groups(*(state["param_groups"] for state in states)), done
        torch.testing.assert_close(
            *(state["state"] for state in states), rtol=1e-9, atol=1e-10, msg=words
        )


def same_groups(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(x[key] == y[key] for key in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.usefixtures("numbers_in_float64")
def test_histories_beside_torch(campaign):
    rng = random.Random(0)
    for name in CLASSES:
        for number in range(400 if campaign.long else 8):
            campaign.attempt((name, number), history, rng, name)
