# A call of native code: what it gives, what is refused, and the job that it becomes. Calls
# of both interfaces of fastopt.h go through the same functions.

from fastopt cimport F64, Request, Streams
from fastopt cimport Stream as GivenStream

cdef enum:
    A_NUMBER = -1
    THE_PARAMETER = -2
    MOST_SEGMENTS = 1 << 28  # so that sizes in bytes do not overflow
    MOST_THREADS = 1024  # OpenMP ends a process whose threads it cannot start
    MOST_FORMATS = 16
    MOST_PARTS = 4
    MOST_STREAMS = 16  # FASTOPT_MOST_MADE
    MOST_SPANS = 64  # all parts of these


# A format of fastopt.h.
cdef struct Stored:
    load_t load  # decodes; NULL: kernels read such streams in memory
    store_t store  # encodes
    store_t start  # encodes the first values of state
    finite_t finite  # whether numbers can be encoded; NULL: groups share no scale
    int64_t part_count
    int64_t widths[MOST_PARTS]  # of each part: the bytes of a word,
    int64_t shared[MOST_PARTS]  # and the number of elements that share it


# A kernel that reads streams of these formats in memory, one format for each column.
cdef struct Form:
    kernel_t kernel
    unsigned char formats[MOST_STREAMS]


# A rule: first what native code sees of it, then the rest.
cdef struct Native:
    Rule about
    bint by_segment
    int64_t scalar_count, measured, terms, settle_count
    scalars_t scalars, settle
    kernel_t kernels[2]
    kernel_t finishes[2]
    measure_t measures[2]
    measure_t begins[2]
    Form* forms
    int64_t form_count
    # For each hyperparameter: its bounds, whether it is a flag, and whether it must be off.
    double* least
    double* below
    char* flags
    char* off
    # For each state buffer and then each carried number: what it starts as. That is a
    # number, a hyperparameter (by index) or the parameter itself.
    double* first
    int64_t* first_of


# What native code gives. Its segments are plain, or they consist of streams.
cdef struct Call:
    const Native* native
    int dtype
    int64_t t
    const double* hyperparameters
    int64_t rows
    double* carry
    bint of_streams
    const Segment* plain
    const Streams* segments
    int64_t count
    double grad_scale
    Request request
    double* sums  # where they go; NULL: it is a step
    const double* given  # the sums of all processes; NULL: a step takes them itself
    int64_t processes


# The memory of a segment's streams.
cdef struct Spans:
    int64_t count
    int64_t begin[MOST_SPANS]
    int64_t end[MOST_SPANS]


cdef Api api
cdef const Tools* native_tools
cdef int default_threads
cdef Contention native_contention  # of all steps: they come without an object to note it
cdef bint native_apart
cdef int process  # with OpenMP's threads; -1 in a fork that began without any
cdef Stored stored[MOST_FORMATS]
cdef int64_t stored_count


cdef inline int64_t length_of(const Call* call, int64_t r) noexcept nogil:
    return call.segments[r].n if call.of_streams else call.plain[r].n


cdef inline int64_t columns_of(const Call* call) noexcept nogil:
    return 2 + call.native.about.state_count


cdef inline int64_t format_at(const Call* call, int64_t r, int64_t c) noexcept nogil:
    """Return the format of column c of a segment: p, g and then the state."""
    # The numbers of plain formats are those of the dtypes.
    return call.segments[r].streams[c].format if call.of_streams else call.dtype


cdef inline int64_t part_at(
    const Call* call, int64_t r, int64_t c, int64_t k
) noexcept nogil:
    """Return the address of a part of column c; plain arrays are one part."""
    if call.of_streams:
        return <int64_t> call.segments[r].streams[c].parts[k]
    if c == 0:
        return <int64_t> call.plain[r].p
    return <int64_t> (call.plain[r].g if c == 1 else call.plain[r].state[c - 2])


cdef inline int64_t sets_of(const Call* call) noexcept nogil:
    """Return the number of sets of scalars, which is that of rows of carried numbers."""
    return call.count if call.native.by_segment else call.rows


cdef inline const double* values_of(const Call* call, int64_t s) noexcept nogil:
    """Return the hyperparameters of a set."""
    cdef int64_t row = s
    if call.native.by_segment:
        row = call.segments[s].row if call.of_streams else 0
    return call.hyperparameters + row * call.native.about.hyperparameter_count


# What is refused ------------------------------------------------------------------------

