# cython: language_level=3, boundscheck=False, wraparound=False
"""Whether tensors are where they were, as ``Tensors`` in fastopt/torch/memory.py says it
in Python, at a sixtieth of the time: by what PyTorch keeps in memory, or else by
DLPack's C exchange API (DLPack 1.3), and by the addresses of what Python's dicts and lists
hold.
"""
from cython cimport critical_section
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

# What is noted of a tensor: its address, dtype, device, number of dimensions, flags and
# dispatch keys; from INNER on, the addresses of its TensorImpl, of its storage and of the
# storage's data, its offset there, PyTorch's dtype, and how many elements of the storage it
# spans; and the size and the stride of each dimension. If PyTorch is to be asked, the
# address of the TensorImpl is 0.
cdef enum:
    MOST_DIMENSIONS = 8
    INLINE_DIMENSIONS = 5  # of more, the sizes lie elsewhere
    INNER = 6
    STORAGE, DATA, OFFSET, DTYPE, EXTENT, DIMENSIONS
    WORDS = DIMENSIONS + 2 * MOST_DIMENSIONS
    COMPLEX = 5
    NEGATED = 1
    CONJUGATED = 2

# Where PyTorch keeps what a tensor is, in words: a Layout of fastopt/torch/layout.py. If it
# is not known, ``inner`` is 0.
cdef struct Layout:
    Py_ssize_t inner, keys, storage, ndim, sizes, strides, offset, dtype
    uint64_t dtype_bits
    Py_ssize_t data, nbytes, deleter
    uint64_t of_copies

cdef extern from *:
    """
    #if defined(__GNUC__)
      #define fastopt_publish(place, value) \\
        __atomic_store_n(place, value, __ATOMIC_RELEASE)
    #else  /* MSVC does not move a store to before others */
      #define fastopt_publish(place, value) \\
        (*(volatile Py_ssize_t *) (place) = (value))
    #endif
    """
    void publish "fastopt_publish" (Py_ssize_t* place, Py_ssize_t value) noexcept nogil

cdef Layout layout
# The dispatch keys of tensors on the CPU, and the words of their dtypes.
cdef uint64_t cpu_keys, float32, float64


def know(found, of_float, of_double):
    """Take over the layout, and what tensors of float32 and float64 have there. Without
    the GIL, other threads may look at tensors meanwhile; they take the layout for unknown
    until all of it is there."""
    global cpu_keys, float32, float64
    cdef Py_ssize_t inner
    (
        inner, layout.keys, layout.storage, layout.ndim, layout.sizes, layout.strides,
        layout.offset, layout.dtype, layout.dtype_bits, layout.data, layout.nbytes,
        layout.deleter, layout.of_copies,
    ) = found
    cpu_keys = word_of(of_float, inner)[layout.keys]
    float32 = word_of(of_float, inner)[layout.dtype] & layout.dtype_bits
    float64 = word_of(of_double, inner)[layout.dtype] & layout.dtype_bits
    publish(&layout.inner, inner)


cdef inline const uint64_t* word_of(tensor, Py_ssize_t place) noexcept:
    """The address in a word of a Python object."""
    return <const uint64_t*> <size_t> (<const uint64_t*> <void*> tensor)[place]


cdef inline const uint64_t* inner_of(tensor) noexcept:
    """A tensor's TensorImpl."""
    return word_of(tensor, layout.inner)


cdef inline const uint64_t* storage_of(const uint64_t* inner) noexcept:
    return <const uint64_t*> <size_t> inner[layout.storage]


cdef inline uint64_t data_of(const uint64_t* inner) noexcept:
    """The address of the data in a tensor's storage; 0 if it has none, or if torch is to
    copy it before it is written to."""
    cdef const uint64_t* storage = <const uint64_t*> <size_t> inner[layout.storage]
    if not storage or storage[layout.deleter] == layout.of_copies:
        return 0
    return storage[layout.data]


cdef inline int64_t keys_of(tensor) noexcept:
    """A tensor's dispatch keys, which say whether a view is to be negated when it is
    read, and DLPack does not; 0 if it is not known where they are."""
    return <int64_t> inner_of(tensor)[layout.keys] if layout.inner else 0


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
    cdef bint same = True
    with critical_section(dict_):
        while same and PyDict_Next(dict_, &at, NULL, &value):
            same = follows(objects, value, place)
    return same


