"""What is saved to a file comes back to the last bit, and a run goes on from there as
if it had not been interrupted."""

import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cases import alike, bfloat16, same_bits
from checkpoints import LARGE, RUNS, Run, adamw, as_list, draw, flat, nested
from installed import needs_numba
from test_golden import RUNS as OF_GOLDEN
from test_golden import SAVED, TOTAL, decoded

import fastopt
from fastopt.memory.trees import leaves
from fastopt.optimizer import safetensors
from fastopt.optimizer.safetensors import Content
from fastopt.optimizer.shards import names_of

STATES = Path(__file__).with_name("states.json")
OTHERS = "jax.", "torch."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def all_arrays(value):
    """All arrays of a nested state."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, np.ndarray)]


# Round trips --------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(name, path):
    run = RUNS[name]()
    run.go_on(3)
    run.opt.save(path)
    saved = run.everything()
    again = RUNS[name]()
    again.take_params(run)
    again.opt.load(path)
    assert alike(again.everything(), saved)
    run.go_on(10)
    again.go_on(10)
    assert alike(again.everything(), run.everything())
    assert not alike(again.everything(), saved)


@pytest.mark.parametrize("name", RUNS)
def test_one_file_resumes_a_run_with_its_parameters(name, path):
    run, again = RUNS[name](), RUNS[name]()
    run.go_on(2)
    run.opt.save(path, params=True)
    again.go_on(1)  # not with zeros: a switch may be on, and averages are there
    again.opt.load(path)
    again.next = run.next
    assert alike(again.everything(), run.everything())
    run.go_on(3)
    again.go_on(3)
    assert alike(again.everything(), run.everything())


@pytest.mark.parametrize("name", ["adamw", "lamb", "ema", "Lookahead", "Adafactor"])
def test_before_the_first_step(name, path):
    run, again = RUNS[name](), RUNS[name]()
    run.opt.save(path)
    again.go_on(2)
    again.take_params(run)
    again.opt.load(path)
    run.go_on(3)
    again.go_on(3)
    assert alike(again.everything(), run.everything())


def test_after_groups_were_added(path):
    """In two ways; the second has all of them from the beginning."""
    added = {"params": {"b": np.ones(2)}, "lr": 0.3}

    def opt(params, *more):
        return fastopt.adamw([{"params": params}, *more], lr=0.1, ema=0.9)

    first = {"w": np.ones(3)}
    run = opt(first)
    run.step([{"w": np.ones(3) + 1}])
    run.add_group(added)
    run.save(path, params=True)
    for later in (False, True):
        second, more = {"w": np.zeros(3)}, {"params": {"b": np.zeros(2)}}
        other = opt(second) if later else opt(second, more)
        if later:
            other.add_group(more)
        other.load(path)
        assert alike(second, first) and alike(more["params"], added["params"])
        assert alike(other.state_dict(), run.state_dict())


def test_an_estimate_before_the_first_step(path):
    def run():
        return Run(lambda params: fastopt.sophia_g(params, lr=0.1))

    first, second = run(), run()
    first.opt.estimate(first.grads(9))
    first.opt.save(path)
    second.opt.load(path)
    first.go_on(3)
    second.go_on(3)
    assert alike(first.everything(), second.everything())


def test_every_number_keeps_its_bits(path):
    """Those that decimal digits, or arithmetic, might change."""
    numbers = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e-40, 0.1]
    words = np.array([0x7FF8000000000123, 0xFFF4000000000001], np.uint64)
    special = np.concatenate([numbers, words.view(np.float64)])
    opt = fastopt.sgd(np.ones(10), lr=0.1, momentum=0.9)
    opt.step(np.ones(10))
    (array,) = opt.state["momentum_buffer"]
    array[:] = special
    opt.lr = 5e-324
    opt.save(path)
    other = fastopt.sgd(np.ones(10), lr=0.5, momentum=0.5)
    other.load(path)
    (back,) = other.state["momentum_buffer"]
    assert back.tobytes() == special.tobytes()
    assert (other.lr, other.momentum) == (5e-324, 0.9)


def test_numbers_that_are_carried(path):
    """Such as prodigy's d, infinities and NaN among them."""
    opt = fastopt.prodigy(np.ones(3))
    opt.step(np.full(3, np.inf))
    opt.save(path)
    other = fastopt.prodigy(np.ones(3))
    other.load(path)
    carried = [o._bound.program.carried for o in (opt, other)]
    assert same_bits(*carried) and not np.isfinite(carried[0]).all()


