"""Files of saved state, in the safetensors format.

Such a file begins with the length of its header, in 8 bytes. The header is JSON; it
says for each array its dtype, its shape and where its bytes are. They follow, in
little-endian order, without gaps. ``__metadata__`` has three strings of ours:

- ``fastopt``: everything that is not an array, as JSON (see :func:`encoded`);
- ``fastopt_crc32``: the checksum of that string;
- ``fastopt_version``: :data:`VERSION`.

The checksums are crc32, in eight digits; that of an array stands beside its name in
``fastopt``. What has none are the dtypes and shapes, which must be those of the
optimizer that loads the state, and the places, which must fill the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from fastopt.memory.arrays import on_device, to_host
from fastopt.memory.formats import FORMATS
from fastopt.memory.segments import Array
from fastopt.rule import shown

VERSION = 1
BLOCK = 8 << 20  # bytes that are written or read at a time
LONGEST = 100_000_000  # bytes of a header: what the safetensors package reads
ALIGNMENT = 64  # bytes: the arrays begin at a multiple of it
DEEPEST = 16  # levels of the JSON; ours has 7
MOST_DIMENSIONS = 32 if np.__version__.startswith("1.") else 64  # NumPy's own

# The dtypes of all state and parameters, by safetensors' names.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
}
NAMES = {name: kind for kind, name in DTYPES.items()}
SWAPS = sys.byteorder == "big"


class Content(NamedTuple):
    """What is in a file.

    Attributes
    ----------
    state
        The ``state_dict()``.
    params
        The parameters, or None if they were not saved.
    names
        What each parameter is called.
    extents
        For each parameter, which elements of a larger array it consists of: the first,
        the end, and the size of that array.
    """

    state: Mapping[str, Any]
    params: Sequence[Any] | None
    names: Sequence[str]
    extents: Sequence[Sequence[int]]

    @property
    def sharded(self) -> bool:
        """Whether some parameters are slices of larger arrays."""
        return any(end - first < size for first, end, size in self.extents)


# Writing ------------------------------------------------------------------------------


class Piece(NamedTuple):
    """An array that is to be written."""

    array: Any  # in host memory or on a device
    kind: str
    shape: tuple[int, ...]
    reference: dict[str, str]  # what the JSON has in its place

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.array.dtype.itemsize)

    def blocks(self) -> Iterator[memoryview]:
        """Yield the bytes, some at a time."""
        flat = self.array.reshape(-1)
        size = BLOCK // int(flat.dtype.itemsize)
        for start in range(0, math.prod(self.shape), size):
            block = flat[start : start + size]
            block = to_host(block) if on_device(block) else block
            yield (block.byteswap() if SWAPS else block).view(np.uint8).data


def write(path: Any, content: Content) -> None:
    """Write a file. Until it is complete, it has another name; then it replaces the one
    that was there at one instant."""
    pieces: dict[str, Piece] = {}
    parts = {
        "state": encoded(content.state, "", content.names, pieces),
        "params": encoded(content.params, ".param", content.names, pieces),
        "names": encoded(content.names, "", (), pieces),
        "extents": encoded(content.extents, "", (), pieces),
    }
    # So each begins at a multiple of its numbers' bytes.
    by_width = sorted(pieces.items(), key=lambda item: -item[1].array.dtype.itemsize)
    pieces = dict(by_width)
    length = len(header(parts, pieces))

    def fill(file: BinaryIO) -> None:
        file.seek(8 + length)
        for piece in pieces.values():
            crc = 0
            for block in piece.blocks():
                crc = zlib.crc32(block, crc)
                write_all(file, block)
            piece.reference["crc32"] = digits(crc)
        file.seek(0)
        write_all(file, length.to_bytes(8, "little") + header(parts, pieces))

    replace(path, fill)


def encoded(
    value: Any, path: str, names: Sequence[str], pieces: dict[str, Piece]
) -> Any:
    """Return what stands for a value in JSON. Arrays are added to ``pieces``.

    A dict becomes {"dict": ...}, a number that is not whole {"float": its hexadecimal
    digits}, an array {"array": its name, "crc32": ...}. Everything else is itself. In a
    list of arrays there is one for each parameter, and they are called like these.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if isinstance(value, (float, np.floating)):
        return {"float": float(value).hex()}
    if isinstance(value, Mapping):
        items = {
            key: encoded(child, f"{path}.{key}", names, pieces)
            for key, child in value.items()
        }
        if not all(isinstance(key, str) for key in items):
            raise TypeError(f"keys of saved state must be strings, got {shown(value)}")
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        ends = names if len(value) == len(names) else range(len(value))
        return [
            encoded(child, f"{path}.{end}", names, pieces)
            for end, child in zip(ends, value, strict=True)
        ]
    kind = NAMES.get(str(getattr(value, "dtype", None)))
    if kind is None:
        raise TypeError(
            f"a checkpoint has arrays of {', '.join(NAMES)}, numbers, strings, lists "
            f"and dicts; it cannot take {shown(value)}"
        )
    name = path[1:] if path[1:] not in pieces else f"{path[1:]}#{len(pieces)}"
    reference = {"array": name, "crc32": digits(0)}
    pieces[name] = Piece(value, kind, tuple(map(int, value.shape)), reference)
    return reference