cdef bint has(list params, list objects, Py_ssize_t* place):
    """Whether a list has these objects, from a place on, which moves on."""
    cdef Py_ssize_t i
    cdef bint same = True
    with critical_section(params):
        for i in range(PyList_GET_SIZE(params)):
            if not follows(objects, PyList_GET_ITEM(params, i), place):
                same = False
                break
    return same


cdef uint64_t simple_dtype(tensor) noexcept:
    """The dtype of a tensor of float32 or float64 on the CPU, whose elements lie in its
    storage as C orders them; 0 for another one, or if torch is to be asked."""
    cdef const uint64_t* inner = inner_of(tensor)
    cdef uint64_t dtype = inner[layout.dtype] & layout.dtype_bits, count = 1
    cdef Py_ssize_t d
    if (
        inner[layout.keys] != cpu_keys or (dtype != float32 and dtype != float64)
        or inner[layout.ndim] > INLINE_DIMENSIONS or not data_of(inner)
    ):
        return 0
    for d in reversed(range(<Py_ssize_t> inner[layout.ndim])):
        if inner[layout.strides + d] != count and inner[layout.sizes + d] != 1:
            return 0
        count *= inner[layout.sizes + d]
    count = (count + inner[layout.offset]) * (4 if dtype == float32 else 8)
    return dtype if count <= storage_of(inner)[layout.nbytes] else 0


cdef bint has_sizes_of(tensor, other) noexcept:
    cdef const uint64_t* a = inner_of(tensor)
    cdef const uint64_t* b = inner_of(other)
    cdef Py_ssize_t d
    if a[layout.ndim] != b[layout.ndim]:
        return False
    for d in range(<Py_ssize_t> a[layout.ndim]):
        if a[layout.sizes + d] != b[layout.sizes + d]:
            return False
    return True


def simple(list params, list grads, tuple kinds):
    """For each parameter, whether it is of one of these types, contiguous, on the CPU and
    of float32 or float64, and its gradient likewise, if there is one."""
    cdef Py_ssize_t i
    cdef uint64_t dtype
    found = bytearray(len(params))
    for i in range(len(params) if layout.inner else 0):
        param, grad = params[i], grads[i]
        if type(param) not in kinds:
            continue
        dtype = simple_dtype(param)
        found[i] = dtype != 0 and (
            grad is None
            or (
                type(grad) in kinds and simple_dtype(grad) == dtype
                and has_sizes_of(grad, param)
            )
        )
    return found


cdef void note_inner(const uint64_t* inner, int64_t* words) noexcept:
    """Note where PyTorch keeps a tensor, after what it is has been noted."""
    cdef int64_t d
    cdef const int64_t* sizes = words + DIMENSIONS
    words[STORAGE] = <int64_t> inner[layout.storage]
    words[DATA] = <int64_t> data_of(inner)
    words[OFFSET] = <int64_t> inner[layout.offset]
    words[DTYPE] = <int64_t> (inner[layout.dtype] & layout.dtype_bits)
    words[EXTENT] = 1
    for d in range(words[3]):
        words[EXTENT] += (sizes[2 * d] - 1) * sizes[2 * d + 1]
    for d in range(words[3]):
        if sizes[2 * d] == 0:  # it spans nothing, whatever its strides are
            words[EXTENT] = 0
    words[INNER] = <int64_t> <size_t> inner


cdef inline bint is_like(const uint64_t* inner, const int64_t* words) noexcept:
    """Whether a tensor's elements are in memory as those of a noted one."""
    cdef int64_t d
    cdef const int64_t* sizes = words + DIMENSIONS
    if (
        inner[layout.keys] != <uint64_t> words[5]
        or inner[layout.ndim] != <uint64_t> words[3]
        or (inner[layout.dtype] & layout.dtype_bits) != <uint64_t> words[DTYPE]
    ):
        return False
    for d in range(words[3]):
        if <int64_t> inner[layout.sizes + d] != sizes[2 * d]:
            return False
        if <int64_t> inner[layout.strides + d] != sizes[2 * d + 1] and sizes[2 * d] != 1:
            return False
    return True


