"""torch.optim, with fastopt's kernels: drop-in classes for every rule.

>>> import torch
>>> from fastopt.torch import AdamW
>>> model = torch.nn.Linear(3, 1)
>>> opt = AdamW(model.parameters(), lr=1e-2)
>>> model(torch.ones(2, 3)).sum().backward()
>>> opt.step()
"""

from fastopt.rules import RULES as _RULES
from fastopt.torch import classes as _classes
from fastopt.torch.classes import SGD as SGD
from fastopt.torch.classes import optimizer as optimizer
from fastopt.torch.flat import flatten_ as flatten_

TORCHS = (
    "SGD Adam AdamW NAdam RAdam Adamax RMSprop Adagrad Adadelta Rprop ASGD Adafactor"
).split()
for _name in TORCHS:
    globals()[_name] = getattr(_classes, _name)
for _rule in _RULES:
    if _rule.name not in [n.lower() for n in TORCHS]:
        _made = optimizer(_rule)
        globals()[_made.__name__] = _made
