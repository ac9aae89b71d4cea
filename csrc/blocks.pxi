# Kernels take most streams from memory as they are. This file makes blocks of the others in
# the cache, just before a kernel takes them. A ``make_t`` makes a block of one stream.

cdef void combine_block(
    const Job* job, int64_t r, int64_t k, int64_t start, int64_t n, char* block
) noexcept nogil:
    """Combine the gradients of several tasks, and clip the result."""
    cdef const int64_t* row = job.table + r * job.columns
    job.tools.combine(
        job.tasks + r, job.rows, job.task_count, job.weights, start, n,
        limits_of(job, row) if job.clipping else NULL, block,
    )


cdef void clip_block(
    const Job* job, int64_t r, int64_t k, int64_t start, int64_t n, char* block
) noexcept nogil:
    cdef const int64_t* row = job.table + r * job.columns
    cdef int64_t pair[2]
    pair[0], pair[1] = <int64_t> block - start * job.itemsize, row[1]
    job.tools.limit(pair, start, n, limits_of(job, row))


cdef void multiply_block(
    const Job* job, int64_t r, int64_t k, int64_t start, int64_t n, char* block
) noexcept nogil:
    job.tools.product(stream_of(job, r, k).parts, start, n, block)


cdef inline void make_blocks(
    const Job* job, int64_t r, int64_t columns, int64_t start, int64_t n, int64_t* local
) noexcept nogil:
    """Copy a row, with blocks in place of those of its first columns that must be made."""
    cdef int64_t c
    cdef make_t make
    cdef double* block = fastopt_scratch
    memcpy(local, job.table + r * job.columns, job.columns * sizeof(int64_t))
    for c in range(1, columns if job.streams else 2):
        make = job.gradient if c == 1 else stream_of(job, r, c - 2).make
        if make:
            make(job, r, c - 2, start, n, <char*> block)
            local[c] = <int64_t> block - start * job.itemsize
            block += CHUNK
