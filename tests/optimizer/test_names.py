"""Saved state is matched to parameters by their names, and old saves by their order."""

import copy
from typing import NamedTuple

import numpy as np
import pytest

import fastopt

RULES = [fastopt.adamw, fastopt.sgd, fastopt.novograd, fastopt.schedule_free_adamw]
RULES += [fastopt.dog, fastopt.lamb, fastopt.prodigy, fastopt.ftrl]
MAKERS = {
    **{rule.name: rule for rule in RULES},
    "muon": lambda params, **given: fastopt.Muon(params, **given),
    "adafactor": lambda params, **given: fastopt.Adafactor(params, **given),
    "lookahead": lambda params, **given: fastopt.Lookahead(
        fastopt.adam(params, **given), k=2
    ),
    "lookahead of muon": lambda params, **given: fastopt.Lookahead(
        fastopt.Muon(params, **given), k=2
    ),
    "lookahead of adafactor": lambda params, **given: fastopt.Lookahead(
        fastopt.Adafactor(params, **given), k=3
    ),
}
ON = {"sgd": {"momentum": 0.9}}
NAMES = ("a", "b", "c")
SHAPES = {"a": (2, 3), "b": (3, 2), "c": (6,)}  # of one size: a swap would fit flat
rng = np.random.default_rng(0)


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def in_layout(values, layout):
    """These arrays by name as parameters, or gradients, and their views by name."""
    if layout == "grouped":
        trees = {name: {name: values[name].copy()} for name in values}
        return list(trees.values()), {n: tree[n] for n, tree in trees.items()}
    order = NAMES[::-1] if layout.endswith("reversed") else NAMES
    tree = {name: values[name].copy() for name in order}
    if layout.startswith("flat"):
        flat = fastopt.flatten(tree)
        return flat, flat.views
    return tree, tree


def trained(make, layouts, *, steps=5, save_at=3, **given):
    """The parameters after some steps, saved and loaded into another layout, and the
    averages."""
    params, views = in_layout(arrays(1), layouts[0])
    opt = make(params, ema=0.75, **given)
    for i in range(steps):
        if i == save_at:
            opt.accumulate(in_layout(arrays(50), layouts[0])[0], grad_scale=0.5)
            saved = copy.deepcopy(opt.state_dict())
            values = {name: np.array(view) for name, view in views.items()}
            params, views = in_layout(values, layouts[1])
            opt = make(params, ema=0.75, **given)
            opt.load_state_dict(saved)
            opt.step()
        opt.step(in_layout(arrays(10 + i), layouts[i >= save_at])[0])
    averages = opt.ema_params
    return {n: (np.array(views[n]), np.array(averages[n])) for n in NAMES}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("layout", ["reversed", "flat", "flat reversed"])
@pytest.mark.parametrize("before", ["as it was", "flat"])
def test_state_finds_its_parameters(name, layout, before):
    """In another order, in a FlatBuffer and out of one: everything that is kept for a
    parameter, sums of gradients and moving averages as well."""
    make, given = MAKERS[name], ON.get(name, {})
    expected = trained(make, ("as it was", "as it was"), **given)
    got = trained(make, (before, layout), **given)
    over_all = name in ("dog", "prodigy")  # whose sums depend on the order
    for key in NAMES:
        for one, other in zip(expected[key], got[key], strict=True):
            if over_all:
                np.testing.assert_allclose(one, other, rtol=1e-12)
            else:
                np.testing.assert_array_equal(one, other)
    changed = [not np.array_equal(got["a"][0], arrays(1)["a"])]
    assert all(changed)


def stepped(params, grads):
    opt = fastopt.adam(params, lr=0.1)
    opt.step(grads)
    return opt


def test_the_moments_of_the_issue():
    a, b = np.zeros(2), np.zeros(2)
    grads = {"a": np.array([1.0, 2.0]), "b": np.array([30.0, 40.0])}
    saved = stepped({"a": a, "b": b}, grads).state_dict()
    other = fastopt.adam({"b": b, "a": a})
    other.load_state_dict(saved)
    np.testing.assert_allclose(other.state["m"][0], [3.0, 4.0])
    np.testing.assert_allclose(other.state["m"][1], [0.1, 0.2])


