"""torch.optim with fastopt's kernels, and with all of fastopt's rules.

>>> import torch
>>> from fastopt.torch import AdamW
>>> model = torch.nn.Linear(3, 1)
>>> opt = AdamW(model.parameters(), lr=1e-2)
>>> model(torch.ones(2, 3)).sum().backward()
>>> opt.step()

The classes that torch has, under its names; and for every other rule one that is named
as the rule is, such as ``Lion``, ``LAMB``, ``ScheduleFreeAdamW``.
"""

import torch.optim as _theirs

from fastopt.advice import no_attribute as _no_attribute
from fastopt.rules import RULES as _RULES
from fastopt.torch import classes as _classes
from fastopt.torch.bitsandbytes import from_bitsandbytes as from_bitsandbytes
from fastopt.torch.classes import ASGD as ASGD
from fastopt.torch.classes import SGD as SGD
from fastopt.torch.classes import Adadelta as Adadelta
from fastopt.torch.classes import Adafactor as Adafactor
from fastopt.torch.classes import Adagrad as Adagrad
from fastopt.torch.classes import Adam as Adam
from fastopt.torch.classes import Adamax as Adamax
from fastopt.torch.classes import AdamW as AdamW
from fastopt.torch.classes import Muon as Muon
from fastopt.torch.classes import NAdam as NAdam
from fastopt.torch.classes import RAdam as RAdam
from fastopt.torch.classes import RMSprop as RMSprop
from fastopt.torch.classes import Rprop as Rprop
from fastopt.torch.classes import optimizer as optimizer
from fastopt.torch.flat import flatten_ as flatten_
from fastopt.torch.flat import unflatten_ as unflatten_
from fastopt.torch.release import release_gradients_ as release_gradients_

_OF_TORCH = [n for n in dir(_classes) if n[0].isupper() and hasattr(_theirs, n)]
_OTHERS = {
    _classes.title(rule): rule
    for rule in _RULES
    if rule.name not in map(str.lower, _OF_TORCH)
}
__all__ = [*_OF_TORCH, *_OTHERS]
__all__ += ["flatten_", "from_bitsandbytes", "optimizer", "release_gradients_"]
__all__ += ["unflatten_"]


def __getattr__(name: str) -> type[_classes.OfRule]:
    """The class of a rule that torch has not, made when it is first asked for."""
    if name not in _OTHERS:
        theirs = getattr(_theirs, name, _theirs.Optimizer)
        if theirs is not _theirs.Optimizer and isinstance(theirs, type):
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; use torch.optim.{name}"
            )
        more = "; fastopt.torch.__all__ lists what there is"
        raise _no_attribute(__name__, name, __all__, more)
    kind = globals()[name] = optimizer(_OTHERS[name], name)
    return kind


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
