"""Rules as methods of scipy.optimize.minimize: what is found, why it ended, and what
was counted on the way."""

import inspect
import pickle
import warnings

import numpy as np
import pytest
from cases import same_bits

import fastopt

scipy = pytest.importorskip("scipy", reason="scipy is not installed")
from scipy.optimize import (  # noqa: E402
    Bounds,
    LinearConstraint,
    OptimizeWarning,
    basinhopping,
    minimize,
    rosen,
    rosen_der,
)
from scipy.sparse import coo_array, csr_array  # noqa: E402

import fastopt.scipy as methods  # noqa: E402

X0 = np.array([-1.2, 1.0])
NUMBER = "the objective must return a number, got "
DENSE = "the gradient must be a dense array of numbers, got "


def bowl(x):
    """Ellipses around (1, -2, 0.5); the minimum is 3."""
    d = x - np.array([1.0, -2.0, 0.5], x.dtype)
    scales = np.array([1.0, 4.0, 0.25], x.dtype)
    return 3 + 0.5 * (scales * d * d).sum(), scales * d


def run(rule=methods.sgd, fun=bowl, x0=(0.0, 0.0, 0.0), jac=True, **options):
    """With options where nobody interferes, if no others are given."""
    given = {"lr": 0.2, "maxiter": 20, "gtol": 0.0, **options}
    keywords = {k: given.pop(k) for k in ("tol", "callback", "args") if k in given}
    return minimize(fun, x0, jac=jac, method=rule, options=given, **keywords)


# What is found ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [rule.name for rule in fastopt.RULES])
def test_every_rule_does_its_own_steps(name):
    rule, method = getattr(fastopt, name), getattr(methods, name)
    assert name in dir(methods)
    lr = 0.7 * rule.hyperparameters["lr"]
    x = np.zeros(3)
    opt, passed = rule(x, lr=lr, threads=1), [x.copy()]
    for _ in range(7):
        opt.step(bowl(x)[1], clip_norm=2.0, clip_value=1.5)
        passed.append(x.copy())
    got = run(
        method,
        lr=lr,
        maxiter=7,
        clip_norm=2.0,
        clip_value=1.5,
        threads=1,
        return_all=True,
        best=False,
    )
    assert got.nit == 7 and len(got.allvecs) == 8
    assert all(map(same_bits, passed, got.allvecs))
    assert (x != 0).any()
    assert same_bits(got.x, opt.eval_params())
    assert got.fun == bowl(got.x)[0] and same_bits(got.jac, bowl(got.x)[1])
    last = rule.evaluate is not None
    assert got.nfev == got.njev == 8 + last


def test_rosenbrock():
    got = minimize(rosen, X0, jac=rosen_der, method=methods.adam, options={"lr": 0.05})
    assert got.success and got.status == 0 and "gtol" in got.message
    np.testing.assert_allclose(got.x, 1, atol=1e-4)
    assert np.abs(got.jac).max() <= 1e-5
    assert got.fun == rosen(got.x) and same_bits(got.jac, rosen_der(got.x))
    assert got.nfev == got.njev == got.nit + 1
    assert same_bits(X0, np.array([-1.2, 1.0]))


def test_least_squares():
    """A linear model of diabetes: its optimum is known in closed form."""
    from sklearn.datasets import load_diabetes

    a, b = load_diabetes(return_X_y=True)
    a, b = np.c_[a * 20, np.ones(len(a))], (b - b.mean()) / b.std()
    wanted = np.linalg.lstsq(a, b, rcond=None)[0]

    def loss(x, a, b):
        residuals = a @ x - b
        return residuals @ residuals / len(b), 2 * a.T @ residuals / len(b)

    for method, options in {
        methods.adam: {"lr": 0.05},
        methods.sgd: {"lr": 0.1, "momentum": 0.9},
    }.items():
        got = minimize(
            loss, np.zeros(11), (a, b), method, True, tol=1e-7, options=options
        )
        assert got.success, got
        np.testing.assert_allclose(got.x, wanted, atol=1e-4)