@needs_numba
def test_backends_read_each_others_files(path):
    runs = [
        Run(lambda params, b=b: fastopt.adamw(params, backend=b, formats="8bit"))
        for b in ("numpy", "numba")
    ]
    for first, second in (runs, runs[::-1]):
        first.go_on(2)
        first.opt.save(path, params=True)
        second.opt.load(path)
        second.next = first.next
        assert alike(first.everything(), second.everything())
        second.go_on(1)


def test_parameters_are_found_by_name(path):
    run = Run(adamw, flat)
    run.go_on(2)
    run.opt.save(path, params=True)
    arrays = draw(5, dict(reversed(run.shapes.items())), np.float32)
    opt = fastopt.adamw(arrays)
    opt.load(path)
    parts = dict(leaves(run.trees[0].views))
    for name, array in leaves(arrays):
        assert same_bits(array, parts[name])


def test_two_arrays_of_one_name(path):
    """Whose keys look alike."""

    class Key:
        def __repr__(self):
            return "key"

    first, second = ({Key(): np.ones(2), Key(): np.zeros(3)} for _ in range(2))
    opt = fastopt.sgd(first, momentum=0.9)
    opt.step({key: array + 1 for key, array in first.items()})
    opt.save(path, params=True)
    other = fastopt.sgd(second, momentum=0.1)
    other.load(path)
    assert alike(list(first.values()), list(second.values()))
    assert alike(opt.state["momentum_buffer"], other.state["momentum_buffer"])


GOLDEN = json.loads(STATES.read_text())


@pytest.mark.parametrize("number", [3, 2])
@pytest.mark.parametrize("name", [n for n in GOLDEN if not n.startswith(OTHERS)])
def test_states_of_earlier_versions_can_be_in_a_file(name, number, path):
    """A file has a state of any format that ``load_state_dict`` reads."""
    saved, before, after = map(decoded, GOLDEN[name].values())
    run = OF_GOLDEN[name]()
    core = saved.get("opt", saved)
    core["format"] = number
    if number == 2:
        del core["params"]
    names = names_of(run.opt._params)
    extents = [(0, array.size, array.size) for array in before]
    safetensors.write(path, Content(saved, before, names, extents))
    run.opt.load(path)
    for k in range(SAVED, TOTAL):
        run.step(k)
    assert alike(run.values(), after)


def test_state_without_names_is_loaded_by_position(path):
    params = {"w": np.ones(3), "b": np.ones(2)}
    opt = fastopt.adamw(params)
    opt.step({"w": np.full(3, 2.0), "b": np.ones(2)})
    state = {**opt.state_dict(), "format": 2}
    del state["params"], state["formats"], state["seed"]
    names = ["[0]['w']", "[0]['b']"]
    content = Content(state, list(params.values()), names, [(0, 3, 3), (0, 2, 2)])
    safetensors.write(path, content)
    others = [np.zeros(3), np.zeros(2)]
    other = fastopt.adamw(others)
    other.load(path)
    assert alike(others, list(params.values()))
    assert alike(other.state, opt.state) and other.steps == 1


# Parameters ---------------------------------------------------------------------------


