"""State that is shared out among several processes, each of which steps a slice of each
flat array and saves a file of its own. As many processes as there are later read the
slices that they have by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt.memory.formats import SMALLEST
from fastopt.memory.order import GROUP
from fastopt.memory.segments import Array
from fastopt.optimizer.checks import collect
from fastopt.optimizer.parameters import Parameters
from fastopt.optimizer.safetensors import Content, Stored, dtype_of
from fastopt.optimizer.saving import of_core
from fastopt.rule import shown


class Extent(NamedTuple):
    """Which elements of a larger array an array consists of."""

    first: int
    end: int
    size: int  # of the larger array

    @property
    def whole(self) -> bool:
        return self.end - self.first == self.size

    def __str__(self) -> str:
        return f"elements {self.first} to {self.end} of {self.size}"


def names_of(params: Parameters) -> list[str]:
    """Return what the array of each segment is called in a file."""
    names = [
        part[0][0] if len(part) == 1 else f"{part[0][0]}...{part[-1][0]}"
        for part in params.parts
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{name}#{i}" for i, name in enumerate(names)]


def extents_of(params: Parameters, shard: Any) -> list[Extent]:
    """Return which elements the arrays have. A user says so for each array by
    ``(first, size)``, or by None if it is whole."""
    given: list[Any] = [None] * len(params.arrays)
    if shard is not None:
        given.clear()
        collect(params.layout, shard, "", given, "shard")
    extents = []
    for name, part, array, chosen, pair in zip(
        params.names, params.parts, params.arrays, params.chosen, given, strict=True
    ):
        n = int(array.size)
        if pair is None:
            extents.append(Extent(0, n, n))
            continue
        what = f"the shard of {name}"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(
                f"{what} must be (first, size), the index of its first element and the "
                f"size of the array that it is a slice of; got {shown(pair)}"
            )
        for number in pair:
            if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
                raise TypeError(f"{what} must be whole numbers, got {shown(pair)}")
        first, size = map(int, pair)
        extent = Extent(first, first + n, size)
        if first < 0 or extent.end > size or size >= 1 << 63:
            raise ValueError(
                f"{what} is {shown(pair)}, but its {n} elements from {first} on do not "
                f"lie within {size}"
            )
        if not extent.whole and (array.ndim != 1 or len(part) > 1):
            raise ValueError(
                f"{name} is {extent}, but only flat arrays are cut: step a slice of "
                f"array.reshape(-1), or of the data of a FlatBuffer"
            )
        if any(format.scale for format in chosen.values()):
            check_groups(name, extent)
        extents.append(extent)
    return extents


def check_groups(name: str, extent: Extent) -> None:
    """Check that no group of numbers that share a scale is cut."""
    if extent.first % GROUP or (extent.end % GROUP and extent.end != extent.size):
        raise ValueError(
            f"{name} is {extent}, which cuts a group of {GROUP} numbers of 8-bit "
            f"state, which share a scale; cut it at multiples of {GROUP}"
        )


class Shards:
    """What several files have for an optimizer that steps these slices."""

    def __init__(
        self,
        contents: Sequence[Content],
        paths: Sequence[str],
        params: Parameters,
        extents: Sequence[Extent],
    ):
        self.contents, self.paths = contents, paths
        self.names = contents[0].names
        self._check_same("the list of parameters", [list(c.names) for c in contents])
        self._check_formats()
        of_name = dict(zip(names_of(params), range(len(extents)), strict=True))
        if set(self.names) != set(of_name):
            raise ValueError(
                f"{paths[0]} has the parameters {shown(list(self.names))}, but this "
                f"optimizer has {shown([*of_name])}"
            )
        # All that follows is in the order of the files.
        order, parts = [of_name[name] for name in self.names], params.parts
        self.parts = [parts[i] for i in order]
        self.ours = [extents[i] for i in order]
        self.theirs = [
            [Extent(*content.extents[i]) for content in contents]
            for i in range(len(order))
        ]
        for name, ours, theirs in zip(self.names, self.ours, self.theirs, strict=True):
            for extent, path in zip(theirs, paths, strict=True):
                if extent.size != ours.size:
                    raise ValueError(
                        f"{name} is {extent} in {path}, but {ours} in this optimizer; "
                        f"say with shard= which slice of it this optimizer steps"
                    )

    def _check_formats(self) -> None:
        formats = [of_core(content.state).get("formats") for content in self.contents]
        for chosen, path in zip(formats, self.paths, strict=True):
            if chosen != formats[0]:
                raise ValueError(
                    f"the state has the formats {shown(formats[0])} in "
                    f"{self.paths[0]}, but {shown(chosen)} in {path}. Slices of fewer "
                    f"than {SMALLEST} elements have no formats: cut arrays into larger "
                    f"ones, or use none"
                )

    def state(self) -> Any:
        """Return the state, whose arrays are read."""
        return self._joined("", [content.state for content in self.contents])

    def params(self) -> list[Array] | None:
        """Return the parameters, if they were saved."""
        values = [content.params for content in self.contents]
        joined: list[Array] | None = self._joined("param", values)
        return joined

    def _joined(self, what: str, values: Sequence[Any]) -> Any:
        """Return what the files together have in one place of their trees."""
        if what in ("params", "opt.params"):
            return self._names_and_shapes(what, values)
        if all(isinstance(value, dict) for value in values):
            self._check_same(f"what {what or 'the state'} has", list(map(list, values)))
            return {
                key: self._joined(f"{what}.{key}".lstrip("."), [v[key] for v in values])
                for key in values[0]
            }
        if all(isinstance(value, list) for value in values):
            has_arrays = any(
                isinstance(one, Stored) for value in values for one in value
            )
            self._check_same(f"the length of {what}", list(map(len, values)))
            if has_arrays and len(values[0]) != len(self.names):
                raise ValueError(f"{what} must have an array for each parameter")
            columns = list(map(list, zip(*values, strict=True)))
            if not has_arrays:
                return [
                    self._joined(f"{what}[{i}]", column)
                    for i, column in enumerate(columns)
                ]
            rows = zip(self.names, self.ours, self.theirs, columns, strict=True)
            return [
                self._array(f"{what} of {name}", ours, theirs, stored)
                for name, ours, theirs, stored in rows
            ]
        self._check_same(what, values)
        return values[0]

    def _names_and_shapes(self, what: str, values: Sequence[Any]) -> list[Any]:
        """Return the names and shapes of the parameters in each array: those in the
        files or, of arrays that are cut, those of our slices."""
        if any(
            not isinstance(value, list) or len(value) != len(self.names)
            for value in values
        ):
            raise ValueError(f"{what} must have the names and shapes of each array")
        parts = []
        for i, saved in enumerate(zip(*values, strict=True)):
            if self.ours[i].whole and all(extent.whole for extent in self.theirs[i]):
                self._check_same(f"the shapes of {self.names[i]}", saved)
                parts.append(saved[0])
            else:
                parts.append([[name, list(shape)] for name, shape in self.parts[i]])
        return parts

    def _check_same(self, what: str, values: Sequence[Any]) -> None:
        """Check that all files have the same of what is not cut. They are compared as
        text, where NaN is NaN, and 1 is not 1.0."""
        for value, path in zip(values, self.paths, strict=True):
            if repr(value) != repr(values[0]):
                raise ValueError(
                    f"{what} is {shown(values[0])} in {self.paths[0]}, but "
                    f"{shown(value)} in {path}; load files that were saved together"
                )

    def _array(
        self,
        what: str,
        ours: Extent,
        theirs: Sequence[Extent],
        stored: Sequence[Stored | None],
    ) -> Array | None:
        """Return our slice of an array."""
        there = [one for one in stored if one is not None]
        if not all(isinstance(one, Stored) for one in there):
            raise ValueError(f"{what} must be an array, got {shown(list(stored))}")
        self._check_same(f"whether there is {what}", [one is None for one in stored])
        if not there:
            return None
        self._check_same(f"the dtype of {what}", [one.kind for one in there])
        if ours.whole and all(extent.whole for extent in theirs):
            array, *others = (one.read() for one in there)
            for other, path in zip(others, self.paths[1:], strict=True):
                if array.shape != other.shape or not same_bytes(array, other):
                    raise self._unequal(what, path)
            return array
        unit = self._unit(what, theirs, there)
        if unit == 0:
            return there[0].read()
        first, last = places(what, ours, unit)
        cut = np.empty(last - first, dtype_of(there[0].kind))
        end = first  # of what is there already
        rows = zip(theirs, there, self.paths, strict=True)
        for extent, one, path in sorted(rows, key=lambda row: row[0]):
            low, high = places(f"{what} in {path}", extent, unit)
            if high <= max(low, first) or last <= low:
                continue  # nothing of ours
            if low > end:
                break
            array, start, known = one.read(), max(low, first), min(end, high)
            there_already = cut[start - first : known - first]
            if not same_bytes(there_already, array[start - low : known - low]):
                raise self._unequal(what, path)
            stop = max(end, min(high, last))
            cut[end - first : stop - first] = array[end - low : stop - low]
            end = stop
        if end < last:
            raise ValueError(
                f"{what} is needed from element {ours.first} to {ours.end} of "
                f"{ours.size}, but none of {', '.join(self.paths)} has element "
                f"{end * unit}; pass the files of all ranks"
            )
        return cut

    def _unequal(self, what: str, path: str) -> ValueError:
        return ValueError(
            f"{what} differs in {path} from the other files where both have the same "
            f"elements; load files that were saved together"
        )

    def _unit(
        self, what: str, theirs: Sequence[Extent], there: Sequence[Stored]
    ) -> int:
        """Return for how many elements there is a number: 1, GROUP for scales, 0 if
        there are none. Raise ValueError for state that cannot be cut."""
        units = set()
        for extent, one, path in zip(theirs, there, self.paths, strict=True):
            n, count = extent.end - extent.first, math.prod(one.shape)
            units |= {0 if not count else GROUP if count < n else 1} if n else set()
            if len(one.shape) != 1 or count not in (0, n, -(-n // GROUP)):
                raise ValueError(
                    f"{what} has shape {one.shape} for {n} elements in {path}; only "
                    f"what has a number for each element of a flat array can be cut"
                )
        if len(units) > 1:
            raise ValueError(
                f"{what} has other formats in some of {', '.join(self.paths)}"
            )
        return units.pop() if units else 1


def places(what: str, extent: Extent, unit: int) -> tuple[int, int]:
    """Return where the numbers of a slice begin and end."""
    if unit == GROUP:
        check_groups(what, extent)
    return extent.first // unit, -(-extent.end // unit)


def same_bytes(a: Array, b: Array) -> bool:
    words = [array.reshape(-1).view(np.uint8) for array in (a, b)]
    return np.array_equal(words[0], words[1])
