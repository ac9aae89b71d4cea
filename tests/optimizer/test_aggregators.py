"""The methods that weigh tasks, against their definitions: in the space of the
gradients where they work on the Gram matrix, with other algorithms (scipy's); and
against TorchJD."""

import itertools

import numpy as np
import pytest

import fastopt
from fastopt import multitask

optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")


def drawn(seed):
    """Gradients of some tasks: at random, now and then in fewer dimensions; of very
    different lengths; two of them equal but for their length, or opposite; one
    zero, or a combination of others; all near one direction."""
    rng = np.random.default_rng(seed)
    kind, count = seed % 8, int(rng.integers(2, 7))
    J = rng.standard_normal((count, int(rng.integers(2, 12))))
    if kind == 1:
        J *= 10.0 ** rng.uniform(-4, 4, (count, 1))
    elif kind == 2:
        J[-1] = J[0] * rng.uniform(0.1, 3)
    elif kind == 3:
        J[-1] = -J[0] * rng.uniform(0.1, 3)
    elif kind == 4:
        J[rng.integers(count)] = 0
    elif kind == 5:
        J += 3 * rng.standard_normal(J.shape[1])
    elif kind == 6:
        J[-1] = -J[:-1].mean(0)
    elif kind == 7:
        J = rng.standard_normal((count, count + 3))
    return J


def generic(seed):
    """Gradients that are independent, and of similar lengths."""
    return drawn(8 * seed + 7)


every_case = pytest.mark.parametrize("seed", range(24))
some_cases = pytest.mark.parametrize("seed", range(8))


def rng_of(seed):
    return np.random.default_rng([seed, 1])


METHODS = {
    "mean": multitask.mean,
    "mgda": multitask.mgda,
    "dualproj": multitask.dualproj,
    "upgrad": multitask.upgrad,
    "pcgrad": lambda G: multitask.pcgrad(G, rng_of(0)),
    "gradvac": lambda G: multitask.GradVac(rng_of(0))(G),
    "cagrad": multitask.cagrad,
    "imtl_g": multitask.imtl_g,
    "aligned_mtl": multitask.aligned_mtl,
    "nash_mtl": multitask.nash_mtl,
    "fairgrad": multitask.fairgrad,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# Those of which the definition says so.
PEACEFUL = ["mgda", "dualproj", "upgrad", "nash_mtl", "fairgrad"]


def test_no_method_is_forgotten():
    names = {name.lower() for name in multitask.__all__} - {"gram"}
    assert names == METHODS.keys()


def conflict(J, weights):
    """How far the direction goes against the task that it is worst for, of all that
    its parts are long; 0 is no conflict."""
    norms = np.linalg.norm(J, axis=1)
    there = norms > 0
    size = np.abs(weights) @ norms
    along = J[there] @ (weights @ J) / norms[there]
    return max(0.0, -along.min()) / (size or 1.0)


def close(a, b, scale, within=1e-8):
    """Equal, relative to the size of what they are made of."""
    return np.abs(a - b).max() <= within * scale


# What all have in common --------------------------------------------------------------


@every_method
@some_cases
def test_the_size_of_the_gradients_does_not_matter(method, seed):
    J = generic(seed)
    expected = method(J @ J.T)
    assert expected.dtype == np.float64 and expected.shape == (len(J),)
    for c in (1e-8, 1e-5, 1e-3, 7.0, 1e4, 1e8, 1e-100, 1e100):
        found = method((c * J) @ (c * J).T)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=c)
    small = (1e-8 * J).astype(np.float32)  # where J @ J.T in float32 would be 1e-16
    found = method(fastopt.gram(small))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@every_method
@every_case
def test_always_an_answer_or_an_error(method, seed):
    """Also for tasks that are dependent, opposite or zero."""
    J = drawn(seed)
    try:
        weights = method(J @ J.T)
    except ValueError as error:
        assert method is multitask.imtl_g and "no weights for the Gram" in str(error)
    else:
        assert np.isfinite(weights).all()


