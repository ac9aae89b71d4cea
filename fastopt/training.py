"""A loop that minimizes, and callbacks that end it early or reduce its steps.

>>> import numpy as np, fastopt
>>> def loss(w):
...     return w @ w, 2 * w
>>> calls = [fastopt.EarlyStopping(patience=5)]
>>> run = fastopt.minimize(loss, np.ones(3), fastopt.adam, 500, lr=0.1, callbacks=calls)
>>> run.loss < 1e-3
True
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, ClassVar

import numpy as np

from fastopt.memory.segments import Array
from fastopt.memory.trees import leaves
from fastopt.optimizer.checks import check_choice, check_count
from fastopt.optimizer.copying import copied, write
from fastopt.optimizer.refusals import (
    RETURNS,
    check_arrays,
    check_function,
    check_made,
    check_maker,
    check_seen,
    items,
    named,
    no_optimizer,
)
from fastopt.rule import check_hyperparameter

__all__ = ["EarlyStopping", "ReduceLROnPlateau", "Result", "Run", "minimize"]


def is_number(value: Any) -> bool:
    real = not np.iscomplexobj(value)  # NumPy's drop what is imaginary
    return real and getattr(value, "shape", ()) == () and hasattr(value, "__float__")


def improves(metric: Any, best: float | None, mode: str, margin: float) -> bool:
    """Return whether a metric is better than the best by more than a margin. NaN and
    infinities never are."""
    if not is_number(metric):
        raise TypeError(f"metric must be a number, got {metric!r}")
    value = float(metric)
    if not math.isfinite(value) or best is None:
        return math.isfinite(value)
    return value < best - margin if mode == "min" else value > best + margin


def check_at_least_zero(name: str, value: Any) -> float:
    return float(check_hyperparameter("lr", name, value, 1.0))


class Watch:
    """Remembers what a metric was, and when it was best."""

    best: float | None
    _nothing: ClassVar[Mapping[str, Any]]  # what is remembered before the first look

    def reset(self) -> None:
        """Forget all metrics."""
        vars(self).update(self._nothing)  # at the same instant

    def _begin(self, run: Any) -> None:
        """Check what a callback of :func:`minimize` is given. At the start of a run,
        forget what was seen before, or loaded."""
        if not isinstance(run, Run):
            raise TypeError(
                f"as a callback it is called by minimize, with a Run, got "
                f"{named(run)}; in a loop of your own use its step(metric, ...)"
            )
        if not run.steps:
            self.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, as numbers and arrays."""
        return {name: getattr(self, name) for name in self._nothing}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        if not isinstance(saved, Mapping) or saved.keys() != self._nothing.keys():
            got = list(saved) if isinstance(saved, Mapping) else type(saved).__name__
            raise TypeError(f"expected the keys {', '.join(self._nothing)}; got {got}")
        best = saved["best"]
        if best is not None and not (is_number(best) and math.isfinite(float(best))):
            raise ValueError(f"best must be a finite number or None, got {best!r}")
        check_seen(saved)
        vars(self).update(saved)


