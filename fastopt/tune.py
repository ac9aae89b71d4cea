"""Choose the learning rate by a range test, the batch size by the noise of gradients,
and hyperparameters for another batch size.

>>> import numpy as np, fastopt
>>> w, h = np.ones(20), np.geomspace(0.01, 1, 20)
>>> test = fastopt.lr_range_test(
...     lambda w: (0.5 * h @ w**2, h * w), fastopt.gd(w), lo=1e-4, hi=100
... )
>>> opt = fastopt.gd(w, lr=test.suggestion())
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastopt.lookahead import Lookahead
from fastopt.memory.arrays import to_host
from fastopt.memory.segments import Array
from fastopt.optimizer.checks import check_choice, check_count, check_positive
from fastopt.optimizer.copying import arrays_of
from fastopt.optimizer.optimizer import Optimizer
from fastopt.optimizer.refusals import (
    RETURNS,
    check_arrays,
    check_function,
    items,
    named,
    no_optimizer,
)
from fastopt.optimizer.state import fill
from fastopt.portable import power
from fastopt.rule import check_hyperparameter
from fastopt.training import check_at_least_zero, evaluated, is_number

__all__ = [
    "GradientNoiseScale",
    "LRRangeTest",
    "lr_range_test",
    "scale_hyperparameters",
]

# The learning rate ------------------------------------------------------------------

DONE = 0.9  # the share of the fall after which there is little more to gain


@dataclass(frozen=True)
class LRRangeTest:
    """The result of :func:`lr_range_test`.

    Attributes
    ----------
    lrs, losses
        The rates that were tried, and the loss after a step with each.
    smoothed
        The losses, at most ``start``, averaged with their neighbours before and after.
        An average of earlier losses alone would lag behind, and move the suggestion to
        larger rates.
    start
        The loss before the first step.
    diverged
        Whether the test ended because the loss diverged.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.gd(np.ones(3))
    >>> test = fastopt.lr_range_test(lambda w: (w @ w, 2 * w), opt, lo=1e-3, hi=100)
    >>> test.diverged, bool(test.suggestion() < 1)
    (True, True)
    """

    lrs: Array
    losses: Array
    smoothed: Array
    start: float
    diverged: bool

    def suggestion(self, how: str = "valley") -> float:
        """A learning rate.

        Parameters
        ----------
        how
            "valley" is the least rate at which the loss has fallen by nine tenths of
            its fall. (fastai's valley is the middle of the longest fall, which depends
            on ``lo``.) "steepest" is where the loss falls fastest over the logarithm of
            the rate, and "minimum" a tenth of the rate with the least loss. Both are
            common, and far too careful for short runs (see docs/strategy.md).

        Raises
        ------
        ValueError
            If the loss does not fall, its fall does not stand out of the noise, or it
            still falls at the end.
        """
        check_choice("how", how, "valley", "steepest", "minimum")
        lrs, s = self.lrs, self.smoothed
        if len(s) < 3:
            raise ValueError(
                f"the loss diverged at the learning rate number {len(s) + 1}; begin "
                f"with a smaller one than {lrs[0] if len(lrs) else 'that'} (lo)"
            )
        least = int(s.argmin())
        fall = float(s[: least + 1].max() - s[least])
        # Neighbours have almost the same rate, and the median ignores the fall. The
        # averages have half of this noise, and range over twice that.
        noise = float(np.median(abs(np.diff(self.losses))))
        if not fall > max(2 * noise, 1e-9 * abs(self.start)):
            raise ValueError(
                f"the loss fell by {fall:.3g}, which does not stand out of its noise "
                f"({noise:.3g} from step to step); test larger rates, larger batches "
                f"or more steps (num), and look at plot()"
            )
        if how == "steepest":
            slope = np.gradient(s, np.log(lrs))
            return float(lrs[slope[: least + 1].argmin()])
        if least == len(s) - 1 and not self.diverged:
            raise ValueError(
                f"the loss still falls at the largest rate of the test, {lrs[-1]:.3g}; "
                f"test larger ones (hi)"
            )
        if how == "minimum":
            return float(lrs[least]) / 10
        return float(lrs[np.argmax(s <= s[: least + 1].max() - DONE * fall)])

    def plot(self, axes: Any = None) -> Any:
        """Draw the losses over the rates, and the suggestions; return the axes.

        ``axes`` are matplotlib's; without them, it makes a figure:
        ``result.plot().figure.savefig("range.png")``.
        """
        if axes is None:
            axes = new_axes()
        axes.semilogx(self.lrs, self.losses, ".", color="0.7", label="losses")
        axes.semilogx(self.lrs, self.smoothed, color="#0072B2", label="smoothed")
        colors = {"valley": "#D55E00", "steepest": "#009E73", "minimum": "#CC79A7"}
        for how, color in colors.items():
            try:
                lr = self.suggestion(how)
            except ValueError:  # there is no suggestion to draw
                continue
            axes.axvline(lr, color=color, label=f"{how}: {lr:.2g}")
        low, high = min([self.start, *self.losses]), self.start
        if low < high:  # losses that diverge would leave no height for the others
            axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)
        return axes


def new_axes() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(8, 5), dpi=150, layout="constrained").add_subplot()


def lr_range_test(
    value_and_grad: Callable[[Any], tuple[Any, Any]],
    opt: Any,
    *,
    lo: float = 1e-7,
    hi: float = 10.0,
    num: int = 100,
    smooth: float = 0.8,
    diverge: float = 4.0,
    rng: Any = None,
) -> LRRangeTest:
    """Make steps with ever larger learning rates, and record the loss. Smith 2017,
    arXiv:1506.01186.

    At the end, also after an error, the optimizer is restored: its parameters, state,
    number of steps and learning rates.

    Parameters
    ----------
    value_and_grad
        ``value_and_grad(params) -> (loss, grads)`` of a batch, as for ``minimize``; the
        parameters are those of ``opt``, in the structure that it was given.
    opt
        An optimizer. The test sets the rate in each of its groups.
    lo, hi, num
        The first and the last rate, and their number; they are evenly spaced in the
        logarithm.
    smooth
        The weight of neighbours in the average, in [0, 1).
    diverge
        The test ends when the running average of the loss has risen above its least
        value by ``diverge - 1`` times the magnitude of that value, or times the fall to
        it if that is larger; and when the loss is not finite.
    rng
        The generator that draws batches, which is restored, too: NumPy's, torch's or
        Python's, or a list of generators. An iterator cannot be restored.

    Returns
    -------
    LRRangeTest
        With ``suggestion()`` and ``plot()``.

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit.
    FloatingPointError
        If the loss is not finite before the first step.

    Notes
    -----
    Each loss is that of the next batch, at the parameters after the step with its rate.
    ``value_and_grad`` is called once more than there are rates. Rules that find their
    rate themselves (``prodigy``, ``dog``) do not need this test. With ``Muon``, it
    tests the rate of the matrices.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> h, x = np.geomspace(0.01, 1, 20), np.ones(20)
    >>> result = fastopt.lr_range_test(
    ...     lambda x: (0.5 * h @ x**2, h * x), fastopt.gd(x), lo=1e-4, hi=100
    ... )
    >>> 0.5 < result.suggestion() < 2        # it diverges from 2 on
    True
    >>> bool((x == 1).all())                 # nothing has changed
    True
    """
    if not isinstance(opt, (Optimizer, Lookahead)):
        instead = "give fastopt's own the arrays, as in fastopt.adam(params)"
        raise no_optimizer(opt, instead, "an Optimizer, or a Lookahead of one,")
    check_function("value_and_grad", value_and_grad, RETURNS)
    if any("lr" not in group for group in opt.groups):
        raise TypeError(f"{opt.rule.name} has no lr to test")
    lo, hi = check_at_least_zero("lo", lo), check_at_least_zero("hi", hi)
    if not 0 < lo < hi:
        raise ValueError(f"lo must be above 0 and below hi, got {lo!r} and {hi!r}")
    check_count("num", num, 3)
    smooth = float(check_hyperparameter("beta", "smooth", smooth, 1.0))
    diverge = float(check_hyperparameter("", "diverge", diverge, 1.0))
    if diverge <= 1:
        raise ValueError(f"diverge must be above 1, got {diverge!r}")
    params = opt._params.trees if opt._params.grouped else opt._params.trees[0]
    lrs, losses, diverged = [], [], False
    # The test is meant to reach rates at which numbers overflow.
    with put_back(opt, rng), np.errstate(over="ignore", invalid="ignore"):
        first, grads = evaluated(value_and_grad, params)
        if not math.isfinite(first):
            raise FloatingPointError(f"the loss is {first} before the first step")
        least, total, weight = first, 0.0, 0.0
        for i in range(num):
            lr = lo * (hi / lo) ** (i / (num - 1))
            for group in opt.groups:
                group["lr"] = lr
            opt.step(grads)
            loss, grads = evaluated(value_and_grad, params)
            if not math.isfinite(loss):
                diverged = True
                break
            lrs.append(lr)
            losses.append(loss)
            total, weight = smooth * total + loss, smooth * weight + 1
            least = min(least, total / weight)
            # The least loss may be near 0, or below, so a multiple of it is no bound.
            if total / weight > least + (diverge - 1) * max(abs(least), first - least):
                diverged = True
                break
    start = max([first, *([float(np.median(losses[:10]))] if losses else [])])
    smoothed = both_ways(np.minimum(losses, start), smooth)
    return LRRangeTest(np.array(lrs), np.array(losses), smoothed, start, diverged)


def both_ways(values: Array, beta: float) -> Array:
    """Averages of values, weighted with ``beta**distance`` in both directions."""
    places = np.arange(len(values))
    weights = beta ** abs(places - places[:, None])
    averages: Array = weights @ values / weights.sum(axis=1)
    return averages


@contextmanager
def put_back(opt: Any, rng: Any) -> Iterator[None]:
    """Restore the optimizer, its parameters, and generators at the end."""
    generators = list(rng) if isinstance(rng, (list, tuple)) else [rng]
    undo = [going_back(one) for one in generators if one is not None]
    arrays = opt._params.arrays
    params = list(map(to_host, arrays))
    lrs = [group["lr"] for group in opt.groups]
    state = opt.state_dict()
    try:
        yield
    finally:
        for group, saved in zip(
            opt.groups, state.get("opt", state)["groups"], strict=True
        ):
            if not callable(group["lr"]):  # while it may be, it is not saved
                saved.setdefault("lr", group["lr"])
        opt.load_state_dict(state)
        for array, saved in zip(arrays, params, strict=True):
            fill(array, saved)
        for group, lr in zip(opt.groups, lrs, strict=True):
            group["lr"] = lr
        for back in undo:
            back()


def going_back(rng: Any) -> Callable[[], None]:
    """Return a function that restores the present state of a generator."""
    if hasattr(getattr(rng, "bit_generator", None), "state"):  # numpy.random has none
        state = rng.bit_generator.state
        return lambda: setattr(rng.bit_generator, "state", state)
    for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(rng, put):
            state = getattr(rng, get)()
            return lambda: getattr(rng, put)(state)
    raise TypeError(f"rng must be a generator of random numbers, got {rng!r}")


# The batch size ---------------------------------------------------------------------


class GradientNoiseScale:
    """The batch size at which noise and signal in a gradient are equal: ``B = tr(C) /
    |G|^2``, for the covariance C of the gradients of single examples and their mean G.
    McCandlish et al. 2018, arXiv:1812.06162.

    With batches of B examples, a run takes twice the least possible number of steps,
    and twice that of examples: much smaller batches waste steps, much larger ones
    examples. B grows as the loss falls, so measure more than once in a run.

    Parameters
    ----------
    batch_size
        The number of examples in each of the batches that are compared.
    beta
        The weight of older measurements, in (0, 1]; with 1 all measurements count
        equally.

    Attributes
    ----------
    noise, signal
        Unbiased estimates of ``tr(C)`` and of ``|G|^2``; NaN before the first update.
    value, error
        Their ratio, and its standard error; NaN while the signal is not resolved.
    resolved
        Whether there were at least 10 updates, and the signal is more than 8 standard
        errors above zero. A signal near or below zero means that there are too few
        examples to see it, not that B is negative or huge. (With 4 standard errors, a
        user who looks after every update saw a ratio below half the true one in a third
        of simulated runs; with 8 in none, but the first values are low, by a fifth.)

    Raises
    ------
    TypeError, ValueError
        For invalid arguments, such as NaN. They are not counted.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> rng, scale = np.random.default_rng(0), fastopt.GradientNoiseScale(10, beta=1)
    >>> for _ in range(50):         # 8 batches of 10: C = 1 (of 100 elements), G = 0.5
    ...     examples = 0.5 + rng.normal(size=(8, 10, 100))
    ...     scale.update(list(examples.mean(axis=1)))
    >>> scale                       # 100 / (100 * 0.5**2) = 4
    <gradient noise scale: 3.99 ± 0.037 examples>
    """

    def __init__(self, batch_size: int, *, beta: float = 0.95):
        self.batch_size = check_count("batch_size", batch_size, 1)
        self.beta = float(check_hyperparameter("", "beta", beta, 1.0))
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta!r}")
        self._count, self._weight, self._squared_weights = 0, 0.0, 0.0
        # Weighted sums of noise and signal, and of their products.
        self._sums, self._products = np.zeros(2), np.zeros((2, 2))

    def update(self, grads: Sequence[Any]) -> None:
        """Count the gradients of two or more batches at the same parameters. ``grads``
        is a list of gradients, each the mean over the examples of a batch, in the
        structure of the parameters."""
        batches = items("grads", grads, "gradients, those of each batch")
        trees = [vectors(f"grads[{i}]", tree) for i, tree in enumerate(batches)]
        sizes = [{name: part.size for name, part in tree.items()} for tree in trees]
        if any(each != sizes[0] for each in sizes):
            raise ValueError("the gradients differ in their structure")
        small, big = [0.0] * len(trees), 0.0
        for name in trees[0] if trees else ():
            parts = [tree[name] for tree in trees]
            for i, part in enumerate(parts):
                small[i] += float(part @ part)
            mean = np.mean(parts, axis=0)
            big += float(mean @ mean)
        self.update_norms(small, big)

    def update_norms(self, small: Sequence[float], big: float) -> None:
        """Do the same as :meth:`update` for known norms: the squared norms of the
        gradients of two or more batches, and the squared norm of their mean. After
        ``opt.accumulate(grads, grad_scale=1/K)`` for each of K batches and
        ``opt.step(nonfinite="skip")``, the latter is ``opt.grad_norm**2``."""
        small = items("small", small, "squared norms, one of each batch")
        count = len(small)
        if count < 2:
            raise ValueError(f"at least two batches must be compared, got {count}")
        for norm in (*small, big):
            if not is_number(norm) or not 0 <= float(norm) < math.inf:
                raise ValueError(f"squared norms must be finite numbers, got {norm!r}")
        mean, big = math.fsum(map(float, small)) / count, float(big)
        if big > mean * (1 + 1e-4):  # more than a mean in float32 is off
            raise ValueError(
                f"the square of the mean's norm, {big:.6g}, is above the mean of the "
                f"squares, {mean:.6g}, which cannot be; is it the norm of the sum of "
                f"the gradients, or had parameters changed between them?"
            )
        noise = self.batch_size * count / (count - 1) * max(mean - big, 0.0)
        signal = (count * big - mean) / (count - 1)
        both, beta = np.array([noise, signal]), self.beta
        vars(self).update(  # all at the same instant
            _count=self._count + 1,
            _weight=beta * self._weight + 1,
            _squared_weights=beta**2 * self._squared_weights + 1,
            _sums=beta * self._sums + both,
            _products=beta * self._products + np.outer(both, both),
        )

    @property
    def noise(self) -> float:
        """The estimate of ``tr(C)``."""
        return float(self._sums[0]) / self._weight if self._count else math.nan

    @property
    def signal(self) -> float:
        """The estimate of ``|G|^2``."""
        return float(self._sums[1]) / self._weight if self._count else math.nan

    def _covariance(self) -> Array:
        """The covariance matrix of the two means."""
        mean = self._sums / self._weight
        numbers = self._weight**2 / self._squared_weights  # as good, of equal weight
        covariance: Array = self._products / self._weight - np.outer(mean, mean)
        return covariance / (numbers - 1)

    @property
    def resolved(self) -> bool:
        """Whether the signal stands out of the noise."""
        if self._count < 10:
            return False
        return self.signal > 8 * math.sqrt(max(self._covariance()[1, 1], 0.0))

    @property
    def value(self) -> float:
        """The batch size, or NaN."""
        return self.noise / self.signal if self.resolved else math.nan

    @property
    def error(self) -> float:
        """The standard error of ``value``, or NaN."""
        if not self.resolved:
            return math.nan
        # The ratio's, to first order.
        slope = np.array([1.0, -self.value])
        square = float(slope @ self._covariance() @ slope)
        return math.sqrt(max(square, 0.0)) / self.signal

    def __repr__(self) -> str:
        if not self.resolved:
            return f"<gradient noise scale: unresolved after {self._count} updates>"
        value, error = float(f"{self.value:.3g}"), float(f"{self.error:.2g}")
        return f"<gradient noise scale: {value:g} ± {error:g} examples>"


def vectors(name: str, tree: Any) -> dict[str, Array]:
    """Return the arrays of a tree by their paths, flattened and in float64."""
    arrays = arrays_of(tree)
    for path, array in arrays.items():
        if array is None:
            raise ValueError(f"there is no gradient at {path or 'all'}, but None")
    check_arrays(name, tree)
    return {
        k: to_host(a, name + k).astype(np.float64).ravel() for k, a in arrays.items()
    }


def scale_hyperparameters(
    hyperparameters: Mapping[str, Any], batch_ratio: float, rule: str
) -> dict[str, Any]:
    """Return hyperparameters for a batch size that is ``batch_ratio`` times as large.

    Parameters
    ----------
    hyperparameters
        A dict by name, such as ``opt.groups[0]``, with at least ``lr``.
    batch_ratio
        The new batch size over the old one.
    rule
        "linear", for SGD with or without momentum, multiplies lr by the ratio. Goyal et
        al. 2017, arXiv:1706.02677, who also warm up for some epochs. "sqrt", for Adam
        and RMSprop, multiplies lr by the root of the ratio and ``1 - beta`` (for beta1,
        beta2 and RMSprop's alpha) by the ratio, and divides eps by the root. Malladi et
        al. 2022, arXiv:2205.10287. AdamC's max_lr is scaled as lr is.

    Returns
    -------
    dict
        All hyperparameters. Weight decay and momentum do not change. ``ema`` is raised
        to the power of the ratio, so that it averages over as many examples.

    Raises
    ------
    TypeError
        If lr, or another number to scale, is a schedule, whose number of steps would
        have to change, too.
    ValueError
        If a beta would average over less than one step, and for invalid arguments, such
        as Muon's, for which there is no rule.

    Notes
    -----
    Do not scale an lr that multiplies a rate which the rule finds itself (prodigy,
    dog). Both rules hold while the noise is large: up to the noise scale
    (:class:`GradientNoiseScale`), beyond which larger batches gain little.

    Examples
    --------
    >>> import fastopt
    >>> fastopt.scale_hyperparameters({"lr": 0.1, "momentum": 0.9}, 4, "linear")
    {'lr': 0.4, 'momentum': 0.9}
    >>> fastopt.scale_hyperparameters({"lr": 0.001, "beta1": 0.875}, 4, "sqrt")
    {'lr': 0.002, 'beta1': 0.5}
    """
    ratio = check_positive("batch_ratio", batch_ratio)
    if not isinstance(hyperparameters, Mapping):
        raise TypeError(
            f"hyperparameters must be a dict of them by name, such as opt.groups[0], "
            f"got {named(hyperparameters)}"
        )
    check_choice("rule", rule, "linear", "sqrt")
    if "lr" not in hyperparameters:
        raise ValueError(f"there is no lr in {dict(hyperparameters)!r}")
    for name, instead in (
        ("adamw_lr", "there is no rule for Muon's lr; scale those of AdamW alone"),
        ("betas", "pass beta1 and beta2"),
    ):
        if name in hyperparameters:
            raise ValueError(f"got {name}: {instead}")

    def number(name: str) -> float:
        value = hyperparameters[name]
        if callable(value):
            raise TypeError(
                f"{name} is a schedule, {value!r}; make one for the other batch size, "
                f"of its number of steps, too"
            )
        return float(check_hyperparameter("", name, value, 1.0))

    root = math.sqrt(ratio)
    scaled = dict(hyperparameters)
    for name in {"lr", "max_lr"} & scaled.keys():  # adamc has both
        scaled[name] = number(name) * (ratio if rule == "linear" else root)
    if scaled.get("ema") is not None:
        scaled["ema"] = power(number("ema"), ratio)
    if rule == "linear":
        return scaled
    if "eps" in scaled:
        scaled["eps"] = number("eps") / root
    for name in scaled:
        beta = re.fullmatch(r"beta\d*", name)
        if beta and not 0 <= number(name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {number(name)!r}")
        average = beta or name == "alpha"
        if not average or not 0 < number(name) < 1:  # 0: no average; ademamix' alpha
            continue
        left = ratio * (1 - number(name))
        if left >= 1 - 1e-9:  # 10 * (1 - 0.9) is not 1
            raise ValueError(
                f"{name}={number(name):g} averages over {1 / (1 - number(name)):.3g} "
                f"steps, of which {ratio:g} become one; at that batch size the rule "
                f"does not hold"
            )
        scaled[name] = 1 - left
    return scaled
