"""Files of several ranks, each of which steps a slice of each array, are merged and cut
again: any number of ranks goes on with the bits of one that has everything."""

import functools
import itertools
import random

import numpy as np
import pytest
from cases import alike, bfloat16
from checkpoints import draw

import fastopt
from fastopt.optimizer import safetensors

SIZES = {"w": (131,), "b": (8,), "one": (1,), "none": (0,)}
LARGE = {"w": (5000 * 3 + 3,), "v": (4160 * 4,)}


def cuts(size, ranks, multiple=1):
    """Where the slices of some ranks begin and end. They differ in size, and may be
    empty."""
    step = -(-size // multiple) / ranks
    ends = [min(size, round(step * rank**1.1) * multiple) for rank in range(ranks)]
    return [*ends, size]


class Rank:
    """One of several ranks, or the only one. It has a slice of each array."""

    def __init__(self, make, rank, ranks, shapes=SIZES, dtype=np.float32, multiple=1):
        self.shapes, self.dtype = shapes, dtype
        ends = {name: cuts(size, ranks, multiple) for name, (size,) in shapes.items()}
        self.slices = {name: slice(*of[rank : rank + 2]) for name, of in ends.items()}
        self.shard = {
            name: (self.slices[name].start, size) for name, (size,) in shapes.items()
        }
        self.params = self.draw(1000)
        self.opt = make(self.params)

    def draw(self, seed):
        arrays = draw(seed, self.shapes, self.dtype)
        return {name: array[self.slices[name]].copy() for name, array in arrays.items()}

    def step(self, seed):
        if self.opt._pending is not None:
            self.opt.step()
        self.opt.step(self.draw(seed))
        if seed % 4 == 2:  # the last before the file is written
            self.opt.accumulate(self.draw(seed + 500), grad_scale=0.3)


def in_groups(rule, **given):
    """An optimizer with a group for each array, whose values differ."""

    def make(params):
        groups = [
            {"params": {name: array}, "lr": 0.01 * (1 + i)}
            for i, (name, array) in enumerate(params.items())
        ]
        return Grouped(rule(groups, **given))

    return make


class Grouped:
    """Takes dicts of gradients for groups, and of shards."""

    def __init__(self, opt):
        self.opt = opt

    def __getattr__(self, name):
        return getattr(self.opt, name)

    def step(self, *grads, **options):
        self.opt.step(*map(in_list, grads), **options)

    def accumulate(self, grads, **options):
        self.opt.accumulate(in_list(grads), **options)

    def save(self, path, *, shard=None, **options):
        self.opt.save(path, shard=in_list(shard), **options)

    def load(self, path, *, shard=None, **options):
        self.opt.load(path, shard=in_list(shard), **options)


def in_list(of_names):
    if of_names is None:
        return None
    return [{name: value} for name, value in of_names.items()]


def lookahead(params):
    return fastopt.Lookahead(fastopt.sgd(params, lr=0.1, momentum=0.9), 2, 0.3)


adamw = functools.partial(fastopt.adamw, lr=0.07)
# Optimizer, shapes, dtype, and the multiples at which arrays are cut.
KINDS = {
    "adamw": (functools.partial(adamw, ema=0.9), SIZES, np.float32, 1),
    "float64": (adamw, SIZES, np.float64, 1),
    "bfloat16": (adamw, SIZES, bfloat16, 1),
    "nadam": (functools.partial(fastopt.nadam, lr=0.07), SIZES, np.float32, 1),
    "gd": (functools.partial(fastopt.sgd, lr=0.07), SIZES, np.float32, 1),
    "groups": (in_groups(fastopt.adamw, ema=0.9), SIZES, np.float32, 1),
    "Lookahead": (lookahead, SIZES, np.float32, 1),
    "nearest": (
        functools.partial(adamw, formats="bf16_nearest"),
        LARGE,
        np.float32,
        1,
    ),
    "remainder": (
        functools.partial(adamw, formats={"param": "bf16+r16", "m": "fp16"}),
        LARGE,
        bfloat16,
        1,
    ),
}
# Each rank draws random numbers by the places in its own arrays.
STOCHASTIC = {
    "8bit": (functools.partial(adamw, formats="8bit"), LARGE, np.float32, 64),
    "bf16": (functools.partial(adamw, formats="bf16", ema=0.5), LARGE, np.float32, 1),
    "8bit, r8": (
        functools.partial(adamw, formats={"param": "bf16+r8", "v": "v8"}),
        LARGE,
        bfloat16,
        64,
    ),
}


def ranks_of(kind, count):
    make, shapes, dtype, multiple = kind
    return [Rank(make, rank, count, shapes, dtype, multiple) for rank in range(count)]


def saved(ranks, folder, alone=False):
    """Save the files of some ranks. One rank may save as one that is alone."""
    paths = [folder / f"rank{number}.safetensors" for number in range(len(ranks))]
    for rank, path in zip(ranks, paths, strict=True):
        rank.opt.save(path, params=True, shard=None if alone else rank.shard)
    return paths


def together(ranks):
    """Everything that ranks have, with the slices of each array in a row."""
    return joined([rank.opt.state_dict() | {"arrays": rank.params} for rank in ranks])


def joined(values, key=None):
    first = values[0]
    if key == "params":
        return [[name for name, _ in part] for part in first]
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, dict):
        return {k: joined([value[k] for value in values], k) for k in first}
    if isinstance(first, list):
        return [joined(list(children)) for children in zip(*values, strict=True)]
    assert all(value == first for value in values)
    return first


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_any_number_of_ranks_goes_on(name, before, after, tmp_path):
    ranks, (only,) = ranks_of(KINDS[name], before), ranks_of(KINDS[name], 1)
    for seed, rank in itertools.product(range(3), [*ranks, only]):
        rank.step(seed)
    paths = saved(ranks, tmp_path, alone=before == 1 and name != "adamw")
    random.Random(0).shuffle(paths)
    others = ranks_of(KINDS[name], after)
    for rank in others:
        for array in rank.params.values():
            array[...] = 0
        rank.opt.load(paths, shard=None if after == 1 else rank.shard)
    assert alike(together(others), together([only]))
    for seed, rank in itertools.product(range(3, 13), [*others, only]):
        rank.step(seed)
    assert alike(together(others), together([only]))


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_state_that_is_rounded_at_random(name, before, after, tmp_path):
    """It is cut and joined to the last bit, and goes on with the same random numbers
    where the slices are the same."""
    ranks, others = (ranks_of(STOCHASTIC[name], count) for count in (before, after))
    for seed, rank in itertools.product(range(3), ranks):
        rank.step(seed)
    paths = saved(ranks, tmp_path)
    for rank in others:
        rank.opt.load(paths, shard=rank.shard)
    assert alike(together(others), together(ranks))
    if before == after:
        for seed, rank in itertools.product(range(3, 13), [*ranks, *others]):
            rank.step(seed)
        assert alike(together(others), together(ranks))


