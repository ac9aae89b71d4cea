/* Square roots for AVX-512 kernels: half of them by multiplication, half by the divider, so
 * that both are busy. fastopt_roots() replaces a group of FASTOPT_GROUP numbers, a multiple of
 * 32, by their roots, with the bits of sqrtf(). By multiplication, an estimate of 14 bits takes one step of Newton's method; then the remainder, which a fused
 * multiply-add computes without an error, corrects the last bit. tests/kernels/test_roots.py
 * compares every float with sqrtf(), and shows that any estimate with an error below 2**-14
 * gives the same root, because processors may differ in it. Kernels call this function where
 * FASTOPT_FAST_ROOTS is 1. With AVX2, whose estimates have 12 bits, it is slower than the
 * divider (docs/performance.md).
 */
#ifndef FASTOPT_ROOTS_H
#define FASTOPT_ROOTS_H

#include <math.h>

#if defined(__AVX512F__) && defined(__GNUC__)
  #define FASTOPT_FAST_ROOTS 1
  #include <immintrin.h>

  /* Vectors of a group, and how many of them the divider takes. */
  #define FASTOPT_VECTORS (FASTOPT_GROUP / 16)
  #define FASTOPT_DIVIDED (FASTOPT_VECTORS / 2)

  static inline void fastopt_roots(float *numbers) {
      /* From 2**-100 on, remainders are normal numbers. Zeros are common, too. All else goes
       * to the divider: as words, negative numbers and NaN are above infinity. */
      const __m512i least = _mm512_set1_epi32(0x0D800000);
      const __m512i infinity = _mm512_set1_epi32(0x7F800000);
      const __m512 half = _mm512_set1_ps(0.5f);
      __m512i low = infinity, high = least;
      __m512 x[FASTOPT_VECTORS];
      __mmask16 nonzero[FASTOPT_VECTORS], unusual;
      int i;
      for (i = 0; i < FASTOPT_VECTORS; i++) {
          x[i] = _mm512_loadu_ps(numbers + 16 * i);
          if (i < FASTOPT_DIVIDED) {
              _mm512_storeu_ps(numbers + 16 * i, _mm512_sqrt_ps(x[i]));
          } else {
              __m512i bits = _mm512_castps_si512(x[i]);
              nonzero[i] = _mm512_test_epi32_mask(bits, bits);
              low = _mm512_mask_min_epu32(low, nonzero[i], low, bits);
              high = _mm512_max_epu32(high, bits);
          }
      }
      unusual = _mm512_cmplt_epu32_mask(low, least) | _mm512_cmpge_epu32_mask(high, infinity);
      if (__builtin_expect(unusual != 0, 0)) {
          for (i = FASTOPT_DIVIDED; i < FASTOPT_VECTORS; i++)
              _mm512_storeu_ps(numbers + 16 * i, _mm512_sqrt_ps(x[i]));
          return;
      }
      for (i = FASTOPT_DIVIDED; i < FASTOPT_VECTORS; i++) {
          __m512 inverse = _mm512_maskz_rsqrt14_ps(nonzero[i], x[i]);
          __m512 root = _mm512_mul_ps(x[i], inverse);
          __m512 slope = _mm512_mul_ps(inverse, half); /* 1 / (2 * root) */
          __m512 error = _mm512_fnmadd_ps(root, slope, half);
          root = _mm512_fmadd_ps(root, error, root);
          slope = _mm512_fmadd_ps(slope, error, slope);
          error = _mm512_fnmadd_ps(root, root, x[i]);
          _mm512_storeu_ps(numbers + 16 * i, _mm512_fmadd_ps(error, slope, root));
      }
  }
#else
  #define FASTOPT_FAST_ROOTS 0
  static inline void fastopt_roots(float *numbers) {
      int i;
      for (i = 0; i < FASTOPT_GROUP; i++)
          numbers[i] = sqrtf(numbers[i]);
  }
#endif

#endif
