# cython: language_level=3, boundscheck=False, wraparound=False
"""Where a framework's tensors lie, read by DLPack's C exchange API (DLPack 1.3): for a
tenth of what asking each tensor in Python costs. fastopt/torch/memory.py says in Python
what this does, and does it where this or that is missing.
"""
from cpython.dict cimport PyDict_Next
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
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

# A tensor's address, dtype, device, dimensions, and of each its size and stride.
cdef enum:
    MOST_DIMENSIONS = 8
    WORDS = 4 + 2 * MOST_DIMENSIONS
    COMPLEX = 5


cdef ExchangeAPI* exchange(type kind) except NULL:
    capsule = kind.__dlpack_c_exchange_api__
    api = <ExchangeAPI*> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    if api.major != 1 or not api.from_object:
        raise AttributeError(f"{kind} has DLPack's exchange API of another version")
    return api


cdef class Tensors:
    """Parameters and what belongs to them, as they were when a step was planned."""

    cdef ExchangeAPI* api
    cdef list params, keys, values, inner, buffers, held
    cdef bytes planned
    cdef bint hold
    cdef int64_t* words  # of each parameter, then of each buffer
    cdef int64_t[::1] at
    cdef readonly object found
    cdef readonly bint moved
    cdef readonly list odd

    def __cinit__(self, list params, list planned, state, list buffers, bint hold):
        cdef Py_ssize_t i
        self.api = exchange(type(params[0]))
        self.params, self.buffers, self.hold = params, buffers, hold
        self.planned = bytes(planned)
        self.keys, self.values = list(state), list(state.values())
        self.inner = [
            list(value.values()) if type(value) is dict else [] for value in self.values
        ]
        self.held = [None] * len(params)
        self.found = zeros(len(params), "int64")
        self.at = self.found
        self.words = <int64_t*> calloc(
            (len(params) + len(buffers) + 1) * WORDS, sizeof(int64_t)
        )
        if not self.words:
            raise MemoryError("no memory to note where tensors are")
        for i, tensor in enumerate(params + buffers):
            if i >= len(params) or self.planned[i]:
                self.read(tensor, self.words + i * WORDS)

    def __dealloc__(self):
        free(self.words)

    cdef int read(self, tensor, int64_t* words) except -1:
        cdef DLTensor view
        cdef int32_t d
        self.api.from_object(<void*> tensor, &view)
        if view.ndim > MOST_DIMENSIONS:
            raise AttributeError(f"more than {MOST_DIMENSIONS} dimensions")
        words[0] = <int64_t> view.data
        words[1] = view.code << 8 | view.bits
        words[2] = <int64_t> view.device_type << 32 | view.device_id
        words[3] = view.ndim
        for d in range(view.ndim):
            words[4 + 2 * d], words[5 + 2 * d] = view.shape[d], view.strides[d]
        return 0

    cdef bint alike(self, DLTensor* view, const int64_t* words) noexcept:
        """Whether a tensor's elements are in memory as those of a noted one."""
        cdef int32_t d
        cdef bint empty = False, same = True
        if (
            view.ndim != words[3] or (view.code << 8 | view.bits) != words[1]
            or (<int64_t> view.device_type << 32 | view.device_id) != words[2]
        ):
            return False
        for d in range(view.ndim):
            if view.shape[d] != words[4 + 2 * d]:
                return False
            empty |= view.shape[d] == 0
            same &= view.strides[d] == words[5 + 2 * d] or view.shape[d] == 1
        return same or empty

    cdef bint as_noted(self, list lists, state):
        """Whether the parameters and the entries of the state are the same objects."""
        cdef Py_ssize_t i, k = 0, place = 0, inner
        cdef PyObject* key
        cdef PyObject* value
        cdef PyObject* entry
        cdef list params, entries
        for params in lists:
            for i in range(PyList_GET_SIZE(params)):
                if k == PyList_GET_SIZE(self.params):
                    return False
                if PyList_GET_ITEM(params, i) != PyList_GET_ITEM(self.params, k):
                    return False
                k += 1
        if k != PyList_GET_SIZE(self.params):
            return False
        k = 0
        while PyDict_Next(state, &place, &key, &value):
            if k == PyList_GET_SIZE(self.keys):
                return False
            if key != PyList_GET_ITEM(self.keys, k):
                return False
            if value != PyList_GET_ITEM(self.values, k):
                return False
            if type(<object> value) is dict:
                entries, inner, i = self.inner[k], 0, 0
                while PyDict_Next(<object> value, &inner, NULL, &entry):
                    if i == PyList_GET_SIZE(entries):
                        return False
                    if entry != PyList_GET_ITEM(entries, i):
                        return False
                    i += 1
                if i != PyList_GET_SIZE(entries):
                    return False
            k += 1
        return k == PyList_GET_SIZE(self.keys)

    def look(self, list lists, state):
        """The gradients, if all is as it was, or else None.

        ``found`` has their addresses: 0 for None, and -1 for what is not in memory as
        its parameter, whose places ``odd`` has. ``moved``: not all are those of the
        last look.
        """
        cdef Py_ssize_t i, count = PyList_GET_SIZE(self.params)
        cdef int64_t* words = self.words
        cdef int64_t address
        cdef DLTensor view
        self.moved, self.odd = False, None
        if not self.as_noted(lists, state):
            return None
        grads = []
        for i in range(count):
            param = <object> PyList_GET_ITEM(self.params, i)
            grad = param.grad
            grads.append(grad)
            address = 0
            if not self.planned[i]:
                if grad is not None:
                    return None
                words += WORDS
                continue
            self.api.from_object(<void*> param, &view)
            if <int64_t> view.data != words[0] or not self.alike(&view, words):
                return None
            if grad is not None:
                address = self.address_of(grad, i, words)
                if address == -1:
                    self.odd = self.odd or []
                    self.odd.append(i)
            if self.at[i] != address:
                self.at[i], self.moved = address, True
            words += WORDS
        for i in range(PyList_GET_SIZE(self.buffers)):
            self.api.from_object(PyList_GET_ITEM(self.buffers, i), &view)
            if <int64_t> view.data != words[0]:
                return None
            words += WORDS
        return grads

    cdef int64_t address_of(self, grad, Py_ssize_t i, int64_t* words) except -3:
        cdef DLTensor view
        try:
            self.api.from_object(<void*> grad, &view)
        except (RuntimeError, BufferError, NotImplementedError):  # sparse, say
            return -1
        if not self.alike(&view, words):
            return -1
        if <PyObject*> grad != PyList_GET_ITEM(self.held, i):
            # Its memory has the other sign, and DLPack does not say so.
            if grad.is_neg() or (view.code == COMPLEX and grad.is_conj()):
                return -1
            if self.hold:
                self.held[i] = grad
        return <int64_t> view.data or -2  # of no elements
