"""Optimizer: parameters + rule + state + step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from threading import Lock
from typing import Any

import numpy as np

from fastopt import backends, checks
from fastopt.flat import Array, FlatBuffer, Segment, leaves
from fastopt.hyperparameters import Group
from fastopt.rule import Rule, check_hyperparameter
from fastopt.threads import after_fork, available

STATE_FORMAT = 1


class Optimizer:
    """Applies a rule to parameters, in place; made by calling the rule.

    Parameters
    ----------
    rule
        What a step does, such as ``fastopt.adamw``.
    params
        An array, a list or dict of arrays (nested too), a ``FlatBuffer``, or a list of
        groups ``{"params": ..., "lr": ...}``. Arrays are float32 or float64 (one dtype
        throughout), C-contiguous, writeable and apart in memory: NumPy arrays, or what
        shares memory by DLPack, ``__array_interface__`` or
        ``__cuda_array_interface__``.
    backend
        "numpy", "cython", "numba" or "cuda"; by default the arrays' device and the rule
        decide. All of them give the same bits.
    threads
        At most so many CPU threads; by default what affinity, the container's quota and
        ``OMP_NUM_THREADS`` allow.
    **hyperparameters
        Of the rule, for all groups that do not set their own. Each is an attribute of
        the optimizer and can be changed at any time. It may be a schedule: a callable
        of the number of completed steps.

    Attributes
    ----------
    rule, backend
        As given or chosen.
    threads
        As given or found; can be changed.
    groups
        For each group of parameters its hyperparameters, to read and change by name.
    state
        The state buffers by name: for each an array a parameter, in its shape.
    steps
        The number of completed steps.

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit, before anything is written.
    RuntimeError
        If the backend is not available; the message says how to get it.

    Example
    -------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, -2.0])
    >>> opt = fastopt.sgd(w, lr=0.5)
    >>> opt.step(2 * w)
    >>> w
    array([0., 0.])
    >>> opt.lr = 0.1
    """

    rule: Rule
    backend: str
    threads: int
    groups: tuple[Group, ...]
    state: dict[str, list[Array]]

    def __init__(
        self,
        rule: Rule,
        params: Any,
        *,
        backend: str | None = None,
        threads: int | None = None,
        **hyperparameters: Any,
    ):
        trees, own = checks.split_groups(params)
        found = [
            (f"params{path}", leaf, number)
            for number, tree in enumerate(trees)
            for path, leaf in leaves(tree, f"[{number}]" if own else "")
        ]
        if not found:
            raise ValueError("params is empty; pass at least one array")
        names, originals, group_of = zip(*found, strict=True)
        if backend is None:
            backend = backends.choose(rule, any(map(checks.on_device, originals)))
        self._module = backends.load(backend)
        arrays = list(map(self._module.as_array, names, originals))
        checks.check_params(names, arrays, originals)
        self.rule, self.backend, self.state = rule, backend, {}
        self.threads = available() if threads is None else threads
        self._names: Sequence[str] = names
        self._arrays, self._spans = arrays, list(map(checks.span, arrays))
        self._group_of: Sequence[int] = group_of
        self._layout = checks.layout(trees if own else trees[0])
        self._switched_on: Set[str] = frozenset()
        self._count = np.zeros(1, np.int64)
        self._stepping = Lock()
        groups = tuple(
            Group(rule, f"groups[{number}]" if own else "", self._assign)
            for number in range(len(trees))
        )
        for group, values in zip(groups, own or [{}], strict=True):
            group.change({**hyperparameters, **values}, 0)
        self.groups = groups  # from now on, assignment is to hyperparameters
        self._bind()

    # Hyperparameters ------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        groups = vars(self).get("groups")
        if not groups or name not in groups[0]:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        values = [group[name] for group in groups]
        if any(value != values[0] for value in values):
            raise AttributeError(
                f"the groups differ in {name}; read opt.groups[i][{name!r}]"
            )
        return values[0]

    def __setattr__(self, name: str, value: Any) -> None:
        groups = vars(self).get("groups")
        if name == "threads":
            super().__setattr__(name, checks.check_threads(value))
        elif groups is None or name.startswith("_"):
            super().__setattr__(name, value)
        elif name in groups[0]:
            self._change([(group, {name: value}) for group in groups], self.steps)
        else:
            raise AttributeError(
                f"{self.rule.name} has no hyperparameter {name!r} to change; it has "
                f"{', '.join(groups[0])}"
            )

    def _assign(self, group: Group, key: str, value: Any) -> None:
        self._change([(group, {key: value})], self.steps)

    def _change(
        self, changes: list[tuple[Group, Mapping[str, Any]]], steps: int
    ) -> None:
        """Change hyperparameters, in all of the groups or, with an error, in none."""
        before = [(group, dict(group)) for group, _ in changes]
        try:
            for group, values in changes:
                group.change(values, steps)
            self._bind()
        except BaseException:
            for group, values in before:
                group.change(values, steps)
            raise

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        return int(self._count[0])

    # State and kernels ----------------------------------------------------------------

    def _bind(self) -> None:
        """Give the variant of the rule that now applies its state and its kernel.

        What was once switched on stays so: with a switch off, a variant does what the
        one without that state does, and the state survives.
        """
        on = {n for n in self.rule.switches if any(group[n] for group in self.groups)}
        on |= self._switched_on
        if on == self._switched_on and "_plan" in vars(self):
            return
        rule = self.rule.variant(on)
        constants = self.rule.scalars(self.steps + 1, **self.groups[0].at(self.steps))
        rule.check_results(constants, surplus=bool(self.rule.variants))
        new = [name for name in rule.state if name not in self.state]
        sizes = [array.size for array in self._arrays]
        arena = self._module.state_arena(sizes, len(new), self._arrays[0].dtype)
        state = dict(self.state)
        for stream, name in enumerate(new):
            state[name] = [
                streams[stream].reshape(array.shape)
                for streams, array in zip(arena, self._arrays, strict=True)
            ]
        segments = [
            Segment(array, tuple(state[name][i] for name in rule.state), group)
            for i, (array, group) in enumerate(
                zip(self._arrays, self._group_of, strict=True)
            )
        ]
        native = self._module.bind(rule, segments, self._count)
        # What a step needs, in one lookup: a class with __getattr__ takes 23 ns for
        # each attribute instead of 7.
        self._plan = (
            self._layout,
            self.groups,
            self.rule.scalars,
            rule.scalar_count,
            self._count,
            self._stepping,
            native,
            self._module.CHECKS_GRADS,
        )
        self._switched_on = on
        self.state.update(state)

    def step(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads
            Gradients in the structure, shapes and dtype of the parameters; ``None`` in
            place of one leaves that parameter and its state alone. They are only read.
            With groups: a list with the gradients of each.
        grad_scale
            A factor for the gradients, applied in the same pass; -1 maximizes.

        Raises
        ------
        TypeError, ValueError
            If the gradients do not fit; then nothing has been written.
        RuntimeError
            If a step of this optimizer is under way, in another thread.

        Notes
        -----
        Steps are counted for the optimizer, not for each parameter as in torch, so a
        parameter that was left alone has the bias correction of the others.
        """
        layout, groups, scalars, used, count, lock, native, native_checks = self._plan
        if type(grad_scale) is not float or grad_scale != 1.0:
            grad_scale = check_hyperparameter("", "grad_scale", grad_scale, 1.0)
        found: list[Any] = []
        if layout is None:  # a single array
            found.append(grads)
        else:
            checks.collect(layout, grads, "", found)
        if not lock.acquire(False):
            raise RuntimeError(
                "this optimizer is in a step already, in another thread or in one of "
                "its schedules; steps of one optimizer must follow each other"
            )
        try:
            done = count.item()
            rows = []
            for group in groups:
                constants = scalars(done + 1, **group.at(done))
                rows.append((grad_scale, *constants[:used]))
            workers = 1 if after_fork() else self.threads
            if not (native_checks and native(found, rows, workers)):
                fit = [self._fit(i, grad) for i, grad in enumerate(found)]
                if not native(fit, rows, workers):
                    raise RuntimeError("the kernel refused gradients found to fit")
        finally:
            lock.release()

    def _fit(self, i: int, grad: Any) -> Array | None:
        """The gradient of the i-th parameter as an array that the kernels can take."""
        if grad is None:
            return None
        of = self._names[i]
        name = "grads" + of.removeprefix("params")
        if isinstance(grad, FlatBuffer):  # one of the right layout is unpacked by now
            raise ValueError(
                f"{name} is a FlatBuffer of another layout than {of}; make it with the "
                f"parameters' zeros_like()"
            )
        array: Array = self._module.as_array(name, grad)
        checks.check_grad(name, array, of, self._arrays[i], self._spans)
        return array

    # Saving and resuming --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the parameters that a run needs to go on exactly.

        Plain dicts, lists, numbers, strings and NumPy arrays. A hyperparameter that is
        a schedule is left out: give it to the optimizer that is to go on.
        """
        return {
            "format": STATE_FORMAT,
            "rule": self.rule.name,
            "steps": self.steps,
            "switched_on": sorted(self._switched_on),
            "groups": [
                {key: value for key, value in group.items() if not callable(value)}
                for group in self.groups
            ],
            "state": {
                name: [_to_host(array) for array in arrays]
                for name, arrays in self.state.items()
            },
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, bit for bit, on any backend.

        All of it is checked before anything changes. Saved hyperparameters replace
        those set here; one that was a schedule there must be a schedule here, too.
        """
        checks.check_saved(saved, STATE_FORMAT, self.rule, self.groups)
        checks.check_saved_state(saved, self.rule, self._names, self._arrays)
        steps: int = saved["steps"]
        were_on = self._switched_on
        self._switched_on = were_on | set(saved["switched_on"])
        del self._plan
        try:
            self._change(list(zip(self.groups, saved["groups"], strict=True)), steps)
        except BaseException:
            self._switched_on = were_on
            self._bind()
            raise
        for name, arrays in self.state.items():
            for i, array in enumerate(arrays):
                array[...] = saved["state"][name][i] if name in saved["state"] else 0
        self._count[0] = steps

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an Optimizer works in its parameters' memory and cannot be copied or "
            "pickled; make a new one and give it this one's state_dict()"
        )

    def __repr__(self) -> str:
        size = sum(array.size for array in self._arrays)
        groups = self.groups[0] if len(self.groups) == 1 else self.groups
        return (
            f"<{self.rule.name}: {size} {self._arrays[0].dtype} parameters, backend "
            f"{self.backend!r}, {self.steps} steps done, {groups}>"
        )


def _to_host(array: Any) -> Array:
    host: Array = array.copy_to_host() if hasattr(array, "copy_to_host") else array
    return np.array(host)