class ReduceLROnPlateau(Watch):
    """Multiply the learning rates by ``factor`` when a metric has not improved for more
    than ``patience`` looks, so at look ``patience + 1``, as torch counts.

    Parameters
    ----------
    mode
        "min" if less is better, "max" if more is.
    factor
        A number between 0 and 1.
    patience
        The number of looks without an improvement that are tolerated.
    threshold, threshold_mode
        An improvement must be more than ``threshold * abs(best)`` in the mode "rel",
        and more than ``threshold`` in "abs". torch multiplies ``best`` by ``1 -
        threshold``, so a constant metric below 0 improves at every look
        (pytorch#47513).
    cooldown
        The number of looks after a reduction that do not count.
    min_lr
        The least learning rate. There is no least change, torch's ``eps``.

    Attributes
    ----------
    best
        The best metric; None before the first one.
    bad, cooling
        The number of looks since the last improvement or reduction, and the number of
        coming looks that will not count.

    Raises
    ------
    TypeError, ValueError
        For invalid arguments.

    Notes
    -----
    A metric that is NaN or infinite is no improvement. The learning rates must be
    numbers, not schedules. They are saved with the optimizer's state, not here.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> opt = fastopt.sgd(np.ones(3), lr=1.0)
    >>> plateau = fastopt.ReduceLROnPlateau(patience=1)
    >>> [plateau.step(loss, opt) for loss in (3.0, 2.0, 2.0, 2.0)], opt.lr
    ([False, False, False, True], 0.1)
    """

    bad: int
    cooling: int
    _nothing = {"best": None, "bad": 0, "cooling": 0}

    def __init__(
        self,
        *,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
    ):
        self.mode = check_choice("mode", mode, "min", "max")
        self.factor = check_at_least_zero("factor", factor)
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must be between 0 and 1, got {factor!r}")
        self.patience = check_count("patience", patience, 0)
        self.threshold = check_at_least_zero("threshold", threshold)
        self.threshold_mode = check_choice(
            "threshold_mode", threshold_mode, "rel", "abs"
        )
        self.cooldown = check_count("cooldown", cooldown, 0)
        self.min_lr = check_at_least_zero("min_lr", min_lr)
        self.reset()

    def step(self, metric: float, opt: Any) -> bool:
        """Look at a metric; return whether it reduced learning rates of ``opt``."""
        if isinstance(opt, type) or getattr(opt, "groups", None) is None:
            instead = "use torch.optim.lr_scheduler.ReduceLROnPlateau"
            raise no_optimizer(opt, instead)
        rates = [
            (number, name)
            for number, group in enumerate(opt.groups)
            for name in ("lr", "adamw_lr")  # Muon has both
            if name in group
        ]
        for number, name in rates:
            if callable(lr := opt.groups[number][name]):
                raise TypeError(
                    f"{name} of groups[{number}] is a schedule, {lr!r}; only a number "
                    f"can be reduced"
                )
        margin = self.threshold
        if self.threshold_mode == "rel":
            margin *= abs(self.best or 0.0)
        best, bad, cooling = self.best, self.bad + 1, self.cooling
        if improves(metric, self.best, self.mode, margin):
            best, bad = float(metric), 0
        if cooling:
            cooling, bad = cooling - 1, 0
        changes: list[dict[str, float]] = [{} for _ in opt.groups]
        if bad > self.patience:
            bad, cooling = 0, self.cooldown
            for number, name in rates:
                rate = opt.groups[number][name]
                lower = max(rate * self.factor, self.min_lr)
                if lower < rate:
                    changes[number][name] = lower
        seen = partial(vars(self).update, best=best, bad=bad, cooling=cooling)
        reduced = any(changes)
        if reduced:  # at the same instant
            opt._change(changes, also=[seen])
        else:
            seen()
        return reduced

    def __call__(self, run: Run) -> None:
        """Take the loss as the metric, as a callback of :func:`minimize`."""
        self._begin(run)
        self.step(run.loss, run.opt)


class EarlyStopping(Watch):
    """Stop when a metric has not improved for ``patience`` looks in a row, so at look
    ``patience``, as Keras and Lightning count.

    Parameters
    ----------
    patience
        The number of looks, at least 1.
    min_delta
        An improvement must be more than this.
    mode
        "min" if less is better, "max" if more is.

    Attributes
    ----------
    best, best_look, best_params
        The best metric, None before the first one; its look, counted from 0; and a copy
        of the parameters at that look, in their structure, if ``step`` got them.
    looks, wait
        The number of looks, and the number of looks since the best one.

    Raises
    ------
    TypeError, ValueError
        For invalid arguments.

    Notes
    -----
    A metric that is NaN or infinite is no improvement. For other criteria, which suit
    noisy metrics, see Prechelt 1998, "Early stopping, but when?".

    Examples
    --------
    >>> import fastopt
    >>> stop = fastopt.EarlyStopping(patience=2)
    >>> [stop.step(loss) for loss in (3.0, 2.0, 2.5, 2.1)]
    [False, False, False, True]
    >>> stop.best, stop.best_look
    (2.0, 1)
    """

    best_look: int
    best_params: Any
    looks: int
    wait: int
    _nothing = {"best": None, "best_look": -1, "best_params": None}
    _nothing |= {"looks": 0, "wait": 0}

    def __init__(self, patience: int, *, min_delta: float = 0.0, mode: str = "min"):
        self.patience = check_count("patience", patience, 1)
        self.min_delta = check_at_least_zero("min_delta", min_delta)
        self.mode = check_choice("mode", mode, "min", "max")
        self.reset()

    def step(self, metric: float, params: Any = None) -> bool:
        """Look at a metric; return whether to stop. Copy ``params`` if it is best."""
        changes: dict[str, Any] = {"looks": self.looks + 1, "wait": self.wait + 1}
        if improves(metric, self.best, self.mode, self.min_delta):
            changes |= {"best": float(metric), "best_look": self.looks, "wait": 0}
            if params is not None:
                check_arrays("params", params)
            changes["best_params"] = None if params is None else copied(params)
        vars(self).update(changes)
        return self.wait >= self.patience

    def restore(self, params: Any) -> None:
        """Write the best parameters into ``params``."""
        if self.best_params is None:
            raise ValueError(
                "there are no best parameters: step() was not given them, or no metric "
                "was finite"
            )
        write(params, self.best_params)

    def __call__(self, run: Run) -> bool:
        """Take the loss as the metric, as a callback of :func:`minimize`."""
        self._begin(run)
        return self.step(run.loss)

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        if saved["best_params"] is not None:
            saved["best_params"] = copied(saved["best_params"])
        return saved