@pytest.mark.parametrize("flat", [False, True])
def test_names_that_do_not_match_are_refused(flat):
    def params(*names):
        tree = {name: np.zeros(2) for name in names}
        return fastopt.flatten(tree) if flat else tree

    opt = stepped(params("a", "b"), params("a", "b"))
    saved = opt.state_dict()
    other = fastopt.adam(params("a", "c"), lr=0.3)
    with pytest.raises(ValueError, match=r"\['a'\], \[0\]\['b'\].*has \[0\]\['a'\]"):
        other.load_state_dict(saved)
    assert other.steps == 0 and other.lr == 0.3
    saved["params"] = None  # as the message says
    other.load_state_dict(saved)
    assert other.steps == 1 and other.lr == 0.1


def test_groups_are_part_of_the_names():
    def groups(*names):
        return [{"params": {name: np.zeros(2)}} for name in names]

    grads = [{"a": np.ones(2)}, {"b": np.ones(2)}]
    saved = stepped(groups("a", "b"), grads).state_dict()
    with pytest.raises(ValueError, match="the state is of the parameters"):
        fastopt.adam(groups("b", "a")).load_state_dict(saved)
    fastopt.adam(groups("a", "b")).load_state_dict(saved)


def test_one_group_is_as_no_groups():
    grads = {"a": np.ones(2)}
    saved = stepped({"a": np.zeros(2)}, grads).state_dict()
    other = fastopt.adam([{"params": {"a": np.zeros(2)}}])
    other.load_state_dict(saved)
    np.testing.assert_allclose(other.state["m"][0], 0.1)


def test_a_flat_buffer_with_arrays_of_other_shapes_is_refused():
    """Of the same names and as many elements in all."""

    def flat(a, b):
        return fastopt.flatten({"a": np.ones(a), "b": np.ones(b)})

    saved = stepped(flat(2, 3), flat(2, 3)).state_dict()
    with pytest.raises(ValueError, match=r"^parameter \[0\]\['a'\] has shape \(2,\)"):
        fastopt.adam(flat(3, 2)).load_state_dict(saved)


def test_sums_for_some_arrays_of_a_flat_buffer_are_refused():
    tree = {"a": np.ones(2), "b": np.ones(3)}
    opt = fastopt.adam(tree)
    opt.accumulate({"a": np.ones(2), "b": None})
    other = fastopt.adam(fastopt.flatten(tree))
    with pytest.raises(ValueError, match=r"nothing for \[0\]\['b'\]"):
        other.load_state_dict(opt.state_dict())


def test_a_slow_weight_of_lookahead_follows_its_name():
    a, b = np.array([1.0, 2.0]), np.array([30.0, 40.0])
    opt = fastopt.Lookahead(fastopt.gd({"a": a, "b": b}, lr=0.0), k=5)
    opt.step({"a": np.ones(2), "b": np.ones(2)})
    other = fastopt.Lookahead(fastopt.gd({"b": b, "a": a}, lr=0.0), k=5)
    other.load_state_dict(opt.state_dict())
    np.testing.assert_array_equal(other._slow[0], [30.0, 40.0])
    np.testing.assert_array_equal(other._slow[1], [1.0, 2.0])


def test_best_parameters_are_put_back_by_name():
    def flat(*names):
        return fastopt.flatten({name: np.full(2, ord(name)) * 1.0 for name in names})

    stop = fastopt.EarlyStopping(2)
    stop.step(1.0, flat("a", "b"))
    other = flat("b", "a")
    other.data[:] = 0
    stop.restore(other)
    assert other["a"].tolist() == [97.0, 97.0] and other["b"].tolist() == [98.0, 98.0]


