# What Python calls: compiled scalars, and steps over fixed segments.

WITHOUT_SETTLE = frozenset(["addresses", "step", "scalars"])
WITH_SETTLE = WITHOUT_SETTLE | {"settle"}


cdef class Scalars:
    """A rule's compiled scalars or settle. It has the bits of the Python function, which is
    called to raise its errors."""
    cdef const Scalar* scalar
    cdef object function

    def __cinit__(self, function, str name):
        self.scalar, self.function = scalar_named(name), function

    def __call__(self, int64_t t, *values):
        cdef double taken[MOST_NUMBERS]
        cdef double results[MOST_NUMBERS]
        cdef int k, count = -1
        if len(values) == self.scalar.taken:
            for k in range(len(values)):
                taken[k] = values[k]
            count = self.scalar.function(t, taken, results)
        if count < 0:
            return self.function(t, *values)
        return tuple([results[k] for k in range(count)])


cdef bint are_writeable(list grads):
    """Whether a step may set gradients to zero."""
    for grad in grads:
        if grad is None:
            continue
        if type(grad) is not ndarray:
            return False
        if not (<fastopt_ndarray*> <PyObject*> grad).flags & WRITEABLE:
            return False
    return True


cdef int compared(const void* a, const void* b) noexcept nogil:
    """Compare two numbers of 64 bits, for qsort."""
    cdef int64_t first = (<const int64_t*> a)[0], second = (<const int64_t*> b)[0]
    return (first > second) - (first < second)


cdef bint lie_apart(const Job* job) except -1:
    """Whether no gradients overlap. If some did, one might be set to zero before the other
    is read."""
    cdef int64_t r, count = 0, end = 0
    cdef bint apart = True
    cdef const int64_t* row = job.table
    # Where each begins and ends. Those of 16 bits are taken for longer than they are.
    cdef int64_t* spans = <int64_t*> malloc((2 * job.rows + 1) * sizeof(int64_t))
    if not spans:
        raise MemoryError("no memory to compare where gradients are")
    for r in range(job.rows):
        if row[1] and row[job.columns - 2]:
            spans[2 * count] = row[1]
            spans[2 * count + 1] = row[1] + row[job.columns - 2] * job.itemsize
            count += 1
        row += job.columns
    qsort(spans, count, 2 * sizeof(int64_t), compared)
    for r in range(count):
        apart = apart and end <= spans[2 * r]
        end = spans[2 * r + 1]
    free(spans)
    return apart


