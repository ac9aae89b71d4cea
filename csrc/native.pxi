# What native code calls, as fastopt.h declares it.

cdef enum:
    A_NUMBER = -1
    THE_PARAMETER = -2
    MOST_SEGMENTS = 1 << 28  # so that sizes in bytes do not overflow
    MOST_THREADS = 1024  # OpenMP ends a process whose threads it cannot start


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
    # The kernels for parameters and gradients that are stored in fewer bits. NULL: blocks
    # are made for the plain kernel.
    kernel_t fused[STORED_COUNT][STORED_COUNT]
    # For each hyperparameter: its bounds, whether it is a flag, and whether it must be off.
    double* least
    double* below
    char* flags
    char* off
    # For each state buffer and then each carried number: what it starts as. That is a
    # number, a hyperparameter (by index) or the parameter itself.
    double* first
    int64_t* first_of


# How numbers that are stored in fewer bits are decoded and encoded.
cdef struct Codec:
    load_t load
    store_t store
    int64_t width  # bytes of an encoded element


cdef Api api
cdef const Tools* native_tools
cdef Codec native_codecs[STORED_COUNT]
cdef int default_threads
cdef bint native_apart
cdef int process  # with OpenMP's threads; -1 in a fork that began without any
cdef list kept = []  # the names, as bytes
STORED = "fp32", "bf16", "fp16"  # the formats STORED_PLAIN, STORED_BF16, STORED_FP16


cdef const Rule* native_find(const char* name) noexcept nogil:
    cdef int64_t i
    for i in range(api.rule_count if name else 0):
        if strcmp(api.rules[i].name, name) == 0:
            return api.rules[i]
    return NULL


cdef const char* native_error(int code) noexcept nogil:
    if code == OK:
        return "no error"
    if code == BAD_ARGUMENT:
        return (
            "a pointer is NULL or not aligned, a length below 0 or beyond memory, the "
            "rule not of this table, the dtype unknown, the step below 1 or the number "
            "of threads below 0 or above 1024"
        )
    if code == BAD_HYPERPARAMETER:
        return "a hyperparameter is out of its range, or the rule refuses it"
    if code == OTHER_VARIANT:
        return (
            "an option is on that needs another variant of the rule, such as "
            "sgd+momentum for a momentum"
        )
    if code == OVERLAP:
        return (
            "parameters, gradients and state of a segment overlap in memory, or one of "
            "them with the carry"
        )
    if code == NO_MEMORY:
        return "there is no memory for the table of segments"
    return "no such error"


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
        if api.rules[i] == &native.about:
            return True
    return False


cdef bint bad_pointer(const void* at, int64_t count) noexcept nogil:
    return count > 0 and (not at or <size_t> at % 8 != 0)


cdef int check_segment(
    const Native* native, const Segment* segment, int64_t itemsize, const char* stored,
    const double* carry, int64_t carried
) noexcept nogil:
    """Check pointers, and that nothing within a segment overlaps. Overlaps between segments
    are not checked, which would take longer than many a step."""
    cdef int64_t i, j, count = native.about.state_count
    cdef int64_t begin[MOST_COLUMNS]
    cdef int64_t width[MOST_COLUMNS]
    if segment.n < 0 or segment.n >> 56:  # more bytes than addresses
        return BAD_ARGUMENT
    if segment.n == 0:
        return OK
    if bad_pointer(segment.state, count):
        return BAD_ARGUMENT
    begin[0] = <int64_t> segment.p
    for i in range(count):
        begin[1 + i] = <int64_t> segment.state[i]
    for i in range(1 + count):
        if begin[i] == 0:
            return BAD_ARGUMENT
    begin[1 + count] = <int64_t> segment.g
    for i in range(2 + count):
        width[i] = itemsize
    if stored and stored[0]:
        width[0] = native_codecs[<int> stored[0]].width
    if stored and stored[1]:
        width[1 + count] = native_codecs[<int> stored[1]].width
    for i in range(2 + count):
        if begin[i] % width[i]:
            return BAD_ARGUMENT
        for j in range(i):
            if (
                begin[i] - begin[j] < segment.n * width[j]
                and begin[j] - begin[i] < segment.n * width[i]
            ):
                return OVERLAP
        if (
            carried and begin[i] - <int64_t> carry < 8 * carried
            and <int64_t> carry - begin[i] < segment.n * width[i]
        ):
            return OVERLAP
    return OK


