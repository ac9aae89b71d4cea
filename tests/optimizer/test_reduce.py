"""Parameters that are divided among processes, here threads: ``reduce`` adds up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt.rules import RULES

SIZES = (7, 1, 12, 0, 5000)
RULE_NAMES = [rule.name for rule in RULES if not rule.factored and rule.name != "muon"]


class Threads:
    """Threads that each have a slice of every array, and add vectors up in order."""

    def __init__(self, count: int):
        self.count, self.barrier = count, threading.Barrier(count, timeout=30)
        self.vectors: list[Any] = [None] * count
        self.lengths: list[list[int]] = [[] for _ in range(count)]

    def cut(self, array: Any, rank: int) -> Any:
        size = -(-len(array) // self.count)
        return array[rank * size : (rank + 1) * size].copy()

    def reduce(self, rank: int) -> Callable[[Any], None]:
        def add(vector: Any) -> None:
            self.lengths[rank].append(len(vector))
            self.vectors[rank] = vector.copy()
            self.barrier.wait()
            total = self.vectors[0].copy()
            for other in self.vectors[1:]:
                total += other
            self.barrier.wait()
            vector[:] = total

        return add

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def call(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        workers = [threading.Thread(target=call, args=(r,)) for r in range(self.count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def arrays(seed: int, dtype: Any = np.float64) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=size).astype(dtype) for size in SIZES]


def train(rule: Any, params: list[Any], cut: Any, options: dict, **more: Any) -> Any:
    opt = rule(params, **more)
    for k in range(5):
        grads: list[Any] = list(map(cut, arrays(k + 1, params[0].dtype)))
        if k == 2:
            grads[0] = None
        opt.step(grads, **options)
    return params, opt.grad_norm, opt.skipped


def both(name: str, dtype: Any, options: dict, count: int, **more: Any) -> Any:
    rule = getattr(fastopt, name)
    one = train(rule, arrays(0, dtype), lambda array: array, options, **more)
    threads = Threads(count)

    def work(rank: int) -> Any:
        mine = [threads.cut(array, rank) for array in arrays(0, dtype)]
        cut = lambda array: threads.cut(array, rank)  # noqa: E731
        more_here = {**more, "reduce": threads.reduce(rank)}
        return train(rule, mine, cut, options, **more_here)

    many = threads.run(work)
    params = [np.concatenate([of[0][i] for of in many]) for i in range(len(SIZES))]
    assert len({norm for _, norm, _ in many if norm == norm}) <= 1
    assert len({tuple(lengths) for lengths in threads.lengths}) == 1
    return one, (params, *many[0][1:]), threads.lengths[0]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_slices_step_as_whole_arrays(name: str, count: int) -> None:
    (one, *_), (many, *_), lengths = both(name, np.float64, {}, count)
    rule = getattr(fastopt, name)
    for theirs, ours in zip(one, many, strict=True):
        if rule.measure is None:
            np.testing.assert_array_equal(theirs, ours)
        else:
            np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-12)
    # What the documentation says of the bytes: nothing, or one vector a step.
    rows = len(SIZES) if rule.by_segment else 1
    assert lengths == ([] if rule.measure is None else [rows * (1 + rule.terms)] * 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "prodigy"])
def test_the_norm_is_that_of_all_slices(name: str, dtype: Any) -> None:
    options = {"clip_norm": 0.5, "nonfinite": "skip"}
    (one, norm, _), (many, all_, _), lengths = both(name, dtype, options, 3, lr=0.25)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    assert norm == pytest.approx(all_, rel=1e-12)
    for theirs, ours in zip(one, many, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=tolerance, atol=tolerance)
    assert lengths.count(2) == 5


def test_groups_formats_averages_and_tasks() -> None:
    def work(rank: int, threads: Threads | None) -> Any:
        cut = (lambda a: a) if threads is None else lambda a: threads.cut(a, rank)
        params = list(map(cut, arrays(0, np.float32)))
        groups = [{"params": params[:2], "lr": 0.25}, {"params": params[2:]}]
        reduce = None if threads is None else threads.reduce(rank)
        opt = fastopt.lars(groups, ema=0.5, lr=0.125, reduce=reduce)
        for k in range(3):
            tasks = [list(map(cut, arrays(3 * k + i, np.float32))) for i in (1, 2)]
            given = [[task[:2], task[2:]] for task in tasks]
            opt.step(given, weights=[0.5, 2.0], clip_norm=1.0)
            opt.accumulate(given[0])
            opt.step()
        return [*params, *opt.ema_params[0], *opt.ema_params[1]]

    threads = Threads(2)
    one, many = work(0, None), threads.run(lambda rank: work(rank, threads))
    for i, theirs in enumerate(one):
        ours = np.concatenate([of[i] for of in many])
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", [0, 1])
def test_a_nan_in_one_slice_stops_all(where: int) -> None:
    threads = Threads(2)

    def work(rank: int) -> Any:
        param = np.ones(5)
        opt = fastopt.adamw(param, reduce=threads.reduce(rank))
        grad = np.full(5, np.nan if rank == where else 1.0)
        opt.step(grad, nonfinite="skip")
        with pytest.raises(FloatingPointError, match="infinity or NaN in grad"):
            opt.step(grad, nonfinite="raise")
        np.testing.assert_array_equal(param, np.ones(5))
        opt.step(np.ones(5), nonfinite="raise")
        return opt.skipped, opt.steps

    assert threads.run(work) == [(1, 1)] * 2


def test_what_cannot_be_right_is_refused() -> None:
    matrix = np.ones((3, 3))
    with pytest.raises(TypeError, match="whole matrices"):
        fastopt.Muon(matrix, reduce=lambda vector: None)
    with pytest.raises(TypeError, match="whole matrices"):
        fastopt.Adafactor(matrix, reduce=lambda vector: None)
    with pytest.raises(TypeError, match="reduce must be a function"):
        fastopt.adamw(matrix, reduce=3)
    opt = fastopt.adamw(matrix, reduce=lambda vector: vector * 2)
    with pytest.raises(TypeError, match="in place and return None"):
        opt.step(matrix.copy(), clip_norm=1.0)
    for left in (np.nan, -1.0, np.inf):
        opt = fastopt.lamb(matrix, reduce=lambda vector, left=left: vector.fill(left))
        with pytest.raises(ValueError, match="must add its vector up"):
            opt.step(matrix.copy())
    opt = fastopt.adamw(matrix, reduce=lambda vector: vector.fill(-1.0))
    with pytest.raises(ValueError, match="must add its vector up"):
        opt.step(matrix.copy(), clip_norm=1.0)
    np.testing.assert_array_equal(matrix, np.ones((3, 3)))
    assert opt.steps == 0
    opt = fastopt.adamw(matrix, reduce=lambda vector: None)
    opt.step(matrix.copy())  # which needs no sum
    assert opt.steps == 1