@every_method
def test_one_task(method):
    expected = 1.5 if method is multitask.cagrad else 1.0
    for size in (1e-16, 1.0, 3e16):
        np.testing.assert_allclose(method([[size]]), [expected], rtol=1e-12)


@every_method
def test_zero_gradients(method):
    summed = method in (METHODS["pcgrad"], METHODS["gradvac"])
    expected = [1.0] * 3 if summed else [1 / 3] * 3
    assert method(np.zeros((3, 3))).tolist() == expected


@every_method
def test_equal_tasks_have_equal_weights(method):
    weights = method(np.eye(4) + 0.3)
    np.testing.assert_allclose(weights, weights[0], rtol=1e-12)


@every_method
def test_two_opposite_tasks_stand_still(method):
    """Or, of those that keep no balance, do not move against the longer one."""
    J = np.array([[1.0, 2.0], [-2.0, -4.0]])
    weights = method(J @ J.T)
    if method in (METHODS["mean"], METHODS["aligned_mtl"], METHODS["cagrad"]):
        return
    assert close(weights @ J, 0, np.abs(weights) @ np.linalg.norm(J, axis=1), 1e-3)


@pytest.mark.parametrize(
    ("gram", "error", "words"),
    [
        ([[1.0, np.nan], [np.nan, 1.0]], ValueError, r"gram\[0\] is not finite.*leave"),
        ([[1.0, 0.0], [0.0, np.inf]], ValueError, r"gram\[1\] is not finite"),
        ([[1.0, 2.0]], ValueError, r"must be a square matrix.*got shape \(1, 2\)"),
        ([1.0, 2.0], ValueError, r"must be a square matrix.*got shape \(2,\)"),
        (np.zeros((0, 0)), ValueError, r"got shape \(0, 0\)"),
        ([[1.0, 0.5], [0.4, 1.0]], ValueError, "must be symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], ValueError, "gram has the eigenvalue -1"),
        ([[-1.0]], ValueError, "gram has the eigenvalue -1"),
        ([[0.0, 1.0], [1.0, 0.0]], ValueError, "gram has the eigenvalue -1"),
        ([["a"]], TypeError, "must be a matrix of numbers"),
        (None, ValueError, "must be a square matrix"),
    ],
)
@every_method
def test_what_is_no_gram_matrix_is_refused(method, gram, error, words):
    with pytest.raises(error, match=words):
        method(gram)


@every_method
@some_cases
def test_products_of_float32(method, seed):
    """As of ``J @ J.T`` in float32, which may have eigenvalues a little below zero."""
    kind = generic if method is multitask.imtl_g else drawn
    J = kind(seed).astype(np.float32)
    weights = method(J @ J.T)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("name", PEACEFUL)
@every_case
def test_no_conflict(name, seed):
    J = drawn(seed)
    weights = METHODS[name](J @ J.T)
    assert (weights >= 0).all()
    assert conflict(J, weights) <= 1e-12


def test_a_conflict_would_be_noticed():
    J = generic(0)
    J[1] = -J[0] + 0.1
    assert conflict(J, METHODS["mean"](J @ J.T) * [1, 0, 0, 0, 0, 0][: len(J)]) > 0.1


def test_preferences():
    """They count as they are, and are looked at."""
    G = np.eye(3)
    for method in (multitask.mean, multitask.dualproj, multitask.upgrad):
        assert method(G, [3, 0, 0.5]).tolist() == [3, 0, 0.5]
    np.testing.assert_allclose(multitask.aligned_mtl(G, [3, 0, 0.5]), [3, 0, 0.5])
    for method in (
        multitask.mean,
        multitask.dualproj,
        multitask.upgrad,
        multitask.aligned_mtl,
    ):
        with pytest.raises(ValueError, match="preference must be at least 0"):
            method(G, [1, -1, 1])
        with pytest.raises(ValueError, match="and not all 0"):
            method(G, [0, 0, 0])
        with pytest.raises(ValueError, match=r"preference has shape \(2,\)"):
            method(G, [1, 1])
        with pytest.raises(ValueError, match=r"preference\[1\] must be finite"):
            method(G, [1, np.nan, 1])


# One by one ---------------------------------------------------------------------------


@every_case
def test_mgda_is_the_shortest(seed):
    """A sum of 1, nothing below 0, and no task along which the direction is shorter
    than it is long: that is all there is to the least of a convex function. And scipy's
    non-negative least squares, of the gradients themselves, has none shorter."""
    J = drawn(seed)
    norms = np.linalg.norm(J, axis=1)
    weights = multitask.mgda(J @ J.T)
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1, rel=1e-14)
    d = weights @ J
    there = norms > 0
    lacking = (d @ d - J[there] @ d) / norms[there]
    assert lacking.max() <= 1e-13 * (weights @ norms)
    scale = norms.max()
    stacked = np.vstack([J.T / scale, np.ones(len(J))])
    x, _ = optimize.nnls(stacked, np.append(np.zeros(J.shape[1]), 1.0))
    other = (x / x.sum()) @ J
    assert np.linalg.norm(d) <= np.linalg.norm(other) + 1e-10 * scale