@dataclass
class Run:
    """The argument of the callbacks of :func:`minimize`, after each evaluation.

    Attributes
    ----------
    opt, params
        The optimizer, and the parameters that it updates.
    total, steps
        The number of planned steps, and of completed ones.
    loss, grads
        What ``value_and_grad`` returned for the present parameters.
    losses, lrs
        The losses so far, and the learning rates of the first group at these, before
        the callbacks.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> def show(run):
    ...     print(run.steps, run.loss, run.total)
    >>> def loss(w):
    ...     return w @ w, 2 * w
    >>> _ = fastopt.minimize(loss, np.ones(3), fastopt.gd, 1, lr=0.5, callbacks=[show])
    0 3.0 1
    1 0.0 1
    """

    opt: Any
    params: Any
    total: int
    steps: int = 0
    loss: float = math.nan
    grads: Any = None
    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What :func:`minimize` returns.

    Attributes
    ----------
    params, loss
        The parameters, in the structure of ``x0``, and their loss.
    step, steps
        The number of steps after which the parameters had these values, and the number
        of all steps.
    losses, lrs
        ``losses[i]`` is the loss after ``i`` steps, ``lrs[i]`` the learning rate of the
        first group there; NaN if the rule has none.
    reason
        Why the run ended, in words.
    opt
        The optimizer. It holds the last parameters, which need not be the best.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> result = fastopt.minimize(
    ...     lambda w: (w @ w, 2 * w), np.ones(2), fastopt.gd, 1, lr=0.5
    ... )
    >>> result.params, result.losses, result.reason
    (array([0., 0.]), array([2., 0.]), 'all 1 steps are done')
    """

    params: Any
    loss: float
    step: int
    steps: int
    losses: Array
    lrs: Array
    reason: str
    opt: Any


def minimize(
    value_and_grad: Callable[[Any], tuple[Any, Any]],
    x0: Any,
    opt: Callable[..., Any],
    steps: int,
    *,
    callbacks: Iterable[Callable[[Run], Any]] = (),
    best: bool = True,
    progress: bool = False,
    **hyperparameters: Any,
) -> Result:
    """Make steps on a function, from a start, and return the best parameters seen.

    Parameters
    ----------
    value_and_grad
        ``value_and_grad(params) -> (loss, grads)``, both at these parameters, which it
        must not change. It may draw a new batch at each call.
    x0
        The start: an array, a list or dict of arrays, which may be nested, or a
        ``FlatBuffer``. It is copied.
    opt
        A rule, such as ``fastopt.adam``, or a function that makes an optimizer of
        parameters: ``lambda params: fastopt.Lookahead(fastopt.adam(params))``.
    steps
        The largest number of steps, 0 or more.
    callbacks
        Functions that are called with a :class:`Run` after every evaluation, before the
        step that uses it. If one returns something true, the run ends. An
        :class:`EarlyStopping`, a :class:`ReduceLROnPlateau`, or your own function, such
        as one that validates, can be callbacks.
    best
        Whether to return the parameters with the least loss, which are copied at each
        improvement, or the last ones, for instance if batches make losses noisy.
    progress
        Show steps, loss and learning rate on the standard error, ten times a second.
    **hyperparameters
        Arguments for the rule: ``lr=0.1, ema=0.999, backend="numba"``.

    Returns
    -------
    Result

    Raises
    ------
    TypeError, ValueError
        For invalid arguments.
    FloatingPointError
        If the loss is NaN or infinite at ``x0``. Such a loss later ends the run with a
        RuntimeWarning, and the best parameters so far are returned, or the last ones if
        ``best`` is False or the rule is evaluated elsewhere.

    Notes
    -----
    ``value_and_grad`` is called once more than there are steps. For a rule that is
    evaluated elsewhere than it is trained (``schedule_free_*``), the result has
    ``eval_params()`` at the end, and another call computes their loss.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> def parabola(x):
    ...     return float((x - 3) @ (x - 3)), 2 * (x - 3)
    >>> lr = fastopt.schedules.cosine(0.4, steps=50)
    >>> result = fastopt.minimize(parabola, np.zeros(2), fastopt.gd, 50, lr=lr)
    >>> result.params.round(3), len(result.losses)
    (array([3., 3.]), 51)
    >>> stop = fastopt.EarlyStopping(patience=5, min_delta=1e-6)
    >>> fastopt.minimize(
    ...     parabola, np.zeros(2), fastopt.adam, 5000, lr=0.1, callbacks=[stop]
    ... ).reason
    'EarlyStopping said so'
    """
    steps = check_count("steps", steps, 0)
    callbacks = items("callbacks", callbacks, "functions")
    for i, callback in enumerate(callbacks):
        check_function(f"callbacks[{i}]", callback, "called with a Run")
    check_function("value_and_grad", value_and_grad, RETURNS)
    check_maker(opt)
    check_arrays("x0", x0)
    params = copied(x0, "x0")
    optimizer = opt(params, **hyperparameters)
    check_made(optimizer)
    run = Run(optimizer, params, steps)
    # A rule such as schedule_free_adamw trains other parameters than those to use.
    elsewhere = getattr(getattr(optimizer, "rule", None), "evaluate", None) is not None
    best = best and not elsewhere
    least, least_at, kept = math.inf, 0, None
    show = Progress(steps) if progress else None
    while True:
        run.loss, run.grads = evaluated(value_and_grad, params)
        if getattr(run.grads, "shape", ()) and are_numbers(x0):
            raise TypeError(
                f"x0 is a {type(x0).__name__} of numbers, each a parameter by itself, "
                f"but the gradient is one array; pass np.array(x0)"
            )
        run.losses.append(run.loss)
        run.lrs.append(rate(optimizer, getattr(optimizer, "steps", run.steps)))
        if show is not None:
            show(run)
        if not math.isfinite(run.loss):
            reason = f"the loss is {run.loss} after {run.steps} steps"
            break
        if best and run.loss < least:
            least, least_at, kept = run.loss, run.steps, copied(params)
        if asking := [c for c in callbacks if c(run)]:
            reason = f"{', '.join(map(name_of, asking))} said so"
            break
        if run.steps == steps:
            reason = f"all {steps} steps are done"
            break
        optimizer.step(run.grads)
        run.steps += 1
    if show is not None:
        show.end()
    if not math.isfinite(run.loss):
        if not run.steps:
            raise FloatingPointError(
                f"the loss is {run.loss} at x0; start where it is finite"
            )
        warnings.warn(f"minimize ended early: {reason}", RuntimeWarning, stacklevel=2)
    loss, at = run.loss, run.steps
    if elsewhere:
        params = optimizer.eval_params()
        loss, _ = evaluated(value_and_grad, params)
    elif best:
        params, loss, at = kept, least, least_at
    return Result(
        params=params,
        loss=loss,
        step=at,
        steps=run.steps,
        losses=np.array(run.losses),
        lrs=np.array(run.lrs),
        reason=reason,
        opt=optimizer,
    )


def evaluated(
    value_and_grad: Callable[[Any], tuple[Any, Any]], params: Any
) -> tuple[float, Any]:
    result = value_and_grad(params)
    if not isinstance(result, tuple) or len(result) != 2 or not is_number(result[0]):
        raise TypeError(
            f"value_and_grad must return the loss, a number, and the gradients, got "
            f"{result!r}"
        )
    return float(result[0]), result[1]


def are_numbers(tree: Any) -> bool:
    """Return whether this is a list of numbers, which may be nested."""
    numbers = all(
        isinstance(leaf, (float, int, np.generic)) for _, leaf in leaves(tree)
    )
    return isinstance(tree, (list, tuple)) and numbers


def rate(opt: Any, steps: int) -> float:
    """The learning rate of the first group."""
    groups = getattr(opt, "groups", None)
    lr = groups[0].get("lr", math.nan) if groups else math.nan
    return float(lr(steps) if callable(lr) else lr)


def name_of(callback: Any) -> str:
    return str(getattr(callback, "__name__", type(callback).__name__))


class Progress:
    """A line on the standard error that shows the progress of a run."""

    def __init__(self, total: int):
        self.total, self.due = total, -math.inf

    def __call__(self, run: Run) -> None:
        if run.steps == self.total or monotonic() >= self.due:
            self.due = monotonic() + 0.1
            line = f"step {run.steps}/{self.total}  loss {run.loss:<12.6g}"
            print(f"\r{line} lr {run.lrs[-1]:<10.3g}", end="", file=sys.stderr)

    def end(self) -> None:
        print(file=sys.stderr)
