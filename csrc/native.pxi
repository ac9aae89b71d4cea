# What native code calls, as fastopt.h declares it, and the table of it.

import re

cdef list kept = []  # the names, as bytes


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
            "rule not of this table, the dtype unknown, a format unknown or not one of "
            "this dtype, a row or a first index out of range, the step below 1, the number "
            "of threads below 0 or above 1024, the factor or the limit of the gradients "
            "out of range, the request of another size, or sums of a rule that takes none, "
            "of a step that clips, or of fewer elements than there are"
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


cdef int native_start(
    const Rule* rule, int dtype, const double* hyperparameters, double* carry,
    const Segment* segments, int64_t count
) noexcept nogil:
    cdef uint64_t modes = fastopt_enter()
    cdef Call call = Call(
        <const Native*> rule, dtype, 1, hyperparameters, 1, carry, False, segments, NULL,
        count, 1, Request(sizeof(Request), 1, 0, 0, NULL, NULL),
        NULL, NULL, 0,
    )
    cdef int code = start_call(&call)
    fastopt_leave(modes)
    return code


cdef int native_start_streams(
    const Rule* rule, int dtype, const double* hyperparameters, int64_t rows,
    double* carry, const Streams* segments, int64_t count
) noexcept nogil:
    cdef uint64_t modes = fastopt_enter()
    cdef Call call = Call(
        <const Native*> rule, dtype, 1, hyperparameters, rows, carry, True, NULL, segments,
        count, 1, Request(sizeof(Request), 1, 0, 0, NULL, NULL),
        NULL, NULL, 0,
    )
    cdef int code = start_call(&call)
    fastopt_leave(modes)
    return code


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
    cdef uint64_t modes = fastopt_enter()
    cdef Call call = Call(
        <const Native*> rule, dtype, t, hyperparameters, 1, carry, False, segments, NULL,
        count, grad_scale, Request(sizeof(Request), parts, 0, 0, run, context),
        NULL, NULL, 0,
    )
    cdef int code = step_call(&call) if parts >= 1 else BAD_ARGUMENT
    fastopt_leave(modes)
    return code


cdef int native_step_streams(
    const Rule* rule, int dtype, int64_t t, const double* hyperparameters, int64_t rows,
    double* carry, const Streams* segments, int64_t count, double grad_scale,
    const Request* request
) noexcept nogil:
    cdef uint64_t modes = fastopt_enter()
    cdef Call call = Call(
        <const Native*> rule, dtype, t, hyperparameters, rows, carry, True, NULL, segments,
        count, grad_scale, Request(sizeof(Request), 0, 0, 0, NULL, NULL),
        NULL, NULL, 0,
    )
    cdef int code
    if request:
        call.request = request[0]
    code = step_call(&call)
    fastopt_leave(modes)
    return code


cdef int native_sums(
    const Rule* rule, int dtype, int64_t t, const double* hyperparameters, int64_t rows,
    const double* carry, const Streams* segments, int64_t count, double grad_scale,
    const Request* request, double* sums
) noexcept nogil:
    cdef uint64_t modes = fastopt_enter()
    cdef Call call = Call(
        <const Native*> rule, dtype, t, hyperparameters, rows, <double*> carry, True, NULL,
        segments, count, grad_scale, Request(sizeof(Request), 0, 0, 0, NULL, NULL),
        sums, NULL, 0,
    )
    cdef int code = BAD_ARGUMENT
    if request:
        call.request = request[0]
    if sums:
        code = step_call(&call)
    fastopt_leave(modes)
    return code


cdef int native_step_with_sums(
    const Rule* rule, int dtype, int64_t t, const double* hyperparameters, int64_t rows,
    double* carry, const Streams* segments, int64_t count, double grad_scale,
    const Request* request, const double* sums, int64_t processes
) noexcept nogil:
    cdef uint64_t modes = fastopt_enter()
    cdef Call call = Call(
        <const Native*> rule, dtype, t, hyperparameters, rows, carry, True, NULL, segments,
        count, grad_scale, Request(sizeof(Request), 0, 0, 0, NULL, NULL),
        NULL, sums, processes,
    )
    cdef int code = BAD_ARGUMENT
    if request:
        call.request = request[0]
    if processes >= 1:
        code = step_call(&call)
    fastopt_leave(modes)
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