def header(parts: Mapping[str, Any], pieces: Mapping[str, Piece]) -> bytes:
    """Return a file's header, whose length does not depend on the checksums."""
    text = json.dumps(parts, separators=(",", ":"))
    metadata = {
        "fastopt_version": str(VERSION),
        "fastopt_crc32": digits(zlib.crc32(text.encode())),
        "fastopt": text,
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, piece in pieces.items():
        offsets = [end, end + piece.nbytes]
        entries[name] = {
            "dtype": piece.kind,
            "shape": piece.shape,
            "data_offsets": offsets,
        }
        end = offsets[1]
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % ALIGNMENT)
    if len(head) > LONGEST:
        raise ValueError(
            f"{len(pieces)} arrays need a header of {len(head)} bytes, and a "
            f"safetensors file may have {LONGEST}; use a FlatBuffer, or fewer arrays"
        )
    return head


def digits(crc: int) -> str:
    return f"{crc:08x}"


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write bytes to a file without a buffer, which may take some of them only."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]


def replace(path: Any, fill: Callable[[BinaryIO], None]) -> None:
    """Let a function fill a new file, which then takes the place of ``path``. If there
    is a symbolic link, it stays, and what it points to is replaced."""
    path = os.fsdecode(path)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    # Short enough for any file system. A process that is killed leaves it behind.
    hidden = os.path.join(folder, f".{name[:32]}.{secrets.token_hex(8)}.tmp")
    try:
        mode = mode_of(path)
        try:
            # As open(path, "w") would make it, but for this process alone.
            with open(hidden, "xb", buffering=0) as file:
                if mode is not None:
                    os.chmod(hidden, mode)
                fill(file)
                os.fsync(file.fileno())
            os.replace(hidden, target)
        except BaseException:
            if os.path.lexists(hidden):
                os.unlink(hidden)
            raise
        sync_folder(folder)
    except OSError as error:
        if error.filename in (None, hidden):
            raise OSError(error.errno, error.strerror, path) from error
        raise


def mode_of(path: str) -> int | None:
    """Return the permissions of a file, or None if there is none. Raise OSError if
    something else is there, which must not be replaced."""
    if not os.path.basename(path):  # as if there were a folder, for open() too
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(there.st_mode):
        raise OSError(errno.EINVAL, "This is not a regular file", path)
    return stat.S_IMODE(there.st_mode)