def test_which_parameters_are_loaded(path):
    def opt():
        return Run(adamw, as_list)

    run, plain = opt(), path.with_name("plain")
    run.go_on(1)
    run.opt.save(path, params=True)
    run.opt.save(plain)
    for file, params, moves in (
        (path, None, True),
        (path, True, True),
        (path, False, False),
        (plain, None, False),
        (plain, False, False),
    ):
        other = opt()
        before = [array.copy() for array in other.params]
        other.opt.load(file, params=params)
        assert alike(other.params, run.params if moves else before)
        assert other.opt.steps == 1
    with pytest.raises(ValueError, match="plain has no parameters, because"):
        opt().opt.load(plain, params=True)
    for value in (1, "yes", None, np.ones(2)):
        with pytest.raises(TypeError, match="params must be True or False"):
            run.opt.save(path, params=value)
    with pytest.raises(TypeError, match="params must be True or False"):
        run.opt.load(path, params=0)


def test_parameters_that_cannot_be_written_are_refused(path):
    run = Run(adamw)
    run.go_on(1)
    run.opt.save(path, params=True)
    before = run.everything()
    run.params[1].flags.writeable = False
    with pytest.raises(ValueError, match="is read-only now"):
        run.opt.load(path)
    run.opt.load(path, params=False)
    run.params[1].flags.writeable = True
    assert alike(run.everything(), before)
    other = Run(adamw, dtype=bfloat16)
    with pytest.raises(TypeError, match=r"params\[0\] must be a NumPy array of bfloat"):
        other.opt.load(path)


def test_copies_follow_the_parameters(path):
    params = {"w": np.linspace(0.1, 1, 7, dtype=np.float32), "b": np.ones(3, "f4")}
    run = fastopt.sgd(params, lr=0.1)
    run.step({"w": np.full(7, 0.3, "f4"), "b": np.ones(3, "f4")})
    run.save(path, params=True)
    zeros = {name: np.zeros_like(array) for name, array in params.items()}
    copies = {"w": np.zeros(7, bfloat16), "b": None}
    fastopt.sgd(zeros, copy_to=copies).load(path)
    assert same_bits(copies["w"], params["w"].astype(bfloat16))
    assert alike(zeros, params)


# The file -----------------------------------------------------------------------------


def test_the_safetensors_package_reads_it(path):
    package = pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    for name in RUNS:
        run = RUNS[name]()
        run.go_on(2)
        run.opt.save(path, params=True)
        with package.safe_open(path, "np") as file:
            metadata = file.metadata()
            found = {key: file.get_tensor(key) for key in file.keys()}
        state = run.opt.state_dict()
        assert len(found) == len(all_arrays(state)) + len(run.params)
        core, before = (state["opt"], "opt.") if "opt" in state else (state, "")
        names = json.loads(metadata["fastopt"])["names"]
        for buffer, arrays in core["state"].items():
            for of, array in zip(names, arrays, strict=True):
                assert same_bits(found[f"{before}state.{buffer}.{of}"], array)
        for of, array in zip(names, run.params, strict=True):
            assert same_bits(found[f"param.{of}"], array)
        if any(array.dtype == bfloat16 for array in found.values()):
            continue  # which the package does not write from NumPy's arrays
        # What it writes again is the same to us.
        save_file(found, path, metadata)
        again = RUNS[name]()
        again.opt.load(path)
        assert alike(again.everything(), run.everything())


def test_what_is_in_it(path):
    run = Run(adamw, nested)
    run.go_on(1)
    run.opt.save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 64 == 0
    metadata = header.pop("__metadata__")
    assert list(metadata) == ["fastopt_version", "fastopt_crc32", "fastopt"]
    assert all(type(text) is str for text in metadata.values())
    assert "state.m.[0]['deep'][0]" in header
    begins = [entry["data_offsets"][0] for entry in header.values()]
    assert begins == sorted(begins)
    end = max(entry["data_offsets"][1] for entry in header.values())
    assert len(data) == 8 + length + end
    assert '"lr":{"float":"0x1.1eb851eb851ecp-4"}' in metadata["fastopt"]


