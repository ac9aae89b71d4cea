"""Muon: momentum made orthogonal, for matrices; AdamW for all other arrays.

It is an optimizer as any, with a pass more before its step, for what is to be made
orthogonal; in between, matrices go through products of the array library that owns
their memory: NumPy's BLAS, or that of torch or CuPy on a GPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastopt.memory.arrays import on_device
from fastopt.memory.flat import expanded
from fastopt.memory.segments import Array
from fastopt.memory.trees import leaves
from fastopt.optimizer import checks
from fastopt.optimizer.gradients import Gradients
from fastopt.optimizer.groups import Values
from fastopt.optimizer.optimizer import Optimizer
from fastopt.optimizer.state import Bound, bind_alone, fill, filling
from fastopt.rules.muon import direction, muon
from fastopt.runtime.atomic import Call
from fastopt.step import Key, Program, Request, execute

# Jordan et al. 2024: chosen to push small singular values up fast.
A, B, C = 3.4445, -4.7750, 2.0315

# Room for updates of up to this many bytes is kept for the next step. More of it is
# made anew each time, which is short beside products of matrices that are so large.
MOST_KEPT = 16 << 20


def orthogonalize(u: Any, ns_steps: int, eps: float) -> None:
    r"""Bring a matrix U, in its place, near an orthogonal one, X, by Newton's and
    Schulz's iteration with a quintic polynomial. The last two lines are done
    ``ns_steps`` times; if there are more rows than columns, all is of the transposed
    matrix:

    ```math
    \begin{aligned}
    X &= \frac{U}{\max(\lVert U \rVert_{F},\ \varepsilon)} \\
    S &= X X^{\top} \\
    X &\leftarrow 3.4445 \, X + (-4.775 \, S + 2.0315 \, S^{2}) \, X
    \end{aligned}
    ```
    """
    x = u.T if u.shape[0] > u.shape[1] else u
    x /= max(math.sqrt(float((x * x).sum())), eps)
    for _ in range(ns_steps):
        gram = x @ x.T
        square = gram @ gram
        gram *= B
        square *= C
        gram += square
        product = gram @ x
        x *= A
        x += product


def adjustment(rows: float, columns: float, match_rms_adamw: bool) -> float:
    """Return the factor for the learning rate of a matrix."""
    return (
        0.2 * math.sqrt(max(rows, columns))
        if match_rms_adamw
        else math.sqrt(max(1.0, rows / columns))
    )


def on_its_device(array: Any) -> Any:
    """Return a device array of numba's as one of a library that has products there."""
    if not on_device(array):
        return array
    if not hasattr(array, "__cuda_array_interface__"):  # numba's simulator
        return array.copy_to_host()
    for name, convert in (("cupy", "asarray"), ("torch", "as_tensor")):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        options = {} if name == "cupy" else {"device": "cuda"}
        return getattr(library, convert)(array, **options)
    raise RuntimeError(
        "Muon on a GPU needs the matrix products of CuPy or torch; install one of them"
    )


def check_group(name: str, tree: Any, own: Mapping[str, Any]) -> None:
    """Check that what a group sets for itself is for arrays that it has."""
    use_muon = own.get("use_muon", True)
    if not isinstance(use_muon, (bool, np.bool_)):
        raise TypeError(f'{name}["use_muon"] must be True or False, got {use_muon!r}')
    arrays = [leaf for _, leaf in leaves(expanded(tree))]
    if use_muon and any(getattr(leaf, "ndim", 0) == 2 for leaf in arrays):
        return
    for key in ("lr", "weight_decay", "eps"):
        if key in own and f"adamw_{key}" not in own:
            raise TypeError(
                f'{name}["{key}"] is for matrices, and all arrays of this group go to '
                f'AdamW; set "adamw_{key}"'
            )


