"""What an optimizer keeps in memory, and how it is saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastopt.memory.segments import Array
from fastopt.optimizer import checkpoint, checks, saving
from fastopt.optimizer.bindings import Bindings
from fastopt.optimizer.formats import PARAM
from fastopt.optimizer.state import fill, filling_stream, numbers
from fastopt.runtime.exclusive import exclusive


class Usage(NamedTuple):
    """The memory of an optimizer, shown as a table.

    Attributes
    ----------
    elements
        The number of elements of all parameters.
    buffers
        For each buffer its name, the dtypes of its arrays, and its bytes. "param" are
        the parameters themselves.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> usage = fastopt.adamw(np.ones(1000, np.float32)).memory()
    >>> usage.elements, usage.total, usage.per_parameter
    (1000, 12000, 12.0)
    """

    elements: int
    buffers: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, elements: int, buffers: Mapping[str, Sequence[Array]]) -> Usage:
        """Return the usage of buffers, which have an array for each parameter."""
        rows = []
        for name, arrays in buffers.items():
            if size := sum(array.nbytes for array in arrays):
                kinds = dict.fromkeys(str(a.dtype) for a in arrays if a.nbytes)
                rows.append((name, ", ".join(kinds), size))
        return cls(elements, tuple(rows))

    @property
    def total(self) -> int:
        """The bytes of all buffers."""
        return sum(size for *_, size in self.buffers)

    @property
    def per_parameter(self) -> float:
        """The bytes of all buffers for each element of the parameters."""
        return self.total / max(self.elements, 1)

    def __repr__(self) -> str:
        rows = [*self.buffers, ("total", "", self.total)]
        names = max(len(name) for name, *_ in rows)
        kinds = max(len(kind) for _, kind, _ in rows)
        lines = [
            f"{name:{names}}  {kind:{kinds}}  {size:>15,} bytes  "
            f"{size / max(self.elements, 1):7.3f} a parameter"
            for name, kind, size in rows
        ]
        return "\n".join([f"{self.elements:,} parameters", *lines])


class Storage(Bindings):
    """The memory of an optimizer."""

    @exclusive
    def memory(self) -> Usage:
        """Return the bytes of each buffer, in all and for each parameter.

        Gradients are not counted, because they are the caller's.

        Examples
        --------
        >>> import numpy as np, fastopt
        >>> opt = fastopt.adamw(np.ones(8192, np.float32), formats="8bit")
        >>> opt.memory()
        8,192 parameters
        param    float32           32,768 bytes    4.000 a parameter
        m        int8               8,192 bytes    1.000 a parameter
        m_scale  float32              512 bytes    0.062 a parameter
        v        uint8              8,192 bytes    1.000 a parameter
        v_scale  float32              512 bytes    0.062 a parameter
        total                      50,176 bytes    6.125 a parameter
        """
        pending = self._pending or self._spare
        buffers = {PARAM: self._params.arrays, **self._bound.state}
        copies = [copy.parts[0] for copy in self._params.copies if copy is not None]
        buffers["copy"] = copies
        buffers["ema"] = self._bound.averages or []
        buffers["accumulated"] = pending.sums if pending else []
        return Usage.of(sum(a.size for a in self._params.arrays), buffers)

    @property
    def nonfinite_groups(self) -> int:
        """How often a group of 64 numbers of 8-bit state was left as it was, because
        its new numbers were not all finite."""
        return self._bound.nonfinite_groups

    @exclusive
    def master_params(self) -> Any:
        """Return the parameters with all bits that are kept of them, as new arrays of
        float32 (or float64) in their structure. Those of "bf16+r8" and "bf16+r16" have
        their remainders."""
        self._params.watch.check()
        self._bound.program.check_working()
        tree, arrays = self._params.like(computed=True)
        for array, stream in zip(arrays, self._bound.streams[PARAM], strict=True):
            fill(array, numbers(stream))
        return tree

    @exclusive
    def load_master_params(self, masters: Any) -> None:
        """Set the parameters, and their remainders, to numbers of float32 in the
        structure of the parameters, such as those of :meth:`master_params`."""
        self._params.watch.check()
        self._bound.program.check_working()
        values: list[Any] = []
        checks.collect(self._params.layout, masters, "", values, "masters")
        names, calls = self._params.names, []
        streams = self._bound.streams[PARAM]
        for name, value, stream in zip(names, values, streams, strict=True):
            if getattr(value, "shape", None) != stream.shape:
                raise ValueError(
                    f"{name} has shape {stream.shape}, but its master is "
                    f"{getattr(value, 'shape', type(value).__name__)}"
                )
            calls += filling_stream(stream, value)
        for value, copy in zip(values, self._params.copies, strict=True):
            if copy is not None:
                calls += filling_stream(copy, value)
        self._write(*calls)

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """A copy of everything but the parameters that a run needs to go on exactly.

        Plain dicts, lists, numbers, strings and NumPy arrays. A hyperparameter that is
        a schedule is left out: give it to the optimizer that is to go on.
        """
        self._params.watch.check()
        return saving.save(self)

    @exclusive
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, bit for bit, on any backend.

        All is checked before anything changes; state finds its parameters by name. The
        saved hyperparameters replace ours; what was a schedule must be one here, too.
        """
        self._loading(saved)()

    def _loading(self, saved: Mapping[str, Any]) -> Callable[..., None]:
        return saving.loading(self, saved)

    @exclusive
    def save(self, path: Any, *, params: bool = False, shard: Any = None) -> None:
        """Write everything that a run needs to go on exactly to a file.

        Parameters
        ----------
        path : str or os.PathLike
            Where. The file is a safetensors file. One that is there is replaced at one
            instant, when the new one is complete and on the disk; after an error, an
            interrupt, or the end of the process, the old one is as it was. What a
            symbolic link points to is replaced, not the link.
        params
            Whether to write the parameters, too.
        shard
            If the arrays are slices of larger flat ones, which other processes step:
            in the structure of the parameters, for each array ``(first, size)``, the
            index of its first element and the size of the larger array, or None if it
            is whole. Each process writes a file of its own.

        Raises
        ------
        OSError
            If the file cannot be written.
        TypeError, ValueError
            If ``shard`` does not fit.
        RuntimeError
            If a step of this optimizer is under way, in another thread.

        Notes
        -----
        The state is written from where it lies, in blocks of 8 MB, and is not copied
        before. Meanwhile other threads are refused to step. A hyperparameter that is a
        schedule is left out, as from :meth:`state_dict`.

        Examples
        --------
        >>> import os, tempfile, numpy as np, fastopt
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> w = np.ones(3)
        >>> opt = fastopt.adamw(w, lr=0.1)
        >>> opt.step(np.array([1.0, 2.0, 3.0]))
        >>> opt.save(path, params=True)
        >>> again = np.zeros(3)
        >>> other = fastopt.adamw(again)
        >>> other.load(path)
        >>> other.steps, other.lr, bool((again == w).all())
        (1, 0.1, True)
        """
        self._params.watch.check()
        state = saving.save(self, saving.as_it_is)
        checkpoint.save(self, state, path, params, shard)

    @exclusive
    def load(self, path: Any, *, params: bool | None = None, shard: Any = None) -> None:
        """Go on from what :meth:`save` wrote, as :meth:`load_state_dict` does.

        Parameters
        ----------
        path : str, os.PathLike or a list of them
            The file; or those of several processes, in any order. Each process may pass
            all files: it reads what it needs.
        params
            Whether to set the parameters to those in the file, at the same instant. By
            default, if it has some.
        shard
            As for :meth:`save`: which slices this optimizer steps. They may be others
            than those that were saved, of more or fewer processes. What is not cut,
            such as the count of steps, must be the same in all files.

        Raises
        ------
        OSError
            If a file cannot be read.
        TypeError, ValueError
            If it is no such file, or is damaged, or does not fit this optimizer. Then
            nothing has changed.

        Notes
        -----
        All bytes that are loaded have checksums, which are checked. Nothing in a file
        is run. While it is loaded, the state is in memory three times: the old one,
        what was read, and the new one.
        """
        checkpoint.load(self, self._loading, path, params, shard)