def sync_folder(folder: str) -> None:
    """Wait until a folder has its new entry on the disk, where systems can do that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not this file system
            raise
    finally:
        os.close(opened)


# Reading ------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Stored:
    """An array that has not been read yet."""

    file: BinaryIO
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    crc: str

    def __repr__(self) -> str:
        return f"an array of {self.kind} with shape {self.shape}"

    def read(self) -> Array:
        """Read it into new memory. Raise ValueError if its checksum is wrong."""
        array: Array = np.empty(self.shape, dtype_of(self.kind))
        rest = array.reshape(-1).view(np.uint8).data
        self.file.seek(self.start)
        crc = 0
        while len(rest):
            block = rest[:BLOCK]
            if self.file.readinto(block) != len(block):  # type: ignore[attr-defined]
                raise unreadable(self.file, f"it ends within {self.name}")
            crc = zlib.crc32(block, crc)
            rest = rest[BLOCK:]
        if digits(crc) != self.crc:
            raise unreadable(
                self.file,
                f"it is damaged: {self.name} has the checksum {digits(crc)}, but "
                f"{shown(self.crc)} when it was saved; load an earlier checkpoint",
            )
        return array.byteswap() if SWAPS else array


def unreadable(file: BinaryIO, why: object) -> ValueError:
    return ValueError(f"cannot load {os.fsdecode(file.name)}: {why}")


def dtype_of(kind: str) -> np.dtype[Any]:
    """Return the dtype of a safetensors' name. Raise ImportError if it is bfloat16 and
    ml_dtypes is not installed."""
    return FORMATS["bf16"].dtype if kind == "BF16" else np.dtype(DTYPES[kind])


# How other files begin that people keep states in.
OTHERS = {
    b"PK": "a zip file, as torch.save and np.savez write",
    b"\x80": "a pickle, as pickle.dump writes",
    b"\x93NUMPY": "an array that np.save wrote",
    b"\x89HDF": "an HDF5 file",
}


def opened(path: Any) -> BinaryIO:
    """Open a file to read it. Raise OSError if it is not a regular file, which may have
    no end, or nothing to read yet."""
    mode_of(os.fsdecode(path))
    return open(path, "rb")


def contents(file: BinaryIO) -> Content:
    """Return what is in a file, in which arrays are :class:`Stored`. Raise ValueError
    for anything that the format does not have."""
    try:
        return checked_contents(file)
    except ValueError as error:
        raise unreadable(file, error) from error


def checked_contents(file: BinaryIO) -> Content:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if size < 8 or not 2 <= length <= min(size - 8, LONGEST):
        for begin, what in OTHERS.items():
            if head.startswith(begin):
                raise ValueError(
                    f"it is not a safetensors file, but {what}; load reads what "
                    f"save of an optimizer of fastopt has written"
                )
        raise ValueError(
            f"it is not a safetensors file, or it was cut off: its header would have "
            f"{length} bytes, but the file has {size}"
        )
    entries = parsed("its header", file.read(length))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or "fastopt" not in metadata:
        raise ValueError("it is a safetensors file, but not one that fastopt saved")
    version = metadata.get("fastopt_version")
    if version != str(VERSION):
        raise ValueError(
            f"it has version {shown(version)} of the format, and this version of "
            f"fastopt reads {VERSION}; load it with a newer version of fastopt"
        )
    text = metadata["fastopt"]
    if not isinstance(text, str):
        raise ValueError(f"its metadata must be a string, got {shown(text)}")
    raw = text.encode(errors="surrogatepass")
    if metadata.get("fastopt_crc32") != digits(zlib.crc32(raw)):
        raise ValueError(
            f"it is damaged: its metadata has the checksum {digits(zlib.crc32(raw))}, "
            f"but {shown(metadata.get('fastopt_crc32'))} when it was saved; load an "
            f"earlier checkpoint"
        )
    places = checked_entries(entries, size - 8 - length)

    def find(name: Any, crc: Any) -> Stored:
        if not isinstance(name, str) or name not in places:
            raise ValueError(f"it has no array {shown(name)}, or uses it twice")
        kind, shape, start = places.pop(name)
        return Stored(file, name, kind, shape, 8 + length + start, crc)

    whole = parsed("its metadata", raw)
    if set(whole) != set(Content._fields):
        raise ValueError(
            f"its metadata must have {', '.join(Content._fields)}, got "
            f"{shown([*whole])}"
        )
    content = Content(**{key: decoded(value, find) for key, value in whole.items()})
    if places:
        raise ValueError(f"it has an array that it does not use, {shown([*places][0])}")
    check_content(content)
    return content


def parsed(what: str, raw: bytes) -> dict[str, Any]:
    """Read JSON, which must be a dict and have whole numbers only."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shown(key)} stands there twice")
            found[key] = value
        return found

    def refuse(number: str) -> NoReturn:
        raise ValueError(f"the number {shown(number)} is not whole")

    hooks: Any = {"parse_float": refuse, "parse_constant": refuse}
    try:
        found = json.loads(raw.decode(), object_pairs_hook=once, **hooks)
    except RecursionError:
        raise ValueError(f"{what} is nested too deep") from None
    except ValueError as error:  # JSON's own, UTF-8's, too many digits, and ours
        raise ValueError(f"{what} is not right, or it is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a JSON object, got {shown(found)}")
    return found


