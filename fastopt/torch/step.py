"""A step as torch knows it: closures, GradScaler, steps of single parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastopt.optimizer import checks
from fastopt.optimizer.formats import first_element
from fastopt.rule import Rule, shown
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import uninterrupted
from fastopt.runtime.collector import paused
from fastopt.step import (
    OPTIONS,
    PLAIN,
    HalfDone,
    Nonfinite,
    Options,
    Request,
    examine,
)
from fastopt.torch import dtensors, memory, sharding
from fastopt.torch.arguments import (
    EXTRAS,
    Arguments,
    refuse_names,
    refuse_params,
    refuse_schedules,
    spared,
)
from fastopt.torch.changes import noting, zeroing
from fastopt.torch.counts import Scaler, Uncountable, are_counted
from fastopt.torch.hooks import hooked_step
from fastopt.torch.memory import Unsupported
from fastopt.torch.orders import Order, Read
from fastopt.torch.part import Part, estimate
from fastopt.torch.plan import Plan
from fastopt.torch.ranks import check_group, ranks_of
from fastopt.torch.stateful import Stateful
from fastopt.torch.storage import Storage
from fastopt.torch.turns import Call, Overtaken
from fastopt.torch.values import check_arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

AS_MADE = "clip_norm", "clip_value", "nonfinite"  # options of step, and of the class


class Stepping(Stateful):
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
    weight_decay_mask
        Where weight decay applies: a callable of a parameter's name (empty if torch has
        none) and the parameter, such as ``lambda name, param: param.ndim > 1``.
    state_dtype
        ``torch.bfloat16`` means ``formats="bf16"``. By default, and for float64
        parameters, state has the dtype that is computed in.
    formats
        The format of the state of parameters of 4,096 elements and more: a name such as
        "bf16" or "8bit", a dict with the format of each buffer, such as
        ``{"exp_avg": "m8"}``, or a callable of a parameter's name (empty if torch has
        none: pass ``named_parameters()``) and the parameter that returns one of these.
        See docs/formats.md. SGD does not count its steps, so "bf16" rounds to nearest
        there.
    master
        How bfloat16 parameters are kept: with "bf16+r8" or "bf16+r16", the state has a
        remainder of 8 or 16 bits for each, so that updates are as precise as those of
        24-bit numbers or of float32. "bf16" rounds them stochastically. By default,
        they are rounded to nearest.
    seed
        Chooses the random numbers of stochastic rounding. They also depend on the
        index of the element and on the number of the step, so a resumed run with the
        same seed draws the same numbers.
    copy_to
        A tensor of bfloat16 or float16 or None for each parameter, as a list. Steps
        write float32 parameters there, rounded to nearest, in the same pass.
    shard_group
        True, or a group of torch.distributed, if each process has some of the
        parameters, as inside ``ZeroRedundancyOptimizer``: ``clip_norm``, ``nonfinite``
        and rules with norms over all parameters then include those of all processes
        (of that group). It is refused for DTensors, which know their processes. See
        docs/distributed.md.
    threads
        How many to use; by default as many as torch uses, within the container's quota
        and this process's share of the machine (docs/threads.md).
    backend
        For CPU tensors: "cython", "numba" or "numpy"; by default the fastest. Tensors
        on a GPU are stepped there, by the backend "cuda" of the core.

    Attributes
    ----------
    grad_norm
        The norm of all gradients in the last step that needed it. On a GPU, to ask for
        it is to wait for that step.
    skipped
        How many steps ``nonfinite="skip"`` has left out. On a GPU, to ask for it is to
        wait for the steps that are under way.
    """

    _step_supports_amp_scaling = False  # True in instances with fused=True, as in torch
    _tellers: tuple[Any, ...] = ()  # runners that count the steps that are skipped
    _warned = False  # that this process has a share of the parameters
    # What the last request without options was made from, and this request.
    _request_before: tuple[tuple[Any, ...], Request] = (object(),) * 5, PLAIN

    def __init__(
        self,
        params: Any,
        *arguments: Any,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        nonfinite: Nonfinite = "propagate",
        ema: float | None = None,
        weight_decay_mask: Callable[[str, Tensor], bool] | None = None,
        state_dtype: torch.dtype | None = None,
        formats: Any = None,
        master: str | None = None,
        copy_to: Any = None,
        seed: int = 0,
        shard_group: Any = None,
        threads: int | None = None,
        backend: str | None = None,
        **options: Any,
    ):
        kind: Any = type(self)
        taken = defaults_of(kind)
        refuse_names(kind.__name__, options, taken)
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.nonfinite = nonfinite
        for name in AS_MADE:
            checks.check_option(name, getattr(self, name))
        self.ema = checks.check_decay("ema", ema)
        if weight_decay_mask is not None and not callable(weight_decay_mask):
            raise TypeError(
                f"weight_decay_mask must be a callable of the name and the parameter, "
                f"got {weight_decay_mask!r}"
            )
        self.weight_decay_mask = weight_decay_mask
        self._set_formats(state_dtype, formats, master)
        self.copy_to, self.seed = copy_to, seed
        self.shard_group = check_group(shard_group)
        first_element(seed)  # which checks it
        self.threads = None if threads is None else checks.check_threads(threads)
        if backend not in (None, "cython", "numba", "numpy"):
            raise ValueError(
                f"backend must be 'cython', 'numba' or 'numpy', got {backend!r}; "
                f"tensors on a GPU are stepped there without it"
            )
        self.backend = backend
        self.skipped, self.grad_norm = 0, math.nan
        self._renew()
        named = {**dict(zip(taken, arguments, strict=False)), **options}
        refuse_schedules(named)
        try:
            super().__init__(params, *arguments, **options)
        except (TypeError, IndexError):  # as of a comparison, which names no argument
            check_arguments(taken, named)
            refuse_params(params)
            raise
        rules = self._rules
        spared(self.weight_decay_mask, self.param_groups, rules)  # its errors come now
        self._check_formats(rules)
        self._check_copies()
        self._warn_of_shares(clip_norm is not None, nonfinite)

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients in the last step that needed it; on a GPU, this
        waits for that step."""
        norm = self.__dict__.get("grad_norm", math.nan)
        return float(norm() if callable(norm) else norm)

    @grad_norm.setter
    def grad_norm(self, norm: float) -> None:
        self.__dict__["grad_norm"] = norm

    @property
    def skipped(self) -> int:
        """How many steps ``nonfinite="skip"`` has left out; on a GPU, this waits for
        the steps that are under way."""
        own = self.__dict__
        own["skipped"] += sum([teller.skips() for teller in self._tellers])
        return int(own["skipped"])

    @skipped.setter
    def skipped(self, count: int) -> None:
        for teller in self._tellers:
            teller.skips()  # which are not to count again
        self.__dict__.update(skipped=count)

    def _warn_of_shares(self, clip_norm: bool, nonfinite: str) -> None:
        """Warn once if a step needs all parameters, of which each process has some."""
        if not self._warned:
            of = type(self).__name__, self._params, self._rules
            self._warned = sharding.warn(*of, clip_norm, nonfinite, self.shard_group)

    @Arguments
    def __signature__(cls) -> inspect.Signature:
        """Return the arguments that ``help`` shows: the next class's, and ours."""
        after: Any = cls.__mro__[cls.__mro__.index(Storage) + 1]
        _, *taken = inspect.signature(after.__init__).parameters.values()
        return inspect.Signature([*taken, *extras()])

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        **options: Unpack[Options],
    ) -> Any:
        """Update the parameters.

        Parameters
        ----------
        closure
            Computes the gradients anew and returns the loss, which is returned.
        grads
            Gradients in place of those in ``.grad``: a tensor or None for each
            parameter, in order. With ``weights``, a list of such lists, one for each
            task. They are only read, unless ``zero_grads`` is set.
        weights
            A number for each task. The step is that of the weighted sum of their
            gradients, which is never written to memory.
        clip_norm : float, optional
            The most that the norm of all gradients together may be; larger ones are
            shrunk to it as by ``clip_grad_norm_``, but stay as they are in ``.grad``.
        clip_value : float, optional
            The most that the magnitude of each of their elements may be.
        nonfinite : str
            What to do about an infinity or a NaN in the gradients: "propagate" it,
            "skip" the step or "raise" FloatingPointError. By default this and the
            limits are as the optimizer was made.
        zero_grads : bool, default False
            Set the gradients that the step has used to zero: ``grads``, if given.
        """
        loss = None
        for name, value in options.items():  # before the closure computes anything
            checks.check_option(name, value)
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"closure must be a function that returns the loss, got "
                    f"{shown(closure)}; gradients are passed by name: "
                    f"step(grads=...)"
                )
            self._check_mode()
            with torch.enable_grad():
                loss = closure()
        own, turns, gradients = self.__dict__, self._turns, None
        with turns.lock:
            if grads is not None or weights is not None or self._sums is not None:
                zeroed = bool(options.get("zero_grads"))
                gradients = self._gradients(grads, weights, zeroed)
            # Taken away during the step, so that whoever comes in between, be it by an
            # interrupt or in a signal handler, finds no plan that is half up to date.
            plan, self._plan = self._plan, None
            request = self._request(options)
            scaler, usual = None, request.nonfinite == "propagate"
            if "grad_scale" in own or "found_inf" in own:
                scaler = Scaler(own.get("found_inf"), own.get("grad_scale"))
                usual = False
            usual = not request.zero_grads and (usual or bool(plan and plan.counted))
            if usual and plan and gradients is None:
                turns.begin()
                try:
                    done = plan.again(
                        self.param_groups, self.state, request, own, scaler
                    )
                except HalfDone as error:
                    self._half_done = error
                    raise
                if done:
                    self._plan = plan
                    return loss
            order: Order | None = Order(
                request, 1.0, None, gradients, grads is None, scaler
            )
            if order and scaler is not None and not scaler.on_gpu:
                order = self._heeded(order)
            if order is not None and gradients is None:
                plan = self._update(plan, order)
            elif order is not None:
                other, self._other_plan = self._other_plan, None
                self._other_plan = self._update(other, order)
            self._plan = plan
        return loss

    def step_param(self, param: Tensor) -> None:
        """Update one parameter, with its gradient, and leave all others alone."""
        self.check_single_steps()
        self._group_of(param)
        with self._turns.lock:
            order = Order(self._request({}), single=param)
            plan = self._update(self._plans.pop(param, None), order)
            if plan is not None:
                self._plans[param] = plan

    def check_single_steps(self) -> None:
        """Check that a parameter can be updated without the gradients of the others."""
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

        def calls() -> list[Call]:
            groups = list(self.param_groups)
            plan = Plan(self, groups, self.state, self._read(groups))
            threads, entries = self._threads(), plan.entries(self.state)
            return [
                *entries,
                *chain(*[estimate(p, plan.values, threads) for p in plan.parts]),
            ]

        self._change(calls)

    def _request(self, options: Options) -> Request:
        """Return the request of a step. Most steps ask for what the optimizer was made
        with; their request is kept, because to look it up in ``Requests`` would take a
        tenth of a small step."""
        norm, value, nonfinite = self.clip_norm, self.clip_value, self.nonfinite
        made = norm, value, nonfinite, self.ema, self._threads()
        before, request = self._request_before
        if not options and all(map(is_, made, before)):
            return request
        named = {"clip_norm": norm, "clip_value": value, "nonfinite": nonfinite}
        request = self._requests.of({**named, **options}, *made[3:])
        if not options and all(type(option) in checks.FIXED for option in made):
            self._request_before = made, request
        return request

    def _heeded(self, order: Order) -> Order | None:
        """Return an order with the factor that GradScaler asks for. If it has found an
        infinity or a NaN, return None: the step is then left out. This waits for a
        GPU."""
        if order.scaler is None:
            return order
        scale = order.scaler.factor()
        if scale is not None:
            return order._replace(scale=scale, scaler=None)
        calls = []
        if self._sums is not None and order.summed:
            calls = self._sums.emptying()
        if order.request.zero_grads:
            own_grads = [[param.grad for param, _ in self._all()]]
            given = order.gradients
            calls += zeroing(chain(*(own_grads if given is None else given.tasks)))
        uninterrupted(*calls)
        return None

    def _check_mode(self) -> None:
        """Refuse a step in eval mode, if the class has one."""

    def _read(self, groups: list[dict[str, Any]]) -> Read:
        self._check_mode()
        for group in groups:
            if group.get("differentiable"):
                raise Unsupported("differentiable=True")
            if group.get("capturable") and not self._kernels_count:
                raise Unsupported("capturable=True")
            if group.get("capturable") and not all(
                memory.on_gpu(dtensors.local(param)) for param in group["params"]
            ):
                raise Unsupported("capturable=True")
        rules = [self._rule(group) for group in groups]
        values = [self._values(*of) for of in zip(groups, rules, strict=True)]
        signs = [-1.0 if group.get("maximize") else 1.0 for group in groups]
        if self.weight_decay_mask is not None:  # those of spared parameters
            pairs = list(zip(rules, values, strict=True))
            values += [without_decay(*pair) for pair in pairs]
            rules, signs = rules * 2, signs * 2
        return rules, values, signs

    def _update(self, plan: Plan | None, order: Order) -> Plan | None:
        """Do a step with this plan or, if it is out of date, with a new one. Return the
        plan to keep."""
        while True:
            self._turns.begin()
            groups = list(self.param_groups)  # a handler may add one
            if order.single is not None:
                groups = [self._group_of(order.single)]
            try:
                self.check_whole()
                return self._attempt(plan, groups, order)
            except HalfDone as error:
                self._half_done = error
                raise
            except Unsupported as reason:
                heeded = self._heeded(order)
                if heeded is not None:
                    self._unsupported(str(reason), heeded)
                return None
            except Uncountable:
                self._kernels_count, plan = False, None
            except Overtaken:  # in a signal handler, say
                plan = None
                if order.gradients and order.summed and not self._gradients(None, None):
                    return None  # which has taken the sums

    def _attempt(
        self, plan: Plan | None, groups: list[dict[str, Any]], order: Order
    ) -> Plan | None:
        request, gradients = order.request, order.gradients
        needs = request.clip_norm < math.inf, request.nonfinite
        if needs not in self._noted:
            self._noted.add(needs)
            self._warn_of_shares(*needs)
        state, averaged = order.entries(self.state), self.ema is not None
        capturable = any(group.get("capturable") for group in groups)
        asked = capturable or order.scaler is not None or request.nonfinite == "skip"
        asked = self._kernels_count and (asked or bool(plan and plan.counted))
        if plan is not None and plan.counted != (asked and plan.can_count(request)):
            plan = None
        grads = None if plan is None else plan.look(groups, state, averaged)
        if plan is None or grads is None or not plan.options_hold:
            read = self._read(groups)
            if plan is None or grads is None or not plan.reread(groups, read):
                plan = self._new_plan(groups, state, read, order, asked)
                if plan is None:
                    self._join(groups, order)
                    return None
                grads = plan.look(groups, state, averaged) or []
        if gradients is None:
            parts: list[Part] | None = plan.take(grads)
        else:
            parts = plan.take_gradients(gradients)
        if parts is None:  # a gradient where there was none before
            plan = self._new_plan(groups, state, self._read(groups), order, asked)
            parts = plan.take_gradients(gradients) if plan and gradients else None
        if plan is None or not parts:
            self._join(groups, order)
            return plan
        if capturable and not plan.counted:
            raise Unsupported("capturable=True")
        if not plan.counted:
            heeded = self._heeded(order)
            if heeded is None:
                plan.forget()
                return None if plan.unused else plan
            order = heeded
        last = self._sums.emptying() if self._sums is not None and gradients else []
        if plan.do(parts, order, self.__dict__, last):
            plan.end(parts, order.entries(self.state))
            return plan
        plan.forget()
        return None if plan.unused else plan

    def _join(self, groups: list[dict[str, Any]], order: Order) -> None:
        """Take part in what other processes add up, if there is no gradient here."""
        request = order.request
        rules, _, _ = self._read(groups)
        params = [param for group in groups for param in group["params"]]
        if self.shard_group is None and not dtensors.are_there(params):
            return
        if self._heeded(order) is None:
            return
        of_each = [
            rule
            for rule, group in zip(rules, groups, strict=False)
            for _ in group["params"]
        ]
        ranks = ranks_of(self.shard_group, params, of_each, rules)
        if ranks is None:
            return
        if request.needs_norm:
            norm, finite, *_ = examine(
                [], 1.0, request, lambda p, i: True, partial(ranks.norm_of, [])
            )
            uninterrupted(*noting(self.__dict__, norm, finite, request))
            if not finite and request.nonfinite == "skip":
                return
        ranks.measure({})

    def _new_plan(
        self,
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        read: Read,
        order: Order,
        counting: bool,
    ) -> Plan | None:
        """Return a new plan; None if there is no gradient. Raise Unsupported if there
        are no kernels for one. With ``counting``, or if the counts of steps are on a
        GPU already, it counts them."""
        single, gradients = order.single, order.gradients
        params = [p for p, _ in self._all()] if single is None else [single]
        grads = [p.grad for p in params] if gradients is None else gradients.first
        # A rule over everything steps where another process has a gradient.
        rules, shared = read[0], self.shard_group is not None and len(params) > 0
        joint = shared and any(of.measure and of.over == "all" for of in rules)
        if all(grad is None for grad in grads) and not joint:
            return None
        memory.refuse_capture(map(dtensors.local, params))
        counting |= self._kernels_count and are_counted(self._entries(), self._names)
        more = single, gradients, order.request if counting else None
        with paused():
            plan = Plan(self, groups, state, read, *more)
            if self._torchs:
                self._to_our_form()
                plan = Plan(self, groups, state, read, *more)
        return plan

    def _unsupported(self, reason: str, order: Order) -> None:
        """Let torch's own step do what fastopt has no kernels for."""
        name, theirs = type(self).__name__, super().step.__func__
        if theirs is Optimizer.step:
            raise RuntimeError(f"{name} does not support {reason}")
        asked = order.request._replace(threads=PLAIN.threads) != PLAIN
        asked |= self.weight_decay_mask is not None or self.copy_to is not None
        if asked or order.gradients is not None:
            raise RuntimeError(
                f"{reason} are left to torch's own {name}, which has no "
                f"{', '.join(OPTIONS)}, ema, grads, weights, weight_decay_mask and "
                f"copy_to"
            )
        if order.scale != 1:
            with torch.no_grad():
                for param, _ in self._all():
                    if param.grad is not None:
                        param.grad.mul_(order.scale)
        if not self._torchs:
            self._to_torchs_form()
        ours = "grad_scale", "found_inf"
        own = self.__dict__
        kept = {key: own.pop(key) for key in ours if key in own}
        kept["param_groups"] = own["param_groups"]
        try:
            if order.single is not None:
                group = self._group_of(order.single)
                self.param_groups = [{**group, "params": [order.single]}]
            if getattr(theirs, "hooked", False):  # ours has called the hooks
                theirs = theirs.__wrapped__
            theirs(self)
        finally:
            own.update(kept)

    profile_hook_step = staticmethod(hooked_step)


def without_decay(rule: Rule, values: Sequence[Any]) -> list[Any]:
    """Return a group's hyperparameters for parameters that are spared weight decay."""
    pairs = zip(rule.hyperparameters, values, strict=True)
    return [0.0 if name == "weight_decay" else value for name, value in pairs]


@cache  # a signature takes ten times as long as torch to make an optimizer
def defaults_of(kind: type[Stepping]) -> dict[str, Any]:
    """Return what the constructor of the next class takes after ``params``, with the
    defaults."""
    init: Any = super(Stepping, kind).__init__
    taken = [*inspect.signature(init).parameters.values()][2:]
    return {of.name: of.default for of in taken}


def extras() -> list[inspect.Parameter]:
    """Return the parameters that all optimizers take in addition."""
    taken = inspect.signature(Stepping.__init__).parameters
    return [taken[name] for name in EXTRAS]