def test_basinhopping():
    """The lowest of many valleys."""

    def valleys(x):
        value = np.cos(14.5 * x[0] - 0.3) + (x[0] + 0.2) * x[0]
        return value, np.array([-14.5 * np.sin(14.5 * x[0] - 0.3) + 2 * x[0] + 0.2])

    # Each local minimization reports what it did.
    kwargs = {"method": methods.adam, "jac": True, "options": {"lr": 0.01}}
    got = basinhopping(valleys, [1.0], minimizer_kwargs=kwargs, niter=30, rng=3)
    assert got.fun == pytest.approx(-1.0009, abs=1e-4)
    np.testing.assert_allclose(got.x, -0.195, atol=1e-3)
    assert got.minimization_failures == 0 and got.nfev == got.njev > 300


def test_a_rule_of_your_own():
    def update(p, g, lr):
        return (p - lr * g,)

    mine = fastopt.Rule(update, lambda t, lr=0.1: (lr,), name="mine")
    got = run(methods.Method(mine), backend="numpy", maxiter=5)
    assert same_bits(got.x, run(methods.gd, maxiter=5).x)


def test_a_rule_whose_hyperparameters_are_named_as_options():
    """Their values would go to the method alone."""
    options = [*inspect.signature(methods.sgd.__call__).parameters]
    assert {"clip_norm", "maxiter", "gtol", "tol", "args", "x0"} < {*options}
    rules_own = {"backend", "threads", "options"}  # which no rule, or every, may have
    for name in {*options, "self"} - rules_own:
        names = {}
        exec(f"def scalars(t, lr=0.1, {name}=2.0): return (lr * {name},)", names)
        mine = fastopt.Rule(fastopt.gd.update, names["scalars"], name="mine")
        with pytest.raises(ValueError, match=f"mine has hyper.*options.*: {name}; ren"):
            methods.Method(mine)
    mine = fastopt.Rule(fastopt.gd.update, lambda t, lr=0.1, options=2.0: (lr,))
    assert run(methods.Method(mine), options=3.0, maxiter=2).nit == 2
    for wrong in ("adam", fastopt.Muon, None):
        with pytest.raises(TypeError, match="rule must be a rule, got .*fastopt.adamw"):
            methods.Method(wrong)


def test_methods_go_to_other_processes():
    again = pickle.loads(pickle.dumps(methods.adamw))
    assert same_bits(run(again).x, run(methods.adamw).x)


# The arguments ------------------------------------------------------------------------


def test_a_gradient_of_its_own():
    """Called as often as the objective, with the same points and arguments."""
    seen = []

    def fun(x, a, b):
        seen.append(("fun", x.copy(), a, b))
        return bowl(x)[0]

    def jac(x, a, b):
        seen.append(("jac", x.copy(), a, b))
        return bowl(x)[1]

    got = run(fun=fun, jac=jac, args=(1, "b"), maxiter=3)
    assert same_bits(got.x, run(maxiter=3).x)
    assert [s[0] for s in seen] == ["fun", "jac"] * 4
    assert {s[2:] for s in seen} == {(1, "b")}
    assert all(
        same_bits(a[1], b[1]) for a, b in zip(seen[::2], seen[1::2], strict=True)
    )


