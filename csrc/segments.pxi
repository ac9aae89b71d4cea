# Segments, and the gradients of a step over them.

cdef enum:
    C_CONTIGUOUS = 0x0001  # among NumPy's flags
    ALIGNED = 0x0100
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

FLOATS = dtype("float32"), dtype("float64")
UNKNOWN = object()  # the kind of a gradient before the first one


# An array that steps write to, as it was when the step was bound to it.
cdef struct Watched:
    fastopt_ndarray* array
    char* data
    PyObject* dtype
    int nd, flags
    Py_ssize_t dimensions[64]  # the most that NumPy allows


cdef class Segments:
    """Fixed segments, and the gradients that a step over them takes.

    ``take`` returns False unless every gradient is a plain C-contiguous ndarray, of its
    parameter's shape and a dtype that kernels take, that does not overlap what a step
    writes; the caller finds out which one and why.
    """
    cdef Job job
    cdef int64_t* spans  # begin and end of all that a step writes, sorted
    cdef int64_t span_count
    cdef Watched* watched
    cdef int64_t watched_count
    cdef Kernels kernels
    cdef object keep, shapes, watched_arrays, dtype
    cdef object kernel_name  # None: it is one of Numba's
    # For each row the kind of each stream: a format, "product", or None for a plain one.
    # And the kernels that take streams of such kinds as they are, or 0.
    cdef list kinds
    cdef dict fused

    def __cinit__(self, Kernels kernels, kernel, *functions, addresses, shapes, averages,
                  list streams, list copies, bint double, keep, **numbers):
        cdef Job* job = &self.job
        self.kernels, self.dtype, self.shapes = kernels, FLOATS[double], shapes
        self.keep = keep  # the arrays whose addresses stand in the table
        self.fused = {}
        job.tools = &kernels.tools[double]
        if isinstance(kernel, int):
            job.kernel = <kernel_t> <size_t> kernel
        else:
            job.kernel, self.kernel_name = <kernel_t> kernels.find(kernel, double), kernel
        job.double, job.itemsize, job.block = double, 8 if double else 4, BLOCK
        job.rows, job.contention.patience = len(addresses), LEAST_PATIENCE
        job.columns = len(addresses[0]) if addresses else 4
        if job.columns > MOST_COLUMNS:
            raise ValueError(f"a rule may have at most {MOST_COLUMNS - 4} state buffers")
        job.table = <int64_t*> calloc(job.rows * job.columns + 1, sizeof(int64_t))
        job.kept_at = <int64_t*> calloc(job.rows + 1, sizeof(int64_t))
        if averages is not None:
            job.averages = <int64_t*> calloc(job.rows + 1, sizeof(int64_t))
        if not (job.table and job.kept_at and (averages is None or job.averages)):
            raise MemoryError("no memory for the table of segments")
        if streams:
            self.make_streams()
        written = []
        for row, column, kind, first, parts in streams:
            written += self.enter_stream(row, column, kind, first, parts)
        if copies:
            written += self.enter_copies(copies)
        self.enter(addresses, averages, written)

    def __dealloc__(self):
        free(self.job.table)
        free(self.job.kept_at)
        free(self.job.averages)
        free(self.job.streams)
        free(self.job.copies)
        free(self.job.fused)
        free(self.job.tasks)
        free(self.job.task_streams)
        free(self.job.weights)
        free(self.spans)
        free(self.watched)

    cdef int enter(self, addresses, averages, list written) except -1:
        """Fill the table, and note what steps write to: plain streams and averages, besides
        what is ``written`` of others."""
        cdef Job* job = &self.job
        cdef const Stream* stream
        cdef int64_t r, c
        for r in range(job.rows):
            for c in range(job.columns):
                job.table[r * job.columns + c] = addresses[r][c]
            length = addresses[r][job.columns - 2]
            for c in (0, *range(2, job.columns - 2)):
                stream = stream_of(job, r, c)
                if not (stream and stream.make):
                    begin = addresses[r][c]
                    written.append((begin, begin + length * job.itemsize if begin else 0))
            if averages is not None:
                job.averages[r] = averages[r]
                written.append((averages[r], averages[r] + length * job.itemsize))
        written.sort()
        self.span_count = len(written)
        self.spans = <int64_t*> calloc(2 * self.span_count + 1, sizeof(int64_t))
        if not self.spans:
            raise MemoryError("no memory for what a step writes")
        for r in range(self.span_count):
            self.spans[2 * r], self.spans[2 * r + 1] = written[r]
        return 0

    cdef int make_streams(self) except -1:
        """Allocate the streams. All of them are plain, and no kernel is chosen yet."""
        cdef Job* job = &self.job
        if job.columns - 2 + AT_A_TIME > FASTOPT_MOST_MADE:
            raise ValueError(
                f"a rule whose streams are encoded or factored may have at most "
                f"{FASTOPT_MOST_MADE - AT_A_TIME - 2} state buffers"
            )
        job.streams = <Stream*> calloc(job.rows * (job.columns - 2) + 1, sizeof(Stream))
        job.fused = <kernel_t*> calloc(job.rows + 1, sizeof(kernel_t))
        if not (job.streams and job.fused):
            raise MemoryError("no memory for streams")
        plain = [None, UNKNOWN, *[None] * (job.columns - 4)]
        self.kinds = [list(plain) for _ in range(job.rows)]
        return 0

    cdef list enter_stream(
        self, int64_t r, int64_t c, kind, int64_t first, parts
    ):
        """Note that the blocks of a stream are made: from rows and columns, if its kind is
        "product", or from elements of a format, of which the first has this number. Return
        the begin and the end of each part that steps write to."""
        cdef Stream* stream = stream_of(&self.job, r, c)
        self.kinds[r][c] = kind
        for k, (part, size) in enumerate(parts):
            stream.parts[k] = part
        if kind == "product":
            if self.job.columns > 5:
                raise ValueError("a rule with factored state has one state buffer")
            stream.make = multiply_block
            return []
        self.enter_format(stream, kind)
        stream.store = <store_t> self.kernels.find(f"store_{kind.name}", False)
        stream_of(&self.job, r, 0).first = stream.first = <uint32_t> first
        return [(part, part + size) for part, size in parts]

    cdef list enter_copies(self, list copies):
        """Note the copies of the parameters: row, format, address and size of each. Return
        where they are, as steps write to them."""
        cdef Stream* stream
        self.job.copies = <Stream*> calloc(self.job.rows + 1, sizeof(Stream))
        if not self.job.copies:
            raise MemoryError("no memory for copies of parameters")
        for row, format, address, size in copies:
            stream = self.job.copies + <int64_t> row
            stream.parts[0] = address
            stream.store = <store_t> self.kernels.find(f"store_{format.name}", False)
        return [(address, address + size) for _, _, address, size in copies]

    cdef int enter_format(self, Stream* stream, format) except -1:
        """Note how a stream is encoded; None: it is plain."""
        if format is None:
            stream.make, stream.load, stream.width = NULL, NULL, 0
            return 0
        stream.make, stream.width = load_block, format.stored.itemsize
        stream.finite = <finite_t> self.kernels.look_up(f"finite_{format.name}", False)
        for k, stride in enumerate(format.strides):
            stream.strides[k] = stride
        stream.load = <load_t> self.kernels.find(f"load_{format.name}", False)
        self.job.encoded, self.job.block = True, ENCODED_BLOCK
        return 0

    cdef int expect(self, int64_t r, format) except -1:
        """Note the format of a row's gradient; None: it is plain. If that has changed, find
        the kernel that takes the row's streams as they are, if there is one."""
        if not self.job.streams:
            if format is None:
                return 0
            self.make_streams()
        cdef list kinds = self.kinds[r]
        if kinds[1] is not format:
            kinds[1] = format
            self.enter_format(stream_of(&self.job, r, 1), format)
            key = tuple(kinds)
            if key not in self.fused:
                self.fused[key] = self.find_fused(kinds)
            self.job.fused[r] = <kernel_t> <size_t> self.fused[key]
        return 0

    cdef size_t find_fused(self, list kinds) except? 0:
        """Return the address of the kernel for streams of these kinds, or 0."""
        if all([kind is None for kind in kinds]):
            return <size_t> self.job.kernel
        if self.kernel_name is None or "product" in kinds:
            return 0
        names = ["fp32" if kind is None else kind.name for kind in kinds]
        return <size_t> self.kernels.look_up("_".join([self.kernel_name, *names]), False)

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
                self.expect(r, None)
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
        return total if r == self.job.rows else -1

    cdef inline bint is_encoded(self, grad):
        """Whether a gradient may be of fewer bits than kernels compute in."""
        if type(grad) is ndarray:
            # Most have our dtype. A reference to it would be counted, and all threads share
            # the dtype: without the GIL, they would wait for each other's counts.
            if (<fastopt_ndarray*> <PyObject*> grad).descr == <PyObject*> self.dtype:
                return False
            return not self.job.double and grad.dtype.itemsize == 2
        return type(grad) is Encoded

    cdef bint accept_encoded(self, int64_t r, grad) except -1:
        """Accept a gradient that is decoded block by block. Return whether it fits."""
        cdef const fastopt_ndarray* array
        parts = (grad,)
        if type(grad) is ndarray:
            format = format_of(grad.dtype)
        else:
            format, parts = grad
        grad = parts[0]
        if format is None or self.job.double or grad.shape != self.shapes[r]:
            return False
        array = <fastopt_ndarray*> <PyObject*> grad
        if array.flags & (C_CONTIGUOUS | ALIGNED) != C_CONTIGUOUS | ALIGNED:
            return False
        self.expect(r, format)
        for k in range(1, len(parts)):
            array = <fastopt_ndarray*> <PyObject*> parts[k]
            stream_of(&self.job, r, 1).parts[k] = <int64_t> array.data
        array = <fastopt_ndarray*> <PyObject*> grad
        return self.place_encoded(r, <int64_t> array.data)

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
        for r in range(self.job.rows):
            self.expect(r, format)
        # Not a memoryview, for which Cython writes 20,000 lines of C.
        cdef Py_buffer view
        PyObject_GetBuffer(addresses, &view, PyBUF_ND | PyBUF_C_CONTIGUOUS)
        try:
            if view.itemsize != 8 or view.len != self.job.rows * 8:
                raise ValueError(f"wanted {self.job.rows} addresses")
            return self.place_at(<const int64_t*> view.buf)
        finally:
            PyBuffer_Release(&view)

    def follow(self, addresses, places):
        """Take gradients like those of the last ``place``, at new addresses: of each segment
        that at its place, arrays of int64. Return whether this was possible: whether all
        have a gradient, and none overlaps what a step writes."""
        cdef Py_buffer view, chosen
        cdef int64_t r, place
        cdef int64_t* row = self.job.table
        cdef const Stream* stream
        PyObject_GetBuffer(addresses, &view, PyBUF_ND | PyBUF_C_CONTIGUOUS)
        try:
            PyObject_GetBuffer(places, &chosen, PyBUF_ND | PyBUF_C_CONTIGUOUS)
            try:
                if view.itemsize != 8 or chosen.itemsize != 8:
                    raise ValueError("wanted arrays of int64")
                if chosen.len != self.job.rows * 8 or self.job.task_count:
                    return False
                for r in range(self.job.rows):
                    place = (<const int64_t*> chosen.buf)[r]
                    if not 0 <= place < view.len // 8:
                        raise IndexError("a place that has no address")
                    row[1] = (<const int64_t*> view.buf)[place]
                    stream = stream_of(&self.job, r, 1)
                    if row[1] == 0:
                        return False
                    if stream and stream.load:
                        if not self.place_encoded(r, row[1]):
                            return False
                    elif self.overlaps(
                        row[1], row[1] + row[self.job.columns - 2] * self.job.itemsize
                    ):
                        return False
                    row += self.job.columns
                return True
            finally:
                PyBuffer_Release(&chosen)
        finally:
            PyBuffer_Release(&view)

    def have_done(self, counts, double steps):
        """Whether all counts, a vector of float32 or float64, are so many steps."""
        cdef Py_buffer view
        cdef Py_ssize_t i
        cdef bint same = True
        PyObject_GetBuffer(counts, &view, PyBUF_ND | PyBUF_C_CONTIGUOUS)
        try:
            if view.itemsize != sizeof(float) and view.itemsize != sizeof(double):
                raise ValueError("wanted a vector of float32 or float64")
            for i in range(view.len // view.itemsize):
                if view.itemsize == sizeof(float):
                    same = same and (<const float*> view.buf)[i] == steps
                else:
                    same = same and (<const double*> view.buf)[i] == steps
            return same
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