def projected(J, g):
    """The nearest to g of all that conflict with no gradient (Moreau), by scipy."""
    norms = np.linalg.norm(J, axis=1)
    units = J[norms > 0] / norms[norms > 0, None]
    z, _ = optimize.nnls(units.T, -g, maxiter=1000)
    return g + z @ units


@every_case
def test_dualproj_is_the_projection_of_the_mean(seed):
    J = drawn(seed)
    scale = np.linalg.norm(J, axis=1).max()
    weights = multitask.dualproj(J @ J.T)
    assert close(weights @ J, projected(J, J.mean(0)), scale)
    counts = np.random.default_rng(seed).uniform(0, 2, len(J))
    counts[0] = 0
    weights = multitask.dualproj(J @ J.T, counts)
    assert close(weights @ J, projected(J, counts @ J), 2 * len(J) * scale)


@every_case
def test_upgrad_is_the_mean_of_projections(seed):
    J = drawn(seed)
    scale = np.linalg.norm(J, axis=1).max()
    weights = multitask.upgrad(J @ J.T)
    wanted = np.mean([projected(J, g) for g in J], axis=0)
    assert close(weights @ J, wanted, scale)
    counts = np.random.default_rng(seed).uniform(0, 2, len(J))
    weights = multitask.upgrad(J @ J.T, counts)
    wanted = sum(c * projected(J, g) for c, g in zip(counts, J, strict=True))
    assert close(weights @ J, wanted, 2 * len(J) * scale)


@every_case
def test_upgrad_is_linear_in_the_length_of_each_gradient(seed):
    J, rng = drawn(seed), np.random.default_rng(seed)
    a, b = rng.uniform(0.1, 3, (2, len(J)))

    def direction(lengths):
        scaled = lengths[:, None] * J
        return multitask.upgrad(scaled @ scaled.T) @ scaled

    scale = 6 * np.linalg.norm(J, axis=1).max()
    assert close(direction(a) + direction(b), direction(a + b), scale)


@every_case
def test_pcgrad_takes_away_what_conflicts(seed):
    """Yu et al., algorithm 1, on the gradients themselves."""
    J = drawn(seed)
    weights = multitask.pcgrad(J @ J.T, rng_of(seed))
    rng, total = rng_of(seed), 0
    for i, g in enumerate(J):
        for j in rng.permutation([j for j in range(len(J)) if j != i]):
            if g @ J[j] < 0:
                g = g - (g @ J[j]) / (J[j] @ J[j]) * J[j]
        total = total + g
    assert close(weights @ J, total, len(J) * np.linalg.norm(J, axis=1).max())
    if len(J) == 2:
        assert conflict(J, weights) <= 1e-12


