# Whether several threads help. Threads of other libraries may keep a CPU busy while they
# wait for work: OpenBLAS's do so for milliseconds after each product of matrices. A step
# that waits for such a CPU takes milliseconds instead of microseconds (docs/threads.md). So
# after several turns that took far too long, one thread does the next ones.

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
