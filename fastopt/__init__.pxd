# For `cimport fastopt`; include_dirs of the extension needs fastopt.get_include().
# The names are those of fastopt.h, which explains them, without its prefix.

from libc.stdint cimport int64_t, uint32_t

cdef extern from "fastopt.h" nogil:
    enum:
        API_VERSION "FASTOPT_API_VERSION"
        FLOAT32 "FASTOPT_FLOAT32"
        FLOAT64 "FASTOPT_FLOAT64"
        OK "FASTOPT_OK"
        BAD_ARGUMENT "FASTOPT_BAD_ARGUMENT"
        BAD_HYPERPARAMETER "FASTOPT_BAD_HYPERPARAMETER"
        OTHER_VARIANT "FASTOPT_OTHER_VARIANT"
        OVERLAP "FASTOPT_OVERLAP"
        NO_MEMORY "FASTOPT_NO_MEMORY"

    ctypedef struct Rule "fastopt_rule":
        const char* name
        int64_t state_count
        int64_t hyperparameter_count
        int64_t carry_count
        int64_t carry_per_segment
        const char** state
        const char** hyperparameters
        const char** carry
        const double* defaults

    ctypedef struct Segment "fastopt_segment":
        void* p
        const void* g
        void** state
        int64_t n

    ctypedef void (*Run "fastopt_run")(
        void* context, int parts, void (*part)(void* work, int k) noexcept nogil,
        void* work
    ) noexcept nogil

    ctypedef struct Api "fastopt_api":
        uint32_t version
        uint32_t size
        const char* isa
        int64_t rule_count
        const Rule** rules
        const Rule* (*find)(const char* name) noexcept nogil
        int (*start)(
            const Rule* rule, int dtype, const double* hyperparameters, double* carry,
            const Segment* segments, int64_t count
        ) noexcept nogil
        int (*step)(
            const Rule* rule, int dtype, int64_t t, const double* hyperparameters,
            double* carry, const Segment* segments, int64_t count, double grad_scale,
            int threads
        ) noexcept nogil
        const char* (*error)(int code) noexcept nogil
        int (*step_on)(
            const Rule* rule, int dtype, int64_t t, const double* hyperparameters,
            double* carry, const Segment* segments, int64_t count, double grad_scale,
            int parts, Run run, void* context
        ) noexcept nogil

cdef extern from "fastopt.h":
    const Api* load "fastopt_import"() except NULL
