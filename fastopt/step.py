"""A step, described once.

Whatever framework the parameters belong to, a step in Python goes through this file.
Only plain steps take a shortcut with the same result: the compiled ``Step.at``, and
torch's ``Plan.again``. C, JAX and ``@njit`` call ``csrc/native.pxi`` instead.

- ``Request`` is what the caller asks of a step besides the rule's update.
- ``Key`` is what a row of scalars is computed from. It has its own step count, so
  torch's count for each parameter and the core's single count are one mechanism.
- ``Program`` is a rule bound to segments of memory by a backend, whose ``Runner`` does
  the arithmetic.
- ``examine`` takes the norm of the gradients and looks for values that are not finite.
- ``execute`` prepares the update: scalars, factored averages, norms. It returns the
  calls that write the result, so that a step happens as a whole or not at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, get_args

import numpy as np

from fastopt.memory.factored import Factors
from fastopt.memory.formats import DTYPES
from fastopt.memory.segments import Array, Product, Segment
from fastopt.portable import portable
from fastopt.rule import Rule
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call

Row: TypeAlias = tuple[float, ...]  # the factor for the gradients, then the scalars
# The number of elements that were measured, and the sums; None: there was no gradient.
Sums: TypeAlias = tuple[int, tuple[float, ...] | None]


LIMIT = "limit"  # a number above 0, or None for no limit
FLAG = "flag"  # True or False
Nonfinite: TypeAlias = Literal["propagate", "skip", "raise"]
# For each option of ``step``, the kind of its values, or a tuple of the words that it
# may be. ``optimizer.checks`` checks them.
OPTIONS: dict[str, Any] = {
    "clip_norm": LIMIT,
    "clip_value": LIMIT,
    "nonfinite": get_args(Nonfinite),
    "zero_grads": FLAG,
}


class Options(TypedDict, total=False):
    """The types of the options, for type checkers: the core's and torch's ``step`` take
    them as keywords."""

    clip_norm: float | None
    clip_value: float | None
    nonfinite: Nonfinite
    zero_grads: bool


def limits(clip_value: float = math.inf) -> tuple[float, ...]:
    """Return the numbers that ``passes.clip`` takes besides a scaled gradient. The
    arguments are the options that change each element on its own."""
    return -clip_value, clip_value


UNLIMITED = limits()


class Request(NamedTuple):
    """What is asked of a step besides the rule's update."""

    clip_norm: float = math.inf  # limit for the norm of all gradients, scaled
    limits: tuple[float, ...] = UNLIMITED
    nonfinite: str = "propagate"  # or "skip" or "raise"
    ema_weight: float = 0.0  # weight of the new parameters in their average; 0: none
    zero_grads: bool = False
    threads: int = 1

    @property
    def limits_gradients(self) -> bool:
        """Whether ``passes.clip`` can change a gradient."""
        return self.limits != UNLIMITED

    @property
    def needs_norm(self) -> bool:
        """Whether all gradients must be read before the first update."""
        return self.clip_norm < math.inf or self.nonfinite != "propagate"


PLAIN = Request()


@functools.cache
def plain(threads: int) -> Request:
    """A request for nothing but the update."""
    return Request(threads=threads)


class Runner(Protocol):
    """What a backend returns from ``bind``: it does the arithmetic of steps over fixed
    segments. ``rows`` are the rows of scalars; a segment names its row.

    ``fuses`` names what the runner does in one compiled call:

    - "step": the update with everything that a request asks for. Otherwise ``calls``
      computes the results, and the several calls that it returns only write them.
    - "scalars": ``at(grads, hyperparameters, grad_scale, threads)`` is a plain step. It
      checks gradients and the arrays given to ``watch`` itself.
    - "settle": ``settled(rows, request, steps)`` is a step of a rule with norms.
    - "decisions": norms, and whether a step is skipped, need not come back to the host.
      See :func:`decided`.
    - "again": a step with the same gradient arrays as the last one, which ``remember``
      was told of.
    - "addresses": ``place`` takes gradients by their addresses.
    - "one row": one row of scalars may stand for all, if these are alike.
    - "failure": a step may fail half-way. From then on ``check_working()`` raises
      RuntimeError.
    """

    fuses: frozenset[str]

    def take(self, grads: Any, weights: Sequence[float] | None = None) -> bool:
        """Take the gradients for what follows: an array for each segment, or None. With
        ``weights``, ``grads`` has such a list for each task, and their weighted sum is
        meant. Return False if one of them needs a closer look."""

    def sums(
        self, what: str, rows: Sequence[Row], request: Request
    ) -> list[tuple[float, ...] | None]:
        """Measure each segment: what the "rule" measures, or the squares of the
        "gradients". None where there is no gradient."""

    def squares(
        self, rows: Sequence[Row], request: Request
    ) -> list[tuple[Array, Array] | None]:
        """Sum up the squares of the gradient by row and by column, for each segment
        with factored state; None for the others and where there is no gradient."""

    def calls(
        self,
        rows: list[Row],
        request: Request = PLAIN,
        steps: Sequence[int] | None = None,
    ) -> list[Call]:
        """Return the calls that do the update and raise the count of steps. ``steps``
        are the numbers of the rows' steps, if anything is drawn at random."""


