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
        F32 "FASTOPT_F32"
        F64 "FASTOPT_F64"
        BF16 "FASTOPT_BF16"
        BF16_SR "FASTOPT_BF16_SR"
        FP16 "FASTOPT_FP16"
        R8 "FASTOPT_R8"
        R16 "FASTOPT_R16"
        M8 "FASTOPT_M8"
        V8 "FASTOPT_V8"

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
        int64_t sum_count

    ctypedef struct Segment "fastopt_segment":
        void* p
        const void* g
        void** state
        int64_t n

    ctypedef void (*Run "fastopt_run")(
        void* context, int parts, void (*part)(void* work, int k) noexcept nogil,
        void* work
    ) noexcept nogil

    ctypedef struct Stream "fastopt_stream":
        int64_t format
        void* parts[4]

    ctypedef struct Streams "fastopt_streams":
        const Stream* streams
        int64_t n
        int64_t row
        int64_t first

    ctypedef struct Request "fastopt_request":
        uint32_t size
        int threads
        double clip_norm
        int64_t zero_grads
        Run run
        void* context

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
        int (*start_streams)(
            const Rule* rule, int dtype, const double* hyperparameters, int64_t rows,
            double* carry, const Streams* segments, int64_t count
        ) noexcept nogil
        int (*step_streams)(
            const Rule* rule, int dtype, int64_t t, const double* hyperparameters,
            int64_t rows, double* carry, const Streams* segments, int64_t count,
            double grad_scale, const Request* request
        ) noexcept nogil
        int (*sums)(
            const Rule* rule, int dtype, int64_t t, const double* hyperparameters,
            int64_t rows, const double* carry, const Streams* segments, int64_t count,
            double grad_scale, const Request* request, double* sums
        ) noexcept nogil
        int (*step_with_sums)(
            const Rule* rule, int dtype, int64_t t, const double* hyperparameters,
            int64_t rows, double* carry, const Streams* segments, int64_t count,
            double grad_scale, const Request* request, const double* sums,
            int64_t processes
        ) noexcept nogil

cdef extern from "fastopt.h":
    const Api* load "fastopt_import"() except NULL
