# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False
# cython: cpow=True, emit_code_comments=False
"""Steps over many arrays, for Python (step.pxi) and for native code (native.pxi), with the
kernels of an instruction set, which it gets as a table.

a) A job has a table of segments, a row each. The segments, laid end to end, are cut into
   one stretch a thread, and a stretch where the parameters' first cache line ends. No
   operation here depends on its neighbours, so where the cuts fall does not change a bit.
b) What a step does besides its rule is done block by block, while the block is in the
   cache. Kernels read most streams in memory. Blocks of the others are made in the cache
   just before (blocks.pxi): combined or clipped gradients, factored state, and streams that
   are stored in fewer bits, which are encoded again after the kernel.
c) Rules with sums over each segment go batch by batch: while the threads update one batch,
   they take the sums of the next (docs/performance.md).
d) Each thread sets the modes of arithmetic that bits are promised for, and restores its
   own (arithmetic.h); and has its scratch apart from its stack, which may be small.
"""
from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
)
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport PyObject
from cython.parallel cimport prange
from libc.math cimport INFINITY, isfinite
from libc.stdint cimport INT64_MAX
from libc.stdlib cimport calloc, free, malloc, qsort
from libc.string cimport memcmp, memcpy, memset, strcmp

from fastopt cimport (
    API_VERSION, Api, BAD_ARGUMENT, BAD_HYPERPARAMETER, FLOAT32, FLOAT64, NO_MEMORY, OK,
    OTHER_VARIANT, OVERLAP, Rule, Run, Segment,
)

from functools import partial

from numpy import dtype, empty, ndarray

from fastopt.memory.factored import in_order
from fastopt.memory.formats import format_of
from fastopt.memory.segments import Encoded
from fastopt.step import UNLIMITED

include "table.pxi"
include "scalars.pxi"

cdef extern from *:
    """
    #if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    static int fastopt_has_avx2(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") != 0;
    }
    static int fastopt_has_avx512(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    #else
    static int fastopt_has_avx2(void) { return 0; }
    static int fastopt_has_avx512(void) { return 0; }
    #endif
    #ifdef _WIN32
    static int fastopt_process(void) { return 0; }  /* which cannot be forked */
    #else
    #include <unistd.h>
    static int fastopt_process(void) { return (int) getpid(); }
    #endif
    #ifdef _OPENMP
    #include <omp.h>
    #define FASTOPT_OPENMP 1
    #define fastopt_seconds() omp_get_wtime()
    #else
    #define FASTOPT_OPENMP 0
    #define fastopt_seconds() 0.0
    #endif

    #if defined(__GNUC__)
    #define fastopt_prefetch(address) __builtin_prefetch(address)
    #else
    #define fastopt_prefetch(address) ((void) (address))
    #endif

    /* Each thread has room for blocks of this many float32 streams, or half as many of
       float64. It is not on the stack, which may have 64 KiB only. */
    #define FASTOPT_MOST_MADE 16
    #if defined(_MSC_VER)
      #define FASTOPT_OF_THREAD __declspec(thread)
      #define FASTOPT_ALIGNED __declspec(align(64))
    #else
      #define FASTOPT_OF_THREAD __thread
      #define FASTOPT_ALIGNED __attribute__((aligned(64)))
    #endif
    static FASTOPT_OF_THREAD FASTOPT_ALIGNED double fastopt_scratch[FASTOPT_MOST_MADE / 2 * FASTOPT_CHUNK];
    """
    bint fastopt_has_avx2()
    bint fastopt_has_avx512()
    int fastopt_process() noexcept nogil
    double* fastopt_scratch
    int FASTOPT_MOST_MADE  # the most streams of a segment whose blocks are made
    void fastopt_prefetch(const void* address) noexcept nogil
    bint FASTOPT_OPENMP
    double fastopt_seconds() noexcept nogil

cdef extern from "arithmetic.h":
    uint64_t fastopt_enter() noexcept nogil
    void fastopt_leave(uint64_t word) noexcept nogil

OPENMP = bool(FASTOPT_OPENMP)

cdef enum:
    CUT = 16  # stretches are cut at multiples of this many elements, a line of floats
    MOST_COLUMNS = 64
    MOST_LIMITS = 7  # the most numbers that passes.clip takes
    AT_A_TIME = 4  # tasks whose gradients are decoded, before they are combined
    # Segments whose sums are taken and which are then updated at once have this many bytes
    # at the most, or are one: the second pass finds them in the last cache. If that has
    # room for two batches, no thread waits for another between a batch's update and the
    # next one's sums, so one may read memory while the other writes (docs/performance.md).
    BATCH = 8 << 20