def test_pcgrad_draws_the_orders():
    J = generic(0)[:4]
    J[1:] -= 0.7 * J[0]
    J[3] -= J[1]
    rng = np.random.default_rng(0)
    several = {multitask.pcgrad(J @ J.T, rng).round(9).tobytes() for _ in range(20)}
    assert len(several) > 1
    again = [multitask.pcgrad(J @ J.T, np.random.default_rng(5)) for _ in range(2)]
    assert (again[0] == again[1]).all()
    for wrong in (None, 3, np.random):
        with pytest.raises(TypeError, match="rng must be a NumPy Generator"):
            multitask.pcgrad(J @ J.T, wrong)
        with pytest.raises(TypeError, match="rng must be a NumPy Generator"):
            multitask.GradVac(wrong)


@some_cases
def test_gradvac_brings_gradients_to_their_usual_angle(seed):
    """Wang et al., algorithm 1, on the gradients themselves, several steps."""
    beta, count = 0.3, 3
    weigh = multitask.GradVac(rng_of(seed), beta)
    rng, targets = rng_of(seed), np.zeros((count, count))
    for step in range(4):
        J = np.random.default_rng([seed, step]).standard_normal((count, 6))
        J += 1.0 if step < 2 else 0.0  # so that they conflict less at first
        total = 0
        for i, g in enumerate(J):
            for j in rng.permutation([j for j in range(count) if j != i]):
                length, other = np.linalg.norm(g), np.linalg.norm(J[j])
                phi, target = g @ J[j] / (length * other), targets[i, j]
                if phi < target:
                    missing = target * np.sqrt(1 - phi**2) - phi * np.sqrt(
                        1 - target**2
                    )
                    g = g + length * missing / (other * np.sqrt(1 - target**2)) * J[j]
                    angle = g @ J[j] / (np.linalg.norm(g) * other)
                    assert angle == pytest.approx(target, abs=1e-9)
                targets[i, j] = (1 - beta) * target + beta * phi
            total = total + g
        weights = weigh(J @ J.T)
        assert close(weights @ J, total, 10 * np.linalg.norm(J, axis=1).max())
        np.testing.assert_allclose(weigh.targets, targets, rtol=1e-9, atol=1e-12)


def test_gradvac_refuses():
    weigh = multitask.GradVac(rng_of(0))
    weigh(np.eye(3))
    targets = weigh.targets
    with pytest.raises(
        ValueError, match="gram is of 2 tasks, but the targets are of 3"
    ):
        weigh(np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        weigh(np.full((3, 3), np.nan))
    assert weigh.targets is targets
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\)"):
        multitask.GradVac(rng_of(0), beta=1.0)


@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
@every_case
def test_cagrad_is_best_for_the_worst_task(seed, c):
    """Within the ball; and by duality no direction there is better for the worst task
    than any mean of the gradients allows. SLSQP, of the dual, finds no better mean."""
    J = drawn(seed)
    scale = np.linalg.norm(J, axis=1).max()
    J = J / scale
    mean = J.mean(0)
    radius = c * np.linalg.norm(mean)
    weights = multitask.cagrad(J @ J.T, c)
    d = weights @ J
    assert np.linalg.norm(d - mean) <= radius * (1 + 1e-9) + 1e-12
    more = np.maximum(weights - 1 / len(J), 0.0)
    means = [*np.eye(len(J)), multitask.mgda(J @ J.T)]
    if more.any():
        means.append(more / more.sum())
    bound = min(w @ J @ mean + radius * np.linalg.norm(w @ J) for w in means)
    assert (J @ d).min() >= bound - 1e-7
    if seed % 8 == 7:
        found = optimize.minimize(
            lambda w: w @ J @ mean + radius * np.linalg.norm(w @ J),
            np.full(len(J), 1 / len(J)),
            method="SLSQP",
            bounds=[(0, 1)] * len(J),
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert (J @ d).min() == pytest.approx(found.fun, abs=1e-6)


def test_cagrad_without_a_radius_is_the_mean():
    G = generic(1) @ generic(1).T
    assert (multitask.cagrad(G, 0.0) == 1 / len(G)).all()
    for c in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="c must be"):
            multitask.cagrad(G, c)