def test_a_rank_reads_only_the_arrays_that_it_needs(tmp_path, monkeypatch):
    paths, read = saved(ranks_of(KINDS["adamw"], 3), tmp_path), []
    whole = safetensors.Stored.read
    monkeypatch.setattr(
        safetensors.Stored,
        "read",
        lambda self: read.append((str(self.file.name), self.name)) or whole(self),
    )
    rank = ranks_of(KINDS["adamw"], 3)[1]
    rank.opt.load(paths, shard=rank.shard)
    # Whatever has no elements belongs to all.
    assert {(path, name) for path, name in read if "'none'" not in name} == {
        (str(paths[1]), f"{buffer}.[0]['{name}']")
        for buffer in ("state.m", "state.v", "ema", "param")
        for name in ("w", "b", "one")
    }


def test_arrays_that_every_rank_has(tmp_path):
    """They are whole, of any shape, and the same in all files."""

    def ranks():
        for first in (0, 2):
            params = {"w": np.arange(4.0)[first : first + 2], "norm": np.ones((2, 3))}
            opt = fastopt.adamw(params, lr=0.1)
            yield params, opt, {"w": (first, 4), "norm": None}

    paths = [tmp_path / "0", tmp_path / "1"]
    opts = list(ranks())
    for (params, opt, shard), path in zip(opts, paths, strict=True):
        opt.step({name: array + 1 for name, array in params.items()})
        opt.save(path, params=True, shard=shard)
    for (params, _, _), (others, opt, shard) in zip(opts, ranks(), strict=True):
        opt.load(paths, shard=shard)
        assert alike(others, params)
    params, opt, shard = opts[0]
    params["norm"][1, 1] += 1
    opt.save(paths[0], params=True, shard=shard)
    with pytest.raises(ValueError, match=r"param of \[0\]\['norm'\] differs in .*1"):
        opt.load(paths, shard=shard)


