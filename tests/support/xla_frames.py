"""Calls of fastopt's target for XLA without XLA: frames of its FFI, with operands that
end where memory ends, so that whoever reads or writes beyond one crashes."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from cases import bfloat16

from fastopt import _xla, native

P, INT, I64, SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
S32, S64, U32, F16, F32, F64, BF16 = 4, 5, 8, 10, 11, 12, 16
TYPES = {S32: "i4", S64: "i8", U32: "u4", F32: "f4", F64: "f8"}
TYPES |= {F16: "f2", BF16: bfloat16}
ARRAY, SCALAR, STRING = 1, 3, 4  # attributes
EXECUTE = 3


def struct(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


HEAD = {"struct_size": SIZE, "extension": P}
Failure = struct("Failure", **HEAD, message=ctypes.c_char_p, code=INT)
Version = struct("Version", **HEAD, major=INT, minor=INT)
FAIL = ctypes.CFUNCTYPE(P, ctypes.POINTER(Failure))
Api = struct(
    "Api",
    **HEAD,
    version=Version,
    internal=P,
    fail=FAIL,
    get_message=P,
    destroy=P,
    others=P * 8,
    schedule=P,
)
Buffer = struct("Buffer", **HEAD, dtype=INT, data=P, rank=I64, dims=P)
Buffers = struct("Buffers", **HEAD, size=I64, types=P, at=P)
Span = struct("Span", at=P, length=SIZE)
Scalar = struct("Scalar", dtype=INT, value=P)
Array = struct("Array", dtype=INT, size=SIZE, data=P)
Attributes = struct("Attributes", **HEAD, size=I64, types=P, names=P, at=P)
Frame = struct(
    "Frame",
    **HEAD,
    api=P,
    context=P,
    stage=INT,
    args=Buffers,
    results=Buffers,
    attributes=Attributes,
)

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = P, [ctypes.py_object, ctypes.c_char_p]
TARGETS = _xla.targets()
HANDLERS = {
    name: ctypes.CFUNCTYPE(P, P)(_pointer(target, None))
    for name, target in TARGETS.items()
}
STEP, SUMS, STEP_WITH_SUMS = TARGETS
libc = ctypes.CDLL(None, use_errno=True)
ENTRIES = {entry.name: entry for entry in native.entries()}


class Room:
    """Memory, with pages before and after it that nobody may touch, and bytes before
    what is handed out that are to stay."""

    MARK = 0xA5

    def __init__(self, pages: int = 1):
        page = mmap.PAGESIZE
        self.map = mmap.mmap(-1, (pages + 2) * page)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map)) + page
        self.nbytes = pages * page
        for guard in (self.start - page, self.start + self.nbytes):
            if libc.mprotect(P(guard), SIZE(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.bytes = (ctypes.c_uint8 * self.nbytes).from_address(self.start)

    def put(self, data: bytes) -> int:
        """The address of these bytes, at the very end."""
        ctypes.memset(self.start, self.MARK, self.nbytes)
        address = self.start + self.nbytes - len(data)
        ctypes.memmove(address, data, len(data))
        return address


class Rooms:
    """Kept for the next call: a map is slow."""

    def __init__(self) -> None:
        self.free: list[Room] = []
        self.used: list[Room] = []

    def put(self, data: bytes) -> int:
        room = self.free.pop() if self.free else Room()
        self.used.append(room)
        return room.put(data)

    def clear(self) -> None:
        self.free += self.used
        self.used = []

    def contents(self) -> list[bytes]:
        return [bytes(room.bytes) for room in self.used]


ROOMS = Rooms()


class Operand:
    def __init__(self, values: Any, dtype: int, shape: tuple[int, ...]):
        self.values = np.ascontiguousarray(values, TYPES[dtype])
        self.dtype, self.dims, self.rank = dtype, list(shape), len(shape)
        self.kind = 1  # a buffer
        self.data: int | None = 0  # what is added to the address; None: no memory


class Result:
    """In the memory of an operand, like it but for ``others``."""

    def __init__(self, operand: Operand):
        self.operand, self.kind, self.others = operand, 1, dict[str, Any]()


class Call:
    """A good call of a rule with parameters and gradients of these dtypes; change what
    is in it, then ``run``."""

    def __init__(
        self,
        rule: str,
        dtypes: tuple[int, int],
        shapes: list[tuple[int, ...]],
        target: str = STEP,
    ):
        entry = ENTRIES[rule]
        rng = np.random.default_rng(5)
        rows = len(shapes) if entry.by_segment else 1
        numbers = [*map(float, entry.hyperparameters.values()), 1.0]
        words = np.array(numbers).view(np.uint32)
        values = [
            float(entry.hyperparameters[s] if isinstance(s, str) else s)
            for s in entry.starts[len(entry.state) :]
        ]
        carry = np.array(values * rows, np.float64).view(np.uint32)
        state = F64 if F64 in dtypes else F32
        arrays = [
            Operand(rng.uniform(0.5, 1.0, shape), dtype, shape)
            for dtype in (*dtypes, *[state] * len(entry.state))
            for shape in shapes
        ]
        self.traced = Operand([0], S64, (1,))
        self.args = [
            Operand([3], S32, ()),
            Operand(words, U32, (len(numbers), 2)),
            Operand(carry, U32, (rows, len(values), 2)),
            Operand([0.125], F32, ()),
            *arrays,
        ]
        kept = [
            2,
            *(4 + k for k in range(len(arrays)) if k // max(len(shapes), 1) != 1),
        ]
        self.results = [Result(self.args[k]) for k in kept]
        self.target, self.number = target, 3  # where the traced number is
        if target != STEP:
            sums = [[np.prod(shape), *[1.0] * entry.terms] for shape in shapes]
            size = len(shapes), 1 + entry.terms, 2
        if target == SUMS:
            words = np.zeros(np.prod(size, dtype=int))
            self.results = [Result(Operand(words, U32, size))]
        if target == STEP_WITH_SUMS:  # of two devices
            words = np.array([sums, sums], np.float64).view(np.uint32)
            self.args.insert(3, Operand(words, U32, (2, *size)))
            self.number = 4
        self.rule: bytes = rule.encode()
        self.threads = Operand([2], S32, ())
        self.attributes = {"rule": STRING, "threads": SCALAR, "traced": ARRAY}
        self.frame_size = ctypes.sizeof(Frame)
        self.arg_count: int | None = None
        self.result_count: int | None = None

    def run(self) -> tuple[str | None, bool]:
        """The error's message, or None; and whether the rest is as it was: everything,
        if there is an error, else what belongs to no result."""
        ROOMS.clear()
        kept: list[Any] = []
        places: dict[int, int] = {}  # of operands, among the rooms

        def table(values: list[Any], kind: str) -> int:
            return ROOMS.put(np.array(values, kind).tobytes())

        def span(data: bytes) -> Any:
            return Span(ROOMS.put(data), len(data))

        def buffer(operand: Operand, add: int = 0, **others: Any) -> int:
            values = {**vars(operand), **others}
            if id(operand) not in places:
                places[id(operand)] = len(ROOMS.used)
                ROOMS.put(operand.values.tobytes())
            room = ROOMS.used[places[id(operand)]]
            address = room.start + room.nbytes - operand.values.nbytes + add
            data = None if values["data"] is None else address + values["data"]
            dims, rank = table(values["dims"], "i8"), values["rank"]
            size = ctypes.sizeof(Buffer)
            kept.append(Buffer(size, None, values["dtype"], data, rank, dims))
            return ctypes.addressof(kept[-1])

        def buffers(addresses: list[int], kinds: list[int], count: int | None) -> Any:
            size = len(addresses) if count is None else count
            tables = table(kinds, "i4"), table(addresses, "u8")
            return Buffers(ctypes.sizeof(Buffers), None, size, *tables)

        args = buffers(
            [buffer(a) for a in self.args], [a.kind for a in self.args], self.arg_count
        )
        results = buffers(
            [buffer(r.operand, **r.others) for r in self.results],
            [r.kind for r in self.results],
            self.result_count,
        )
        indices = table(self.traced.values, "i8")
        values = {
            "rule": span(self.rule),
            "threads": Scalar(self.threads.dtype, table(self.threads.values, "i4")),
            "traced": Array(self.traced.dtype, self.traced.dims[0], indices),
        }
        names = [span(name.encode()) for name in self.attributes]
        at = [ctypes.addressof(values[name]) for name in self.attributes]
        attributes = Attributes(
            ctypes.sizeof(Attributes),
            None,
            len(names),
            table([*self.attributes.values()], "i4"),
            table([ctypes.addressof(name) for name in names], "u8"),
            table(at, "u8"),
        )
        messages: list[str] = []

        def fail(failure: Any) -> int:
            messages.append(failure.contents.message.decode())
            return 1

        api = Api(struct_size=ctypes.sizeof(Api), fail=FAIL(fail))
        head = self.frame_size, None, ctypes.addressof(api), None, EXECUTE
        frame = Frame(*head, args, results, attributes)
        before = ROOMS.contents()
        returned = HANDLERS[self.target](ctypes.addressof(frame))
        if bool(returned) != bool(messages):
            raise AssertionError(f"returned {returned} with the messages {messages}")
        written = {places[id(r.operand)]: r.operand.values.nbytes for r in self.results}
        untouched = True
        for k, (a, b) in enumerate(zip(before, ROOMS.contents(), strict=True)):
            last = len(a) - (0 if messages else written.get(k, 0))
            untouched &= a[:last] == b[:last]
        return (messages[0] if messages else None), untouched


Change = Callable[[Call], None]


def changes(call: Call) -> Iterator[tuple[str, Change]]:
    """What a hostile caller may get wrong, one thing each."""

    def on_arg(k: int, what: Callable[[Operand], None]) -> Change:
        return lambda call: what(call.args[k])

    def shrink(a: Operand) -> None:
        a.values = np.ravel(a.values)[:-1]
        a.dims, a.rank = [a.values.size], 1

    def longer(a: Operand) -> None:
        a.dims, a.rank = [a.values.size + 1], 1

    def set_to(**values: Any) -> Callable[[Operand], None]:
        return lambda a: [setattr(a, k, v) for k, v in values.items()] and None

    first = call.number + 1
    arrays = len(call.args) - first
    state_count = len(ENTRIES[call.rule.decode()].state)
    params_and_grads = range(first, first + arrays // (2 + state_count) * 2)
    for k, a in enumerate(call.args):
        if a.values.size:
            yield f"operand {k} without memory", on_arg(k, set_to(data=None))
            yield f"operand {k} of fewer elements", on_arg(k, shrink)
            if k != call.number:  # which is read byte by byte
                yield f"operand {k} not aligned", on_arg(k, set_to(data=-1))
        yield f"operand {k} of more elements", on_arg(k, longer)
        yield f"operand {k} below zero", on_arg(k, set_to(dims=[-1], rank=1))
        yield f"operand {k} twice below zero", on_arg(k, set_to(dims=[-1, -6], rank=2))
        yield f"operand {k} of rank -1", on_arg(k, set_to(rank=-1))
        huge = set_to(dims=[2**32, 2**32], rank=2)
        yield f"operand {k} whose size overflows", on_arg(k, huge)
        yield f"operand {k} as large as memory", on_arg(k, set_to(dims=[2**61], rank=1))
        yield f"operand {k} is no buffer", on_arg(k, set_to(kind=0))
        others = {0, 1, 2, 7, F16, 15, BF16, 17, S32, S64, U32, F32, F64} - {a.dtype}
        if k in params_and_grads and a.dtype != F64:
            others -= {F16, BF16, F32}  # may be mixed
        for dtype in others:
            if (k, dtype) in ((0, S64), (call.number, F64)):
                continue  # a call like that is good, with more memory
            yield f"operand {k} of dtype {dtype}", on_arg(k, set_to(dtype=dtype))

    def on_result(k: int, **others: Any) -> Change:
        return lambda call: call.results[k].others.update(others)

    for k, result in enumerate(call.results):
        a = result.operand
        yield (
            f"result {k} is no buffer",
            lambda call, k=k: setattr(call.results[k], "kind", 2),
        )
        if a.values.size and call.target != SUMS:
            yield f"result {k} elsewhere", on_result(k, add=-8)
        if a.rank:
            dims = [*a.dims[:-1], a.dims[-1] + 1]
            yield f"result {k} of another shape", on_result(k, dims=dims)
        if call.target != SUMS:
            yield (
                f"result {k} of another rank",
                on_result(k, rank=a.rank + 1, dims=[*a.dims, 1]),
            )
        for dtype in {S32, F16, BF16} - {a.dtype}:
            yield f"result {k} of dtype {dtype}", on_result(k, dtype=dtype)
    for count in (-1, -(2**62), *range(len(call.args)), len(call.args) + 1, 2**40):
        yield (
            f"{count} operands",
            lambda call, count=count: setattr(call, "arg_count", count),
        )
    for count in (-1, -(2**62), *range(len(call.results)), len(call.results) + 1):
        yield (
            f"{count} results",
            lambda call, count=count: setattr(call, "result_count", count),
        )
    for name in call.attributes:
        yield f"no {name}", lambda call, name=name: call.attributes.pop(name) and None
        for kind in {0, ARRAY, 2, SCALAR, STRING} - {call.attributes[name]}:
            yield (
                f"{name} is an attribute of type {kind}",
                lambda call, n=name, kind=kind: call.attributes.update({n: kind}),
            )
    for rule in (b"", b"adamv", b"x" * 63, b"x" * 64, b"x" * 4000, call.rule + b"\0"):
        yield f"rule {rule[:9]!r}", lambda call, rule=rule: setattr(call, "rule", rule)
    for number in (0, -1, -(2**31), 1025, 2**31 - 1):
        threads = Operand([number], S32, ())
        yield (
            f"{number} threads",
            lambda call, threads=threads: setattr(call, "threads", threads),
        )
    for dtype in (0, F32, U32):
        yield (
            f"threads of dtype {dtype}",
            lambda call, dtype=dtype: setattr(call.threads, "dtype", dtype),
        )
    last = len(ENTRIES[call.rule.decode()].hyperparameters)
    for index in (-1, last + 1, 63, 64, 2**31, 2**62, -(2**63)):
        traced = Operand([index], S64, (1,))
        yield (
            f"index {index}",
            lambda call, traced=traced: setattr(call, "traced", traced),
        )

    def twice(call: Call) -> None:
        call.traced = Operand([0, 0], S64, (2,))
        call.args.insert(call.number, Operand([0.125], F32, ()))

    yield "an index twice", twice
    for size in (0, 2, 65, 2**40, 2**63):
        traced = Operand([0], S64, (1,))
        traced.dims = [size]
        yield (
            f"{size} indices",
            lambda call, traced=traced: setattr(call, "traced", traced),
        )
    for dtype in (0, S32, F64):
        yield (
            f"indices of dtype {dtype}",
            lambda call, dtype=dtype: setattr(call.traced, "dtype", dtype),
        )
    for step in (0, -1, -(2**31)):
        yield f"step {step}", on_arg(0, set_to(values=np.array([step], "i4")))
    for value in (np.nan, np.inf, -1.0):
        yield f"lr {value}", on_arg(call.number, set_to(values=np.array([value], "f4")))
    yield (
        "a smaller frame",
        lambda call: setattr(call, "frame_size", ctypes.sizeof(Frame) - 8),
    )
