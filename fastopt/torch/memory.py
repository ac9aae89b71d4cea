"""Where tensors lie: as arrays that kernels take, and whether they are still there."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastopt.memory.formats import FORMATS, Format
from fastopt.memory.segments import Array, Encoded
from fastopt.torch import dtensors, layout
from fastopt.torch.dtensors import local

native: Any
try:
    native = importlib.import_module("fastopt._tensors")
except ImportError:  # no C compiler
    native = None

# What is computed in, for parameters of these dtypes. A complex number is two numbers.
COMPUTED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
HALVES: dict[torch.dtype, Format] = {
    torch.bfloat16: FORMATS["bf16"],
    torch.float16: FORMATS["fp16"],
}
NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class Unsupported(RuntimeError):
    """What fastopt has no kernels for."""


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is in the memory of a GPU, on which kernels of ours can work."""
    return bool(tensor.is_cuda)


def is_captured(tensors: Iterable[Tensor]) -> bool:
    """Whether steps on these tensors become part of a CUDA graph."""
    there = any(map(on_gpu, tensors))
    return there and bool(torch.cuda.is_current_stream_capturing())


def refuse_capture(tensors: Iterable[Tensor]) -> None:
    """Refuse to prepare a step while it becomes part of a CUDA graph: what is allocated
    then belongs to the graph."""
    if is_captured(tensors):
        raise RuntimeError(
            "a step of a new kind cannot be captured in a CUDA graph, because memory "
            "must be allocated for it: run a few steps before capturing, as torch does"
        )


