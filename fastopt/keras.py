"""Every rule as an optimizer of Keras 3, with its torch backend on a CPU.

>>> import os; os.environ["KERAS_BACKEND"] = "torch"
>>> import keras, numpy as np, fastopt.keras
>>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
>>> model.compile(fastopt.keras.lion(learning_rate=0.01, beta2=0.98), loss="mse")
>>> fitted = model.fit(np.ones((8, 3)), np.ones(8), verbose=0)
>>> int(model.optimizer.iterations)
1

A step updates all variables of a model at once, in their own memory, which the other
backends of Keras do not give away.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar

import keras
import numpy as np
from keras.optimizers.schedules import LearningRateSchedule

import fastopt
from fastopt import docstrings
from fastopt.rule import Rule, check_hyperparameter, shown
from fastopt.rules import RULES

if keras.backend.backend() != "torch":
    raise ImportError(
        f"fastopt.keras updates variables in place, which only Keras's torch backend "
        f"allows, and this is {keras.backend.backend()!r}; set KERAS_BACKEND=torch "
        f"before keras is imported"
    )

__all__ = ["Optimizer"]
if TYPE_CHECKING:
    from fastopt import _keras as _rules
    from fastopt._keras import *  # noqa: F403

    __all__ += _rules.__all__
else:
    __all__ += [rule.name for rule in RULES]


def check_rate(value: Any) -> None:
    """Check that Keras can call a learning rate that is a function. It passes no
    arguments."""
    if not callable(value) or isinstance(value, LearningRateSchedule):
        return
    try:
        inspect.signature(value).bind()
    except ValueError:  # it does not say what it takes
        pass
    except TypeError as error:
        raise TypeError(
            f"learning_rate must be a float, a LearningRateSchedule of Keras, or a "
            f"function without arguments, got {shown(value)}; use a keras "
            f"LearningRateSchedule, such as keras.optimizers.schedules.CosineDecay"
        ) from error


def place(tensor: Any) -> tuple[Any, ...]:
    """Describe where a tensor is in memory and how it is laid out."""
    kind = tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()
    return tensor.data_ptr(), *kind


class Optimizer(keras.optimizers.Optimizer):
    """A ``keras.optimizers.Optimizer``, for a rule of your own, too: derive a class
    with it as ``rule``.

    Parameters
    ----------
    learning_rate
        A float, a ``LearningRateSchedule`` or a callable; the rule's by default.
    weight_decay
        The rule's own, in its pass over memory: what it means, and its default, are
        the rule's (for ``adam``, other than for Keras's, it is added to the gradient,
        as in torch). It spares what ``exclude_from_weight_decay`` names. A rule without
        one leaves it to Keras.
    **options
        The other hyperparameters of the rule, and what every optimizer of Keras has:
        ``name``, ``clipnorm``, ``global_clipnorm``, ``clipvalue``, ``use_ema``,
        ``gradient_accumulation_steps`` ...; see there.

    Raises
    ------
    TypeError, ValueError
        For what does not fit, such as variables that are not all float32 or float64:
        when the optimizer is built, which is at its first step at the latest.

    Notes
    -----
    The hyperparameters are attributes, too. They may be set at any time, and the next
    step uses the new values. A ``weight_decay`` of None means 0.

    Beside the iterations and the learning rate, ``variables`` has no state: that is
    fastopt's, and saved and loaded with the model's.

    Examples
    --------
    >>> import keras, numpy as np, fastopt, fastopt.keras
    >>> class Mine(fastopt.keras.Optimizer):
    ...     rule = fastopt.Rule(fastopt.gd.update, fastopt.gd.scalars, name="mine")
    >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(Mine(learning_rate=0.1), loss="mse")
    >>> model.train_on_batch(np.ones((8, 3)), np.ones((8, 1))) > 0
    True
    """

    rule: ClassVar[Rule]
    _optimizer: fastopt.Optimizer  # from build on
    _excluded: Mapping[str, list[str]] = {}  # from weight decay, for the configuration
    _restored = False  # whether a configuration brought that
    _missing: Sequence[str] = ()  # of those, what no variable is called, or several are
    _spared: Set[int] = (
        frozenset()
    )  # keys of the variables that a configuration excludes

    def __init__(
        self,
        learning_rate: Any = None,
        weight_decay: float | None = None,
        **options: Any,
    ):
        defaults = self.rule.hyperparameters
        hyperparameters = {n: options.pop(n) for n in {*options} & {*defaults} - {"lr"}}
        check_rate(learning_rate)
        if learning_rate is None:
            learning_rate = defaults.get("lr")
        if weight_decay is None:
            weight_decay = defaults.get("weight_decay")
        super().__init__(learning_rate, weight_decay=weight_decay, **options)
        self.hyperparameters = hyperparameters

    def __getattr__(self, name: str) -> Any:
        """Look up a hyperparameter of the rule that is no attribute of Keras's."""
        defaults = self.rule.hyperparameters
        if name not in defaults or name == "lr":
            kind = type(self).__name__
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        return vars(self).get("hyperparameters", {}).get(name, defaults[name])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learning_rate":
            check_rate(value)
        own, defaults = vars(self), self.rule.hyperparameters
        if name not in defaults or name in own or "hyperparameters" not in own:
            super().__setattr__(name, value)
            return
        if name == "lr":
            raise AttributeError("the learning rate is called learning_rate by Keras")
        if "_optimizer" in own:  # which checks it
            setattr(self._optimizer, name, value)
            value = self._optimizer.groups[0][name]
        elif not (callable(value) or (value is None and name in self.rule.follows)):
            value = check_hyperparameter(name, name, value, defaults[name])
        self.hyperparameters[name] = value

    def _decay(self) -> Any:
        """Return the weight decay for the rule. To Keras, None means no decay."""
        return 0.0 if self.weight_decay is None else self.weight_decay

    def build(self, variables: Sequence[Any]) -> None:
        """Make the state for these variables, once."""
        if self.built:
            return
        self._tensors = [variable.value.detach() for variable in variables]
        for variable in variables:
            if variable.dtype in ("float16", "bfloat16"):
                raise TypeError(
                    f"variable {variable.path} has dtype {variable.dtype}; float32 or "
                    f"float64 is needed"
                )
        self._spare(variables)
        self._decays = list(map(self._use_weight_decay, variables))
        self._optimizer = self._new(self._decays)
        super().build(variables)

    def _spare(self, variables: Sequence[Any]) -> None:
        """Find what a configuration excludes. A model that was loaded leaves out the
        model's own name in the paths of its variables."""
        if not self._restored:
            return
        missing, spared = [], set()
        for path in self._excluded["paths"]:
            matches = [v for v in variables if v.path == path] or [
                v
                for v in variables
                if f"/{path}".endswith(f"/{v.path}")
                or f"/{v.path}".endswith(f"/{path}")
            ]
            if len(matches) == 1:
                spared.add(self._var_key(matches[0]))
            else:
                missing.append(path)
        self._missing, self._spared = missing, frozenset(spared)

    def _new(self, decays: list[bool]) -> fastopt.Optimizer:
        hyperparameters: dict[str, Any] = dict(self.hyperparameters)
        if "weight_decay" in self.rule.hyperparameters:
            hyperparameters["weight_decay"] = self._decay()
            hyperparameters["weight_decay_mask"] = list(decays)
        self._lr = float(self.learning_rate)
        if self.rule.follows:  # the configuration has it: a run that was loaded goes on
            schedule = self._learning_rate
            scheduled = isinstance(schedule, LearningRateSchedule)
            first = self.rule.complete(
                {**hyperparameters, "lr": schedule if scheduled else self._lr}
            )
            follows = {name: float(first[name]) for name in self.rule.follows}
            hyperparameters |= follows
            self.hyperparameters |= follows
        return self.rule(self._tensors, lr=lambda steps: self._lr, **hyperparameters)

    # What Keras does before and after this is its own: clipping, accumulation of
    # gradients, moving averages, constraints, the count of iterations.
    def _backend_update_step(
        self,
        grads: Sequence[Any],
        trainable_variables: Sequence[Any],
        learning_rate: Any,
    ) -> None:
        if self._missing:
            raise ValueError(
                f"{', '.join(self._missing)}: what was excluded from weight decay when "
                f"the model was saved cannot be found by this name now; compile the "
                f"model again, with an optimizer that excludes it"
            )
        self._lr = float(learning_rate)
        if "weight_decay" in self.rule.hyperparameters:  # which may be set at any time
            self._optimizer.weight_decay = self._decay()
        gradients: list[Any] = [None] * len(self._tensors)
        for grad, variable in zip(grads, trainable_variables, strict=True):
            i = self._get_variable_index(variable)
            if place(variable.value) != place(self._tensors[i]):
                raise RuntimeError(
                    f"{variable.path} has moved to other memory, or lies there in "
                    f"another way, since this optimizer was built; compile the model "
                    f"again, with a new one"
                )
            gradients[i] = grad.detach().to(self._tensors[i].dtype).contiguous()
        self._optimizer.step(gradients)

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        if "weight_decay" not in self.rule.hyperparameters:
            super()._apply_weight_decay(variables)

    def exclude_from_weight_decay(
        self, var_list: Any = None, var_names: Any = None
    ) -> None:
        if self.built:
            raise ValueError(
                "exclude_from_weight_decay() must come before the optimizer is built"
            )
        super().exclude_from_weight_decay(var_list, var_names)
        self._restored = False
        self._excluded = {
            "paths": sorted(variable.path for variable in var_list or ()),
            "var_names": sorted(var_names or ()),
        }

    def _use_weight_decay(self, variable: Any) -> bool:
        spared = self._var_key(variable) in self._spared
        return not spared and bool(super()._use_weight_decay(variable))

    def eval_params(self) -> list[Any]:
        """The values to use, where these are not those that are trained
        (``schedule_free_*``): NumPy arrays, one for each variable that is trained, in
        their order. ``layer.set_weights`` takes them."""
        if not self.built:
            raise ValueError("the optimizer has not been built; train the model first")
        return [np.asarray(value) for value in self._optimizer.eval_params()]

    # Saving and loading, with the model -----------------------------------------------

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), **self.hyperparameters}
        if "weight_decay" in self.rule.hyperparameters:
            config["weight_decay"] = self._decay()  # None would be the rule's default
        if any(self._excluded.values()):
            config["exclude_from_weight_decay"] = {
                kind: list(names) for kind, names in self._excluded.items()
            }
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make an optimizer from what ``get_config()`` has returned."""
        excluded = config.get("exclude_from_weight_decay", {})
        rest = {k: v for k, v in config.items() if k != "exclude_from_weight_decay"}
        optimizer = super().from_config(rest, custom_objects)
        if excluded:
            optimizer.exclude_from_weight_decay(var_names=excluded["var_names"])
            optimizer._excluded, optimizer._restored = excluded, True
        return optimizer

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.built:
            saved = self._optimizer.state_dict()
            store["steps"] = np.array(saved["steps"])
            store["carry"] = np.array(saved["carry"])
            store["decays"] = np.array(self._decays)
            for name, arrays in saved["state"].items():
                for i, array in enumerate(arrays):
                    store[f"{name}_{i}"] = array

    def load_own_variables(self, store: Any) -> None:
        theirs = {key for key in store.keys() if key.isdigit()}
        ours = {*store.keys()} - theirs
        if not (self.built and ours):
            super().load_own_variables(store)  # warns of what it leaves out
            return
        # A configuration names the weights that do not decay; these are by position.
        decays = store["decays"].tolist() if "decays" in ours else self._decays
        optimizer = self._new(decays)
        saved = optimizer.state_dict()
        # State stays when its hyperparameter, such as momentum, is set to 0.
        buffers = {key.rpartition("_")[0] for key in ours} - {""}
        for on in self.rule.variants:
            if {*self.rule.variant(set(on)).state} == buffers > {*saved["state"]}:
                saved |= {"switched_on": [*on], "state": dict.fromkeys(buffers)}
        keys = {
            name: [f"{name}_{i}" for i in range(len(self._tensors))]
            for name in saved["state"]
        }
        wanted = {"steps", "carry", "decays"}.union(*keys.values())
        if ours != wanted:
            raise ValueError(
                f"the optimizer that was saved has other state than {self.rule.name} "
                f"here: {', '.join(sorted(ours ^ wanted))} not in both"
            )
        saved["steps"], saved["carry"] = int(store["steps"]), store["carry"].tolist()
        for name in keys:
            saved["state"][name] = [store[key] for key in keys[name]]
        optimizer.load_state_dict(saved)
        # Both attributes change at once, or, with an interrupt, neither does.
        self.__dict__.update(_optimizer=optimizer, _decays=decays)
        if "decays" in ours:
            self._missing = ()
        super().load_own_variables({key: store[key] for key in theirs})


EXAMPLE = """\
Examples
--------
>>> import keras, numpy as np, fastopt.keras
>>> layers = keras.layers.Input((3,)), keras.layers.Dense(1)
>>> model = keras.Sequential(layers)
>>> model.compile(fastopt.keras.{name}(), loss="mse")
>>> model.train_on_batch(np.ones((8, 3)), np.ones((8, 1))) > 0
True
"""


def about(rule: Rule) -> str:
    """Return the docstring of the class of a rule."""
    first = {"lr": "learning_rate", "weight_decay": "weight_decay"}
    parts = [
        docstrings.words(rule),
        "\n".join(
            [
                "Parameters",
                "----------",
                *docstrings.hyperparameters(rule, **first),
                "**options",
                "    What every :class:`Optimizer` here has.",
            ]
        ),
        EXAMPLE.format(name=rule.name),
    ]
    return "\n\n".join(parts)


for _rule in RULES:
    _made = type(_rule.name, (Optimizer,), {"rule": _rule, "__doc__": about(_rule)})
    _made.__module__ = __name__
    globals()[_rule.name] = keras.saving.register_keras_serializable("fastopt")(_made)
