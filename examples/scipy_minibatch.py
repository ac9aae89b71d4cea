"""Logistic regression through scipy.optimize.minimize: from all of the data, where BFGS
is the better choice, and from random batches of it, which no line search survives."""

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import fastopt.scipy

BATCH = 32

data, labels = load_breast_cancer(return_X_y=True)
data, labels = StandardScaler().fit_transform(data), 2.0 * labels - 1
x, x_test, y, y_test = train_test_split(data, labels, random_state=0)
rng = np.random.default_rng(0)


def loss(w, x, y):
    """The mean of log(1 + exp(-margin)), a little shrinkage, and the gradient."""
    margin = y * (x @ w[1:] + w[0])
    slope = -y / (1 + np.exp(margin)) / len(y)
    value = np.logaddexp(0, -margin).mean() + 1e-3 * w @ w
    return value, np.r_[slope.sum(), x.T @ slope] + 2e-3 * w


def of_a_batch(w, x, y):
    batch = rng.integers(0, len(y), BATCH)
    return loss(w, x[batch], y[batch])


def decay(step):
    return 0.1 * 0.995**step


RUNS = [
    ("all data", loss, "BFGS", {}),
    ("all data", loss, fastopt.scipy.adam, {"lr": 0.1}),
    ("batches", of_a_batch, "BFGS", {}),
    (
        "batches",
        of_a_batch,
        fastopt.scipy.adam,
        # The lowest value of a batch says nothing: take the last point, not the best.
        {"lr": decay, "maxiter": 1000, "best": False},
    ),
]
print(f"{'from':10}{'method':8}{'loss of all':>12}{'seen':>10}  how it ended")
for data, fun, method, options in RUNS:
    result = minimize(
        fun, np.zeros(x.shape[1] + 1), (x, y), method, jac=True, options=options
    )
    seen = result.nfev * (len(y) if fun is loss else BATCH)
    name = method if isinstance(method, str) else method.rule.name
    value = loss(result.x, x, y)[0]
    print(f"{data:10}{name:8}{value:12.4f}{seen:10}  {result.message}")

right = (np.sign(x_test @ result.x[1:] + result.x[0]) == y_test).mean()
print(f"test accuracy: {right:.3f} with the last of them")