def checked_entries(
    entries: Mapping[str, Any], nbytes: int
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Return for each array of a header its dtype, its shape and where it begins. Check
    that the arrays fill the bytes after the header."""
    places, spans = {}, []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {
            "dtype",
            "shape",
            "data_offsets",
        }:
            raise ValueError(
                f"its header must have for {shown(name)} a dtype, a shape and "
                f"data_offsets, got {shown(entry)}"
            )
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ValueError(
                f"{shown(name)} has dtype {shown(kind)}, but state has "
                f"{', '.join(DTYPES)}"
            )
        if not is_counts(shape) or len(shape) > MOST_DIMENSIONS:
            raise ValueError(f"{shown(name)} has a wrong shape, {shown(shape)}")
        if math.prod(max(size, 1) for size in shape) >= 2**60:  # beside a 0, too
            raise ValueError(f"{shown(name)} has too large a shape, {shown(shape)}")
        if not is_counts(offsets) or len(offsets) != 2:
            raise ValueError(f"{shown(name)} has wrong offsets, {shown(offsets)}")
        begin, end = offsets
        itemsize = 2 if kind == "BF16" else np.dtype(DTYPES[kind]).itemsize
        if end - begin != math.prod(shape) * itemsize:
            raise ValueError(
                f"{shown(name)} of shape {shown(shape)} and dtype {kind} has "
                f"{math.prod(shape) * itemsize} bytes, but its offsets are "
                f"{shown(offsets)}"
            )
        places[name] = kind, tuple(shape), begin
        spans.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(spans):
        if begin != last:
            raise ValueError(
                f"{shown(name)} begins at byte {begin}, but what is before it ends at "
                f"byte {last}: arrays overlap, or there is a gap"
            )
        last = end
    if last != nbytes:
        raise ValueError(
            f"its arrays have {last} bytes, but {nbytes} bytes follow the header; it "
            f"was cut off, or has something more"
        )
    return places


def is_counts(value: Any) -> bool:
    """Whether something is a list of whole numbers from 0 on that fit into 63 bits."""
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in value
    )


def decoded(value: Any, find: Callable[[Any, Any], Stored], level: int = 0) -> Any:
    """Return what :func:`encoded` has made JSON of; ``find`` returns an array."""
    if level > DEEPEST:
        raise ValueError(f"its metadata is nested more than {DEEPEST} levels deep")
    if isinstance(value, list):
        return [decoded(child, find, level + 1) for child in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"dict": dict(items), **rest} if not rest:
            return {k: decoded(child, find, level + 1) for k, child in items.items()}
        case {"float": str(number), **rest} if not rest:
            try:
                return float.fromhex(number)
            except (ValueError, OverflowError):
                pass
        case {"array": name, "crc32": crc, **rest} if not rest:
            return find(name, crc)
    raise ValueError(f"its metadata has {shown(value)}, which means nothing")


def check_content(content: Content) -> None:
    """Check what is not checked with the state."""
    names, extents = content.names, content.extents
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its names must be strings, got {shown(names)}")
    if not isinstance(extents, list) or not all(
        is_counts(extent) and len(extent) == 3 and extent[0] <= extent[1] <= extent[2]
        for extent in extents
    ):
        raise ValueError(f"its extents are wrong: {shown(extents)}")
    if len(names) != len(extents) or len(set(names)) < len(names):
        raise ValueError(f"it has {len(extents)} extents for the names {shown(names)}")
    if not isinstance(content.state, dict):
        raise ValueError(f"its state must be a dict, got {shown(content.state)}")


def read_all(value: Any) -> Any:
    """Return a state with its arrays, which are read."""
    if isinstance(value, Stored):
        return value.read()
    if isinstance(value, list):
        return [read_all(child) for child in value]
    if isinstance(value, dict):
        return {key: read_all(child) for key, child in value.items()}
    return value
