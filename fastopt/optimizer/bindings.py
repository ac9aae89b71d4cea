"""What an optimizer is bound to: parameters, groups of hyperparameters, and state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

from fastopt import advice, backends
from fastopt.memory.arrays import on_device
from fastopt.memory.segments import Array
from fastopt.memory.trees import leaves
from fastopt.optimizer import checks
from fastopt.optimizer.accumulation import Pending
from fastopt.optimizer.formats import Formats, first_element
from fastopt.optimizer.groups import Group, Values
from fastopt.optimizer.parameters import Parameters
from fastopt.optimizer.refusals import (
    check_reduce,
    check_rule,
    no_attribute,
    where_option,
)
from fastopt.optimizer.state import Bound, fill
from fastopt.rule import Rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call, uninterrupted
from fastopt.runtime.exclusive import exclusive, new_flag
from fastopt.runtime.threads import available, forked
from fastopt.trial import check_results


class Bindings:
    """Parameters, groups and state, and how they change: together, at one instant."""

    rule: Rule
    backend: str
    threads: int
    ema: float | None
    groups: tuple[Group, ...]

    _bound: Bound  # missing from add_group until the next look at it
    _bound_before: Any = None  # by add_group
    _plan: tuple[Any, list[Values] | None, int, Any, bool]
    _planned: bool
    _separately = False  # whether the arrays of a FlatBuffer are segments of their own
    _leaves_state = True  # to kernels, which know how it is encoded
    _in_one_call = True  # whether the compiled step alone can do a plain step
    _takes_shards = True  # whether a step can do with shards of the parameters
    _estimated = False  # whether there was an estimate before the first step

    def __init__(
        self,
        rule: Rule,
        params: Any,
        *,
        backend: str | None = None,
        threads: int | None = None,
        ema: float | None = None,
        weight_decay_mask: Any = None,
        formats: Any = None,
        copy_to: Any = None,
        seed: int = 0,
        reduce: Callable[[Array], None] | None = None,
        **hyperparameters: Any,
    ):
        check_rule("rule", rule)
        check_reduce(reduce, rule, self._takes_shards)
        checks.check_meant(params, rule.hyperparameters)
        trees, own = checks.split_groups(params)
        if backend is None:
            device = any(on_device(leaf) for _, leaf in leaves(trees))
            backend = backends.choose(rule, device)
        self._module = backends.load(backend)
        of = Formats.of_rule(formats, rule, self._leaves_state)
        separate = rule.by_segment or self._separately or callable(formats)
        self._params = Parameters(
            self._module,
            trees,
            own is not None,
            separate or weight_decay_mask is not None,
            self._off,
            weight_decay_mask,
            of,
            **{"copy_to": copy_to, "first": first_element(seed)},
        )
        of.check_used(self._params.chosen)
        self.rule, self.backend, self.seed = rule, backend, seed
        self._reduce = reduce
        self.threads = available() if threads is None else threads
        self.ema = ema
        if self._params.masked:
            checks.check_decays(rule)
        self._pending: Pending | None = None
        self._spare: Pending | None = None  # zeros, for the next accumulation
        self._busy, self._skipped = new_flag(self), 0
        # The norm, or a function that returns it, and who counts skipped steps, if that
        # is a GPU.
        self._grad_norm: Any = math.nan
        self._decider: Any = None
        self._in_graphs: tuple[Bound, ...] = ()  # whose memory CUDA graphs use
        self._requests = checks.Requests()
        self._averages = None if ema is None else self._params.like(computed=True)
        groups, values = zip(
            *[
                self._new_group(number, bool(own), given, hyperparameters)
                for number, given in enumerate(own or [{}])
            ],
            strict=True,
        )
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
            raise RuntimeError("there are accumulated gradients; step() first")
        changes = {k: v for k, v in group.items() if k != "params"}
        params = self._params.with_group(group["params"])
        number = len(self.groups)
        new, values = self._new_group(number, True, changes, {}, self.steps)
        before = vars(self).get("_bound", self._bound_before)
        before.program.check_working()
        on = before.on | {name for name in self.rule.switches if values[name]}
        self._check_results([new], [values], on, params, self.steps)
        changes = {"groups": (*self.groups, new), "_params": params, "_spare": None}
        changes |= self._unplanned(params)
        named = [] if self._params.grouped else [*self.groups]
        uninterrupted(
            *[g.committing(dict(g), prefix="groups[0]") for g in named],
            new.committing(values),
            partial(vars(self).update, changes, _bound_before=before),
            partial(vars(self).pop, "_bound", None),
        )

    def _new_group(
        self,
        number: int,
        named: bool,
        own: Mapping[str, Any],
        common: Mapping[str, Any],
        steps: int = 0,
    ) -> tuple[Group, dict[str, Any]]:
        """Return a group, and its first hyperparameters: its own and common ones."""
        prefix, dtype = f"groups[{number}]" * named, self._params.dtype
        frozen = own.get("frozen", False)
        group = Group(self.rule, prefix, number, self._assign, dtype, frozen)
        changes = {key: value for key, value in own.items() if key != "frozen"}
        return group, group.begin(self._completed({**common, **changes}), steps)

    def _completed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Complete a group's first hyperparameters, as a class may have to."""
        return values

    def _bind_added(self) -> Bound:
        """Bind to the groups that were added, in one go however many they are."""
        params, averages = self._params, None
        if self._averages is not None:
            averages, old = params.like(computed=True), self._averages[1]
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
        """Bind to added groups, for readers that do not hold the busy flag."""
        if "_bound" not in vars(self):
            self._bind_added()

    def __getattr__(self, name: str) -> Any:
        groups = vars(self).get("groups")
        if name == "_bound" and groups:  # some were added
            return self._bind_added()
        if not groups or name not in groups[0]:
            raise no_attribute(self, name, self.groups[0] if groups else ())
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
                self._use_threads(threads)
        elif name == "ema":
            if groups is not None:
                checks.check_same_kind(name, value, self.ema)
            super().__setattr__(name, checks.check_decay(name, value))
        elif groups is None or name.startswith("_"):
            super().__setattr__(name, value)
        elif name in groups[0]:
            self._change([{name: value} for _ in groups])
        else:
            more = where_option(self.rule, name)
            if not more and not hasattr(type(self), name):
                more = advice.hint(name, groups[0])
            raise AttributeError(
                f"{self.rule.name} has no hyperparameter {name!r} to change; it has "
                f"{', '.join(groups[0]) or 'none'}{more}"
            )

    @exclusive
    def _use_threads(self, threads: int) -> None:
        vars(self).update(self._unplanned(threads=threads))
        if "_bound" in vars(self):
            self._plan_steps()

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
        """Change hyperparameters of each group; with an error, of none. More calls are
        made at the same instant.

        What was once switched on stays so: with a switch off, a variant does what the
        one without that state does (with finite numbers), and the state survives.
        """

        def checked(steps: int) -> list[dict[str, Any]]:
            pairs = zip(self.groups, changes, strict=True)
            return [group.checked(changed, steps) for group, changed in pairs]

        known = self._bound.known_steps
        try:
            values = checked(known)
        except (ValueError, ArithmeticError):
            # Perhaps only in the first step, which a GPU may have done.
            if self.steps == known:
                raise
            values = checked(self.steps)
        bound, switches = self._bound, self.rule.switches
        if not {n for n in switches if any(v[n] for v in values)} <= bound.on:
            bound = self._bind(values, bound)
        self._commit(values, bound, frozen=frozen, also=also)

    @property
    def _threads_now(self) -> int:
        """The number of threads for a step: 1 after a fork, which ends OpenMP's."""
        return 1 if forked[0] else self.threads

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        bound: Bound = vars(self).get("_bound", self._bound_before)
        return bound.steps

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

    @standard
    def _values(self, steps: int) -> list[Values]:
        """Return the hyperparameters that hold now, for each set of them."""
        values = [group.at(steps) for group in self.groups]
        if not self._params.differ:
            return values
        names = list(self.groups[0])
        by_name = [dict(zip(names, row, strict=True)) for row in values]
        sets = self._sets(by_name, self._params)
        return [tuple(row.values()) for row in sets]

    def _sets(
        self, values: Sequence[Mapping[str, Any]], params: Parameters
    ) -> list[dict[str, Any]]:
        """Return the values of the last so many groups for each of their sets: without
        decay where it is masked."""
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
        """Return the hyperparameters of the sets of these groups, which are the last
        ones, after so many steps. Check that the scalars of all but the ``known`` sets
        are finite in the parameters' dtype."""
        rule, dtype = self.rule.variant(on), params.dtype
        now = [
            dict(zip(named, group.at(steps, named), strict=True))
            for group, named in zip(groups, values, strict=True)
        ]
        sets = self._sets(now, params)
        for named in sets[known:]:
            carry = rule.first_carry(named)
            constants = rule.scalars(steps + 1, *carry, *named.values())
            surplus = bool(self.rule.variants)
            check_results(rule, steps + 1, constants, dtype, surplus=surplus)
        return sets

    @staticmethod  # a method would hold this object in a cycle of references
    def _off(array: Array, decays: bool) -> tuple[str, ...]:
        """Return the hyperparameters that are 0 for an array, whatever its group's."""
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
        """Return the variant for these values of the groups, and for switches that are
        ``on``, with its state: that of ``before``, the ``saved`` one, or a new one."""
        params, groups = self._params, groups or self.groups
        params.watch.check()
        averages = averages or self._averages
        rule, steps = self.rule, saved.get("steps", before.steps if before else 0)
        on = on | (before.on if before else frozenset())
        on = on | {n for n in rule.switches if any(v[n] for v in values)}
        known = len(before.params.sets) if before and before.on == on else 0
        sets = self._check_results(groups, values, on, params, steps, known)
        kept = {} if before is None else before.kept
        return Bound(
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
        changes |= self._unplanned(bound.params)
        changes |= self._following(values, bound)
        self._write(
            *also,
            *[
                group.committing(named, flag)
                for group, named, flag in zip(groups, values, flags, strict=True)
            ],
            partial(vars(self).update, changes, _bound=bound, groups=groups),
        )
        self._plan_steps()

    def _write(self, *calls: Call) -> None:
        """Make all calls or, with an interrupt, none. If one fails on a device, in
        whichever program, the optimizer refuses to go on."""
        try:
            uninterrupted(*calls)
        except Exception as error:
            if bound := vars(self).get("_bound"):
                bound.program.note_failure(error)
            raise

    def _following(
        self, values: Sequence[Mapping[str, Any]], bound: Bound
    ) -> dict[str, Any]:
        """Return more attributes that follow from these."""
        return {}

    def _unplanned(
        self, params: Parameters | None = None, threads: int | None = None
    ) -> dict[str, Any]:
        """Return attributes in place of a plan. Every step is right with them, but
        slow, because an interrupt may come before there is a new plan."""
        threads = self.threads if threads is None else threads
        averaged = self.ema is not None
        plan = ((params or self._params).layout, None, threads, None, averaged)
        return {"threads": threads, "_plan": plan, "_planned": False}

    def _plan_steps(self) -> None:
        schedules = any(group.schedules for group in self.groups)
        rule = self._bound.rule
        # Whether the compiled step cannot do all of a plain step.
        needs_python = (
            not self._in_one_call
            or self._reduce is not None
            or rule.measure is not None
            or self._pending is not None
            or any(group.frozen for group in self.groups)
            or (
                bool(rule.starts or rule.carry or self._averages is not None)
                and self._bound.is_first
            )
        )
        # What a step needs, in one lookup: a class with __getattr__ takes 23 ns for
        # each attribute instead of 7.
        plan = (
            self._params.layout,
            None if schedules else self._values(self._bound.known_steps),
            self.threads,
            None if needs_python else self._params.watching(self._bound.program.runner),
            self.ema is not None,
        )
        vars(self).update(_plan=plan, _planned=True)

    def _start(self, values: list[Values]) -> None:
        """Start the state before the first step, as the parameters may have got their
        values by now."""
        names, rule = list(self.groups[0]), self._bound.rule
        sets = [dict(zip(names, row, strict=True)) for row in values]
        since = dict.fromkeys(rule.state, 0)
        if self._estimated and rule.estimate is not None:
            del since[rule.estimate[0]]  # the estimate has set this buffer
        self._bound.start(sets, since)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an Optimizer works in its parameters' memory and cannot be copied or "
            "pickled; make a new one and give it this one's state_dict()"
        )