@every_case
def test_imtl_g_is_as_long_along_each(seed):
    J = drawn(seed)
    norms = np.linalg.norm(J, axis=1)
    there = norms > 0
    try:
        weights = multitask.imtl_g(J @ J.T)
    except ValueError:
        assert np.linalg.matrix_rank(J) < len(J)
        return
    along = J[there] @ (weights @ J) / norms[there]
    assert weights.sum() == pytest.approx(1, abs=1e-9 * np.abs(weights).sum())
    assert np.ptp(along) <= 1e-8 * (np.abs(weights) @ norms)


def test_imtl_g_of_dependent_tasks():
    """Of several the least squares; where only standing still is equal, that; and where
    there is nothing, an error."""
    a, b = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
    J = np.array([a, 2 * a, b])
    weights = multitask.imtl_g(J @ J.T)
    wanted = np.linalg.pinv(J @ J.T) @ np.linalg.norm(J, axis=1)
    np.testing.assert_allclose(weights, wanted / wanted.sum(), rtol=1e-9)
    J = np.array([a, -3 * a])
    np.testing.assert_allclose(multitask.imtl_g(J @ J.T) @ J, 0, atol=1e-9)
    J = np.array([a, a + b, a + b + b, a + 4 * b])  # on a line, not through zero
    with pytest.raises(ValueError, match="IMTL-G has no solution"):
        multitask.imtl_g(J @ J.T)


@every_case
def test_aligned_mtl_makes_gradients_orthogonal(seed):
    """By the singular value decomposition of the gradients themselves."""
    J = drawn(seed)
    if seed % 8 == 1:  # of which the Gram matrix has not the least singular value
        J /= np.linalg.norm(J, axis=1)[:, None]
    u, s, v = np.linalg.svd(J, full_matrices=False)
    there = s > 1e-6 * s[0]
    balanced = s[there][-1] * u[:, there] @ v[there]
    scale = np.linalg.norm(J, axis=1).max()
    weights = multitask.aligned_mtl(J @ J.T)
    assert close(weights @ J, balanced.mean(0), scale, 1e-6)
    for k, row in enumerate(balanced):
        alone = multitask.aligned_mtl(J @ J.T, np.eye(len(J))[k])
        assert close(alone @ J, row, scale, 1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 8.0])
@every_case
def test_fairgrad_is_where_its_equation_holds(seed, alpha):
    """``G @ w = w ** (-1 / alpha)``, of the gradients over the root of the norm of G,
    for tasks that are not lost."""
    J = drawn(seed)
    J = J / np.linalg.norm(J, axis=1).max()
    G = J @ J.T
    weights = multitask.fairgrad(G, alpha)
    norms = np.linalg.norm(J, axis=1)
    there = norms > 0
    assert (weights[there] > 0).all() and not weights[~there].any()
    units = J[there] / norms[there, None]
    shortest = multitask.mgda(units @ units.T) @ units
    if shortest @ shortest > 1e-5:
        G = G / np.linalg.norm(G)
        gains = (G @ weights)[there]
        wanted = weights[there] ** (-1 / alpha)
        size = (np.abs(G) @ weights)[there]
        assert (np.abs(gains - wanted) <= 1e-9 * wanted + 1e-13 * size).all()
        if alpha == 1:
            assert (weights == multitask.nash_mtl(J @ J.T)).all()
            squared = (weights @ J) @ (weights @ J)
            wanted = np.count_nonzero(there) * np.linalg.norm(J @ J.T)
            assert squared == pytest.approx(wanted, rel=1e-8)


def test_fairgrad_refuses():
    for alpha in (0, -1.0, np.inf):
        with pytest.raises(ValueError, match="alpha must be"):
            multitask.fairgrad(np.eye(2), alpha)


