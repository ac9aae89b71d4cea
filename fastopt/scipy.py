"""Every rule as a method of ``scipy.optimize.minimize``, under its own name.

>>> from scipy.optimize import minimize, rosen, rosen_der
>>> import fastopt.scipy
>>> adam, options = fastopt.scipy.adam, {"lr": 0.05}
>>> found = minimize(rosen, [-1.0, 2.0], jac=rosen_der, method=adam, options=options)
>>> found.success, found.x.round(3)
(True, array([1., 1.]))

They are for objectives that are noisy or have very many variables. A smooth one with
few of them is scipy's own BFGS' to minimize, in far fewer evaluations.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.optimize import OptimizeResult, OptimizeWarning, approx_fprime

from fastopt import docstrings
from fastopt.memory.formats import DTYPES
from fastopt.memory.segments import Array
from fastopt.optimizer.refusals import check_rule
from fastopt.rule import Rule, shown
from fastopt.rules import RULES

__all__ = ["Method"]
if TYPE_CHECKING:
    from fastopt import _scipy as _rules
    from fastopt._scipy import *  # noqa: F403

    __all__ += _rules.__all__
else:
    __all__ += [rule.name for rule in RULES]


class Ending(NamedTuple):
    status: int  # the numbers are those of scipy's own methods
    message: str


GRADIENT = Ending(0, "Success: the gradient is within gtol.")
STEP = Ending(0, "Success: the step is within xtol.")
CHANGE = Ending(0, "Success: the change of the objective is within ftol.")
MAXITER = Ending(1, "Maximum number of iterations has been exceeded.")
NOT_FINITE = Ending(3, "The objective or its gradient is infinite or NaN.")
STOPPED = Ending(99, "`callback` raised `StopIteration`.")


class Point(NamedTuple):
    """A place where the objective was evaluated."""

    x: Array
    fun: float
    jac: Array

    @property
    def finite(self) -> bool:
        return math.isfinite(self.fun) and bool(np.isfinite(self.jac).all())

    def lower(self, other: Point) -> Point:
        """The lower of two points."""
        return other if other.finite and other.fun < self.fun else self


class Objective:
    """A function and its gradient, and how often they were evaluated."""

    def __init__(self, fun: Callable[..., Any], jac: Any, args: tuple[Any, ...]):
        self.fun, self.jac, self.args = fun, jac, args
        self.nfev = self.njev = 0

    def value(self, x: Array) -> float:
        self.nfev += 1
        what = "the objective must return a number"
        value = real(what, self.fun(np.copy(x), *self.args))
        if value.size != 1:
            raise ValueError(f"{what}, got an array of {value.shape}")
        return float(value.item())

    def at(self, x: Array) -> Point:
        """All of it copied: a function may write into what it is given, and return the
        same memory every time."""
        self.njev += 1
        if callable(self.jac):
            fun, jac = self.value(x), self.jac(np.copy(x), *self.args)
        else:
            values: list[float] = []

            def recorded(x: Array) -> float:
                values.append(self.value(x))
                return values[-1]

            jac = approx_fprime(x, recorded)
            fun = values[0]  # it begins with x itself
        jac = real("the gradient must be a dense array of numbers", jac)
        jac = np.atleast_1d(np.array(jac, x.dtype))
        if jac.shape != x.shape:
            raise ValueError(
                f"the gradient must have the shape of x, {x.shape}, got {jac.shape}"
            )
        return Point(np.copy(x), fun, jac)


def real(what: str, value: Any) -> Array:
    """Convert what a function has returned to an array of real numbers. ``what`` begins
    the error message."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of many lengths
        raise TypeError(f"{what}, got {shown(value)}") from error
    numbers = array.dtype.kind in "biuf" or (
        array.dtype.kind == "O" and all(hasattr(v, "__float__") for v in array.flat)
    )
    if not numbers:
        if hasattr(value, "toarray"):
            kind = type(value).__name__
            raise TypeError(f"{what}, got a sparse {kind}; return its toarray()")
        raise TypeError(f"{what}, got {shown(value)}")
    return array


