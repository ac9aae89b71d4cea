# A step in two calls: each of several processes takes the sums over its part of each array,
# and then steps with the sums of all.

cdef double MOST_ELEMENTS = 2.0**53  # which float64 counts exactly


cdef int check_sums(const Call* call) noexcept nogil:
    """Check the sums of all processes: none has fewer elements than are here."""
    cdef int64_t r, i, width = 1 + call.native.terms
    cdef double n
    if not call.native.settle or call.request.clip_norm != 0:
        return BAD_ARGUMENT
    if call.sums:
        return BAD_ARGUMENT if bad_pointer(call.sums, call.count) else OK
    if call.processes < 1 or call.processes > MOST_SEGMENTS:
        return BAD_ARGUMENT
    if bad_pointer(call.given, call.count):
        return BAD_ARGUMENT
    for r in range(call.count):
        n = 0
        for i in range(call.processes):
            if not 0 <= call.given[(i * call.count + r) * width] <= MOST_ELEMENTS:
                return BAD_ARGUMENT
            n += call.given[(i * call.count + r) * width]
        if not n <= MOST_ELEMENTS:
            return BAD_ARGUMENT
        if length_of(call, r) and part_at(call, r, 1, 0) and n < length_of(call, r):
            return BAD_ARGUMENT
    return OK


cdef int write_sums(Job* job, const Call* call) noexcept nogil:
    """Write what is measured of each segment, and of how many elements this is."""
    cdef int64_t s, r, k, length
    cdef Rows rows = rows_from(job, 0, INT64_MAX)
    cdef const double* partials
    cdef double* sums = call.sums
    if not make_room(job, rows.chunks, job.terms):
        return NO_MEMORY
    for s in range(job.sets):
        put_row(job, s, job.factors[s], 0, job.measured)
    measure_all(job, rows, job.measure, job.terms)
    partials = job.partials
    for r in range(job.rows):
        length = job.table[(r + 1) * job.columns - 2]
        if not job.table[r * job.columns + 1]:
            length = 0
        sums[0] = <double> length
        for k in range(job.terms):
            sums[1 + k] = in_chunks(partials + k, job.terms, chunks_of(length))
        partials += chunks_of(length) * job.terms
        sums += 1 + job.terms
    return OK


cdef int settle_given(Job* job, const Call* call, double* settled) noexcept nogil:
    """Settle with the sums that all processes have taken, added up in their order.
    ``settled`` has room for the carry, which is written when every set has settled."""
    cdef int64_t s, r, i, k, n, width = 1 + job.terms
    cdef bint by_segment = call.native.by_segment
    cdef double total[MOST_NUMBERS + 1]
    cdef double number
    memset(total, 0, sizeof(total))
    memcpy(settled, call.carry, job.sets * job.carried * sizeof(double))
    for r in range(job.rows):
        for k in range(width):
            number = 0
            for i in range(call.processes):
                number += call.given[(i * job.rows + r) * width + k]
            total[k] = number if by_segment else total[k] + number
        n = <int64_t> total[0]
        if by_segment and n:
            if not settle(job, r, n, total + 1, settled + r * job.carried):
                return BAD_HYPERPARAMETER
    n = <int64_t> total[0]
    for s in range(job.sets if n and not by_segment else 0):
        if not settle(job, s, n, total + 1, settled + s * job.carried):
            return BAD_HYPERPARAMETER
    memcpy(call.carry, settled, job.sets * job.carried * sizeof(double))
    return OK
