/* The arithmetic that fastopt promises its bits for: numbers below the smallest normal one
 * are kept, results are rounded to the nearest number, and nothing traps. A thread may have
 * been told otherwise, as by torch.set_flush_denormal(True) or fesetround(); the threads of
 * a pool keep what they were started with. So each thread that computes enters here before
 * and leaves here after, which takes a few nanoseconds; leaving restores what it had.
 *
 * Both are barriers, too: no load or store moves past them, so neither does what is
 * computed from one memory into another.
 */
#ifndef FASTOPT_ARITHMETIC_H
#define FASTOPT_ARITHMETIC_H

#include <stdint.h>

#if defined(_MSC_VER)
  #include <intrin.h>
  #define FASTOPT_BARRIER() _ReadWriteBarrier()
#elif defined(__GNUC__)
  #define FASTOPT_BARRIER() __asm__ volatile("" ::: "memory")
#else
  #define FASTOPT_BARRIER() ((void) 0)
#endif

#if defined(__SSE2__) || defined(_M_X64)
  #include <xmmintrin.h>
  /* MXCSR: the modes that count, what they are by default; flags of exceptions below. */
  #define FASTOPT_MODES 0xFFC0u
  #define FASTOPT_STANDARD 0x1F80u
  static inline uint64_t fastopt_control(void) { return _mm_getcsr(); }
  static inline void fastopt_set_control(uint64_t word) { _mm_setcsr((unsigned) word); }
#elif defined(__aarch64__) && defined(__GNUC__)
  /* FPCR: all of it is modes, 0 by default. */
  #define FASTOPT_MODES (~(uint64_t) 0)
  #define FASTOPT_STANDARD 0u
  static inline uint64_t fastopt_control(void) {
      uint64_t word;
      __asm__ volatile("mrs %0, fpcr" : "=r"(word));
      return word;
  }
  static inline void fastopt_set_control(uint64_t word) {
      __asm__ volatile("msr fpcr, %0" :: "r"(word));
  }
#else
  #define FASTOPT_MODES 0u
  #define FASTOPT_STANDARD 0u
  static inline uint64_t fastopt_control(void) { return 0; }
  static inline void fastopt_set_control(uint64_t word) { (void) word; }
#endif

/* Sets the standard modes; returns what there was, for fastopt_leave. */
static inline uint64_t fastopt_enter(void) {
    uint64_t word = fastopt_control();
    if ((word & FASTOPT_MODES) != FASTOPT_STANDARD)
        fastopt_set_control((word & ~(uint64_t) FASTOPT_MODES) | FASTOPT_STANDARD);
    FASTOPT_BARRIER();
    return word;
}

static inline void fastopt_leave(uint64_t word) {
    FASTOPT_BARRIER();
    if ((word & FASTOPT_MODES) != FASTOPT_STANDARD)
        fastopt_set_control(word);
}

#endif