def test_without_a_gradient():
    """Forward differences, n + 1 evaluations for each, and one more for none."""
    seen = []

    def fun(x, factor):
        seen.append(x.copy())
        return factor * bowl(x)[0]

    got = run(fun=fun, jac=None, args=(2.0,), maxiter=6)
    near = run(fun=lambda x: (2 * bowl(x)[0], 2 * bowl(x)[1]), maxiter=6)
    np.testing.assert_allclose(got.x, near.x, atol=1e-6)
    assert got.nfev == len(seen) == 7 * 4 and got.njev == 7
    assert got.fun == 2 * bowl(got.x)[0]
    single = run(fun=fun, jac=None, args=(2.0,), x0=np.zeros(3, np.float32), maxiter=6)
    assert single.x.dtype == np.float32 and seen[-1].dtype == np.float64
    np.testing.assert_allclose(single.x, near.x, rtol=1e-5)


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_what_is_given_is_only_read(best, apart):
    """Functions may write into x and return the same array every time; a callback may
    write into all that it gets."""
    shared = np.zeros(3)

    def rude(x):
        value, shared[:] = bowl(x)
        x[:] = np.nan
        return value, shared

    def callback(intermediate_result):
        intermediate_result.x[:] = intermediate_result.jac[:] = np.nan

    x0 = np.zeros(3)
    given = {"best": best, "return_all": True, "lr": 0.6}  # the first is the lowest
    rude_ones = {"fun": rude}
    if apart:
        rude_ones = {"fun": lambda x: rude(x)[0], "jac": lambda x: rude(x)[1]}
    got, want = run(**rude_ones, x0=x0, callback=callback, **given), run(**given)
    assert same_bits(x0, np.zeros(3))
    assert same_bits(got.x, want.x) and same_bits(got.jac, want.jac)
    assert all(map(same_bits, got.allvecs, want.allvecs))


@pytest.mark.parametrize(
    "given, worked_on",
    [
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.float16, np.float64),
        (np.longdouble, np.float64),
        (np.int64, np.float64),
        (np.bool_, np.float64),
        (">f4", np.float64),
    ],
)
def test_dtypes(given, worked_on):
    seen = set()

    def fun(x):
        seen.add(x.dtype)
        return bowl(x)

    x0 = np.array([1, 0, 1], given)
    got = run(methods.adam, fun=fun, x0=x0, lr=0.1, maxiter=4)
    assert got.x.dtype == got.jac.dtype == worked_on
    assert seen == {np.dtype(worked_on)}
    assert isinstance(got.fun, float)