def cpu_supports():
    """The instruction sets of this CPU that kernels exist for, best first."""
    names = []
    if fastopt_has_avx512():
        names.append("avx512")
    if fastopt_has_avx2():
        names.append("avx2")
    return [*names, "baseline"]


def no_kernel(name):
    return LookupError(
        f"no compiled kernel is named {name!r}; the kernels are older than the rules: "
        f"install fastopt again"
    )


# The kernels of any rule, for a dtype.
cdef struct Tools:
    kernel_t limit, approach
    measure_t square
    product_t product
    combine_t combine
    squares_t squares
    gram_t gram


cdef class Kernels:
    """The kernels of an instruction set, from the capsule of their module."""
    cdef const Table* table
    cdef Tools tools[2]
    cdef readonly str ISA

    def __cinit__(self, capsule):
        cdef Tools* tools
        cdef bint double
        self.table = <const Table*> PyCapsule_GetPointer(capsule, CAPSULE)
        self.ISA = self.table.isa.decode()
        for double in (False, True):
            tools = &self.tools[double]
            tools.limit = <kernel_t> self.find("passes_limited", double)
            tools.approach = <kernel_t> self.find("passes_approach", double)
            tools.square = <measure_t> self.find("passes_square", double)
            tools.product = <product_t> self.find("product", double)
            tools.combine = <combine_t> self.find("combine", double)
            tools.squares = <squares_t> self.find("squares", double)
            tools.gram = <gram_t> self.find("gram", double)

    cdef function_t find(self, str name, bint double) except NULL:
        cdef function_t function = self.look_up(name, double)
        if not function:
            raise no_kernel(name)
        return function

    cdef function_t look_up(self, str name, bint double):
        """Return a function, or NULL if there is none."""
        cdef int64_t k
        text = name.encode()
        for k in range(self.table.count):
            if strcmp(self.table.entries[k].name, text) == 0:
                return self.table.entries[k].functions[double]
        return NULL


# A range of rows of the table.
cdef struct Rows:
    int64_t first, last
    int64_t given  # the number of elements with a gradient
    int64_t chunks  # and of chunks of these
    bint kept  # whether begin measures them and finish updates them


# Makes a block of elements [start, start + n) of column c of row r.
ctypedef void (*make_t)(
    const Job* job, int64_t r, int64_t c, int64_t start, int64_t n, char* block
) noexcept nogil

# A stream. If ``make`` is NULL, kernels read it in memory.
cdef struct Stream:
    make_t make
    load_t load  # decodes; NULL: the stream is not encoded
    store_t store  # encodes; NULL: steps do not write to the stream
    finite_t finite  # whether it can be encoded; NULL: groups share no scale
    uint32_t first  # index of its first element, for stochastic rounding
    int64_t width  # bytes of an encoded element, without remainder and scale
    int64_t parts[4]  # what its blocks are made of
    int64_t strides[4]  # bytes of each part for a GROUP of elements; 0: it has no elements


include "contention.pxi"


# All that a step needs. A part of a step whose field is zero is left out.
cdef struct Job:
    const Tools* tools
    kernel_t kernel, finish
    kernel_t* fused  # for each row: reads its streams in memory; NULL: blocks are made
    measure_t measure, begin
    scalars_t scalars, settle
    bint double, clipping, zeroing, apart, encoded
    int64_t itemsize, rows, columns, sets, width
    int64_t scalar_count, measured, terms, carried  # numbers besides the factor; sums
    int64_t settle_count  # numbers that settle takes, the last of those of scalars
    int64_t handed  # numbers before these, which it hands on
    int64_t* table
    int64_t given  # elements with a gradient
    int64_t* averages  # addresses
    make_t gradient  # makes blocks of the gradients; NULL: kernels take them from memory
    Stream* streams  # those of each row; NULL: all are plain
    Stream* copies  # of the parameters in fewer bits, a stream a row; NULL: there are none
    int64_t block  # elements of a block
    int64_t* tasks  # addresses: for each task those of its gradients
    Stream* task_streams  # how these are encoded; NULL: all are plain
    int64_t task_count  # 0: there is one gradient, that in the table
    char* weights
    # For each set: the factor for gradients; what scalars or settle returned, in ``stride``
    # places; the number of this step; what a kernel takes; and what limits values.
    double* factors
    double* numbers
    int64_t stride
    int64_t* steps
    char* constants
    char* limits
    double limit_values[MOST_LIMITS]  # what passes.clip takes besides the gradients
    int64_t limit_count
    char weight[16]  # of an average
    double* partials  # sums of chunks
    char* kept  # what a begin leaves for a finish, of two batches
    int64_t* kept_at  # and its address, for each row
    int threads
    Contention contention  # whether several help
    Run run  # NULL: OpenMP
    void* context


