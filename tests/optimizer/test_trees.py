"""Trees of parameters: their types come back, and what is no tree is refused."""

import collections
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt
from fastopt.memory.trees import leaves, rebuild
from fastopt.runtime import identity


class Pair(NamedTuple):
    w: Any
    b: Any


def ones(*shape):
    return np.ones(shape)


def by_default():
    tree = collections.defaultdict(list)
    tree["w"], tree["b"] = ones(2), ones(3)
    return tree


TREES = {
    "tuple": lambda: (ones(2), ones(3)),
    "namedtuple": lambda: Pair(ones(2), ones(3)),
    "ordered": lambda: collections.OrderedDict(w=ones(2), b=ones(3)),
    "default": by_default,
    "counter": lambda: collections.Counter(w=ones(2), b=ones(3)),
    "nested": lambda: {"x": (Pair(ones(2), (ones(3),)), [ones(1)])},
    "list": lambda: [ones(2), (ones(3),)],
    "group": lambda: [{"params": Pair(ones(2), ones(3))}, {"params": (ones(1),)}],
}


def same_kind(one, other):
    if not isinstance(one, (dict, list, tuple)):
        return isinstance(other, np.ndarray) and one.shape == other.shape
    children = (one.values(), other.values()) if isinstance(one, dict) else (one, other)
    return type(one) is type(other) and all(
        same_kind(a, b) for a, b in zip(*children, strict=True)
    )


@pytest.mark.parametrize("name", TREES)
def test_types_come_back(name):
    given = TREES[name]()
    params = [g["params"] for g in given] if name == "group" else given
    opt = fastopt.schedule_free_sgd(given, lr=0.1, ema=0.5)
    opt.step(TREES[name]() if name != "group" else [Pair(ones(2), ones(3)), (ones(1),)])
    assert same_kind(params, opt.ema_params) and same_kind(params, opt.eval_params())
    if name == "group":
        return
    result = fastopt.minimize(
        lambda tree: (
            sum(float(x @ x) for _, x in leaves(tree)),
            rebuild(tree, (1 * x for _, x in leaves(tree))),
        ),
        given,
        fastopt.gd,
        3,
        lr=0.5,
    )
    assert same_kind(given, result.params)
    assert [float(x.sum()) for _, x in leaves(result.params)] == [
        float((x / 8).sum()) for _, x in leaves(given)
    ]
    stop = fastopt.EarlyStopping(2)
    stop.step(1.0, given)
    assert same_kind(given, stop.best_params)
    assert same_kind(given, fastopt.flatten(given).views)
    assert same_kind(given, fastopt.adam(fastopt.flatten(given)).eval_params().views)


def test_a_defaultdict_keeps_its_default():
    assert rebuild(by_default(), iter([1, 2])).default_factory is list


def deep(levels):
    tree: Any = ones(2)
    for i in range(levels):
        tree = {"x": tree} if i % 2 else [tree]
    return tree


def endless():
    tree: Any = [ones(2)]
    tree.append({"again": tree})
    return tree


