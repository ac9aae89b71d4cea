# Kernels read most streams in memory. For the other streams, this file makes blocks in the
# cache just before a kernel reads them, and encodes the blocks that the kernel has changed.
# A ``make_t`` makes a block of column c of row r.

cdef inline int64_t block_bytes(const Job* job, int64_t n) noexcept nogil:
    """Return the distance in bytes between blocks of n elements. Each begins at a cache
    line."""
    return (n * job.itemsize + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef void combine_block(
    const Job* job, int64_t r, int64_t c, int64_t start, int64_t n, char* block
) noexcept nogil:
    """Combine the gradients of several tasks, and clip the result."""
    cdef const int64_t* row = job.table + r * job.columns
    combine_limited(job, r, start, n, limits_of(job, row) if job.clipping else NULL, block)


cdef void combine_limited(
    const Job* job, int64_t r, int64_t start, int64_t n, const char* limits, char* block
) noexcept nogil:
    """Combine the gradients of several tasks in a block. Encoded gradients are decoded
    into the blocks behind it, a few at a time."""
    cdef int64_t k, j, count, room = block_bytes(job, n)
    cdef int64_t addresses[AT_A_TIME]
    cdef const Stream* stream
    memset(block, 0, n * job.itemsize)
    if job.task_streams == NULL:
        job.tools.combine(
            job.tasks + r, job.rows, job.task_count, job.weights, start, n, limits, block
        )
        return
    k = 0
    while k < job.task_count:
        count = min(<int64_t> AT_A_TIME, job.task_count - k)
        for j in range(count):
            stream = job.task_streams + (k + j) * job.rows + r
            addresses[j] = job.tasks[(k + j) * job.rows + r]
            if addresses[j] and stream.load:
                stream.load(stream.parts, start, n, block + (1 + j) * room)
                addresses[j] = <int64_t> block + (1 + j) * room - start * job.itemsize
        job.tools.combine(
            addresses, 1, count, job.weights + k * job.itemsize, start, n,
            limits if k + count == job.task_count else NULL, block,
        )
        k += count


cdef void load_block(
    const Job* job, int64_t r, int64_t c, int64_t start, int64_t n, char* block
) noexcept nogil:
    """Decode a stream into a block."""
    cdef const Stream* stream = stream_of(job, r, c)
    stream.load(stream.parts, start, n, block)


cdef void clip_block(
    const Job* job, int64_t r, int64_t c, int64_t start, int64_t n, char* block
) noexcept nogil:
    """Clip a gradient in a block. An encoded gradient is first decoded into the next block,
    which no stream uses yet."""
    cdef const int64_t* row = job.table + r * job.columns
    cdef const Stream* stream = stream_of(job, r, c)
    cdef int64_t pair[2]
    pair[0], pair[1] = <int64_t> block - start * job.itemsize, row[1]
    if stream and stream.load:
        load_block(job, r, c, start, n, block + block_bytes(job, n))
        pair[1] = pair[0] + block_bytes(job, n)
    job.tools.limit(pair, start, n, limits_of(job, row))


cdef void multiply_block(
    const Job* job, int64_t r, int64_t c, int64_t start, int64_t n, char* block
) noexcept nogil:
    job.tools.product(stream_of(job, r, c).parts, start, n, block)


cdef inline void make_blocks(
    const Job* job, int64_t r, int64_t first, int64_t end, int64_t start, int64_t n,
    int64_t* local
) noexcept nogil:
    """Copy a row. In columns [first, end), replace streams that kernels cannot read by
    blocks."""
    cdef int64_t c
    cdef make_t make
    cdef const Stream* stream
    cdef char* block = <char*> fastopt_scratch
    cdef int64_t stride = block_bytes(job, n)
    memcpy(local, job.table + r * job.columns, job.columns * sizeof(int64_t))
    for c in range(first, end):
        stream = stream_of(job, r, c)
        make = stream.make if stream else NULL
        if c == 1 and job.gradient:
            make = job.gradient
        if make:
            make(job, r, c, start, n, block)
            local[c] = <int64_t> block - start * job.itemsize
            block += stride


cdef inline void store_copy(
    const Job* job, int64_t r, int64_t start, int64_t n, const int64_t* local
) noexcept nogil:
    """Encode a block of parameters in the row's copy of them, if there is one."""
    cdef uint32_t draw[3]
    cdef const Stream* stream = job.copies + r
    draw[0] = draw[1] = draw[2] = 0  # formats of copies are not stochastic
    if stream.store:
        stream.store(
            stream.parts, start, n, <char*> local[0] + start * job.itemsize, draw
        )


cdef void hold_together(
    const Job* job, int64_t r, int64_t first, int64_t end, int64_t start, int64_t n,
    const int64_t* local
) noexcept nogil:
    """If a group of one stream with scales is not finite, and so will not be stored, let
    those of the others be neither: a new average without the other would make a step of any
    length."""
    cdef int64_t c, k, m, bad, scaled = 0
    cdef finite_t is_finite
    cdef float* x
    cdef bint finite = True
    for c in range(first, end):
        scaled += stream_of(job, r, c).finite != NULL
    if scaled < 2:
        return
    for c in range(first, end):
        is_finite = stream_of(job, r, c).finite
        if is_finite:
            finite = finite and is_finite(<float*> local[c] + start, n)
    if finite:
        return
    k = 0
    while k < n:
        m, bad = min(<int64_t> GROUP, n - k), 0
        for c in range(first, end):
            is_finite = stream_of(job, r, c).finite
            if is_finite:
                bad += not is_finite(<float*> local[c] + start + k, m)
        for c in range(first, end if bad else first):
            if stream_of(job, r, c).finite:
                x = <float*> local[c] + start + k
                x[0] = <float> INFINITY
        k += GROUP


cdef inline void store_blocks(
    const Job* job, int64_t r, int64_t first, int64_t end, int64_t start, int64_t n,
    const int64_t* local
) noexcept nogil:
    """Encode the blocks of columns [first, end) that a kernel has written."""
    cdef int64_t c
    cdef uint32_t draw[3]
    cdef const Stream* stream
    if job.encoded:
        hold_together(job, r, max(first, <int64_t> 2), end, start, n, local)
    for c in range(first, end if job.streams else first):
        stream = stream_of(job, r, c)
        if stream.store:
            draw[0], draw[1], draw[2] = stream.first, job.steps[local[job.columns - 1]], c
            stream.store(
                stream.parts, start, n, <char*> local[c] + start * job.itemsize, draw
            )


cdef inline void prefetch(int64_t at, int64_t start, int64_t n, int64_t stride) noexcept nogil:
    """Prefetch elements [start, start + n) of an array, which has so many bytes for each
    GROUP. If it has no address or no elements, there is nothing to prefetch."""
    cdef int64_t last = at + (start + n) * stride // GROUP
    if at:
        at += start * stride // GROUP
        while at < last:
            fastopt_prefetch(<const void*> at)
            at += CACHE_LINE


cdef inline void prefetch_blocks(
    const Job* job, int64_t r, int64_t end, int64_t start, int64_t n
) noexcept nogil:
    """Prefetch the next elements of columns [0, end), because a loop that only decodes
    would wait for memory (docs/performance.md)."""
    cdef int64_t c, k
    cdef const int64_t* row = job.table + r * job.columns
    cdef const Stream* stream
    for c in range(end):
        stream = stream_of(job, r, c)
        if not stream.load:
            prefetch(row[c], start, n, GROUP * job.itemsize)
            continue
        for k in range(2):
            prefetch(stream.parts[k], start, n, stream.strides[k])
