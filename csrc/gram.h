/* Gram matrices: the products of every two of several arrays, summed up in float64, in
 * one pass. The order is that of all sums (memory/order.py): a chunk's lanes, then these by
 * halves.
 *
 * The arrays go block by block, which stay in the first cache; of a block, a few lanes
 * at a time, so that the sums of all pairs of four arrays, and the four numbers, are in
 * registers: an array's elements are then loaded and made wide once.
 */
#ifndef FASTOPT_GRAM_H
#define FASTOPT_GRAM_H

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
  #if defined(__AVX512F__)
    #define GRAM_WIDTH 8
  #elif defined(__AVX2__)
    #define GRAM_WIDTH 4
  #else
    #define GRAM_WIDTH 2
  #endif
  #define GRAM_INLINE static inline __attribute__((always_inline))
  #define GRAM_UNROLLED _Pragma("GCC unroll 4") for
  #define GRAM_PREFETCH(at) __builtin_prefetch(at)
  typedef double gram_wide __attribute__((vector_size(8 * GRAM_WIDTH)));
  typedef double gram_f64
      __attribute__((vector_size(8 * GRAM_WIDTH), aligned(8), may_alias));
  typedef float gram_f32
      __attribute__((vector_size(4 * GRAM_WIDTH), aligned(4), may_alias));
  #define GRAM_LOAD_f64(at) ((gram_wide) *(const gram_f64 *) (at))
  /* GCC 12's __builtin_convertvector goes through memory. */
  #if defined(__SSE2__)
    #include <immintrin.h>
  #endif
  #if defined(__AVX512F__)
    #define GRAM_LOAD_f32(at) ((gram_wide) _mm512_cvtps_pd(_mm256_loadu_ps(at)))
  #elif defined(__AVX2__)
    #define GRAM_LOAD_f32(at) ((gram_wide) _mm256_cvtps_pd(_mm_loadu_ps(at)))
  #elif defined(__SSE2__)
    #define GRAM_LOAD_f32(at) ((gram_wide) _mm_cvtps_pd( \
        _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *) (at)))))
  #else
    #define GRAM_LOAD_f32(at) \
        __builtin_convertvector(*(const gram_f32 *) (at), gram_wide)
  #endif
#else
  #define GRAM_WIDTH 1
  #define GRAM_INLINE static __forceinline
  #define GRAM_UNROLLED for
  #define GRAM_PREFETCH(at) ((void) (at))
  typedef double gram_wide;
  typedef double gram_f64;
  #define GRAM_LOAD_f64(at) (*(at))
  #define GRAM_LOAD_f32(at) ((double) *(at))
#endif

enum {
    GRAM_LANES = 32,
    GRAM_BLOCK = 16 << 10, /* bytes of all arrays together, but at least so many rows */
    GRAM_ROWS = 4,         /* of lanes, in a block */
    GRAM_AHEAD = 1024      /* elements that are prefetched; a fifth of the time */
};

/* Where the lanes, or the sum, of a pair stand; column <= row. */
#define GRAM_PAIR(row, column) ((row) * ((row) + 1) / 2 + (column))

#define GRAM(real, dtype)                                                             \
                                                                                      \
/* Pairs of at most four arrays with at most four others, or among themselves: whole  \
 * rows of lanes, n elements from `at` on. The counts are known to the compiler. */   \
