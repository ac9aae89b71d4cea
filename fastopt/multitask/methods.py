"""Methods that turn a Gram matrix into weights, each from a paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastopt.multitask.matrices import (
    DEPENDENT,
    STATIONARY,
    Weights,
    checked_gram,
    equal_shares,
    least_square,
    normalized,
    norms_and_cosines,
    preferences,
    reciprocals,
)
from fastopt.optimizer import checks
from fastopt.rule import check_hyperparameter
from fastopt.runtime.arithmetic import standard


@standard
def mean(gram: Any, preference: Any = None) -> Weights:
    """Return the preference, by default equal weights: a weighted sum of losses.

    Parameters
    ----------
    gram
        The m x m Gram matrix of the gradients of m tasks, as :func:`gram` makes it.
    preference
        The importance of each task: m numbers of at least 0. By default 1 / m.

    Returns
    -------
    m weights, float64

    Raises
    ------
    TypeError, ValueError
        For a matrix that cannot be a Gram matrix. Arguments, result and errors are the
        same for all methods.

    Examples
    --------
    >>> from fastopt import multitask
    >>> multitask.mean([[1.0, 0.0], [0.0, 1.0]])
    array([0.5, 0.5])
    """
    return preferences(preference, len(checked_gram(gram)))


@standard
def mgda(gram: Any) -> Weights:
    """Use the shortest of all weighted means of the gradients. Désidéri 2012,
    doi:10.1016/j.crma.2012.03.014; Sener & Koltun 2018, arXiv:1810.04650.

    The weights are at least 0, and their sum is 1. Along the direction, each loss falls
    at least by the square of its length, which is zero where no direction makes all
    losses fall: a task with a gradient of zero gets all the weight. The solution is
    exact; others stop the iteration of Frank and Wolfe early.

    >>> from fastopt import multitask
    >>> multitask.mgda([[1.0, 0.0], [0.0, 3.0]])
    array([0.75, 0.25])
    """
    matrix = checked_gram(gram)
    norms, cosines = norms_and_cosines(matrix)
    if not norms.all():
        return normalized((norms == 0).astype(np.float64))
    # With the shortest as the unit of length. Where x is the least, so is the mean with
    # weights x / sum(x), whatever its length: what is added holds the sum near 1.
    relative = norms.min() / norms
    return normalized(
        least_square(cosines + relative * relative[:, None], relative) * relative
    )


@standard
def dualproj(gram: Any, preference: Any = None) -> Weights:
    """Project the mean gradient, or that of the preference, onto the directions that
    conflict with no task. Lopez-Paz & Ranzato 2017, arXiv:1706.08840 (GEM), as in
    Quinton & Rey 2024, arXiv:2406.16232.

    >>> from fastopt import multitask
    >>> multitask.dualproj([[1.0, -1.0], [-1.0, 4.0]])
    array([0.5, 0.5])
    >>> multitask.dualproj([[1.0, -2.0], [-2.0, 5.0]])
    array([1. , 0.5])
    """
    norms, cosines = norms_and_cosines(checked_gram(gram))
    return _projected(norms, cosines, preferences(preference, len(norms)))


def _projected(norms: Weights, cosines: Weights, weights: Weights) -> Weights:
    """Add to the weights what is needed so that no task is in conflict."""
    lengths = weights * norms
    longest = float(lengths.max()) or 1.0
    more = least_square(cosines, -cosines @ (lengths / longest))
    return weights + longest * more * reciprocals(norms)


@standard
def upgrad(gram: Any, preference: Any = None) -> Weights:
    """Project each gradient onto the directions that conflict with no task, and take
    the mean of these, or that of the preference. Quinton & Rey 2024, arXiv:2406.16232.

    The direction conflicts with no task, and is linear in the length of each gradient.

    >>> from fastopt import multitask
    >>> multitask.upgrad([[2.0, -2.0], [-2.0, 4.0]])
    array([1.  , 0.75])
    """
    norms, cosines = norms_and_cosines(checked_gram(gram))
    total = np.zeros(len(norms))
    for alone in np.diag(preferences(preference, len(norms))):
        total += _projected(norms, cosines, alone)
    return total


@standard
def pcgrad(gram: Any, rng: np.random.Generator) -> Weights:
    """Subtract from each gradient what conflicts with the others, which are taken in
    random order, and add the results. Yu et al. 2020, arXiv:2001.06782.

    Afterwards two tasks are not in conflict, but of more tasks some may be. The weights
    are those of a sum, not of a mean. ``rng`` draws an order for each task at each
    call.

    >>> import numpy as np
    >>> from fastopt import multitask
    >>> multitask.pcgrad([[2.0, -2.0], [-2.0, 4.0]], np.random.default_rng(0))
    array([2. , 1.5])
    """
    matrix = checked_gram(gram)

    def adjust(i: int, j: int, weights: Weights) -> None:
        product = matrix[j] @ weights
        if product < 0 and matrix[j, j] > 0:
            weights[j] -= product / matrix[j, j]

    return _adjusted(rng, len(matrix), adjust)


def _adjusted(
    rng: np.random.Generator, count: int, adjust: Callable[[int, int, Weights], None]
) -> Weights:
    """Add up the weights of all tasks, each adjusted to all others in a random order.
    ``adjust(i, j, weights)`` does that to the weights of task i for task j."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(
            f"rng must be a NumPy Generator, such as np.random.default_rng(0), "
            f"got {rng!r}"
        )
    total = np.zeros(count)
    for i in range(count):
        weights = np.eye(count)[i]
        for j in rng.permutation([j for j in range(count) if j != i]).tolist():
            adjust(i, j, weights)
        total += weights
    return total


