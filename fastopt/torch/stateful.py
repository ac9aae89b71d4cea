"""What a torch optimizer of ours keeps: groups, state in torch's form and in ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastopt.memory.formats import FORMATS
from fastopt.optimizer import checks, refusals
from fastopt.optimizer.formats import PARAM, Chosen
from fastopt.rule import Rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import uninterrupted
from fastopt.runtime.threads import available, forked, launched_with_one, own_number
from fastopt.step import HalfDone
from fastopt.torch import dtensors, loading
from fastopt.torch.arguments import (
    EXTRAS,
    refuse_options,
    refuse_params,
    refuse_schedules,
)
from fastopt.torch.flat import flattened_any, in_flat_buffer
from fastopt.torch.formats import REMAINDER, WORDS, decoded, fit, names_of
from fastopt.torch.gradients import Gradients, Sums, is_left, of_shards, of_tasks
from fastopt.torch.masters import apart, check_masters, setting
from fastopt.torch.memory import HALVES, Unsupported, native
from fastopt.torch.plan import Plan
from fastopt.torch.ranks import refuse_group_in
from fastopt.torch.state import BEGUN, EMA, TRAINED, evaluated, first_counts, has_begun
from fastopt.torch.storage import Storage
from fastopt.torch.turns import Call, Turns
from fastopt.torch.values import values_of

NEVER: Any = object()  # no attribute is this
KEPT = (
    *EXTRAS,
    "skipped",
    "grad_norm",
    "_step_supports_amp_scaling",
    "_torchs",
    "_sums",
)
ACCUMULATED = "accumulated"  # the key of sums of gradients in a state_dict


class Stateful(Storage):
    """A ``torch.optim.Optimizer`` whose state is in memory that kernels work in."""

    _own: Rule | None = None  # the rule of a class that torch has not
    _torchs = False  # whether state is in torch's form, since the last step was torch's
    _sums: Sums | None = None  # of accumulated gradients
    weight_decay_mask: Any = None
    threads: int | None

    def _renew(self) -> None:
        """Forget what was worked out."""
        self._plan: Plan | None = None
        self._other_plan: Plan | None = None  # of steps with other gradients
        self._plans: dict[Tensor, Plan | None] = {}  # of single parameters
        self._places: dict[Tensor, tuple[dict[str, Any], int]] = {}
        self._noted: set[Any] = set()  # what steps have needed of all parameters
        self._kernels_count = True  # unless they cannot compute a rule's scalars
        if "_turns" not in vars(self):
            self._turns, self._requests = Turns(), checks.Requests()
            self._not_stored = np.zeros(1, np.int64)
            self._not_stored_there = {}
            self._most_threads = available()
            self._threads_chosen = bool(own_number())
            self._launched_with_one = launched_with_one()

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule for a group with the options it has now. Raise Unsupported if
        there is none."""
        return self._default_rule

    @property
    def _rules(self) -> list[Rule]:
        """The rules of the groups; none of them, if torch's own step is used."""
        try:
            return [self._rule(group) for group in self.param_groups]
        except Unsupported:
            return []

    def _values(self, group: Mapping[str, Any], rule: Rule) -> list[Any]:
        """Return the group's hyperparameters in the order of the rule's."""
        return values_of(group, rule, self.param_groups, self._own is not None)

    def _inward(self, state: dict[str, Any]) -> None:
        """Change a saved state of a parameter to the form of ``state``."""

    def _outward(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state of a parameter in the form that is saved."""
        return state

    def _entries(self) -> list[tuple[Tensor, dict[str, Any]]]:
        entries = list(self.state.items())  # a handler may add some
        return [(p, s) for p, s in entries if isinstance(s, dict)]

    def _to_torchs_form(self) -> None:
        buffers = {self._names.key(name) for rule in self._rules for name in rule.state}
        calls = []
        for param, state in self._entries():
            if not has_begun(state, self._default_rule, self._names):
                calls.append(state.clear)
                continue
            changed = dict(self._outward(state))
            begun = bool(changed.pop(BEGUN, True))
            gone = {REMAINDER, BEGUN}  # torch's step will change the parameter
            if not begun:
                gone |= buffers
            for key in (buffers & changed.keys()) - gone:
                # Ours may be of another dtype.
                changed[key] = decoded(changed, key).to(param.dtype)
            changed = {key: new for key, new in changed.items() if key not in gone}
            calls.append(partial(state.update, changed))
            calls += [partial(state.pop, key, None) for key in gone]
        uninterrupted(*calls, partial(self.__dict__.update, _torchs=True))

    def _to_our_form(self) -> None:
        calls = []
        for _, state in self._entries():
            changed = dict(state)
            with torch.no_grad():
                self._inward(changed)
            calls.append(partial(state.update, changed))
        uninterrupted(*calls, partial(self.__dict__.update, _torchs=False))

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        group, i = self._places.get(param, ({"params": []}, 0))
        there = any(group is now for now in self.param_groups)
        if not there or i >= len(group["params"]) or group["params"][i] is not param:
            self._places = {
                p: (group, i)
                for group in self.param_groups
                for i, p in enumerate(group["params"])
            }
            group, _ = self._places.get(param) or refusals.no_parameter(param)
        return group

    def _threads(self) -> int:
        if forked[0]:
            return 1
        if self.threads is not None:
            return self.threads
        now: int = torch.get_num_threads()
        if self._threads_chosen or (now == 1 and self._launched_with_one):
            return self._most_threads  # torch has its 1 from the launcher
        return min(self._most_threads, now)

    @standard
    def accumulate(self, *, grad_scale: float = 1.0) -> None:
        """Add the gradients in ``.grad``, times a factor, to sums for the next
        ``step()``, and reset them as ``zero_grad`` does.

        The sums of bfloat16 and float16 gradients are float32. A ``state_dict``
        contains the sums. GradScaler cannot be used, because it reads ``.grad``.
        """

        if dtensors.are_there(self._params):
            raise TypeError(
                "accumulate() takes no DTensors; their gradients are added up by FSDP2 "
                "itself, with set_requires_gradient_sync(False) before all but the last"
            )

        def calls() -> list[Call]:
            try:
                self._read(list(self.param_groups))
            except Unsupported as reason:
                raise RuntimeError(
                    f"{reason} are left to torch's own {type(self).__name__}, which "
                    f"has no accumulate"
                ) from None
            params = [param for param, _ in self._all()]
            sums = self._sums
            if sums is None or not (sums.received.any() or sums.fit(params)):
                sums = Sums(params)
            sums.check(params)
            factor = checks.check_factor(grad_scale, sums.dtype)
            adding = sums.adding(factor, self._threads())
            return [*adding, partial(self.__dict__.update, _sums=sums)]

        self._change(calls)

    def _change(self, prepare: Callable[[], Iterable[Call]]) -> None:
        """Make a change, as ``Turns.change``. If it fails half-way on a GPU, refuse to
        go on."""
        self.check_whole()
        try:
            self._turns.change(prepare)
        except HalfDone as error:
            self._half_done, self._plan = error, None
            raise

    def drop_accumulated(self) -> None:
        """Discard the sums of :meth:`accumulate`."""
        with self._turns.lock:
            uninterrupted(
                self._turns.overtake, partial(self.__dict__.update, _sums=None)
            )

    @property
    def _waiting(self) -> Sums | None:
        """The accumulated sums that the next step takes."""
        sums = self._sums
        return None if sums is None or not sums.received.any() else sums

    def _gradients(
        self, grads: Any, weights: Any, zero_grads: bool = False
    ) -> Gradients | None:
        """Return the gradients that a step takes in place of those in ``.grad``: those
        that it was given, the accumulated sums, or None if there are neither."""
        params = [param for param, _ in self._all()]
        sums = self._waiting
        if grads is not None or weights is not None:
            if sums is not None:
                raise RuntimeError(
                    "there are accumulated gradients; call step() without gradients to "
                    "apply them, or drop_accumulated() to discard them"
                )
            return of_shards(of_tasks(params, grads, weights), params, zero_grads)
        if sums is None:
            return None
        sums.check(params)
        if any(is_left(param.grad) for param in params):
            raise RuntimeError(
                "there are accumulated gradients, and others in .grad; call "
                "accumulate() to add these, or zero_grad() to discard them"
            )
        return sums.gradients

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients: to None, or to zeros. Those of a model that ``flatten_``
        has flattened are always set to zeros, because they are to stay in their
        buffer."""
        plan = self._plan
        if set_to_none and not torch.autograd._profiler_enabled():
            # This does what torch does, without the label that its profiler shows.
            if native is not None and not flattened_any[0]:
                native.drop_gradients(self.param_groups)
                return
            if plan is not None and plan.zero_flat(self.param_groups, self.state):
                return
        flat: dict[int, list[Tensor]] = {}
        if set_to_none:
            for param, _ in self._all():
                if param.grad is not None and in_flat_buffer(param.grad):
                    flat.setdefault(id(param.grad._base), []).append(param)
        kept, bases = [], []
        for params in flat.values():
            grads = [param.grad for param in params]
            kept += list(zip(params, grads, strict=True))
            base = grads[0]._base
            whole = sum(grad.numel() for grad in grads) == base.numel()
            bases += [base] if whole else []
            for grad in [base] if whole else grads:
                grad.zero_()
        super().zero_grad(set_to_none)
        for param, grad in kept:
            param.grad = grad
        if plan is not None and len(bases) == len(flat) > 0:
            plan.note_flat(self.param_groups, self.state, bases)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            refuse_group_in(param_group)
            if "params" in param_group:
                refuse_params(param_group["params"], '"params" of a group')
            # Others' keys may be anything: Megatron's groups contain a class.
            ours = self.defaults
            refuse_options(param_group, self)
            refuse_schedules({k: v for k, v in param_group.items() if k in ours})
        self.check_whole()
        with self._turns.lock:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        with self._turns.lock:
            self.check_whole()
            saved: dict[str, Any] = super().state_dict()
            for key, state in saved["state"].items():
                if isinstance(state, dict) and not self._torchs:
                    saved["state"][key] = self._outward(state)
            if self._waiting is not None:
                (sums,) = self._waiting.gradients.tasks
                saved[ACCUMULATED] = [s if s is None else s.clone() for s in sums]
            return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does, with three differences: float32 state of bfloat16
        and float16 parameters stays float32, a state of another optimizer is refused,
        and everything changes at the same instant."""
        state_dict = state_dict.copy()
        for before in list(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = self.__dict__
        with self._turns.lock:
            loading.check(state_dict, self, self._own)
            loaded = self._loaded(state_dict)
            new = {k: v for k, v in loaded.items() if own.get(k, NEVER) is not v}
            if self._half_done is not None:
                new["_half_done"] = None
            uninterrupted(self._turns.overtake, partial(own.update, new))
        for after in list(self._optimizer_load_state_dict_post_hooks.values()):
            after(self)

    def _loaded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the attributes that this optimizer gets from what was saved: those of
        a copy, which torch loads it into."""
        hooks = [f"_optimizer_load_state_dict_{when}_hooks" for when in ("pre", "post")]
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **{name: OrderedDict() for name in hooks})
        super(Stateful, other).load_state_dict(state_dict)
        ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        for i, (param, _) in zip(ids, other._all(), strict=True):
            loaded = other.state.get(param)
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    carried = not value.dim() and not self._names.torchs
                    if key == self._names.steps:
                        continue  # torch moves it to the device that is to count
                    if param.dtype in HALVES or carried:
                        loaded[key] = value if carried else value.to(param.device)
                elif isinstance(value, Tensor) and value.dtype in WORDS:
                    loaded[key] = value.to(param.device)  # no numbers to convert
            if loaded:
                other._inward(loaded)
        other._fit_formats()
        other._torchs, saved = False, state_dict.get(ACCUMULATED)
        other._sums = None
        if saved is not None:
            other._sums = Sums([param for param, _ in other._all()])
            other._sums.restore(saved)
        return {k: v for k, v in vars(other).items() if k not in hooks}

    def _fit_formats(self) -> None:
        """Decode loaded state that has formats of other optimizers. The next step does
        the rest, but until then ``state_dict`` must be what torch can load."""
        for param, _, rule, chosen in self._with_formats():
            if state := self.state.get(param):
                keys = {name: self._names.key(name) for name in rule.state}
                fit(state, keys, param, chosen)

    def load_master_params(self, masters: Sequence[Tensor]) -> None:
        """Set each parameter, its remainder and its copy to a tensor of float32 in its
        shape, such as those of :meth:`master_params`."""
        masters, copies = check_masters(masters, self._params), self.copy_to or {}
        self.check_whole()
        with self._turns.lock, torch.no_grad():
            masters = apart(masters, [*self._params, *copies.values()])
            params, calls = list(self._with_formats()), list[Call]()
            for (param, group, rule, chosen), values in zip(
                params, masters, strict=True
            ):
                entry, format = self.state.get(param, {}), chosen.get(PARAM)
                if not entry and format is not None and format.second is not None:
                    options = self._values(group, rule)
                    entry = first_counts(rule, self._names, options)
                    calls.append(partial(self.state.__setitem__, param, entry))
                calls += setting(param, values, format, entry)
                if param in copies:
                    calls.append(partial(copies[param].copy_, param))
            uninterrupted(*calls)

    def _with_formats(self) -> Iterator[tuple[Tensor, dict[str, Any], Rule, Chosen]]:
        """Yield each parameter with its group, its rule and its formats."""
        wanted, known = self._wanted, frozenset(FORMATS)
        rules = self._rules or [self._default_rule] * len(self.param_groups)
        for group, rule in zip(self.param_groups, rules, strict=True):
            formats, names = wanted.of_rule(rule), names_of([group])
            for param in group["params"]:
                chosen = wanted.of(formats, names[param], param, known)
                yield param, group, rule, chosen

    def __getstate__(self) -> dict[str, Any]:
        self.check_whole()
        return {**super().__getstate__(), **{key: getattr(self, key) for key in KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._renew()

    def _all(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def ema_params(self) -> list[Tensor]:
        """Return each parameter's moving average; before its first step, itself."""
        if self.ema is None:
            call = f"{type(self).__name__}(..., ema=0.999)"
            raise RuntimeError(f"ema_params() needs an optimizer made with ema: {call}")
        self.check_whole()
        return [self.state.get(p, {}).get(EMA, p.detach()) for p, _ in self._all()]

    @standard
    def eval_params(self) -> list[Tensor]:
        """Return the parameters to use, such as for a validation, in their order. For
        rules like ``ScheduleFreeAdamW`` they are not those that are trained."""
        tensors = []
        self.check_whole()
        with self._turns.lock:
            for param, group in self._all():
                state = self.state.get(param)
                evaluates = any(rule.evaluate for rule in self._rules)
                rule = self._rule(group) if evaluates else self._default_rule
                trained = has_begun(state, rule, self._names)
                if evaluates and trained and TRAINED not in state:
                    values = self._values(group, rule)
                    of = param, state, rule, self._names, values
                    tensors.append(dtensors.on_shard(evaluated, *of))
                else:
                    tensors.append(param.detach())
        return tensors
