"""Several tasks: how much weight the gradient of each gets in a step.

The gradients of m tasks are the rows of a matrix J. All that the methods here need of
it is the Gram matrix of the products of every two rows, ``J @ J.T``, which :func:`gram`
makes in one pass over J. They turn it into m weights; a step with these forms
``weights @ J`` block by block, in the cache:

>>> import numpy as np, fastopt
>>> from fastopt import multitask
>>> w = np.zeros(3)
>>> opt = fastopt.gd(w, lr=1.0)
>>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])  # they conflict: J[0] @ J[1] < 0
>>> weights = multitask.upgrad(fastopt.gram(J))
>>> opt.step(J, weights=weights)
>>> bool((J @ w < 0).all())  # yet both losses fall
True

Each method is of one paper, and its own definition is all that it promises; the tests
hold it to that. What they have in common:

- Weights do not change when J is multiplied by a number, as long as float64 has its
  squares: the matrix is divided by its own size first. (Those of Nash-MTL and FairGrad
  do in their papers; here they are of the gradients over the root of the Frobenius norm
  of the Gram matrix, as Nash-MTL's authors have it.)
- A single task gets weight 1, but 1 + c of CAGrad. Where all gradients are zero, tasks
  count alike.
- A matrix that no gradients have is refused with ValueError: one that is not square,
  not symmetric, not finite, or has an eigenvalue clearly below zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastopt import backends
from fastopt.memory.arrays import on_device
from fastopt.memory.formats import DTYPES
from fastopt.memory.segments import Array
from fastopt.memory.trees import leaves
from fastopt.multitask.methods import (
    GradVac,
    aligned_mtl,
    cagrad,
    dualproj,
    fairgrad,
    imtl_g,
    mean,
    mgda,
    nash_mtl,
    pcgrad,
    upgrad,
)
from fastopt.optimizer import checks
from fastopt.rules import passes
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.threads import available, forked

__all__ = [
    "GradVac",
    "aligned_mtl",
    "cagrad",
    "dualproj",
    "fairgrad",
    "gram",
    "imtl_g",
    "mean",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "upgrad",
]


@standard
def gram(
    tasks: Any, *, backend: str | None = None, threads: int | None = None
) -> Array:
    """The products of the gradients of every two tasks, ``J @ J.T``.

    Parameters
    ----------
    tasks
        A list with the gradients of each task, in one structure: arrays, lists or dicts
        of arrays (nested too) or FlatBuffers; or an array with a row for each task. All
        are float32 or float64, of one dtype. They are only read. None in place of an
        array: the task does not depend on that parameter.
    backend
        "numpy", "cython", "numba" or "cuda"; by default as for an optimizer. All of
        them give the same bits.
    threads
        At most so many CPU threads; by default as for an optimizer.

    Returns
    -------
    array of float64, tasks x tasks
        Products and sums are of float64, in the order of all sums here: over each array
        by chunks, the arrays one after the other. On the CPU J is read once, in CUDA
        once for every two tasks.

    Raises
    ------
    TypeError, ValueError
        If the gradients of the tasks do not fit each other.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> fastopt.gram([np.array([1.0, 2.0]), np.array([-1.0, 1.0])])
    array([[5., 1.],
           [1., 2.]])
    """
    trees = checks.split_tasks("tasks", tasks)
    if backend is None:
        device = any(on_device(leaf) for _, leaf in leaves(trees))
        backend = backends.choose(passes.inner, device)
    module = backends.load(backend)
    layout = checks.layout(trees[0])
    gradients: list[list[Any]] = []
    for k, task in enumerate(trees):
        gradients.append([])
        checks.collect(layout, task, "", gradients[k], f"tasks[{k}]", "tasks[0]")
    paths = [path for path, _ in leaves(trees[0])]
    arrays = [
        [
            None
            if leaf is None
            else checks.as_gradient(module, f"tasks[{k}]{path}", leaf)
            for path, leaf in zip(paths, task, strict=True)
        ]
        for k, task in enumerate(gradients)
    ]
    _check_rows(paths, arrays)
    threads = available() if threads is None else checks.check_threads(threads)
    products: Array = module.gram(arrays, 1 if forked[0] else threads)
    return products


def _check_rows(paths: Sequence[str], tasks: Sequence[Sequence[Any]]) -> None:
    """Check that all arrays have one dtype, and that those with the same path have one
    shape."""
    first: tuple[str, Any] | None = None
    for i, path in enumerate(paths):
        same: tuple[str, Any] | None = None
        for k, task in enumerate(tasks):
            array, name = task[i], f"tasks[{k}]{path}"
            if array is None:
                continue
            if array.dtype not in DTYPES:
                raise TypeError(
                    f"{name} has dtype {array.dtype}; float32 or float64 is needed"
                )
            first, same = first or (name, array), same or (name, array)
            if array.dtype != first[1].dtype:
                raise TypeError(
                    f"{name} has dtype {array.dtype} but {first[0]} has "
                    f"{first[1].dtype}; convert it with .astype"
                )
            if array.shape != same[1].shape:
                raise ValueError(
                    f"{name} has shape {array.shape} but {same[0]} has {same[1].shape}"
                )
            checks.check_layout(name, array)
