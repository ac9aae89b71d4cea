# What Python calls: compiled scalars, and steps over fixed segments.

cdef enum:
    C_CONTIGUOUS = 0x0001  # among NumPy's flags
    WRITEABLE = 0x0400

cdef extern from *:
    """
    /* The fields of an ndarray, in the order of every NumPy from 1.7 on. Reading them takes
       no call. */
    typedef struct {
        PyObject_HEAD
        char *data;
        int nd;
        Py_ssize_t *dimensions, *strides;
        PyObject *base, *descr;
        int flags;
    } fastopt_ndarray;
    """
    ctypedef struct fastopt_ndarray:
        char* data
        int nd
        Py_ssize_t* dimensions
        PyObject* descr
        int flags


WITHOUT_SETTLE = frozenset(["step", "scalars"])
WITH_SETTLE = WITHOUT_SETTLE | {"settle"}
FLOATS = dtype("float32"), dtype("float64")


# An array that steps write to, as it was when the step was bound to it.
cdef struct Watched:
    fastopt_ndarray* array
    char* data
    PyObject* dtype
    int nd, flags
    Py_ssize_t dimensions[64]  # the most that NumPy allows


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


cdef class Step:
    """Runs steps over fixed segments (see fastopt.step.Runner) with one kernel: a compiled
    one by name, or one of Numba's by address.

    ``take`` returns False unless every gradient is a plain C-contiguous ndarray of its
    parameter's shape and dtype that does not overlap what a step writes; the caller finds
    out which one and why. ``at`` takes gradients, computes scalars and steps in one call.
    ``settled`` measures, settles and steps, for norms of each segment.
    """
    cdef Job job
    cdef int64_t* spans  # begin and end of all that a step writes, sorted
    cdef int64_t span_count
    cdef double* carry
    cdef int64_t* count
    cdef Watched* watched
    cdef int64_t watched_count
    cdef Scalars scalars, settle
    cdef Kernels kernels
    cdef object keep, shapes, scalars_at, watched_arrays, dtype
    # The last dtype of a gradient and its format; and the last format and its codec.
    cdef object stored_kind, stored_format, found_format
    cdef load_t found_load
    cdef int64_t found_width
    # The name of our kernel; for each row the formats of p and states, if they are not all
    # plain; names of formats by the address of what decodes them; and the kernels for
    # formats of p, g and states. For each row, how gradients were decoded that its kernel
    # was chosen for.
    cdef object kernel_name
    cdef dict forms, names, fused_kernels
    cdef tuple plain_form
    cdef load_t* chosen_for

    def __cinit__(self, Kernels kernels, kernel, measure, begin, finish, scalars,
                  addresses, *, shapes, averages, list streams, bint double, int64_t sets,
                  int64_t scalar_count, int64_t terms, int64_t measured, Scalars settle,
                  int64_t settle_count, int64_t count_address, int64_t carry_address,
                  int64_t carried, int64_t last_cache, keep):
        cdef Job* job = &self.job
        self.kernels, self.dtype = kernels, FLOATS[double]
        job.tools = &kernels.tools[double]
        if isinstance(kernel, int):
            job.kernel = <kernel_t> <size_t> kernel
        else:
            job.kernel, self.kernel_name = <kernel_t> kernels.find(kernel, double), kernel
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
        job.double, job.itemsize = double, 8 if double else 4
        job.apart = 0 < last_cache < 2 * BATCH
        job.rows, job.sets = len(addresses), sets
        job.columns = len(addresses[0]) if addresses else 4
        if job.columns > MOST_COLUMNS:
            raise ValueError(f"a rule may have at most {MOST_COLUMNS - 4} state buffers")
        job.scalar_count, job.measured, job.terms = scalar_count, measured, terms
        job.width, job.carried = 1 + max(scalar_count, measured), carried
        job.stride = job.width + MOST_NUMBERS
        self.count, self.carry = <int64_t*> count_address, <double*> carry_address
        self.shapes = shapes
        self.keep = keep  # the arrays whose addresses stand in the table
        self.span_count = job.rows * (job.columns - 3 + (averages is not None))
        self.spans = <int64_t*> calloc(2 * self.span_count + 1, sizeof(int64_t))
        job.table = <int64_t*> calloc(job.rows * job.columns + 1, sizeof(int64_t))
        job.constants = <char*> calloc(sets * job.width, 8)
        job.limits = <char*> calloc(sets * (1 + MOST_LIMITS), 8)
        job.factors = <double*> calloc(sets + 1, 8)
        job.numbers = <double*> calloc(sets * job.stride, 8)
        job.steps = <int64_t*> calloc(sets + 1, 8)
        job.kept_at = <int64_t*> calloc(job.rows + 1, sizeof(int64_t))
        if averages is not None:
            job.averages = <int64_t*> calloc(job.rows + 1, sizeof(int64_t))
        self.forms, self.names, self.fused_kernels = {}, {0: "fp32"}, {}
        self.plain_form = ("fp32",) * (job.columns - 3)
        if streams:
            self.make_streams()
        if not (
            self.spans and job.table and job.constants and job.limits and job.factors
            and job.numbers and job.steps and job.kept_at and (averages is None or job.averages)
        ):
            raise MemoryError("no memory for the table of segments")
        job.block = BLOCK
        for row, column, kind, *more in streams:
            self.enter_stream(row, column, kind, *more)
            name = "product" if kind == "product" else kind.name
            form = list(self.forms.get(row, self.plain_form))
            form[max(0, column - 1)] = name
            self.forms[row] = tuple(form)
        self.enter(addresses, averages)

    cdef int make_streams(self) except -1:
        """Allocate the streams. All of them are plain."""
        cdef Job* job = &self.job
        if job.columns - 2 + AT_A_TIME > FASTOPT_MOST_MADE:
            raise ValueError(
                f"a rule whose streams are encoded or factored may have at most "
                f"{FASTOPT_MOST_MADE - AT_A_TIME - 2} state buffers"
            )
        job.streams = <Stream*> calloc(job.rows * (job.columns - 2) + 1, sizeof(Stream))
        job.fused = <kernel_t*> calloc(job.rows + 1, sizeof(kernel_t))
        self.chosen_for = <load_t*> malloc((job.rows + 1) * sizeof(load_t))
        if not (job.streams and job.fused and self.chosen_for):
            raise MemoryError("no memory for streams")
        memset(self.chosen_for, -1, job.rows * sizeof(load_t))  # for nothing yet
        return 0

    def enter_stream(self, int64_t r, int64_t c, kind, int64_t first, *parts):
        """Note that the blocks of a stream are made: from rows and columns, if its kind is
        "product", or from elements of a format, of which the first has this number."""
        cdef Stream* stream = stream_of(&self.job, r, c)
        for k, part in enumerate(parts):
            stream.parts[k] = part
        if kind == "product":
            if self.job.columns > 5:
                raise ValueError("a rule with factored state has one state buffer")
            stream.make = multiply_block
        else:
            self.enter_format(stream, kind)
            stream.first = stream_of(&self.job, r, 0).first = <uint32_t> first
            stream.store = <store_t> self.kernels.find(f"store_{kind.name}", False)

    cdef int enter_format(self, Stream* stream, format) except -1:
        """Note how the elements of a stream are encoded."""
        if format is not self.found_format:
            self.found_load = <load_t> self.kernels.find(f"load_{format.name}", False)
            self.found_width, self.found_format = format.stored.itemsize, format
            # Formats may share what decodes them; then any of their names does.
            self.names.setdefault(<size_t> self.found_load, format.name)
        stream.make, stream.load, stream.width = load_block, self.found_load, self.found_width
        self.job.encoded, self.job.block = True, ENCODED_BLOCK
        return 0

    cdef int enter(self, addresses, averages) except -1:
        cdef Job* job = &self.job
        cdef const Stream* stream
        cdef int64_t r, c
        written = []
        for r in range(job.rows):
            for c in range(job.columns):
                job.table[r * job.columns + c] = addresses[r][c]
            length = addresses[r][job.columns - 2]
            for c in (0, *range(2, job.columns - 2)):
                stream = stream_of(job, r, c)
                if stream and stream.load:
                    begin, width = stream.parts[0], stream.width
                else:
                    begin, width = addresses[r][c], job.itemsize
                written.append((begin, begin + length * width if begin else 0))
            if averages is not None:
                job.averages[r] = averages[r]
                written.append((averages[r], averages[r] + length * job.itemsize))
        written.sort()
        for r in range(self.span_count):
            self.spans[2 * r], self.spans[2 * r + 1] = written[r]
        return 0

    def __dealloc__(self):
        free(self.job.table)
        free(self.job.averages)
        free(self.job.streams)
        free(self.job.fused)
        free(self.chosen_for)
        free(self.job.constants)
        free(self.job.limits)
        free(self.job.factors)
        free(self.job.numbers)
        free(self.job.steps)
        free(self.job.kept_at)
        free(self.job.tasks)
        free(self.job.task_streams)
        free(self.job.weights)
        free(self.spans)
        free(self.watched)

    def watch(self, list arrays):
        """Have ``at`` check that these ndarrays have not changed since, and that those which
        are given as such are writeable."""
        cdef int64_t i
        cdef Watched* now
        free(self.watched)
        self.watched_count = 0
        self.watched = <Watched*> malloc((len(arrays) + 1) * sizeof(Watched))
        if not self.watched:
            raise MemoryError("no memory for what parameters are like")
        self.watched_arrays = [(array, array.dtype, flag) for array, flag in arrays]
        for i, (array, dtype, writeable) in enumerate(self.watched_arrays):
            now = self.watched + i
            now.array = <fastopt_ndarray*> <PyObject*> array
            now.data, now.dtype = now.array.data, <PyObject*> dtype
            now.nd = now.array.nd
            now.flags = now.array.flags & C_CONTIGUOUS
            if writeable:
                now.flags |= WRITEABLE
            memcpy(now.dimensions, now.array.dimensions, now.nd * sizeof(Py_ssize_t))
        self.watched_count = len(arrays)

    cpdef bint unchanged(self) except -1:
        """Whether no watched array has changed."""
        cdef int64_t i
        cdef const Watched* then
        cdef const fastopt_ndarray* array
        for i in range(self.watched_count):
            then = self.watched + i
            array = then.array
            if (
                array.data != then.data
                or array.nd != then.nd
                or array.flags & (C_CONTIGUOUS | WRITEABLE) != then.flags
                or memcmp(
                    array.dimensions, then.dimensions, then.nd * sizeof(Py_ssize_t)
                )
            ):
                return False
            if array.descr != then.dtype and <object> array.descr != <object> then.dtype:
                return False
        return True

    cdef bint overlaps(self, int64_t begin, int64_t end) noexcept:
        """Whether [begin, end) overlaps what a step writes: a binary search, because the
        spans do not overlap each other."""
        cdef int64_t low = 0, high = self.span_count, middle
        while low < high:
            middle = (low + high) // 2
            if self.spans[2 * middle] < end:
                low = middle + 1
            else:
                high = middle
        # Now low is behind the last span that begins before our end. Skip empty spans.
        while low > 0 and self.spans[2 * low - 2] == self.spans[2 * low - 1]:
            low -= 1
        return low > 0 and begin < end and self.spans[2 * low - 1] > begin

    cdef int64_t accept(self, grads) except -2:
        """Put the addresses of the gradients into the table. Return the number of their
        elements, or -1 if one of them does not fit."""
        cdef Py_buffer view
        cdef int64_t r = 0, total = 0
        cdef int64_t* row = self.job.table
        cdef bint fits
        self.job.task_count = 0
        for grad in grads:
            if r == self.job.rows:
                return -1
            if grad is None:
                row[1] = 0
            elif self.is_encoded(grad):
                if not self.accept_encoded(r, grad):
                    return -1
                total += row[self.job.columns - 2]
            else:
                if type(grad) is not ndarray or grad.shape != self.shapes[r]:
                    return -1
                if self.job.streams:
                    memset(stream_of(&self.job, r, 1), 0, sizeof(Stream))
                try:
                    PyObject_GetBuffer(
                        grad, &view, PyBUF_ND | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS
                    )
                except (BufferError, ValueError):
                    return -1
                row[1] = <int64_t> view.buf
                fits = (
                    view.format[0] == (c"d" if self.job.double else c"f")
                    and view.format[1] == 0
                    and not self.overlaps(row[1], row[1] + view.len)
                )
                PyBuffer_Release(&view)
                if not fits:
                    return -1
                total += row[self.job.columns - 2]
            row += self.job.columns
            r += 1
        self.job.given = total
        self.choose_kernels()
        return total if r == self.job.rows else -1

    cdef inline bint is_encoded(self, grad):
        """Whether a gradient may be of fewer bits than kernels compute in."""
        if type(grad) is ndarray:
            descr = <object> (<fastopt_ndarray*> <PyObject*> grad).descr
            return descr is not self.dtype and not self.job.double and descr.itemsize == 2
        return type(grad) is Encoded

    cdef bint accept_encoded(self, int64_t r, grad) except -1:
        """Accept a gradient that is decoded block by block. Return whether it fits."""
        cdef const fastopt_ndarray* array
        if type(grad) is ndarray:
            kind = grad.dtype
            if kind is not self.stored_kind:
                self.stored_format, self.stored_kind = format_of(kind), kind
            format = self.stored_format
        else:
            format, (grad,) = grad
        if format is None or self.job.double or grad.shape != self.shapes[r]:
            return False
        array = <fastopt_ndarray*> <PyObject*> grad
        if not array.flags & C_CONTIGUOUS:
            return False
        if not self.job.streams:
            self.make_streams()
        self.enter_format(stream_of(&self.job, r, 1), format)
        return self.place_encoded(r, <int64_t> array.data)

    cdef int choose_kernels(self) except -1:
        """For each row with streams that must be made, find the kernel that takes them as
        they are, if there is one."""
        cdef Job* job = &self.job
        cdef const Stream* streams
        cdef int64_t r
        for r in range(job.rows if job.streams else 0):
            streams = stream_of(job, r, 0)
            if job.table[r * job.columns + 1] and streams[1].load != self.chosen_for[r]:
                self.chosen_for[r] = streams[1].load
                form = self.forms.get(r, self.plain_form)
                grad = self.names[<size_t> streams[1].load]
                key = form[0], grad, *form[1:]
                if key not in self.fused_kernels:
                    self.fused_kernels[key] = self.find_fused(key)
                job.fused[r] = <kernel_t> <size_t> self.fused_kernels[key]
        return 0

    cdef size_t find_fused(self, tuple key) except? 0:
        """Return the address of the kernel for these formats of p, g and states, or 0."""
        if set(key) == {"fp32"}:
            return <size_t> self.job.kernel
        if self.kernel_name is None or "product" in key:
            return 0
        return <size_t> self.kernels.look_up("_".join([self.kernel_name, *key]), False)

    cdef bint place_encoded(self, int64_t r, int64_t address) noexcept:
        """Note where a gradient of encoded elements is. Return whether it overlaps nothing
        that a step writes."""
        cdef Stream* stream = stream_of(&self.job, r, 1)
        cdef int64_t* row = self.job.table + r * self.job.columns
        row[1] = stream.parts[0] = address
        return not self.overlaps(
            address, address + row[self.job.columns - 2] * stream.width
        )

    cdef int64_t accept_tasks(self, list tasks, weights) except -2:
        """Accept the gradients of several tasks. The table keeps the address of any task's
        gradient, to mark the segment as active."""
        cdef int64_t r, k, count = len(tasks)
        cdef int64_t* row = self.job.table
        free(self.job.tasks)
        free(self.job.task_streams)
        free(self.job.weights)
        self.job.task_streams = NULL
        self.job.tasks = <int64_t*> malloc((count * self.job.rows + 1) * sizeof(int64_t))
        self.job.weights = <char*> malloc(count * self.job.itemsize)
        if not (self.job.tasks and self.job.weights):
            raise MemoryError("no memory for the table of tasks")
        for k in range(count):
            if self.accept(tasks[k]) < 0:
                return -1
            for r in range(self.job.rows):
                self.job.tasks[k * self.job.rows + r] = self.job.table[r * self.job.columns + 1]
            self.note_streams(k, count)
            put(&self.job, self.job.weights, k, weights[k])
        self.job.given = 0
        for r in range(self.job.rows):
            for k in range(count):
                if row[1] == 0:
                    row[1] = self.job.tasks[k * self.job.rows + r]
            if row[1]:
                self.job.given += row[self.job.columns - 2]
            row += self.job.columns
        self.job.task_count = count
        return self.job.given

    cdef int note_streams(self, int64_t k, int64_t count) except -1:
        """Note how the gradients of task k are encoded, if any task's are."""
        cdef Job* job = &self.job
        cdef int64_t r
        if not job.streams:
            return 0
        if not job.task_streams:
            job.task_streams = <Stream*> calloc(count * job.rows + 1, sizeof(Stream))
            if not job.task_streams:
                raise MemoryError("no memory for the streams of tasks")
        for r in range(job.rows):
            job.task_streams[k * job.rows + r] = stream_of(job, r, 1)[0]
        return 0

    def take(self, list grads, weights=None):
        if weights is None:
            return self.accept(grads) >= 0
        return self.accept_tasks(grads, weights) >= 0

    def place(self, addresses, format=None):
        """Take gradients by their addresses, an array of int64 with 0 for none. The caller
        has checked that they fit, and names their format if they are encoded; only overlaps
        are checked here."""
        cdef int64_t r
        if format is not None and not self.job.streams:
            self.make_streams()
        for r in range(self.job.rows if self.job.streams else 0):
            memset(stream_of(&self.job, r, 1), 0, sizeof(Stream))
            if format is not None:
                self.enter_format(stream_of(&self.job, r, 1), format)
        # Not a memoryview, for which Cython writes 20,000 lines of C.
        cdef Py_buffer view
        PyObject_GetBuffer(addresses, &view, PyBUF_ND | PyBUF_C_CONTIGUOUS)
        try:
            if view.itemsize != 8 or view.len != self.job.rows * 8:
                raise ValueError(f"wanted {self.job.rows} addresses")
            fits = self.place_at(<const int64_t*> view.buf)
            self.choose_kernels()
            return fits
        finally:
            PyBuffer_Release(&view)

    cdef bint place_at(self, const int64_t* addresses) noexcept:
        cdef int64_t r, total = 0, length
        cdef int64_t* row = self.job.table
        cdef const Stream* stream
        for r in range(self.job.rows):
            row[1] = addresses[r]
            if row[1]:
                length = row[self.job.columns - 2]
                stream = stream_of(&self.job, r, 1)
                if stream and stream.load:
                    if not self.place_encoded(r, row[1]):
                        return False
                elif self.overlaps(row[1], row[1] + length * self.job.itemsize):
                    return False
                total += length
            row += self.job.columns
        self.job.given = total
        return True

    @property
    def fuses(self):
        """See fastopt.step.Runner."""
        return WITHOUT_SETTLE if self.settle is None else WITH_SETTLE

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

    def at(self, list grads, list hyperparameters, double grad_scale, int threads):
        """Take the gradients and do a plain step. The scalars are computed here from the
        hyperparameters of each set, at half the cost."""
        cdef Job* job = &self.job
        cdef int64_t r
        cdef double* old = self.carry + self.count[0] % 2 * job.sets * job.carried
        cdef double* new = self.carry + (self.count[0] + 1) % 2 * job.sets * job.carried
        cdef uint64_t modes
        if not self.unchanged() or self.accept(grads) < 0:
            return False
        modes = fastopt_enter()
        try:
            job.threads = threads
            for r in range(job.sets):
                job.steps[r] = self.count[0] + 1
                self.compute(
                    r, hyperparameters[r], old + r * job.carried, new + r * job.carried
                )
                put_row(job, r, grad_scale, 0, job.scalar_count)
            with nogil:
                update_all(job)
            self.count[0] += 1
        finally:
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
