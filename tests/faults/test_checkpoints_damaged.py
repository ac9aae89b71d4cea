"""Checkpoint files that are damaged: flipped bits, missing ends, hostile headers. They
are refused by their name, and then nothing has changed."""

import functools
import itertools
import json
import pickle
import random
import re
import struct
import sys
import zlib

import numpy as np
import pytest
from cases import alike
from checkpoints import TRAINED, everything, trained
from test_faults_state import damaged, raised_by_us

import fastopt


def in_our_words(error):
    """What was wrong is said by us, below the statement that names the file."""
    return raised_by_us(error.__cause__ or error)


def judge(opt, path, data, saved):
    """Load a file that has something else than was saved. It is refused by its name,
    and then nothing has changed; or what changed has no meaning. Whether it is
    refused."""
    path.write_bytes(data)
    before = everything(opt)
    try:
        opt.load(path)
    except (TypeError, ValueError) as error:
        assert str(error).startswith(f"cannot load {path}: "), error
        assert alike(everything(opt), before), f"changed, with {error}"
        assert in_our_words(error), f"not in our words: {error.__cause__!r}"
        return True
    assert alike(everything(opt), saved), "taken as something else"
    opt.load_state_dict({k: v for k, v in before.items() if k != "arrays"})
    for array, value in zip(opt._params.arrays, before["arrays"], strict=True):
        array[...] = value
    return False


@pytest.fixture(params=TRAINED)
def file(request, tmp_path):
    """An optimizer, a file of another state, its bytes, and what it has."""
    other = trained(request.param)
    path = tmp_path / "run"
    other.save(path, params=True)
    opt = trained(request.param, 1)
    return opt, path, path.read_bytes(), everything(other)


def refused(*arguments):
    assert judge(*arguments), "not refused"


def test_flipped_bits(file, campaign):
    """Every bit of a file has a meaning, so every flip is refused."""
    opt, path, data, saved = file
    rng = random.Random(0)
    length = 8 + int.from_bytes(data[:8], "little")
    places = [rng.randrange(8 * len(data)) for _ in range(200)]
    header = range(0, 8 * length, 1 if campaign.long else 89)
    if campaign.long:
        places += [rng.randrange(8 * len(data)) for _ in range(5000)]
    for place in (*places, *header):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        campaign.attempt(f"bit {place}", refused, opt, path, flipped, saved)
    assert not judge(opt, path, data, saved)


def test_files_that_are_cut_off(file, campaign):
    opt, path, data, saved = file
    length = 8 + int.from_bytes(data[:8], "little")
    every = campaign.long or isinstance(opt, fastopt.Optimizer)
    header = range(0, length, 1 if every else 7)
    ends = {*range(0, len(data), 4096), *header, *range(16), len(data) - 1}
    for end in sorted(ends):
        campaign.attempt(f"at {end}", refused, opt, path, data[:end], saved)
    for more in (b"\0", data, bytes(4096)):
        campaign.attempt("longer", refused, opt, path, data + more, saved)
    # Zeros where a disk has lost blocks.
    for begin in range(0, len(data), 4096):
        lost = data[:begin] + bytes(min(4096, len(data) - begin)) + data[begin + 4096 :]
        if lost != data:
            campaign.attempt(f"zeros at {begin}", refused, opt, path, lost, saved)