def test_slices_that_overlap_must_agree(tmp_path):
    whole = np.arange(10.0)
    paths = [tmp_path / str(number) for number in range(3)]
    opts = []
    for (first, end), path in zip(((0, 5), (2, 8), (6, 10)), paths, strict=True):
        opt = fastopt.sgd(whole[first:end].copy(), lr=0.1, momentum=0.9)
        opt.step(whole[first:end] + 1)
        opt.save(path, shard=(first, 10))
        opts.append(opt)
    everything = fastopt.sgd(whole.copy(), momentum=0.9)
    everything.load(paths)
    assert alike(everything.state["momentum_buffer"], [whole + 1])
    opts[1].state["momentum_buffer"][0][2] += 1  # element 4
    opts[1].save(paths[1], shard=(2, 10))
    with pytest.raises(ValueError, match="differs in .*1 from the other files"):
        everything.load(paths)


# What is refused ----------------------------------------------------------------------


def changed(opt, **values):
    for name, value in values.items():
        setattr(opt, name, value)


def more_steps(opt):
    opt.step(np.ones(4, np.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        (more_steps, "steps is 1 in .*0, but 2 in .*1; load files that were saved tog"),
        (lambda opt: changed(opt, lr=0.2), r"groups\[0\].lr is 0.1 in .*0, but 0.2 in"),
        (lambda opt: changed(opt, ema=0.2), "ema_decay is 0.5 in .*0, but 0.2 in .*1"),
        (lambda opt: opt.accumulate(np.ones(4, "f4")), "accumulated is None in .*0"),
    ],
)
def test_what_is_not_cut_must_be_the_same(change, message, tmp_path):
    paths = [tmp_path / "0", tmp_path / "1"]
    opts = [fastopt.adamw(np.ones(4, np.float32), lr=0.1, ema=0.5) for _ in paths]
    for opt in opts:
        opt.step(np.ones(4, np.float32))
    change(opts[1])
    for first, opt, path in zip((0, 4), opts, paths, strict=True):
        opt.save(path, shard=(first, 8))
    before = opts[0].state_dict()
    with pytest.raises(ValueError, match=message):
        opts[0].load(paths, shard=(0, 8))
    assert alike(opts[0].state_dict(), before)


