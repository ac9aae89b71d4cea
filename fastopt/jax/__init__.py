"""Steps inside ``jax.jit``, on the CPU: one custom call, in place where donated.

>>> import jax, jax.numpy as jnp, fastopt.jax
>>> params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, -2.0])}
>>> opt = fastopt.jax.adamw(lr=0.5)
>>> state = opt.init(params)
>>> step = jax.jit(opt.step, donate_argnums=(0, 2))
>>> params, state = step(params, grads, state)
>>> params["w"].tolist()
[-0.5, 0.5]

A function for each rule, by its name; ``optimizer`` takes the rule itself. The bits are
those of ``fastopt.adamw(params).step(grads)``. ``as_optax()`` makes what optax
composes. See docs/jax.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastopt import advice, docstrings, native
from fastopt.backends.numpy_ref import evaluate
from fastopt.jax import calls, shards
from fastopt.jax import schedules as jax_schedules
from fastopt.jax.arrays import (
    as_dtype,
    as_float,
    as_words,
    carried,
    completed,
    fitting,
    named,
    number,
    paths,
    taken,
    widened,
)
from fastopt.memory.formats import DTYPES as STATE_DTYPES
from fastopt.memory.formats import computed
from fastopt.memory.segments import Array
from fastopt.optimizer import checks
from fastopt.optimizer.groups import check_schedule
from fastopt.optimizer.refusals import check_rule
from fastopt.portable import portable
from fastopt.rule import Rule, check_hyperparameter, shown
from fastopt.rules import RULES
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.threads import available
from fastopt.schedules import Schedule

__all__ = ["Optimizer", "State", "exact", "optimizer"]
if TYPE_CHECKING:
    from fastopt.jax import _rules
    from fastopt.jax._rules import *  # noqa: F403

    __all__ += _rules.__all__
else:
    __all__ += [rule.name for rule in RULES]

    def __getattr__(name):
        raise advice.no_attribute(__name__, name, __all__)


calls.register()


class State(NamedTuple):
    """What an optimizer remembers: a pytree.

    Attributes
    ----------
    count
        How many steps are completed, of int32.
    carry
        Numbers that the rule remembers, as words; None if it has none.
    buffers
        The state by its name, in the structure of the parameters.

    Examples
    --------
    >>> import fastopt.jax, jax.numpy as jnp
    >>> state = fastopt.jax.lion().init({"w": jnp.ones(2)})
    >>> int(state.count), state.carry, list(state.buffers)
    (0, None, ['m'])
    """

    count: Any  # completed steps, int32
    # Numbers of the rule's: float64 in words, a row for each set of them. None: it has
    # none, and checkpoints need not store an array without elements.
    carry: Any
    buffers: dict[str, Any]  # by name, each in the structure of the parameters


def exact(value: float) -> Any:
    """A hyperparameter for :meth:`Optimizer.step` that keeps all of its float64, which
    JAX by default rounds to float32 when it is an argument of a compiled function.

    >>> import fastopt.jax
    >>> fastopt.jax.exact(1e-3).shape
    (2,)
    """
    return as_words(float(value))


def optimizer(
    rule: Rule,
    *,
    threads: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    **hyperparameters: Any,
) -> Optimizer:
    """An optimizer for use inside ``jax.jit``.

    Parameters
    ----------
    rule
        One of fastopt's own, such as ``fastopt.adamw``.
    threads
        At most so many CPU threads; by default what Python would use.
    axis_name
        For a rule that takes sums over arrays, inside ``jax.shard_map``: the axes of
        the mesh over which arrays are sharded; the sums of all shards are added up.
        ``()``: each device has whole arrays, which may differ. Other rules ignore it.
    **hyperparameters
        Of the rule. Each may be a schedule, one of fastopt's or another function of the
        number of completed steps, which inside ``jit`` is traced; or itself traced, as
        ``optax.inject_hyperparams`` has them. ``lr=None`` is for
        :meth:`Optimizer.as_optax`.

    Returns
    -------
    Optimizer

    Raises
    ------
    TypeError, ValueError
        For a rule without compiled kernels, and hyperparameters that do not fit.
    RuntimeError
        If the kernels are not installed.

    Examples
    --------
    >>> import fastopt, fastopt.jax, jax.numpy as jnp
    >>> opt = fastopt.jax.sgd(lr=0.5)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> params, state = opt.step(params, {"w": 2 * params["w"]}, opt.init(params))
    >>> params["w"].tolist()
    [0.0, 0.0]
    """
    check_rule("rule", rule)
    if not any(rule is ours for ours in RULES):
        raise TypeError(
            f"{rule.name} has no compiled kernels, which fastopt.jax needs; there are "
            f"some for {', '.join(ours.name for ours in RULES)}"
        )
    rule.check_names(hyperparameters)
    for key, other in rule.follows.items():
        if key not in hyperparameters and isinstance(
            hyperparameters.get(other), jax.Array
        ):
            raise TypeError(
                f"{key} must be the largest {other}, which is not known where {other} "
                f"is an array of JAX's, traced or of one step, as those that "
                f"optax.inject_hyperparams gives; give {key}, too"
            )
    for key, value in hyperparameters.items():
        check_schedule(key, value)
    values, now = {**rule.hyperparameters, **rule.complete(hyperparameters)}, {}
    for key, value in values.items():
        name = key
        if key == "lr" and value is None:
            value = 1.0
        if key in selecting(rule) and (
            callable(value) or isinstance(value, jax.core.Tracer)
        ):
            raise TypeError(
                f"{key} selects what is compiled, so it cannot be a schedule or "
                f"traced; for optax.inject_hyperparams, name it in static_args"
            )
        check_schedule(name, value)
        if callable(value):
            value, name = value(0), f"{key}(0)"
        now[key] = number(key, name, value, rule.hyperparameters[key])
        if values[key] is not None and not callable(values[key]):
            values[key] = now[key]
    unscaled = values.get("lr", 1.0) is None
    if unscaled and ("lr" in rule.follows.values() or not scales(rule, now)):
        raise TypeError(
            f"lr of {rule.name} does more than scale the update, so it cannot be None "
            f"and left to what follows; give a number or a schedule"
        )
    on = {name for name in rule.switches if now[name]}
    if not any(isinstance(value, jax.core.Tracer) for value in now.values()):
        rule.scalars(1, *rule.first_carry(now), *now.values())
    return Optimizer(
        rule,
        rule.variant(on),
        native.called(rule, on),
        values,
        available() if threads is None else checks.check_threads(threads),
        shards.checked_names(axis_name),
    )


def selecting(rule: Rule) -> Set[str]:
    """The hyperparameters that cannot change in what is compiled: options and flags."""
    defaults = rule.hyperparameters.items()
    return rule.switches | {k for k, value in defaults if isinstance(value, bool)}


def scales(rule: Rule, values: Mapping[str, Any]) -> bool:
    """Whether lr does no more than to scale the update: what steps with it, and with
    half of it, tell."""
    plain = {
        key: rule.hyperparameters[key] if isinstance(value, jax.core.Tracer) else value
        for key, value in values.items()
    }
    seen: list[Array] = []
    for lr in (1.0, 0.5):
        start = np.array([0.75, -1.5, 2.0])
        params, moved = start.copy(), []
        python = rule(params, backend="numpy", **{**plain, "lr": lr})
        for k in range(8):  # RAdam begins at its sixth
            python.step(np.cos(np.arange(3.0) + k))
            moved.append((params - start) / lr)
            params[:] = start
        state = [np.asarray(arrays[0]) for arrays in python.state.values()]
        seen.append(np.stack([*moved, *state]))
    whole, half = seen
    return bool(np.allclose(whole, half, rtol=1e-9, atol=1e-12))


EXAMPLE = """\
Examples
--------
>>> import fastopt.jax, jax.numpy as jnp
>>> opt = fastopt.jax.{name}(lr=0.5)
>>> params = {{"w": jnp.array([1.0, -2.0])}}
>>> params, state = opt.step(params, {{"w": 2 * params["w"]}}, opt.init(params))
>>> int(state.count)
1
"""


def of_rule(rule: Rule) -> Callable[..., Optimizer]:
    """Return the function of a rule: :func:`optimizer` with that rule."""

    def function(*unnamed: Any, **options: Any) -> Optimizer:
        if unnamed:
            raise TypeError(
                f"fastopt.jax.{rule.name} takes only options, by name, but got "
                f"{shown(unnamed[0])}; give the parameters to init: opt = "
                f"fastopt.jax.{rule.name}(...); state = opt.init(params)"
            )
        return optimizer(rule, **options)

    options = docstrings.hyperparameters(rule)
    function.__name__ = function.__qualname__ = rule.name
    function.__doc__ = "\n\n".join(
        [
            docstrings.words(rule),
            "An :class:`Optimizer` for use inside ``jax.jit``; see :func:`optimizer`.",
            "\n".join(["Parameters", "----------", *options]),
            EXAMPLE.format(name=rule.name),
        ]
    )
    return function


globals().update({rule.name: of_rule(rule) for rule in RULES})


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A rule under hyperparameters; made by :func:`optimizer`. Its methods are pure.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, fastopt.jax
    >>> opt = fastopt.jax.adamw(lr=0.5, weight_decay=0.0)
    >>> params = jnp.zeros(2)
    >>> params, state = jax.jit(opt.step)(params, jnp.ones(2), opt.init(params))
    >>> params.tolist()
    [-0.5, -0.5]
    """

    rule: Rule
    variant: Rule  # what the options that are on make of it
    name: str  # and what that is called among the native rules
    hyperparameters: Mapping[str, Any]
    threads: int
    axis_name: tuple[str, ...] | None  # where sums of shards are added up

    def init(self, params: Any) -> State:
        """The state before the first step, of parameters in any structure. State is
        float64 where they are, or else float32; what starts as the parameters starts
        as these."""
        leaves, _ = taken("params", params)
        self._check_mixed(leaves)
        now = {
            key: 1.0 if value is None else value(0) if callable(value) else value
            for key, value in self.hyperparameters.items()
        }

        def first(name: str, leaf: Any) -> Any:
            start, dtype = self.variant.starts.get(name, 0.0), computed(leaf.dtype)
            if start == "p":
                return jnp.array(leaf, dtype, copy=True)  # to be donated apart from it
            value = now[start] if isinstance(start, str) else start
            new = jnp.full_like(leaf, as_dtype(value, dtype), dtype)
            return shards.alike(leaf, new)

        carry = [
            as_words(now[start] if isinstance(start, str) else start)
            for start in self.variant.carry.values()
        ]
        shape = self._carry_shape(leaves)
        rows = jnp.broadcast_to(
            jnp.asarray(carry, jnp.uint32).reshape(shape[1:]), shape
        )
        if self.variant.settle is not None and self.axis_name == ():
            rows = shards.varying(rows, shards.axes_of(*leaves))  # as steps leave it
        return State(
            jnp.zeros((), jnp.int32),
            rows if carry else None,
            {
                name: jax.tree.map(functools.partial(first, name), params)
                for name in self.variant.state
            },
        )

    def step(
        self,
        params: Any,
        grads: Any,
        state: State,
        *,
        grad_scale: Any = 1.0,
        **hyperparameters: Any,
    ) -> tuple[Any, State]:
        """The new parameters and state.

        Parameters
        ----------
        params, grads
            Arrays in the same structure and shapes: both float64, or each of them
            float32, bfloat16 or float16.
        state
            From ``init`` or the step before. Its leaves may be NumPy's, and its count
            any integer, as checkpoints bring them.
        grad_scale
            A factor for the gradients, in the same pass; -1 maximizes.
        **hyperparameters
            In place of the optimizer's own, for this step. Numbers or traced scalars:
            another value does not trace or compile again. JAX rounds an argument of a
            compiled function to float32, unless it is ``exact`` or x64 is on.

        Raises
        ------
        TypeError, ValueError
            When it is traced, for what does not fit.
        jax.errors.JaxRuntimeError
            When it runs, for a traced hyperparameter out of its range, and for a traced
            ``grad_scale`` that is not finite if some arrays have 16 bits.

        Notes
        -----
        For a step in place, donate ``params`` and ``state``:
        ``jax.jit(opt.step, donate_argnums=(0, 2))``. It cannot be differentiated; under
        ``vmap`` the steps are done one after the other.
        """
        changes = {**hyperparameters, "grad_scale": grad_scale}
        leaves, tree = taken("params", params)
        self._check_mixed(leaves)
        gradients = fitting("grads", grads, params)
        given = state
        state, buffers = self._fitting(state, params)
        static, traced = self._numbers(changes, state.count)
        axes = self._summed_over(params, grads, state)
        new, carry = calls.Step(self.variant, self.name, self.threads, axes)(
            *(state.count + 1, static, traced, state.carry),
            *(leaves, gradients, buffers),
        )
        rebuilt = [jax.tree.unflatten(tree, array) for array in new]
        named = dict(zip(self.variant.state, rebuilt[1:], strict=True))
        if given.carry is None:
            carry = None
        return rebuilt[0], State(state.count + 1, carry, named)

    def as_optax(self) -> Any:
        """An ``optax.GradientTransformationExtraArgs``, to be composed in
        ``optax.chain``. It ignores extra arguments.

        Its updates are the new parameters less the old, so added to the old they may
        miss the new by a rounding, and a step is not in place: ``step`` is faster.
        The difference is taken before parameters are rounded to 16 bits, so it keeps
        what that would lose. As with optax, an update has the dtype to which JAX
        promotes those of its parameter and its gradient.
        With ``lr=None`` they are neither scaled nor negated, as those of optax' own
        with ``learning_rate=None``: ``optax.scale_by_learning_rate`` may follow.
        """
        import optax

        def update(
            grads: Any, state: State, params: Any = None, **extra_args: Any
        ) -> Any:
            if params is None:
                raise ValueError(
                    f"{self.rule.name} needs the parameters: update(grads, state, "
                    f"params)"
                )
            leaves, tree = taken("params", params)
            gradients = fitting("grads", grads, params)
            before = [widened(leaf) for leaf in leaves]
            wide = jax.tree.unflatten(tree, before)
            new, state = self.step(wide, grads, state, **self._unit_lr)
            after = jax.tree.leaves(new)
            if self._unit_lr:
                before, after = after, before
            updates = [
                (b - a).astype(jnp.promote_types(p.dtype, g.dtype))
                for a, b, p, g in zip(before, after, leaves, gradients, strict=True)
            ]
            return jax.tree.unflatten(tree, updates), state

        return optax.GradientTransformationExtraArgs(self.init, update)

    def eval_params(self, params: Any, state: State) -> Any:
        """The parameters to use, such as for a validation: for most rules ``params``;
        for those that take their gradients elsewhere (``schedule_free_*``), others."""
        if self.variant.evaluate is None:
            return params
        leaves, tree = taken("params", params)
        state, buffers = self._fitting(state, params)
        static, traced = self._numbers({}, state.count)
        new = jax.pure_callback(
            functools.partial(self._evaluate, static),
            [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
            *(state.count, state.carry, traced, leaves, buffers),
            vmap_method="sequential",
        )
        given = zip(new, leaves, *buffers, strict=True)
        new = [shards.varying(array, shards.axes_of(*like)) for array, *like in given]
        return jax.tree.unflatten(tree, new)

    def estimate(self, grads: Any, state: State, *, grad_scale: Any = 1.0) -> State:
        """The state with an estimate in it, for a rule that works with one; the page of
        ``sophia_g`` says of what ``grads`` are to be the gradients."""
        if self.rule.estimate is None:
            raise TypeError(f"{self.rule.name} does not use estimates")
        buffer, rule = self.rule.estimate
        gradients, tree = taken("grads", grads)
        given = state
        state, _ = self._fitting(state, grads, "grads")
        leaves = jax.tree.leaves(state.buffers[buffer])
        changes = {"grad_scale": grad_scale, **self._unit_lr}
        static, traced = self._numbers(changes, state.count)
        (new,), _ = calls.Step(rule, f"{self.name}.estimate", self.threads)(
            *(state.count + 1, static, traced, state.carry),
            *(leaves, gradients, []),
        )
        buffers = {**state.buffers, buffer: jax.tree.unflatten(tree, new)}
        return state._replace(carry=given.carry, buffers=buffers)

    # How ------------------------------------------------------------------------------

    @property
    def _unit_lr(self) -> dict[str, float]:
        """In place of an lr that is left to what follows."""
        return {"lr": 1.0} if self.hyperparameters.get("lr", 1.0) is None else {}

    def _check_mixed(self, leaves: Sequence[Any]) -> None:
        dtypes = {str(computed(leaf.dtype)) for leaf in leaves}
        if self.variant.over == "all" and len(dtypes) > 1:
            raise TypeError(
                f"{self.rule.name} takes sums over all parameters, which must be "
                f"computed in one dtype, but there are {' and '.join(sorted(dtypes))}"
            )

    def _summed_over(self, params: Any, grads: Any, state: State) -> dict[str, int]:
        def called(name: str, tree: Any) -> list[tuple[str, Any]]:
            return [(f"{name}{path}", leaf) for path, leaf in paths(tree)]

        others = [
            called(f"state.buffers[{name!r}]", tree)
            for name, tree in state.buffers.items()
        ]
        return shards.summed_over(
            self.variant,
            self.axis_name,
            called("params", params),
            [called("grads", grads), *others],
        )

    def _carry_shape(self, leaves: Sequence[Any]) -> tuple[int, int, int]:
        rows = len(leaves) if self.variant.by_segment else 1
        return rows, len(self.variant.carry), 2

    def _fitting(
        self, state: Any, params: Any, theirs: str = "params"
    ) -> tuple[State, list[list[Any]]]:
        """The state, if it is one for these parameters, and the leaves of its buffers,
        in order."""
        if not isinstance(state, State):
            raise TypeError(
                f"state must be a fastopt.jax.State, got {type(state).__name__}; of a "
                f"dict that was restored, State(**it) makes one"
            )
        trees = named(state.buffers, self.name, self.variant.state)
        shape = self._carry_shape(jax.tree.leaves(params))
        count, carry = completed(state.count), carried(state.carry, shape)
        buffers = [
            fitting(
                f"state.buffers[{name!r}]", trees[name], params, theirs, STATE_DTYPES
            )
            for name in self.variant.state
        ]
        return State(count, carry, trees), buffers

    def _numbers(
        self, changes: Mapping[str, Any], count: Any
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The hyperparameters and what else is in ``changes``: those that are numbers
        now, checked, and those that will be when it runs."""
        defaults = {**self.rule.hyperparameters, "grad_scale": 1.0}
        static, traced = {}, {}
        for key, value in {**self.hyperparameters, **changes}.items():
            if key not in defaults:
                self.rule.check_names([key])
            if key in changes and key in selecting(self.rule):
                raise TypeError(
                    f"{key} selects what is compiled; give it to the optimizer"
                )
            if value is None and key not in changes:
                raise TypeError(
                    f"lr is None, which leaves it to what follows in a chain of optax: "
                    f"use as_optax(), or give {self.rule.name} an lr"
                )
            if isinstance(value, Schedule) and isinstance(count, jax.core.Tracer):
                value = jax_schedules.words(value, count)
            elif callable(value):
                value = value(count)
            value = number(key, key, value, defaults[key])
            if isinstance(value, jax.Array):
                traced[key] = value
            else:
                static[key] = float(value)
        return static, traced

    @standard
    def _evaluate(
        self,
        static: Mapping[str, float],
        count: Any,
        carry: Any,
        traced: Mapping[str, Any],
        leaves: Sequence[Any],
        buffers: Sequence[Sequence[Any]],
    ) -> list[Any]:
        """In NumPy: XLA may contract a product and a sum, to other bits."""
        rule, results = self.variant, []
        now = dict(static)
        for key, value in traced.items():
            default = rule.hyperparameters[key]
            now[key] = check_hyperparameter(key, key, as_float(value), default)
        before = np.asarray(carry).view(np.float64).reshape(-1).tolist()
        values = [now[key] for key in rule.hyperparameters]
        scalars = portable(rule.scalars)(max(int(count), 1), *before, *values)
        for arrays in zip(leaves, *buffers, strict=True):
            param, *state = map(np.asarray, arrays)
            dtype = computed(param.dtype)
            new = evaluate(rule, (param.astype(dtype), *state), scalars, dtype)
            with np.errstate(over="ignore"):  # infinity is the nearest of float16
                results.append(new.astype(param.dtype))
        return results
