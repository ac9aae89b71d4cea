# cython: language_level=3, boundscheck=False, wraparound=False
"""Whether tensors are where they were, as ``Tensors`` in fastopt/torch/memory.py says it
in Python, at a tenth of the time: by DLPack's C exchange API (DLPack 1.3), and by the
addresses of what Python's dicts and lists hold.
"""
from cpython.dict cimport PyDict_Next
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject, PyTypeObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport (
    int32_t, int64_t, intptr_t, uint8_t, uint16_t, uint32_t, uint64_t
)
from libc.stdlib cimport calloc, free

from numpy import zeros

cdef struct DLTensor:
    void* data
    int32_t device_type, device_id
    int32_t ndim
    uint8_t code, bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides
    uint64_t byte_offset

ctypedef int (*from_object_t)(void* tensor, DLTensor* out) except -1

cdef struct ExchangeAPI:
    uint32_t major, minor
    void* previous
    void* allocate
    void* managed_from_object
    void* managed_to_object
    from_object_t from_object
    void* current_stream

# A tensor's address, dtype, device, dimensions, flags and dispatch keys, and of each
# dimension its size and stride.
cdef enum:
    MOST_DIMENSIONS = 8
    DIMENSIONS = 6
    WORDS = DIMENSIONS + 2 * MOST_DIMENSIONS
    COMPLEX = 5
    NEGATED = 1
    CONJUGATED = 2

# In words: where a tensor's object has the address of what it is in C++, and where that
# has the tensor's dispatch keys. 0 if it is not known.
cdef Py_ssize_t inner_at = 0, keys_at = 0


def learn(list samples):
    """Learn where tensors have their dispatch keys, which say whether a view is to be
    negated when it is read, and DLPack does not: to ask torch takes longer than all
    else here, and lets other threads run in the middle of a step. From tensors with
    different keys, each with its address in C++ and its keys."""
    global inner_at, keys_at
    cdef Py_ssize_t i, j, length = type(samples[0][0]).__basicsize__ // 8
    inner_at = keys_at = 0
    for tensor, inner, keys in samples:
        i = j = 0
        while i < length and word(<void*> tensor, i) != <uint64_t> inner:
            i += 1
        if i == length:
            break
        while j < 24 and word(<void*> <size_t> inner, j) != <uint64_t> keys:
            j += 1
        if j == 24 or (inner_at and (i, j) != (inner_at, keys_at)):
            break
        inner_at, keys_at = i, j
    else:
        return
    inner_at = keys_at = 0


cdef inline uint64_t word(const void* where, Py_ssize_t i) noexcept:
    return (<const uint64_t*> where)[i]


cdef inline int64_t keys_of(tensor) noexcept:
    """A tensor's dispatch keys; 0 if it is not known where they are."""
    if not inner_at:
        return 0
    return <int64_t> word(<void*> <size_t> word(<void*> tensor, inner_at), keys_at)


def drop_gradients(list groups):
    """Set the gradients of all parameters to None. The destructor of one may run Python
    code that changes the groups."""
    for group in list(groups):
        for param in list(group["params"]):
            param.grad = None


cdef ExchangeAPI* exchange(type kind) except NULL:
    capsule = kind.__dlpack_c_exchange_api__
    api = <ExchangeAPI*> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    if api.major != 1 or not api.from_object:
        raise AttributeError(f"{kind} has DLPack's exchange API of another version")
    return api


cdef inline bint follows(list objects, PyObject* value, Py_ssize_t* place) noexcept:
    """Whether the object at a place is this one; if so, the place moves on."""
    if place[0] == PyList_GET_SIZE(objects):
        return False
    if value != PyList_GET_ITEM(objects, place[0]):
        return False
    place[0] += 1
    return True


cdef bint holds(dict_, list objects, Py_ssize_t* place):
    """Whether a dict's values are these objects, from a place on, which moves on."""
    cdef Py_ssize_t at = 0
    cdef PyObject* value
    while PyDict_Next(dict_, &at, NULL, &value):
        if not follows(objects, value, place):
            return False
    return True