def test_files_that_do_not_fit_together(tmp_path):
    paths = {name: tmp_path / name for name in ("a", "b", "other", "params", "sgd")}
    adamw, ones = fastopt.adamw, np.ones(4, np.float32)
    adamw({"w": ones.copy()}).save(paths["a"], shard={"w": (0, 8)})
    adamw({"w": ones.copy()}).save(paths["b"], shard={"w": (4, 8)})
    adamw({"v": ones.copy()}).save(paths["other"], shard={"v": (4, 8)})
    adamw({"w": ones.copy()}).save(
        paths["params"], True and {"w": (4, 8)}
    ) if 0 else None
    adamw({"w": ones.copy()}).save(paths["params"], params=True, shard={"w": (4, 8)})
    fastopt.sgd({"w": ones.copy()}, momentum=0.9).save(
        paths["sgd"], shard={"w": (4, 8)}
    )
    whole = adamw({"w": np.ones(8, np.float32)})
    half = adamw({"w": ones.copy()})
    for names, message in (
        ("a", r"none of .*a has element 4; pass the files of all ranks"),
        ("b", r"needed from element 0 to 8 of 8, but none of .*b has element 0"),
        (("a", "other"), r"the list of parameters is .*'w'.* in .*a, but .*'v'"),
        (("a", "params"), "param is None in .*a, but "),
        (("a", "sgd"), "rule is 'adamw' in .*a, but 'sgd' in .*sgd"),
    ):
        before = whole.state_dict()
        files = [paths[name] for name in ([names] if type(names) is str else names)]
        with pytest.raises(ValueError, match=message):
            whole.load(files)
        assert alike(whole.state_dict(), before)
    with pytest.raises(ValueError, match=r"has the parameters .*'v'.*, but this"):
        whole.load(paths["other"])
    with pytest.raises(
        ValueError, match="is elements 0 to 4 of 8 in .*a, but elements"
    ):
        half.load(paths["a"])
    half.load(paths["b"], shard={"w": (4, 8)})
    whole.load([paths["a"], paths["b"]])
    whole.load([paths["a"], paths["params"]], params=False)
    with pytest.raises(ValueError, match="was saved without params=True"):
        whole.load([paths["a"], paths["params"]], params=True)


@pytest.mark.parametrize(
    "shard, error, message",
    [
        (3, TypeError, r"the shard of params must be \(first, size\)"),
        ((1, 2, 3), TypeError, r"the shard of params must be \(first, size\)"),
        ((0.0, 8), TypeError, r"must be whole numbers, got \(0.0, 8\)"),
        ((True, 8), TypeError, "must be whole numbers"),
        (("0", "8"), TypeError, "must be whole numbers"),
        ((-1, 8), ValueError, r"its 4 elements from -1 on do not lie within 8"),
        ((5, 8), ValueError, "its 4 elements from 5 on do not lie within 8"),
        ((0, 3), ValueError, "do not lie within 3"),
        ({"w": (0, 8)}, TypeError, r"the shard of params must be \(first, size\)"),
    ],
)
def test_shards_that_are_none(shard, error, message, tmp_path):
    opt = fastopt.adamw(np.ones(4))
    with pytest.raises(error, match=message):
        opt.save(tmp_path / "file", shard=shard)
    opt.save(tmp_path / "file", shard=(np.int64(4), 8))
    with pytest.raises(error, match=message):
        opt.load(tmp_path / "file", shard=shard)


def test_shards_of_a_tree_have_its_structure(tmp_path):
    opt = fastopt.adamw({"w": np.ones(4), "b": np.ones(2)})
    with pytest.raises(ValueError, match="must have the keys of params"):
        opt.save(tmp_path / "file", shard={"w": (0, 8)})
    with pytest.raises(TypeError, match="must be a dict"):
        opt.save(tmp_path / "file", shard=[(0, 8), (0, 2)])


def test_only_flat_arrays_are_cut(tmp_path):
    flat = fastopt.flatten({"w": np.ones(4), "b": np.ones(2)})
    for params in (np.ones((2, 3)), flat):
        opt = fastopt.adamw(params)
        with pytest.raises(ValueError, match="only flat arrays are cut: step a slice"):
            opt.save(tmp_path / "file", shard=(0, 12))
        opt.save(tmp_path / "file", shard=(0, 6))  # which is whole
    slices = [fastopt.adamw(np.ones(3)) for _ in range(2)]
    fastopt.adamw(np.ones((2, 3))).save(tmp_path / "file")
    with pytest.raises(
        ValueError, match=r"has shape \(2, 3\) for 6 elements in .*file"
    ):
        slices[0].load(tmp_path / "file", shard=(0, 6))
    for first, opt in zip((0, 3), slices, strict=True):
        opt.step(np.arange(first, first + 3.0))
        opt.save(tmp_path / str(first), shard=(first, 6))
    whole = fastopt.adamw(np.ones((2, 3)))
    whole.load([tmp_path / "0", tmp_path / "3"])  # slices of array.reshape(-1)
    moments = np.concatenate([opt.state["m"][0] for opt in slices])
    np.testing.assert_array_equal(whole.state["m"][0], moments.reshape(2, 3))


