"""Steps on a GPU: one launch for all segments (see :class:`fastopt.step.Runner`).

What a launch needs is prepared once and kept: the table of segments on the device, the
compiled kernel, and the block of its parameters. A step then writes the scalars and, if
they have changed, the addresses of gradients, and launches the kernel. It allocates
nothing and does not wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np

from fastopt.backends import cuda_device as device
from fastopt.backends import cuda_jobs, cuda_table
from fastopt.backends.cuda_arrays import (
    DeviceArray,
    default_stream,
    state_arena,
)
from fastopt.backends.cuda_boards import DeviceTable, NumberBoard, device_table
from fastopt.backends.cuda_decisions import (
    NOWHERE,
    Counts,
    Decisions,
    Places,
)
from fastopt.backends.cuda_jobs import Beside, Update
from fastopt.backends.cuda_sums import Measuring, row_count
from fastopt.backends.cuda_table import address, draws
from fastopt.backends.numpy_ref import Step, parts_of
from fastopt.memory.formats import Format
from fastopt.memory.segments import Array, Encoded, Segment, encoded
from fastopt.portable import portable
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.runtime.atomic import Call
from fastopt.runtime.identity import same_objects
from fastopt.step import PLAIN, HalfDone, Request, Row

BROKEN = (
    "a step of this optimizer failed on the GPU ({error}), so only some of its "
    "parameters and state may have been updated; load a checkpoint, in a new process "
    "if the error persists"
)

UNREADABLE = (
    "the stream is being captured into a CUDA graph, so nothing can be read from the "
    "GPU: neither steps, skipped, grad_norm nor the state; read them after the capture"
)

FILLING = (
    "this step cannot be captured into a CUDA graph, because state must be filled "
    "before the first step, and before the first one after add_group or a switch; do a "
    "step before the capture"
)

CAPTURED = (
    "the stream is being captured into a CUDA graph, but this step needs the host and "
    "cannot be captured. These steps need it: of groups without capturable=True in "
    "fastopt.torch; with weights, and those of accumulate() and estimate(); with "
    "nonfinite='raise'; with nonfinite='skip' and float64 or zero_grads; of rules with "
    "factored state; and of rules whose scalars Numba cannot compile"
)


class OnDevice(Step):
    """The runner of the backend "cuda".

    ``stream`` returns the stream to work on. It is asked in every step.
    """

    fuses = frozenset({"addresses", "again", "decisions", "failure", "one row", "step"})

    def __init__(
        self,
        rule: Rule,
        segments: Sequence[Segment],
        count: Array,
        carry: Array | None = None,
    ):
        self.rule, self.segments, self.count = rule, segments, count
        self.dtype = segments[0].param.dtype
        self.sizes = [segment.param.size for segment in segments]
        first: Any = parts_of(segments[0].param)[0]
        arrays = arrays_of(segments)
        self.stream: Callable[[], int] = first.stream
        for array in arrays:  # so that whoever reads it waits for the steps
            if array.stream is default_stream:
                array.stream = self.stream
        numbers = sorted({array.number for array in arrays if array.size})
        if len(numbers) > 1:
            raise ValueError(
                f"arrays of an optimizer must be on one device, but these are on the "
                f"devices {', '.join(map(str, numbers))}; make an optimizer for each"
            )
        self.near = next((address(a) for a in arrays if a.size), 0)
        self.number = device.device_of(self.near) if self.near else 0
        self.context = device.context(self.number)
        self.averaged = any(segment.average is not None for segment in segments)
        self.draws = any(segment.draws for segment in segments)
        # The address of each gradient, or 0 if there is none. A gradient without
        # elements has an address that is not 0.
        self.grads_now = np.zeros(len(segments), np.int64)
        self.grad_formats: tuple[Format | None, ...] = ()
        # One number for equal formats, because a tuple of thousands takes long to hash.
        self.format_number = 0
        self._format_numbers: dict[tuple[Format | None, ...], int] = {}
        self._tables: dict[Any, DeviceTable] = {}
        self._launches: dict[Any, PreparedUpdate] = {}
        self._measuring = Measuring(self)
        self._given: list[Any] | None = None  # gradients, as a user gave them
        self._scalars = portable(rule.scalars)
        self._made: list[DeviceArray] = []  # where several tasks are combined
        self._combining: OnDevice | None = None
        self._failure: BaseException | None = None
        self.gradients = NumberBoard(self, (len(segments),), np.int64)
        self._decisions: Decisions | None = None
        self._carry = carry
        self._has_device_scalars = True  # until a compilation fails
        self._skips = 0  # the number that the optimizer has been told
        self.tasks: list[list[Any]] = []

    # Gradients ------------------------------------------------------------------------

    def take(self, grads: list[Any], weights: Sequence[float] | None = None) -> bool:
        self.tasks = [
            [None if grad is None else encoded(grad) for grad in task]
            for task in ([grads] if weights is None else grads)
        ]
        taken, self._given = self.tasks[0], None
        if weights is not None:
            taken = self._combined(self.tasks, weights)
        for grad in taken:
            self._check_device(grad)
        self.grads = taken
        self._point(
            [
                0 if g is None else address(parts_of(g)[0]) if g.size else -1
                for g in taken
            ]
        )
        # A segment without a gradient goes on as one of its kind.
        before = self.grad_formats or (None,) * len(taken)
        self._name_formats(
            old if g is None else g.format if isinstance(g, Encoded) else None
            for g, old in zip(taken, before, strict=True)
        )
        return True

    def _check_device(self, grad: Any) -> None:
        if grad is not None and grad.size:
            first: Any = parts_of(grad)[0]
            if first.number != self.number:
                raise ValueError(
                    f"a gradient is on device {first.number}, but its parameter on "
                    f"device {self.number}; copy it there first"
                )

    def _point(self, addresses: Any) -> None:
        """Take gradients at these addresses."""
        self.grads_now[:] = addresses
        self.gradients.note(self.grads_now)

    def _name_formats(self, formats: Iterable[Format | None]) -> None:
        """Take gradients of these formats."""
        self.grad_formats = tuple(formats)
        numbers = self._format_numbers
        self.format_number = numbers.setdefault(self.grad_formats, len(numbers))

    def place(
        self, addresses: Array, formats: Format | Sequence[Format | None] | None = None
    ) -> bool:
        """Take gradients by their addresses, with 0 for none. The caller has checked
        that they fit, and names their format if they are encoded, or lists the format
        of each. Return False where their shapes are needed, too."""
        if self.rule.factored:
            return False
        self._point(addresses)
        if formats is None or isinstance(formats, Format):
            formats = (formats,) * len(self.segments)
        self._name_formats(formats)
        self.grads, self.tasks, self._given = [], [], None
        return True

    def follow(self, addresses: Array, places: Array) -> bool:
        """Take gradients like those of the last ``place``, at new addresses. Return
        whether all segments have one."""
        self._point(addresses[places])
        return bool(self.grads_now.all())

    def have_done(self, counts: Array, steps: float) -> bool:
        """Whether all counts equal ``steps``."""
        return bool((counts == steps).all())

    def _combined(self, tasks: list[list[Any]], weights: Sequence[float]) -> list[Any]:
        """Combine the tasks' gradients of every segment, as the reference does."""
        params = [segment.param for segment in self.segments]
        if not self._made:
            self._made = [made for (made,) in state_arena(params, 1)]
        with self.context:
            for made in self._made:
                device.clear(made.address, made.nbytes, self.stream())
        step, self._combining = self._combining, None
        if step is None:
            made_arrays: list[Any] = [*self._made]
            segments = [Segment(made, (), 0) for made in made_arrays]
            step = self._alongside(passes.accumulate, segments)
        try:
            for task, weight in zip(tasks, weights, strict=True):
                if self.dtype.type(weight) != 0:
                    step.take([None if g is None else flat(g) for g in task])
                    step([(weight,)])
        except HalfDone as error:  # nothing of the optimizer's was written
            raise error.__cause__ or error from None
        self._combining = step  # unless it has failed
        there = [any(g is not None for g in of) for of in zip(*tasks, strict=True)]
        return [
            made.reshape(param.shape) if given else None
            for made, param, given in zip(self._made, params, there, strict=True)
        ]

    def _alongside(self, rule: Rule, segments: Sequence[Segment]) -> OnDevice:
        """Return a runner for other segments, on the same stream."""
        runner = OnDevice(rule, segments, np.zeros(1, np.int64))
        runner.stream = self.stream
        return runner

    @staticmethod
    def is_fixed(array: Any) -> bool:
        """Whether an array stays where it is as long as it lives. Tensors may move."""
        library = type(array).__module__.partition(".")[0]
        foreign = library in ("numba", "cupy") and not device.SIMULATED
        return isinstance(array, DeviceArray) or foreign

    def remember(self, given: Sequence[Any]) -> None:
        """Note the gradients as they were given, if no library moves such arrays, so
        that they are known when they are given once more."""
        fixed = all(map(self.is_fixed, given))
        self._given = list(given) if fixed and not self.rule.carry else None

    def again(
        self,
        grads: list[Any],
        hyperparameters: Sequence[Sequence[Any]],
        grad_scale: float,
        threads: int,
        request: Request | None = None,
        attributes: Any = None,
    ) -> bool:
        """Do a plain step with gradients that lie where those of the last step did.
        Return False, with nothing done, if they may not, or if it is not plain."""
        given = self._given
        if given is None or request is not None or self.is_ahead:
            return False
        if self.is_captured():
            return False
        if not same_objects(grads, given):
            return False
        t, count = int(self.count[0]) + 1, self.rule.scalar_count
        rows = [
            (grad_scale, *self._scalars(t, *values)[:count])
            for values in hyperparameters
        ]
        return self(rows, PLAIN, [t] * len(rows) if self.draws else None)

    # What is prepared once ------------------------------------------------------------

    def table(self, what: str) -> DeviceTable:
        """Return the table of segments with the formats of the gradients at hand: for
        the "update", or for what is measured of the "gradients" or by the "rule"."""
        known = what, self.format_number
        if known not in self._tables:
            self._tables[known] = device_table(self, what)
        return self._tables[known]

    def _prepared(self, request: Request, rows: int) -> PreparedUpdate:
        """Return the launch of an update."""
        key = request.limits_gradients, request.zero_grads, self.format_number, rows
        launch = self._launches.get(key)
        if launch is None:
            beside = Beside(key[0], self.averaged, request.zero_grads)
            table = self.table("update")
            of = self.rule.update, len(self.rule.state), self.dtype
            job = Update(*of, table.kinds, table.stride, beside)
            launch = PreparedUpdate(self, job, table, rows)
            self._launches[key] = launch
        return launch

    # A step ---------------------------------------------------------------------------

    def check_working(self) -> None:
        """Refuse to go on after a step that has failed on the device."""
        if self._failure is not None:
            raise HalfDone(BROKEN.format(error=self._failure)) from self._failure

    def calls(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> list[Call]:
        self.check_working()
        # Compile and allocate here, before anything is written.
        launch = self._prepared(request, row_count(rows))
        return [functools.partial(self._do, launch, rows, request, steps)]

    def __call__(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> bool:
        self.check_working()
        launch = self._prepared(request, row_count(rows))
        return self._do(launch, rows, request, steps)

    def _do(
        self,
        launch: PreparedUpdate,
        rows: list[Row],
        request: Request,
        steps: Sequence[int] | None,
    ) -> bool:
        try:
            launch.run(rows, request, steps)
            self._zero_tasks(request)
            self.count[0] += 1
            if self.is_replayed:
                self.decisions.tell(self.stream())
        except device.DriverError as error:
            raise self._failed(error) from error
        return True

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Note a failure of the device, because the step may then be half done."""
        try:
            yield
        except device.DriverError as error:
            raise self._failed(error) from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Read from the device. In a capture, the driver would refuse to wait for it,
        and end the capture."""
        if self.is_captured():
            raise RuntimeError(UNREADABLE)
        with self._noting_failures():
            yield

    def _failed(self, error: device.DriverError) -> HalfDone:
        self._failure = error
        return HalfDone(BROKEN.format(error=error))

    def note_failure(self, error: Exception) -> None:
        """See :meth:`fastopt.step.Program.note_failure`."""
        if isinstance(error, HalfDone):
            self._failure = error.__cause__
        elif isinstance(error, device.DriverError):
            raise self._failed(error) from error

    def _zero_tasks(self, request: Request) -> None:
        """Set the gradients of several tasks to zero. The step has read their sum."""
        if not request.zero_grads or not self.tasks or self.tasks[0] is self.grads:
            return
        with self.context:
            for grad in chain(*self.tasks):
                for part in () if grad is None else parts_of(grad):
                    device.clear(address(part), part.nbytes, self.stream())

    # Steps that the device decides ----------------------------------------------------

    @property
    def decisions(self) -> Decisions:
        if self._decisions is None:
            carry = self._carry
            if carry is None:
                carry = np.zeros((2, 1 + max(s.row for s in self.segments), 0))
            self._decisions = Decisions(self, carry.shape[1], carry)
        return self._decisions

    def decided_by(self, request: Request) -> str:
        """Return who computes the scalars of a step that needs a norm, or sums of the
        rule: the "host", if it knows the number of the step and what the rule carries,
        or the "device". Return nothing for a step that the host must decide, or that
        needs no decision."""
        rule = self.rule
        if rule.factored or request.nonfinite == "raise":
            if self.is_captured():
                raise RuntimeError(CAPTURED)
            return ""
        captured = self.is_captured()
        counted = captured or self.is_replayed  # by the device
        if not counted and not (request.needs_norm or rule.settle is not None):
            return ""
        skips = request.nonfinite == "skip"
        # The squares of float64 may overflow, and gradients be zeroed though skipped.
        if skips and (self.dtype == np.float64 or request.zero_grads):
            if captured:
                raise RuntimeError(CAPTURED)
            return ""
        if counted:
            return "device"
        if not skips and not (rule.settle is not None and rule.carry):
            if self._decisions is not None:
                self._decisions.refresh()
            return "host"
        return "device" if self._has_device_scalars else ""

    def check_filling(self) -> None:
        """Refuse to fill state before a step that becomes part of a CUDA graph: this
        waits for the parameters, and must not be done again by replays."""
        if self.is_captured():
            raise RuntimeError(FILLING)

    def is_captured(self) -> bool:
        """Whether what is enqueued becomes part of a CUDA graph."""
        stream = self.stream()
        if not stream:  # the default one, which cannot be captured
            return False
        with self.context:
            return bool(device.is_capturing(stream))

    def decided_by_host(
        self, rows: Sequence[Row], request: Request, steps: Sequence[int]
    ) -> Call:
        """Return the call of a step that the device decides, with rows that have all
        results of the rule's ``scalars``, after the factor. ``steps`` are the numbers
        of the rows' steps."""
        self.check_working()
        if self.is_captured():  # each replay would be the same step
            raise RuntimeError(CAPTURED)
        return self._deciding(self.decisions.by_host(rows, request, steps), request)

    def decided_by_device(
        self,
        hyperparameters: Sequence[Sequence[float]],
        factors: Sequence[float],
        request: Request,
        places: Places = NOWHERE,
        counts: Counts | None = None,
    ) -> Call | None:
        """Return the call of a step for which the device also computes the scalars, or
        None if kernels cannot: a user's rule may do what Numba does not compile. See
        ``cuda_decisions`` for ``places`` and ``counts``."""
        self.check_working()
        given = hyperparameters, factors, request, places, counts
        try:
            sequence = self.decisions.by_device(*given)
        except Exception as error:
            if not cuda_jobs.is_refusal(error):
                raise
            if self.is_captured():
                raise RuntimeError(CAPTURED) from error
            self._has_device_scalars = False
            return None
        return self._deciding(sequence, request)

    def _deciding(self, sequence: Any, request: Request) -> Call:
        def call() -> None:
            with self._noting_failures():
                sequence.run()
                self._zero_tasks(request)

        return call

    @property
    def is_ahead(self) -> bool:
        """Whether the device knows of steps that the host does not."""
        return self._decisions is not None and self._decisions.ahead

    @property
    def is_replayed(self) -> bool:
        """Whether CUDA graphs count this runner's steps. All others count there, too,
        so that replays go on from them."""
        return self._decisions is not None and self._decisions.is_replayed

    @property
    def is_in_graph(self) -> bool:
        """Whether a CUDA graph uses this runner's memory."""
        return self._decisions is not None and bool(self._decisions._captured)

    def refresh(self) -> None:
        """Bring the count of steps and the carried numbers up to date, if the device
        knows more than the host."""
        if self._decisions is not None and self.is_ahead:
            self.check_working()
            with self._reading():
                self._decisions.refresh()

    def norm(self) -> float:
        """Return the norm of the last step that had one."""
        with self._reading():
            return self.decisions.norm()

    def skips(self) -> int:
        """Return how many steps have been skipped since this was last asked."""
        if self._decisions is None:
            return 0
        with self._reading():
            total = self._decisions.skips()
        new, self._skips = total - self._skips, total
        return new

    # Sums -----------------------------------------------------------------------------

    def sums(
        self, what: str, rows: Sequence[Row], request: Request
    ) -> list[tuple[float, ...] | None]:
        self.check_working()
        return self._measuring.sums(what, rows, request)

    def squares(
        self, rows: Sequence[Row], request: Request
    ) -> list[tuple[Array, Array] | None]:
        self.check_working()
        return self._measuring.squares(rows, request)


class PreparedUpdate:
    """An update of a runner's segments, up to the numbers that change."""

    def __init__(self, runner: OnDevice, job: Update, table: DeviceTable, rows: int):
        self.runner, self.job = runner, job
        self.data = np.zeros((rows, job.row), job.dtype)
        self.steps = np.zeros(rows, np.int64)
        self._draws = any(map(draws, job.kinds))
        self.boards = device.Board(runner.context, self.data.nbytes)
        self.numbers = device.Board(runner.context, self.steps.nbytes)
        self._launch: Any = None
        if table.block_count:
            addresses = (
                *(table.blocks.address, table.numbers.address),
                *(runner.gradients.address, self.boards.address, self.numbers.address),
                *(int(rows > 1), int(rows > 1), 0),
            )
            kernel = cuda_jobs.loaded(job, runner.number)
            of = table.block_count, cuda_table.BLOCK, addresses
            self._launch = device.Launch(kernel, *of)

    def run(
        self, rows: list[Row], request: Request, steps: Sequence[int] | None
    ) -> None:
        runner, beside = self.runner, self.job.beside
        if self._launch is None:
            return
        more: tuple[float, ...] = request.limits if beside.clip else ()
        if beside.average:
            more = (*more, request.ema_weight)
        for i in range(len(self.data)):
            self.data[i] = rows[i] + more
        stream = runner.stream()
        with runner.context:
            if device.is_capturing(stream):
                raise RuntimeError(CAPTURED)
            runner.gradients.write_noted(stream)
            self.boards.write(self.data, stream)
            if self._draws and steps:
                self.steps[:] = steps[: len(self.steps)]
                self.numbers.write(self.steps, stream)
            self._launch(stream)


def arrays_of(segments: Sequence[Segment]) -> list[Any]:
    """Return the arrays in which segments are stored."""
    return [
        part
        for segment in segments
        for stream in cuda_table.buffers_of(segment)
        for part in cuda_table.parts(stream)
    ]


def flat(stream: Any) -> Any:
    """Return a stream as one without dimensions."""
    if isinstance(stream, Encoded):
        return Encoded(stream.format, tuple(part.reshape(-1) for part in stream.parts))
    return stream.reshape(-1)
