# cython: language_level=3, cdivision=True
"""A step as a custom call of XLA's, for fastopt/jax/calls.py, or as two of them.

XLA calls a handler of plain C with a frame of pointers (xla_ffi.pxi). XLA checks the
version that we name when the handler is registered; we check what it gives us by its
sizes. Whoever calls the target chooses operands and attributes, so all of them are checked
before any is read.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport isfinite
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strlen

cimport fastopt

cdef extern from *:
    """
    #if defined(_MSC_VER)
      #include <windows.h>
      #define fastopt_add(place, n) InterlockedExchangeAdd((volatile LONG *) (place), n)
      #define fastopt_give_way() SwitchToThread()
    #else
      #include <sched.h>
      #define fastopt_add(place, n) __atomic_fetch_add(place, n, __ATOMIC_ACQ_REL)
      #define fastopt_give_way() sched_yield()
    #endif
    """
    int fetch_add "fastopt_add" (int* place, int n) noexcept nogil
    void give_way "fastopt_give_way" () noexcept nogil

include "xla_ffi.pxi"


# The call -------------------------------------------------------------------------------
#
# Attributes: rule (a name), threads, traced (which of the numbers are operands).
# Operands: the step, from 1 on; numbers (as words: the hyperparameters, the factor for
# the gradients); carry (words); the traced numbers; then p, g and each state buffer of
# all arrays. Results: carry, p and state, in the operands' memory. All arrays are float64,
# or p and g are of float32, bfloat16 and float16 in any mixture, and state is float32.
# Words are the two halves of a float64, which JAX has only if it is told to.
#
# A step in two calls, where each device has a shard of each array: the first has one
# result only, the sums over each array (words), and writes nothing else. The second has
# one operand more, after the carry: the sums of all devices (words), one after the other.

cdef const fastopt.Api* api = NULL

cdef enum:
    MOST_NAME = 64
    MOST_NUMBERS = 64
    MOST_MESSAGE = 256
    MOST_THREADS = 1024  # as in Python
    MOST_ELEMENTS_LOG = 56  # more bytes than addresses
    MOST_ARRAYS = 1 << 28  # as in native code

# What a call is.
cdef enum:
    WHOLE  # a step
    SUMS  # the first of two calls
    REST  # and the second


cdef void* failed(
    const Frame* frame, int code, const char* message, const char* rule = ""
) noexcept nogil:
    cdef char text[MOST_MESSAGE]
    cdef Failure failure
    snprintf(text, MOST_MESSAGE, "fastopt: %s%s", rule, message)
    failure.struct_size, failure.extension = sizeof(Failure), NULL
    failure.message, failure.code = text, code
    return frame.api.fail(&failure)


cdef void* attribute(
    const Frame* frame, const char* name, int kind
) noexcept nogil:
    cdef int64_t k
    cdef Span* here
    for k in range(frame.attributes.size):
        here = frame.attributes.names[k]
        if (
            here.length == strlen(name) and memcmp(here.at, name, here.length) == 0
            and frame.attributes.types[k] == kind
        ):
            return frame.attributes.at[k]
    return NULL


cdef int64_t size_of(const Buffer* buffer) noexcept nogil:
    """How many elements; -1 if that is no number of elements."""
    cdef int64_t k, size = 1
    if buffer.rank < 0 or (buffer.rank and not buffer.dims):
        return -1
    for k in range(buffer.rank):
        if buffer.dims[k] < 0:
            return -1
        if buffer.dims[k] and size > (<int64_t> 1 << MOST_ELEMENTS_LOG) // buffer.dims[k]:
            return -1
        size *= buffer.dims[k]
    return size


cdef bint holds(
    const Buffer* buffer, int dtype, int64_t size, size_t alignment
) noexcept nogil:
    """Whether it is of this dtype and size, and in memory."""
    return (
        buffer.dtype == dtype and size >= 0 and size_of(buffer) == size
        and (size == 0 or (buffer.data and <size_t> buffer.data % alignment == 0))
    )


cdef bint same_shape(const Buffer* a, const Buffer* b) noexcept nogil:
    return a.rank == b.rank and (
        a.rank == 0 or memcmp(a.dims, b.dims, a.rank * sizeof(int64_t)) == 0
    )


cdef bint alike(const Buffer* a, const Buffer* b) noexcept nogil:
    """Whether one has the dtype and shape of the other."""
    return a.dtype == b.dtype and same_shape(a, b)


cdef int64_t format_of(int dtype, bint double) noexcept nogil:
    """Return the format of a parameter or gradient of this dtype, in a step in float64 or
    float32; -1: the step does not take it."""
    if dtype == (F64 if double else F32):
        return fastopt.F64 if double else fastopt.F32
    if dtype == BF16 and not double:
        return fastopt.BF16
    if dtype == F16 and not double:
        return fastopt.FP16
    return -1


cdef bint whole(int dtype, const void* value, int64_t* found) noexcept nogil:
    """An integer, if it is one."""
    if dtype == S64:
        found[0] = (<const int64_t*> value)[0]
    elif dtype == S32:
        found[0] = (<const int32_t*> value)[0]
    else:
        return False
    return True


cdef bint number(const Buffer* buffer, double* found) noexcept nogil:
    """A traced number: of either dtype, or in words."""
    if holds(buffer, F32, 1, sizeof(float)):
        found[0] = (<const float*> buffer.data)[0]
    elif holds(buffer, F64, 1, sizeof(float)) or holds(buffer, U32, 2, sizeof(float)):
        memcpy(found, buffer.data, sizeof(double))
    else:
        return False
    return True


cdef bint buffers(const Buffers* some) noexcept nogil:
    cdef int64_t k
    for k in range(some.size):
        if some.types[k] != BUFFER:
            return False
    return some.size >= 0


# Parts of a step, taken one by one by XLA's threads. Not OpenMP's: each thread of XLA's
# that calls us would have a pool of its own, and they would keep XLA's from their cores.
# The caller takes parts, too, so it never waits for a part that nobody has begun.
cdef struct Parts:
    int next, done, owners  # atomic
    int count
    void (*part)(void* work, int k) noexcept nogil
    void* work


cdef void take(void* data) noexcept nogil:
    cdef Parts* parts = <Parts*> data
    cdef int k = fetch_add(&parts.next, 1)
    while k < parts.count:
        parts.part(parts.work, k)
        fetch_add(&parts.done, 1)
        k = fetch_add(&parts.next, 1)


cdef void leave(Parts* parts, int owners) noexcept nogil:
    if fetch_add(&parts.owners, -owners) == owners:
        free(parts)


cdef void help(void* data) noexcept nogil:
    take(data)
    leave(<Parts*> data, 1)


cdef void run(
    void* context, int count, void (*part)(void* work, int k) noexcept nogil, void* work
) noexcept nogil:
    cdef const Frame* frame = <const Frame*> context
    cdef Parts* parts = <Parts*> malloc(sizeof(Parts))
    cdef Task task
    cdef Destroy destroy
    cdef int k
    if not parts:
        for k in range(count):
            part(work, k)
        return
    parts.next, parts.done, parts.owners, parts.count = 0, 0, count, count
    parts.part, parts.work = part, work
    task.struct_size, task.extension = sizeof(Task), NULL
    task.context, task.task, task.data = frame.context, help, parts
    destroy.struct_size, destroy.extension = sizeof(Destroy), NULL
    for k in range(count - 1):
        destroy.error = frame.api.schedule(&task)
        if destroy.error:  # there is no pool, or it will take no more
            frame.api.destroy(&destroy)
            leave(parts, 1)
    take(parts)
    while fetch_add(&parts.done, 0) < count:
        give_way()
    leave(parts, 1)


cdef const char* misfit(
    const Frame* frame, const fastopt.Rule* rule, int64_t first, int64_t arrays, int what
) noexcept nogil:
    """What is wrong with the operands and results, of which there are as many as should
    be; NULL if nothing is."""
    cdef Buffer** args = frame.args.at
    cdef Buffer** results = frame.results.at
    cdef Buffer* p
    cdef Buffer* operand
    cdef int64_t i, k, rows = arrays if rule.carry_per_segment else 1
    cdef bint double = arrays > 0 and args[first].dtype == F64
    cdef size_t itemsize = sizeof(double) if double else sizeof(float)
    cdef int64_t format, plain = fastopt.F64 if double else fastopt.F32
    cdef int64_t sums = 2 * arrays * (1 + rule.sum_count)
    if not holds(args[1], U32, 2 * (rule.hyperparameter_count + 1), sizeof(uint32_t)):
        return "the numbers must be uint32, two for each"
    if not holds(args[2], U32, 2 * rule.carry_count * rows, sizeof(double)):
        return "the carry must be uint32, two for each number of each row"
    if what == REST and not (
        holds(args[3], U32, size_of(args[3]), sizeof(double))
        and (size_of(args[3]) % sums == 0 if sums else size_of(args[3]) == 0)
    ):
        return "the sums must be uint32, as many as each device has"
    if what != SUMS and not alike(args[2], results[0]):
        return "a result is not like its operand"
    for i in range(arrays):
        p = args[first + i]
        for k in range(2 + rule.state_count):
            operand = args[first + k * arrays + i]
            format = format_of(operand.dtype, double)
            if format < 0 or (k >= 2 and format != plain):
                return (
                    "parameters and gradients must be float32, bfloat16 or float16 and "
                    "state float32, or all of them float64"
                )
            if not holds(
                operand, operand.dtype, size_of(p),
                itemsize if format == plain else sizeof(uint16_t),
            ):
                return "parameters, gradients and state differ in size"
            if not same_shape(p, operand):
                return "parameters, gradients and state differ in shape"
            # There are no results for gradients.
            if what != SUMS and k != 1 and not alike(
                operand, results[1 + (k - (k > 1)) * arrays + i]
            ):
                return "a result is not like its operand"
    # XLA promises that these share their memory.
    for k in range(frame.results.size if what != SUMS else 0):
        i = k - 1 if k <= arrays else k - 1 + arrays
        i = 2 if k == 0 else first + i
        if args[i].data != results[k].data and size_of(args[i]):
            return "XLA did not alias the operands"
    return NULL


# What of a call the steps below take.
cdef struct Given:
    const Frame* frame
    const fastopt.Rule* rule
    int64_t t
    const double* numbers  # the hyperparameters, the factor for the gradients
    double* carry
    Buffer** at  # p, g and each state buffer of all arrays
    int64_t arrays
    bint double
    int threads
    double* sums  # those of all devices, or where they go
    int64_t devices


cdef int step_plain(const Given* given) noexcept nogil:
    """A step over arrays that all have the dtype that it computes in."""
    cdef int64_t i, k, states = given.rule.state_count, arrays = given.arrays
    cdef void** pointers
    cdef int code
    cdef fastopt.Segment* segments = <fastopt.Segment*> malloc(
        arrays * (sizeof(fastopt.Segment) + states * sizeof(void*)) + 1
    )
    if not segments:
        return fastopt.NO_MEMORY
    pointers = <void**> (segments + arrays)
    for i in range(arrays):
        segments[i].p = given.at[i].data
        segments[i].g = given.at[arrays + i].data
        segments[i].state = pointers + i * states
        segments[i].n = size_of(given.at[i])
        for k in range(states):
            pointers[i * states + k] = given.at[(2 + k) * arrays + i].data
    code = api.step_on(
        given.rule,
        fastopt.FLOAT64 if given.double else fastopt.FLOAT32,
        given.t,
        given.numbers,
        given.carry,
        segments,
        arrays,
        given.numbers[given.rule.hyperparameter_count],
        given.threads,
        run,
        <void*> given.frame,
    )
    free(segments)
    return code


cdef int step_streams(const Given* given, int what) noexcept nogil:
    """A step over arrays of which some may be stored in fewer bits, or a part of one."""
    cdef int64_t i, k, columns = 2 + given.rule.state_count, arrays = given.arrays
    cdef const Buffer* buffer
    cdef fastopt.Stream* streams
    cdef fastopt.Request request
    cdef int code, dtype = fastopt.FLOAT64 if given.double else fastopt.FLOAT32
    cdef double factor = given.numbers[given.rule.hyperparameter_count]
    cdef fastopt.Streams* segments = <fastopt.Streams*> malloc(
        arrays * (sizeof(fastopt.Streams) + columns * sizeof(fastopt.Stream)) + 1
    )
    if not segments:
        return fastopt.NO_MEMORY
    streams = <fastopt.Stream*> (segments + arrays)
    for i in range(arrays):
        segments[i].streams = streams + i * columns
        segments[i].n = size_of(given.at[i])
        segments[i].row = 0
        segments[i].first = 0  # no format of ours draws by it
        for k in range(columns):
            buffer = given.at[k * arrays + i]
            streams[i * columns + k].format = format_of(buffer.dtype, given.double)
            streams[i * columns + k].parts[0] = buffer.data
    memset(&request, 0, sizeof(request))
    request.size, request.threads = sizeof(request), given.threads
    request.run, request.context = run, <void*> given.frame
    if what == SUMS:
        code = api.sums(
            given.rule, dtype, given.t, given.numbers, 1, given.carry, segments, arrays,
            factor, &request, given.sums,
        )
    elif what == REST:
        code = api.step_with_sums(
            given.rule, dtype, given.t, given.numbers, 1, given.carry, segments, arrays,
            factor, &request, given.sums, given.devices,
        )
    else:
        code = api.step_streams(
            given.rule, dtype, given.t, given.numbers, 1, given.carry, segments, arrays,
            factor, &request,
        )
    free(segments)
    return code


cdef void* step(const Frame* frame, int what) noexcept nogil:
    cdef Buffer** args = frame.args.at
    cdef Span* name = <Span*> attribute(frame, "rule", ATTR_STRING)
    cdef Scalar* threads = <Scalar*> attribute(frame, "threads", ATTR_SCALAR)
    cdef Array* traced = <Array*> attribute(frame, "traced", ATTR_ARRAY)
    cdef char text[MOST_NAME + 2]
    cdef double numbers[MOST_NUMBERS]
    cdef bint taken[MOST_NUMBERS]
    cdef const char* wrong
    cdef const fastopt.Rule* rule
    cdef Given given
    cdef bint stored = False
    cdef int64_t k, at, count, arrays, first, rest, t, parts, leading = 3 + (what == REST)
    cdef int code
    cdef double none = 0
    if not name or name.length >= MOST_NAME or not threads or not traced:
        return failed(frame, INVALID_ARGUMENT, "an attribute is missing")
    if not whole(threads.dtype, threads.value, &parts):
        return failed(frame, INVALID_ARGUMENT, "threads must be an integer")
    if parts < 1 or parts > MOST_THREADS:
        return failed(frame, INVALID_ARGUMENT, "threads must be from 1 to 1024")
    if traced.dtype != S64 or traced.size > MOST_NUMBERS:
        return failed(frame, INVALID_ARGUMENT, "traced must be a few int64")
    memcpy(text, name.at, name.length)
    text[name.length] = 0
    rule = api.find(text) if strlen(text) == name.length else NULL
    if not rule:
        return failed(frame, INVALID_ARGUMENT, "there is no such rule")
    count = rule.hyperparameter_count
    first = leading + <int64_t> traced.size
    rest = frame.args.size - first
    arrays = rest // (2 + rule.state_count) if rest > 0 else 0
    if what != WHOLE and rule.sum_count == 0:
        return failed(frame, INVALID_ARGUMENT, "the rule takes no sums")
    if what == SUMS and not (  # before its operands, whose number this confirms
        frame.results.size == 1 and buffers(&frame.results) and arrays <= MOST_ARRAYS
        and holds(
            frame.results.at[0], U32, 2 * arrays * (1 + rule.sum_count), sizeof(double)
        )
    ):
        return failed(
            frame, INVALID_ARGUMENT,
            "the sums must be uint32, two for each number of each array",
        )
    if (
        count + 1 > MOST_NUMBERS or rest != (2 + rule.state_count) * arrays
        or frame.results.size != (
            1 if what == SUMS else 1 + (1 + rule.state_count) * arrays
        )
        or not buffers(&frame.args) or not buffers(&frame.results)
    ):
        return failed(frame, INVALID_ARGUMENT, "the operands do not fit the rule")
    wrong = misfit(frame, rule, first, arrays, what)
    if wrong:
        return failed(frame, INVALID_ARGUMENT, wrong)
    if not (
        holds(args[0], S32, 1, sizeof(int32_t)) or holds(args[0], S64, 1, sizeof(int64_t))
    ) or not whole(args[0].dtype, args[0].data, &t):
        return failed(frame, INVALID_ARGUMENT, "the step must be an integer")
    if t < 1:
        return failed(frame, INVALID_ARGUMENT, "the step must be at least 1")
    memcpy(numbers, args[1].data, (count + 1) * sizeof(double))
    memset(taken, 0, sizeof(taken))
    for k in range(first - leading):
        at = (<const int64_t*> traced.data)[k]
        if at < 0 or at > count or taken[at]:
            return failed(
                frame, INVALID_ARGUMENT, "traced has an index out of range, or twice"
            )
        taken[at] = True
        if not number(args[leading + k], &numbers[at]):
            return failed(frame, INVALID_ARGUMENT, "a traced number is not a scalar")
    given.frame, given.rule, given.t = frame, rule, t
    given.numbers, given.carry = numbers, <double*> args[2].data
    given.at, given.arrays, given.threads = args + first, arrays, <int> parts
    given.double = arrays > 0 and given.at[0].dtype == F64
    given.sums, given.devices = &none, 1  # of no arrays
    if arrays and what != WHOLE:
        given.sums = <double*> (frame.results.at[0] if what == SUMS else args[3]).data
        if what == REST:
            given.devices = size_of(args[3]) // (2 * arrays * (1 + rule.sum_count))
    for k in range(2 * arrays):
        stored |= given.at[k].dtype == BF16 or given.at[k].dtype == F16
    if stored and not isfinite(<float> numbers[count]):  # which step_streams refuses
        return failed(
            frame, INVALID_ARGUMENT,
            "grad_scale must be finite in float32 if some arrays have 16 bits",
        )
    # Tables of plain arrays are smaller, which counts where there are many small ones.
    if stored or what != WHOLE:
        code = step_streams(&given, what)
    else:
        code = step_plain(&given)
    if code == fastopt.NO_MEMORY:
        return failed(frame, RESOURCE_EXHAUSTED, api.error(code))
    if code != fastopt.OK:
        memcpy(text + name.length, ": ", 3)
        return failed(frame, INVALID_ARGUMENT, api.error(code), text)
    return NULL


cdef void* handled(Frame* frame, int what) noexcept nogil:
    cdef Extension* extension = frame.extension
    cdef Metadata* metadata
    while extension:
        if extension.type == METADATA:
            metadata = (<MetadataExtension*> extension).metadata
            metadata.version.major, metadata.version.minor = 0, 1
            metadata.traits = 0
            return NULL
        extension = extension.next
    if frame.struct_size < sizeof(Frame):
        return failed(frame, INTERNAL, "XLA's call frame is not the known one")
    if frame.stage != EXECUTE:
        return NULL
    return step(frame, what)


cdef void* step_handler(Frame* frame) noexcept nogil:
    return handled(frame, WHOLE)


cdef void* sums_handler(Frame* frame) noexcept nogil:
    return handled(frame, SUMS)


cdef void* rest_handler(Frame* frame) noexcept nogil:
    return handled(frame, REST)


def targets():
    """Return the handlers by name, as jax.ffi.register_ffi_target takes them."""
    global api
    api = fastopt.load()
    return {
        "fastopt_step": PyCapsule_New(<void*> step_handler, NULL, NULL),
        "fastopt_sums": PyCapsule_New(<void*> sums_handler, NULL, NULL),
        "fastopt_step_with_sums": PyCapsule_New(<void*> rest_handler, NULL, NULL),
    }
