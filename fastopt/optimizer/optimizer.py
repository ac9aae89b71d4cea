"""Optimizer: parameters + rule + state + step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastopt.memory.flat import FlatBuffer
from fastopt.memory.segments import Array
from fastopt.optimizer import checks
from fastopt.optimizer.accumulation import Pending, new_pending
from fastopt.optimizer.gradients import Gradients, grad_name, of_tasks, take
from fastopt.optimizer.groups import Values
from fastopt.optimizer.state import bind_alone, filling
from fastopt.optimizer.storage import Storage
from fastopt.rule import Rule, shown
from fastopt.runtime.arithmetic import standard
from fastopt.runtime.atomic import Call
from fastopt.runtime.claims import claimed
from fastopt.runtime.exclusive import exclusive, free_flag
from fastopt.runtime.threads import forked
from fastopt.step import (
    Key,
    Options,
    Request,
    added,
    decided,
    examine,
    execute,
    over_ranks,
    plain,
    together,
)
from fastopt.trial import note_scalars

if TYPE_CHECKING:
    from typing_extensions import Unpack

ACCUMULATED: Any = object()  # stands for the accumulated gradients
AS_GIVEN = 1.0  # compared by identity, so that the default needs no check


class Optimizer(Storage):
    """Applies a rule to parameters, in place; made by calling the rule.

    Parameters
    ----------
    rule
        What a step does, such as ``fastopt.adamw``.
    params
        An array, a list or dict of arrays (nested too), a ``FlatBuffer``, or a list of
        groups ``{"params": ..., "lr": ...}``. Arrays are C-contiguous, writeable and
        apart in memory: NumPy arrays, or what shares memory by DLPack,
        ``__array_interface__`` or ``__cuda_array_interface__``. All are float64, or
        each is float32, float16 or ml_dtypes' bfloat16. Those of 16 bits are updated in
        float32, and rounded to nearest once a step.
    backend
        "numpy", "cython", "numba" or "cuda"; by default the arrays' device and the rule
        decide. All of them give the same bits.
    threads
        At most so many CPU threads; by default what affinity, the container's quota,
        a launcher and ``OMP_NUM_THREADS`` allow (docs/threads.md).
    ema
        Decay of a moving average of the parameters, updated in the same pass as they:
        ``average = ema * average + (1 - ema) * p``. It starts with the parameters as
        they are at the first step, and follows them where a gradient is None, too.
    weight_decay_mask
        Where weight decay applies: a tree of bools in the structure of the parameters,
        or a callable of a parameter's path, such as ``"['w'][0]"``, and the array.
        ``lambda path, array: array.ndim > 1`` spares vectors, as people do.
    formats
        The format of the state: "fp32" (the default), "bf16", "bf16_nearest", "fp16",
        or "8bit", which means "m8" for averages of gradients and "v8" for averages of
        squares. Or a dict with the format of each buffer, one of these or "m8" or
        "v8". In a dict, "param" is the format of bfloat16 parameters: "bf16_nearest"
        (the default), "bf16", "bf16+r8", "bf16+r8_nearest" or "bf16+r16". Or a callable
        of an array's path and the array that returns any of these. Arrays of fewer than
        4,096 elements keep state of float32. See docs/formats.md.
    seed
        Chooses the random numbers of stochastic rounding, from 0 to 2**32 - 1. They
        also depend on the index of the element and on the number of the step, so a
        resumed run with the same seed draws the same numbers.
    copy_to
        Arrays of bfloat16 or float16, or None, in the structure of the parameters.
        Each step that updates a float32 parameter also writes it there, rounded to
        nearest, in the same pass.
    reduce
        A function that sums a float64 vector over all processes, in place, if each
        process has a slice of every array. All processes must get the same bits. A step
        calls it once for ``clip_norm`` or ``nonfinite``, and once for a rule with
        norms, which are then norms of whole arrays. Other steps do not call it. See
        docs/distributed.md.
    **hyperparameters
        Of the rule, for all groups that do not set their own. Each is an attribute of
        the optimizer and can be changed at any time. It may be a schedule: a callable
        of the number of completed steps. A group may also have ``frozen=True``.

    Attributes
    ----------
    rule, backend
        As given or chosen.
    threads
        As given or found; can be changed.
    ema
        As given; can be changed. None: there is no moving average.
    groups
        For each group of parameters its hyperparameters, to read and change by name,
        and ``frozen``: whether steps leave its parameters alone.
    state, steps, skipped, grad_norm, ema_params
        See below.

    Raises
    ------
    TypeError, ValueError
        For anything that does not fit, before anything is written.
    RuntimeError
        If the backend is not available; the message says how to get it.

    Examples
    --------
    >>> import numpy as np, fastopt
    >>> w = np.array([1.0, -2.0])
    >>> opt = fastopt.sgd(w, lr=0.5)
    >>> opt.step(2 * w)
    >>> w
    array([0., 0.])
    >>> opt.lr = 0.1
    """

    # More calls that belong to a step, computed from its own, such as a Lookahead's.
    _with_step: Callable[[Sequence[Call]], Sequence[Call]] | None = None

    @property
    def skipped(self) -> int:
        """How often ``nonfinite="skip"`` has left a step out. On a GPU, this waits for
        the steps that are under way."""
        if self._decider is not None:
            self._skipped += self._decider.skips()
        return self._skipped

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients, scaled and not yet clipped, in the last step that
        had ``clip_norm`` or looked for what is not finite; NaN before one. On a GPU,
        this waits for the step."""
        norm = self._grad_norm
        return float(norm() if callable(norm) else norm)

    @exclusive
    def eval_params(self) -> Any:
        """The parameters to use, such as for a validation, in their structure.

        For most rules the parameters themselves, as given. For those that take their
        gradients elsewhere (``schedule_free_*``), new arrays.
        """
        if self._bound.rule.evaluate is None:
            params = self._params
            return params.trees if params.grouped else params.trees[0]
        self._params.watch.check()
        values = self._values(self.steps)
        if not self.steps:
            self._start(values)
        return self._bound.evaluated(values)

    @claimed
    def step(
        self,
        grads: Any = ACCUMULATED,
        *,
        weights: Any = None,
        grad_scale: float = AS_GIVEN,
        **options: Unpack[Options],
    ) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads
            Gradients in the structure and shapes of the parameters, of float64 if these
            are, or else of float32, float16 or bfloat16; ``None`` in place of one
            leaves that parameter and its state alone. They are only read, unless
            ``zero_grads`` is set.
            With groups: a list with the gradients of each. By default those that were
            accumulated, which start at zero again.
        weights
            Of several tasks, a number for each. Then ``grads`` is a list with the
            gradients of each task, or an array with a row for each, and the step is
            that of their weighted sum, which is formed in the cache and never written
            to memory: the sum from zero on, in the order of the tasks, in the
            state's dtype. That is, to the last bit, what ``accumulate(grads[k],
            grad_scale=weights[k])`` for each of them would have come to. None in place
            of a gradient: the task does not depend on that parameter. A task whose
            weight is 0 is left out, and not read.
        grad_scale
            A factor for the gradients, applied in the same pass; -1 maximizes.
        clip_norm : float, optional
            The most that the norm of all gradients together, scaled, may be; larger
            ones are shrunk to it as by torch's ``clip_grad_norm_``. One pass more over
            the gradients, which only reads.
        clip_value : float, optional
            The most that the magnitude of each element may be, after ``clip_norm``.
        nonfinite : str, default "propagate"
            What to do about an infinity or a NaN in the gradients: "propagate" it,
            "skip" the step (parameters, state and count stay; ``skipped`` counts it),
            or "raise" FloatingPointError. All but the first read the gradients once
            more.
        zero_grads : bool, default False
            Set the gradients to zero when they have been read.

        Raises
        ------
        TypeError, ValueError
            If the gradients do not fit; then nothing has been written.
        FloatingPointError
            With ``nonfinite="raise"``; nothing has been written.
        RuntimeError
            If a step of this optimizer is under way, in another thread. On a GPU also
            if the driver reports an error, now or at an earlier step, or if a step that
            needs the host is captured into a CUDA graph.

        Notes
        -----
        The first step of a kind on a GPU compiles its kernels, which takes seconds. A
        step on a GPU may return before the device has done it (docs/gpu.md).

        Steps are counted for the optimizer, not for each parameter as in torch, so a
        parameter that was left alone has the bias correction of the others.
        """
        if grad_scale is not AS_GIVEN:
            grad_scale = checks.check_factor(grad_scale, self._params.dtype)
        busy = self._busy
        while busy[0]:
            busy = free_flag(self)
        try:
            try:
                busy[0] = True  # as in exclusive(), at half the cost
                # Only now: the gradients' own code, a mapping's or a schedule's, is
                # refused to change the optimizer, and another thread is, too.
                layout, values, threads, compiled, averaged = self._plan
                gradients: Any
                if weights is not None:
                    if grads is ACCUMULATED:
                        raise TypeError(
                            "weights need the gradients of each task: step(grads, ...)"
                        )
                    gradients = of_tasks(self._params, grads, weights)
                    compiled = None
                elif layout is None:  # a single array
                    gradients = [grads]
                elif type(grads) is FlatBuffer and grads.shapes is layout:
                    gradients = [grads.data]
                elif grads is ACCUMULATED:
                    gradients = [grads]
                else:
                    gradients = []
                    checks.collect(layout, grads, "", gradients)
                if values is None:  # there are schedules
                    values = self._values(self.steps)
                if forked[0]:
                    threads = 1
                # The compiled step takes plain arrays only, and refuses before it
                # writes.
                if options or averaged:
                    request = self._requests.of(options, self.ema, threads)
                    more = request, vars(self)
                    done = compiled is not None and compiled(
                        gradients, values, grad_scale, threads, *more
                    )
                else:
                    request = None
                    done = compiled is not None and compiled(
                        gradients, values, grad_scale, threads
                    )
                if not done:
                    request = request or plain(threads)
                    pending = self._look_for_accumulated(grads)
                    if pending is not None:
                        gradients = pending.gradients
                        request = request._replace(zero_grads=True)
                    if weights is None:
                        gradients = Gradients([gradients])
                    self._step_in_full(gradients, values, grad_scale, request)
            finally:
                busy[0] = False
        except BaseException as error:  # perhaps an interrupt at the first lines
            busy[0] = False
            if isinstance(error, ArithmeticError):
                note_scalars(self.rule, error)
            raise

    def _look_for_accumulated(self, grads: Any) -> Pending | None:
        """Return the sums that a step with these gradients takes."""
        if grads is not ACCUMULATED and self._pending is not None:
            raise RuntimeError(
                "there are accumulated gradients; call step() without gradients to "
                "apply them, or drop_accumulated() to discard them"
            )
        if grads is ACCUMULATED and self._pending is None:
            raise TypeError("step needs gradients: none have been accumulated")
        return self._pending

    def _using_up(self) -> tuple[list[Call], dict[str, Any]]:
        """Return what a step does with accumulated gradients, which it sets to zero
        where it reads them: calls, and new values of attributes."""
        pending = self._pending
        if pending is None:
            return [], {}
        calls = [
            filling(sums, 0.0)
            for group, sums in zip(self._params.group_of, pending.sums, strict=True)
            if self.groups[group].frozen  # and so not read
        ]
        changes = {"_pending": None, "_spare": pending.emptied}
        return calls, changes | self._unplanned()

    @standard
    def _step_in_full(
        self,
        gradients: Gradients,
        values: list[Values],
        grad_scale: float,
        request: Request,
    ) -> None:
        """Do a step with everything that a request may ask for."""
        bound, params = self._bound, self._params
        program, first = bound.program, bound.is_first
        gradients = self._without_frozen(gradients)
        params.check_unchanged(program.runner, gradients.tasks)
        gradients = take(params, program.runner, gradients, bound.spans)
        if request.zero_grads:
            gradients.check_writeable(params)
        if first and (bound.rule.starts or bound.rule.carry or bound.averages):
            self._start(values)
        factor = grad_scale
        calls, changes = self._using_up()
        # What is due after a step is not if the step is skipped, which the host must
        # know then.
        waits = self._with_step is not None and request.nonfinite == "skip"
        alone = self._reduce is None and self._in_one_call and not waits
        if program.decides and alone:
            call = decided(
                program,
                partial(bound.keys, values, factor),
                partial(bound.hyperparameters, values),
                factor,
                request,
            )
            if call is not None:
                more = self._with_step([call]) if self._with_step else ()
                changes |= self._deciding(program.runner, request)
                if first:
                    changes |= self._unplanned()
                self._finish([call, *calls, *more], changes)
                return
        if request.needs_norm:

            def is_finite(_: int, i: int) -> bool:
                return gradients.are_finite(i, grad_scale)

            norm, finite, nonfinite, shrink = examine(
                [program], factor, request, is_finite, self._over_ranks
            )
            changes["_grad_norm"] = norm
            if not finite and request.nonfinite == "raise":
                self._grad_norm = norm
                task = "[...]" if gradients.weights else ""
                names = [grad_name(params, i, task) for _, i in nonfinite]
                raise FloatingPointError(
                    f"infinity or NaN in {', '.join(names) or 'gradients elsewhere'}; "
                    f"nothing was updated"
                )
            if not finite and request.nonfinite == "skip":
                unread = [
                    g for grads in gradients.tasks for g in grads if g is not None
                ]
                calls += [filling(g, 0.0) for g in unread if request.zero_grads]
                changes["_skipped"] = self._skipped + 1
                self._finish(calls, changes)
                return
            factor *= shrink
        own = self._calls(gradients, values, factor, request)
        more = self._with_step(own) if self._with_step else ()
        if first:  # what is done before it need not be done again
            changes |= self._unplanned()
        self._finish([*own, *calls, *more], changes)

    def _deciding(self, runner: Any, request: Request) -> dict[str, Any]:
        """Return what changes with a step that ``runner`` decides on the device."""
        changes: dict[str, Any] = {}
        if request.needs_norm:
            changes["_grad_norm"] = runner.norm
        if runner is not self._decider:
            changes |= {"_skipped": self.skipped, "_decider": runner}
        if runner.is_in_graph and self._bound not in self._in_graphs:
            changes["_in_graphs"] = (*self._in_graphs, self._bound)
        return changes

    def _without_frozen(self, gradients: Gradients) -> Gradients:
        """Replace the gradients of frozen groups by None."""
        if not any(group.frozen for group in self.groups):
            return gradients
        frozen = [self.groups[number].frozen for number in self._params.group_of]
        tasks = [
            [None if off else grad for off, grad in zip(frozen, task, strict=True)]
            for task in gradients.tasks
        ]
        return gradients._replace(tasks=tasks)

    def _finish(self, calls: Iterable[Call], changes: Mapping[str, Any]) -> None:
        """Write the result of a step: all of it or, with an interrupt, nothing."""
        self._write(*calls, partial(vars(self).update, changes))
        if not self._planned:
            self._plan_steps()

    def _calls(
        self,
        gradients: Gradients,
        values: Sequence[Values],
        factor: float,
        request: Request,
    ) -> list[Call]:
        """Prepare the update with the gradients that were taken, times a factor."""
        bound, totals = self._bound, None
        program, rule = bound.program, bound.rule
        keys = bound.keys(values, factor)
        if self._reduce is not None and rule.measure is not None:
            sums = program.sums(program.rows(keys), request)
            sums = sums if rule.by_segment else [together(sums)]
            totals = over_ranks(sums, rule.terms, self._add)
            totals = totals if rule.by_segment else totals * len(keys)
        return execute(program, keys, request, totals)

    @property
    def _over_ranks(self) -> Callable[..., tuple[float, float]] | None:
        """A function that sums the squares of gradients over all processes; None
        without ``reduce``."""
        if self._reduce is None:
            return None

        def add(squares: Sequence[Sequence[float]], count: int) -> tuple[float, float]:
            numbers = np.array([added(map(added, squares)), count], np.float64)
            self._add(numbers)
            total, nonfinite = numbers.tolist()
            if total < 0 or not nonfinite >= 0:
                raise ValueError(
                    f"reduce has made {numbers.tolist()} of a sum of squares and a "
                    f"count; it must add its vector up over all processes"
                )
            return total, nonfinite

        return add

    def _add(self, numbers: Array) -> None:
        """Sum a vector over all processes, in place."""
        result = self._reduce(numbers) if self._reduce is not None else None
        if result is not None:
            raise TypeError(
                f"reduce must add its vector up in place and return None, but it "
                f"returned {shown(result)}; write the sums into the vector, as in "
                f"comm.Allreduce(MPI.IN_PLACE, vector)"
            )

    @exclusive
    @standard
    def accumulate(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Add gradients, times a factor, to a sum that the next ``step()`` takes.

        They are as for :meth:`step`, and only read. The sums have the state's
        dtype; a parameter that only got None is left alone by that step.
        """
        grad_scale = checks.check_factor(grad_scale, self._params.dtype)
        gradients: list[Any] = []
        checks.collect(self._params.layout, grads, "", gradients)
        pending = self._pending or self._spare
        if pending is None:
            pending = new_pending(self._module, self._params.likes)
        runner = pending.program.runner
        taken = take(self._params, runner, Gradients([gradients]), pending.spans)
        pending, calls = pending.added(taken.tasks[0], grad_scale, self._threads_now)
        changes = {"_pending": pending, "_spare": None}
        self._finish(calls, changes | self._unplanned())

    @exclusive
    def drop_accumulated(self) -> None:
        """Forget what :meth:`accumulate` was given since the last step."""
        self._finish([], {"_pending": None, "_spare": None} | self._unplanned())

    @exclusive
    @standard
    def estimate(self, grads: Any, *, grad_scale: float = 1.0) -> None:
        """Put an estimate into the state, for a rule that works with one (``sophia_g``;
        its page says of what ``grads`` are to be the gradients). Like a step otherwise,
        but parameters and the count stay."""
        if self.rule.estimate is None:
            raise TypeError(f"{self.rule.name} does not use estimates")
        grad_scale = checks.check_factor(grad_scale, self._params.dtype)
        self._params.watch.check()
        gradients: list[Any] = []
        checks.collect(self._params.layout, grads, "", gradients)
        buffer, rule = self.rule.estimate
        arrays, values = self._bound.streams[buffer], self._values(self.steps)
        if not self.steps:
            self._start(values)
        program = bind_alone(self._module, rule, arrays, self._params.set_of)
        there = self._without_frozen(Gradients([gradients]))
        # They must not be the parameters either, to which this step writes nothing.
        there.fitting(self._params, self._bound.spans).give(program.runner)
        keys = [Key(self.steps + 1, (), given, grad_scale) for given in values]
        calls = execute(program, keys, Request(threads=self._threads_now))
        self._finish(calls, {"_estimated": True})

    def __repr__(self) -> str:
        arrays = self._params.arrays
        size = sum(array.size for array in arrays)
        groups = self.groups[0] if len(self.groups) == 1 else self.groups
        return (
            f"<{self.rule.name}: {size} {arrays[0].dtype} parameters, backend "
            f"{self.backend!r}, {self.steps} steps done, {groups}>"
        )


Rule.optimizer = Optimizer