class Muon(Optimizer):
    """Muon for the matrices among the parameters, AdamW for the rest. Jordan et al.
    2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.

    Parameters
    ----------
    params
        As for every optimizer; in a ``FlatBuffer`` each array is by itself. Arrays of
        two dimensions go to Muon, all others to AdamW. What is a matrix but should not
        (embeddings, the last layer, say the authors) goes there by a group of its own:
        ``{"params": ..., "use_muon": False}``. A filter of four dimensions goes to Muon
        as a view, ``w.reshape(len(w), -1)``.
    lr, weight_decay, momentum, nesterov, eps, ns_steps
        For the matrices, as torch's: weight decay is decoupled, the momentum an average
        of the gradients, ``ns_steps`` the iterations. Products are of the parameters'
        dtype; torch's are of bfloat16.
    match_rms_adamw
        Which adjustment of lr. False, "original" in torch: times the root of rows /
        columns, if that is above 1. True: times 0.2 roots of the larger one, so that
        AdamW's lr and weight decay serve; give them as ``adamw_lr`` and
        ``adamw_weight_decay``, too, for neither follows the other.
    adamw_lr, adamw_beta1, adamw_beta2, adamw_eps, adamw_weight_decay
        For the rest.
    backend, threads, ema, weight_decay_mask
        As for every optimizer; the mask is for both weight decays. The products have
        threads of their own, the BLAS's.

    Attributes
    ----------
    state
        ``state["m"]`` has the momentum, ``state["v"]`` AdamW's second moment, or the
        last update of a matrix, before lr.

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit, before anything is written.
    RuntimeError
        On a GPU, if neither torch nor CuPy is there.

    Notes
    -----
    Everything that is not here is as for every :class:`Optimizer`: any group may have
    any of these hyperparameters, ``use_muon`` only from the beginning on. Bits are the
    same on all CPU backends, with the same BLAS and as many threads of it.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> params = {"w": np.eye(3), "b": np.zeros(3)}
    >>> opt = fastopt.Muon(params, lr=0.1, weight_decay=0, adamw_lr=0.01)
    >>> opt.step({"w": np.diag([1.0, 2.0, 3.0]), "b": np.ones(3)})
    >>> params["b"].round(4)
    array([-0.01, -0.01, -0.01])
    >>> opt.momentum = 0.9
    """

    _separately = True
    _leaves_state = False
    _in_one_call = False  # matrices are made orthogonal within a step
    _takes_shards = False  # which must be whole for that
    _matrices: list[int]  # those of the segments that go through products
    # Before the step, if their updates are kept.
    _pass: tuple[list[Array], Program] | None

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1e-3,
        weight_decay: Any = 0.1,
        momentum: Any = 0.95,
        nesterov: Any = True,
        eps: Any = 1e-7,
        ns_steps: Any = 5,
        match_rms_adamw: Any = False,
        adamw_lr: Any = 1e-3,
        adamw_beta1: Any = 0.9,
        adamw_beta2: Any = 0.999,
        adamw_eps: Any = 1e-8,
        adamw_weight_decay: Any = 1e-2,
        **options: Any,
    ):
        trees, own = checks.split_groups(params)
        for number, (tree, group) in enumerate(zip(trees, own or [{}], strict=True)):
            check_group(f"groups[{number}]", tree, group)
        super().__init__(
            muon,
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            eps=eps,
            ns_steps=ns_steps,
            match_rms_adamw=match_rms_adamw,
            adamw_lr=adamw_lr,
            adamw_beta1=adamw_beta1,
            adamw_beta2=adamw_beta2,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
            **options,
        )

    def add_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters: ``{"params": ..., "lr": ...}``, as in the beginning."""
        if isinstance(group, Mapping) and "params" in group:
            check_group(f"groups[{len(self.groups)}]", group["params"], group)
        super().add_group(group)

    @staticmethod
    def _off(array: Array, decays: bool) -> tuple[str, ...]:
        decay = () if decays else ("weight_decay", "adamw_weight_decay")
        return decay if array.ndim == 2 else (*decay, "use_muon")

    def _change(self, changes: Sequence[Mapping[str, Any]], **more: Any) -> None:
        self._check_use_muon(changes)
        super()._change(changes, **more)

    def _loading(self, saved: Mapping[str, Any]) -> Callable[..., None]:
        commit = super()._loading(saved)
        self._check_use_muon(saved["groups"])
        return commit

    def _check_use_muon(self, changes: Sequence[Mapping[str, Any]]) -> None:
        for i, (group, changed) in enumerate(zip(self.groups, changes, strict=True)):
            now, new = group["use_muon"], changed.get("use_muon", group["use_muon"])
            if not isinstance(new, (bool, np.bool_)) or bool(new) is not now:
                raise ValueError(
                    f"use_muon of groups[{i}] is {now} and cannot become {new!r}: it "
                    f"decides about the state; make another optimizer"
                )

    def _following(
        self, values: Sequence[Mapping[str, Any]], bound: Bound
    ) -> dict[str, Any]:
        params = bound.params
        matrices = [
            i
            for i, (array, group) in enumerate(
                zip(params.arrays, params.group_of, strict=True)
            )
            if array.ndim == 2 and values[group]["use_muon"]
        ]
        nbytes = sum(params.arrays[i].nbytes for i in matrices)
        small = matrices and nbytes <= MOST_KEPT
        lasting = self._new_pass(bound, matrices) if small else None
        return {"_matrices": matrices, "_pass": lasting}

    def _new_pass(
        self, bound: Bound, matrices: list[int]
    ) -> tuple[list[Array], Program]:
        """Return room for the updates of matrices, and the program that puts there what
        is to be made orthogonal. The room is copied into the state when all of it is
        ready; on a device, where no step is made at one instant, it is the state."""
        room = [bound.buffers["v"][i] for i in matrices]
        if not any(map(on_device, room)):
            room = list(map(np.empty_like, room))
        rows = [bound.params.set_of[i] for i in matrices]
        momentum = [bound.buffers["m"][i] for i in matrices]
        return room, bind_alone(self._module, direction, room, rows, [momentum])

    def _calls(
        self,
        gradients: Gradients,
        values: Sequence[Values],
        factor: float,
        request: Request,
    ) -> list[Call]:
        sets = [dict(zip(muon.hyperparameters, v, strict=True)) for v in values]
        updates = self._updates(gradients, sets, factor, request)
        v, runner = self._bound.buffers["v"], self._bound.program.runner
        writes = [filling(v[i], update) for i, update in updates.items()]
        if self.backend == "numpy":  # which reads now what it writes later
            runner.instead = {id(v[i]): update for i, update in updates.items()}
            writes = []
        return [*writes, *super()._calls(gradients, values, factor, request)]

    def _updates(
        self,
        gradients: Gradients,
        sets: Sequence[Mapping[str, Any]],
        factor: float,
        request: Request,
    ) -> dict[int, Any]:
        """Return, for each matrix that has a gradient, its update made orthogonal."""
        updates: dict[int, Any] = {}
        if not self._matrices:
            return updates
        t = self.steps + 1
        keys = [Key(t, (), (s["momentum"], s["nesterov"]), factor) for s in sets]
        of_matrices = [[task[i] for i in self._matrices] for task in gradients.tasks]
        room, program = self._pass or self._new_pass(self._bound, self._matrices)
        gradients._replace(tasks=of_matrices).give(program.runner)
        alone = request._replace(ema_weight=0.0, zero_grads=False)
        self._write(*execute(program, keys, alone))
        for i, update in zip(self._matrices, room, strict=True):
            if all(task[i] is None for task in gradients.tasks) or not update.size:
                continue
            values = sets[self._params.set_of[i]]
            rows, columns = update.shape
            there = on_its_device(update)
            with np.errstate(all="ignore"):
                orthogonalize(there, int(values["ns_steps"]), values["eps"])
                there *= adjustment(rows, columns, values["match_rms_adamw"])
            if on_device(update):
                if isinstance(there, np.ndarray):  # the simulator
                    fill(update, there)
            else:
                updates[i] = update
        return updates
