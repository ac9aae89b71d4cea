"""thinc's Adam in one pass over memory, for its arrays on a CPU.

``get_ops("fastopt")`` are NumPy's operations but for ``adam``. thinc's own optimizers
never ask for that, whatever operations are set: they take those that belong to the
array. ``fastopt.Adam.v1`` asks for it, and is thinc's ``Adam.v1`` otherwise.

>>> from thinc.api import Linear, registry
>>> Adam = registry.optimizers.get("fastopt.Adam.v1")
>>> model, optimizer = Linear(2, 3).initialize(), Adam(0.01, L2=1e-4)
>>> Y, backprop = model.begin_update(model.ops.alloc2f(8, 3))
>>> gradient = backprop(Y - 1)
>>> model.finish_update(optimizer)
>>> model.get_param("b").round(3)
array([0.01, 0.01], dtype=float32)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from thinc.api import NumpyOps, registry
from thinc.optimizers import Optimizer

from fastopt import backends
from fastopt.memory.segments import Array, Segment
from fastopt.optimizer import checks
from fastopt.rule import check_hyperparameter, shown
from fastopt.rules import adam as rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import uninterrupted
from fastopt.runtime.threads import available, forked
from fastopt.step import Key, Program, Request, execute

__all__ = ["Adam", "FastoptOps"]


@registry.ops("fastopt")
class FastoptOps(NumpyOps):
    """thinc's ``NumpyOps`` with an Adam of ours.

    Examples
    --------
    >>> import numpy as np, fastopt.thinc
    >>> ops = fastopt.thinc.FastoptOps()
    >>> w, g, m, v = np.ones((4, 2), np.float32)
    >>> _ = ops.adam(w, g, m, v, 0.9, 0.999, 1e-8, 0.5)
    >>> w, g
    (array([0.5, 0.5], dtype=float32), array([0., 0.], dtype=float32))
    """

    name = "fastopt"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.threads = available()  # which reads files

    @standard
    def adam(
        self,
        weights: Array,
        gradient: Array,
        mom1: Array,
        mom2: Array,
        beta1: float,
        beta2: float,
        eps: float,
        learn_rate: float,
        mod_rate: float = 1.0,
    ) -> tuple[Array, Array, Array, Array]:
        """Update arrays of one shape in place, and zero the gradient.

        As in ``NumpyOps``, the bias correction is in ``learn_rate`` and not in ``eps``,
        and the betas are rounded to float32 before they are taken from 1.
        """
        arrays = [weights, mom1, mom2, gradient]
        names = ["weights", "mom1", "mom2", "gradient"]
        for name, array in zip(names, arrays, strict=True):
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"{name} must be a NumPy array, got {shown(array)}; other arrays "
                    f"have operations of their own in thinc"
                )
        checks.check_params(names, arrays, arrays, formats=frozenset())
        for name, array in zip(names, arrays, strict=True):
            checks.check_grad(name, array, "weights", weights, ())
        numbers = {"beta1": beta1, "beta2": beta2, "eps": eps}
        numbers |= {"learn_rate": learn_rate, "mod_rate": mod_rate}
        beta1, beta2, eps, learn_rate, mod_rate = (
            float(check_hyperparameter("", name, number, 1.0))
            for name, number in numbers.items()
        )
        if mod_rate == 0:
            raise ValueError("mod_rate must not be 0: learn_rate is divided by it")
        module = backends.load(backends.choose(rule, on_device=False))
        segment = Segment(weights, (mom1, mom2), 0)
        program = Program(module, rule, [segment], scalars=thincs)
        a1, a2 = (float(np.float32(1) - np.float32(beta)) for beta in (beta1, beta2))
        scalars = (learn_rate / mod_rate, a1, a2, eps / mod_rate, 0.0)
        largest = float(np.finfo(weights.dtype).max)
        if not max(map(abs, scalars)) <= largest:
            raise ValueError(
                f"learn_rate {learn_rate!r}, beta1 {beta1!r}, beta2 {beta2!r}, eps "
                f"{eps!r} and mod_rate {mod_rate!r} have a number too large for "
                f"{weights.dtype}"
            )
        if not program.runner.take([gradient]):
            raise RuntimeError("the kernel refused arrays found to fit")
        threads = 1 if forked[0] else self.threads
        request = Request(zero_grads=True, threads=threads)
        uninterrupted(*execute(program, [Key(1, (), scalars)], request))
        return weights, gradient, mom1, mom2


def thincs(t: int, *scalars: float) -> tuple[float, ...]:
    """The scalars of the rule are those that ``adam`` has computed."""
    return scalars


OPS = FastoptOps()


@registry.optimizers("fastopt.Adam.v1")
class Adam(Optimizer):
    """thinc's optimizer, with our operations where its are NumPy's.

    Examples
    --------
    >>> import numpy as np, fastopt.thinc
    >>> optimizer = fastopt.thinc.Adam(0.5)
    >>> w, g = np.ones(2, np.float32), np.ones(2, np.float32)
    >>> w, g = optimizer(("layer", "w"), w, g)
    >>> w.round(3)
    array([0.5, 0.5], dtype=float32)
    """

    __slots__ = ()

    def _adam(self, ops: Any, *args: Any) -> Any:
        return super()._adam(OPS if isinstance(ops, NumpyOps) else ops, *args)