class Key(NamedTuple):
    """What a row of scalars is computed from."""

    t: int  # the number of the step, from 1
    carry: Sequence[float]  # the numbers that the rule carries from step to step
    values: Sequence[Any]  # the hyperparameters, in the order of ``scalars``
    factor: float = 1.0  # for the gradients


class HalfDone(RuntimeError):
    """A step has failed on a device, so only some parameters may be updated."""


class Program:
    """A rule bound to segments by a backend.

    Parameters
    ----------
    module
        The backend.
    rule, segments
        What is computed, and where.
    factors
        For each segment its factored state, or None.
    count
        Where the runner counts completed steps: one int64. By default a new one.
    carry
        Two sets of carried numbers, a row for each row of scalars. The set that holds
        is the one at the parity of ``count``, so count and carry change together.
    scalars
        In place of the rule's own.
    """

    def __init__(
        self,
        module: ModuleType,
        rule: Rule,
        segments: Sequence[Segment],
        *,
        factors: Sequence[Factors | None] = (),
        count: Array | None = None,
        carry: Array | None = None,
        scalars: Callable[..., Row] | None = None,
    ):
        self.rule, self.factors = rule, factors
        self.sizes = [segment.param.size for segment in segments]
        self.known_count = np.zeros(1, np.int64) if count is None else count
        if carry is None:
            rows = 1 + max((segment.row for segment in segments), default=0)
            carry = np.zeros((2, rows, len(rule.carry)))
        self.carry = carry
        self.numbers: int = carry.shape[2]  # that the rule carries, for each row
        self.scalars = module.scalars(rule) if scalars is None else scalars
        self.draws = any(segment.draws for segment in segments)
        check_dtypes(segments)
        self.runner: Any = module.bind(rule, segments, self.known_count, carry)
        # Whether steps are decided, and may be counted, on a device.
        self.decides = "decisions" in self.runner.fuses

    @property
    def count(self) -> Array:
        """The number of completed steps, which a GPU may be asked for."""
        if self.decides:
            self.runner.refresh()
        return self.known_count

    @property
    def carried(self) -> Array:
        """The numbers that the completed steps have left."""
        if self.decides:  # not by ``count``: each call takes 50 ns of a small step
            self.runner.refresh()
        carried: Array = self.carry[self.known_count.item(0) % 2]
        return carried

    @property
    def carried_next(self) -> Array:
        """The numbers that the next step leaves, after a look at ``carried``."""
        carried: Array = self.carry[1 - self.known_count.item(0) % 2]
        return carried

    def check_working(self) -> None:
        """Check that no step has failed half-way, so that the state is that of one
        step."""
        if "failure" in self.runner.fuses:
            self.runner.check_working()

    def note_failure(self, error: Exception) -> None:
        """Note that a call of this program or of another one has failed, after others
        may have written. If a device has failed, ``check_working`` raises HalfDone from
        now on, and so does this."""
        if "failure" in self.runner.fuses:
            self.runner.note_failure(error)

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        """Compute the rows of scalars, one for each key: the factor for the gradients,
        the scalars, and what the rule will carry. One key makes one row, however often
        it occurs."""
        made: dict[int, Row] = {}
        rows = []
        for key in keys:
            if id(key) not in made:
                row = self.scalars(key.t, *key.carry, *key.values)
                made[id(key)] = (key.factor, *row)
            rows.append(made[id(key)])
        return rows

    def sums(self, rows: Sequence[Row], request: Request) -> list[Sums]:
        """Measure each segment for the rule."""
        measured = self.runner.sums("rule", rows, request)
        return [
            (size, terms) if terms is not None and size else (0, None)
            for size, terms in zip(self.sizes, measured, strict=True)
        ]