cdef int check_hyperparameters(const Native* native, const double* given) noexcept nogil:
    cdef int64_t k
    for k in range(native.about.hyperparameter_count):
        if native.flags[k] and given[k] != 0 and given[k] != 1:
            return BAD_HYPERPARAMETER
        if not (
            isfinite(given[k]) and native.least[k] <= given[k]
            and given[k] < native.below[k]
        ):
            return BAD_HYPERPARAMETER
        if native.off[k] and given[k] != 0:
            return OTHER_VARIANT
    return OK


cdef bint in_table(const Native* native) noexcept nogil:
    cdef int64_t i
    for i in range(api.rule_count):
        if api.rules[i] == <const Rule*> native:
            return True
    return False


cdef bint bad_pointer(const void* at, int64_t count) noexcept nogil:
    return count > 0 and (not at or <size_t> at % 8 != 0)


cdef bint plain_spans(const Call* call, int64_t r, Spans* spans) noexcept nogil:
    """Find the memory of a plain segment. Return whether all pointers are valid."""
    cdef const Segment* segment = &call.plain[r]
    cdef int64_t k, itemsize = 8 if call.dtype == FLOAT64 else 4
    cdef int64_t states = call.native.about.state_count
    if bad_pointer(segment.state, states):
        return False
    spans.begin[0], spans.count = <int64_t> segment.p, 1
    for k in range(states):
        spans.begin[1 + k] = <int64_t> segment.state[k]
        spans.count += 1
    if segment.g:
        spans.begin[spans.count] = <int64_t> segment.g
        spans.count += 1
    for k in range(spans.count):
        spans.end[k] = spans.begin[k] + segment.n * itemsize
        if spans.begin[k] == 0 or spans.begin[k] & (itemsize - 1):
            return False
    return True


cdef bint stream_spans(const Call* call, int64_t r, Spans* spans) noexcept nogil:
    """Find the memory of a segment of streams. Return whether all pointers and formats are
    valid."""
    cdef const Streams* segment = &call.segments[r]
    cdef const GivenStream* stream
    cdef const Stored* format
    cdef int64_t c, k, nbytes
    if bad_pointer(segment.streams, columns_of(call)):
        return False
    spans.count = 0
    for c in range(columns_of(call)):
        stream = &segment.streams[c]
        if c == 1 and not stream.parts[0]:
            continue
        if not 0 <= stream.format < stored_count:
            return False
        if (stream.format == F64) != (call.dtype == FLOAT64):
            return False
        format = &stored[stream.format]
        if c == 1 and format.part_count > 1:
            return False
        for k in range(format.part_count):
            nbytes = (segment.n + format.shared[k] - 1) // format.shared[k]
            nbytes *= format.widths[k]
            spans.begin[spans.count] = <int64_t> stream.parts[k]
            spans.end[spans.count] = spans.begin[spans.count] + nbytes
            if not stream.parts[k] or spans.begin[spans.count] % format.widths[k]:
                return False
            spans.count += 1
    return True


cdef int check_segment(const Call* call, int64_t r, int64_t carried) noexcept nogil:
    """Check pointers, and that nothing within a segment overlaps. Overlaps between segments
    are not checked, which would take longer than many a step."""
    cdef int64_t i, j, n = length_of(call, r)
    cdef int64_t carry = <int64_t> call.carry
    cdef Spans spans
    if n < 0 or n >> 56:  # more bytes than addresses
        return BAD_ARGUMENT
    if call.of_streams and not (
        0 <= call.segments[r].row < call.rows and call.segments[r].first >= 0
    ):
        return BAD_ARGUMENT
    if n == 0:
        return OK
    if not (
        stream_spans(call, r, &spans) if call.of_streams else plain_spans(call, r, &spans)
    ):
        return BAD_ARGUMENT
    if call.sums:  # which writes to none of them
        return OK
    for i in range(spans.count):
        for j in range(i):
            if spans.begin[i] < spans.end[j] and spans.begin[j] < spans.end[i]:
                return OVERLAP
        if carried and spans.begin[i] < carry + 8 * carried and carry < spans.end[i]:
            return OVERLAP
    return OK


