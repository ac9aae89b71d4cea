"""The table of functions for native code (fastopt.h), as ctypes sees it, and an
optimizer that a C program may make of it."""

import ctypes

import numpy as np
from cases import nonzero, odd_view

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
    ]


class Segment(ctypes.Structure):
    _fields_ = [("p", P), ("g", P), ("state", P), ("n", I64)]


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
