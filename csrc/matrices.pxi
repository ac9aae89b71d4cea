# Gram matrices of the gradients of several tasks, and the squares of gradients by row and
# by column.

cdef inline int64_t pair_of(int64_t row, int64_t column) noexcept nogil:
    """The index of the sum of a pair of arrays; column <= row."""
    return row * (row + 1) // 2 + column


cdef struct Gram:
    const int64_t* arrays
    gram_t kernel
    int64_t count, length, chunks, share
    double* sums
    double* lanes


cdef void gram_part(void* work, int k) noexcept nogil:
    """Sum up the chunks of a part."""
    cdef const Gram* gram = <const Gram*> work
    cdef int64_t c, start, pairs = pair_of(gram.count, 0)
    cdef uint64_t modes = fastopt_enter()
    for c in range(k * gram.share, min(gram.chunks, (k + 1) * gram.share)):
        start = c * CHUNK
        gram.kernel(
            gram.arrays, gram.count, start, min(<int64_t> CHUNK, gram.length - start),
            gram.lanes + k * pairs * LANES, gram.sums + c * pairs,
        )
    fastopt_leave(modes)


def gram(Kernels kernels, list addresses, int64_t length, bint double, int threads):
    """Return the products of every two arrays, a symmetric matrix. The arrays have ``length``
    elements."""
    cdef Job job
    cdef Gram work
    cdef int64_t count = len(addresses), pairs = pair_of(count, 0), i, j
    cdef int parts = threads if count * length >= SERIAL_BELOW else 1
    memset(&job, 0, sizeof(job))
    work.kernel = kernels.tools[double].gram
    work.count, work.length, work.chunks = count, length, chunks_of(length)
    work.share = (work.chunks + parts - 1) // parts
    cdef int64_t* arrays = <int64_t*> malloc(count * sizeof(int64_t))
    work.sums = <double*> malloc((work.chunks * pairs + 1) * sizeof(double))
    work.lanes = <double*> malloc(parts * pairs * LANES * sizeof(double))
    try:
        if not (arrays and work.sums and work.lanes):
            raise MemoryError("no memory for sums")
        for i in range(count):
            arrays[i] = addresses[i]
        work.arrays = arrays
        with nogil:
            in_parts(&job, parts, gram_part, &work)
        products = empty((count, count))
        for i in range(count):
            for j in range(i + 1):
                products[i, j] = products[j, i] = in_chunks(
                    work.sums + pair_of(i, j), pairs, work.chunks
                )
        return products
    finally:
        free(arrays)
        free(work.sums)
        free(work.lanes)


# The tiles of a segment, matrix by matrix and row by row. The sums by row of a tile follow
# those of the tiles to its left, the sums by column those of the tiles above it.
cdef struct Tiles:
    Job* job
    int64_t r, height, width, across, down, matrices, share
    double* by_row
    double* by_column


cdef void square_made(
    const Job* job, int64_t r, int64_t first, int64_t width, int64_t rows,
    int64_t columns, const char* limits, double* to_row, double* to_column
) noexcept nogil:
    """Sum up a tile of gradients that must be made, row by row."""
    cdef int64_t i, j
    cdef double* scratch = fastopt_scratch  # also of what is decoded, before by_column
    cdef double* by_column = fastopt_scratch + TILE_COLUMNS
    memset(to_column, 0, columns * sizeof(double))
    for i in range(rows):
        if job.task_count:
            combine_limited(
                job, r, first + i * width, columns, NULL, <char*> scratch
            )
        else:
            load_block(job, r, 1, first + i * width, columns, <char*> scratch)
        job.tools.squares(scratch, columns, 1, columns, limits, to_row + i, by_column)
        for j in range(columns):
            to_column[j] += by_column[j]


cdef void tiles_part(void* work, int part) noexcept nogil:
    cdef const Tiles* tiles = <const Tiles*> work
    cdef const Job* job = tiles.job
    cdef const int64_t* row = job.table + tiles.r * job.columns
    cdef int64_t height = tiles.height, width = tiles.width
    cdef int64_t count = tiles.matrices * tiles.across * tiles.down
    cdef int64_t k, matrix, i, j, rows, columns, first
    cdef double* to_row
    cdef double* to_column
    cdef uint64_t modes = fastopt_enter()
    for k in range(part * tiles.share, min(count, (part + 1) * tiles.share)):
        matrix, j = k // (tiles.across * tiles.down), k % tiles.across
        i = k // tiles.across % tiles.down
        rows = min(<int64_t> TILE_ROWS, height - i * TILE_ROWS)
        columns = min(<int64_t> TILE_COLUMNS, width - j * TILE_COLUMNS)
        first = (matrix * height + i * TILE_ROWS) * width + j * TILE_COLUMNS
        to_row = tiles.by_row + (j * tiles.matrices + matrix) * height + i * TILE_ROWS
        to_column = (
            tiles.by_column + (i * tiles.matrices + matrix) * width + j * TILE_COLUMNS
        )
        if job.task_count or stream_of(job, tiles.r, 1).load:
            square_made(
                job, tiles.r, first, width, rows, columns, limits_of(job, row), to_row,
                to_column,
            )
        else:
            job.tools.squares(
                <char*> row[1] + first * job.itemsize, width, rows, columns,
                limits_of(job, row), to_row, to_column,
            )
    fastopt_leave(modes)


cdef squares_of(Job* job, int64_t r):
    """The sums by row and by column of a segment's squares."""
    cdef Tiles tiles
    cdef int64_t length = job.table[(r + 1) * job.columns - 2], to_row, to_column
    cdef int parts = job.threads if length >= SERIAL_BELOW else 1
    tiles.job, tiles.r = job, r
    tiles.height, tiles.width = stream_of(job, r, 2).parts[2], stream_of(job, r, 2).parts[3]
    tiles.across = (tiles.width + TILE_COLUMNS - 1) // TILE_COLUMNS
    tiles.down = (tiles.height + TILE_ROWS - 1) // TILE_ROWS
    tiles.matrices = length // (tiles.height * tiles.width)
    tiles.share = (tiles.matrices * tiles.across * tiles.down + parts - 1) // parts
    by_row = empty((tiles.across, tiles.matrices, tiles.height))
    by_column = empty((tiles.down, tiles.matrices, tiles.width))
    to_row, to_column = by_row.ctypes.data, by_column.ctypes.data
    tiles.by_row, tiles.by_column = <double*> to_row, <double*> to_column
    with nogil:
        in_parts(job, parts, tiles_part, &tiles)
    return in_order(by_row), in_order(by_column)
