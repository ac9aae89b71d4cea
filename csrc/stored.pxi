# The step that xla.pyx calls and native.pxi has: parameters and gradients of a step in
# float32 may be stored in fewer bits. ``stored`` has two entries for each segment, for its
# parameter and its gradient; NULL: all of them are plain.

cdef enum:
    STORED_PLAIN = 0  # in the dtype of the step
    STORED_BF16 = 1
    STORED_FP16 = 2
    STORED_COUNT = 3

cdef const char* STEP_STORED = "fastopt.native._step_stored"  # the name of its capsule

ctypedef int (*step_stored_t)(
    const fastopt.Rule* rule, int dtype, int64_t t, const double* hyperparameters,
    double* carry, const fastopt.Segment* segments, const char* stored, int64_t count,
    double grad_scale, int parts, fastopt.Run run, void* context
) noexcept nogil