cdef int check_call(const Call* call) noexcept nogil:
    cdef const Native* native = call.native
    cdef int64_t i, carried
    cdef int code = OK
    if (
        not in_table(native) or (call.dtype != FLOAT32 and call.dtype != FLOAT64)
        or call.count < 0 or call.count > MOST_SEGMENTS
        or call.rows < 1 or call.rows > MOST_SEGMENTS
        or (
            bad_pointer(call.segments, call.count) if call.of_streams
            else bad_pointer(call.plain, call.count)
        )
        or bad_pointer(call.hyperparameters, native.about.hyperparameter_count)
        or bad_pointer(call.carry, native.about.carry_count)
    ):
        return BAD_ARGUMENT
    for i in range(call.rows):
        code = check_hyperparameters(
            native, call.hyperparameters + i * native.about.hyperparameter_count
        )
        if code != OK:
            return code
    carried = native.about.carry_count * sets_of(call)
    for i in range(call.count):
        code = check_segment(call, i, carried)
        if code != OK:
            return code
    return OK


cdef int check_step(const Call* call) noexcept nogil:
    """Check what a step has besides what a start has."""
    cdef const Request* request = &call.request
    if request.size != sizeof(Request) or call.t < 1 or request.threads < 0:
        return BAD_ARGUMENT
    if not request.run and request.threads > MOST_THREADS:
        return BAD_ARGUMENT
    if call.of_streams and not (
        isfinite(call.grad_scale)
        and (call.dtype == FLOAT64 or isfinite(<float> call.grad_scale))
        and isfinite(request.clip_norm) and request.clip_norm >= 0
    ):
        return BAD_ARGUMENT
    return OK


# The first values -----------------------------------------------------------------------

cdef double first_value(
    const Native* native, int64_t k, const double* given
) noexcept nogil:
    cdef int64_t of = native.first_of[k]
    return native.first[k] if of == A_NUMBER else given[of]


cdef void start_stream(
    const Call* call, int64_t r, int64_t k, const double* values
) noexcept nogil:
    """Give a state buffer its first values, under these hyperparameters."""
    cdef bint of_param = call.native.first_of[k] == THE_PARAMETER
    cdef double value = 0 if of_param else first_value(call.native, k, values)
    cdef const Stored* format = &stored[format_at(call, r, 2 + k)]
    cdef const Stored* param = &stored[format_at(call, r, 0)]
    cdef int64_t itemsize = 8 if call.dtype == FLOAT64 else 4
    cdef int64_t i, m, start = 0, n = length_of(call, r)
    cdef int64_t parts[MOST_PARTS]
    cdef int64_t params[MOST_PARTS]
    cdef uint32_t draw[3]
    cdef char* block
    memset(draw, 0, sizeof(draw))
    for i in range(format.part_count):
        parts[i] = part_at(call, r, 2 + k, i)
    for i in range(param.part_count):
        params[i] = part_at(call, r, 0, i)
    while start < n:
        m = min(<int64_t> BLOCK, n - start)
        block = <char*> parts[0] + start * itemsize
        if format.load:
            block = <char*> fastopt_scratch
        if not of_param:
            for i in range(m):
                if call.dtype == FLOAT64:
                    (<double*> block)[i] = value
                else:
                    (<float*> block)[i] = <float> value
        elif param.load:
            param.load(params, start, m, block)
        else:
            memcpy(block, <const char*> params[0] + start * itemsize, m * itemsize)
        if format.load:
            format.start(parts, start, m, block, draw)
        start += m


cdef int start_call(const Call* call) noexcept nogil:
    cdef const Native* native = call.native
    cdef int64_t r, s, k, states, carried
    cdef const double* values
    cdef int code = check_call(call)
    if code != OK:
        return code
    states, carried = native.about.state_count, native.about.carry_count
    for r in range(call.count):
        s = call.segments[r].row if call.of_streams else 0
        values = call.hyperparameters + s * native.about.hyperparameter_count
        for k in range(states if length_of(call, r) else 0):
            start_stream(call, r, k, values)
    for s in range(sets_of(call)):
        for k in range(carried):
            call.carry[s * carried + k] = first_value(native, states + k, values_of(call, s))
    return OK


# Steps ----------------------------------------------------------------------------------

cdef int compute_all(Job* job, const Call* call) noexcept nogil:
    """Compute the scalars of each set, and check that the dtype has them. Return how many
    there are, with what is carried, or -1."""
    cdef int64_t s, k
    cdef int returned = 0
    cdef double taken[MOST_NUMBERS]
    cdef double* numbers = job.numbers
    for s in range(job.sets):
        memcpy(taken, call.carry + s * job.carried, job.carried * sizeof(double))
        memcpy(
            taken + job.carried, values_of(call, s),
            call.native.about.hyperparameter_count * sizeof(double),
        )
        returned = job.scalars(job.steps[s], taken, numbers)
        for k in range(returned - job.carried):
            if not job.double and isfinite(numbers[k]) and not isfinite(<float> numbers[k]):
                return -1  # as Python says when an optimizer is made
        if returned < 0:
            return -1
        numbers += job.stride
    return returned


