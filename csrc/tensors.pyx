# cython: language_level=3, boundscheck=False, wraparound=False
"""Whether tensors are where they were, as ``Tensors`` in fastopt/torch/memory.py says it
in Python, at a tenth of the time: by DLPack's C exchange API (DLPack 1.3), and by the
addresses of what Python's dicts and lists hold.
"""
from cpython.dict cimport PyDict_Next
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject, PyTypeObject
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


cdef list entries_of(dicts):
    """What dicts hold, one after the other."""
    return [value for entries in dicts for value in entries.values()]


cdef bint holds(dict_, list values, Py_ssize_t* place):
    """Whether a dict's values are these objects, from a place on, which moves on."""
    cdef Py_ssize_t at = 0
    cdef PyObject* value
    while PyDict_Next(dict_, &at, NULL, &value):
        if place[0] == PyList_GET_SIZE(values):
            return False
        if value != PyList_GET_ITEM(values, place[0]):
            return False
        place[0] += 1
    return True


cdef class Tensors:
    cdef ExchangeAPI* api
    cdef list params, counts, options, keys, values, entries, buffers, held
    cdef object grad_of, address_of
    cdef bytes planned
    cdef bint single, hold
    cdef int64_t* words  # of each parameter, then of each buffer
    cdef int64_t[::1] at
    cdef readonly object found
    cdef public bint moved
    cdef readonly bint same_options
    cdef readonly list odd

    def __cinit__(
        self, list params, list planned, list groups, state, list buffers,
        bint single, bint hold,
    ):
        cdef Py_ssize_t i
        self.api = exchange(type(params[0]))
        self.params, self.buffers = params, buffers
        self.single, self.hold = single, hold
        self.planned = bytes(planned)
        self.note(groups)
        self.keys, self.values = list(state), list(state.values())
        self.entries = entries_of([v for v in self.values if type(v) is dict])
        self.held = [None] * len(params)
        # What reads the attribute, without looking for it each time.
        self.grad_of, self.address_of = type(params[0]).grad, type(params[0]).data_ptr
        for param in params:
            if type(param).grad is not self.grad_of:
                raise AttributeError("parameters with gradients of different kinds")
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

    def note(self, list groups):
        self.options = entries_of(groups)
        self.counts = [len(group["params"]) for group in groups]

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

    cdef bint as_noted(self, list groups, state):
        """Whether the parameters and the entries of the state are the same objects."""
        cdef Py_ssize_t g, i, k = 0, place = 0, at = 0
        cdef PyObject* key
        cdef PyObject* value
        cdef list params
        self.same_options = True
        if PyList_GET_SIZE(groups) != PyList_GET_SIZE(self.counts):
            return False
        for g, group in enumerate(groups):
            if self.same_options and not holds(group, self.options, &at):
                self.same_options = False
            if self.single:
                continue
            params = group["params"]
            if PyList_GET_SIZE(params) != <Py_ssize_t> self.counts[g]:
                return False
            for i in range(PyList_GET_SIZE(params)):
                if k == PyList_GET_SIZE(self.params):
                    return False
                if PyList_GET_ITEM(params, i) != PyList_GET_ITEM(self.params, k):
                    return False
                k += 1
        if k != PyList_GET_SIZE(self.params) and not self.single:
            return False
        if at != PyList_GET_SIZE(self.options):
            self.same_options = False
        k = at = 0
        while PyDict_Next(state, &place, &key, &value):
            if (
                k == PyList_GET_SIZE(self.keys)
                or key != PyList_GET_ITEM(self.keys, k)
                or value != PyList_GET_ITEM(self.values, k)
            ):
                return False
            if type(<object> value) is dict:
                if not holds(<object> value, self.entries, &at):
                    return False
            k += 1
        return k == PyList_GET_SIZE(self.keys) and at == PyList_GET_SIZE(self.entries)

    def look(self, list groups, state):
        cdef Py_ssize_t i, count = PyList_GET_SIZE(self.params)
        descriptor = type(self.grad_of)
        cdef PyTypeObject* getter = <PyTypeObject*> descriptor
        cdef int64_t* words = self.words
        cdef int64_t address
        cdef DLTensor view
        self.odd = None
        if not self.as_noted(groups, state):
            return None
        grads = []
        for i in range(count):
            param = <object> PyList_GET_ITEM(self.params, i)
            grad = getter.tp_descr_get(self.grad_of, param, type(param))
            grads.append(grad)
            address = 0
            if (
                grad is not None
                and <PyObject*> grad == PyList_GET_ITEM(self.held, i)
                and <int64_t> self.address_of(grad) == self.at[i]
            ):
                if <int64_t> self.address_of(param) != words[0]:
                    return None
            elif self.planned[i]:
                self.api.from_object(<void*> param, &view)
                if <int64_t> view.data != words[0] or not self.alike(&view, words):
                    return None
                if grad is not None:
                    address = self.fitting(grad, i, words)
                    if address == -1:
                        self.odd = self.odd or []
                        self.odd.append(i)
                if self.at[i] != address:
                    self.at[i], self.moved = address, True
            elif grad is not None:
                return None
            words += WORDS
        for i in range(PyList_GET_SIZE(self.buffers)):
            self.api.from_object(PyList_GET_ITEM(self.buffers, i), &view)
            if <int64_t> view.data != words[0]:
                return None
            words += WORDS
        return grads

    cdef int64_t fitting(self, grad, Py_ssize_t i, int64_t* words) except -3:
        """The address of a gradient; -1 if it is not in memory as its parameter."""
        cdef DLTensor view
        try:
            self.api.from_object(<void*> grad, &view)
        except (RuntimeError, BufferError, NotImplementedError):  # sparse, say
            return -1
        # DLPack does not say whether a view is to be negated when it is read.
        if (
            not self.alike(&view, words)
            or grad.is_neg()
            or (view.code == COMPLEX and grad.is_conj())
        ):
            return -1
        if self.hold:
            self.held[i] = grad
        return <int64_t> view.data or -2  # of no elements