# What lamb({"a": ..., "b": ...}, lr=0.1, weight_decay=0.02, ema=0.5) saved when there
# were no names in it, after a step and an accumulate.
FORMAT_2 = {
    "accumulated": [np.array([0.25, 1.0, 0.5]), None],
    "carry": [[], []],
    "ema": [
        np.array([0.4320773399845782, -1.065905186890021, 2.0645601935980734]),
        np.array([[1.4455790743411052, -0.19689997315980875]]),
    ],
    "ema_decay": 0.5,
    "format": 2,
    "groups": [
        {
            "always_adapt": False,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-06,
            "frozen": False,
            "lr": 0.1,
            "weight_decay": 0.02,
        }
    ],
    "rule": "lamb",
    "skipped": 0,
    "state": {
        "m": [np.array([0.1, 0.2, -0.3]), np.array([[0.05, -0.05]])],
        "v": [np.array([0.001, 0.004, 0.009]), np.array([[0.00025, 0.00025]])],
    },
    "steps": 1,
    "switched_on": [],
}


def test_a_save_of_format_2_goes_on_as_it_would_have():
    a = np.array([0.3641546799691564, -1.1318103737800422, 2.1291203871961484])
    b = np.array([[1.3911581486822102, -0.14379994631961746]])
    opt = fastopt.lamb({"a": a, "b": b}, ema=0.9)
    opt.load_state_dict(copy.deepcopy(FORMAT_2))
    opt.step()
    np.testing.assert_allclose(
        a, [0.210803174675666, -1.298277945775562, 2.219891710097577], rtol=1e-8
    )
    np.testing.assert_array_equal(b, [[1.3911581486822102, -0.14379994631961746]])
    np.testing.assert_allclose(
        opt.ema_params["a"], [0.32144026, -1.18209157, 2.14222595], atol=1e-8
    )
    assert opt.steps == 2 and opt.lr == 0.1 and opt.ema == 0.5
    assert opt.state_dict()["format"] == 3


SPOILT = [None, 5, 1.5, float("nan"), "text", [], {}, [None], [[5]], [{}]]
SPOILT += [object(), np.array(1.0), np.ones(2), {"m": 5}, {"m": [None, 7]}, [[["a"]]]]


@pytest.mark.parametrize("rule", [fastopt.gd, fastopt.adam, fastopt.novograd])
def test_damaged_states_are_refused_in_words(rule):
    """Every entry of a saved state in place of which something else is."""
    opt = rule([np.ones(3), np.ones(2)], lr=0.5, ema=0.5)
    opt.step([np.ones(3), np.ones(2)])
    opt.accumulate([np.ones(3), np.ones(2)])
    before = repr(opt.state_dict())
    for key in opt.state_dict():
        for value in SPOILT:
            saved = opt.state_dict()
            saved[key] = value
            try:
                opt.load_state_dict(saved)
            except (TypeError, ValueError) as error:
                words = str(error)
                assert any(w in words for w in ("must", "state", "cannot")), words
                assert "object is not" not in words and "NaN to" not in words
                assert repr(opt.state_dict()) == before
            else:
                assert key in saved and value in (None, 5, [], {}), (key, value)
                opt.load_state_dict(saved | {key: eval_entry(before, key)})


def eval_entry(before, key):
    return eval(before, {"array": np.array})[key]


# Trees of other kinds, and groups -----------------------------------------------------


class Pair(NamedTuple):
    weight: np.ndarray
    bias: np.ndarray


class Turned(NamedTuple):
    bias: np.ndarray
    weight: np.ndarray


def nested(seed, kind=Pair, turned=False):
    """All of one shape, so that a swap would fit; as parameters and by name."""
    rng = np.random.default_rng(seed)
    names = ("body.0", "body.1", "head.weight", "head.bias")
    a, b, weight, bias = views = rng.normal(size=(4, 2, 3))
    head = kind(weight=weight, bias=bias)
    tree = {"body": {"x": a, "y": b}, "head": head}
    if turned:
        tree = {"head": head, "body": {"y": b, "x": a}}
    return tree, dict(zip(names, views, strict=True))


def in_groups(seed, turned=False):
    """The same in three groups, of which the second is frozen: two to begin with."""
    tree, views = nested(seed, turned=turned)
    body = {"params": tree["body"], "lr": 0.05}
    first = [body, {"params": [tree["head"].weight], "frozen": True}]
    return first, {"params": {"b": tree["head"].bias}, "lr": 0.2}, views


def group_grads(seed, turned):
    first, last, _ = in_groups(seed, turned)
    return [group["params"] for group in (*first, last)]