def test_many_tasks():
    """More than two tiles of the kernel; the solvers still find the least."""
    J = np.random.default_rng(0).standard_normal((40, 30))
    G = fastopt.gram(J)
    np.testing.assert_allclose(G, J @ J.T, rtol=1e-12, atol=1e-12)
    for name, method in METHODS.items():
        if name != "imtl_g":
            assert np.isfinite(method(G)).all()
    weights = multitask.upgrad(G)
    assert conflict(J, weights) <= 1e-11


# TorchJD ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jd():
    pytest.importorskip("torchjd", reason="torchjd is not installed")
    from torchjd import aggregation

    return aggregation


def theirs(weighting, G):
    import torch

    found = weighting(torch.from_numpy(np.array(G, np.float64)))
    return found.detach().numpy()


@some_cases
def test_torchjd_agrees(jd, seed):
    """Where it has no thresholds. Its MGDA, by Frank and Wolfe's iteration, comes near
    our answer from above; of two tasks it is there at once."""
    J = generic(seed)
    G = J @ J.T

    def same(ours, weighting, within=1e-7):
        np.testing.assert_allclose(ours, theirs(weighting, G), rtol=within, atol=within)

    same(multitask.mean(G), jd.MeanWeighting())
    same(multitask.imtl_g(G), jd.IMTLGWeighting())
    same(multitask.aligned_mtl(G), jd.AlignedMTLWeighting())
    ours, other = multitask.mgda(G), theirs(jd.MGDAWeighting(1e-9, 300), G)
    assert -1e-12 <= other @ G @ other - ours @ G @ ours <= 0.01 * G.trace()
    other = theirs(jd.MGDAWeighting(1e-9, 300), G[:2, :2])
    np.testing.assert_allclose(multitask.mgda(G[:2, :2]), other, atol=1e-9)


@some_cases
def test_torchjd_projects_alike(jd, seed):
    pytest.importorskip("quadprog", reason="quadprog is not installed")
    pytest.importorskip("qpsolvers", reason="qpsolvers is not installed")
    import torch
    from torchjd.linalg import QuadprogProjector

    J = generic(seed)
    counts = np.random.default_rng(seed).uniform(0.1, 2, len(J))
    for prefer in (None, counts):
        given = None if prefer is None else torch.from_numpy(prefer)
        for ours, name in (
            (multitask.upgrad, "UPGradWeighting"),
            (multitask.dualproj, "DualProjWeighting"),
        ):
            projector = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
            weighting = getattr(jd, name)(given, projector=projector)
            other = theirs(weighting, J @ J.T)
            np.testing.assert_allclose(ours(J @ J.T, prefer), other, atol=1e-7)
            # What is not right there: where gradients are small, it is the mean.
            tiny = 1e-10 * (J @ J.T)
            other = theirs(getattr(jd, name)(given), tiny)
            np.testing.assert_allclose(ours(tiny, prefer), ours(J @ J.T, prefer))
            mean = multitask.mean(tiny, prefer)
            np.testing.assert_allclose(other, mean, atol=1e-6)


@some_cases
def test_torchjd_takes_away_alike(jd, seed):
    """Of two tasks, where the order does not matter."""
    J = generic(seed)[:2]
    if seed % 2:
        J[1] = -J[0] + 0.3 * J[1]
    other = theirs(jd.PCGradWeighting(), J @ J.T)
    np.testing.assert_allclose(multitask.pcgrad(J @ J.T, rng_of(0)), other, rtol=1e-9)
    ours = multitask.GradVac(rng_of(0), beta=0.25)
    weighting = jd.GradVacWeighting(0.25, 0.0)
    for step in range(4):
        K = np.random.default_rng([seed, step]).standard_normal((2, 5)) + 0.5
        np.testing.assert_allclose(ours(K @ K.T), theirs(weighting, K @ K.T), rtol=1e-9)


