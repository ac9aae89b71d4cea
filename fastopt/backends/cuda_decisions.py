"""Steps that are decided on the device: norms, clipping, what rules measure, and
whether a step is skipped.

The host enqueues the kernels of a step one after another and waits for none of them.
Where it knows the number of the step, and what the rule carries, it computes the rows
of scalars as for a plain step. Where only the device knows, because a step may have
been skipped or the rule carries what it measures, the device computes them, too. Then
the counts and the carried numbers on the device are ahead of the host's, and
``refresh`` fetches them for whoever asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastopt.backends import cuda_device as device
from fastopt.backends import cuda_jobs, cuda_table
from fastopt.backends.cuda_arrays import DeviceArray, empty
from fastopt.backends.cuda_boards import NumberBoard
from fastopt.backends.cuda_jobs import CONTROL, LIMITS, Beside, Settle, Sums, Update
from fastopt.backends.cuda_table import ceiling
from fastopt.memory.order import LANES
from fastopt.memory.segments import Array
from fastopt.rule import Rule
from fastopt.rules import passes
from fastopt.step import Request, Row

if TYPE_CHECKING:
    from fastopt.backends.cuda_runner import OnDevice

NUMBER = np.dtype(np.float64)


class Places(NamedTuple):
    """Numbers on the device that a training loop keeps there: their addresses, or 0."""

    found: int = 0  # a float32 that is not 0 if gradients are not finite
    scale: int = 0  # a float32 by which the gradients are to be divided
    lr: int = 0  # a number; with ``Counts``, one for each row of hyperparameters
    lr_kind: str = ""  # the dtype of lr


NOWHERE = Places()


@dataclass(frozen=True, eq=False)
class Counts:
    """The steps of each segment, as torch counts them, on the device. There should be
    one object for all steps: each is known by itself, because thousands of groups would
    take long to compare."""

    steps: int  # the address of a vector of float32
    groups: tuple[int, ...]  # for each segment, the row of its hyperparameters


class Decisions:
    """The decisions of a runner's steps, for a number of rows of scalars.

    Parameters
    ----------
    runner
        Whose steps they are.
    rows
        The number of rows.
    carry
        The numbers that the rule carries, as ``Program.carry``.
    """

    def __init__(self, runner: OnDevice, rows: int, carry: Array):
        self.runner, self.rows, self.host_carry = runner, rows, carry
        self.rule, self.carried = runner.rule, carry.shape[2]
        self._make_boards()
        self.control = self.array((len(CONTROL),), NUMBER)
        size = len(runner.segments), max(self.rule.terms, 1)
        self.totals = self.array(size, NUMBER)
        self._asked = NumberBoard(runner, (2 + LIMITS,), NUMBER)
        self._factor = NumberBoard(runner, (1,), runner.dtype)
        self._sequences: dict[Any, LaunchSequence] = {}
        self._captured: list[LaunchSequence] = []  # what graphs launch
        self._retired: list[Any] = []  # what kernels in a queue may still use
        # The count and the carried numbers that host and device last agreed on.
        self._known: tuple[int, bytes] = (-1, b"")
        self.ahead = False  # whether the device knows more than the host
        # Whether a CUDA graph counts steps here. The host does not see its replays.
        self.is_replayed = False

    def array(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return empty(shape, dtype, self.runner.near, self.runner.stream)

    def _make_boards(self) -> None:
        self.steps = NumberBoard(self.runner, (self.rows,), np.int64)
        self.carry = NumberBoard(self.runner, (self.rows, self.carried), NUMBER)

    # The host's view ------------------------------------------------------------------

    def start(self, stream: int, captured: bool) -> None:
        """Give the device the host's count and carried numbers, if it has others."""
        if not self.ahead:
            self.tell(stream, captured)

    def tell(self, stream: int, captured: bool = False) -> None:
        """Give the device the host's count and carried numbers."""
        count = int(self.runner.count[0])
        numbers = self.host_carry[count % 2]
        now = count, numbers.tobytes()
        if now == self._known:
            return
        for board, new in ((self.steps, count), (self.carry, numbers)):
            if captured:
                board.set_aside(new)
            else:
                with self.runner.context:
                    board.write(new, stream)
                    board.forget()  # kernels will write other numbers there
        self._known = now

    def forget(self) -> None:
        """Forget what the device has, because a kernel has written other numbers."""
        self._known = (-1, b"")
        self.steps.forget()

    def refresh(self) -> None:
        """Wait for the device, and bring the host's count and carried numbers up to
        date."""
        if not self.ahead:
            return
        count = int(self.steps.read(self.runner.stream())[0])
        if self.carried:
            self.host_carry[count % 2] = self.carry.read(self.runner.stream())
        self.runner.count[0] = count
        self._known = count, self.host_carry[count % 2].tobytes()
        self.ahead = self.is_replayed

    def norm(self) -> float:
        """Wait for the device, and return the norm of the last step that had one."""
        return float(self.control.copy_to_host()[CONTROL.index("norm")])

    def skips(self) -> int:
        """Wait for the device, and return how many steps it has skipped."""
        words = self.control.copy_to_host().view(np.int64)
        return int(words[CONTROL.index("skipped")])

    # Steps ----------------------------------------------------------------------------

    def by_host(
        self, rows: Sequence[Row], request: Request, steps: Sequence[int]
    ) -> LaunchSequence:
        """Prepare a step whose rows the host has computed in full: the factor for the
        gradients, and all results of the rule's ``scalars``. ``steps`` are the numbers
        of the rows' steps."""
        alike = [row is rows[0] for row in rows]
        if all(alike) and len({*steps}) == 1:
            rows, steps = rows[:1], steps[:1]
        numbers = [(row[0], t, *row[1:]) for row, t in zip(rows, steps, strict=True)]
        job = self._job(request, None, len(rows[0]), len(rows[0]) - 1)
        sequence = self._sequence(job, len(rows), request, NOWHERE)
        return sequence.asked(numbers, request)

    def by_device(
        self,
        hyperparameters: Sequence[Sequence[float]],
        factors: Sequence[float],
        request: Request,
        places: Places = NOWHERE,
        counts: Counts | None = None,
    ) -> LaunchSequence:
        """Prepare a step whose scalars the device computes. With ``counts``, there are
        hyperparameters for each group, and a row of scalars for each segment."""
        pairs = zip(factors, hyperparameters, strict=True)
        rows = [(factor, *row) for factor, row in pairs]
        words = np.array(rows, NUMBER).view(np.uint64)  # in which zeros have signs
        if counts is None and not self.carried and (words == words[0]).all():
            rows = rows[:1]
        names = list(self.rule.hyperparameters)
        job = self._job(request, self.rule.scalars, len(names), self._results(rows[0]))
        job = job._replace(
            skips=request.nonfinite == "skip",
            found=bool(places.found),
            scale=bool(places.scale),
            lr_column=names.index("lr") if places.lr else -1,
            lr_kind=places.lr_kind,
            counts=counts is not None,
        )
        sequence = self._sequence(job, len(rows), request, places, counts)
        return sequence.asked(rows, request)

    def _results(self, row: Sequence[float]) -> int:
        """Return how many results the rule's ``scalars`` have."""
        values = dict(zip(self.rule.hyperparameters, row[1:], strict=True))
        carry = self.rule.first_carry(values)
        # A rule may refuse something in the first step, which is over if it is ahead.
        t = int(self.runner.count[0]) + 1 + self.ahead
        return len(self.rule.scalars(t, *carry, *values.values()))

    def _job(self, request: Request, scalars: Any, hyper: int, count: int) -> Settle:
        rule = self.rule
        return Settle(
            scalars,
            rule.settle,
            "scalars",
            self.runner.dtype,
            0,
            hyper,
            self.carried if scalars is not None else 0,
            count,
            rule.settle_count,
            rule.scalar_count,
            rule.measure_count,
            rule.terms,
            rule.settle is not None and not rule.by_segment,
            request.limits_gradients,
            self.runner.averaged,
            norm=request.needs_norm,
        )

    def _sequence(
        self,
        job: Settle,
        rows: int,
        request: Request,
        places: Places,
        counts: Counts | None = None,
    ) -> LaunchSequence:
        formats = self.runner.format_number
        if self.runner.is_captured():
            if not self.ahead:
                # The host is to write its count beside the stream, where kernels of
                # earlier steps may be about to write theirs.
                self._retired.append((self.steps, self.carry, self._sequences))
                self._make_boards()
                self._sequences, self._known = {}, (-1, b"")
            of = job, rows, request, places, counts
            self._captured.append(LaunchSequence(self, *of, captured=True))
            return self._captured[-1]
        key = job, rows, request.zero_grads, formats, places, counts
        sequence = self._sequences.get(key)
        if sequence is None:
            sequence = LaunchSequence(self, job, rows, request, places, counts)
            self._sequences[key] = sequence
        return sequence


