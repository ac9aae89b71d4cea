/* A stub of NVIDIA's driver library: fastopt's calls of CUDA are tested without a GPU.
 *
 * Device memory is host memory. Copies and memsets are done at once, and launches are only
 * recorded. What the driver refuses, the stub refuses with the same code, and it is strict
 * where the driver's behaviour is undefined. tests/support/cuda_stub.py builds the library
 * and reads its log; the functions named stub_... control it. A function is added by one
 * CALL: its name, its parameters, what it needs, its result, and what the log says.
 */
#include "cuda_stub_device.h"

/* Contexts. */

static int retain(int device, void *out) {
    if (device || !out)
        return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_ERROR_INVALID_VALUE;
    retained++;
    memcpy(out, &(void *){&context}, sizeof(void *));
    return CUDA_SUCCESS;
}

static int release_context(int device) {
    if (device || !retained)
        return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_ERROR_INVALID_CONTEXT;
    if (!--retained)
        destroy_context();
    return CUDA_SUCCESS;
}

static int current(void) {
    if (!depth)
        return CUDA_ERROR_INVALID_CONTEXT;
    return retained ? CUDA_SUCCESS : CUDA_ERROR_CONTEXT_IS_DESTROYED;
}

static int get_current(void *out) {
    void *top = depth ? contexts[depth - 1] : NULL;
    return out ? (memcpy(out, &top, sizeof top), CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}

static int push(void *handle) {
    if (handle != &context || depth == CONTEXTS)
        return CUDA_ERROR_INVALID_CONTEXT;
    contexts[depth++] = handle;
    return CUDA_SUCCESS;
}

static int pop(void *out) {
    if (!depth)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (out)
        get_current(out);
    depth--;
    return CUDA_SUCCESS;
}

static int set_current(void *handle) {
    if (handle && handle != &context)
        return CUDA_ERROR_INVALID_CONTEXT;
    depth -= depth > 0;
    return handle ? push(handle) : CUDA_SUCCESS;
}

/* The beginning and the end of each call. */

static int fault(const char *name, int needs) {
    for (int i = 0; i < failure_count; i++)
        if (!strcmp(failures[i].name, name) && !--failures[i].left) {
            for (size_t e = 0; e < sizeof errors / sizeof *errors; e++)
                if (errors[e].code == failures[i].code && errors[e].sticky)
                    sticky = errors[e].code;
            return failures[i].code;
        }
    return needs >= CONTEXT ? sticky : CUDA_SUCCESS;
}

static int enter(const char *name, int needs) {
    pthread_mutex_lock(&lock);
    int code = needs && !initialized ? CUDA_ERROR_NOT_INITIALIZED : CUDA_SUCCESS;
    if (!code && (failure_count || sticky))
        code = fault(name, needs);
    if (!code && needs >= CONTEXT)
        code = current();
    if (!code && needs == NO_CAPTURE && captures && mode != RELAXED)
        code = invalidated(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return code;
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
    for (;;) {
        va_list values;
        va_start(values, format);
        const size_t room = text_room - text_size;
        int length = vsnprintf(text ? text + text_size : NULL, room, format, values);
        va_end(values);
        if (length >= 0 && (size_t) length < room) {
            text_size += (size_t) length;
            return;
        }
        const size_t wanted = text_room ? 2 * text_room : TEXT;
        char *larger = realloc(text, wanted);
        if (length < 0 || !larger)
            return;
        text = larger;
        text_room = wanted;
    }
}

static int leave(int code) {
    if (!quiet)
        say(" result=%d\n", code);
    pthread_mutex_unlock(&lock);
    return code;
}

/* What a call stored: a handle or an address. */
static uint64_t stored(const void *out, int code) {
    uint64_t value = 0;
    if (!code && out)
        memcpy(&value, out, sizeof(void *));
    return value;
}

static int row_of(const struct object *function) { /* the last that was declared */
    int row = declared_count - 1;
    for (; row >= 0; row--)
        if (!strncmp(function->name, declared[row].name, strlen(declared[row].name)))
            break;
    return row;
}

/* The bytes of a kernel's parameters, whose sizes were declared. */
static const char *bytes_of(const void *function, void **parameters) {
    static char bytes[TEXT];
    char *at = bytes;
    const int row = row_of(find(function, FUNCTION));
    for (int i = 0; row >= 0 && i < declared[row].count; i++) {
        const unsigned char *parameter = parameters[i];
        at += i ? sprintf(at, ",") : 0;
        for (int b = 0; b < declared[row].sizes[i] && at < bytes + TEXT - 1024; b++)
            at += sprintf(at, "%02x", parameter[b]);
    }
    *at = 0;
    return bytes;
}

static int launch(
    const void *function, const unsigned *grid, const unsigned *block, unsigned shared,
    void *handle, void **parameters, void **extra
) {
    struct object *stream;
    int code = CUDA_ERROR_INVALID_HANDLE;
    if (find(function, FUNCTION))
        code = receive(handle, &stream);
    if (code || extra)
        return code ? code : CUDA_ERROR_NOT_SUPPORTED;
    for (int i = 0; i < 3; i++)
        if (!grid[i] || !block[i] || grid[i] > (i ? 65535 : INT32_MAX)
            || block[i] > (i < 2 ? 1024 : 64))
            return CUDA_ERROR_INVALID_VALUE;
    if (block[0] * block[1] * block[2] > 1024 || shared > 48 << 10)
        return CUDA_ERROR_INVALID_VALUE;
    const int row = row_of(find(function, FUNCTION));
    if (row >= 0 && declared[row].count && !parameters)
        return CUDA_ERROR_INVALID_VALUE;
    issue(stream);
    return CUDA_SUCCESS;
}

static int find_function(void *out, void *handle, const char *name) {
    struct object *module = find(handle, MODULE);
    if (!module || !name || !out)
        return module ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
    for (size_t i = 0; i < used_objects; i++) {
        struct object *object = objects + i;
        if (object->kind == FUNCTION && object->of == module && !strcmp(object->name, name))
            return memcpy(out, &object, sizeof object), CUDA_SUCCESS;
    }
    return create(FUNCTION, (struct object){.name = strdup(name), .of = module}, out);
}

static int find_global(uint64_t *out, size_t *size, void *handle, const char *name) {
    struct object *module = find(handle, MODULE);
    uint64_t address;
    if (!module || !name)
        return module ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
    for (int g = 0; g < global_count; g++) {
        if (strcmp(globals[g].name, name))
            continue;
        for (size_t i = 0; i < area_count; i++)
            if (areas[i].module == module && !strcmp(areas[i].name, name)) {
                if (size)
                    *size = areas[i].size;
                if (out)
                    *out = areas[i].address;
                return CUDA_SUCCESS;
            }
        int code = allocate(GLOBAL, globals[g].size, &address, module, name);
        return code ? code : find_global(out, size, handle, name);
    }
    return CUDA_ERROR_NOT_FOUND;
}

/* What the functions about attributes and errors answer. */

static int attribute_of_device(int *value, int attribute, int device) {
    for (int i = 0; value && i < attribute_count; i++)
        if (attributes[i].attribute == attribute) {
            *value = attributes[i].value;
            return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_VALUE;
}

static int attribute_of_function(int *value, int attribute, void *function) {
    static const int values[] = {1024, 0, 0, 0, 32, 90, 90, 0, 48 << 10, -1};
    if (!value || attribute < 0 || attribute > 9)
        return CUDA_ERROR_INVALID_VALUE;
    *value = values[attribute];
    return find(function, FUNCTION) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

static int attribute_of_pointer(void *out, int attribute, uint64_t address) {
    const struct area *area = area_of(address);
    if (!out || !area)
        return CUDA_ERROR_INVALID_VALUE;
    const uint64_t handle = ADDRESS(&context), size = area->size;
    const int type = area->place == HOST ? 1 : 2, zero = 0;
    switch (attribute) {
    case 1: memcpy(out, &handle, sizeof handle); break;
    case 2: memcpy(out, &type, sizeof type); break;
    case 4: if (area->place != HOST) return CUDA_ERROR_INVALID_VALUE; /* fall through */
    case 3: memcpy(out, &address, sizeof address); break;
    case 8: memcpy(out, &zero, 1); break;
    case 9: memcpy(out, &zero, sizeof zero); break;
    case 11: memcpy(out, &area->address, sizeof area->address); break;
    case 12: memcpy(out, &size, sizeof size); break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

static int words_of(int code, const char **out, int name) {
    for (size_t e = 0; out && e < sizeof errors / sizeof *errors; e++)
        if (errors[e].code == code) {
            *out = name ? errors[e].name : errors[e].words;
            return CUDA_SUCCESS;
        }
    if (out)
        *out = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

/* The driver's functions. */

#define CALL(name, parameters, needs, result, ...)                                     \
    int name parameters {                                                              \
        int code = enter(#name, needs);                                                \
        if (!code)                                                                     \
            code = result;                                                             \
        if (!quiet)                                                                    \
            say(#name __VA_ARGS__);                                                    \
        return leave(code);                                                            \
    }

#define STORE(out, value) ((out) ? (*(out) = (value), 0) : CUDA_ERROR_INVALID_VALUE)

CALL(cuInit, (unsigned flags), NOTHING,
     flags ? CUDA_ERROR_INVALID_VALUE : (initialized = 1, 0), " flags=%u", flags)
CALL(cuDriverGetVersion, (int *out), NOTHING, STORE(out, 13000))
CALL(cuGetErrorName, (int error, const char **out), NOTHING, words_of(error, out, 1),
     " error=%d", error)
CALL(cuGetErrorString, (int error, const char **out), NOTHING, words_of(error, out, 0),
     " error=%d", error)

CALL(cuDeviceGetCount, (int *out), INITIALIZED, STORE(out, 1))
CALL(cuDeviceGet, (int *out, int ordinal), INITIALIZED,
     ordinal ? CUDA_ERROR_INVALID_DEVICE : STORE(out, 0), " ordinal=%d", ordinal)
CALL(cuDeviceGetAttribute, (int *out, int attribute, int device), INITIALIZED,
     attribute_of_device(out, attribute, device), " attribute=%d device=%d", attribute,
     device)
CALL(cuDeviceGetName, (char *out, int size, int device), INITIALIZED,
     device                ? CUDA_ERROR_INVALID_DEVICE
     : !out || size <= 0   ? CUDA_ERROR_INVALID_VALUE
                           : (snprintf(out, (size_t) size, "Stub of a GPU"), 0),
     " device=%d", device)

CALL(cuDevicePrimaryCtxRetain, (void **out, int device), INITIALIZED, retain(device, out),
     " device=%d", device)
CALL(cuDevicePrimaryCtxGetState, (int device, unsigned *flags, int *active), INITIALIZED,
     device                                     ? CUDA_ERROR_INVALID_DEVICE
     : STORE(flags, 0) || STORE(active, !!retained) ? CUDA_ERROR_INVALID_VALUE
                                                : CUDA_SUCCESS,
     " device=%d", device)
CALL(cuDevicePrimaryCtxRelease_v2, (int device), INITIALIZED, release_context(device),
     " device=%d", device)
CALL(cuCtxGetCurrent, (void **out), INITIALIZED, get_current(out), " context=" HEX,
     stored(out, code))
CALL(cuCtxGetDevice, (int *out), CONTEXT, STORE(out, 0))
CALL(cuCtxSetCurrent, (void *handle), INITIALIZED, set_current(handle), " context=" HEX,
     ADDRESS(handle))
CALL(cuCtxPushCurrent_v2, (void *handle), INITIALIZED, push(handle), " context=" HEX,
     ADDRESS(handle))
CALL(cuCtxPopCurrent_v2, (void **out), INITIALIZED, pop(out), " context=" HEX,
     stored(out, code))
CALL(cuCtxSynchronize, (void), NO_CAPTURE, finish(1))

CALL(cuModuleLoadData, (void **out, const void *image), NO_CAPTURE,
     image ? create(MODULE, (struct object){0}, out) : CUDA_ERROR_INVALID_VALUE,
     " image=" HEX " module=" HEX, ADDRESS(image), stored(out, code))
CALL(cuModuleUnload, (void *module), NO_CAPTURE, destroy(module, MODULE), " module=" HEX,
     ADDRESS(module))
CALL(cuModuleGetFunction, (void **out, void *module, const char *name), CONTEXT,
     find_function(out, module, name), " module=" HEX " function=" HEX " kernel=%s",
     ADDRESS(module), stored(out, code), name ? name : "")
CALL(cuModuleGetGlobal_v2, (uint64_t *out, size_t *size, void *module, const char *name),
     CONTEXT, find_global(out, size, module, name),
     " module=" HEX " address=" HEX " global=%s", ADDRESS(module), stored(out, code),
     name ? name : "")
CALL(cuFuncGetAttribute, (int *out, int attribute, void *function), CONTEXT,
     attribute_of_function(out, attribute, function), " attribute=%d kernel=%s", attribute,
     name_of(function))

CALL(cuMemAlloc_v2, (uint64_t *out, size_t size), NO_CAPTURE,
     allocate(DEVICE, size, out, NULL, NULL), " size=%zu address=" HEX, size,
     stored(out, code))
CALL(cuMemFree_v2, (uint64_t address), NO_CAPTURE, release(address, DEVICE),
     " address=" HEX, address)
CALL(cuMemAllocAsync, (uint64_t *out, size_t size, void *stream), CONTEXT,
     allocate_on(stream, size, out), " size=%zu stream=" HEX " address=" HEX, size,
     ADDRESS(stream), stored(out, code))
CALL(cuMemFreeAsync, (uint64_t address, void *stream), CONTEXT,
     release_on(stream, address), " address=" HEX " stream=" HEX, address, ADDRESS(stream))
CALL(cuMemHostAlloc, (void **out, size_t size, unsigned flags), NO_CAPTURE,
     allocate(HOST, size, out, NULL, NULL), " size=%zu flags=%u address=" HEX, size, flags,
     stored(out, code))
CALL(cuMemFreeHost, (void *address), NO_CAPTURE, release(ADDRESS(address), HOST),
     " address=" HEX, ADDRESS(address))
CALL(cuPointerGetAttribute, (void *out, int attribute, uint64_t address), CONTEXT,
     attribute_of_pointer(out, attribute, address), " attribute=%d address=" HEX,
     attribute, address)

CALL(cuMemcpyHtoD_v2, (uint64_t to, const void *from, size_t size), NO_CAPTURE,
     copy(to, 1, ADDRESS(from), 0, size), " to=" HEX " from=" HEX " size=%zu", to,
     ADDRESS(from), size)
CALL(cuMemcpyDtoH_v2, (void *to, uint64_t from, size_t size), NO_CAPTURE,
     copy(ADDRESS(to), 0, from, 1, size), " to=" HEX " from=" HEX " size=%zu", ADDRESS(to),
     from, size)
CALL(cuMemcpyHtoDAsync_v2, (uint64_t to, const void *from, size_t size, void *stream),
     CONTEXT, copy_on(stream, to, 1, ADDRESS(from), 0, size),
     " to=" HEX " from=" HEX " size=%zu stream=" HEX, to, ADDRESS(from), size,
     ADDRESS(stream))
CALL(cuMemcpyDtoHAsync_v2, (void *to, uint64_t from, size_t size, void *stream), CONTEXT,
     copy_on(stream, ADDRESS(to), 0, from, 1, size),
     " to=" HEX " from=" HEX " size=%zu stream=" HEX, ADDRESS(to), from, size,
     ADDRESS(stream))
CALL(cuMemcpyDtoDAsync_v2, (uint64_t to, uint64_t from, size_t size, void *stream),
     CONTEXT, copy_on(stream, to, 1, from, 1, size),
     " to=" HEX " from=" HEX " size=%zu stream=" HEX, to, from, size, ADDRESS(stream))
CALL(cuMemsetD8Async, (uint64_t to, unsigned char value, size_t count, void *stream),
     CONTEXT, set_on(stream, to, value, 1, count),
     " to=" HEX " value=%u count=%zu stream=" HEX, to, value, count, ADDRESS(stream))
CALL(cuMemsetD32Async, (uint64_t to, unsigned value, size_t count, void *stream),
     CONTEXT, set_on(stream, to, value, 4, count),
     " to=" HEX " value=%u count=%zu stream=" HEX, to, value, count, ADDRESS(stream))

CALL(cuLaunchKernel,
     (void *function, unsigned x, unsigned y, unsigned z, unsigned block_x,
      unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **parameters,
      void **extra),
     CONTEXT,
     launch(function, (unsigned[]){x, y, z}, (unsigned[]){block_x, block_y, block_z},
            shared, stream, parameters, extra),
     " kernel=%s function=" HEX " grid=%u,%u,%u block=%u,%u,%u shared=%u stream=" HEX
     " parameters=" HEX " values=%s",
     name_of(function), ADDRESS(function), x, y, z, block_x, block_y, block_z, shared,
     ADDRESS(stream), ADDRESS(parameters), code ? "" : bytes_of(function, parameters))

CALL(cuStreamCreate, (void **out, unsigned flags), CONTEXT,
     flags > 1 ? CUDA_ERROR_INVALID_VALUE
               : create(STREAM, (struct object){.flags = flags}, out),
     " flags=%u stream=" HEX, flags, stored(out, code))
CALL(cuStreamDestroy_v2, (void *stream), CONTEXT, destroy(stream, STREAM), " stream=" HEX,
     ADDRESS(stream))
CALL(cuThreadExchangeStreamCaptureMode, (int *other), INITIALIZED, exchange(other),
     " mode=%d", other ? *other : -1)
CALL(cuStreamSynchronize, (void *stream), NO_CAPTURE, synchronize(stream), " stream=" HEX,
     ADDRESS(stream))
CALL(cuStreamQuery, (void *stream), NO_CAPTURE, query(stream), " stream=" HEX,
     ADDRESS(stream))
CALL(cuStreamWaitEvent, (void *stream, void *event, unsigned flags), CONTEXT,
     wait_for(stream, event), " stream=" HEX " event=" HEX " flags=%u", ADDRESS(stream),
     ADDRESS(event), flags)
CALL(cuStreamIsCapturing, (void *stream, int *out), CONTEXT, capture_status(stream, out),
     " stream=" HEX, ADDRESS(stream))
CALL(cuEventCreate, (void **out, unsigned flags), CONTEXT,
     flags > 7 ? CUDA_ERROR_INVALID_VALUE
               : create(EVENT, (struct object){.flags = flags}, out),
     " flags=%u event=" HEX, flags, stored(out, code))
CALL(cuEventDestroy_v2, (void *event), CONTEXT, destroy(event, EVENT), " event=" HEX,
     ADDRESS(event))
CALL(cuEventRecord, (void *event, void *stream), CONTEXT, record(event, stream),
     " event=" HEX " stream=" HEX, ADDRESS(event), ADDRESS(stream))
CALL(cuEventQuery, (void *event), NO_CAPTURE, reached(event, 0), " event=" HEX,
     ADDRESS(event))
CALL(cuEventSynchronize, (void *event), NO_CAPTURE, reached(event, 1), " event=" HEX,
     ADDRESS(event))

/* What controls the stub. */

#define CONTROL(name, parameters, ...)                                                 \
    int64_t name parameters {                                                          \
        int64_t answer = 0;                                                            \
        pthread_mutex_lock(&lock);                                                     \
        __VA_ARGS__                                                                    \
        pthread_mutex_unlock(&lock);                                                   \
        return answer;                                                                 \
    }

/* Copies the log, and a zero after it, as far as there is room. Returns its size. */
CONTROL(stub_log, (char *buffer, size_t size),
    const size_t copied = text_size < size ? text_size : size ? size - 1 : 0;
    if (size) {
        if (copied)
            memcpy(buffer, text, copied);
        buffer[copied] = 0;
    }
    answer = (int64_t) text_size;)

CONTROL(stub_clear, (void), text_size = 0;)
CONTROL(stub_quiet, (int on), quiet = on;)

/* While it is held, work stays unfinished until something waits for it. */
CONTROL(stub_hold, (int on),
    held = on;
    if (!on)
        finish(1);)

/* Begins or ends the capture of a stream, and of those that joined it. Returns the status
 * it had, or -1 for what cannot be captured. */
CONTROL(stub_capture, (void *handle, int on),
    struct object *stream = stream_of(handle);
    answer = stream && stream != objects ? stream->status : -1;
    if (!answer && on) {
        stream->capture = ++sequence;
        stream->status = 1;
        captures++;
    } else if (answer > 0 && !on) {
        const uint64_t number = stream->capture;
        for (size_t i = 0; i < used_objects; i++)
            if (objects[i].kind == STREAM && objects[i].capture == number) {
                objects[i].capture = 0;
                objects[i].status = 0;
                captures--;
            }
    })

CONTROL(stub_capture_status, (void *handle),
    const struct object *stream = stream_of(handle);
    answer = stream ? stream->status : -1;)

/* The nth call from now on of a function fails. */
CONTROL(stub_fail, (const char *name, int64_t nth, int code),
    answer = nth > 0 && failure_count < FAILURES ? failure_count++ : -1;
    if (answer >= 0) {
        failures[answer].name = strdup(name);
        failures[answer].left = nth;
        failures[answer].code = code;
    })

CONTROL(stub_clear_failures, (void),
    while (failure_count)
        free(failures[--failure_count].name);
    sticky = 0;)

/* Declares the sizes of the parameters of the kernels whose names begin so. */
CONTROL(stub_parameters, (const char *prefix, const int *sizes, int count),
    answer = count <= PARAMETERS && declared_count < DECLARED ? declared_count++ : -1;
    if (answer >= 0) {
        declared[answer].name = strdup(prefix);
        declared[answer].count = count;
        memcpy(declared[answer].sizes, sizes, (size_t) count * sizeof *sizes);
    })

/* Gives all modules a global of this name; without it, they have none. */
CONTROL(stub_global, (const char *name, size_t size),
    answer = global_count < DECLARED ? global_count++ : -1;
    if (answer >= 0) {
        globals[answer].name = strdup(name);
        globals[answer].size = size;
    })

CONTROL(stub_attribute, (int attribute, int value),
    int i = 0;
    while (i < attribute_count && attributes[i].attribute != attribute)
        i++;
    answer = i < ATTRIBUTES ? i : -1;
    if (answer >= 0) {
        attributes[i].attribute = attribute;
        attributes[i].value = value;
        attribute_count += i == attribute_count;
    })

/* How much there is of what must be freed in the end. */
CONTROL(stub_live, (const char *what),
    static const char *const kinds[] = {"", "module", "function", "stream", "event"};
    static const char *const places[] = {"device", "host", "global"};
    answer = strcmp(what, "context") ? 0 : retained;
    for (size_t i = DEFAULT_STREAMS; i < used_objects; i++)
        answer += objects[i].kind != FREE && !strcmp(kinds[objects[i].kind], what);
    for (size_t i = 0; i < area_count; i++)
        answer += !strcmp(places[areas[i].place], what);)
