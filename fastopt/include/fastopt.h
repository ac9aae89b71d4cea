/* fastopt for native code: a table of functions, and the rules that they take.

   The table comes in a capsule of Python's, so nothing has to be linked. Where Python.h
   was included before this file, fastopt_import() gets it; it starts nothing and keeps
   no state, and the functions need no Python thread: call them without the GIL.

       const fastopt_api *fastopt = fastopt_import();
       const fastopt_rule *adamw = fastopt->find("adamw");

   There are two interfaces in one table. The first takes arrays of float32 or float64: a
   fastopt_segment, start, step and step_on. The second takes streams, each of which may be
   stored in a format of fewer bits: fastopt_streams, start_streams and step_streams. It was
   added behind the first, which does not change.

   docs/native.md has whole programs. */

#ifndef FASTOPT_H
#define FASTOPT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when something here changes its meaning or goes. What is only added makes
   `size` larger: compare it with the offset of what you use that came later. */
#define FASTOPT_API_VERSION 1

#define FASTOPT_FLOAT32 0
#define FASTOPT_FLOAT64 1

/* What start and step return; in all cases but 0 they have written nothing. */
enum {
    FASTOPT_OK = 0,
    FASTOPT_BAD_ARGUMENT = 1,       /* a pointer, number, dtype or format */
    FASTOPT_BAD_HYPERPARAMETER = 2, /* out of range, or refused by the rule */
    FASTOPT_OTHER_VARIANT = 3,      /* an option is on that needs another rule's state */
    FASTOPT_OVERLAP = 4,            /* p, g and state of a segment share memory */
    FASTOPT_NO_MEMORY = 5
};

/* A rule, or the variant of one that an option makes: "sgd", "sgd+momentum". */
typedef struct fastopt_rule {
    const char *name;
    int64_t state_count; /* buffers, of the length and dtype of p */
    int64_t hyperparameter_count;
    int64_t carry_count; /* numbers that it remembers from step to step */
    int64_t carry_per_segment; /* 1: so many for each segment; 0: for all together */
    const char *const *state; /* names */
    const char *const *hyperparameters;
    const char *const *carry;
    const double *defaults; /* of the hyperparameters; 1 and 0 are yes and no */
    int64_t sum_count; /* sums over arrays that a step takes first, such as squared norms */
} fastopt_rule;

/* One array: C-contiguous, aligned to its elements. Nothing of a segment may overlap
   with anything else of a segment, but that several may have the same g. */
typedef struct fastopt_segment {
    void *p;
    const void *g;      /* NULL: leave this one alone */
    void *const *state; /* as many as the rule has; not read if it has none */
    int64_t n;
} fastopt_segment;

/* Has part(work, 0) to part(work, parts - 1) done, in any order, by any threads, and
   returns after that. */
typedef void (*fastopt_run)(
    void *context, int parts, void (*part)(void *work, int k), void *work
);

/* How a stream is stored. Steps of FASTOPT_FLOAT32 take all formats but FASTOPT_F64: they
   decode numbers to float32, and encode those that they change. Steps of FASTOPT_FLOAT64
   take FASTOPT_F64 only. */
enum {
    FASTOPT_F32 = 0,     /* float32 */
    FASTOPT_F64 = 1,     /* float64 */
    FASTOPT_BF16 = 2,    /* bfloat16, rounded to nearest */
    FASTOPT_BF16_SR = 3, /* bfloat16, rounded stochastically; as the format of a gradient,
                            which is only read, it means FASTOPT_BF16 */
    FASTOPT_FP16 = 4,    /* IEEE 754's float16, rounded to nearest */
    /* Parameters of bfloat16 in part 0, with a remainder in part 1: */
    FASTOPT_R8 = 5,      /* of 8 bits, rounded stochastically */
    FASTOPT_R16 = 6,     /* of 16 bits: exactly float32 */
    /* State of 8 bits: codes in part 0, a float32 scale for each 64 elements, rounded up,
       in part 1, and one int64_t in part 2, which counts groups that were not finite and
       were left as they were. Both are rounded stochastically. */
    FASTOPT_M8 = 7,      /* int8, for averages of gradients */
    FASTOPT_V8 = 8       /* uint8, for numbers that are not negative */
};

/* An array in a format, C-contiguous. Each part is aligned to its words, which have the
   size of the dtype. Addresses of parts that the format does not have are not read.
   Gradients have formats of one part. */
typedef struct fastopt_stream {
    int64_t format;
    void *parts[4];
} fastopt_stream;

/* A segment whose arrays are streams. They may not overlap with each other, but several
   segments may have the same gradient, unless gradients are set to zero. */
typedef struct fastopt_streams {
    const fastopt_stream *streams; /* p, g, and each state buffer of the rule. If the
                                      first part of g is NULL, the step leaves this
                                      segment alone, and g's format is not read. */
    int64_t n;     /* elements of each stream */
    int64_t row;   /* the row of hyperparameters that applies, from 0 on */
    int64_t first; /* index of the first element among all that are trained. Stochastic
                      rounding draws by this index, the step and the buffer: segments with
                      indices of their own draw numbers of their own, and segments laid
                      end to end have the bits of Python. */
} fastopt_streams;