cdef int check_all(
    const Native* native, int dtype, const double* given, const double* carry,
    const Segment* segments, const char* stored, int64_t count
) noexcept nogil:
    cdef int64_t i, carried
    cdef int code
    if (
        not in_table(native) or (dtype != FLOAT32 and dtype != FLOAT64)
        or count < 0 or count > MOST_SEGMENTS
        or bad_pointer(segments, count)
        or bad_pointer(given, native.about.hyperparameter_count)
        or bad_pointer(carry, native.about.carry_count)
    ):
        return BAD_ARGUMENT
    for i in range(2 * count if stored else 0):
        if not 0 <= stored[i] < STORED_COUNT or (stored[i] and dtype != FLOAT32):
            return BAD_ARGUMENT
    code = check_hyperparameters(native, given)
    carried = native.about.carry_count * (count if native.by_segment else 1)
    for i in range(count if code == OK else 0):
        code = check_segment(
            native, &segments[i], 8 if dtype == FLOAT64 else 4,
            stored + 2 * i if stored else NULL, carry, carried,
        )
        if code != OK:
            return code
    return code


cdef double first_value(
    const Native* native, int64_t k, const double* given
) noexcept nogil:
    cdef int64_t of = native.first_of[k]
    return native.first[k] if of == A_NUMBER else given[of]


cdef int native_start(
    const Rule* rule, int dtype, const double* given, double* carry,
    const Segment* segments, int64_t count
) noexcept nogil:
    cdef const Native* native = <const Native*> rule
    cdef int64_t i, j, k, states, carried
    cdef double value
    cdef uint64_t modes = fastopt_enter()
    cdef int code = check_all(native, dtype, given, carry, segments, NULL, count)
    if code != OK:
        fastopt_leave(modes)
        return code
    states, carried = rule.state_count, rule.carry_count
    for i in range(count):
        for k in range(states if segments[i].n else 0):
            if native.first_of[k] == THE_PARAMETER:
                memcpy(
                    segments[i].state[k], segments[i].p,
                    segments[i].n * (8 if dtype == FLOAT64 else 4),
                )
                continue
            value = first_value(native, k, given)
            for j in range(segments[i].n):
                if dtype == FLOAT64:
                    (<double*> segments[i].state[k])[j] = value
                else:
                    (<float*> segments[i].state[k])[j] = <float> value
    for i in range(count if native.by_segment else 1):
        for k in range(carried):
            carry[i * carried + k] = first_value(native, states + k, given)
    fastopt_leave(modes)
    return OK


cdef int compute_all(
    Job* job, const Native* native, const double* hyperparameters, const double* carry
) noexcept nogil:
    """Compute the scalars of each set, and check that the dtype has them. Return how many
    there are, with what is carried, or -1."""
    cdef int64_t s, k
    cdef int returned = 0
    cdef double taken[MOST_NUMBERS]
    cdef double* numbers = job.numbers
    memcpy(
        taken + job.carried, hyperparameters,
        native.about.hyperparameter_count * sizeof(double),
    )
    for s in range(job.sets):
        memcpy(taken, carry + s * job.carried, job.carried * sizeof(double))
        returned = job.scalars(job.steps[s], taken, numbers)
        for k in range(returned - job.carried):
            if not job.double and isfinite(numbers[k]) and not isfinite(<float> numbers[k]):
                return -1  # as Python says when an optimizer is made
        if returned < 0:
            return -1
        numbers += job.stride
    return returned


