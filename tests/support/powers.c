/* Computes powers, logarithms and cosines of a sample of numbers with fastopt's own functions,
 * prints hashes of their bits, and in how many cases those of the C library differ. .ci/powers
 * builds it for several C libraries, compilers and processors. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "elementary.h"

static uint64_t state;

static uint64_t random_word(void) { /* SplitMix64, Steele et al. 2014 */
  uint64_t z = state += UINT64_C(0x9E3779B97F4A7C15);
  z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
  z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
  return z ^ z >> 31;
}

/* A number from 2**low to 2**high, of either sign if it may be negative. */
static double random_number(int low, int high, int negative) {
  const uint64_t word = random_word(), exponent = 1023 + low + random_word() % (high - low);
  return fastopt_real((word >> 12) | exponent << 52 | (negative ? word << 63 : 0));
}

static const double betas[] = {0.5,  0.8,   0.9,   0.95,   0.96,   0.97,    0.98,
                               0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99999, 0.999999};
static const double roots[] = {-0.8, -0.5, 0.25, 0.3, 0.5, 0.75, 1.5, 2, 3, -1};

static void sample(uint64_t i, double *x, double *y) {
  switch (i % 4) {
  case 0: /* beta**t */
    *x = betas[random_word() % (sizeof betas / sizeof *betas)];
    *y = (double)(1 + random_word() % ((uint64_t)1 << (1 + random_word() % 20)));
    break;
  case 1: /* t**power */
    *x = (double)(1 + random_word() % ((uint64_t)1 << (1 + random_word() % 20)));
    *y = roots[random_word() % (sizeof roots / sizeof *roots)];
    break;
  case 2: /* a small number to any power, also where it underflows */
    *x = random_number(-10, 3, 0);
    *y = random_number(-10, 10, 1);
    break;
  default: /* any number, also one below the smallest normal one */
    *x = random_number(-1022, 1024, 0);
    if (random_word() % 16 == 0)
      *x = fastopt_real(random_word() >> 12);
    *y = random_number(-60, 1, 1);
  }
}

static uint64_t with(uint64_t hash, double result) {
  hash = (hash ^ fastopt_bits(result)) * UINT64_C(0x100000001B3);
  return hash ^ hash >> 29;
}

int main(int count, char **arguments) {
  const uint64_t size = count > 1 ? strtoull(arguments[1], 0, 10) : 100000;
  uint64_t hash = UINT64_C(0xCBF29CE484222325), cosines = hash, powers = 0, often = 0, logarithms = 0;
  for (uint64_t i = 0; i < size; i++) {
    double x, y;
    sample(i, &x, &y);
    const double results[] = {fastopt_power(x, y), fastopt_log(x)};
    hash = with(with(hash, results[0]), results[1]);
    cosines = with(cosines, fastopt_cospi(random_number(-20, 2, 1)));
    volatile double a = x, b = y; /* so that no compiler computes these */
    const int differs = fastopt_bits(pow(a, b)) != fastopt_bits(results[0]);
    powers += differs, often += differs && i % 4 == 0;
    logarithms += fastopt_bits(log(a)) != fastopt_bits(results[1]);
  }
  printf("%016llx", (unsigned long long)hash);
  if (FASTOPT_HAS_COSPI)
    printf(" %016llx", (unsigned long long)cosines);
  printf("\n%llu of %llu powers differ from the C library's, %llu of them beta**t, and %llu "
         "logarithms\n",
         (unsigned long long)powers, (unsigned long long)size, (unsigned long long)often,
         (unsigned long long)logarithms);
  return 0;
}
