"""Optimizer: parameters + rule + state + step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

from fastopt import backends
from fastopt.backends.numpy_ref import Extras, calls_of
from fastopt.memory.arrays import on_device
from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array
from fastopt.memory.trees import leaves
from fastopt.optimizer import checks, saving
from fastopt.optimizer.accumulation import Pending, new_pending
from fastopt.optimizer.gradients import fit, grad_name, of_tasks, take
from fastopt.optimizer.groups import Group, Values
from fastopt.optimizer.parameters import Parameters
from fastopt.optimizer.refusals import check_rule
from fastopt.optimizer.state import Bound, bind, bind_alone, fill, shrinking
from fastopt.rule import Rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call, filling, uninterrupted
from fastopt.runtime.exclusive import exclusive, free_flag, new_flag
from fastopt.runtime.threads import available, forked

ACCUMULATED: Any = object()  # in place of gradients: those that were accumulated
AS_GIVEN = 1.0  # the gradients; an object of its own, to be known at once


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
    ema
        Decay of a moving average of the parameters, updated in the same pass as they:
        ``average = ema * average + (1 - ema) * p``. It starts with the parameters as
        they are at the first step, and follows them where a gradient is None, too.
    weight_decay_mask
        Where weight decay applies: a tree of bools in the structure of the parameters,
        or a callable of a parameter's path, such as ``"['w'][0]"``, and the array.
        ``lambda path, array: array.ndim > 1`` spares vectors, as people do.
    **hyperparameters
        Of the rule, for all groups that do not set their own. Each is an attribute of
        the optimizer and can be changed at any time. It may be a schedule: a callable
        of the number of completed steps. A group may also have ``frozen=True``.

    Attributes
    ----------
    rule, backend
        As given or chosen.
    threads
        As given or found; can be changed.
    ema
        As given; can be changed. None: there is no moving average.
    groups
        For each group of parameters its hyperparameters, to read and change by name,
        and ``frozen``: whether steps leave its parameters alone.
    state, steps, skipped, grad_norm, ema_params
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
    ema: float | None
    groups: tuple[Group, ...]

    _bound: Bound  # not there from add_group to the next look at it
    _bound_before: Any = None  # by add_group
    _plan: tuple[Any, list[Values] | None, int, Any]
    _planned: bool
    _separately = False  # whether the arrays of a FlatBuffer are segments of their own
    _estimated = False  # whether there was an estimate before the first step
    _in_one_call = True  # whether the compiled step alone can do a plain step
    # More calls that belong to a step, whose own these are; such as a Lookahead's.
    _with_step: Callable[[Sequence[Call]], Sequence[Call]] | None = None

    def __init__(
        self,
        rule: Rule,
        params: Any,
        *,
        backend: str | None = None,
        threads: int | None = None,
        ema: float | None = None,
        weight_decay_mask: Any = None,
        **hyperparameters: Any,
    ):
        check_rule("rule", rule)
        checks.check_meant(params, rule.hyperparameters)
        trees, own = checks.split_groups(params)
        if backend is None:
            device = any(on_device(leaf) for _, leaf in leaves(trees))
            backend = backends.choose(rule, device)
        self._module = backends.load(backend)
        self._params = Parameters(
            self._module,
            trees,
            own is not None,
            rule.by_segment or self._separately or weight_decay_mask is not None,
            self._off,
            weight_decay_mask,
        )
        self.rule, self.backend = rule, backend
        self.threads = available() if threads is None else threads
        self.ema = ema
        if self._params.masked and "weight_decay" not in rule.hyperparameters:
            raise TypeError(
                f"{rule.name} has no weight_decay for a weight_decay_mask to spare"
            )
        self._pending: Pending | None = None
        self._spare: Pending | None = None  # zeros, for the next accumulation
        self._busy, self._skipped, self._grad_norm = new_flag(self), 0, math.nan
        self._averages = None if ema is None else self._params.like()
        given = [dict(group) for group in own or [{}]]
        groups = tuple(
            Group(
                rule,
                f"groups[{number}]" if own else "",
                number,
                self._assign,
                self._params.arrays[0].dtype,
                changes.pop("frozen", False),
            )
            for number, changes in enumerate(given)
        )
        values = [
            group.begin({**hyperparameters, **changes}, 0)
            for group, changes in zip(groups, given, strict=True)
        ]
        # From now on, assignment is to hyperparameters.
        self._commit(values, self._bind(values, groups=groups), groups=groups)

    @exclusive
    def add_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters: ``{"params": ..., "lr": ...}``, as in the beginning.

        What it does not set has the rule's defaults. From now on gradients are a list
        with those of each group. The steps so far count for the new parameters, too.
        """
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(
                f'a group is a dict with "params" and hyperparameters, got '
                f"{type(group).__name__}"
            )
        if self._pending is not None:
            raise RuntimeError(
                "there are accumulated gradients; step or drop_accumulated() first"
            )
        changes = {k: v for k, v in group.items() if k not in ("params", "frozen")}
        params = self._params.with_group(group["params"])
        number = len(self.groups)
        new = Group(
            self.rule,
            f"groups[{number}]",
            number,
            self._assign,
            params.arrays[0].dtype,
            group.get("frozen", False),
        )
        values = new.begin(changes, self.steps)
        before = vars(self).get("_bound", self._bound_before)
        on = before.on | {name for name in self.rule.switches if values[name]}
        self._check_results([new], [values], on, params, self.steps)
        changes = {"groups": (*self.groups, new), "_params": params, "_spare": None}
        changes |= self._unplanned(params, self.threads)
        named = [] if self._params.grouped else [*self.groups]
        uninterrupted(
            *[g.committing(dict(g), prefix="groups[0]") for g in named],
            new.committing(values),
            partial(vars(self).update, changes, _bound_before=before),
            partial(vars(self).pop, "_bound", None),
        )

    def _bind_added(self) -> Bound:
        """Bind to the groups that were added, in one go however many they are."""
        params, averages = self._params, None
        if self._averages is not None:
            averages, old = params.like(), self._averages[1]
            values = [*old, *params.arrays[len(old) :]]
            for average, value in zip(averages[1], values, strict=True):
                fill(average, value)
        of_groups = [dict(group) for group in self.groups]
        bound = self._bind(of_groups, self._bound_before, averages=averages)
        following = self._following(of_groups, bound)
        vars(self).update(following, _averages=averages, _bound=bound)
        return bound

    @exclusive
    def _be_bound(self) -> None:
        """Bind added groups, for readers that do not hold the busy flag."""
        if "_bound" not in vars(self):
            self._bind_added()

    # Hyperparameters ------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        groups = vars(self).get("groups")
        if name == "_bound" and groups:  # some were added
            return self._bind_added()
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
            threads = checks.check_threads(value)
            if groups is None:
                vars(self)["threads"] = threads
            else:
                vars(self).update(self._unplanned(self._params, threads))
                if "_bound" in vars(self):
                    self._plan_steps()
        elif name == "ema":
            if groups is not None:
                checks.check_same_kind(name, value, self.ema)
            super().__setattr__(name, checks.check_decay(name, value))
        elif groups is None or name.startswith("_"):
            super().__setattr__(name, value)
        elif name in groups[0]:
            self._change([{name: value} for _ in groups])
        else:
            raise AttributeError(
                f"{self.rule.name} has no hyperparameter {name!r} to change; it has "
                f"{', '.join(groups[0]) or 'none'}"
            )

    def _assign(
        self, number: int, changes: Mapping[str, Any], frozen: bool | None = None
    ) -> None:
        of_group = [g.number == number for g in self.groups]
        self._change(
            [changes if here else {} for here in of_group],
            frozen=[frozen if here else None for here in of_group],
        )

    @exclusive
    def _change(
        self,
        changes: Sequence[Mapping[str, Any]],
        *,
        frozen: Sequence[bool | None] | None = None,
        also: Iterable[Call] = (),
    ) -> None:
        """Change hyperparameters, a mapping for each group; with an error, none. More
        calls are made at the same instant.

        What was once switched on stays so: with a switch off, a variant does what the
        one without that state does (with finite numbers), and the state survives.
        """
        values = [
            group.checked(given, self.steps)
            for group, given in zip(self.groups, changes, strict=True)
        ]
        bound, switches = self._bound, self.rule.switches
        if not {n for n in switches if any(v[n] for v in values)} <= bound.on:
            bound = self._bind(values, bound)
        self._commit(values, bound, frozen=frozen, also=also)

    @property
    def _threads_now(self) -> int:
        """Those of OpenMP do not survive a fork."""
        return 1 if forked[0] else self.threads

    # State and kernels ----------------------------------------------------------------

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        bound: Bound = vars(self).get("_bound", self._bound_before)
        return bound.steps

    @property
    def skipped(self) -> int:
        """How often ``nonfinite="skip"`` has left a step out."""
        return self._skipped

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients, scaled and not yet clipped, in the last step that
        had ``clip_norm`` or looked for what is not finite; NaN before one."""
        return self._grad_norm

    @property
    def state(self) -> dict[str, list[Array]]:
        """The state buffers by name: for each an array a parameter, in its shape; or,
        where it is factored, the averages of rows and then columns as they are now."""
        if "_bound" not in vars(self):
            self._be_bound()
        return self._bound.state

    @property
    def ema_params(self) -> Any:
        """The moving average of the parameters, in their structure: the very memory
        that steps update, until ``add_group`` makes another. None without ``ema``."""
        if "_bound" not in vars(self):
            self._be_bound()
        return self._averages[0] if self._averages else None

    @exclusive
    def eval_params(self) -> Any:
        """The parameters to use, such as for a validation, in their structure.

        For most rules the parameters themselves, as given. For those that take their
        gradients elsewhere (``schedule_free_*``), new arrays.
        """
        if self._bound.rule.evaluate is None:
            params = self._params
            return params.trees if params.grouped else params.trees[0]
        self._params.watch.check()
        values = self._values(self.steps)
        if not self.steps:
            self._start(values)
        return self._bound.evaluated(values)

    @standard
    def _values(self, steps: int) -> list[Values]:
        """The hyperparameters that hold now, for each set of them."""
        given = [group.at(steps) for group in self.groups]
        if not self._params.differ:
            return given
        names = list(self.groups[0])
        by_name = [dict(zip(names, values, strict=True)) for values in given]
        sets = self._sets(by_name, self._params)
        return [tuple(values.values()) for values in sets]

    def _sets(
        self, values: Sequence[Mapping[str, Any]], params: Parameters
    ) -> list[dict[str, Any]]:
        """The values of the last so many groups for each of their sets: without decay
        where it is masked."""
        first = len(params.trees) - len(values)
        return [
            {**values[number - first], **dict.fromkeys(off, 0.0)}
            for number, off in params.sets
            if number >= first
        ]

    def _check_results(
        self,
        groups: Sequence[Group],
        values: Sequence[Mapping[str, Any]],
        on: Set[str],
        params: Parameters,
        steps: int,
        known: int = 0,
    ) -> list[dict[str, Any]]:
        """The hyperparameters of the sets of these groups, the last ones, as they are
        after so many steps; all but the ``known`` ones with scalars that are finite in
        the parameters' dtype."""
        rule, dtype = self.rule.variant(on), params.arrays[0].dtype
        now = [
            dict(zip(given, group.at(steps, given), strict=True))
            for group, given in zip(groups, values, strict=True)
        ]
        sets = self._sets(now, params)
        for given in sets[known:]:
            carry = rule.first_carry(given)
            constants = rule.scalars(steps + 1, *carry, *given.values())
            surplus = bool(self.rule.variants)
            rule.check_results(steps + 1, constants, dtype, surplus=surplus)
        return sets

    def _off(self, array: Array, decays: bool) -> tuple[str, ...]:
        """The hyperparameters that are 0 for an array, whatever they are in its group;
        ``decays``: whether its weights decay."""
        return () if decays else ("weight_decay",)

    @standard
    def _bind(
        self,
        values: Sequence[Mapping[str, Any]],
        before: Bound | None = None,
        on: Set[str] = frozenset(),
        *,
        averages: tuple[Any, list[Array]] | None = None,
        groups: Sequence[Group] | None = None,
        **saved: Any,
    ) -> Bound:
        """The variant for these values of the groups, and for more switches that are
        ``on``, with its kernel and its state: what there was ``before`` or is
        ``saved``, and else new. Averages and groups are ours, or others."""
        params, groups = self._params, groups or self.groups
        params.watch.check()
        averages = averages or self._averages
        rule, steps = self.rule, saved.get("steps", before.steps if before else 0)
        on = on | (before.on if before else frozenset())
        on = on | {n for n in rule.switches if any(v[n] for v in values)}
        known = len(before.params.sets) if before and before.on == on else 0
        sets = self._check_results(groups, values, on, params, steps, known)
        kept = {"state": before.state, "carried": before.carried} if before else {}
        return bind(
            self._module,
            rule.variant(on),
            frozenset(on),
            params,
            sets,
            averages=averages[1] if averages else None,
            **{"state": {}, "carried": None, "steps": steps, **kept, **saved},
        )

    def _commit(
        self,
        values: Sequence[Mapping[str, Any]],
        bound: Bound,
        *,
        groups: tuple[Group, ...] | None = None,
        frozen: Sequence[bool | None] | None = None,
        also: Iterable[Call] = (),
        **changes: Any,
    ) -> None:
        """Take over what is ready, all at the same instant."""
        groups = groups or self.groups
        flags = frozen or [None] * len(groups)
        changes |= self._unplanned(bound.params, self.threads)
        changes |= self._following(values, bound)
        uninterrupted(
            *also,
            *[
                group.committing(given, flag)
                for group, given, flag in zip(groups, values, flags, strict=True)
            ],
            partial(vars(self).update, changes, _bound=bound, groups=groups),
        )
        self._plan_steps()

    def _following(
        self, values: Sequence[Mapping[str, Any]], bound: Bound
    ) -> dict[str, Any]:
        """More attributes that follow from these."""
        return {}

    def _unplanned(self, params: Parameters, threads: int) -> dict[str, Any]:
        """Attributes in place of a plan: with this one, every step is right, but slow;
        an interrupt may come before there is another."""
        plan = (params.layout, None, threads, None)
        return {"threads": threads, "_plan": plan, "_planned": False}

    def _plan_steps(self) -> None:
        schedules = any(group.schedules for group in self.groups)
        rule = self._bound.rule
        # What the compiled step cannot do all by itself.
        more = (
            not self._in_one_call
            or rule.measure is not None
            or self._averages is not None
            or self._pending is not None
            or any(group.frozen for group in self.groups)
            or (bool(rule.starts or rule.carry) and self.steps == 0)
        )
        # What a step needs, in one lookup: a class with __getattr__ takes 23 ns for
        # each attribute instead of 7.
        plan = (
            self._params.layout,
            None if schedules else self._values(self.steps),
            self.threads,
            None if more else self._params.watching(self._bound.step),
        )
        vars(self).update(_plan=plan, _planned=True)

    # Steps ----------------------------------------------------------------------------

    def step(
        self,
        grads: Any = ACCUMULATED,
        *,
        weights: Any = None,
        grad_scale: float = AS_GIVEN,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        zero_grads: bool = False,
    ) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads
            Gradients in the structure, shapes and dtype of the parameters; ``None`` in
            place of one leaves that parameter and its state alone. They are only read.
            With groups: a list with the gradients of each. By default those that were
            accumulated, which start at zero again.
        weights
            Of several tasks, a number for each. Then ``grads`` is a list with the
            gradients of each task, or an array with a row for each, and the step is
            that of their weighted sum, which is formed in the cache and never written
            to memory: the sum from zero on, in the order of the tasks, in the
            parameters' dtype. That is, to the last bit, what ``accumulate(grads[k],
            grad_scale=weights[k])`` for each of them would have come to. None in place
            of a gradient: the task does not depend on that parameter. A task whose
            weight is 0 is left out, and not read.
        grad_scale
            A factor for the gradients, applied in the same pass; -1 maximizes.
        clip_norm
            The most that the norm of all gradients together, scaled, may be; larger
            ones are shrunk to it as by torch's ``clip_grad_norm_``. One pass more over
            the gradients, which only reads.
        clip_value
            The most that the magnitude of each element may be, after ``clip_norm``.
        nonfinite
            What to do about an infinity or a NaN in the gradients: "propagate" it,
            "skip" the step (parameters, state and count stay; ``skipped`` counts it),
            or "raise" FloatingPointError. All but the first read the gradients once
            more.
        zero_grads
            Set the gradients to zero when they have been read.

        Raises
        ------
        TypeError, ValueError
            If the gradients do not fit; then nothing has been written.
        FloatingPointError
            With ``nonfinite="raise"``; nothing has been written.
        RuntimeError
            If a step of this optimizer is under way, in another thread.

        Notes
        -----
        Steps are counted for the optimizer, not for each parameter as in torch, so a
        parameter that was left alone has the bias correction of the others.
        """
        if grad_scale is not AS_GIVEN:
            grad_scale = checks.check_factor(grad_scale, self._params.arrays[0].dtype)
        busy = self._busy
        while busy[0]:
            busy = free_flag(self)
        try:
            try:
                busy[0] = True  # as in exclusive(), at half the cost
                # Only now: the gradients' own code, a mapping's or a schedule's, is
                # refused to change the optimizer, and another thread is, too.
                layout, values, threads, compiled = self._plan
                found: list[Any]
                if weights is not None:
                    if grads is ACCUMULATED:
                        raise TypeError(
                            "weights need the gradients of each task: step(grads, ...)"
                        )
                    found, weights = of_tasks(self._params, grads, weights)
                    compiled = None
                elif layout is None:  # a single array
                    found = [grads]
                elif type(grads) is FlatBuffer and grads.shapes is layout:
                    found = [grads.data]
                elif grads is ACCUMULATED:
                    found = [grads]
                else:
                    found = []
                    checks.collect(layout, grads, "", found)
                if values is None:  # there are schedules
                    values = self._values(self.steps)
                if forked[0]:
                    threads = 1
                # The compiled step takes plain arrays only, and refuses before it
                # writes.
                if (
                    compiled is None
                    or clip_norm is not None
                    or clip_value is not None
                    or zero_grads
                    or nonfinite != "propagate"
                    or not compiled(found, values, grad_scale, threads)
                ):
                    pending = self._look_for_accumulated(grads)
                    self._step_in_full(
                        pending.found if pending else found,
                        values,
                        threads,
                        grad_scale,
                        checks.check_limit("clip_norm", clip_norm),
                        checks.check_limit("clip_value", clip_value),
                        checks.check_nonfinite(nonfinite),
                        zero_grads or pending is not None,
                        weights,
                    )
            finally:
                busy[0] = False
        except BaseException:  # perhaps an interrupt at the first of these lines
            busy[0] = False
            raise

    def _look_for_accumulated(self, grads: Any) -> Pending | None:
        """The sums that a step with these gradients is to take."""
        if grads is not ACCUMULATED and self._pending is not None:
            raise RuntimeError(
                "there are accumulated gradients; call step() without gradients to "
                "apply them, or drop_accumulated() to discard them"
            )
        if grads is ACCUMULATED and self._pending is None:
            raise TypeError("step needs gradients: none have been accumulated")
        return self._pending

    def _taken(self) -> tuple[list[Call], dict[str, Any]]:
        """What a step does with the sums that it takes, beside zeroing those that it
        reads: calls, and what attributes become."""
        pending = self._pending
        if pending is None:
            return [], {}
        calls = [
            filling(sums, 0.0)
            for group, sums in zip(self._params.group_of, pending.sums, strict=True)
            if self.groups[group].frozen  # and so not read
        ]
        unplanned = self._unplanned(self._params, self.threads)
        return calls, {"_pending": None, "_spare": pending.emptied, **unplanned}

    @standard
    def _step_in_full(
        self,
        found: list[Any],
        values: list[Values],
        threads: int,
        grad_scale: float,
        clip_norm: float,
        clip_value: float,
        nonfinite: str,
        zero_grads: bool,
        weights: list[float] | None,
    ) -> None:
        """A step with all that there is to it, in the order in which it happens. With
        weights, what was found is a list for each task."""
        bound = self._bound
        step, first = bound.step, bound.steps == 0
        several = weights is not None
        thawed = list(map(self._thawed, found)) if several else self._thawed(found)
        self._params.check_unchanged(step, thawed if several else [thawed])
        grads = take(self._params, step, thawed, bound.spans, weights)
        tasks: list[list[Any]] = grads if several else [grads]
        if zero_grads:
            names = [
                grad_name(self._params, i, f"[{k}]" if several else "")
                for k, task in enumerate(tasks)
                for i in range(len(task))
            ]
            checks.check_writeable(names, [grad for task in tasks for grad in task])
        if first and (bound.rule.starts or bound.rule.carry or bound.averages):
            self._start(values)
        factor = grad_scale
        calls, changes = self._taken()
        if clip_norm < math.inf or nonfinite != "propagate":
            norm, bad = bound.norm(grads, grad_scale, threads, weights)
            changes["_grad_norm"] = norm
            if bad and nonfinite == "raise":
                self._grad_norm = norm
                where = [
                    grad_name(self._params, i, "[...]" if several else "") for i in bad
                ]
                raise FloatingPointError(
                    f"infinity or NaN in {', '.join(where)}; nothing was updated"
                )
            if bad and nonfinite == "skip":
                calls += [
                    filling(grad, 0.0)
                    for task in tasks
                    for grad in task
                    if zero_grads and grad is not None
                ]
                changes["_skipped"] = self._skipped + 1
                self._finish(calls, changes)
                return
            factor *= shrinking(norm, clip_norm)
        weight = 0.0 if self.ema is None else 1 - self.ema
        extras = Extras(clip_value, weight, zero_grads)
        own = self._calls(grads, weights, values, factor, threads, extras)
        more = self._with_step(own) if self._with_step else ()
        if first:  # what is done before it need not be done again
            changes |= self._unplanned(self._params, self.threads)
        self._finish([*own, *calls, *more], changes)

    def _finish(self, calls: Iterable[Call], changes: Mapping[str, Any]) -> None:
        """What a step writes: all of it, or, with an interrupt, nothing."""
        uninterrupted(*calls, partial(vars(self).update, changes))
        if not self._planned:
            self._plan_steps()

    def _calls(
        self,
        grads: list[Any],
        weights: list[float] | None,
        values: Sequence[Values],
        factor: float,
        threads: int,
        extras: Extras,
    ) -> list[Call]:
        """The step itself, with these gradients, which were taken, times a factor."""
        return self._bound.calls(values, factor, threads, extras)

    def _start(self, values: list[Values]) -> None:
        """Before the first step: the parameters may have got their values by now."""
        names, rule = list(self.groups[0]), self._bound.rule
        sets = [dict(zip(names, given, strict=True)) for given in values]
        since = dict.fromkeys(rule.state, 0)
        if self._estimated and rule.estimate is not None:
            del since[rule.estimate[0]]  # the estimate has set this buffer
        self._bound.start(sets, since)

    def _thawed(self, found: list[Any]) -> list[Any]:
        """Gradients, without those of frozen groups."""
        if not any(group.frozen for group in self.groups):
            return found
        return [
            None if self.groups[number].frozen else grad
            for number, grad in zip(self._params.group_of, found, strict=True)
        ]

    # Gradients that come in parts -----------------------------------------------------

    @exclusive
    @standard
    def accumulate(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Add gradients, times a factor, to a sum that the next ``step()`` takes.

        They are as for :meth:`step`, and only read. The sums have the parameters'
        dtype; a parameter that only got None is left alone by that step.
        """
        grad_scale = checks.check_factor(grad_scale, self._params.arrays[0].dtype)
        found: list[Any] = []
        checks.collect(self._params.layout, grads, "", found)
        pending = self._pending or self._spare
        if pending is None:
            pending = new_pending(self._module, self._params.arrays)
        taken = take(self._params, pending.step, found, pending.spans)
        pending, calls = pending.added(taken, grad_scale, self._threads_now)
        unplanned = self._unplanned(self._params, self.threads)
        self._finish(calls, {"_pending": pending, "_spare": None, **unplanned})

    @exclusive
    def drop_accumulated(self) -> None:
        """Forget what :meth:`accumulate` was given since the last step."""
        unplanned = self._unplanned(self._params, self.threads)
        self._finish([], {"_pending": None, "_spare": None, **unplanned})

    @exclusive
    @standard
    def estimate(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Put an estimate into the state, for a rule that works with one (``sophia_g``;
        its page says of what ``grads`` are to be the gradients). Like a step otherwise,
        but parameters and the count stay."""
        if self.rule.estimate is None:
            raise TypeError(f"{self.rule.name} does not use estimates")
        grad_scale = checks.check_factor(grad_scale, self._params.arrays[0].dtype)
        self._params.watch.check()
        found: list[Any] = []
        checks.collect(self._params.layout, grads, "", found)
        buffer, rule = self.rule.estimate
        arrays, values = self._bound.state[buffer], self._values(self.steps)
        if not self.steps:
            self._start(values)
        step = bind_alone(self._module, rule, arrays, self._params.set_of)
        # They must not be the parameters either, to which this step writes nothing.
        taken = [
            fit(self._params, i, grad, self._bound.spans)
            for i, grad in enumerate(self._thawed(found))
        ]
        step.take(taken)
        rows = [
            (grad_scale, *rule.scalars(self.steps + 1, *given)[: rule.scalar_count])
            for given in values
        ]
        self._finish(calls_of(step, rows, self._threads_now), {"_estimated": True})

    # Saving and resuming --------------------------------------------------------------

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the parameters that a run needs to go on exactly.

        Plain dicts, lists, numbers, strings and NumPy arrays. A hyperparameter that is
        a schedule is left out: give it to the optimizer that is to go on.
        """
        self._params.watch.check()
        return saving.save(self)

    @exclusive
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, bit for bit, on any backend.

        All is checked before anything changes; state finds its parameters by name. The
        saved hyperparameters replace ours; what was a schedule must be one here, too.
        """
        self._loading(saved)()

    def _loading(self, saved: Mapping[str, Any]) -> Callable[..., None]:
        return saving.loading(self, saved)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an Optimizer works in its parameters' memory and cannot be copied or "
            "pickled; make a new one and give it this one's state_dict()"
        )

    def __repr__(self) -> str:
        arrays = self._params.arrays
        size = sum(array.size for array in arrays)
        groups = self.groups[0] if len(self.groups) == 1 else self.groups
        return (
            f"<{self.rule.name}: {size} {arrays[0].dtype} parameters, backend "
            f"{self.backend!r}, {self.steps} steps done, {groups}>"
        )


Rule.optimizer = Optimizer