def test_sizes():
    """None, one (as a number, too; a gradient likewise) and more than one dimension,
    which minimize itself does not let through."""
    assert run(fun=lambda x: (1.0, x), x0=[]).success
    for x0 in ([2.0], 2.0, np.float32(2)):
        got = run(fun=lambda x: (x @ x, 2 * x[0]), x0=x0, maxiter=3, lr=0.25)
        assert got.x.shape == (1,) and got.x[0] == got.fun / got.x[0] == 0.25
    x0 = np.ones((2, 3), order="F")
    got = methods.gd(lambda x: (x * x).sum(), x0, jac=lambda x: 2 * x, lr=0.1)
    assert got.success and got.x.shape == (2, 3)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"bounds": Bounds(0, 1)}, ValueError, "cannot keep within bounds"),
        ({"bounds": [(0, None)] * 3}, ValueError, "cannot keep within bounds"),
        (
            {"constraints": LinearConstraint(np.ones(3), 0, 1)},
            ValueError,
            "bounds or constraints",
        ),
        (
            {"constraints": {"type": "eq", "fun": lambda x: x[0]}},
            ValueError,
            "bounds or constraints",
        ),
        ({"x0": [1j, 0, 0]}, TypeError, "x0 must be of real numbers, got complex128"),
        ({"options": {"lr": -1.0}}, ValueError, "lr must be at least 0"),
        ({"options": {"gtol": -1.0}}, ValueError, "gtol must be at least 0, got -1.0"),
        ({"options": {"xtol": np.nan}}, ValueError, "xtol must be at least 0, got nan"),
        ({"options": {"ftol": -1e-9}}, ValueError, "ftol must be at least 0"),
        ({"options": {"maxiter": -1}}, ValueError, "maxiter must be at least 0"),
        ({"tol": -1.0}, ValueError, "tol must be at least 0"),
        ({"options": {"backend": "numbo"}}, ValueError, "backend must be one of"),
        ({"fun": lambda x: (x, x)}, ValueError, r"must return a number, got .* \(3,\)"),
        ({"fun": lambda x: (1.0, x[:2])}, ValueError, r"of x, \(3,\), got \(2,\)"),
        ({"options": {"clip_norm": -1.0}}, ValueError, "clip_norm"),
        ({"options": {"maxiter": "5"}}, TypeError, "maxiter must be a number, got '5'"),
        ({"options": {"gtol": "a"}}, TypeError, "gtol must be a number, got 'a'"),
        ({"options": {"xtol": [1]}}, TypeError, r"xtol must be a number, got \[1\]"),
        ({"options": {"ftol": 1j}}, TypeError, "ftol must be a number, got 1j"),
        ({"tol": "1"}, TypeError, "tol must be a number, got '1'"),
        *(
            ({"fun": lambda x, f=f: f, "jac": rosen_der}, TypeError, f"{NUMBER}{words}")
            for f, words in ((None, "None"), (1j, "1j"), ("1.5", "'1.5'"), ({}, "{}"))
        ),
        *(
            ({"fun": rosen, "jac": lambda x, g=g: g}, TypeError, f"{DENSE}{words}")
            for g, words in (
                (None, "None"),
                (1j * np.ones(3), "array"),
                (["1", "2", "3"], r"\['1'"),
                ([1.0, None, 2.0], r"\[1.0, None"),
                ([[1.0], [1.0, 2.0]], r"\[\[1.0\]"),
                (csr_array(np.ones((1, 3))), "a sparse csr_array; return"),
                (coo_array(np.ones(3)), "a sparse coo_array; return"),
            )
        ),
    ],
)
def test_refusals(wrong, error, message):
    with pytest.raises(error, match=message):
        given = {"fun": bowl, "x0": np.zeros(3), "jac": True, "method": methods.sgd}
        minimize(**{**given, **wrong})


def test_warnings_are_where_minimize_was_called():
    hess, hessp = lambda x: np.eye(3), lambda x, p: p
    for keywords, options, category, message in [
        ({"hess": hess}, {}, RuntimeWarning, "sgd does not use the Hessian"),
        ({"hessp": hessp}, {}, RuntimeWarning, "sgd does not use the Hessian"),
        ({}, {"iprint": 1}, OptimizeWarning, "Unknown solver options: iprint"),
    ]:
        given = {"jac": True, "method": methods.sgd, **keywords}
        with pytest.warns(category, match=message) as record:
            got = minimize(bowl, [0, 0, 0], options={"maxiter": 3, **options}, **given)
        assert record[0].filename == __file__ and len(record) == 1
        assert got.nit == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


# Why it ended -------------------------------------------------------------------------


def test_maxiter():
    got = run(maxiter=5)
    assert (got.success, got.status, got.nit) == (False, 1, 5)
    assert "Maximum number of iterations" in got.message
    at_once = run(maxiter=0)
    assert (
        at_once.nit == 0 and at_once.nfev == 1 and at_once.fun == bowl(np.zeros(3))[0]
    )
    slow = run(lr=1e-12, maxiter=None)
    assert slow.nit == 10_000 and slow.status == 1


@pytest.mark.parametrize("name", ["gtol", "tol"])
def test_gtol(name):
    """The first point whose gradient is small enough, in its largest element."""
    got = run(maxiter=1000, **{"gtol": None, name: 0.1})
    assert got.success and got.status == 0 and "gtol" in got.message
    path = run(maxiter=got.nit + 5, return_all=True).allvecs
    slopes = [np.abs(bowl(x)[1]).max() for x in path]
    assert got.nit == next(i for i, s in enumerate(slopes) if s <= 0.1) > 3
    assert same_bits(got.x, path[got.nit])
    assert np.linalg.norm(got.jac) > slopes[got.nit] > 0.01
    both = run(maxiter=1000, gtol=0.1, tol=1e-9)
    assert both.nit == got.nit


