from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt

OPENMP: bool
CYTHON: str  # its version
FLOATS: tuple[np.dtype[np.float32], np.dtype[np.float64]]
UNLIMITED: tuple[float, ...]  # the limits of a step that has none
UNKNOWN: Any
WITHOUT_SETTLE: frozenset[str]
WITH_SETTLE: frozenset[str]

def cpu_supports() -> list[str]: ...
def no_kernel(name: str) -> LookupError: ...
def gram(
    kernels: Kernels, addresses: list[int], length: int, double: bool, threads: int
) -> npt.NDArray[np.float64]: ...

# The table of functions for C; see fastopt.h.
def native_table(
    kernels: Kernels,
    entries: list[Any],
    formats: Sequence[Any],
    threads: int,
    forked: bool,
    last_cache: int,
) -> Any: ...
def native_addresses() -> dict[str, int]: ...
def native_errors() -> list[str]: ...
def native_alone() -> int: ...
def native_judge(several: bool, seconds: float, n: int) -> None: ...

class Kernels:
    def __new__(cls, capsule: Any) -> Self: ...
    @property
    def ISA(self) -> str: ...

class Scalars:
    def __new__(cls, function: Callable[..., Any], name: str) -> Self: ...
    def __call__(self, t: int, *values: float) -> tuple[float, ...]: ...

class Segments:
    def __new__(
        cls,
        kernels: Kernels,
        kernel: str | int,
        *functions: Any,
        addresses: Sequence[Sequence[int]],
        shapes: Sequence[tuple[int, ...]],
        averages: Sequence[int] | None,
        streams: list[Any],
        copies: list[Any],
        double: bool,
        keep: Any,
        **numbers: Any,
    ) -> Self: ...
    def watch(self, arrays: list[tuple[Any, bool]]) -> None: ...
    def unchanged(self) -> bool: ...
    def take(
        self, grads: list[Any], weights: Sequence[float] | None = None
    ) -> bool: ...
    def place(self, addresses: Any, format: Any = None) -> bool: ...
    def follow(self, addresses: Any, places: Any) -> bool: ...
    def have_done(self, counts: Any, steps: float) -> bool: ...

class Step(Segments):
    def __new__(
        cls,
        kernels: Kernels,
        kernel: str | int,
        measure: str | int | None,
        begin: str | None,
        finish: str | None,
        scalars: Any,
        *,
        double: bool,
        sets: int,
        scalar_count: int,
        terms: int,
        measured: int,
        settle: Scalars | None,
        settle_count: int,
        count_address: int,
        carry_address: int,
        carried: int,
        last_cache: int,
        **segments: Any,
    ) -> Self: ...
    @property
    def fuses(self) -> frozenset[str]: ...
    @property
    def alone(self) -> int: ...
    def judge(self, several: bool, seconds: float, n: int) -> None: ...
    def calls(
        self, rows: list[Any], request: Any = None, steps: list[int] | None = None
    ) -> list[partial[None]]: ...
    def __call__(
        self, rows: list[Any], request: Any = None, steps: list[int] | None = None
    ) -> None: ...
    def limited(
        self,
        rows: list[Any],
        request: Any,
        steps: list[int],
        attributes: dict[str, Any],
        name: str,
    ) -> None: ...
    def at(
        self,
        grads: list[Any],
        hyperparameters: list[Any],
        grad_scale: float,
        threads: int,
        request: Any = None,
        attributes: dict[str, Any] | None = None,
    ) -> bool: ...
    def settled(self, rows: list[Any], request: Any, steps: list[int]) -> None: ...
    def sums(self, what: str, rows: list[Any], request: Any) -> list[list[float]]: ...
    def squares(self, rows: list[Any], request: Any) -> list[list[float]]: ...