@dataclass(frozen=True)
class Method:
    """What ``minimize`` takes as its ``method``; for a rule of your own, too.

    ``minimize`` calls it, and says what ``fun``, ``x0``, ``args``, ``jac`` and
    ``callback`` may be. Here:

    Parameters
    ----------
    x0
        Is only read. float32 stays float32, everything else becomes float64.
    jac
        Without it, forward differences in float64 by scipy's ``approx_fprime``: n + 1
        evaluations for every step.
    callback
        ``callback(x)`` or ``callback(intermediate_result)``, which has ``x``, ``fun``,
        ``jac`` and ``nit``: called after each step with where it led. StopIteration
        ends the run.
    hess, hessp
        Not used, as a RuntimeWarning says.
    bounds, constraints
        Refused.
    **options
        The rule's hyperparameters; mind ``lr``, whose default is for networks. Each may
        be a schedule. ``backend`` and ``threads`` are the optimizer's, ``clip_norm``
        and ``clip_value`` its step's. And:

        maxiter
            The most steps; 10,000 by default.
        gtol
            Success when no element of the gradient is larger, in magnitude. 1e-5 by
            default, or ``minimize``'s ``tol``.
        ftol
            Success when a step changes the objective by no more than
            ``ftol * max(abs(before), abs(after), 1)``. Off by default: with a small
            ``lr`` a step changes little, wherever it is.
        xtol
            Success when a step changes no element of x by more than
            ``xtol * max(abs(x).max(), 1)``. Off by default, too; for schedules that
            end at 0. Neither counts before x has moved at all: some rules wait.
        best
            True, the default: return the lowest of all points; if ``gtol`` was met, the
            one where it was. False: the last one, for objectives that are noisy, where
            the lowest was lucky.
        disp
            Print how it ended.
        return_all
            Return all points, from ``x0`` on, as ``allvecs``.

    Returns
    -------
    OptimizeResult
        With ``fun`` and ``jac`` as they are at ``x``. ``status`` is 0 for success, 1
        after ``maxiter`` steps, 3 if the objective or its gradient became infinite or
        NaN, 99 if the callback ended the run. Rules whose parameters to use are not
        those that they train (``schedule_free_*``) end with one evaluation more, at
        ``eval_params()``.

    Raises
    ------
    TypeError, ValueError
        If something does not fit. Unknown options are no error but, as with scipy's own
        methods, an OptimizeWarning.

    Examples
    --------
    >>> from scipy.optimize import minimize, rosen, rosen_der
    >>> import fastopt, fastopt.scipy
    >>> method, options = fastopt.scipy.Method(fastopt.lion), {"maxiter": 5}
    >>> minimize(rosen, [-1.0, 2.0], jac=rosen_der, method=method, options=options).nit
    5
    """

    rule: Rule

    def __post_init__(self) -> None:
        check_rule("rule", self.rule)
        own = {
            name
            for name, parameter in inspect.signature(Method.__call__).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        taken = [name for name in self.rule.hyperparameters if name in own]
        if taken:
            raise ValueError(
                f"{self.rule.name} has hyperparameters with the names of arguments or "
                f"options of every method, which would take their values: "
                f"{', '.join(taken)}; rename them"
            )

    def __call__(
        self,
        fun: Callable[..., Any],
        x0: Any,
        args: tuple[Any, ...] = (),
        jac: Any = None,
        hess: Any = None,
        hessp: Any = None,
        bounds: Any = None,
        constraints: Any = (),
        callback: Callable[..., Any] | None = None,
        *,
        tol: float | None = None,
        maxiter: float | None = None,
        gtol: float | None = None,
        ftol: float | None = None,
        xtol: float | None = None,
        best: bool = True,
        disp: bool = False,
        return_all: bool = False,
        backend: str | None = None,
        threads: int | None = None,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        **options: Any,
    ) -> OptimizeResult:
        rule = self.rule
        if bounds is not None or constraints:
            raise ValueError(
                f"{rule.name} cannot keep within bounds or constraints; use one of "
                f"scipy's methods that can, or other variables, such as a logarithm"
            )
        if hess is not None or hessp is not None:
            warn(f"Method {rule.name} does not use the Hessian.", RuntimeWarning)
        known = {key: options.pop(key) for key in {*options} & {*rule.hyperparameters}}
        if options:
            warn(f"Unknown solver options: {', '.join(options)}", OptimizeWarning)
        never = -1.0
        gtol = limit("gtol", gtol, limit("tol", tol, 1e-5))
        ftol, xtol = limit("ftol", ftol, never), limit("xtol", xtol, never)
        maxiter = limit("maxiter", maxiter, 10_000)
        x = np.atleast_1d(np.asarray(x0))
        if x.dtype.kind not in "biuf":
            raise TypeError(f"x0 must be of real numbers, got {x.dtype}")
        x = x.astype(x.dtype if x.dtype in DTYPES else np.float64, order="C")
        opt = rule(x, backend=backend, threads=threads, **known)
        objective, tell = Objective(fun, jac, args), teller(callback)

        before = now = lowest = objective.at(x)
        passed, moved = [now.x], False
        ending: Ending | None = None
        while ending is None:
            if not now.finite:
                ending = NOT_FINITE
            elif largest(now.jac) <= gtol:
                ending = GRADIENT
            elif moved and step(before, now) <= xtol:
                ending = STEP
            elif moved and change(before, now) <= ftol:
                ending = CHANGE
            elif opt.steps >= maxiter:
                ending = MAXITER
            else:
                opt.step(now.jac, clip_norm=clip_norm, clip_value=clip_value)
                before, now = now, objective.at(x)
                moved = moved or bool((now.x != before.x).any())
                lowest = lowest.lower(now)
                if return_all:
                    passed.append(now.x)
                ending = tell(now, opt.steps)

        last = now
        if rule.evaluate is not None and opt.steps:
            last = objective.at(opt.eval_params())
            lowest = lowest.lower(last)
            if ending is GRADIENT and not largest(last.jac) <= gtol:
                last = now
        point = last if ending is GRADIENT or not best else lowest
        result = OptimizeResult(
            **point._asdict(),
            nit=opt.steps,
            nfev=objective.nfev,
            njev=objective.njev,
            success=ending.status == 0,
            **ending._asdict(),
        )
        if return_all:
            result.allvecs = passed
        if disp:
            print(
                f"{ending.message}\n"
                f"         Current function value: {point.fun:f}\n"
                f"         Iterations: {opt.steps}\n"
                f"         Function evaluations: {objective.nfev}\n"
                f"         Gradient evaluations: {objective.njev}"
            )
        return result


def warn(message: str, category: type[Warning]) -> None:
    """Where ``minimize`` was called."""
    warnings.warn(message, category, stacklevel=4)


def limit(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return value


def largest(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0))


def step(before: Point, now: Point) -> float:
    """How far x has come, as ``xtol`` means it."""
    return largest(now.x - before.x) / max(largest(now.x), 1.0)


def change(before: Point, now: Point) -> float:
    """By how much the objective has changed, as ``ftol`` means it."""
    return abs(now.fun - before.fun) / max(abs(before.fun), abs(now.fun), 1.0)


def teller(
    callback: Callable[..., Any] | None,
) -> Callable[[Point, int], Ending | None]:
    """Return a function that calls a callback after a step. It returns whether to
    stop."""
    by_name = callback and [*inspect.signature(callback).parameters]

    def tell(now: Point, nit: int) -> Ending | None:
        if callback is None:
            return None
        x, fun, jac = now
        x, jac = np.copy(x), np.copy(jac)  # a callback may keep or change them
        try:
            if by_name == ["intermediate_result"]:
                result = OptimizeResult(x=x, fun=fun, jac=jac, nit=nit)
                callback(intermediate_result=result)
            else:
                callback(x)
        except StopIteration:
            return STOPPED
        return None

    return tell


def about(method: Method) -> str:
    """Return the docstring of a method of fastopt's."""
    rule, options = method.rule, docstrings.hyperparameters(method.rule)
    parts = [
        docstrings.words(rule),
        "A :class:`Method` of ``scipy.optimize.minimize``, which describes its other "
        "options.",
        "\n".join(["Parameters", "----------", *options]),
    ]
    if method.rule in RULES:
        parts.append(EXAMPLE.format(name=rule.name))
    return "\n\n".join(parts)


EXAMPLE = """\
Examples
--------
>>> from scipy.optimize import minimize, rosen, rosen_der
>>> import fastopt.scipy
>>> method, options = fastopt.scipy.{name}, {{"lr": 1e-3, "maxiter": 5}}
>>> minimize(rosen, [-1.0, 2.0], jac=rosen_der, method=method, options=options).nit
5
"""

Method.__doc__ = docstrings.Described(Method.__doc__, about)  # type: ignore[assignment]

globals().update({rule.name: Method(rule) for rule in RULES})
