"""Steps inside ``jax.jit``, on the CPU: one custom call, in place where donated.

    opt = fastopt.jax.adamw(lr=1e-3)
    state = opt.init(params)
    step = jax.jit(opt.step, donate_argnums=(0, 2))
    params, state = step(params, grads, state)

A function for each rule, by its name; ``optimizer`` takes the rule itself. The bits are
those of ``fastopt.adamw(params).step(grads)``. ``as_optax()`` makes what optax
composes. See docs/jax.md.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastopt import checks, native
from fastopt.cython_cpu import HOW_TO_GET
from fastopt.numpy_ref import NUMPY
from fastopt.rule import Function, Rule, check_hyperparameter, concrete
from fastopt.rules import RULES
from fastopt.threads import available

__all__ = ["Optimizer", "State", "exact", "optimizer"]

TARGET = "fastopt_step"
DTYPES = (np.float32, np.float64)


def register() -> None:
    """Tell XLA of the call."""
    native.table()  # or the error that says how to get it
    try:
        xla = importlib.import_module("fastopt._xla")
    except ImportError as error:
        raise RuntimeError(
            f"fastopt was built without its call for XLA ({error}); {HOW_TO_GET}"
        ) from error
    jax.ffi.register_ffi_target(TARGET, xla.target(), platform="cpu")


register()


class State(NamedTuple):
    """What an optimizer remembers: a pytree."""

    count: Any  # completed steps, int32
    carry: Any  # numbers of the rule's: float64 in words, a row for each set of them
    buffers: dict[str, Any]  # by name, each in the structure of the parameters


def exact(value: float) -> Any:
    """A hyperparameter for :meth:`Optimizer.step` that keeps all of its float64, which
    JAX by default rounds to float32 when it is an argument of a compiled function.

    >>> import fastopt.jax
    >>> fastopt.jax.exact(1e-3).shape
    (2,)
    """
    return words([float(value)])[0]


def words(values: Sequence[float]) -> Any:
    """float64 as pairs of uint32, which JAX has in any case."""
    return np.array(values, np.float64).view(np.uint32).reshape(len(values), 2)


def optimizer(
    rule: Rule, *, threads: int | None = None, **hyperparameters: Any
) -> Optimizer:
    """An optimizer for use inside ``jax.jit``.

    Parameters
    ----------
    rule
        One of fastopt's own, such as ``fastopt.adamw``.
    threads
        At most so many CPU threads; by default what Python would use.
    **hyperparameters
        Of the rule. Each may be a schedule: a function of the number of completed
        steps, which inside ``jit`` is traced.

    Raises
    ------
    TypeError, ValueError
        For a rule without compiled kernels, and hyperparameters that do not fit.
    RuntimeError
        If the kernels are not installed.

    Example
    -------
    >>> import fastopt, fastopt.jax, jax.numpy as jnp
    >>> opt = fastopt.jax.sgd(lr=0.5)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> params, state = opt.step(params, {"w": 2 * params["w"]}, opt.init(params))
    >>> params["w"].tolist()
    [0.0, 0.0]
    """
    if not any(rule is ours for ours in RULES):
        raise TypeError(
            f"{rule.name} has no compiled kernels, which fastopt.jax needs; there are "
            f"some for {', '.join(ours.name for ours in RULES)}"
        )
    for key in hyperparameters.keys() - rule.hyperparameters.keys():
        raise TypeError(
            f"{rule.name} has no hyperparameter {key!r}; it has "
            f"{', '.join(rule.hyperparameters)}"
        )
    values, now = {**rule.hyperparameters, **hyperparameters}, {}
    for key, value in values.items():
        name = key
        if callable(value):
            if key in selecting(rule):
                raise TypeError(
                    f"{key} selects what is compiled, so it cannot be a schedule"
                )
            value, name = value(0), f"{key}(0)"
        now[key] = check_hyperparameter(key, name, value, rule.hyperparameters[key])
        if not callable(values[key]):
            values[key] = now[key]
    on = {name for name in rule.switches if now[name]}
    rule.scalars(1, *rule.first_carry(now), *now.values())
    return Optimizer(
        rule,
        rule.variant(on),
        native.called(rule, on),
        values,
        available() if threads is None else checks.check_threads(threads),
    )


def selecting(rule: Rule) -> Set[str]:
    """The hyperparameters that cannot change in what is compiled: options and flags."""
    defaults = rule.hyperparameters.items()
    return rule.switches | {k for k, value in defaults if isinstance(value, bool)}


def __getattr__(name: str) -> Any:
    for rule in RULES:
        if rule.name == name:
            return functools.partial(optimizer, rule)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A rule under hyperparameters; made by :func:`optimizer`. Its methods are pure."""

    rule: Rule
    variant: Rule  # what the options that are on make of it
    name: str  # and what that is called among the native rules
    hyperparameters: Mapping[str, Any]
    threads: int

    def init(self, params: Any) -> State:
        """The state before the first step. Of float32 and float64 arrays, in any
        structure; what starts as the parameters starts as these."""
        leaves, _ = taken("params", params)
        self._check_mixed(leaves)
        now = {k: v(0) if callable(v) else v for k, v in self.hyperparameters.items()}
        rows = len(leaves) if self._by_segment else 1
        carry = words(self.variant.first_carry(now) * rows)

        def first(name: str, leaf: Any) -> Any:
            of = self.variant.starts.get(name, 0.0)
            if of == "p":
                return jnp.array(leaf, copy=True)  # to be donated apart from it
            return jnp.full_like(leaf, now[of] if isinstance(of, str) else of)

        return State(
            jnp.zeros((), jnp.int32),
            jnp.asarray(carry.reshape(rows, len(self.variant.carry), 2)),
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
            Arrays in the same structure, shapes and dtypes.
        state
            From ``init`` or the step before.
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
            When it runs, for a traced hyperparameter out of its range.

        Notes
        -----
        For a step in place, donate ``params`` and ``state``:
        ``jax.jit(opt.step, donate_argnums=(0, 2))``. It cannot be differentiated; under
        ``vmap`` the steps are done one after the other.
        """
        given = {**hyperparameters, "grad_scale": grad_scale}
        leaves, tree = taken("params", params)
        self._check_mixed(leaves)
        found = self._fitting("grads", grads, params)
        buffers = [
            self._fitting(f"state.buffers[{name!r}]", state.buffers[name], params)
            for name in self.variant.state
        ]
        numbers = self._numbers(given, state.count)
        new, carry = self._call(
            self.name, state.count + 1, numbers, state.carry, leaves, found, buffers
        )
        rebuilt = [jax.tree.unflatten(tree, array) for array in new]
        named = dict(zip(self.variant.state, rebuilt[1:], strict=True))
        return rebuilt[0], State(state.count + 1, carry, named)

    def as_optax(self) -> Any:
        """An ``optax.GradientTransformation``, to be composed in ``optax.chain``.

        Its updates are the new parameters less the old, so added to the old they may
        miss the new by a rounding, and a step is not in place: ``step`` is faster.
        """
        import optax

        def update(grads: Any, state: State, params: Any = None) -> Any:
            if params is None:
                raise ValueError(
                    f"{self.rule.name} needs the parameters: update(grads, state, "
                    f"params)"
                )
            new, state = self.step(params, grads, state)
            return jax.tree.map(lambda a, b: a - b, new, params), state

        return optax.GradientTransformation(self.init, update)

    def eval_params(self, params: Any, state: State) -> Any:
        """The parameters to use, such as for a validation: for most rules ``params``;
        for those that take their gradients elsewhere (``schedule_free_*``), others."""
        evaluate = self.variant.evaluate
        if evaluate is None:
            return params
        leaves, tree = taken("params", params)
        buffers = [jax.tree.leaves(state.buffers[name]) for name in self.variant.state]
        static, traced = self._numbers({}, state.count)
        new = jax.pure_callback(
            functools.partial(self._evaluate, evaluate, static),
            [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
            *(state.count, state.carry, traced, leaves, buffers),
        )
        return jax.tree.unflatten(tree, new)

    def estimate(self, grads: Any, state: State, *, grad_scale: Any = 1.0) -> State:
        """The state with an estimate in it, for a rule that works with one; the page of
        ``sophia_g`` says of what ``grads`` are to be the gradients."""
        if self.rule.estimate is None:
            raise TypeError(f"{self.rule.name} works without estimates")
        buffer, _ = self.rule.estimate
        leaves, tree = taken(buffer, state.buffers[buffer])
        found = self._fitting("grads", grads, state.buffers[buffer])
        numbers = self._numbers({"grad_scale": grad_scale}, state.count)
        (new,), _ = self._call(
            *(f"{self.name}.estimate", state.count + 1, numbers, state.carry),
            *(leaves, found, []),
        )
        made = {**state.buffers, buffer: jax.tree.unflatten(tree, new)}
        return state._replace(buffers=made)

    # How ------------------------------------------------------------------------------

    @property
    def _by_segment(self) -> bool:
        return self.variant.measure is not None and self.variant.over == "segment"

    def _check_mixed(self, leaves: Sequence[Any]) -> None:
        dtypes = {str(leaf.dtype) for leaf in leaves}
        if self.variant.over == "all" and len(dtypes) > 1:
            raise TypeError(
                f"{self.rule.name} takes sums over all parameters, which must have one "
                f"dtype, but there are {' and '.join(sorted(dtypes))}"
            )

    @staticmethod
    def _fitting(name: str, tree: Any, params: Any) -> list[Any]:
        """The leaves, if they have the parameters' structure, shapes and dtypes."""
        leaves, structure = taken(name, tree)
        wanted = jax.tree.structure(params)
        if structure != wanted:
            raise ValueError(f"{name} has the structure {structure}, params {wanted}")
        for leaf, (path, param) in zip(leaves, paths(params), strict=True):
            if leaf.shape != param.shape or leaf.dtype != param.dtype:
                raise ValueError(
                    f"{name}{path} is {leaf.dtype}{list(leaf.shape)} but params{path} "
                    f"is {param.dtype}{list(param.shape)}"
                )
        return leaves

    def _numbers(
        self, changes: Mapping[str, Any], count: Any
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The hyperparameters and what else is in ``changes``: those that are numbers
        now, checked, and those that will be when it runs."""
        defaults = {**self.rule.hyperparameters, "grad_scale": 1.0}
        static, traced = {}, {}
        for key, value in {**self.hyperparameters, **changes}.items():
            if key not in defaults:
                raise TypeError(
                    f"{self.rule.name} has no hyperparameter {key!r}; it has "
                    f"{', '.join(self.rule.hyperparameters)}"
                )
            if key in changes and key in selecting(self.rule):
                raise TypeError(
                    f"{key} selects what is compiled; give it to the optimizer"
                )
            if callable(value):
                value = value(count)
            if getattr(value, "dtype", None) == np.uint32:
                traced[key] = value  # an exact one
            elif isinstance(value, jax.Array):
                wide = value.dtype == jnp.float64
                traced[key] = value if wide else value.astype(jnp.float32)
            else:
                value = check_hyperparameter(key, key, value, defaults[key])
                static[key] = float(value)
        return static, traced

    def _call(
        self,
        name: str,
        t: Any,
        numbers: tuple[dict[str, float], dict[str, Any]],
        carry: Any,
        params: Sequence[Any],
        grads: Sequence[Any],
        buffers: Sequence[Sequence[Any]],
    ) -> tuple[list[list[Any]], Any]:
        """Parameters and state, each as a list of arrays, after a step, and the carry.
        One custom call for the arrays of each dtype."""
        static, traced = numbers
        order = [*self.rule.hyperparameters, "grad_scale"]
        places = np.array([order.index(key) for key in traced], np.int64)
        given = [t, words([static.get(key, 0.0) for key in order])]
        streams, old = [list(params), *map(list, buffers)], carry
        for dtype in DTYPES:
            which = [k for k, param in enumerate(params) if param.dtype == dtype]
            if not which:
                continue
            # Of a rule over segments, each array has its own row.
            rows = np.array(which) if self._by_segment else np.arange(len(old))
            aliased = [stream[k] for stream in streams for k in which]
            operands = [
                *(*given, old[rows] if len(rows) < len(old) else old),
                *traced.values(),
                *aliased[: len(which)],
                *(grads[k] for k in which),
                *aliased[len(which) :],
            ]
            first = len(given) + 1 + len(traced)
            skipped = len(which)  # the gradients
            aliases = {len(given): 0} | {
                first + k + (skipped if k >= len(which) else 0): 1 + k
                for k in range(len(aliased))
            }
            like = [operands[at] for at in aliases]
            part, *new = jax.ffi.ffi_call(
                TARGET,
                [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in like],
                input_output_aliases=aliases,
                vmap_method="sequential",
            )(*operands, rule=name, traced=places, threads=np.int32(self.threads))
            carry = carry.at[rows].set(part) if len(rows) < len(old) else part
            for k, array in enumerate(new):
                streams[k // len(which)][which[k % len(which)]] = array
        return streams, carry

    def _evaluate(
        self,
        function: Function,
        static: Mapping[str, float],
        count: Any,
        carry: Any,
        traced: Mapping[str, Any],
        leaves: Sequence[Any],
        buffers: Sequence[Sequence[Any]],
    ) -> list[Any]:
        """In NumPy: XLA may contract a product and a sum, to other bits."""
        rule, found = self.variant, []
        now = {**static, **{key: float(value) for key, value in traced.items()}}
        carried = np.asarray(carry).view(np.float64).reshape(-1).tolist()
        values = [now[key] for key in rule.hyperparameters]
        scalars = rule.scalars(max(int(count), 1), *carried, *values)
        taken = function.__code__.co_argcount - 1 - len(rule.state)
        for arrays in zip(leaves, *buffers, strict=True):
            arrays = tuple(map(np.asarray, arrays))
            dtype = arrays[0].dtype
            evaluate = concrete(function, dtype, NUMPY, lambda helper: helper)
            with np.errstate(all="ignore"):
                used = map(dtype.type, scalars[:taken])
                found.append(np.asarray(evaluate(*arrays, *used)))
        return found


def paths(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(p), x) for p, x in jax.tree.leaves_with_path(tree)]


def taken(name: str, tree: Any) -> tuple[list[Any], Any]:
    """The leaves, if they are arrays that a step can take, and the structure."""
    leaves, structure = jax.tree.flatten(tree)
    for path, leaf in paths(tree):
        if not isinstance(leaf, (jax.Array, np.ndarray)) or leaf.dtype not in DTYPES:
            dtype = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{name}{path} must be an array of float32 or float64, got {dtype}"
            )
        check_platform(f"{name}{path}", leaf)
    return leaves, structure


def check_platform(name: str, leaf: Any) -> None:
    """The kernels work in host memory. Where a traced array will be, only JAX's
    default tells."""
    if isinstance(leaf, jax.core.Tracer):
        device = jax.config.jax_default_device
        platforms = {getattr(device, "platform", device) or jax.default_backend()}
    elif isinstance(leaf, jax.Array):
        platforms = {device.platform for device in leaf.devices()}
    else:
        platforms = {"cpu"}
    if platforms != {"cpu"}:
        raise ValueError(
            f"{name} is on {' and '.join(sorted(platforms))}, but fastopt.jax works on "
            f"the CPU; set JAX_PLATFORMS=cpu, or work within "
            f"jax.default_device(jax.devices('cpu')[0])"
        )