class GradVac:
    """Adjust gradients as :func:`pcgrad` does, but to an angle of at most their average
    angle so far, in place of a right angle. Wang et al. 2020, arXiv:2010.05874,
    algorithm 1.

    Parameters
    ----------
    rng
        The generator that draws the orders.
    beta
        The weight of the new cosine in the average, in [0, 1).

    Notes
    -----
    As in the paper, weights have no bound: they grow as the average angle between two
    tasks shrinks, if the two then disagree.

    Attributes
    ----------
    targets
        The average cosines, tasks x tasks; None before the first call. To resume a run,
        restore them and the state of ``rng``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastopt import multitask
    >>> weights = multitask.GradVac(np.random.default_rng(0), beta=0.5)
    >>> weights([[1.0, 0.5], [0.5, 1.0]])
    array([1., 1.])
    >>> weights([[1.0, 0.0], [0.0, 1.0]]).round(4)
    array([1.2582, 1.2582])
    """

    def __init__(self, rng: np.random.Generator, beta: float = 1e-2):
        _adjusted(rng, 0, lambda i, j, weights: None)  # checks it
        self.rng = rng
        self.beta = float(check_hyperparameter("beta", "beta", beta, 1.0))
        self.targets: Weights | None = None

    @standard
    def __call__(self, gram: Any) -> Weights:
        """Return the weights for the next step."""
        matrix = checked_gram(gram)
        count = len(matrix)
        targets = np.zeros((count, count)) if self.targets is None else self.targets
        if np.shape(targets) != (count, count):
            raise ValueError(
                f"gram is of {count} tasks, but the targets are of "
                f"{len(targets)}; make another GradVac"
            )
        targets = np.array(targets, np.float64)
        norms = np.sqrt(np.maximum(matrix.diagonal(), 0.0))

        def adjust(i: int, j: int, weights: Weights) -> None:
            norm = math.sqrt(max(0.0, float(weights @ matrix @ weights)))
            if norm == 0 or norms[j] == 0:
                return  # there is no angle
            cosine = float(matrix[j] @ weights) / (norm * norms[j])
            cosine, target = min(1.0, max(-1.0, cosine)), float(targets[i, j])
            if cosine < target:
                sine, wanted = math.sqrt(1 - cosine**2), math.sqrt(1 - target**2)
                change = norm * (target * sine - cosine * wanted)
                weights[j] += change / (norms[j] * wanted)
            targets[i, j] += self.beta * (cosine - target)

        total = _adjusted(self.rng, count, adjust)
        self.targets = targets
        return total


