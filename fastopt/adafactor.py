"""Adafactor: steps of a size relative to the parameters', and a second moment that
takes next to no memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastopt.optimizer.optimizer import Optimizer
from fastopt.rules.adafactor import adafactor


class Adafactor(Optimizer):
    """Adafactor, which stores only one average per row and per column of a matrix.
    Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 to 6, as torch has them.

    Parameters
    ----------
    params
        As for every optimizer. Arrays of two and more dimensions are factored, over
        the last two; all others keep a full second moment. In a ``FlatBuffer`` each
        array is by itself.
    lr
        The most that a relative step may be; it is ``min(lr, 1 / sqrt(t))``, times the
        root mean square of the array.
    beta2_decay
        At most 0: squares of gradients enter their average with weight
        ``t**beta2_decay``.
    eps1
        Above 0: the least root of an estimated square that a gradient is divided by,
        and the least mean of the averages for rows. None: the machine epsilon of the
        parameters' dtype.
    eps2
        The least root mean square of an array that its steps are relative to.
    d
        Above 0: the root mean square of an update, beyond which it is scaled down.
    weight_decay
        Decoupled, times lr.
    backend, threads, ema, weight_decay_mask
        As for every optimizer.

    Attributes
    ----------
    state
        ``state["v"]`` has for a factored array of shape ``(..., rows, columns)`` one of
        shape ``(..., rows + columns)``, in host memory. In all, an optimizer keeps
        three times as many numbers.

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit, before anything is written.

    Notes
    -----
    Everything that is not here is as for every :class:`Optimizer`. Where torch computes
    in the parameters' dtype, sums and averages are of float64, and rounded once.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.ones((2, 3))
    >>> opt = fastopt.Adafactor(w, lr=0.1)
    >>> opt.step(np.full((2, 3), 5.0))
    >>> w.round(4)
    array([[0.9, 0.9, 0.9],
           [0.9, 0.9, 0.9]])
    >>> opt.state["v"][0].shape
    (5,)
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1e-2,
        beta2_decay: Any = -0.8,
        eps1: Any = None,
        eps2: Any = 1e-3,
        d: Any = 1.0,
        weight_decay: Any = 0.0,
        **options: Any,
    ):
        super().__init__(
            adafactor,
            params,
            lr=lr,
            beta2_decay=beta2_decay,
            eps2=eps2,
            d=d,
            weight_decay=weight_decay,
            eps1=eps1,
            **options,
        )

    def _completed(self, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("eps1") is None:
            values["eps1"] = float(np.finfo(self._params.dtype).eps)
        return values