def flat(sizes, names="abc"):
    return fastopt.flatten(dict(zip(names, map(np.ones, sizes), strict=True)))


@pytest.mark.parametrize(
    "theirs, ours, word",
    [
        (lambda: flat((3, 4, 5)), lambda: flat((5, 4, 3)), "shape|elements"),
        (lambda: flat((3, 4, 5), "axc"), lambda: flat((3, 4, 5)), "parameters"),
        (lambda: np.ones((2, 3)), lambda: np.ones((3, 2)), "shape"),
    ],
)
@pytest.mark.parametrize("rule", [fastopt.adamw, fastopt.Adafactor])
def test_lists_of_files_are_of_the_same_parameters(tmp_path, theirs, ours, word, rule):
    """Of the same names and shapes in each FlatBuffer, as one file alone must be."""
    rule(theirs()).save(tmp_path / "file")
    opt = rule(ours())
    for given in (tmp_path / "file", [tmp_path / "file"] * 2):
        with pytest.raises(ValueError, match=word):
            opt.load(given)


@pytest.mark.parametrize("shape", [(2, 3), (), (2, 0, 3), (6,)])
@pytest.mark.parametrize("first", [False, True])
def test_a_flat_buffer_of_one_array_has_its_state(tmp_path, shape, first):
    def params(in_buffer):
        array = {"w": np.ones(shape)}
        return fastopt.flatten(array) if in_buffer else array

    grads = [params(first), params(not first)]
    one, other = fastopt.adamw(params(first)), fastopt.adamw(params(not first))
    one.step(grads[0])
    one.save(tmp_path / "file")
    other.load(tmp_path / "file")
    states = [opt.state["m"][0].reshape(-1) for opt in (one, other)]
    np.testing.assert_array_equal(*states)
    other.load_state_dict(one.state_dict())
    other.step(grads[1])


def test_factored_state_is_not_cut(tmp_path):
    fastopt.Adafactor(np.ones((2, 3))).save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"state.v of \[0\] has shape \(5,\) for 6 el"):
        fastopt.Adafactor(np.ones(3)).load(tmp_path / "file", shard=(3, 6))


def test_groups_with_a_scale_are_not_cut(tmp_path):
    def opt(n):
        return fastopt.adamw(np.ones(n, np.float32), formats="8bit")

    size = 2 * 4160 + 10
    for first, n, cuts in (
        (0, 4160, False),
        (64, 4160, False),
        (4160, 4170, False),  # up to the end
        (1, 4160, True),
        (32, 4160, True),
        (0, 4161, True),
        (4160, 4169, True),
    ):
        if cuts:
            with pytest.raises(
                ValueError, match="cuts a group of 64 .* multiples of 64"
            ):
                opt(n).save(tmp_path / "file", shard=(first, size))
        else:
            opt(n).save(tmp_path / "file", shard=(first, size))
    # State of 8 bits on one rank and of 32 on another, which has fewer elements.
    opt(4160).save(tmp_path / "0", shard=(0, 4224))
    opt(64).save(tmp_path / "1", shard=(4160, 4224))
    with pytest.raises(ValueError, match="fewer than 4096 elements have no formats"):
        opt(4224).load([tmp_path / "0", tmp_path / "1"])
    # A whole file is cut by ranks that are too small for the format.
    opt(4160).save(tmp_path / "0")
    with pytest.raises(ValueError, match="has the formats .*, but this optimizer has"):
        opt(64).load(tmp_path / "0", shard=(0, 4160))
