/* fastopt for native code: a table of functions, and the rules that they take.

   The table comes in a capsule of Python's, so nothing has to be linked. Where Python.h
   was included before this file, fastopt_import() gets it; it starts nothing and keeps
   no state, and the functions need no Python thread: call them without the GIL.

       const fastopt_api *fastopt = fastopt_import();
       const fastopt_rule *adamw = fastopt->find("adamw");

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
    FASTOPT_BAD_ARGUMENT = 1,       /* a pointer, length, dtype, step or thread count */
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