def test_arrays_begin_at_multiples_of_their_width(path):
    RUNS["formats 8bit"]().opt.save(path)
    with open(path, "rb") as file:
        arrays = all_stored(safetensors.contents(file).state)
        for stored in arrays:
            assert stored.start % safetensors.dtype_of(stored.kind).itemsize == 0
    assert len({stored.kind for stored in arrays}) == 3


def all_stored(value):
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, safetensors.Stored)]


def test_keys_with_dots(path):
    """A user's rule may have such buffers."""
    state = {"a": {"b": np.ones(2)}, "a.b": np.zeros(3), "a.b#1": np.full(1, 2.0)}
    safetensors.write(path, Content(state, None, [], []))
    with open(path, "rb") as file:
        assert alike(safetensors.read_all(safetensors.contents(file).state), state)


@pytest.mark.parametrize("name", ["adamw", "formats r8", "Lookahead", "float64"])
@pytest.mark.parametrize("block", [8, 24, 1000])
def test_blocks(name, block, path, monkeypatch):
    """A file does not depend on how many bytes are written at a time."""
    run = RUNS[name]()
    run.go_on(2)
    run.opt.save(path, params=True)
    whole = path.read_bytes()
    monkeypatch.setattr(safetensors, "BLOCK", block)
    run.opt.save(path, params=True)
    assert path.read_bytes() == whole
    again = RUNS[name]()
    again.opt.load(path)
    assert alike(again.everything(), run.everything())


def test_writes_that_take_a_part_go_on(path):
    class Slow:
        def __init__(self):
            self.taken = b""

        def write(self, data):
            self.taken += bytes(data[:3])
            return min(len(data), 3)

    file = Slow()
    safetensors.write_all(file, b"0123456789")
    assert file.taken == b"0123456789"


def test_saving_takes_no_second_copy(path):
    params = np.ones(4 << 20, np.float32)
    opt = fastopt.adamw(params, ema=0.9)
    opt.step(np.ones_like(params))
    tracemalloc.start()
    opt.save(path, params=True)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert os.path.getsize(path) > 64 << 20 and most < 1 << 20


def test_big_endian_memory(path, monkeypatch):
    """Written in the other order, as a file must not be here; what reads it swaps."""
    run, again = RUNS["float64"](), RUNS["float64"]()
    run.go_on(2)
    run.opt.save(path)
    right = path.read_bytes()
    monkeypatch.setattr(safetensors, "SWAPS", True)
    run.opt.save(path)
    assert path.read_bytes() != right
    again.opt.load(path)
    assert alike(again.opt.state_dict(), run.opt.state_dict())


SIMULATED = """
import numpy as np, fastopt, sys
from numba import cuda
rng = np.random.default_rng(0)
arrays = {"w": rng.normal(size=(65, 64)).astype("f4"), "b": np.ones(3, "f4")}
def opt(seed):
    params = {n: cuda.to_device(a) for n, a in arrays.items()}
    return params, fastopt.adamw(params, formats="8bit", ema=0.9, backend="cuda")
params, run = opt(0)
grads = {n: cuda.to_device(a) for n, a in arrays.items()}
run.step(grads)
run.accumulate(grads)
run.save(sys.argv[1], params=True)
again, other = opt(1)
other.load(sys.argv[1])
host = {n: np.zeros_like(a) for n, a in arrays.items()}
third = fastopt.adamw(host, formats="8bit", ema=0.9, backend="numpy")
third.load(sys.argv[1])
for name in arrays:
    one = params[name].copy_to_host()
    assert (again[name].copy_to_host() == one).all() and (host[name] == one).all()
    assert (one != arrays[name]).any()
states = [o.state_dict() for o in (run, other, third)]
for state in states[1:]:
    assert state["steps"] == 1 and state["accumulated"]
    for name, buffers in state["state"].items():
        for a, b in zip(buffers, states[0]["state"][name]):
            assert a.tobytes() == b.tobytes() and a.dtype == b.dtype
"""