cdef inline void put(const Job* job, char* row, int64_t place, double value) noexcept nogil:
    """Round a number to the dtype, once."""
    if job.double:
        (<double*> row)[place] = value
    else:
        (<float*> row)[place] = <float> value


cdef void put_limits(const Job* job, int64_t s, double factor) noexcept nogil:
    cdef int64_t k
    cdef char* limits = job.limits + s * (1 + MOST_LIMITS) * job.itemsize
    put(job, limits, 0, factor)
    for k in range(job.limit_count):
        put(job, limits, 1 + k, job.limit_values[k])


cdef void put_row(
    const Job* job, int64_t s, double factor, int64_t first, int64_t end
) noexcept nogil:
    """What a kernel takes for a set: the factor and numbers [first, end). With a limit for
    values, the factor is applied before that, and not in the kernel."""
    cdef int64_t k
    cdef const double* numbers = job.numbers + s * job.stride + first
    cdef char* row = job.constants + s * job.width * job.itemsize
    if job.clipping:
        put_limits(job, s, factor)
        factor = 1
    put(job, row, 0, factor)
    for k in range(end - first):
        put(job, row, 1 + k, numbers[k])


cdef inline const char* constants_of(const Job* job, const int64_t* row) noexcept nogil:
    return job.constants + row[job.columns - 1] * job.width * job.itemsize


cdef inline char* limits_of(const Job* job, const int64_t* row) noexcept nogil:
    return job.limits + row[job.columns - 1] * (1 + MOST_LIMITS) * job.itemsize


cdef inline Stream* stream_of(const Job* job, int64_t r, int64_t c) noexcept nogil:
    """The stream of a column, or NULL if all are plain."""
    return job.streams + r * (job.columns - 2) + c if job.streams else NULL


cdef inline int64_t chunks_of(int64_t length) noexcept nogil:
    return (length + CHUNK - 1) // CHUNK


# The update of segments -----------------------------------------------------------------

include "blocks.pxi"


cdef inline void zero(const Job* job, int64_t r, int64_t start, int64_t n) noexcept nogil:
    """Set the gradients of all tasks to zero."""
    cdef int64_t k, address, width
    cdef const Stream* stream
    for k in range(max(<int64_t> 1, job.task_count)):
        address, stream = job.table[r * job.columns + 1], stream_of(job, r, 1)
        if job.task_count:
            address = job.tasks[k * job.rows + r]
            stream = job.task_streams + k * job.rows + r if job.task_streams else NULL
        if address:
            width = stream.width if stream and stream.load else job.itemsize
            memset(<char*> address + start * width, 0, n * width)


cdef inline void move(
    const Job* job, kernel_t kernel, int64_t r, const int64_t* row, bint kept,
    int64_t start, int64_t n
) noexcept nogil:
    """Update these elements with a kernel or, if begin has done the rest, move the
    parameters by what it kept."""
    cdef int64_t pair[2]
    if kept:
        pair[0], pair[1] = row[0], job.kept_at[r]
        job.finish(pair, start, n, constants_of(job, row))
    else:
        kernel(row, start, n, constants_of(job, row))


cdef void move_beside(
    const Job* job, int64_t r, bint kept, int64_t first, int64_t n
) noexcept nogil:
    """Update block by block, with everything else that the step does."""
    cdef const int64_t* row = job.table + r * job.columns
    cdef bint moves = row[1] != 0
    cdef int64_t start = first, m, end = first + n
    cdef int64_t columns = job.columns - 2 if moves and not kept else 1
    cdef int64_t pair[2]
    cdef int64_t local[MOST_COLUMNS]
    while start < end:
        m = min(job.block, end - start)
        make_blocks(job, r, 0, columns, start, m, local)
        if job.encoded:
            prefetch_blocks(job, r, columns, start + m, min(job.block, end - start - m))
        if moves:
            move(job, job.kernel, r, local, kept, start, m)
            store_blocks(job, r, 0, columns, start, m, local)
            if job.copies:
                store_copy(job, r, start, m, local)
        if job.averages:
            pair[0], pair[1] = job.averages[r], local[0]
            job.tools.approach(pair, start, m, job.weight)
        if job.zeroing:
            zero(job, r, start, m)
        start += m