def check_dtypes(segments: Sequence[Segment]) -> None:
    """Check that kernels can compute in one dtype. Arrays of 16 bits must be encoded
    streams: kernels would take them for float32, and write beyond their ends."""
    kinds = {
        stream.dtype
        for segment in segments
        for stream in (segment.param, *segment.state, segment.average)
        if stream is not None and not isinstance(stream, Product)
    }
    if len(kinds) > 1 or not kinds <= {*DTYPES}:
        names = ", ".join(sorted(map(str, kinds)))
        raise TypeError(
            f"kernels compute in float32 or float64, got segments of {names}"
        )


class Examination(NamedTuple):
    """What a look at all gradients has shown."""

    norm: float
    finite: bool  # whether all gradients are finite, in all processes
    nonfinite: list[tuple[int, int]]  # programs and segments with such gradients
    factor: float  # for the gradients, to clip their norm


@standard
def examine(
    programs: Sequence[Program],
    factor: float,
    request: Request,
    is_finite: Callable[[int, int], bool],
    over_ranks: Callable[[Sequence[Sequence[float]], int], tuple[float, float]]
    | None = None,
) -> Examination:
    """Take the norm of the gradients, times a factor, that the programs have taken.

    ``is_finite(program, segment)`` is asked about gradients whose squares overflow.
    ``over_ranks`` takes the sum of squares of each segment of each program, and the
    number of segments that are not finite. It returns the totals over all processes.
    """
    squares, nonfinite = [], []
    unclipped = Request(threads=request.threads)
    for p, program in enumerate(programs):
        squares.append([0.0] * len(program.sizes))
        rows = [(factor,)] * len(program.carry[0])
        for i, sums in enumerate(program.runner.sums("gradients", rows, unclipped)):
            if sums is not None:
                squares[p][i] = sums[0]
                if not math.isfinite(sums[0]) and not is_finite(p, i):
                    nonfinite.append((p, i))
    if over_ranks is None:
        total = added(chain.from_iterable(squares))
        count = float(len(nonfinite))
    else:
        total, count = over_ranks(squares, len(nonfinite))
    norm = math.sqrt(total)
    shrink = shrinking(norm, request.clip_norm)
    return Examination(norm, not count, nonfinite, shrink)


