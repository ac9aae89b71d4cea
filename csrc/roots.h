/* Square roots by multiplication, because AVX-512 kernels need the divider for quotients.
 * fastopt_roots() replaces a group of numbers by their roots, with the bits of sqrtf(). An
 * estimate of 14 bits takes one step of Newton's method; then the remainder, which a fused
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

  /* So many vectors of a group are left to the divider, which is idle otherwise. */
  #define FASTOPT_VECTORS (FASTOPT_GROUP / 16)
  #define FASTOPT_DIVIDED (FASTOPT_VECTORS / 2)

  static inline void fastopt_roots(float *numbers) {
      /* From 2**-100 on, remainders are normal numbers. Zeros are common, too. */
      const __m512i least = _mm512_set1_epi32(0x0D800000);
      const __m512i infinity = _mm512_set1_epi32(0x7F800000);
      const __m512 half = _mm512_set1_ps(0.5f);
      __m512i low = infinity, high = least;
      __m512 x[FASTOPT_VECTORS];
      __mmask16 positive[FASTOPT_VECTORS], odd;
      int i;
      for (i = 0; i < FASTOPT_VECTORS; i++) {
          x[i] = _mm512_loadu_ps(numbers + 16 * i);
          if (i < FASTOPT_DIVIDED) {
              _mm512_storeu_ps(numbers + 16 * i, _mm512_sqrt_ps(x[i]));
          } else {
              __m512i bits = _mm512_castps_si512(x[i]);
              positive[i] = _mm512_test_epi32_mask(bits, bits);
              low = _mm512_mask_min_epu32(low, positive[i], low, bits);
              high = _mm512_max_epu32(high, bits);
          }
      }
      odd = _mm512_cmplt_epu32_mask(low, least) | _mm512_cmpge_epu32_mask(high, infinity);
      if (__builtin_expect(odd != 0, 0)) {
          for (i = FASTOPT_DIVIDED; i < FASTOPT_VECTORS; i++)
              _mm512_storeu_ps(numbers + 16 * i, _mm512_sqrt_ps(x[i]));
          return;
      }
      for (i = FASTOPT_DIVIDED; i < FASTOPT_VECTORS; i++) {
          __m512 inverse = _mm512_maskz_rsqrt14_ps(positive[i], x[i]);
          __m512 root = _mm512_mul_ps(x[i], inverse);
          __m512 error;
          inverse = _mm512_mul_ps(inverse, half);
          error = _mm512_fnmadd_ps(root, inverse, half);
          root = _mm512_fmadd_ps(root, error, root);
          inverse = _mm512_fmadd_ps(inverse, error, inverse);
          error = _mm512_fnmadd_ps(root, root, x[i]);
          _mm512_storeu_ps(numbers + 16 * i, _mm512_fmadd_ps(error, inverse, root));
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
