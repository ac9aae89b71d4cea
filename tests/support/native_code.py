"""The table of functions for native code (fastopt.h), as ctypes sees it, and an
optimizer that a C program may make of it."""

import ctypes

import numpy as np
from cases import bfloat16, nonzero, odd_view

import fastopt
from fastopt import native

OK, BAD_ARGUMENT, BAD_HYPERPARAMETER, OTHER_VARIANT, OVERLAP = range(5)

P, INT, I64, F64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
NAMES = ctypes.POINTER(ctypes.c_char_p)


class Rule(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("state_count", I64),
        ("hyperparameter_count", I64),
        ("carry_count", I64),
        ("carry_per_segment", I64),
        ("state", NAMES),
        ("hyperparameters", NAMES),
        ("carry", NAMES),
        ("defaults", ctypes.POINTER(F64)),
        ("sum_count", I64),
    ]


class Segment(ctypes.Structure):
    _fields_ = [("p", P), ("g", P), ("state", P), ("n", I64)]


class Stream(ctypes.Structure):
    _fields_ = [("format", I64), ("parts", P * 4)]


class Streams(ctypes.Structure):
    _fields_ = [("streams", P), ("n", I64), ("row", I64), ("first", I64)]


RUN = ctypes.CFUNCTYPE(None, P, INT, P, P)
PART = ctypes.CFUNCTYPE(None, P, INT)


class Request(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("threads", INT),
        ("clip_norm", F64),
        ("zero_grads", I64),
        ("run", RUN),
        ("context", P),
    ]

    def __init__(self, **fields):
        super().__init__(size=ctypes.sizeof(Request), **fields)


RULE = ctypes.POINTER(Rule)


class Api(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("isa", ctypes.c_char_p),
        ("rule_count", I64),
        ("rules", ctypes.POINTER(RULE)),
        ("find", ctypes.CFUNCTYPE(RULE, ctypes.c_char_p)),
        ("start", ctypes.CFUNCTYPE(INT, RULE, INT, P, P, P, I64)),
        ("step", ctypes.CFUNCTYPE(INT, RULE, INT, I64, P, P, P, I64, F64, INT)),
        ("error", ctypes.CFUNCTYPE(ctypes.c_char_p, INT)),
        ("step_on", P),
        ("start_streams", ctypes.CFUNCTYPE(INT, RULE, INT, P, I64, P, P, I64)),
        (
            "step_streams",
            ctypes.CFUNCTYPE(INT, RULE, INT, I64, P, I64, P, P, I64, F64, P),
        ),
        (
            "sums",
            ctypes.CFUNCTYPE(INT, RULE, INT, I64, P, I64, P, P, I64, F64, P, P),
        ),
        (
            "step_with_sums",
            ctypes.CFUNCTYPE(INT, RULE, INT, I64, P, I64, P, P, I64, F64, P, P, I64),
        ),
    ]


def load():
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = P, [ctypes.py_object, ctypes.c_char_p]
    return Api.from_address(pointer(native._api, b"fastopt.native._api"))


API = load()


address_of = ctypes.addressof


def address(array):
    return array.ctypes.data


class Optimizer:
    """An optimizer that a C program may have: parameters, state, and the table."""

    call = API.step

    def __init__(self, name, params, values):
        self.rule = API.find(name.encode())
        assert self.rule, name
        about = self.rule.contents
        self.params, self.t = params, 0
        self.values = np.array([float(v) for v in values.values()])
        assert about.hyperparameter_count == len(self.values)
        self.state = [
            [np.full_like(p, np.nan) for _ in range(about.state_count)] for p in params
        ]
        sets = len(params) if about.carry_per_segment else 1
        self.carry = np.full((sets, about.carry_count), np.nan)
        self.dtype = int(params[0].dtype == np.float64)
        code = API.start(
            *(self.rule, self.dtype, address(self.values), address(self.carry)),
            *(self.segments([None] * len(params)), len(params)),
        )
        assert code == OK

    def segments(self, grads):
        self.keep = [(P * (1 + len(s)))(*map(address, s)) for s in self.state]
        rows = [
            Segment(address(p), g if g is None else address(g), address_of(s), p.size)
            for p, g, s in zip(self.params, grads, self.keep, strict=True)
        ]
        return (Segment * len(rows))(*rows)

    def step(self, grads, grad_scale=1.0, threads=1, t=None):
        code = self.call(
            *(self.rule, self.dtype, t or self.t + 1, address(self.values)),
            *(address(self.carry), self.segments(grads), len(grads)),
            *(grad_scale, threads),
        )
        self.t += code == OK
        return code

    def everything(self):
        """In the order of ``python``'s."""
        return [
            *self.params,
            *(s for states in zip(*self.state, strict=True) for s in states),
        ]


# The formats of fastopt.h, and the dtype of each; a dtype alone means the first.
F32, F64_STORED, BF16, BF16_SR, FP16 = range(5)
DTYPES = np.float32, np.float64, bfloat16, bfloat16, np.float16


