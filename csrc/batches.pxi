# Steps of rules with norms of each segment: sums and update, batch by batch.

cdef bint settle(
    const Job* job, int64_t s, int64_t n, const double* sums, double* carry
) noexcept nogil:
    """Replace numbers of a set by the results of settle. Return whether it succeeded."""
    cdef double* numbers = job.numbers + s * job.stride + job.handed
    cdef double taken[MOST_NUMBERS]
    cdef int returned
    taken[0] = <double> n
    memcpy(taken + 1, sums, job.terms * sizeof(double))
    memcpy(taken + 1 + job.terms, numbers, job.settle_count * sizeof(double))
    returned = job.settle(job.steps[s], taken, numbers)
    if returned >= 0:
        memcpy(carry, numbers + returned - job.carried, job.carried * sizeof(double))
    return returned >= 0


cdef void keep(Job* job, Rows* rows, int64_t at) noexcept nogil:
    """Choose begin and finish for a batch if the rule has them and what they keep fits into
    the cache."""
    cdef int64_t r
    at = (at + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
    rows.kept = job.begin != NULL and rows.given * job.itemsize <= BATCH
    for r in range(rows.first, rows.last if rows.kept else 0):
        job.kept_at[r] = at
        if job.table[r * job.columns + 1]:
            at += job.table[(r + 1) * job.columns - 2] * job.itemsize


cdef int step_in_batches(Job* job, const double* old, double* new) noexcept nogil:
    """Do a step with norms of each row, where each row has its own set of scalars. No settle
    of such a rule may divide by zero, because arrays have changed by then;
    tests/kernels/test_bits.py checks this for ours."""
    cdef int64_t r, k, length, turn = 0
    cdef double sums[MOST_NUMBERS]
    cdef const double* partials
    cdef Rows none = Rows(0, 0, 0, 0, False), batch = none, after
    cdef Rows rows = rows_from(job, 0, INT64_MAX)
    # There are two halves: one is read for the last batch while the other is written for
    # this one, unless the two are done one after the other.
    cdef int64_t room = min(<int64_t> BATCH, rows.given * job.itemsize) + CACHE_LINE
    if not make_room(job, rows.chunks, job.terms):
        return NO_MEMORY
    if job.begin:
        job.kept = <char*> malloc(room if job.apart else 2 * room)
        if not job.kept:
            return NO_MEMORY
    while True:
        after = rows_from(job, batch.last, BATCH)
        keep(job, &after, <int64_t> <size_t> job.kept + turn * room)
        turn = 0 if job.apart else 1 - turn
        for r in range(after.first, after.last):
            put_row(job, r, job.factors[r], 0, job.measured)
        if job.apart:
            take_turn(job, batch, none, NULL, 0)
            batch = none
        take_turn(
            job, batch, after, job.begin if after.kept else job.measure, job.terms
        )
        if after.first == after.last:
            return OK
        partials = job.partials
        for r in range(after.first, after.last):
            length = job.table[(r + 1) * job.columns - 2]
            if not job.table[r * job.columns + 1] or length == 0:
                for k in range(job.carried):  # no update, and no change
                    new[r * job.carried + k] = old[r * job.carried + k]
                continue
            for k in range(job.terms):
                sums[k] = in_chunks(partials + k, job.terms, chunks_of(length))
            partials += chunks_of(length) * job.terms
            if not settle(job, r, length, sums, new + r * job.carried):
                return BAD_HYPERPARAMETER
            if after.kept:  # begin has used the factor and what was handed on
                put_row(job, r, 1, job.handed, job.scalar_count)
            else:
                put_row(job, r, job.factors[r], 0, job.scalar_count)
        batch = after