def test_device_arrays_in_the_simulator(path):
    pytest.importorskip("numba_cuda")
    done = subprocess.run(
        [sys.executable, "-c", SIMULATED, path],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


# The folder ---------------------------------------------------------------------------


def small():
    opt = fastopt.sgd(np.ones(3), momentum=0.9)
    opt.step(np.ones(3))
    return opt


def test_paths(tmp_path, monkeypatch):
    opt = small()
    monkeypatch.chdir(tmp_path)
    for path in (
        "a",
        Path("b"),
        os.fsencode("c"),
        tmp_path / "d",
        "é" * 100,
        "e" * 255,
    ):
        opt.save(path)
        small().load(path)
        assert len(os.listdir()) == 1
        os.unlink(path)
    for path in (3, None, ["a"], np.ones(2)):
        with pytest.raises(TypeError):
            opt.save(path)
    with pytest.raises(ValueError, match="path is an empty list"):
        opt.load([])
    assert not os.listdir()


def test_permissions(path):
    """As open() would give them; those of a file that is replaced stay."""
    opt, before = small(), os.umask(0o027)
    try:
        opt.save(path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
        os.chmod(path, 0o604)
        opt.save(path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o604
    finally:
        os.umask(before)


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    opt = small()
    there, link = tmp_path / "folder" / "there", tmp_path / "link"
    there.parent.mkdir()
    link.symlink_to(there)
    for _ in range(2):  # where it points to is nothing at first
        opt.save(link)
        opt.step(np.ones(3))
        assert link.is_symlink() and not there.is_symlink()
        assert sorted(os.listdir(tmp_path)) == ["folder", "link"]
        assert os.listdir(there.parent) == ["there"]
        small().load(link)
    hard = tmp_path / "hard"
    os.link(there, hard)
    old = hard.read_bytes()
    opt.step(np.ones(3))
    opt.save(there)
    assert hard.read_bytes() == old != there.read_bytes()  # another file from now on


def test_what_is_no_place_for_a_file(tmp_path):
    opt = small()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "fifo")
    for path, error in (
        (tmp_path, IsADirectoryError),
        (f"{tmp_path}/new/", IsADirectoryError),
        ("", IsADirectoryError),
        (".", IsADirectoryError),
        (tmp_path / "missing" / "file", FileNotFoundError),
        (tmp_path / "file" / "more", NotADirectoryError),
        (tmp_path / "loop", OSError),
        (tmp_path / "fifo", OSError),
        ("/dev/null", OSError),
        (tmp_path / ("n" * 256), OSError),
        ("with\0zero", ValueError),
    ):
        before = sorted(os.listdir(tmp_path))
        for door in (opt.save, opt.load):
            with pytest.raises(error) as raised:
                door(path)
            if isinstance(raised.value, OSError):
                assert str(path) in str(raised.value)
        assert sorted(os.listdir(tmp_path)) == before
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_a_step_in_another_thread_refuses(path):
    opt, errors = small(), []

    class Gradient:
        """One that saves in another thread while a step looks at it."""

        @property
        def __array_interface__(self):
            def save():
                try:
                    opt.save(path)
                except RuntimeError as error:
                    errors.append(error)

            thread = threading.Thread(target=save)
            thread.start()
            thread.join()
            return np.ones(3).__array_interface__ | {"keep": self}

    opt.step(Gradient())
    assert errors and "in a step, in another thread" in str(errors[0])
    assert not path.exists()


def test_names_are_reserved():
    for name in ("save", "load"):
        code = f"def scalars(t, {name}=1.0):\n    return ({name},)"
        space = {}
        exec(textwrap.dedent(code), space)
        with pytest.raises(TypeError, match="means something else"):
            fastopt.Rule(lambda p, g, lr: (p - lr * g,), space["scalars"], name="r")


def test_large_is_large_enough():
    """Or the formats would not be tested."""
    sizes = [int(np.prod(shape)) for shape in LARGE.values()]
    assert sum(size >= 4096 for size in sizes) == 2 and min(sizes) < 4096