@pytest.mark.parametrize("name", MAKERS)
def test_nested_trees(name):
    """In another order of keys at every level, in and out of a FlatBuffer."""
    make, given, results = MAKERS[name], ON.get(name, {}), []
    for turned, flat in ((False, False), (True, False), (True, True)):
        params, views = nested(1)
        opt = make(params, ema=0.5, **given)
        for seed in range(3):
            opt.step(nested(10 + seed)[0])
        saved = copy.deepcopy(opt.state_dict())
        there, now = nested(1, turned=turned)
        for key, view in views.items():
            now[key][...] = view
        if flat:
            there = fastopt.flatten(there)
        opt = make(there, ema=0.5, **given)
        opt.load_state_dict(saved)
        for seed in range(3, 6):
            grads = nested(10 + seed, turned=turned)[0]
            opt.step(fastopt.flatten(grads) if flat else grads)
        tree = there.views if flat else there
        averages = opt.ema_params.views if flat else opt.ema_params
        results.append(
            [t["body"]["x"] for t in (tree, averages)]
            + [t["body"]["y"] for t in (tree, averages)]
            + [t["head"][i] for t in (tree, averages) for i in (0, 1)]
        )
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", MAKERS)
def test_the_fields_of_namedtuples(name):
    """They are names, whatever their order, and as the keys of a dict."""
    make, given, results = MAKERS[name], ON.get(name, {}), []
    kinds = (Pair, Turned, lambda weight, bias: {"bias": bias, "weight": weight})
    for kind in kinds:
        params, views = nested(1)
        opt = make(params, ema=0.5, **given)
        for seed in range(3):
            opt.step(nested(10 + seed)[0])
        there, now = nested(1, kind)
        for key, view in views.items():
            now[key][...] = view
        other = make(there, ema=0.5, **given)
        other.load_state_dict(opt.state_dict())
        for seed in range(3, 6):
            other.step(nested(10 + seed, kind)[0])
        results.append(list(now.values()))
    for turned in results[1:]:
        for got, expected in zip(turned, results[0], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("later", [False, True])
def test_a_frozen_group_and_one_that_is_added_later(name, later):
    make, given, results = MAKERS[name], ON.get(name, {}), []
    given = {**given, "eps": 1e-3} if name == "muon" else given
    for saving in (False, True):
        first, last, views = in_groups(1)
        if name in ("muon", "lookahead of muon"):
            last["adamw_lr"] = 0.1
        opt = make(first, ema=0.5, **given)
        for seed in range(2):
            opt.step(group_grads(10 + seed, False)[:2])
        opt.add_group(last)
        for seed in range(2, 4):
            opt.step(group_grads(10 + seed, False))
        if saving:
            saved = copy.deepcopy(opt.state_dict())
            again, last, now = in_groups(1, turned=True)
            for key, view in views.items():
                now[key][...] = view
            views = now
            opt = make(again if later else [*again, last], ema=0.5, **given)
            if later:
                opt.add_group(last)
            opt.load_state_dict(saved)
            assert [group.frozen for group in opt.groups] == [False, True, False]
        opt.groups[1].frozen = False
        for seed in range(4, 7):
            opt.step(group_grads(10 + seed, saving))
        results.append({key: view.copy() for key, view in views.items()})
    for key, expected in results[0].items():
        np.testing.assert_allclose(results[1][key], expected, rtol=1e-12, atol=1e-15)


def test_gradients_whose_fields_are_in_another_order_are_refused():
    params, views = nested(1)
    opt = fastopt.adam(params)
    with pytest.raises(
        ValueError,
        match=r"grads\['head'\] has the fields bias, weight, but params\['head'\] has "
        "weight, bias",
    ):
        opt.step(nested(2, Turned)[0])
    for key, before in nested(1)[1].items():
        assert np.array_equal(views[key], before)
    grads, _ = nested(2)
    opt.step(grads | {"head": list(grads["head"])})  # a list has an order alone
    other, now = nested(1)
    fastopt.adam(other).step(grads)
    for key in views:
        assert np.array_equal(views[key], now[key])