cdef class Tensors:
    cdef ExchangeAPI* api
    cdef list params, options, buffers
    cdef list objects  # the parameters, with None after each group, and the state
    cdef object grad_of, is_neg, is_conj
    cdef bytes planned
    cdef bint single
    cdef int64_t* words  # of each parameter, then of each buffer
    cdef int64_t* at  # of self.addresses
    cdef readonly object addresses
    cdef public bint moved
    cdef readonly bint same_options
    cdef readonly list odd

    def __cinit__(
        self, list params, list planned, list groups, state, list buffers, bint single
    ):
        cdef Py_ssize_t i
        cdef DLTensor view
        self.api = exchange(type(params[0]))
        self.params, self.buffers = params, buffers
        self.single = single
        self.planned = bytes(planned)
        self.note(groups)
        self.objects = []
        if not single:
            for group in groups:
                self.objects += [*group["params"], None]
        for key, value in state.items():
            self.objects += [key, value]
            if type(value) is dict:
                self.objects += value.values()
        # What reads the attribute, without looking for it each time.
        kind = type(params[0])
        self.grad_of, self.is_neg, self.is_conj = kind.grad, kind.is_neg, kind.is_conj
        for param in params:
            if type(param).grad is not self.grad_of:
                raise AttributeError("parameters with gradients of different kinds")
        self.addresses = zeros(len(params), "int64")
        self.at = <int64_t*> <intptr_t> self.addresses.ctypes.data
        self.words = <int64_t*> calloc(
            (len(params) + len(buffers) + 1) * WORDS, sizeof(int64_t)
        )
        if not self.words:
            raise MemoryError("no memory to note where tensors are")
        for i, tensor in enumerate(params + buffers):
            if i >= len(params) or self.planned[i]:
                if not self.read(tensor, &view):
                    raise AttributeError(f"{type(tensor)} lies nowhere for DLPack")
                self.write(tensor, &view, self.words + i * WORDS)

    def __dealloc__(self):
        free(self.words)

    def note(self, list groups):
        self.options = [value for group in groups for value in group.values()]

    cdef bint read(self, tensor, DLTensor* view) except -1:
        """Where a tensor lies; False if it has no memory to lie in."""
        try:
            self.api.from_object(<void*> tensor, view)
        except (RuntimeError, ValueError, BufferError, Warning):
            return False  # sparse, say, or a wrapper
        return True

    cdef int64_t flags(self, tensor, DLTensor* view) except -1:
        """What DLPack does not say: whether a view is lazily negated or conjugated."""
        cdef int64_t flags = NEGATED if self.is_neg(tensor) else 0
        if view.code == COMPLEX and self.is_conj(tensor):
            flags |= CONJUGATED
        return flags

    cdef int write(self, tensor, DLTensor* view, int64_t* words) except -1:
        cdef int32_t d
        if view.ndim > MOST_DIMENSIONS:
            raise AttributeError(f"more than {MOST_DIMENSIONS} dimensions")
        words[0] = <int64_t> view.data
        words[1] = view.code << 8 | view.bits
        words[2] = <int64_t> view.device_type << 32 | view.device_id
        words[3] = view.ndim
        words[4], words[5] = self.flags(tensor, view), keys_of(tensor)
        words += DIMENSIONS
        for d in range(view.ndim):
            words[2 * d], words[2 * d + 1] = view.shape[d], view.strides[d]
        return 0

    cdef bint alike(self, tensor, DLTensor* view, const int64_t* words) except -1:
        """Whether a tensor's elements are in memory as those of a noted one."""
        cdef int32_t d
        cdef int64_t keys = keys_of(tensor)
        cdef bint empty = False, same = True
        if (
            view.ndim != words[3] or (view.code << 8 | view.bits) != words[1]
            or (<int64_t> view.device_type << 32 | view.device_id) != words[2]
        ):
            return False
        if (not keys or keys != words[5]) and self.flags(tensor, view) != words[4]:
            return False
        words += DIMENSIONS
        for d in range(view.ndim):
            if view.shape[d] != words[2 * d]:
                return False
            empty |= view.shape[d] == 0
            same &= view.strides[d] == words[2 * d + 1] or view.shape[d] == 1
        return empty or (same and view.data != NULL)

    cdef bint stays(self, tensor, const int64_t* words) except -1:
        """Whether a noted tensor is where it was, and lies there as it did."""
        cdef DLTensor view
        return (
            self.read(tensor, &view)
            and <int64_t> view.data == words[0]
            and self.alike(tensor, &view, words)
        )

    cdef bint as_noted(self, list groups, state):
        """Whether the parameters and the entries of the state are the same objects."""
        cdef Py_ssize_t i, k = 0, place = 0, at = 0
        cdef PyObject* key
        cdef PyObject* value
        cdef list params
        self.same_options = True
        for group in groups:
            self.same_options = self.same_options and holds(group, self.options, &at)
            if self.single:
                continue
            params = group["params"]
            for i in range(PyList_GET_SIZE(params)):
                if not follows(self.objects, PyList_GET_ITEM(params, i), &k):
                    return False
            if not follows(self.objects, <PyObject*> None, &k):
                return False
        self.same_options = self.same_options and at == PyList_GET_SIZE(self.options)
        while PyDict_Next(state, &place, &key, &value):
            if not (follows(self.objects, key, &k) and follows(self.objects, value, &k)):
                return False
            if type(<object> value) is dict:
                if not holds(<object> value, self.objects, &k):
                    return False
        return k == PyList_GET_SIZE(self.objects)

    def look(self, list groups, state):
        cdef Py_ssize_t i, count = PyList_GET_SIZE(self.params)
        descriptor = type(self.grad_of)
        cdef PyTypeObject* getter = <PyTypeObject*> descriptor
        cdef int64_t* words = self.words
        cdef int64_t address
        self.odd = None
        if not self.as_noted(groups, state):
            return None
        grads = []
        for i in range(count):
            param = <object> PyList_GET_ITEM(self.params, i)
            grad = getter.tp_descr_get(self.grad_of, param, type(param))
            grads.append(grad)
            if self.planned[i]:
                if not self.stays(param, words):
                    return None
                address = 0 if grad is None else self.fitting(grad, words)
                if address == -1:
                    self.odd = self.odd or []
                    self.odd.append(i)
                if self.at[i] != address:
                    self.at[i], self.moved = address, True
            elif grad is not None:
                return None
            words += WORDS
        for i in range(PyList_GET_SIZE(self.buffers)):
            if not self.stays(<object> PyList_GET_ITEM(self.buffers, i), words):
                return None
            words += WORDS
        return grads

    cdef int64_t fitting(self, grad, const int64_t* words) except -3:
        """The address of a gradient; -1 if it is not in memory as its parameter."""
        cdef DLTensor view
        if not self.read(grad, &view) or not self.alike(grad, &view, words):
            return -1
        return <int64_t> view.data or -2  # of no elements