cdef int sum_all(
    Job* job, measure_t measure, int64_t measured, int64_t terms, double* total, int64_t* n
) noexcept nogil:
    """Add up what is measured of all segments, and count the elements that this is of."""
    cdef int64_t r, s, k, length
    cdef Rows rows = rows_from(job, 0, INT64_MAX)
    cdef const double* partials
    memset(total, 0, terms * sizeof(double))
    n[0] = 0
    if not make_room(job, rows.chunks, terms):
        return NO_MEMORY
    for s in range(job.sets):
        put_row(job, s, job.factors[s], 0, measured)
    measure_all(job, rows, measure, terms)
    partials = job.partials
    for r in range(job.rows):
        if job.table[r * job.columns + 1]:
            length = job.table[(r + 1) * job.columns - 2]
            for k in range(terms):
                total[k] += in_chunks(partials + k, terms, chunks_of(length))
            partials += chunks_of(length) * terms
            n[0] += length
    free(job.partials)
    job.partials = NULL
    return OK


cdef int clip_all(Job* job, double limit, double* norm) noexcept nogil:
    """Take the norm of all gradients, and bring it under a limit, as ``shrinking`` of
    step.py does."""
    cdef int64_t s, n
    cdef double total, shrink
    if sum_all(job, job.tools.square, 0, 1, &total, &n) != OK:
        return NO_MEMORY
    norm[0] = sqrt_f64(total)
    shrink = limit / (norm[0] + 1e-6)
    for s in range(job.sets if not shrink >= 1 else 0):
        job.factors[s] *= shrink
    return OK


cdef int settle_all(Job* job, double* carry, double* settled) noexcept nogil:
    """Take the sums over all segments, and settle, if anything was summed up. ``settled``
    has room for the carry, which is written when every set has settled."""
    cdef int64_t s, n
    cdef double total[MOST_NUMBERS]
    cdef int code
    if job.given == 0:
        return OK
    code = sum_all(job, job.measure, job.measured, job.terms, total, &n)
    if code != OK:
        return code
    for s in range(job.sets):
        if not settle(job, s, n, total, settled + s * job.carried):
            return BAD_HYPERPARAMETER
    memcpy(carry, settled, job.sets * job.carried * sizeof(double))
    return OK


cdef int do_job(Job* job, const Call* call, double* settled) noexcept nogil:
    cdef int64_t s
    cdef int code = OK
    cdef double norm, limit = call.request.clip_norm
    cdef int returned = compute_all(job, call)
    if returned < 0:
        return BAD_HYPERPARAMETER
    job.handed = returned - job.settle_count
    job.zeroing = call.request.zero_grads != 0
    if limit > 0:
        code = clip_all(job, limit, &norm)
        if code != OK:
            return code
    if call.sums:
        return write_sums(job, call)
    if job.settle and call.native.by_segment and not call.processes:
        return step_in_batches(job, call.carry, call.carry)
    if job.settle:
        if call.processes:
            code = settle_given(job, call, settled)
        else:
            code = settle_all(job, call.carry, settled)
        if code != OK:
            return code
    for s in range(job.sets):
        put_row(job, s, job.factors[s], 0, job.scalar_count)
        if not job.settle:
            memcpy(
                call.carry + s * job.carried,
                job.numbers + s * job.stride + returned - job.carried,
                job.carried * sizeof(double),
            )
    update_all(job)
    return OK


cdef kernel_t kernel_of(const Job* job, const Call* call, int64_t r) noexcept nogil:
    """Return the kernel that reads all streams of a segment in memory, or NULL."""
    cdef int64_t c, k, columns = columns_of(call)
    cdef unsigned char formats[MOST_STREAMS]
    cdef bint plain = True
    for c in range(columns):
        formats[c] = <unsigned char> format_at(call, r, c)
        plain &= stored[formats[c]].load == NULL
    if plain:
        return job.kernel
    for k in range(call.native.form_count):
        if memcmp(call.native.forms[k].formats, formats, columns) == 0:
            return call.native.forms[k].kernel
    return NULL