def test_xtol():
    """Relative to the largest element of x, if that is above 1."""
    got = run(maxiter=1000, xtol=0.01)
    assert got.success and got.status == 0 and "xtol" in got.message
    path = run(maxiter=got.nit + 5, return_all=True).allvecs
    steps = [
        np.abs(b - a).max() / max(np.abs(b).max(), 1)
        for a, b in zip(path[:-1], path[1:], strict=True)
    ]
    assert got.nit == 1 + next(i for i, s in enumerate(steps) if s <= 0.01) > 3
    assert np.abs(got.x - path[got.nit - 1]).max() > 0.01


def test_ftol():
    """Relative to the objective, if that is above 1."""
    got = run(maxiter=1000, ftol=0.01)
    assert got.success and got.status == 0 and "ftol" in got.message
    path = run(maxiter=got.nit + 5, return_all=True).allvecs
    values = [bowl(x)[0] for x in path]
    changes = [
        abs(b - a) / max(a, b) for a, b in zip(values[:-1], values[1:], strict=True)
    ]
    assert got.nit == 1 + next(i for i, c in enumerate(changes) if c <= 0.01) > 3
    assert abs(got.fun - values[got.nit - 1]) > 0.01


def test_small_numbers_are_measured_absolutely():
    def small(x):
        return 1e-3 * (bowl(x)[0] - 3), bowl(x)[1]

    by_fun = run(fun=small, ftol=1e-3)
    assert "ftol" in by_fun.message and by_fun.nit < 5
    by_step = run(fun=lambda x: (x @ x, 2 * x), x0=[0.1, 0, 0], xtol=0.03)
    assert "xtol" in by_step.message and by_step.nit == 2


@pytest.mark.parametrize("tolerance", ["xtol", "ftol"])
def test_what_waits_has_not_converged(tolerance):
    """A step that moves nothing yet, such as a warm-up's, is not one that is small."""
    got = run(lr=lambda n: 0.2 * (n > 3), maxiter=100, **{tolerance: 0.01})
    assert got.success and got.nit > 6
    still = run(lr=0.0, maxiter=5, **{tolerance: 0.01})
    assert not still.success and still.nit == 5
    decayed = run(lr=lambda n: 0.2 * (n < 4), maxiter=100, **{tolerance: 0.0})
    assert decayed.success and decayed.nit == 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["fun", "jac"])
@pytest.mark.parametrize("best", [True, False])
def test_not_finite(value, where, best):
    """The run ends there. What is returned is the lowest point before, or that."""

    def cliff(x):
        fun, jac = bowl(x)
        if x[0] < 0.5:
            return fun, jac
        return (value, jac) if where == "fun" else (fun, jac + value)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(fun=cliff, maxiter=100, ftol=0.0, best=best)
    path = run(maxiter=10, return_all=True).allvecs
    last = next(i for i, x in enumerate(path) if x[0] >= 0.5)
    assert (got.success, got.status, got.nit) == (False, 3, last)
    assert "infinite or NaN" in got.message
    assert same_bits(got.x, path[last - best])
    assert np.isfinite(got.fun) == (best or where == "jac")
    at_once = run(fun=cliff, x0=[1.0, 0, 0])
    assert (at_once.success, at_once.status, at_once.nit) == (False, 3, 0)
    assert same_bits(at_once.x, np.array([1.0, 0, 0]))


def test_the_best_is_returned_or_the_last():
    """With a step too large it is the start that is lowest."""
    best = run(lr=0.6, maxiter=9)
    assert best.nit == 9 and same_bits(best.x, np.zeros(3))
    assert best.fun == bowl(best.x)[0] and same_bits(best.jac, bowl(best.x)[1])
    last = run(lr=0.6, maxiter=9, best=False, return_all=True)
    assert same_bits(last.x, last.allvecs[-1]) and last.fun > best.fun
    assert last.fun == bowl(last.x)[0] and same_bits(last.jac, bowl(last.x)[1])