cdef class Step(Segments):
    """Runs steps over fixed segments (see fastopt.step.Runner) with one kernel: a compiled
    one by name, or one of Numba's by address.

    ``at`` takes gradients, computes scalars and steps in one call. ``settled`` measures,
    settles and steps, for norms of each segment.
    """
    cdef double* carry
    cdef int64_t* count
    cdef Scalars scalars, settle
    cdef object scalars_at

    def __cinit__(self, Kernels kernels, kernel, measure, begin, finish, scalars, *,
                  bint double, int64_t sets, int64_t scalar_count, int64_t terms,
                  int64_t measured, Scalars settle, int64_t settle_count,
                  int64_t count_address, int64_t carry_address, int64_t carried,
                  int64_t last_cache, **segments):
        cdef Job* job = &self.job
        if isinstance(measure, int):
            job.measure = <measure_t> <size_t> measure
        elif measure is not None:
            job.measure = <measure_t> kernels.find(measure, double)
        if begin is not None:
            job.begin = <measure_t> kernels.find(begin, double)
            job.finish = <kernel_t> kernels.find(finish, double)
        self.scalars_at, self.settle = scalars, settle
        if isinstance(scalars, Scalars):
            self.scalars = scalars
            job.scalars = self.scalars.scalar.function
        if settle is not None:
            job.settle, job.settle_count = settle.scalar.function, settle_count
            if 1 + terms + settle_count != settle.scalar.taken:
                raise TypeError(f"settle does not take {settle_count} scalars")
        job.apart, job.sets = 0 < last_cache < 2 * BATCH, sets
        job.scalar_count, job.measured, job.terms = scalar_count, measured, terms
        job.width, job.carried = 1 + max(scalar_count, measured), carried
        job.stride = job.width + MOST_NUMBERS
        self.count, self.carry = <int64_t*> count_address, <double*> carry_address
        job.constants = <char*> calloc(sets * job.width, 8)
        job.limits = <char*> calloc(sets * (1 + MOST_LIMITS), 8)
        job.factors = <double*> calloc(sets + 1, 8)
        job.numbers = <double*> calloc(sets * job.stride, 8)
        job.steps = <int64_t*> calloc(sets + 1, 8)
        if not (
            job.constants and job.limits and job.factors and job.numbers and job.steps
        ):
            raise MemoryError("no memory for the numbers of a step")

    def __dealloc__(self):
        free(self.job.constants)
        free(self.job.limits)
        free(self.job.factors)
        free(self.job.numbers)
        free(self.job.steps)

    @property
    def fuses(self):
        """See fastopt.step.Runner."""
        return WITHOUT_SETTLE if self.settle is None else WITH_SETTLE

    # Threads -----------------------------------------------------------------------------

    @property
    def alone(self):
        """How many turns one thread will do because several have been too slow."""
        return self.job.contention.alone

    def judge(self, bint several, double seconds, int64_t n):
        """Note that a turn took so long, for tests."""
        judge(&self.job.contention, several, seconds, n)

    # Numbers ---------------------------------------------------------------------------

    cdef int note(self, int64_t r, row, int64_t skip, int64_t count) except -1:
        """Store ``count`` numbers of a set, which follow ``skip`` others in the row."""
        cdef int64_t k
        cdef double* numbers = self.job.numbers + r * self.job.stride
        cdef tuple values = row
        if len(values) - skip < count:
            raise TypeError(
                f"update takes {count} scalars, but scalars returned {len(values) - skip}"
            )
        for k in range(count):
            numbers[k] = values[skip + k]
        return 0

    cdef int note_all(self, list rows, int64_t count) except -1:
        """Store all rows. Each begins with the factor for the gradients."""
        cdef Job* job = &self.job
        cdef int64_t r, stride = job.stride
        cdef tuple row
        for r in range(job.sets):
            if r and rows[r] is rows[r - 1]:
                job.factors[r] = job.factors[r - 1]
                memcpy(
                    job.numbers + r * stride, job.numbers + (r - 1) * stride,
                    stride * sizeof(double),
                )
            else:
                row = rows[r]
                job.factors[r] = row[0]
                self.note(r, row, 1, count)
        return 0

    cdef int accept_request(self, request) except -1:
        """Store what is asked besides the update."""
        cdef Job* job = &self.job
        cdef tuple limits = request.limits  # a field, because no Python code may run here
        cdef int64_t k
        if len(limits) > MOST_LIMITS:
            raise ValueError(f"at most {MOST_LIMITS} limits, got {len(limits)}")
        job.limit_count = len(limits)
        for k in range(len(limits)):
            job.limit_values[k] = limits[k]
        job.threads = request.threads
        job.clipping, job.zeroing = limits != UNLIMITED, request.zero_grads
        put(job, job.weight, 0, 1.0)
        put(job, job.weight, 1, request.ema_weight)
        return 0

    # Steps -----------------------------------------------------------------------------

    def calls(self, list rows, request=None, list steps=None):
        """Return the step as one call for ``uninterrupted``."""
        return [partial(self, rows, request, steps)]

    def __call__(self, list rows, request=None, list steps=None):
        cdef Job* job = &self.job
        cdef int64_t r
        cdef uint64_t modes = fastopt_enter()
        try:
            job.threads = 1
            if request is not None:
                self.accept_request(request)
            self.note_all(rows, job.scalar_count)
            for r in range(job.sets):
                if steps is not None:
                    job.steps[r] = steps[r]
                put_row(job, r, job.factors[r], 0, job.scalar_count)
            with nogil:
                update_all(job)
            self.count[0] += 1
        finally:
            clear(job)
            fastopt_leave(modes)
        return True

    def limited(self, list rows, request, list steps, dict attributes, str name):
        """Do a step after the norm of all gradients was brought under the request's limit.
        The norm becomes an item of ``attributes``, by this name."""
        cdef Job* job = &self.job
        cdef double norm = 0, limit = request.clip_norm
        cdef int64_t r
        cdef int code
        cdef uint64_t modes = fastopt_enter()
        try:
            job.threads = request.threads
            self.note_all(rows, job.scalar_count)
            with nogil:
                code = clip_all(job, limit, &norm)
            if code != OK:
                raise MemoryError("no memory for sums")
            self.accept_request(request)
            for r in range(job.sets):
                if steps is not None:
                    job.steps[r] = steps[r]
                put_row(job, r, job.factors[r], 0, job.scalar_count)
            with nogil:
                update_all(job)
            self.count[0] += 1
            if norm == norm:
                attributes[name] = norm
        finally:
            clear(job)
            fastopt_leave(modes)
        return True

    cdef int compute(self, int64_t r, tuple values, const double* old, double* new) except -1:
        """Compute the scalars of a set from its hyperparameters."""
        cdef Job* job = &self.job
        cdef double taken[MOST_NUMBERS]
        cdef int64_t t = self.count[0] + 1, k
        cdef int returned = -1
        cdef double* numbers = job.numbers + r * job.stride
        if job.scalars and len(values) + job.carried == self.scalars.scalar.taken:
            memcpy(taken, old, job.carried * sizeof(double))
            for k in range(len(values)):
                taken[job.carried + k] = values[k]
            returned = job.scalars(t, taken, numbers)
        if returned - job.carried >= job.scalar_count:
            memcpy(new, numbers + returned - job.carried, job.carried * sizeof(double))
            return 0
        carry = [old[k] for k in range(job.carried)]
        constants = self.scalars_at(t, *carry, *values)
        for k in range(job.carried):
            new[k] = constants[len(constants) - job.carried + k]
        return self.note(r, constants, 0, job.scalar_count)

    def at(self, list grads, list hyperparameters, double grad_scale, int threads,
           request=None, dict attributes=None):
        """Take the gradients and do a step. The scalars are computed here from the
        hyperparameters of each set, at half the cost. The norm of the gradients, if the
        request needs it, goes to ``attributes``. Return False if nothing was done, because
        gradients need a closer look or are not finite."""
        cdef Job* job = &self.job
        cdef bint measures = False
        cdef double norm = 0, limit = INFINITY
        cdef int64_t r
        cdef double* old = self.carry + self.count[0] % 2 * job.sets * job.carried
        cdef double* new = self.carry + (self.count[0] + 1) % 2 * job.sets * job.carried
        cdef uint64_t modes
        cdef int code
        if not self.unchanged() or self.accept(grads) < 0:
            return False
        if request is not None and request.zero_grads:
            if not are_writeable(grads) or not lie_apart(job):
                return False
        modes = fastopt_enter()
        try:
            job.threads = threads
            for r in range(job.sets):
                job.factors[r] = grad_scale
            if request is not None:  # its fields alone, because no Python code may run here
                limit = request.clip_norm
                measures = limit < INFINITY or request.nonfinite != "propagate"
            if measures:
                with nogil:
                    code = clip_all(job, limit, &norm)
                if code != OK:
                    raise MemoryError("no memory for sums")
                if not isfinite(norm):
                    return False
            if request is not None:
                self.accept_request(request)
            for r in range(job.sets):
                job.steps[r] = self.count[0] + 1
                self.compute(
                    r, hyperparameters[r], old + r * job.carried, new + r * job.carried
                )
                put_row(job, r, job.factors[r], 0, job.scalar_count)
            with nogil:
                update_all(job)
            self.count[0] += 1
            if measures:
                attributes["_grad_norm"] = norm
        finally:
            clear(job)
            fastopt_leave(modes)
        return True

    def settled(self, list rows, request, list steps):
        """Do a step of a rule with norms. No Python code runs within it, so an interrupt
        comes before or after."""
        cdef Job* job = &self.job
        cdef double* old = self.carry + self.count[0] % 2 * job.sets * job.carried
        cdef double* new = self.carry + (self.count[0] + 1) % 2 * job.sets * job.carried
        cdef int64_t r, count
        cdef tuple row
        cdef int code
        cdef uint64_t modes = fastopt_enter()
        try:
            self.accept_request(request)
            for r in range(job.sets):
                job.steps[r] = steps[r]
                row = rows[r]
                job.handed = len(row) - 1 - job.settle_count
                count = job.handed + self.settle.scalar.returned - job.carried
                if not 0 <= job.handed <= job.scalar_count <= count:
                    raise TypeError(
                        f"update takes {job.scalar_count} scalars and settle "
                        f"{job.settle_count}, but scalars returned {len(row) - 1} and "
                        f"settle {self.settle.scalar.returned}"
                    )
            self.note_all(rows, job.handed + job.settle_count)
            with nogil:
                code = step_in_batches(job, old, new)
            if code == NO_MEMORY:
                raise MemoryError("no memory for sums and updates")
            if code != OK:
                raise ZeroDivisionError("float division by zero")
            self.count[0] += 1
        finally:
            clear(job)
            fastopt_leave(modes)
        return True

    # Sums ------------------------------------------------------------------------------

    def sums(self, str what, list rows, request):
        cdef Job* job = &self.job
        cdef bint of_rule = what == "rule"
        cdef int64_t r, k, chunks, terms = job.terms if of_rule else 1
        cdef Rows segments = rows_from(job, 0, INT64_MAX)
        cdef const double* partials
        cdef uint64_t modes = fastopt_enter()
        try:
            self.accept_request(request)
            self.note_all(rows, job.measured if of_rule else 0)
            for r in range(job.sets):
                put_row(job, r, job.factors[r], 0, job.measured if of_rule else 0)
            if not make_room(job, segments.chunks, terms):
                raise MemoryError("no memory for sums")
            with nogil:
                measure_all(
                    job, segments, job.measure if of_rule else job.tools.square, terms
                )
            sums, partials = [], job.partials
            for r in range(job.rows):
                if not job.table[r * job.columns + 1]:
                    sums.append(None)
                    continue
                chunks = chunks_of(job.table[(r + 1) * job.columns - 2])
                sums.append(
                    tuple([in_chunks(partials + k, terms, chunks) for k in range(terms)])
                )
                partials += chunks * terms
            return sums
        finally:
            clear(job)
            fastopt_leave(modes)

    def squares(self, list rows, request):
        cdef Job* job = &self.job
        cdef const int64_t* row = job.table
        cdef int64_t r, s
        try:
            self.accept_request(request)
            squares = []
            for r in range(job.rows):
                if (
                    job.streams != NULL
                    and stream_of(job, r, 2).make == multiply_block
                    and row[1] and row[job.columns - 2]
                ):
                    s = row[job.columns - 1]
                    put_limits(job, s, rows[s][0])
                    squares.append(squares_of(job, r))
                else:
                    squares.append(None)
                row += job.columns
            return squares
        finally:
            clear(job)
