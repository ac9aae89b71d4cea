"""Gram matrices of gradients, checked and solved: what the methods have in common."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastopt.optimizer import checks

Weights = npt.NDArray[np.float64]

# Of the errors that a Gram matrix may have, relative to its size: those of products in
# float32, as of J @ J.T.
TOLERANCE = 1e-5
# Eigenvalues below this many, times their number, of the largest are those of dependent
# tasks: a gradient rounded to float32 moves them by 1e-15.
DEPENDENT = 1e-14
# The least square that a mean of unit gradients has for Nash-MTL and FairGrad, which
# know no answer where it is zero.
STATIONARY = 1e-6


def checked_gram(gram: Any) -> Weights:
    """Check a Gram matrix, and return it in float64, divided by its trace unless all of
    it is zero."""
    try:
        matrix = np.asarray(gram, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"gram must be a matrix of numbers: {error}") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"gram must be a square matrix with a row for each task, as gram(J) makes "
            f"it, got shape {matrix.shape}"
        )
    finite = np.isfinite(matrix)
    alone = finite.diagonal()  # where a task meets no other one
    bad = np.flatnonzero(~finite.all(1) if alone.all() else ~alone)
    if bad.size:
        k = int(bad[0])
        raise ValueError(
            f"gram[{k}] is not finite, {matrix[k]}: the gradient of a task is infinite "
            f"or NaN, or its square too large; leave the step out, or that task"
        )
    size = float(np.abs(matrix).max())
    if size == 0:
        return matrix
    matrix = matrix / size
    if np.abs(matrix - matrix.T).max() > TOLERANCE:
        raise ValueError("gram must be symmetric, as J @ J.T is")
    matrix = (matrix + matrix.T) / 2
    least = float(np.linalg.eigvalsh(matrix)[0])
    if least < -TOLERANCE * len(matrix):
        raise ValueError(
            f"gram has the eigenvalue {least * size:g}, but J @ J.T has none below 0"
        )
    return matrix / float(matrix.trace())


def norms_and_cosines(gram: Weights) -> tuple[Weights, Weights]:
    """Return the norms of the gradients and the matrix of cosines between them, which
    has no eigenvalue below zero. The cosines of a zero gradient are zero."""
    norms = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    inverse = reciprocals(norms)
    cosines = gram * inverse * inverse[:, None]
    roots, vectors = np.linalg.eigh(cosines)
    if roots[0] < -DEPENDENT * len(roots):  # of products in float32
        cosines = (vectors * np.maximum(roots, 0.0)) @ vectors.T
    return norms, cosines


def reciprocals(norms: Weights) -> Weights:
    """Return ``1 / norms``, with zero where a norm is zero."""
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def equal_shares(count: int) -> Weights:
    return normalized(np.ones(count))


def normalized(weights: Weights) -> Weights:
    """Scale weights so that their sum is 1."""
    shares: Weights = weights / weights.sum()
    return shares


def preferences(value: Any, count: int) -> Weights:
    """Check a preference and scale it. By default all tasks count alike."""
    if value is None:
        return equal_shares(count)
    preference = np.array(
        checks.check_weights(value, count, np.dtype(np.float64), "preference")
    )
    if (preference < 0).any() or not preference.any():
        raise ValueError(f"preference must be at least 0, and not all 0, got {value!r}")
    return preference


def least_square(matrix: Weights, linear: Weights) -> Weights:
    """Return the nonnegative x that minimizes ``x @ matrix @ x / 2 - linear @ x``, by
    Lawson and Hanson's method: one more element of x is freed at a time, and the others
    are 0. The diagonal must be about 1, or 0 where linear is 0."""
    count = len(linear)
    # Dependent rows make singular systems; with this, far solutions, in the direction
    # that matters. It changes no more than rounding does.
    matrix = matrix + 2.0**-50 * np.eye(count)
    x, free = np.zeros(count), np.zeros(count, bool)
    enough = 2.0**-48 * count * float(np.abs(linear).max())
    for _ in range(30 * count):
        slope = np.where(free, -math.inf, linear - matrix @ x)
        for new in np.argsort(-slope):
            if slope[new] <= enough:
                return x
            free[new] = True
            target = solution(matrix, linear, free)
            if target[new] > 0:
                break
            free[new] = False  # by rounding alone: not this one
        else:
            return x
        while (target[free] <= 0).any():
            stops = np.flatnonzero(free & (target <= 0))
            ways = x[stops] / (x[stops] - target[stops])
            x = np.maximum(x + ways.min() * (target - x), 0.0)
            x[stops[ways.argmin()]] = 0.0
            free &= x > 0
            target = solution(matrix, linear, free)
        x = target
    raise RuntimeError(
        f"no weights were found for the Gram matrix {matrix!r}; please report it"
    )


def solution(matrix: Weights, linear: Weights, free: npt.NDArray[np.bool_]) -> Weights:
    """Solve for the free elements, whose gradient must be zero; the others are 0."""
    x = np.zeros(len(linear))
    if free.any():
        x[free] = np.linalg.solve(matrix[np.ix_(free, free)], linear[free])
    return x
