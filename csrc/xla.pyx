# cython: language_level=3, cdivision=True
"""A step as a custom call of XLA's, for fastopt/jax.py.

XLA calls a handler of plain C with a frame of pointers. Its structures are declared here,
as far as they are read, so that no jaxlib is needed to build: this is version 0.1 of
XLA's typed FFI, which grows at the ends. XLA checks the version that we name when the
handler is registered; we check what it gives us by its sizes.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, strlen

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
    F32 = 11
    F64 = 12
    ATTR_ARRAY = 1
    ATTR_SCALAR = 3
    ATTR_STRING = 4
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
# all arrays. Results: carry, p and state, in the operands' memory.
# Words are the two halves of a float64, which JAX has only if it is told to.

cdef const fastopt.Api* api = NULL

cdef enum:
    MOST_NAME = 64
    MOST_NUMBERS = 64
    MOST_MESSAGE = 256


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
    cdef int64_t k, size = 1
    for k in range(buffer.rank):
        size *= buffer.dims[k]
    return size


cdef int64_t whole(int dtype, const void* value) noexcept nogil:
    return (<const int64_t*> value)[0] if dtype == S64 else (<const int32_t*> value)[0]


cdef bint number(const Buffer* buffer, double* found) noexcept nogil:
    """A traced number: of either dtype, or in words."""
    cdef int64_t size = size_of(buffer)
    if buffer.dtype == F32 and size == 1:
        found[0] = (<const float*> buffer.data)[0]
    elif (buffer.dtype == F64 and size == 1) or (buffer.dtype == U32 and size == 2):
        memcpy(found, buffer.data, sizeof(double))
    else:
        return False
    return True


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


cdef void* step(const Frame* frame) noexcept nogil:
    cdef Buffer** args = frame.args.at
    cdef Buffer** results = frame.results.at
    cdef Span* name = <Span*> attribute(frame, "rule", ATTR_STRING)
    cdef Scalar* threads = <Scalar*> attribute(frame, "threads", ATTR_SCALAR)
    cdef Array* traced = <Array*> attribute(frame, "traced", ATTR_ARRAY)
    cdef char text[MOST_NAME + 2]
    cdef double numbers[MOST_NUMBERS]
    cdef const fastopt.Rule* rule
    cdef fastopt.Segment* segments
    cdef void** pointers
    cdef int64_t i, k, at, count, arrays, first, places
    cdef int code
    if not name or name.length >= MOST_NAME or not threads or not traced:
        return failed(frame, INTERNAL, "an attribute is missing")
    memcpy(text, name.at, name.length)
    text[name.length] = 0
    rule = api.find(text)
    if not rule:
        return failed(frame, INTERNAL, "there is no such rule")
    count = rule.hyperparameter_count
    first = 3 + traced.size
    arrays = (frame.args.size - first) // (2 + rule.state_count)
    places = 1 + (1 + rule.state_count) * arrays
    if (
        count + 1 > MOST_NUMBERS or size_of(args[1]) != 2 * (count + 1)
        or frame.args.size != first + (2 + rule.state_count) * arrays
        or frame.results.size != places
    ):
        return failed(frame, INTERNAL, "the operands do not fit the rule")
    memcpy(numbers, args[1].data, (count + 1) * sizeof(double))
    for k in range(<int64_t> traced.size):
        at = (<const int64_t*> traced.data)[k]
        if not number(args[3 + k], &numbers[at]):
            return failed(frame, INTERNAL, "a traced number is not a scalar")
    # XLA promises that these share their memory.
    for k in range(places):
        i = k - 1 if k <= arrays else k - 1 + arrays
        i = 2 if k == 0 else first + i
        if args[i].data != results[k].data and size_of(args[i]):
            return failed(frame, INTERNAL, "XLA did not alias the operands")
    segments = <fastopt.Segment*> malloc(
        arrays * (sizeof(fastopt.Segment) + rule.state_count * sizeof(void*)) + 1
    )
    if not segments:
        return failed(frame, RESOURCE_EXHAUSTED, "no memory for the table")
    pointers = <void**> (segments + arrays)
    for i in range(arrays):
        segments[i].p = args[first + i].data
        segments[i].g = args[first + arrays + i].data
        segments[i].state = pointers + i * rule.state_count
        segments[i].n = size_of(args[first + i])
        for k in range(rule.state_count):
            pointers[i * rule.state_count + k] = args[first + (2 + k) * arrays + i].data
    code = api.step_on(
        rule,
        fastopt.FLOAT64 if arrays and args[first].dtype == F64 else fastopt.FLOAT32,
        whole(args[0].dtype, args[0].data),
        numbers,
        <double*> args[2].data,
        segments,
        arrays,
        numbers[count],
        <int> whole(threads.dtype, threads.value),
        run,
        <void*> frame,
    )
    free(segments)
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
    if frame.stage != EXECUTE:
        return NULL
    if frame.struct_size < sizeof(Frame):
        return failed(frame, INTERNAL, "XLA's call frame is not the known one")
    return step(frame)


def target():
    """The handler, as jax.ffi.register_ffi_target takes it."""
    global api
    api = fastopt.load()
    return PyCapsule_New(<void*> handler, NULL, NULL)
