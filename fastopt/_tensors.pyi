from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

def know(found: tuple[int, ...], of_float: Tensor, of_double: Tensor) -> None: ...
def drop_gradients(groups: list[dict[str, Any]]) -> None: ...
def simple(
    params: list[Tensor], grads: list[Tensor | None], kinds: tuple[type, ...]
) -> bytearray: ...

class Tensors:
    moved: bool
    def __new__(
        cls,
        params: list[Tensor],
        planned: list[bool],
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        buffers: list[Tensor],
        single: bool,
        specs: list[Any] | None,
        divided_alike: Any,
    ) -> Self: ...
    @property
    def addresses(self) -> npt.NDArray[np.int64]: ...
    @property
    def same_options(self) -> bool: ...
    @property
    def odd(self) -> list[int] | None: ...
    def note(self, groups: list[dict[str, Any]]) -> None: ...
    def look(
        self, groups: list[dict[str, Any]], state: dict[Any, Any]
    ) -> list[Tensor | None] | None: ...
