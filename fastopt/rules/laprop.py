"""LaProp: the momentum of normalised gradients. Ziyin et al. 2020, arXiv:2002.04839. As
the authors' code, the momentum holds the learning rates, whose average corrects it for
bias; weight decay comes after the step, here times the learning rate (as in timm).
"""

from fastopt.rule import Rule, sqrt


def scalars(
    t, lr_average, lr=4e-4, beta1=0.9, beta2=0.999, eps=1e-15, weight_decay=0.0
):
    c = sqrt(1 - beta2**t)  # bias correction, folded into the step and eps
    lr_average = beta1 * lr_average + (1 - beta1) * lr
    correction = lr / lr_average if lr != 0 else 1.0
    taken, keep = (1 - beta1) * lr * c, 1 - lr * weight_decay
    return beta1, taken, 1 - beta2, eps * c, correction, keep, lr_average


def update(p, g, m, v, beta1, taken, a2, eps, correction, keep):
    v = v + a2 * (g * g - v)
    m = beta1 * m + taken * g / (sqrt(v) + eps)
    return keep * (p - correction * m), m, v


laprop = Rule(update, scalars, state=("m", "v"), carry={"lr_average": 0.0})