cdef void enter_streams(Job* job, const Call* call, int64_t r) noexcept nogil:
    """Note how the streams of a segment with a gradient are encoded."""
    cdef int64_t c, k
    cdef const Stored* format
    cdef Stream* stream
    for c in range(columns_of(call)):
        format, stream = &stored[format_at(call, r, c)], stream_of(job, r, c)
        stream.first = <uint32_t> call.segments[r].first
        if format.load:
            stream.make, stream.load, stream.width = load_block, format.load, format.widths[0]
            stream.finite = format.finite
            if c != 1:
                stream.store = format.store
            for k in range(format.part_count):
                stream.parts[k] = part_at(call, r, c, k)
                if format.shared[k] <= GROUP:
                    stream.strides[k] = GROUP // format.shared[k] * format.widths[k]
            job.encoded, job.block = True, ENCODED_BLOCK
    job.fused[r] = kernel_of(job, call, r)


cdef void enter_segments(Job* job, const Call* call) noexcept nogil:
    """Fill the table."""
    cdef int64_t r, c, n
    cdef int64_t* row = job.table
    for r in range(call.count):
        n = length_of(call, r)
        if call.of_streams:
            for c in range(job.columns - 2 if n else 0):
                row[c] = <int64_t> call.segments[r].streams[c].parts[0]
            row[job.columns - 1] = call.segments[r].row
        else:
            row[0], row[1] = <int64_t> call.plain[r].p, <int64_t> call.plain[r].g
            for c in range(job.columns - 4 if n else 0):
                row[2 + c] = <int64_t> call.plain[r].state[c]
        row[job.columns - 2] = n
        if call.native.by_segment:
            row[job.columns - 1] = r
        if row[1]:
            job.given += n
            if call.of_streams:
                enter_streams(job, call, r)
        row += job.columns


cdef int step_call(Call* call) noexcept nogil:
    cdef const Native* native = call.native
    cdef Job job
    cdef int64_t r, words, streams = 0
    cdef double* settled
    cdef int code = check_call(call)
    if code == OK:
        code = check_step(call)
    if code == OK and (call.sums or call.processes):
        code = check_sums(call)
    if code != OK:
        return code
    memset(&job, 0, sizeof(job))
    job.double = call.dtype == FLOAT64
    job.itemsize = 8 if job.double else 4
    job.tools = &native_tools[job.double]
    job.kernel, job.finish = native.kernels[job.double], native.finishes[job.double]
    job.measure, job.begin = native.measures[job.double], native.begins[job.double]
    job.scalars, job.settle = native.scalars, native.settle
    job.apart, job.block = native_apart, BLOCK
    job.rows, job.columns = call.count, 2 + columns_of(call)
    job.sets = sets_of(call)
    job.scalar_count, job.measured = native.scalar_count, native.measured
    job.terms, job.carried = native.terms, native.about.carry_count
    job.settle_count = native.settle_count
    job.width = 1 + max(job.scalar_count, job.measured)
    job.stride = job.width + MOST_NUMBERS
    job.run, job.context = call.request.run, call.request.context
    copy_shared(&native_contention, &job.contention)
    job.threads = call.request.threads if call.request.threads else default_threads
    if not job.run and fastopt_process() != process:
        job.threads = 1  # after a fork, OpenMP's threads are in the parent
    words = job.rows * (job.columns + 1)
    words += job.sets * (2 + job.stride + job.carried + job.width)
    if call.of_streams:  # the structures are multiples of 8 bytes
        streams = job.rows * (job.columns - 2)
        words += streams * (sizeof(Stream) // 8) + job.rows
    job.table = <int64_t*> calloc(words + 1, 8)
    if not job.table:
        return NO_MEMORY
    job.kept_at = job.table + job.rows * job.columns
    job.factors = <double*> (job.kept_at + job.rows)
    job.steps = <int64_t*> (job.factors + job.sets)
    job.numbers = <double*> (job.steps + job.sets)
    settled = job.numbers + job.sets * job.stride
    job.constants = <char*> (settled + job.sets * job.carried)
    if job.carried == 0:
        call.carry = settled  # not NULL, which memcpy may not take even for no bytes
    if call.of_streams:
        job.streams = <Stream*> (job.constants + job.sets * job.width * 8)
        job.fused = <kernel_t*> (job.streams + streams)
    enter_segments(&job, call)
    for r in range(job.sets):
        job.factors[r], job.steps[r] = call.grad_scale, call.t
    code = do_job(&job, call, settled)
    share(&native_contention, &job.contention)
    clear(&job)
    free(job.table)
    return code
