"""Lookahead: slow weights that follow, every few steps, those of any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastopt import passes, saving
from fastopt.bound import bind_alone, fill
from fastopt.optimizer import Optimizer


class Lookahead:
    """An optimizer around another: every ``k`` steps the slow weights go ``alpha`` of
    the way to the parameters, and the parameters back to them. Zhang et al. 2019,
    arXiv:1907.08610, algorithm 1; the inner optimizer's state is kept.

    Parameters
    ----------
    opt
        Any optimizer of fastopt; it should not do steps of its own from now on.
    k
        Steps from one synchronization to the next, at least 1.
    alpha
        How far the slow weights go, in (0, 1].

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit.

    Notes
    -----
    Everything that is not here is the inner optimizer's: ``lr``, ``state``, ``groups``.
    The slow weights begin with the parameters as the first step finds them. A step that
    was skipped does not count.

    Example
    -------
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
            raise TypeError(f"opt must be an optimizer of fastopt, got {opt!r}")
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {k!r}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")
        vars(self).update(opt=opt, k=int(k), alpha=float(alpha))
        self._make_room()

    def _make_room(self) -> None:
        """The slow weights, and the pass over them: the average's, by alpha."""
        opt, arrays = self.opt, self.opt._params.arrays
        self._slow = opt._params.like()[1]
        self._pull = bind_alone(opt._module, passes.average, self._slow)
        for slow, param in zip(self._slow, arrays, strict=True):
            fill(slow, param)

    def step(self, *grads: Any, **asked: Any) -> None:
        """A step of the inner optimizer, and what is due after it; see there."""
        opt, before = self.opt, self.opt.steps
        if before == 0:
            for slow, param in zip(self._slow, opt._params.arrays, strict=True):
                fill(slow, param)
        opt.step(*grads, **asked)
        if opt.steps > before and opt.steps % self.k == 0:
            self._pull.take(list(opt._params.arrays))
            self._pull([(1.0, self.alpha)], opt._threads_now)
            for slow, param in zip(self._slow, opt._params.arrays, strict=True):
                fill(param, slow)

    def add_group(self, group: Mapping[str, Any]) -> None:
        """As the inner optimizer's; its slow weights begin as the parameters are."""
        self.opt.add_group(group)
        old = self._slow
        self._make_room()
        for slow, value in zip(self._slow, old, strict=False):
            fill(slow, value)

    def __getattr__(self, name: str) -> Any:
        if name == "opt":  # not made yet
            raise AttributeError(name)
        return getattr(self.opt, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("opt", "k", "alpha"):
            raise AttributeError(f"{name} is fixed; make another Lookahead")
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.opt, name, value)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and the slow weights."""
        slow = list(map(saving.to_host, self._slow))
        return {"opt": self.opt.state_dict(), "slow": slow}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; ``k`` and ``alpha`` are those given here."""
        if not isinstance(saved, Mapping) or saved.keys() != {"opt", "slow"}:
            got = list(saved) if isinstance(saved, Mapping) else type(saved).__name__
            raise TypeError(f"expected the keys opt, slow of a state_dict(); got {got}")
        saving.check_arrays('state["slow"]', saved["slow"], self.opt)
        self.opt.load_state_dict(saved["opt"])
        for slow, value in zip(self._slow, saved["slow"], strict=True):
            fill(slow, value)

    def __repr__(self) -> str:
        return f"<lookahead k={self.k} alpha={self.alpha} of {self.opt!r}>"
