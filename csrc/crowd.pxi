# Whether threads help. Threads of other libraries may keep a CPU busy while they wait for
# work, as OpenBLAS's do for milliseconds after each product of matrices, and OpenMP's, too.
# A step that waits for such a CPU takes milliseconds instead of microseconds
# (docs/threads.md). So turns that take far too long are done by one thread for a while.

cdef enum:
    STRIKES = 6  # slow turns before one thread is tried; a fast one makes up for one
    LEAST_PATIENCE = 64  # turns before this is tried again; doubled each time
    MOST_PATIENCE = 1 << 16

cdef double SLOW = 1e-4  # seconds that no turn takes,
cdef double SLOW_ELEMENT = 2e-9  # with so many for each of its elements


# What is known about the turns of a job. Zero: they are not judged.
cdef struct Crowd:
    int64_t patience, strikes
    int64_t alone  # turns that one thread will do
    int64_t trusted  # turns of several that will not be judged
    double together  # seconds of the turn before one thread was tried; 0: it is not new


cdef void judge(Crowd* crowd, bint together, double seconds, int64_t n) noexcept nogil:
    """Note how long a turn over so many elements took, by several threads or one."""
    if not crowd.patience:
        return
    if not together:
        if 0 < crowd.together < seconds:  # others were not to blame
            crowd.trusted, crowd.alone = crowd.patience, 0
        crowd.together = 0
    elif crowd.trusted:
        crowd.trusted -= 1
    elif seconds < SLOW + <double> n * SLOW_ELEMENT:
        crowd.strikes -= crowd.strikes > 0
    else:
        crowd.strikes += 1
        if crowd.strikes == STRIKES:
            crowd.alone, crowd.together, crowd.strikes = crowd.patience, seconds, 0
            crowd.patience = min(2 * crowd.patience, <int64_t> MOST_PATIENCE)


cdef inline bint is_alone(Crowd* crowd) noexcept nogil:
    """Whether one thread does the next turn."""
    cdef bint alone = crowd.alone > 0
    crowd.alone -= alone
    return alone