cdef int enter_formats(Kernels kernels, formats) except -1:
    """Note the formats of fastopt.h: a Stored of native.py for each number."""
    global stored_count
    cdef Stored* format
    cdef int64_t k
    if len(formats) > MOST_FORMATS:
        raise ValueError(f"at most {MOST_FORMATS} formats, got {len(formats)}")
    for entry in formats:
        format = &stored[stored_count]
        if entry.start is not None:
            format.load = <load_t> kernels.find(f"load_{entry.name}", False)
            format.store = <store_t> kernels.find(f"store_{entry.name}", False)
            format.start = <store_t> kernels.find(f"store_{entry.start}", False)
            format.finite = <finite_t> kernels.look_up(f"finite_{entry.name}", False)
        format.part_count = len(entry.parts)
        for k, part in enumerate(entry.parts):
            format.widths[k], format.shared[k] = part
        stored_count += 1
    return 0


cdef int enter_forms(Native* native, Kernels kernels, str update, list names) except -1:
    """Note the kernels that decode and encode in registers for this update. A kernel's name
    is the update's, with the name of a format for each column."""
    cdef int64_t i, k
    cdef Form* form
    native.forms = <Form*> room(kernels.table.count * sizeof(Form))
    column = f"_({'|'.join(names)})"
    pattern = re.compile(update + column * (2 + native.about.state_count))
    for i in range(kernels.table.count):
        found = pattern.fullmatch(kernels.table.entries[i].name.decode())
        if found:
            form = &native.forms[native.form_count]
            form.kernel = <kernel_t> kernels.table.entries[i].functions[0]
            for k, name in enumerate(found.groups()):
                form.formats[k] = names.index(name)
            native.form_count += 1
    return 0


cdef Native* native_of(Kernels kernels, entry, list formats) except NULL:
    """Make the native form of a rule from an Entry of native.py."""
    cdef Native* native = <Native*> room(sizeof(Native))
    cdef Rule* about = &native.about
    cdef double* defaults
    cdef int64_t k
    cdef bint double
    about.name = lasting(entry.name)
    about.state = all_lasting(entry.state)
    about.hyperparameters = all_lasting(list(entry.hyperparameters))
    about.carry = all_lasting(entry.carry)
    about.state_count = len(entry.state)
    about.hyperparameter_count = len(entry.hyperparameters)
    about.carry_count, about.sum_count = len(entry.carry), entry.terms
    about.carry_per_segment = native.by_segment = entry.by_segment
    native.scalar_count, native.measured = entry.scalar_count, entry.measure_count
    native.terms, native.settle_count = entry.terms, entry.settle_count
    native.scalars = scalar_named(entry.scalars).function
    if entry.settle is not None:
        native.settle = scalar_named(entry.settle).function
    if 2 + about.state_count > MOST_STREAMS:
        raise ValueError(f"{entry.name} has more than {MOST_STREAMS - 2} state buffers")
    enter_forms(native, kernels, entry.update, formats)
    for double in (False, True):
        native.kernels[double] = <kernel_t> kernels.find(entry.update, double)
        if entry.measure is not None:
            native.measures[double] = <measure_t> kernels.find(entry.measure, double)
        if entry.begin is not None:
            native.begins[double] = <measure_t> kernels.find(entry.begin, double)
            native.finishes[double] = <kernel_t> kernels.find(entry.finish, double)
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
    Kernels kernels, list entries, formats, int threads, bint forked, int64_t last_cache
):
    """Make the table, in a capsule. It is made once and lives as long as the process."""
    global default_threads, native_contention, process, native_tools, native_apart
    cdef const Rule** rules = <const Rule**> room(len(entries) * sizeof(void*))
    cdef int64_t k
    enter_formats(kernels, formats)
    names = [entry.name for entry in formats]
    for k in range(len(entries)):
        rules[k] = &native_of(kernels, entries[k], names).about
    kept.append(kernels)
    native_tools, native_apart = kernels.tools, 0 < last_cache < 2 * BATCH
    default_threads, native_contention.patience = threads, LEAST_PATIENCE
    process = -1 if forked else fastopt_process()
    api.version, api.size, api.isa = API_VERSION, sizeof(Api), kernels.table.isa
    api.rule_count, api.rules = len(entries), rules
    api.find, api.error = native_find, native_error
    api.start, api.step, api.step_on = native_start, native_step, native_step_on
    api.start_streams, api.step_streams = native_start_streams, native_step_streams
    api.sums, api.step_with_sums = native_sums, native_step_with_sums
    return PyCapsule_New(&api, "fastopt.native._api", NULL)


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


def native_alone():
    """Return how many turns one thread will do because several have been too slow."""
    return native_contention.alone


def native_judge(bint several, double seconds, int64_t n):
    """Note that a turn took so long, for tests."""
    judge(&native_contention, several, seconds, n)
