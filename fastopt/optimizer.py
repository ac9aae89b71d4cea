"""Optimizer: parameters + rule + state + step."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from fastopt import backends, checks
from fastopt.flat import Array, FlatBuffer, Segment, leaves
from fastopt.hyperparameters import Group
from fastopt.numpy_ref import Step
from fastopt.rule import Rule, check_hyperparameter
from fastopt.threads import available, forked

STATE_FORMAT = 1


class Bound(NamedTuple):
    """A variant of the rule, bound to the parameters: what applies at present."""

    on: frozenset[str]  # the switches that selected it
    rule: Rule
    state: dict[str, list[Array]]
    completed: Array  # steps: one int64, raised by the kernel
    step: Step
    spans: list[tuple[int, int]]  # of all that a step writes, by address


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
    state, steps
        See below.

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
        self.rule, self.backend = rule, backend
        self.threads = available() if threads is None else threads
        self._names: Sequence[str] = names
        self._arrays: Sequence[Array] = arrays
        self._group_of: Sequence[int] = group_of
        self._layout = checks.layout(trees if own else trees[0])
        self._busy = [False]
        groups = tuple(
            Group(rule, f"groups[{number}]" if own else "", number, self._assign)
            for number in range(len(trees))
        )
        values = [
            group.checked({**hyperparameters, **given}, 0)
            for group, given in zip(groups, own or [{}], strict=True)
        ]
        self.groups = groups  # from now on, assignment is to hyperparameters
        self._commit(values, self._bind(values, set(), {}, 0))

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
            if groups is not None:
                self._plan_steps()
        elif groups is None or name.startswith("_"):
            super().__setattr__(name, value)
        elif name in groups[0]:
            self._change([{name: value} for _ in groups])
        else:
            raise AttributeError(
                f"{self.rule.name} has no hyperparameter {name!r} to change; it has "
                f"{', '.join(groups[0])}"
            )

    def _assign(self, number: int, changes: Mapping[str, Any]) -> None:
        self._change([changes if g.number == number else {} for g in self.groups])

    def _change(self, changes: list[Mapping[str, Any]]) -> None:
        """Change hyperparameters, a mapping for each group; with an error, none.

        What was once switched on stays so: with a switch off, a variant does what the
        one without that state does (with finite numbers), and the state survives.
        """
        self._refuse_during_a_step()
        values = [
            group.checked(given, self.steps)
            for group, given in zip(self.groups, changes, strict=True)
        ]
        on, state = self._bound.on, self._bound.state
        bound = self._bound
        if not {n for n in self.rule.switches if any(v[n] for v in values)} <= on:
            bound = self._bind(values, on, state, self.steps)
        self._commit(values, bound)

    def _refuse_during_a_step(self) -> None:
        if self._busy[0]:
            raise RuntimeError(
                "this optimizer is in a step, in another thread or in one of its "
                "schedules; wait for its end"
            )

    # State and kernels ----------------------------------------------------------------

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        return int(self._bound.completed[0])

    @property
    def state(self) -> dict[str, list[Array]]:
        """The state buffers by name: for each an array a parameter, in its shape."""
        return dict(self._bound.state)

    def _bind(
        self,
        values: Sequence[Mapping[str, Any]],
        on: Set[str],
        state: Mapping[str, list[Array]],
        steps: int,
    ) -> Bound:
        """The variant for these values of the groups, and for more switches that are
        ``on``, with its kernel and its state: what there is of it, or zeros."""
        rule, dtype = self.rule, self._arrays[0].dtype
        on = on | {n for n in rule.switches if any(v[n] for v in values)}
        variant = rule.variant(on)
        for group, given in zip(self.groups, values, strict=True):
            constants = variant.scalars(steps + 1, *group.at(steps, given))
            variant.check_results(constants, dtype, surplus=bool(rule.variants))
        state = {**self._zeros([n for n in variant.state if n not in state]), **state}
        state = {name: state[name] for name in variant.state}
        segments = [
            Segment(array, tuple(buffers), group)
            for array, group, *buffers in zip(
                self._arrays, self._group_of, *state.values(), strict=True
            )
        ]
        completed = np.array([steps], np.int64)
        written = [*self._arrays, *(a for arrays in state.values() for a in arrays)]
        return Bound(
            on=frozenset(on),
            rule=variant,
            state=state,
            completed=completed,
            step=self._module.bind(variant, segments, completed),
            spans=checks.spans_of(written),
        )

    def _zeros(self, names: Sequence[str]) -> dict[str, list[Array]]:
        """New state buffers in the shapes of the parameters."""
        arena = self._module.state_arena(self._arrays, len(names))
        return {
            name: [
                streams[k].reshape(array.shape)
                for streams, array in zip(arena, self._arrays, strict=True)
            ]
            for k, name in enumerate(names)
        }

    def _commit(self, values: Sequence[Mapping[str, Any]], bound: Bound) -> None:
        for group, given in zip(self.groups, values, strict=True):
            group.commit(given)
        self._bound = bound
        self._plan_steps()

    def _plan_steps(self) -> None:
        schedules = any(group.schedules for group in self.groups)
        # What a step needs, in one lookup: a class with __getattr__ takes 23 ns for
        # each attribute instead of 7.
        self._plan = (
            self._layout,
            None if schedules else [group.at(self.steps) for group in self.groups],
            self.threads,
            getattr(self._bound.step, "at", None),
        )

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
        if type(grad_scale) is not float or grad_scale != 1.0:
            grad_scale = check_hyperparameter("", "grad_scale", grad_scale, 1.0)
        busy = self._busy
        # Not a Lock: an interrupt may come between its acquire and the try, and then it
        # is never released. Between these lines there is no call, so there comes none.
        if busy[0]:
            self._refuse_during_a_step()
        busy[0] = True
        try:
            # Only now: the gradients' own code, a mapping's or a schedule's, is refused
            # to change the optimizer, and another thread is, too.
            layout, values, threads, compiled = self._plan
            if layout is None:  # a single array
                found = [grads]
            elif type(grads) is FlatBuffer and grads.shapes is layout:
                found = [grads.data]
            else:
                found = []
                checks.collect(layout, grads, "", found)
            if values is None:  # there are schedules
                done = self.steps
                values = [group.at(done) for group in self.groups]
            if forked[0]:
                threads = 1
            # The compiled step takes plain arrays only, and refuses before it writes.
            if compiled is None or not compiled(found, values, grad_scale, threads):
                self._step_checked(found, values, grad_scale, threads)
        finally:
            busy[0] = False

    def _step_checked(
        self, grads: list[Any], values: list[Any], grad_scale: float, threads: int
    ) -> None:
        """A step after a look at each gradient, which finds the words for a refusal."""
        bound, t = self._bound, self.steps + 1
        scalars = [
            (grad_scale, *bound.rule.scalars(t, *given)[: bound.rule.scalar_count])
            for given in values
        ]
        fit = [self._fit(i, grad) for i, grad in enumerate(grads)]
        if not bound.step(fit, scalars, threads):
            raise RuntimeError("the kernel refused gradients found to fit")

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
        checks.check_grad(name, array, of, self._arrays[i], self._bound.spans)
        return array

    # Saving and resuming --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the parameters that a run needs to go on exactly.

        Plain dicts, lists, numbers, strings and NumPy arrays. A hyperparameter that is
        a schedule is left out: give it to the optimizer that is to go on.
        """
        self._refuse_during_a_step()
        return {
            "format": STATE_FORMAT,
            "rule": self.rule.name,
            "steps": self.steps,
            "switched_on": sorted(self._bound.on),
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
        self._refuse_during_a_step()
        checks.check_saved(saved, STATE_FORMAT, self.rule, self.groups)
        checks.check_saved_state(saved, self.rule, self._names, self._arrays)
        steps = operator.index(saved["steps"])
        values = [
            group.checked(given, steps)
            for group, given in zip(self.groups, saved["groups"], strict=True)
        ]
        state = self._zeros(list(saved["state"]))
        for name, arrays in state.items():
            for new, old in zip(arrays, saved["state"][name], strict=True):
                new[...] = old
        # Exactly what was saved: a buffer of a switch that was off there is dropped.
        on = frozenset(saved["switched_on"])
        self._commit(values, self._bind(values, on, state, steps))

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