def put_together(header, data, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(raw) if length is None else length
    return struct.pack("<Q", size % 2**64) + raw + data


def taken_apart(data):
    """A file's header, as JSON has it, what it says in "fastopt", and its data."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return header, json.loads(header["__metadata__"]["fastopt"]), data[end:]


def with_metadata(header, text):
    """A header with something else in "fastopt", and the checksum that this has."""
    text = text if isinstance(text, str) else json.dumps(text)
    crc = zlib.crc32(text.encode(errors="surrogatepass"))
    return {
        **header,
        "__metadata__": {
            **header["__metadata__"],
            "fastopt": text,
            "fastopt_crc32": f"{crc:08x}",
        },
    }


def changed_entry(header, data, name, **changes):
    return put_together({**header, name: {**header[name], **changes}}, data)


def wrong_text(header, metadata, data):
    """Headers that are not JSON, or not ours. Each is a file, by what is wrong."""
    raw, name = json.dumps(header).encode(), biggest(header)
    for length in (
        0,
        1,
        2,
        2**63 - 1,
        2**63,
        2**64 - 1,
        10**8,
        10**8 + 1,
        len(raw) - 1,
    ):
        yield f"length {length}", put_together(raw, data, length)
    for what in (b"", b"{}", b"[]", b"null", b'"x"', b"\xff\xfe{}", b"\0" * 64, b"{"):
        yield f"header {what!r}", put_together(what, data)
    yield "not UTF-8", put_together(raw[:-1] + b', "\xff": 1}', data)
    yield "deep lists", put_together(b"[" * 200_000 + b"]" * 200_000, data)
    yield "deep dicts", put_together(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, data)
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1.0", b"9" * 5000):
        changed = raw.replace(b'"shape": [', b'"shape": [' + number + b", ", 1)
        yield f"the number {number[:9]!r}", put_together(changed, data)
    twice = raw[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}".encode()
    yield "a name twice", put_together(twice, data)
    yield "a key twice", put_together(raw.replace(b'"dtype"', b'"shape"', 1), data)


def biggest(header):
    return next(key for key in header if key != "__metadata__" and "'w'" in key)


def wrong_entries(header, metadata, data):
    """What the header says of an array is not so."""
    name = biggest(header)
    entry = header[name]
    (n,), (begin, end) = entry["shape"], entry["data_offsets"]
    kinds = (
        "F32",
        "f32",
        "F8_E4M3",
        "I64",
        "BOOL",
        "C64",
        "",
        None,
        4,
        ["F32"],
        "BF16",
    )
    shapes = [None, "x", {}, [-n], [-1, -n], [n + 1], [n, 2], [str(n)], [float(n)]]
    shapes += [[True], [n, 0], [2**62, 4], [2**31, 2**31], [10**400], [[n]], [None]]
    shapes += [[0, 2**62], [1] * 65 + [n], [n, -1, -1]]
    shapes += [functools.reduce(lambda x, _: [x], range(50), n)]
    offsets = [
        None,
        [],
        [begin],
        [begin, end, end],
        "xy",
        [end, begin],
        [[begin], [end]],
    ]
    offsets += [[-1, end - begin - 1], [begin + 1, end + 1], [begin, end + 1]]
    offsets += [[begin, end - 1], [begin, 2**63], [2**64, 2**64 + end - begin]]
    offsets += [[str(begin), str(end)], [float(begin), end], [True, end]]
    offsets += [[begin + 2**62, end + 2**62]]
    for key, values in ("dtype", kinds), ("shape", shapes), ("data_offsets", offsets):
        for value in values:
            if value != entry[key]:
                changed = changed_entry(header, data, name, **{key: value})
                yield f"{key} {str(value)[:30]}", changed
    yield "an entry that is no dict", put_together({**header, name: [1]}, data)
    yield "an entry with more", changed_entry(header, data, name, more=1)
    lacking = {key: value for key, value in entry.items() if key != "dtype"}
    yield "an entry with less", put_together({**header, name: lacking}, data)
    without = {key: value for key, value in header.items() if key != name}
    yield "a missing array", put_together(without, data)
    more = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    yield "one array more", put_together({**header, "more": more}, data + bytes(4))
    yield "an overlap", put_together({**header, "more": entry}, data)


def right_bytes(header, metadata, data):
    """All bytes have their checksums; what they mean has changed."""
    entries = {key: value for key, value in header.items() if key != "__metadata__"}
    last = max(entries, key=lambda key: entries[key]["data_offsets"][1])
    begin, end = entries[last]["data_offsets"]
    shifted, offsets = data[:begin] + bytes(4) + data[begin:], [begin + 4, end + 4]
    yield "a gap", changed_entry(header, shifted, last, data_offsets=offsets)
    for a, b in itertools.combinations(entries, 2):
        one, other = entries[a], entries[b]
        same = all(one[key] == other[key] for key in ("dtype", "shape"))
        contents = {data[slice(*entry["data_offsets"])] for entry in (one, other)}
        if same and len(contents) == 2:
            yield f"{a} for {b}", put_together({**header, a: other, b: one}, data)
    for key, entry in entries.items():
        shapes = {  # not [6]: an array in a FlatBuffer is flat, and has the same state
            "'b'": ([3, 2], [1, 2, 3], [2, 3, 1]),
            "'none'": ([0, 2**62], [2**62, 0, 2**62], [0, 1], [0] * 65),
        }
        for shape in next((v for k, v in shapes.items() if k in key), ()):
            if entry["shape"] in ([2, 3], [0]):
                changed = changed_entry(header, data, key, shape=shape)
                yield f"{key} of shape {str(shape)[:30]}", changed
        if entry["dtype"] in ("I8", "U8"):
            kind = {"I8": "U8", "U8": "I8"}[entry["dtype"]]
            yield f"{key} of {kind}", changed_entry(header, data, key, dtype=kind)


def wrong_metadata(header, metadata, data):
    """Metadata that is not ours, or has a wrong checksum."""
    for wrong in (None, [], "x", {}, {"fastopt": 3}, {"fastopt": "{}"}, {"format": ""}):
        yield f"metadata {wrong}", put_together({**header, "__metadata__": wrong}, data)
    without = {key: value for key, value in header.items() if key != "__metadata__"}
    yield "no metadata", put_together(without, data)
    of = header["__metadata__"]
    for version in ("2", "0", "", "1.0", "01", None, 1, [1], "9" * 5000):
        changed = {**header, "__metadata__": {**of, "fastopt_version": version}}
        yield f"version {str(version)[:9]}", put_together(changed, data)
    for crc in ("", "00000000", None, 5, of["fastopt_crc32"] + " "):
        changed = {**header, "__metadata__": {**of, "fastopt_crc32": crc}}
        yield f"crc {crc!r}", put_together(changed, data)


def wrong_meaning(header, metadata, data):
    """Metadata with a right checksum."""

    def file(metadata):
        return put_together(with_metadata(header, metadata), data)

    for text in ("", "null", "[]", "{}", "NaN", "[" * 100_000, '{"state":1}', "\ud800"):
        yield f"text {text[:9]!r}", file(text)
    for number in ("0.5", "NaN", "-Infinity", "1e5"):
        text = header["__metadata__"]["fastopt"]
        bare = re.sub(r'{"float":"[^"]*"}', number, text, count=1)
        yield f"a bare {number}", file(bare)
    for key in metadata:
        for value in (None, 1, "x", [], {}, [[0, 1, 2]], [None], {"float": "nan"}):
            if value != metadata[key] and (key, value) != ("params", None):
                yield f"{key} {value}", file({**metadata, key: value})
    name = biggest(header)
    tags = [
        {"float": "x"},
        {"float": 1},
        {"float": "0x1p99999"},
        {"dict": []},
        {"x": 1},
    ]
    tags += [{"array": "nowhere", "crc32": "00000000"}, {"array": name, "crc32": None}]
    tags += [{"array": 3, "crc32": ""}, {"array": name}, {"dict": {}, "more": 1}]
    tags += [functools.reduce(lambda x, _: {"dict": {"a": x}}, range(20), 1)]
    tags += [functools.reduce(lambda x, _: [x], range(20), 1)]
    for wrong in tags:
        state = {"dict": {**metadata["state"]["dict"], "more": wrong}}
        yield f"{str(wrong)[:30]}", file({**metadata, "state": state})
    for wrong in ([-1, 0, 1], [1, 0, 1], [0, 2, 1], [0, 1], [0, 1.5, 2], [0, 0, 2**64]):
        extents = [wrong, *metadata["extents"][1:]]
        yield f"extent {wrong}", file({**metadata, "extents": extents})


@pytest.mark.parametrize(
    "kind", [wrong_text, wrong_entries, right_bytes, wrong_metadata, wrong_meaning]
)
def test_hostile_headers(kind, file, campaign):
    opt, path, data, saved = file
    for what, bad in kind(*taken_apart(data)):
        campaign.attempt(what, refused, opt, path, bad, saved)


def as_json(value):
    """What is JSON of ours, which has no NaN, as text; or None."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None


def load_or_refuse(opt, path):
    """Load something that may be right. If it is refused, nothing has changed."""
    before = everything(opt)
    try:
        opt.load(path)
    except (TypeError, ValueError, RuntimeError) as error:
        assert alike(everything(opt), before), f"changed, with {error!r}"
        assert any(
            str(p) in str(error) for p in ([path] if type(path) is not list else path)
        )
        assert in_our_words(error), f"not in our words: {error!r}"
    else:
        opt.load_state_dict({k: before[k] for k in before if k != "arrays"})


def test_state_that_is_wrong_in_a_sound_file(file, campaign):
    """With right checksums: it is judged as a state is that a user passes."""
    opt, path, data, saved = file
    header, metadata, rest = taken_apart(data)
    rng = random.Random(0)
    for _ in range(2000 if campaign.long else 60):
        changed, how = damaged(metadata, rng)
        if (text := as_json(changed)) is None:
            continue
        bad = put_together(with_metadata(header, text), rest)

        def check(bad=bad):
            path.write_bytes(bad)
            load_or_refuse(opt, path)

        campaign.attempt(how, check)


def test_files_of_ranks_that_are_wrong(tmp_path, campaign):
    """One of two is damaged, with right checksums."""
    paths = [tmp_path / "0", tmp_path / "1"]
    opts = [fastopt.adamw({"w": np.ones(n)}, lr=0.1, ema=0.9) for n in (5, 3, 8)]
    opt = opts.pop()
    for begin, rank, path in zip((0, 5), opts, paths, strict=True):
        rank.step({"w": np.arange(1.0, 1 + rank._params.arrays[0].size)})
        rank.save(path, params=True, shard={"w": (begin, 8)})
    sound = [path.read_bytes() for path in paths]
    rng = random.Random(0)
    for _ in range(4000 if campaign.long else 200):
        number = rng.randrange(2)
        header, metadata, rest = taken_apart(sound[number])
        changed, how = damaged(metadata, rng)
        if (text := as_json(changed)) is None:
            continue

        def check(number=number, text=text, header=header, rest=rest):
            for path, data in zip(paths, sound, strict=True):
                path.write_bytes(data)
            paths[number].write_bytes(put_together(with_metadata(header, text), rest))
            load_or_refuse(opt, paths)

        campaign.attempt(f"{how} in {number}", check)


class Canary:
    """It writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_read(file, tmp_path, monkeypatch):
    opt, path, data, saved = file
    canary = tmp_path / "canary"
    header, metadata, rest = taken_apart(data)
    raw = pickle.dumps(Canary(str(canary)))
    for bad in (
        raw,
        put_together(raw, rest),
        put_together(with_metadata(header, raw.decode("latin1")), rest),
        put_together(header, raw),
        put_together(header, raw.ljust(len(rest), b".")),
    ):
        refused(opt, path, bad, saved)
    assert not canary.exists()
    pickle.loads(raw)
    assert canary.exists()
    for name in ("safetensors", "checkpoint", "shards", "saving"):
        module = sys.modules[f"fastopt.optimizer.{name}"]
        assert not {"pickle", "marshal", "shelve"} & vars(module).keys()


def test_other_files(tmp_path):
    """Which users may take for a checkpoint."""
    package = pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    opt, path = trained("adamw"), tmp_path / "run"
    save_file({"w": np.ones(3, np.float32)}, path)
    with pytest.raises(ValueError, match="but not one that fastopt saved"):
        opt.load(path)
    np.save(path.with_suffix(".npy"), np.ones(100))
    with pytest.raises(ValueError, match="not a safetensors file, but an array"):
        opt.load(path.with_suffix(".npy"))
    assert package
