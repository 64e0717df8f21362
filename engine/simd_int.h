/* simd_int.h - what the files with vector code share: attributes and loop unrolling.
 *
 * Kernels are written as always-inlined bodies whose block sizes are literals at the call.  Their
 * loops must be unrolled completely, or arrays of accumulators end up in memory. */
#ifndef ENGINE_SIMD_INT_H
#define ENGINE_SIMD_INT_H

#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

#if defined(__x86_64__)
#include <immintrin.h>

/* The vector is here, in a register.  gcc joins the additions of integer sums over unrolled steps,
 * and then has too few registers for what it gained; clang does not. */
#if defined(__clang__)
#define IN_PLACE(v) (void)(v)
#else
#define IN_PLACE(v) __asm__("" : "+x"(v))
#endif

/* What ISA_AVX2 and ISA_AVX512 stand for; isa_select() checks the same lists. */
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")))
#endif

#endif