@standard
def cagrad(gram: Any, c: float = 0.5) -> Weights:
    """Use the direction that is best for the worst task, among those whose distance
    from the mean gradient is at most c times its length. Liu et al. 2021,
    arXiv:2110.14048.

    ``c`` is in [0, 1); 0 gives the mean. As in the paper, there is no rescaling, which
    its code has. Where several directions are best, because none makes all losses fall,
    it is the one nearest to the mean.

    >>> from fastopt import multitask
    >>> multitask.cagrad([[1.0, 0.0], [0.0, 1.0]])
    array([0.75, 0.75])
    """
    c = float(check_hyperparameter("c", "c", c, 0.5))
    if not 0 <= c < 1:
        raise ValueError(f"c must be in [0, 1), got {c!r}")
    matrix = checked_gram(gram)
    equal = equal_shares(len(matrix))
    radius = c * math.sqrt(max(0.0, float(equal @ matrix @ equal)))
    shortest = mgda(matrix)
    square = max(0.0, float(shortest @ matrix @ shortest))
    if radius * radius <= DEPENDENT * float(matrix.max()):
        return equal
    norms, cosines = norms_and_cosines(matrix)
    unit = float(norms.max())
    inverse, norms = reciprocals(norms) * unit, norms / unit
    radius, length = radius / unit, math.sqrt(square) / unit
    gains = cosines @ norms / len(norms)  # of the mean, along each gradient

    def nearest(gain: float) -> tuple[Weights, float]:
        """What has to be added to the mean for every task to gain so much, and its
        length."""
        more = least_square(cosines, gain * inverse - gains)
        return more, math.sqrt(max(0.0, float(more @ cosines @ more)))

    # The length grows with the gain, and is convex in it: from above, Newton's method
    # comes down to the radius. The gain of the best direction is at most that of the
    # shortest mean (by duality, for any mean); where that is zero, it is none.
    stationary = length * length <= DEPENDENT * len(matrix)
    most = float(shortest * norms @ gains) + radius * length
    gain = 0.0 if stationary else most
    more, length = nearest(gain)
    if stationary and length <= radius:
        return equal + more * inverse
    for _ in range(100):
        slope = float(inverse @ more)
        if length <= radius * (1 + 1e-13) or slope <= 0:
            break
        lower = gain - (length - radius) * length / slope
        if not lower < gain:  # as near as float64 comes
            break
        gain = lower
        more, length = nearest(gain)
    return equal + more * inverse * (radius / length if length > 0 else 0.0)


@standard
def imtl_g(gram: Any) -> Weights:
    """Use the direction that has equal projections onto all gradients. Liu et al. 2021
    (IMTL-G), openreview.net/forum?id=IMPnRXEWpvr.

    The sum of the weights is 1, and they may be negative: the definition allows a
    direction along which all losses rise. If several weights do this, for dependent
    tasks, they are those with the least squares; if only the zero direction does, it is
    used. A task with a gradient of zero gets weight 0.

    Raises
    ------
    ValueError
        Also if no weights with the sum 1 give such a direction, which only happens for
        dependent tasks.

    Examples
    --------
    >>> from fastopt import multitask
    >>> multitask.imtl_g([[1.0, 0.0], [0.0, 4.0]]).round(4)
    array([0.6667, 0.3333])
    """
    matrix = checked_gram(gram)
    norms, cosines = norms_and_cosines(matrix)
    there = norms > 0
    weights = np.zeros(len(matrix))
    if not there.any():
        return equal_shares(len(matrix))
    inverse = norms.min(initial=math.inf, where=there) / norms[there]
    roots, vectors = np.linalg.eigh(cosines[np.ix_(there, there)])
    none = roots <= DEPENDENT * len(roots) * roots[-1]
    along = vectors[:, ~none]
    solution = (along / roots[~none]) @ along.sum(0) * inverse
    if none.any():
        # Weights of no effect: what they can be, as an orthonormal basis.
        idle, _ = np.linalg.qr(vectors[:, none] * inverse[:, None])
        if np.abs(vectors[:, none].sum(0)).max() < math.sqrt(DEPENDENT) * len(roots):
            solution = solution - idle @ (solution @ idle)
        else:
            solution = idle @ idle.sum(0)
    total, size = float(solution.sum()), float(np.abs(solution).sum())
    if abs(total) <= DEPENDENT * len(roots) * size:
        raise ValueError(
            f"IMTL-G has no solution for the Gram matrix {gram!r}: the tasks are "
            f"linearly dependent, and weights with equal projections sum to 0"
        )
    weights[there] = solution / total
    return weights