def test_where_gtol_is_met_may_not_be_the_lowest():
    """Past the step down there is a flat place, which is higher than the one before."""

    def terrace(x):
        return (1.0, np.zeros(1)) if x[0] < -1 else (x[0], np.ones(1))

    got = run(fun=terrace, x0=[0.3], lr=0.5, gtol=1e-5)
    assert got.success and got.x[0] < -1 and got.fun == 1 and got.jac[0] == 0


def test_schedule_free_ends_at_the_parameters_to_use():
    method = methods.schedule_free_sgd
    given = {"lr": 0.4, "momentum": 0.9}
    x = np.zeros(3)
    opt = fastopt.schedule_free_sgd(x, **given)
    for _ in range(12):
        opt.step(bowl(x)[1])
    got = run(method, maxiter=12, best=False, **given)
    assert same_bits(got.x, opt.eval_params()) and not same_bits(got.x, x)
    assert got.nfev == got.njev == 14
    lowest = run(method, maxiter=12, return_all=True, **given)
    values = [bowl(x)[0] for x in [*lowest.allvecs, got.x]]
    assert lowest.fun == min(values) < got.fun
    lower = run(method, maxiter=8, return_all=True, **given)
    assert lower.fun < min(bowl(x)[0] for x in lower.allvecs)
    met = run(method, maxiter=10_000, gtol=1e-3, **given)
    assert met.success and np.abs(met.jac).max() <= 1e-3
    assert met.nfev == met.nit + 2
    # There, the gradient may not be small yet: then it is not what is returned.
    early = run(method, maxiter=10_000, gtol=0.1, return_all=True, **given)
    assert early.success and np.abs(early.jac).max() <= 0.1
    assert same_bits(early.x, early.allvecs[-1])


# Callbacks ----------------------------------------------------------------------------


def test_callbacks():
    """After every step, with the point where it led, in either of scipy's forms."""
    path = run(maxiter=4, return_all=True).allvecs
    seen = []
    run(maxiter=4, callback=seen.append)
    assert len(seen) == 4 and all(map(same_bits, seen, path[1:]))

    def callback(intermediate_result):
        results.append(intermediate_result)

    results = []
    run(maxiter=4, callback=callback)
    assert [r.nit for r in results] == [1, 2, 3, 4]
    for result, x in zip(results, path[1:], strict=True):
        assert same_bits(result.x, x)
        assert result.fun == bowl(x)[0] and same_bits(result.jac, bowl(x)[1])


def test_stop_iteration():
    def old(x):
        seen.append(x)
        if len(seen) == 3:
            raise StopIteration

    def new(*, intermediate_result):
        old(intermediate_result.x)

    for callback in (old, new):
        seen = []
        got = run(maxiter=10, callback=callback)
        assert (got.success, got.status, got.nit) == (False, 99, 3)
        assert got.message == "`callback` raised `StopIteration`."
        assert same_bits(got.x, seen[-1]) and got.nfev == 4


def test_what_a_callback_returns_means_nothing_and_its_errors_go_on():
    assert run(maxiter=4, callback=lambda x: True).nit == 4

    def callback(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(callback=callback)


def test_disp(capsys):
    assert capsys.readouterr().out == ""
    run(maxiter=4)
    assert capsys.readouterr().out == ""
    got = run(maxiter=4, disp=True)
    printed = capsys.readouterr().out
    assert got.message in printed and f"{got.fun:f}" in printed
    assert "Iterations: 4" in printed and "evaluations: 5" in printed


def test_docstring_examples():
    import doctest

    result = doctest.testmod(methods)
    assert result.attempted >= 4 and not result.failed
