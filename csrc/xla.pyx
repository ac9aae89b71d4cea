# cython: language_level=3, cdivision=True
"""A step as a custom call of XLA's, for fastopt/jax/__init__.py.

XLA calls a handler of plain C with a frame of pointers. Its structures are declared here,
as far as they are read, so that no jaxlib is needed to build: this is version 0.1 of
XLA's typed FFI, which grows at the ends. XLA checks the version that we name when the
handler is registered; we check what it gives us by its sizes. Whoever calls the target
chooses operands and attributes, so all of them are checked before any is read.
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

# XLA's structures -----------------------------------------------------------------------

cdef enum:
    METADATA = 1  # the type of an extension: XLA asks what we are
    EXECUTE = 3  # the stage
    S32 = 4
    S64 = 5
    U32 = 8
    F16 = 10
    F32 = 11
    F64 = 12
    BF16 = 16
    ATTR_ARRAY = 1
    ATTR_SCALAR = 3
    ATTR_STRING = 4
    BUFFER = 1  # the type of an operand or a result
    INVALID_ARGUMENT = 3  # codes of errors
    RESOURCE_EXHAUSTED = 8
    INTERNAL = 13

cdef struct Extension:
    size_t struct_size
    int type
    Extension* next

cdef struct Version:
    size_t struct_size
    Extension* extension
    int major, minor

cdef struct Metadata:
    size_t struct_size
    Version version
    uint32_t traits

cdef struct MetadataExtension:
    Extension base
    Metadata* metadata

cdef struct Failure:
    size_t struct_size
    Extension* extension
    const char* message
    int code

ctypedef void* (*fail_t)(Failure* failure) noexcept nogil

ctypedef void (*task_t)(void* data) noexcept nogil

cdef struct Task:
    size_t struct_size
    Extension* extension
    void* context
    task_t task
    void* data

cdef struct Destroy:
    size_t struct_size
    Extension* extension
    void* error

cdef struct XlaApi:
    size_t struct_size
    Extension* extension
    Version version
    void* internal
    fail_t fail
    void* get_message
    void (*destroy)(Destroy* args) noexcept nogil
    void* others[8]
    void* (*schedule)(Task* task) noexcept nogil  # returns an error, or NULL

cdef struct Buffer:
    size_t struct_size
    Extension* extension
    int dtype
    void* data
    int64_t rank
    int64_t* dims

cdef struct Buffers:  # XLA's Args and Rets
    size_t struct_size
    Extension* extension
    int64_t size
    int* types
    Buffer** at

cdef struct Span:
    const char* at
    size_t length

cdef struct Scalar:
    int dtype
    void* value

cdef struct Array:
    int dtype
    size_t size
    void* data

cdef struct Attributes:
    size_t struct_size
    Extension* extension
    int64_t size
    int* types
    Span** names
    void** at

cdef struct Frame:
    size_t struct_size
    Extension* extension
    const XlaApi* api
    void* context
    int stage
    Buffers args
    Buffers results
    Attributes attributes


# The call -------------------------------------------------------------------------------
#
# Attributes: rule (a name), threads, traced (which of the numbers are operands).
# Operands: the step, from 1 on; numbers (as words: the hyperparameters, the factor for
# the gradients); carry (words); the traced numbers; then p, g and each state buffer of
# all arrays. Results: carry, p and state, in the operands' memory. All arrays are float64,
# or p and g are of float32, bfloat16 and float16 in any mixture, and state is float32.
# Words are the two halves of a float64, which JAX has only if it is told to.

cdef const fastopt.Api* api = NULL

cdef enum:
    MOST_NAME = 64
    MOST_NUMBERS = 64
    MOST_MESSAGE = 256
    MOST_THREADS = 1024  # as in Python
    MOST_ELEMENTS_LOG = 56  # more bytes than addresses


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
    const Frame* frame, const fastopt.Rule* rule, int64_t first, int64_t arrays
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
    if not holds(args[1], U32, 2 * (rule.hyperparameter_count + 1), sizeof(uint32_t)):
        return "the numbers must be uint32, two for each"
    if not holds(args[2], U32, 2 * rule.carry_count * rows, sizeof(double)):
        return "the carry must be uint32, two for each number of each row"
    if not alike(args[2], results[0]):
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
            if k != 1 and not alike(operand, results[1 + (k - (k > 1)) * arrays + i]):
                return "a result is not like its operand"
    # XLA promises that these share their memory.
    for k in range(frame.results.size):
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


cdef int step_stored(const Given* given) noexcept nogil:
    """A step in float32 over arrays of which some are stored in fewer bits."""
    cdef int64_t i, k, columns = 2 + given.rule.state_count, arrays = given.arrays
    cdef const Buffer* buffer
    cdef fastopt.Stream* streams
    cdef fastopt.Request request
    cdef int code
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
            streams[i * columns + k].format = format_of(buffer.dtype, False)
            streams[i * columns + k].parts[0] = buffer.data
    memset(&request, 0, sizeof(request))
    request.size, request.threads = sizeof(request), given.threads
    request.run, request.context = run, <void*> given.frame
    code = api.step_streams(
        given.rule,
        fastopt.FLOAT32,
        given.t,
        given.numbers,
        1,
        given.carry,
        segments,
        arrays,
        given.numbers[given.rule.hyperparameter_count],
        &request,
    )
    free(segments)
    return code


cdef void* step(const Frame* frame) noexcept nogil:
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
    cdef int64_t k, at, count, arrays, first, rest, t, parts
    cdef int code
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
    first = 3 + <int64_t> traced.size
    rest = frame.args.size - first
    arrays = rest // (2 + rule.state_count) if rest > 0 else 0
    if (
        count + 1 > MOST_NUMBERS or rest != (2 + rule.state_count) * arrays
        or frame.results.size != 1 + (1 + rule.state_count) * arrays
        or not buffers(&frame.args) or not buffers(&frame.results)
    ):
        return failed(frame, INVALID_ARGUMENT, "the operands do not fit the rule")
    wrong = misfit(frame, rule, first, arrays)
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
    for k in range(first - 3):
        at = (<const int64_t*> traced.data)[k]
        if at < 0 or at > count or taken[at]:
            return failed(
                frame, INVALID_ARGUMENT, "traced has an index out of range, or twice"
            )
        taken[at] = True
        if not number(args[3 + k], &numbers[at]):
            return failed(frame, INVALID_ARGUMENT, "a traced number is not a scalar")
    given.frame, given.rule, given.t = frame, rule, t
    given.numbers, given.carry = numbers, <double*> args[2].data
    given.at, given.arrays, given.threads = args + first, arrays, <int> parts
    given.double = arrays > 0 and given.at[0].dtype == F64
    for k in range(2 * arrays):
        stored |= given.at[k].dtype == BF16 or given.at[k].dtype == F16
    if stored and not isfinite(<float> numbers[count]):  # which step_streams refuses
        return failed(
            frame, INVALID_ARGUMENT,
            "grad_scale must be finite in float32 if some arrays have 16 bits",
        )
    # Tables of plain arrays are smaller, which counts where there are many small ones.
    code = step_stored(&given) if stored else step_plain(&given)
    if code == fastopt.NO_MEMORY:
        return failed(frame, RESOURCE_EXHAUSTED, api.error(code))
    if code != fastopt.OK:
        memcpy(text + name.length, ": ", 3)
        return failed(frame, INVALID_ARGUMENT, api.error(code), text)
    return NULL


cdef void* handler(Frame* frame) noexcept nogil:
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
    return step(frame)


def target():
    """The handler, as jax.ffi.register_ffi_target takes it."""
    global api
    api = fastopt.load()
    return PyCapsule_New(<void*> handler, NULL, NULL)