class LaunchSequence:
    """The launches of one kind of step. Only the numbers that change are missing.

    If it is ``captured``, it belongs to a CUDA graph. A graph copies nothing from the
    host, so what the host writes is in boards that no other step changes.
    """

    def __init__(
        self,
        decisions: Decisions,
        job: Settle,
        rows: int,
        request: Request,
        places: Places,
        counts: Counts | None = None,
        captured: bool = False,
    ):
        runner, rule = decisions.runner, decisions.rule
        self.decisions, self.job, self.runner = decisions, job, runner
        self.captured = captured
        self.gradients, self._asked = runner.gradients, decisions._asked
        self._factor = decisions._factor
        if captured:
            size = (len(runner.segments),)
            self.gradients = NumberBoard(runner, size, np.int64)
            self._asked = NumberBoard(runner, (2 + LIMITS,), NUMBER)
            self._factor = NumberBoard(runner, (1,), runner.dtype)
        self.hyper = NumberBoard(runner, (rows, 1 + job.hyper), NUMBER)
        length = 1 if counts is None else len(counts.groups)
        groups, self._counts = decisions.array((length,), np.int64), 0
        if counts is not None:
            rows, self._counts = length, counts.steps
            numbers = np.array(counts.groups, np.int64)
            device.set_aside(runner.context, groups.address, numbers)
        self._groups = groups
        by_segment = job.settle is not None and not job.over_all
        out_rows = decisions.rows if by_segment else rows
        shared = rows == 1 and out_rows > 1
        update_table = runner.table("update")
        update = Update(
            rule.update,
            len(rule.state),
            runner.dtype,
            update_table.kinds,
            update_table.stride,
            Beside(job.clip, job.average, request.zero_grads),
            job.skips or job.found,
        )
        measured_row = 1 + job.measured + LIMITS * job.clip
        self.out = decisions.array((out_rows, update.row), runner.dtype)
        # Where nothing comes before the sums, the host writes what these need.
        self.direct = job.scalars is None and job.settle is not None and not job.norm
        array: Any = NumberBoard if self.direct else decisions.array
        before = (runner,) if self.direct else ()
        self.measured = array(*before, (rows, measured_row), runner.dtype)
        self.numbers = array(*before, (rows, 1 + job.results), NUMBER)
        self.factor = decisions.array((1,), runner.dtype)
        norm_table = runner.table("gradients")
        rule_table = runner.table("rule")
        self.squares = decisions.array((max(norm_table.chunk_count, 1),), NUMBER)
        shape = max(rule_table.chunk_count, 1), max(rule.terms, 1)
        self.sums = decisions.array(shape, NUMBER)
        spans = max(norm_table.span_count, rule_table.span_count, 1)
        self.partials = decisions.array((spans, max(rule.terms, 1)), NUMBER)
        self.launches: list[Any] = []
        if job.norm:
            factor = self._factor.address
            if job.scale:
                stage = job._replace(stage="factor", stride=norm_table.stride)
                self._settle(stage, norm_table, self.factor, rows, places)
                factor = self.factor.address
            self._sum(passes.norm, 0, norm_table, factor, 0, self.squares, False)
        if not self.direct:
            stage = job._replace(stride=norm_table.stride)
            self._settle(stage, norm_table, self.measured, rows, places)
        if job.settle is not None:
            of = len(rule.state), rule_table, self.measured.address, int(rows > 1)
            self._sum(rule, *of, self.sums, job.clip)
            stage = job._replace(
                stage="settle", stride=rule_table.stride, shared=shared
            )
            self._settle(stage, rule_table, self.measured, out_rows, places)
        if update_table.block_count:
            kernel = cuda_jobs.loaded(update, runner.number)
            addresses = (
                *(update_table.blocks.address, update_table.numbers.address),
                *(self.gradients.address, self.out.address),
                *(decisions.steps.address, int(out_rows > 1), int(rows > 1)),
                decisions.control.address,
            )
            of_blocks = update_table.block_count, cuda_table.BLOCK, addresses
            self.launches.append(device.Launch(kernel, *of_blocks))

    def _settle(
        self, job: Settle, table: Any, measured: Any, rows: int, places: Places
    ) -> None:
        """Add the launch of a kernel that decides."""
        decisions, runner = self.decisions, self.runner
        kernel = cuda_jobs.loaded(job, runner.number)
        addresses = (
            *(table.numbers.address, len(runner.segments), rows),
            *(self.gradients.address, self.squares.address, self.sums.address),
            *(decisions.totals.address, self.hyper.board.address),
            *(decisions.steps.address, decisions.carry.address, self.numbers.address),
            *(measured.address, self.out.address, decisions.control.address),
            *(self._asked.address, places.found, places.scale, places.lr),
            *(self._counts, self._groups.address),
            *(table.spans.address, table.span_count, self.partials.address),
        )
        self.launches.append(device.Launch(kernel, 1, cuda_table.BLOCK, addresses))

    def _sum(
        self,
        rule: Rule,
        states: int,
        table: Any,
        rows: int,
        by_row: int,
        to: DeviceArray,
        clip: bool,
    ) -> None:
        """Add the launch of a kernel that sums up what a rule measures."""
        if not table.chunk_count:
            return
        of = rule.measure, states, self.runner.dtype, table.kinds, table.stride
        kernel = cuda_jobs.loaded(Sums(*of, rule.terms, clip), self.runner.number)
        addresses = (
            *(table.chunks.address, table.chunk_count, table.numbers.address),
            *(self.gradients.address, rows, to.address, by_row),
        )
        blocks = ceiling(table.chunk_count * LANES, cuda_table.BLOCK)
        launch = device.Launch(kernel, blocks, cuda_table.BLOCK, addresses)
        self.launches.append(launch)

    def asked(
        self, rows: Sequence[Sequence[float]], request: Request
    ) -> LaunchSequence:
        """Note what the next run is asked for."""
        limits = request.limits if request.limits_gradients else (0.0,) * LIMITS
        self._now = rows, (request.clip_norm, *limits, request.ema_weight)
        return self

    def _write(
        self, rows: Sequence[Sequence[float]], asked: Sequence[float], stream: int
    ) -> None:
        """Write what the host has computed: for each row, a factor for the gradients,
        the number of the step, and the results of the rule's ``scalars``."""
        job, limits = self.job, asked[1 : 1 + LIMITS] if self.job.clip else ()
        self.decisions.steps.write([row[1] for row in rows], stream)
        self.numbers.write([(row[0], *row[2:]) for row in rows], stream)
        measured = [(row[0], *row[2 : 2 + job.measured], *limits) for row in rows]
        self.measured.write(measured, stream)

    def run(self) -> None:
        """Enqueue the step."""
        runner, decisions, job = self.runner, self.decisions, self.job
        stream, (rows, asked) = runner.stream(), self._now
        if job.scalars is not None and not job.counts:
            decisions.start(stream, self.captured)
        if self.captured:
            self.gradients.set_aside(runner.grads_now)
            self._asked.set_aside(asked)
            self._factor.set_aside([abs(rows[0][0])])
            self.hyper.set_aside(rows)
        with runner.context:
            if not self.captured:
                self.gradients.write_noted(stream)
                self._asked.write(asked, stream)
                if job.norm and not job.scale:
                    self._factor.write([abs(rows[0][0])], stream)
                if self.direct:
                    self._write(rows, asked, stream)
                else:
                    self.hyper.write(rows, stream)
            for launch in self.launches:
                launch(stream)
        if job.scalars is None:
            decisions.forget()
            runner.count[0] += 1
        elif not job.counts:  # torch's counts are not the host's
            decisions.ahead = True
            decisions.is_replayed |= self.captured
