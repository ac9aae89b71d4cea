"""Sophia-G: momentum by a clipped estimate of the Hessian's diagonal. Liu et al. 2023,
arXiv:2305.14342. About every ten steps, call ``opt.estimate(grads)`` with the gradients
of the mean loss for labels drawn from the model's own output. As in the authors' code,
the estimate's factor is ``rho * bs``, where ``bs`` is the number of examples (tokens)
per batch. Steps before the first estimate have the maximal size. Weight decay is
decoupled.
"""

from fastopt.rule import Rule, minimum, sign


def scalars(t, lr=1e-4, beta1=0.965, beta2=0.99, rho=0.04, bs=5120.0, weight_decay=0.1):
    if rho < 0 or bs <= 0:
        raise ValueError(
            f"rho must be at least 0 and bs must be above 0, got {rho!r} and {bs!r}"
        )
    return lr, 1 - beta1, rho * bs, 1e-15, 1.0, lr * weight_decay


def update(p, g, m, h, lr, a1, factor, tiny, one, decay):
    m = m + a1 * (g - m)
    u = sign(m) * minimum(abs(m) / (factor * h + tiny), one)
    return p - (lr * u + decay * p), m, h


def estimate_scalars(
    t, lr=1e-4, beta1=0.965, beta2=0.99, rho=0.04, bs=5120.0, weight_decay=0.1
):
    return (1 - beta2,)


def hessian(h, g, a2):
    return (h + a2 * (g * g - h),)


sophia_g = Rule(
    update,
    scalars,
    state=("m", "h"),
    estimate=("h", Rule(hessian, estimate_scalars)),
)
