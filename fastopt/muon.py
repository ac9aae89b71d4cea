"""Muon: momentum made orthogonal, for matrices; AdamW for all other arrays.

The momentum, the step and AdamW are kernels like every rule's; between the first two, a
matrix goes through products of the array library that owns its memory: NumPy's BLAS, or
that of torch or CuPy on a GPU.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastopt import checks, passes
from fastopt.bound import fill, shrinking
from fastopt.flat import Array, leaves, rebuild
from fastopt.optimizer import ACCUMULATED, Optimizer
from fastopt.parameters import expanded, zeros
from fastopt.rule import check_hyperparameter
from fastopt.rules.adamw import adamw as adamw_rule
from fastopt.rules.sgdw import sgdw

# Jordan et al. 2024: chosen to push small singular values up fast.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(u: Any, steps: int, eps: float) -> Any:
    """A matrix near ``u @ inverse_root(u.T @ u)``, of NumPy, torch or CuPy, in whose
    memory it may be: Newton and Schulz's iteration with a quintic polynomial."""
    tall = u.shape[0] > u.shape[1]
    x = u.T if tall else u
    x = x / max(math.sqrt(float((x * x).sum())), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = A * x + (B * gram + C * (gram @ gram)) @ x
    return x.T if tall else x


def adjustment(shape: tuple[int, ...], adjust_lr: str) -> float:
    """The factor for the learning rate of a matrix."""
    rows, columns = shape
    if adjust_lr == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def on_its_device(array: Any) -> Any:
    """A numba device array as one of a library that has products there."""
    if not checks.on_device(array):
        return array
    if not hasattr(array, "__cuda_array_interface__"):  # numba's simulator
        return array.copy_to_host()
    for name, convert in (("cupy", "asarray"), ("torch", "as_tensor")):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        given = {} if name == "cupy" else {"device": "cuda"}
        return getattr(library, convert)(array, **given)
    raise RuntimeError(
        "Muon on a GPU needs the matrix products of CuPy or torch; install one of them"
    )


class Muon:
    """Muon for the matrices among the parameters, AdamW for the rest. Jordan et al.
    2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.

    Parameters
    ----------
    params
        An array, a list or dict of arrays, nested too, or a ``FlatBuffer``. Those of
        two dimensions go to Muon, all others to AdamW; what is a matrix but should not
        (embeddings, the last layer) belongs into an ``adamw`` of its own, say the
        authors.
    lr, weight_decay, momentum, nesterov, eps, ns_steps
        As torch's: weight decay is decoupled, the momentum an average of the gradients,
        ``ns_steps`` the iterations. Products are of the parameters' dtype; torch's are
        of bfloat16.
    adjust_lr
        "original": lr times the root of rows / columns, if that is above 1;
        "match_rms_adamw": times 0.2 roots of the larger one, so that AdamW's lr serves.
    adamw
        Hyperparameters for the rest, such as ``{"lr": 3e-4}``.
    ema, backend, threads
        As for every optimizer.

    Attributes
    ----------
    matrices, others
        The optimizers for the step of the matrices, whose ``lr`` and ``weight_decay``
        may be changed or be schedules, and for the rest; None if there are none.
    steps, skipped, grad_norm
        As for every optimizer.

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit, before anything is written.

    Example
    -------
    >>> import numpy as np, fastopt
    >>> params = {"w": np.eye(3), "b": np.zeros(3)}
    >>> opt = fastopt.Muon(params, lr=0.1, weight_decay=0, adamw={"lr": 0.01})
    >>> opt.step({"w": np.diag([1.0, 2.0, 3.0]), "b": np.ones(3)})
    >>> params["b"].round(4)
    array([-0.01, -0.01, -0.01])
    """

    matrices: Optimizer | None
    others: Optimizer | None

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr: str = "original",
        adamw: Mapping[str, Any] | None = None,
        ema: float | None = None,
        backend: str | None = None,
        threads: int | None = None,
    ):
        if adjust_lr not in ("original", "match_rms_adamw"):
            raise ValueError(
                f'adjust_lr must be "original" or "match_rms_adamw", got {adjust_lr!r}'
            )
        if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or ns_steps < 1:
            raise ValueError(f"ns_steps must be an integer above 0, got {ns_steps!r}")
        self.eps = float(check_hyperparameter("eps", "eps", eps, 1.0))
        self.skipped, self.grad_norm = 0, math.nan
        self.ns_steps, self.adjust_lr = ns_steps, adjust_lr
        params = expanded(params)
        given = [leaf for _, leaf in leaves(params)]
        if not given:
            raise ValueError("params is empty; pass at least one array")
        self._is_matrix = [getattr(leaf, "ndim", 0) == 2 for leaf in given]
        self._params, self._layout = params, checks.layout(params)
        self._names = [f"grads{path}" for path, _ in leaves(params)]
        self._busy = False
        how: dict[str, Any] = {"backend": backend, "threads": threads}
        flat, rest = self._split(given)
        self.matrices = self.others = self._momentum = None
        self._updates: list[Array] = []
        if flat:
            self.matrices = sgdw(flat, lr=lr, weight_decay=weight_decay, ema=ema, **how)
            how["backend"] = self.matrices.backend
            matrices = self.matrices._params.arrays
            self._updates = zeros(self.matrices._module.state_arena, matrices, 1)[0]
            self._momentum = passes.momentum(
                self._updates, **how, momentum=momentum, nesterov=nesterov
            )
        if rest:
            self.others = adamw_rule(rest, ema=ema, **how, **(adamw or {}))

    def _split(self, values: list[Any]) -> tuple[list[Any], list[Any]]:
        """What belongs to matrices, and what to others."""
        pairs = list(zip(values, self._is_matrix, strict=True))
        return [v for v, matrix in pairs if matrix], [v for v, m in pairs if not m]

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        first = self.matrices or self.others
        return first.steps if first else 0

    @property
    def ema_params(self) -> Any:
        """The moving average of the parameters, in their structure; None without."""
        parts = [opt.ema_params if opt else [] for opt in (self.matrices, self.others)]
        if None in parts:
            return None
        ours, rest = map(iter, parts)
        values = (next(ours if matrix else rest) for matrix in self._is_matrix)
        return rebuild(self._params, values)

    def step(
        self,
        grads: Any = ACCUMULATED,
        *,
        grad_scale: float = 1.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        zero_grads: bool = False,
    ) -> None:
        """Update the parameters in place; all arguments are as those of
        :meth:`Optimizer.step`. The norm is of all gradients together."""
        scale = float(check_hyperparameter("", "grad_scale", grad_scale, 1.0))
        limit = checks.check_limit("clip_norm", clip_norm)
        checks.check_limit("clip_value", clip_value)
        checks.check_nonfinite(nonfinite)
        accumulated = grads is ACCUMULATED
        with self._alone():
            used = self._accumulated() if accumulated else self._taken(grads)
            if zero_grads and not accumulated:
                found = self._joined([given for _, given in used])
                checks.check_writeable(self._names, found)
            for part in self._parts.values():
                if part is not None:  # a schedule may have an error
                    part._values(part.steps)
            if limit < math.inf or nonfinite != "propagate":
                squares, finite = 0.0, True
                for opt, given in used:
                    norm, bad = opt._bound.norm(given, scale, opt._threads_now)
                    squares, finite = squares + norm * norm, finite and not bad
                self.grad_norm = math.sqrt(squares)
                if not finite and nonfinite == "raise":
                    raise FloatingPointError(
                        "not all is finite in the gradients; nothing was updated"
                    )
                if not finite and nonfinite == "skip":
                    self._skip(used, accumulated, zero_grads)
                    return
                scale *= shrinking(self.grad_norm, limit)
            asked: dict[str, Any] = {
                "grad_scale": scale,
                "clip_value": clip_value,
                "zero_grads": zero_grads,
            }
            directions: list[Any] = []
            for opt, given in used:
                opt.step(*(() if accumulated else (given,)), **asked)
                if opt is self._momentum:
                    directions = self._directions(given)
            if self.matrices is not None:
                self.matrices.step(directions)

    def _skip(
        self, used: list[tuple[Optimizer, list[Any]]], accumulated: bool, zero: bool
    ) -> None:
        """Leave the step out."""
        self.skipped += 1
        for opt, given in used:
            if accumulated:
                opt.drop_accumulated()
            for grad in given if zero else ():
                if grad is not None:
                    fill(grad, 0.0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No step of this, in another thread either, while this lasts."""
        if self._busy:
            raise RuntimeError("this Muon is in a step, in another thread")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def accumulate(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Add gradients to sums that the next ``step()`` takes; as every optimizer."""
        with self._alone():
            for opt, given in self._taken(grads):
                opt.accumulate(given, grad_scale=grad_scale)

    def drop_accumulated(self) -> None:
        """Forget what :meth:`accumulate` was given since the last step."""
        for opt in (self._momentum, self.others):
            if opt is not None:
                opt.drop_accumulated()

    def _taken(self, grads: Any) -> list[tuple[Optimizer, list[Any]]]:
        """The optimizers that take gradients, and theirs; all of them are looked at
        before anything is written."""
        found: list[Any] = []
        checks.collect(self._layout, grads, "", found)
        pairs = zip((self._momentum, self.others), self._split(found), strict=True)
        used = [(opt, given) for opt, given in pairs if opt is not None]
        taken = [
            (opt, opt._take(opt._bound.step, given, opt._bound.spans))
            for opt, given in used
        ]
        parts = [part for part in self._parts.values() if part is not None]
        spans = sorted(span for part in parts for span in part._bound.spans)
        grads_here = self._joined([given for _, given in taken])
        for name, grad in zip(self._names, grads_here, strict=True):
            if grad is not None:  # it may be a parameter of another part
                checks.check_grad(name, grad, "its parameter", grad, spans)
        return taken

    def _joined(self, parts: list[list[Any]]) -> list[Any]:
        """The opposite of ``_split``, of those parts that there are."""
        iterators = [iter(part) for part in parts]
        ours, rest = iterators[0], iterators[-1]
        return [next(ours if matrix else rest) for matrix in self._is_matrix]

    def _accumulated(self) -> list[tuple[Optimizer, list[Any]]]:
        """As :meth:`_taken`, of the sums."""
        used = []
        for opt in (self._momentum, self.others):
            if opt is not None:
                if opt._pending is None:
                    raise TypeError("step needs gradients: none have been accumulated")
                opt._take(opt._bound.step, opt._pending.found, opt._bound.spans)
                used.append((opt, opt._pending.found))
        return used

    def _directions(self, grads: list[Any]) -> list[Any]:
        """For each matrix that has a gradient, its update made orthogonal."""

        def direction(update: Any) -> Any:
            there = on_its_device(update)
            x = orthogonal(there, self.ns_steps, self.eps)
            x = x * adjustment(update.shape, self.adjust_lr)
            if there is update:
                return np.ascontiguousarray(x)
            fill(update, x.contiguous() if hasattr(x, "contiguous") else x)
            return update

        return [
            None if grad is None else direction(update)
            for grad, update in zip(grads, self._updates, strict=True)
        ]

    @property
    def _parts(self) -> dict[str, Optimizer | None]:
        return {
            "momentum": self._momentum,
            "matrices": self.matrices,
            "others": self.others,
        }

    def state_dict(self) -> dict[str, Any]:
        """As an optimizer's, for each of the three in this one."""
        with self._alone():
            parts = self._parts.items()
            saved: dict[str, Any] = {n: opt and opt.state_dict() for n, opt in parts}
            return {**saved, "skipped": self.skipped}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, of the same arrays."""
        parts = self._parts
        if not isinstance(saved, Mapping) or saved.keys() != {*parts, "skipped"}:
            got = list(saved) if isinstance(saved, Mapping) else type(saved).__name__
            raise TypeError(f"expected the keys {', '.join(parts)}, skipped; got {got}")
        for name, opt in parts.items():
            if (saved[name] is None) != (opt is None):
                raise ValueError(f"the state and this optimizer differ in {name}")
        with self._alone():
            skipped = operator.index(saved["skipped"])
            commits = [opt._loading(saved[name]) for name, opt in parts.items() if opt]
            for commit in commits:
                commit()
            self.skipped = skipped

    def __repr__(self) -> str:
        return f"<muon: {self.matrices!r} and {self.others!r}>"