def computed(param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: complex if the parameter is."""
    return param.dtype if param.is_complex() else COMPUTED[param.dtype]


def is_hollow(tensor: Tensor) -> bool:
    """Whether it has elements, but no memory of its own: a wrapper of other tensors, as
    DTensor, a FakeTensor, or what functorch makes."""
    if isinstance(tensor, FakeTensor):
        return True
    try:
        return not tensor.data_ptr() and tensor.numel() > 0
    except RuntimeError:  # what functorch makes
        return True


def is_cut_off(tensor: Tensor) -> bool:
    """Whether elements lie beyond the end of its storage, which was freed or made
    smaller: torch reads and writes there all the same."""
    wraps = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if wraps or not tensor.numel():
        return False
    try:
        length = tensor.untyped_storage().nbytes()
    except RuntimeError:  # what functorch makes has none
        return False
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    return bool((last + 1) * tensor.element_size() > length)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_plain(
    tensor: Tensor, shaped: bool = False, formats: Set[str] = frozenset()
) -> bool:
    """Whether kernels that have these formats can work in its memory; if ``shaped``,
    row by row."""
    return (
        tensor.dtype in COMPUTED
        and (tensor.dtype not in HALVES or HALVES[tensor.dtype].name in formats)
        and not tensor.is_neg()
        and not (tensor.is_complex() and tensor.is_conj())
        and (tensor.is_contiguous() if shaped else is_dense(tensor))
    )


def same_layout(
    tensor: Tensor, param: Tensor, dtype: torch.dtype | None = None
) -> bool:
    """Whether a tensor's elements are in memory as those of a parameter, if they have
    its dtype or the one given."""
    return (
        tensor.layout is torch.strided
        and tensor.device == param.device
        and (tensor.dtype, tensor.shape) == (dtype or param.dtype, param.shape)
        and not tensor.is_neg()
        and not (tensor.is_complex() and tensor.is_conj())
        and (
            not param.numel()
            or all(
                size == 1 or ours == theirs
                for size, ours, theirs in zip(
                    param.shape, tensor.stride(), param.stride(), strict=True
                )
            )
        )
    )


def numbers(tensor: Tensor) -> int:
    """Return how many real numbers a tensor contains."""
    count: int = tensor.numel()
    return 2 * count if tensor.is_complex() else count


def array(tensor: Tensor, count: int | None = None, shape: Any = (-1,)) -> Any:
    """Return the numbers of a dense tensor, in the order of memory, as its device's
    kernels take them; ``count`` of them, if those of other tensors follow."""
    count = numbers(tensor) if count is None else count
    format = HALVES.get(tensor.dtype)
    if not on_gpu(tensor):
        dtype = NUMPY[COMPUTED[tensor.dtype]] if format is None else format.stored
        address = tensor.data_ptr()
        if not address and count:
            raise RuntimeError(f"{type(tensor).__name__} has no memory for a kernel")
        memory = at_address(address, count, dtype) if count else np.empty(0, dtype)
        if shape != (-1,):
            memory = memory.reshape(shape)
        return memory if format is None else Encoded(format, (memory,))
    real = tensor.detach()
    real = torch.view_as_real(real) if real.is_complex() else real
    if format is not None:  # numba has no bfloat16 of torch's
        real = real.view(torch.int16)
    from fastopt.backends import cuda_driver

    flat = real.as_strided((count,), (1,)).reshape(shape)
    there = cuda_driver.as_array("params", flat)
    if format is None:
        return there
    words: Any = there.view(format.stored)
    return Encoded(format, (words,))


def at_address(address: int, count: int, dtype: np.dtype[Any], kept: Any = ()) -> Array:
    """Return so many numbers in memory as an array, which keeps some objects alive."""
    memory: Any = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    if kept:
        memory.kept = kept
    array: Array = np.frombuffer(memory, dtype)
    return array


def like(param: Tensor, flat: Tensor, plain: bool) -> Tensor:
    """Return a row of numbers as a tensor with the layout of the parameter."""
    if param.is_complex():
        flat = torch.view_as_complex(flat.view(-1, 2))
    if flat.shape == param.shape:
        return flat
    return (
        flat.as_strided(param.shape, param.stride())
        if plain
        else flat.view(param.shape)
    )


def check_gradient(param: Tensor, grad: Tensor) -> None:
    """Check that a gradient can be read, or copied first."""
    check_memory("gradients", grad)
    if grad.is_complex() and not param.is_complex():
        raise ValueError(
            f"a parameter of {param.dtype} has a gradient of {grad.dtype}; pass its "
            f"real part"
        )
    if grad.shape != param.shape and not broadcasts(grad.shape, param.shape):
        raise ValueError(
            f"a parameter has shape {tuple(param.shape)}, but its gradient has "
            f"{tuple(grad.shape)}"
        )


def check_device(param: Tensor, grad: Tensor) -> None:
    """Refuse a gradient on another device: a copy of it would wait for that device."""
    if grad.device != param.device:
        raise ValueError(
            f"a gradient is on {grad.device}, but its parameter on {param.device}; "
            f"move the gradient there before"
        )


def broadcasts(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether torch repeats a tensor of a shape where another one is wanted."""
    try:
        return bool(torch.broadcast_shapes(shape, wanted) == torch.Size(wanted))
    except RuntimeError:
        return False


def check_memory(what: str, tensor: Tensor) -> None:
    """Check that a tensor's elements are in memory, one by one."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else "sparse"
        raise Unsupported(f"{kind} {what}")
    shape = tuple(tensor.shape)
    if is_cut_off(tensor):
        raise RuntimeError(
            f"one of the {what} has shape {shape}, but a storage of "
            f"{tensor.untyped_storage().nbytes()} bytes, which was freed or made "
            f"smaller; nothing was updated"
        )
    if is_hollow(tensor):
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        kind = "wrapper" if plain else type(tensor).__name__
        raise Unsupported(f"{what} without memory of their own ({kind}, shape {shape})")


class Tensors:
    """Parameters and what belongs to them, as they were when a step was planned. For
    those who have no compiler, or an older torch; ``csrc/tensors.pyx`` is faster.

    Parameters
    ----------
    params, planned
        All parameters, and for each whether the plan knows what to do with a gradient.
    groups, state
        The optimizer's. If the state is no longer the same objects, all is to be
        planned anew; if the options of the groups are not, they are to be read again.
    buffers
        The tensors of the state that a step works in, to see whether they move.
    single
        Whether the parameters are not all of the groups.
    specs
        For each parameter its DTensorSpec, or None if it is no DTensor; or None if
        there are no DTensors. For DTensors, the local tensors are watched.
    divided_alike
        A function of a gradient and a parameter: whether their placements are the same.
    """

    def __init__(
        self,
        params: list[Tensor],
        planned: list[bool],
        groups: list[dict[str, Any]],
        state: dict[Any, Any],
        buffers: list[Tensor],
        single: bool,
        specs: list[Any] | None,
        divided_alike: Callable[[Any, Any], bool],
    ):
        self.divided_alike = divided_alike
        self.params, self.planned, self.buffers = params, planned, buffers
        self.single, self.same_options = single, True
        self.note(groups)
        self.objects = self._objects(groups, state)
        self.places = self._places()
        self.addresses = np.zeros(len(params), np.int64)
        self.moved = False
        self.odd: list[int] | None = None

    def note(self, groups: list[dict[str, Any]]) -> None:
        """Note that the options have been read."""
        self.options = [value for group in groups for value in list(group.values())]

    def _objects(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> Any:
        """Return parameters, None after each group, and the entries of the state."""
        parts = [] if self.single else [(*group["params"], None) for group in groups]
        for key, value in list(state.items()):  # a handler may add some
            parts.append((key, value, *(value.values() if type(value) is dict else ())))
        return list(chain.from_iterable(parts))

    def _places(self) -> list[tuple[Any, ...]]:
        pairs = zip(self.params, self.planned, strict=True)
        of_params = [place(local(param)) if on else (0,) for param, on in pairs]
        return of_params + list(map(place, self.buffers))

    def look(
        self, groups: list[dict[str, Any]], state: dict[Any, Any]
    ) -> list[Tensor | None] | None:
        """Return the gradients if all is as it was, or else None.

        ``addresses`` are theirs: 0 for None, and -1 for a gradient whose layout is not
        that of its parameter; ``odd`` has the places of these. ``moved`` says that some
        addresses have changed since it was last set to False, and ``same_options`` that
        the options of the groups are those that were noted.
        """
        options = [value for group in groups for value in list(group.values())]
        self.same_options = same(self.options, options)
        if not same(self.objects, self._objects(groups, state)):
            return None
        if self._places() != self.places:
            return None
        grads = [
            local(grad) if self.divided_alike(grad, param) else grad
            for param in self.params
            for grad in [param.grad]
        ]
        now = np.zeros(len(grads), np.int64)
        for i, grad in enumerate(grads):
            if grad is not None and not self.planned[i]:
                return None
            if grad is not None:
                address, *how = place(grad)
                fits = how == [*self.places[i][1:]] and not is_cut_off(grad)
                now[i] = address if fits else -1
        self.moved |= not np.array_equal(now, self.addresses)
        self.addresses[:] = now
        self.odd = np.flatnonzero(now == -1).tolist() or None
        return grads


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where a tensor is, and its layout."""
    if tensor.layout is not torch.strided or tensor.is_nested or is_hollow(tensor):
        return (type(tensor), tensor.layout)
    strides = tuple(
        0 if size == 1 or not tensor.numel() else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    flipped = tensor.is_neg() or (tensor.is_complex() and tensor.is_conj())
    address = tensor.data_ptr() or -2
    return address, tensor.dtype, tensor.device, tensor.shape, strides, flipped


def same(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists have the same objects."""
    return len(first) == len(second) and all(
        a is b for a, b in zip(first, second, strict=True)
    )


SIMPLE_TYPES = Tensor, torch.nn.Parameter
known: list[layout.Layout] = []  # the layout of tensors, once it has been found


def know(found: layout.Layout) -> None:
    """Let the native code read tensors where they have this layout."""
    native.know(found, layout.ones(torch.float32), layout.ones(torch.float64))
    known[:] = [found]


def learn() -> None:
    """Find the layout of tensors, if it is not known yet. Another version of torch may
    have another one, and within a transformation, such as torch.func.grad, there is
    none to be found; then tensors are asked."""
    if native is not None and not known:
        with suppress(AttributeError, ValueError, RuntimeError):
            with torch.inference_mode(False):  # in which tensors have other keys
                know(layout.find())


def simple(params: list[Tensor], grads: list[Tensor | None]) -> Sequence[int]:
    """Return for each parameter whether it is simple, so that nothing needs to be
    checked: it is of float32 or float64 on the CPU and contiguous in its storage, and
    its gradient, if there is one, is so as well."""
    learn()
    if native is None:
        return bytes(len(params))
    found: Sequence[int] = native.simple(params, grads, SIMPLE_TYPES)
    return found


def watched(params: list[Tensor], *more: Any) -> Any:
    """Return the faster of the two kinds of ``Tensors``, where it is possible."""
    specs = None
    if dtensors.are_there(params):
        specs = [p._spec if dtensors.is_dtensor(p) else None for p in params]
    what = params, *more, specs, dtensors.fits
    if native is not None and params:
        try:
            return native.Tensors(*what)
        except AttributeError:  # an older torch, a tensor of many dimensions
            pass
    return Tensors(*what)
