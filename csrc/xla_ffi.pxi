# XLA's structures, declared as far as they are read, so that no jaxlib is needed to build.
# This is version 0.1 of XLA's typed FFI, which grows at the ends.

cdef enum:
    METADATA = 1  # the type of an extension: XLA asks what we are
    EXECUTE = 3  # the stage
    S32 = 4
    S64 = 5
    U32 = 8
    F16 = 10
    F32 = 11
    F64 = 12
    BF16 = 16
    ATTR_ARRAY = 1
    ATTR_SCALAR = 3
    ATTR_STRING = 4
    BUFFER = 1  # the type of an operand or a result
    INVALID_ARGUMENT = 3  # codes of errors
    RESOURCE_EXHAUSTED = 8
    INTERNAL = 13

cdef struct Extension:
    size_t struct_size
    int type
    Extension* next

cdef struct Version:
    size_t struct_size
    Extension* extension
    int major, minor

cdef struct Metadata:
    size_t struct_size
    Version version
    uint32_t traits

cdef struct MetadataExtension:
    Extension base
    Metadata* metadata

cdef struct Failure:
    size_t struct_size
    Extension* extension
    const char* message
    int code

ctypedef void* (*fail_t)(Failure* failure) noexcept nogil

ctypedef void (*task_t)(void* data) noexcept nogil

cdef struct Task:
    size_t struct_size
    Extension* extension
    void* context
    task_t task
    void* data

cdef struct Destroy:
    size_t struct_size
    Extension* extension
    void* error

cdef struct XlaApi:
    size_t struct_size
    Extension* extension
    Version version
    void* internal
    fail_t fail
    void* get_message
    void (*destroy)(Destroy* args) noexcept nogil
    void* others[8]
    void* (*schedule)(Task* task) noexcept nogil  # returns an error, or NULL

cdef struct Buffer:
    size_t struct_size
    Extension* extension
    int dtype
    void* data
    int64_t rank
    int64_t* dims

cdef struct Buffers:  # XLA's Args and Rets
    size_t struct_size
    Extension* extension
    int64_t size
    int* types
    Buffer** at

cdef struct Span:
    const char* at
    size_t length

cdef struct Scalar:
    int dtype
    void* value

cdef struct Array:
    int dtype
    size_t size
    void* data

cdef struct Attributes:
    size_t struct_size
    Extension* extension
    int64_t size
    int* types
    Span** names
    void** at

cdef struct Frame:
    size_t struct_size
    Extension* extension
    const XlaApi* api
    void* context
    int stage
    Buffers args
    Buffers results
    Attributes attributes
