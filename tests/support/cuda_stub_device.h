/* The memory, objects, streams and captures of cuda_stub.c's device. The stub's lock is
 * held while a function of this file runs. */
#ifndef FASTOPT_CUDA_STUB_DEVICE_H
#define FASTOPT_CUDA_STUB_DEVICE_H

#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The codes that calls return (CUresult). After a sticky one, the context is unusable. */
#define ERRORS(ERROR, STICKY)                                                          \
    ERROR(0, CUDA_SUCCESS, "no error")                                                 \
    ERROR(1, CUDA_ERROR_INVALID_VALUE, "invalid argument")                             \
    ERROR(2, CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                \
    ERROR(3, CUDA_ERROR_NOT_INITIALIZED, "initialization error")                       \
    ERROR(100, CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")             \
    ERROR(101, CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                    \
    ERROR(200, CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")             \
    ERROR(201, CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                   \
    ERROR(209, CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available")           \
    ERROR(400, CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                   \
    ERROR(500, CUDA_ERROR_NOT_FOUND, "named symbol not found")                         \
    ERROR(600, CUDA_ERROR_NOT_READY, "device not ready")                               \
    ERROR(709, CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                \
    ERROR(801, CUDA_ERROR_NOT_SUPPORTED, "operation not supported")                    \
    ERROR(900, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "not permitted during a capture")\
    ERROR(901, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture is invalidated")    \
    ERROR(902, CUDA_ERROR_STREAM_CAPTURE_MERGE, "two captures would be merged")        \
    ERROR(905, CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "depends on work not captured")    \
    ERROR(906, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "the legacy stream would depend")   \
    ERROR(907, CUDA_ERROR_CAPTURED_EVENT, "the event was last recorded in a capture")  \
    ERROR(999, CUDA_ERROR_UNKNOWN, "unknown error")                                    \
    STICKY(214, CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error")               \
    STICKY(700, CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")\
    STICKY(702, CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out")                     \
    STICKY(710, CUDA_ERROR_ASSERT, "device-side assert triggered")                     \
    STICKY(714, CUDA_ERROR_HARDWARE_STACK_ERROR, "hardware stack error")               \
    STICKY(715, CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction")              \
    STICKY(716, CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address")                   \
    STICKY(717, CUDA_ERROR_INVALID_ADDRESS_SPACE, "invalid address space")             \
    STICKY(718, CUDA_ERROR_INVALID_PC, "invalid program counter")                      \
    STICKY(719, CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")

#define AS_CONSTANT(number, name, words) name = number,
enum { ERRORS(AS_CONSTANT, AS_CONSTANT) };

struct error { int code, sticky; const char *name, *words; };
#define AS_ROW(number, name, words) {number, 0, #name, words},
#define AS_STICKY_ROW(number, name, words) {number, 1, #name, words},
static const struct error errors[] = {ERRORS(AS_ROW, AS_STICKY_ROW)};

enum {
    OBJECTS = 1 << 14,       /* modules, functions, streams and events at a time */
    DEFAULT_STREAMS = 2,     /* the first objects: the legacy and the per-thread stream */
    CONTEXTS = 16,           /* of a thread's stack */
    FAILURES = 16,
    DECLARED = 64,           /* kernels' parameters, and globals */
    PARAMETERS = 256,
    ATTRIBUTES = 64,
    NON_BLOCKING = 1,        /* a flag of streams */
    TEXT = 1 << 17
};
static const uint64_t MEMORY = UINT64_C(4) << 30;

/* What a call needs. */
enum { NOTHING, INITIALIZED, CONTEXT, NO_CAPTURE /* a context, but no capture */ };

enum kind { FREE, MODULE, FUNCTION, STREAM, EVENT };

struct object {
    enum kind kind;
    unsigned flags;
    char *name;              /* of a function */
    struct object *of;       /* a function's module; the stream where an event stands */
    uint64_t issued, done;   /* a stream's work; an event's place in it */
    uint64_t capture;        /* the number of the capture, or 0 */
    int status;              /* of a stream's capture: 0 none, 1 active, 2 invalidated */
};

enum place { DEVICE, HOST, GLOBAL };

struct area {
    uint64_t address;
    size_t size;
    enum place place;
    struct object *module;   /* of a global, and its name */
    char *name;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct object objects[OBJECTS];
static size_t next_object = DEFAULT_STREAMS, used_objects = DEFAULT_STREAMS;
static struct area *areas; /* by address */
static size_t area_count, area_room;
static uint64_t allocated, sequence;
static int initialized, retained, held, quiet, captures, sticky;
static char context; /* its address is the handle of the only context */
static _Thread_local void *contexts[CONTEXTS];
static _Thread_local int depth;
/* Which calls a capture forbids this thread: in the relaxed mode none of other streams. */
enum { STRICT, OF_THREAD, RELAXED };
static _Thread_local int mode = STRICT;

static int exchange(int *other) {
    if (!other || *other < STRICT || *other > RELAXED)
        return CUDA_ERROR_INVALID_VALUE;
    const int before = mode;
    mode = *other;
    *other = before;
    return CUDA_SUCCESS;
}
static char *text;
static size_t text_size, text_room;
static struct { char *name; int64_t left; int code; } failures[FAILURES];
static int failure_count;
static struct { char *name; int count; int sizes[PARAMETERS]; } declared[DECLARED];
static int declared_count;
static struct { char *name; size_t size; } globals[DECLARED];
static int global_count, attribute_count = 20;
static struct { int attribute, value; } attributes[ATTRIBUTES] = {
    {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},            /* threads of a block */
    {5, INT32_MAX}, {6, 65535}, {7, 65535},              /* blocks of a grid */
    {8, 48 << 10}, {81, 228 << 10}, {97, 227 << 10},     /* shared memory */
    {10, 32}, {12, 65536}, {13, 1980000}, {16, 16},      /* processors: 16 */
    {38, 50 << 20}, {39, 2048}, {41, 1}, {115, 1},       /* caches, addresses, pools */
    {75, 9}, {76, 0},                                    /* compute capability 9.0 */
};

/* Through this pointer, so that no compiler leaves out filling what is freed next. */
static void *(*volatile fill)(void *, int, size_t) = memset;

#define POINTER(address) ((void *) (uintptr_t) (address))
#define ADDRESS(pointer) ((uint64_t) (uintptr_t) (pointer))
#define HEX "%#" PRIx64

/* Memory. */

static size_t areas_below(uint64_t address) { /* that start at it or below */
    size_t low = 0, high = area_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (areas[middle].address <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct area *area_of(uint64_t address) {
    size_t below = areas_below(address);
    if (!below || address - areas[below - 1].address >= areas[below - 1].size)
        return NULL;
    return areas + below - 1;
}

static int allocate(
    enum place place, size_t size, void *out, struct object *module, const char *name
) {
    const uint64_t room = ((uint64_t) size + 255) / 256 * 256;
    if (!out || !size)
        return CUDA_ERROR_INVALID_VALUE;
    if (size > MEMORY || room > MEMORY - allocated)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (area_count == area_room) {
        size_t wanted = area_room ? 2 * area_room : 256;
        struct area *larger = realloc(areas, wanted * sizeof *areas);
        if (!larger)
            return CUDA_ERROR_OUT_OF_MEMORY;
        areas = larger;
        area_room = wanted;
    }
    void *memory = aligned_alloc(256, room);
    if (!memory)
        return CUDA_ERROR_OUT_OF_MEMORY;
    fill(memory, 0xCD, room);
    size_t at = areas_below(ADDRESS(memory));
    memmove(areas + at + 1, areas + at, (area_count++ - at) * sizeof *areas);
    areas[at] = (struct area){
        ADDRESS(memory), size, place, module, name ? strdup(name) : NULL
    };
    allocated += room;
    memcpy(out, &memory, sizeof memory);
    return CUDA_SUCCESS;
}

static void remove_area(struct area *area) {
    const uint64_t room = ((uint64_t) area->size + 255) / 256 * 256;
    fill(POINTER(area->address), 0xDD, room);
    free(POINTER(area->address));
    free(area->name);
    allocated -= room;
    memmove(area, area + 1, (size_t) (areas + --area_count - area) * sizeof *areas);
}

static int release(uint64_t address, enum place place) {
    struct area *area = area_of(address);
    if (!area || area->address != address || area->place != place)
        return CUDA_ERROR_INVALID_VALUE;
    remove_area(area);
    return CUDA_SUCCESS;
}

static int within(uint64_t address, size_t size, int device) {
    struct area *area = area_of(address);
    if (!area) /* any host memory will do, but this is never the device's */
        return !device && address;
    return device == (area->place != HOST)
           && size <= area->size - (address - area->address);
}

/* Objects. */

static struct object *find(const void *handle, enum kind kind) {
    const uint64_t offset = ADDRESS(handle) - ADDRESS(objects);
    if (offset >= sizeof objects || offset % sizeof *objects)
        return NULL;
    struct object *object = objects + offset / sizeof *objects;
    return object->kind == kind ? object : NULL;
}

/* A handle that was destroyed is used again as late as possible, so that its later use is
 * noticed. */
static int create(enum kind kind, struct object what, void *out) {
    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    for (size_t tried = DEFAULT_STREAMS; tried < OBJECTS; tried++) {
        struct object *object = objects + next_object;
        next_object = next_object + 1 < OBJECTS ? next_object + 1 : DEFAULT_STREAMS;
        if (object->kind != FREE)
            continue;
        *object = what;
        object->kind = kind;
        object->issued = object->done = kind == STREAM ? sequence : 0;
        if (object >= objects + used_objects)
            used_objects = (size_t) (object - objects) + 1;
        memcpy(out, &object, sizeof object);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

static int destroy(const void *handle, enum kind kind) {
    struct object *object = find(handle, kind);
    if (!object || object < objects + DEFAULT_STREAMS)
        return CUDA_ERROR_INVALID_HANDLE;
    if (kind == MODULE) {
        for (size_t i = 0; i < used_objects; i++)
            if (objects[i].kind == FUNCTION && objects[i].of == object)
                destroy(objects + i, FUNCTION);
        for (size_t i = area_count; i-- > 0;)
            if (areas[i].module == object)
                remove_area(areas + i);
    }
    captures -= kind == STREAM && object->capture;
    free(object->name);
    object->name = NULL;
    object->capture = 0;
    object->done = object->issued; /* what a stream does, it finishes */
    object->kind = FREE;
    return CUDA_SUCCESS;
}

static void destroy_context(void) {
    for (size_t i = DEFAULT_STREAMS; i < used_objects; i++)
        if (objects[i].kind != FREE)
            destroy(objects + i, objects[i].kind);
    while (area_count)
        remove_area(areas + area_count - 1);
}

static const char *name_of(const void *function) {
    struct object *object = find(function, FUNCTION);
    return object ? object->name : "unknown";
}

/* Streams, captures and events. */

static struct object *stream_of(void *stream) {
    const uint64_t address = ADDRESS(stream);
    objects[0].kind = objects[1].kind = STREAM;
    return address > 2 ? find(stream, STREAM) : objects + address / 2;
}

static int invalidated(int code) {
    for (size_t i = 0; i < used_objects && captures; i++)
        if (objects[i].kind == STREAM && objects[i].capture)
            objects[i].status = 2;
    return code;
}

/* Looks a stream up that gets work. */
static int receive(void *handle, struct object **stream) {
    *stream = stream_of(handle);
    if (!*stream)
        return CUDA_ERROR_INVALID_HANDLE;
    if ((*stream)->status == 2)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (*stream == objects && captures)
        for (size_t i = 0; i < used_objects; i++)
            if (objects[i].kind == STREAM && objects[i].capture
                && !(objects[i].flags & NON_BLOCKING))
                return invalidated(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    return CUDA_SUCCESS;
}

/* True if work is done now: a capture only records it. */
static int issue(struct object *stream) {
    if (stream->capture)
        return 0;
    stream->issued = ++sequence;
    if (!held)
        stream->done = sequence;
    return 1;
}

static int finish(int all) { /* all streams, or those that wait for the legacy stream */
    for (size_t i = 0; i < used_objects; i++)
        if (objects[i].kind == STREAM && (all || !(objects[i].flags & NON_BLOCKING)))
            objects[i].done = objects[i].issued;
    return CUDA_SUCCESS;
}

static int copy(
    uint64_t to, int to_device, uint64_t from, int from_device, size_t size
) {
    if (!within(to, size, to_device) || !within(from, size, from_device))
        return CUDA_ERROR_INVALID_VALUE;
    finish(0);
    memmove(POINTER(to), POINTER(from), size);
    return CUDA_SUCCESS;
}

static int copy_on(
    void *handle, uint64_t to, int to_device, uint64_t from, int from_device, size_t size
) {
    struct object *stream;
    int code = receive(handle, &stream);
    if (code)
        return code;
    if (!within(to, size, to_device) || !within(from, size, from_device))
        return CUDA_ERROR_INVALID_VALUE;
    if (issue(stream))
        memmove(POINTER(to), POINTER(from), size);
    return CUDA_SUCCESS;
}

static int set_on(void *handle, uint64_t to, unsigned value, size_t width, size_t count) {
    struct object *stream;
    int code = receive(handle, &stream);
    if (code)
        return code;
    if (to % width || count > MEMORY || !within(to, width * count, 1))
        return CUDA_ERROR_INVALID_VALUE;
    if (issue(stream))
        for (size_t i = 0; i < count; i++)
            memcpy(POINTER(to + i * width), &value, width); /* its low byte comes first */
    return CUDA_SUCCESS;
}

static int allocate_on(void *handle, size_t size, uint64_t *out) {
    struct object *stream;
    int code = receive(handle, &stream);
    return code ? code : allocate(DEVICE, size, out, NULL, NULL);
}

static int release_on(void *handle, uint64_t address) {
    struct object *stream;
    int code = receive(handle, &stream);
    return code ? code : release(address, DEVICE);
}

static int synchronize(void *handle) {
    struct object *stream = stream_of(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    stream->done = stream->issued;
    return stream == objects ? finish(0) : CUDA_SUCCESS;
}

static int query(void *handle) {
    struct object *stream = stream_of(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    return stream->done < stream->issued ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

static int record(void *event, void *handle) {
    struct object *stream, *object = find(event, EVENT);
    int code = object ? receive(handle, &stream) : CUDA_ERROR_INVALID_HANDLE;
    if (code)
        return code;
    object->capture = stream->capture;
    if (issue(stream)) {
        object->of = stream;
        object->issued = stream->issued;
    }
    return CUDA_SUCCESS;
}

static int reached(void *event, int wait) {
    struct object *object = find(event, EVENT);
    if (!object)
        return CUDA_ERROR_INVALID_HANDLE;
    if (object->capture)
        return CUDA_ERROR_CAPTURED_EVENT;
    if (!object->of || object->of->done >= object->issued)
        return CUDA_SUCCESS;
    if (!wait)
        return CUDA_ERROR_NOT_READY;
    object->of->done = object->issued;
    return CUDA_SUCCESS;
}

/* A stream that waits for an event of a capture joins the capture. */
static int wait_for(void *handle, void *event) {
    struct object *stream, *object = find(event, EVENT);
    int code = object ? receive(handle, &stream) : CUDA_ERROR_INVALID_HANDLE;
    if (code)
        return code;
    if (!object->capture)
        return stream->capture && object->of
                   ? invalidated(CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
                   : CUDA_SUCCESS;
    if (stream->capture)
        return stream->capture != object->capture
                   ? invalidated(CUDA_ERROR_STREAM_CAPTURE_MERGE)
                   : CUDA_SUCCESS;
    for (size_t i = 0; i < used_objects; i++)
        if (objects[i].kind == STREAM && objects[i].capture == object->capture) {
            stream->capture = object->capture;
            stream->status = objects[i].status;
            captures++;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_CAPTURED_EVENT; /* of a capture that has ended */
}

static int capture_status(void *handle, int *status) {
    struct object *stream = stream_of(handle);
    if (!stream || !status)
        return stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
    *status = stream->status;
    return CUDA_SUCCESS;
}

#endif