cdef inline bint is_as_noted(const uint64_t* inner, const int64_t* words) noexcept:
    """Whether a noted tensor is where it was, and lies there as it did."""
    return (
        <int64_t> <size_t> inner == words[INNER]
        and <int64_t> inner[layout.storage] == words[STORAGE]
        and <int64_t> data_of(inner) == words[DATA]
        and <int64_t> inner[layout.offset] == words[OFFSET]
        and is_like(inner, words)
    )


cdef inline int64_t address_like(const uint64_t* inner, const int64_t* words) noexcept:
    """The address of a tensor that lies in memory as a noted one; 0 if it does not, or
    if torch is to be asked; -1 if its storage was made too small for it."""
    cdef int64_t data, itemsize = (words[1] & 0xFF) // 8
    if not is_like(inner, words):
        return 0
    data = <int64_t> data_of(inner)
    if (
        data and <int64_t> storage_of(inner)[layout.nbytes]
        < (<int64_t> inner[layout.offset] + words[EXTENT]) * itemsize
    ):
        return -1
    return data + <int64_t> inner[layout.offset] * itemsize if data else 0


cdef class Tensors:
    cdef ExchangeAPI* api
    cdef list params, options, buffers
    cdef list objects  # the parameters, with None after each group, and the state
    cdef list specs  # the DTensorSpec of each parameter that is a DTensor; or None
    cdef object divided_alike  # whether a gradient has the placements of a parameter
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
        self, list params, list planned, list groups, state, list buffers, bint single,
        list specs, divided_alike
    ):
        cdef Py_ssize_t i
        cdef DLTensor view
        self.api = exchange(type(params[0]))
        self.params, self.buffers = params, buffers
        self.single, self.specs, self.divided_alike = single, specs, divided_alike
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
            if specs is not None and i < len(params) and specs[i] is not None:
                tensor = tensor._local_tensor
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
        for d in range(view.ndim):
            words[DIMENSIONS + 2 * d] = view.shape[d]
            words[DIMENSIONS + 2 * d + 1] = view.strides[d]
        if layout.inner and view.ndim <= INLINE_DIMENSIONS and data_of(inner_of(tensor)):
            note_inner(inner_of(tensor), words)
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
        if words[INNER] and is_as_noted(inner_of(tensor), words):
            return True
        return (
            self.read(tensor, &view)
            and <int64_t> view.data == words[0]
            and self.alike(tensor, &view, words)
        )

    cdef bint as_noted(self, list groups, state):
        """Whether the parameters and the entries of the state are the same objects."""
        cdef Py_ssize_t k = 0, place = 0, at = 0
        cdef PyObject* key
        cdef PyObject* value
        cdef bint same = True
        self.same_options = True
        for group in groups:
            self.same_options = self.same_options and holds(group, self.options, &at)
            if self.single:
                continue
            if not has(group["params"], self.objects, &k):
                return False
            if not follows(self.objects, <PyObject*> None, &k):
                return False
        self.same_options = self.same_options and at == PyList_GET_SIZE(self.options)
        with critical_section(state):
            while same and PyDict_Next(state, &place, &key, &value):
                same = follows(self.objects, key, &k) and follows(self.objects, value, &k)
                if same:
                    entry = <object> value  # ours, so that it outlives its place there
                    if type(entry) is dict:
                        same = holds(entry, self.objects, &k)
        return same and k == PyList_GET_SIZE(self.objects)

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
            if self.specs is not None and <object> PyList_GET_ITEM(self.specs, i) is not None:
                grad = self.shard_of(grad, param, i)
                param = param._local_tensor
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

    cdef object shard_of(self, grad, param, Py_ssize_t i):
        """The shard of a DTensor's gradient. A gradient with other placements than its
        parameter is returned itself; it has no memory, so it is odd."""
        if grad is None or type(grad) is not type(param):
            return grad
        if grad._spec is not self.specs[i] and not self.divided_alike(grad, param):
            return grad
        return grad._local_tensor

    cdef int64_t fitting(self, grad, const int64_t* words) except -3:
        """The address of a gradient; -1 if it is not in memory as its parameter, -2 if it
        has no elements."""
        cdef DLTensor view
        cdef int64_t address = words[INNER] and address_like(inner_of(grad), words)
        if address:
            return address
        if not self.read(grad, &view) or not self.alike(grad, &view, words):
            return -1
        return <int64_t> view.data or -2  # of no elements
