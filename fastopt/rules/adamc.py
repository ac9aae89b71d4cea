"""AdamC: AdamW whose decay falls with the square of the learning rate, so that the
weights' norms do not grow at the end of a schedule. Defazio 2025, arXiv:2506.02285.
``max_lr`` is the schedule's largest lr; by default the group's first, so give it where
lr rises. A larger lr decays as in AdamW, never more. Layers before no normalisation
belong to a group of ``adamw``, says the paper.
"""

from fastopt.rule import Rule, sqrt
from fastopt.rules.adamw import update


def scalars(
    t, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, max_lr=1e-3
):
    if max_lr <= 0:
        raise ValueError(f"max_lr must be above 0, got {max_lr!r}")
    c = sqrt(1 - beta2**t)  # bias correction, folded into lr and eps
    decay = lr * min(1.0, lr / max_lr) * weight_decay
    return lr * c / (1 - beta1**t), 1 - beta1, 1 - beta2, eps * c, decay


adamc = Rule(update, scalars, state=("m", "v"), name="adamc", follows={"max_lr": "lr"})