@standard
def aligned_mtl(gram: Any, preference: Any = None) -> Weights:
    """Take the mean, or that of the preference, of gradients that are made orthogonal
    and of one length, the least singular value of J. Senushkin et al. 2023,
    arXiv:2305.19000.

    Singular values of zero, which dependent tasks have, do not count.

    >>> from fastopt import multitask
    >>> multitask.aligned_mtl([[4.0, 0.0], [0.0, 1.0]])
    array([0.25, 0.5 ])
    """
    matrix = checked_gram(gram)
    preference = preferences(preference, len(matrix))
    roots, vectors = np.linalg.eigh(matrix)
    there = roots > DEPENDENT * len(roots) * roots[-1]
    if not there.any():
        return np.array(preference)
    roots, vectors = roots[there], vectors[:, there]
    weights: Weights = vectors @ (np.sqrt(roots[0] / roots) * (preference @ vectors))
    return weights


def nash_mtl(gram: Any) -> Weights:
    """Use the bargain that maximizes the product of the gains of all tasks. Navon et
    al. 2022, arXiv:2202.01017: ``G @ w = 1 / w``.

    The direction conflicts with no task, and the square of its length is m times the
    Frobenius norm of G. Where no direction makes all losses fall, there is no bargain;
    then a small part of its own is added to each gradient, and the result is projected
    as by :func:`dualproj`. A task with a gradient of zero gets weight 0. The
    ``max_norm`` of the authors' code is not included: see ``clip_norm`` of a step.

    >>> from fastopt import multitask
    >>> multitask.nash_mtl([[1.0, 0.0], [0.0, 1.0]]).round(4)
    array([1.1892, 1.1892])
    """
    return fairgrad(gram, 1.0)


@standard
def fairgrad(gram: Any, alpha: float = 2.0) -> Weights:
    """Use a direction that is alpha-fair in the gains of the tasks. Ban & Ji 2024,
    arXiv:2402.15638: ``G @ w = w ** (-1 / alpha)``, for alpha above 0.

    With alpha 1 this is :func:`nash_mtl`, which says what happens if there is no
    solution. The larger alpha is, the more alike are the gains. The authors' scripts
    use 2.

    >>> from fastopt import multitask
    >>> multitask.fairgrad([[1.0, 0.0], [0.0, 1.0]]).round(4)
    array([1.2599, 1.2599])
    """
    alpha = checks.check_positive("alpha", alpha)
    matrix = checked_gram(gram)
    norms, cosines = norms_and_cosines(matrix)
    there = norms > 0
    weights = np.zeros(len(matrix))
    if not there.any():
        return equal_shares(len(matrix))
    norms = norms[there] / math.sqrt(float(np.linalg.norm(matrix)))
    cosines = cosines[np.ix_(there, there)]
    shortest = mgda(cosines)
    lost = max(0.0, STATIONARY - float(shortest @ cosines @ shortest))
    apart = cosines + lost * np.eye(len(cosines))
    solution = _fair(apart, norms ** (1 / alpha - 1), 1 / alpha) / norms
    weights[there] = _projected(norms, cosines, solution) if lost else solution
    return weights


def _fair(matrix: Weights, gains: Weights, power: float) -> Weights:
    """The x above 0 with ``matrix @ x = gains / x**power``: where a convex function, of
    which the difference is the slope, is least. By Newton's method, damped."""

    def value(x: Weights) -> float:
        if power == 1:
            return float(x @ matrix @ x / 2 - gains @ np.log(x))
        return float(x @ matrix @ x / 2 - gains @ x ** (1 - power) / (1 - power))

    x = gains ** (1 / (1 + power))
    rounded = 2.0**-50 * len(x)
    for _ in range(1000):
        wanted = gains / x**power
        slope, sizes = matrix @ x - wanted, np.abs(matrix) @ x + wanted
        if (np.abs(slope) <= rounded * sizes).all():
            return x
        curvature = matrix + np.diag(power * wanted / x)
        try:
            step = np.linalg.solve(curvature, -slope)
        except np.linalg.LinAlgError:  # of nearly parallel tasks: singular, as rounded
            step = np.linalg.lstsq(curvature, -slope)[0]
        way = 0.9 / max(0.9, float((-step / x).max()))  # at the most, to stay above 0
        # Where the value cannot tell any more, Newton's own step is best.
        most, descent = value(x) + rounded * float(x @ sizes), float(slope @ step)
        while value(x + way * step) > most + way * descent / 4:
            way /= 2
        x = x + way * step
    raise RuntimeError(
        f"no weights were found for the cosines {matrix!r}; please report it"
    )