cdef void walk(const Job* job, const Rows* rows, int64_t begin, int64_t end) noexcept nogil:
    """Update elements [begin, end) of these segments, counted from the first to the last."""
    cdef int64_t r, first, last, head, start = 0
    cdef kernel_t kernel = job.kernel
    cdef const int64_t* at
    cdef int64_t local[MOST_COLUMNS + 3]
    cdef const int64_t* row = job.table + rows.first * job.columns
    cdef bint beside = job.gradient or job.zeroing or job.averages or job.copies
    for r in range(rows.first, rows.last):
        if row[1] != 0 or job.averages:
            first = begin - start if begin > start else 0
            last = min(end - start, row[job.columns - 2])
            if job.encoded:  # groups that share a scale belong to one thread
                first = min((first + GROUP - 1) // GROUP * GROUP, row[job.columns - 2])
                last = min((last + GROUP - 1) // GROUP * GROUP, row[job.columns - 2])
            head = 0
            if last - first >= ALIGN_FROM and not job.encoded:
                head = (row[0] + first * job.itemsize) % CACHE_LINE
                if head:
                    head = (CACHE_LINE - head) // job.itemsize
            if job.streams:
                kernel = job.fused[r]
                if rows.kept and stream_of(job, r, 0).make:
                    kernel = NULL
                memcpy(local, row, job.columns * sizeof(int64_t))
                local[job.columns] = stream_of(job, r, 0).first + (
                    job.steps[row[job.columns - 1]] << 32
                )
                local[job.columns + 1] = <int64_t> <size_t> stream_of(job, r, 0).parts
                local[job.columns + 2] = sizeof(Stream) // sizeof(int64_t)
            if beside or (job.streams and not kernel):
                if head:
                    move_beside(job, r, rows.kept, first, head)
                move_beside(job, r, rows.kept, first + head, last - first - head)
            else:
                at = row
                if job.streams:
                    at = local
                if head:
                    move(job, kernel, r, at, rows.kept, first, head)
                if first + head < last:
                    move(job, kernel, r, at, rows.kept, first + head, last - first - head)
            start += row[job.columns - 2]
            if start >= end:
                break
        row += job.columns


cdef int64_t elements(const Job* job, const Rows* rows) noexcept nogil:
    """Count the elements that an update works on: all of them if averages are kept, because
    averages follow parameters without a gradient, too."""
    cdef int64_t r, total = 0
    if job.averages == NULL:
        return rows.given
    for r in range(rows.first, rows.last):
        total += job.table[(r + 1) * job.columns - 2]
    return total


# Sums over segments ---------------------------------------------------------------------

cdef Rows rows_from(const Job* job, int64_t first, int64_t most) noexcept nogil:
    """Return the rows from ``first`` on that have ``most`` bytes together, at least one."""
    cdef int64_t length, r = first
    cdef Rows rows = Rows(first, first, 0, 0, False)
    while r < job.rows:
        length = job.table[(r + 1) * job.columns - 2]
        most -= length * (job.columns - 2 + job.task_count) * job.itemsize
        if most < 0 and r > first:
            break
        if job.table[r * job.columns + 1]:
            rows.given += length
            rows.chunks += chunks_of(length)
        r += 1
    rows.last = r
    return rows


cdef void measure_chunks(
    const Job* job, measure_t measure, int64_t terms, const Rows* rows, int64_t begin,
    int64_t end
) noexcept nogil:
    """Measure chunks [begin, end) of these segments."""
    cdef int64_t r, c, start, n, length, before = 0
    cdef bint square = measure == job.tools.square
    cdef int64_t columns = 2 if square else job.columns - 2
    cdef const int64_t* row = job.table + rows.first * job.columns
    cdef int64_t local[MOST_COLUMNS + 1]
    for r in range(rows.first, rows.last if begin < end else 0):
        if row[1] != 0:
            length = row[job.columns - 2]
            for c in range(max(begin, before), min(end, before + chunks_of(length))):
                start = (c - before) * CHUNK
                n = min(<int64_t> CHUNK, length - start)
                make_blocks(job, r, 1 if square else 0, columns, start, n, local)
                if square:
                    local[0] = local[1]  # the parameters may be encoded; it ignores them
                local[job.columns] = job.kept_at[r]
                measure(
                    local, start, n, constants_of(job, row), job.partials + c * terms
                )
                if measure == job.begin:
                    store_blocks(job, r, 2, columns, start, n, local)
            before += chunks_of(length)
        row += job.columns


cdef double in_chunks(const double* sums, int64_t stride, int64_t chunks) noexcept nogil:
    """Add up the sums of chunks, in their order: first within spans."""
    cdef double total = 0, span
    cdef int64_t first = 0, c
    while first < chunks:
        span = 0
        for c in range(first, min(chunks, first + SPAN)):
            span += sums[c * stride]
        total += span
        first += SPAN
    return total


cdef bint make_room(Job* job, int64_t chunks, int64_t terms) noexcept nogil:
    """Allocate memory for sums. Return whether there was any."""
    job.partials = <double*> malloc((chunks + 1) * terms * sizeof(double))
    return job.partials != NULL


cdef void clear(Job* job) noexcept nogil:
    """Free and reset what belongs to one step."""
    job.clipping = job.zeroing = False
    free(job.partials)
    free(job.kept)
    job.partials, job.kept = NULL, NULL


# Threads --------------------------------------------------------------------------------

ctypedef void (*part_t)(void* work, int k) noexcept nogil

# The update of some rows and the measuring of others, shared among parts: each has
# ``share`` elements of the first and ``chunks`` chunks of the others.
cdef struct Turn:
    Job* job
    Rows batch, after
    measure_t measure
    int64_t terms, total, share, chunks


cdef void in_parts(Job* job, int parts, part_t part, void* work) noexcept nogil:
    cdef int k
    if parts <= 1:
        part(work, 0)
    elif job.run:
        job.run(job.context, parts, part, work)
    else:
        for k in prange(parts, schedule="static", chunksize=1, num_threads=parts):
            part(work, k)


cdef void turn_part(void* work, int k) noexcept nogil:
    cdef const Turn* turn = <const Turn*> work
    cdef int64_t begin = k * turn.share
    cdef uint64_t modes = fastopt_enter()
    measure_chunks(
        turn.job, turn.measure, turn.terms, &turn.after, k * turn.chunks,
        min(turn.after.chunks, (k + 1) * turn.chunks),
    )
    if begin < turn.total:
        walk(turn.job, &turn.batch, begin, min(turn.total, begin + turn.share))
    fastopt_leave(modes)


cdef void take_turn(
    Job* job, Rows batch, Rows after, measure_t measure, int64_t terms
) noexcept nogil:
    """Update one batch and measure another."""
    cdef Turn turn
    cdef int64_t parts = 1
    cdef bint judged = False
    cdef double before = 0
    turn.job, turn.batch, turn.after, turn.measure = job, batch, after, measure
    turn.terms, turn.total = terms, elements(job, &batch)
    job.gradient = NULL
    if job.task_count:
        job.gradient = combine_block
    elif job.clipping:
        job.gradient = clip_block
    if job.threads > 1 and turn.total + after.given >= SERIAL_BELOW:
        judged = job.run == NULL
        if judged:
            before = fastopt_seconds()
        if not (judged and is_alone(&job.contention)):
            parts = job.threads
    turn.share = (turn.total // parts + CUT) // CUT * CUT
    turn.chunks = (after.chunks + parts - 1) // parts
    parts = (turn.total + turn.share - 1) // turn.share
    if turn.chunks:
        parts = max(parts, (after.chunks + turn.chunks - 1) // turn.chunks)
    in_parts(job, <int> parts, turn_part, &turn)
    if judged:
        judge(
            &job.contention, parts > 1, fastopt_seconds() - before,
            turn.total + after.given,
        )


cdef void update_all(Job* job) noexcept nogil:
    take_turn(
        job, Rows(0, job.rows, job.given, 0, False), Rows(0, 0, 0, 0, False), NULL, 0
    )


cdef void measure_all(Job* job, Rows rows, measure_t measure, int64_t terms) noexcept nogil:
    take_turn(job, Rows(0, 0, 0, 0, False), rows, measure, terms)


include "batches.pxi"
include "matrices.pxi"
include "segments.pxi"
include "step.pxi"
include "calls.pxi"
include "sums.pxi"
include "native.pxi"
