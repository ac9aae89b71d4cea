"""Lookahead: slow weights that follow, every few steps, those of any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import setitem
from typing import Any

import numpy as np

from fastopt.backends.numpy_ref import written
from fastopt.memory.arena import zeros
from fastopt.memory.arrays import to_host
from fastopt.memory.segments import Array, Encoded
from fastopt.optimizer import checkpoint, saving
from fastopt.optimizer.formats import PARAM
from fastopt.optimizer.optimizer import Optimizer
from fastopt.optimizer.refusals import no_optimizer
from fastopt.optimizer.state import bind_alone, fill, filling, numbers
from fastopt.optimizer.storage import Usage
from fastopt.rule import check_hyperparameter
from fastopt.rules import passes
from fastopt.rules.lookahead import lookahead
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call
from fastopt.runtime.exclusive import exclusive
from fastopt.step import Key, Program, Request, execute

KEYS = ("opt", "slow", "k", "alpha")


class Lookahead:
    """An optimizer around another: every ``k`` steps the slow weights go ``alpha`` of
    the way to the parameters, and the parameters back to them. Zhang et al. 2019,
    arXiv:1907.08610, algorithm 1; the inner optimizer's state is kept.

    Parameters
    ----------
    opt
        Any optimizer of fastopt; it should not do steps of its own from now on.
    k
        Steps from one synchronization to the next, at least 1. Can be changed.
    alpha
        How far the slow weights go, in (0, 1]. Can be changed.

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit.

    Notes
    -----
    Everything that is not here is the inner optimizer's: ``lr``, ``state``, ``groups``.
    The slow weights begin with the parameters as the first step finds them, those of a
    group that is added as the next one does. A step that was skipped does not count. A
    synchronization belongs to the step before it: an interrupt comes before both or
    after both. It leaves the parameters of frozen groups alone, but moves those that
    got no gradient.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0])
    >>> opt = fastopt.Lookahead(fastopt.gd(w, lr=0.5), k=2, alpha=0.5)
    >>> opt.step(np.ones(1)); opt.step(np.ones(1))
    >>> w
    array([0.5])
    """

    opt: Optimizer
    k: int
    alpha: float

    def __init__(self, opt: Optimizer, k: int = 5, alpha: float = 0.5):
        if not isinstance(opt, Optimizer):
            raise no_optimizer(opt, "wrap fastopt's own, as in fastopt.adam(params)")
        vars(self).update(opt=opt, **checked(k, alpha))
        self._slow: list[Array] = []
        # After how many steps the slow weights moved, which the kernel counts, and then
        # the parameters.
        self._moved, self._synchronized = np.array([opt.steps], np.int64), opt.steps
        self._make_room()

    def _make_room(self) -> None:
        """Make the slow weights; those of new parameters begin as these are."""
        opt = self.opt
        (slow,) = zeros(opt._module.state_arena, opt._params.likes, 1)
        values = [*self._slow, *map(numbers, self._streams[len(self._slow) :])]
        for new, value in zip(slow, values, strict=True):
            fill(new, value)
        vars(self).update(_slow=slow, _pull=self._new_pull(slow))

    def _new_pull(self, slow: list[Array]) -> Program:
        """Return the program that moves the slow weights."""
        return bind_alone(self.opt._module, lookahead, slow, count=self._moved)

    def step(self, *grads: Any, **asked: Any) -> None:
        """Do a step of the inner optimizer, and what is due after it; see there."""
        self._prepare()
        try:
            self.opt.step(*grads, **asked)
        finally:
            vars(self.opt).update(_with_step=None)

    @exclusive
    def _prepare(self) -> None:
        """Before a step, arrange that it also does what is due after it."""
        opt = self.opt
        self._synchronize()
        if opt.steps == 0:
            for slow, stream in zip(self._slow, self._streams, strict=True):
                fill(slow, numbers(stream))
        if (opt.steps + 1) % self.k == 0:
            vars(opt).update(opt._unplanned(), _with_step=self._due)

    @property
    def _streams(self) -> list[Array | Encoded]:
        """The parameters with all that is kept of them."""
        streams: list[Array | Encoded] = self.opt._bound.streams[PARAM]
        return streams

    @standard
    def _synchronize(self) -> None:
        """Do what is due, or what of it has not been done yet."""
        opt = self.opt
        if len(self._slow) < len(opt._params.arrays):
            self._make_room()
        if opt.steps % self.k or opt.steps == self._synchronized:
            return
        opt._write(*self._moving(opt.steps, {}))

    def _due(self, step: Sequence[Call]) -> list[Call]:
        """Return the calls that are due after a step that these calls make."""
        steps = self.opt.steps + 1
        return [] if steps % self.k else self._moving(steps, written(step))

    def _moving(self, steps: int, values: Mapping[int, Any]) -> list[Call]:
        """Return the calls that move the slow weights, unless they have been moved
        after so many steps, and then the parameters. ``values`` has, by identity, what
        arrays will contain by then; the others will contain what they do now."""
        opt, streams = self.opt, self._streams
        moving = [not opt.groups[number].frozen for number in opt._params.group_of]
        calls: list[Call] = []
        if self._moved[0] != steps:
            self._pull.runner.take(
                [
                    after(stream, values) if moves else None
                    for stream, moves in zip(streams, moving, strict=True)
                ]
            )
            key = Key(1, (), (self.k, self.alpha))
            calls = [
                partial(setitem, self._moved, 0, steps - 1),
                *execute(self._pull, [key], Request(threads=opt._threads_now)),
                partial(setitem, self._moved, 0, steps),
            ]
        return [
            *calls,
            *self._putting(steps, moving, written(calls)),
            partial(vars(self).update, _synchronized=steps),
        ]

    def _putting(
        self, steps: int, moving: Sequence[bool], slow: Mapping[int, Any]
    ) -> list[Call]:
        """Return the calls that set the parameters to the slow weights. ``slow`` has
        what these will be by then, if that is known."""
        opt, params = self.opt, self.opt._params
        if not params.copied and not any(map(split, self._streams)):
            triples = zip(params.arrays, self._slow, moving, strict=True)
            return [filling(array, new) for array, new, moves in triples if moves]
        copies = params.copies
        put = bind_alone(opt._module, passes.clip, self._streams, copies=copies)
        pairs = zip(self._slow, moving, strict=True)
        put.runner.take([after(new, slow) if moves else None for new, moves in pairs])
        unlimited = Key(steps, (), (-math.inf, math.inf))
        return list(execute(put, [unlimited], Request(threads=opt._threads_now)))

    def __getattr__(self, name: str) -> Any:
        if name == "opt":  # not made yet
            raise AttributeError(name)
        return getattr(self.opt, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "opt":
            raise AttributeError("opt is fixed; make another Lookahead")
        if name in ("k", "alpha"):
            now = {"k": self.k, "alpha": self.alpha}
            vars(self).update(checked(**{**now, name: value}))
        elif name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.opt, name, value)

    def memory(self) -> Usage:
        """Return the bytes of the inner optimizer's buffers and of the slow weights."""
        inner, slow = self.opt.memory(), Usage.of(0, {"slow": self._slow})
        return inner._replace(buffers=inner.buffers + slow.buffers)

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, the slow weights, ``k`` and ``alpha``."""
        return self._saved(to_host)

    @exclusive
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, of the same parameters."""
        self._loading(saved)()

    @exclusive
    def save(self, path: Any, *, params: bool = False, shard: Any = None) -> None:
        """Write all that a run needs to go on to a file; see :meth:`Optimizer.save`."""
        self.opt._params.watch.check()
        state = self._saved(saving.as_it_is)
        checkpoint.save(self.opt, state, path, params, shard)

    @exclusive
    def load(self, path: Any, *, params: bool | None = None, shard: Any = None) -> None:
        """Go on from what :meth:`save` wrote; see :meth:`Optimizer.load`."""
        checkpoint.load(self.opt, self._loading, path, params, shard)

    def _saved(self, take: Callable[[Array], Array]) -> dict[str, Any]:
        self._synchronize()
        slow = list(map(take, self._slow))
        values = saving.save(self.opt, take), slow, self.k, self.alpha
        return dict(zip(KEYS, values, strict=True))

    def _loading(self, saved: Mapping[str, Any]) -> Callable[..., None]:
        """Check a saved state. The result commits it, and the calls it is given."""
        if not isinstance(saved, Mapping) or saved.keys() != {*KEYS}:
            got = list(saved) if isinstance(saved, Mapping) else type(saved).__name__
            raise TypeError(f"expected the keys {', '.join(KEYS)}; got {got}")
        if len(self._slow) < len(self.opt._params.arrays):
            self._make_room()
        values = checked(saved["k"], saved["alpha"])
        load, order = self.opt._loading(saved["opt"]), saving.by_name
        slow = order(saved["opt"], self.opt)('state["slow"]', saved["slow"])
        saving.check_arrays('state["slow"]', slow, self.opt)
        steps = saved["opt"]["steps"]
        return partial(
            load,
            *[filling(*pair) for pair in zip(self._slow, slow, strict=True)],
            partial(setitem, self._moved, 0, steps),
            partial(vars(self).update, values, _synchronized=steps),
            # The one that there is may have failed.
            partial(vars(self).update, _pull=self._new_pull(self._slow)),
        )

    def __repr__(self) -> str:
        return f"<lookahead k={self.k} alpha={self.alpha} of {self.opt!r}>"


def split(stream: Array | Encoded) -> bool:
    """Whether a parameter is stored in other ways than its dtype says."""
    format = stream.format if isinstance(stream, Encoded) else None
    return format is not None and (bool(format.second) or format.stochastic)


def after(stream: Array | Encoded, values: Mapping[int, Any]) -> Array | Encoded:
    """Return a stream as it will be, if ``values`` has what its arrays will contain."""
    if isinstance(stream, Encoded):
        parts = [values.get(id(part), part) for part in stream.parts]
        return Encoded(stream.format, tuple(parts))
    value: Array = values.get(id(stream), stream)
    return value


def checked(k: Any, alpha: Any) -> dict[str, Any]:
    """Return the hyperparameters, if they are valid."""
    pairs = ("k", k), ("alpha", alpha)
    values = [check_hyperparameter(name, name, value, 1.0) for name, value in pairs]
    lookahead.scalars(1, *values)
    return {"k": int(values[0]), "alpha": float(values[1])}