/* What is asked of step_streams besides the update. A field of zero asks for nothing. */
typedef struct fastopt_request {
    uint32_t size;      /* sizeof(fastopt_request); another size is refused */
    int threads;        /* at most so many; 0: those that Python would use */
    double clip_norm;   /* limit for the norm of all gradients, after grad_scale */
    int64_t zero_grads; /* 1: set gradients to zero in the same pass */
    fastopt_run run;    /* has the parts done, as for step_on: at most ``threads`` parts;
                           NULL: OpenMP's threads do them */
    void *context;      /* for run */
} fastopt_request;

typedef struct fastopt_api {
    uint32_t version; /* FASTOPT_API_VERSION of the library */
    uint32_t size;    /* and its sizeof(fastopt_api) */
    const char *isa;  /* the instruction set of the kernels, such as "avx2" */
    int64_t rule_count;
    const fastopt_rule *const *rules;

    /* The rule of this name, or NULL. */
    const fastopt_rule *(*find)(const char *name);

    /* Give state and carry their first values. */
    int (*start)(
        const fastopt_rule *rule, int dtype, const double *hyperparameters,
        double *carry, const fastopt_segment *segments, int64_t count
    );

    /* Step t, the first of which is 1, with g times grad_scale. At most so many
       threads; 0: those that Python would use. All bits are those of opt.step(). */
    int (*step)(
        const fastopt_rule *rule, int dtype, int64_t t, const double *hyperparameters,
        double *carry, const fastopt_segment *segments, int64_t count,
        double grad_scale, int threads
    );

    /* What a returned value means, in words. */
    const char *(*error)(int code);

    /* A step in at most so many parts, at least one, which threads of the caller's own
       do instead of OpenMP's. */
    int (*step_on)(
        const fastopt_rule *rule, int dtype, int64_t t, const double *hyperparameters,
        double *carry, const fastopt_segment *segments, int64_t count,
        double grad_scale, int parts, fastopt_run run, void *context
    );

    /* start and step over streams. There are ``rows`` rows of hyperparameters, one after the
       other; each segment names its own. The carry has carry_count numbers for each
       segment if the rule's carry_per_segment is 1, and otherwise for each row. */
    int (*start_streams)(
        const fastopt_rule *rule, int dtype, const double *hyperparameters, int64_t rows,
        double *carry, const fastopt_streams *segments, int64_t count
    );
    /* ``request`` may be NULL: nothing but the update. */
    int (*step_streams)(
        const fastopt_rule *rule, int dtype, int64_t t, const double *hyperparameters,
        int64_t rows, double *carry, const fastopt_streams *segments, int64_t count,
        double grad_scale, const fastopt_request *request
    );

    /* A step in two calls, of a rule whose sum_count is not 0, where several processes have
       a part of each array. ``sums`` changes nothing. It writes 1 + sum_count numbers for
       each segment: how many elements have a gradient, and the sums over these.
       ``step_with_sums`` takes what ``sums`` wrote in so many processes, one after the
       other: all processes the same, in the same order. It adds them up in that order, so
       all processes step with the same numbers. For a segment that several processes have
       in whole, let the numbers of all but one be 0. The other arguments are those of
       step_streams, the same in both calls; clip_norm must be 0. */
    int (*sums)(
        const fastopt_rule *rule, int dtype, int64_t t, const double *hyperparameters,
        int64_t rows, const double *carry, const fastopt_streams *segments,
        int64_t count, double grad_scale, const fastopt_request *request, double *sums
    );
    int (*step_with_sums)(
        const fastopt_rule *rule, int dtype, int64_t t, const double *hyperparameters,
        int64_t rows, double *carry, const fastopt_streams *segments, int64_t count,
        double grad_scale, const fastopt_request *request, const double *sums,
        int64_t processes
    );
} fastopt_api;

#ifdef Py_PYTHON_H
#include <stddef.h>
/* The table, or NULL with a Python exception set. Needs the GIL. */
static inline const fastopt_api *fastopt_import(void) {
    const fastopt_api *api =
        (const fastopt_api *) PyCapsule_Import("fastopt.native._api", 0);
    if (api && api->version != FASTOPT_API_VERSION) {
        PyErr_Format(
            PyExc_ImportError,
            "this was compiled for version %d of fastopt's table, but the fastopt that "
            "is installed has version %d; compile it again",
            FASTOPT_API_VERSION, (int) api->version
        );
        return NULL;
    }
    if (api && api->size < sizeof(fastopt_api)) {
        PyErr_Format(
            PyExc_ImportError,
            "this was compiled for a newer fastopt, whose table has %d bytes, not %d; "
            "install that one", (int) sizeof(fastopt_api), (int) api->size
        );
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif

#endif