cdef int settle_all(Job* job, double* carry) noexcept nogil:
    """Take the sums over all segments, and settle, if anything was summed up."""
    cdef int64_t r, k, chunks, n = 0
    cdef double total[MOST_NUMBERS]
    cdef Rows rows = rows_from(job, 0, INT64_MAX)
    cdef const double* partials
    if rows.given == 0:
        return OK
    if not make_room(job, rows.chunks, job.terms):
        return NO_MEMORY
    put_row(job, 0, job.factors[0], 0, job.measured)
    measure_all(job, rows, job.measure, job.terms)
    memset(total, 0, sizeof(total))
    partials = job.partials
    for r in range(job.rows):
        if job.table[r * job.columns + 1]:
            chunks = chunks_of(job.table[(r + 1) * job.columns - 2])
            for k in range(job.terms):
                total[k] += in_chunks(partials + k, job.terms, chunks)
            partials += chunks * job.terms
            n += job.table[(r + 1) * job.columns - 2]
    return OK if settle(job, 0, n, total, carry) else BAD_HYPERPARAMETER


cdef int do_job(
    Job* job, const Native* native, const double* hyperparameters, double* carry
) noexcept nogil:
    cdef int64_t s
    cdef int code = OK
    cdef int returned = compute_all(job, native, hyperparameters, carry)
    if returned < 0:
        return BAD_HYPERPARAMETER
    job.handed = returned - job.settle_count
    if job.settle and native.by_segment:
        return step_in_batches(job, carry, carry)
    if job.settle:
        code = settle_all(job, carry)
        if code != OK:
            return code
    for s in range(job.sets):
        put_row(job, s, job.factors[s], 0, job.scalar_count)
        if not job.settle:
            memcpy(
                carry + s * job.carried,
                job.numbers + s * job.stride + returned - job.carried,
                job.carried * sizeof(double),
            )
    update_all(job)
    return OK


cdef int native_step(
    const Rule* rule, int dtype, int64_t t, const double* hyperparameters, double* carry,
    const Segment* segments, int64_t count, double grad_scale, int threads
) noexcept nogil:
    if threads < 0 or threads > MOST_THREADS:
        return BAD_ARGUMENT
    return native_step_on(
        rule, dtype, t, hyperparameters, carry, segments, count, grad_scale,
        threads if threads else default_threads, NULL, NULL,
    )


cdef int native_step_on(
    const Rule* rule, int dtype, int64_t t, const double* hyperparameters, double* carry,
    const Segment* segments, int64_t count, double grad_scale, int parts, Run run,
    void* context
) noexcept nogil:
    return native_step_stored(
        rule, dtype, t, hyperparameters, carry, segments, NULL, count, grad_scale, parts,
        run, context,
    )


cdef int native_step_stored(
    const Rule* rule, int dtype, int64_t t, const double* hyperparameters, double* carry,
    const Segment* segments, const char* stored, int64_t count, double grad_scale,
    int parts, Run run, void* context
) noexcept nogil:
    cdef uint64_t modes = fastopt_enter()
    cdef int code = step_stored(
        rule, dtype, t, hyperparameters, carry, segments, stored, count, grad_scale, parts,
        run, context,
    )
    fastopt_leave(modes)
    return code


cdef void note_stored(Job* job, const Native* native, const char* stored) noexcept nogil:
    """Note how parameters and gradients are stored. There is room for the streams, which
    are plain so far."""
    cdef int64_t r, c
    cdef Stream* stream
    cdef const Codec* codec
    job.encoded, job.block = True, ENCODED_BLOCK
    for r in range(job.rows):
        job.fused[r] = native.fused[<int> stored[2 * r]][<int> stored[2 * r + 1]]
        for c in range(2):
            if stored[2 * r + c]:
                codec, stream = &native_codecs[<int> stored[2 * r + c]], stream_of(job, r, c)
                stream.make, stream.load, stream.width = load_block, codec.load, codec.width
                stream.store = codec.store if c == 0 else NULL
                stream.parts[0] = job.table[r * job.columns + c]