def format_of(array):
    return DTYPES.index(array.dtype)


class StreamOptimizer:
    """An optimizer of streams that a C program may have.

    ``rows`` are hyperparameters, of which each parameter has one by ``row_of``.
    ``formats`` are those of the state buffers, and ``param_format`` that of the
    parameters if it does not follow from their dtypes.
    """

    def __init__(
        self, name, params, *rows, formats=None, row_of=None, param_format=None
    ):
        self.rule = API.find(name.encode())
        assert self.rule, name
        about = self.rule.contents
        self.params, self.t, self.param_format = params, 0, param_format
        self.row_of = row_of or [0] * len(params)
        self.values = np.array([[float(v) for v in row.values()] for row in rows])
        assert self.values.shape == (len(rows), about.hyperparameter_count)
        self.dtype = int(params[0].dtype == np.float64)
        self.formats = formats or [self.dtype] * about.state_count
        self.state = [
            [np.full(p.shape, np.nan, DTYPES[k]) for k in self.formats] for p in params
        ]
        sets = len(params) if about.carry_per_segment else len(rows)
        self.carry = np.full((sets, about.carry_count), np.nan)

    def start(self):
        return API.start_streams(
            *(self.rule, self.dtype, address(self.values), len(self.values)),
            *(address(self.carry), self.segments([None] * len(self.params))),
            len(self.params),
        )

    def segments(self, grads):
        self.keep, segments, first = [], [], 0
        each = zip(self.params, grads, self.state, self.row_of, strict=True)
        for p, g, state, row in each:
            kind = format_of(p) if self.param_format is None else self.param_format
            streams = [(kind, p)]
            # The format of a missing gradient is not read.
            streams += [(99 if g is None else format_of(g), g)]
            streams += zip(self.formats, state, strict=True)
            described = (Stream * len(streams))(
                *(Stream(k, (a if a is None else address(a),)) for k, a in streams)
            )
            self.keep.append(described)
            segments.append(Streams(address_of(described), p.size, row, first))
            first += p.size
        return (Streams * len(segments))(*segments)

    def step(self, grads, grad_scale=1.0, **request):
        asked = Request(**request)
        code = API.step_streams(
            *(self.rule, self.dtype, self.t + 1, address(self.values)),
            *(len(self.values), address(self.carry), self.segments(grads)),
            *(len(grads), grad_scale, address_of(asked) if request else None),
        )
        self.t += code == OK
        return code

    def sums(self, grads, grad_scale=1.0, **request):
        """The code, and a row for each segment: its elements, and sums over these."""
        found = np.full((len(grads), 1 + self.rule.contents.sum_count), np.nan)
        code = API.sums(*self._given(grads, grad_scale, request), address(found))
        return code, found

    def step_with_sums(self, grads, sums, grad_scale=1.0, **request):
        """A step with the sums of several processes."""
        given = self._given(grads, grad_scale, request)
        code = API.step_with_sums(*given, address(sums), len(sums))
        self.t += code == OK
        return code

    def _given(self, grads, grad_scale, request):
        self.asked = Request(**request)
        return (
            *(self.rule, self.dtype, self.t + 1, address(self.values)),
            *(len(self.values), address(self.carry), self.segments(grads)),
            *(len(grads), grad_scale, address_of(self.asked) if request else None),
        )

    def everything(self):
        """In the order of ``python``'s."""
        return [
            *self.params,
            *(s for states in zip(*self.state, strict=True) for s in states),
        ]


def variant_name(rule, values):
    on = {name for name in rule.switches if values[name]}
    for names in rule.variants:
        if set(names) == on:
            return "+".join([rule.name, *names])
    return rule.name


def arrays(size, dtype, seed):
    """Three segments, misaligned to cache lines, and an empty one."""
    rng = np.random.default_rng(seed)
    sizes = (size, 3, 0, size // 3)
    return [odd_view(nonzero(rng, n, dtype), k) for k, n in enumerate(sizes)]


def run_both(rule, values, size, dtype, threads):
    """Four steps of an optimizer of Python's and of ours, with a gradient missing."""
    python = rule(arrays(size, dtype, 0), backend="numpy", **values)
    ours = Optimizer(variant_name(rule, values), arrays(size, dtype, 0), values)
    for step in range(4):
        grads = arrays(size, dtype, 1 + step)
        if step == 2:
            grads[0] = None
        python.step(grads, grad_scale=0.5)
        assert ours.step(grads, 0.5, threads) == OK
    expected = [*python._params.arrays]
    expected += [a for name in python._bound.rule.state for a in python.state[name]]
    return expected, ours.everything(), python, ours


def small(name="adamw", dtype=np.float32, **changes):
    rule = getattr(fastopt, name.partition("+")[0])
    params = [np.ones(5, dtype), np.ones(3, dtype)]
    return Optimizer(name, params, {**rule.hyperparameters, **changes})
