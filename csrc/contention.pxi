# Whether several threads help. Threads of other libraries may keep a CPU busy while they
# wait for work: OpenBLAS's do so for milliseconds after each product of matrices. A step
# that waits for such a CPU takes milliseconds instead of microseconds (docs/threads.md). So
# after several turns that took far too long, one thread does the next ones.

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define fastopt_load(shared, own) __atomic_load(shared, own, __ATOMIC_RELAXED)
    #define fastopt_store(shared, own) __atomic_store(shared, own, __ATOMIC_RELAXED)
    #else  /* loads and stores of aligned words are atomic on what it compiles for */
    #define fastopt_load(shared, own) ((void) (*(own) = *(shared)))
    #define fastopt_store(shared, own) ((void) (*(shared) = *(own)))
    #endif
    """
    void fastopt_load(void* shared, void* own) noexcept nogil
    void fastopt_store(void* shared, void* own) noexcept nogil

cdef enum:
    STRIKES = 6  # slow turns before one thread is tried; a fast turn cancels a slow one
    LEAST_PATIENCE = 64  # turns by one thread the first time; each time twice as many
    MOST_PATIENCE = 1 << 16

# A turn is slow if it takes more seconds than this sum of a constant and a time for each
# element.
cdef double SLOW_TURN = 1e-4
cdef double SLOW_ELEMENT = 2e-9


# What is known about the turns of a job. If all fields are zero, they are not judged.
cdef struct Contention:
    int64_t patience  # how many turns one thread will do the next time
    int64_t strikes
    int64_t alone  # how many turns one thread will still do
    int64_t trusted  # how many turns by several threads will not be judged
    double slow_seconds  # of the last slow turn, until one thread has done a turn; then 0


cdef void judge(
    Contention* known, bint several, double seconds, int64_t n
) noexcept nogil:
    """Note how long a turn over n elements took, by several threads or by one."""
    if not known.patience:
        return
    if not several:
        if 0 < known.slow_seconds < seconds:  # one thread is slower still
            known.trusted, known.alone = known.patience, 0
        known.slow_seconds = 0
    elif known.trusted:
        known.trusted -= 1
    elif seconds < SLOW_TURN + <double> n * SLOW_ELEMENT:
        known.strikes -= known.strikes > 0
    else:
        known.strikes += 1
        if known.strikes == STRIKES:
            known.alone, known.slow_seconds, known.strikes = known.patience, seconds, 0
            known.patience = min(2 * known.patience, <int64_t> MOST_PATIENCE)


cdef inline bint is_alone(Contention* known) noexcept nogil:
    """Whether one thread is to do the next turn, which is counted."""
    cdef bint alone = known.alone > 0
    known.alone -= alone
    return alone


# Steps at the same time may share what is known. Each works on a copy. Of two, one may be
# forgotten, or the fields may be of both, which does no harm: they only count.

cdef inline void copy_shared(Contention* shared, Contention* own) noexcept nogil:
    fastopt_load(&shared.patience, &own.patience)
    fastopt_load(&shared.strikes, &own.strikes)
    fastopt_load(&shared.alone, &own.alone)
    fastopt_load(&shared.trusted, &own.trusted)
    fastopt_load(&shared.slow_seconds, &own.slow_seconds)


cdef inline void share(Contention* shared, Contention* own) noexcept nogil:
    fastopt_store(&shared.patience, &own.patience)
    fastopt_store(&shared.strikes, &own.strikes)
    fastopt_store(&shared.alone, &own.alone)
    fastopt_store(&shared.trusted, &own.trusted)
    fastopt_store(&shared.slow_seconds, &own.slow_seconds)