GRAM_INLINE void gram_tile_##dtype(                                                   \
    const real *const *arrays, int64_t row, const int height, int64_t column,         \
    const int width, const int same, int64_t at, int64_t n, double *lanes             \
) {                                                                                   \
    const real *a[4], *b[4];                                                          \
    double *sums[4];                                                                  \
    GRAM_UNROLLED (int c = 0; c < width; c++)                                         \
        b[c] = arrays[column + c] + at;                                               \
    GRAM_UNROLLED (int r = 0; r < height; r++) {                                      \
        a[r] = arrays[row + r] + at;                                                  \
        sums[r] = lanes + GRAM_PAIR(row + r, column) * GRAM_LANES;                    \
    }                                                                                 \
    for (int lane = 0; lane < GRAM_LANES; lane += GRAM_WIDTH) {                       \
        gram_wide sum[4][4], x[4], y[4];                                              \
        GRAM_UNROLLED (int r = 0; r < height; r++)                                    \
            GRAM_UNROLLED (int c = 0; c < width; c++)                                 \
                if (!same || c <= r)                                                  \
                    sum[r][c] =                                                       \
                        *(const gram_f64 *) (sums[r] + c * GRAM_LANES + lane);        \
        for (int64_t i = lane; i < n; i += GRAM_LANES) {                              \
            GRAM_UNROLLED (int c = 0; c < width; c++) {                               \
                if (same)                                                             \
                    GRAM_PREFETCH(b[c] + i + GRAM_AHEAD);                             \
                y[c] = GRAM_LOAD_##dtype(b[c] + i);                                   \
            }                                                                         \
            GRAM_UNROLLED (int r = 0; r < height; r++) {                              \
                if (same)                                                             \
                    x[r] = y[r];                                                      \
                else                                                                  \
                    x[r] = GRAM_LOAD_##dtype(a[r] + i);                               \
            }                                                                         \
            GRAM_UNROLLED (int r = 0; r < height; r++)                                \
                GRAM_UNROLLED (int c = 0; c < width; c++)                             \
                    if (!same || c <= r)                                              \
                        sum[r][c] += x[r] * y[c];                                     \
        }                                                                             \
        GRAM_UNROLLED (int r = 0; r < height; r++)                                    \
            GRAM_UNROLLED (int c = 0; c < width; c++)                                 \
                if (!same || c <= r)                                                  \
                    *(gram_f64 *) (sums[r] + c * GRAM_LANES + lane) = sum[r][c];      \
    }                                                                                 \
}                                                                                     \
                                                                                      \
static void gram_block_##dtype(                                                       \
    const real *const *arrays, int64_t count, int64_t at, int64_t n, double *lanes    \
) {                                                                                   \
    for (int64_t row = 0; row < count; row += 4) {                                    \
        int64_t end = row + 4 < count ? row + 4 : count;                              \
        for (int64_t column = 0; column < row; column += 4) {                         \
            int64_t r = row;                                                          \
            for (; r + 2 <= end; r += 2)                                              \
                gram_tile_##dtype(arrays, r, 2, column, 4, 0, at, n, lanes);          \
            if (r < end)                                                              \
                gram_tile_##dtype(arrays, r, 1, column, 4, 0, at, n, lanes);          \
        }                                                                             \
        switch (end - row) {                                                          \
        case 1: gram_tile_##dtype(arrays, row, 1, row, 1, 1, at, n, lanes); break;    \
        case 2: gram_tile_##dtype(arrays, row, 2, row, 2, 1, at, n, lanes); break;    \
        case 3: gram_tile_##dtype(arrays, row, 3, row, 3, 1, at, n, lanes); break;    \
        default: gram_tile_##dtype(arrays, row, 4, row, 4, 1, at, n, lanes);          \
        }                                                                             \
    }                                                                                 \
}                                                                                     \
                                                                                      \
/* The sums over a chunk: n elements from `start` on. There must be room for the      \
 * lanes of all pairs. */                                                             \
static void gram_chunk_##dtype(                                                       \
    const real *const *arrays, int64_t count, int64_t start, int64_t n,               \
    double *lanes, double *sums                                                       \
) {                                                                                   \
    int64_t pairs = GRAM_PAIR(count, 0), whole = n / GRAM_LANES * GRAM_LANES;         \
    int64_t rows = GRAM_BLOCK / (int64_t) (count * sizeof(real) * GRAM_LANES);        \
    int64_t block = (rows > GRAM_ROWS ? rows : GRAM_ROWS) * GRAM_LANES;               \
    memset(lanes, 0, pairs * GRAM_LANES * sizeof(double));                            \
    for (int64_t at = 0; at < whole; at += block) {                                   \
        int64_t here = whole - at < block ? whole - at : block;                       \
        gram_block_##dtype(arrays, count, start + at, here, lanes);                   \
    }                                                                                 \
    for (int64_t row = 0; row < count; row++)                                         \
        for (int64_t column = 0; column <= row; column++) {                           \
            double *sum = lanes + GRAM_PAIR(row, column) * GRAM_LANES;                \
            const real *a = arrays[row] + start + whole;                              \
            const real *b = arrays[column] + start + whole;                           \
            for (int64_t j = 0; j < n - whole; j++)                                   \
                sum[j] += (double) a[j] * (double) b[j];                              \
            for (int half = GRAM_LANES / 2; half; half /= 2)                          \
                for (int j = 0; j < half; j++)                                        \
                    sum[j] += sum[j + half];                                          \
            sums[GRAM_PAIR(row, column)] = sum[0];                                    \
        }                                                                             \
}

GRAM(float, f32)
GRAM(double, f64)

#endif