cdef int step_stored(
    const Rule* rule, int dtype, int64_t t, const double* hyperparameters, double* carry,
    const Segment* segments, const char* stored, int64_t count, double grad_scale,
    int parts, Run run, void* context
) noexcept nogil:
    cdef const Native* native = <const Native*> rule
    cdef Job job
    cdef int64_t r, k, words, made
    cdef int64_t* row
    cdef int code = check_all(
        native, dtype, hyperparameters, carry, segments, stored, count
    )
    if code != OK:
        return code
    if t < 1 or parts < 1 or (not run and parts > MOST_THREADS):
        return BAD_ARGUMENT
    memset(&job, 0, sizeof(job))
    job.double = dtype == FLOAT64
    job.itemsize = 8 if job.double else 4
    job.tools = &native_tools[job.double]
    job.kernel, job.finish = native.kernels[job.double], native.finishes[job.double]
    job.measure, job.begin = native.measures[job.double], native.begins[job.double]
    job.scalars, job.settle = native.scalars, native.settle
    job.apart, job.block = native_apart, BLOCK
    job.rows, job.columns = count, 4 + rule.state_count
    job.sets = count if native.by_segment else 1
    job.scalar_count, job.measured = native.scalar_count, native.measured
    job.terms, job.carried = native.terms, rule.carry_count
    job.settle_count = native.settle_count
    job.width = 1 + max(job.scalar_count, job.measured)
    job.stride = job.width + MOST_NUMBERS
    job.threads, job.run, job.context = parts, run, context
    if not run and fastopt_process() != process:
        job.threads = 1  # after a fork, OpenMP's threads are in the parent
    words = count * (job.columns + 1) + job.sets * (2 + job.stride + job.width)
    made = count * (1 + (job.columns - 2) * sizeof(Stream) // 8) if stored else 0
    job.table = <int64_t*> calloc(words + made + 1, 8)
    if not job.table:
        return NO_MEMORY
    job.kept_at = job.table + count * job.columns
    job.factors = <double*> (job.kept_at + count)
    job.steps = <int64_t*> (job.factors + job.sets)
    job.numbers = <double*> (job.steps + job.sets)
    job.constants = <char*> (job.numbers + job.sets * job.stride)
    for r in range(count):
        row = job.table + r * job.columns
        row[0], row[1] = <int64_t> segments[r].p, <int64_t> segments[r].g
        for k in range(rule.state_count if segments[r].n else 0):
            row[2 + k] = <int64_t> segments[r].state[k]
        row[job.columns - 2] = segments[r].n
        row[job.columns - 1] = r if native.by_segment else 0
        job.given += segments[r].n if row[1] else 0
    for r in range(job.sets):
        job.factors[r], job.steps[r] = grad_scale, t
    if stored:
        job.fused = <kernel_t*> (job.table + words)
        job.streams = <Stream*> (job.fused + count)
        note_stored(&job, native, stored)
    code = do_job(&job, native, hyperparameters, carry)
    clear(&job)
    free(job.table)
    return code


cdef void* room(size_t nbytes) except NULL:
    cdef void* found = calloc(nbytes + 1, 1)
    if not found:
        raise MemoryError("no memory for the table of rules")
    return found


cdef const char* lasting(str name) except NULL:
    kept.append(name.encode())
    return kept[len(kept) - 1]


cdef const char** all_lasting(names) except NULL:
    cdef const char** found = <const char**> room(len(names) * sizeof(char*))
    cdef int64_t k
    for k in range(len(names)):
        found[k] = lasting(names[k])
    return found


cdef Native* native_of(Kernels kernels, entry) except NULL:
    """Make the native form of a rule from an Entry of native.py."""
    cdef Native* native = <Native*> room(sizeof(Native))
    cdef Rule* about = &native.about
    cdef double* defaults
    cdef int64_t k, p, g
    cdef bint double
    about.name = lasting(entry.name)
    about.state = all_lasting(entry.state)
    about.hyperparameters = all_lasting(list(entry.hyperparameters))
    about.carry = all_lasting(entry.carry)
    about.state_count = len(entry.state)
    about.hyperparameter_count = len(entry.hyperparameters)
    about.carry_count = len(entry.carry)
    about.carry_per_segment = native.by_segment = entry.by_segment
    native.scalar_count, native.measured = entry.scalar_count, entry.measure_count
    native.terms, native.settle_count = entry.terms, entry.settle_count
    native.scalars = scalar_named(entry.scalars).function
    if entry.settle is not None:
        native.settle = scalar_named(entry.settle).function
    for double in (False, True):
        native.kernels[double] = <kernel_t> kernels.find(entry.update, double)
        if entry.measure is not None:
            native.measures[double] = <measure_t> kernels.find(entry.measure, double)
        if entry.begin is not None:
            native.begins[double] = <measure_t> kernels.find(entry.begin, double)
            native.finishes[double] = <kernel_t> kernels.find(entry.finish, double)
    for p in range(STORED_COUNT):
        for g in range(STORED_COUNT):
            names = [STORED[p], STORED[g], *["fp32"] * len(entry.state)]
            fused = kernels.look_up("_".join([entry.update, *names]), False)
            native.fused[p][g] = <kernel_t> fused
    native.fused[STORED_PLAIN][STORED_PLAIN] = native.kernels[False]
    defaults = <double*> room(about.hyperparameter_count * sizeof(double))
    native.least = <double*> room(about.hyperparameter_count * sizeof(double))
    native.below = <double*> room(about.hyperparameter_count * sizeof(double))
    native.flags = <char*> room(about.hyperparameter_count)
    native.off = <char*> room(about.hyperparameter_count)
    for k, (name, default) in enumerate(entry.hyperparameters.items()):
        defaults[k] = default
        native.least[k], native.below[k] = entry.limits[name]
        native.flags[k] = isinstance(default, bool)
        native.off[k] = name in entry.off
    about.defaults = defaults
    native.first = <double*> room(len(entry.starts) * sizeof(double))
    native.first_of = <int64_t*> room(len(entry.starts) * sizeof(int64_t))
    for k, start in enumerate(entry.starts):
        native.first_of[k] = A_NUMBER
        if start == "p":
            native.first_of[k] = THE_PARAMETER
        elif isinstance(start, str):
            native.first_of[k] = list(entry.hyperparameters).index(start)
        else:
            native.first[k] = start
    return native


def native_table(
    Kernels kernels, list entries, int threads, bint forked, int64_t last_cache
):
    """Make the table, in a capsule. It is made once and lives as long as the process."""
    global default_threads, process, native_tools, native_apart
    cdef const Rule** rules = <const Rule**> room(len(entries) * sizeof(void*))
    cdef int64_t k
    for k in range(len(entries)):
        rules[k] = &native_of(kernels, entries[k]).about
    kept.append(kernels)
    native_tools, native_apart = kernels.tools, 0 < last_cache < 2 * BATCH
    for k in range(1, STORED_COUNT):
        native_codecs[k].load = <load_t> kernels.find(f"load_{STORED[k]}", False)
        native_codecs[k].store = <store_t> kernels.find(f"store_{STORED[k]}", False)
        native_codecs[k].width = FORMATS[STORED[k]].stored.itemsize
    default_threads = threads
    process = -1 if forked else fastopt_process()
    api.version, api.size, api.isa = API_VERSION, sizeof(Api), kernels.table.isa
    api.rule_count, api.rules = len(entries), rules
    api.find, api.error = native_find, native_error
    api.start, api.step, api.step_on = native_start, native_step, native_step_on
    return PyCapsule_New(&api, "fastopt.native._api", NULL)


def native_step_of_stored():
    """Return the step that xla.pyx calls, in a capsule. The table must have been made."""
    cdef step_stored_t step = native_step_stored
    return PyCapsule_New(<void*> step, STEP_STORED, NULL)


def native_addresses():
    """Return the addresses of the functions in the table by name, for Numba."""
    return {
        "find": <size_t> native_find,
        "start": <size_t> native_start,
        "step": <size_t> native_step,
    }


def native_errors():
    """Return the messages of the error codes, from 0 on."""
    return [native_error(code).decode() for code in range(NO_MEMORY + 1)]