def added(numbers: Iterable[float]) -> float:
    """Add up numbers in order. Python's ``sum`` compensates rounding errors from 3.12
    on, so its bits depend on the version."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def shrinking(norm: float, limit: float) -> float:
    """Return the factor that brings gradients of a norm under a limit, as torch's
    ``clip_grad_norm_`` does. A NaN passes on to the parameters, as it does there."""
    if limit == math.inf:
        return 1.0
    shrink = limit / (norm + 1e-6)
    return 1.0 if shrink >= 1 else shrink


def together(sums: Iterable[Sums]) -> Sums:
    """Add up what was measured of several segments."""
    count, total = 0, None
    for n, terms in sums:
        if terms is not None:
            count += n
            old = total or (0.0,) * len(terms)
            total = tuple([a + b for a, b in zip(old, terms, strict=True)])
    return count, total


def over_ranks(
    sums: Sequence[Sums], terms: int, add: Callable[[Array], None]
) -> list[Sums]:
    """Return sums over all processes. Each has this many terms. ``add`` sums a float64
    vector over the processes, in place."""
    numbers = np.array([(n, *(of or (0.0,) * terms)) for n, of in sums], np.float64)
    add(numbers.reshape(-1))
    if not (numbers[:, 0] >= 0).all() or np.isinf(numbers[:, 0]).any():
        raise ValueError(
            f"the sums over processes have {numbers[:, 0].tolist()} for numbers of "
            f"elements; reduce must add its vector up over all processes"
        )
    return [(int(n), tuple(of)) if n else (0, None) for n, *of in numbers.tolist()]


@standard
def execute(
    program: Program,
    keys: Sequence[Key],
    request: Request,
    totals: Sequence[Sums] | None = None,
) -> list[Call]:
    """Prepare a step with the gradients that the program's runner has taken.

    Parameters
    ----------
    keys
        One for each row of scalars.
    totals
        For a rule with norms: the sums that apply to each row, if they are not those of
        this program alone, but of other programs or processes, too.

    Returns
    -------
    list of calls
        They do the step, for :func:`fastopt.runtime.atomic.uninterrupted`. Before the
        last has been made, ``program.carried_next`` is complete, too.
    """
    rule, runner = program.rule, program.runner
    rows = program.rows(keys)
    if rule.factored:
        advance_factors(program, rows, request)
    if rule.settle is not None:
        if totals is None and "settle" in runner.fuses:
            if program.numbers:
                program.carried[:] = [key.carry for key in keys]
            steps = [key.t for key in keys]
            return [partial(runner.settled, rows, request, steps)]
        rows = settle(program, keys, rows, request, totals)
    if program.numbers:
        program.carried_next[:] = [row[-program.numbers :] for row in rows]
    # Runners copy a row that is the same object as the one before.
    scalars: list[Row] = []
    same: dict[int, Row] = {}
    for row in rows:
        scalars.append(same.setdefault(id(row), row[: 1 + rule.scalar_count]))
    numbers = [key.t for key in keys] if program.draws else None
    calls: list[Call] = runner.calls(scalars, request, numbers)
    return calls


@standard
def decided(
    program: Program,
    keys: Callable[[], Sequence[Key]],
    hyperparameters: Callable[[], Sequence[Sequence[Any]]],
    factor: float,
    request: Request,
) -> Call | None:
    """Prepare a step that decides on the device what its norms mean.

    The norm is then not looked at by the host, as :func:`examine` does, nor are the
    sums of a rule. ``keys`` and ``hyperparameters`` return what scalars are computed
    from, for each row; only one of them is called. Return None if the runner leaves the
    decisions to the host.
    """
    runner = program.runner
    who = runner.decided_by(request)
    if who == "host":
        of_rows = keys()
        rows = program.rows(of_rows)
        if program.numbers:
            program.carried_next[:] = [row[-program.numbers :] for row in rows]
        steps = [key.t for key in of_rows]
        call: Call = runner.decided_by_host(rows, request, steps)
        return call
    if who == "device":
        values = hyperparameters()
        factors = [factor] * len(values)
        of_device: Call | None = runner.decided_by_device(values, factors, request)
        return of_device
    return None


def advance_factors(program: Program, rows: list[Row], request: Request) -> None:
    """Bring factored averages up to the next step, and let the kernels see them. Their
    own weight is then 0, because the kernels need not average again."""
    turn = 1 - program.count.item(0) % 2
    squares = program.runner.squares(rows, request)
    for i, factors in enumerate(program.factors):
        if factors is None:
            continue
        if squares[i] is None:
            factors.keep(turn)
        else:
            factor, weight, floor, least, *others = rows[i]
            factors.advance(turn, squares[i], weight, least)
            rows[i] = (factor, 0.0, floor, least, *others)


def settle(
    program: Program,
    keys: Sequence[Key],
    rows: Sequence[Row],
    request: Request,
    totals: Sequence[Sums] | None,
) -> list[Row]:
    """Measure for a rule with norms; return the rows with what follows from that."""
    rule: Any = program.rule
    if totals is None:
        totals = program.sums(rows, request)
        if not rule.by_segment:
            totals = [together(totals)] * len(rows)
    compute = portable(rule.settle)
    results: dict[Any, Row] = {}
    settled = []
    for key, row, (n, terms) in zip(keys, rows, totals, strict=True):
        same, handed = (id(row), n, terms), len(row) - rule.settle_count
        if same not in results:
            new = (
                (*(0.0,) * rule.scalar_count, *key.carry)  # no update, and no change
                if terms is None
                else (
                    *row[1:handed],
                    *compute(key.t, float(n), *terms, *row[handed:]),
                )
            )
            results[same] = (row[0], *new)
        settled.append(results[same])
    return settled
