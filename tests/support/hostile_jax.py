"""Attacks on fastopt.jax, for test_faults_jax.py, in a process of their own. Prints a
line of JSON for each: what it was, and what went wrong."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from xla_frames import (
    BF16,
    ENTRIES,
    F16,
    F32,
    F64,
    STEP,
    STEP_WITH_SUMS,
    SUMS,
    Call,
    changes,
)

import fastopt.jax as fj

jax.config.update("jax_platforms", "cpu")

Attack = tuple[str, Callable[[], None]]


def expect(condition: bool, said: Any) -> None:
    if not condition:
        raise AssertionError(said)


# Frames, without XLA ------------------------------------------------------------------


def frames(long: bool) -> Iterator[Attack]:
    """One thing wrong, or two; and calls with nothing wrong."""
    names = ["sgd", "novograd", "prodigy", "nadam", "adamw"][: None if long else 2]
    shapes = [[(3, 5), (1,), ()], [(7,)], [(0, 2), (4,)], []][: None if long else 1]
    dtypes = (F32, F32), (F64, F64), (BF16, F16), (F32, BF16)
    for name, pair, some in itertools.product(names, dtypes, shapes):
        new = partial(Call, name, pair, some)
        about = f"{name}, dtypes {pair}, {some}"
        yield f"{about}: nothing", partial(good, new)
        every = list(changes(new()))
        for what, change in every:
            yield f"{about}: {what}", partial(bad, new, change)
        rng = np.random.default_rng(6)
        for _ in range(2000 if long else 100):
            (one, a), (two, b) = (every[k] for k in rng.integers(len(every), size=2))
            # Memory that is shorter than is said cannot be told if the rest fits.
            short = f"{len(new().args) + 1} operands" in (one, two)
            short = short and "indices" in one + two
            short |= "operand" in one and one.split()[:2] == two.split()[:2]
            short |= all(what.endswith("of more elements") for what in (one, two))
            # A mixture that fits again, and a call without arrays.
            fits = all("operand" in what and " of dtype" in what for what in (one, two))
            fits |= {one, two} == {"1 results", "4 operands"}
            if one != two and not short and not fits:
                yield f"{about}: {one}, {two}", partial(bad, new, a, b)
    # The two calls of a step in shards.
    names = ["novograd", "prodigy"][: None if long else 1]
    for target, name, pair, some in itertools.product(
        (SUMS, STEP_WITH_SUMS), names, dtypes, [[(3, 5), (1,), ()], [(0, 2), (4,)]]
    ):
        new = partial(Call, name, pair, some, target)
        about = f"{target} of {name}, dtypes {pair}, {some}"
        yield f"{about}: nothing", partial(good, new)
        for what, change in changes(new()):
            yield f"{about}: {what}", partial(bad, new, change)
        for rule in (b"adamw", b"lars"):  # without sums, and with others
            changed = partial(setattr_of, "rule", rule)
            yield f"{about}: as {rule!r}", partial(bad, new, changed)
    for value in (np.nan, np.inf, -1.0, 0.0, 2.0**60):
        new = partial(Call, "novograd", (F32, F32), [(3, 5)], STEP_WITH_SUMS)
        yield f"sums of {value} elements", partial(bad, new, partial(elements, value))


def setattr_of(name: str, value: Any, call: Call) -> None:
    setattr(call, name, value)


def elements(value: float, call: Call) -> None:
    """Let all devices say that an array has so many elements."""
    call.args[3].values.view(np.float64)[..., 0] = value


def good(new: Callable[[], Call]) -> None:
    message, untouched = new().run()
    expect(message is None, message)
    expect(untouched, "wrote beyond its results")


def bad(new: Callable[[], Call], *wrong: Callable[[Call], Any]) -> None:
    call = new()
    for change in wrong:
        try:
            change(call)
        except (IndexError, KeyError, ValueError):  # the first has left nothing for it
            continue
    message, untouched = call.run()
    expect(message is not None, "was done")
    expect(untouched, "wrote, though it says: " + str(message))


# Calls of the target, through XLA -----------------------------------------------------


def calls(long: bool) -> Iterator[Attack]:
    dtypes = [np.uint8, np.int32, np.float32, np.uint32, np.float16]
    for name in ["nadam", "novograd", "sgd"][: None if long else 1]:
        call = Call(name, (F32, F32), SHAPES)
        operands = [a.values.reshape(a.dims) for a in call.args]
        do = partial(through_xla, name)
        yield f"{name}: nothing", partial(do, operands, refused=False)
        for k, operand in enumerate(operands):
            rest = [*operands[:k], *operands[k + 1 :]]
            yield f"{name}: without operand {k}", partial(do, rest)
            cut = [*operands[:k], np.ravel(operand)[:-1], *operands[k + 1 :]]
            if operand.size:
                yield f"{name}: a shorter operand {k}", partial(do, cut)
            for dtype in dtypes if long else dtypes[:2]:
                other = [*operands[:k], operand.astype(dtype), *operands[k + 1 :]]
                if operand.dtype != dtype:
                    what = f"{name}: operand {k} as {np.dtype(dtype)}"
                    taken = dtype == np.float16 and k in range(4, 4 + 2 * len(SHAPES))
                    yield what, partial(do, other, refused=not taken)
        for count in range(0, len(operands), 1 if long else 3):
            if count != 4:  # a good call, without arrays
                yield f"{name}: {count} operands", partial(do, operands[:count])
        for others in (
            {"rule": "adamv"},
            {"rule": 3},
            {"traced": np.array([99])},
            {"traced": np.array([-1])},
            {"traced": np.array([0, 0])},
            {"traced": np.array([0.0])},
            {"traced": np.arange(1000)},
            {"traced": np.array([0], np.int32)},
            {"threads": np.int32(0)},
            {"threads": np.int32(2**31 - 1)},
            {"threads": np.float32(2)},
            {"threads": "2"},
        ):
            yield f"{name}: {others}", partial(do, operands, **others)


SHAPES = [(2, 3), (5,)]


def through_xla(
    name: str, operands: list[Any], refused: bool = True, **others: Any
) -> None:
    """The results are those of the operands that there are."""
    first = 4  # after the step, the numbers, the carry and a traced number
    aliases = {2: 0}
    for k in range(first, first + 2 * (2 + len(ENTRIES[name].state))):
        if (k - first) // 2 != 1:
            aliases[k] = len(aliases)
    aliases = {k: n for k, n in aliases.items() if k < len(operands)}
    results = [
        jax.ShapeDtypeStruct(operands[k].shape, operands[k].dtype) for k in aliases
    ]
    options = {"input_output_aliases": aliases, "has_side_effect": True}
    target = jax.ffi.ffi_call(STEP, results, **options)
    usual = {"rule": name, "traced": np.array([0]), "threads": np.int32(2)}
    try:
        call = jax.jit(lambda *operands: target(*operands, **usual | others))
        jax.block_until_ready(call(*operands))
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        expect(refused, error)
        return
    expect(not refused, "was done")


# States -------------------------------------------------------------------------------

PARAMS = {"w": np.linspace(-1, 1, 6, dtype="f").reshape(2, 3), "b": np.ones(1, "f")}


def states(long: bool) -> Iterator[Attack]:
    """Every leaf of a state with another dtype, shape or type, at every door."""
    names = ["adam", "nadam", "novograd", "schedule_free_sgd", "sophia_g", "prodigy"]
    for name in names if long else names[2:5]:
        opt = getattr(fj, name)(lr=0.1)
        _, state = opt.step(PARAMS, PARAMS, opt.init(PARAMS))
        state = jax.tree.map(np.asarray, state)
        leaves, tree = jax.tree.flatten(state)
        doors: dict[str, Callable[[Any], Any]] = {
            "step": partial(opt.step, PARAMS, PARAMS),
            "a compiled step": partial(jax.jit(opt.step), PARAMS, PARAMS),
        }
        if long:
            update = opt.as_optax().update
            doors["as_optax"] = partial(swapped, partial(update, PARAMS), PARAMS)
        if opt.variant.evaluate is not None:
            doors["eval_params"] = partial(opt.eval_params, PARAMS)
        if opt.rule.estimate is not None:
            doors["estimate"] = partial(opt.estimate, PARAMS)
        places = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(state)]
        for (door, do), (k, leaf) in itertools.product(
            doors.items(), enumerate(leaves)
        ):
            for what, other in others(leaf, long):
                changed = jax.tree.unflatten(
                    tree, [*leaves[:k], other, *leaves[k + 1 :]]
                )
                said = f"{name}, {door}: state{places[k]} {what}"
                yield said, partial(refused, do, changed)
        for door, do in doors.items():
            for what, buffers in (
                ("without a buffer", dict(list(state.buffers.items())[1:])),
                ("with another buffer", {**state.buffers, "other": PARAMS}),
                ("with a list", list(state.buffers.values())),
                ("with less", {n: {"w": b["w"]} for n, b in state.buffers.items()}),
            ):
                changed = state._replace(buffers=buffers)
                yield f"{name}, {door}: {what}", partial(refused, do, changed)


def swapped(function: Callable[[Any, Any], Any], second: Any, first: Any) -> Any:
    return function(first, second)


def others(leaf: Any, long: bool) -> Iterator[tuple[str, Any]]:
    kinds = [
        "float32",
        "float16",
        "uint8",
        "int8",
        "bool",
        "complex64",
        "int32",
        "uint32",
    ]
    integers = ("i", "u") if leaf.dtype == np.int32 else ()
    for kind in kinds if long else kinds[:4]:
        if np.dtype(kind) != leaf.dtype and np.dtype(kind).kind not in integers:
            yield f"as {kind}", np.ones(leaf.shape, kind)
            yield f"as JAX's {kind}", jnp.ones(leaf.shape, kind)
    for shape in (
        (*leaf.shape, 2),
        (3, *leaf.shape),
        leaf.shape[1:],
        (0,),
        (2, 1, 1, 2),
    ):
        if shape != leaf.shape:
            yield f"of shape {shape}", np.ones(shape, leaf.dtype)
    yield "as None", None
    if leaf.shape:
        yield "as a number", 1.5


def refused(do: Callable[[Any], Any], state: Any) -> None:
    """By an error in Python, of which neither XLA nor the kernels hear."""
    try:
        jax.block_until_ready(do(state))
    except (TypeError, ValueError) as error:
        expect("state" in str(error), f"the error does not say that: {error}")
        return
    expect(False, "was done")


def main(kind: str, form: str) -> None:
    attacks = {"frames": frames, "calls": calls, "states": states}[kind]
    for what, attack in attacks(form == "long"):
        print(json.dumps({"begun": what}), flush=True)
        problem = None
        try:
            attack()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({"what": what, "problem": problem}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