DOORS = {
    "params": lambda tree: fastopt.adam(tree),
    "a group": lambda tree: fastopt.adam([{"params": tree}]),
    "add_group": lambda tree: fastopt.adam(ones(2)).add_group({"params": tree}),
    "no group": lambda tree: fastopt.adam(ones(2)).add_group(tree),
    "muon": lambda tree: fastopt.Muon(tree),
    "grads": lambda tree: fastopt.adam([ones(2)]).step(tree),
    "accumulate": lambda tree: fastopt.adam([ones(2)]).accumulate(tree),
    "mask": lambda tree: fastopt.adamw([ones(2)], weight_decay_mask=tree),
    "flatten": fastopt.flatten,
    "gram": lambda tree: fastopt.gram([tree, tree]),
    "gram of a backend": lambda tree: fastopt.gram([tree], backend="numpy"),
    "minimize": lambda tree: fastopt.minimize(lambda x: (1.0, x), tree, fastopt.gd, 1),
    "early stopping": lambda tree: fastopt.EarlyStopping(1).step(1.0, tree),
    "noise": lambda tree: fastopt.GradientNoiseScale(1).update([tree, tree]),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("make", [lambda: deep(5000), endless], ids=["deep", "endless"])
def test_trees_without_an_end_are_refused(door, make):
    with pytest.raises((TypeError, ValueError)) as caught:
        DOORS[door](make())
    assert len(str(caught.value)) < 500
    if door not in ("grads", "accumulate", "no group"):
        assert "levels deep" in str(caught.value)


def test_a_deep_tree_is_taken():
    tree, grads = deep(150), deep(150)
    fastopt.gd(tree, lr=0.5).step(grads)
    ((_, param),) = leaves(tree)
    assert param.tolist() == [0.5, 0.5]


# Weight decay masks -----------------------------------------------------------------


def test_a_mask_is_matched_by_name():
    params = {"w": ones(2), "b": ones(2)}
    mask = {"b": np.False_, "w": np.True_}
    opt = fastopt.sgdw(params, lr=0.5, weight_decay=0.5, weight_decay_mask=mask)
    opt.step({"w": np.zeros(2), "b": np.zeros(2)})
    assert params["b"].tolist() == [1.0, 1.0] and params["w"].tolist() == [0.75, 0.75]


def test_a_mask_of_other_names_is_refused():
    with pytest.raises(ValueError, match=r"leaves \['w'\]; it has \['v'\]"):
        fastopt.sgdw({"w": ones(2)}, weight_decay_mask={"v": True})
    with pytest.raises(TypeError, match="True or False"):
        fastopt.sgdw({"w": ones(2)}, weight_decay_mask={"w": np.int64(1)})


# What a step writes must be the caller's --------------------------------------------


@pytest.mark.parametrize(
    "param", [np.ones((2, 3), order="F"), np.ones((4, 4))[:, 1:3]], ids=["F", "slice"]
)
def test_a_copy_of_a_parameter_is_not_advised(param):
    with pytest.raises(ValueError, match="not C-contiguous") as caught:
        fastopt.adam({"w": param})
    words = str(caught.value)
    assert "ascontiguousarray" not in words and "a copy would be updated" in words
    assert ("params['w'].T" in words) == bool(param.flags.f_contiguous)


def test_the_transpose_is_trained():
    param = np.ones((2, 3), order="F")
    grad = np.arange(6.0).reshape(2, 3)
    fastopt.gd(param.T, lr=0.5).step(np.ascontiguousarray(grad.T))
    np.testing.assert_array_equal(param, 1 - 0.5 * grad)


def test_a_gradient_may_be_copied():
    with pytest.raises(ValueError, match=r"pass np.ascontiguousarray\(grads\)"):
        fastopt.adam(np.ones((2, 3))).step(np.ones((3, 2)).T)


@pytest.mark.parametrize("x0", [[1.0, 2.0], (1.0, 2.0), [[1.0, 2.0], [3.0, 4.0]]])
def test_minimize_says_what_a_list_of_numbers_is(x0):
    def squares(x):
        x = np.asarray(x)
        return float((x * x).sum()), 2 * x

    with pytest.raises(TypeError, match=r"pass np\.array\(x0\)"):
        fastopt.minimize(squares, x0, fastopt.gd, 1)
    result = fastopt.minimize(squares, np.array(x0), fastopt.gd, 1, lr=0.5)
    assert result.loss == 0


# EarlyStopping.restore --------------------------------------------------------------


def fortran():
    return np.zeros((3, 2), order="F")


ARRAYS = {
    "fortran": fortran,
    "slice": lambda: np.zeros((4, 6))[::2, 1:4],
    "reversed": lambda: np.zeros(5)[::-1],
    "transpose": lambda: np.zeros((2, 3, 4)).transpose(2, 0, 1),
    "0-d": lambda: np.zeros(()),
    "empty": lambda: np.zeros((0, 3)),
    "half": lambda: np.zeros((3, 2), np.float16, order="F"),
    "matrix": lambda: np.zeros((3, 2)).view(np.matrix),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_the_best_is_put_back_where_it_was(name):
    w = ARRAYS[name]()
    best = np.random.default_rng(0).normal(size=w.shape).astype(w.dtype)
    stop = fastopt.EarlyStopping(3)
    w[...] = best
    stop.step(1.0, {"w": w})
    w[...] = 2
    stop.restore({"w": w})
    np.testing.assert_array_equal(w, best)


def test_the_best_of_torchs_is_put_back():
    torch = pytest.importorskip("torch")
    for w in (
        torch.zeros(2, 3),
        torch.zeros(2, 3).T,
        torch.zeros(4, 4)[::2, 1:3],
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros(2, 3).T),
    ):
        best, stop = torch.randn(w.shape), fastopt.EarlyStopping(3)
        w.data.copy_(best)
        stop.step(1.0, [w])
        w.data.fill_(2)
        stop.restore([w])
        assert torch.equal(w.data, best)


def test_what_cannot_be_written_to_is_refused_before_anything_is():
    first, second = np.zeros(2), np.zeros(3)
    stop = fastopt.EarlyStopping(3)
    stop.step(1.0, [first, second])
    first[:] = second[:] = 2
    second.flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[1\] is read-only"):
        stop.restore([first, second])
    assert first.tolist() == [2, 2]
    with pytest.raises(TypeError, match=r"params\[1\] has dtype int64"):
        stop.restore([first, np.ones(3, np.int64)])
    with pytest.raises(TypeError, match=r"params\[0\] must be an array"):
        stop.load_state_dict(stop.state_dict() | {"best_params": [np.zeros(())]})
        stop.restore([1.0])
    assert first.tolist() == [2, 2]


def test_minimize_starts_from_any_array():
    x0 = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    result = fastopt.minimize(
        lambda x: (float((x * x).sum()), 1 * x), x0, fastopt.gd, 2, lr=0.5
    )
    np.testing.assert_array_equal(result.params, x0 / 4)
    assert result.params.shape == (2, 3)


# Parameters without dimensions ------------------------------------------------------

BACKENDS = ["numpy", "cython", "numba"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalars_are_gradients_of_arrays_without_dimensions(backend, dtype):
    """As NumPy's arithmetic makes them: as good as the array, at every door."""

    def trained(wrap):
        w, x = np.array(1.5, dtype), np.ones(2, dtype)
        opt = fastopt.sophia_g({"w": w, "x": x}, lr=0.1, backend=backend)

        def grads(factor):
            return {"w": wrap(dtype(factor) * w), "x": np.ones(2, dtype)}

        opt.estimate(grads(2))
        opt.step(grads(3), clip_norm=1.0, nonfinite="skip")
        opt.accumulate(grads(0.5))
        opt.step()
        opt.step([grads(2), grads(-0.75)], weights=[0.5, 0.25])
        return w, *opt.state["m"], *opt.state["h"]

    for one, other in zip(trained(lambda g: g), trained(np.array), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_of_tasks_are_scalars():
    w = np.array(1.0)
    fastopt.gd(w, lr=0.5).step(np.array([1.0, 2.0]), weights=[1.0, 0.25])
    assert w == 0.25
    expected = [[1.0, 2.0], [2.0, 4.0]]
    assert fastopt.gram(np.array([1.0, 2.0])).tolist() == expected
    assert fastopt.gram([np.float64(1), np.array(2.0)]).tolist() == expected


def test_scalars_with_other_optimizers():
    w, v = np.array(1.0), np.array(1.0)
    slow = fastopt.Lookahead(fastopt.gd(w, lr=0.5), k=1, alpha=0.5)
    slow.step(2 * w)
    assert w == 0.5
    both = {"v": v, "m": np.eye(2)}
    fastopt.Muon(both, adamw_lr=0.25, adamw_weight_decay=0).step(
        {"v": np.sqrt(v), "m": np.eye(2)}
    )
    np.testing.assert_allclose(v, 0.75, rtol=1e-6)
    result = fastopt.minimize(
        lambda x: ((x - 3) ** 2, 2 * (x - 3)), np.array(1.0), fastopt.gd, 2, lr=0.5
    )
    assert result.params == 3 and result.params.shape == ()
    result = fastopt.minimize(
        lambda p: (p["x"] ** 2, {"x": 2 * p["x"]}), {"x": 1.0}, fastopt.gd, 1, lr=0.5
    )
    assert result.params["x"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_that_do_not_fit(backend):
    w = np.array(1.0)
    opt = fastopt.gd(w, lr=0.5, backend=backend)
    for bad in (np.float32(1), np.int64(1), np.bool_(1)):
        with pytest.raises(TypeError, match="grads has dtype"):
            opt.step(bad)
    with pytest.raises(TypeError, match="grads must be an array"):
        opt.step(1.0)
    with pytest.raises(ValueError, match="zero_grads"):
        opt.step(2 * w, zero_grads=True)
    with pytest.raises(TypeError, match="grads must be an array"):
        fastopt.gd(np.ones(1), backend=backend).step(np.float64(1))
    assert w == 1


class Changing(dict):
    """Loses a key between the look at its keys and the look at its values."""

    def __getitem__(self, key):
        self.pop("b", None)
        return super().__getitem__(key)


class Growing(list):
    """Has one entry more each time it is iterated over."""

    def __iter__(self):
        self.append(None)
        return super().__iter__()


def leaves_of(params):
    return params.values() if isinstance(params, dict) else params


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_gradients_that_change_while_they_are_read(kind):
    params = {"a": np.ones(2), "b": np.ones(3)}
    grads = Changing({k: p.copy() for k, p in params.items()})
    if kind == "list":
        params, grads = [*params.values()], Growing(p.copy() for p in params.values())
        del grads[2:]
    opt = fastopt.gd(params, backend="numpy")
    with pytest.raises(ValueError, match="grads was changed while it was read"):
        opt.step(grads)
    assert opt.steps == 0 and all((p == 1).all() for p in leaves_of(params))


@pytest.mark.parametrize("same", [identity.same_objects, identity.same_objects_slowly])
def test_the_same_objects(same):
    first = [object(), 1.5, float("nan"), None]
    assert same(first, list(first)) and same([], [])
    assert not same(first, first[:-1]) and not same(first[:-1], first)
    assert not same(first, [*first[:-1], 0])
    assert not same([float("nan")], [float("nan")])  # another one
    equal = [np.ones(2)], [np.ones(2)]
    assert not same(*equal)


def test_a_list_of_arrays_is_taken_as_a_whole():
    """And refused where its length, or a gradient, is not as it should be."""
    params = [np.ones(2), np.ones(3)]
    opt = fastopt.sgd(params, lr=0.5)
    opt.step([np.ones(2), None])
    opt.step((None, np.ones(3)))
    assert [p.tolist() for p in params] == [[0.5] * 2, [0.5] * 3]
    for wrong, message in (
        ([np.ones(2)], "has 1 entries but params has 2"),
        ({"a": np.ones(2)}, "must be a list like params, got dict"),
        ([np.ones(2), [np.ones(3)]], r"grads\[1\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            opt.step(wrong)
    assert opt.steps == 2


def test_a_flat_buffer_is_taken_for_a_list_of_arrays():
    params = [np.ones(2), np.ones(3)]
    grads = fastopt.flatten([np.full(2, 1.0), np.full(3, 2.0)])
    fastopt.sgd(params, lr=0.5).step(grads)
    assert [p.tolist() for p in params] == [[0.5] * 2, [0.0] * 3]