@some_cases
def test_torchjd_is_as_fair(jd, seed):
    J = generic(seed)
    G = J @ J.T
    for alpha in (1.0, 2.0):
        other = theirs(jd.FairGradWeighting(alpha), G)
        ours = multitask.fairgrad(G, alpha)
        size = np.linalg.norm(G) ** (alpha / (1 + alpha))  # theirs are of G as it is
        np.testing.assert_allclose(ours, other * size, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
@some_cases
def test_torchjd_solves_alike(jd, seed):
    """CAGrad to what its solver leaves, which was 2e-4 at the most; Nash-MTL but for
    its length."""
    for module in ("cvxpy", "clarabel", "ecos"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    import torch
    from torchjd.aggregation import CAGrad, NashMTL

    J = generic(seed)
    tensor = torch.from_numpy(np.array(J, np.float64))
    for c in (0.2, 0.5, 0.9):
        ours = J.T @ multitask.cagrad(J @ J.T, c)
        size = np.abs(ours).max()
        np.testing.assert_allclose(ours, CAGrad(c=c)(tensor), atol=2e-3 * size, rtol=0)
    ours = J.T @ multitask.nash_mtl(J @ J.T)
    other = NashMTL(n_tasks=len(J), optim_niter=100, max_norm=0)(tensor).numpy()
    ours, other = ours / np.linalg.norm(ours), other / np.linalg.norm(other)
    np.testing.assert_allclose(ours, other, atol=1e-6)


def test_all_orders_of_three_tasks(jd):
    """What TorchJD draws is among what we can draw."""
    J = np.array([[1.0, 0.2, 0], [-1, 0.5, 0.3], [0.1, -1, 0.4]])
    ours = set()
    for seed in range(60):
        ours.add(tuple(multitask.pcgrad(J @ J.T, rng_of(seed)).round(9)))
    found = {tuple(theirs(jd.PCGradWeighting(), J @ J.T).round(9)) for _ in range(20)}
    assert found <= ours and len(list(itertools.islice(ours, 2))) == 2


@pytest.mark.parametrize("c", [1e-6, 1e-5, 1e-4, 1e-3, 0.5])
def test_cagrad_near_the_mean(c):
    """A little c, and tasks of sizes that are far apart: always within c of the mean,
    and no worse for the worst task than the mean is."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        J = rng.normal(size=(3, 50)) * 10.0 ** rng.integers(-4, 4, size=(3, 1))
        direction, mean = J.T @ multitask.cagrad(J @ J.T, c), J.mean(0)
        length = np.linalg.norm(mean)
        assert np.linalg.norm(direction - mean) <= c * length * (1 + 1e-6)
        gains, before = J @ direction, J @ mean
        assert gains.min() >= before.min() - 1e-9 * np.abs(before).max()
    for J in ([[1.0], [2.0]], [[1.0, 0, 2], [0, 1, 1]]):
        J = np.array(J)
        assert multitask.cagrad(J @ J.T, c).sum() > 0


def test_cagrad_where_the_matrix_is_nearly_singular():
    gram = [
        [1.8323729178738534e-14, 2.605846117158478, 2.847301572839484, -3.2698712939],
        [2.605846117158478, 370581442242064.0, 404919199339192.0, -465013498716576.0],
        [2.847301572839484, 404919199339192.0, 442438663419076.0, -508101248791728.0],
        [-3.2698712939, -465013498716576.0, -508101248791728.0, 583508857541184.0],
    ]
    assert np.isfinite(multitask.cagrad(gram)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_task_whose_gradient_is_not_finite_is_named(bad):
    J = np.array([[1.0, 1], [1, 2], [bad, 1]])
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match=r"gram\[2\] is not"),
    ):
        multitask.upgrad(J @ J.T)


@pytest.mark.parametrize("method", [multitask.nash_mtl, multitask.fairgrad])
def test_many_tasks_that_are_nearly_one(method):
    """A matrix that is singular, as rounded, at each step on the way."""
    rng = np.random.default_rng(0)
    for spread in (1e-6, 1e-8, 1e-10, 1e-12):
        for _ in range(20):
            J = rng.normal(size=50) * (1 + spread * rng.normal(size=(8, 1)))
            weights = method(J @ J.T)
            assert np.isfinite(weights).all() and (weights > 0).all()
