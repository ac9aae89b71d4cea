"""A step as torch knows it: closures, hooks, GradScaler, states to save and load."""

from __future__ import annotations

import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torchs

from fastopt.optimizer import checks, refusals
from fastopt.rule import Rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import uninterrupted
from fastopt.runtime.threads import available, forked
from fastopt.torch import loading, sharding
from fastopt.torch.arguments import (
    EXTRAS,
    Arguments,
    number,
    readers,
    refuse_schedules,
)
from fastopt.torch.arguments import PAIRS as PAIRS
from fastopt.torch.flat import in_flat_buffer
from fastopt.torch.memory import HALVES
from fastopt.torch.plan import Asked, Plan, Read, Unsupported, zeroing
from fastopt.torch.state import EMA, TRAINED, Names, evaluated
from fastopt.torch.turns import Overtaken, Turns

AS_MADE: Any = object()  # an argument of step: as the optimizer was made
NOTHING_ASKED = None, None, "propagate", None, False
KEPT = (*EXTRAS, "skipped", "grad_norm", "_step_supports_amp_scaling", "_torchs")


class Stepping(Optimizer):
    """A ``torch.optim.Optimizer`` whose steps are fastopt's.

    Parameters
    ----------
    *arguments
        Those of the optimizer.
    clip_norm, clip_value, nonfinite
        As of :meth:`step`, for all steps.
    ema
        Decay of a moving average of the parameters, updated in the same pass; it is in
        the state under "ema", and in ``ema_params()``.
    threads
        At most so many; by default as many as torch uses, within the container's quota.
    backend
        Of CPU tensors: "cython", "numba" or "numpy"; by default the fastest.

    Attributes
    ----------
    grad_norm
        The norm of all gradients in the last step that needed it.
    skipped
        How often ``nonfinite="skip"`` has left a step out.
    """

    _names = Names()
    _own: Rule | None = None  # the rule of a class that torch has not
    _step_supports_amp_scaling = False  # but of instances with fused=True, as torch's
    _warned = False  # that this process has a share of the parameters
    _torchs = False  # whether state is in torch's form, since the last step was torch's

    def __init__(
        self,
        params: Any,
        *arguments: Any,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: str = "propagate",
        ema: float | None = None,
        threads: int | None = None,
        backend: str | None = None,
        **options: Any,
    ):
        checks.check_limit("clip_norm", clip_norm)
        checks.check_limit("clip_value", clip_value)
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.nonfinite = checks.check_nonfinite(nonfinite)
        self.ema = checks.check_decay("ema", ema)
        self.threads = None if threads is None else checks.check_threads(threads)
        if backend not in (None, "cython", "numba", "numpy"):
            raise ValueError(
                f"backend must be 'cython', 'numba' or 'numpy', got {backend!r}"
            )
        self.backend = backend
        self.skipped, self.grad_norm = 0, math.nan
        self._renew()
        names = [*inspect.signature(super().__init__).parameters][1:]
        refuse_schedules({**dict(zip(names, arguments, strict=False)), **options})
        super().__init__(params, *arguments, **options)
        self._warn_of_shares(clip_norm is not None, nonfinite)

    def _warn_of_shares(self, clip_norm: bool, nonfinite: str) -> None:
        """Once, where what is asked needs all parameters, but each process has some."""
        if not self._warned:
            params = [param for param, _ in self._all()]
            self._warned = sharding.warn(
                type(self).__name__, params, self._rules, clip_norm, nonfinite
            )

    @Arguments
    def __signature__(cls) -> inspect.Signature:
        """What ``help`` shows as the arguments: the next class's, and ours."""
        after: Any = cls.__mro__[cls.__mro__.index(Stepping) + 1]
        _, *taken = inspect.signature(after.__init__).parameters.values()
        return inspect.Signature([*taken, *extras()])

    def _renew(self) -> None:
        """Forget what was worked out."""
        self._plan: Plan | None = None
        self._plans: dict[Tensor, Plan | None] = {}  # of single parameters
        self._places: dict[Tensor, tuple[dict[str, Any], int]] = {}
        self._noted: set[Any] = set()  # what steps have needed of all parameters
        if "_turns" not in vars(self):
            self._turns = Turns()
            self._most_threads = available()

    # What differs between optimizers --------------------------------------------------

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule for a group, with the options it has now; Unsupported if there is
        none."""
        raise NotImplementedError

    @property
    def _rules(self) -> list[Rule]:
        """Those of the groups; none of them, if torch's own step is used."""
        try:
            return [self._rule(group) for group in self.param_groups]
        except Unsupported:
            return []

    def _values(self, group: Mapping[str, Any], rule: Rule) -> list[Any]:
        """The group's hyperparameters, in the order in which the rule takes them."""
        return [number(read(group)) for read in readers(rule)]

    def _inward(self, state: dict[str, Any]) -> None:
        """Make of a parameter's state in a state_dict what is kept in ``state``."""

    def _outward(self, state: dict[str, Any]) -> dict[str, Any]:
        """The opposite, as a copy."""
        return state

    def _entries(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, s) for p, s in self.state.items() if isinstance(s, dict)]

    def _to_torchs_form(self) -> None:
        buffers = {self._names.key(name) for rule in self._rules for name in rule.state}
        calls = []
        for param, state in self._entries():
            made = dict(self._outward(state))
            for key in buffers & made.keys():
                if param.dtype in HALVES:  # float32 here, but not there
                    made[key] = made[key].to(param.dtype)
            calls.append(partial(state.update, made))
        uninterrupted(*calls, partial(self.__dict__.update, _torchs=True))

    def _to_our_form(self) -> None:
        calls = []
        for _, state in self._entries():
            made = dict(state)
            with torch.no_grad():
                self._inward(made)
            calls.append(partial(state.update, made))
        uninterrupted(*calls, partial(self.__dict__.update, _torchs=False))

    # Steps ----------------------------------------------------------------------------

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip_norm: float | None = AS_MADE,
        clip_value: float | None = AS_MADE,
        nonfinite: str = AS_MADE,
        zero_grads: bool = False,
    ) -> Any:
        """Update the parameters.

        Parameters
        ----------
        closure
            Computes the gradients anew and returns the loss, which is returned.
        clip_norm
            The most that the norm of all gradients together may be; larger ones are
            shrunk to it as by ``clip_grad_norm_``, but stay as they are in ``.grad``.
        clip_value
            The most that the magnitude of each of their elements may be.
        nonfinite
            What to do about an infinity or a NaN in the gradients: "propagate" it,
            "skip" the step or "raise" FloatingPointError.
        zero_grads
            Set the gradients to zero when they have been read.
        """
        loss = None
        if closure is not None:
            self._check_mode()
            with torch.enable_grad():
                loss = closure()
        if clip_norm is AS_MADE:
            clip_norm = self.clip_norm
        if clip_value is AS_MADE:
            clip_value = self.clip_value
        if nonfinite is AS_MADE:
            nonfinite = self.nonfinite
        made = clip_norm, clip_value, nonfinite, self.ema, zero_grads
        own = self.__dict__
        usual = made == NOTHING_ASKED
        turns = self._turns
        with turns.lock:
            # Taken away during the step, so that whoever comes in between, be it by an
            # interrupt or in a signal handler, finds no plan that is half up to date.
            plan, self._plan = self._plan, None
            if usual and plan and not ("grad_scale" in own or "found_inf" in own):
                turns.begin()
                of = self.param_groups, self.state, self._threads(), turns
                if plan.again(*of):
                    self._plan = plan
                    return loss
            scale = self._scale()
            if scale is not None:
                asked = None if usual else self._asked(*made)
                plan = self._update(plan, scale, asked)
            elif zero_grads:
                uninterrupted(*zeroing(param.grad for param, _ in self._all()))
            self._plan = plan
        return loss

    def _threads(self) -> int:
        if forked[0]:
            return 1
        most = self._most_threads if self.threads is None else self.threads
        now: int = torch.get_num_threads()
        return min(most, now)

    def step_param(self, param: Tensor) -> None:
        """Update one parameter, with its gradient, and leave all others alone."""
        self.check_single_steps()
        self._group_of(param)
        made = self.clip_norm, self.clip_value, self.nonfinite, self.ema, False
        with self._turns.lock:
            asked = None if made == NOTHING_ASKED else self._asked(*made)
            plan = self._update(self._plans.pop(param, None), 1.0, asked, param)
            if plan is not None:
                self._plans[param] = plan

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

    def check_single_steps(self) -> None:
        """That a parameter can be updated without the gradients of the others."""
        if self.clip_norm is not None or self.nonfinite == "skip":
            raise ValueError(
                "clip_norm and nonfinite='skip' need the gradients of all parameters, "
                "of which each is updated alone here"
            )
        for rule in self._rules:
            if rule.measure is not None and rule.over == "all":
                raise TypeError(
                    f"{type(self).__name__} measures all parameters together, which "
                    f"cannot be updated one by one"
                )

    @standard
    def estimate(self) -> None:
        """Put an estimate into the state, for a rule that works with one, as
        ``SophiaG``: from the gradients that the parameters have now, of what the rule's
        page says. Nothing else changes."""
        if not any(rule.estimate for rule in self._rules):
            raise TypeError(f"{type(self).__name__} does not use estimates")
        with self._turns.lock:
            while not self._estimate():
                pass

    def _estimate(self) -> bool:
        """Whether it is done, or another change came first."""
        self._turns.begin()
        groups = list(self.param_groups)
        of = self._names, groups, self.state, self._read(groups)
        plan = Plan(*of, self.ema is not None, self.backend)
        calls = plan.entries(self.state)
        calls += chain(*[p.estimate(plan.values, self._threads()) for p in plan.parts])
        try:
            self._turns.commit(calls)
        except Overtaken:
            return False
        return True

    def _asked(
        self,
        clip_norm: float | None,
        clip_value: float | None,
        nonfinite: str,
        ema: float | None,
        zero_grads: bool,
    ) -> Asked:
        return Asked(
            checks.check_limit("clip_norm", clip_norm),
            checks.check_limit("clip_value", clip_value),
            checks.check_nonfinite(nonfinite),
            zero_grads,
            0.0 if ema is None else 1 - ema,
        )

    @standard
    def _scale(self) -> float | None:
        """The factor by which GradScaler wants the gradients unscaled; None if it wants
        no step."""
        own = self.__dict__
        found, scale = own.get("found_inf"), own.get("grad_scale")
        if found is not None and float(found):
            return None
        return 1.0 if scale is None else 1 / float(scale)

    def _check_mode(self) -> None:
        """That this is the time for steps."""

    def _read(self, groups: list[dict[str, Any]]) -> Read:
        self._check_mode()
        for group in groups:
            for option in ("differentiable", "capturable"):
                if group.get(option):
                    raise Unsupported(f"{option}=True")
        rules = [self._rule(group) for group in groups]
        values = [self._values(*of) for of in zip(groups, rules, strict=True)]
        signs = [-1.0 if group.get("maximize") else 1.0 for group in groups]
        return rules, values, signs

    def _update(
        self,
        plan: Plan | None,
        scale: float,
        asked: Asked | None,
        single: Tensor | None = None,
    ) -> Plan | None:
        """A step of all parameters, or of a ``single`` one: by a plan, or by a new one
        if that is out of date. The plan that now is."""
        while True:
            self._turns.begin()
            groups = list(self.param_groups)  # a handler may add one
            state: dict[Any, Any] = self.state
            if single is not None:
                groups = [self._group_of(single)]
                state = {single: state[single]} if single in state else {}
            try:
                return self._attempt(plan, groups, state, scale, asked, single)
            except Unsupported as reason:
                self._unsupported(str(reason), scale, asked, single)
                return None
            except Overtaken:  # in a signal handler, say
                plan = None

    def _attempt(
        self,
        plan: Plan | None,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        scale: float,
        asked: Asked | None,
        single: Tensor | None,
    ) -> Plan | None:
        clips = asked is not None and asked.clip_norm < math.inf
        needs = clips, "propagate" if asked is None else asked.nonfinite
        if needs not in self._noted:
            self._noted.add(needs)
            self._warn_of_shares(*needs)
        averaged = self.ema is not None
        grads = None if plan is None else plan.look(groups, state, averaged)
        if plan is None or grads is None or not plan.options_hold:
            read = self._read(groups)
            if plan is None or grads is None or not plan.reread(groups, read):
                params = [p for p, _ in self._all()] if single is None else [single]
                if all(param.grad is None for param in params):
                    return None
                of = self._names, groups, state, read, averaged, self.backend, single
                plan = Plan(*of)  # Unsupported, if so
                if self._torchs:
                    self._to_our_form()
                    plan = Plan(*of)
                grads = plan.look(groups, state, averaged) or []
        parts = plan.take(grads)
        if not parts:
            return plan
        if not plan.do(parts, scale, self._threads(), asked, self.__dict__):
            return None if plan.unused else plan
        if single is not None:
            state = {single: self.state[single]} if single in self.state else {}
        plan.end(parts, state)
        return plan

    def _unsupported(
        self, reason: str, scale: float, asked: Asked | None, single: Tensor | None
    ) -> None:
        """Let torch's own step do what fastopt has no kernels for."""
        name, theirs = type(self).__name__, super().step.__func__
        if theirs is Optimizer.step:
            raise RuntimeError(f"{name} does not support {reason}")
        if asked is not None:
            raise RuntimeError(
                f"{reason} are left to torch's own {name}, which has no clip_norm, "
                f"clip_value, nonfinite, ema and zero_grads"
            )
        if scale != 1:
            with torch.no_grad():
                for param, _ in self._all():
                    if param.grad is not None:
                        param.grad.mul_(scale)
        if not self._torchs:
            self._to_torchs_form()
        ours = "grad_scale", "found_inf"
        own = self.__dict__
        kept = {key: own.pop(key) for key in ours if key in own}
        kept["param_groups"] = own["param_groups"]
        try:
            if single is not None:
                self.param_groups = [{**self._group_of(single), "params": [single]}]
            if getattr(theirs, "hooked", False):  # ours has called the hooks
                theirs = theirs.__wrapped__
            theirs(self)
        finally:
            own.update(kept)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Hooks and the profiler's label around a step, as torch has them; but the
        label only if there is a profiler, for it takes as long as a small step."""
        before = torchs._global_optimizer_pre_hooks
        after = torchs._global_optimizer_post_hooks

        @functools.wraps(func)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.autograd._profiler_enabled():
                label = f"Optimizer.step#{type(self).__name__}.step"
                with torch.autograd.profiler.record_function(label):
                    return hooked(self, *args, **kwargs)
            own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            if own or before or after:
                return hooked(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            self = args[0]
            own = self._optimizer_step_pre_hooks
            for hook in chain(before.values(), own.values()):
                changed = hook(self, args, kwargs)
                if changed is None:
                    continue
                if not isinstance(changed, tuple) or len(changed) != 2:
                    raise RuntimeError(
                        f"{func} must return None or a tuple of (new_args, "
                        f"new_kwargs), but got {changed}."
                    )
                args, kwargs = changed
            out = func(*args, **kwargs)
            self._optimizer_step_code()
            own = self._optimizer_step_post_hooks
            for hook in chain(own.values(), after.values()):
                hook(self, args, kwargs)
            return out

        return step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients: to None, or to zeros. Those of a model that ``flatten_``
        has flattened are always set to zeros, because they are to stay in their
        buffer."""
        flat: dict[int, list[Tensor]] = {}
        if set_to_none:
            for param, _ in self._all():
                if param.grad is not None and in_flat_buffer(param.grad):
                    flat.setdefault(id(param.grad._base), []).append(param)
        kept = []
        for params in flat.values():
            grads = [param.grad for param in params]
            kept += list(zip(params, grads, strict=True))
            base = grads[0]._base
            whole = sum(grad.numel() for grad in grads) == base.numel()
            for grad in [base] if whole else grads:
                grad.zero_()
        super().zero_grad(set_to_none)
        for param, grad in kept:
            param.grad = grad

    # State ----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            refuse_schedules({k: v for k, v in param_group.items() if k != "params"})
        with self._turns.lock:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        with self._turns.lock:
            saved: dict[str, Any] = super().state_dict()
            for key, state in saved["state"].items():
                if isinstance(state, dict) and not self._torchs:
                    saved["state"][key] = self._outward(state)
            return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but what is float32 for bfloat16 and float16 parameters stays
        so, a state of another optimizer is refused, and all changes at once."""
        state_dict = state_dict.copy()
        for before in list(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = self.__dict__
        with self._turns.lock:
            loading.check(state_dict, self, self._own)
            loaded = self._loaded(state_dict)
            new = {k: v for k, v in loaded.items() if own.get(k, AS_MADE) is not v}
            uninterrupted(self._turns.overtake, partial(own.update, new))
        for after in list(self._optimizer_load_state_dict_post_hooks.values()):
            after(self)

    def _loaded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The attributes of this optimizer with what was saved in them: of a copy,
        which torch loads it into."""
        hooks = [f"_optimizer_load_state_dict_{when}_hooks" for when in ("pre", "post")]
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **{name: OrderedDict() for name in hooks})
        super(Stepping, other).load_state_dict(state_dict)
        ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        for i, (param, _) in zip(ids, other._all(), strict=True):
            loaded = other.state.get(param)
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    counts = not value.dim() and not self._names.torchs
                    if param.dtype in HALVES or counts:
                        loaded[key] = value.to(param.device)
            if loaded:
                other._inward(loaded)
        other._torchs = False
        return {k: v for k, v in vars(other).items() if k not in hooks}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._renew()

    # Parameters to use ----------------------------------------------------------------

    def _all(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def ema_params(self) -> list[Tensor]:
        """Each parameter's moving average; before its first step, the parameter."""
        if self.ema is None:
            made = f"{type(self).__name__}(..., ema=0.999)"
            raise RuntimeError(f"ema_params() needs an optimizer made with ema: {made}")
        return [self.state.get(p, {}).get(EMA, p.detach()) for p, _ in self._all()]

    def eval_params(self) -> list[Tensor]:
        """The parameters to use, such as for a validation, in their order: for rules
        like ``ScheduleFreeAdamW`` other ones than those that are trained."""
        with self._turns.lock:
            return self._evaluated()

    @standard
    def _evaluated(self) -> list[Tensor]:
        found = []
        for param, group in self._all():
            state = self.state.get(param)
            trained = state and TRAINED not in state
            if trained and any(rule.evaluate for rule in self._rules):
                rule = self._rule(group)
                values = self._values(group, rule)
                found.append(evaluated(param, state, rule, self._names, values))
            else:
                found.append(param.detach())
        return found


def extras() -> list[inspect.Parameter]:
    """What all optimizers take beside."""
    taken = inspect.signature(Stepping.__init__).parameters
    return [taken[name] for name in EXTRAS]
