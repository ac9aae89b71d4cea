"""Optimizer: parameters + rule + state + step."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np

from fastopt import backends, checks
from fastopt import threads as threads_
from fastopt.flat import Array, FlatBuffer, Segment, leaves
from fastopt.hyperparameters import Group
from fastopt.rule import Rule, check_hyperparameter

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

    def __init__(
        self,
        rule: Rule,
        params: Any,
        *,
        backend: str | None = None,
        threads: int | None = None,
        **hyperparameters: Any,
    ):
        mine = vars(self)  # plain assignment is for hyperparameters
        for name in rule.hyperparameters:
            if hasattr(type(self), name) or name in ("rule", "groups", "state"):
                raise TypeError(f"a hyperparameter may not be named {name!r}")
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
        mine["_module"] = backends.load(backend)
        arrays = [
            checks.as_array(name, leaf, backend)
            for name, leaf in zip(names, originals, strict=True)
        ]
        checks.check_params(names, arrays, originals)
        mine["threads"] = (
            threads_.available() if threads is None else checks.check_threads(threads)
        )
        mine.update(rule=rule, backend=backend, state={}, _switched_on=set())
        mine.update(_tree=trees if own else trees[0], _names=names, _arrays=arrays)
        mine.update(_group_of=group_of)
        mine["_spans"] = [checks.span(array) for array in arrays]
        mine["_count"] = np.zeros(1, np.int64)
        mine["_stepping"] = Lock()
        mine["groups"] = [
            Group(rule, f"groups[{number}]" if own else "", self._assign)
            for number in range(len(trees))
        ]
        for group, values in zip(self.groups, own or [{}], strict=True):
            group.replace({**hyperparameters, **values}, 0)
        rule.check_results(rule.scalars(1, **self.groups[0].at(0)))
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
        if name == "threads":
            vars(self)["threads"] = checks.check_threads(value)
        elif name in self.groups[0]:
            self._replace([(group, {name: value}) for group in self.groups], self.steps)
        else:
            raise AttributeError(
                f"{self.rule.name} has no hyperparameter {name!r}; it has "
                f"{', '.join(self.groups[0])}"
            )

    def _assign(self, group: Group, key: str, value: Any) -> None:
        self._replace([(group, {key: value})], self.steps)

    def _replace(
        self, changes: list[tuple[Group, Mapping[str, Any]]], steps: int
    ) -> None:
        """Change hyperparameters, in all of the groups or, with an error, in none."""
        before = [(group, dict(group)) for group, _ in changes]
        try:
            for group, values in changes:
                group.replace(values, steps)
            self._bind()
        except BaseException:
            for group, values in before:
                group.replace(values, steps)
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
        switches = {name for names in self.rule.variants for name in names}
        on = {name for name in switches if any(group[name] for group in self.groups)}
        on |= self._switched_on
        if on == self._switched_on and "_plan" in vars(self):
            return
        rule = self.rule.variant({name: name in on for name in switches})
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
        # What a step needs, in one lookup: a class with __getattr__ takes 23 ns for
        # each attribute instead of 7.
        plan = (
            checks.structure(self._tree),
            self.groups,
            self.rule.scalars,
            rule.scalar_count,
            self._count,
            self._stepping,
            self._module.bind(rule, segments, self._count),
            self._module.CHECKS_GRADS,
        )
        state = {name: state[name] for name in rule.state}
        vars(self).update(_plan=plan, _switched_on=on, state=state)

    def step(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads
            Gradients in the structure, shapes and dtype of the parameters; ``None`` in
            place of one leaves that parameter and its state alone. They are only read.
        grad_scale
            A factor for the gradients, applied in the same pass; -1 maximizes.
        """
        tree, groups, scalars, taken, count, lock, native, native_checks = self._plan
        if grad_scale != 1.0:
            grad_scale = check_hyperparameter("", "grad_scale", grad_scale, 1.0)
        found: list[Any] = []
        if tree is None:  # a single array
            found.append(grads)
        else:
            checks.collect(tree, grads, "", found)
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
                rows.append((grad_scale, *constants[:taken]))
            workers = 1 if threads_.after_fork() else self.threads
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
        array = checks.as_array(name, grad, self.backend)
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

        All of it is checked before anything changes. A hyperparameter that is a
        schedule here and was left out there stays as it is.
        """
        steps, switched_on = self._check_saved(saved)
        were_on = self._switched_on
        vars(self)["_switched_on"] = were_on | switched_on
        vars(self).pop("_plan")
        try:
            self._replace(list(zip(self.groups, saved["groups"], strict=True)), steps)
        except BaseException:
            vars(self)["_switched_on"] = were_on
            self._bind()
            raise
        for name, arrays in self.state.items():
            for i, array in enumerate(arrays):
                array[...] = saved["state"][name][i] if name in saved["state"] else 0
        self._count[0] = steps

    def _check_saved(self, saved: Mapping[str, Any]) -> tuple[int, set[str]]:
        """The steps and switches of a saved state that fits, or why it does not."""
        wanted = ("format", "rule", "steps", "switched_on", "groups", "state")
        if not isinstance(saved, Mapping) or any(key not in saved for key in wanted):
            raise TypeError(
                f"expected a state_dict() with the keys {', '.join(wanted)}; "
                f"got {saved if not isinstance(saved, Mapping) else list(saved)}"
            )
        if saved["format"] != STATE_FORMAT:
            raise ValueError(
                f"the state has format {saved['format']!r}, this version of fastopt "
                f"reads {STATE_FORMAT}; load it with the version that saved it"
            )
        if saved["rule"] != self.rule.name:
            raise ValueError(
                f"the state is of rule {saved['rule']!r}, this optimizer's is "
                f"{self.rule.name!r}"
            )
        steps = saved["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f'state["steps"] must be a number >= 0, got {steps!r}')
        if len(saved["groups"]) != len(self.groups):
            raise ValueError(
                f"the state has {len(saved['groups'])} groups, this optimizer has "
                f"{len(self.groups)}"
            )
        for i, (group, values) in enumerate(
            zip(self.groups, saved["groups"], strict=True)
        ):
            for key in group:
                if key not in values and not callable(group[key]):
                    raise ValueError(
                        f"the state has no {key} for groups[{i}], where it was a "
                        f"schedule; set one here too before loading"
                    )
        switches = {name for names in self.rule.variants for name in names}
        on = set(saved["switched_on"])
        names = self.rule.variant({name: name in on for name in switches}).state
        if not on <= switches or set(saved["state"]) != set(names):
            raise ValueError(
                f"the state has buffers {list(saved['state'])}, but {self.rule.name} "
                f"with {sorted(on)} on keeps {list(names)}"
            )
        for name, arrays in saved["state"].items():
            if len(arrays) != len(self._arrays):
                raise ValueError(
                    f'state["{name}"] has {len(arrays)} arrays for '
                    f"{len(self._arrays)} parameters"
                )
            for i, (array, param) in enumerate(zip(arrays, self._arrays, strict=True)):
                where = f'state["{name}"][{i}]'
                if not isinstance(array, np.ndarray) or array.dtype != param.dtype:
                    raise TypeError(
                        f"{where} must be a NumPy array of {param.dtype}, as it was "
                        f"saved, got {getattr(array, 'dtype', type(array))}"
                    )
                if array.shape != param.shape:
                    raise ValueError(
                        f"{where} has shape {array.shape} but {self._names[i]} has "
                        f"{param.shape}"
                    )
        return steps, on

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
