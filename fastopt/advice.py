"""Suggestions for a name that does not exist."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

# Names of hyperparameters in other libraries and papers, and ours for them.
ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "step_size", "eta", "alpha"), ("lr",)),
    "betas": ("beta1", "beta2", "beta3"),
    "beta": ("beta1", "momentum"),
    **dict.fromkeys(("beta1", "beta2", "beta3"), ("betas",)),
    "b1": ("beta1", "betas"),
    "b2": ("beta2", "betas"),
    "b3": ("beta3", "betas"),
    **dict.fromkeys(("max_norm", "max_grad_norm", "gradient_clip_val"), ("clip_norm",)),
    **dict.fromkeys(("eta_minus", "eta_plus"), ("etas",)),
    **dict.fromkeys(("step_min", "step_max"), ("step_sizes",)),
    **dict.fromkeys(("decay", "wd", "l2", "weight_decay_rate"), ("weight_decay",)),
    "epsilon": ("eps",),
    "eps": ("eps1", "eps2"),
    "etas": ("eta_minus", "eta_plus"),
    "step_sizes": ("step_min", "step_max"),
    "mu": ("momentum",),
    "rho": ("alpha",),
    # Of schedules
    **dict.fromkeys(
        ("total_steps", "num_training_steps", "decay_steps", "T_max"), ("steps",)
    ),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps"), ("warmup",)),
    **dict.fromkeys(("eta_min", "min_lr", "end_value"), ("end",)),
    **dict.fromkeys(("max_lr", "peak_value", "peak_lr"), ("lr",)),
    "init_value": ("start", "lr"),
    **dict.fromkeys(("cosine_annealing", "CosineAnnealing"), ("cosine",)),
    **dict.fromkeys(("cosine_decay", "cosine_decay_schedule"), ("cosine",)),
    "CosineAnnealingWarmRestarts": ("cosine_restarts",),
    "warmup_cosine_decay_schedule": ("warmup_cosine",),
    "Sequential": ("join",),
    "ChainedScheduler": ("product",),
}


def meant(name: str, names: Iterable[str]) -> list[str]:
    """Return the ``names`` that a wrong name probably stands for.

    Examples
    --------
    >>> meant("betas", ["lr", "beta1", "beta2"])
    ['beta1', 'beta2']
    >>> meant("AdamW", ["adam", "adamw"])
    ['adamw']
    """
    known = list(names)
    if not isinstance(name, str):  # a key of a damaged state
        return []
    same = [one for one in known if one.casefold() == name.casefold()]
    same = same or [one for one in ELSEWHERE.get(name, ()) if one in known]
    if same:
        return same
    folded = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=2, cutoff=0.7)
    return [folded[one] for one in near]


def hint(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return the end of an error message: the question whether one of ``names`` was
    meant. It is empty if none is similar."""
    found = meant(name, names)
    if not found:
        return ""
    whole = name in ELSEWHERE and name.endswith("s")  # such as betas, which are several
    joint = " and " if whole else " or "
    return f"; did you mean {joint.join(prefix + one for one in found)}?"


def no_attribute(
    module: str,
    name: str,
    names: Iterable[str],
    otherwise: str = "",
    also: str = "",
) -> AttributeError:
    """Return the error for a name that does not exist in a module.

    Parameters
    ----------
    module, name
        The module, and the name that does not exist.
    names
        The names that do.
    otherwise
        The end of the message if none of them is similar.
    also
        A sentence that follows the suggestion of a similar one.
    """
    known, more = list(names), otherwise
    plain = name.removesuffix("8bit").removesuffix("_").removeprefix("Paged")
    plain = plain.removesuffix("LR")  # as of torch's schedules
    found = meant(plain, known)
    if name.startswith("_"):  # programs look for such names, such as __path__
        more = ""
    elif found and name.endswith("8bit"):
        more = f'; {module}.{found[0]}(..., formats="8bit") has its state in 8 bits'
    elif found:
        more = hint(plain, known, f"{module}.") + also
    return AttributeError(f"module {module!r} has no attribute {name!r}{more}")


def missing(module: str, names: Iterable[str]) -> Callable[[str], NoReturn]:
    """Return the ``__getattr__`` of a module that has these names."""

    def getattribute(name: str) -> NoReturn:
        raise no_attribute(module, name, names)

    return getattribute


def suggest_arguments(*kinds: Any) -> None:
    """Make classes suggest a name for an argument that their ``__init__`` lacks."""
    for kind in kinds:
        kind.__init__ = _suggesting(kind.__init__)


def _suggesting(init: Callable[..., None]) -> Callable[..., None]:
    names = [*inspect.signature(init).parameters][1:]

    @functools.wraps(init)
    def checked(self: Any, *arguments: Any, **named: Any) -> None:
        for name in named:
            if name not in names:
                raise TypeError(
                    f"{type(self).__name__} has no argument {name!r}; it has "
                    f"{', '.join(names)}{hint(name, names)}"
                )
        init(self, *arguments, **named)

    return checked
